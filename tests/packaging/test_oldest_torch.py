# SPDX-License-Identifier: Apache-2.0
"""csrc names nothing of PyTorch that its oldest supported version lacks; `make test-oldest` compiles it with that."""

import re

import pytest

from support import ROOT
from support.torch_names import LIST, OLDEST, used, used_in

HAS = set(LIST.read_text().split())


def test_the_oldest_torch_is_the_same_everywhere():
    major, minor = map(int, OLDEST.split(".")[:2])
    assert f'dependencies = ["torch>={major}.{minor}"' in (ROOT / "pyproject.toml").read_text()
    cmake = (ROOT / "csrc" / "cmake" / "common.cmake").read_text()
    assert f"TORCH_TARGET_VERSION=0x{major:02x}{minor:02x}000000000000" in cmake
    assert f"TORCH_VERSION VERSION_LESS {major}.{minor})" in cmake


def test_the_sources_use_only_what_it_has():
    newer = {name: files for name, files in used().items() if name not in HAS}
    assert not newer, f"not known to be in torch {OLDEST}; `make test-oldest` tells, and writes {LIST.name}: {newer}"


def test_the_list_has_nothing_else():
    assert set(used()) == HAS, "`make test-oldest` writes the list anew"


@pytest.mark.parametrize("name", ["STABLE_TORCH_ERROR_CODE_CHECK", "torch::stable::from_blob", "aoti_torch_new_thing"])
def test_a_newer_name_is_seen(name):
    """The first is what the sources once used: 2.12 has it, and 2.10 and 2.11 have not."""
    source = (ROOT / "csrc" / "cuda" / "tensors.h").read_text()
    assert used_in(source) <= HAS
    changed = re.sub(r"\bTORCH_ERROR_CODE_CHECK\(", f"{name}(", source)
    assert used_in(changed) - HAS == {name.rpartition("::")[2]}
    assert used_in(f'// {name}\n/* {name} */ "{name}"') == set()
