# SPDX-License-Identifier: Apache-2.0
"""CUDA graphs around a frozen network's launches, with a runtime that captures on the CPU: what is kept, and that calls
of several threads and streams do not meet in the buffers. tests/gates/interpreted_networks.py has real launches."""

from __future__ import annotations

import gc
import threading
import time
import warnings
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import mvit_kernels
from mvit_kernels import CudaGraphs
from mvit_kernels.freezing import graphs
from mvit_kernels.freezing.graphs import checked
from support.cuda_graphs import Runtime


class Graphs(graphs.Graphs):
    """Called as the network calls them."""

    def __call__(self, x):
        return super().__call__(x, self._network().lowering(x.shape[0], x.shape[2:]))


class Network:
    """Doubles an image, slowly enough that calls that meet in its memory would show."""

    dtype = torch.bfloat16

    def __init__(self):
        self.runs = []

    def lowering(self, batch, size):
        return SimpleNamespace(arena=8, result=(batch, *size, 3), any_image=True, settings=(None, "half"))

    def image(self, x, lowering):
        return x.permute(0, 2, 3, 1)

    def run(self, lowering, image, result, arena):
        self.runs.append(tuple(image.shape))
        time.sleep(0.002)
        result.copy_(2 * image)
        return []


@pytest.fixture
def runtime(monkeypatch):
    fake = Runtime()
    monkeypatch.setattr(graphs, "runtime", fake)
    return fake


def image(*shape: int) -> torch.Tensor:
    return torch.randn(shape)


def twice(x: torch.Tensor) -> torch.Tensor:
    return (2 * x.bfloat16()).permute(0, 2, 3, 1)


def test_one_capture_then_replays(runtime):
    network = Network()
    replays, x = Graphs(network, CudaGraphs()), image(2, 3, 4, 5)
    results = [replays(factor * x) for factor in (1, 2, 3)]
    for factor, result in zip((1, 2, 3), results, strict=True):
        assert torch.equal(result, twice(factor * x)) and result.is_contiguous()  # each in memory of its own
    assert runtime.captured == 1 and len(network.runs) == 4
    assert runtime.log == ["made", "record", *["wait", "replay", "record"] * 3]


def test_a_module_that_is_no_stem_reads_each_image(runtime):
    """It wants channels-last maps, and the graph must not read a channels-last copy of the first call's."""

    class Later(Network):
        def lowering(self, batch, size):
            return SimpleNamespace(arena=8, result=(batch, *size, 3), any_image=False, settings=(None, "half"))

        def image(self, x, lowering):
            return x.contiguous(memory_format=torch.channels_last).permute(0, 2, 3, 1)

    replays = Graphs(network := Later(), CudaGraphs())
    for x in (image(2, 3, 4, 5), image(2, 3, 4, 5), image(2, 3, 4, 5).to(memory_format=torch.channels_last)):
        assert torch.equal(replays(x), twice(x)) and network.runs
    assert runtime.captured == 1


def test_all_is_asked_of_the_image_s_device(runtime):
    """Events and streams are those of the current device."""
    replays, x = Graphs(network := Network(), CudaGraphs()), image(1, 3, 2, 2)
    for _ in range(2):
        replays(x)
    assert runtime.devices == [x.device] * 2 and network.runs


def test_in_and_outside_of_inference_mode(runtime):
    replays, x = Graphs(network := Network(), CudaGraphs()), image(1, 3, 2, 2)
    with torch.inference_mode():
        assert torch.equal(replays(x), twice(x))
    assert torch.equal(replays(x.clone().requires_grad_()), twice(x)) and network.runs
    assert torch.equal(replays(x.to(memory_format=torch.channels_last)), twice(x)) and runtime.captured == 1


def test_the_shape_used_longest_ago_goes(runtime):
    replays = Graphs(network := Network(), CudaGraphs(shapes=2))
    for batch in (1, 2, 1, 3):
        assert torch.equal(replays(x := image(batch, 3, 2, 2)), twice(x))
    assert [shape[0] for shape in replays.shapes()] == [1, 3] and runtime.captured == 3
    assert runtime.log.count("synchronize") == 1  # before its memory is given to others
    replays(image(2, 3, 2, 2))
    assert runtime.captured == 4 and [shape[0] for shape in replays.shapes()] == [3, 2] and network.runs


def test_further_shapes_may_run_without_a_graph(runtime):
    replays = Graphs(network := Network(), CudaGraphs(shapes=1, more="run"))
    assert replays(image(1, 3, 2, 2)) is not None
    assert replays(image(2, 3, 2, 2)) is None and runtime.captured == 1 and network.runs
    assert replays(image(1, 3, 2, 2)) is not None


def test_inside_of_another_capture(runtime):
    replays = Graphs(network := Network(), CudaGraphs())
    runtime.capturing = True
    assert replays(image(1, 3, 2, 2)) is None and runtime.captured == 0 and not network.runs
    runtime.capturing = False
    assert replays(image(1, 3, 2, 2)) is not None


def test_a_shape_that_cannot_be_captured_runs_as_usual(runtime, monkeypatch):
    """With one warning, and no second try; others keep their graphs."""

    def capture(call, device):
        call()
        if "3" in runtime.log:
            raise graphs.CaptureError("operation not permitted when stream is capturing")
        return Runtime.capture(runtime, call, device)

    monkeypatch.setattr(runtime, "capture", capture)
    replays = Graphs(network := Network(), CudaGraphs())
    assert replays(image(1, 3, 2, 2)) is not None
    runtime.log.append("3")
    with pytest.warns(RuntimeWarning, match=r"no CUDA graph for images \(3, 3, 2, 2\) on cpu.*not permitted") as warned:
        assert replays(image(3, 3, 2, 2)) is None
        runs = len(network.runs)
        assert replays(image(3, 3, 2, 2)) is None and len(network.runs) == runs
        assert replays(image(4, 3, 2, 2)) is None
    assert len(warned) == 1 and replays.shapes() == [(1, 3, 2, 2)]
    assert replays(image(1, 3, 2, 2)) is not None


def test_who_wants_an_error_gets_it_each_time(runtime, monkeypatch):
    def capture(call, device):
        raise graphs.CaptureError("operation not permitted")

    monkeypatch.setattr(runtime, "capture", capture)
    replays = Graphs(network := Network(), CudaGraphs())
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "freeze: no CUDA graph")
        for _ in range(2):
            with pytest.raises(RuntimeWarning, match="operation not permitted"):
                replays(image(1, 3, 2, 2))
    assert not network.runs


def test_what_fails_without_a_graph_too_is_raised(runtime, monkeypatch):
    network = Network()
    monkeypatch.setattr(network, "run", lambda *arguments: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        Graphs(network, CudaGraphs())(image(1, 3, 2, 2))


def test_threads_take_turns(runtime):
    replays, wrong = Graphs(network := Network(), CudaGraphs(shapes=2)), []

    def call(seed):
        generator = torch.Generator().manual_seed(seed)
        for turn in range(8):
            x = torch.randn(1 + turn % 2, 3, 4, 4, generator=generator)
            if not torch.equal(replays(x), twice(x)):
                wrong.append(seed)

    threads = [threading.Thread(target=call, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and runtime.captured == 2 and len(network.runs) == 2 + 32


def test_memory_outlives_its_last_replay(runtime):
    """Dropped with a change of the weights, say."""
    replays = Graphs(network := Network(), CudaGraphs())
    replays(image(1, 3, 2, 2))
    assert "synchronize" not in runtime.log and network.runs
    del replays
    assert runtime.log[-1] == "synchronize"


# ----------------------------------------------------------------------------------------------------------- arguments


def test_what_freeze_takes():
    assert checked(False) is None and checked(True) == CudaGraphs(8, "replace")
    assert checked(3) == CudaGraphs(3, "replace") and checked(CudaGraphs(2, "run")) == CudaGraphs(2, "run")


@pytest.mark.parametrize(
    "value, error, says",
    [
        ("yes", TypeError, "freeze: cuda_graph is 'yes'; True, a number of input shapes or a CudaGraphs is wanted"),
        ((1, 3, 256, 256), TypeError, "cuda_graph is"),
        (CudaGraphs(True), TypeError, "cuda_graph is"),
        (CudaGraphs(1.5), TypeError, "cuda_graph is"),
        (0, ValueError, "cuda_graph keeps 0 input shapes; at least 1 is wanted"),
        (CudaGraphs(2, "drop"), ValueError, "more='drop'; 'replace' or 'run' is wanted"),
    ],
    ids=str,
)
def test_what_freeze_refuses(value, error, says):
    with pytest.raises(error) as raised:
        mvit_kernels.freeze(nn.Conv2d(3, 8, 3), cuda_graph=value)
    assert says in str(raised.value)


@pytest.mark.parametrize("model, where", [(nn.Conv2d(3, 8, 3), "on cpu"), (nn.Identity(), "nowhere")], ids=str)
def test_a_model_must_be_on_a_gpu(model, where):
    with pytest.raises(ValueError, match=f"for models on a GPU, and this one is {where}; move it with .to"):
        mvit_kernels.freeze(model, cuda_graph=True)


# ------------------------------------------------------------------------------------------ the calls of torch.cuda


@pytest.fixture
def cuda(monkeypatch):
    """What `Runtime` calls of torch.cuda, in order."""
    log = []

    class Stream:
        def __init__(self, name="aside"):
            self.name = name

        def wait_stream(self, other):
            log.append(f"{self.name} waits for {other.name}")

        def __enter__(self):
            log.append(f"on {self.name}")

        def __exit__(self, *_):
            log.append(f"off {self.name}")

    class Graph:
        def capture_begin(self, capture_error_mode):
            log.append(f"begin {capture_error_mode}")

        def capture_end(self):
            log.append("end")

        def replay(self):
            log.append("replay")

    monkeypatch.setattr(torch.cuda, "device", lambda device: Stream(str(device)))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: Stream("current"))
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: stream)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    return log


def test_a_capture(cuda):
    """After a run that loads the kernels, on a stream of its own, and disturbed by no other thread."""
    replay = graphs.Runtime().capture(lambda: cuda.append("call"), "cuda:1")
    replay()
    before = ["on cuda:1", "aside waits for current", "on aside", "call", "begin thread_local", "call", "end"]
    assert cuda == [*before, "off aside", "current waits for aside", "off cuda:1", "replay"]


def test_a_capture_that_fails_is_ended(cuda, monkeypatch):
    """What ends it raises too then, and is not the cause."""

    def call():
        cuda.append("call")
        if "begin thread_local" in cuda:
            raise RuntimeError("operation not permitted")

    def end(self):
        cuda.append("end")
        raise RuntimeError("the capture was invalidated")

    monkeypatch.setattr(torch.cuda.CUDAGraph, "capture_end", end)
    with pytest.raises(graphs.CaptureError, match="operation not permitted"):
        graphs.Runtime().capture(call, "cuda:1")
    assert cuda.count("end") == 1 and cuda[-2:] == ["current waits for aside", "off cuda:1"] and gc.isenabled()
    with pytest.raises(graphs.CaptureError, match="was invalidated"):
        graphs.Runtime().capture(lambda: None, "cuda:1")


def test_what_fails_before_the_capture_is_raised_as_it_is(cuda):
    with pytest.raises(ZeroDivisionError):
        graphs.Runtime().capture(lambda: 1 / 0, "cuda:1")
    assert "begin thread_local" not in cuda and cuda[-2:] == ["current waits for aside", "off cuda:1"]


@pytest.mark.parametrize("enabled", [True, False])
def test_no_garbage_is_collected_in_a_capture(cuda, enabled):
    """It may destroy another model's graph, which no thread that captures may do."""
    seen = []
    (gc.enable if enabled else gc.disable)()
    try:
        graphs.Runtime().capture(lambda: seen.append(gc.isenabled()), "cuda:1")
        assert seen == [enabled, False] and gc.isenabled() == enabled
    finally:
        gc.enable()


def test_captures_take_turns(cuda):
    """The first to end must not let the collector into another one's."""
    barrier, seen = threading.Barrier(2), []

    def capture():
        begun = []

        def call():
            begun.append(1)
            if len(begun) == 1:
                barrier.wait()  # both begin to capture at once
            else:
                seen.append("in")
                time.sleep(0.01)
                seen.append(gc.isenabled())

        graphs.Runtime().capture(call, "cuda:1")

    threads = [threading.Thread(target=capture) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == ["in", False] * 2 and gc.isenabled()
