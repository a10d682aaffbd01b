# SPDX-License-Identifier: Apache-2.0
"""``keep_freed_memory``: page faults of later steps in processes of their own, and where it has nothing to set."""

import subprocess
import sys
from types import SimpleNamespace

import pytest

import mvit_kernels
from mvit_kernels._utils import freed_memory
from mvit_kernels.bench.origin import environment

# Steps that allocate and free 48 tensors of up to 40 MB, as a network's forward and backward do.
STEPS = """
import resource, sys
import mvit_kernels
if sys.argv[1] == "kept":
    assert mvit_kernels.keep_freed_memory()
assert "torch" not in sys.modules
import torch

def step():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    kept = [torch.ones(10_000_000 * (i % 4 + 1) // 4) for i in range(48)]
    while kept:
        kept.pop()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

step()
step()
print(*(step() for _ in range(3)))
"""


class Process:
    """The functions of a process, as ctypes shows them."""

    def __init__(self, *names, takes=()):
        self.set = []
        for name in names:
            setattr(self, name, lambda: 0)
        if "mallopt" in names:
            self.mallopt = lambda what, value: self.set.append((what, value)) or what in takes


def pretend(monkeypatch, process, platform="linux"):
    monkeypatch.setattr(freed_memory, "sys", SimpleNamespace(platform=platform))
    monkeypatch.setattr(freed_memory, "ctypes", SimpleNamespace(CDLL=lambda name: process))
    monkeypatch.setattr(freed_memory, "_kept", False)


def is_glibc():
    return sys.platform == "linux" and hasattr(freed_memory.ctypes.CDLL(None), "gnu_get_libc_version")


@pytest.mark.skipif(not is_glibc(), reason="there is no glibc")
def test_later_steps_have_no_page_faults():
    faults = {}
    for how in ("default", "kept"):
        command = [sys.executable, "-c", STEPS, how]
        told = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
        faults[how] = [int(count) for count in told.split()]
    assert max(faults["default"]) > 50_000  # 1.2 GB of pages of 4 KiB, less where the system gives huge ones
    # One step in some runs has a twentieth of them: the memory of one tensor, which then is kept too.
    assert min(faults["kept"]) < max(faults["default"]) / 20


def test_what_is_set(monkeypatch):
    glibc = Process("gnu_get_libc_version", "mallopt", takes=(-1, -3))
    pretend(monkeypatch, glibc)
    assert "malloc" not in environment()["libraries"]
    assert mvit_kernels.keep_freed_memory() is True
    assert glibc.set == [(-3, 1 << 30), (-1, -1)]
    assert environment()["libraries"].endswith("; malloc keeps freed memory")


def test_a_glibc_that_takes_no_such_threshold_gets_no_blocks_by_mmap(monkeypatch):
    old = Process("gnu_get_libc_version", "mallopt", takes=(-1, -4))
    pretend(monkeypatch, old)
    assert freed_memory.keep_freed_memory() is True
    assert old.set[1:] == [(-4, 0), (-1, -1)]


@pytest.mark.parametrize(
    "process, platform",
    [
        (Process(), "linux"),  # musl
        (Process("mallopt", takes=(-1, -3)), "linux"),  # bionic
        (None, "darwin"),
        (None, "win32"),
        *(
            (Process("gnu_get_libc_version", "mallopt", name, takes=(-1, -3)), "linux")
            for name in ("mallctl", "tc_malloc", "mi_malloc")
        ),
    ],
)
def test_there_is_nothing_to_set(monkeypatch, process, platform):
    pretend(monkeypatch, process, platform)
    assert freed_memory.keep_freed_memory() is False
    assert process is None or process.set == []
    assert freed_memory.allocator() == freed_memory.other_allocator() != "malloc keeps freed memory"


def test_training_and_benchmarks_call_it_first(monkeypatch):
    from mvit_kernels.__main__ import build_parser
    from mvit_kernels.cli import bench, measuring, train
    from mvit_kernels.training import loop

    class Reached(Exception):
        pass

    def reached(*args, **kwargs):
        raise Reached

    called = []
    for module, (owner, then) in {bench: (measuring, "run_model"), train: (loop, "train")}.items():
        monkeypatch.setattr(module, "keep_freed_memory", lambda name=module.__name__: called.append(name))
        monkeypatch.setattr(owner, then, reached)
    for words in (["bench", "--model", "own/xxs"], ["train", "photos"], ["train", "photos", "--return-memory"]):
        args = build_parser().parse_args(words)
        with pytest.raises(Reached):
            args.run(args)
    assert called == ["mvit_kernels.cli.bench", "mvit_kernels.cli.train"]
