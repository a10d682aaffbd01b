# SPDX-License-Identifier: Apache-2.0
"""The memory that the C++ kernels' threads keep between calls, by the library's own count: what one large map needed is
released during the usual calls after it, and a stream of large ones keeps it."""

from __future__ import annotations

import ctypes
import threading
import time

import pytest
import torch

from mvit_kernels.backends import cpu, library
from mvit_kernels.freezing.modules import FrozenSequential
from support.native import LIBRARY, skip_without_a_compiler
from support.networks import Draw, native

skip_without_a_compiler()

MB = 1 << 20
KEPT = 3 * 8 * MB  # by a thread after any calls: kUsual of csrc/cpu/scratch.cpp, for each of three uses


def kept() -> int:
    """Bytes that all threads keep."""
    assert not cpu.BACKEND.unavailable("cpu")
    function = ctypes.CDLL(str(library.loaded_paths.get("cpu", LIBRARY))).mvit_kernels_cpu_kept_bytes
    function.restype = ctypes.c_int64
    return function()


def stem() -> tuple[FrozenSequential, Draw]:
    """A network with little arithmetic and large maps: 16 channels of float32 at half the input's height and width."""
    draw = Draw(0)
    return FrozenSequential(draw.conv(3, 16, 3, stride=2), draw.inverted(16, 32, 8, stride=2), draw.conv(8, 8)), draw


@pytest.fixture
def on_a_thread():
    """Run a function on a thread of its own, whose scratch is empty at first and freed with it."""

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
    module, draw = stem()
    small, large = draw(1, 3, 64, 64), draw(1, 3, 1500, 1500)

    def work():
        before = kept()
        expected = native(module, small)
        usual = kept() - before
        native(module, large)
        taken, counts = kept() - before, []
        for _ in range(140):
            assert torch.equal(native(module, small), expected)
            counts.append(kept() - before)
        return usual, taken, counts

    before = kept()
    usual, taken, counts = on_a_thread(work)
    assert usual < KEPT < 32 * MB < taken
    assert counts[0] == taken  # a few small calls in between do not cost a stream of large ones its memory
    assert counts[-1] <= KEPT
    for _ in range(1000):  # a thread's memory is freed a moment after Python sees it end
        if kept() == before:
            break
        time.sleep(0.01)
    assert kept() == before


def test_maps_take_what_those_alive_at_once_need(on_a_thread):
    """Also where a small one comes first: the largest has its place, and so does what follows."""
    draw, pixels = Draw(0), 128 * 128 * 4
    module = FrozenSequential(draw.conv(4, 8), draw.conv(8, 16), draw.conv(16, 32), draw.conv(32, 4))
    x = draw(1, 4, 128, 128)

    def work():
        before = kept()
        native(module, x)
        return kept() - before

    assert 48 * pixels <= on_a_thread(work) < 52 * pixels  # 56 in the order of the steps


def test_a_stream_of_large_calls_keeps_its_memory(on_a_thread):
    """Even among usual ones: fresh pages at each call would cost time."""
    module, draw = stem()
    small, large = draw(1, 3, 64, 64), draw(1, 3, 1200, 1200)

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
    """Even the memory of other operators, when only a network runs afterwards."""
    module, draw = stem()
    small = draw(1, 3, 64, 64)

    def inverted_residual(side: int, channels: int, hidden: int, dilation: int) -> None:
        weights = draw(hidden, channels), draw(hidden), draw(hidden, 1, 3, 3), draw(hidden), draw(4, hidden), draw(4)
        x = draw(1, side, side, channels)
        torch.ops.mvit_kernels.inverted_residual.cpu(x, *weights, 1, dilation, False)

    def work():
        native(module, small)
        before = kept()
        inverted_residual(120, 1, 256, 60)  # 30 MB of rows under the filter at once, on one thread
        one_thread = kept() - before
        inverted_residual(2, 1000, 4000, 1)  # 16 MB of packed weights, which threads share
        shared = kept() - before - one_thread
        for _ in range(140):
            native(module, small)
        return one_thread, shared, kept() - before

    one_thread, shared, after = on_a_thread(work)
    assert one_thread > 24 * MB and shared > 12 * MB
    assert after < MB
