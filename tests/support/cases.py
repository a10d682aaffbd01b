# SPDX-License-Identifier: Apache-2.0
"""What an operator is called with, written down in plain literals, and the ways to call it.

Example:
    >>> tensors, settings = make("patch_attention", dict(shape=(2, 6, 4), heads=4, head_dim=16, patch=(2, 2)))
    >>> out = call("patch_attention", tensors, settings, path="raw")

A *path* is a way to compute the operator: ``reference`` (the public function on the reference backend, plain PyTorch),
``raw`` (the reference's raw operators with the autograd function around them), or a backend with kernels, by its name;
`paths` gives those that can run on this machine. ``oracle`` and ``usual`` are the truth and the yardstick of the tests.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

import mvit_kernels
from mvit_kernels import backends
from mvit_kernels.backends.contract import REGISTRY
from mvit_kernels.backends.library import BACKENDS, raw
from mvit_kernels.rounding import RoundedArithmetic
from support import oracle, usual
from support.layouts import lay_out

DIFFERENTIABLE = (
    "batch_norm_activation",
    "layer_norm",
    "layer_norm_linear",
    "patch_attention",
    "linear_residual",
    "layer_norm_mlp",
    "transformer_layer",
)
INFERENCE = ("inverted_residual", "transformer")
DTYPES = ("float32", "bfloat16", "float16", "float64")

# ------------------------------------------------------------------------------------------------------------ inputs

Tensors = dict[str, Tensor | None]
Sizes = dict[str, Any]  # the keyword arguments of an operator's function below, `_layer_norm` for one

# A small call of each operator.
SMALL = {
    "batch_norm_activation": dict(shape=(2, 8, 3, 4)),
    "layer_norm": dict(shape=(3, 8)),
    "layer_norm_linear": dict(shape=(3, 8), n=4, activation="silu"),
    "patch_attention": dict(shape=(2, 4, 4), heads=2, head_dim=4, patch=(2, 2)),
    "linear_residual": dict(shape=(3, 8), n=4),
    "layer_norm_mlp": dict(shape=(3, 8), hidden=16),
    "inverted_residual": dict(shape=(2, 4, 4, 8), hidden=16, out=8, residual=True),
    "transformer": dict(shape=(2, 4, 4, 8), heads=2, patch=(2, 2)),
    "transformer_layer": dict(shape=(2, 4, 4, 8), heads=2, patch=(2, 2), dropout=dict(mlp=0.1)),
}

# Another of each with a gradient: rows that fill no tile, widths that are no power of two.
NARROW = {
    "batch_norm_activation": dict(shape=(2, 24, 3, 5), channels_last=True),  # which every backend serves
    "layer_norm": dict(shape=(2, 3, 5, 24)),
    "layer_norm_linear": dict(shape=(2, 3, 5, 24), n=40, activation="silu"),
    "patch_attention": dict(shape=(2, 6, 8), heads=2, head_dim=12, patch=(2, 2)),
    "linear_residual": dict(shape=(2, 3, 5, 24), n=40),
    "layer_norm_mlp": dict(shape=(2, 3, 5, 24), hidden=40),
    "transformer_layer": dict(shape=(2, 4, 6, 24), heads=2, patch=(2, 2)),
}


class Draw:
    """Seeded normal float64 tensors whose values float32 can represent."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, *shape: int, std: float = 1.0, mean: float = 0.0) -> Tensor:
        return (torch.randn(shape, generator=self.generator) * std + mean).double()

    def norm(self, d: int) -> tuple[Tensor, Tensor]:
        return self(d, std=0.2, mean=1.0), self(d, std=0.2)

    def linear(self, n: int, k: int) -> tuple[Tensor, Tensor]:
        return self(n, k, std=max(k, 1) ** -0.5), self(n, std=0.2)


def _batch_norm_activation(draw, shape, activation="silu", mean=0.0, eps=1e-5, channels_last=False):
    weight, bias = draw.norm(shape[1])
    x = draw(*shape, mean=mean)
    x = x.contiguous(memory_format=torch.channels_last) if channels_last else x
    tensors = {"x": x, "weight": weight, "bias": bias}
    return tensors, {"running_mean": None, "running_var": None, "momentum": 0.1, "eps": eps, "activation": activation}


def _layer_norm(draw, shape, mean=0.0, eps=1e-5):
    weight, bias = draw.norm(shape[-1])
    return {"x": draw(*shape, mean=mean), "norm_weight": weight, "norm_bias": bias}, {"eps": eps}


def _layer_norm_linear(draw, shape, n, bias=True, activation=None, mean=0.0, eps=1e-5):
    norm, linear = draw.norm(shape[-1]), draw.linear(n, shape[-1])
    tensors = {
        "x": draw(*shape, mean=mean),
        "norm_weight": norm[0],
        "norm_bias": norm[1],
        "weight": linear[0],
    }
    return {**tensors, "bias": linear[1] if bias else None}, {"eps": eps, "activation": activation}


def _patch_attention(draw, shape, heads, head_dim, patch, scale=None, magnitude=1.0):
    qkv = draw(*shape, 3 * heads * head_dim, std=magnitude)
    return {"qkv": qkv}, {"num_heads": heads, "patch_size": patch, "scale": scale}


def _linear_residual(draw, shape, n, bias=True):
    weight, b = draw.linear(n, shape[-1])
    return {
        "x": draw(*shape),
        "weight": weight,
        "bias": b if bias else None,
        "residual": draw(*shape[:-1], n),
    }, {}


def _layer_norm_mlp(draw, shape, hidden, mean=0.0, eps=1e-5):
    d = shape[-1]
    norm, fc1, fc2 = draw.norm(d), draw.linear(hidden, d), draw.linear(d, hidden)
    names = ("norm_weight", "norm_bias", "fc1_weight", "fc1_bias", "fc2_weight", "fc2_bias")
    return {"x": draw(*shape, mean=mean), **dict(zip(names, (*norm, *fc1, *fc2), strict=True))}, {"eps": eps}


def _inverted_residual(draw, shape, hidden, out, stride=1, dilation=1, residual=False):
    expand, project = draw.linear(hidden, shape[-1]), draw.linear(out, hidden)
    tensors = {
        "x": draw(*shape),
        "expand_weight": expand[0],
        "expand_bias": expand[1],
        "depthwise_weight": draw(hidden, 1, 3, 3, std=1 / 3),
        "depthwise_bias": draw(hidden, std=0.2),
        "project_weight": project[0],
        "project_bias": project[1],
    }
    return tensors, {"stride": stride, "dilation": dilation, "residual": residual}


def _layer_weights(draw, d, heads, head_dim, hidden, qkv_bias) -> Tensors:
    inner = heads * head_dim if head_dim else d
    qkv, proj, fc1, fc2 = (
        draw.linear(3 * inner, d),
        draw.linear(d, inner),
        draw.linear(hidden, d),
        draw.linear(d, hidden),
    )
    values = (*draw.norm(d), qkv[0], qkv[1] if qkv_bias else None, *proj, *draw.norm(d), *fc1, *fc2)
    return dict(zip(mvit_kernels.TransformerLayerWeights._fields, values, strict=True))


def _transformer_layer(draw, shape, heads, patch, head_dim=None, hidden=None, qkv_bias=True, dropout=None, eps=1e-5):
    """`dropout`: fields of `LayerDropout` by name; then there is a seed too."""
    d = shape[-1]
    tensors = {"x": draw(*shape), **_layer_weights(draw, d, heads, head_dim, hidden or 2 * d, qkv_bias)}
    seed = torch.randint(2**63 - 1, (2,), generator=draw.generator) if dropout else None
    live = mvit_kernels.LayerDropout(**dropout) if dropout else None
    return tensors, {"num_heads": heads, "patch_size": patch, "eps": eps, "dropout": live, "seed": seed}


def _transformer(draw, shape, heads, patch, head_dim=None, ratio=2, layers=2, qkv_bias=True, final_norm=True, eps=1e-5):
    d = shape[-1]
    tensors: Tensors = {"x": draw(*shape)}
    for index in range(layers):
        for field, value in _layer_weights(draw, d, heads, head_dim, ratio * d, qkv_bias).items():
            tensors[f"layers.{index}.{field}"] = value
    if final_norm:
        tensors["final_norm.weight"], tensors["final_norm.bias"] = draw.norm(d)
    return tensors, {"num_heads": heads, "patch_size": patch, "eps": eps}


def make(operator: str, sizes: dict[str, Any], seed: int = 0) -> tuple[Tensors, dict[str, Any]]:
    """The operator's tensors (float64, in the order of its schema) and its other arguments."""
    return globals()[f"_{operator}"](Draw(seed), **sizes)


def convert(
    tensors: Tensors, dtype: torch.dtype, norm_dtype: torch.dtype | None = None, device: str = "cpu"
) -> Tensors:
    """In `dtype`, the norms' parameters in `norm_dtype` if given."""
    return {
        name: None if t is None else t.to(device, norm_dtype if norm_dtype and is_norms(name, tensors) else dtype)
        for name, t in tensors.items()
    }


def is_norms(name: str, tensors: Tensors) -> bool:
    """Whether `name` is a parameter of a norm; where ``weight`` and ``bias`` are one, there is no matrix."""
    return "norm" in name or (name in ("weight", "bias") and tensors["weight"].dim() == 1)


# ------------------------------------------------------------------------------------------------------------- calls


def paths(operator: str, dtype: str | None = None) -> list[str]:
    """The paths of the operator that can run here, and that take `dtype` if given."""
    found = ["reference", "raw"]
    for backend in BACKENDS[1:]:
        if operator in backends.operators(backend) and not backends.unavailable(backend, device_of(backend)):
            if takes(backend, dtype):
                found.append(backend)
    return found


def differentiable_on(backend: str) -> list[str]:
    """The operators with a gradient that `backend` has kernels for."""
    return [operator for operator in DIFFERENTIABLE if operator in backends.operators(backend)]


def takes(path: str, dtype: str | None) -> bool:
    """Whether the backend has kernels for `dtype` (a name) at all; the reference has."""
    return dtype is None or path in ("reference", "raw") or getattr(torch, dtype) in REGISTRY[path].dtypes


def plain_dtype(path: str) -> torch.dtype:
    """The dtype for tests that are not about dtypes: float32, or bfloat16 where the path has no kernels for float32."""
    return torch.float32 if takes(path, "float32") else torch.bfloat16


def differentiable(operator: str, path: str) -> bool:
    """Whether the operator has gradients on `path`: not on a backend that has no backward for it."""
    if path in ("reference", "raw"):
        return path == "reference" or operator in DIFFERENTIABLE
    backward, key = f"mvit_kernels::{operator}_backward.{path}", device_of(path).upper()
    return operator in DIFFERENTIABLE and torch._C._dispatch_has_kernel_for_dispatch_key(backward, key)


def device_of(path: str) -> str:
    """Where the path's tensors are: on its backend's `device_type`, or on the CPU if it has none."""
    return REGISTRY[path].device_type if path in REGISTRY else "cpu"


def resolved(operator: str, tensors: Tensors, settings: dict[str, Any]) -> dict[str, Any]:
    """The settings with their defaults written out."""
    if settings.get("scale", 0.0) is None:
        head_dim = tensors["qkv"].shape[-1] // (3 * settings["num_heads"])
        return {**settings, "scale": head_dim**-0.5}
    if settings.get("seed") is not None:
        return {**settings, "seed": settings["seed"].to(tensors["x"].device)}
    return settings


def structured(operator: str, tensors: Tensors) -> dict[str, Any]:
    """The tensors as the public function takes them."""
    if operator == "transformer_layer":
        x, *layer = tensors.values()
        return {"x": x, "layer": mvit_kernels.TransformerLayerWeights(*layer)}
    if operator != "transformer":
        return dict(tensors)
    weights = [t for name, t in tensors.items() if name.startswith("layers.")]
    layers = [mvit_kernels.TransformerLayerWeights(*weights[i : i + 12]) for i in range(0, len(weights), 12)]
    final = (tensors["final_norm.weight"], tensors["final_norm.bias"]) if "final_norm.weight" in tensors else None
    return {"x": tensors["x"], "layers": layers, "final_norm": final}


def raw_arguments(operator: str, tensors: Tensors, settings: dict[str, Any]) -> tuple:
    """The raw operator's arguments."""
    settings = resolved(operator, tensors, settings)
    if operator == "transformer":
        from mvit_kernels.ops.transformer import flatten

        s = structured(operator, tensors)
        return s["x"], flatten(s["layers"]), *(s["final_norm"] or (None, None)), *settings.values()
    if operator == "transformer_layer":
        num_heads, patch_size, eps, dropout, seed = settings.values()
        return *tensors.values(), seed, num_heads, patch_size, eps, *_probabilities(dropout)
    if operator == "batch_norm_activation":
        return *tensors.values(), settings["eps"], settings["activation"] or ""
    return *tensors.values(), *("" if value is None else value for value in settings.values())


def _probabilities(dropout: mvit_kernels.LayerDropout | None) -> tuple[tuple[float, ...], bool]:
    dropout = dropout or mvit_kernels.LayerDropout()
    return (dropout.projection, dropout.path1, dropout.mlp, dropout.path2), dropout.path_scale


def backward_arguments(
    operator: str, tensors: Tensors, settings: dict[str, Any], outputs: tuple, grad_out: Tensor
) -> tuple:
    """The arguments of the raw backward operator, given what the raw forward operator returned."""
    t, settings = list(tensors.values()), list(resolved(operator, tensors, settings).values())
    return {
        "batch_norm_activation": lambda: (grad_out, t[0], *outputs[1:3], *t[1:], settings[4] or ""),
        "layer_norm": lambda: (grad_out, t[0], *outputs[1:], t[1]),
        "layer_norm_linear": lambda: (grad_out, t[0], *outputs[1:], *t[1:], settings[1] or ""),
        "patch_attention": lambda: (grad_out, t[0], *outputs, *settings),
        "linear_residual": lambda: (grad_out, t[0], t[1]),
        "layer_norm_mlp": lambda: (grad_out, t[0], *outputs[1:], *t[1:-1]),
        "transformer_layer": lambda: (
            *(grad_out, t[0], *outputs[1:]),
            *(t[i] for i in (1, 2, 3, 4, 5, 7, 8, 9, 10, 11)),  # without the biases of proj and fc2
            *(settings[4], *settings[:3], *_probabilities(settings[3])),
        ),
    }[operator]()


def call(operator: str, tensors: Tensors, settings: dict[str, Any], path: str) -> Tensor:
    """The operator's result on `path`, or by the ``oracle`` or the ``usual`` implementation. CPU tensors are moved to
    where the path runs, and the result is moved back."""
    if path in ("oracle", "usual"):
        function = getattr(oracle if path == "oracle" else usual, operator)
        return function(**structured(operator, tensors), **resolved(operator, tensors, settings))
    if path == "raw":
        arguments = raw_arguments(operator, tensors, settings)
        if operator in INFERENCE:
            return raw(operator, "reference")(*arguments)
        needs_grad = any(t is not None and t.requires_grad for t in tensors.values())
        return importlib.import_module(f"mvit_kernels.ops.{operator}").apply("reference", needs_grad, *arguments)
    away = device_of(path) != "cpu" and all(t is None or t.device.type == "cpu" for t in tensors.values())
    if away:
        tensors = {name: None if t is None else t.to(device_of(path)) for name, t in tensors.items()}
    if "seed" in settings:
        settings = resolved(operator, tensors, settings)
    out = getattr(mvit_kernels, operator)(**structured(operator, tensors), **settings, backend=path)
    return out.cpu() if away else out


def call_raw(operator: str, backend: str, tensors: Tensors, settings: dict[str, Any]) -> tuple[Tensor, ...]:
    """The results of the raw forward operator for CPU tensors, moved to where it runs and back."""
    moved = {name: None if t is None else t.to(device_of(backend)) for name, t in tensors.items()}
    return tuple(t.cpu() for t in raw(operator, backend)(*raw_arguments(operator, moved, settings)))


def evaluate(
    function: Callable[[Tensors], Tensor],
    tensors: Tensors,
    gradients: bool | tuple[str, ...],
    layout: str = "contiguous",
    arithmetic: contextlib.AbstractContextManager = contextlib.nullcontext(),  # noqa: B008  (it has no state)
) -> dict[str, Tensor]:
    """The result, and the gradients of all tensors or of those named, for the same seeded gradient of the result; both
    are computed inside `arithmetic`."""
    wanted = [name for name, t in tensors.items() if t is not None and (gradients is True or name in (gradients or ()))]
    leaves = {name: None if t is None else t.detach().requires_grad_(name in wanted) for name, t in tensors.items()}
    with arithmetic:
        out = function(leaves)
    results = {"out": out.detach()}
    if wanted:  # a gradient of the result that every dtype represents exactly
        grad_out = lay_out(Draw(99)(*out.shape).to(torch.bfloat16).to(out.device, out.dtype), layout)[0]
        with arithmetic:
            grads = torch.autograd.grad(out, [leaves[name] for name in wanted], grad_out)
        results.update({f"gradient of {name}": grad for name, grad in zip(wanted, grads, strict=True)})
    return results


def carefully(
    function: Callable[[Tensors], Tensor],
    tensors: Tensors,
    gradients: bool | tuple[str, ...],
    dtype: torch.dtype,
    layout: str = "contiguous",
) -> Callable[[str, int], Tensor]:
    """Samples of what careful arithmetic in `dtype` makes of `evaluate`'s results, by name and seed; `tensors` are
    float64."""

    @functools.cache
    def results(seed: int) -> dict[str, Tensor]:
        return evaluate(function, tensors, gradients, layout, RoundedArithmetic(dtype, seed))

    return lambda name, seed: results(seed)[name]


def _switch() -> Callable[..., None]:
    """``torch.use_deterministic_algorithms``. It imports inductor for its settings, in a second or two, which a process
    that compiles nothing does not need."""
    compiles = "torch._inductor.config" in sys.modules
    return torch.use_deterministic_algorithms if compiles else torch._C._set_deterministic_algorithms


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """Fill every ``torch.empty`` with NaN, even in compiled code, so that memory which is read before it is written
    shows."""
    switch = _switch()
    switch(True, warn_only=True)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*deterministic.*")
            yield
    finally:
        switch(False, warn_only=False)
