# SPDX-License-Identifier: Apache-2.0
"""What changed between two sets of results, from the command line, and its plot."""

import json
import sys
from pathlib import Path

import pytest

from mvit_kernels.bench import plots
from mvit_kernels.bench.changes import changes, load
from mvit_kernels.bench.results import append, row

PLACE = {"device": "cpu", "device_name": "AMD EPYC", "cpu": "Zen 5", "threads": "2", "date": "2026-11-25T20:00:00Z"}


def line(candidate, ms, subject="mobilevit_s", **known):
    """A row as the suite of networks writes it, as text; with ms None it was not timed."""
    usual = dict(suite="models", mode="inference", size=256, batch=1, dtype="float32", backend="auto", clock="wall")
    usual |= dict(note="absent: not here", samples=0) if ms is None else dict(samples=5)
    if ms is not None:
        usual |= dict(median_ms=ms, p20_ms=0.95 * ms, p80_ms=1.05 * ms)
    one = row(**(usual | dict(subject=subject, candidate=candidate) | PLACE | known))
    return {name: str(value) for name, value in one.items()}


@pytest.fixture
def two(tmp_path):
    """Two files: eager drifted by a tenth; frozen is faster, accelerated as before, relative to eager."""

    def write(name, commit, **ms):
        append(tmp_path / name, [line(c, value, commit=commit) for c, value in ms.items()])
        return str(tmp_path / name)

    old = write("old.csv", "aaaa", eager=100.0, frozen=50.0, accelerated=80.0, compile=70.0, openvino=40.0)
    new = write("new.csv", "bbbb", eager=110.0, frozen=40.0, accelerated=88.0, compile=None, openvino=60.0)
    return old, new


def test_what_moved_beyond_the_noise(two):
    old, new = (load(name, Path()) for name in two)
    verdicts = {change.line["candidate"]: change.verdict for change in changes(old, new)}
    assert verdicts == {
        "eager": "same",  # its percentiles overlap those of before
        "frozen": "faster",
        "accelerated": "same",  # slower by as much as eager is
        "compile": "lost",
        "openvino": "slower",
    }
    absolute = {c.line["candidate"]: c.factor for c in changes(old, new, absolute=True)}
    assert absolute["accelerated"] == pytest.approx(1.1) and absolute["frozen"] == pytest.approx(0.8)
    relative = {c.line["candidate"]: c.factor for c in changes(old, new)}
    assert relative["accelerated"] == pytest.approx(1.0) and relative["frozen"] == pytest.approx(0.8 / 1.1, rel=1e-3)
    assert all(c.verdict in ("same", "lost") for c in changes(old, new, least=60.0))


def test_what_is_another_machine_or_batch_is_kept_apart():
    here = [line("eager", 1.0)]
    for other in (line("eager", 2.0, batch=8), line("eager", 2.0, threads="1"), line("eager", 2.0, cpu="Zen 4")):
        assert changes(here, [other]) == []


def test_of_several_rounds_all_must_lie_beyond_all():
    """Each round is taken relative to eager of the same round; the percentiles within a round do not matter."""

    def rounds(*ms, eager=(10.0, 20.0, 30.0)):
        dates = [f"2026-11-25T20:00:00Z {index}" for index in range(len(ms))]
        found = [line("frozen", ours * base / 10, date=d) for ours, base, d in zip(ms, eager, dates, strict=True)]
        return found + [line("eager", base, date=d) for base, d in zip(eager, dates, strict=True)]

    old = rounds(5.0, 5.2, 5.1)
    for new, verdict in ((rounds(5.5, 5.6, 5.4), "slower"), (rounds(5.5, 5.6, 5.15), "same"), (old, "same")):
        (found,) = (change for change in changes(old, new) if change.line["candidate"] == "frozen")
        assert found.verdict == verdict, (found.old, found.new)
        assert found.old == pytest.approx((0.51, 0.50, 0.52))


def test_files_folders_and_commits_are_compared(two, run, refused, monkeypatch):
    root = Path(two[0]).parent
    out = run("bench", "--compare", *two).out.splitlines()
    assert out[0] == "lost    mobilevit_s inference 256 1 float32: compile  absent: not here"
    assert out[1] == "slower  mobilevit_s inference 256 1 float32: openvino  40 -> 60 ms, +36.4 %"
    assert out[-1] == "5 in both: 1 lost, 1 slower, 1 faster, 2 same"
    assert run("bench", "--compare", "aaa", "bbb", "--results", root).out.splitlines() == out
    assert len(run("bench", "--compare", *two, "--all").out.splitlines()) == 6
    assert len(load(str(root), root)) == 10 and {one["commit"] for one in load("bbb", root)} == {"bbbb"}
    assert "cccc is not a result file" in refused("bench", "--compare", two[0], "cccc")
    assert "has no dtype bfloat16; there are: float32" in refused("bench", "--compare", *two, "--dtype", "bfloat16")
    rows = json.loads(run("bench", "--compare", *two, "--json").out)
    assert {one["candidate"]: one["factor"] for one in rows}["openvino"] == pytest.approx(1.364, rel=1e-3)
    output = root / "changes.csv"
    assert run("bench", "--compare", *two, "--output", output, "--absolute").code == 0
    assert "verdict,old_ms,new_ms,factor" in output.read_text()


def test_changes_and_tables_are_drawn(two, run, refused, monkeypatch, tmp_path):
    assert run("bench", "--compare", *two, "--plot", tmp_path / "a.png").code == 0
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    rows = [row(candidate="eager", clock="wall", median_ms=2.0, p20_ms=1.0, p80_ms=3.0, ratio=1.0)]
    rows += [row(candidate="compile", clock="wall", note="absent")]
    plots.draw_table(rows, "title", tmp_path / "b.svg")
    assert "<svg" in (tmp_path / "b.svg").read_text()
    with pytest.raises(ValueError, match="no candidate was timed"):
        plots.draw_table([row(candidate="compile", clock="wall")], "title", tmp_path / "c.png")
    assert "ends in none of .png, .svg and .pdf" in refused("bench", "--plot", tmp_path / "a.gif")

    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)  # as where it is not installed
    missing = refused("bench", "--compare", "nowhere", "nowhere", "--plot", tmp_path / "d.png")
    assert "--plot needs matplotlib: pip install 'mvit_kernels[plots]'" in missing  # before anything is looked at
