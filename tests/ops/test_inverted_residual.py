# SPDX-License-Identifier: Apache-2.0
"""``inverted_residual``: values on every path (gradients by the reference), and what it refuses."""

import pytest
import torch
from torch import nn

from support.cases import call, convert, make, paths
from support.checks import check_autocast, check_registration
from support.operator_tests import OperatorTests
from support.tolerance import assert_close_as_pytorch

OP = "inverted_residual"
# CUDA C++ has kernels for MobileViT's own shapes alone, and tests of its own: backends/cuda/test_inverted_residual.py.
PATHS = [path for path in paths(OP) if path != "cuda"]
SMALL = dict(shape=(2, 5, 7, 8), hidden=24, out=8, residual=True)


def served(path):
    """`SMALL`, with a width that the path has kernels for."""
    return {**SMALL, "shape": (2, 5, 7, 16), "out": 16} if path == "cuda" else SMALL


CASES = [
    dict(shape=(1, 8, 8, 16), hidden=32, out=16, residual=True),  # xxs, stage 1
    dict(shape=(1, 8, 8, 16), hidden=32, out=24, stride=2),  # xxs, stage 2
    dict(shape=(1, 8, 6, 64), hidden=256, out=96, stride=2),  # s, stage 3
    dict(shape=(1, 6, 8, 128), hidden=512, out=160, stride=2),  # s, stage 5
    dict(shape=(1, 4, 6, 48), hidden=96, out=48, dilation=2, residual=True),  # output stride 16
    dict(shape=(2, 7, 5, 8), hidden=24, out=12, dilation=3),
    *(
        dict(shape=(2, h, w, 8), hidden=16, out=8, stride=2)
        for h, w in ((7, 7), (8, 7), (1, 1), (1, 2), (2, 1), (3, 8))
    ),
    dict(shape=(2, 7, 5, 8), hidden=16, out=8, stride=2, dilation=2),
    dict(shape=(1, 1, 1, 8), hidden=16, out=8, residual=True),
    *(dict(shape=(1, 4, 3, c), hidden=h, out=o) for c, h, o in ((17, 33, 100), (33, 100, 17), (1, 1, 1), (3, 7, 5))),
    *(  # more columns than kernels take at once, with every kind of remainder
        dict(shape=(1, 7, w, 20), hidden=70, out=50, stride=stride, dilation=dilation)
        for w, stride, dilation in ((16, 1, 1), (37, 1, 1), (39, 2, 1), (66, 2, 1), (35, 1, 2), (35, 2, 2), (38, 2, 3))
    ),
    dict(shape=(1, 5, 33, 98), hidden=130, out=98, residual=True),
    dict(shape=(0, 4, 6, 8), hidden=16, out=8, residual=True),
]
REFUSED = [
    (dict(x=None), TypeError, ("x is", "torch.Tensor is wanted")),
    (dict(expand_bias=None), TypeError, ("expand_bias is", "torch.Tensor is wanted")),
    (dict(x=lambda x: x[0]), ValueError, ("x has shape (5, 7, 8)", "4 axes (B, H, W, C)")),
    (dict(x=lambda x: x[..., :7]), ValueError, ("expand_weight has shape (24, 8)", "(hidden, 7) is wanted")),
    (dict(x=lambda x: x[:, :0]), ValueError, ("empty map of 0 × 7",)),
    (dict(expand_weight=lambda w: w[:, :, None, None]), ValueError, ("expand_weight has shape (24, 8, 1, 1)",)),
    (dict(expand_bias=torch.zeros(8)), ValueError, ("expand_bias has shape (8,)", "(24,) is wanted")),
    (dict(depthwise_weight=torch.zeros(24, 24, 3, 3)), ValueError, ("depthwise_weight", "(24, 1, 3, 3) is wanted")),
    (dict(depthwise_weight=torch.zeros(24, 1, 5, 5)), ValueError, ("depthwise_weight", "(24, 1, 3, 3) is wanted")),
    (dict(depthwise_bias=torch.zeros(1)), ValueError, ("depthwise_bias has shape (1,)", "(24,) is wanted")),
    (dict(project_weight=lambda w: w.t()), ValueError, ("project_weight has shape (24, 8)", "(out, 24) is wanted")),
    (dict(project_bias=torch.zeros(24)), ValueError, ("project_bias has shape (24,)", "(8,) is wanted")),
    (dict(project_bias=lambda b: b.double()), TypeError, ("project_bias is torch.float64", "model.to(dtype)")),
    (dict(x=lambda x: x.half()), TypeError, ("expand_weight is torch.float32", "x torch.float16")),
    (dict(depthwise_weight=lambda w: w.to("meta")), ValueError, ("depthwise_weight is on meta", ".to(device)")),
    (dict(stride=3), ValueError, ("stride is 3", "1 or 2")),
    (dict(stride=(2, 2)), ValueError, ("stride is (2, 2)", "1 or 2")),
    (dict(stride=1.0), ValueError, ("stride is 1.0", "1 or 2")),
    (dict(dilation=0), ValueError, ("dilation is 0", "positive int")),
    (dict(dilation=1.5), ValueError, ("dilation is 1.5", "positive int")),
    (dict(stride=2), ValueError, ("residual wants stride 1", "stride is 2")),
    (
        dict(project_weight=torch.zeros(9, 24), project_bias=torch.zeros(9)),
        ValueError,
        ("as many channels out as in", "8 channels come in and 9 go out"),
    ),
    (dict(backend="fast"), ValueError, ("unknown backend 'fast'",)),
]


class TestInvertedResidual(OperatorTests):
    operator, cases, small, refused = OP, CASES, SMALL, REFUSED
    # The operator is for inference. Its reference is differentiable as far as PyTorch is, whose bfloat16 depthwise
    # convolution gives a NaN weight gradient now and then on maps of one or two pixels (oneDNN, torch 2.13, AMD EPYC).
    gradients_in = ("float32", "float64")
    tiny = [
        *(dict(shape=(1, 3, 2, 2), hidden=3, out=2, **more) for more in (dict(residual=True), dict(stride=2))),
        dict(shape=(1, 3, 2, 2), hidden=3, out=2, dilation=2),
        dict(shape=(1, 2, 2, 1), hidden=2, out=1),
    ]
    repeated = dict(shape=(1, 8, 8, 16), hidden=32, out=16)
    test_norm_parameters_in_float32 = None  # it has no norm
    test_graph = None  # kernels have no gradient

    def test_autocast(self, path):
        check_autocast(OP, served(path), path)

    def test_registration(self, backend, layout):
        check_registration(OP, served(backend), layout, backend)


@pytest.mark.parametrize("stride, dilation", [(1, 1), (2, 1), (1, 2)])
@pytest.mark.parametrize("path", PATHS)
def test_is_the_module_everybody_writes(path, stride, dilation):
    """Against nn.Conv2d on the channels-first map."""
    expand, project = nn.Conv2d(8, 24, 1), nn.Conv2d(24, 12, 1)
    depthwise = nn.Conv2d(24, 24, 3, stride, dilation, dilation, groups=24)
    module = nn.Sequential(expand, nn.SiLU(), depthwise, nn.SiLU(), project)
    x = torch.randn(2, 8, 9, 6)
    with torch.no_grad():
        usual, truth = (module(x).permute(0, 2, 3, 1), module.double()(x.double()).permute(0, 2, 3, 1))
        tensors = {
            "x": x.permute(0, 2, 3, 1),
            "expand_weight": expand.weight.flatten(1),
            "expand_bias": expand.bias,
            "depthwise_weight": depthwise.weight,
            "depthwise_bias": depthwise.bias,
            "project_weight": project.weight.flatten(1),
            "project_bias": project.bias,
        }
        tensors = convert(tensors, torch.float64 if path in ("reference", "raw") else torch.float32)
        tensors["x"] = tensors["x"].contiguous()
        out = call(OP, tensors, {"stride": stride, "dilation": dilation, "residual": False}, path)
    assert_close_as_pytorch(f"{OP} by {path}", out, usual, truth)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("stride, dilation", [(1, 1), (1, 2), (1, 3), (2, 1), (2, 2)])
def test_a_pixel_is_seen_by_its_neighbours_only(stride, dilation, dtype, path):
    """Also at the border, where zeros pad the expanded values, not x."""
    tensors, settings = make(OP, dict(shape=(2, 6, 8, 8), hidden=16, out=8, stride=stride, dilation=dilation))
    tensors = convert(tensors, getattr(torch, dtype))
    for h, w in ((0, 0), (3, 4), (5, 7)):
        before = call(OP, tensors, settings, path)
        tensors["x"][1, h, w] += 1
        changed = (call(OP, tensors, settings, path) != before).any(-1)
        reach = (-dilation, 0, dilation)
        seen = {(a * stride, b * stride) for a in range(changed.shape[1]) for b in range(changed.shape[2])}
        seen &= {(h + i, w + j) for i in reach for j in reach}
        assert {(1, a // stride, b // stride) for a, b in seen} == set(map(tuple, changed.nonzero().tolist()))


def test_registration_with_stride():
    check_registration(OP, dict(shape=(2, 5, 7, 8), hidden=24, out=12, stride=2))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "sizes",
    [
        dict(shape=(1, 17, 19, 8), hidden=24, out=8, residual=True),  # strips of one image
        dict(shape=(3, 16, 16, 16), hidden=64, out=24, stride=2),
        dict(shape=(2, 11, 9, 7), hidden=33, out=5, dilation=3),
        dict(shape=(5, 2, 3, 8), hidden=16, out=8),
    ],
    ids=str,
)
@pytest.mark.parametrize("path", [path for path in PATHS if path not in ("reference", "raw")])
def test_same_bits_for_any_number_of_threads(path, sizes, dtype):
    tensors, settings = make(OP, sizes)
    tensors = convert(tensors, getattr(torch, dtype))
    alone = call(OP, tensors, settings, path)
    try:
        for threads in (2, 3, 4, 7):
            torch.set_num_threads(threads)
            assert torch.equal(call(OP, tensors, settings, path), alone), f"{threads} threads"
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("path", PATHS)
def test_leaves_nothing_behind(path, dtype):
    """Memory that is kept between calls never shows: neither the NaNs of a larger call, nor the rows of another
    shape."""
    small, settings = make(OP, SMALL)
    small = convert(small, getattr(torch, dtype))
    before = call(OP, small, settings, path)
    large, large_settings = make(OP, dict(shape=(1, 9, 20, 16), hidden=64, out=24, dilation=2))
    large = convert(large, getattr(torch, dtype))
    assert call(OP, {**large, "x": large["x"] * torch.nan}, large_settings, path).isnan().all()
    assert torch.equal(call(OP, small, settings, path), before)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("path", PATHS)
def test_channels_that_are_padding(path, dtype):
    """40 hidden channels are 64 on matrix tiles, and nothing computes the last 16: what a call of 64 channels left
    there must not show."""
    narrow, settings = make(OP, dict(shape=(1, 9, 20, 16), hidden=40, out=24))
    narrow = convert(narrow, getattr(torch, dtype))
    before = call(OP, narrow, settings, path)
    assert before.isfinite().all()
    wide, wide_settings = make(OP, dict(shape=(1, 9, 20, 16), hidden=64, out=24))
    wide = convert(wide, getattr(torch, dtype))
    assert call(OP, {**wide, "x": wide["x"] * torch.nan}, wide_settings, path).isnan().all()
    assert torch.equal(call(OP, narrow, settings, path), before)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("path", PATHS)
def test_large_values(path, dtype):
    """SiLU of large values is 0 or the value itself, far beyond the range of its exponential (-1e30 divided by the
    largest finite e^x is -3e-9)."""
    x = torch.tensor([-1e30, -3000.0, -100.0, 100.0, 3000.0, 1e30], dtype=getattr(torch, dtype)).reshape(1, 1, 1, 6)
    one = torch.eye(6, dtype=x.dtype)
    centre = torch.zeros(6, 1, 3, 3, dtype=x.dtype)
    centre[:, :, 1, 1] = 1
    none = torch.zeros(6, dtype=x.dtype)
    weights = dict(expand_weight=one, expand_bias=none, depthwise_weight=centre, depthwise_bias=none)
    tensors = {"x": x, **weights, "project_weight": one, "project_bias": none}
    out = call(OP, tensors, {"stride": 1, "dilation": 1, "residual": False}, path)
    torch.testing.assert_close(out, x.clamp(min=0), rtol=0, atol=1e-8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kernels_take_a_block_without_hidden_channels(dtype):
    """The result is the projection's bias. Every path, matrix tiles too, shares out work by hidden channels."""
    x, bias = torch.randn(1, 7, 5, 4, dtype=dtype), torch.randn(8, dtype=dtype)
    empty = [torch.empty(shape, dtype=dtype) for shape in ((0, 4), (0,), (0, 1, 3, 3), (0,), (8, 0))]
    out = torch.ops.mvit_kernels.inverted_residual.cpu(x, *empty, bias, 1, 1, False)
    assert torch.equal(out, bias.expand(1, 7, 5, 8))
