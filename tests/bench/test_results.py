# SPDX-License-Identifier: Apache-2.0
"""Rows of results, the files they are appended to, and what they say about their origin."""

import csv
import io

import pytest
import torch

from mvit_kernels.bench import origin, results
from mvit_kernels.bench.origin import amd_generation, environment, folder_name, intel_generation
from mvit_kernels.bench.results import COLUMNS, ORIGIN, append, check_file, key, latest, read, row
from support import ROOT


def test_a_row_has_every_column_in_order():
    one = row(subject="x", median_ms=1.23456789, samples=0)
    assert list(one) == list(COLUMNS)
    assert (one["subject"], one["median_ms"], one["samples"], one["note"]) == ("x", 1.235, 0, "")
    with pytest.raises(ValueError, match="results: no column is named medain_ms"):
        row(medain_ms=1.0)


def test_rows_are_appended_under_one_heading(tmp_path):
    path = tmp_path / "new" / "operators.csv"
    append(path, [row(subject="a, b", note='says "no"')])
    append(path, [row(subject="c"), row(subject="d")])
    assert [line["subject"] for line in read(path)] == ["a, b", "c", "d"]
    assert read(path)[0]["note"] == 'says "no"' and path.read_text().count("median_ms") == 1


def test_a_file_of_other_columns_is_left_alone(tmp_path):
    path = tmp_path / "models.csv"
    path.write_text("model,median_ms\ns,1.0\n")
    with pytest.raises(ValueError, match="has other columns than this version writes"):
        append(path, [row(subject="a")])
    assert path.read_text() == "model,median_ms\ns,1.0\n"
    assert read(path)[0]["subject"] == "" and read(path)[0]["median_ms"] == "1.0"


def test_half_a_row_is_never_written(tmp_path, monkeypatch):
    """A full disk, or Ctrl-C, in the middle of a write: the file is as it was."""
    path = tmp_path / "a.csv"
    append(path, [row(subject="a")])
    before = path.read_bytes()

    class Full(io.FileIO):
        def write(self, data):
            return super().write(data[: len(data) // 2])

    class Interrupted(Full):
        def write(self, data):
            super().write(data)
            raise KeyboardInterrupt

    for kind, error in ((Full, OSError), (Interrupted, KeyboardInterrupt)):
        with monkeypatch.context() as patch, pytest.raises(error):
            patch.setattr(type(path), "open", lambda self, mode="r", *_, kind=kind, **__: kind(str(self), mode))
            patch.setattr(results, "_is_new", lambda path: False)
            append(path, [row(subject="b")])
        assert path.read_bytes() == before
    path.write_bytes(before + b"half a ro")
    with pytest.raises(ValueError, match="ends in the middle of a line: delete that line"):
        append(path, [row(subject="c")])


def test_a_place_that_cannot_be_written_is_found_first(tmp_path):
    check_file(tmp_path / "new" / "a.csv")
    assert list((tmp_path / "new").iterdir()) == []  # nothing is left of the attempt
    (tmp_path / "b.csv").mkdir()
    (tmp_path / "file").touch()
    for path in (tmp_path / "b.csv", tmp_path / "file" / "a.csv"):
        with pytest.raises(OSError, match="results cannot be written there"):
            check_file(path)


def test_the_latest_rows_stay_with_those_they_were_measured_beside():
    """For each subject all rows of its newest date, and no others; another clock makes another set."""

    def line(date, candidate, subject="s", clock="wall", ms="1.0"):
        known = dict(date=date, candidate=candidate, subject=subject, clock=clock, median_ms=ms)
        return dict.fromkeys(COLUMNS, "") | known

    old = [line("2026-01-02", "eager"), line("2026-01-02", "compile"), line("2026-01-01", "eager", "other")]
    new = [line("2026-01-03", "eager"), line("2026-01-03", "frozen"), line("2026-01-02", "eager", clock="graph")]
    assert latest([*new, *old]) == [*new, old[2]]
    assert key(old[0]) == key(new[0]) != key(old[2])
    assert latest([*old, *new]) == [*new[:2], old[2], new[2]]  # in the order in which subjects first appeared
    failed = line("2026-01-04", "eager", ms="")
    assert latest([*new, failed]) == new and latest([failed]) == [failed]


def test_environment_tells_where_and_when():
    found = environment()
    assert tuple(found) == ORIGIN and all(isinstance(value, str) for value in found.values())
    assert (found["device"], found["torch"]) == ("cpu", torch.__version__)
    assert found["threads"] == str(torch.get_num_threads()) and found["isa"] and found["date"].endswith("Z")


@pytest.mark.parametrize(
    "family, model, expected",
    [
        (25, 0x01, "Zen 3"),
        (25, 0x11, "Zen 4"),
        (25, 0x21, "Zen 3"),
        (25, 0x61, "Zen 4"),
        (25, 0xA0, "Zen 4"),
        (26, 0x02, "Zen 5"),
        (26, 0x44, "Zen 5"),
        (26, 0x50, ""),
        (23, 0x31, ""),
    ],
)
def test_generations_of_amd(family, model, expected):
    assert amd_generation(family, model) == expected


@pytest.mark.parametrize(
    "family, model, expected",
    [(6, 0x6A, "Ice Lake"), (6, 0x8F, "Sapphire Rapids"), (6, 0xCF, "Emerald Rapids"), (6, 0x55, ""), (19, 0xCF, "")],
)
def test_generations_of_intel(family, model, expected):
    assert intel_generation(family, model) == expected


def test_folders_tell_processors_of_one_name_apart(monkeypatch):
    names = set()
    amd, intel = ("AuthenticAMD", "AMD EPYC"), ("GenuineIntel", "Intel(R) Xeon(R) Processor")
    for (vendor, name), family, model in ((amd, 25, 17), (amd, 26, 2), (amd, 27, 1), (intel, 6, 207), (intel, 6, 85)):
        known = {"cpu family": str(family), "model": str(model), "vendor_id": vendor, "model name": name}
        monkeypatch.setattr(origin, "cpuinfo", lambda known=known: known)
        names.add(folder_name(environment()))
    assert names == {
        "amd-epyc-zen4",
        "amd-epyc-zen5",
        "amd-epyc-family-27-model-1",
        "intel-xeon-emerald-rapids",
        "intel-xeon-family-6-model-85",
    }
    gpu = {"device": "cuda", "device_name": "NVIDIA H100 80GB HBM3", "cpu": "x"}
    assert folder_name(gpu) == "nvidia-h100-80gb-hbm3"
    named = {"device": "cpu", "device_name": "Intel(R) Xeon(R) Platinum 8375C CPU @ 2.90GHz"}
    named["cpu"] = "family 6 model 106: Ice Lake"
    assert folder_name(named) == "intel-xeon-platinum-8375c-ice-lake"


def test_committed_results_can_be_read_and_appended_to():
    """Every line of the folders that this version writes has its columns and was made by a commit."""
    root = ROOT / "benchmarks" / "results"
    files = [file for file in root.rglob("*.csv") if file.parent.name != "amd-epyc"]  # an earlier form
    for file in files:
        with file.open(newline="") as text:
            assert next(csv.reader(text)) == list(COLUMNS), file
        for line in read(file):
            assert line["commit"] and line["date"] and line["device_name"], (file, line)
            assert file.parent.name == folder_name(line), (file, line)
            if file.parent.name == "nvidia-h200":  # of another script: what it did not record is empty (its about.md)
                continue
            assert line["cpu"], (file, line)
            assert bool(line["median_ms"]) == (float(line["samples"]) > 0), (file, line)
            assert line["median_ms"] or line["note"], (file, line)
