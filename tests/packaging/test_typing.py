# SPDX-License-Identifier: Apache-2.0
"""The public functions and classes are typed whole.

That their types are right, mypy finds in `make lint`, in the package and in typed_program.py.
"""

import importlib
import inspect

import pytest

import mvit_kernels
from mvit_kernels import backends, checkpoints, exporting, freezing, nn, ops, zoo
from mvit_kernels.training import sampler, sized
from support import ROOT

MODULES = (mvit_kernels, backends, checkpoints, exporting, freezing, nn, ops, zoo, sampler, sized)
OTHERS = ("mvit_kernels.training.loop", "mvit_kernels.training.evaluation", "mvit_kernels.training.recipe")


def public(module):
    """Name and object of each public function and class that the module, or the package for it, defines."""
    names = getattr(module, "__all__", None) or [name for name in vars(module) if not name.startswith("_")]
    for name in names:
        value = getattr(module, name)
        if getattr(value, "__module__", "").startswith("mvit_kernels") and callable(value):
            yield f"{module.__name__}.{name}", value


def functions(name, value):
    """The function, or the public methods and the constructor that a class itself defines."""
    if inspect.isfunction(value):
        yield name, value
    elif inspect.isclass(value):
        for key, member in vars(value).items():
            function = getattr(member, "__func__", getattr(member, "fget", member))
            written = inspect.isfunction(function) and function.__module__ == value.__module__
            if written and function.__code__.co_filename.startswith(str(ROOT)) and (key[0] != "_" or key == "__init__"):
                yield f"{name}.{key}", function


@pytest.mark.parametrize("module", [*MODULES, *OTHERS], ids=lambda module: getattr(module, "__name__", module))
def test_everything_public_is_annotated(module):
    module = importlib.import_module(module) if isinstance(module, str) else module
    found = [each for name, value in public(module) for each in functions(name, value)]
    assert found
    bare = []
    for name, function in found:
        signature = inspect.signature(function)
        bare += [
            f"{name}({key})" for key, p in signature.parameters.items() if key != "self" and p.annotation is p.empty
        ]
        bare += [f"{name} -> ?"] if signature.return_annotation is signature.empty else []
    assert not bare


def test_checkers_see_every_public_name():
    """In the imports that they alone read; at run time names come from the table."""
    source = (ROOT / "mvit_kernels" / "__init__.py").read_text()
    seen = [line.split(" as ")[1] for line in source.splitlines() if line.startswith("    from .") and " as " in line]
    assert sorted(seen) == sorted(set(mvit_kernels.__all__) - {"__version__"})
    assert (ROOT / "mvit_kernels" / "py.typed").is_file()
