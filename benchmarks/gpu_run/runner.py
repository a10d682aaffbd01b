# SPDX-License-Identifier: Apache-2.0
"""Processes within a budget of time, and files that are whole after any cut.

Example:
    >>> runner = Runner(Path("gpu_results"), minutes=9)
    >>> runner.run([Job("tests", ["python3", "-m", "pytest", "-q"])], seconds=60)
    {'tests': Ended(code=0, seconds=41.2, lines=[...])}

Every line of every process is in the log, and every line of JSON in ``lines.jsonl``, as soon as it was printed: nothing
waits for a process, or for this one, to end. Each process is a session of its own, so that a cut ends what it started.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

LEAST = 5.0  # seconds below which no process is begun: importing torch takes as long
GRACE = 8.0  # seconds between the request to end, on which pytest lists its failures, and the end
MOST_LOGGED = 12 * 2**20  # bytes of the log and of lines.jsonl: each file that is to come back may have 16 MiB
CUT, NOT_BEGUN = 124, 125


class Job(NamedTuple):
    """One process."""

    name: str
    command: Sequence[str]
    environment: Mapping[str, str | None] = {}  # beyond that of this process; None takes a variable out
    seconds: float = 1e9  # at most, from its start


class Ended(NamedTuple):
    """How a job ended: its exit code, `CUT` or `NOT_BEGUN`; and what it printed, the last lines of it."""

    code: int
    seconds: float = 0.0
    lines: Sequence[str] = ()

    @property
    def how(self) -> str:
        if self.code in (CUT, NOT_BEGUN):
            return "not begun, the budget is spent" if self.code == NOT_BEGUN else f"cut after {self.seconds:.0f} s"
        return f"ok in {self.seconds:.0f} s" if not self.code else f"FAILED with {self.code} after {self.seconds:.0f} s"


class Cut(BaseException):
    """The run is to end now; its text says why."""


class Runner:
    """The folder of results, the report, and what is left of the budget.

    Args:
        folder: created if it does not exist.
        minutes: the budget of everything.
    """

    def __init__(self, folder: Path, minutes: float) -> None:
        self.folder, self.bad, self.dumps_read = folder, False, 0
        self.cut = ""  # why the run is to end, once it is: a signal's handler says so here
        self.started = time.monotonic()
        self.end = self.started + 60 * minutes
        folder.mkdir(parents=True, exist_ok=True)
        self._files: dict[str, IO[str]] = {}
        self._written = dict.fromkeys(("report.txt", "log.txt", "lines.jsonl"), 0)
        for name in self._written:
            self._files[name] = (folder / name).open("w", encoding="utf-8", errors="backslashreplace")
        self._lock = threading.Lock()
        self._running: list[_Process] = []

    @property
    def left(self) -> float:
        return self.end - time.monotonic()

    @property
    def elapsed(self) -> float:
        return time.monotonic() - self.started

    # ------------------------------------------------------------------------------------------------------- writing

    def _write(self, name: str, line: str) -> None:
        with self._lock:
            if self._written[name] > MOST_LOGGED:
                return
            self._written[name] += len(line.encode("utf-8", "backslashreplace")) + 1
            if self._written[name] > MOST_LOGGED:
                line = f"… more than {MOST_LOGGED >> 20} MiB; the rest is left out"
            self._files[name].write(line + "\n")
            self._files[name].flush()

    def log(self, line: str) -> None:
        self._write("log.txt", line)

    def note(self, text: str, *, bad: bool = False) -> None:
        """A line of the report, also in the log and on the standard output; with `bad` the run has failed."""
        self.bad |= bad
        self.detail(f"{self.elapsed:4.0f} s  {text}", indent="")

    def detail(self, text: str, indent: str = "        ") -> None:
        """A line of the report below the last note."""
        line = (indent + text)[:200]
        for name in ("report.txt", "log.txt"):
            self._write(name, line)
        with contextlib.suppress(OSError):  # who reads the output may be gone; the files are not
            print(line, flush=True)

    def line(self, **facts: Any) -> None:
        """A line of JSON in ``lines.jsonl``."""
        self._write("lines.jsonl", json.dumps({**facts, "t": round(self.elapsed, 1)}, ensure_ascii=False))

    def heard(self, job: str, line: str) -> None:
        """What a process printed: into the log, and a line of JSON into ``lines.jsonl`` too."""
        self.log(f"[{job}] {line}")
        if line.startswith('{"what"'):
            with contextlib.suppress(ValueError):
                self.line(**json.loads(line), job=job)

    # ------------------------------------------------------------------------------------------------------- running

    def run(
        self,
        jobs: Sequence[Job],
        seconds: float,
        at_once: int = 1,
        ended: Callable[[Job, Ended], None] = lambda job, end: None,
    ) -> dict[str, Ended]:
        """Run `jobs` in their order, `at_once` at the same time, for at most `seconds` and the rest of the budget.

        Args:
            ended: called as each ends, in this thread; jobs that were not begun too.

        Raises:
            Cut: `cut` was set. No process is lost sight of, as it would be if a signal's handler raised this.
        """
        end = min(time.monotonic() + seconds, self.end)
        waiting, found = list(jobs), {}
        while waiting or self._running:
            if self.cut:
                raise Cut(self.cut)
            while waiting and len(self._running) < at_once and end - time.monotonic() >= LEAST:
                job = waiting.pop(0)
                self._running.append(_Process(self, job, min(end, time.monotonic() + job.seconds)))
            for process in [p for p in self._running if p.has_ended()]:
                self._running.remove(process)
                found[process.job.name] = process.ended()
                ended(process.job, found[process.job.name])
            if not self._running and (not waiting or end - time.monotonic() < LEAST):
                break
            time.sleep(0.02)
        for job in waiting:
            found[job.name] = Ended(NOT_BEGUN)
            ended(job, found[job.name])
        return found

    def step(self, name: str, command: Sequence[str], seconds: float, **environment: str | None) -> Ended:
        """One job, whose end is noted; a failure makes the run a failed one."""
        done = self.run([Job(name, command, environment)], seconds)[name]
        self.note(f"{name}: {done.how}", bad=done.code not in (0, CUT, NOT_BEGUN))
        return done

    def stop(self) -> None:
        """End what is running, at once."""
        for process in self._running:
            process.kill()
        for process in self._running:
            process.ended()
        self._running.clear()


class _Process:
    def __init__(self, runner: Runner, job: Job, limit: float) -> None:
        self.job, self._limit, self._asked = job, limit, False
        self._lines: list[str] = []
        self._begun = time.monotonic()
        environment = {**os.environ, **job.environment}
        runner.log(f"=== {job.name}: {' '.join(job.command)}"[:2000])
        try:
            self._process = subprocess.Popen(
                job.command,
                env={name: value for name, value in environment.items() if value is not None},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                text=True,
                errors="backslashreplace",
            )
        except OSError as error:  # no such program: as a shell says it
            runner.heard(job.name, str(error))
            self._process = None
            self._lines.append(str(error))
            return
        self._reader = threading.Thread(target=self._read, args=(runner,), daemon=True)
        self._reader.start()

    def _read(self, runner: Runner) -> None:
        assert self._process is not None and self._process.stdout is not None
        for line in self._process.stdout:
            line = line.rstrip("\n")
            runner.heard(self.job.name, line)
            self._lines.append(line)
            del self._lines[:-4000]

    def has_ended(self) -> bool:
        """Whether it has; a process past its time is asked to end, and then ended."""
        if self._process is None or self._process.poll() is not None:
            return True
        late = time.monotonic() - self._limit
        if late > 0 and not self._asked:
            self._asked = True
            self._signal(signal.SIGINT)
        if late > GRACE:
            self.kill()
        return False

    def ended(self) -> Ended:
        took = time.monotonic() - self._begun
        if self._process is None:
            return Ended(127, took, self._lines)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=GRACE)
        self._signal(signal.SIGKILL)  # a child that it left behind, which may hold the pipe
        self._reader.join(timeout=2)
        return Ended(CUT if self._asked else self._process.returncode, took, list(self._lines))

    def kill(self) -> None:
        self._asked = True
        self._signal(signal.SIGKILL)

    def _signal(self, number: int) -> None:
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, number)
