# SPDX-License-Identifier: Apache-2.0
"""A frozen network's program for one input size, as operations that are one launch each.

A `Lowering` walks the steps of a `Builder` and writes for each what a GPU does: a convolution is one launch, an
inverted residual three (or one, where a kernel takes it whole), a transformer one or four a layer, a resize that
changes nothing none: its target is another name of its source. Values that only live inside a step, such as an inverted
residual's hidden maps, are values like the program's own. What follows from all operations is when each value lives,
and so where it can lie in memory (`mvit_kernels.freezing.arena`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import backends
from ..backends import StackPlan, preference, triton
from ..ops.inverted_residual import inverted_residual_call
from ..ops.patch_attention import attention_call
from ..ops.transformer import stack_call
from . import operations
from .arena import Region, place
from .operations import EndOfStack, InvertedResidualWeights, Operation, StackWeights
from .program import (
    CONVOLUTION,
    COPY,
    DEPTHWISE_CONVOLUTION,
    INVERTED_RESIDUAL,
    MEAN,
    TO_SIZE_OF,
    TO_WHOLE_PATCHES,
    TRANSFORMER,
    Builder,
    NotNative,
    Place,
    target_size,
)

IMAGE, RESULT = 0, -1  # the first and the last of the program's own values, which are not in the arena
ACTIVATIONS = (None, "silu", "relu")  # by their words


class Value(NamedTuple):
    """A map of a call: (batch, height, width, channels), contiguous."""

    batch: int
    height: int
    width: int
    channels: int
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        return self.batch * self.height * self.width * self.channels * self.dtype.itemsize


class Lowering:
    """The operations of a program on (batch, C, height, width) images, and where their values lie.

    Args:
        builder: the program.
        weights: of each step, in the kernels' order; see `mvit_kernels.freezing.launched`.
        device: that it is for.
        batch, size: of the images.

    Raises:
        NotNative: no launches serve this size.
    """

    def __init__(
        self, builder: Builder, weights: Sequence[Any], device: torch.device, batch: int, size: tuple[int, int]
    ) -> None:
        self.device, self.dtype, self.batch = device, builder.dtype, batch
        self.last = len(builder.values) - 1
        self.names = list(range(len(builder.values)))  # of each value: the one whose memory it has
        self.values: list[Value | None] = [None] * len(builder.values)
        self.values[IMAGE] = self._value(size, builder.values[IMAGE][0])
        self.operations: list[Operation] = []
        self.settings: tuple[str | None, str] = None, ""  # under which it was made
        self.any_image = _takes_any_image(builder)  # any strides and dtype; else channels-last, in the weights' dtype
        sizes = {IMAGE: size}
        self._end_of_stack: EndOfStack | None = None  # of the last one that was lowered
        self._later = builder.steps  # behind the one that is lowered
        for index, (kind, *six_and_words) in enumerate(builder.steps):
            source, target, words = Place(*six_and_words[:3]), Place(*six_and_words[3:6]), six_and_words[6:]
            self._later = builder.steps[index + 1 :]
            sizes[target.value] = target_size(kind, words, sizes[source.value], sizes)
            if self.values[target.value] is None:
                self.values[target.value] = self._value(sizes[target.value], builder.values[target.value][0])
            self._lower(kind, source, target, words, weights[index])
        self.arena = self._lay_out()

    @property
    def result(self) -> tuple[int, int, int, int]:
        """The shape of the result, (B, H', W', C')."""
        return self._of_value(self.last)[:4]

    # -- steps ----------------------------------------------------------------------------------------------------

    def _lower(self, kind: int, source: Place, target: Place, words: Sequence[int], weights: Any) -> None:
        if kind in (COPY, TO_WHOLE_PATCHES, TO_SIZE_OF):
            self._resize(source, target)
        elif kind in (CONVOLUTION, DEPTHWISE_CONVOLUTION):
            stride, dilation, activation = words[1:4] if kind == CONVOLUTION else words[:3]
            depthwise = kind == DEPTHWISE_CONVOLUTION
            one_pixel = kind == CONVOLUTION and words[0] == stride == 1
            if one_pixel and self._norm_linear(source, target, weights, ACTIVATIONS[activation]):
                return
            self._convolution(source, target, weights, stride, dilation, ACTIVATIONS[activation], depthwise=depthwise)
        elif kind == INVERTED_RESIDUAL:
            self._inverted_residual(source, target, weights, words[1], words[2], bool(words[3]))
        elif kind == MEAN:
            self._add("mean", (source,), (target,), operations.mean)
        elif kind == TRANSFORMER:
            self._transformer(source, target, weights)
        else:
            raise AssertionError(f"a step of an unknown kind {kind}")

    def _resize(self, source: Place, target: Place) -> None:
        """A copy, too, is a resize. What changes nothing is a name, if the map is no part of another one's memory."""
        before, after = self._of_value(source.value), self._of_value(target.value)
        whole = before == after and before.channels == source.channels == target.channels
        if whole and target.value != self.last and not self._is_written(target):
            self.names[target.value] = self.names[source.value]
        elif self._resolved(source).value == IMAGE or self._of(source)[1:4] == self._of(target)[1:4]:
            # Of any strides; and between maps of one size a resize would make NaN of Inf · 0.
            self._add("copy", (source,), (target,), operations.copy, is_call=True)
        else:
            self._add("resize", (source,), (target,), operations.resize)

    def _convolution(
        self,
        source: Place,
        target: Place,
        weights: tuple[Tensor, Tensor],
        stride: int,
        dilation: int,
        activation: str | None,
        *,
        depthwise: bool = False,
        residual: Place | None = None,
    ) -> None:
        weight, bias = weights
        if depthwise:
            make = partial(operations.depthwise_convolution, weight, bias, stride, dilation, activation)
            self._add("depthwise_convolution", (source,), (target,), make)
        elif residual is None:
            make = partial(operations.convolution, weight, bias, stride, dilation, activation)
            self._add("convolution", (source,), (target,), make)
        else:
            make = partial(operations.convolution_residual, weight, bias, stride, dilation, activation)
            self._add("convolution", (source, residual), (target,), make)

    def _norm_linear(
        self, source: Place, target: Place, weights: tuple[Tensor, Tensor], activation: str | None
    ) -> bool:
        """Make one launch of a stack's last LayerNorm and the 1×1 convolution that follows, if that alone reads it; of
        the MLP's second half too, where it is a launch of its own."""
        at, last, end = self._resolved(source), self.operations[-1] if self.operations else None, self._end_of_stack
        if last is None or last.name != "layer_norm" or last.writes[0] != at or activation not in (None, "silu"):
            return False
        if any(self.names[value] == at.value for _, value, *_ in self._later) or end is None:
            return False
        self.operations.pop()
        convolution = weights[0].flatten(1), weights[1]
        if end.product is None:
            make = partial(operations.norm_linear, end.norm, convolution, end.eps, activation)
            self._add("layer_norm_linear", last.reads, (target, *last.writes[1:]), make)
        else:
            before = self.operations.pop()
            make = partial(operations.projection_norm_linear, end.product, end.norm, convolution, end.eps, activation)
            self._add("projection_norm_linear", before.reads, (target,), make)
        return True

    def _inverted_residual(
        self,
        source: Place,
        target: Place,
        weights: InvertedResidualWeights,
        stride: int,
        dilation: int,
        residual: bool,
    ) -> None:
        call = self._whole_inverted_residual(source, target, weights, stride, dilation, residual)
        if call is not None:
            return self._add("inverted_residual", (source,), (target,), call, is_call=True)
        width = weights.expand[0].shape[0]
        wide = self._new(self._of(source)[1:3], width)
        narrow = self._new(self._of(target)[1:3], width)
        self._convolution(source, wide, weights.expand, 1, 1, "silu")
        self._convolution(wide, narrow, weights.depthwise, stride, dilation, "silu", depthwise=True)
        self._convolution(narrow, target, weights.project, 1, 1, None, residual=source if residual else None)
        return None

    def _whole_inverted_residual(
        self,
        source: Place,
        target: Place,
        weights: InvertedResidualWeights,
        stride: int,
        dilation: int,
        residual: bool,
    ) -> Callable[[Tensor, Tensor], None] | None:
        """CUDA C++'s call of one launch; None for three of Triton's. This is the one place where that is chosen."""
        if weights.packed is None or IMAGE in (source.value, self.names[source.value]):
            return None
        # Its kernel moves 16 bytes at a time, so that it would copy the one, and cannot write the other.
        if not self._has_whole_units(source) or not self._has_whole_units(target):
            return None
        x, expand, project = self._stand_in(source), weights.expand[0].flatten(1), weights.project[0].flatten(1)
        call = inverted_residual_call(x, expand, project, (x,), stride, dilation, residual)
        call = call._replace(device_type=self.device.type)
        if backends.server("inverted_residual", call) != "cuda":
            return None  # Triton's operator is three launches and their allocations
        from ..backends.cuda.inverted_residual import prepared  # registers the operator, so the library must be loaded

        return prepared(weights.packed, expand.shape[0], stride, residual, weights.half_filter)

    def _transformer(self, source: Place, target: Place, weights: StackWeights) -> None:
        stack = weights.stack
        x = self._stand_in(source)
        call = stack_call(x, weights.layers, weights.final_norm, stack.num_heads, stack.patch_size, self.dtype)
        call = call._replace(device_type=self.device.type)
        inner = weights.layers[0].proj_weight.shape[1]
        attention = attention_call(call, 3 * inner, stack.num_heads, stack.patch_size)
        plan = backends.plan_stack(call, attention, dropout=False)
        if plan is StackPlan.WHOLE and backends.choose(call) == "cuda":
            # Its blocks read rows after others have written theirs: so `target`, which may be `source`, is a new map.
            reads = (self._resolved(source),)
            writes = (self._renamed(target),)
            self.operations.append(Operation("transformer", reads, writes, self._whole_transformer(x, weights), True))
            return None
        facts = dict(call.facts, contiguous=True, inner_dropout=False)
        layer = call._replace(operator="transformer_layer", facts=tuple(facts.items()))
        reasons = triton.BACKEND.reasons_against(layer)
        if plan is StackPlan.SEQUENCES or reasons:
            raise NotNative(f"no kernels serve its transformer: {'; '.join(reasons) or 'plain PyTorch computes it'}")
        return self._layers(source, target, weights)

    def _whole_transformer(self, x: Tensor, weights: StackWeights) -> Callable[[Tensor, Tensor], None]:
        from ..backends.cuda.transformer import prepared  # registers the operator, so the library must be loaded

        stack = weights.stack
        return prepared(x, weights.layers, weights.final_norm, stack.num_heads, stack.patch_size, stack.eps)

    def _layers(self, source: Place, target: Place, weights: StackWeights) -> None:
        """Four launches a layer: its rows go from `source` to a map of their own and back to `target`, which may be
        `source` itself. For few rows three, of which two have a product, a LayerNorm and the next product: the
        projection and the MLP's first half, the second half and the next layer's (`preference.divides_mlp`)."""
        stack, before = weights.stack, self._of(source)
        size, d, inner = before[1:3], before.channels, weights.layers[0].proj_weight.shape[1]
        rows, eps = size[0] * size[1], stack.eps
        heads, patch, scale = stack.num_heads, stack.patch_size, float(inner // stack.num_heads) ** -0.5
        divided = preference.divides_mlp(self.batch * rows, d, self.dtype)

        def statistics() -> list[Place]:
            return [self._new((rows, 1), 1, torch.float32) for _ in range(2)]

        x, qkv = source, self._new(size, 3 * inner)
        make = partial(operations.layer_norm_linear, weights.layers[0], eps)
        self._add("layer_norm_linear", (x,), (qkv, *statistics()), make)
        for layer, following in zip(weights.layers, (*weights.layers[1:], None), strict=True):
            attended, middle = self._new(size, inner), self._new(size, d)
            made = attended, self._new((rows, 1), heads, torch.float32)
            self._add("patch_attention", (qkv,), made, partial(operations.patch_attention, heads, patch, scale))
            qkv = qkv if following is None else self._new(size, 3 * inner)
            if divided:
                hidden = self._new(size, layer.fc1_weight.shape[0])
                make = partial(operations.projection_norm_linear, layer[4:6], layer[6:8], layer[8:10], eps, "silu")
                self._add("projection_norm_linear", (attended, x), (middle, hidden), make)
                fc2 = layer[10:12]
                if following is not None:
                    make = partial(operations.projection_norm_linear, fc2, following[:2], following[2:4], eps, None)
                    self._add("projection_norm_linear", (hidden, middle), (target, qkv), make)
                else:
                    self._add("linear_residual", (hidden, middle), (target,), partial(operations.linear_residual, *fc2))
            else:
                self._add("linear_residual", (attended, x), (middle,), partial(operations.linear_residual, *layer[4:6]))
                make = partial(operations.layer_norm_mlp, layer, eps)
                self._add("layer_norm_mlp", (middle,), (target, *statistics()), make)
                if following is not None:
                    make = partial(operations.layer_norm_linear, following, eps)
                    self._add("layer_norm_linear", (target,), (qkv, *statistics()), make)
            x = target
        if weights.final_norm is not None:
            self._end_of_stack = EndOfStack(weights.final_norm, eps, weights.layers[-1][10:12] if divided else None)
            make = partial(operations.layer_norm, weights.final_norm, eps)
            self._add("layer_norm", (x,), (x, *statistics()), make)

    # -- values ---------------------------------------------------------------------------------------------------

    def _value(self, size: tuple[int, int], channels: int, dtype: torch.dtype | None = None) -> Value:
        return Value(self.batch, *size, channels, dtype or self.dtype)

    def _new(self, size: tuple[int, int], channels: int, dtype: torch.dtype | None = None) -> Place:
        """A value of this lowering alone."""
        self.values.append(self._value(size, channels, dtype))
        self.names.append(len(self.names))
        return Place(len(self.values) - 1, 0, channels)

    def _renamed(self, at: Place) -> Place:
        """A new map in place of the one that has that name now."""
        old, fresh = self.names[at.value], self._new(self._of(at)[1:3], at.channels)
        self.names = [fresh.value if name_of == old else name_of for name_of in self.names]
        return fresh

    def _of_value(self, index: int) -> Value:
        value = self.values[index]
        assert value is not None, "a step reads what no step wrote"
        return value

    def _of(self, at: Place) -> Value:
        """The form of a place."""
        return self._of_value(at.value)._replace(channels=at.channels)

    def _stand_in(self, at: Place) -> Tensor:
        """A tensor of the shape and dtype of a place, for those who judge by these; its device is none."""
        value = self._of(at)
        return torch.empty(value[:4], dtype=value.dtype, device="meta")

    def _resolved(self, at: Place) -> Place:
        return at._replace(value=self.names[at.value])

    def _is_written(self, at: Place) -> bool:
        return any(self.names[at.value] == other.value for op in self.operations for other in op.writes)

    def _has_whole_units(self, at: Place) -> bool:
        """Whether each of its pixels begins at a multiple of 16 bytes."""
        value = self._of_value(at.value)
        return all(elements * value.dtype.itemsize % 16 == 0 for elements in (value.channels, at.offset))

    def _add(
        self,
        name: str,
        reads: tuple[Place, ...],
        writes: tuple[Place, ...],
        make: Callable[..., Any],
        is_call: bool = False,
    ) -> None:
        reads, writes = (tuple(map(self._resolved, places)) for places in (reads, writes))
        self.operations.append(Operation(name, reads, writes, make, is_call))

    # -- memory ---------------------------------------------------------------------------------------------------

    def lives(self) -> dict[int, tuple[int, int]]:
        """Of each value that has memory: the first and the last operation that reads or writes it."""
        found: dict[int, tuple[int, int]] = {}
        for index, operation in enumerate(self.operations):
            for at in (*operation.reads, *operation.writes):
                found[at.value] = found.get(at.value, (index, index))[0], index
        return found

    def _lay_out(self) -> int:
        """Place the values in the arena; return its bytes."""
        regions = {
            value: Region(self._of_value(value).bytes, *life)
            for value, life in self.lives().items()
            if value not in (IMAGE, self.last)
        }
        total = place(regions.values())
        self.offsets = {value: region.offset for value, region in regions.items()}
        return total


def _takes_any_image(builder: Builder) -> bool:
    """Whether all that reads the image is a stem, whose kernel loads element by element, of any strides and dtype."""
    images = {IMAGE}
    for kind, value, offset, _, target, to_offset, _, *words in builder.steps:
        if value not in images:
            continue
        channels = builder.values[IMAGE][0]
        if kind == COPY and offset == to_offset == 0 and builder.values[target][0] == channels:
            images.add(target)
        elif kind != CONVOLUTION or not (words[0] > 1 and words[0] ** 2 * channels <= 64 and channels < 8):
            return False
    return True
