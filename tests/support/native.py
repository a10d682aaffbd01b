# SPDX-License-Identifier: Apache-2.0
"""The C++ library, for the tests that are about it."""

import json

import pytest

from mvit_kernels.backends import library as _library

LIBRARY = _library.LIBRARY_DIRECTORY / "libmvit_kernels_cpu.so"


def why_not_built() -> str:
    information = _library.LIBRARY_DIRECTORY / "build_info.json"
    if not information.exists():
        return "never built: `make build` does it"
    return json.loads(information.read_text())["cpu"].get("reason", "built, and then lost")


def skip_without_a_compiler() -> None:
    """Skip the module if there is no compiler to build the library with; a library that should be there and is not is
    an error."""
    if not LIBRARY.exists() and why_not_built().startswith("no C++ compiler"):
        pytest.skip(f"the C++ library is not built: {why_not_built()}", allow_module_level=True)
