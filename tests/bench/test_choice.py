# SPDX-License-Identifier: Apache-2.0
"""The tables of the automatic choice are what `bench.choice` prints of an H200's lines, and so are rows of `bench`."""

import json

import pytest

from mvit_kernels.backends import preference
from mvit_kernels.bench import choice, results
from support import ROOT

LINES = ROOT / "tests" / "data" / "h200_choice.jsonl"


def without_source(rows):
    return [row[:-1] for row in rows]


def test_the_tables_are_what_was_measured():
    operators, stacks = choice.rows(choice.timings(LINES))
    assert without_source(operators) == without_source(preference.OPERATORS)
    summed = [row for row in preference.STACKS if row.source.endswith("; sums")]
    assert len(summed) == 3 and without_source(stacks) == without_source(summed)
    assert not list(choice.changes(operators))
    one_launch = {each.us for each in choice.timings(LINES) if each.subject == "transformer"}
    assert {row.one_launch for row in preference.STACKS} <= {round(us, 1) for us in one_launch}


def test_rows_of_bench(tmp_path, capsys):
    """The same from a CSV file; a later line counts, and another clock, dtype or size does not."""
    path, other = tmp_path / "operators.csv", dict(clock="wall", dtype="float16", size=128, mode="training")
    known = dict(suite="operators", mode="inference", size=256, dtype="bfloat16", clock="graph", batch=64, stage="s/5")
    times = dict(eager=0.02, cuda=0.03, triton=0.01)
    lines = [dict(known, subject="layer_norm_mlp", candidate=name, median_ms=ms) for name, ms in times.items()]
    lines += [dict(lines[0], median_ms=0.001, **{key: value}) for key, value in other.items()]
    lines += [dict(lines[2], median_ms=0.012), dict(lines[0], subject="layer_norm", candidate="triton")]
    results.append(path, [results.row(**line) for line in lines])
    assert choice.main([str(path)]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed == [
        "# OPERATORS",
        'Operator("layer_norm_mlp", 240, 4096, 20.0, 30.0, 12.0, "operators.csv:2,3,9"),',
        "# STACKS",
        "# layer_norm_mlp, 4096 rows of 240: triton > reference > cuda, and in the table reference > triton > cuda",
    ]


def test_a_place_that_was_not_measured_before(tmp_path):
    lines = [json.loads(line) for line in LINES.read_text().splitlines()]
    again = tmp_path / "again.jsonl"
    again.write_text("\n".join(json.dumps(line | {"batch": 256}) for line in lines if line["stage"] == "s/5"))
    operators, stacks = choice.rows(choice.timings(again))
    assert {row.rows for row in operators} == {256 * 64} and [row.sequences for row in stacks] == [1024]
    told = list(choice.changes(operators))
    assert len(told) == 4 and all(line.endswith("and in the table nothing") for line in told)


@pytest.mark.parametrize(
    "text, code, says",
    [
        ("", 1, "nothing there was timed in eager, cuda and triton"),
        ("not JSON", 2, "Expecting value"),
        (json.dumps(dict(section="stack", stage="m/3", batch=1, candidate="eager", us=1.0)), 1, "nothing there"),
    ],
)
def test_files_without_measurements(tmp_path, capsys, text, code, says):
    (tmp_path / "lines.jsonl").write_text(text)
    assert choice.main([str(tmp_path / "lines.jsonl")]) == code
    assert says in capsys.readouterr().err
    assert choice.main([str(tmp_path / "absent.jsonl")]) == 2


def test_stages():
    assert choice.stage_of("xs/4", 2)[:5] == ("xs", 4, 4, 120, 16)
    with pytest.raises(ValueError, match="no stage is named 's/6'"):
        choice.stage_of("s/6", 1)
