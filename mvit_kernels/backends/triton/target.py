# SPDX-License-Identifier: Apache-2.0
"""Where the kernels run, and the limits of their tiles.

With ``TRITON_INTERPRET=1`` in the environment (read when this module is imported) they run in Triton's interpreter, on
CPU tensors and slowly.
"""

from __future__ import annotations

import os

import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE_TYPE = "cpu" if INTERPRETED else "cuda"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# The widest row that LayerNorm kernels keep in registers, and the widest head: beyond these, tiles spill by kilobytes.
MAX_WIDTH = 512
MAX_HEAD_DIM = 256
MAX_ROWS = 2**31 - 1
# Of batch norm: loops over pixels step beyond the last one, and sums of parts are addressed by 32 bits.
MAX_PIXELS, MAX_CHANNELS = 2**30, 2**19
