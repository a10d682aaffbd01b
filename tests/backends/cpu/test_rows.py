# SPDX-License-Identifier: Apache-2.0
"""The C++ row-wise operators, in what their own tests (which also run on path ``cpu``) do not cover.

Sizes around every vector's width, tile and block, thousands of rows, rows of any strides, other numbers of threads, two
callers at once, calls that bypass Python's checks. test_instruction_sets.py runs those named ``test_kernels_…`` again
on every instruction set.
"""

import random
import re
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

import mvit_kernels.backends.reference  # noqa: F401 (registers the operators' reference)
from mvit_kernels.backends.library import raw
from support.cases import backward_arguments, convert, make, poisoned, raw_arguments
from support.checks import check
from support.layouts import LAYOUTS
from support.native import skip_without_a_compiler

skip_without_a_compiler()

OPERATORS = ("layer_norm_linear", "linear_residual", "layer_norm_mlp")
WIDTHS = (
    1,
    2,
    3,
    5,
    7,
    8,
    9,
    15,
    16,
    17,
    24,
    31,
    32,
    33,
    47,
    48,
    49,
    50,
    63,
    64,
    65,
    80,
    95,
    96,
    97,
    98,
    100,
    144,
    200,
)
ROWS = (1, 2, 3, 7, 8, 15, 16, 17, 31, 32, 33, 47, 48, 63, 64, 65, 97, 127, 128, 129, 160, 255, 256, 257, 300)


def _sizes(operator: str, rows: tuple[int, ...], d: int, n: int, activation: str | None = None) -> dict:
    """The sizes that `cases.make` takes."""
    if operator == "layer_norm_mlp":
        return dict(shape=(*rows, d), hidden=n)
    return dict(shape=(*rows, d), n=n) | (dict(activation=activation) if operator == "layer_norm_linear" else {})


def _both(operator: str, tensors: dict, settings: dict, grad_out: Tensor | None = None) -> list[Tensor]:
    """The results of the raw operator and of its backward, whose gradient is the result itself if none is given."""
    results = raw(operator, "cpu")(*raw_arguments(operator, tensors, settings))
    results = results if isinstance(results, tuple) else (results,)
    grad_out = results[0] if grad_out is None else grad_out
    grads = raw(f"{operator}_backward", "cpu")(*backward_arguments(operator, tensors, settings, results, grad_out))
    return [*results, *grads]


def _same(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


# ---------------------------------------------------------------------------------- kernels, on every instruction set


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("seed", range(40))
def test_kernels_drawn_at_random(seed, operator):
    draw = random.Random(f"{operator} {seed}")
    activation = draw.choice([None, "silu"])
    sizes = _sizes(operator, (draw.choice(ROWS),), draw.choice(WIDTHS), draw.choice(WIDTHS), activation)
    case = dict(
        sizes=sizes,
        dtype=draw.choice(["float32", "float32", "bfloat16", "bfloat16", "float64"]),
        layout=draw.choice(LAYOUTS),
        seed=seed,
    )
    print(f"check({operator!r}, **{case}, path='cpu')")  # pytest shows it if the test fails
    check(operator, **case, path="cpu")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("operator", OPERATORS)
def test_kernels_thousands_of_rows(operator, dtype):
    """Gradients of weights are sums over all rows: summed in blocks, or the error would exceed PyTorch's."""
    check(operator, _sizes(operator, (9, 701), 26, 34), dtype=dtype, path="cpu")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("rows", [5, 700, 2200])
def test_kernels_same_bits_for_any_number_of_threads(rows, operator, dtype):
    tensors, settings = make(operator, _sizes(operator, (rows,), 80, 112, "silu"))
    tensors = convert(tensors, getattr(torch, dtype))
    try:
        torch.set_num_threads(1)
        alone = _both(operator, tensors, settings)
        for threads in (1, 2, 3, 4, 7, 2):
            torch.set_num_threads(threads)
            assert _same(alone, _both(operator, tensors, settings)), f"{threads} threads"
    finally:
        torch.set_num_threads(1)


VIEWS = {
    "every other row": lambda t: t[:, :, ::2],
    "cropped along W": lambda t: t[:, :, 1:5],
    "cropped along H": lambda t: t[:, 1:5],
    "cropped along both": lambda t: t[:, 1:5, 2:6],
    "a slice of channels": lambda t: t[..., 2:26],
    "an odd slice of channels": lambda t: t[..., 1:28],
    "H and W exchanged": lambda t: t.transpose(1, 2),
    "channels apart": lambda t: t[..., ::2],
    "channels first": lambda t: t.permute(0, 3, 1, 2),
    "one row for all": lambda t: t[:1, :1, :1].expand(2, 3, 5, -1),
    "one image of many": lambda t: t[1:],
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("view", VIEWS)
def test_kernels_rows_of_any_strides(view, operator, dtype):
    """A view gives the same bits as its contiguous copy: x, the residual and the gradient, one at a time."""
    generator = torch.Generator().manual_seed(0)

    def viewed() -> Tensor:
        return VIEWS[view](torch.randn(2, 6, 8, 28, generator=generator).to(getattr(torch, dtype)))

    x = viewed()
    width = x.shape[-1]
    tensors, settings = make(operator, _sizes(operator, x.shape[:-1], width, width))
    tensors = {**convert(tensors, getattr(torch, dtype)), "x": x.contiguous()}
    grad_out = viewed()
    expected = _both(operator, tensors, settings, grad_out.contiguous())
    assert _same(_both(operator, {**tensors, "x": x}, settings, grad_out), expected)
    if "residual" in tensors:
        residual = viewed()
        expected = _both(operator, {**tensors, "residual": residual.contiguous()}, settings)
        assert _same(_both(operator, {**tensors, "residual": residual}, settings), expected)


@pytest.mark.parametrize("operator", OPERATORS)
def test_kernels_leave_nothing_behind(operator):
    """The memory that a thread keeps between calls never shows: small, large and poisoned calls in turn."""
    small, settings = make(operator, _sizes(operator, (5,), 17, 33))
    small = convert(small, torch.float32)
    first = _both(operator, small, settings)
    large, large_settings = make(operator, _sizes(operator, (300,), 100, 200))
    large = {name: torch.full_like(t, torch.nan, dtype=torch.float32) for name, t in large.items()}
    _both(operator, large, large_settings)
    with poisoned():
        again = _both(operator, small, settings)
    assert _same(first, again)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("d, n", [(0, 6), (6, 0), (0, 0)])
def test_kernels_no_channels(d, n, operator, dtype):
    """Only the bias is left, and its gradient is the sum over the rows."""
    sizes = _sizes(operator, (70,), d, n)
    tensors, settings = make(operator, sizes)
    tensors = convert(tensors, getattr(torch, dtype))
    with poisoned():
        ours = _both(operator, tensors, settings)
    out = {"layer_norm_linear": n, "linear_residual": n, "layer_norm_mlp": d}[operator]
    assert ours[0].shape == (70, out) and all(t.isfinite().all() for t in ours if t.shape != (70,))
    if operator != "layer_norm_mlp":
        expected = tensors["bias"].expand(70, n) + tensors.get("residual", 0)
        if d == 0:
            torch.testing.assert_close(ours[0], expected)
        torch.testing.assert_close(ours[-1], ours[0].float().sum(0).to(ours[0].dtype))


# ------------------------------------------------------------------------------------------------ the operators' edge


@pytest.mark.parametrize("operator", OPERATORS)
def test_two_python_threads_at_once(operator):
    cases = [make(operator, _sizes(operator, (600,), d, 64), seed=d) for d in (16, 36)]
    cases = [(convert(tensors, torch.float32), settings) for tensors, settings in cases]
    alone = [_both(operator, *case) for case in cases]
    with ThreadPoolExecutor(4) as pool:
        jobs = [(i, pool.submit(_both, operator, *cases[i])) for _ in range(20) for i in range(2)]
    for i, job in jobs:
        assert _same(alone[i], job.result())


X, NORM, WEIGHT, GRAD = torch.ones(2, 3, 4), torch.ones(4), torch.ones(6, 4), torch.ones(2, 3, 6)
MEAN, BIAS = torch.ones(2, 3), torch.ones(6)
GOOD = {
    "layer_norm_linear": dict(
        x=X, norm_weight=NORM, norm_bias=NORM, weight=WEIGHT, bias=BIAS, eps=1e-5, activation="silu"
    ),
    "layer_norm_linear_backward": dict(
        grad_out=GRAD,
        x=X,
        mean=MEAN,
        rstd=MEAN,
        norm_weight=NORM,
        norm_bias=NORM,
        weight=WEIGHT,
        bias=BIAS,
        activation="silu",
    ),
    "linear_residual": dict(x=X, weight=WEIGHT, bias=BIAS, residual=GRAD),
    "linear_residual_backward": dict(grad_out=GRAD, x=X, weight=WEIGHT),
    "layer_norm_mlp": dict(
        x=X,
        norm_weight=NORM,
        norm_bias=NORM,
        fc1_weight=WEIGHT,
        fc1_bias=BIAS,
        fc2_weight=WEIGHT.t(),
        fc2_bias=NORM,
        eps=1e-5,
    ),
    "layer_norm_mlp_backward": dict(
        grad_out=X,
        x=X,
        mean=MEAN,
        rstd=MEAN,
        norm_weight=NORM,
        norm_bias=NORM,
        fc1_weight=WEIGHT,
        fc1_bias=BIAS,
        fc2_weight=WEIGHT.t(),
    ),
}


@pytest.mark.parametrize("operator", GOOD)
def test_the_good_arguments_are_good(operator):
    raw(operator, "cpu")(**GOOD[operator])


@pytest.mark.parametrize(
    "operator, change, says",
    [
        *((name, dict(x=torch.tensor(1.0)), "x has no axes") for name in OPERATORS),
        *((name, dict(x=X.int()), "float32, bfloat16, float16 and float64") for name in GOOD),
        *((name, dict(x=X[..., :3]), "not of 3 values") for name in ("layer_norm_linear", "layer_norm_mlp")),
        ("linear_residual", dict(x=X[..., :3]), "a weight is not of 6 x 3"),
        *((name, dict(weight=WEIGHT.double()), "a weight is of another dtype") for name in OPERATORS[:2]),
        *((name, dict(weight=WEIGHT[0]), "not") for name in OPERATORS[:2]),
        *((name, dict(bias=BIAS[:5]), "a bias or norm weight is not of 6 values") for name in OPERATORS[:2]),
        *((name, dict(bias=BIAS.double()), "a weight is of another dtype") for name in OPERATORS[:2]),
        ("layer_norm_linear", dict(norm_weight=NORM[:3]), "a bias or norm weight is not of 4 values"),
        ("layer_norm_linear", dict(norm_bias=NORM[:3]), "a bias or norm weight is not of 4 values"),
        ("layer_norm_linear", dict(activation="gelu"), "activation is 'gelu'; '' or 'silu' is wanted"),
        ("linear_residual", dict(residual=GRAD[:1]), "residual is not of x's leading axes and 6 channels"),
        ("linear_residual", dict(residual=GRAD[0]), "residual is not of x's leading axes and 6 channels"),
        ("linear_residual", dict(residual=GRAD.double()), "residual is not of x's dtype and device"),
        ("layer_norm_mlp", dict(fc1_weight=WEIGHT.t()), "a weight is not of"),
        ("layer_norm_mlp", dict(fc2_weight=WEIGHT), "a weight is not of 4 x 6"),
        ("layer_norm_mlp", dict(fc1_bias=NORM), "a bias or norm weight is not of 6 values"),
        ("layer_norm_mlp", dict(fc2_bias=BIAS), "a bias or norm weight is not of 4 values"),
        *(
            (f"{name}_backward", dict(grad_out=GRAD[..., :5]), "grad_out is not of x's leading axes")
            for name in OPERATORS
        ),
        *(
            (f"{name}_backward", dict(grad_out=GRAD[:, :2]), "grad_out is not of x's leading axes")
            for name in OPERATORS
        ),
        ("linear_residual_backward", dict(grad_out=GRAD.double()), "grad_out is not of x's dtype and device"),
        ("layer_norm_mlp_backward", dict(fc2_weight=WEIGHT), "a weight is not of 4 x 6"),
        *(
            (f"{name}_backward", dict([(saved, wrong)]), f"{saved} is not the one that the forward operator returned")
            for name in ("layer_norm_linear", "layer_norm_mlp")
            for saved in ("mean", "rstd")
            for wrong in (MEAN[:1], MEAN.double(), MEAN.repeat(1, 2)[:, ::2])
        ),
    ],
    ids=str,
)
def test_the_library_checks_for_itself(operator, change, says):
    with pytest.raises(RuntimeError, match=re.escape(says)):
        raw(operator, "cpu")(**{**GOOD[operator], **change})
