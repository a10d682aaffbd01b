# SPDX-License-Identifier: Apache-2.0
"""Suites of measurements as a whole: the budget, what a failure, a lost GPU and an interruption leave, and which
options are wrong."""

import pytest
import torch

from mvit_kernels.__main__ import main
from mvit_kernels.bench import suites
from mvit_kernels.bench.origin import environment
from mvit_kernels.bench.results import read, row
from mvit_kernels.bench.suites import Suite
from mvit_kernels.bench.suites._case import Case, Context

ORIGIN = environment()

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


# --- cases and options


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
