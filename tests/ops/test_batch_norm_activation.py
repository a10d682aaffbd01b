# SPDX-License-Identifier: Apache-2.0
"""``batch_norm_activation``: values, gradients and running statistics on every path and in both memory formats, and
what it refuses."""

import functools

import pytest
import torch
from torch import nn

from mvit_kernels import batch_norm_activation, use_backend
from support import oracle
from support.cases import DTYPES, call, convert, device_of, evaluate, make, paths, takes
from support.checks import check, check_registration
from support.layouts import lay_out
from support.operator_tests import OperatorTests
from support.tolerance import assert_close_as_pytorch

OP = "batch_norm_activation"
PATHS = paths(OP)
KERNELS = [path for path in PATHS if path not in ("reference", "raw")]
FORMATS = ("contiguous", "channels_last")
SERVED = [(path, layout) for path in KERNELS for layout in FORMATS[path == "triton" :]]  # Triton: channels-last alone


def served(*dtypes):
    """Path, layout and dtype of what kernels serve."""
    return [(*pair, dtype) for pair in SERVED for dtype in dtypes if takes(pair[0], dtype)]


TRAINED = [("reference", layout, dtype) for layout in FORMATS for dtype in DTYPES] + served(*DTYPES)
SMALL = dict(shape=(2, 24, 3, 5), channels_last=True)
CASES = [
    *(dict(shape=(2, c, 3, 4)) for c in (16, 144, 640)),  # of s
    *(dict(shape=(2, c, 3, 3)) for c in (3, 17, 129)),  # lines that end within a vector
    dict(shape=(2, 16, 21, 31)),  # several blocks of a channels-last map, the last one short
    dict(shape=(2, 1, 70, 71)),  # a block for each plane
    dict(shape=(1, 1, 91, 92)),  # two for one plane
    dict(shape=(70, 8, 1, 1)),  # one pixel of many images
    dict(shape=(2, 8, 1, 1)),
    dict(shape=(2, 16, 6, 7), activation=None),
    dict(shape=(2, 24, 8, 8), mean=1e3),
    dict(shape=(2, 16, 6, 7), eps=0.1),
    dict(shape=(0, 8, 4, 4)),
]
REFUSED = [
    (dict(x=None), TypeError, ("x is", "torch.Tensor is wanted")),
    (dict(weight=None), TypeError, ("weight is", "torch.Tensor is wanted")),
    (dict(x=lambda x: x[0]), ValueError, ("x has shape (24, 3, 5)", "4 axes (N, C, H, W)")),
    (dict(x=lambda x: x.to(torch.uint8)), TypeError, ("x is torch.uint8",)),
    (dict(weight=lambda w: w[:23]), ValueError, ("weight has shape (23,)", "(24,) is wanted")),
    (dict(bias=torch.zeros(1)), ValueError, ("bias has shape (1,)", "(24,) is wanted")),
    (dict(bias=lambda b: b.double()), TypeError, ("bias is torch.float64", "weight torch.float32", "one dtype")),
    (dict(weight=lambda w: w.bfloat16()), TypeError, ("weight is torch.bfloat16", "x torch.float32")),
    (dict(bias=lambda b: b.to("meta")), ValueError, ("bias is on meta", ".to(device)")),
    (dict(running_mean=torch.zeros(24)), ValueError, ("running_var is None", "both or neither")),
    (
        dict(running_mean=torch.zeros(24), running_var=torch.ones(23)),
        ValueError,
        ("running_var has shape (23,)", "(24,) is wanted"),
    ),
    (
        dict(running_mean=torch.zeros(24).half(), running_var=torch.ones(24)),
        TypeError,
        ("running_mean is torch.float16", "one dtype"),
    ),
    (dict(x=lambda x: x[:1, :, :1, :1]), ValueError, ("(1, 24, 1, 1)", "one value a channel")),
    (dict(momentum=None), ValueError, ("momentum is None", "1 / num_batches_tracked")),
    (dict(eps=0.0), ValueError, ("eps is 0.0", "positive")),
    (dict(activation="relu"), ValueError, ("activation is 'relu'", "'silu' or None")),
    (dict(backend="fast"), ValueError, ("unknown backend 'fast'",)),
]


def fused(path, x, *vectors, **settings):
    """The operator for tensors on the CPU, wherever the path runs; running statistics are updated here too."""
    there = [t.to(device_of(path)) for t in (x, *vectors)]
    out = batch_norm_activation(*there, backend=path, **settings)
    for running, value in zip(vectors[2:], there[3:], strict=True):
        running.data.copy_(value)
    return out.to("cpu")


class TestBatchNormActivation(OperatorTests):
    operator, cases, small, refused = OP, CASES, SMALL, REFUSED
    tiny = [dict(shape=(2, 3, 2, 2)), dict(shape=(2, 2, 1, 2), activation=None)]
    repeated = dict(shape=(3, 40, 20, 20), channels_last=True)

    def test_autocast(self, path):
        """Nothing is cast, as by PyTorch: a convolution before gives x autocast's dtype, parameters stay float32."""
        tensors, settings = make(OP, SMALL)
        for dtype in (torch.float32, torch.bfloat16):
            given = convert(tensors, dtype, torch.float32)
            expected = evaluate(lambda t: call(OP, t, settings, path), given, True)
            with torch.autocast("cpu", torch.bfloat16):
                ours = evaluate(lambda t: call(OP, t, settings, path), given, True)
            assert ours["out"].dtype == dtype
            assert all(torch.equal(value, expected[name]) for name, value in ours.items())


@pytest.mark.parametrize("sizes", [case for case in CASES if case["shape"][1] in (3, 16, 24, 129, 640)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("path", KERNELS)
def test_channels_last(path, dtype, sizes):
    check(OP, sizes, dtype=dtype, path=path, layout="channels_last")
    if "16" in dtype:
        check(OP, sizes, dtype=dtype, norm_dtype="float32", path=path, layout="channels_last")


@pytest.mark.parametrize("path", [path for path in PATHS if path != "raw"])
def test_registration_in_channels_last(path):
    check_registration(OP, SMALL, "channels_last", path)


@pytest.mark.parametrize("path", PATHS)
def test_the_result_has_the_format_of_x(path):
    tensors, settings = make(OP, SMALL)
    tensors = convert(tensors, torch.float32)
    x = tensors["x"].requires_grad_()
    out = call(OP, {**tensors, "x": x}, settings, path)
    (grad,) = torch.autograd.grad(out.mean(), x)  # whose own gradient is one number, expanded
    for result in (out, grad):
        assert result.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("path, layout", SERVED)
def test_kernels_serve_their_formats(layout, path):
    """And what is in none of them is PyTorch's, by the automatic choice."""
    x = torch.randn(2, 8, 5, 6).contiguous(memory_format=torch.channels_last)
    x = x if layout == "channels_last" else x.contiguous()
    fused(path, x, torch.ones(8), torch.zeros(8))
    others = [x[..., :5]] + [x.contiguous()] * (path == "triton")
    for other in others:
        with pytest.raises(RuntimeError, match="x is (neither channels-last nor contiguous|not channels-last)"):
            fused(path, other, torch.ones(8), torch.zeros(8))


# -------------------------------------------------------------------------------------------------- running statistics


@pytest.mark.parametrize("momentum", [0.1, 1.0, 0.0])
@pytest.mark.parametrize(
    "path, layout, dtype, norm_dtype",
    [(*each, each[2]) for each in TRAINED] + [(*each, "float32") for each in TRAINED if "bfloat16" in each],
)
def test_running_statistics(path, dtype, norm_dtype, momentum, layout):
    """Right by the tolerance rule, with the unbiased variance; far from zero too."""
    draw = torch.Generator().manual_seed(0)
    x = (torch.randn(3, 40, 9, 11, generator=draw) + torch.linspace(-50, 50, 40)[:, None, None]).to(
        getattr(torch, dtype)
    )
    x = x.contiguous(memory_format=torch.channels_last) if layout == "channels_last" else x
    kind, usual = getattr(torch, norm_dtype), torch.float32 if dtype == "float64" else getattr(torch, norm_dtype)
    before = torch.randn(40, generator=draw).to(kind), torch.rand(40, generator=draw).to(kind)
    ours, pytorch = [t.clone() for t in before], [t.to(usual) for t in before]
    vectors = torch.ones(40, dtype=kind), torch.zeros(40, dtype=kind)
    fused(path, x, *vectors, *ours, momentum=momentum)
    usual_x = x.float() if dtype == "float64" else x
    torch.nn.functional.batch_norm(usual_x, *pytorch, *(v.to(usual) for v in vectors), True, momentum)
    mean, variance = oracle.batch_statistics(x.double())
    count = x.numel() // 40
    for name, running, theirs, old, value in zip(
        ("running_mean", "running_var"), ours, pytorch, before, (mean, variance * count / (count - 1)), strict=True
    ):
        assert_close_as_pytorch(name, running, theirs, (1 - momentum) * old.double() + momentum * value)


def _is_the_module(path, compiled):
    """Two steps of nn.BatchNorm2d, of which the second starts from the statistics of the first; to the bits of those
    computed operator by operator where it is compiled."""
    norm, ours, own = nn.BatchNorm2d(24), nn.BatchNorm2d(24), nn.BatchNorm2d(24)

    def step(x, norm):
        return fused(path, x, norm.weight, norm.bias, norm.running_mean, norm.running_var)

    for seed in range(2):
        x = torch.randn(2, 24, 5, 4, generator=torch.Generator().manual_seed(seed))
        x = x.contiguous(memory_format=torch.channels_last).requires_grad_()
        expected, eager, result = nn.functional.silu(norm(x)), step(x, own), compiled(step)(x, ours)
        torch.testing.assert_close(result, expected)
        torch.testing.assert_close(
            *(torch.autograd.grad(out.square().sum(), x)[0] for out in (result, expected)), rtol=1e-4, atol=1e-5
        )
        assert torch.equal(result, eager)
    for name in ("running_mean", "running_var"):
        torch.testing.assert_close(getattr(ours, name), getattr(norm, name))
        assert torch.equal(getattr(ours, name), getattr(own, name))


@pytest.mark.parametrize("path", KERNELS)
def test_is_the_module_everybody_writes(path):
    _is_the_module(path, lambda step: step)


@pytest.mark.parametrize("path", KERNELS)
def test_graph_of_the_module_everybody_writes(path):
    torch._dynamo.reset()
    _is_the_module(path, functools.cache(functools.partial(torch.compile, fullgraph=True, backend="aot_eager")))
    torch._dynamo.reset()


@pytest.mark.parametrize("path", [path for path in PATHS if path != "raw"])
def test_no_pixels_teach_nothing(path):
    running = torch.randn(8), torch.rand(8)
    before = [t.clone() for t in running]
    x, weight, bias = (t.requires_grad_() for t in (torch.empty(0, 3, 3, 8), torch.ones(8), torch.zeros(8)))
    x = x.permute(0, 3, 1, 2)
    fused(path, x, weight, bias, *running).sum().backward()
    assert all(torch.equal(*pair) for pair in zip(running, before, strict=True))
    assert weight.grad is None or not weight.grad.any()


def test_the_reference_is_pytorch():
    x, running = torch.randn(2, 8, 5, 6), [torch.zeros(8), torch.ones(8)]
    norm = nn.BatchNorm2d(8)
    ours = batch_norm_activation(x, norm.weight, norm.bias, *running, backend="reference")
    assert torch.equal(ours, nn.functional.silu(norm(x)))
    assert torch.equal(running[0], norm.running_mean) and torch.equal(running[1], norm.running_var)


# ------------------------------------------------------------------------------------------------------------ kernels


@pytest.mark.parametrize("path, layout", [("raw", layout) for layout in FORMATS] + SERVED)
def test_saves_one_map(path, layout):
    """x itself, and nothing else of its size: PyTorch's two operators save the normalised map as well."""
    tensors, settings = make(OP, dict(shape=(2, 16, 8, 8)))
    leaves = {name: lay_out(t.float(), layout)[0].requires_grad_() for name, t in tensors.items()}
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        call(OP, leaves, settings, path)
    maps = [t for t in saved if t.numel() == leaves["x"].numel()]
    assert [t.data_ptr() for t in maps] == [leaves["x"].data_ptr()] and len(saved) == 5


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
@pytest.mark.parametrize("shape", [(3, 16, 40, 41), (2, 200, 33, 9), (5, 3, 70, 60), (1, 1, 91, 92)], ids=str)
@pytest.mark.parametrize("path, layout", [pair for pair in SERVED if pair[0] == "cpu"])
def test_same_bits_for_any_number_of_threads(path, layout, shape, dtype):
    tensors, settings = make(OP, dict(shape=shape))
    tensors = convert(tensors, getattr(torch, dtype))
    if layout == "channels_last":
        tensors["x"] = tensors["x"].contiguous(memory_format=torch.channels_last)
    alone = evaluate(lambda t: call(OP, t, settings, path), tensors, True, layout)
    try:
        for threads in (2, 3, 7):
            torch.set_num_threads(threads)
            ours = evaluate(lambda t: call(OP, t, settings, path), tensors, True, layout)
            assert all(torch.equal(value, alone[name]) for name, value in ours.items()), f"{threads} threads"
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize("value", [0.0, 1.0, 1234.5678, -3e37])
@pytest.mark.parametrize("path, layout, dtype", served("float32", "bfloat16", "float64"))
def test_channels_of_equal_values(path, layout, value, dtype):
    """They have no variance and are their mean, so the result is the bias's, to the last bit."""
    x = torch.full((2, 17, 30, 21), value, dtype=getattr(torch, dtype))
    x = x.contiguous(memory_format=torch.channels_last) if layout == "channels_last" else x
    weight, bias = torch.randn(17).to(x.dtype), torch.randn(17).to(x.dtype)
    running = torch.full_like(weight, 7), torch.full_like(weight, 7)
    out = fused(path, x, weight, bias, *running, momentum=1.0, activation=None)
    assert torch.equal(out, bias[:, None, None].expand_as(out))
    assert running[0].eq(x[0, 0, 0, 0]).all() and not running[1].any()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("scale", [1e-30, 1e15, 1e19, 1e30, 1e35])
@pytest.mark.parametrize("path, layout", SERVED)
def test_values_of_any_scale(path, layout, scale, dtype):
    """Finite where PyTorch is: where squares overflow rstd is 0, and where they vanish eps decides."""
    tensors, settings = make(OP, dict(shape=(2, 16, 40, 30)))
    tensors = convert(tensors, getattr(torch, dtype))
    x = tensors["x"] * scale
    tensors["x"] = x.contiguous(memory_format=torch.channels_last) if layout == "channels_last" else x
    ours, theirs = (
        evaluate(lambda t, p=p: call(OP, t, settings, p), tensors, True, layout) for p in (path, "reference")
    )
    for name, value in ours.items():
        right = theirs[name]
        assert right.isfinite().all(), name
        close = 3e-2 if dtype == "bfloat16" else 1e-4
        torch.testing.assert_close(value, right, rtol=close, atol=close * right.abs().max().item(), msg=name)


@pytest.mark.parametrize("path, dtype", [pair[::2] for pair in served("float32", "bfloat16", "float64")])
def test_saturated_silu(path, dtype):
    """0 or the value itself, and a gradient of 0 or 1, far beyond the range of the exponential."""
    x = torch.tensor([-1.0, 1.0]).repeat(8).reshape(1, 1, 4, 4).to(getattr(torch, dtype))
    for size in (1e2, 3e3, 1e30):
        weight, bias = torch.full((1,), size).to(x.dtype).requires_grad_(), torch.zeros(1).to(x.dtype).requires_grad_()
        out = fused(path, x, weight, bias, eps=1e-12)
        torch.testing.assert_close(out.detach(), (x * weight.detach()).clamp(min=0), rtol=1e-5, atol=1e-8)
        grad_weight, grad_bias = torch.autograd.grad(out.sum(), (weight, bias))
        assert grad_weight.item() == pytest.approx(8, rel=1e-4) and grad_bias.item() == pytest.approx(8, rel=1e-4)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("path, layout", SERVED)
def test_a_nan_stays_in_its_channel(path, layout, dtype):
    tensors, settings = make(OP, dict(shape=(2, 21, 5, 7)))
    tensors = convert(tensors, getattr(torch, dtype))
    if layout == "channels_last":
        tensors["x"] = tensors["x"].contiguous(memory_format=torch.channels_last)
    for poison in (torch.nan, torch.inf):
        before = evaluate(lambda t: call(OP, t, settings, path), tensors, True, layout)
        dirty = tensors["x"].clone()
        dirty[1, 13, 2, 3] = poison
        after = evaluate(lambda t: call(OP, t, settings, path), {**tensors, "x": dirty}, True, layout)
        for name, value in after.items():
            axis = 1 if value.dim() == 4 else 0
            changed = (value != before[name]).movedim(axis, 0).flatten(1 if axis else 0)
            changed = changed.any(-1) if axis else changed
            assert changed.nonzero().flatten().tolist() == [13], name


def test_a_backend_for_everything_inside():
    with use_backend("reference"):
        x = torch.randn(2, 4, 3, 3, requires_grad=True)
        assert "SiluBackward" in batch_norm_activation(x, torch.ones(4), torch.zeros(4)).grad_fn.name()
