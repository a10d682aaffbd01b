# SPDX-License-Identifier: Apache-2.0
"""The convolutions, the mean and the resizing of frozen networks in Triton's interpreter, against float64.
backends/triton/test_backend.py runs this file in a process of its own:

    TRITON_INTERPRET=1 python -m pytest tests/gates/interpreted_convolutions.py
"""

import pytest
import torch
import torch.nn.functional as F

import mvit_kernels
from mvit_kernels.backends.triton.target import INTERPRETED
from support.checks import check as check_operator
from support.tolerance import assert_close_as_pytorch

assert INTERPRETED, "run it with TRITON_INTERPRET=1"
pytest.importorskip("mvit_kernels.backends.triton._launch")

from mvit_kernels.backends.triton import _maps, convolution, depthwise_convolution, mean, resize  # noqa: E402
from mvit_kernels.backends.triton._launch import watching  # noqa: E402

ACTIVATIONS = {"silu": F.silu, "relu": F.relu, None: lambda y: y}
POISON = float("nan")


def draw(*shape, dtype, seed=0, view="dense"):
    """Random rows (B, H, W, C) as a view, and the buffer that it is a view of; NaN lies around it."""
    dtype = getattr(torch, dtype)
    B, H, W, C = shape
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)
    if view == "dense":
        buffer = torch.empty(shape, dtype=dtype)
        rows = buffer
    elif view == "channels":  # a range of channels of a wider map
        buffer = torch.full((B, H, W, C + 24), POISON, dtype=dtype)
        rows = buffer[..., 8 : 8 + C]
    elif view == "inner":  # of a map with a border
        buffer = torch.full((B, H + 2, W + 3, C), POISON, dtype=dtype)
        rows = buffer[:, 1 : H + 1, 2 : W + 2]
    elif view == "offset":  # by an element: no vectors
        buffer = torch.full((B * H * W * C + 1,), POISON, dtype=dtype)
        rows = buffer[1:].view(shape)
    else:
        assert view == "nchw"
        buffer = torch.empty((B, C, H, W), dtype=dtype)
        rows = buffer.permute(0, 2, 3, 1)
    rows.copy_(values)
    return rows, buffer


def convolved(x, weight, bias, residual, stride, dilation, activation):
    """By PyTorch, in x's dtype."""
    padding, groups = dilation * (weight.shape[2] // 2), x.shape[3] // weight.shape[1]
    y = F.conv2d(x.permute(0, 3, 1, 2), weight, bias, stride, padding, dilation, groups).permute(0, 2, 3, 1)
    y = ACTIVATIONS[activation](y)
    return y if residual is None else y + residual


def check(module, weight, x, bias, residual, *, view="dense", around=(), stride=1, dilation=1, activation=None):
    """The result by the tolerance rule; nothing is written beside it."""
    shape = (x.shape[0], _maps.out_size(x.shape[1], stride), _maps.out_size(x.shape[2], stride), weight.shape[0])
    out, buffer = draw(*shape, dtype=str(weight.dtype).removeprefix("torch."), view=view)
    out.fill_(7)
    outside = buffer.isnan()
    settings = dict(stride=stride, dilation=dilation, activation=activation)
    more = (residual,) if module is convolution else ()
    module.launch(x, module.packed(weight), bias, *more, out, **settings).run()
    assert torch.equal(buffer.isnan() & outside, outside), "what lies around the result was written"
    usual = convolved(*(None if t is None else t.to(weight.dtype) for t in (x, weight, bias, residual)), **settings)
    doubles = [x.to(weight.dtype).double(), *(None if t is None else t.double() for t in (weight, bias, residual))]
    truth = convolved(*doubles, **settings)
    assert_close_as_pytorch("out", out, usual, truth)


def parameters(out, inp, kernel, dtype, seed=1, bias_dtype=None):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(out, inp, kernel, kernel, generator=generator, dtype=torch.float64) / (inp**0.5 * kernel)
    bias = torch.randn(out, generator=generator, dtype=torch.float64)
    dtype = getattr(torch, dtype)
    return weight.to(dtype), bias.to(bias_dtype or dtype)


DENSE = [
    dict(shape=(1, 4, 8, 16), out=32, activation="silu", dtype="bfloat16"),
    dict(shape=(2, 5, 7, 24), out=40, residual=True, dtype="float16"),
    dict(shape=(1, 9, 3, 40), out=24, activation="relu", dtype="float32"),
    dict(shape=(1, 3, 5, 96), out=144, dtype="bfloat16", x="channels"),
    dict(shape=(2, 3, 5, 16), out=16, residual=True, activation="silu", dtype="bfloat16", x="inner", to="channels"),
    dict(shape=(2, 5, 3, 17), out=5, dtype="bfloat16", bias=False, x="offset", to="offset"),
    dict(shape=(1, 7, 9, 24), out=20, stride=2, residual=True, dtype="float32", to="inner"),
    dict(shape=(0, 4, 4, 16), out=16, dtype="float16"),
    dict(shape=(2, 5, 7, 16), out=24, kernel=3, activation="silu", dtype="bfloat16"),
    dict(shape=(1, 6, 5, 40), out=48, kernel=3, dtype="float16", residual=True, x="channels"),
    dict(shape=(2, 7, 4, 24), out=16, kernel=3, stride=2, activation="relu", dtype="float32"),
    dict(shape=(1, 8, 8, 16), out=16, kernel=3, dilation=2, dtype="bfloat16", x="inner", to="channels"),
    dict(shape=(1, 5, 5, 96), out=80, kernel=3, dilation=3, dtype="bfloat16", bias=False, x="offset"),
    dict(shape=(3, 1, 1, 16), out=32, kernel=3, dtype="bfloat16", to="inner"),
    dict(shape=(1, 3, 4, 9), out=7, kernel=5, dtype="float32"),
]
STEM = [
    dict(shape=(2, 9, 11, 3), out=16, kernel=3, stride=2, activation="silu", dtype="bfloat16", x="nchw"),
    dict(shape=(1, 8, 6, 3), out=32, kernel=3, stride=2, activation="silu", dtype="float16", x="dense"),
    dict(shape=(2, 7, 5, 3), out=144, kernel=3, stride=2, dtype="bfloat16", x="nchw", x_dtype="float32", to="channels"),
    dict(shape=(1, 5, 6, 1), out=8, kernel=3, dilation=2, dtype="float32", x="inner"),
    dict(shape=(0, 5, 6, 3), out=16, kernel=3, stride=2, dtype="float32", x="nchw"),
]
DEPTHWISE = [
    dict(shape=(2, 5, 7, 16), activation="silu", dtype="bfloat16"),
    dict(shape=(1, 9, 6, 24), stride=2, activation="relu", dtype="float16", x="channels"),
    dict(shape=(2, 4, 5, 40), dilation=2, dtype="float32", to="channels"),
    dict(shape=(1, 7, 7, 96), stride=2, dilation=3, dtype="bfloat16", bias=False, x="inner"),
    dict(shape=(1, 3, 4, 17), activation="silu", dtype="bfloat16", to="offset"),
    dict(shape=(2, 1, 1, 20), dtype="float16", x="inner", to="inner"),
    dict(shape=(0, 4, 5, 16), dtype="bfloat16"),
]


def run_dense(case, seed=0):
    case = dict(case)
    dtype, shape, out = case.pop("dtype"), case.pop("shape"), case.pop("out")
    weight, bias = parameters(out, shape[3], case.pop("kernel", 1), dtype)
    x, _ = draw(*shape, dtype=case.pop("x_dtype", dtype), view=case.pop("x", "dense"), seed=seed)
    view, stride = case.pop("to", "dense"), case.get("stride", 1)
    residual = None
    if case.pop("residual", False):
        sides = (_maps.out_size(side, stride) for side in shape[1:3])
        other = "channels" if view == "dense" else "dense"  # its strides are its own
        residual, _ = draw(shape[0], *sides, out, dtype=dtype, view=other, seed=2)
    check(convolution, weight, x, bias if case.pop("bias", True) else None, residual, view=view, **case)


@pytest.mark.parametrize("case", DENSE + STEM, ids=str)
def test_convolution(case):
    run_dense(case)


@pytest.mark.parametrize("row", range(4))
@pytest.mark.parametrize("case", [DENSE[1], DENSE[4], DENSE[9], STEM[0]], ids=str)
def test_every_tile(case, row, monkeypatch):
    """Each row of the table, at sizes for which it would not be taken."""
    tiles = {kind: rows[min(row, len(rows) - 1) :][:1] for kind, rows in convolution._TILES.items()}
    monkeypatch.setattr(convolution, "_TILES", tiles)
    run_dense(case, seed=row)


@pytest.mark.parametrize("case", DEPTHWISE, ids=str)
@pytest.mark.parametrize("row", [0, 1, 4])
def test_depthwise_convolution(case, row, monkeypatch):
    monkeypatch.setattr(depthwise_convolution, "_TILES", depthwise_convolution._TILES[row : row + 1])
    case = dict(case)
    dtype, shape = case.pop("dtype"), case.pop("shape")
    weight, bias = parameters(shape[3], 1, 3, dtype)
    x, _ = draw(*shape, dtype=dtype, view=case.pop("x", "dense"))
    bias = bias if case.pop("bias", True) else None
    check(depthwise_convolution, weight, x, bias, None, view=case.pop("to", "dense"), **case)


@pytest.mark.parametrize(
    "shape, dtype, view",
    [
        ((2, 8, 8, 96), "bfloat16", "dense"),
        ((3, 7, 5, 24), "float16", "channels"),
        ((2, 9, 13, 17), "float32", "inner"),
        ((1, 1, 1, 40), "bfloat16", "dense"),
        ((0, 3, 4, 16), "bfloat16", "dense"),
        ((2, 0, 4, 16), "float32", "dense"),  # NaN
    ],
    ids=str,
)
def test_mean(shape, dtype, view):
    x, _ = draw(*shape, dtype=dtype, view=view)
    out, buffer = draw(shape[0], 1, 1, shape[3], dtype=dtype, view="channels")
    outside = buffer.isnan()
    mean.launch(x, out).run()
    assert buffer[outside].isnan().all()
    usual, truth = x.mean((1, 2), keepdim=True), x.double().mean((1, 2), keepdim=True)
    if shape[1] == 0:
        assert out.isnan().all() and usual.isnan().all()
    else:
        assert_close_as_pytorch("mean", out, usual, truth)


@pytest.mark.parametrize(
    "shape, size, dtype, view",
    [
        ((2, 7, 5, 24), (8, 8), "bfloat16", "dense"),
        ((1, 8, 8, 40), (7, 5), "float16", "channels"),
        ((2, 3, 4, 17), (13, 31), "float32", "inner"),
        ((1, 1, 1, 16), (3, 5), "bfloat16", "dense"),
        ((1, 5, 9, 96), (1, 1), "float32", "offset"),
        ((0, 3, 4, 16), (6, 8), "bfloat16", "dense"),
    ],
    ids=str,
)
def test_resize(shape, size, dtype, view):
    x, _ = draw(*shape, dtype=dtype, view=view)
    out, buffer = draw(shape[0], *size, shape[3], dtype=dtype, view=view)
    out.fill_(7)
    outside = buffer.isnan()
    resize.launch(x, out).run()
    assert torch.equal(buffer.isnan() & outside, outside)
    usual, truth = (
        F.interpolate(rows.permute(0, 3, 1, 2), size, mode="bilinear", align_corners=False).permute(0, 2, 3, 1)
        for rows in (x, x.double())
    )
    assert_close_as_pytorch("resize", out, usual, truth)


@pytest.mark.parametrize(
    "sizes, dtype",
    [
        (dict(shape=(2, 5, 7, 24), hidden=40, out=24, residual=True), "bfloat16"),
        (dict(shape=(1, 6, 5, 16), hidden=64, out=24, stride=2), "float16"),
        (dict(shape=(1, 5, 4, 17), hidden=33, out=17, dilation=2, residual=True), "float32"),
        (dict(shape=(0, 4, 6, 8), hidden=16, out=8), "bfloat16"),
    ],
    ids=str,
)
def test_inverted_residual(sizes, dtype):
    check_operator("inverted_residual", sizes, dtype=dtype, path="triton")


def test_inverted_residual_of_a_view_is_three_launches():
    x = torch.randn(2, 6, 5, 40, dtype=torch.float16)[:, :, 1:, 8:32]
    weights = [
        torch.randn(shape, dtype=torch.float16) / 4
        for shape in ((48, 24), (48,), (48, 1, 3, 3), (48,), (24, 48), (24,))
    ]
    with watching() as launches:
        y = mvit_kernels.inverted_residual(x, *weights, residual=True, backend="triton")
    assert [each.plan.kernel.fn.__name__ for each in launches] == ["_convolution", "_depthwise", "_convolution"]
    assert torch.equal(y, mvit_kernels.inverted_residual(x.contiguous(), *weights, residual=True, backend="triton"))


# --------------------------------------------------------------------------------------------------- what is not finite


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("activation", ["silu", "relu", None])
@pytest.mark.parametrize("kind", ["1×1", "3×3", "stem", "depthwise"])
def test_what_is_not_finite_reaches_what_it_reaches_in_pytorch(kind, activation):
    """NaN and infinities reach the pixels under whose filter they lie and no other: neither through padded channels,
    nor from beside the map."""
    channels = {"stem": 3, "depthwise": 24}.get(kind, 40)
    out, module = (24, depthwise_convolution) if kind == "depthwise" else (20, convolution)
    weight, bias = parameters(out, 1 if kind == "depthwise" else channels, 1 if kind == "1×1" else 3, "float32")
    x, _ = draw(2, 6, 7, channels, dtype="float32", view="inner")
    x[0, 0, 0, 1], x[0, 5, 6, 2], x[1, 3, 3, 0] = float("nan"), float("inf"), -float("inf")
    y = torch.empty(2, 6, 7, out)
    more = (None,) if module is convolution else ()
    module.launch(x, module.packed(weight), bias, *more, y, activation=activation).run()
    truth = convolved(x.double(), weight.double(), bias.double(), None, 1, 1, activation)
    assert truth.isnan().any() and not truth.isnan().all()
    assert torch.equal(y.isnan(), truth.isnan())
    assert torch.equal(y.isinf(), truth.isinf()) and torch.equal(y[y.isinf()].double(), truth[y.isinf()])


@pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning")
def test_silu_of_large_values():
    values = torch.tensor([-1e30, -200.0, -89.0, -45.0, -44.0, -20.0, -1.0, 0.0, 1.0, 89.0, 1e30])
    x = values.repeat_interleave(16).view(1, 1, -1, 16).clone()
    y = torch.empty_like(x)
    convolution.launch(x, convolution.packed(torch.eye(16)[:, :, None, None]), None, None, y, activation="silu").run()
    torch.testing.assert_close(y.double(), F.silu(x.double()), rtol=1e-6, atol=1e-17)


# ------------------------------------------------------------------------------------------------ offsets over 31 bits


@pytest.mark.parametrize("case", [DENSE[4], DENSE[10], STEM[0]], ids=str)
def test_convolution_with_wide_offsets(case, monkeypatch):
    monkeypatch.setattr(convolution, "is_wide", lambda *given: True)
    run_dense(case)


@pytest.mark.parametrize("module", [depthwise_convolution, mean, resize], ids=lambda module: module.NAME)
def test_others_with_wide_offsets(module, monkeypatch):
    monkeypatch.setattr(module, "is_wide", lambda *given: True)
    if module is depthwise_convolution:
        test_depthwise_convolution(DEPTHWISE[1], 1, monkeypatch)
    elif module is mean:
        test_mean((3, 7, 5, 24), "float16", "channels")
        test_mean((2, 9, 13, 17), "float32", "inner")
    else:
        test_resize((1, 8, 8, 40), (7, 5), "float16", "channels")
