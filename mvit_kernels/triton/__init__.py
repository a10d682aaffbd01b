# SPDX-License-Identifier: Apache-2.0
"""The Triton backend's answers: what the kernels in this folder can serve, call by call (see `mvit_kernels.backends`).

They run on NVIDIA GPUs, and with ``TRITON_INTERPRET=1`` in the environment (read when this module is imported) in
Triton's interpreter on CPU tensors, slowly: so their tests run without a GPU. Triton itself is imported when
`unavailable` is first asked about a device that could be served.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os

import torch

from .._gpu import no_gpu
from ..backends import Call

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE_TYPE = "cpu" if INTERPRETED else "cuda"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# The widest row that a LayerNorm's kernels keep in registers, and the widest head: beyond, tiles spill by kilobytes.
MAX_WIDTH = 512
MAX_HEAD_DIM = 256
MAX_ROWS = 2**31 - 1


def unavailable(device_type: str) -> list[str]:
    """Why the kernels cannot serve this device at all."""
    if device_type != DEVICE_TYPE:
        where = "Triton's interpreter serves CPU tensors" if INTERPRETED else "it is for NVIDIA GPUs"
        return [f"{where}, and the tensors are on {device_type}"]
    why = ("" if INTERPRETED else no_gpu()) or _load()
    return [why] if why else []


@functools.cache
def _load() -> str:
    """Import the kernels, which registers them; "" or why they can not be used."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed (torch's CUDA builds bring it; `pip install triton` does)"
    try:
        for operator in SUPPORTS:
            importlib.import_module(f"{__name__}.{operator}")
    except (ImportError, AttributeError) as error:  # a Triton too old to have what the kernels use
        return f"Triton does not import: {error}"
    return ""


def _dtype(call: Call) -> list[str]:
    if call.dtype in DTYPES:
        return []
    return [f"{call.dtype} is not supported in Triton; float32, bfloat16 and float16 are"]


def _row_wise(call: Call, *tensors: str) -> list[str]:
    reasons = _dtype(call)
    if not call.fact("contiguous"):
        reasons.append(f"{' or '.join(tensors)} is not contiguous; call .contiguous() first")
    rows = 1
    for side in call.shape[:-1]:
        rows *= side
    if rows > MAX_ROWS:
        reasons.append(f"{rows} rows are more than {MAX_ROWS}")
    if call.shape[-1] == 0:
        reasons.append("rows have no elements")
    return reasons


def _norm_rows(call: Call) -> list[str]:
    reasons = _row_wise(call, "x")
    if call.shape[-1] > MAX_WIDTH:
        reasons.append(f"rows of {call.shape[-1]} are too wide to be normalised in registers; {MAX_WIDTH} go")
    return reasons


def _features(call: Call, name: str) -> list[str]:
    return [] if call.fact(name) else [f"{name} is 0"]


def _layer_norm_linear(call: Call) -> list[str]:
    return _norm_rows(call) + _features(call, "out_features")


def _linear_residual(call: Call) -> list[str]:
    return _row_wise(call, "x", "residual") + _features(call, "out_features")


def _layer_norm_mlp(call: Call) -> list[str]:
    return _norm_rows(call) + _features(call, "hidden_features")


def _patch_attention(call: Call) -> list[str]:
    reasons = _dtype(call)
    if not call.fact("dense_rows"):
        reasons.append("the channels of qkv are not adjacent in memory; call .contiguous() first")
    if call.fact("head_dim") > MAX_HEAD_DIM:
        reasons.append(f"heads of {call.fact('head_dim')} are too wide; {MAX_HEAD_DIM} go")
    return reasons


def _transformer_layer(call: Call) -> list[str]:
    reasons = _norm_rows(call) + _features(call, "hidden_features")
    if call.fact("head_dim") > MAX_HEAD_DIM:
        reasons.append(f"heads of {call.fact('head_dim')} are too wide; {MAX_HEAD_DIM} go")
    if call.fact("inner_dropout"):
        reasons.append("dropout on attention weights or after SiLU is live")
    return reasons


SUPPORTS = {
    "layer_norm": _norm_rows,
    "layer_norm_linear": _layer_norm_linear,
    "patch_attention": _patch_attention,
    "linear_residual": _linear_residual,
    "layer_norm_mlp": _layer_norm_mlp,
    "transformer_layer": _transformer_layer,
}
