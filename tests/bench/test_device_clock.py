# SPDX-License-Identifier: Apache-2.0
"""Both clocks of a GPU, on a machine without one: stand-ins play CUDA's part, and tensors are on the CPU."""

import contextlib
from types import SimpleNamespace

import pytest
import torch

from mvit_kernels.bench import comparison, device_clock
from mvit_kernels.bench.ceilings import Ceilings, Work
from mvit_kernels.bench.comparison import measure
from mvit_kernels.bench.device_clock import Replay, capture, count_beyond
from mvit_kernels.bench.origin import environment
from mvit_kernels.bench.suites import operators
from mvit_kernels.bench.suites._case import Context
from mvit_kernels.bench.suites.operands import OPERATORS, Stage
from mvit_kernels.bench.tables import Result, rows_of
from mvit_kernels.bench.timing import Timing

TINY = Stage("xxs", 3, 2, 16, 4, 2)
ORIGIN = environment()


def test_inputs_are_rotated_beyond_three_times_the_cache():
    cache = 50e6
    assert count_beyond(1e9, cache) == 1
    for size in (1e6, 7e6, 60e6):
        assert count_beyond(size, cache) * size > 3 * cache >= (count_beyond(size, cache) - 1) * size
    assert count_beyond(0, cache) == device_clock.MOST_SETS


@pytest.fixture
def fake_gpu(monkeypatch):
    """As much of torch.cuda as `capture` uses: a graph is the list of what was called while it was captured."""
    log = []
    stream = SimpleNamespace(wait_stream=lambda other: log.append("wait"))

    class Graph:
        def replay(self):
            log.append("replay")

    @contextlib.contextmanager
    def capturing(graph, stream):
        log.append("begin")
        yield
        log.append("end")

    monkeypatch.setattr(torch.cuda, "Stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: log.append("synchronize"))
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", capturing)
    return log


def test_a_graph_holds_one_call_for_each_set(fake_gpu):
    replay = capture([lambda name=name: fake_gpu.append(name) for name in "abc"])
    begin, end = fake_gpu.index("begin"), fake_gpu.index("end")
    assert fake_gpu[:begin].count("a") == 3 and fake_gpu[begin + 1 : end] == ["a", "b", "c"]
    assert fake_gpu[begin - 1] == "synchronize"
    replay.run()
    assert fake_gpu[-1] == "replay" and replay.calls == 3


def test_a_gpus_rows_have_both_clocks(monkeypatch):
    """Wall and graph with a ratio each, launches and memory; a candidate without a graph says why."""
    walls = {"eager": Timing(8.0, 7, 9, 5), "ours": Timing(2.0, 1, 3, 5), "own graphs": Timing(4.0, 3, 5, 5)}
    graphs = {"eager": Timing(6.0, 5, 7, 5), "ours": Timing(3.0, 2, 4, 5)}  # of replays of two calls

    def interleave(calls, *, events=False, **options):
        assert set(calls) == set(graphs if events else walls) and options["device"].type == "cuda"
        return graphs if events else walls

    def refuse():
        raise RuntimeError("it waits for the device")

    monkeypatch.setattr(comparison, "interleave", interleave)
    monkeypatch.setattr(comparison, "synchronize", lambda device: None)
    monkeypatch.setattr(comparison, "launches", lambda call, device: 7)
    monkeypatch.setattr(comparison.peak_memory, "on_gpu", lambda call, device: 1.5)
    results = {name: Result(name) for name in walls}
    replays = {"eager": lambda: Replay(list, 2), "ours": lambda: Replay(list, 2), "own graphs": refuse}
    measure(results, dict.fromkeys(walls, list), replays=replays, device=torch.device("cuda"), seconds=1.0)
    best = Ceilings(100.0, 10.0, {}, {})
    rows = rows_of(results.values(), ORIGIN, work=Work(0.1, 3.0), ceilings=best, subject="x", batch=2)
    table = {(one["candidate"], one["clock"]): one for one in rows}
    assert len(rows) == 6 and {one["launches"] for one in rows} == {7} and {one["peak_mb"] for one in rows} == {1.5}
    ours, device = table["ours", "wall"], table["ours", "graph"]
    assert (ours["median_ms"], ours["ratio"], ours["images_per_s"]) == (2.0, 4.0, 1000.0)
    assert (device["median_ms"], device["p20_ms"], device["p80_ms"], device["ratio"]) == (1.5, 1.0, 2.0, 2.0)
    assert (ours["percent_product"], device["percent_product"]) == (50.0, 66.67)
    assert (ours["percent_bandwidth"], device["percent_bandwidth"]) == (15.0, 20.0)
    refused = table["own graphs", "graph"]
    assert (refused["median_ms"], refused["note"]) == ("", "no graph: it waits for the device")


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("operator", ["linear_residual", "patch_attention", "transformer"])
def test_an_operator_is_measured_on_a_gpu(monkeypatch, operator, training):
    """Everything that is done there, on CPU tensors: candidates, replays over different sets of inputs, both clocks."""
    captured = []

    def capture(calls):
        captured.append([call() for call in calls])
        return Replay(calls[0], len(calls))

    def interleave(calls, *, events=False, device, seconds, **options):
        assert device.type == "cuda"
        for call in calls.values():
            call()
        return {name: Timing(2.0, 1.0, 3.0, 4) for name in calls}

    monkeypatch.setattr(operators.Operands, "to", lambda case, device, dtype=None: case)
    monkeypatch.setattr(operators, "sets_beyond_cache", lambda size, device: 3)
    monkeypatch.setattr(operators, "capture", capture)
    monkeypatch.setattr(operators, "environment", lambda device: ORIGIN)
    monkeypatch.setattr(operators.backends, "unavailable", lambda backend, device: ("no GPU",) * (backend == "cuda"))
    monkeypatch.setattr(operators.backends, "operators", lambda backend: OPERATORS)
    for name, value in dict(interleave=interleave, launches=lambda *_: 3, synchronize=lambda device: None).items():
        monkeypatch.setattr(comparison, name, value)
    monkeypatch.setattr(comparison.peak_memory, "on_gpu", lambda call, device: 1.5)
    monkeypatch.setattr(operators.Operands, "result_bytes", 4)
    there = Context("cuda", "operators", seconds=0.02)
    there.ceilings = lambda dtype: Ceilings(100.0, 10.0, {}, {})
    rows = operators.measure_setting(operators.Setting(operator, TINY, 32, "float32", training), there)
    by_name = {(one["candidate"], one["clock"]): one for one in rows}
    assert by_name["cuda", "wall"]["note"] == "absent: no GPU"
    assert by_name["triton", "wall"]["note"].startswith("absent: ")  # asked for by name, and there is no GPU
    assert by_name["eager", "wall"]["median_ms"] == 2.0 and by_name["eager", "graph"]["median_ms"] == 0.6667
    assert by_name["eager", "graph"]["launches"] == 3 and by_name["eager", "graph"]["peak_mb"] == 1.5
    if operator == "patch_attention":
        assert by_name["sdpa_math", "graph"]["median_ms"] and ("sdpa_cudnn", "wall") in by_name
    first = captured[0]
    results = [one[0] if training else one for one in first]
    assert len(first) == 3 and not torch.equal(results[0], results[1]) and not torch.equal(results[1], results[2])


def test_a_networks_graph_holds_several_batches(monkeypatch):
    monkeypatch.setattr(comparison, "capture", lambda calls: Replay(calls[-1], len(calls)))
    seen = []
    images = torch.rand(2, 3, 8, 8)
    replay = comparison._replay_of("eager", comparison.Form(seen.append, images))()
    replay.run()
    assert replay.calls == comparison.IMAGE_SETS
    assert torch.equal(seen[0], images) and seen[0].data_ptr() != images.data_ptr()
    with pytest.raises(ValueError, match="replays CUDA graphs of its own"):
        comparison._replay_of("compile_max_autotune", comparison.Form(seen.append, images))()


def test_what_goes_wrong_with_a_gpus_clock_leaves_the_walls(monkeypatch):
    """Except when the GPU is lost: then nothing on it can be trusted."""

    def interleave(calls, *, events=False, **options):
        if events:
            raise RuntimeError("out of memory")
        return {"eager": Timing(8.0, 7, 9, 5)}

    monkeypatch.setattr(comparison, "interleave", interleave)
    monkeypatch.setattr(comparison, "synchronize", lambda device: None)
    monkeypatch.setattr(comparison, "launches", lambda call, device: 0)
    monkeypatch.setattr(comparison.peak_memory, "on_gpu", lambda call, device: 1.5)
    how = dict(replays={"eager": lambda: Replay(list, 2)}, device=torch.device("cuda"), seconds=1.0)
    results = {"eager": Result("eager")}
    measure(results, {"eager": list}, **how)
    wall, graph = rows_of(results.values(), ORIGIN)
    assert (wall["median_ms"], wall["launches"], graph["note"]) == (8.0, "", "not replayed: out of memory")

    def lost(device):
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(comparison, "synchronize", lost)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        measure({"eager": Result("eager")}, {"eager": list}, **how)
