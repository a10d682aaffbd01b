# SPDX-License-Identifier: Apache-2.0
"""``inverted_residual`` in CUDA C++ as it is called: the operator, packed weights, the binding and the map that it is
given to write, and frozen blocks, by emulation."""

import gc
import re

import pytest
import torch

import mvit_kernels
from backends.cuda.test_inverted_residual import OP, sizes_of
from mvit_kernels.backends.cuda import inverted_residual, kept
from mvit_kernels.backends.cuda import inverted_residual_packing as packing
from mvit_kernels.nn.layers import InvertedResidual
from support.cases import call, convert, make
from support.cuda import preferred
from support.layouts import LAYOUTS, lay_out
from support.tolerance import assert_close_as_pytorch


@pytest.fixture
def emulated(monkeypatch):
    with preferred(monkeypatch, OP, inverted_residual.forward):
        yield


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(emulated, layout):
    """Maps are read in place if 16-byte accesses allow it; otherwise from a copy."""
    tensors, settings = make(OP, sizes_of(16, 24, 2, (2, 5, 6)))
    low = convert(tensors, torch.bfloat16)
    low["x"], buffer = lay_out(low["x"], layout)
    before = None if buffer is None else buffer.clone()
    if low["x"].stride(-1) != 1:  # asked for by name, it would refuse
        return
    with torch.no_grad():
        ours = mvit_kernels.inverted_residual(**low, **settings, backend="cuda")
    assert ours.is_contiguous() and (buffer is None or torch.equal(buffer, before))
    truth = call(OP, convert(low, torch.float64), settings, "oracle")
    assert_close_as_pytorch(layout, ours, call(OP, low, settings, "usual"), truth)


def test_empty_batch(emulated):
    tensors, settings = make(OP, sizes_of(64, 64, 1, (0, 5, 6)))
    with torch.no_grad():
        out = mvit_kernels.inverted_residual(**convert(tensors, torch.float16), **settings, backend="cuda")
    assert out.shape == (0, 5, 6, 64) and out.dtype == torch.float16


def test_a_frozen_block_packs_once(emulated, monkeypatch):
    """Although its weights are other views at every call; in place when a weight was changed; until it is gone."""
    packs = []
    pack = inverted_residual.pack_inverted_residual
    monkeypatch.setattr(inverted_residual, "pack_inverted_residual", lambda *a, **k: packs.append(1) or pack(*a, **k))
    block = InvertedResidual(16, 16, expand_ratio=2)
    with torch.no_grad():
        for parameter in block.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
    frozen = mvit_kernels.freeze(block.bfloat16().eval())
    composed = frozen.composed  # what runs where no native network does, as on a GPU
    before = len(kept.packed)
    x = torch.randn(1, 16, 6, 7).bfloat16()
    with torch.inference_mode():
        first = composed(x)
        again = composed(x)
    assert torch.equal(first, again) and len(packs) == 1 and len(kept.packed) == before + 1
    (data,) = [entry.data for entry in list(kept.packed.values())[before:]]
    with torch.no_grad():
        frozen.project.weight.mul_(2)
        assert not torch.equal(composed(x), first)
    assert len(packs) == 2 and list(kept.packed.values())[-1].data is data
    del frozen, composed
    gc.collect()
    assert len(kept.packed) == before


def part(pitch, first, channels=24):
    """A map whose pixels are `pitch` elements apart."""
    return torch.zeros(1, 2, 3, pitch).bfloat16()[..., first : first + channels]


def shared(pitch, first, second):
    """x and out in one map's memory, from these channels on; `out` takes a part of its pixels."""
    memory = torch.zeros(1, 4, 6, pitch).bfloat16()
    out = memory.flatten(0, 2)[: 2 * 3].view(1, 2, 3, pitch)
    return memory[..., first : first + 16], out[..., second : second + 24]


def packed_arguments(**change):
    tensors, _ = make(OP, sizes_of(16, 24, 2, (1, 4, 6), 32))
    x, *weights = convert(tensors, torch.bfloat16).values()
    packed = packing.pack_inverted_residual(*weights, dtype=torch.bfloat16)
    given = dict(x=x, packed=packed, version=packing.VERSION, hidden=32, stride=2, residual=False)
    out = torch.zeros(1, 2, 3, 24).bfloat16()
    return tuple((given | dict(half_filter=False, out=out) | change).values())


@pytest.mark.parametrize(
    "change, says",
    [
        (dict(version=2), "packed by version 2 of the order, and the library reads version 1"),
        (dict(x=torch.zeros(4, 6, 16).bfloat16()), "not of 3 axes"),
        (dict(x=torch.zeros(1, 4, 6, 16)), "take float16 and bfloat16"),
        (dict(x=torch.zeros(1, 0, 6, 16).bfloat16()), "a map of 0 x 6 is empty"),
        (dict(x=torch.zeros(1).bfloat16().expand(2**20, 64, 64, 16)), "at most 2147483647 pixels are supported"),
        (dict(x=torch.zeros(1, 4, 6, 40).bfloat16()), "no kernel for 40 channels in and 24 out with stride 2"),
        (dict(stride=2**40), "no kernel for 16 channels in"),
        (dict(residual=True), "residual wants stride 1"),
        (
            dict(x=torch.zeros(1, 4, 6, 80).bfloat16(), out=torch.zeros(1, 2, 3, 96).bfloat16(), half_filter=True),
            "no kernel that filters in float16 for 80 channels in and 96 out",
        ),
        (dict(hidden=64), "not those of 16 channels in, 64 hidden"),
        (dict(hidden=2**62), "not those of 16 channels in"),
        (dict(packed=torch.zeros(8)), "not those of 16 channels in"),
        (dict(out=torch.zeros(2, 3, 24).bfloat16()), "out must be (B, H, W, C), not of 3 axes"),
        (dict(out=torch.zeros(1, 2, 2, 24).bfloat16()), "out must be (1, 2, 3, 24) for this x"),
        (dict(out=torch.zeros(1, 2, 3, 40).bfloat16()), "no kernel for 16 channels in and 40 out"),
        (dict(out=torch.zeros(1, 2, 3, 24).half()), "out is not of x's dtype; give one that is"),
        (dict(out=part(40, 4)), "out has pixels that do not begin at a multiple of 16 bytes"),
        (dict(out=part(28, 0)), "out has pixels that do not begin at a multiple of 16 bytes"),
        (dict(out=torch.zeros(1, 2, 24, 3).bfloat16().mT), "or channels that are not adjacent"),
        (dict(out=torch.zeros(1).bfloat16().expand(1, 2, 3, 24)), "or channels that are not adjacent"),
        (dict(out=part(24, 0)[:, :1].expand(1, 2, 3, 24)), "lie in one another: axis 1 has stride 0, and 72 or more"),
        (dict(zip(("x", "out"), shared(24, 0, 0), strict=True)), "out lies in x's memory"),
        (dict(zip(("x", "out"), shared(40, 0, 8), strict=True)), "out lies in x's memory"),
        (dict(zip(("x", "out"), shared(40, 24, 8), strict=True)), "out lies in x's memory"),
    ],
    ids=str,
)
def test_the_binding_checks_again(emulated, change, says):
    with pytest.raises(RuntimeError, match=re.escape(says)):
        torch.ops.mvit_kernels.inverted_residual_packed.cuda(*packed_arguments(**change))


def test_side_by_side_in_one_map(emulated):
    """x and out are different channels of the same pixels: no element is both's."""
    x, out = shared(40, 0, 16)
    arguments = packed_arguments(out=out)
    x.copy_(arguments[0])
    torch.ops.mvit_kernels.inverted_residual_packed.cuda(x, *arguments[1:])
    alone = packed_arguments()
    torch.ops.mvit_kernels.inverted_residual_packed.cuda(*alone)
    assert torch.equal(out, alone[-1]) and torch.equal(x, arguments[0]) and out.any()


def test_the_raw_operator_checks_again(emulated):
    tensors, _ = make(OP, sizes_of(16, 24, 2, (1, 4, 6), 32))
    low = convert(tensors, torch.bfloat16)
    operator = torch.ops.mvit_kernels.inverted_residual.cuda
    with pytest.raises(RuntimeError, match="dilation is 2; the kernel has 1"):
        operator(*low.values(), 2, 2, False)
    with pytest.raises(RuntimeError, match=r"weights of shapes .* are wanted"):
        operator(*{**low, "expand_bias": low["expand_bias"][1:]}.values(), 2, 1, False)


def test_the_binding_is_what_its_fake_says(emulated):
    operator = torch.ops.mvit_kernels.inverted_residual_packed.cuda
    torch.library.opcheck(operator, packed_arguments(), test_utils=("test_schema", "test_faketensor"))
