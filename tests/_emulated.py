# SPDX-License-Identifier: Apache-2.0
"""``MVIT_KERNELS_EMULATED=1``: the CUDA backend serves CPU tensors, and is a path of the operators' own tests.

Imported by conftest.py. What runs is csrc/cuda under emulation; `make test-emulated` runs whole suites on it.
"""

from __future__ import annotations

from _emulation import ROWS, load_operators

from mvit_kernels import backends, cuda

load_operators()
cuda.DEVICE_TYPE = "cpu"
cuda.unavailable = lambda device_type: [] if device_type == "cpu" else ["the emulation serves CPU tensors"]
cuda.device = lambda: (4, 99 << 10)  # of tests/emulation/tensors.h
cuda.SUPPORTS = {operator: cuda.SUPPORTS[operator] for operator in ("patch_attention", *ROWS)}
backends._choices.clear()
