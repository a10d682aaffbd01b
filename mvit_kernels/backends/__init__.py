# SPDX-License-Identifier: Apache-2.0
"""Which backend serves a call: ``reference``, ``cpu``, ``triton`` or ``cuda``.

Example:
    >>> with mvit_kernels.use_backend("reference"):
    ...     model(images)

Each backend is a folder here, whose ``BACKEND`` keeps the contract of `mvit_kernels.backends.contract`; adding one is a
folder, its name in ``library.BACKENDS`` and its place in `PREFERENCE`. An obstacle to all but the reference (a
transform of PyTorch, a tensor subclass: `mvit_kernels._utils.transforms`) is the call's own.

Who decides, strongest first: ``backend=`` of the call (``accelerate(model, backend=…)`` sets it on the blocks),
``use_backend``, the environment variable ``MVIT_KERNELS_BACKEND`` (read when the package is imported), the automatic
choice: the first in order of `PREFERENCE` without a reason against it. The choice depends on devices, dtypes and shapes
alone, so that ``torch.compile`` folds it.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from . import cpu, cuda, reference, triton
from .contract import REGISTRY, Backend, Call, StackPlan, unavailable
from .library import BACKENDS, TransformerLayerWeights

__all__ = [
    "BACKENDS",
    "PREFERENCE",
    "Backend",
    "BackendError",
    "Call",
    "StackPlan",
    "checked_name",
    "choose",
    "operators",
    "pack",
    "packs_weights",
    "plan_stack",
    "reasons_against",
    "requested",
    "serves",
    "unavailable",
    "use_backend",
]

logger = logging.getLogger("mvit_kernels")

# Fastest first. The reference is plain PyTorch and comes last everywhere.
PREFERENCE = {"cpu": ("cpu", "reference"), "cuda": ("cuda", "triton", "reference")}
REGISTRY.update({room.BACKEND.name: room.BACKEND for room in (reference, cpu, triton, cuda)})


class BackendError(RuntimeError):
    """A backend that was asked for by name cannot serve the call; the message lists every reason."""


def checked_name(name: str | None, source: str) -> str | None:
    if name in (None, "", "auto"):
        return None
    if name not in BACKENDS:
        raise ValueError(f"{source}: unknown backend {name!r}; choose one of {', '.join(BACKENDS)}, or 'auto'")
    return name


def requested() -> str | None:
    """The backend that `use_backend` or ``MVIT_KERNELS_BACKEND`` asks for, None for the automatic choice."""
    return _override


_override: str | None = checked_name(os.environ.get("MVIT_KERNELS_BACKEND"), "MVIT_KERNELS_BACKEND")
_choices: dict[tuple[Any, ...], Any] = {}  # what was decided, by the function that decided and what it was given
_logged: set[str] = set()


@contextlib.contextmanager
def use_backend(name: str | None) -> Iterator[None]:
    """Ask for one backend, for every operator called inside; ``"auto"`` or None returns to the automatic choice.

    Example:
        >>> with mvit_kernels.use_backend("reference"):
        ...     model(images)

    It is a setting of the process, not of the thread, like those of ``torch.backends``.

    Raises:
        ValueError: an unknown name.
        BackendError: from the operators called inside, where the backend cannot serve the call.
    """
    global _override
    name = checked_name(name, "use_backend")
    previous = _override
    _override = name
    try:
        yield
    finally:
        _override = previous


def operators(backend: str) -> tuple[str, ...]:
    """The operators that `backend` has kernels for (all, for the reference)."""
    return tuple(REGISTRY[backend].supports) if backend in REGISTRY else ()


def reasons_against(backend: str, call: Call) -> list[str]:
    """Why `backend` cannot serve `call`; an empty list if it can."""
    return REGISTRY[backend].reasons_against(call) if backend in REGISTRY else list(unavailable(backend, ""))


def choose(call: Call, requested: str | None = None) -> str:
    """The backend that serves `call`.

    Raises:
        ValueError: `requested` is no backend's name.
        BackendError: the backend that was asked for cannot serve the call.
    """
    return _remembered(_choose, call, (requested or _override,))


def serves(operator: str, call: Call, requested: str | None = None) -> bool:
    """Whether a backend other than the reference serves `call`: the one asked for, or any by the automatic choice."""
    requested = checked_name(requested or _override, operator)
    if requested is not None:
        return requested != "reference" and not reasons_against(requested, call)
    return choose(call, "auto") != "reference"


def plan_stack(stack: Call, attention: Call, *, dropout: bool, requested: str | None = None) -> StackPlan:
    """How a stack of transformer layers is divided: by the backend that was asked for, or the first that has a plan.

    Args:
        stack, attention, dropout: see `Backend.plan_stack`.
        requested: a backend's name, as in `choose`.

    Raises:
        ValueError, BackendError: as `choose` does, for the attention of the stack.
    """
    return _remembered(_plan_stack, stack, (attention, dropout, requested or _override))


def packs_weights(backend: str) -> bool:
    """Whether `backend` packs the weights of ``transformer`` itself, and wants them as they are."""
    return REGISTRY[backend].packs_weights


def pack(
    layers: Sequence[TransformerLayerWeights],
    final_norm: tuple[Tensor, Tensor] | None,
    num_heads: int,
    dtype: torch.dtype,
) -> None:
    """Let every backend prepare the weights of a frozen stack now that it would pack at the first call."""
    for backend in REGISTRY.values():
        backend.pack(layers, final_norm, num_heads, dtype)


def _plan_stack(stack: Call, attention: Call, dropout: bool, requested: str | None) -> StackPlan:
    requested = checked_name(requested, stack.operator)
    if _exporting():
        return StackPlan.SEQUENCES
    candidates = PREFERENCE.get(stack.device_type, ("reference",)) if requested is None else (requested,)
    for backend in candidates:
        plan = REGISTRY[backend].plan_stack(stack, attention, dropout) if backend in REGISTRY else None
        if plan is not None:
            break
    else:
        plan = StackPlan.SEQUENCES
        choose(attention, requested)  # raises, with the reasons, where a backend was asked for
    if requested is None and not dropout and plan is not StackPlan.WHOLE:
        choose(stack, "auto")  # for the log: why no kernel takes all of it
    return plan


def _remembered(decide: Callable[..., Any], call: Call, more: tuple[Any, ...]) -> Any:
    """``decide(call, *more)``, once for equal arguments."""
    # Traced once, and the symbolic sizes of a trace or of fake tensors are no keys.
    if call.obstacle or torch.compiler.is_compiling() or torch.jit.is_tracing():
        return decide(call, *more)
    key = (decide, call, *more)
    decided = _choices.get(key)
    if decided is None:
        if len(_choices) > 4096:  # multi-scale training sees dozens of shapes; a shape a call must not grow without end
            _choices.clear()
        decided = _choices[key] = decide(call, *more)
    return decided


def _exporting() -> bool:
    """Exporters need plain operators of PyTorch, whatever backend runs otherwise."""
    return torch.compiler.is_exporting() or torch.jit.is_tracing()


def _choose(call: Call, requested: str | None) -> str:
    requested = checked_name(requested, call.operator)
    if _exporting():
        return "reference"
    if requested is not None:
        reasons = reasons_against(requested, call)
        if reasons:
            raise BackendError(
                f"{call.operator}: backend {requested!r} was asked for and cannot serve this call "
                f"({_describe(call)}): {'; '.join(reasons)}. Leave the backend to the automatic choice, or change the "
                "call."
            )
        return requested
    for backend in PREFERENCE.get(call.device_type, ("reference",)):
        reasons = reasons_against(backend, call)
        if not reasons:
            return backend
        if not torch.compiler.is_compiling():
            for reason in reasons:
                _log_once(f"{call.operator}: not on backend {backend!r}: {reason}")
    return "reference"


def _describe(call: Call) -> str:
    facts = "".join(f", {key}={value}" for key, value in call.facts)
    return f"shape {tuple(call.shape)}, {call.dtype}, {call.device_type}{facts}"


def _log_once(message: str) -> None:
    if message not in _logged:
        if len(_logged) > 4096:  # reasons tell sizes: these too must not grow without end
            _logged.clear()
        _logged.add(message)
        logger.info(message)
