# SPDX-License-Identifier: Apache-2.0
"""The C++ backend: which calls ``csrc/cpu`` can serve (see `mvit_kernels.backends.contract`)."""

from __future__ import annotations

import ctypes
import functools
from typing import Any

import torch

from ..._utils.compiling import assume_constant_result
from ..contract import Backend, Call
from ..library import load, loaded_paths, raw
from . import composed

# float16 is served by the float32 arithmetic and rounded at the end of each operator (csrc/cpu/float16.h).
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
INFERENCE_DTYPES = DTYPES[:3]  # of the operators without a backward


def instruction_set() -> str:
    """The instruction set in use, one of those listed in csrc/cpu/CMakeLists.txt: "avx512bf16", …, "portable".

    It is the best that the processor supports, or the one that the environment variable ``MVIT_KERNELS_CPU_ISA`` names;
    "" where that one is unknown or unsupported (an error where the backend is used), or where there is no library.
    """
    return "" if load("cpu") else _ask("isa", ctypes.c_char_p).decode()


def plain_instruction_set() -> str:
    """`instruction_set`, or the best set below it without products of bfloat16 pairs: it computes all but bfloat16."""
    return "" if load("cpu") else _ask("plain_isa", ctypes.c_char_p).decode()


def vector_lanes() -> int:
    """float32 elements of a vector of that instruction set, the unit in which csrc/cpu packs; 0 where there is none."""
    return 0 if load("cpu") else _ask("vector_bytes") // 4


def bf16_products() -> int:
    """How bfloat16 pairs are multiplied here, as ``Bf16Products`` in csrc/cpu/isa.h: 0 not at all, 1 in vectors, 2 on
    matrix tiles."""
    return 0 if load("cpu") else _ask("bf16_products")


def multiplies_bf16_pairs() -> bool:
    """Whether bfloat16 operands are multiplied as bfloat16 pairs here; elsewhere they are converted to float32."""
    return bf16_products() > 0


def multiplies_on_tiles() -> bool:
    """Whether bfloat16 pairs are multiplied on matrix tiles (AMX); maps and weights then have layouts of their own."""
    return bf16_products() == 2


@functools.cache
def _instruction_set_beside_amx() -> str:
    # Absent from a torch that has no products with AMX either.
    has_amx = getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    return instruction_set() if has_amx() else ""


@assume_constant_result
def instruction_set_beside_amx() -> str:
    """`instruction_set` where the processor has AMX, for PyTorch's products to use, else "": see `composed`."""
    return _instruction_set_beside_amx()


@functools.cache
def _wrong_instruction_set() -> str:
    """What the loaded library says against the value of ``MVIT_KERNELS_CPU_ISA``; "" if it has nothing against it."""
    if instruction_set():
        return ""
    row = torch.ones(1, device="cpu")
    try:
        raw("layer_norm", "cpu")(row[None], row, row, 1e-5)
    except RuntimeError as error:
        return str(error).partition("\n")[0]
    return ""


def _ask(what: str, kind: type = ctypes.c_int) -> Any:
    """A fact that csrc/cpu/isa.cpp exports about the instruction set in use."""
    function = getattr(ctypes.CDLL(str(loaded_paths["cpu"])), f"mvit_kernels_cpu_{what}")
    function.restype = kind
    return function()


def _dtype(call: Call) -> list[str]:
    if call.dtype in DTYPES:
        return []
    return [f"{call.dtype} is not supported on the CPU; float32, bfloat16, float16 and float64 are"]


def _patch_attention(call: Call) -> list[str]:
    reasons = _dtype(call)
    if not call.fact("dense_rows"):
        reasons.append("the channels of qkv are not adjacent in memory; call .contiguous() first")
    return reasons


def _batch_norm_activation(call: Call) -> list[str]:
    reasons = _dtype(call)
    if call.fact("layout") == "strided":
        reasons.append("x is neither channels-last nor contiguous; call .contiguous() first")
    return reasons


def _inference_dtype(call: Call) -> list[str]:
    if call.dtype in INFERENCE_DTYPES:
        return []
    return [f"{call.dtype} is not supported; float32, bfloat16 and float16 are"]


def _inverted_residual(call: Call) -> list[str]:
    reasons = _inference_dtype(call)
    if not call.fact("dense_rows"):
        reasons.append("the channels of x are not adjacent in memory; call .contiguous() first")
    return reasons


def _transformer(call: Call) -> list[str]:
    reasons = _inference_dtype(call)
    if not call.fact("same_widths"):
        reasons.append("its layers have different widths")
    return reasons


class CpuBackend(Backend):
    """C++ kernels for the CPU; `instruction_set` says which variant runs."""

    name = "cpu"
    device_type = "cpu"
    dtypes = DTYPES
    # The row-wise operators take rows with any strides. Rows that two strides cannot address, or whose channels are not
    # adjacent, are copied first, as PyTorch's own layer_norm and linear copy them.
    supports = {
        "batch_norm_activation": _batch_norm_activation,
        "layer_norm_linear": _dtype,
        "patch_attention": _patch_attention,
        "linear_residual": _dtype,
        "layer_norm_mlp": _dtype,
        "inverted_residual": _inverted_residual,
        "transformer": _transformer,
    }

    def unavailable(self, device_type: str) -> list[str]:
        if device_type != self.device_type:
            return [f"it is for the CPU, and the tensors are on {device_type}"]
        why = load("cpu")
        if not why and _wrong_instruction_set():
            raise ValueError(_wrong_instruction_set())
        return [why] if why else []

    def variant(self, dtype: torch.dtype) -> str:
        if dtype == torch.bfloat16:
            return instruction_set()
        return plain_instruction_set() + (", float16 in float32 arithmetic" if dtype == torch.float16 else "")

    def run(self, name: str, *arguments: Any) -> Any:
        return composed.run(name, arguments, instruction_set_beside_amx())


BACKEND = CpuBackend()
