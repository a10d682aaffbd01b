# SPDX-License-Identifier: Apache-2.0
"""``verify``: the fast path and PyTorch's own path, both compared with float64, block by block.

The tolerance rule: with e(·) the largest absolute difference from the float64 result on the same inputs,
``e(fast) ≤ 2 · (e(PyTorch in the same dtype) + band)``. The band is one unit (eps) of the dtype at the largest value of
the result.

Two details adapt the rule to whole models:

- PyTorch's own error is the larger one of its two memory formats, NCHW and channels-last. They run different
  convolutions, and at XXS's third stage their errors already differ by a factor of 1.8. For gradients each format is
  also run with the batch in reverse order, since sums over a batch then round differently: one sample of a rounding
  error is below half of another correct one about once in some thousand tensors, and a model has hundreds.
- Some gradients are zero in exact arithmetic (a key's bias shifts all scores of a row alike), so that their value is
  nothing but rounding. A gradient's band is therefore taken at the largest gradient of the same module's parameters.

PyTorch's error depends on the machine. If the fast path misses the rule, PyTorch's error is replaced by the error that
careful arithmetic in the dtype would make (`mvit_kernels.rounding`) if that is larger; it is the same on all machines.
If PyTorch's error is more than two thousand times the careful one, its result is garbage and not used as a yardstick.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ._utils.arguments import check_model
from ._utils.plain import DTYPES, cast_floats, copy_of
from ._utils.text import some
from .adapters import AccelerationReport, named_blocks, report, restore
from .adapters._block import FrozenBlock
from .freezing.frozen import Frozen
from .rounding import PLAUSIBLE_BANDS, RoundedArithmetic, deciding_error, yardstick

GRADIENT = "gradient of "


class ErrorRow(NamedTuple):
    """Errors of one tensor: the output of a block or of the model, or a gradient. All are largest absolute values."""

    name: str
    error: float  # of the fast path, against float64
    pytorch_error: float  # of PyTorch's own path in the same dtype, against float64
    allowed: float  # 2 · (pytorch_error + band), or the same with careful_error
    scale: float  # largest value at which the band is taken: the float64 result's, or of a module's gradients
    careful_error: float | None = None  # of the samples of careful arithmetic that decide; None if PyTorch's error does

    @property
    def ok(self) -> bool:
        """Whether the tolerance rule holds; it does not hold for a NaN error."""
        return self.error <= self.allowed


class VerificationReport(NamedTuple):
    """The errors of a model's fast path, with PyTorch's own for comparison; printable."""

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
    """Apply the tolerance rule to one tensor.

    Args:
        name: of the tensor.
        fast: the result to judge.
        pytorch: PyTorch's own results in the same dtype.
        truth: the float64 result.
        scale: value at which the band is taken; None for the largest one of `truth`.
        careful: from a seed to a sample of careful arithmetic; called only if PyTorch's error does not decide, until a
            sample allows the error.

    Raises:
        ValueError: results of different shapes.
    """
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

    def judged(expected: float) -> ErrorRow:
        return row._replace(allowed=2 * (yardstick(own, expected) + band), careful_error=expected)

    return judged(deciding_error(careful, truth, lambda expected: judged(expected).ok))


def largest(value: Tensor) -> float:
    """The largest absolute value; 0 for an empty tensor."""
    return value.abs().max().item() if value.numel() else 0.0


def verify(
    model: nn.Module, example: Any, *, reference: nn.Module | None = None, gradients: bool = False
) -> VerificationReport:
    """Run `model` as it is and on PyTorch's own path, and compare both with the same model in float64.

    Example:
        >>> model = mvit_kernels.accelerate(model)
        >>> print(mvit_kernels.verify(model, images))
        >>> print(mvit_kernels.verify(mvit_kernels.freeze(model), images, reference=model))

    Args:
        model: an accelerated model, or a frozen one together with its `reference`. Whether a kernel or plain PyTorch
            serves our operators (``print(mvit_kernels.report(model))``), they are compared all the same.
        example: a batch of images (B, 3, H, W), a list of images or whatever else the model takes as its only argument,
            or a dict of its keyword arguments. Floating tensors in it are cast to the model's dtype.
        reference: the model that is correct by definition; None for `model` itself, restored, of which something must
            be accelerated.
        gradients: compare the output and the gradients of all parameters in training mode without dropout instead of
            the blocks' outputs in evaluation mode. Batch norms use the batch's statistics.

    Returns:
        A `VerificationReport` with a row for each MobileViT block's output and for the model's outputs; with
        `gradients`, for the model's outputs and each parameter's gradient. No model is changed, nor its running
        statistics.

    Raises:
        TypeError: `model` or `reference` is not an ``nn.Module``.
        ValueError: an empty example; without `reference`, a frozen model or one in which nothing is accelerated; a
            frozen one with `gradients`; an output that is not finite in float64; outputs of different shapes on the two
            paths.
    """
    check_model("verify", model)
    if reference is not None and not isinstance(reference, nn.Module):
        raise TypeError(
            f"verify: reference is {type(reference).__name__}; a torch.nn.Module is wanted, such as the one that model "
            "was made from"
        )
    frozen = any(isinstance(module, (FrozenBlock, Frozen)) for module in model.modules())
    if frozen and reference is None:
        raise ValueError(
            "verify: a frozen model no longer has PyTorch's own path; give the model it was made from as reference="
        )
    if frozen and gradients:
        raise ValueError("verify: a frozen model has no gradients; verify the model it was made from")
    if reference is None:
        idle = nothing_accelerated(report(model), gradients)
        if idle:
            raise ValueError(f"verify: {idle}")
    for value in _tensors(example):
        if value.numel() == 0:
            raise ValueError(
                f"verify: the example is empty, of shape {tuple(value.shape)}; at least one image is wanted"
            )

    pytorch = restore(copy_of(model if reference is None else reference))
    truth = cast_floats(copy_of(pytorch), torch.float64)
    dtype = _dtype(model)
    if frozen and dtype != _dtype(pytorch):  # PyTorch's own path in the same dtype, for a fair comparison
        pytorch = _casting(cast_floats(pytorch, dtype))
    run = _gradients if gradients else _outputs
    fast = run(copy_of(model), example, dtype)
    with Double():
        exact = run(copy_of(truth), example, torch.float64)
    if not all(torch.isfinite(value).all() for value in exact.values()):
        raise ValueError("verify: the model's output is not finite in float64 either; fix its weights or the example")
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
        with Double(), RoundedArithmetic(dtype, seed):
            return run(copy_of(truth), example, torch.float64)

    return VerificationReport(tuple(error_rows(fast, own, exact, None if dtype == torch.float64 else careful)))


def nothing_accelerated(told: AccelerationReport, gradients: bool) -> str:
    """Why there is nothing of ours to verify in a model that is not frozen, and what to do; "" if there is something.

    Args:
        told: the model's report.
        gradients: as in `verify`. Convolution layers are accelerated in training alone.
    """
    if told.accelerated or (gradients and any(layer.fused for layer in told.convolutions)):
        return ""
    if not told.blocks:
        why = f"{told}; give a model that has such blocks"
    elif told.declined:
        why = f"its blocks are declined: {some(dict.fromkeys(r for b in told.declined for r in b.reasons), joint='; ')}"
    else:
        why = "call mvit_kernels.accelerate(model) first"
    return f"nothing is accelerated in this model, and PyTorch alone is not verified: {why}"


def error_rows(
    outputs: Mapping[str, Tensor],
    own: Sequence[Mapping[str, Tensor]],
    truth: Mapping[str, Tensor],
    careful: Callable[[int], Mapping[str, Tensor]] | None = None,
) -> Iterator[ErrorRow]:
    """Apply the tolerance rule to each of `outputs`; a gradient's name is ``GRADIENT`` + the parameter's name.

    Args:
        outputs: the results to judge, by name.
        own: PyTorch's own results in the same dtype, one mapping per memory format and order of the batch.
        truth: the float64 results.
        careful: from a seed to the results of the float64 computation under `RoundedArithmetic`.
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
    """The outputs of every block and of the model, in evaluation mode."""
    outputs: dict[str, Tensor] = {}
    model.eval()
    for name, module, _ in named_blocks(model):
        if name:
            module.register_forward_hook(lambda _, __, output, name=name: outputs.__setitem__(name, output))
    with torch.no_grad():
        outputs.update(named_outputs(_call(model, example, dtype)))
    return outputs


def _gradients(model: nn.Module, example: Any, dtype: torch.dtype, reverse: bool = False) -> dict[str, Tensor]:
    """The outputs in training mode without dropout, and the gradient of every parameter for one fixed random cotangent.

    With `reverse`, they are computed with the batch in reverse order.
    """
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
    loss: Any = 0.0
    for value in outputs.values():
        cotangent = torch.randn(value.shape, generator=generator, dtype=torch.float64, device="cpu")
        loss = loss + (value * cotangent.to(value)).sum()
    model.zero_grad()
    loss.backward()
    gradients = {GRADIENT + name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {name: value.detach() for name, value in outputs.items()} | gradients


class Double(TorchFunctionMode):
    """Makes explicit casts inside a float64 model (``x.float()``, ``dtype=torch.float32``) stay in float64."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (Tensor.float, Tensor.half, Tensor.bfloat16):
            func = Tensor.double
        args = [torch.float64 if _is_float(value) else value for value in args]
        kwargs = {key: torch.float64 if _is_float(value) else value for key, value in (kwargs or {}).items()}
        return func(*args, **kwargs)


def _is_float(value: Any) -> bool:
    return isinstance(value, torch.dtype) and value in DTYPES


def _casting(model: nn.Module) -> nn.Module:
    """Make the modules of `model` cast their input to their parameters' dtype, as frozen modules do."""
    for module in model.modules():
        weight = next(module.parameters(recurse=False), None)
        if weight is not None and not isinstance(module, torch.jit.ScriptModule):  # a ScriptModule takes no hooks
            dtype = weight.dtype
            module.register_forward_pre_hook(lambda _, args, dtype=dtype: tuple(_cast(value, dtype) for value in args))
    return model


def _dtype(model: nn.Module) -> torch.dtype:
    """The dtype that a model computes in: that of its MobileViT blocks, if it has any."""
    modules = (*(module for _, module, _ in named_blocks(model)), model)
    weights = (weight for module in modules for weight in (*module.parameters(), *module.buffers()))
    return next((weight.dtype for weight in weights if weight.dtype in DTYPES), torch.float32)


def _call(model: nn.Module, example: Any, dtype: torch.dtype) -> Any:
    if isinstance(example, Mapping):
        return model(**{key: _cast(value, dtype) for key, value in example.items()})
    return model(_cast(example, dtype))


def _map(function: Callable[[Tensor], Tensor], value: Any) -> Any:
    """`value` with `function` applied to every tensor in it, however nested."""
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

    def collect(tensor: Tensor) -> Tensor:
        tensors.append(tensor)
        return tensor

    _map(collect, value)
    return tensors


def _is_one_batch(example: Any) -> bool:
    """Whether the first axis of every tensor is the batch, and no tensor is in a list, so that it can be reversed."""
    values = example.values() if isinstance(example, Mapping) else [example]
    return not any(isinstance(value, (list, tuple, Mapping)) and _tensors(value) for value in values)


def named_outputs(output: Any) -> dict[str, Tensor]:
    """The floating tensors of a model's output by name: "output", or e.g. "output.logits" of Hugging Face's classes and
    of a named tuple."""
    if isinstance(output, Tensor):
        return {"output": output}
    if hasattr(output, "_asdict"):
        output = output._asdict()
    items = output.items() if isinstance(output, Mapping) else enumerate(output)
    return {f"output.{key}": value for key, value in items if isinstance(value, Tensor) and value.is_floating_point()}
