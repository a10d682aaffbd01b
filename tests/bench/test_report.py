# SPDX-License-Identifier: Apache-2.0
"""benchmarks/report.py and its plots: what is written from committed results."""

import re

import pytest

from mvit_kernels.bench.results import append, read, row
from support import ROOT

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


@pytest.fixture
def gpu(device):
    """A GPU's results beside the CPU's: a clock of its own, a competitor that wins, one that is missing, a failure."""
    place = PLACE | {"device": "cuda", "device_name": "NVIDIA H200", "driver": "580.1", "cpu": "", "triton": "3.6.0"}
    usual = dict(batch=256, dtype="bfloat16") | place
    new = [line(c, ms, **usual) for c, ms in (("eager", 9.0), ("compile", 2.0), ("frozen", 3.0))]
    new += [line(c, ms, clock="graph", **usual) for c, ms in (("eager", 8.0), ("frozen", 2.0))]
    new += [line(c, ms, **(usual | {"batch": 1})) for c, ms in (("eager", 5.0), ("frozen", 4.0))]
    append(device / "nvidia-h200" / "models.csv", new)
    why = "not measured: RuntimeError: Triton Error [CUDA]: an illegal memory access; in both processes"
    steps = [training("eager", 50.0, **(usual | {"batch": 64})), training("compile", 30.0, **(usual | {"batch": 64}))]
    steps += [training("accelerated", None, **(usual | {"batch": 64, "note": why}))]
    append(device / "nvidia-h200" / "training.csv", steps)
    stage = dict(suite="operators", dtype="bfloat16", clock="graph", gflop=1.0, mb=1.0, gflop_per_s=1.0) | place
    times = {("linear_residual", "s/3", 64): dict(eager=0.05, cuda=0.0745, triton=0.03826)}
    times[("linear_residual", "s/5", 64)] = dict(eager=0.0084, cuda=0.0173, triton=0.0088)
    times[("transformer", "s/4", 256)] = dict(eager=1.87, cuda=1.078, cuda_mended=0.605, triton_by_operator=None)
    rows = [
        line(c, ms, subject, **(stage | dict(stage=where, batch=batch) | ({} if ms else {"note": why})))
        for (subject, where, batch), each in times.items()
        for c, ms in each.items()
    ]
    append(device / "nvidia-h200" / "operators.csv", rows)
    return device


def test_a_gpus_rows_come_first_and_hide_no_loss(script, gpu):
    """Of the GPU its throughput is in the sentence; what failed and which competitor is missing is said."""
    report = script("report")
    sentence, *lines = report.headline(gpu).splitlines()
    assert sentence == (
        "In bfloat16 at batch 256 on one NVIDIA H200, timm's MobileViT-S frozen is 3.00× as fast as eager PyTorch and "
        "0.67× as fast as torch.compile, the fastest of the others; in float32 at batch 1 on 2 threads of an AMD EPYC "
        "(Zen 5), frozen, 3.00× and 0.75× (OpenVINO)."
    )
    assert [one.split(" | ")[1].removesuffix(" |") for one in lines[-4:]] == [
        "not measured",
        "**frozen 4.00**, eager 5.00; torch.compile was not measured",
        "**torch.compile 2.00**, frozen 3.00, eager 9.00",
        "**torch.compile 30.0**, eager 50.0; accelerated **failed**: Triton Error [CUDA]: an illegal memory access",
    ]


def test_a_gpus_tables_tell_the_clock_and_each_backend(script, gpu):
    (gpu / "nvidia-h200" / "about.md").write_text("How it was measured.\n")
    detail = script("report").detail(gpu)
    assert "torch 2.13.0+cpu, Triton 3.6.0, driver 580.1; commit" in detail and "\n\nHow it was measured.\n\n" in detail
    assert "| S, batch 256, device's clock | 8.00 | **2.00 (4.00×)** |  |" in detail
    assert "| S, batch 64 | 50.0 | failed | **30.0 (1.67×)** |" in detail
    assert "| `linear_residual`, 3 | 50.0 | 74.5 (0.67×) | **38.3 (1.31×)** |  |  |" in detail
    assert "| `linear_residual`, 5 | **8.40** | 17.3 (0.49×) | 8.80 (0.95×) |  |  |" in detail
    assert "| stage, batch | eager | one launch | one launch, library mended | Triton by operator |" in detail
    assert "| 4, 256 | 1870 | 1078 (1.73×) | **605 (3.09×)** | failed |" in detail
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


def test_the_headline_plot_says_what_failed(script, gpu, tmp_path, monkeypatch):
    plots, plotting, tables = script("plots"), script("plotting"), script("tables")
    drawn = []
    monkeypatch.setattr(plotting, "save", lambda figure, path: drawn.append(figure))
    plots.headline([tables.first_screen(gpu / "nvidia-h200")], tmp_path / "x.png")
    assert [text.get_text() for text in drawn[0].axes[0].texts if "failed" in text.get_text()] == ["accelerated failed"]
