# SPDX-License-Identifier: Apache-2.0
"""Whether anything frozen may have changed since it was looked at last, in one comparison.

A native call stands for dozens of modules with hundreds of weights. Looking at each of them takes 60 µs before a call,
and 250 when the processor has slept and nothing is in its caches: a tenth of XXS in bfloat16 at batch 1. So frozen
modules tell of their changes here, and only after one is everything looked at again.
"""

from __future__ import annotations

from typing import Any

last = object()  # another one after each change


def note() -> None:
    """Some frozen module changes. (A new object each time: two threads cannot count to the same number.)"""
    global last
    last = object()


class NotedDict(dict):
    """A dict whose changes are noted: the buffers of a frozen module, which ``torch.func.functional_call`` and others
    replace in their dict, past ``__setattr__``."""

    def __setitem__(self, key: Any, value: Any) -> None:
        super().__setitem__(key, value)
        note()

    def __delitem__(self, key: Any) -> None:
        super().__delitem__(key)
        note()

    def __ior__(self, other: Any) -> NotedDict:
        self.update(other)
        return self

    def clear(self) -> None:
        super().clear()
        note()

    def pop(self, *args: Any) -> Any:
        try:
            return super().pop(*args)
        finally:
            note()

    def popitem(self) -> tuple[Any, Any]:
        try:
            return super().popitem()
        finally:
            note()

    def setdefault(self, *args: Any) -> Any:
        try:
            return super().setdefault(*args)
        finally:
            note()

    def update(self, *args: Any, **kwargs: Any) -> None:
        super().update(*args, **kwargs)
        note()
