# SPDX-License-Identifier: Apache-2.0
"""``batch_norm_activation`` in Triton's interpreter: every kernel, at a few shapes that reach every branch.
backends/triton/test_backend.py runs this file in a process of its own, like interpreted.py:

    TRITON_INTERPRET=1 python -m pytest tests/gates/interpreted_batch_norm.py
"""

import importlib

import pytest
import torch

from mvit_kernels.backends import PREFERENCE
from mvit_kernels.backends.triton.target import INTERPRETED
from support import oracle
from support.cases import call, convert, evaluate, make
from support.checks import check
from support.tolerance import assert_close_as_pytorch

assert INTERPRETED, "run it with TRITON_INTERPRET=1"
OP = "batch_norm_activation"
kernels = importlib.import_module("mvit_kernels.backends.triton.batch_norm_activation")
launch = importlib.import_module("mvit_kernels.backends.triton._launch")


@pytest.fixture
def parts(monkeypatch):
    """Several parts of several tiles each, at maps that the interpreter computes in a fraction of a second: at most
    four parts, of tiles of 8 to 32 rows."""
    monkeypatch.setattr(kernels, "_SMALL", 0)
    monkeypatch.setattr(kernels, "_TILE", 512)
    monkeypatch.setattr(kernels, "_PROGRAMS", 4)
    kernels._shape.cache_clear()
    yield
    kernels._shape.cache_clear()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("channels", [1, 3, 17, 40, 96, 640])
def test_small_maps(channels, dtype):
    check(OP, dict(shape=(2, channels, 3, 4)), dtype=dtype, path="triton", layout="channels_last")


@pytest.mark.parametrize(
    "sizes",
    [
        dict(shape=(2, 1, 1, 1)),
        dict(shape=(1, 16, 1, 2), activation=None),
        dict(shape=(2, 17, 13, 21)),  # three tiles of 256 rows, the last one short
        dict(shape=(2, 16, 16, 16)),  # two whole ones
        dict(shape=(2, 24, 8, 8), mean=1e3, eps=0.1),
        dict(shape=(0, 8, 4, 4)),
    ],
    ids=str,
)
def test_rows_of_small_maps(sizes):
    check(OP, sizes, path="triton", layout="channels_last")


@pytest.mark.parametrize(
    "sizes, dtype",
    [
        (dict(shape=(2, 3, 21, 10)), "float32"),  # 14 tiles of 32 rows in 4 parts
        (dict(shape=(2, 17, 9, 5), activation=None), "float16"),
        (dict(shape=(2, 40, 7, 5)), "bfloat16"),  # 9 of 8 rows, in 4 parts
        (dict(shape=(1, 96, 6, 9)), "float32"),  # two blocks of channels
        (dict(shape=(1, 200, 5, 5)), "bfloat16"),  # four blocks, one part
        (dict(shape=(3, 16, 1, 1)), "float32"),  # one tile, and lanes without a row
        (dict(shape=(2, 24, 8, 8), mean=1e3), "float32"),
    ],
    ids=str,
)
def test_parts(sizes, dtype, parts):
    check(OP, sizes, dtype=dtype, path="triton", layout="channels_last")


def test_parameters_in_float32(parts):
    check(OP, dict(shape=(2, 40, 7, 5)), dtype="bfloat16", norm_dtype="float32", path="triton", layout="channels_last")


def test_as_many_parts_as_on_a_gpu():
    """With no constant changed: 57 tiles, each a part."""
    check(OP, dict(shape=(2, 40, 30, 30)), dtype="bfloat16", path="triton", layout="channels_last")


@pytest.mark.parametrize("mean", [0.0, 1e3, 1e6])
@pytest.mark.parametrize("shape", [(2, 17, 3, 5), (2, 40, 9, 10)], ids=str)
def test_statistics(shape, mean, parts):
    """The mean to half a unit (of the largest value, where it is near 0), 1/σ to two and the unbiased variance to four,
    however far the mean is from 0 and the first value from the others."""
    tensors, settings = make(OP, dict(shape=shape, mean=mean, channels_last=True))
    tensors = convert(tensors, torch.float32)
    tensors["x"][0, ::2, 0, 0] += 30.0
    _, mean, rstd, variance = kernels.forward(*tensors.values(), settings["eps"], "silu")
    true_mean, true_variance = oracle.batch_statistics(tensors["x"].double())
    count, unit = tensors["x"].numel() // shape[1], torch.finfo(torch.float32).eps
    true_rstd = 1 / torch.sqrt(true_variance + settings["eps"])
    largest = tensors["x"].abs().amax((0, 2, 3))
    assert ((mean - true_mean).abs() <= 0.5 * unit * largest).all()
    assert ((rstd - true_rstd).abs() <= 2 * unit * true_rstd).all()
    unbiased = true_variance * count / (count - 1)
    assert ((variance - unbiased).abs() <= 4 * unit * unbiased).all()


@pytest.mark.filterwarnings("ignore:(overflow|invalid):RuntimeWarning")
@pytest.mark.parametrize("value", [7.1, -3e37])
def test_channels_of_equal_values(value, parts):
    """They are their mean and have no variance, to the last bit, so the result is the bias. Rows that a tile has
    beyond the last one are 0, that is infinitely far from a mean of −3e37, and count for nothing."""
    x = torch.full((2, 17, 9, 5), value).contiguous(memory_format=torch.channels_last)
    weight, bias = torch.ones(17), torch.randn(17)
    out, mean, rstd, variance = kernels.forward(x, weight, bias, 1e-5, "")
    for gradient in kernels.backward(torch.ones_like(x), x, mean, rstd, weight, bias, "silu"):
        assert gradient.isfinite().all()
    assert mean.eq(x[0, 0, 0, 0]).all() and not variance.any() and torch.equal(rstd, rstd[:1].expand(17))
    assert torch.equal(out, bias[:, None, None].expand_as(out))


@pytest.mark.filterwarnings("ignore:(overflow|invalid):RuntimeWarning")
@pytest.mark.parametrize("poison", [torch.nan, torch.inf, 1e30])
def test_what_is_not_finite_stays_in_its_channel(poison, parts):
    """In a channel of huge values squares overflow: its 1/σ is 0, and its result the bias."""
    tensors, settings = make(OP, dict(shape=(2, 21, 5, 7), channels_last=True))
    tensors = convert(tensors, torch.float32)
    before = evaluate(lambda t: call(OP, t, settings, "triton"), tensors, True)
    dirty = tensors["x"].clone()
    dirty[1, 13, 2, 3] = poison
    after = evaluate(lambda t: call(OP, t, settings, "triton"), {**tensors, "x": dirty}, True)
    for name, value in after.items():
        others = [c for c in range(21) if c != 13]
        axis = 1 if value.dim() == 4 else 0
        clean = value.movedim(axis, 0)[others], before[name].movedim(axis, 0)[others]
        assert torch.equal(*clean), name
    assert after["out"][:, 13].isnan().any() != (poison == 1e30)


def test_saturated_silu():
    """0 or the value itself, and a gradient of 0 or 1, far beyond the range of the exponential."""
    x = torch.tensor([-1.0, 1.0]).repeat(8).reshape(1, 1, 4, 4)
    for size in (3e3, 1e30):
        weight, bias = torch.full((1,), size), torch.zeros(1)
        out, mean, rstd, _ = kernels.forward(x, weight, bias, 1e-12, "silu")
        torch.testing.assert_close(out, (x * size).clamp(min=0), rtol=1e-5, atol=1e-8)
        _, grad_weight, grad_bias = kernels.backward(torch.ones_like(x), x, mean, rstd, weight, bias, "silu")
        assert grad_weight.item() == pytest.approx(8) and grad_bias.item() == pytest.approx(8)


def test_a_gradient_in_another_format(parts):
    """As a reduction behind it gives, expanded; and that of a contiguous layer behind it."""
    tensors, settings = make(OP, dict(shape=(2, 24, 5, 4), channels_last=True))
    x, weight, bias = convert(tensors, torch.float32).values()
    _, mean, rstd, _ = kernels.forward(x, weight, bias, settings["eps"], "silu")
    right = kernels.backward(g := torch.randn_like(x), x, mean, rstd, weight, bias, "silu")
    ours = kernels.backward(g.contiguous(), x, mean, rstd, weight, bias, "silu")
    assert all(torch.equal(*pair) for pair in zip(ours, right, strict=True))
    assert ours[0].is_contiguous(memory_format=torch.channels_last)
    one = kernels.backward(torch.ones(()).expand_as(x), x, mean, rstd, weight, bias, "silu")
    full = kernels.backward(torch.ones_like(x), x, mean, rstd, weight, bias, "silu")
    assert all(torch.equal(*pair) for pair in zip(one, full, strict=True))


# ------------------------------------------------------------------------------------------------------------ launches


def planned(shape, dtype, target, activation="silu"):
    x = torch.empty(shape, dtype=dtype, device="meta").contiguous(memory_format=torch.channels_last)
    vector = torch.empty(shape[1], device="meta")
    with launch.watching(target) as launches:
        out, mean, rstd, _ = kernels.forward(x, vector, vector, 1e-5, activation)
        kernels.backward(out, x, mean, rstd, vector, vector, activation)
    return launches


@pytest.mark.parametrize("shape", [(64, 64, 128, 128), (64, 144, 32, 32), (64, 640, 8, 8), (1, 640, 8, 8)], ids=str)
def test_bits_do_not_depend_on_the_gpu(shape):
    """What a program adds up follows from the shape alone: the same launches on every architecture."""
    plans = [
        [(each.plan.kernel.fn.__name__, each.grid, each.scalars, each.plan.constants) for each in planned(*of)]
        for of in ((shape, torch.bfloat16, 80), (shape, torch.bfloat16, 120), (shape, torch.float32, 90))
    ]
    assert plans[0] == plans[1] == plans[2]


def test_launches():
    """Three forward and three backward, and one each where the map is small; parts fill the GPU and no more."""
    names = [each.plan.kernel.fn.__name__ for each in planned((64, 144, 32, 32), torch.bfloat16, 90)]
    assert names[:3] == ["_statistics", "_combine_statistics", "_normalise"]
    assert names[3:] == ["_sum_gradients", "_combine_gradients", "_gradient"]
    names = [each.plan.kernel.fn.__name__ for each in planned((1, 640, 32, 32), torch.bfloat16, 90)]
    assert names == ["_forward", "_backward"]
    for channels in (16, 64, 144, 640, 5000):
        first = planned((64, channels, 32, 32), torch.bfloat16, 90)[0]
        blocks, parts = first.grid
        assert 4 / 5 * kernels._PROGRAMS <= blocks * parts <= kernels._PROGRAMS
    few = planned((2, 144, 32, 32), torch.bfloat16, 90)[0]
    assert few.grid == (3, 64)  # a part has at least one tile


def test_variants():
    """One kernel serves all widths that are multiples of 8, at any number of pixels: compiling takes a second each."""
    variants = {
        (each.plan.kernel, each.plan.constants)
        for channels in (96, 144, 192, 384, 640)
        for side in (32, 64)
        for each in planned((64, channels, side, side), torch.bfloat16, 90)
        if "combine" not in each.plan.kernel.fn.__name__
    }
    assert len(variants) == 4


def test_the_largest_map():
    """Programs and offsets of 2³⁰ pixels: a loop's counter ends beyond the last row by less than one step."""
    launches = planned((2**14, 8, 256, 256), torch.bfloat16, 90)
    step = launches[0].scalars[1] * kernels._TILE // 16
    assert launches[0].scalars[0] == 2**30 and 2**30 + step < 2**31
    assert all(side < 2**31 for each in launches for side in each.grid) and launches[0].grid[1] < 2**16


# ------------------------------------------------------------------------------------------------------- the whole path


def test_a_gpu_chooses_it():
    """By itself, for channels-last maps, in training."""
    assert "triton" in PREFERENCE["cuda"]
    from mvit_kernels.backends import Call, triton

    def reasons(layout):
        return triton.BACKEND.supports[OP](Call(OP, "cuda", torch.bfloat16, True, (2, 8, 4, 4), (("layout", layout),)))

    assert reasons("channels_last") == [] and "channels-last" in reasons("contiguous")[0]


def test_running_statistics(parts):
    """Through the public function: right by the tolerance rule, in bfloat16 with float32 parameters too."""
    from mvit_kernels import batch_norm_activation

    draw = torch.Generator().manual_seed(0)
    for dtype in (torch.float32, torch.bfloat16):
        x = (torch.randn(2, 40, 7, 5, generator=draw) + torch.linspace(-50, 50, 40)[:, None, None]).to(dtype)
        x = x.contiguous(memory_format=torch.channels_last)
        before = torch.randn(40, generator=draw), torch.rand(40, generator=draw)
        ours, pytorch = ([t.clone() for t in before] for _ in range(2))
        batch_norm_activation(x, torch.ones(40), torch.zeros(40), *ours, momentum=0.1, backend="triton")
        torch.nn.functional.batch_norm(x, *pytorch, torch.ones(40), torch.zeros(40), True, 0.1)
        mean, variance = oracle.batch_statistics(x.double())
        truth = mean, variance * 70 / 69
        for name, *pair, old, value in zip(("mean", "variance"), ours, pytorch, before, truth, strict=True):
            assert_close_as_pytorch(name, *pair, 0.9 * old.double() + 0.1 * value)
