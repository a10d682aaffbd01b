# SPDX-License-Identifier: Apache-2.0
"""``MVIT_KERNELS_EMULATED=1``: the CUDA backend serves CPU tensors, and is a path of the operators' own tests.

Imported by conftest.py. What runs is csrc/cuda under emulation; `make test-emulated` runs whole suites on it.
"""

from __future__ import annotations

from mvit_kernels import backends
from mvit_kernels.backends import cuda, gpu
from support.emulation import ROWS, load_operators

load_operators()
cuda.BACKEND.device_type = "cpu"
cuda.BACKEND.unavailable = lambda device_type: [] if device_type == "cpu" else ["the emulation serves CPU tensors"]
gpu.limits = lambda: gpu.Limits(4, 99 << 10)  # of emulated_cuda/tensors.h
cuda.BACKEND.supports = {operator: cuda.BACKEND.supports[operator] for operator in ("patch_attention", *ROWS)}
backends._choices.clear()
