# SPDX-License-Identifier: Apache-2.0
"""Launches of the Triton kernels as an H200 would get them, and their machine code.

Example:
    >>> (launch, file), = triton_launches("layer_norm_mlp", batch=256, side=32, width=144)

Triton compiles for sm_90 as `gates.triton_gate` does, so with the assembler that the backend takes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import torch

from gates.addresses import parameters
from gates.triton_gate import compiled_for
from support import ROOT
from support.sass.launches import Launch

BUILT = ROOT / "build" / "timing"


def triton_launches(operator: str, batch: int, side: int, width: int) -> list[tuple[Launch, Path]]:
    """The launches of an operator in bfloat16 at MobileViT-S's sizes, each with the cubin that has its kernel.

    Raises:
        LookupError: no such operator.
    """
    from mvit_kernels.backends.triton._launch import watching

    if operator not in _OPERATORS:
        raise LookupError(f"no launch of {operator} is known; {', '.join(_OPERATORS)} are")

    def t(*shape: int, of: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.empty(shape, device="meta", dtype=of)

    with watching(90) as launches:
        _OPERATORS[operator](t, t(batch, side, side, width), width)
    return [_described(launch) for launch in launches]


def _described(launch) -> tuple[Launch, Path]:
    compiled = compiled_for(launch, 90)
    name = launch.plan.kernel.fn.__name__
    file = BUILT / f"{name}-{hashlib.sha256(compiled.asm['cubin']).hexdigest()[:16]}.cubin"
    BUILT.mkdir(parents=True, exist_ok=True)
    file.write_bytes(compiled.asm["cubin"])
    given, _ = parameters(launch)
    grid = (*launch.grid, 1, 1)[:3]
    return Launch(name, grid, 32 * launch.plan.num_warps, compiled.metadata.shared, given), file


def _norm(t: Callable, d: int) -> tuple:
    return t(d, of=torch.float32), t(d, of=torch.float32)


def _layer_norm_linear(t: Callable, x: torch.Tensor, d: int) -> None:
    from mvit_kernels.backends.triton import layer_norm_linear

    layer_norm_linear.forward(x, *_norm(t, d), t(3 * d, d), t(3 * d), 1e-5, "")


def _linear_residual(t: Callable, x: torch.Tensor, d: int) -> None:
    from mvit_kernels.backends.triton import linear_residual

    linear_residual.forward(x, t(d, d), t(d), x)


def _layer_norm_mlp(t: Callable, x: torch.Tensor, d: int) -> None:
    from mvit_kernels.backends.triton import layer_norm_mlp

    layer_norm_mlp.forward(x, *_norm(t, d), t(2 * d, d), t(2 * d), t(d, 2 * d), t(d), 1e-5)


def _patch_attention(t: Callable, x: torch.Tensor, d: int) -> None:
    from mvit_kernels.backends.triton import patch_attention

    patch_attention.forward(t(*x.shape[:3], 3 * d), 4, (2, 2), (d // 4) ** -0.5)


_OPERATORS: dict[str, Callable[..., None]] = {
    "layer_norm_linear": _layer_norm_linear,
    "linear_residual": _linear_residual,
    "layer_norm_mlp": _layer_norm_mlp,
    "patch_attention": _patch_attention,
}
