# SPDX-License-Identifier: Apache-2.0
"""``MVIT_KERNELS_COMPILED=1``: the Triton backend serves CPU tensors, and is a path of the operators' own tests.

Imported by conftest.py, before the kernels are. Each launch compiles its kernel for sm_80, where products are
``mma.sync`` and copies ``cp.async``, and runs what came out (see `program`). `make test-compiled` does so; any file of
operators' tests can be run like that.

`launched` are the launches so far, each with its program.
"""

from __future__ import annotations

from gates.triton_gate import compiled_for
from mvit_kernels import backends
from mvit_kernels.backends.triton import BACKEND, _load, target

from .program import Program

ARCH = 80

_programs: dict[str, Program] = {}
launched: list[tuple[object, Program]] = []
settings = {"seed": 0}  # of the emulation: the schedule


def run(launch) -> None:
    """Compile and execute one launch.

    Raises:
        EmulationFault: the kernel does what it must not.
    """
    compiled = compiled_for(launch, ARCH)
    text = compiled.asm["ptx"]
    program = _programs.get(text) or _programs.setdefault(text, Program(text))
    tensors = [t for t in launch.tensors if t is not None]
    threads = 32 * launch.plan.num_warps
    arguments = [*tensors, *launch.scalars]
    shared = compiled.metadata.shared
    launched.append((launch, program))
    program.launch(launch.grid, threads, shared=shared, arguments=arguments, seed=settings["seed"])


class Launcher(list):
    """In place of the list of launches that `_launch.watching` fills: each is executed."""

    def append(self, launch) -> None:
        run(launch)


def serve() -> None:
    """From now on, in this process."""
    assert not target.INTERPRETED, "either MVIT_KERNELS_COMPILED or TRITON_INTERPRET"
    target.DEVICE_TYPE = BACKEND.device_type = "cpu"  # before the kernels are registered, by _load
    BACKEND.unavailable = lambda device_type: [] if device_type == "cpu" else ["compiled kernels run on CPU tensors"]
    assert _load() == ""
    from mvit_kernels.backends.triton import _launch

    _launch._watcher, _launch._target = Launcher(), ARCH
    backends._choices.clear()
