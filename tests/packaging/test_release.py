# SPDX-License-Identifier: Apache-2.0
"""What is published: the sdist's files, metadata and description, the commit, the tag, and the libraries' symbols."""

from __future__ import annotations

import email
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from mvit_kernels.backends.library import LIBRARY_DIRECTORY
from release import check_tag, metadata, try_wheel, wheel
from support import ROOT

SOURCE = "https://example.com/someone/mvit_kernels"
ADDRESS = ("GITHUB_", "MVIT_KERNELS_REPOSITORY")  # variables that tell it
ADDED_TO_SDIST = {"PKG-INFO", "setup.cfg", "release/COMMIT"}


@pytest.fixture(autouse=True)
def nowhere(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith(ADDRESS)]:
        monkeypatch.delenv(name)


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    """A copy of the files that git has, or of this sdist's, as of a commit "0123abcd"."""
    folder = tmp_path_factory.mktemp("checkout")
    if (ROOT / ".git").exists():
        listed = subprocess.run(["git", "-C", ROOT, "ls-files"], capture_output=True, text=True, check=True).stdout
    else:
        listed = next(ROOT.glob("*.egg-info/SOURCES.txt")).read_text()
    for name in listed.splitlines():
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    (folder / metadata.COMMIT_FILE).write_text("0123abcd\n")
    return folder


@pytest.fixture(scope="module")
def sdist(checkout: Path, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("sdist")
    command = [sys.executable, "setup.py", "-q", "sdist", "--dist-dir", output]
    environment = {name: value for name, value in os.environ.items() if not name.startswith(ADDRESS)}
    done = subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    warnings = [line for line in done.stderr.splitlines() if "no previously-included files" not in line]
    assert not warnings, done.stderr
    (made,) = output.glob("*.tar.gz")
    return made


def members(sdist: Path) -> dict[str, tarfile.TarInfo]:
    with tarfile.open(sdist) as archive:
        return {member.name.partition("/")[2]: member for member in archive.getmembers() if member.isfile()}


def read(sdist: Path, name: str) -> str:
    with tarfile.open(sdist) as archive:
        return archive.extractfile(members(sdist)[name]).read().decode()


# -- The sdist ---------------------------------------------------------------------------------------------------------


def test_sdist_has_what_git_has(sdist: Path, checkout: Path) -> None:
    ours = {str(file.relative_to(checkout)) for file in checkout.rglob("*") if file.is_file()}
    ours = {name for name in ours if not name.startswith("mvit_kernels.egg-info/")}
    packed = {name for name in members(sdist) if not name.startswith("mvit_kernels.egg-info/")}
    assert ours | ADDED_TO_SDIST == packed
    assert not [name for name in packed if ".so" in name or "__pycache__" in name]
    assert members(sdist)[".ci/run"].mode & 0o111


def test_sdist_knows_its_commit_and_so_does_a_build_of_it(sdist: Path, tmp_path: Path) -> None:
    assert read(sdist, "release/COMMIT") == "0123abcd\n"
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path, filter="data")
    folder = tmp_path / sdist.name.removesuffix(".tar.gz")
    for library in ("cpu", "cuda"):
        (folder / "csrc" / library / "CMakeLists.txt").unlink()  # nothing to compile
    build = [sys.executable, "setup.py", "-q", "build_native", "--inplace"]
    subprocess.run(build, cwd=folder, check=True, stdout=subprocess.DEVNULL)
    information = json.loads((folder / "mvit_kernels" / "lib" / "build_info.json").read_text())
    for entry in information.values():
        assert entry["commit"] == "0123abcd" and entry["version"] == metadata.version()


def test_commit_of_a_checkout_and_of_changed_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metadata, "ROOT", tmp_path)
    assert metadata.commit() == ""  # though a folder above might be a checkout
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@example.com"]
    (tmp_path / "file").write_text("1")
    for command in (["init", "-q"], ["add", "file"], ["commit", "-q", "-m", "one"]):
        subprocess.run([*git, *command], check=True)
    clean = metadata.commit()
    assert re.fullmatch(r"[0-9a-f]{12}", clean)
    (tmp_path / "file").write_text("2")
    assert metadata.commit() == clean + "+"


# -- Metadata and description ------------------------------------------------------------------------------------------


def check_links(description: str) -> None:
    """Everything that it points at is an address."""
    prose = re.sub(r"^```.*?^```$|`[^`]+`", "", description, flags=re.MULTILINE | re.DOTALL)
    targets = re.findall(r"\]\(([^)\s]+)", prose) + re.findall(r"\b(?:src|srcset|href)=\"([^\"]+)", prose)
    assert targets and all(target.startswith("https://") for target in targets), targets


def test_metadata_and_description_on_pypi(sdist: Path) -> None:
    told = email.message_from_string(read(sdist, "PKG-INFO"))
    assert told.get_all("Project-URL") == [f"Paper, {metadata.PAPER}"]
    classifiers = told.get_all("Classifier")
    assert "Operating System :: POSIX :: Linux" in classifiers
    assert not [line for line in classifiers if "OS Independent" in line]
    assert told["Description-Content-Type"] == "text/markdown" and "# mvit_kernels" in told.get_payload()
    check_links(told.get_payload())
    twine = [sys.executable, "-m", "twine", "check", "--strict", sdist]
    done = subprocess.run(twine, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_description_and_addresses_of_a_build_that_was_told_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MVIT_KERNELS_REPOSITORY", f"{SOURCE}.git")
    description = metadata.long_description((ROOT / "README.md").read_text())
    check_links(description)
    assert f"({SOURCE}/blob/HEAD/" in description and f"{SOURCE}/raw/HEAD/" in description
    for page in set(re.findall(rf"{SOURCE}/(?:blob|raw)/HEAD/([^)\"\s#]+)", description)):
        assert (ROOT / page).exists(), page
    addresses = metadata.urls()
    assert set(addresses) == {"Paper", "Source", "Issues", "Changelog"}
    assert all(
        address.startswith(f"{SOURCE}/") for name, address in addresses.items() if name in ("Issues", "Changelog")
    )


README = """
[page](docs/a.md#part), [`code`](docs/b.md) and [here](#there), [whole](https://example.org/x).
![plot](a.png) [![badge](https://example.org/b.svg)](docs) [![own](b.svg)](docs)
<picture><source srcset="dark.png"><img src="light.png" alt="x"></picture> `[no](link.md)`
```python
x[i](y.md)
```
"""


def test_links_without_an_address_become_text() -> None:
    shown = metadata.long_description(README)
    assert shown == (
        "\npage, `code` and here, [whole](https://example.org/x).\n"
        " ![badge](https://example.org/b.svg) \n `[no](link.md)`\n```python\nx[i](y.md)\n```\n"
    )


def test_links_with_an_address_are_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GITHUB_SERVER_URL", "https://example.com")
    monkeypatch.setenv("GITHUB_REPOSITORY", "a/b")
    monkeypatch.setenv("GITHUB_REF_TYPE", "tag")
    monkeypatch.setenv("GITHUB_REF_NAME", "v1.2.3")
    page, raw = "https://example.com/a/b/blob/v1.2.3", "https://example.com/a/b/raw/v1.2.3"
    assert metadata.long_description(README) == (
        f"\n[page]({page}/docs/a.md#part), [`code`]({page}/docs/b.md) and [here]({page}/README.md#there), "
        "[whole](https://example.org/x).\n"
        f"![plot]({raw}/a.png) [![badge](https://example.org/b.svg)]({page}/docs) [![own]({raw}/b.svg)]({page}/docs)\n"
        f'<picture><source srcset="{raw}/dark.png"><img src="{raw}/light.png" alt="x"></picture> `[no](link.md)`\n'
        "```python\nx[i](y.md)\n```\n"
    )
    assert metadata.urls()["Changelog"] == f"{page}/CHANGELOG.md"


@pytest.mark.parametrize("told", ["github", "http://example.com/a/b", "https://example.com", "git@example.com:a/b"])
def test_an_address_that_is_none_is_an_error(told: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MVIT_KERNELS_REPOSITORY", told)
    with pytest.raises(SystemExit, match=r"MVIT_KERNELS_REPOSITORY is '.*'; an address such as https://"):
        metadata.urls()


# -- Version and tag ---------------------------------------------------------------------------------------------------


def test_version_is_the_newest_dated_entry_of_the_changelog() -> None:
    entry, _ = check_tag.newest_entry()
    assert entry == metadata.version() or not entry  # none: nothing was released yet


@pytest.mark.parametrize(
    ("tag", "changelog", "told"),
    [
        ("v1.0", "## [1.0] - 2026-01-02\n\n## [0.9] - 2025-01-02\n", ""),
        ("1.0", "## [1.0] - 2026-01-02\n", "the tag is 1.0 and mvit_kernels.__version__ is 1.0"),
        ("v1.1", "## [1.0] - 2026-01-02\n", "the tag is v1.1 and mvit_kernels.__version__ is 1.0"),
        ("v1.0", "## [Unreleased]\n\n## [0.9] - 2025-01-02\n", "newest dated entry is 0.9, and 1.0 is wanted"),
        ("v1.0", "## [1.0]\n", "newest dated entry is missing, and 1.0 is wanted"),
    ],
)
def test_tag(tag: str, changelog: str, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "CHANGELOG.md").write_text(changelog)
    monkeypatch.setattr(check_tag, "ROOT", tmp_path)
    monkeypatch.setattr(check_tag, "version", lambda: "1.0")
    monkeypatch.setattr(sys, "argv", ["check_tag.py", tag])
    if told:
        with pytest.raises(SystemExit, match=re.escape(told)):
            check_tag.main()
    else:
        check_tag.main()


@pytest.mark.parametrize(
    "codes, expected",
    [
        ("sm_80 sm_90 sm_100 sm_103 sm_120", "8.0;9.0+PTX;10.0;12.0"),
        ("sm_80 sm_90 sm_100", "8.0;9.0+PTX;10.0"),
        ("sm_80 sm_90", None),
        (None, None),
    ],
)
@pytest.mark.parametrize("by", ["CUDA_HOME", "PATH"])
def test_wheels_have_code_for_the_gpus_that_nvcc_knows(tmp_path: Path, monkeypatch, codes, expected, by) -> None:
    for name in ("CUDA_HOME", "CUDA_PATH", "TORCH_CUDA_ARCH_LIST"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(wheel, "NVCC", "/nowhere/nvcc")
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv(by, str(tmp_path if by == "CUDA_HOME" else tmp_path / "bin"))
    if codes:
        nvcc = tmp_path / "bin" / "nvcc"
        nvcc.write_text(f"#!/bin/sh\n[ $1 = --list-gpu-code ] && echo {codes}\n")
        nvcc.chmod(0o755)
    found = wheel.cuda_architectures()
    assert found == ({} if expected is None else {"TORCH_CUDA_ARCH_LIST": expected})
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "9.0")
    assert wheel.cuda_architectures() == {}


# -- The libraries -----------------------------------------------------------------------------------------------------


def test_libraries_keep_to_torchs_stable_abi() -> None:
    if not list(LIBRARY_DIRECTORY.glob("*.so")):
        pytest.skip("nothing was built here: make build")
    if sys.version_info < (3, 11) and importlib.util.find_spec("torch_abi_audit") is None:
        pytest.skip("torch-abi-audit wants Python 3.11")
    audit = [sys.executable, *wheel.AUDIT, "--json", LIBRARY_DIRECTORY]
    done = subprocess.run(audit, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    audited = {Path(found["path"]).name: found["torch"] for found in json.loads(done.stdout)["bundled_libs"]}
    assert set(audited) == {file.name for file in LIBRARY_DIRECTORY.glob("*.so")}
    assert not audited.pop("libmvit_runtime.so")["uses_torch"]
    for facts in audited.values():
        assert facts["uses_torch"] and facts["stable"] and facts["min_torch_version"] == "2.10.0"


def test_trying_a_wheel_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"there is no wheel for \w+ in .*: make wheel"):
        try_wheel.find_wheel(tmp_path)
