# SPDX-License-Identifier: Apache-2.0
"""Two commits in alternation: a repository of two, of which the second makes one candidate slower."""

import os
import re
import shutil
import subprocess
from types import SimpleNamespace

import pytest

from mvit_kernels.bench import commits, results
from mvit_kernels.bench.changes import changes
from mvit_kernels.bench.suites import Suite
from mvit_kernels.bench.suites._case import Case
from mvit_kernels.bench.suites.selection import Selection
from support import ROOT

SELECTED = Selection(operator=("patch_attention",), stage=("xxs/5",))


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    """Two commits of this package without its libraries; in the second, `sdpa_math` sleeps."""
    root = tmp_path_factory.mktemp("repository")
    ignored = shutil.ignore_patterns("lib", "__pycache__")
    for name in ("mvit_kernels", "release"):
        shutil.copytree(ROOT / name, root / name, ignore=ignored)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, root)

    def git(*words):
        who = ("-c", "user.name=a", "-c", "user.email=a@example.org")
        subprocess.run(["git", *who, "-C", root, *words], check=True, capture_output=True)

    git("init", "-q")
    git("add", "-A")
    git("commit", "-q", "-m", "one")
    path = root / "mvit_kernels" / "bench" / "suites" / "operators.py"
    slow = "    if backend is SDPBackend.MATH:\n        __import__('time').sleep(0.05)\n    with sdpa_kernel(backend):"
    path.write_text(path.read_text().replace("    with sdpa_kernel(backend):", slow))
    git("commit", "-q", "-a", "-m", "two")
    return root


def test_what_a_commit_made_slower_is_found(repository, tmp_path, monkeypatch):
    monkeypatch.setenv("MVIT_KERNELS_BUILD", "skip")
    said = []
    old, new = commits.measure(
        *("HEAD~1", "HEAD"),
        names=["operators"],
        minutes=5,
        rounds=2,
        seconds=0.02,
        folder=tmp_path,
        selection=SELECTED._replace(dtype=("float32",), training=True),
        root=repository,
        progress=said.append,
    )
    verdicts = {change.line["candidate"]: change for change in changes(old, new, absolute=True)}
    assert verdicts["sdpa_math"].verdict == "slower" and verdicts["sdpa_math"].factor > 3
    assert {"eager", "sdpa_flash"} <= verdicts.keys() and verdicts["eager"].factor < 3
    shas = {line["commit"] for line in old}, {line["commit"] for line in new}
    assert all(len(one) == 1 for one in shas) and shas[0] != shas[1]
    assert len({line["date"] for line in old}) == 2  # rounds
    assert {line["stage"] for line in old} == {"xxs/5"} and {line["mode"] for line in old} == {"training"}
    written = results.read(tmp_path / "new" / "operators.csv")
    assert [line for line in written if line["subject"] != "machine"] == new
    assert "building" in " ".join(said) and said[-1].startswith("rows of every round are in")


def test_rounds_alternate(monkeypatch, tmp_path):
    """old, new, new, old, …: a drift of the machine favours neither; both measure the same cases in the same order."""
    log = []
    cases = [Case(name, {"subject": name}, 1.0, None) for name in "ab"]
    monkeypatch.setattr(commits, "SUITES", {"operators": Suite(None, 1.0, {"cpu": 1.0}, 0.0)})

    def worker(side):
        def call(suite, case, seconds):
            log.append((case.name, side, seconds))
            return [results.row(subject=case.name, candidate="eager", median_ms=1.0, date="2026")]

        return call

    workers = {}
    for side, known in (("old", ["a"]), ("new", ["a", "b"])):
        call = worker(side)
        workers[side] = type("Worker", (SimpleNamespace,), {"__call__": lambda self, *w, call=call: call(*w)})()
        workers[side].cases = {"operators": known}
    rows = {"old": [], "new": []}
    said = []
    commits._measure({"operators": cases}, workers, rows, 5, 3, None, "cpu", tmp_path, said.append)
    assert [side for _, side, _ in log] == ["old", "new", "new", "old", "old", "new"]
    assert {(name, seconds) for name, _, seconds in log} == {("a", 0.5)}
    assert [line["date"] for line in rows["old"]] == ["2026 1", "2026 2", "2026 3"]
    assert "operators: b: not in both commits" in said


def test_only_what_the_device_needs_is_built(tmp_path, monkeypatch):
    """Each build notes what it was asked for; what is built for a GPU serves the CPU."""
    monkeypatch.delenv("MVIT_KERNELS_BUILD_LIBRARIES", raising=False)
    place = tmp_path / "0123456789ab"
    (place / ".git").mkdir(parents=True)
    (place / "setup.py").write_text(
        "import os\nwith open('asked', 'a') as f: f.write(os.environ.get('MVIT_KERNELS_BUILD_LIBRARIES', 'all') + ' ')"
    )
    for device, asked in (("cpu", "cpu "), ("cpu", "cpu "), ("cuda", "cpu all "), ("cpu", "cpu all ")):
        assert commits._checkout("0123456789abcdef", tmp_path, tmp_path, device, lambda text: None) == place
        assert (place / "asked").read_text() == asked


def test_libraries_are_copied_where_their_own_sources_are_older(repository, tmp_path):
    """A library for the GPU that is older than a source for the CPU is as good, and asked about for a GPU alone."""
    root = shutil.copytree(repository, tmp_path / "root")
    shutil.copytree(ROOT / "csrc" / "cmake", root / "csrc" / "cmake")
    for place, time in (
        ("csrc/cpu/a.cpp", 3e9),
        ("csrc/cuda/a.cu", 1e9),
        ("mvit_kernels/lib/libmvit_kernels_cpu.so", 4e9),
    ):
        (root / place).parent.mkdir(parents=True, exist_ok=True)
        (root / place).touch()
        os.utime(root / place, (time, time))
    cuda = root / "mvit_kernels" / "lib" / "libmvit_kernels_cuda.so"
    assert commits._libraries_are_of("HEAD", root, "cpu")
    assert not commits._libraries_are_of("HEAD", root, "cuda")
    cuda.touch()
    os.utime(cuda, (2.9e9, 2.9e9))
    assert commits._libraries_are_of("HEAD", root, "cuda")
    os.utime(cuda, (0.9e9, 0.9e9))
    assert commits._libraries_are_of("HEAD", root, "cpu")
    assert not commits._libraries_are_of("HEAD", root, "cuda")
    (root / "setup.py").write_text("")
    assert not commits._libraries_are_of("HEAD", root, "cpu")


@pytest.mark.parametrize(
    "names, options, message",
    [
        (("HEAD", "nothing"), {}, "has no commit nothing; '.' is the checkout as it is"),
        (("HEAD", "HEAD~1"), {"minutes": 0.001}, "--budget 0.001: the smallest useful budget is 0.3 minutes"),
        (("HEAD", "HEAD~1"), {"root": ROOT / "tests"}, "tests is no git checkout"),
        (("HEAD", "HEAD~1"), {"selection": Selection(stage=("7",))}, "has no stage 7; there are: s/3"),
    ],
)
def test_what_cannot_be_compared_is_refused(repository, tmp_path, names, options, message):
    usual = {"minutes": 5.0, "root": repository, "names": ["operators"], "folder": tmp_path}
    with pytest.raises(ValueError, match=re.escape(message)):
        commits.measure(*names, **usual | options)


def test_a_process_that_ends_is_reported(tmp_path):
    (tmp_path / "mvit_kernels").mkdir()
    (tmp_path / "mvit_kernels" / "__init__.py").write_text("raise SystemExit('of no use')")
    with (
        pytest.raises(RuntimeError, match="ended: .*of no use"),
        commits._worker(tmp_path, "cpu", 1, tmp_path / "log") as worker,
    ):
        worker.started()
