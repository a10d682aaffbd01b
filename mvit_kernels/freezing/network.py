# SPDX-License-Identifier: Apache-2.0
"""Frozen modules as one native call: a program of steps with packed weights, run by ``csrc/cpu/network.cpp``.

Each frozen module *emits* its steps into a `Builder`: convolutions, inverted residuals, transformers, means and
resizes. `Network` keeps the result for a module and calls it. Savings over one operator per layer: a core takes a
whole image through all steps, so maps stay in its cache; the concatenation in a MobileViT block costs nothing, since
two steps write into one map; nothing is allocated between layers; Python runs once.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Sequence
from itertools import chain
from operator import is_
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from .. import backends
from .._utils.plain import does_nothing, is_plain
from .._utils.transforms import obstacle
from ..backends import cpu
from ..backends.library import TransformerLayerWeights
from ..ops.flops import flop_formula, inverted_residual_flops, layer_flops

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# A program is a list of int64 words, which csrc/cpu/program.cpp parses: VERSION, `Builder.products`, the number of
# values, the number of steps; channels and border of each value; then each step: its number of words, its
# kind, source and target (two `Place`s), and its arguments. Value 0 is the input, the last value the output.
VERSION = 2
COPY, CONVOLUTION, INVERTED_RESIDUAL, TRANSFORMER, TO_WHOLE_PATCHES, TO_SIZE_OF, DEPTHWISE_CONVOLUTION, MEAN = range(8)
_ACTIVATIONS = {None: 0, "silu": 1, "relu": 2}
_TILE = 32  # channels of a step of a product on matrix tiles: parts of a map start at multiples of it
_ONE_PIXEL = 31  # halvings that leave one pixel of any map


class NotNative(Exception):
    """Raised with the reason why a frozen module cannot be part of a network."""


class Place(NamedTuple):
    """A range of adjacent channels of a value, which a step reads or writes."""

    value: int
    offset: int
    channels: int


class Link(Protocol):
    """A frozen module, as `Builder` sees it (`mvit_kernels.freezing.modules`)."""

    in_channels: int

    def emit(self, builder: Builder, source: Place, target: Place | None) -> Place:
        """Append the module's steps and return the place of its output; raises `NotNative` if no steps express it."""

    def place(self, builder: Builder) -> Place | None:
        """Where the module wants its input; None for anywhere."""


class Builder:
    """Builds the program and the weights of a network step by step. The program does not depend on the maps' sizes.

    Args:
        in_channels: channels of the input.
        products: how maps and matrices of bfloat16 are multiplied (`backends.cpu.bf16_products`): as pairs (1), as
            pairs on matrix tiles (2); with 0 everything is float32.
    """

    def __init__(self, in_channels: int, products: int) -> None:
        self.products, self.pairs, self.tiles = products, products > 0, products == 2
        self.odd = False  # whether a channel count is odd, which products of pairs do not support
        self.values = [(in_channels, 0)]  # (channels, border)
        self.halvings = [0]  # of each value: how many times the input's size was halved
        self.steps: list[list[int]] = []
        self.parts: dict[int, list[Place]] = {}  # of the values that `side_by_side` made
        self.takes: list[tuple[Link, int, int]] = []  # blocks that must accept a map: (block, its channels, halvings)
        self._parts: list[Tensor] = []
        self._bytes = 0

    # -- called by frozen modules ---------------------------------------------------------------------------------

    def value(self, channels: int, border: int = 0) -> Place:
        """A new map of `channels` channels, with a border of zeros `border` pixels wide."""
        self.values.append((channels, border))
        self.halvings.append(0)
        self.odd |= bool(channels % 2)
        return Place(len(self.values) - 1, 0, channels)

    def side_by_side(self, *widths: int, border: int = 0) -> list[Place]:
        """The parts of a new map, which several steps write and one convolution reads."""
        starts = [0]
        for width in widths:
            starts.append(starts[-1] + (-(-width // _TILE) * _TILE if self.tiles else width))
        whole = self.value(starts[-2] + widths[-1], border)
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
        out, width, kernel, _ = conv.weight.shape
        weight = conv.weight.detach()
        if source.channels != width:  # weights of zero for channels that the convolution does not have
            parts = self.parts.get(source.value, [source._replace(channels=width)])
            padded = weight.new_zeros(out, source.channels, kernel, kernel)
            for part, of_part in zip(parts, weight.split([part.channels for part in parts], 1), strict=True):
                padded[:, part.offset : part.offset + part.channels] = of_part
            weight = padded
        return self._step(
            CONVOLUTION,
            source,
            target or self.value(out),
            kernel,
            conv.stride[0],
            conv.dilation[0],
            _ACTIVATIONS[conv.activation],
            self._add(_packer("convolution")(self._as_matrix(weight), conv.bias.detach().float())),
            halve=conv.stride[0] == 2,
        )

    def depthwise_convolution(self, conv: nn.Module, source: Place, target: Place | None) -> Place:
        """A depthwise 3×3 `FrozenConv2d`. Its weights are float32 in every arithmetic: nine taps, then the bias."""
        taps = torch.cat((conv.weight.detach().flatten(1).T, conv.bias.detach()[None])).float()
        return self._step(
            DEPTHWISE_CONVOLUTION,
            source,
            target or self.value(source.channels),
            conv.stride[0],
            conv.dilation[0],
            _ACTIVATIONS[conv.activation],
            self._add(taps),
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
        self.odd |= bool(expand.weight.shape[0] % 2)
        return self._step(
            INVERTED_RESIDUAL,
            source,
            target or self.value(project.weight.shape[0]),
            expand.weight.shape[0],
            depthwise.stride[0],
            depthwise.dilation[0],
            int(block.residual),
            self._add(
                _packer("inverted_residual")(
                    *(
                        packed
                        for conv in (expand, depthwise, project)
                        for packed in (self._as_matrix(conv.weight), conv.bias.detach().float())
                    )
                )
            ),
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
        self.odd |= bool((inner // num_heads) % 2 or hidden % 2)
        whole = self._step(TO_WHOLE_PATCHES, source, self.value(d), ph, pw)
        offsets: list[int] = []
        for layer in layers:
            for name, value in layer._asdict().items():
                if value is None:
                    offsets.append(-1)
                elif value.dim() == 2:
                    offsets.append(self._matrix(value, parts=3 if name == "qkv_weight" else 1))
                else:
                    offsets.append(self._vector(value))
        norm = [-1, -1] if final_norm is None else [self._vector(value) for value in final_norm]
        (eps_bits,) = struct.unpack("q", struct.pack("d", eps))
        self._step(TRANSFORMER, whole, whole, num_heads, inner, hidden, len(layers), ph, pw, eps_bits, *norm, *offsets)
        return self.resize(whole, source)

    # -- the result -----------------------------------------------------------------------------------------------

    def program(self) -> Tensor:
        """The program, int64."""
        words = [VERSION, self.products, len(self.values), len(self.steps)]
        words += [word for value in self.values for word in value]
        words += [word for step in self.steps for word in (len(step) + 1, *step)]
        return torch.tensor(words, dtype=torch.int64, device="cpu")

    def weights(self) -> Tensor:
        """All weights in one tensor of bytes, each aligned to 64 bytes."""
        stretch = torch.zeros(self._bytes, dtype=torch.uint8, device="cpu")
        at = 0
        for part in self._parts:
            bytes_ = part.contiguous().flatten().view(torch.uint8)
            stretch[at : at + bytes_.numel()] = bytes_
            at += _aligned(bytes_.numel())
        return stretch

    def _step(self, kind: int, source: Place, target: Place, *words: int, halve: bool = False) -> Place:
        self.halvings[target.value] = min(self.halvings[source.value] + halve, _ONE_PIXEL)
        self.steps.append([kind, *source, *target, *words])
        return target

    def _add(self, part: Tensor) -> int:
        at = self._bytes
        self._parts.append(part)
        self._bytes += _aligned(part.numel() * part.element_size())
        return at

    def _vector(self, values: Tensor) -> int:
        return self._add(values.detach().float())

    def _matrix(self, values: Tensor, parts: int) -> int:
        matrix = self._as_matrix(values)
        return self._add(
            matrix if self.odd else _packer("matrix")(matrix, parts)
        )  # odd: it is built again, without pairs

    def _as_matrix(self, values: Tensor) -> Tensor:
        return values.detach().to(torch.bfloat16 if self.pairs else torch.float32).contiguous()


def _packer(kind: str) -> Callable[..., Tensor]:
    return getattr(torch.ops.mvit_kernels, f"pack_{kind}").cpu


def _aligned(size: int) -> int:
    return -(-size // 64) * 64


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
        # float16 is computed in float32 throughout, with weights packed as that, and rounded once, at the end.
        self._of_maps = torch.float32 if self.dtype == torch.float16 else self.dtype
        builder = _build(module, self.dtype, cpu.bf16_products() if self.dtype == torch.bfloat16 else 0)
        self.program, self.weights = builder.program(), builder.weights()
        self.out_channels, self.halvings = builder.values[-1][0], builder.halvings[-1]
        self.takes = builder.takes
        self._taken: dict[Any, bool] = {}
        self.reads_rows = builder.steps[0][0] != COPY
        # Inner modules, whose hooks it would skip, and the tensors that were packed, whose changes invalidate it.
        self._inner = [part for part in module.modules() if part is not module]
        self._buffers = [part._buffers for part in module.modules() if part._buffers]
        self._packed_from = tuple(chain.from_iterable(map(dict.values, self._buffers)))
        self._generations = [(part, part.generation) for part in module.modules() if hasattr(part, "generation")]

    def is_stale(self) -> bool:
        """Whether something inside has changed since it was built."""
        return any(part.generation != generation for part, generation in self._generations)

    def serves(self, x: Tensor) -> bool:
        """Whether no hook would be skipped, the weights are the packed ones (``torch.func.functional_call`` substitutes
        others), and every block accepts its map (Kornia raises for maps that are not whole patches)."""
        if hooked(self._inner):
            return False
        if not all(map(is_, chain.from_iterable(map(dict.values, self._buffers)), self._packed_from)):
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

    def __call__(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) of any memory format to (B, C', H', W'), channels-last, in the weights' dtype."""
        x = x.to(self.dtype).to(self._of_maps)  # the first rounds images as the weights are, if at all
        if self.reads_rows:
            x = x.contiguous(memory_format=torch.channels_last)
        rows = torch.ops.mvit_kernels.network.cpu(x, self.weights, self.program, self.out_channels, self.halvings)
        return rows.to(self.dtype).permute(0, 3, 1, 2)


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
        and x.device.type == "cpu"
        and x.dim() == 4
        and x.numel() > 0
        and not (x.requires_grad and torch.is_grad_enabled())
        and backends.requested() in (None, "cpu")
        and not obstacle((x,))
        and not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()
    )


def hooks_inside(module: nn.Module) -> bool:
    """Whether a hook would be skipped if the modules inside `module` were not called one by one."""
    return hooked([part for part in module.modules() if part is not module])


def hooked(modules: list[nn.Module]) -> bool:
    if nn.modules.module._has_any_global_hook():
        return True
    return any(part._forward_hooks or part._forward_pre_hooks for part in modules)


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


def _build(module: nn.Module, dtype: torch.dtype, products: int) -> Builder:
    links = links_of(module)
    if not links:
        raise NotNative("it is empty")
    converts = dtype == torch.bfloat16 and not products  # float32 inside, bfloat16 at both ends
    builder = Builder(links[0].in_channels, products)
    place = links[0].place(builder)
    if place is None:
        builder.odd |= bool(links[0].in_channels % 2)
        if converts or builder.tiles:  # which do not read the rows of x in place
            place = builder.value(links[0].in_channels)
    elif products and place == (place.value, 0, builder.values[place.value][0]) and place.channels % 2:
        # An image has three channels: add a fourth of zeros, with zero weights.
        place = place._replace(channels=place.channels + 1)
        builder.values[place.value] = (place.channels, builder.values[place.value][1])
        builder.odd = False
    image = Place(0, 0, links[0].in_channels)
    end = builder.chain(links, image if place is None else builder.copy(image, place))
    if converts:
        builder.copy(end, builder.value(end.channels))
    return _build(module, dtype, products=0) if products and builder.odd else builder
