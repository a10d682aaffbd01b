# SPDX-License-Identifier: Apache-2.0
"""Triton's compiled kernels, executed on the CPU: right values, planted faults, and how many instructions they take.

`make test-compiled` runs every kernel, forward and backward (gates/compiled.py); here are three that are compiled in a
second. How PTX is executed, test_ptx.py tests by itself.
"""

import re
from pathlib import Path

import pytest
import torch

from gates import executed, table
from mvit_kernels.backends import triton as backend
from support.cases import call, convert, make
from support.cuda_sources import cuda_sources
from support.emulation import EmulationFault
from support.ptx.program import written
from support.tolerance import assert_close_as_pytorch

triton = pytest.importorskip("triton", reason="Triton is not installed")
if backend.target.INTERPRETED:
    pytest.skip("TRITON_INTERPRET=1: kernels are not compiled in this process", allow_module_level=True)


@pytest.fixture(scope="module")
def launches():
    product, norm, attention = executed.small()
    return {"product": product, "norm": norm, "attention": attention}


# --------------------------------------------------------------------------------------------------------------- values


@pytest.mark.parametrize(
    "operator, sizes",
    [
        ("linear_residual", dict(shape=(70, 24), n=40)),
        ("layer_norm", dict(shape=(70, 24))),
        ("patch_attention", dict(shape=(1, 10, 26), heads=1, head_dim=20, patch=(2, 2))),
    ],
)
def test_values(monkeypatch, operator, sizes):
    """Forward, by the tolerance rule: each launch is executed where it would be launched."""
    import importlib

    from mvit_kernels.backends.triton import _launch
    from support.ptx import serve_cpu_tensors

    module = importlib.import_module(f"mvit_kernels.backends.triton.{operator}")
    monkeypatch.setattr(_launch, "_watcher", serve_cpu_tensors.Launcher())
    monkeypatch.setattr(_launch, "_target", executed.ARCH)
    tensors, settings = make(operator, sizes)
    tensors = convert(tensors, torch.bfloat16)
    given = [value for value in settings.values() if value is not None]
    if operator == "patch_attention":
        given = [sizes["heads"], sizes["patch"], sizes["head_dim"] ** -0.5]
    ours = module.forward(*tensors.values(), *given)
    ours = ours[0] if isinstance(ours, tuple) else ours
    usual = call(operator, tensors, settings, "usual")
    truth = call(operator, convert(tensors, torch.float64), settings, "oracle")
    assert_close_as_pytorch(operator, ours, usual, truth)


# ------------------------------------------------------------------------------------------------------- planted faults


def without(pattern, *, which):
    """A change of PTX: one of the matches of `pattern` is removed, or all if `which` is None."""

    def change(ptx):
        found = list(re.finditer(pattern, ptx))
        assert found, f"{pattern!r} is nowhere"
        for match in reversed(found if which is None else [found[which]]):
            ptx = ptx[: match.start()] + ptx[match.end() :]
        return ptx

    return change


def shifted(pattern, by):
    """A change of PTX: the first address after `pattern` is `by` bytes further on."""

    def change(ptx):
        changed, count = re.subn(rf"({pattern}[^;]*?\[\s*%rd\d+) \+ 0 \]", rf"\1 + {by} ]", ptx, count=1)
        assert count == 1, f"{pattern!r} is nowhere"
        return changed

    return change


@pytest.mark.parametrize(
    "kernel, change, says",
    [
        ("product", without(r"bar\.sync\s+0;", which=None), "no barrier|nobody wrote it"),
        ("attention", without(r"bar\.sync\s+0;", which=-1), "no barrier|nobody wrote it|in flight"),
        ("attention", without(r"cp\.async\.wait_group\s+\d;", which=0), "in flight|ends with copies"),
        ("product", without(r"@%p\d+ (?=ld\.global)", which=-1), "a read of .* is outside of every buffer"),
        ("product", without(r"@%p\d+ (?=st\.global)", which=-1), "a write of .* is outside of every buffer"),
        ("norm", shifted(r"st\.global", 4096), "a write of .* is outside of every buffer"),
        ("norm", shifted(r"ld\.global", 2), "is not aligned"),
        ("norm", shifted(r"st\.global", -64), "outside of every buffer|no barrier after it was written by"),
    ],
    ids=["barriers", "a barrier", "a wait", "a read's bound", "a write's bound", "far", "alignment", "near"],
)
def test_a_planted_fault_is_reported(launches, kernel, change, says):
    with pytest.raises(EmulationFault, match=says) as raised:
        executed.executed(launches[kernel], change)
    # It names the thread, the instruction, and the line that this was compiled from.
    assert re.search(r"by thread \d+ \(kernel\.ptx:\d+\)|by warp \d+ \(kernel|thread \d+ ends", str(raised.value))
    if "ends with" not in str(raised.value):
        assert re.search(r"\n  \d+: \S+.* of \w+\.py:\d+:\d+", str(raised.value)), str(raised.value)


# --------------------------------------------------------------------------------------------------------------- counts


def test_the_kernels_write_what_they_return(launches):
    program, _ = executed.executed(launches["norm"])
    assert {launches["norm"].plan.kernel.arg_names[i] for i in written(program.kernel)} == {"out", "mean", "rstd"}


COMMITTED = table.committed(executed.TABLE)
MARGIN = 0.05  # of an instruction class, in either direction: another version of the compiler moves a few


def test_counts():
    """Those of the table, within the margin. After a change that is meant, `make executed` writes them anew."""
    committed = [row for row in COMMITTED if row["case"] == "small"]
    if committed[0]["compiler"] != f"Triton {triton.__version__.split('+')[0]}":
        pytest.skip(f"the table is of {committed[0]['compiler']}")
    rows = sorted(executed.rows("small"), key=lambda row: row["kernel"])
    assert [row["kernel"] for row in rows] == [row["kernel"] for row in committed]
    for row, expected in zip(rows, committed, strict=True):
        for name in ("programs", *executed.CLASSES):
            now, before = row[name], expected[name]
            assert abs(now - before) <= MARGIN * before, f"{row['kernel']}: {now} {name} instructions, not {before}"


def test_the_table_is_of_every_kernel():
    """Of Triton's and of CUDA's, the latter at each width of S."""
    assert {row["case"] for row in COMMITTED} == {*executed.TRITON, *executed.CUDA}
    for row in COMMITTED:
        assert 0 < sum(row[name] for name in executed.CLASSES[1:]) <= row["all"], row
    kernels = {row["kernel"] for row in COMMITTED}
    folder = Path(backend.__file__).parent
    defined = {
        f"{path.stem}.{name}"
        for path in folder.glob("*.py")
        for name in re.findall(r"^@triton\.jit\(.*\)\ndef (\w+)", path.read_text(), re.M)
    }
    defined |= {f"patch_attention.{name}" for name in ("_forward", "_backward_whole", "_backward_blocks")}
    defined |= {"patch_attention_short.forward", "patch_attention_short.backward"}
    assert len(defined) > 25 and defined <= kernels, defined - kernels
    sources = {source.path.stem for source in cuda_sources()}
    assert sources == {name.partition("<")[0] for name in kernels if "<" in name}
    for width in (144, 192, 240):
        assert any(name.startswith(f"transformer_kernel<BFloat16, {width},") for name in kernels), width
