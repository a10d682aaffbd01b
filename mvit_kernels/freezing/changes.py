# SPDX-License-Identifier: Apache-2.0
"""Whether anything frozen may have changed since it was looked at last, in one comparison.

A native call stands for dozens of modules with hundreds of weights. Looking at each of them takes 60 µs before a call,
and 250 when the processor has slept and nothing is in its caches: a tenth of XXS in bfloat16 at batch 1. So frozen
modules tell of their changes here, and only after one is everything looked at again.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

last = object()  # another one after each change


def note() -> None:
    """Some frozen module has changed: called after the change, so that whoever looks in between looks again. (A new
    object each time: two threads cannot count to the same number.)"""
    global last
    last = object()


def _noted(method: Callable[..., Any]) -> Any:
    @functools.wraps(method)
    def change(self: dict, *args: Any, **kwargs: Any) -> Any:
        try:
            return method(self, *args, **kwargs)
        finally:
            note()

    return change


class NotedDict(dict):
    """A dict whose changes are noted: the buffers of a frozen module, which ``torch.func.functional_call`` and others
    replace in their dict, past ``__setattr__``."""

    __setitem__ = _noted(dict.__setitem__)
    __delitem__ = _noted(dict.__delitem__)
    __ior__ = _noted(dict.__ior__)
    clear = _noted(dict.clear)
    pop = _noted(dict.pop)
    popitem = _noted(dict.popitem)
    setdefault = _noted(dict.setdefault)
    update = _noted(dict.update)
