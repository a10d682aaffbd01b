# SPDX-License-Identifier: Apache-2.0
"""``verify``: the fast path and PyTorch's own path, both against float64, block by block.

The tolerance rule: with e(·) the largest absolute difference from the float64 result on the same inputs,
``e(fast) ≤ 2 · (e(PyTorch in the same dtype) + band)``; the band is one unit of the dtype at the largest value of the
result.

Two readings make the rule fit whole models. PyTorch's own error is the larger of its two memory formats, NCHW and
channels-last: they run different convolutions, and at XXS's third stage the errors of the two already differ by 1.8
times. For gradients each is run on the batch in both orders, since sums over a batch round differently: one sample of
a rounding error is below half of another right one about once in some thousand tensors, and a model has hundreds. And
some gradients are zero in exact arithmetic (a key's bias shifts all scores of a row alike), so that all of
their value is rounding: a gradient's band is taken at the largest gradient of the same module's parameters.

PyTorch's error differs from machine to machine. Where the fast path misses the rule by it, the error that careful
arithmetic in the dtype would make stands in (`mvit_kernels.rounding`), which is the same on all; and where PyTorch's
own is more than two thousand times that, its result is garbage, and no yardstick.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ._utils.plain import DTYPES, cast_floats, copy_of
from .adapters import FrozenBlock, named_blocks, restore
from .rounding import PLAUSIBLE_BANDS, RUNS, RoundedArithmetic, careful_error, yardstick

GRADIENT = "gradient of "


class ErrorRow(NamedTuple):
    """Errors of one tensor: a block's output, the model's, or a gradient."""

    name: str
    error: float  # of the fast path, against float64
    pytorch_error: float  # of PyTorch's own path in the same dtype, against float64
    allowed: float  # 2 · (pytorch_error + band), or the same with careful_error
    scale: float  # the float64 result's largest value
    careful_error: float | None = None  # of careful arithmetic in the dtype; None where PyTorch's error decides

    @property
    def ok(self) -> bool:
        """Whether the tolerance rule holds; it does not for an error that is not a number."""
        return self.error <= self.allowed


class VerificationReport(NamedTuple):
    """The errors of a model on the operators, beside PyTorch's own; printable."""

    rows: tuple[ErrorRow, ...]

    @property
    def ok(self) -> bool:
        """Whether the tolerance rule holds for every row."""
        return all(row.ok for row in self.rows)

    def __str__(self) -> str:
        width = max(len("output"), *(len(row.name) for row in self.rows))
        lines = [f"{'':<{width}}  {'error':>9}  {'PyTorch':>9}  {'allowed':>9}  {'largest':>9}"]
        for row in self.rows:
            numbers = f"{row.error:9.2e}  {row.pytorch_error:9.2e}  {row.allowed:9.2e}  {row.scale:9.2e}"
            lines.append(f"{row.name:<{width}}  {numbers}  {'ok' if row.ok else 'TOO LARGE'}")
        return "\n".join(lines)


def error_row(
    name: str,
    fast: Tensor,
    pytorch: Sequence[Tensor],
    truth: Tensor,
    scale: float | None = None,
    careful: Callable[[int], Tensor] | None = None,
) -> ErrorRow:
    """The tolerance rule on one tensor: `pytorch` are PyTorch's own results, `truth` is float64, the band is taken at
    `scale`, the truth's largest value where None; `careful` gives samples of careful arithmetic by their seed, and is
    asked only where PyTorch's error does not decide."""
    if scale is None:
        scale = largest(truth)
    unit = max(torch.finfo(t.dtype).eps for t in (fast, *pytorch))
    band = unit * scale

    def error(value: Tensor) -> float:
        if value.shape != truth.shape:
            raise ValueError(
                f"verify: {name} has shape {tuple(value.shape)} on one path and {tuple(truth.shape)} on the other"
            )
        return largest(value.double() - truth)

    ours, own = error(fast), max(error(value) for value in pytorch)
    row = ErrorRow(name, ours, own, 2 * (own + band), scale)
    if careful is None or (row.ok and own <= PLAUSIBLE_BANDS * band):
        return row
    expected = careful_error([careful(seed) for seed in range(RUNS)], truth)
    return row._replace(allowed=2 * (yardstick(own, expected) + band), careful_error=expected)


def largest(value: Tensor) -> float:
    """The largest absolute value; 0 of nothing."""
    return value.abs().max().item() if value.numel() else 0.0


def verify(
    model: nn.Module, example: Any, *, reference: nn.Module | None = None, gradients: bool = False
) -> VerificationReport:
    """Run `model` as it is and on PyTorch's own path, and measure both against the same model in float64.

    Example:
        >>> model = mvit_kernels.accelerate(model)
        >>> print(mvit_kernels.verify(model, images))
        >>> print(mvit_kernels.verify(mvit_kernels.freeze(model), images, reference=model))

    Args:
        model: an accelerated model, or a frozen one with its `reference`.
        example: a batch of images (B, 3, H, W), a list of images or whatever else the model takes as its one argument,
            or its keyword arguments as a dict. Floats in it are cast to the model's dtype.
        reference: the model that is right by definition; `model` restored where None.
        gradients: also compare the gradients of every parameter, in training mode without dropout; batch norms use the
            batch's statistics, and their running ones are left alone.

    Returns:
        The errors of every MobileViT block's output, of the output, and of the gradients if asked for. No model is
        changed.

    Raises:
        TypeError: `model` is no ``nn.Module``.
        ValueError: an empty example, an output that is not finite on PyTorch's own path, or a frozen model without
            reference.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"verify: model is {type(model).__name__}; a torch.nn.Module is wanted")
    frozen = any(isinstance(module, FrozenBlock) for module in model.modules())
    if frozen and reference is None:
        raise ValueError("verify: a frozen model has lost its own path; give the model it was made from as reference=")
    if frozen and gradients:
        raise ValueError("verify: a frozen model has no gradients; verify the model it was made from")
    for value in _tensors(example):
        if value.numel() == 0:
            raise ValueError(
                f"verify: the example is empty, of shape {tuple(value.shape)}; at least one image is wanted"
            )

    pytorch = restore(copy_of(model if reference is None else reference))
    truth = cast_floats(copy_of(pytorch), torch.float64)
    dtype = _dtype(model)
    if frozen and dtype != _dtype(pytorch):  # the same for PyTorch's own path, so that the comparison is fair
        pytorch = _casting(cast_floats(pytorch, dtype))
    run = _gradients if gradients else _outputs
    fast = run(copy_of(model), example, dtype)
    with _Double():
        exact = run(copy_of(truth), example, torch.float64)
    if not all(torch.isfinite(value).all() for value in exact.values()):
        raise ValueError("verify: the model's output is not finite in float64 either; mend its weights or the example")
    reverse = gradients and _is_one_batch(example)
    own = [run(copy_of(pytorch), example, dtype)]
    if reverse:
        own.append(_gradients(copy_of(pytorch), example, dtype, reverse=True))
    laid_out = _map(_channels_last, example)
    pytorch._apply(_channels_last)
    own.append(run(copy_of(pytorch), laid_out, dtype))
    if reverse:
        own.append(_gradients(pytorch, laid_out, dtype, reverse=True))

    def careful(seed: int) -> dict[str, Tensor]:
        with _Double(), RoundedArithmetic(dtype, seed):
            return run(copy_of(truth), example, torch.float64)

    return VerificationReport(tuple(error_rows(fast, own, exact, None if dtype == torch.float64 else careful)))


def error_rows(
    outputs: Mapping[str, Tensor],
    own: Sequence[Mapping[str, Tensor]],
    truth: Mapping[str, Tensor],
    careful: Callable[[int], Mapping[str, Tensor]] | None = None,
) -> Iterator[ErrorRow]:
    """The tolerance rule on every one of `outputs`, by name; gradients are named ``GRADIENT`` + the parameter's name.

    Args:
        outputs: the results to judge.
        own: PyTorch's own results in the same dtype, one mapping for each memory format.
        truth: the float64 results.
        careful: the float64 computation under `RoundedArithmetic` with a seed.
    """
    samples = None if careful is None else functools.cache(careful)
    for name, value in outputs.items():
        scale = None
        if name.startswith(GRADIENT):
            module = name.rpartition(".")[0]
            scale = max(largest(other) for key, other in truth.items() if key.rpartition(".")[0] == module)
        sample = None if samples is None else lambda seed, name=name: samples(seed)[name]
        yield error_row(name, value, [result[name] for result in own], truth[name], scale, sample)


def _outputs(model: nn.Module, example: Any, dtype: torch.dtype) -> dict[str, Tensor]:
    """Every block's output and the model's, in evaluation mode."""
    outputs: dict[str, Tensor] = {}
    model.eval()
    for name, module, _ in named_blocks(model):
        if name:
            module.register_forward_hook(lambda _, __, output, name=name: outputs.__setitem__(name, output))
    with torch.no_grad():
        outputs.update(named_outputs(_call(model, example, dtype)))
    return outputs


def _gradients(model: nn.Module, example: Any, dtype: torch.dtype, reverse: bool = False) -> dict[str, Tensor]:
    """The output in training mode without dropout, and the gradient of every parameter for one fixed random cotangent;
    the same by the batch in reverse order, if asked for."""
    model.train()
    for module in model.modules():
        if "drop" in type(module).__name__.lower():
            module.eval()
    if reverse:
        example = _reversed(example)
    outputs = named_outputs(_call(model, example, dtype))
    if reverse:
        outputs = {name: value.flip(0) for name, value in outputs.items()}
    generator = torch.Generator().manual_seed(0)
    loss = 0.0
    for value in outputs.values():
        cotangent = torch.randn(value.shape, generator=generator, dtype=torch.float64, device="cpu")
        loss = loss + (value * cotangent.to(value)).sum()
    model.zero_grad()
    loss.backward()
    gradients = {GRADIENT + name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {name: value.detach() for name, value in outputs.items()} | gradients


class _Double(TorchFunctionMode):
    """What a float64 model asks for by name (``x.float()``, ``dtype=torch.float32``) is float64 too."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in (Tensor.float, Tensor.half, Tensor.bfloat16):
            func = Tensor.double
        args = [torch.float64 if _is_float(value) else value for value in args]
        kwargs = {key: torch.float64 if _is_float(value) else value for key, value in (kwargs or {}).items()}
        return func(*args, **kwargs)


def _is_float(value: Any) -> bool:
    return isinstance(value, torch.dtype) and value in DTYPES


def _casting(model: nn.Module) -> nn.Module:
    """`model` with modules that cast their input to their parameters' dtype, as frozen ones do."""
    for module in model.modules():
        weight = next(module.parameters(recurse=False), None)
        if weight is not None and not isinstance(module, torch.jit.ScriptModule):  # which takes no hooks
            dtype = weight.dtype
            module.register_forward_pre_hook(lambda _, args, dtype=dtype: tuple(_cast(value, dtype) for value in args))
    return model


def _dtype(model: nn.Module) -> torch.dtype:
    """The dtype that a model computes in: its blocks', where it has any."""
    modules = (*(module for _, module, _ in named_blocks(model)), model)
    weights = (weight for module in modules for weight in (*module.parameters(), *module.buffers()))
    return next((weight.dtype for weight in weights if weight.dtype in DTYPES), torch.float32)


def _call(model: nn.Module, example: Any, dtype: torch.dtype) -> Any:
    if isinstance(example, Mapping):
        return model(**{key: _cast(value, dtype) for key, value in example.items()})
    return model(_cast(example, dtype))


def _map(function: Callable[[Tensor], Tensor], value: Any) -> Any:
    """`value` with `function` of every tensor in it, however nested."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, Mapping):
        return {key: _map(function, item) for key, item in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_map(function, item) for item in value))
    if isinstance(value, (list, tuple)):
        return type(value)(_map(function, item) for item in value)
    return value


def _cast(value: Any, dtype: torch.dtype) -> Any:
    return _map(lambda tensor: tensor.to(dtype) if tensor.dtype in DTYPES else tensor, value)


def _reversed(value: Any) -> Any:
    return _map(lambda tensor: tensor.flip(0) if tensor.dim() else tensor, value)


def _channels_last(value: Tensor) -> Tensor:
    if value.dim() != 4 or value.layout != torch.strided or type(value) not in (Tensor, nn.Parameter):
        return value
    return value.contiguous(memory_format=torch.channels_last)


def _tensors(value: Any) -> list[Tensor]:
    tensors: list[Tensor] = []
    _map(lambda tensor: tensors.append(tensor) or tensor, value)
    return tensors


def _is_one_batch(example: Any) -> bool:
    """Whether images are the first axis of every tensor, and none is in a list: then their order can be reversed."""
    values = example.values() if isinstance(example, Mapping) else [example]
    return not any(isinstance(value, (list, tuple, Mapping)) and _tensors(value) for value in values)


def named_outputs(output: Any) -> dict[str, Tensor]:
    """The floating tensors of a model's output, by name: "output", or "output.logits" of a Hugging Face output."""
    if isinstance(output, Tensor):
        return {"output": output}
    items = output.items() if isinstance(output, Mapping) else enumerate(output)
    return {f"output.{key}": value for key, value in items if isinstance(value, Tensor) and value.is_floating_point()}
