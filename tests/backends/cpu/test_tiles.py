# SPDX-License-Identifier: Apache-2.0
"""Matrix tiles: the emulation that machines without them test has the processor's bits."""

import hashlib
import os
import subprocess
import sys

import pytest
import torch

import mvit_kernels
from mvit_kernels.backends import cpu
from support import TESTS
from support.cases import call, convert, make
from support.native import skip_without_a_compiler
from support.networks import Draw, chain, native

skip_without_a_compiler()

CONVOLUTIONS = (
    # in, out, kernel, stride, dilation, height, width
    (3, 16, 3, 2, 1, 24, 34),  # an image, whose kernel rows are one step each
    (3, 17, 3, 1, 2, 9, 20),
    (4, 8, 1, 1, 1, 5, 3),
    (40, 48, 1, 1, 1, 3, 11),
    (32, 64, 3, 1, 1, 8, 8),
    (34, 70, 3, 2, 1, 17, 39),
    (64, 32, 3, 1, 6, 12, 40),  # which leaves out taps
)
INVERTED_RESIDUALS = (
    # in, hidden, out, stride, dilation, height, width
    (16, 64, 16, 1, 1, 9, 35),
    (24, 50, 40, 2, 1, 16, 16),
    (5, 33, 5, 1, 2, 7, 5),
    (64, 256, 96, 2, 1, 12, 70),
    (32, 512, 32, 1, 1, 5, 8),
)


TRANSFORMERS = (
    dict(shape=(1, 12, 14, 64), heads=4, patch=(2, 2), layers=2),
    dict(shape=(2, 6, 34, 72), heads=2, patch=(1, 1), layers=1),
    dict(shape=(3, 14, 14, 60), heads=1, patch=(2, 2), layers=1),
    dict(shape=(1, 4, 6, 24), heads=2, head_dim=80, patch=(2, 2), layers=1),
)


def inverted_residual(x, draw, hidden, out, **settings):
    shapes = (hidden, x.shape[3]), (hidden,), (hidden, 1, 3, 3), (hidden,), (out, hidden), (out,)
    residual = settings["stride"] == 1 and x.shape[3] == out
    weights = [draw(*shape, std=0.2).bfloat16() for shape in shapes]
    return mvit_kernels.inverted_residual(x, *weights, **settings, residual=residual, backend="cpu")


def results():
    """Of every kind of layer, in bfloat16."""
    for number, (inp, out, kernel, stride, dilation, *size) in enumerate(CONVOLUTIONS):
        draw = Draw(number)
        conv = draw.conv(inp, out, kernel, stride=stride, dilation=dilation, act=(True, False, "relu")[number % 3])
        yield native(conv.bfloat16(), draw(2, inp, *size).bfloat16())
    for number, (inp, hidden, out, stride, dilation, *size) in enumerate(INVERTED_RESIDUALS):
        draw = Draw(number)
        yield native(
            draw.inverted(inp, hidden, out, stride=stride, dilation=dilation).bfloat16(), draw(2, inp, *size).bfloat16()
        )
        rows = draw(2, *size, inp).bfloat16()
        yield inverted_residual(rows, draw, hidden, out, stride=stride, dilation=dilation)
    for sizes in TRANSFORMERS:
        tensors, settings = make("transformer", sizes)
        yield call("transformer", convert(tensors, torch.bfloat16), settings, "cpu")
    module, draw = chain()
    yield native(module.bfloat16(), draw(2, 3, 33, 30).bfloat16())


def digest() -> str:
    torch.set_num_threads(1)
    assert cpu.multiplies_on_tiles()
    return hashlib.sha256(b"".join(y.contiguous().view(torch.uint8).numpy().tobytes() for y in results())).hexdigest()


def digest_on(isa: str) -> str | None:
    """In a process of its own; None where it does not exist."""
    code = "from backends.cpu import test_tiles as t; print(t.digest() if t.cpu.instruction_set() else None)"
    environment = {
        **os.environ,
        "MVIT_KERNELS_CPU_ISA": isa,
        "PYTHONPATH": os.pathsep.join((str(TESTS.parent), str(TESTS))),
    }
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    last = run.stdout.split()[-1]
    return None if last == "None" else last


def test_the_emulation_has_the_bits_of_the_processor():
    real = digest_on("amx")
    if real is None:
        pytest.skip("this processor has no matrix tiles")
    assert digest_on("amx_emulated") == real


@pytest.mark.parametrize("stride", [1, 2])
def test_kernels_read_nothing_beyond_a_pixels_channels(stride):
    """A slice of wider rows: all around it is NaN."""
    draw = Draw(stride)
    for inp, hidden, out, h, w in ((24, 48, 24, 9, 13), (32, 64, 32, 8, 8), (5, 18, 9, 4, 37)):
        around = torch.full((2, h + 2, w + 2, inp + 40), torch.nan, dtype=torch.bfloat16)
        around[:, 1:-1, 1:-1, 8 : 8 + inp] = draw(2, h, w, inp)
        inside = around[:, 1:-1, 1:-1, 8 : 8 + inp]
        y, expected = (inverted_residual(x, Draw(1), hidden, out, stride=stride) for x in (inside, inside.contiguous()))
        assert y.isfinite().all() and torch.equal(y, expected)
