# SPDX-License-Identifier: Apache-2.0
"""A backend for the tests: "triton" on the CPU, served by the reference's raw operators, as selective as a test
needs."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator

import torch

from mvit_kernels import backends
from mvit_kernels._utils.plain import DTYPES
from mvit_kernels.backends.contract import REGISTRY, Backend
from mvit_kernels.backends.library import SCHEMAS, raw

NAME = "triton"


def _as_compiled(operator: Callable) -> Callable:
    """Neither autograd nor autocast sees inside a compiled kernel."""

    def kernel(*arguments):
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            return operator(*arguments)

    return kernel


@contextlib.contextmanager
def fake_backend(
    operators: Iterable[str],
    *,
    refuses: Callable[[backends.Call], list[str]] = lambda call: [],
    unavailable: Iterable[str] = (),
    preferred: bool = True,
) -> Iterator[Backend]:
    """Let "triton" serve `operators` on the CPU inside, and be the automatic choice there if `preferred`.

    Example:
        >>> with fake_backend(["patch_attention"], refuses=lambda call: ["not today"]):
        ...     model(images)

    The fake backend has a list `asked` of all `Call`s that it was asked about.
    """
    asked: list[backends.Call] = []

    def predicate(call: backends.Call) -> list[str]:
        if not torch.compiler.is_compiling():  # a side effect would be guarded upon
            asked.append(call)
        return list(refuses(call))

    class Fake(Backend):
        name, device_type, dtypes = NAME, "cpu", DTYPES
        supports = dict.fromkeys(operators, predicate)

        def unavailable(self, device_type: str) -> list[str]:
            return list(reasons)

    fake, reasons = Fake(), tuple(unavailable)
    fake.asked = asked
    library = torch.library.Library("mvit_kernels", "IMPL")
    for operator in operators:
        for name in (operator, f"{operator}_backward"):
            if name in SCHEMAS:
                library.impl(f"{name}.{NAME}", _as_compiled(raw(name, "reference")), "CPU")
    before = dict(REGISTRY), dict(backends.PREFERENCE), backends._override
    REGISTRY[NAME] = fake
    if preferred:
        backends.PREFERENCE["cpu"] = (NAME, "reference")
    backends._choices.clear()
    backends._logged.clear()
    try:
        yield fake
    finally:
        for current, previous in zip((REGISTRY, backends.PREFERENCE), before, strict=False):
            current.clear()
            current.update(previous)
        backends._override = before[2]
        backends._choices.clear()
        backends._logged.clear()
        library._destroy()
