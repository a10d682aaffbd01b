# SPDX-License-Identifier: Apache-2.0
"""The definition of every operator in plain PyTorch: the oracle of all tests, and the fallback.

Example:
    >>> out = reference.patch_attention(qkv, num_heads=4, patch_size=(2, 2), scale=36**-0.5)

`plain` has the operators as differentiable functions, `raw` the raw operators with the formulas that the kernels use.
"""

from __future__ import annotations

import torch

from ..._utils.plain import DTYPES
from ..contract import Backend, Call, StackPlan
from ..library import SCHEMAS
from .plain import (
    batch_norm_activation,
    constants,
    inverted_residual,
    is_one_column,
    layer_norm,
    layer_norm_linear,
    layer_norm_mlp,
    linear_residual,
    patch_attention,
    patch_attention_written_out,
    to_map,
    to_sequences,
    transformer,
    transformer_layer,
)
from .raw import transformer_layer_from_seed

__all__ = [
    "BACKEND",
    "ReferenceBackend",
    "batch_norm_activation",
    "constants",
    "inverted_residual",
    "is_one_column",
    "layer_norm",
    "layer_norm_linear",
    "layer_norm_mlp",
    "linear_residual",
    "patch_attention",
    "patch_attention_written_out",
    "to_map",
    "to_sequences",
    "transformer",
    "transformer_layer",
    "transformer_layer_from_seed",
]


class ReferenceBackend(Backend):
    """PyTorch itself: it serves every call, on every device."""

    name = "reference"
    device_type = "cpu"  # and any other
    dtypes = DTYPES
    supports = {name: lambda call: [] for name in SCHEMAS if not name.endswith("_backward")}

    def unavailable(self, device_type: str) -> list[str]:
        return []

    def variant(self, dtype: torch.dtype) -> str:
        return "plain PyTorch"

    def reasons_against(self, call: Call) -> list[str]:
        return []

    def plan_stack(self, stack: Call, attention: Call, dropout: bool, alone: bool) -> StackPlan:
        # No strides describe a patch-position sequence to PyTorch's attention: every layer would need a gather.
        return StackPlan.SEQUENCES


BACKEND = ReferenceBackend()
