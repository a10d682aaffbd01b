# SPDX-License-Identifier: Apache-2.0
"""Frozen modules as one native call: a program of steps with packed weights, run by ``csrc/cpu/run_program.cpp``.

`mvit_kernels.freezing.program` writes the program, and `Network` keeps what this processor makes of it for a module,
and calls it. Savings over one operator per layer: a core takes a whole image through all steps, so maps stay in its
cache; the concatenation in a MobileViT block costs nothing, since two steps write into one map; nothing is allocated
between layers; Python runs once.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from ..backends import cpu
from ..backends.library import raw
from ..ops.flops import flop_formula, inverted_residual_flops, layer_flops
from .native import DTYPES as DTYPES
from .native import Native
from .program import CONVOLUTION, COPY, DEPTHWISE_CONVOLUTION, INVERTED_RESIDUAL, TRANSFORMER, Builder, target_size
from .program import NotNative as NotNative


class Network(Native):
    """A frozen module on the CPU as one native call (see `Native`)."""

    backends: ClassVar[tuple[str, ...]] = ("cpu",)

    @staticmethod
    def place_of_weights() -> str:
        return "cpu"

    def _check(self, module: nn.Module) -> None:
        reasons = cpu.BACKEND.unavailable("cpu")
        if reasons:
            raise NotNative("; ".join(reasons))

    def _pack(self, builder: Builder) -> None:
        stored = builder.stored()
        self.program, self.weights = raw("pack_network", "cpu")(stored.program, stored.weights)
        self.out_channels, self.halvings = stored.out_channels, stored.halvings
        self.reads_rows = reads_rows(self.program)

    def rows(self, x: Tensor, plan: object) -> Tensor:
        result = self.out_channels, self.halvings
        return call_packed(x, self.dtype, self.program, self.weights, *result, self.reads_rows)


_call_network = raw("network", "cpu")  # looking it up takes 2 µs


def call_packed(
    x: Tensor, dtype: torch.dtype, program: Tensor, weights: Tensor, out_channels: int, halvings: int, rows: bool
) -> Tensor:
    """`Network.rows` of a packed program. float16 is computed in float32 throughout, and rounded at both ends.
    `rows`: whether the program reads the channels of x in place."""
    if x.dtype is not dtype:
        x = x.to(dtype)  # rounds images as the weights are, if at all
    if dtype is torch.float16:
        x = x.float()
    if rows:
        x = x.contiguous(memory_format=torch.channels_last)
    made = _call_network(x, weights, program, out_channels, halvings)
    return made if made.dtype is dtype else made.to(dtype)


@flop_formula("network", get_raw=True)
def _flops(x: Tensor, weights: Tensor, program: Tensor, out_channels: int, halvings: int, out_val: Tensor) -> int:
    """FLOPs of a program's products on a (B, C, H, W) input, with the size of each map followed step by step."""
    batch, _, *size = x.shape
    words = program.tolist()
    sizes, total = {0: (size[0], size[1])}, 0
    at = 4 + 2 * words[2]
    for _ in range(words[3]):
        length, kind, source, _, channels, target, _, out, *more = words[at : at + words[at]]
        at += length
        height, width = sizes[source]
        made = sizes[target] = target_size(kind, more, sizes[source], sizes)
        if kind == CONVOLUTION:
            total += 2 * batch * made[0] * made[1] * more[0] ** 2 * channels * out
        elif kind == DEPTHWISE_CONVOLUTION:
            total += 2 * batch * made[0] * made[1] * 9 * channels
        elif kind == INVERTED_RESIDUAL:
            hidden, stride = more[:2]
            total += inverted_residual_flops((batch, height, width, channels), hidden, out, stride)
        elif kind == TRANSFORMER:
            _, inner, hidden, layers, *patch_size = more[:6]
            rows, d = (batch, height, width, channels), channels
            shapes = ((3 * inner, d), (d, inner), (hidden, d), (d, hidden))
            total += layers * layer_flops(rows, *shapes, patch_size)
    return total


def reads_rows(program: Tensor) -> bool:
    """Whether a packed program reads the channels of its input in place, which must then be adjacent."""
    return bool(program[4 + 2 * int(program[2]) + 1] != COPY)
