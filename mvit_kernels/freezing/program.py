# SPDX-License-Identifier: Apache-2.0
"""The program of a frozen network, as it is stored: the same for every processor.

Each frozen module *emits* its steps into a `Builder`: convolutions, inverted residuals, transformers, means and
resizes. The result, a `Stored` network, is what a file holds (`mvit_kernels.freezing.saved`), and what
``csrc/cpu/pack_program.cpp`` makes this processor's program of (`mvit_kernels.freezing.network`).
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from .. import backends
from .._utils.plain import does_nothing, is_plain
from ..backends.library import TransformerLayerWeights

# The words of a stored program: csrc/cpu/pack_program.h.
VERSION = 1
STORED_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
COPY, CONVOLUTION, INVERTED_RESIDUAL, TRANSFORMER, TO_WHOLE_PATCHES, TO_SIZE_OF, DEPTHWISE_CONVOLUTION, MEAN = range(8)
_ACTIVATIONS = {None: 0, "silu": 1, "relu": 2}
_ONE_PIXEL = 31  # halvings that leave one pixel of any map


class NotNative(Exception):
    """Raised with the reason why a frozen module cannot be part of a network."""

    about: object = None  # the kind of native call that there is not, and the backend asked for
    lasts = True  # until the module changes

    def about_kind(self, kind: type) -> NotNative:
        """The reason, noted to be one against calls of `kind` with the backend that is asked for now."""
        self.about = kind, backends.requested()
        return self


class Place(NamedTuple):
    """A range of adjacent channels of a value, which a step reads or writes."""

    value: int
    offset: int
    channels: int


class Link(Protocol):
    """A frozen module, as `Builder` sees it (`mvit_kernels.freezing.frozen`)."""

    in_channels: int

    def emit(self, builder: Builder, source: Place, target: Place | None) -> Place:
        """Append the module's steps and return the place of its output; raises `NotNative` if no steps express it."""

    def place(self, builder: Builder) -> Place | None:
        """Where the module wants its input; None for anywhere."""


class Stored(NamedTuple):
    """A network for any processor: its program and its weights, in PyTorch's own order."""

    program: Tensor  # int64 words
    weights: Tensor  # bytes; each tensor begins at a multiple of 64
    dtype: torch.dtype  # of matrices, filters and maps; vectors are float32
    out_channels: int
    halvings: int  # how many times each side of the input is halved, rounding up


class Stack(NamedTuple):
    """The transformer of a step, with the module's own weights."""

    layers: Sequence[TransformerLayerWeights]
    final_norm: Sequence[Tensor] | None
    num_heads: int
    patch_size: tuple[int, int]
    eps: float


class Builder:
    """Builds the program and the weights of a network step by step. The program does not depend on the maps' sizes.

    Args:
        in_channels: channels of the input.
        dtype: of the weights: float32, bfloat16 or float16.
        backends: those that a block may ask for by name.
    """

    def __init__(self, in_channels: int, dtype: torch.dtype, backends: Sequence[str] = ("cpu",)) -> None:
        self.dtype, self.backends = dtype, tuple(backends)
        self.values = [(in_channels, 0)]  # (channels, border)
        self.halvings = [0]  # of each value: how many times the input's size was halved
        self.steps: list[list[int]] = []
        self.parts: dict[int, list[Place]] = {}  # of the values that `side_by_side` made
        self.takes: list[tuple[Link, int, int]] = []  # blocks that must accept a map: (block, its channels, halvings)
        self.stacks: dict[int, Stack] = {}  # the transformer of each step that is one
        self.half_filters: set[int] = set()  # steps that are inverted residuals known to be within float16's range
        self._parts: list[Tensor] = []
        self._addresses: dict[int, int] = {}  # -> the index of the part there
        self._bytes = 0

    # -- called by frozen modules ---------------------------------------------------------------------------------

    def value(self, channels: int, border: int = 0) -> Place:
        """A new map of `channels` channels, with a border of zeros `border` pixels wide."""
        self.values.append((channels, border))
        self.halvings.append(0)
        return Place(len(self.values) - 1, 0, channels)

    def side_by_side(self, *widths: int, border: int = 0) -> list[Place]:
        """The parts of a new map, which several steps write and one convolution reads."""
        starts = [0, *accumulate(widths)]
        whole = self.value(starts[-1], border)
        self.parts[whole.value] = [
            whole._replace(offset=at, channels=width) for at, width in zip(starts, widths, strict=False)
        ]
        return self.parts[whole.value]

    def whole(self, part: Place) -> Place:
        """All channels of the value that `part` belongs to."""
        return Place(part.value, 0, self.values[part.value][0])

    def chain(self, links: Iterable[Link], source: Place, target: Place | None = None) -> Place:
        """Emit `links` in sequence; each writes where the next one wants its input, the last one to `target`."""
        links = list(links)
        for link, following in zip(links, [*links[1:], None], strict=True):
            source = link.emit(self, source, following.place(self) if following is not None else target)
        return source

    def copy(self, source: Place, target: Place) -> Place:
        """Copy channels to another layout or dtype; additional channels of the target become zeros."""
        return self._step(COPY, source, target)

    def convolution(self, conv: nn.Module, source: Place, target: Place | None) -> Place:
        """A dense `FrozenConv2d`, 1×1 or 3×3."""
        return self._step(
            CONVOLUTION,
            source,
            target or self.value(conv.weight.shape[0]),
            conv.weight.shape[2],
            *self._geometry(conv),
            *self._convolution(conv),
            halve=conv.stride[0] == 2,
        )

    def depthwise_convolution(self, conv: nn.Module, source: Place, target: Place | None) -> Place:
        """A depthwise 3×3 `FrozenConv2d`."""
        return self._step(
            DEPTHWISE_CONVOLUTION,
            source,
            target or self.value(source.channels),
            *self._geometry(conv),
            *self._convolution(conv),
            halve=conv.stride[0] == 2,
        )

    def mean(self, source: Place, target: Place | None = None) -> Place:
        """The mean over all pixels: a map of one."""
        target = self._step(MEAN, source, target or self.value(source.channels))
        self.halvings[target.value] = _ONE_PIXEL
        return target

    def resize(self, source: Place, like: Place, target: Place | None = None) -> Place:
        """Resize to the size of the map `like`; a single pixel is repeated."""
        target = self._step(TO_SIZE_OF, source, target or self.value(source.channels), like.value)
        self.halvings[target.value] = self.halvings[like.value]
        return target

    def inverted_residual(self, block: nn.Module, source: Place, target: Place | None) -> Place:
        """A `FrozenInvertedResidual`."""
        expand, depthwise, project = block.expand, block.depthwise, block.project
        if block.half_range is not None and block.half_range.reason is None:
            self.half_filters.add(len(self.steps))
        return self._step(
            INVERTED_RESIDUAL,
            source,
            target or self.value(project.weight.shape[0]),
            expand.weight.shape[0],
            depthwise.stride[0],
            depthwise.dilation[0],
            int(block.residual),
            *(address for conv in (expand, depthwise, project) for address in self._convolution(conv)),
            halve=depthwise.stride[0] == 2,
        )

    def transformer(
        self,
        source: Place,
        layers: Sequence[TransformerLayerWeights],
        final_norm: Sequence[Tensor] | None,
        num_heads: int,
        patch_size: tuple[int, int],
        eps: float,
    ) -> Place:
        """Transformer layers and final norm; the map is resized to whole patches before, and back afterwards."""
        d, (ph, pw) = source.channels, patch_size
        if self.values[source.value] != (d, 0):
            raise NotNative("its transformer works on a part of a map")
        inner, hidden = layers[0].proj_weight.shape[1], layers[0].fc1_weight.shape[0]
        if any(layer.proj_weight.shape[1] != inner or layer.fc1_weight.shape[0] != hidden for layer in layers):
            raise NotNative("its layers have different widths")
        whole = self._step(TO_WHOLE_PATCHES, source, self.value(d), ph, pw)
        offsets = [self._tensor(value) for layer in layers for value in layer]
        norm = [self._tensor(value) for value in final_norm or (None, None)]
        (eps_bits,) = struct.unpack("q", struct.pack("d", eps))
        self.stacks[len(self.steps)] = Stack(layers, final_norm, num_heads, patch_size, eps)
        self._step(TRANSFORMER, whole, whole, num_heads, inner, hidden, len(layers), ph, pw, eps_bits, *norm, *offsets)
        return self.resize(whole, source)

    def tensor(self, address: int) -> Tensor:
        """The tensor at `address`, which a step has: contiguous, on its own device; see `_tensor`."""
        return self._parts[self._addresses[address]]

    def drop_tensors(self) -> None:
        """Let go of the tensors, of which some are copies: for whoever has packed them and keeps the steps."""
        self._parts.clear()
        self._addresses.clear()

    # -- the result -----------------------------------------------------------------------------------------------

    def stored(self) -> Stored:
        """The network as it stands, with the last value as its result."""
        words = [VERSION, STORED_TYPES[self.dtype], len(self.values), len(self.steps)]
        for value, (channels, border) in enumerate(self.values):
            widths = [part.channels for part in self.parts.get(value, [])] or [channels]
            words += [channels, border, len(widths), *widths]
        words += [word for step in self.steps for word in (len(step) + 1, *step)]
        weights = torch.zeros(self._bytes, dtype=torch.uint8, device="cpu")
        at = 0
        for part in self._parts:
            bytes_ = part.flatten().view(torch.uint8)
            weights[at : at + bytes_.numel()] = bytes_
            at += _aligned(bytes_.numel())
        program = torch.tensor(words, dtype=torch.int64, device="cpu")
        return Stored(program, weights, self.dtype, self.values[-1][0], self.halvings[-1])

    def _step(self, kind: int, source: Place, target: Place, *words: int, halve: bool = False) -> Place:
        self.halvings[target.value] = min(self.halvings[source.value] + halve, _ONE_PIXEL)
        self.steps.append([kind, *source, *target, *words])
        return target

    @staticmethod
    def _geometry(conv: nn.Module) -> tuple[int, int, int]:
        return conv.stride[0], conv.dilation[0], _ACTIVATIONS[conv.activation]

    def _convolution(self, conv: nn.Module) -> tuple[int, int]:
        """Addresses of a `FrozenConv2d`'s weight and bias."""
        return self._tensor(conv.weight), self._tensor(conv.bias)

    def _tensor(self, values: Tensor | None) -> int:
        """The address of a tensor: matrices and filters in the network's dtype, vectors in float32; -1 for none."""
        if values is None:
            return -1
        at = self._bytes
        self._addresses[at] = len(self._parts)
        self._parts.append(values.detach().to(torch.float32 if values.dim() == 1 else self.dtype).contiguous())
        self._bytes += _aligned(self._parts[-1].numel() * self._parts[-1].element_size())
        return at


def _aligned(size: int) -> int:
    return -(-size // 64) * 64


def target_size(
    kind: int, words: Sequence[int], source: tuple[int, int], sizes: Mapping[int, tuple[int, int]]
) -> tuple[int, int]:
    """The (height, width) of the map that a step writes.

    Args:
        kind: of the step.
        words: those behind its places, stored or packed.
        source: the size of the map that it reads.
        sizes: of the values so far.
    """
    height, width = source
    if kind in (CONVOLUTION, INVERTED_RESIDUAL, DEPTHWISE_CONVOLUTION):
        stride = words[0 if kind == DEPTHWISE_CONVOLUTION else 1]
        return (height - 1) // stride + 1, (width - 1) // stride + 1
    if kind == TO_WHOLE_PATCHES:
        return -(-height // words[0]) * words[0], -(-width // words[1]) * words[1]
    if kind == TO_SIZE_OF:
        return sizes[words[0]]
    return (1, 1) if kind == MEAN else source


def links_of(module: nn.Module) -> list[Link]:
    """The frozen modules that make up a call of `module`, in order; raises `NotNative` if there is another module."""
    if does_nothing(module):
        return []
    if hasattr(module, "links"):
        return module.links()
    if is_plain(module, nn.Sequential):
        return [link for child in module for link in links_of(child)]
    if not hasattr(module, "emit"):
        raise NotNative(f"it contains a {type(module).__name__}")
    return [module]


def build(module: nn.Module, dtype: torch.dtype, backends: Sequence[str] = ("cpu",)) -> Builder:
    """The builder with all steps of a frozen module, whose weights have `dtype` (see `Builder`)."""
    links = links_of(module)
    if not links:
        raise NotNative("it is empty")
    builder = Builder(links[0].in_channels, dtype, backends)
    place, image = links[0].place(builder), Place(0, 0, links[0].in_channels)
    builder.chain(links, image if place is None else builder.copy(image, place))
    return builder
