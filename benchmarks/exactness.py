# SPDX-License-Identifier: Apache-2.0
"""Compare the errors of the C++ kernels with PyTorch's: every operator, its result and each gradient, over many draws.

    python benchmarks/exactness.py [--draws 200] [--dtypes float32 float64] [--only linear_residual] [--results FOLDER]

It prints two ratios for each case, our error divided by PyTorch's (which uses MKL for products and oneDNN for
convolutions): "rms" is the ratio of the root mean square errors over all elements and draws, "largest" that of the
largest error, averaged over the draws. A ratio below 1 means that our kernels are more exact. The true result is
computed in float64 for float32, and in numpy's longdouble (64 bits of mantissa on x86) for float64; float64 is skipped
where longdouble is no wider.

PyTorch's errors depend on the machine: on an Intel processor MKL multiplies few rows in sums of many lanes, which is up
to four times as exact as what it runs on AMD processors. ``MVIT_KERNELS_CPU_ISA`` chooses our instruction set.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import conv2d, silu

import mvit_kernels
from mvit_kernels.bench import results
from mvit_kernels.bench.origin import environment
from mvit_kernels.freezing.modules import FrozenConv2d

Arrays = dict[str, np.ndarray]

# (rows, channels, out channels). The length K of a sum is the second number in forward, the third for x's gradient, and
# the first for the weight's.
PRODUCTS = [
    (1, 512, 512), (6, 64, 192), (6, 192, 576), (6, 240, 480), (6, 1024, 256), (6, 2048, 64),
    (32, 64, 64), (32, 144, 432), (64, 240, 480), (64, 512, 4), (32, 512, 512), (16, 1024, 256), (16, 2048, 256),
    (16, 256, 2048), (1024, 64, 64), (4096, 64, 64), (20000, 16, 32),
]  # fmt: skip
TOKENS = [(64, 1, 36), (256, 1, 16), (1024, 1, 32)]  # (tokens per sequence, heads, head dim)
MAPS = [(8, 16, 64, 16), (8, 64, 256, 96), (6, 128, 512, 160), (4, 512, 1024, 256)]  # (side, in, hidden, out)
CONVOLUTIONS = [(8, 64, 64, 1), (8, 640, 160, 1), (6, 2048, 64, 1), (8, 32, 64, 3), (8, 128, 96, 3), (6, 320, 160, 3)]
LAYERS = [(8, 64, 4), (16, 144, 4), (8, 240, 4)]  # (side, width, heads)
MEANS = [0.0, 1e4]  # mean of LayerNorm's input rows


# ---- reference results, in the dtype of their arguments -------------------------------------------------------------


def _normalise(x, weight, bias, eps):
    centred = x - x.mean(-1, keepdims=True)
    rstd = 1 / np.sqrt((centred * centred).mean(-1, keepdims=True) + x.dtype.type(eps))
    return centred * rstd * weight + bias, centred * rstd, rstd


def _normalise_backward(grad, normalised, rstd, weight):
    g = grad * weight
    grad_x = (g - g.mean(-1, keepdims=True) - normalised * (g * normalised).mean(-1, keepdims=True)) * rstd
    return grad_x, (grad * normalised).sum(0), grad.sum(0)


def _silu_backward(grad, x):
    sigmoid = 1 / (1 + np.exp(-x))
    return grad * sigmoid * (1 + x * (1 - sigmoid))


def linear_residual(t: Arrays, grad) -> Arrays:
    return {
        "out": t["residual"] + t["x"] @ t["weight"].T + t["bias"],
        "x": grad @ t["weight"],
        "weight": grad.T @ t["x"],
        "bias": grad.sum(0),
    }


def layer_norm_linear(t: Arrays, grad, activation=None, eps=1e-5) -> Arrays:
    y, normalised, rstd = _normalise(t["x"], t["norm_weight"], t["norm_bias"], eps)
    z = y @ t["weight"].T + t["bias"]
    g = grad if activation is None else _silu_backward(grad, z)
    x, norm_weight, norm_bias = _normalise_backward(g @ t["weight"], normalised, rstd, t["norm_weight"])
    out = z if activation is None else z / (1 + np.exp(-z))
    return dict(out=out, x=x, norm_weight=norm_weight, norm_bias=norm_bias, weight=g.T @ y, bias=g.sum(0))


def layer_norm_mlp(t: Arrays, grad, eps=1e-5) -> Arrays:
    y, normalised, rstd = _normalise(t["x"], t["norm_weight"], t["norm_bias"], eps)
    z = y @ t["fc1_weight"].T + t["fc1_bias"]
    hidden = z / (1 + np.exp(-z))
    g = _silu_backward(grad @ t["fc2_weight"], z)
    x, norm_weight, norm_bias = _normalise_backward(g @ t["fc1_weight"], normalised, rstd, t["norm_weight"])
    return dict(
        out=t["x"] + hidden @ t["fc2_weight"].T + t["fc2_bias"], x=grad + x, norm_weight=norm_weight,
        norm_bias=norm_bias, fc1_weight=g.T @ y, fc1_bias=g.sum(0), fc2_weight=grad.T @ hidden, fc2_bias=grad.sum(0),
    )  # fmt: skip


def patch_attention(t: Arrays, grad, num_heads, patch_size, scale) -> Arrays:
    """For maps of one row and patches of one pixel, where the tokens of an image are one sequence."""
    assert patch_size == (1, 1)
    (images, _, tokens, _), heads = t["qkv"].shape, num_heads
    q, k, v = t["qkv"].reshape(images, tokens, 3, heads, -1).transpose(2, 0, 3, 1, 4)
    grad = grad.reshape(images, tokens, heads, -1).transpose(0, 2, 1, 3)
    scale = t["qkv"].dtype.type(scale)
    scores = scale * (q @ k.swapaxes(-1, -2))
    p = np.exp(scores - scores.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    out = p @ v
    ds = p * (grad @ v.swapaxes(-1, -2) - (grad * out).sum(-1, keepdims=True))
    grads = np.stack((scale * (ds @ k), scale * (ds.swapaxes(-1, -2) @ q), p.swapaxes(-1, -2) @ grad))
    return {
        "out": out.transpose(0, 2, 1, 3).reshape(images, 1, tokens, -1),
        "qkv": grads.transpose(1, 3, 0, 2, 4).reshape(t["qkv"].shape),
    }


TRUTHS: dict[str, Callable[..., Arrays]] = {
    function.__name__: function for function in (linear_residual, layer_norm_linear, layer_norm_mlp, patch_attention)
}


# ---- cases ----------------------------------------------------------------------------------------------------------


def draw_rows(operator: str, generator, rows: int, d: int, n: int, mean: float = 0.0) -> dict[str, Tensor]:
    def normal(*shape: int, std: float = 1.0, mean: float = 0.0) -> Tensor:
        return torch.randn(shape, generator=generator) * std + mean

    if operator == "linear_residual":
        return dict(x=normal(rows, d), weight=normal(n, d, std=d**-0.5), bias=normal(n), residual=normal(rows, n))
    norm = dict(norm_weight=normal(d, std=0.2, mean=1.0), norm_bias=normal(d, std=0.2))
    x = normal(rows, d, mean=mean)
    if operator == "layer_norm_linear":
        return dict(x=x, **norm, weight=normal(n, d, std=d**-0.5), bias=normal(n, std=0.2))
    weights = dict(fc1_weight=normal(n, d, std=d**-0.5), fc1_bias=normal(n, std=0.2))
    return dict(x=x, **norm, **weights, fc2_weight=normal(d, n, std=n**-0.5), fc2_bias=normal(d, std=0.2))


def _with_gradients(function, tensors: dict[str, Tensor], grad: Tensor, wanted) -> dict[str, Tensor]:
    leaves = {name: t.detach().requires_grad_(name in wanted) for name, t in tensors.items()}
    out = function(**leaves)
    grads = torch.autograd.grad(out, [leaves[name] for name in wanted], grad)
    return {"out": out.detach(), **dict(zip(wanted, grads, strict=True))}


def differentiable_case(operator: str, tensors: dict[str, Tensor], out_shape, generator, dtype, **settings):
    """{name: (ours, PyTorch's, truth)} for the result and every gradient."""
    wide = np.float64 if dtype == torch.float32 else np.longdouble
    tensors = {name: t.to(dtype) for name, t in tensors.items()}
    grad = torch.randn(out_shape, generator=generator).to(dtype)
    arrays = {name: t.numpy().astype(wide) for name, t in tensors.items()}
    truth = TRUTHS[operator](arrays, grad.numpy().astype(wide), **settings)
    wanted = [name for name in tensors if name in truth]
    ours, pytorch = (
        _with_gradients(
            lambda backend=backend, **t: getattr(mvit_kernels, operator)(**t, **settings, backend=backend),
            tensors, grad, wanted,
        )
        for backend in ("cpu", "reference")
    )  # fmt: skip
    return {name: (ours[name], pytorch[name], truth[name]) for name in truth}


def forward_case(function, tensors, **settings):
    """The same for an operator without gradients here, which is called as `function(backend, tensors, **settings)`."""
    with torch.inference_mode():
        ours, pytorch = function("cpu", tensors, **settings), function("reference", tensors, **settings)
        truth = function("reference", tensors, double=True, **settings)
    return {"out": (ours, pytorch, truth.numpy())}


def _inverted_residual(backend, tensors, double=False):
    tensors = [t.double() for t in tensors] if double else tensors
    if backend == "reference":  # as convolutions, as every library runs it
        x, expand, expand_bias, depthwise, depthwise_bias, project, project_bias = tensors
        y = silu(conv2d(x.permute(0, 3, 1, 2), expand[:, :, None, None], expand_bias))
        y = silu(conv2d(y, depthwise, depthwise_bias, padding=1, groups=y.shape[1]))
        return conv2d(y, project[:, :, None, None], project_bias).permute(0, 2, 3, 1)
    return mvit_kernels.inverted_residual(*tensors, stride=1, dilation=1, residual=False, backend=backend)


def _convolution(backend, tensors, double=False):
    x, weight, bias = (t.double() for t in tensors) if double else tensors
    if backend == "reference":
        return conv2d(x, weight, bias, padding=weight.shape[2] // 2)
    return FrozenConv2d(weight, bias, padding=(weight.shape[2] // 2,) * 2)(x)


def _transformer(backend, tensors, heads, double=False):
    x, *weights = (t.double() for t in tensors) if double else tensors
    layers = [mvit_kernels.TransformerLayerWeights(*weights)]
    return mvit_kernels.transformer(x, layers, None, num_heads=heads, patch_size=(2, 2), backend=backend)


def cases(dtype: torch.dtype) -> dict[tuple[str, str], Callable[[torch.Generator], dict]]:
    """(operator, sizes) -> function that makes one random draw of {name: (ours, PyTorch's, truth)}."""
    found: dict[tuple[str, str], Callable[[torch.Generator], dict]] = {}

    def add(operator: str, sizes: str, draw) -> None:
        found[operator, sizes] = draw

    for rows, d, n in PRODUCTS:
        for operator, out in (("linear_residual", n), ("layer_norm_linear", n), ("layer_norm_mlp", d)):
            for mean in MEANS if operator != "linear_residual" and rows == 32 else MEANS[:1]:
                text = f"{rows} x {d} -> {n}" + (f", mean {mean:g}" if mean else "")

                def draw(g, operator=operator, rows=rows, d=d, n=n, out=out, mean=mean):
                    tensors = draw_rows(operator, g, rows, d, n, mean)
                    return differentiable_case(operator, tensors, (rows, out), g, dtype)

                add(operator, text, draw)
                if operator == "layer_norm_linear" and n == 2 * d:

                    def draw(g, rows=rows, d=d, n=n):
                        tensors = draw_rows("layer_norm_linear", g, rows, d, n)
                        return differentiable_case("layer_norm_linear", tensors, (rows, n), g, dtype, activation="silu")

                    add(operator, f"{text}, silu", draw)
    for tokens, heads, head_dim in TOKENS:

        def draw(g, tokens=tokens, heads=heads, head_dim=head_dim):
            tensors = dict(qkv=torch.randn(1, 1, tokens, 3 * heads * head_dim, generator=g))
            settings = dict(num_heads=heads, patch_size=(1, 1), scale=head_dim**-0.5)
            return differentiable_case(
                "patch_attention", tensors, (1, 1, tokens, heads * head_dim), g, dtype, **settings
            )

        add("patch_attention", f"{tokens} tokens of {heads} x {head_dim}", draw)
    if dtype == torch.float64:
        return found  # the following operators have no float64 kernels

    for side, inp, hidden, out in MAPS:

        def draw(g, side=side, inp=inp, hidden=hidden, out=out):
            shapes = (
                (1, side, side, inp),
                (hidden, inp),
                (hidden,),
                (hidden, 1, 3, 3),
                (hidden,),
                (out, hidden),
                (out,),
            )
            scales = (1, inp**-0.5, 0.2, 1 / 3, 0.2, hidden**-0.5, 0.2)
            tensors = [torch.randn(s, generator=g) * scale for s, scale in zip(shapes, scales, strict=True)]
            return forward_case(_inverted_residual, tensors)

        add("inverted_residual", f"{side} x {side}, {inp} -> {hidden} -> {out}", draw)
    for side, inp, out, kernel in CONVOLUTIONS:

        def draw(g, side=side, inp=inp, out=out, kernel=kernel):
            weight = torch.randn(out, inp, kernel, kernel, generator=g) * (inp * kernel**2) ** -0.5
            x, bias = torch.randn(1, inp, side, side, generator=g), torch.randn(out, generator=g)
            return forward_case(_convolution, (x, weight, bias))

        add("convolution", f"{kernel} x {kernel}, {side} x {side}, {inp} -> {out}", draw)
    for side, d, heads in LAYERS:

        def draw(g, side=side, d=d, heads=heads):
            norm = lambda: (torch.randn(d, generator=g) * 0.2 + 1, torch.randn(d, generator=g) * 0.2)  # noqa: E731
            linear = lambda n, k: (torch.randn(n, k, generator=g) * k**-0.5, torch.randn(n, generator=g) * 0.2)  # noqa: E731
            weights = (*norm(), *linear(3 * d, d), *linear(d, d), *norm(), *linear(2 * d, d), *linear(d, 2 * d))
            return forward_case(_transformer, (torch.randn(1, side, side, d, generator=g), *weights), heads=heads)

        add("transformer", f"{side} x {side} x {d}", draw)
    return found


# ---- measuring ------------------------------------------------------------------------------------------------------


class Errors:
    """Errors of one result over the draws, of ours and of PyTorch's: sums of squares and sums of largest errors."""

    def __init__(self) -> None:
        self.squares, self.largest, self.count = np.zeros(2), np.zeros(2), 0

    def add(self, ours: Tensor, pytorch: Tensor, truth: np.ndarray) -> None:
        for side, value in enumerate((ours, pytorch)):
            error = np.abs(value.numpy().astype(truth.dtype) - truth).astype(np.float64)
            self.squares[side] += (error * error).sum()
            self.largest[side] += error.max()
        self.count += truth.size

    @property
    def rms(self) -> float:
        """Ratio of the root mean square errors, ours over PyTorch's; 1 if both are exact."""
        return _ratio(*np.sqrt(self.squares))

    @property
    def maximum(self) -> float:
        """The same ratio of the mean largest errors."""
        return _ratio(*self.largest)


def _ratio(ours: float, pytorch: float) -> float:
    return 1.0 if ours == pytorch == 0 else math.inf if pytorch == 0 else float(ours / pytorch)


def measure(draw: Callable[[torch.Generator], dict], draws: int) -> dict[str, Errors]:
    errors: dict[str, Errors] = {}
    for seed in range(draws):
        for name, values in draw(torch.Generator().manual_seed(seed)).items():
            errors.setdefault(name, Errors()).add(*values)
    return errors


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--draws",
        type=int,
        default=200,
        help="random inputs per case (default: 200; a tenth of it for 1000 rows or more)",
    )
    parser.add_argument(
        "--dtypes", nargs="+", default=["float32", "float64"], choices=["float32", "float64"], help="(default: both)"
    )
    parser.add_argument("--only", nargs="+", default=[], help="names of the operators to measure (default: all)")
    parser.add_argument("--results", type=Path, metavar="FOLDER", help="append the rows to FOLDER/exactness.csv")
    args = parser.parse_args()
    torch.set_num_threads(1)
    origin, rows = environment(), []
    for name in args.dtypes:
        if name == "float64" and np.finfo(np.longdouble).eps > 1e-18:
            print("float64: skipped, this machine has no wider type to compute the true result in", file=sys.stderr)
            continue
        for (operator, sizes), draw in cases(getattr(torch, name)).items():
            if args.only and operator not in args.only:
                continue
            draws = args.draws if int(sizes.split()[0]) < 1000 else max(1, args.draws // 10)
            for result, errors in measure(draw, draws).items():
                print(
                    f"{name} {operator:18} {sizes:30} {result:12} rms {errors.rms:6.2f}  largest {errors.maximum:6.2f}",
                    flush=True,
                )
                rows.append(_row(name, operator, sizes, result, errors, draws, origin))
    if args.results:
        results.append(args.results / "exactness.csv", rows)


def _row(dtype: str, operator: str, sizes: str, result: str, errors: Errors, draws: int, origin: dict[str, Any]):
    rms = np.sqrt(errors.squares[0] / errors.count)
    return results.row(
        suite="exactness", subject=operator, stage=sizes, mode=result, dtype=dtype, backend="cpu", candidate="cpu",
        samples=draws, ratio=errors.rms, error=float(rms), worst=errors.maximum, **origin,
    )  # fmt: skip


if __name__ == "__main__":
    main()
