# SPDX-License-Identifier: Apache-2.0
"""Comparing candidates: the gate before timing, and ``mvit-kernels bench`` on one model."""

import csv
import math
import signal
import time

import pytest
import torch

from mvit_kernels import verification
from mvit_kernels.__main__ import main
from mvit_kernels.bench import comparison, tables
from mvit_kernels.bench.comparison import TimeLimit, compare, time_limit
from mvit_kernels.bench.origin import environment
from mvit_kernels.bench.peers import PEERS, Form, Peer, Subject, eager
from mvit_kernels.bench.results import COLUMNS
from support import models

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


def test_what_all_are_judged_by_counts_against_no_limit(subject, monkeypatch):
    """Samples of careful arithmetic take minutes in training; the first candidate that needed them was given up."""

    class Slow(comparison.RoundedArithmetic):
        def __enter__(self):
            time.sleep(1.5)
            return super().__enter__()

    monkeypatch.setattr(comparison, "RoundedArithmetic", Slow)
    monkeypatch.setattr(verification, "PLAUSIBLE_BANDS", 0)  # always asked for
    (result,) = compare(subject, ["eager"], seconds=0.1, warmup_seconds=0.0, build_seconds=1.2)
    assert result.row.ok and result.row.careful_error > 0 and result.timing is not None and result.build_seconds < 1.2


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


# --- the command


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
