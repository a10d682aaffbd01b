# SPDX-License-Identifier: Apache-2.0
"""The checks that every operator passes on every path.

Example:
    >>> check("patch_attention", dict(shape=(2, 6, 4), heads=4, head_dim=16, patch=(2, 2)), path="raw")

All arguments are plain literals, so that a failing case can be pasted into a shell:
``PYTHONPATH=tests python -c 'from support.checks import *; check(…)'``.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import mvit_kernels
from mvit_kernels.backends import triton
from mvit_kernels.backends.library import BACKENDS, raw
from support.cases import (
    DIFFERENTIABLE,
    Tensors,
    backward_arguments,
    call,
    call_raw,
    carefully,
    convert,
    device_of,
    differentiable,
    evaluate,
    make,
    plain_dtype,
    poisoned,
    raw_arguments,
    structured,
    takes,
)
from support.layouts import lay_out, lay_out_all
from support.recorder import Recorder
from support.tolerance import Compared, assert_close_as_pytorch, assert_close_over_draws

THREADS = 2


@contextlib.contextmanager
def threads_of(path: str) -> Iterator[None]:
    """All threads for kernels: how they share the work is part of what is tested."""
    torch.set_num_threads(THREADS if path in BACKENDS[1:] else 1)
    try:
        yield
    finally:
        torch.set_num_threads(1)


def check(
    operator: str,
    sizes: dict[str, Any],
    *,
    dtype: str = "float32",
    path: str = "reference",
    layout: str = "contiguous",
    norm_dtype: str | None = None,
    gradients: bool = True,
    seed: int = 0,
) -> None:
    """The result and every gradient by the tolerance rule; inputs and the memory around them stay unchanged.

    A backend that refuses the case has to say so, and the automatic choice has to serve it nevertheless.
    """

    def draw(seed: int) -> dict[str, Compared]:
        return _draw(operator, sizes, dtype, path, layout, norm_dtype, gradients, seed)

    assert_close_over_draws(draw, seed)


def _draw(operator, sizes, dtype, path, layout, norm_dtype, gradients, seed) -> dict[str, Compared]:
    where = f"{operator} by {path}"
    gradients = gradients and differentiable(operator, path)
    tensors64, settings = make(operator, sizes, seed)
    kind, norm_kind = getattr(torch, dtype), getattr(torch, norm_dtype) if norm_dtype else None
    tensors = convert(tensors64, kind, norm_kind, device_of(path))
    laid_out = lay_out_all(tensors, layout)
    tensors = {name: view for name, (view, _) in laid_out.items()}
    before = {
        name: (view if buffer is None else buffer).clone()
        for name, (view, buffer) in laid_out.items()
        if view is not None
    }

    watch = contextlib.nullcontext() if path == "reference" else Recorder()
    with poisoned(), threads_of(path), watch as recorder:
        try:
            ours = evaluate(lambda t: call(operator, t, settings, path), tensors, gradients, layout)
        except mvit_kernels.BackendError as refusal:
            assert str(refusal).startswith(f"{operator}: backend {path!r} was requested"), refusal
            ours = evaluate(lambda t: call(operator, t, settings, None), tensors, gradients, layout)
            recorder = None
    if recorder is not None:
        backend = "reference" if path == "raw" else path
        expected = [f"{operator}.{backend}"] + [f"{operator}_backward.{backend}"] * gradients
        assert recorder.ours() == expected, f"{where}: ran {recorder.ours()}"

    for name, copy in before.items():
        view, buffer = laid_out[name]
        assert torch.equal(view if buffer is None else buffer, copy), (
            f"{where}: {name} or what lies around it was written"
        )
    as_usual = convert(tensors, torch.float32) if dtype == "float64" else tensors

    def in_pytorch(t: Tensors) -> Tensor:
        return call(operator, t, settings, "usual")

    usual = evaluate(in_pytorch, as_usual, gradients, layout)
    doubles = convert(tensors, torch.float64)
    truth = evaluate(lambda t: call(operator, t, settings, "oracle"), doubles, gradients, layout)
    careful = carefully(in_pytorch, doubles, gradients, as_usual["qkv" if operator == "patch_attention" else "x"].dtype)
    return {
        f"{where}: {name}": Compared(value, usual[name], truth[name], functools.partial(careful, name))
        for name, value in ours.items()
    }


def check_autocast(operator: str, sizes: dict[str, Any], path: str = "reference") -> None:
    """Under autocast: the same bits as the call with the casts done by hand, LayerNorm's parameters left in float32."""
    tensors, settings = make(operator, sizes)
    tensors = convert(tensors, torch.float32, device=device_of(path))

    def by_autocast(t: Tensors) -> Tensor:
        with torch.autocast(device_of(path), torch.bfloat16):
            return call(operator, t, settings, path)

    def by_hand(t: Tensors) -> Tensor:
        cast = {name: v if v is None or "norm" in name else v.to(torch.bfloat16) for name, v in t.items()}
        return call(operator, cast, settings, path)

    gradients = differentiable(operator, path)
    ours, expected = evaluate(by_autocast, tensors, gradients), evaluate(by_hand, tensors, gradients)
    assert ours["out"].dtype == torch.bfloat16
    for name, value in ours.items():
        assert value.dtype == expected[name].dtype
        assert torch.equal(value, expected[name]), f"{operator} by {path} under autocast: {name} differs"


def check_gradients(operator: str, sizes: dict[str, Any], path: str, *, twice: bool = False) -> None:
    """Finite differences in float64; with `twice`, those of the gradients too."""
    tensors, settings = make(operator, sizes)
    names = [name for name, t in tensors.items() if t is not None]
    inputs = [tensors[name].requires_grad_() for name in names]

    def function(*values: Tensor) -> Tensor:
        return call(operator, {**tensors, **dict(zip(names, values, strict=True))}, settings, path)

    assert torch.autograd.gradcheck(function, inputs)
    if twice:  # the fused attention of PyTorch has no second derivative, its plain one has
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            assert torch.autograd.gradgradcheck(function, inputs, fast_mode=True)


def check_registration(
    operator: str, sizes: dict[str, Any], layout: str = "contiguous", backend: str = "reference"
) -> None:
    """``torch.library.opcheck`` of the raw operators: schema, fake (with strides), dispatch under AOTAutograd."""
    tensors, settings = make(operator, sizes)
    tensors = convert(tensors, plain_dtype(backend), device=device_of(backend))
    tensors = {name: view for name, (view, _) in lay_out_all(tensors, layout).items()}
    arguments = raw_arguments(operator, tensors, settings)
    torch.library.opcheck(raw(operator, backend), arguments)
    if operator in DIFFERENTIABLE and differentiable(operator, backend):
        outputs = raw(operator, backend)(*arguments)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        grad_out = lay_out(torch.randn_like(outputs[0]), layout)[0]
        arguments = backward_arguments(operator, tensors, settings, outputs, grad_out)
        torch.library.opcheck(raw(f"{operator}_backward", backend), arguments)


def check_same_bits(operator: str, sizes: dict[str, Any], path: str, runs: int = 20) -> None:
    """The same call gives the same bits every time, gradients included."""
    tensors, settings = make(operator, sizes)
    tensors = convert(tensors, plain_dtype(path), device=device_of(path))
    gradients = differentiable(operator, path)
    if triton.target.INTERPRETED:
        runs = 2  # which runs one program after another, slowly
    with threads_of(path):
        first = evaluate(lambda t: call(operator, t, settings, path), tensors, gradients)
        for _ in range(runs - 1):
            again = evaluate(lambda t: call(operator, t, settings, path), tensors, gradients)
            assert all(torch.equal(value, again[name]) for name, value in first.items())


def check_refusal(
    operator: str, sizes: dict[str, Any], change: dict[str, Any], error: type[Exception], *says: str
) -> None:
    """The public function with some arguments changed raises `error`, and its message starts with the operator's name
    and contains all of `says`. A changed argument is a value, or a function of the right argument."""
    tensors, settings = make(operator, sizes)
    arguments = {**structured(operator, convert(tensors, torch.float32)), **settings}
    for name, value in change.items():
        arguments[name] = value(arguments[name]) if callable(value) else value
    with pytest.raises(error) as raised:
        getattr(mvit_kernels, operator)(**arguments)
    message = str(raised.value)
    assert message.startswith(f"{operator}: "), message
    for fragment in says:
        assert fragment in message, f"{fragment!r} is not in {message!r}"


def check_gradients_one_by_one(operator: str, sizes: dict[str, Any], path: str) -> None:
    """Frozen parameters: a tensor gets the same gradient whether or not the others need theirs."""
    if not differentiable(operator, path):
        return  # check_graph_only_where_needed sees that it is refused
    tensors, settings = make(operator, sizes)
    tensors = convert(tensors, plain_dtype(path), device=device_of(path))
    together = evaluate(lambda t: call(operator, t, settings, path), tensors, True)
    for name in [name for name, t in tensors.items() if t is not None]:
        alone = evaluate(lambda t: call(operator, t, settings, path), tensors, (name,))
        assert torch.equal(alone[f"gradient of {name}"], together[f"gradient of {name}"]), (
            f"{operator} by {path}: {name}"
        )


def check_saved_statistics(operator: str, sizes: dict[str, Any], dtype: str, path: str) -> None:
    """The raw operator's second and third results are the mean and 1/σ of x's rows, in float32 or better."""
    backend = "reference" if path == "raw" else path
    tensors, settings = make(operator, sizes)
    tensors = convert(tensors, getattr(torch, dtype))
    if not takes(backend, dtype):
        with pytest.raises((TypeError, RuntimeError), match="bfloat16 and float"):
            call_raw(operator, backend, tensors, settings)
        return
    _, mean, rstd = call_raw(operator, backend, tensors, settings)
    x, d = tensors["x"].double(), sizes["shape"][-1]
    centred = x - x.sum(-1, keepdim=True) / d
    _, pytorch_mean, pytorch_rstd = torch.native_layer_norm(tensors["x"].float(), (d,), None, None, settings["eps"])
    truth = 1 / torch.sqrt((centred * centred).sum(-1) / d + settings["eps"])
    assert_close_as_pytorch("mean", mean, pytorch_mean.squeeze(-1), x.sum(-1) / d)
    assert_close_as_pytorch("rstd", rstd, pytorch_rstd.squeeze(-1), truth)


def check_graph_only_where_needed(operator: str, sizes: dict[str, Any], path: str) -> None:
    """A result has a graph iff some tensor needs a gradient and gradients are on; a path without gradients raises."""
    tensors, settings = make(operator, sizes)
    tensors = convert(tensors, plain_dtype(path), device=device_of(path))
    assert not call(operator, tensors, settings, path).requires_grad
    list(tensors.values())[-1].requires_grad_()
    with torch.no_grad():
        assert not call(operator, tensors, settings, path).requires_grad
    with torch.inference_mode():
        assert call(operator, tensors, settings, path).is_inference()
    if differentiable(operator, path):
        assert call(operator, tensors, settings, path).requires_grad
    else:
        with pytest.raises(mvit_kernels.BackendError, match="needs? (a gradient|one)"):
            call(operator, tensors, settings, path)


def check_meta(operator: str, sizes: dict[str, Any], path: str) -> None:
    """On the meta device: the shape and the dtype of the result, and nothing computed."""
    tensors, settings = make(operator, sizes)
    expected = call(operator, tensors, settings, path)
    out = call(operator, {name: t if t is None else t.to("meta") for name, t in tensors.items()}, settings, path)
    assert out.is_meta and out.shape == expected.shape and out.dtype == expected.dtype
