# SPDX-License-Identifier: Apache-2.0
"""``MVIT_KERNELS_EMULATED=1``: the CUDA backend serves CPU tensors, and is a path of the operators' own tests.

Imported by conftest.py. What runs is csrc/cuda under emulation; `make test-emulated` runs whole suites on it.
"""

from __future__ import annotations

from mvit_kernels import backends
from mvit_kernels.backends import cuda, gpu
from mvit_kernels.backends.cuda import inverted_residual
from mvit_kernels.backends.library import LIBRARY
from support.emulation import ROWS, load_operators

OPERATORS = ("patch_attention", *ROWS, "inverted_residual")

load_operators()
load_operators("inverted_residual")
LIBRARY.impl("inverted_residual.cuda", inverted_residual.forward, "CPU")
cuda.BACKEND.device_type = "cpu"
cuda.BACKEND.unavailable = lambda device_type: [] if device_type == "cpu" else ["the emulation serves CPU tensors"]
gpu.limits = lambda: gpu.Limits(4, 99 << 10)  # of emulated_cuda/tensors.h
cuda.BACKEND.supports = {operator: cuda.BACKEND.supports[operator] for operator in OPERATORS}
backends._choices.clear()
