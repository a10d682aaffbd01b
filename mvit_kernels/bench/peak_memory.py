# SPDX-License-Identifier: Apache-2.0
"""Peak memory of one call of a peer, not counting weights.

On a GPU PyTorch's allocator provides it: the maximum allocated, minus what was allocated before. On the CPU no
allocator does: OpenVINO, ONNX Runtime, oneDNN and the per-thread scratch memory of our kernels bypass PyTorch's. There
the operating system is asked for the pages that a process holds, in a fresh process for each candidate:

- before: anonymous memory once the candidate is built (and compiled), after malloc has returned its free memory;
- kept: its increase by the first call: memory that a runtime or a kernel keeps for the next call, weights that are
  packed late, generated code;
- rise: how far resident memory rises above its level during a later call, by Linux's high-water mark (``VmHWM``), which
  is reset before each of three such calls; the largest counts.

The peak is kept + rise. Pages of program code, which the first call loads from files, are in neither. The process that
times all candidates could not measure this, because memory that one candidate keeps is free for the next.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from .. import backends
from .._utils.third_party import prepare_torchvision
from .peers import PEERS, Subject, call_of
from .timing import synchronize

CALLS = 3  # measured calls: what two threads hold at the same time, and where malloc finds room, varies between calls


def on_gpu(call: Callable[[], object], device: torch.device) -> float:
    """Peak memory of PyTorch's allocator during `call`, in MiB, minus what was allocated before."""
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    call()
    synchronize(device)
    return (torch.cuda.max_memory_allocated(device) - before) / 2**20


def on_cpu(subject: Subject, peers: Iterable[str], *, timeout: float | None = None) -> dict[str, float | str]:
    """The peak memory of one call of each of `peers`, as described at the top of this module.

    Args:
        subject: the model and the images; pickled for a fresh process.
        peers: names from `PEERS`.
        timeout: seconds for all peers together.

    Returns:
        name -> MiB, or the reason why it could not be measured: the system is not Linux, the model cannot be pickled,
        the timeout expired, the process failed.
    """
    peers = list(peers)
    if not Path("/proc/self/clear_refs").exists():
        return dict.fromkeys(peers, "this system has no /proc/self/clear_refs (Linux only)")
    with tempfile.TemporaryDirectory(prefix="mvit_kernels-") as folder:
        task = Path(folder, "task")
        try:
            task.write_bytes(pickle.dumps((subject, peers, torch.get_num_threads(), backends._override)))
        except Exception as error:  # whatever a class that cannot be pickled raises
            return dict.fromkeys(peers, f"the model cannot be pickled: {error}")
        # Find the same modules as this process, also if sys.path was changed.
        code = f"import sys; sys.path[:] = {sys.path!r}; from mvit_kernels.bench import peak_memory; peak_memory.main()"
        why = "its process ended without an error message"
        try:
            run = subprocess.run([sys.executable, "-c", code, str(task)], capture_output=True, timeout=timeout)
            if run.returncode != 0:
                why = (run.stderr.decode(errors="replace").strip().splitlines() or [why])[-1]
        except subprocess.TimeoutExpired:
            why = f"not done within {timeout:.0f} s"
        files = {name: Path(folder, f"task.{name}") for name in peers}
        return {name: json.loads(file.read_text()) if file.exists() else why for name, file in files.items()}


class _Unpickler(pickle.Unpickler):
    """Prepares torchvision before it imports a library: timm's and Hugging Face's models import torchvision. Only then,
    because that takes 5 seconds of CPU time, three times as much as everything else here."""

    def find_class(self, module: str, name: str) -> Any:
        if module.partition(".")[0] not in sys.modules:
            prepare_torchvision()
        return super().find_class(module, name)


def main() -> None:
    """Entry point of the fresh process. It loads everything once, since that takes seconds, and forks for each peer.

    The command-line argument names the task file; the result of each peer is written to a file beside it.
    """
    task = Path(sys.argv[1])
    with task.open("rb") as file:
        subject, peers, threads, backends._override = _Unpickler(file).load()
    torch.set_num_threads(threads)
    for name in peers:
        child = os.fork()  # safe: no parallel work was done here, so no thread is lost
        if child == 0:
            ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: a timeout also ends the child
            try:
                result: float | str = _measured(subject, name) / 1024
            except BaseException as error:
                result = traceback.format_exception_only(error)[-1].strip()
            part = task.with_name(f"part.{name}")
            part.write_text(json.dumps(result))
            part.rename(task.with_name(f"{task.name}.{name}"))
            os._exit(0)
        os.waitpid(child, 0)


def _measured(subject: Subject, name: str) -> int:
    """Peak memory of one call of the peer in KiB; to be called in a process in which it has not run before."""
    with torch.set_grad_enabled(subject.training):
        call = call_of(PEERS[name].build(subject), subject)
        if PEERS[name].lazy:
            call()
        before = _anonymous()
        call()
        kept = _anonymous() - before
        rise = 0
        for _ in range(CALLS):
            _anonymous()  # returns free memory to the system
            Path("/proc/self/clear_refs").write_text("5")
            level = _field("/proc/self/status", "VmHWM")
            call()
            rise = max(rise, _field("/proc/self/status", "VmHWM") - level)
    return kept + rise


def _anonymous() -> int:
    """Anonymous memory in KiB, after malloc has returned its free memory."""
    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except AttributeError:
        pass  # not glibc
    # Not RssAnon of /proc/self/status: newer Linux kernels count it per CPU and do not sum it up exactly.
    return _field("/proc/self/smaps_rollup", "Anonymous")


def _field(file: str, name: str) -> int:
    line = next(line for line in Path(file).read_text().splitlines() if line.startswith(f"{name}:"))
    return int(line.split()[1])
