# SPDX-License-Identifier: Apache-2.0
"""The scripts in benchmarks/: the report of committed results, and the one for GPUs."""

import importlib
import os
import re
import subprocess
import sys

import pytest
import torch

import mvit_kernels
from gates import every_kernel
from mvit_kernels.bench.results import append, read, row
from support import ROOT

FOLDER = ROOT / "benchmarks"


@pytest.fixture
def script(monkeypatch):
    """Import a script of benchmarks/ as a module."""
    before = set(sys.modules)
    monkeypatch.syspath_prepend(str(FOLDER))
    yield importlib.import_module
    for name in set(sys.modules) - before:
        if str(FOLDER) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


PLACE = {
    "device": "cpu",
    "device_name": "AMD EPYC",
    "cpu": "family 26 model 2: Zen 5",
    "isa": "avx512bf16",
    "threads": "2",
    "torch": "2.13.0+cpu",
    "commit": "abcdef123456",
    "date": "2026-11-25T20:00:00Z",
}


def line(candidate, ms, subject="mobilevit_s", **known):
    """A row as the suite of networks writes it; with ms None it was not timed."""
    usual = dict(suite="models", mode="inference", size=256, batch=1, dtype="float32", backend="auto", clock="wall")
    usual |= dict(note="absent: not here", samples=0) if ms is None else dict(samples=5)
    if ms is not None:
        usual |= dict(median_ms=ms, p20_ms=0.95 * ms, p80_ms=1.05 * ms)
    return row(**(usual | dict(subject=subject, candidate=candidate) | PLACE | known))


def training(candidate, ms, **known):
    return line(candidate, ms, **(dict(suite="training", mode="step", batch=8) | known))


# --- the report


def test_texts_are_what_the_committed_results_give(script):
    """`make report` would change nothing, and what they link is there."""
    for path, text in script("report").written().items():
        assert path.read_text(encoding="utf-8") == text, f"{path.name} is outdated: make report"
        for link in re.findall(r"\]\(((?:\.\./)?benchmarks/[^)]+|docs/[^)]+)\)", text):
            assert (path.parent / link).exists(), f"{path.name} names {link}, which is not there: make report"


def test_readme_has_no_figure_of_speed_by_hand():
    """Milliseconds, ratios and rates only stand between the markers, where they come from the results."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    by_hand = re.sub(r"<!-- report: (\w+) -->.*?<!-- end of report: \1 -->", "", text, flags=re.DOTALL)
    assert len(by_hand) < len(text)
    found = re.findall(r"[^\n]*\b\d+(?:\.\d+)?\s?(?:ms|µs|×|GFLOP|TFLOP|GB/s|images/s)(?![\w])[^\n]*", by_hand)
    assert not [one for one in found if not re.search(r"\d × \d", one)], found


@pytest.fixture
def device(tmp_path):
    """Results of one CPU: S at batch 1, where OpenVINO wins, and at batch 8, where we do; and those of an older run."""
    folder = tmp_path / "amd-epyc-zen5"
    old = [line("eager", 99.0, date="2026-11-24T20:00:00Z"), line("frozen", 1.0, date="2026-11-24T20:00:00Z")]
    new = [line("eager", 60.0), line("openvino", 15.0), line("frozen", 20.0), line("accelerated", 40.0)]
    new += [line("onnxruntime", None), line("frozen", 100.0, batch=8), line("eager", 400.0, batch=8)]
    new += [line("openvino", 150.0, batch=8), line("product of 64 × 64", 1.0, "machine")]
    append(folder / "models.csv", [*new, *old])
    return tmp_path


def test_the_report_takes_the_newest_rows_and_hides_no_loss(script, device):
    report = script("report")
    headline = report.headline(device).splitlines()
    assert headline[0] == (
        "In float32 at batch 1 on 2 threads of an AMD EPYC (Zen 5), timm's MobileViT-S frozen is 3.00× as fast as "
        "eager PyTorch and 0.75× as fast as OpenVINO, the fastest of the others."
    )
    assert headline[-3:] == [
        "| | AMD Zen 5, 2 threads |",
        "|---|---|",
        "| S, batch 1, float32 | **OpenVINO 15.0**, frozen 20.0, eager 60.0 |",
    ]
    detail = report.detail(device)
    assert "| S, batch 1 | 60.0 | 40.0 (1.50×) | 20.0 (3.00×) | **15.0 (4.00×)** |" in detail
    assert "| S, batch 8 | 400 |  | **100 (4.00×)** | 150 (2.67×) |" in detail
    assert "### Inference, float32\n\n| | eager | accelerated | frozen | OpenVINO |\n" in detail
    assert "99.0" not in detail and "machine" not in detail and "commit abcdef123456, 2026-11-25." in detail
    assert "There are no rows of a GPU yet." in detail and "### Training step" not in detail


def test_every_number_of_the_report_is_a_rows(script, device):
    """Milliseconds in the tables are medians of rows, and ratios are those of two medians."""
    report = script("report")
    append(device / "amd-epyc-zen5" / "training.csv", [training("eager", 900.0), training("accelerated", 700.0)])
    text = report.headline(device) + report.detail(device)
    rows = [one for suite in ("models", "training") for one in read(device / "amd-epyc-zen5" / f"{suite}.csv")]
    medians = [float(one["median_ms"]) for one in rows if one["median_ms"]]
    written = {report.milliseconds(value) for value in medians}
    ratios = {report.times(a, b) for a in medians for b in medians}
    cells = [cell for one in text.splitlines() if one.startswith("|") for cell in one.split("|")[2:]]
    numbers = [number for cell in cells for number in re.findall(r"(?<!Zen )\b\d+(?:\.\d+)?(?! threads)×?", cell)]
    assert len(numbers) > 15 and set(numbers) <= written | ratios


def test_the_headlines_table_has_a_column_a_machine(script, device):
    """What a machine lacks is said, and eager is not named twice where it is the fastest of the others."""
    append(device / "amd-epyc-zen5" / "training.csv", [training("eager", 900.0), training("accelerated", 950.0)])
    intel = {"device_name": "Intel(R) Xeon(R) Processor", "cpu": "family 6 model 207: Emerald Rapids"}
    append(device / "somewhere" / "models.csv", [line("eager", 80.0, **intel), line("frozen", 40.0, **intel)])
    headline = script("report").headline(device).splitlines()
    assert headline[0].endswith("; on 2 threads of an Intel Xeon (Emerald Rapids), frozen, 2.00× and 2.00× (eager).")
    assert headline[-4:] == [
        "| | AMD Zen 5, 2 threads | Intel Emerald Rapids, 2 threads |",
        "|---|---|---|",
        "| S, batch 1, float32 | **OpenVINO 15.0**, frozen 20.0, eager 60.0 | **frozen 40.0**, eager 80.0 |",
        "| S, batch 8, float32, training step | **eager 900**, accelerated 950 | not measured |",
    ]


def test_milliseconds_have_three_digits(script):
    report = script("report")
    assert [report.milliseconds(value) for value in (0.1234, 5.678, 9.996, 42.25, 99.96, 1234.5)] == [
        "0.12",
        "5.68",
        "10.0",
        "42.2",
        "100",
        "1234",
    ]
    assert report.times(30.0, 20.0) == "1.50×"  # above 1: the second is faster


def test_the_report_wants_its_markers(script):
    report = script("report")
    text = "a\n<!-- report: x -->\nold\n<!-- end of report: x -->\nb\n"
    assert report.rewritten(text, "x", "new \\1") == text.replace("old", "new \\1")
    with pytest.raises(ValueError, match="docs/a.md has no marker <!-- report: y -->"):
        report.rewritten(text, "y", "new", "docs/a.md")


def test_a_gpus_rows_come_first_and_tell_their_clock(script, device):
    gpu = PLACE | {"device": "cuda", "device_name": "NVIDIA H200", "driver": "580.1"}
    new = [
        line(c, ms, batch=64, dtype="bfloat16", **gpu) for c, ms in (("eager", 9.0), ("compile", 6.0), ("frozen", 3.0))
    ]
    device_clock = dict(batch=64, dtype="bfloat16", clock="graph") | gpu
    new += [line("eager", 8.0, **device_clock), line("frozen", 2.0, **device_clock)]
    append(device / "nvidia-h200" / "models.csv", new)
    report = script("report")
    text = report.headline(device).splitlines()
    assert text[0].startswith("In bfloat16 at batch 64 on one NVIDIA H200, timm's MobileViT-S frozen is 3.00× as fast")
    assert text[0].endswith(
        "; in float32 at batch 1 on 2 threads of an AMD EPYC (Zen 5), frozen, 3.00× and 0.75× (OpenVINO)."
    )
    detail = report.detail(device)
    assert "| S, batch 64, device's clock | 8.00 | **2.00 (4.00×)** |  |" in detail
    assert detail.index("## NVIDIA H200") < detail.index("## 2 threads") and "no rows of a GPU" not in detail


# --- the plots


@pytest.fixture
def operators(device):
    """Results of the transformer at three batches and two sizes, two operators, and the machine's rates."""
    folder, rows = device / "amd-epyc-zen5", []
    rates = dict(subject="machine", suite="operators")
    rows += [line("product of 64 × 64", 1.0, gflop_per_s=200.0, **rates)]
    rows += [line("copy of 1 MiB", 1.0, gb_per_s=30.0, **(rates | {"dtype": ""}))]
    for batch, size in ((1, 256), (2, 256), (4, 256), (1, 128)):
        for candidate, ms in (("eager", 8.0), ("cpu", 2.0)):
            known = dict(suite="operators", stage="s/3", batch=batch, size=size, sequence=(size // 16) ** 2)
            known |= dict(gflop=1.0, mb=2.0, gflop_per_s=1000.0 / ms / batch)
            known |= dict(percent_product=50.0 / batch if candidate == "cpu" else None)
            rows.append(line(candidate, ms * batch, "transformer", **known))
    rows += [
        line("eager", 1.0, "patch_attention", suite="operators", stage="s/4", gflop=0.1, mb=1.0, gflop_per_s=100.0)
    ]
    append(folder / "operators.csv", rows)
    return device


def test_plots_are_drawn(script, operators, tmp_path, monkeypatch):
    """As wide as a page of 900 px, twice as fine; here coarser, to be quick."""
    plots, operator_plots, plotting, tables = map(script, ("plots", "operator_plots", "plotting", "tables"))
    assert plotting.WIDTH * plotting.DPI == 2 * 900
    monkeypatch.setattr(plotting, "DPI", 50)
    folder = operators / "amd-epyc-zen5"
    found = tables.tables(folder, "operators")
    plots.headline([tables.first_screen(folder)], tmp_path / "headline.png")
    assert list(operator_plots.KINDS) == ["roofline", "scaling"]
    for kind in operator_plots.KINDS:
        assert operator_plots.has(kind, found)
        operator_plots.draw(kind, folder, tmp_path / f"{kind}.png")
    for name in ("headline", *operator_plots.KINDS):
        data = (tmp_path / f"{name}.png").read_bytes()
        assert data.startswith(b"\x89PNG") and int.from_bytes(data[16:20], "big") == 450
    assert [t.any["batch"] for t in operator_plots.under_the_roof(found)] == ["1"]  # what we have no kernel for is out
    points = operator_plots._scaling(found)
    assert [x for x, _ in points["batch", "cpu"]] == [1, 2, 4]
    assert [x for x, _ in points["tokens", "eager"]] == [64, 256]
    assert not operator_plots.has("roofline", []) and not operator_plots.has("scaling", [])


def test_the_operators_table(script, operators):
    detail = script("report").detail(operators)
    assert "MobileViT-S at 256 px, inference, float32, batch 1: microseconds" in detail
    assert "| `transformer`, 3 | 8000 | **2000 (4.00×)** | 50 % |  |" in detail
    assert "patch_attention" not in detail  # not ours yet: no row


def marks(panel, y):
    """{ratio: height} of the marks at the height of a setting, without the line to the fastest."""
    found = {}
    for one in panel.lines:
        if one.get_marker() not in ("None", "", None) and len(one.get_xdata()) == 1:
            if abs(one.get_ydata()[0] - y) < 0.5:
                found[round(float(one.get_xdata()[0]), 3)] = round(float(one.get_ydata()[0]) - y, 3)
    return found


def test_the_headline_plot_shows_ratios_and_what_is_absent(script, device, tmp_path, monkeypatch):
    """A mark a kind of candidate at eager's time over its own; none for what was not timed; none behind another."""
    plots, plotting, tables = script("plots"), script("plotting"), script("tables")
    more = [line("eager", 60.0, "mobilevit_xxs"), line("frozen", 120.0, "mobilevit_xxs")]  # slower than eager
    more += [line("openvino", 123.0, "mobilevit_xxs"), line("compile_freezing", 30.0, "mobilevit_xxs")]
    more += [line("compile", 40.0, "mobilevit_xxs")]
    append(device / "amd-epyc-zen5" / "models.csv", more)
    drawn = []
    monkeypatch.setattr(plotting, "save", lambda figure, path: drawn.append(figure))
    here = tables.first_screen(device / "amd-epyc-zen5")
    there = {setting: table for setting, table in here.items() if setting.batch == 1}
    plots.headline([here, {}, there], tmp_path / "x.png")
    left, right = drawn[0].axes
    heights = dict(zip([text.get_text() for text in left.get_yticklabels()], left.get_yticks(), strict=True))
    assert list(heights) == ["S, batch 1", "S, batch 8", "XXS, batch 1"]
    assert marks(left, heights["S, batch 1"]) == {4.0: 0, 3.0: 0, 1.5: 0}
    crowded = marks(left, heights["XXS, batch 1"])
    assert crowded == {0.488: -0.3, 0.5: 0, 2.0: 0}  # of torch.compile the faster; OpenVINO moved off ours
    assert left.get_xlim()[0] < 0.488 and [text.get_text() for text in left.texts if "×" in text.get_text()] == [
        "3.0×",
        "4.0×",
        "0.5×",
    ]
    assert [text.get_text() for text in right.texts] == ["3.0×", "not measured", "0.5×"]
    assert [text.get_text() for text in drawn[0].legends[0].get_texts()] == [
        "frozen (ours)",
        "accelerated (ours)",
        "OpenVINO",
        "torch.compile",
    ]


# --- the others


def test_boundary_writes_a_row_a_path(script, tmp_path, monkeypatch, capsys):
    boundary = script("boundary")
    monkeypatch.setattr(sys, "argv", ["boundary.py", "--rounds", "3", "--results", str(tmp_path)])
    boundary.main()
    lines = read(tmp_path / "boundary.csv")
    paths = {(one["subject"], one["backend"], one["candidate"]) for one in lines}
    assert ("torch.add", "", "forward") in paths and ("transformer", "reference", "raw") in paths
    assert ("layer_norm_linear", "reference", "function") in paths
    assert len(paths) == len(lines) and all(float(one["median_ms"]) > 0 for one in lines)
    assert "× torch.add" in capsys.readouterr().out


def test_exactness_writes_a_row_a_result(script, tmp_path, monkeypatch, capsys):
    """Ours and PyTorch's, against a truth that is exact in comparison; operators only in the dtypes they have."""
    exactness = script("exactness")
    if exactness.mvit_kernels.backends.unavailable("cpu", "cpu"):
        pytest.skip(exactness.mvit_kernels.backends.unavailable("cpu", "cpu")[0])
    monkeypatch.setattr(exactness, "PRODUCTS", [(6, 64, 192)])
    monkeypatch.setattr(sys, "argv", ["exactness.py", "--draws", "2", "--results", str(tmp_path)])
    exactness.main()
    lines = read(tmp_path / "exactness.csv")
    found = {(one["subject"], one["dtype"], one["mode"]) for one in lines}
    assert ("layer_norm_mlp", "float64", "fc2_weight") in found and ("convolution", "float32", "out") in found
    assert ("convolution", "float64", "out") not in found and len(capsys.readouterr().out.splitlines()) == len(lines)
    for one in lines:
        unit = torch.finfo(getattr(torch, one["dtype"])).eps
        assert float(one["error"]) < 20 * unit and 0 < float(one["ratio"]) < 3, one


def test_regressions_check_and_time_the_cpu_path(script):
    regressions = script("regressions")
    timed = []

    def benchmark(function, *arguments):
        timed.append(function(*arguments))

    stage = regressions.stages(["xxs"], 64, 1)[0]
    if regressions.backends.unavailable("cpu", "cpu"):
        pytest.skip(regressions.backends.unavailable("cpu", "cpu")[0])
    regressions.test_operator(benchmark, "transformer", stage, torch.float32)
    regressions.test_operator_with_backward(benchmark, "linear_residual")
    assert timed[0].shape == (1, 8, 8, 64) and len(timed[1]) == 1 + 4


def test_scales_times_every_scale(script, monkeypatch, capsys):
    """A line a case; it exits with 1 if a scale is slower than allowed, and measures again before it says so."""
    scales = script("scales")
    if scales.mvit_kernels.backends.unavailable("cpu", "cpu"):
        pytest.skip(scales.mvit_kernels.backends.unavailable("cpu", "cpu")[0])
    base = ["scales.py", "--variant", "xxs", "--dtypes", "float32", "--seconds", "0.001"]
    monkeypatch.setattr(scales, "FORWARD", ("layer_norm_linear", "frozen"))
    monkeypatch.setattr(scales, "TRAINED", ("patch_attention",))
    monkeypatch.setattr(sys, "argv", [*base, "--most", "1000"])
    assert scales.main() == 0
    head, *lines = capsys.readouterr().out.splitlines()
    assert head.split()[1:] == [f"{scale:g}" for scale in scales.SCALES] and float(head.split()[-1]) == 1e4
    assert [one.split(",")[0] for one in lines] == ["layer_norm_linear", "frozen", "patch_attention"]
    assert "trained" in lines[2] and all(len(one.split("float32")[1].split()) == 10 for one in lines)
    monkeypatch.setattr(sys, "argv", [*base, "--most", "0.5", "--only", "frozen"])
    assert scales.main() == 1
    assert [one.endswith("slow") for one in capsys.readouterr().out.splitlines()] == [False, True]


def test_every_kernel_once(monkeypatch, capsys):
    """It exits with 0 if all is right, and with 1 if a kernel is wrong or if every call is refused."""
    monkeypatch.setattr(every_kernel, "SIZES", {name: sizes[:1] for name, sizes in every_kernel.SIZES.items()})
    assert every_kernel.main(["reference"]) == 0
    dtypes = 3
    assert capsys.readouterr().out.count(": ok\n") == dtypes * len(every_kernel.SIZES)
    right = mvit_kernels.linear_residual

    def wrong(*arguments, **options):
        return right(*arguments, **options) * 1.1

    def refused(*arguments, **options):
        raise mvit_kernels.BackendError("linear_residual: not here")

    monkeypatch.setattr(mvit_kernels, "linear_residual", wrong)
    assert every_kernel.main(["reference"]) == 1
    out = capsys.readouterr().out
    assert out.count(": WRONG: ") == dtypes and out.count(": ok\n") == dtypes * (len(every_kernel.SIZES) - 1)
    assert every_kernel.main(["reference", "--only", "linear_residual", "--run"]) == 0
    out = capsys.readouterr().out
    assert out.count(": ran\n") == dtypes and out.endswith(f"{dtypes} calls\n")
    monkeypatch.setattr(mvit_kernels, "linear_residual", refused)
    assert every_kernel.main(["reference"]) == 0 and capsys.readouterr().out.count(": refused: ") == dtypes
    assert every_kernel.main(["reference", "--only", "linear_residual"]) == 1


def test_every_kernel_is_among_the_small_cases():
    assert every_kernel.SIZES.keys() == set(mvit_kernels.backends.operators("reference"))


def gpu_script(*arguments, **environment):
    environment = {"PYTHON": sys.executable, "PATH": os.environ["PATH"], "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run(
        [str(FOLDER / "gpu.sh"), *arguments],
        env={"HOME": os.environ.get("HOME", "/"), **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_the_script_for_gpus_without_one(tmp_path):
    """It says so, does what was asked, and tells what failed; the folder has the report, whatever the outcome."""
    broken = tmp_path / "python"
    broken.write_text('#!/bin/sh\ncase "$*" in *build_native*) exit 7 ;; esac\nexec "$REAL" "$@"\n')
    broken.chmod(0o755)
    out = tmp_path / "out"
    done = gpu_script(str(out), "0.5", PYTHON=str(broken), REAL=sys.executable, STEPS="build", CUDA_VISIBLE_DEVICES="")
    report = (out / "report.txt").read_text()
    assert done.returncode == 1, done.stdout + done.stderr
    assert "no GPU is visible to torch: only the CPU part runs" in report and "reference     available on any" in report
    assert "build: FAILED with 7" in report and "done; bad: 1" in report and "correctness" not in report
    assert {file.name for file in out.iterdir()} == {"report.txt", "log.txt"}


def test_the_script_for_gpus_with_one(tmp_path):
    """Its order, with a Python that only says what it was asked for: correctness, speed, sanitizer; a suite in which
    the GPU was lost is resumed, and whatever fails shows in the report and in the exit code."""
    fake = tmp_path / "python"
    fake.write_text(
        f"""#!/bin/sh
case "$*" in
  *get_device_properties*) echo "a GPU" ;;
  *"--suite operators"*) [ -e {tmp_path}/lost ] || {{ touch {tmp_path}/lost; exit 2; }} ;;
  *pytest*) echo "12 passed in 1.00s" ;;
  *gates.every_kernel*) echo "cuda patch_attention: WRONG: 1 for 2"; exit 1 ;;
esac
"""
    )
    (tmp_path / "compute-sanitizer").write_text('#!/bin/sh\nshift 4\necho "ERROR SUMMARY: 0 errors"\n')
    for file in (fake, tmp_path / "compute-sanitizer"):
        file.chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    done = gpu_script(str(tmp_path / "out"), "9", PYTHON=str(fake), PATH=path, SUITES="operators blocks")
    report = (tmp_path / "out" / "report.txt").read_text()
    steps = [re.sub(r"^ *\d+ s  | (after|in) \d+ s$", "", one) for one in report.splitlines()]
    assert done.returncode == 1, done.stdout + done.stderr
    assert steps[1:] == [
        "a GPU",
        "build: ok",
        "correctness, every kernel once: FAILED with 1",
        "        cuda patch_attention: WRONG: 1 for 2",
        "correctness, cuda: ok",
        "        12 passed in 1.00s",
        "correctness, triton: ok",
        "        12 passed in 1.00s",
        "correctness, S and XXS: ok",
        "speed, operators: FAILED with 2",
        "speed, operators: ok",
        "speed, blocks: ok",
        "sanitizer, memcheck: ok",
        "        ERROR SUMMARY: 0 errors",
        "sanitizer, racecheck: ok",
        "        ERROR SUMMARY: 0 errors",
        "tests, the rest: ok",
        "        12 passed in 1.00s",
        "done; bad: 1",
    ]
