# SPDX-License-Identifier: Apache-2.0
"""``torch.compiler.assume_constant_result`` without what it loads."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

Function = TypeVar("Function", bound=Callable)


def assume_constant_result(function: Function) -> Function:
    """Mark `function` as one whose result a trace takes as a constant, as ``torch.compiler.assume_constant_result``.

    PyTorch's own sets the same mark, but imports torch._dynamo first, and with it sympy: two thirds of the time that
    importing torch itself takes, in a process that may never compile (1.6 of 2.2 s here). A test compares the marks.
    """
    setattr(function, "_dynamo_marked_constant", True)  # noqa: B010  functions have no such attribute of their own
    return function
