# SPDX-License-Identifier: Apache-2.0
"""The C++ library, for the tests that are about it."""

import json

import pytest

from mvit_kernels.backends import library

LIBRARY = library.LIBRARY_DIRECTORY / "libmvit_kernels_cpu.so"


def instruction_sets() -> tuple[str, ...]:
    """Those that the library has, the best first."""
    information = json.loads((library.LIBRARY_DIRECTORY / "build_info.json").read_text())["cpu"]
    return (*reversed(information["isa"]), "portable")


def why_not_built() -> str:
    information = library.LIBRARY_DIRECTORY / "build_info.json"
    if not information.exists():
        return "never built: `make build` does it"
    return json.loads(information.read_text())["cpu"].get("reason", "built, and then lost")


def skip_without_a_compiler() -> None:
    """Load the library, or skip the module if there is no compiler to build it with; a library that should be there and
    is not is an error of test_backend.py."""
    if not LIBRARY.exists() and why_not_built().startswith("no C++ compiler"):
        pytest.skip(f"the C++ library is not built: {why_not_built()}", allow_module_level=True)
    library.load("cpu")
