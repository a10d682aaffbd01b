# SPDX-License-Identifier: Apache-2.0
"""Which backend serves a call: ``reference``, ``cpu``, ``triton`` or ``cuda``.

Example:
    >>> with mvit_kernels.use_backend("reference"):
    ...     model(images)

Each backend is a folder here whose ``BACKEND`` implements the contract of `mvit_kernels.backends.contract`. To add one,
add its folder, its name in ``library.BACKENDS`` and its place in ``preference.PREFERENCE``. What rules out every
backend but the reference (a PyTorch transform, a tensor subclass: `mvit_kernels._utils.transforms`) is the `obstacle`
of the call.

Precedence, highest first: ``backend=`` of the call (``accelerate(model, backend=…)`` sets it on the blocks);
``use_backend``; the environment variable ``MVIT_KERNELS_BACKEND`` (read when the package is imported); the automatic
choice, which is the first backend with no reason against it, in the order of `mvit_kernels.backends.preference`. The
choice depends on devices, dtypes and shapes alone, so that ``torch.compile`` folds it.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from types import FrameType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._utils.text import some
from . import cpu, cuda, preference, reference, triton
from .building import PACKAGE
from .contract import REGISTRY, Backend, Call, StackPlan, unavailable
from .library import BACKENDS, TransformerLayerWeights
from .preference import PREFERENCE

__all__ = [
    "BACKENDS",
    "PREFERENCE",
    "Backend",
    "BackendError",
    "Call",
    "Serving",
    "StackPlan",
    "checked_name",
    "choose",
    "explain",
    "has_kernels",
    "operators",
    "pack",
    "packs_weights",
    "plan_stack",
    "reasons_against",
    "requested",
    "run",
    "server",
    "serves",
    "unavailable",
    "use_backend",
    "warn_without_kernels",
]

logger = logging.getLogger("mvit_kernels")

REGISTRY.update({room.BACKEND.name: room.BACKEND for room in (reference, cpu, triton, cuda)})


class BackendError(RuntimeError):
    """A backend that was asked for by name cannot serve the call; the message lists every reason."""


class Serving(NamedTuple):
    """Which backends serve some calls, and why kernels do not serve all of them; printable.

    Example:
        >>> print(report(model).blocks[0].serving)
        cpu (avx512)
    """

    backends: tuple[str, ...]  # their names, in the order of the calls; none where one was requested and cannot
    variants: tuple[str, ...] = ()  # which kernels of each these are, such as the instruction set, or ""
    reasons: tuple[str, ...] = ()  # why no kernel serves some of the calls, each behind the name of a backend

    @property
    def by_kernels(self) -> bool:
        """Whether a kernel serves any of the calls; the reference is PyTorch itself."""
        return any(name != "reference" for name in self.backends)

    def __str__(self) -> str:
        named = zip(self.backends, self.variants, strict=True)
        return ", ".join(f"{name} ({variant})" if variant else name for name, variant in named) or "no backend"


def checked_name(name: str | None, source: str) -> str | None:
    """`name` if it is a backend's; None for the automatic choice, which None, "" and "auto" ask for.

    Args:
        name: a backend's name, "auto", "" or None.
        source: the function or variable that the name came from, for the message.

    Raises:
        ValueError: an unknown name.
    """
    if name in (None, "", "auto"):
        return None
    if name not in BACKENDS:
        raise ValueError(f"{source}: unknown backend {name!r}; choose one of {', '.join(BACKENDS)}, or 'auto'")
    return name


def requested() -> str | None:
    """The backend that `use_backend` or ``MVIT_KERNELS_BACKEND`` asks for; None for the automatic choice."""
    return _override


_override: str | None = checked_name(os.environ.get("MVIT_KERNELS_BACKEND"), "MVIT_KERNELS_BACKEND")
_choices: dict[tuple[Any, ...], Any] = {}  # decisions, by the function that decides and its arguments
_logged: set[str] = set()
_warned = False  # whether `warn_without_kernels` has warned


@contextlib.contextmanager
def use_backend(name: str | None) -> Iterator[None]:
    """Ask for one backend for every operator called inside; ``"auto"`` or None returns to the automatic choice.

    Example:
        >>> with mvit_kernels.use_backend("reference"):
        ...     model(images)

    The setting belongs to the process, not to the thread, like those of ``torch.backends``.

    Args:
        name: "reference", "cpu", "triton", "cuda", "auto" or None.

    Raises:
        ValueError: an unknown name.
        BackendError: raised by the operators called inside where the backend cannot serve the call.
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
    """The names of the operators that `backend` has kernels for; all of them for the reference."""
    return tuple(REGISTRY[backend].supports) if backend in REGISTRY else ()


def has_kernels(operator: str, device_type: str) -> bool:
    """Whether a backend other than the reference, the requested one or any of the automatic choice, has `operator`."""
    candidates = PREFERENCE.get(device_type, ()) if _override is None else (_override,)
    for name in candidates:
        if name != "reference" and name in REGISTRY and operator in REGISTRY[name].supports:
            return True
    return False


def reasons_against(backend: str, call: Call) -> list[str]:
    """Why `backend` cannot serve `call`; an empty list if it can."""
    return REGISTRY[backend].reasons_against(call) if backend in REGISTRY else list(unavailable(backend, ""))


def choose(call: Call, requested: str | None = None) -> str:
    """The name of the backend that serves `call`.

    Args:
        call: what is to be computed.
        requested: the backend asked for; None means what `use_backend` or the environment asks for, "auto" the
            automatic choice.

    Raises:
        ValueError: `requested` is not a backend's name.
        BackendError: the backend that was asked for cannot serve the call.
    """
    return _remembered(_choose, call, (requested or _override,))


def explain(calls: Iterable[Call], requested: str | None = None) -> Serving:
    """Which backends serve `calls`, as `choose` answers for each, and the reasons where that is PyTorch itself.

    Args:
        calls: what is to be computed.
        requested: as in `choose`, but one that cannot serve a call is reported instead of raised.

    Raises:
        ValueError: `requested` is not a backend's name, or one is set up wrongly (`Backend.unavailable`).
    """
    serving: dict[str, str] = {}
    found: dict[str, None] = {}
    for call in calls:
        wanted = checked_name(requested or _override, call.operator)
        served, against = _first(call) if wanted is None else (None, {wanted: reasons_against(wanted, call)})
        if wanted is not None and not against[wanted]:
            served = wanted
        if served is not None:
            serving[served] = REGISTRY[served].variant(call.dtype)
        if served in (None, "reference"):
            found.update((f"{name}: {reason}", None) for name, reasons in against.items() for reason in reasons)
            if wanted is None and (why := preference.measured(call)):
                found[f"reference: {why}"] = None
            if wanted is None and call.device_type not in PREFERENCE:
                found[f"no backend has kernels for {call.device_type}; move the model to the CPU or an NVIDIA GPU"] = (
                    None
                )
    return Serving(tuple(serving), tuple(serving.values()), tuple(found))


def warn_without_kernels(function: str, servings: Sequence[Serving], device_type: str, dtype: torch.dtype) -> None:
    """Warn, once a process, if kernels serve nothing of what `function` was called for, and nobody asked for that.

    Args:
        function: the public function, for the message; the warning points at the line that calls it.
        servings: what serves each block.
        device_type, dtype: of the blocks.
    """
    global _warned
    reasons = list(dict.fromkeys(reason for serving in servings for reason in serving.reasons))
    if _warned or device_type == "meta" or not reasons or any(serving.by_kernels for serving in servings):
        return
    _warned = True
    level = 1
    frame: FrameType | None = sys._getframe()
    while frame is not None and frame.f_code.co_filename.startswith((str(PACKAGE), "<")):  # "<frozen runpy>"
        level, frame = level + 1, frame.f_back
    warnings.warn(
        f"{function}: no kernel serves {dtype} on {device_type} here; plain PyTorch computes the blocks, correctly but "
        f"no faster. {some(reasons, joint='; ')}",
        stacklevel=level if frame is not None else 1,
    )


def run(name: str, backend: str, *arguments: Any) -> Any:
    """Run the raw operator `name` on `backend`, which `choose` has named (see `Backend.run`)."""
    return REGISTRY[backend].run(name, *arguments)


def serves(operator: str, call: Call, requested: str | None = None) -> bool:
    """Whether a backend other than the reference serves `call`: the requested one, or any by the automatic choice.

    Args:
        operator: its name, for the message.
        call, requested: as in `choose`.

    Raises:
        ValueError: `requested` is not a backend's name.
    """
    return server(operator, call, requested) is not None


def server(operator: str, call: Call, requested: str | None = None) -> str | None:
    """The backend by which `serves` holds; None where it does not. Arguments and errors are those of `serves`."""
    requested = checked_name(requested or _override, operator)
    if requested is None:
        requested = choose(call, "auto")
    elif reasons_against(requested, call):
        return None
    return None if requested == "reference" else requested


def plan_stack(stack: Call, attention: Call, *, dropout: bool, requested: str | None = None) -> StackPlan:
    """How a stack of transformer layers is divided: by the requested backend, or by the first that has a plan.

    Args:
        stack, attention, dropout: see `Backend.plan_stack`.
        requested: a backend's name, as in `choose`.

    Raises:
        ValueError, BackendError: as in `choose`, for the stack's attention.
    """
    return _remembered(_plan_stack, stack, (attention, dropout, requested or _override))


def packs_weights(backend: str) -> bool:
    """Whether `backend` packs the weights of ``transformer`` itself and takes them without a cast."""
    return REGISTRY[backend].packs_weights


def pack(
    layers: Sequence[TransformerLayerWeights],
    final_norm: tuple[Tensor, Tensor] | None,
    num_heads: int,
    dtype: torch.dtype,
) -> None:
    """Let every backend pack a frozen stack's weights now instead of at the first call.

    Args:
        layers, final_norm, num_heads: as in `mvit_kernels.transformer`.
        dtype: of the rows.
    """
    for backend in REGISTRY.values():
        backend.pack(layers, final_norm, num_heads, dtype)


def _plan_stack(stack: Call, attention: Call, dropout: bool, requested: str | None) -> StackPlan:
    requested = checked_name(requested, stack.operator)
    if _exporting():
        return StackPlan.SEQUENCES
    # Whoever has the whole stack in one operator is asked first; it may want the stack divided nevertheless.
    known = PREFERENCE.get(stack.device_type, ("reference",)) if requested is None else (requested,)
    for backend in sorted(known, key=lambda name: name == "reference" or stack.operator not in operators(name)):
        if requested is None and preference.excluded(backend, attention):
            continue
        others = [name for name in known if name not in (backend, "reference")]
        alone = all(reasons_against(name, attention) or preference.excluded(name, attention) for name in others)
        plan = REGISTRY[backend].plan_stack(stack, attention, dropout, alone) if backend in REGISTRY else None
        if plan is not None:
            break
    else:
        plan = StackPlan.SEQUENCES
        choose(attention, requested)  # raises, with the reasons, if a backend was requested
    if requested is None and not dropout and plan is not StackPlan.WHOLE:
        choose(stack, "auto")  # for the log: why no kernel takes the whole stack
    return plan


def _remembered(decide: Callable[..., Any], call: Call, more: tuple[Any, ...]) -> Any:
    """``decide(call, *more)``, cached by its arguments."""
    # A trace decides once, and the symbolic sizes of traces and fake tensors cannot be keys.
    if call.obstacle or torch.compiler.is_compiling() or torch.jit.is_tracing():
        return decide(call, *more)
    key = (decide, call, *more)
    decided = _choices.get(key)
    if decided is None:
        if len(_choices) > 4096:  # multi-scale training sees dozens of shapes; a new shape a call must not fill memory
            _choices.clear()
        decided = _choices[key] = decide(call, *more)
    return decided


def _exporting() -> bool:
    """Whether the call is being exported: exporters need PyTorch's own operators, whatever backend runs otherwise."""
    return torch.compiler.is_exporting() or torch.jit.is_tracing()


def _choose(call: Call, requested: str | None) -> str:
    requested = checked_name(requested, call.operator)
    if _exporting():
        return "reference"
    if requested is not None:
        reasons = reasons_against(requested, call)
        if reasons:
            raise BackendError(
                f"{call.operator}: backend {requested!r} was requested but cannot serve this call "
                f"({_describe(call)}): {'; '.join(reasons)}. Request 'auto' instead "
                "(by backend=, use_backend or MVIT_KERNELS_BACKEND), or change the call."
            )
        return requested
    served, against = _first(call)
    if not torch.compiler.is_compiling():
        for backend, reasons in against.items():
            for reason in reasons:
                _log_once(f"{call.operator}: not on backend {backend!r}: {reason}")
    return served


def _first(call: Call) -> tuple[str, dict[str, list[str]]]:
    """The backend of the automatic choice, and the reasons against each that comes before it."""
    against: dict[str, list[str]] = {}
    for backend in preference.order(call):
        reasons = reasons_against(backend, call) + preference.excluded(backend, call)
        if not reasons:
            return backend, against
        against[backend] = reasons
    return "reference", against


def _describe(call: Call) -> str:
    facts = "".join(f", {key}={value}" for key, value in call.facts)
    return f"shape {tuple(call.shape)}, {call.dtype}, {call.device_type}{facts}"


def _log_once(message: str) -> None:
    if message not in _logged:
        if len(_logged) > 4096:  # reasons contain sizes, so this must not fill memory either
            _logged.clear()
        _logged.add(message)
        logger.info(message)
