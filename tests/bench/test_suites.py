# SPDX-License-Identifier: Apache-2.0
"""The suites of measurements: their budget, their arithmetic, the gate, both clocks, and the rows that they write."""

import csv
import json

import pytest
import torch

from mvit_kernels.__main__ import build_parser, main
from mvit_kernels.bench import ceilings, suites
from mvit_kernels.bench.ceilings import Ceilings, Work
from mvit_kernels.bench.origin import environment
from mvit_kernels.bench.peers import Subject, call_of, eager
from mvit_kernels.bench.results import read, row
from mvit_kernels.bench.suites import Suite, networks, operators
from mvit_kernels.bench.suites._case import Case, Context
from mvit_kernels.bench.suites.operands import OPERATORS, Stage, operands, operands_of, sizes_of, stages
from mvit_kernels.bench.timing import Timing
from mvit_kernels.cli import measuring
from mvit_kernels.verification import ErrorRow
from support import models

TINY = Stage("xxs", 3, 2, 16, 4, 2)
ORIGIN = environment()


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """The machine's rates, measured in no time."""
    monkeypatch.setattr(ceilings, "SQUARES", {"cpu": (32, 64)})
    monkeypatch.setattr(ceilings, "CONVOLUTION", (8, 6))
    monkeypatch.setattr(ceilings, "COPY_BYTES", {"cpu": 2**12})
    monkeypatch.setattr(ceilings, "SECONDS", {"cpu": 0.01})


# --- arithmetic


def test_work_of_the_stacks_is_what_the_networks_do():
    """GFLOP of the published variants at 256 px, by hand: S stage 3 is 2 layers of 1024 tokens, of which each costs
    6 · 144² + 2 · 144² + 8 · 144² for the linear layers, and 2 · 2 · 256 · 144 for attention to 256 tokens."""
    first = operands("transformer", stages(["s"], 256, 1)[0]).work
    assert first.gflop == pytest.approx(2 * 1024 * (16 * 144**2 + 4 * 256 * 144) / 1e9)
    for variant, total in (("s", 1816), ("xs", 836), ("xxs", 424)):
        gflop = [operands("transformer", stage).work.gflop for stage in stages([variant], 256, 1)]
        assert round(sum(gflop) * 1e3) == total
    assert [stage.side for stage in stages(["s"], 224, 1)] == [28, 14, 8]  # 7 × 7 becomes 8 × 8


@pytest.mark.parametrize("operator", OPERATORS)
def test_work_counts_what_pytorch_counts(operator):
    """FlopCounterMode counts the products of linear layers, convolutions and attention: all that `Work` counts."""
    case = operands(operator, TINY)
    with networks.sdpa_kernel(networks.SDPBackend.MATH), networks.FlopCounterMode(display=False) as counter:
        out = case.plain(*case.tensors)
    assert case.work.gflop == pytest.approx(counter.get_total_flops() / 1e9)
    assert case.training_work.gflop == pytest.approx(3 * case.work.gflop)
    moved = sum(t.nbytes for t in case.tensors) + out.nbytes
    assert case.work.megabytes == pytest.approx(moved / 1e6)
    assert case.to(dtype=torch.bfloat16).work.megabytes == pytest.approx(moved / 2e6)
    torch.testing.assert_close(case.public(*case.tensors, backend="reference"), out)


def test_work_of_a_network():
    """4.06 GFLOP an image for S at 256 px, and the bytes of its 5.6 million weights."""
    model = models.build("own", "s")
    work = networks.work_of(Subject(model, torch.rand(2, 3, 256, 256), torch.bfloat16))
    assert work.gflop == pytest.approx(2 * 4.06, rel=0.02)
    weights = sum(p.numel() for p in model.parameters())
    assert work.megabytes == pytest.approx(2 * (weights + 2 * 3 * 256 * 256) / 1e6)
    training = networks.work_of(Subject(model, torch.rand(2, 3, 256, 256), training=True))
    assert training.gflop == pytest.approx(3 * work.gflop)


def test_per_cent_are_of_the_machines_best():
    best = Ceilings(200.0, 50.0, {}, {})
    columns = best.columns(Work(gflop=0.5, megabytes=20.0), milliseconds=5.0)
    assert columns == pytest.approx(
        {"gflop_per_s": 100.0, "gb_per_s": 4.0, "percent_product": 50.0, "percent_bandwidth": 8.0}
    )


@pytest.mark.parametrize("convolution, best", [(9.0, 2 * 64**3 / 4e-3), (1e-3, 2 * 9 * 8**2 * 4**2 / 1e-6)])
def test_ceilings_are_the_best_that_was_seen(monkeypatch, convolution, best):
    timings = {"product of 32 × 32": Timing(3.0, 2, 3, 5), "product of 64 × 64": Timing(5.0, 4, 6, 5)}
    others = Timing(9.0, convolution, 9, 5), Timing(0.7, 0.5, 1, 5)
    monkeypatch.setattr(
        ceilings, "interleave", lambda calls, **_: timings | dict(zip(list(calls)[2:], others, strict=True))
    )
    found = ceilings.measure(torch.float32)
    assert found.gflop_per_s == pytest.approx(best / 1e9)  # not that of a smaller product
    assert found.gb_per_s == pytest.approx(2 * 2**12 / 0.5e-3 / 1e9)  # read and written
    assert found.amounts("product of 32 × 32")["gflop_per_s"] == pytest.approx(2 * 32**3 / 2e-3 / 1e9)


# --- the gate, and rows


def context(**options) -> Context:
    return Context("cpu", "operators", seconds=0.02, progress=lambda line: None, **options)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("operator", OPERATORS)
def test_each_operator_is_measured_beside_pytorchs(operator, training):
    if training and operator == "inverted_residual":
        return
    stage = TINY if operator == "transformer" or training else TINY._replace(variant="s")
    setting = operators.Setting(operator, stage, 32, "float32", training)
    rows = operators.measure_setting(setting, context())
    by_name = {one["candidate"]: one for one in rows}
    backends = suites.operators.backends
    ours = {"cpu"} if operator in backends.operators("cpu") and not backends.unavailable("cpu", "cpu") else set()
    more = {"patch_attention": {"sdpa_math", "sdpa_flash"}, "inverted_residual": {"convolutions"}}.get(operator, set())
    assert set(by_name) - ({"cpu"} - ours) == {"eager"} | ours | more
    for name in {"eager"} | ours | more:
        one = by_name[name]
        assert one["p20_ms"] <= one["median_ms"] <= one["p80_ms"] and one["error"] <= one["allowed"]
        assert one["ratio"] == pytest.approx(by_name["eager"]["median_ms"] / one["median_ms"], rel=2e-3)
        assert one["gflop_per_s"] == pytest.approx(one["gflop"] / one["median_ms"] * 1e3, rel=2e-3)
        assert (one["mode"], one["stage"]) == ("training" if training else "inference", f"{stage.variant}/3")


@pytest.mark.parametrize("training, wrong", [(False, "output"), (True, "gradient of weight")])
def test_a_wrong_operator_is_not_timed(monkeypatch, training, wrong):
    class Wrong(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone() if training else x * 1.001

        @staticmethod
        def backward(ctx, grad):
            return grad * 1.001

    def candidates(case, device, compiled):
        def function(x, weight, bias, residual):
            return case.plain(x, Wrong.apply(weight), bias, residual)

        return {"eager": case.plain, "cpu": function}

    monkeypatch.setattr(operators, "candidates", candidates)
    setting = operators.Setting("linear_residual", TINY, 32, "float32", training)
    right, ours = operators.measure_setting(setting, context())
    assert right["median_ms"] and (ours["median_ms"], ours["samples"]) == ("", 0)
    assert ours["note"].startswith(f"not timed: the error of {wrong} is ") and ours["error"] > ours["allowed"]
    assert suites._is_wrong(ours) and not suites._is_wrong(right)


def test_bad_luck_with_one_draw_is_no_error(monkeypatch):
    """An operator that misses on one draw of eight, by no more than PyTorch does on another, is right."""
    unit = torch.finfo(torch.float32).eps
    lucky, other = (ErrorRow("output", e, p, 2 * (p + unit), 1.0) for e, p in ((5e-6, 1e-6), (3e-6, 4e-6)))
    together = operators._together([lucky, other], unit)
    assert not lucky.ok and other.ok and together.ok
    assert together == ErrorRow("output", 5e-6, 4e-6, 2 * (4e-6 + unit), 1.0)

    seeds, rows = [], iter([[lucky], *[[other]] * 7])
    monkeypatch.setattr(operators, "_rows", lambda *_: next(rows))
    case = operands("linear_residual", TINY)

    def redraw(seed):
        seeds.append(seed)
        return case

    found = operators.check(case, False, *operators.truth_of(case, False), case.plain, redraw)
    assert found == together and seeds == list(range(1, 8))


def test_a_step_moves_no_weight():
    model = models.build("own", "xxs")
    subject = Subject(model, torch.rand(2, 3, 64, 64), training=True, step=True)
    form = eager(subject)
    before = {name: value.clone() for name, value in form.model.named_parameters()}
    optimizers = []
    original = torch.optim.AdamW.step
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", lambda self: (optimizers.append(self), original(self)))
        call_of(form, subject)()
    assert len(optimizers) == 1 and subject.mode == "step"
    assert all(torch.equal(value, before[name]) for name, value in form.model.named_parameters())


# --- the budget


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


def fake_suite(monkeypatch, clock, costs, *, compiles=0.0, fails=()):
    """A suite of cases that take as many seconds as they cost; returns the list of what ran."""
    ran = []

    def measured(name, cost):
        def run(context):
            ran.append(name)
            clock.now += cost
            if compiles:
                context.built(cost)
            if name in fails:
                raise RuntimeError(f"{name} is out of memory\nby far")
            return [row(suite="fake", subject=name, candidate="eager", clock="wall", median_ms=cost, **environment())]

        return run

    cases = [
        Case(f"c{i}", {"subject": f"c{i}"}, cost, measured(f"c{i}", cost), compiles) for i, cost in enumerate(costs)
    ]
    monkeypatch.setitem(suites.SUITES, "fake", Suite(lambda device: cases, 1.0, {"cpu": 1.0, "cuda": 1.0}, 1.0))
    return ran


def run_fake(clock, folder, minutes, **options):
    said = []
    right = suites.run(
        ["fake"], device="cpu", minutes=minutes, folder=folder, clock=clock, progress=said.append, **options
    )
    return right, said


def test_a_budget_is_kept_the_most_valuable_first(monkeypatch, tmp_path):
    clock = Clock()
    ran = fake_suite(monkeypatch, clock, [10, 20, 300, 15, 30, 40])
    right, said = run_fake(clock, tmp_path, 1.5)
    assert ran == ["c0", "c1", "c3", "c4"] and clock.now <= 90  # 300 never fits, 40 no longer does
    assert right and said[-1].startswith("fake: 4 cases in ") and "; 2 skipped" in said[-1]
    assert [line["subject"] for line in read(tmp_path / "fake.csv")] == ran


def test_rows_are_there_as_soon_as_they_are_made(monkeypatch, tmp_path):
    clock = Clock()
    fake_suite(monkeypatch, clock, [10, 20])
    seen = []
    suites.run(
        ["fake"],
        device="cpu",
        minutes=5,
        folder=tmp_path,
        clock=clock,
        progress=lambda line: seen.append(len(read(tmp_path / "fake.csv")) if (tmp_path / "fake.csv").exists() else 0),
    )
    assert seen[0] == 0 and 1 in seen


def test_a_case_that_fails_has_a_row_and_the_rest_goes_on(monkeypatch, tmp_path):
    clock = Clock()
    fake_suite(monkeypatch, clock, [1, 2, 3], fails=("c1",))
    run_fake(clock, tmp_path, 5)
    lines = read(tmp_path / "fake.csv")
    assert [line["subject"] for line in lines] == ["c0", "c1", "c2"]
    assert lines[1]["note"] == "not measured: RuntimeError: c1 is out of memory by far" and not lines[1]["median_ms"]


def test_resume_leaves_out_what_is_there(monkeypatch, tmp_path):
    clock = Clock()
    ran = fake_suite(monkeypatch, clock, [10, 10, 10])
    run_fake(clock, tmp_path, 0.4)
    assert ran == ["c0", "c1"]
    run_fake(clock, tmp_path, 5, resume=True)
    assert ran == ["c0", "c1", "c2"]
    run_fake(clock, tmp_path, 5)
    assert len(ran) == 6


def test_compiling_has_its_share_of_the_budget(monkeypatch, tmp_path):
    clock = Clock()
    ran = fake_suite(monkeypatch, clock, [20] * 10, compiles=15.0)
    run_fake(clock, tmp_path, 3)
    assert ran == ["c0", "c1", "c2"]  # 60 of 180 s; a fourth would be more than two fifths
    context = Context("cpu", "fake", seconds=1.0, clock=clock)
    context.end = clock.now + 50
    assert context.build_seconds(30.0) is None and context.build_seconds(20.0) == 40.0


def test_a_lost_gpu_ends_the_run(monkeypatch, tmp_path):
    clock = Clock()
    ran = fake_suite(monkeypatch, clock, [1, 1, 1])

    def lost():
        if len(ran) == 2:
            raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(suites, "environment", lambda device: ORIGIN)
    monkeypatch.setattr(torch.cuda, "synchronize", lost)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    with pytest.raises(suites.DeviceLost, match="lost in c1: an illegal memory access"):
        suites.run(["fake"], device="cuda", minutes=5, folder=tmp_path, clock=clock, progress=lambda line: None)
    assert len(read(tmp_path / "fake.csv")) == 2  # the failed case has its row, so that resuming skips it


def test_suites_share_a_budget(monkeypatch, tmp_path):
    shares = []
    monkeypatch.setattr(suites, "_run_suite", lambda name, cases, context, *_: shares.append(context.left) or True)
    clock = Clock()
    suites.run(["all"], device="cpu", minutes=10, folder=tmp_path, clock=clock)
    assert shares == pytest.approx([240, 600 * 3 / 6, 600 / 3, 600 / 2, 600])  # no time passes: it is shared anew


# --- networks


def test_models_are_measured(tmp_path, monkeypatch, capsys):
    """A whole suite on the smallest network, from the command line; the machine's rates have rows of their own."""
    setting = networks.Setting("own/xxs", 64, 1, "float32")
    block = networks.Setting("own/xxs", 64, 1, "float32", stage=3)
    step = networks.Setting("own/xxs", 64, 2, "float32", training=True)
    cases = [networks._case(one, "cpu") for one in (setting, block, step)]
    monkeypatch.setitem(networks.CHEAP, "cpu", ("eager", "accelerated", "frozen"))
    monkeypatch.setattr(networks, "MEMORY_SECONDS", 1e9)
    monkeypatch.setitem(suites.SUITES, "models", Suite(lambda device: cases, 1.0, {"cpu": 0.1}, 1.0))
    assert main(f"bench --suite models --budget 5 --results {tmp_path}".split()) == 0
    lines = list(csv.DictReader((tmp_path / "models.csv").open()))
    assert [line["subject"] for line in lines[:4]] == ["machine"] * 4
    kinds = [(line["subject"], line["stage"], line["mode"], line["candidate"]) for line in lines[4:]]
    network = [("own/xxs", "", "inference", name) for name in ("eager", "accelerated", "frozen")]
    blocks = [("block", "xxs/3", "inference", name) for name in ("eager", "accelerated", "frozen")]
    assert kinds == [*network, *blocks, *(("own/xxs", "", "step", name) for name in ("eager", "accelerated"))]
    for line in lines[4:]:
        if line["subject"] == "own/xxs":
            images = 1e3 * float(line["batch"]) / float(line["median_ms"])
            assert float(line["images_per_s"]) == pytest.approx(images, rel=2e-3)
            assert float(line["percent_product"]) > 0
    assert "accelerated" in capsys.readouterr().out


def test_an_absent_library_is_listed_with_what_installs_it(monkeypatch):
    def absent(name, device):
        raise ImportError("kornia is not installed: pip install 'mvit_kernels[kornia]'")

    monkeypatch.setattr(networks, "load", absent)
    rows = networks.measure_setting(networks.Setting("kornia/s", 64, 1, "float32"), context())
    assert [one["note"] for one in rows] == ["absent: kornia is not installed: pip install 'mvit_kernels[kornia]'"]
    assert (rows[0]["subject"], rows[0]["median_ms"]) == ("kornia/s", "")


def test_an_absent_backend_is_listed_with_its_reasons(monkeypatch):
    monkeypatch.setattr(operators.backends, "unavailable", lambda backend, device: ("no library",) * (backend == "cpu"))
    setting = operators.Setting("linear_residual", TINY, 32, "float32", False)
    rows = {one["candidate"]: one for one in operators.measure_setting(setting, context())}
    assert rows["cpu"]["note"] == "absent: no library" and rows["eager"]["median_ms"]


def test_the_papers_protocol(monkeypatch):
    """MobileNetV2 has none of our blocks and is the baseline of all ratios; each form runs as often as was asked."""
    networks_ = {"mobilenetv2_100": 64, "mobilevit_xxs": 64}

    def subject(name, device):
        model = models.build("timm", "xxs") if name == "mobilevit_xxs" else torch.nn.Conv2d(3, 4, 3).eval()
        return Subject(model, torch.rand(1, 3, networks_[name], networks_[name]))

    monkeypatch.setattr(networks, "_mobile_subject", subject)
    monkeypatch.setattr(networks, "MOBILE_NAMES", tuple(networks_))
    monkeypatch.setattr(networks, "MOBILE_RUNS", 4)
    monkeypatch.setitem(networks.CHEAP, "cpu", ("eager", "frozen"))
    tight = context()
    tight.end = tight.clock() + 1  # no time for compiling
    rows = networks._measure_mobile(tight)
    assert [(one["subject"], one["candidate"]) for one in rows] == [
        ("mobilenetv2_100", "eager"),
        ("mobilevit_xxs", "eager"),
        ("mobilevit_xxs", "frozen"),
    ]
    base = rows[0]["median_ms"]
    for one in rows:
        assert one["samples"] == 4 and one["ratio"] == pytest.approx(base / one["median_ms"], rel=2e-3)


def test_every_case_is_named_once_and_can_be_told_apart(capsys):
    for device in ("cpu", "cuda"):
        for name, suite in suites.SUITES.items():
            cases = suite.cases(device)
            assert len({case.name for case in cases}) == len(cases), name
            keys = [(tuple(case.subject.items()), bool(case.compiles)) for case in cases]
            assert len(set(keys)) == len(keys), name
    assert main("bench --suite blocks,mobile --dry-run".split()) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("mobile: 100 runs at batch 1") and lines[1].startswith("blocks: ")


@pytest.mark.parametrize(
    "options, message",
    [
        ("--suite fast", "unknown suite 'fast'; choose from models, operators, "),
        ("--suite models --budget 0", "'0' is not a positive number"),
        ("--suite models --budget 0.1", "can be measured in 6 s; the smallest useful budget is 0.34 minutes"),
        ("--suite mobile,blocks --stage 4 --budget 0.01", "the smallest useful budget is 0.18 minutes"),
        ("--suite models --peers frozen", "--peers is not for a suite: each suite has its candidates"),
        ("--suite models --pretrained", "--pretrained is not for a suite: suites measure random weights"),
        ("--suite models --checkpoint a.pth", "--checkpoint is not for a suite: suites measure random weights"),
        ("--suite models --output a.csv", "--output is not for a suite: the rows are appended to FOLDER/<suite>.csv"),
        ("--suite models --plot a.png", "--plot is not for a suite: draw what has changed with --compare"),
        ("--suite models --build-seconds 3", "--build-seconds is not for a suite: torch.compile gets"),
        ("--suite models --shape 1,2", "--shape is not for a suite; it belongs to --operator with --shape"),
        ("--suite all --seconds 1 --dry-run", "--seconds: the suite mobile makes 100 runs"),
        ("--suite operators --backend triton", "--backend triton cannot run here: it is for NVIDIA GPUs"),
        ("--suite models --model own/m", "the suite models on cpu has no model own/m; there are: deeplabv3/s, "),
        ("--suite operators --operator attention", "has no operator attention; there are: batch_norm_activation, "),
        ("--suite models --size 96", "has no size 96; there are: 224, 256, 320, 512"),
        ("--suite operators --stage 6", "has no stage 6; there are: s/3, s/4, s/5, xs/3, "),
        (
            "--suite operators --operator transformer --dtype bfloat16 --size 512",
            "with --operator transformer --size 512 there are dtype float32; with --operator transformer --dtype "
            "bfloat16 there are size 256",
        ),
        ("--suite models --dtype float16 --train", "together; without --train there are some"),
        ("--budget 3", "--budget is not for one model; it belongs to --suite, --compare-commits"),
        ("--stage 3", "--stage is not for one model; it belongs to --suite, --compare, --compare-commits"),
        ("--compare a b --batch 8 --budget 3", "--budget is not for a comparison; it belongs to --suite"),
    ],
)
def test_bench_says_what_is_wrong_with_a_suite(options, message, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)  # where the default folder of results would be
    assert main(["bench", *options.split()]) == 2 and message in capsys.readouterr().err


# --- selections


def listed(capsys, options):
    assert main(["bench", "--dry-run", "--suite", *options.split()]) == 0
    return capsys.readouterr().out.splitlines()


@pytest.mark.parametrize(
    "options, count, words",
    [
        ("operators --operator patch_attention,transformer --dtype bfloat16 --stage 3 --train", 4, "s stage 3"),
        ("operators --stage xs/4 --operator layer_norm_mlp", 2, "layer_norm_mlp, xs stage 4"),
        ("models,training --batch 8 --dtype bfloat16 --model mobilevit_s --train", 2, "training: mobilevit_s, 256 px"),
        ("blocks --model mobilevit_xs --stage 3", 1, "mobilevit_xs, block of stage 3"),
        ("models --size 512 --batch 1 --dtype float32", 2, "deeplabv3/"),
    ],
)
def test_filters_select_cases(options, count, words, capsys):
    lines = listed(capsys, options)
    assert len(lines) == count and all(words in one for one in lines), lines


def test_bfloat16_on_the_cpu_is_measured_beside_torch_compile(capsys):
    """In every suite whose candidates are chosen by dtype; there was none, although it is what PyTorch advises."""
    for suite, count in {"models": 4, "training": 2, "operators": 1}.items():
        lines = listed(capsys, f"{suite} --dtype bfloat16")
        assert sum("compiled too" in one for one in lines) >= count, suite


def test_a_selected_run_writes_to_the_same_file(tmp_path, capsys):
    command = "bench --suite operators --operator layer_norm_linear --stage s/5 --dtype float32 --batch 1 --size 256"
    command += f" --seconds 0.05 --budget 0.2 --backend cpu --results {tmp_path}"
    assert main([*command.split(), "--json"]) == 0
    out, err = capsys.readouterr()
    rows = json.loads(out)
    assert [(one["suite"], one["backend"]) for one in rows if one["subject"] != "machine"][0] == ("operators", "cpu")
    written = read(tmp_path / "operators.csv")
    assert len(written) == len(rows) and {one["subject"] for one in written} == {"machine", "layer_norm_linear"}
    assert "layer_norm_linear, s stage 5" in err


def test_an_interrupted_run_says_how_to_go_on(monkeypatch, tmp_path, capsys):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(suites, "_run_suite", interrupted)
    command = ["bench", "--suite", "models", "--results", str(tmp_path)]
    monkeypatch.setattr("sys.argv", ["mvit-kernels", *command])
    assert main(command) == 130
    error = capsys.readouterr().err
    assert f"what was finished is in {tmp_path}. To go on: mvit-kernels bench --suite models --results" in error
    assert error.rstrip().endswith("--resume")


# --- one operator at a shape of one's own


@pytest.mark.parametrize(
    "operator, shape, sizes",
    [
        ("transformer", (2, 6, 8, 20), dict(num_heads=5, patch_size=(3, 2), inner=10, hidden=24, layers=3)),
        ("transformer_layer", (1, 4, 4, 24), dict(num_heads=2, inner=16, hidden=40)),
        ("patch_attention", (2, 4, 6, 24), dict(num_heads=3, patch_size=(2, 3))),
        ("inverted_residual", (2, 7, 8, 20), dict(hidden=24, out_features=12, stride=2)),
        ("inverted_residual", (2, 7, 8, 20), dict(residual=True, dilation=2)),
        ("layer_norm_linear", (9, 20), dict(out_features=12, activation="silu")),
        ("linear_residual", (3, 5, 20), dict(out_features=12)),
        ("layer_norm_mlp", (9, 20), dict(hidden=7)),
        ("layer_norm", (9, 20), {}),
        ("batch_norm_activation", (2, 3, 4, 20), dict(activation=None)),
    ],
)
def test_own_sizes(operator, shape, sizes):
    """Every size is that of the call: the products that PyTorch counts are those of the formula."""
    case = operands_of(operator, shape, **sizes)
    with networks.sdpa_kernel(networks.SDPBackend.MATH), networks.FlopCounterMode(display=False) as counter:
        out = case.plain(*case.tensors)
    assert case.work.gflop == pytest.approx(counter.get_total_flops() / 1e9)
    torch.testing.assert_close(case.public(*case.tensors, backend="reference"), out)


@pytest.mark.parametrize(
    "options, message",
    [
        ("--operator patch_attention", "give --shape B,H,W,C for one call of it, or --suite operators"),
        ("--shape 1,2,2,8", "name the operator with --operator"),
        ("--operator attention --shape 1,2,2,8", "unknown operator 'attention'; choose from batch_norm_activation, "),
        ("--operator layer_norm,transformer --shape 1,2,2,8", "--shape is that of one operator"),
        ("--operator layer_norm --shape 8", "has 1 numbers; give 2 or more numbers, channels last"),
        ("--operator transformer --shape 4,8", "has 2 numbers; give 4: batch, height, width, channels"),
        ("--operator layer_norm --shape 8,0", "'8,0' is not a shape such as 8,32,32,144"),
        ("--operator layer_norm --shape 8,8 --heads 2", "layer_norm has no heads; its sizes are the shape"),
        ("--operator patch_attention --shape 1,2,2,10", "the channels, 10, are no multiple of heads, 4"),
        ("--operator patch_attention --shape 1,3,2,8", "3 × 2 has no whole number of patches of 2 × 2"),
        ("--operator inverted_residual --shape 1,4,4,8 --residual --stride 2", "residual takes stride 1"),
        ("--operator inverted_residual --shape 1,4,4,8 --train", "is for inference only and has no gradient"),
        ("--operator layer_norm --shape 100000,100000,1000", "give a smaller shape"),
        (
            "--operator layer_norm --shape 8,8 --peers fast",
            "layer_norm has no candidate fast here; choose from eager, ",
        ),
        ("--operator layer_norm --shape 8,8 --batch 3", "--batch is not for one operator; it belongs to --model, "),
        ("--operator layer_norm --shape 8,8 --output a.txt", "ends neither in .csv nor in .json"),
    ],
)
def test_bench_says_what_is_wrong_with_an_operator(options, message, capsys):
    assert main(["bench", *options.split()]) == 2 and message in capsys.readouterr().err


@pytest.mark.parametrize("train", [False, True])
def test_one_operator_is_measured(train, tmp_path, capsys):
    command = "bench --operator layer_norm_mlp --shape 3,5,16 --hidden 24 --seconds 0.05 --backend reference".split()
    command += ["--peers", "reference", "--output", str(tmp_path / "a.json")]
    assert main([*command, *["--train"] * train]) == 0
    head, amount, *table = capsys.readouterr().out.splitlines()
    kind = "training" if train else "inference"
    assert head.startswith(f"layer_norm_mlp, 3x5x16, hidden 24, float32, {kind}, torch ")
    assert "GFLOP of products" in amount and [one.split()[0] for one in table] == ["candidate", "eager", "reference"]
    rows = json.loads((tmp_path / "a.json").read_text())
    assert [one["candidate"] for one in rows] == ["eager", "reference"]
    for one in rows:
        assert one["median_ms"] > 0 and one["error"] <= one["allowed"] and one["stage"] == "3x5x16, hidden 24"
        assert ("gradient" in one["worst"] or train is False) and one["backend"] == "reference"


def test_every_operator_has_a_size_for_each_flag():
    """The flags are the operators' sizes, and the help names every operator."""
    parser = build_parser()
    assert {name for operator in OPERATORS for name in sizes_of(operator)} == set(measuring.SIZES)
    text = parser._subparsers._group_actions[0].choices["bench"].format_help()
    assert all(operator in text for operator in OPERATORS)
