# SPDX-License-Identifier: Apache-2.0
"""``mvit-kernels info``: versions, machine, each backend (available, or the reasons why not), and what to do."""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
from typing import Any

from . import add_command, print_json

_PACKAGES = ("torch", "triton", "numpy", "timm", "transformers", "kornia")
_INSTRUCTION_SETS = "avx avx2 fma f16c avx512f avx512bw avx512dq avx512vl avx512_bf16 avx512_vnni avx512_fp16 amx_bf16"
_INSTRUCTION_SETS += " asimd sve bf16"  # Arm's
_DEVICE_TYPES = {"reference": "cpu", "cpu": "cpu", "triton": "cuda", "cuda": "cuda"}  # each backend's device type


def add_arguments(subparsers: argparse._SubParsersAction) -> None:
    parser = add_command(
        subparsers,
        "info",
        run,
        summary="versions, device, each backend: available, or the reasons why not; and what to do",
        description="Versions, machine, each backend: available, or the reasons why not; and what to do for kernels.",
        examples="  mvit-kernels info\n  mvit-kernels info --json > info.json",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    info = gather()
    if args.json:
        print_json(info)
    else:
        print(_text(info))
    return 0


def gather() -> dict[str, Any]:
    """Everything that ``info`` prints, as plain values: versions, machine, gpus, backends, libraries, advice."""
    from ..backends import library
    from ..backends.building import build_info

    backends, gpus = _backends(), _gpus()
    return {
        "versions": _versions(),
        "machine": _machine(),
        "gpus": gpus,
        "backends": backends,
        "libraries": build_info(library.LIBRARY_DIRECTORY),
        "advice": _advice(backends, bool(gpus)),
    }


def _versions() -> dict[str, str | None]:
    import torch

    from .. import __version__

    versions: dict[str, str | None] = {"mvit_kernels": __version__, "python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    return {**versions, "torch": torch.__version__}  # with the build, which the wheel's metadata may lack


def _machine() -> dict[str, Any]:
    import torch

    from ..backends.cpu import instruction_set
    from ..bench.origin import cpu_name, cpuinfo

    cpu = cpuinfo()
    flags = cpu.get("flags", cpu.get("Features", "")).split()
    affinity = getattr(os, "sched_getaffinity", None)
    return {
        "os": platform.platform(),
        "cpu": cpu_name(),
        "cores": len(affinity(0)) if affinity else os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "instruction_sets": [name for name in _INSTRUCTION_SETS.split() if name in flags],
        "torch_cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "kernels_instruction_set": instruction_set(),
    }


def _gpus() -> list[dict[str, Any]]:
    import torch

    from ..bench.origin import driver as driver_version

    driver = driver_version() if torch.cuda.is_available() else None
    gpus = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        gpus.append(
            {
                "name": properties.name,
                "compute_capability": f"{properties.major}.{properties.minor}",
                "memory_gib": round(properties.total_memory / 2**30, 1),
                "driver": driver,
                "cuda_of_torch": torch.version.cuda,
            }
        )
    return gpus


def _backends() -> dict[str, dict[str, Any]]:
    from .. import backends
    from ..backends.library import BACKENDS

    return {
        backend: {
            "device_type": _DEVICE_TYPES[backend] if backend != "reference" else "any",
            "reasons_against": _reasons_against(backend),
            "operators": list(backends.operators(backend)),
        }
        for backend in BACKENDS
    }


def _reasons_against(backend: str) -> list[str]:
    from .. import backends

    try:
        return list(backends.unavailable(backend, _DEVICE_TYPES[backend]))
    except ValueError as error:  # an environment variable of ours has a wrong value; elsewhere that ends the program
        return [str(error)]


def _advice(backends: dict[str, dict[str, Any]], has_gpu: bool) -> list[str]:
    """What to do for kernels on the devices that this machine has, a sentence each; empty if they serve all of them.

    On a GPU one of two backends is enough.
    """
    wanted = [("the CPU", ("cpu",)), *([("a GPU", ("cuda", "triton"))] if has_gpu else [])]
    return [
        f"no kernel serves {device}: {reason}"
        for device, candidates in wanted
        if all(backends[name]["reasons_against"] for name in candidates)
        for name in candidates
        for reason in backends[name]["reasons_against"]
    ]


def _text(info: dict[str, Any]) -> str:
    machine = info["machine"]
    kernels = machine["kernels_instruction_set"]
    lines = ["versions"]
    lines += [_line(name, version or "not installed") for name, version in info["versions"].items()]
    lines += [
        "machine",
        _line("os", machine["os"]),
        _line("cpu", f"{machine['cpu']}, {machine['cores']} cores, {machine['torch_threads']} threads in torch"),
        _line("", " ".join(machine["instruction_sets"])),
        _line("", f"torch uses {machine['torch_cpu_capability']}, our C++ kernels {kernels or 'none'}"),
    ]
    for gpu in info["gpus"]:
        about = f"compute capability {gpu['compute_capability']}, {gpu['memory_gib']} GiB, driver {gpu['driver']}"
        lines.append(_line("gpu", f"{gpu['name']}, {about}, torch for CUDA {gpu['cuda_of_torch']}"))
    if not info["gpus"]:
        lines.append(_line("gpu", "none visible to torch"))
    lines.append("backends")
    for name, backend in info["backends"].items():
        if backend["reasons_against"]:
            lines.append(_line(name, f"not available: {'; '.join(backend['reasons_against'])}"))
        else:
            lines.append(_line(name, f"available on {backend['device_type']}: {', '.join(backend['operators'])}"))
    lines.append("compiled libraries")
    for name, library in info["libraries"].items():
        lines.append(_line(name, _about(library)))
    lines.append("what to do")
    lines += [f"  {line}" for line in info["advice"]] or [
        "  nothing, kernels serve this machine; mvit-kernels verify and mvit-kernels bench show it"
    ]
    return "\n".join(lines)


def _about(library: dict[str, Any]) -> str:
    if not library.get("built"):
        return f"not built: {library.get('reason', 'no reason was noted')}"
    targets = ", ".join(library.get("architectures") or library.get("isa") or ["baseline only"])
    compiler = library.get("compiler", "an unknown compiler")
    about = f"built {library.get('time', '')} by {compiler} for {targets}"
    left_out = library.get("isa_left_out")
    about += f", sources of {library['version']} {library['commit']}".rstrip() if library.get("version") else ""
    return about + (f"; the compiler has no {', '.join(left_out)}" if left_out else "")


def _line(name: str, value: str) -> str:
    return f"  {name:<13} {value}"
