# SPDX-License-Identifier: Apache-2.0
"""Measures two commits in alternation on this machine: ``mvit-kernels bench --compare-commits OLD NEW``.

Example:
    >>> old, new = measure("HEAD~1", "HEAD", names=["operators"], minutes=10, folder=Path("build/commits"))
    >>> print(report(changes(old, new)))

Each commit gets a git worktree with a build of its own, and a process of its own that stays for the whole run. Case
after case is measured in several rounds, by the two processes in turn (old, new, new, old, …), never both at once: a
slow minute of the machine lasts longer than a turn, and so affects both. `mvit_kernels.bench.changes` then calls a
candidate slower or faster only if every round of one commit lies beyond every round of the other.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, Any

from . import commit_worker
from .changes import Line
from .results import append, check_file
from .suites import SUITES, cases_of, expected_seconds
from .suites._case import Case
from .suites.selection import Selection

HERE = "."  # in place of a commit: this checkout as it is, with the libraries that it has
ROOT = Path(__file__).resolve().parents[2]
ROUNDS = 5  # two sets of five are apart by chance once in 126 times
SHARE = 0.5  # of a suite's measuring time, for each round


def measure(
    old: str,
    new: str,
    *,
    names: Iterable[str],
    minutes: float,
    folder: Path,
    device: str = "cpu",
    rounds: int = ROUNDS,
    seconds: float | None = None,
    threads: int | None = None,
    selection: Selection | None = None,
    root: Path = ROOT,
    progress: Callable[[str], None] = print,
) -> tuple[list[Line], list[Line]]:
    """The rows of both commits, those of every round.

    Args:
        old, new: commits as git names them, or ``HERE``.
        names: suites. Cases that compile are left out: they measure torch.compile.
        minutes: budget, beside building. A case that has begun is finished; after Ctrl-C it is not, and the cases that
            were finished are returned.
        folder: for the worktrees, and the rows as ``old/<suite>.csv`` and ``new/<suite>.csv``.
        device: "cpu" or "cuda".
        rounds: how often each commit measures a case.
        seconds: measuring time of one round of a case; None for half of the suite's.
        threads: of PyTorch; None for its choice.
        selection: of the cases.
        root: the checkout whose commits they are.
        progress: called with each line of text.

    Raises:
        ValueError: no checkout, an unknown commit, nothing selected, a budget too small for one case.
        RuntimeError: a commit's build or its process failed.
    """
    chosen = {name: [c for c in cases if not c.compiles] for name, cases in cases_of(names, device, selection).items()}
    least = min((2 * rounds * SUITES[name].least * SHARE for name, cases in chosen.items() if cases), default=0.0)
    if not least:
        raise ValueError("--compare-commits: every case that is selected compiles, which is not compared")
    if 60 * minutes < least:
        raise ValueError(f"--budget {minutes:g}: the smallest useful budget is {math.ceil(least / 6) / 10:g} minutes")
    shas = {"old": _commit(old, root), "new": _commit(new, root)}
    for side in shas:
        for name in chosen:
            path = folder / side / f"{name}.csv"
            check_file(path)
            path.unlink(missing_ok=True)  # rows of an earlier run are no rounds of this one
    places = {side: _checkout(sha, root, folder, device, progress) for side, sha in shas.items()}
    rows: dict[str, list[Line]] = {"old": [], "new": []}
    with contextlib.ExitStack() as stack:
        workers = {
            side: stack.enter_context(_worker(place, device, threads, folder / f"{side}.log"))
            for side, place in places.items()
        }
        for worker in workers.values():
            worker.started()  # both have, side by side, before the budget's time begins
        with contextlib.suppress(KeyboardInterrupt):
            _measure(chosen, workers, rows, minutes, rounds, seconds, device, folder, progress)
    return rows["old"], rows["new"]


def _measure(
    chosen: dict[str, list[Case]],
    workers: dict[str, Worker],
    rows: dict[str, list[Line]],
    minutes: float,
    rounds: int,
    seconds: float | None,
    device: str,
    folder: Path,
    progress: Callable[[str], None],
) -> None:
    end = time.monotonic() + 60 * minutes
    left_out = 0
    for name, cases in chosen.items():
        lasting = seconds or SHARE * SUITES[name].seconds[device]
        took: list[tuple[float, float]] = []
        for case in cases:
            if any(case.name not in worker.cases[name] for worker in workers.values()):
                progress(f"{name}: {case.name}: not in both commits")
                continue
            start = time.monotonic()
            if end - start < expected_seconds(case.cost, took, 2 * rounds * SHARE * SUITES[name].least):
                left_out += 1
                continue
            progress(f"{name}: {case.name} ({(end - start) / 60:.1f} min left)")
            found: dict[str, list[Line]] = {side: [] for side in workers}
            for index in range(rounds):
                for side in list(workers)[:: -1 if index % 2 else 1]:
                    # Two rounds may end within one second, of which dates are made: they are told apart by number.
                    for line in workers[side](name, case, lasting):
                        texts = {key: str(value) for key, value in line.items()}
                        found[side].append(texts | {"date": f"{line['date']} {index + 1}"})
            for side, lines in found.items():
                append(folder / side / f"{name}.csv", lines)
                rows[side] += [line for line in lines if line["subject"] != "machine"]
            took.append((case.cost, time.monotonic() - start))
    chance = 200 / math.comb(2 * rounds, rounds)
    progress(f"{rounds} rounds: {chance:.2g} % of what did not change is apart by chance")
    progress(f"rows of every round are in {folder / 'old'} and {folder / 'new'}; {left_out} cases did not fit")


# -------------------------------------------------------------------------------------------------------- checkouts


def _git(root: Path, *arguments: str) -> str:
    run = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True)
    if run.returncode:
        raise ValueError(f"git {' '.join(arguments)}: {run.stderr.strip() or run.returncode}")
    return run.stdout.strip()


def _commit(name: str, root: Path) -> str:
    """The commit's full hash, or `HERE`."""
    if not (root / ".git").exists():
        raise ValueError(f"--compare-commits: {root} is no git checkout, so there are no commits to compare")
    if name == HERE:
        return HERE
    try:
        return _git(root, "rev-parse", "--verify", "--quiet", f"{name}^{{commit}}")
    except ValueError:
        raise ValueError(f"--compare-commits: {root} has no commit {name}; '.' is the checkout as it is") from None


def _checkout(sha: str, root: Path, folder: Path, device: str, progress: Callable[[str], None]) -> Path:
    """The folder of the commit's files, with the libraries that `device` needs; kept for the next comparison."""
    if sha == HERE:
        return root
    place = (folder / sha[:12]).resolve()
    if not (place / ".git").exists():
        progress(f"checking out {sha[:12]} into {place}")
        place.parent.mkdir(parents=True, exist_ok=True)
        _git(root, "worktree", "add", "--force", "--detach", str(place), sha)
    enough = ("cpu", "cuda") if device == "cpu" else ("cuda",)  # for a GPU both libraries are built
    if any((place / f".built-for-{name}").exists() for name in enough):
        return place
    if _libraries_are_of(sha, root, device):
        progress(f"{sha[:12]} has the C++ sources of this checkout: its libraries are copied")
        shutil.copytree(root / "mvit_kernels" / "lib", place / "mvit_kernels" / "lib", dirs_exist_ok=True)
    else:
        progress(f"building {sha[:12]} (minutes; {place / 'build.log'})")
        command = [sys.executable, "setup.py", "-q", "build_native", "--inplace"]
        with (place / "build.log").open("wb") as log:
            environment = {"MVIT_KERNELS_BUILD": "auto"} | os.environ
            if device == "cpu":  # nvcc takes longer than the rest
                environment.setdefault("MVIT_KERNELS_BUILD_LIBRARIES", "cpu")
            code = subprocess.run(command, cwd=place, stdout=log, stderr=subprocess.STDOUT, env=environment).returncode
        if code:
            raise RuntimeError(f"{sha[:12]} could not be built: see {place / 'build.log'}")
    (place / f".built-for-{device}").touch()
    return place


def _libraries_are_of(sha: str, root: Path, device: str) -> bool:
    """Whether the checkout's libraries for `device` are those of the commit: the sources are the same, and older than
    what was compiled from them."""

    def is_newer(name: str) -> bool:
        library = root / "mvit_kernels" / "lib" / f"libmvit_kernels_{name}.so"
        sources = [path for part in (name, "cmake") for path in (root / "csrc" / part).rglob("*") if path.is_file()]
        newest = max((path.stat().st_mtime for path in sources), default=0)
        return library.exists() and newest <= library.stat().st_mtime

    same = subprocess.run(["git", "-C", str(root), "diff", "--quiet", sha, "--", "csrc", "setup.py"]).returncode == 0
    return same and all(map(is_newer, ("cpu",) if device == "cpu" else ("cpu", "cuda")))


# --------------------------------------------------------------------------------------------------------- processes


class Worker:
    """The process of one commit: called with a case it returns its rows."""

    def __init__(self, place: Path, process: subprocess.Popen[str], log: Path) -> None:
        self._place, self._process, self._log = place, process, log

        self.cases: dict[str, list[str]] = {}  # suite -> the names of those that the commit has

    def started(self) -> None:
        """Wait until the process is ready, and take the cases that it has."""
        hello = self._answer()
        if not Path(hello["file"]).is_relative_to(self._place):
            raise RuntimeError(f"the process in {self._place} imports {hello['file']}")
        self.cases = {name: hello["cases"].get(name, []) for name in SUITES}

    def __call__(self, suite: str, case: Case, seconds: float) -> list[dict[str, Any]]:
        stdin: IO[str] = self._process.stdin
        with contextlib.suppress(BrokenPipeError):  # what ended it is said below
            stdin.write(json.dumps([suite, case.name, seconds]) + "\n")
            stdin.flush()
        return self._answer()

    def _answer(self) -> Any:
        line = self._process.stdout.readline()
        if not line:
            last = (self._log.read_text(encoding="utf-8", errors="replace").strip().splitlines() or ["no message"])[-1]
            raise RuntimeError(f"the process that measures {self._place} ended: {last} (all of it: {self._log})")
        return json.loads(line)


@contextlib.contextmanager
def _worker(place: Path, device: str, threads: int | None, log: Path) -> Iterator[Worker]:
    source = Path(commit_worker.__file__).read_text(encoding="utf-8")
    command = [sys.executable, "-c", source, device, str(threads or 0)]
    path = os.pathsep.join(filter(None, [str(place), os.environ.get("PYTHONPATH")]))
    with log.open("wb") as errors:
        process = subprocess.Popen(
            command,
            cwd=place,
            env=os.environ | {"PYTHONPATH": path},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            start_new_session=True,  # Ctrl-C ends this process, which ends that one
        )
    try:
        yield Worker(place, process, log)
    finally:
        process.kill()
        process.communicate()
