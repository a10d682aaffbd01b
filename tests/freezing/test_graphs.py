# SPDX-License-Identifier: Apache-2.0
"""CUDA graphs around a frozen network's launches, with a runtime that captures on the CPU: what is kept, and that calls
of several threads and streams do not meet in the buffers. tests/gates/interpreted_networks.py has real launches."""

from __future__ import annotations

import threading
import time
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import mvit_kernels
from mvit_kernels import CudaGraphs
from mvit_kernels.freezing import graphs
from mvit_kernels.freezing.graphs import Graphs, checked
from support.cuda_graphs import Runtime


class Network:
    """Doubles an image, slowly enough that calls that meet in its memory would show."""

    dtype = torch.bfloat16

    def __init__(self):
        self.runs = []

    def settings(self):
        return None, "half"

    def lowering(self, batch, size):
        return SimpleNamespace(arena=8, result=(batch, *size, 3), any_image=True)

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
            return SimpleNamespace(arena=8, result=(batch, *size, 3), any_image=False)

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


def test_a_capture_that_fails_is_ended(cuda):
    def call():
        cuda.append("call")
        if "begin thread_local" in cuda:
            raise RuntimeError("operation not permitted")

    with pytest.raises(RuntimeError, match="operation not permitted"):
        graphs.Runtime().capture(call, "cuda:1")
    assert cuda.count("end") == 1
