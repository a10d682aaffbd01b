# SPDX-License-Identifier: Apache-2.0
"""A frozen chain as one native call: against float64 and PyTorch, for all sizes, numbers of threads and layouts."""

from __future__ import annotations

import copy
import os
import random
import threading

import pytest
import torch
from torch import Tensor, nn

import mvit_kernels
from mvit_kernels.backends import cpu
from mvit_kernels.freezing.block import FrozenMobileViTBlock
from mvit_kernels.freezing.frozen import Frozen
from mvit_kernels.freezing.modules import FrozenConv2d, FrozenInvertedResidual, FrozenMean, FrozenSequential
from mvit_kernels.rounding import RoundedArithmetic
from support import models
from support.native import skip_without_a_compiler
from support.networks import Draw, called, chain, composed, native
from support.recorder import Recorder
from support.tolerance import assert_close_as_pytorch

skip_without_a_compiler()

DTYPES = (torch.float32, torch.bfloat16)
CASES = int(os.environ.get("MVIT_KERNELS_FUZZ", "60"))


def check(module: Frozen, x: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """The tolerance rule, with the same modules one by one as PyTorch's result."""
    module, x = copy.deepcopy(module).to(dtype), x.to(dtype)
    ours = native(module, x)
    exact, x64 = copy.deepcopy(module).double(), x.double()

    def careful(seed: int) -> Tensor:
        with RoundedArithmetic(dtype, seed):
            return composed(exact, x64)

    name = f"{type(module).__name__} on {tuple(x.shape)}"
    assert_close_as_pytorch(name, ours, composed(module, x), composed(exact, x64), careful)
    assert ours.is_contiguous(memory_format=torch.channels_last)
    return ours


# ------------------------------------------------------------------------------------------------------------- values


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [(16, 16), (7, 9), (1, 1), (2, 5), (33, 18)], ids=str)
@pytest.mark.parametrize("kernel, stride, dilation", [(1, 1, 1), (3, 1, 1), (3, 2, 1), (3, 1, 2), (3, 2, 3), (3, 1, 9)])
def test_convolutions(kernel, stride, dilation, size, dtype):
    for inp, out, act in ((3, 16, True), (24, 48, False), (17, 33, "relu"), (64, 80, "relu"), (4, 1, False)):
        draw = Draw(inp)
        conv = draw.conv(inp, out, kernel, stride=stride, dilation=dilation, act=act)
        check(FrozenSequential(conv), draw(2, inp, *size), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [(16, 16), (7, 9), (1, 3), (21, 30)], ids=str)
@pytest.mark.parametrize("stride, dilation", [(1, 1), (2, 1), (1, 2), (2, 2)])
def test_inverted_residuals(stride, dilation, size, dtype):
    for inp, hidden, out in ((16, 32, 16), (24, 96, 48), (5, 18, 5), (3, 33, 7), (64, 256, 64)):
        draw = Draw(hidden)
        check(draw.inverted(inp, hidden, out, stride=stride, dilation=dilation), draw(2, inp, *size), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [(16, 16), (7, 9), (1, 3), (21, 30), (2, 1)], ids=str)
@pytest.mark.parametrize("stride, dilation", [(1, 1), (2, 1), (1, 2), (2, 3), (1, 8)])
def test_depthwise_convolutions(stride, dilation, size, dtype):
    for width, act in ((2, False), (16, True), (24, "relu"), (33, False), (64, "relu")):
        draw = Draw(width)
        check(draw.depthwise(width, stride=stride, dilation=dilation, act=act), draw(2, width, *size), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [(16, 16), (7, 9), (1, 1), (2, 5), (33, 18)], ids=str)
def test_pyramids(size, dtype):
    for inp, width, out, rates in ((16, 8, 24, (6, 12, 18)), (17, 5, 3, (1, 2)), (48, 64, 32, (3, 40, 1))):
        draw = Draw(inp)
        check(draw.pyramid(inp, width, out, rates), draw(2, inp, *size), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [(16, 16), (1, 1), (37, 50)], ids=str)
def test_means(size, dtype):
    for width in (3, 16, 70, 130):
        draw = Draw(width)
        mean, last = FrozenMean(width), draw.conv(width, 24, act="relu")
        check(FrozenSequential(mean, last), draw(2, width, *size) + 3, dtype)
        first = draw.conv(8, width, 3, stride=2)
        check(FrozenSequential(first, mean, last, draw.conv(24, 8, 3, stride=2)), draw(2, 8, *size), dtype)


def test_float16_is_computed_in_float32():
    """Every kind of step. Nothing between the layers is rounded to float16, nor overflows it."""
    draw = Draw(0)
    block = FrozenSequential(draw.conv(3, 16, 3, stride=2), draw.inverted(16, 32, 16), draw.block(16, 24))
    check(block, draw(2, 3, 30, 34), torch.float16)
    check(draw.pyramid(16, 24, 8), draw(1, 16, 9, 10), torch.float16)
    check(
        FrozenSequential(draw.depthwise(16, act="relu"), FrozenMean(16), draw.conv(16, 8)),
        draw(1, 16, 7, 6),
        torch.float16,
    )
    torch.manual_seed(0)
    model = mvit_kernels.MobileViT("xxs", num_classes=10).eval()
    image = draw(1, 3, 64, 64)
    half, single = (mvit_kernels.freeze(model, dtype=dtype) for dtype in (torch.float16, torch.float32))
    with Recorder() as recorder, torch.inference_mode():
        ours, wanted = half(image), single(image)
    assert set(recorder.ours()) == {"network.cpu"}
    assert ours.dtype == torch.float16 and (ours - wanted).abs().max() < 2e-3 * wanted.abs().max()
    large, small = draw.conv(16, 16, act=False), draw.conv(16, 16, act=False)
    large.weight.mul_(2000)
    small.weight.mul_(1 / 2000)
    module, x = FrozenSequential(large, small).half(), draw(1, 16, 8, 8, std=100.0).half()
    ours, exact = native(module, x), composed(copy.deepcopy(module).double(), x.double())
    assert not composed(module, x).isfinite().all()  # PyTorch's, layer by layer
    torch.testing.assert_close(ours, exact.half(), rtol=2e-3, atol=2e-2)


@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_and_infinity_stay_what_they_are(dtype):
    """In ReLU and in the mean too, as in PyTorch."""
    draw, x = Draw(0), Draw(1)(1, 16, 9, 8)
    x[0, :, 1, 1], x[0, :, 6, 6] = float("nan"), float("inf")
    x = x.to(dtype)
    depthwise, mean = draw.depthwise(16, act="relu"), FrozenSequential(FrozenMean(16), draw.conv(16, 8, act="relu"))
    image = draw.conv(3, 16, 3, stride=2, act="relu"), draw.conv(3, 16, 3, dilation=2, act="relu")
    for module in (*image, draw.conv(16, 32, act="relu"), draw.conv(16, 8, 3, act="relu"), depthwise, mean):
        part = x[:, :3] if module in image else x
        ours = native(module.to(dtype), part)
        # In float64: in bfloat16 oneDNN's convolution of three channels makes NaN of an infinity beside the filter.
        pytorch = composed(module.double(), part.double())
        assert ours.isnan().any()
        assert torch.equal(ours.isnan(), pytorch.isnan()) and torch.equal(ours.isinf(), pytorch.isinf())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "sizes",
    [
        dict(inp=48, d=64),
        dict(inp=64, d=80, layers=4),
        dict(inp=80, d=120, layers=1),
        dict(inp=160, d=240, layers=1),
        dict(inp=48, d=64, head_dim=8, qkv_bias=False, final_norm=False, input_first=False),  # Kornia's
        dict(inp=24, d=36, heads=3, hidden=50, patch=(1, 3)),
        dict(inp=24, d=30, heads=2, patch=(4, 2)),  # a head dim of 15
        dict(inp=16, d=20, heads=1, fusion=False),
        dict(inp=16, d=32, dilation=2),
        dict(inp=17, d=32),
    ],
    ids=str,
)
def test_blocks(sizes, dtype):
    draw = Draw(sizes["d"])
    block = draw.block(**sizes)
    for size in ((8, 12), (7, 10), (3, 3)):  # the latter two are resized to whole patches and back
        check(block, draw(2, sizes["inp"], *size), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("library", models.LIBRARIES)
def test_every_library_is_native_throughout(library, dtype):
    model = models.build(library)
    x = models.images(1, *((64, 128) if library == "kornia" else (70, 90)))
    frozen = mvit_kernels.freeze(model, dtype=dtype)
    assert frozen.freeze_report.left == ()
    with torch.inference_mode():
        ours = models.output(frozen(x))
    inside = {id(part) for outer in called(frozen) for part in outer.modules()}
    leaves = (FrozenConv2d, FrozenInvertedResidual, FrozenMobileViTBlock)
    assert all(id(part) in inside for part in frozen.modules() if isinstance(part, leaves))
    truth = models.output(composed(copy.deepcopy(model).double(), x.double()))
    assert_close_as_pytorch(library, ours, models.output(composed(frozen, x)), truth)


def test_bfloat16_takes_pairs_only_where_all_widths_are_even():
    even, odd = Draw(0).conv(3, 16, 3).bfloat16(), Draw(0).conv(3, 15, 3).bfloat16()
    pairs = cpu.multiplies_bf16_pairs()
    for conv, expected in ((even, pairs), (odd, False)):
        native(conv, torch.zeros(1, 3, 8, 8))
        assert bool(conv._network.program[1]) is expected


@pytest.mark.parametrize("seed", range(3))
def test_long_sums_are_as_exact_as_pytorchs(seed):
    """Nine times 320 channels, the fusion of S's last block, compared with the convolution that PyTorch runs
    unfrozen."""
    draw = Draw(seed)
    conv, x = draw.conv(320, 160, 3, act=False), draw(1, 320, 8, 8)
    truth, pytorch = (
        nn.functional.conv2d(x.to(dtype), conv.weight.to(dtype), conv.bias.to(dtype), padding=1)
        for dtype in (torch.float64, torch.float32)
    )
    assert_close_as_pytorch("fusion", native(conv, x), pytorch, truth)


@pytest.mark.parametrize("number", range(CASES))
def test_fuzz(number):
    r = random.Random(number)
    draw = Draw(number)
    width = first = r.choice((1, 3, 8, 16, 17, 24, 48))
    links: list[nn.Module] = []
    for _ in range(r.randint(1, 4)):
        kind = r.choice(("conv", "inverted", "block", "depthwise", "pyramid", "mean"))
        out = r.choice((5, 8, 16, 24, 33, 64))
        stride, dilation = r.choice((1, 1, 2)), r.choice((1, 1, 2))
        if kind == "conv":
            kernel = r.choice((1, 3, 3))
            stride, dilation = (1, 1) if kernel == 1 else (stride, dilation)
            act = r.choice((True, False, "relu"))
            links.append(draw.conv(width, out, kernel, stride=stride, dilation=dilation, act=act))
        elif kind == "depthwise" and width > 1:
            out = width
            links.append(draw.depthwise(width, stride=stride, dilation=dilation, act=r.choice((True, False, "relu"))))
        elif kind == "pyramid":
            links.append(draw.pyramid(width, r.choice((3, 8, 20)), out, r.sample(range(1, 20), 2)))
        elif kind == "mean" and links:
            links += [FrozenMean(width), draw.conv(width, out, act="relu")]
        elif kind == "inverted":
            out = width if r.random() < 0.5 else out
            links.append(draw.inverted(width, r.choice((6, 16, 40, 64)), out, stride=stride, dilation=dilation))
        else:
            out, heads = width, r.choice((1, 2, 4))
            patch = r.choice(((2, 2), (1, 1), (2, 1), (3, 2)))
            options = dict(hidden=r.choice((16, 31, 64)), layers=r.randint(1, 2), patch=patch, heads=heads)
            flags = {name: r.random() < 0.7 for name in ("fusion", "input_first", "final_norm", "qkv_bias")}
            # A LayerNorm of four channels has variances near zero: the errors of both sides are then a matter of luck.
            head_dim = r.choice((8, 9, 20) if heads == 1 else (4, 8, 9, 20))
            links.append(draw.block(width, heads * head_dim, **options, **flags))
        width = out
        if r.random() < 0.2:
            links.append(nn.Identity())
    x = draw(r.choice((1, 2, 3)), first, r.randint(1, 20), r.randint(1, 20))
    layout = r.choice(("contiguous", "channels_last", "sliced", "transposed"))
    if layout == "channels_last":
        x = x.contiguous(memory_format=torch.channels_last)
    elif layout == "sliced":
        x = nn.functional.pad(x, (1, 2, 2, 1, 1, 1), value=42.0)[:, 1:-1, 2:-1, 1:-2]
    elif layout == "transposed":
        x = x.transpose(2, 3).contiguous().transpose(2, 3)
    check(FrozenSequential(*links), x, r.choice(DTYPES))


# ------------------------------------------------------------------------------------------- threads, memory, layouts


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batch", [1, 2, 3, 5])
def test_the_same_bits_for_any_number_of_threads_and_any_batch(batch, dtype):
    module, draw = chain()
    module, x = module.to(dtype), draw(5, 3, 70, 58).to(dtype)[:batch]
    torch.set_num_threads(1)
    expected = native(module, x)
    for _ in range(20):
        assert torch.equal(native(module, x), expected)
    for count in (2, 3, 4, 8):
        torch.set_num_threads(count)
        assert torch.equal(native(module, x), expected)
        assert torch.equal(native(module, x[-1:]), expected[-1:])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("side", [8, 40])
def test_convolutions_that_threads_share_by_rows_and_by_panels(side, dtype):
    """Enough work for every thread: maps larger than the weights are shared out otherwise than smaller ones."""
    draw = Draw(0)
    module = FrozenSequential(draw.conv(32, 96, 1), draw.conv(96, 160, 3), draw.conv(160, 96, 1)).to(dtype)
    x = draw(1, 32, side, side).to(dtype)
    torch.set_num_threads(1)
    expected = native(module, x)
    for count in (2, 3):
        torch.set_num_threads(count)
        assert torch.equal(native(module, x), expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_nothing_is_left_of_an_earlier_call(dtype):
    """The workspace is kept between calls: after a call whose every value was NaN it holds nothing but NaN."""
    module, draw = chain()
    module, x = module.to(dtype), draw(3, 3, 51, 66).to(dtype)
    for count in (1, 2):
        torch.set_num_threads(count)
        expected = native(module, x)
        for size in ((3, 3, 80, 96), (1, 3, 51, 66)):
            assert native(module, torch.full(size, float("nan"), dtype=dtype)).isnan().all()
        assert torch.equal(native(module, x), expected)
        assert torch.equal(native(module, x[:1]), expected[:1])


def test_inputs_of_any_layout_and_dtype():
    module, draw = chain()
    x = draw(2, 3, 40, 36)
    expected = native(module, x)
    wide = torch.full((2, 5, 50, 60), 42.0)
    wide[:, 1:4, 3:43, 7:43] = x
    laid_out = (
        x.contiguous(memory_format=torch.channels_last),
        wide[:, 1:4, 3:43, 7:43],
        x.flip(3).contiguous().flip(3),
        x.transpose(2, 3).contiguous().transpose(2, 3),
        x.double(),
    )
    for other in laid_out:
        assert torch.equal(native(module, other), expected)
    one = x[:1].expand(2, -1, -1, -1)
    assert torch.equal(native(module, one)[1], expected[0])
    rows = FrozenSequential(draw.inverted(8, 16, 8))
    y = draw(2, 8, 9, 10)
    assert torch.equal(native(rows, y), native(rows, y.contiguous(memory_format=torch.channels_last)))
    assert torch.equal(native(rows, torch.cat((y, y), 1)[:, 8:]), native(rows, y))


def test_two_python_threads_run_one_network():
    module, draw = chain()
    inputs = [draw(1, 3, 40, 36 + 8 * i) for i in range(3)]
    expected = [native(module, x) for x in inputs]
    wrong = []

    def work() -> None:
        for turn in range(30):
            if not torch.equal(native(module, inputs[turn % 3]), expected[turn % 3]):
                wrong.append(turn)

    workers = [threading.Thread(target=work) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong
