# SPDX-License-Identifier: Apache-2.0
"""Registration with a module that may never be imported: it is done when somebody else imports that module."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from types import ModuleType


def after_import(name: str, function: Callable[[], object]) -> None:
    """Call `function` when the module `name` has been imported; now, if it has been already.

    Example:
        >>> after_import("torch.utils.flop_counter", register_formulas)  # which importing ourselves would take 0.4 s

    Args:
        name: the module's full name.
        function: called once, before the statement that imports the module continues.
    """
    if name in sys.modules:
        function()
        return
    waiting = next((finder for finder in sys.meta_path if isinstance(finder, _Finder) and finder.name == name), None)
    if waiting is None:
        waiting = _Finder(name)
        sys.meta_path.insert(0, waiting)
    waiting.functions.append(function)


class _Finder:
    """Finds one module as Python would without it, and adds what is to be done after the module's own code."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.functions: list[Callable[[], object]] = []
        self.searching = False

    def find_spec(self, name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        if name != self.name or self.searching:
            return None
        self.searching = True
        try:
            spec = importlib.util.find_spec(name)  # by the other finders
        finally:
            self.searching = False
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            sys.meta_path.remove(self)  # only now: a spec may be asked for without an import
            for function in self.functions:
                function()

        setattr(spec.loader, "exec_module", exec_module)  # noqa: B010  of this loader alone: each module has its own
        return spec
