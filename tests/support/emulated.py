# SPDX-License-Identifier: Apache-2.0
"""``MVIT_KERNELS_EMULATED=1``: the CUDA backend serves CPU tensors, and is a path of the operators' own tests.

Imported by conftest.py. What runs is csrc/cuda under emulation; `make test-emulated` runs whole suites on it.
"""

from __future__ import annotations

import torch

from mvit_kernels import backends
from mvit_kernels.backends import cuda, gpu
from mvit_kernels.backends.cuda import inverted_residual, transformer
from support.emulation import load_operators

load_operators()
LIBRARY = torch.library.Library("mvit_kernels", "FRAGMENT")  # as long as the process
for operator in (transformer, inverted_residual):  # whose raw operator is in Python
    name = operator.__name__.rpartition(".")[2]
    load_operators(name)
    LIBRARY.impl(f"{name}.cuda", operator.forward, "CPU")
cuda.BACKEND.device_type = "cpu"
cuda.BACKEND.unavailable = lambda device_type: [] if device_type == "cpu" else ["the emulation serves CPU tensors"]
gpu.limits = lambda: gpu.Limits(4, 99 << 10)  # of emulated_cuda/tensors.h
backends._choices.clear()
