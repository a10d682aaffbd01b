# SPDX-License-Identifier: Apache-2.0
"""Frozen modules as one native call: a program of steps with packed weights, run by ``csrc/cpu/run_program.cpp``.

`mvit_kernels.freezing.program` writes the program, and `Network` keeps what this processor makes of it for a module,
and calls it. Savings over one operator per layer: a core takes a whole image through all steps, so maps stay in its
cache; the concatenation in a MobileViT block costs nothing, since two steps write into one map; nothing is allocated
between layers; Python runs once.
"""

from __future__ import annotations

from itertools import chain
from operator import is_
from typing import Any

import torch
from torch import Tensor, nn

from .. import backends
from .._utils.transforms import obstacle
from ..backends import cpu
from ..backends.library import raw
from ..ops.flops import flop_formula, inverted_residual_flops, layer_flops
from . import changes
from .program import (
    CONVOLUTION,
    COPY,
    DEPTHWISE_CONVOLUTION,
    INVERTED_RESIDUAL,
    MEAN,
    TO_SIZE_OF,
    TO_WHOLE_PATCHES,
    TRANSFORMER,
    NotNative,
    build,
)

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Network:
    """A frozen module as one native call, valid until something that it was built from changes.

    Args:
        module: the frozen module.

    Raises:
        NotNative: it must be called module by module instead, for the reason given.
    """

    def __init__(self, module: nn.Module) -> None:
        weight = next(iter(module.buffers()), None)
        if weight is None or weight.device.type != "cpu" or weight.dtype not in DTYPES:
            raise NotNative("its weights are not float32, bfloat16 or float16 on the CPU")
        reasons = cpu.BACKEND.unavailable("cpu")
        if reasons:
            raise NotNative("; ".join(reasons))
        self.dtype = weight.dtype
        builder = build(module, self.dtype)
        stored = builder.stored()
        self.program, self.weights = raw("pack_network", "cpu")(stored.program, stored.weights)
        self.out_channels, self.halvings = stored.out_channels, stored.halvings
        self.takes = builder.takes
        self._taken: dict[Any, bool] = {}
        self.reads_rows = reads_rows(self.program)
        # Inner modules, whose hooks it would skip, and the tensors that were packed, whose changes invalidate it.
        self._inner = [part for part in module.modules() if part is not module]
        self._others = [part for part in self._inner if not hasattr(part, "generation")]  # these note no change
        self._buffers = [part._buffers for part in module.modules() if part._buffers]
        self._packed_from = tuple(chain.from_iterable(map(dict.values, self._buffers)))
        self._generations = [(part, part.generation) for part in module.modules() if hasattr(part, "generation")]
        self._seen: object = None  # the last change before everything was looked at

    def is_stale(self) -> bool:
        """Whether something inside has changed since it was built."""
        return self._seen is not changes.last and any(
            part.generation != generation for part, generation in self._generations
        )

    def _has_packed_weights(self) -> bool:
        return all(map(is_, chain.from_iterable(map(dict.values, self._buffers)), self._packed_from))

    def serves(self, x: Tensor) -> bool:
        """Whether no hook would be skipped, the weights are the packed ones (``torch.func.functional_call`` substitutes
        others), and every block accepts its map (Kornia raises for maps that are not whole patches)."""
        if self._seen is not changes.last:
            now = changes.last
            if self.is_stale() or hooked(self._inner) or not self._has_packed_weights():
                return False
            if not any(part._buffers for part in self._others):
                self._seen = now
        elif hooked(self._others):
            return False
        if not self.takes:
            return True
        size = (x.shape[2], x.shape[3])
        taken = self._taken.get(size)
        if taken is None:
            if len(self._taken) > 4096:  # bounds the cache when every call has another size
                self._taken.clear()
            taken = self._taken[size] = all(
                block.takes(
                    block.fallback,
                    torch.empty((1, channels, *(-(-side // 2**halvings) for side in size)), device="meta"),
                )
                for block, channels, halvings in self.takes
            )
        return taken

    def rows(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) of any memory format to contiguous (B, H', W', C'), in the weights' dtype."""
        result = self.out_channels, self.halvings
        return call_packed(x, self.dtype, self.program, self.weights, *result, self.reads_rows)

    def __call__(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) of any memory format to (B, C', H', W'), channels-last, in the weights' dtype."""
        return self.rows(x).permute(0, 3, 1, 2)


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
    sizes, total = {0: tuple(size)}, 0
    at = 4 + 2 * words[2]
    for _ in range(words[3]):
        length, kind, source, _, channels, target, _, out, *more = words[at : at + words[at]]
        at += length
        height, width = sizes[source]
        if kind == CONVOLUTION:
            kernel, stride = more[:2]
            height, width = (height - 1) // stride + 1, (width - 1) // stride + 1
            total += 2 * batch * height * width * kernel * kernel * channels * out
        elif kind == DEPTHWISE_CONVOLUTION:
            height, width = (height - 1) // more[0] + 1, (width - 1) // more[0] + 1
            total += 2 * batch * height * width * 9 * channels
        elif kind == MEAN:
            height = width = 1
        elif kind == INVERTED_RESIDUAL:
            hidden, stride = more[:2]
            total += inverted_residual_flops((batch, height, width, channels), hidden, out, stride)
            height, width = (height - 1) // stride + 1, (width - 1) // stride + 1
        elif kind == TRANSFORMER:
            _, inner, hidden, layers, *patch_size = more[:6]
            rows, d = (batch, height, width, channels), channels
            shapes = ((3 * inner, d), (d, inner), (hidden, d), (d, hidden))
            total += layers * layer_flops(rows, *shapes, patch_size)
        elif kind == TO_WHOLE_PATCHES:
            height, width = -(-height // more[0]) * more[0], -(-width // more[1]) * more[1]
        elif kind == TO_SIZE_OF:
            height, width = sizes[more[0]]
        sizes[target] = (height, width)
    return total


def network_allowed(x: object) -> bool:
    """Whether a native network may be called with `x` now: inference on the CPU, not under tracing or a transform."""
    return (
        isinstance(x, Tensor)
        and x.is_cpu
        and x.ndim == 4
        and x.numel() > 0
        and not (torch.is_grad_enabled() and x.requires_grad)
        and backends.requested() in (None, "cpu")
        and not obstacle((x,))
        and not torch.compiler.is_compiling()
        and not torch._C._is_tracing()
    )


def hooks_inside(module: nn.Module) -> bool:
    """Whether a hook would be skipped if the modules inside `module` were not called one by one."""
    return hooked([part for part in module.modules() if part is not module])


def hooked(modules: list[nn.Module]) -> bool:
    if nn.modules.module._has_any_global_hook():
        return True
    return any(part._forward_hooks or part._forward_pre_hooks for part in modules)


def reads_rows(program: Tensor) -> bool:
    """Whether a packed program reads the channels of its input in place, which must then be adjacent."""
    return bool(program[4 + 2 * int(program[2]) + 1] != COPY)
