# SPDX-License-Identifier: Apache-2.0
"""Measuring: timing in turns, the gate before it, categories of a profile, layout copies, and the demo."""

import contextlib
import csv
import json
import math
import random
import signal
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import mvit_kernels
from mvit_kernels import backends
from mvit_kernels.__main__ import main
from mvit_kernels.bench import demo, profiling, tables
from mvit_kernels.bench.comparison import TimeLimit, compare, time_limit
from mvit_kernels.bench.origin import environment
from mvit_kernels.bench.peers import PEERS, Form, Peer, Subject, eager
from mvit_kernels.bench.profiling import LAUNCH_GAPS, OTHER, category, layout_copies, time_by_category
from mvit_kernels.bench.profiling import table as profile_table
from mvit_kernels.bench.results import COLUMNS
from mvit_kernels.bench.timing import Timing, interleave
from support import models

# --- timing


class Clock:
    """A clock that only candidates advance."""

    def __init__(self):
        self.now, self.log = 0.0, []

    def candidate(self, name, *seconds):
        """A function that takes `seconds` in turn, over and over."""
        state = {"calls": 0}

        def run():
            self.now += seconds[state["calls"] % len(seconds)]
            state["calls"] += 1
            self.log.append(name)

        return run


def test_timing_statistics_are_numpys():
    for count in (1, 2, 3, 10, 101):
        draw = random.Random(count)
        samples = [draw.random() for _ in range(count)]
        expected = np.percentile(samples, (50, 20, 80))
        assert Timing.of(samples)[:3] == pytest.approx(expected) and Timing.of(samples).count == count


def test_interleave_takes_turns_and_takes_medians():
    clock = Clock()
    candidates = {"a": clock.candidate("a", 0.001, 0.002, 0.009), "b": clock.candidate("b", 0.004)}
    candidates["c"] = clock.candidate("c", 0.1)
    times = interleave(candidates, rounds=30, warmup_seconds=0.0, clock=lambda: clock.now)
    assert list(times) == ["a", "b", "c"]
    assert times["a"] == pytest.approx((2.0, 1.0, 9.0, 30)) and times["b"] == pytest.approx((4.0, 4.0, 4.0, 30))
    assert clock.log[:3] == ["a", "b", "c"]  # one call each for warming up
    rounds = [tuple(clock.log[i : i + 3]) for i in range(3, len(clock.log), 3)]
    assert len(rounds) == 30 and all(sorted(one) == ["a", "b", "c"] for one in rounds)
    assert len(set(rounds)) > 3, "every round has the same order, so that each candidate has one predecessor"


def test_interleave_warms_up_by_time_and_stops_by_time():
    clock, seen = Clock(), []
    candidates = {"slow": clock.candidate("slow", 0.5), "fast": clock.candidate("fast", 0.1)}
    times = interleave(
        candidates, seconds=5.9, warmup_seconds=1.0, clock=lambda: clock.now, progress=lambda *done: seen.append(done)
    )
    warm_up = clock.log[:12]
    assert warm_up.count("slow") == 2 and warm_up.count("fast") == 10
    assert times["slow"].count == times["fast"].count == 10
    assert seen[-1] == (10, pytest.approx(6.0))
    times = interleave({"slow": clock.candidate("slow", 50.0)}, seconds=1.0, warmup_seconds=0, clock=lambda: clock.now)
    assert times["slow"].count == 3  # a median of fewer would be one outlier


def test_interleave_divides_by_the_calls_of_a_sample():
    clock = Clock()
    times = interleave(
        {"a": clock.candidate("a", 0.003)}, rounds=2, calls=10, warmup_seconds=0, clock=lambda: clock.now
    )
    assert times["a"] == pytest.approx((3.0, 3.0, 3.0, 2)) and len(clock.log) == 21


def test_interleave_makes_samples_as_long_as_asked():
    clock = Clock()
    candidates = {"short": clock.candidate("short", 0.001), "long": clock.candidate("long", 0.5)}
    times = interleave(candidates, rounds=3, sample_seconds=0.01, warmup_seconds=0, clock=lambda: clock.now)
    assert times["short"] == pytest.approx((1.0, 1.0, 1.0, 3)) and times["long"] == pytest.approx((500.0,) * 3 + (3,))
    assert (
        clock.log.count("short") == 1 + 1 + 3 * 10 and clock.log.count("long") == 1 + 1 + 3
    )  # warm-up, trial, samples


@pytest.mark.parametrize(
    "candidates, options",
    [({}, {"rounds": 1}), ({"a": list}, {}), ({"a": list}, {"rounds": 1, "seconds": 1}), ({"a": list}, {"rounds": 0})],
)
def test_interleave_refuses(candidates, options):
    with pytest.raises(ValueError, match="interleave: "):
        interleave(candidates, **options)


# --- the gate


@pytest.fixture(scope="module")
def subject():
    return Subject(models.build("own", "xxs"), torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)))


def _missing(subject):
    raise ImportError("the library for it is not installed")


def _wrong(subject):
    """Off by a thousandth in one weight, which nobody would notice in the output."""
    model, images = eager(subject)
    with torch.no_grad():
        model.classifier.weight[7, 7] += 1e-3
    return Form(model, images)


def test_only_what_is_right_is_timed(subject, monkeypatch):
    for name, build in (("wrong", _wrong), ("missing", _missing)):
        monkeypatch.setitem(PEERS, name, Peer(name, build))
    before = {name: value.clone() for name, value in subject.model.state_dict().items()}
    steps = []
    results = compare(
        subject,
        ["accelerated", "wrong", "missing", "frozen"],
        seconds=0.1,
        warmup_seconds=0.0,
        progress=steps.append,
    )
    by_name = {result.candidate: result for result in results}
    assert list(by_name) == ["eager", "accelerated", "wrong", "missing", "frozen"]
    for name in ("eager", "accelerated", "frozen"):
        assert by_name[name].row.ok and by_name[name].timing.count >= 3, name
        assert by_name[name].ratio == by_name["eager"].timing.median / by_name[name].timing.median
    assert by_name["wrong"].timing is None and not by_name["wrong"].row.ok
    assert by_name["wrong"].note.startswith("not timed: the error of output is")
    assert by_name["missing"].note == "absent: the library for it is not installed"
    assert steps[-1] == "timing eager, accelerated, frozen"
    assert all(torch.equal(value, before[name]) for name, value in subject.model.state_dict().items())
    text = tables.table(results)
    assert len(text.splitlines()) == 6 and "absent" in text


def test_what_takes_too_long_to_build_is_given_up(subject, monkeypatch):
    monkeypatch.setitem(PEERS, "slow", Peer("", lambda subject: time.sleep(60)))
    slow = compare(subject, ["slow"], seconds=0.1, warmup_seconds=0.0, build_seconds=1.0)[-1]
    assert (slow.candidate, slow.timing, slow.note) == ("slow", None, "given up: not built within 1 s")


def test_a_wrong_gradient_is_not_timed(subject, monkeypatch):
    def wrong(subject):
        model, images = eager(subject)
        model.stages[4][1].transformer[0].fc1.weight.register_hook(lambda gradient: gradient * 1.1)
        return Form(model, images)

    monkeypatch.setitem(PEERS, "wrong", Peer("", wrong))
    results = compare(subject._replace(training=True), ["accelerated", "wrong"], seconds=0.1, warmup_seconds=0.0)
    assert [result.timing is not None for result in results] == [True, True, False]
    assert results[2].row.name == "gradient of stages.4.1.transformer.0.fc1.weight"


def test_what_has_no_finite_truth_is_refused(subject):
    model = models.build("own", "xxs")
    model.classifier.weight.data[0, 0] = math.nan
    with pytest.raises(ValueError, match="not finite in float64"):
        compare(subject._replace(model=model), ["eager"])


def test_time_limit_ends_with_its_block():
    before = signal.getsignal(signal.SIGALRM)
    with pytest.raises(TimeLimit), time_limit(0.05):
        time.sleep(10)
    with time_limit(0.05):
        pass
    time.sleep(0.1)
    assert signal.getsignal(signal.SIGALRM) is before


# --- the commands


def test_bench_writes_a_row_a_candidate(tmp_path, capsys):
    path = tmp_path / "bench.csv"
    command = "bench --model own/xxs --size 64x96 --seconds 0.2 --peers accelerated,frozen --backend reference --output"
    assert main([*command.split(), str(path)]) == 0
    rows = list(csv.DictReader(path.open()))
    assert list(rows[0]) == list(COLUMNS)
    assert [row["candidate"] for row in rows] == ["eager", "accelerated", "frozen"]
    for row in rows:
        assert (row["subject"], row["size"], row["dtype"], row["backend"]) == (
            "own/xxs",
            "64x96",
            "float32",
            "reference",
        )
        assert float(row["p20_ms"]) <= float(row["median_ms"]) <= float(row["p80_ms"])
        assert float(row["ratio"]) == pytest.approx(float(rows[0]["median_ms"]) / float(row["median_ms"]), rel=2e-3)
        assert float(row["error"]) <= float(row["allowed"])
        assert float(row["peak_mb"]) > 0
        assert row["torch"] == torch.__version__ == environment()["torch"]
    assert "accelerated" in capsys.readouterr().out


def test_bench_fails_where_ours_is_wrong(monkeypatch, capsys):
    command = "bench --model own/xxs --size 64 --seconds 0.1 --no-memory --peers accelerated".split()
    monkeypatch.setitem(PEERS, "accelerated", Peer("", _wrong))
    assert main(command) == 0 and "not timed" in capsys.readouterr().out  # a compiler's bug, say
    monkeypatch.setitem(PEERS, "accelerated", Peer("", _wrong, ours=True))
    assert main(command) == 1 and "not timed" in capsys.readouterr().out


@pytest.mark.parametrize(
    "options, message",
    [
        ("--peers eager,fast", "unknown peer 'fast'; choose from eager, "),
        ("--train --peers frozen", "peer 'frozen' is for inference only"),
        ("--seconds 0", "'0' is not a positive number"),
        ("--backend triton --device cpu --peers accelerated", ""),
    ],
)
def test_bench_says_what_is_wrong(options, message, capsys):
    code = main(["bench", "--model", "own/xxs", "--size", "64", "--seconds", "0.1", "--no-memory", *options.split()])
    output = capsys.readouterr()
    if message:
        assert code == 2 and message in output.err
    else:  # the others are still measured; this one is listed with the reason
        assert code == 0 and "absent: accelerate: backend 'triton' was requested but cannot run here" in output.out


def test_launches_are_kernels_alone(monkeypatch):
    """Of a GPU's events: no copies, no fills, no ranges with a name, and nothing that the host does."""
    kinds = torch.autograd.DeviceType
    names = [("aten::add", kinds.CPU), ("add_kernel", kinds.CUDA), ("_fused", kinds.CUDA), ("Memcpy DtoD", kinds.CUDA)]
    names += [("Memset (Device)", kinds.CUDA), ("Torch-Compiled Region", kinds.CUDA)]
    events = [SimpleNamespace(name=n, device_type=k, is_user_annotation="Region" in n) for n, k in names]
    calls = []

    @contextlib.contextmanager
    def profile(**options):
        calls.append("profile")
        yield SimpleNamespace(events=lambda: events)

    monkeypatch.setattr(profiling, "profile", profile)
    monkeypatch.setattr(profiling, "synchronize", lambda device: calls.append("synchronize"))
    assert profiling.launches(lambda: calls.append("call"), "cuda") == 2
    assert calls == ["call", "synchronize", "profile", "call", "synchronize"]


def test_profile_prints_categories(tmp_path, capsys):
    path = tmp_path / "profile.csv"
    assert main(f"profile --model own/xxs --size 64 --calls 1 --operators 3 --output {path}".split()) == 0
    output = capsys.readouterr().out
    for words in ("convolution", "linear", "attention", "norm and activation", "launch gaps", "total", "accelerated"):
        assert words in output
    rows = list(csv.DictReader(path.open()))
    assert {row["candidate"] for row in rows} == {"eager", "accelerated", "frozen"}
    assert main("profile --model own/xxs --size 64 --calls 1 --peers eager --json".split()) == 0
    assert {row["category"] for row in json.loads(capsys.readouterr().out)} == {row["category"] for row in rows}


# --- profiles


@pytest.mark.parametrize(
    "operator, expected",
    [
        ("aten::mkldnn_convolution", "convolution"),
        ("aten::_conv_depthwise2d", "convolution"),
        ("mkldnn::_convolution_pointwise", "convolution"),
        ("aten::convolution_backward", "convolution"),
        ("aten::addmm", "linear"),
        ("mvit_kernels::layer_norm_linear", "linear"),
        ("mvit_kernels::layer_norm_mlp_backward", "linear"),
        ("aten::_scaled_dot_product_flash_attention_for_cpu", "attention"),
        ("aten::_softmax_backward_data", "attention"),
        ("mvit_kernels::patch_attention", "attention"),
        ("mvit_kernels::transformer", "fused transformer"),
        ("aten::native_layer_norm", "norm and activation"),
        ("aten::cudnn_batch_norm_backward", "norm and activation"),
        ("aten::silu_", "norm and activation"),
        ("aten::copy_", "layout copies"),
        ("aten::cat", "layout copies"),
        ("aten::add_relu_of_the_future", OTHER),
        ("aten::view", OTHER),
    ],
)
def test_category_of_an_operator(operator, expected):
    assert category(operator) == expected


ALLOCATION = set("empty empty_like empty_strided new_empty resize_ fill_".split())
VIEWS = set(
    "_nnpack_available _reshape_alias _unsafe_view alias as_strided as_strided_ chunk detach expand flatten narrow "
    "permute reshape resolve_conj select slice split squeeze t to transpose unbind unflatten unsqueeze view".split()
)
POOLING = set("adaptive_avg_pool2d mean sum".split())  # once per model, over its last and smallest map


@pytest.mark.parametrize(
    ("form", "backend", "expected"),
    [
        ("eager", None, ("convolution", "linear", "attention", "norm and activation", "layout copies")),
        ("accelerated", "reference", ("convolution", "linear", "attention", "norm and activation", "layout copies")),
        ("accelerated", None, ("convolution", "fused transformer", "norm and activation")),
        ("frozen", None, ("frozen network",)),
    ],
)
def test_categories_cover_what_a_model_runs(form, backend, expected):
    subject = Subject(models.build("timm", "xxs"), torch.rand(1, 3, 192, 192), backend=backend)
    model, images = PEERS[form].build(subject)
    with torch.no_grad():
        profile = time_by_category(lambda: model(images), calls=1)
    assert sum(profile.categories.values()) == pytest.approx(profile.wall_ms)
    work = profile.wall_ms - profile.categories[LAUNCH_GAPS]
    assert work == pytest.approx(sum(operator.ms for operator in profile.operators))
    for name in expected:
        assert profile.categories[name] > 0, name
    # Which operators are left over, not how long they took: shares of the time depend on what else the machine does.
    other = {operator.name.removeprefix("aten::") for operator in profile.operators if operator.category == OTHER}
    assert other <= ALLOCATION | VIEWS | POOLING, other - ALLOCATION - VIEWS - POOLING
    assert expected[0] in profile_table({form: profile})


# --- layout copies


def test_layout_copies_finds_each_copy_and_no_other():
    x = torch.rand(2, 8, 6, 4)
    assert layout_copies(lambda: (x.permute(0, 2, 3, 1), x.contiguous(), x.flatten(), x + 1, x.to(torch.float32))) == []
    rows = x.permute(0, 2, 3, 1)
    found = layout_copies(lambda: (rows.contiguous(), rows.contiguous(), rows.reshape(-1, 8), x.bfloat16(), x.clone()))
    assert sorted(found) == [
        ("aten::clone", (2, 8, 6, 4), 1),
        ("aten::contiguous", (2, 6, 4, 8), 2),
        ("aten::reshape", (2, 6, 4, 8), 1),
        ("aten::to", (2, 8, 6, 4), 1),
    ]
    assert layout_copies(lambda: torch.cat([x, x])) == [("aten::cat", (), 1)]


def _copies_of_the_map(block, x, width):
    """Copies at least as large as the (B, H, W, width) map between the 1 × 1 convolutions in and out.

    All other maps of the block are narrower (C < width), but for fusion's concatenation, which is a cat.
    """
    with torch.no_grad():
        block(x)
        copies = layout_copies(lambda: block(x))
    tokens = x.numel() // x.shape[1]
    return sum(copy.count for copy in copies if math.prod(copy.shape) >= tokens * width)


@pytest.mark.parametrize(
    "backend, expected",
    [
        ("reference", 2),  # into sequence order and back, once per block
        ("auto", 0),  # where the C++ attention is built, which reads rows where they are
    ],
)
@pytest.mark.parametrize("library", ["timm", "huggingface", "own"])
def test_accelerated_block_copies_no_map(library, backend, expected):
    if backend == "auto" and backends.unavailable("cpu", "cpu"):
        pytest.skip(backends.unavailable("cpu", "cpu")[0])
    if library == "huggingface":
        block = models.build(library).mobilevit.encoder.layer[2]
        block.downsampling_layer = torch.nn.Conv2d(48, 48, 3, padding=1)  # its stride of 2 is in the others' stage
    else:
        block = models.build(library).stages[2][1]
    block = block.to(memory_format=torch.channels_last)
    x = torch.rand(2, 48, 32, 32).contiguous(memory_format=torch.channels_last)
    as_it_was = _copies_of_the_map(block, x, 64)
    mvit_kernels.accelerate(block, backend=backend, strict=True)
    assert _copies_of_the_map(block, x, 64) == expected
    # timm copies the map six times, our own textbook path three: if none were seen, 0 would prove nothing
    assert as_it_was > max(2, expected)


# --- the demo


def test_demo_on_a_small_model(tmp_path, run):
    command = f"demo --model own/xxs --size 64 --batch 1 --budget 1 --output {tmp_path}"
    result = run(*command.split())
    assert result.code == 0, result.err
    output = result.out
    for words in ("3 of 3 MobileViT blocks accelerated", "stages.4.1", "output", "eager", "every error is allowed"):
        assert words in output
    rows = list(csv.DictReader((tmp_path / "demo.csv").open()))
    assert [row["candidate"] for row in rows] == list(demo.FORMS)
    assert rows[-1]["note"].startswith("skipped") and all(row["median_ms"] for row in rows[:-1])
    assert (tmp_path / "demo.png").read_bytes().startswith(b"\x89PNG")


def test_demo_fails_where_an_error_is_too_large(tmp_path, run, monkeypatch):
    def wrong(model):
        model = mvit_kernels.accelerate(model)
        model.classifier.bias.data += 1e-3
        return model

    monkeypatch.setattr(demo, "accelerate", wrong)
    monkeypatch.setattr(demo, "_measured", lambda *arguments: compare(arguments[1], ["eager"], seconds=0.1))
    result = run(*f"demo --model own/xxs --size 64 --batch 1 --budget 1 --output {tmp_path}".split())
    assert result.code == 1 and "TOO LARGE" in result.out


def test_calibration_gives_batch_norms_the_statistics_of_the_images():
    model = models.build("own", "xxs")
    images = torch.rand(3, 3, 64, 64)
    demo.calibrate(model, demo.views(images))
    with torch.no_grad():
        maps = model.stem.conv(torch.cat([images, images.flip(3), images.flip(2), images.flip(2, 3)]))
    norm = model.stem.norm
    assert torch.allclose(norm.running_mean, maps.mean((0, 2, 3)), atol=1e-5)
    assert norm.momentum == 0.1 and not norm.training and norm.num_batches_tracked == 4
