# SPDX-License-Identifier: Apache-2.0
"""``mvit-kernels info``: what it tells of the machine, its backends and the build, and what it advises."""

import importlib.metadata
import json
import os
import subprocess
import sys

import pytest
import torch

from mvit_kernels import backends
from mvit_kernels.backends import library
from mvit_kernels.cli import info


def test_info(run):
    text = run("info").out
    data = json.loads(run("info", "--json").out)
    assert data["versions"]["torch"] == torch.__version__
    assert data["machine"]["torch_threads"] == torch.get_num_threads()
    assert list(data["backends"]) == list(library.BACKENDS)
    assert data["backends"]["reference"]["reasons_against"] == []
    assert "patch_attention" in data["backends"]["reference"]["operators"]
    lines = text.split("\nbackends\n")[1].splitlines()
    for name, backend in data["backends"].items():
        line = next(line for line in lines if line.startswith(f"  {name:<13} "))
        assert ("not available: " in line) == bool(backend["reasons_against"])
        assert all(reason in line for reason in backend["reasons_against"])
        if backend["reasons_against"] == []:
            assert all(operator in line for operator in backend["operators"])


def test_info_tells_what_is_missing(run, monkeypatch):
    version = importlib.metadata.version

    def without_kornia(name):
        if name == "kornia":
            raise importlib.metadata.PackageNotFoundError(name)
        return version(name)

    monkeypatch.setattr(importlib.metadata, "version", without_kornia)
    monkeypatch.setattr(backends, "unavailable", lambda name, device_type: [f"{name} wants a {device_type}", "rest"])
    text = run("info").out
    assert "  kornia        not installed\n" in text
    assert "  triton        not available: triton wants a cuda; rest\n" in text


def test_info_ends_with_what_to_do(run, monkeypatch):
    monkeypatch.setattr(backends, "unavailable", lambda name, device_type: [])
    assert run("info").out.splitlines()[-2:] == [
        "what to do",
        "  nothing, kernels serve this machine; mvit-kernels verify and mvit-kernels bench show it",
    ]
    monkeypatch.setattr(backends, "unavailable", lambda name, device_type: [f"run `make {name}`"])
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)  # then nothing is said about what only a GPU needs
    assert run("info").out.endswith("what to do\n  no kernel serves the CPU: run `make cpu`\n")
    assert json.loads(run("info", "--json").out)["advice"] == ["no kernel serves the CPU: run `make cpu`"]
    monkeypatch.setattr(info, "_gpus", lambda: [{}])
    assert info.gather()["advice"][1:] == [
        "no kernel serves a GPU: run `make cuda`",
        "no kernel serves a GPU: run `make triton`",
    ]
    served = {"cpu": [], "cuda": ["no"], "triton": [], "reference": []}
    monkeypatch.setattr(backends, "unavailable", lambda name, device_type: served[name])
    assert info.gather()["advice"] == []


def test_info_without_a_library_names_the_command(run, monkeypatch, tmp_path):
    """Nobody is told to run what runs."""
    monkeypatch.setattr(library, "LIBRARY_DIRECTORY", tmp_path)
    monkeypatch.setattr(library, "_loaded", {})
    (tmp_path / "build_info.json").write_text(
        json.dumps({"cpu": {"built": False, "reason": "no torch: `pip install`"}})
    )
    text = run("info").out
    assert "mvit-kernels info" not in text
    command = "python setup.py build_native --inplace`"
    assert "libmvit_kernels_cpu.so was not built (no torch); " in text and text.rstrip().endswith(command.split()[-1])
    assert "not built: no torch: `pip install`" in text


def test_info_about_a_wrong_instruction_set():
    environment = {**os.environ, "MVIT_KERNELS_CPU_ISA": "sse"}
    command = [sys.executable, "-m", "mvit_kernels", "info", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, env=environment)
    told = json.loads(done.stdout)
    (reason,) = told["backends"]["cpu"]["reasons_against"]
    assert "MVIT_KERNELS_CPU_ISA is 'sse'; choose one of " in reason and "avx2" in reason
    assert told["machine"]["kernels_instruction_set"] == ""
    assert told["advice"] == [f"no kernel serves the CPU: {reason}"]


@pytest.mark.parametrize(
    "build_info, line",
    [
        (
            {"cpu": {"built": True, "time": "2025", "compiler": "g++ 12", "isa": ["avx2"]}},
            "built 2025 by g++ 12 for avx2",
        ),
        (
            {"cpu": {"built": True, "isa": ["amx"], "version": "0.1.0", "commit": "0123abcd+"}},
            "for amx, sources of 0.1.0 0123abcd+",
        ),
        ({"cpu": {"built": True, "isa": [], "isa_left_out": ["avx2"]}}, "baseline only; the compiler has no avx2"),
        ({"cuda": {"built": True, "compiler": "nvcc 13", "architectures": ["sm_80"]}}, "by nvcc 13 for sm_80"),
        ({"cpu": {"built": False, "reason": "no compiler"}}, "not built: no compiler"),
        ("{half", "is damaged"),
        (None, "does not exist"),
    ],
)
def test_info_about_the_build(run, monkeypatch, tmp_path, build_info, line):
    if build_info is not None:
        text = build_info if isinstance(build_info, str) else json.dumps(build_info)
        (tmp_path / "build_info.json").write_text(text)
    monkeypatch.setattr(library, "LIBRARY_DIRECTORY", tmp_path)
    assert line in run("info").out.split("compiled libraries\n")[1].split("what to do\n")[0]
