# SPDX-License-Identifier: Apache-2.0
"""Frozen modules on a GPU as one native call: a list of launches, prepared once for each input shape.

Example:
    >>> fast = mvit_kernels.freeze(model.cuda(), dtype=torch.bfloat16)      # calls of `fast` are such lists

The counterpart of the CPU's `mvit_kernels.freezing.network`, of the same program. Bias, SiLU and residuals are inside
the launches: as PyTorch's own passes they took half of frozen MobileViT-S on an H200. A step writes where the next
one reads, so that a concatenation costs nothing; and Python runs once a launch, with addresses that were computed
before (`mvit_kernels.backends.triton.prepared`). A call allocates its result and one arena for all maps, in which maps
that do not live at the same time share memory. So it needs no state but the weights: any number of threads and streams
may call it at once. ``freeze(cuda_graph=…)`` makes a CUDA graph of the list (`mvit_kernels.freezing.graphs`).

With ``TRITON_INTERPRET=1`` and ``use_backend("triton")`` it runs in Triton's interpreter, on CPU tensors.
"""

from __future__ import annotations

import threading
from contextlib import nullcontext
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .. import backends
from ..backends import Call, cuda, gpu, preference, triton
from ..backends.library import TransformerLayerWeights
from .graphs import CudaGraphs, Graphs
from .lowering import IMAGE, Lowering
from .native import DTYPES, Native
from .operations import InvertedResidualWeights, StackWeights
from .program import CONVOLUTION, DEPTHWISE_CONVOLUTION, INVERTED_RESIDUAL, TRANSFORMER, Builder, NotNative, Place

_ARENA, _RESULT = 1, 2  # stretches of a call's memory, behind the image
_MOST_SHAPES = 64  # of images, whose lists are kept; with another shape at every call none would ever be used again


class LaunchedNetwork(Native):
    """A frozen module on a GPU as prepared launches (see `Native`)."""

    backends: ClassVar[tuple[str, ...]] = ("triton",)

    @staticmethod
    def place_of_weights() -> str:
        return triton.target.DEVICE_TYPE

    def _check(self, module: nn.Module) -> None:
        self._options: CudaGraphs | None = getattr(module, "cuda_graph", None)
        if any(value.device != self.device for value in module.buffers()):
            raise NotNative("its weights are on several devices")
        reasons = triton.BACKEND.unavailable(triton.target.DEVICE_TYPE)
        if not reasons and backends.requested() is None:
            reasons = preference.excluded("triton", Call("network", self.device.type, self.dtype, False, (), ()))
        if reasons:
            raise NotNative("; ".join(reasons))
        if not self._is_wanted():
            raise NotNative(
                "float32 convolutions are left to cuDNN on a GPU, against whose TF32 Triton's exact ones have not been "
                "measured; use_backend('triton') asks for these, and bfloat16 and float16 take them unasked"
            )
        if gpu.is_capturing(self.device):
            reason = NotNative("a CUDA graph is being captured, and what packs the weights would be part of it")
            reason.lasts = False
            raise reason

    def _pack(self, builder: Builder) -> None:
        # Outside inference mode, even in a call inside it: weights may be used by calls outside.
        with torch.inference_mode(False), torch.no_grad():
            self._weights = [_packed(builder, index) for index in range(len(builder.steps))]
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()  # other streams will read them too
        builder.drop_tensors()
        self.out_channels = builder.values[-1][0]
        self._builder = builder
        self._lowered: dict[Any, Lowering | str] = {}
        self._prepared: dict[Any, list[Any]] = {}
        self._lock = threading.Lock()
        self._graphs = None if self._options is None else Graphs(self, self._options)
        self.lowering(1, (256, 256))  # whether there are launches for all steps is to be known now

    def _is_wanted(self) -> bool:
        return self.dtype != torch.float32 or backends.requested() == "triton"

    def plan(self, x: Tensor) -> Lowering | None:
        if x.device != self.device or torch.is_autocast_enabled(self.device.type) or not self._is_wanted():
            return None
        if not self._serves(x):
            return None
        try:
            return self.lowering(x.shape[0], (x.shape[2], x.shape[3]))
        except NotNative:
            return None

    def settings(self) -> tuple[str | None, str]:
        """What a user may set that launches depend on: the backend asked for, and the precision of products."""
        from ..backends.triton._launch import kind_of

        return backends.requested(), kind_of(self.dtype)

    def lowering(self, batch: int, size: tuple[int, int]) -> Lowering:
        """The operations for images of this size; raises `NotNative`."""
        settings = self.settings()
        key = batch, size, settings
        known = self._lowered.get(key)
        if known is None:
            try:
                known = Lowering(self._builder, self._weights, self.device, batch, size)
                known.settings = settings
            except NotNative as reason:
                known = str(reason)
            _keep(self._lowered, key, known)
        if isinstance(known, str):
            raise NotNative(known)  # another one each time: its traceback holds the call's image
        return known

    def rows(self, x: Tensor, plan: Lowering) -> Tensor:
        if self._graphs is not None:
            x = x.to(self.dtype)  # as graphs have it: inside of another one nothing new is to be compiled and loaded
            replayed = self._graphs(x, plan)
            if replayed is not None:
                return replayed
        image = self.image(x, plan)
        result = torch.empty(plan.result, dtype=self.dtype, device=self.device)
        self.run(plan, image, result, torch.empty(plan.arena, dtype=torch.uint8, device=self.device))
        return result

    def image(self, x: Tensor, lowering: Lowering) -> Tensor:
        """`x` as (B, H, W, C), as the first launch reads it: a stem reads any, other modules channels-last maps in the
        weights' dtype."""
        if lowering.any_image:
            x = x if x.dtype in DTYPES else x.to(self.dtype)
        else:
            x = x.to(self.dtype).contiguous(memory_format=torch.channels_last)
        return x.permute(0, 2, 3, 1)

    def run(self, lowering: Lowering, image: Tensor, result: Tensor, arena: Tensor) -> list[Any]:
        """Compute `result`, (B, H', W', C'), of what `image` returned, with `arena` as memory for the maps between;
        return the prepared launches, which own copies of weights."""
        from ..backends.triton import prepared

        form = image.shape, image.stride(), image.dtype, image.data_ptr() % prepared.FEWEST_BYTES
        key = form, lowering.settings
        memory = prepared.Memory((image, arena, result))
        steps = self._prepared.get(key)
        if steps is None:
            with self._lock:  # one thread compiles, the others wait
                steps = self._prepared.get(key)
                if steps is None:
                    steps = self._prepare(lowering, memory)
                    _keep(self._prepared, key, steps)
                    return steps
        prepared.run(steps, memory)
        return steps

    def _prepare(self, lowering: Lowering, memory: Any) -> list[Any]:
        """Prepare the steps and run each; they hold no tensor of this call."""
        from ..backends.triton import prepared

        with _device(self.device):
            steps: list[Any] = []
            for operation in lowering.operations:
                views = [_view(lowering, memory, at) for at in (*operation.reads, *operation.writes)]
                if operation.is_call:
                    steps.append(prepared.PreparedCall(operation.make, [memory.find(view) for view in views]))
                else:
                    steps.append(prepared.PreparedLaunch(operation.make(*views), memory))
                steps[-1].run_slowly(memory)
        return steps


def _view(lowering: Lowering, memory: Any, at: Place) -> Tensor:
    """The tensor at a place, in the memory of a call."""
    if at.value == IMAGE:
        return memory.tensors[0]
    value = lowering.values[at.value]
    if at.value == lowering.last:
        whole = memory.tensors[_RESULT]
    else:
        whole = memory.tensors[_ARENA][lowering.offsets[at.value] :][: value.bytes].view(value.dtype).view(value[:4])
    return whole if value.channels == at.channels else whole[..., at.offset : at.offset + at.channels]


def _packed(builder: Builder, index: int) -> Any:
    """The weights of a step, in the kernels' order."""
    from ..backends.triton import convolution, depthwise_convolution

    kind, *words = builder.steps[index]
    words = words[6:]

    def tensors(first: int) -> tuple[Tensor, Tensor]:
        return builder.tensor(words[first]), builder.tensor(words[first + 1])

    if kind == CONVOLUTION:
        weight, bias = tensors(4)
        return convolution.packed(weight), bias
    if kind == DEPTHWISE_CONVOLUTION:
        weight, bias = tensors(3)
        return depthwise_convolution.packed(weight), bias
    if kind == INVERTED_RESIDUAL:
        expand, depthwise, project = tensors(4), tensors(6), tensors(8)
        whole = (expand[0].flatten(1), expand[1], *depthwise, project[0].flatten(1), project[1])
        half_filter = index in builder.half_filters and cuda.has_half_filter(whole[0], whole[4], words[1])
        return InvertedResidualWeights(
            (convolution.packed(expand[0]), expand[1]),
            (depthwise_convolution.packed(depthwise[0]), depthwise[1]),
            (convolution.packed(project[0]), project[1]),
            cuda.BACKEND.packed_inverted_residual(whole, builder.dtype, *words[1:3], half_filter),
            half_filter,
        )
    if kind == TRANSFORMER:
        stack = builder.stacks[index]
        layers = []
        for layer in stack.layers:
            values = (_as(builder.dtype, name, value) for name, value in layer._asdict().items())
            layers.append(TransformerLayerWeights(*values))
        norm = None if stack.final_norm is None else tuple(v.contiguous() for v in stack.final_norm)
        # Now, before other streams and captures read what is packed.
        backends.pack(layers, norm, stack.num_heads, builder.dtype)
        return StackWeights(stack, layers, norm)
    return None


def _as(dtype: torch.dtype, name: str, value: Tensor | None) -> Tensor | None:
    """A layer's weight as the operators take it: LayerNorm's are never cast. Where nothing is to be done it is the
    module's own tensor, by which the CUDA backend knows what `freeze` has packed."""
    return None if value is None else (value if "norm" in name else value.to(dtype)).contiguous()


def _device(device: torch.device) -> Any:
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _keep(kept: dict[Any, Any], key: Any, value: Any) -> None:
    """Keep an entry; where there are too many, the oldest go. (Another thread may do the same.)"""
    while len(kept) >= _MOST_SHAPES:
        kept.pop(next(iter(list(kept))), None)
    kept[key] = value
