# SPDX-License-Identifier: Apache-2.0
"""What the machine has and what serves it, as a line of JSON: ``{"what": "machine", "device": "cuda", …}``."""

from __future__ import annotations

import json
import platform
import sys

import torch

from mvit_kernels import backends
from mvit_kernels.backends import library
from mvit_kernels.bench.origin import driver


def main() -> int:
    has_gpu = torch.cuda.is_available()
    device = "cuda" if has_gpu else "cpu"
    facts = {"what": "machine", "device": device, "python": platform.python_version(), "torch": torch.__version__}
    if has_gpu:
        found = torch.cuda.get_device_properties(0)
        facts |= {"name": found.name, "capability": f"{found.major}.{found.minor}", "driver": driver() or ""}
        facts |= {"multiprocessors": found.multi_processor_count, "l2_mib": found.L2_cache_size >> 20}
        facts |= {"gib": round(found.total_memory / 2**30), "cuda": torch.version.cuda}
    try:
        import triton

        facts |= {"triton": triton.__version__}
    except ImportError as error:
        facts |= {"triton": "", "no_triton": str(error)}
    possible = [name for name in backends.PREFERENCE[device] if name != "reference"]
    why = {name: list(backends.unavailable(name, device)) for name in possible}
    facts |= {"backends": {name: sorted(backends.operators(name)) for name in possible if not why[name]}, "why": why}
    # Whether the library loads, apart from whether its backend serves this machine.
    facts |= {"libraries": {name: library.load(name) for name in ("cuda", "cpu")}}
    facts |= {"library_folder": str(library.LIBRARY_DIRECTORY)}
    print(json.dumps(facts), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
