# SPDX-License-Identifier: Apache-2.0
"""The inference-only modules that `freeze` puts in place: batch norms folded, activations fused, channels-last
inside.

Their weights are buffers, and they stay in evaluation mode: ``train()`` raises, since a folded batch norm cannot be
trained.

Each module, with everything inside it, runs as one native call where that is possible, and is composed of its parts
where not (`mvit_kernels.freezing.frozen`).
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import backends
from .._utils.transforms import channels_last, obstacle
from ..backends import reference
from ..ops import inverted_residual
from ..ops.inverted_residual import inverted_residual_call
from .frozen import Frozen
from .half_range import HalfRange
from .native import Native, hooks_inside
from .program import Builder, NotNative, Place, links_of

_ACTIVATIONS = {"silu": F.silu, "relu": F.relu}


class FrozenSequential(Frozen, nn.Sequential):
    """Frozen modules in sequence, such as a stage of a model, or all of its stages."""

    _runs: dict[tuple[int, int], FrozenSequential] | None = None  # of `maps`; not submodules

    @property
    def in_channels(self) -> int:
        return self.links()[0].in_channels

    def links(self) -> list[Frozen]:
        """The frozen modules in order, including those of inner Sequentials."""
        return [link for child in self for link in links_of(child)]

    def composed(self, x: Tensor) -> Tensor:
        return nn.Sequential.forward(self, x)

    def maps(self, x: Tensor, indices: Sequence[int]) -> list[Tensor]:
        """The outputs of the modules at `indices`, which increase: one native call from each to the next, which saves 3
        to 6 % of a call for each module."""
        found, begin = [], 0
        for index in indices:
            x = self._run(begin, index + 1)(x)
            found.append(x)
            begin = index + 1
        return found

    def _run(self, begin: int, end: int) -> Frozen:
        if end - begin == 1:
            return self[begin]
        runs = self._runs if self._runs is not None else {}
        if (begin, end) not in runs:
            runs[begin, end] = FrozenSequential(*list(self)[begin:end])
            runs[begin, end].cuda_graph = self.cuda_graph
            self._runs = runs
        return runs[begin, end]

    def _changed(self) -> None:
        self._runs = None
        super()._changed()

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_runs": None}


class FrozenConv2d(Frozen):
    """A convolution with batch norm and activation fused: (B, C, H, W) of any memory format in, channels-last out.

    Example:
        >>> FrozenConv2d(weight, bias, stride=(2, 2), padding=(1, 1), activation="silu")(images)

    When it is composed on the CPU, it runs as oneDNN's convolution with SiLU or a residual addition as a fused
    epilogue, and with weights reordered once for the first input's size: half the time of separate convolution,
    batch norm and SiLU.

    Args:
        weight: (out, in / groups, kh, kw), the batch norm folded in.
        bias: (out,).
        stride, padding, dilation: pairs of ints, (height, width).
        groups: as in ``nn.Conv2d``.
        activation: "silu", "relu" or None.
    """

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor,
        *,
        stride: tuple[int, int] = (1, 1),
        padding: tuple[int, int] = (0, 0),
        dilation: tuple[int, int] = (1, 1),
        groups: int = 1,
        activation: str | None = None,
    ) -> None:
        super().__init__()
        self.register_buffer("weight", weight.contiguous(memory_format=torch.channels_last))
        self.register_buffer("bias", bias)
        self.stride, self.padding, self.dilation, self.groups = stride, padding, dilation, groups
        self.activation = activation
        self._packed: tuple[Tensor, Tensor] | None = None  # the weight, and oneDNN's reordered copy of it

    @property
    def in_channels(self) -> int:
        return self.weight.shape[1] * self.groups

    # Code around a bare convolution may read these attributes of nn.Conv2d.

    @property
    def out_channels(self) -> int:
        return self.weight.shape[0]

    @property
    def kernel_size(self) -> tuple[int, int]:
        return tuple(self.weight.shape[2:])

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """``act(conv(x))``, or without an activation ``conv(x) + residual``."""
        if residual is None:
            return super().forward(x)
        self._check(x)
        return self.composed(x, residual)

    def composed(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        x = x.to(self.weight.dtype)
        if x.dim() == 4:  # nn.Conv2d also takes an unbatched image
            x = channels_last(x)
        if residual is None and reference.is_one_column(
            x, self.weight, self.stride, self.padding, self.dilation, self.groups
        ):
            y = self.composed(F.pad(x, (0, self.stride[1])))[..., :1]
            return channels_last(y) if x.dim() == 4 else y
        if _onednn_serves(x, self.weight):
            return self._onednn(x, residual)
        y = F.conv2d(x, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups)
        if residual is not None:
            return y + residual
        return _ACTIVATIONS[self.activation](y) if self.activation else y

    def _onednn(self, x: Tensor, residual: Tensor | None) -> Tensor:
        geometry = (self.padding, self.stride, self.dilation, self.groups)
        weight, packed = self._packed or (None, None)
        if weight is not self.weight:  # torch.func.functional_call substitutes another
            packed = torch.ops.mkldnn._reorder_convolution_weight(self.weight, *geometry, list(x.shape))
            self._packed = (self.weight, packed)
        if residual is None:
            activation = "swish" if self.activation == "silu" else "none"
            y = torch.ops.mkldnn._convolution_pointwise(x, packed, self.bias, *geometry, activation, [], "")
            return y.relu_() if self.activation == "relu" else y  # oneDNN's ReLU makes 0 of NaN
        residual = residual.contiguous(memory_format=torch.channels_last)
        return torch.ops.mkldnn._convolution_pointwise(
            x, residual, packed, self.bias, *geometry, "add", 1.0, None, [], None
        )

    def place(self, builder: Builder) -> Place | None:
        return builder.value(self.in_channels, self.border) if self.border else None

    @property
    def border(self) -> int:
        """How wide a border of zeros the native step reads around its input, so that edges need no special case."""
        return 0 if self.weight.shape[2] == 1 or self._is_depthwise() else self.dilation[0]

    def _is_depthwise(self) -> bool:
        return self.groups > 1 and self.weight.shape == (self.groups, 1, 3, 3)

    def emit(self, builder: Builder, source: Place, target: Place | None) -> Place:
        kernel = self.weight.shape[2]
        same = (self.stride, self.dilation) == (self.stride[:1] * 2, self.dilation[:1] * 2)
        padded = self.padding == (self.dilation[0] * (kernel // 2),) * 2
        dense = self.groups == 1 and kernel in (1, 3)
        if not (dense or self._is_depthwise()) or not same or not padded or self.stride[0] > 2:
            raise NotNative(f"it has a convolution with {self.extra_repr()}")
        if self.weight.shape[3] != kernel or (kernel == 1 and self.stride[0] != 1):
            raise NotNative(f"it has a convolution with {self.extra_repr()}")
        return (builder.convolution if dense else builder.depthwise_convolution)(self, source, target)

    # Weights that oneDNN packed are opaque tensors: they are dropped on a change and not pickled.

    def _changed(self) -> None:
        self._packed = None
        super()._changed()

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_packed": None}

    # A state dict is contiguous, as safetensors requires; the weight of a dense 3×3 convolution here is channels-last.

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}weight"] = destination[f"{prefix}weight"].contiguous()

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._buffers["weight"] = self.weight.contiguous(memory_format=torch.channels_last)  # assign=True replaced it

    def extra_repr(self) -> str:
        out, width, kh, kw = self.weight.shape
        return (
            f"{width * self.groups}, {out}, kernel_size=({kh}, {kw}), stride={self.stride}, padding={self.padding}, "
            f"dilation={self.dilation}, groups={self.groups}, activation={self.activation}"
        )


class FrozenMean(Frozen):
    """The mean over a map, (B, C, H, W) to (B, C, 1, 1), as a link of a `FrozenSequential`. By itself it is PyTorch's.

    Args:
        in_channels: C.
    """

    def __init__(self, in_channels: int) -> None:
        super().__init__()
        self.in_channels = in_channels

    def native(self, kind: type[Native] | None = None) -> NotNative:
        return NotNative("it only takes the mean of a map")

    def emit(self, builder: Builder, source: Place, target: Place | None) -> Place:
        return builder.mean(source, target)

    def composed(self, x: Tensor) -> Tensor:
        return x.mean((-2, -1), keepdim=True)

    def extra_repr(self) -> str:
        return f"{self.in_channels}"


def _onednn_serves(x: Tensor, weight: Tensor) -> bool:
    """Whether oneDNN's fused convolution can be used: on the CPU, in float32 or (if the processor supports it)
    bfloat16, without gradients, and not under tracing or a dispatch mode, such as a FLOP counter."""
    if x.device.type != "cpu" or torch.compiler.is_compiling() or torch.jit.is_tracing():
        return False
    if x.requires_grad or weight.requires_grad or obstacle((x, weight)) or torch._C._len_torch_dispatch_stack():
        return False
    if not torch.backends.mkldnn.is_available() or not torch.backends.mkldnn.enabled:
        return False
    if x.dim() != 4 or x.numel() == 0:
        return False
    return x.dtype == torch.float32 or (x.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())


class FrozenInvertedResidual(Frozen):
    """MobileNetV2's inverted residual of three frozen convolutions, as one operator where a backend serves it.

    Args:
        expand, depthwise, project: the three convolutions, with SiLU on the first two.
        residual: whether the input is added.
    """

    # What was found on an example, and the weights then: the tensors, and how often they were changed in place.
    _half_range: HalfRange | None = None
    _half_range_of: tuple[tuple[weakref.ref[Tensor], int], ...] = ()

    def __init__(self, expand: FrozenConv2d, depthwise: FrozenConv2d, project: FrozenConv2d, residual: bool) -> None:
        super().__init__()
        self.expand, self.depthwise, self.project, self.residual = expand, depthwise, project, residual

    @property
    def in_channels(self) -> int:
        return self.expand.in_channels

    @property
    def half_range(self) -> HalfRange | None:
        """What float16 would have to hold here, on the example that `freeze` was given; None if there was none, or a
        weight has changed since. A move to another device or dtype is no change."""
        known = self._half_range
        if known is None or len(self._half_range_of) != len(tensors := self._tensors()):
            return None
        for (known_tensor, version), tensor in zip(self._half_range_of, tensors, strict=True):
            if known_tensor() is not tensor or tensor.is_inference() or tensor._version != version:
                return None
        return known

    def note_half_range(self, known: HalfRange | None) -> None:
        """`known` is of the weights as they are now."""
        tensors = self._tensors()
        if any(tensor.is_inference() for tensor in tensors):  # they do not count their changes
            known = None
        self._half_range = known
        self._half_range_of = () if known is None else tuple((weakref.ref(t), t._version) for t in tensors)
        self._changed()

    def _tensors(self) -> list[Tensor]:
        return [value for part in (self.expand, self.depthwise, self.project) for value in part.buffers()]

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        known, before = self.half_range, self._tensors()
        super()._apply(*args, **kwargs)
        if known is not None and all(map(_is_the_same, before, self._tensors())):
            self.note_half_range(known)
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_half_range": self.half_range, "_half_range_of": ()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if self._half_range is not None:
            self.note_half_range(self._half_range)

    def extra_repr(self) -> str:
        known = self.half_range
        if known is None:
            return ""
        return f"float16 inside: {known.reason or f'within its range on the example, headroom {known.headroom:.3g}'}"

    def emit(self, builder: Builder, source: Place, target: Place | None) -> Place:
        if self.depthwise.stride[0] > 2:
            raise NotNative(f"it has a depthwise convolution with {self.depthwise.extra_repr()}")
        return builder.inverted_residual(self, source, target)

    def composed(self, x: Tensor) -> Tensor:
        expand, depthwise, project = self.expand, self.depthwise, self.project
        x = channels_last(x.to(expand.weight.dtype))
        rows = x.permute(0, 2, 3, 1)
        expand_weight, project_weight = expand.weight.flatten(1), project.weight.flatten(1)
        stride, dilation = depthwise.stride[0], depthwise.dilation[0]
        call = inverted_residual_call(rows, expand_weight, project_weight, (x,), stride, dilation, self.residual)
        if not hooks_inside(self) and backends.serves("inverted_residual", call):
            weights = (expand_weight, expand.bias, depthwise.weight, depthwise.bias, project_weight, project.bias)
            rows = inverted_residual(rows, *weights, stride=stride, dilation=dilation, residual=self.residual)
            return rows.permute(0, 3, 1, 2)
        return project(depthwise(expand(x)), x if self.residual else None)


def _is_the_same(before: Tensor, after: Tensor) -> bool:
    """Whether a move left a weight as it was, but for what a dtype rounds."""
    if before is after:
        return True
    if "meta" in (before.device.type, after.device.type) or before.shape != after.shape:
        return False
    # bfloat16 rounds by 2^-9, float16 next to zero by 2^-25: neither is a matter for a headroom of 4.
    return torch.allclose(before.to(after.device, torch.float32), after.float(), rtol=2**-8, atol=2**-24)
