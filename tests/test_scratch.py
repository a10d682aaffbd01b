# SPDX-License-Identifier: Apache-2.0
"""The memory that the C++ kernels' threads keep from call to call, by the library's own count: what a large map once
asked for goes with the usual calls after it, and a stream of large ones keeps it."""

from __future__ import annotations

import ctypes
import threading

import pytest
import torch
from _native import LIBRARY, skip_without_a_compiler
from test_network import chain, native

from mvit_kernels import _library, cpu

skip_without_a_compiler()

MB = 1 << 20
KEPT = 3 * 8 * MB  # of a thread, whatever the calls: kUsual of csrc/cpu/scratch.cpp, for each of three uses


def kept() -> int:
    """Bytes that all threads keep."""
    assert not cpu.unavailable("cpu")
    function = ctypes.CDLL(str(_library.loaded_paths.get("cpu", LIBRARY))).mvit_kernels_cpu_kept_bytes
    function.restype = ctypes.c_int64
    return function()


@pytest.fixture
def on_a_thread():
    """Run a function on a thread of its own, whose scratch begins with nothing and goes with it."""

    def run(function):
        results = []

        def work():
            torch.set_num_threads(1)
            results.append(function())

        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        (result,) = results
        return result

    return run


def test_usual_calls_give_back_what_a_large_one_took(on_a_thread):
    module, draw = chain()
    small, large = draw(1, 3, 64, 64), draw(1, 3, 1100, 1100)

    def work():
        before = kept()
        expected = native(module, small)
        usual = kept() - before
        native(module, large)
        taken, counts = kept() - before, []
        for _ in range(60):
            assert torch.equal(native(module, small), expected)
            counts.append(kept() - before)
        return usual, taken, counts

    before = kept()
    usual, taken, counts = on_a_thread(work)
    assert usual < KEPT < 32 * MB < taken
    assert counts[0] == taken  # a few small calls in between cost a stream of large ones nothing
    assert counts[-1] <= KEPT
    assert kept() == before  # a thread's memory ends with it


def test_a_stream_of_large_calls_keeps_its_memory(on_a_thread):
    """Also beside usual ones: fresh pages at each call would cost time."""
    module, draw = chain()
    small, large = draw(1, 3, 64, 64), draw(1, 3, 700, 700)

    def work():
        counts = []
        for _ in range(12):
            native(module, large)
            counts.append(kept())
            for _ in range(3):
                native(module, small)
                counts.append(kept())
        return counts

    counts = on_a_thread(work)
    assert len(set(counts)) == 1


def test_every_use_gives_back(on_a_thread):
    """Backward's memory (shared) and one thread's, after which only a network runs."""
    module, draw = chain()
    small = draw(1, 3, 64, 64)
    x, weight = torch.randn(6000, 600), torch.randn(700, 600)
    attention = torch.randn(1, 170, 170, 3 * 128)

    def work():
        before = kept()
        torch.ops.mvit_kernels.linear_residual_backward.cpu(torch.randn(6000, 700), x, weight)
        torch.ops.mvit_kernels.patch_attention.cpu(attention, 1, [1, 1], 0.1)
        taken = kept() - before
        for _ in range(60):
            native(module, small)
        return taken, kept() - before

    taken, after = on_a_thread(work)
    assert taken > KEPT >= after
