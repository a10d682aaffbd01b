# SPDX-License-Identifier: Apache-2.0
"""Which calls the kernels in this folder can serve: for each operator, a function from a call to the reasons against
it."""

from __future__ import annotations

from ..contract import Call, Predicate
from .target import DTYPES, MAX_CHANNELS, MAX_HEAD_DIM, MAX_PIXELS, MAX_ROWS, MAX_WIDTH


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
        reasons.append(f"{rows} rows; at most {MAX_ROWS} are supported")
    if call.shape[-1] == 0:
        reasons.append("the width of x is 0; at least 1 is wanted")
    return reasons


def _norm_rows(call: Call) -> list[str]:
    reasons = _row_wise(call, "x")
    if call.shape[-1] > MAX_WIDTH:
        reasons.append(
            f"rows of {call.shape[-1]} are too wide to be normalised in registers; widths up to {MAX_WIDTH} are "
            "supported"
        )
    return reasons


def _features(call: Call, name: str) -> list[str]:
    return [] if call.fact(name) else [f"{name} is 0; at least 1 is wanted"]


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
        reasons.append(f"heads of {call.fact('head_dim')} are too wide; up to {MAX_HEAD_DIM} are supported")
    return reasons


def _batch_norm_activation(call: Call) -> list[str]:
    reasons = _dtype(call)
    if call.fact("layout") != "channels_last":
        reasons.append(
            "x is not channels-last; call .to(memory_format=torch.channels_last) first, on the model as well"
        )
    images, channels, height, width = call.shape
    if images * height * width > MAX_PIXELS:
        reasons.append(f"{images * height * width} pixels; at most {MAX_PIXELS} are supported")
    if channels > MAX_CHANNELS:
        reasons.append(f"{channels} channels; at most {MAX_CHANNELS} are supported")
    return reasons


def _transformer_layer(call: Call) -> list[str]:
    reasons = _norm_rows(call) + _features(call, "hidden_features")
    if call.fact("head_dim") > MAX_HEAD_DIM:
        reasons.append(f"heads of {call.fact('head_dim')} are too wide; up to {MAX_HEAD_DIM} are supported")
    if call.fact("inner_dropout"):
        reasons.append("dropout on attention weights or after SiLU is active, and is not fused")
    return reasons


def _inverted_residual(call: Call) -> list[str]:
    reasons = _dtype(call) + _features(call, "hidden_features") + _features(call, "out_features")
    if not call.fact("dense_rows"):
        reasons.append("the channels of x are not adjacent in memory; call .contiguous() first")
    if call.shape[0] * call.shape[1] * call.shape[2] > MAX_ROWS:
        reasons.append(f"x has more than {MAX_ROWS} pixels; split the batch")
    if call.shape[-1] == 0:
        reasons.append("x has no channels; at least 1 is wanted")
    return reasons


SUPPORTS: dict[str, Predicate] = {
    "batch_norm_activation": _batch_norm_activation,
    "layer_norm": _norm_rows,
    "layer_norm_linear": _layer_norm_linear,
    "patch_attention": _patch_attention,
    "linear_residual": _linear_residual,
    "layer_norm_mlp": _layer_norm_mlp,
    "transformer_layer": _transformer_layer,
    "inverted_residual": _inverted_residual,
}
