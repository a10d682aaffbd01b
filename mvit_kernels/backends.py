# SPDX-License-Identifier: Apache-2.0
"""Which backend serves a call: ``reference``, ``cpu``, ``triton`` or ``cuda``.

Example:
    >>> with mvit_kernels.use_backend("reference"):
    ...     model(images)

A backend other than the reference is a module of this package (``mvit_kernels.cpu``, …) with

- ``unavailable(device_type)``: the reasons why it cannot be used at all on this machine, an empty list if it can;
- ``SUPPORTS``: operator name -> function from a `Call` to the reasons why not, an empty list if it can.

An obstacle to all of them (a transform of PyTorch, a tensor subclass: `mvit_kernels._transforms`) is the call's own.

The same two feed the automatic choice (the first backend in order of `PREFERENCE` without a reason against it), the
error when a backend was asked for by name, the log, and ``mvit-kernels info``. The choice depends on devices, dtypes
and shapes alone, so that ``torch.compile`` folds it.

Who decides, strongest first: ``backend=`` of the call (``accelerate(model, backend=…)`` sets it on the blocks),
``use_backend``, the environment variable ``MVIT_KERNELS_BACKEND`` (read when the package is imported), the automatic
choice.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator
from types import ModuleType
from typing import Any, NamedTuple

import torch

from ._library import BACKENDS, SCHEMAS

logger = logging.getLogger("mvit_kernels")

# Fastest first. The reference is plain PyTorch and comes last everywhere.
PREFERENCE = {"cpu": ("cpu", "reference"), "cuda": ("cuda", "triton", "reference")}
_MODULES: dict[str, ModuleType] = {}  # filled at the end of this file


class BackendError(RuntimeError):
    """A backend that was asked for by name cannot serve the call; the message lists every reason."""


class Call(NamedTuple):
    """What a backend may base its answer on. `facts` are the operator's own: widths, heads, patch, …"""

    operator: str
    device_type: str
    dtype: torch.dtype
    needs_grad: bool
    shape: tuple[int, ...]
    facts: tuple[tuple[str, Any], ...]
    obstacle: str = ""  # why nothing but PyTorch's own operators can serve it

    def fact(self, name: str) -> Any:
        """The operator's own fact `name`."""
        return dict(self.facts)[name]


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
_choices: dict[tuple[Call, str | None], str] = {}
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


@torch.compiler.assume_constant_result  # it may load a library, which is no business of a trace
def unavailable(backend: str, device_type: str) -> tuple[str, ...]:
    """Why `backend` cannot run on this machine's `device_type` at all; empty if it can."""
    if backend == "reference":
        return ()
    if backend not in _MODULES:
        return (f"this version of mvit_kernels has no {backend} kernels",)
    return tuple(_MODULES[backend].unavailable(device_type))


def operators(backend: str) -> tuple[str, ...]:
    """The operators that `backend` has kernels for (all, for the reference)."""
    if backend == "reference":
        return tuple(name for name in SCHEMAS if not name.endswith("_backward"))
    return tuple(_MODULES[backend].SUPPORTS) if backend in _MODULES else ()


def reasons_against(backend: str, call: Call) -> list[str]:
    """Why `backend` cannot serve `call`; an empty list if it can."""
    if backend == "reference":
        return []
    reasons = list(unavailable(backend, call.device_type))
    if call.obstacle:
        reasons.append(call.obstacle)
    if call.needs_grad and f"{call.operator}_backward" not in SCHEMAS:
        reasons.append(f"{call.operator} is for inference, and this call needs a gradient")
    if backend not in _MODULES:
        return reasons
    predicate = _MODULES[backend].SUPPORTS.get(call.operator)
    if predicate is None:
        return [*reasons, f"it has no {call.operator}"]
    return reasons + predicate(call)


def choose(call: Call, requested: str | None = None) -> str:
    """The backend that serves `call`.

    Raises:
        ValueError: `requested` is no backend's name.
        BackendError: the backend that was asked for cannot serve the call.
    """
    requested = requested or _override
    # Traced once, and the symbolic sizes of a trace or of fake tensors are no keys.
    if call.obstacle or torch.compiler.is_compiling() or torch.jit.is_tracing():
        return _choose(call, requested)
    key = (call, requested)
    chosen = _choices.get(key)
    if chosen is None:
        if len(_choices) > 4096:  # multi-scale training sees dozens of shapes; a shape a call must not grow without end
            _choices.clear()
        chosen = _choices[key] = _choose(call, requested)
    return chosen


def serves(operator: str, call: Call, requested: str | None = None) -> bool:
    """Whether a backend other than the reference serves `call`: the one asked for, or any by the automatic choice."""
    requested = checked_name(requested or _override, operator)
    if requested is not None:
        return requested != "reference" and not reasons_against(requested, call)
    return choose(call, "auto") != "reference"


def _choose(call: Call, requested: str | None) -> str:
    requested = checked_name(requested, call.operator)
    # Exporters need plain operators of PyTorch, whatever backend runs otherwise.
    if torch.compiler.is_exporting() or torch.jit.is_tracing():
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


from . import cpu, cuda, triton  # noqa: E402  (they judge the `Call` defined above)

_MODULES["cpu"] = cpu
_MODULES["cuda"] = cuda
_MODULES["triton"] = triton
