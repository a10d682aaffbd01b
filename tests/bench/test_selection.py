# SPDX-License-Identifier: Apache-2.0
"""The cases that a command line selects from the suites."""

import json

import pytest

from mvit_kernels.__main__ import main
from mvit_kernels.bench.results import read

pytestmark = pytest.mark.usefixtures("quick_ceilings")


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
