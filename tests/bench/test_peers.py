# SPDX-License-Identifier: Apache-2.0
"""The peers of other runtimes, and the peak memory of a call."""

import io
import pickle
import sys
import time
from unittest import mock

import pytest
import torch
from torch import nn

from mvit_kernels.bench import peak_memory, peers, runtimes
from mvit_kernels.bench.comparison import TimeLimit, compare, time_limit
from mvit_kernels.bench.peers import PEERS, Peer, Subject, call_of
from mvit_kernels.bench.runtimes import OnnxRuntime, OpenVino
from mvit_kernels.bench.tables import table
from mvit_kernels.bench.timing import interleave
from mvit_kernels.verification import named_outputs
from support import models

RUNTIMES = ("onnxruntime", "openvino", "openvino_by_image")
EXPORTED = ("onnxruntime_exported", "openvino_exported")


class Tiny(nn.Module):
    """A network with two outputs, each channel of which is a different function of the image."""

    def __init__(self, heads: int = 2) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.heads = nn.Conv2d(3, 8, 3), nn.ModuleList(nn.Linear(8, 5 + i) for i in range(heads))

    def forward(self, images):
        features = torch.nn.functional.silu(self.conv(images)).mean((2, 3))
        outputs = [head(features) for head in self.heads]
        return outputs[0] if len(outputs) == 1 else {"a": outputs[0], "b": outputs[1]}


def tiny(batch: int = 3, dtype: torch.dtype = torch.float32, heads: int = 2) -> Subject:
    return Subject(Tiny(heads).eval(), torch.rand(batch, 3, 12, 16, generator=torch.Generator().manual_seed(1)), dtype)


# --- other runtimes


@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("name", (*RUNTIMES, *EXPORTED))
def test_a_runtime_computes_what_the_model_does(name, heads):
    subject = tiny(heads=heads)
    form = PEERS[name].build(subject)
    with torch.no_grad():
        for images in (form.images, form.images.flip(0)):  # not only the values of the example
            expected = named_outputs(subject.model(images))
            got = named_outputs(form.model(images))
            assert list(got) == list(expected)
            for key, value in expected.items():
                torch.testing.assert_close(got[key], value, rtol=1e-5, atol=1e-6)


def test_a_runtime_gets_the_plain_model():
    """An accelerated subject is restored for it in a copy; the subject itself stays as it is."""
    model = models.build("timm", "xxs")
    before = type(model.stages[2][1])
    subject = Subject(peers.accelerate(model), torch.rand(1, 3, 32, 32))
    with torch.no_grad():
        expected = peers.eager(subject).model(subject.images)
    for name in ("onnxruntime", "onnxruntime_exported"):
        form = PEERS[name].build(subject)
        torch.testing.assert_close(form.model(form.images), expected, rtol=1e-4, atol=1e-5)
    assert type(model.stages[2][1]) is not before


def test_runtimes_are_gated_and_timed_with_the_others():
    results = compare(tiny(), [*RUNTIMES, "compile_freezing"], seconds=0.1, warmup_seconds=0.0)
    assert [result.candidate for result in results] == ["eager", *RUNTIMES, "compile_freezing"]
    for result in results:
        assert result.row.ok and result.timing.count >= 3 and result.ratio > 0, result


def test_openvino_in_bfloat16():
    """It computes in bfloat16 (its error is that of bfloat16, not of float32), and is judged against PyTorch's own."""
    subject = tiny(dtype=torch.bfloat16)
    try:
        form = PEERS["openvino"].build(subject)
    except ValueError as error:
        assert str(error) == "OpenVINO has no bf16 on this processor"
        assert "avx512" not in open("/proc/cpuinfo").read()
        return
    assert torch.equal(form.images, subject.images.bfloat16().float())
    result = compare(subject, ["openvino"], seconds=0.1, warmup_seconds=0.0)[1]
    assert result.timing is not None and result.row.error > 1e-5


def test_openvino_leaves_signals_alone():
    """Of two OpenVINO cores, the one destroyed last leaves Python's signal handlers on a stack that no longer
    exists."""
    for _ in range(2):
        first, second = (PEERS["openvino"].build(tiny(heads=1)) for _ in range(2))
        del first, second
    with pytest.raises(TimeLimit), time_limit(0.05):
        time.sleep(10)


@pytest.mark.parametrize(
    "name, dtype, says",
    [
        ("onnxruntime", torch.bfloat16, "ONNX Runtime computes in float32 on the CPU, not in bfloat16"),
        ("openvino", torch.float16, "OpenVINO computes in float32 and bfloat16 on the CPU, not in float16"),
    ],
)
def test_a_dtype_that_a_runtime_has_not(name, dtype, says):
    assert compare(tiny(dtype=dtype), [name], seconds=0.1, warmup_seconds=0.0)[1].note == f"absent: {says}"


@pytest.mark.parametrize("module", ["onnxruntime", "openvino", "onnxscript"])
def test_an_absent_runtime_is_listed_with_what_installs_it(module, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.setattr(runtimes, "openvino_core", runtimes.openvino_core.__wrapped__)  # not created yet
    name = "openvino" if module == "openvino" else "onnxruntime"
    extra = "openvino" if module == "openvino" else "onnx"
    results = compare(tiny(), [name], seconds=0.1, warmup_seconds=0.0)
    assert results[0].timing is not None
    assert results[1].note == f"absent: {module} is not installed: pip install 'mvit_kernels[{extra}]'"


@pytest.mark.parametrize("runtime", [OnnxRuntime, OpenVino])
def test_images_and_results_are_not_copied(runtime):
    """A runtime reads the tensor's memory, and its result lies in its own."""
    seen = []

    class Spy(torch.Tensor):
        def numpy(self):
            seen.append(self.as_subclass(torch.Tensor).numpy())
            return seen[-1]

    subject = tiny(heads=1)
    fast = runtime(subject.model, subject.images, dtype=torch.float32, threads=1)
    fast(subject.images.as_subclass(Spy))
    assert seen[0].__array_interface__["data"][0] == subject.images.data_ptr()
    first = fast(subject.images)
    if runtime is OpenVino:  # the next call's result lies where this one's did
        assert fast(subject.images.flip(0)).data_ptr() == first.data_ptr()


def test_threads_of_the_runtimes_are_pytorchs(monkeypatch):
    asked = []
    for name in ("OnnxRuntime", "OpenVino"):
        monkeypatch.setattr(peers, name, lambda *arguments, **options: asked.append(options["threads"]))
    before = torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            for runtime in (peers.OnnxRuntime, peers.OpenVino):
                peers._runtime(runtime)(tiny())
    finally:
        torch.set_num_threads(before)
    assert asked == [1, 1, 2, 2]


def test_a_pause_comes_before_each_sample(monkeypatch):
    log = []
    monkeypatch.setattr("time.sleep", lambda seconds: log.append(seconds))
    interleave({"a": lambda: log.append("a")}, rounds=2, warmup_seconds=0, pause=0.25)
    assert log == ["a", 0.25, "a", 0.25, "a"]


# --- peak memory

MIB = 2**20 // 4  # float32s


class Keeps(nn.Module):
    """Holds `rise` MiB while it runs and keeps `kept` MiB for the next call, all of it outside PyTorch's allocator."""

    def __init__(self, rise: int, kept: int) -> None:
        super().__init__()
        self.weight, self.rise, self.kept, self.scratch = nn.Parameter(torch.ones(1)), rise, kept, None

    def forward(self, images):
        import numpy as np

        if self.kept and self.scratch is None:
            self.scratch = np.ones(self.kept * MIB, np.float32)
        buffer = np.ones(self.rise * MIB, np.float32)
        return images.mean((1, 2, 3), keepdim=True) * self.weight + float(buffer[-1])


def test_peak_memory_is_what_a_call_holds():
    """What it frees again and what it keeps: neither alone is within the bounds."""
    rise, kept = 20, 40
    subject = Subject(Keeps(rise, kept).eval(), torch.rand(1, 3, 8, 8))
    peaks = peak_memory.on_cpu(subject, ["eager", "channels_last"])
    for name, peak in peaks.items():  # the second finds nothing left behind by the first
        assert rise + kept - 0.5 < peak < rise + kept + 6, (name, peaks)


def plain() -> Subject:
    """Of PyTorch's own classes: the fresh process imports no other library, and none of the tests."""
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 8, 3), nn.SiLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)
    return Subject(nn.Sequential(*layers).eval(), torch.rand(3, 3, 12, 16))


def test_peak_memory_of_every_kind_of_peer():
    """Including one that compiles at its first call: the compiler's own memory does not count."""
    subject = Subject(models.build("own", "xxs"), torch.rand(1, 3, 64, 64))
    results = compare(subject, ["eager", "frozen"], seconds=0.1, warmup_seconds=0.0, memory=True)
    assert "peak MiB" in table(results)
    peaks = {result.candidate: result.peak_mb for result in results}
    peaks |= peak_memory.on_cpu(plain(), ["openvino", "compile"])
    assert list(peaks) == ["eager", "frozen", "openvino", "compile"]
    for peak in peaks.values():
        assert isinstance(peak, float) and 0 <= peak < 30, peaks


def test_the_process_imports_torchvision_for_other_libraries_alone(monkeypatch, tmp_path):
    """In this process, where a library that is not loaded stands for timm: nothing is imported for our own models."""
    prepared = []
    monkeypatch.setattr(peak_memory, "prepare_torchvision", lambda: prepared.append("stands_for_timm" in sys.modules))
    task = pickle.dumps(Subject(models.build("own", "xxs"), torch.rand(1, 3, 64, 64)))
    assert isinstance(peak_memory._Unpickler(io.BytesIO(task)).load(), Subject) and prepared == []
    (tmp_path / "stands_for_timm.py").write_text("class Model: pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    with mock.patch.dict(sys.modules):  # which are as before in the end
        import stands_for_timm

        task = pickle.dumps(stands_for_timm.Model())
        del sys.modules["stands_for_timm"]
        assert type(peak_memory._Unpickler(io.BytesIO(task)).load()).__name__ == "Model" and prepared == [False]


def test_peak_memory_of_a_training_step_is_more():
    subject = Subject(models.build("own", "xxs"), torch.rand(4, 3, 64, 64))
    inference = peak_memory.on_cpu(subject, ["eager"])["eager"]
    training = peak_memory.on_cpu(subject._replace(training=True), ["eager"])["eager"]
    assert training > inference + 5  # 1.3 million gradients alone are 5 MiB


def test_memory_that_cannot_be_measured_says_why(monkeypatch):
    subject = plain()
    # The fresh process only knows the package's own peers.
    monkeypatch.setitem(PEERS, "stranger", Peer("", peers.eager))
    result = compare(subject, ["stranger"], seconds=0.1, warmup_seconds=0.0, memory=True)[1]
    assert result.timing is not None and result.peak_mb is None
    assert result.note == "memory not measured: KeyError: 'stranger'"

    subject.model.unpicklable = lambda: None
    assert peak_memory.on_cpu(subject, ["eager"])["eager"].startswith("the model cannot be pickled: ")
    assert peak_memory.on_cpu(plain(), ["eager"], timeout=0.01) == {"eager": "not done within 0 s"}


def test_call_of_a_form_calls_it():
    subject = tiny(heads=1)
    assert call_of(PEERS["eager"].build(subject), subject)().shape == (3, 5)
