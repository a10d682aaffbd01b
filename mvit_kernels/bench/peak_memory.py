# SPDX-License-Identifier: Apache-2.0
"""How much memory one call of a peer takes at its peak, weights not counted.

On a GPU PyTorch's allocator knows: what was allocated at most, less what was before. On the CPU nobody does: OpenVINO,
ONNX Runtime, oneDNN and the memory that our kernels keep for a thread all pass PyTorch's allocator by. So the operating
system is asked, which counts the pages that a process really holds, in a process for each candidate where nothing ran
before:

- before: anonymous memory once the candidate is built (and compiled), and malloc has given back what is free;
- kept: how much more of it there is after the first call: memory that a runtime or a kernel keeps for the next call,
  weights that were packed late, code that was generated;
- rise: how far the resident memory rises above its level while a later call runs, by the kernel's own high-water mark
  (``VmHWM``), which is set back before each of three such calls.

The peak is kept + rise. Pages of program code, which the first call reads from its file, are in neither. In the process
that times the candidates this would be wrong: what one of them keeps there, the next one finds free.
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

import torch

from .. import backends
from .._utils.third_party import prepare_torchvision
from .peers import PEERS, Subject, call_of
from .timing import synchronize

CALLS = 3  # that are measured: what two threads hold at once, and where malloc finds room, changes from call to call


def on_gpu(call: Callable[[], object], device: torch.device) -> float:
    """Mebibytes that PyTorch's allocator held at most during `call`, beyond what was there before."""
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    call()
    synchronize(device)
    return (torch.cuda.max_memory_allocated(device) - before) / 2**20


def on_cpu(subject: Subject, peers: Iterable[str], *, timeout: float | None = None) -> dict[str, float | str]:
    """For each of `peers`, the mebibytes that one call takes at its peak (see this module's head), or why they could
    not be measured: no Linux, a model that cannot be pickled, more than `timeout` seconds in all."""
    peers = list(peers)
    if not Path("/proc/self/clear_refs").exists():
        return dict.fromkeys(peers, "this system has no /proc/self/clear_refs")
    with tempfile.TemporaryDirectory(prefix="mvit_kernels-") as folder:
        task = Path(folder, "task")
        try:
            task.write_bytes(pickle.dumps((subject, peers, torch.get_num_threads(), backends._override)))
        except Exception as error:  # whatever a class that cannot be pickled raises
            return dict.fromkeys(peers, f"the model cannot be pickled: {error}")
        # The same modules as here, also where sys.path was changed by hand.
        code = f"import sys; sys.path[:] = {sys.path!r}; from mvit_kernels.bench import peak_memory; peak_memory.main()"
        why = "its process ended without a word"
        try:
            run = subprocess.run([sys.executable, "-c", code, str(task)], capture_output=True, timeout=timeout)
            if run.returncode != 0:
                why = (run.stderr.decode(errors="replace").strip().splitlines() or [why])[-1]
        except subprocess.TimeoutExpired:
            why = f"not done within {timeout:.0f} s"
        files = {name: Path(folder, f"task.{name}") for name in peers}
        return {name: json.loads(file.read_text()) if file.exists() else why for name, file in files.items()}


def main() -> None:
    """What runs in the fresh process, which loads everything and forks for each peer, since loading takes seconds.

    The argument names the file of the task; beside it comes a file for each peer that is done.
    """
    task = Path(sys.argv[1])
    prepare_torchvision()  # timm's and Hugging Face's models import it when they are unpickled
    subject, peers, threads, backends._override = pickle.loads(task.read_bytes())
    torch.set_num_threads(threads)
    for name in peers:
        child = os.fork()  # safe: no parallel work was done here, so that no thread is lost
        if child == 0:
            ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: a timeout ends this one too
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
    """Kibibytes of one call of the peer at its peak, in a process where it never ran before."""
    with torch.set_grad_enabled(subject.training):
        call = call_of(PEERS[name].build(subject), subject)
        if PEERS[name].lazy:
            call()
        before = _anonymous()
        call()
        kept = _anonymous() - before
        rise = 0
        for _ in range(CALLS):
            _anonymous()  # gives back what is free
            Path("/proc/self/clear_refs").write_text("5")
            level = _field("/proc/self/status", "VmHWM")
            call()
            rise = max(rise, _field("/proc/self/status", "VmHWM") - level)
    return kept + rise


def _anonymous() -> int:
    """Kibibytes of memory that is no file's, after malloc gave back what is free."""
    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except AttributeError:
        pass  # no glibc
    # Not RssAnon of /proc/self/status: newer kernels keep it by the processor, and do not add up exactly.
    return _field("/proc/self/smaps_rollup", "Anonymous")


def _field(file: str, name: str) -> int:
    line = next(line for line in Path(file).read_text().splitlines() if line.startswith(f"{name}:"))
    return int(line.split()[1])
