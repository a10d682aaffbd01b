# SPDX-License-Identifier: Apache-2.0
"""Where and when a result was measured: the columns of origin in every row of results.

Example:
    >>> environment()["cpu"], folder_name(environment())
    ('family 26 model 2: Zen 5', 'amd-epyc-zen5')

The processor's name in a virtual machine ("AMD EPYC") does not show its generation, so family and model are recorded
too.
"""

from __future__ import annotations

import datetime
import functools
import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
from pathlib import Path

import torch

from .. import __version__
from .._utils.freed_memory import allocator
from ..backends.cpu import instruction_set

# Libraries whose versions affect what a candidate does.
LIBRARIES = ("timm", "transformers", "kornia", "onnxruntime", "openvino")


def environment(device: str | torch.device = "cpu") -> dict[str, str]:
    """Device, processor, instruction set, threads, driver, versions, commit and date, all as text.

    Example:
        >>> environment()["device_name"]
        'AMD EPYC 7763 64-Core Processor'

    ``cpu`` and ``isa`` describe the host, also on a GPU: its speed determines the launch overhead. ``isa`` is the
    instruction set of our C++ kernels, or PyTorch's own if they are not built. ``libraries`` ends with the allocator
    where it is not malloc as usual: it decides how many page faults a call costs.

    Args:
        device: where the candidates run: "cpu" or "cuda".

    Returns:
        The columns `mvit_kernels.bench.results.ORIGIN`; the date is UTC. What is unknown is "".
    """
    device = torch.device(device)
    on_gpu = device.type == "cuda"
    return {
        "device": device.type,
        "device_name": torch.cuda.get_device_name(device) if on_gpu else cpu_name(),
        "cpu": _processor(),
        "isa": instruction_set() or f"torch {torch.backends.cpu.get_cpu_capability()}",
        "threads": str(torch.get_num_threads()),
        "driver": (driver() or "") if on_gpu else "",
        "torch": torch.__version__,
        "cuda": (torch.version.cuda or "") if on_gpu else "",
        "triton": _version("triton"),
        "libraries": "; ".join(filter(None, [*_versions(), allocator()])),
        "python": platform.python_version(),
        "mvit_kernels": __version__,
        "commit": _commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
    }


def folder_name(origin: dict[str, str]) -> str:
    """The name of the folder for results of this `environment`: one per kind of device.

    Example:
        >>> folder_name({"device": "cuda", "device_name": "NVIDIA H200", "cpu": ""})
        'nvidia-h200'

    What every processor's name has ("Processor", "CPU @ 2.90GHz") is left out, its generation is added:
    ``amd-epyc-zen5``, ``intel-xeon-emerald-rapids``.
    """
    name = re.sub(r"\((R|TM)\)|\b(CPU|Processor)\b|@.*", " ", origin["device_name"])
    if origin["device"] == "cpu" and origin["cpu"]:
        numbers, _, generation = origin["cpu"].partition(": ")
        name += " " + (re.sub(r" (?=\d)", "", generation) or numbers)  # "Zen 5" becomes one word
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


# ------------------------------------------------------------------------------------------------------ the processor


@functools.cache
def cpuinfo() -> dict[str, str]:
    """The first processor's entry in /proc/cpuinfo; empty if there is no such file."""
    try:
        first = Path("/proc/cpuinfo").read_text(encoding="utf-8").split("\n\n")[0]
    except OSError:
        return {}
    pairs = (line.partition(":") for line in first.splitlines())
    return {key.strip(): value.strip() for key, _, value in pairs}


def cpu_name() -> str:
    """The processor's model name."""
    return cpuinfo().get("model name") or platform.processor() or platform.machine()


def _processor() -> str:
    """Family and model, with the generation if it is known; "" if the system does not provide them."""
    known = cpuinfo()
    if "cpu family" not in known:
        return ""
    family, model = int(known["cpu family"]), int(known["model"])
    generation_of = {"AuthenticAMD": amd_generation, "GenuineIntel": intel_generation}.get(known.get("vendor_id"))
    generation = generation_of(family, model) if generation_of else ""
    return f"family {family} model {model}" + (f": {generation}" if generation else "")


def amd_generation(family: int, model: int) -> str:
    """ "Zen 3", "Zen 4" or "Zen 5" by the model ranges in Linux (arch/x86/kernel/cpu/amd.c); otherwise ""."""
    if family == 25:
        return "Zen 4" if 0x10 <= model <= 0x1F or 0x60 <= model <= 0x7F or 0xA0 <= model <= 0xAF else "Zen 3"
    if family == 26 and (model <= 0x2F or 0x40 <= model <= 0x4F or 0x60 <= model <= 0x7F):
        return "Zen 5"
    return ""


def intel_generation(family: int, model: int) -> str:
    """The code name of a Xeon since Ice Lake, by the model numbers in Linux (arch/x86/include/asm/intel-family.h);
    otherwise ""."""
    names = {0x6A: "Ice Lake", 0x6C: "Ice Lake", 0x8F: "Sapphire Rapids", 0xCF: "Emerald Rapids"}
    names |= {0xAD: "Granite Rapids", 0xAE: "Granite Rapids"}
    return names.get(model, "") if family == 6 else ""


# ------------------------------------------------------------------------------------------------------- the software


@functools.cache
def driver() -> str | None:
    """The version of the NVIDIA driver; None if nvidia-smi is missing or does not answer."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return None
    command = [tool, "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return None
    return result.stdout.partition("\n")[0].strip() or None


def _versions() -> list[str]:
    return [f"{name} {_version(name)}" for name in LIBRARIES if _version(name)]


@functools.cache
def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return ""


@functools.cache
def _commit() -> str:
    """The commit of this checkout, followed by "+" if files differ from it. Outside of a checkout, the value of the
    environment variable MVIT_KERNELS_COMMIT, since a copy of the files alone does not know its commit."""
    root = Path(__file__).resolve().parent.parent.parent
    if not (root / ".git").exists():  # installed, perhaps inside another project's checkout
        return os.environ.get("MVIT_KERNELS_COMMIT", "")
    try:
        command = ["git", "-C", str(root), "describe", "--always", "--abbrev=12", "--exclude=*", "--dirty=+"]
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return os.environ.get("MVIT_KERNELS_COMMIT", "")
