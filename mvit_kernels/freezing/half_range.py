# SPDX-License-Identifier: Apache-2.0
"""Which inverted residuals may compute in float16 inside: what example images make of them (``freeze(example=…)``).

Example:
    >>> fast = mvit_kernels.freeze(model, dtype=torch.bfloat16, example=images)
    >>> dict(fast.freeze_report.half_ranges)["stages.0.0"].headroom
    412.7

On a GPU, CUDA C++'s kernel of a whole inverted residual has a second form, for bfloat16 and float16 maps: it stores the
expanded map in float16, adds up the depthwise convolution there, two channels an instruction, and projects from there.
It takes 17 to 32 % fewer instructions, and beside bfloat16 it is more exact, with 11 bits in place of 8. But float16
ends at 65504, and its numbers lie 2^-24 apart next to zero. So it is only for blocks of which example images have shown
that nothing comes near either end; the others stay as they are, with filters in float32.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._utils.plain import DTYPES
from .._utils.text import some

LARGEST = 65504.0  # of float16
SPACING = 2.0**-24  # of its numbers next to zero
ROUNDING = 2.0**-9  # half a unit of bfloat16: what rounding the result changes at the most

# Other images may make larger values. Images are bounded, by 0 and 255 or what preprocessing makes of them, and behind
# batch norms the largest value that other images make is seldom twice that of a batch: this is twice that, for what is
# summed (`filtered` is a bound already) and what is stored alike.
HEADROOM = 4.0

_IMAGES = 16  # at a time: the expanded maps of a batch are its largest tensors, here in float32


class HalfRange(NamedTuple):
    """What float16 would have to hold in an inverted residual, on example images.

    Attributes:
        expanded: the largest magnitude of the expanded map, ``silu(expand(x))``.
        filtered: the largest that a sum of the depthwise convolution, or of its first few products, could be with
            values of each channel's largest size.
        weights: the largest magnitude of a filter or of the projection.
        lost: the most by which float16's spacing next to zero could change a result, as a part of the largest one.
    """

    expanded: float
    filtered: float
    weights: float
    lost: float

    @property
    def headroom(self) -> float:
        """How many times as large values of float16 may be, or how many times as small; 0 where one is not finite."""
        if not all(map(math.isfinite, self)) or self.weights > LARGEST:
            return 0.0
        above, below = max(self.expanded, self.filtered), self.lost
        return min(LARGEST / above if above else math.inf, ROUNDING / below if below else math.inf)

    @property
    def reason(self) -> str | None:
        """Why it is not for float16; None if it is."""
        if self.headroom >= HEADROOM:
            return None
        if LARGEST < self.weights < math.inf:
            return f"a weight is {self.weights:.3g}, and float16 ends at 65504"
        if self.headroom == 0:
            return "the example makes values that are not finite in it"
        if LARGEST < HEADROOM * max(self.expanded, self.filtered):
            return (
                f"on the example its expanded map reaches {self.expanded:.3g}, its depthwise sums {self.filtered:.3g}; "
                f"float16 ends at 65504, and room for {HEADROOM:g} times as much is wanted"
            )
        return (
            f"values as small as on the example lie so far apart in float16 that its results could change by "
            f"{self.lost:.2g} of the largest; {ROUNDING / HEADROOM:.2g} is allowed"
        )


class Convolution(Protocol):
    """A frozen convolution, as it is computed here (`mvit_kernels.freezing.modules`)."""

    weight: Tensor
    bias: Tensor
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int


class Block(Protocol):
    """A frozen inverted residual."""

    expand: Convolution
    depthwise: Convolution
    project: Convolution
    residual: bool

    def note_half_range(self, known: HalfRange | None) -> None:
        """Keep what is known of the weights as they are now."""

    def register_forward_pre_hook(self, hook: Any) -> Any:
        """As every module has it."""


def checked(example: object, devices: set[torch.device]) -> list[Tensor]:
    """The batches of an `example` that `freeze` was given, for a model on `devices`.

    Raises:
        TypeError, ValueError: it is none of what is wanted.
    """
    batches = [example] if isinstance(example, Tensor) else example
    wanted = "a batch of images, (B, C, H, W), or a list of such batches, is wanted"
    if not isinstance(batches, Sequence) or isinstance(batches, str):
        raise TypeError(f"freeze: example is {type(example).__name__}; {wanted}")
    if not batches:
        raise ValueError(f"freeze: example has no batches; {wanted}")
    for index, batch in enumerate(batches):
        name = "example" if batch is example else f"example[{index}]"
        if not isinstance(batch, Tensor):
            raise TypeError(f"freeze: {name} is {type(batch).__name__}; {wanted}")
        if batch.dtype not in DTYPES:
            raise TypeError(
                f"freeze: {name} is {batch.dtype}; float images, scaled and normalized as the model wants them, are "
                "wanted"
            )
        if batch.dim() != 4 or batch.numel() == 0:
            raise ValueError(f"freeze: {name} has shape {tuple(batch.shape)}; {wanted}")
        if devices and batch.device not in devices:
            where = sorted(map(str, devices))
            raise ValueError(
                f"freeze: {name} is on {batch.device} and the model on {some(where)}; move it with .to({where[0]!r})"
            )
        if batch.device.type == "meta" or not torch.isfinite(batch).all():
            raise ValueError(f"freeze: {name} has values that are not finite; give images as the model will see them")
    return [batch.detach() for batch in batches]


def measure(model: nn.Module, blocks: Mapping[str, Block], batches: Iterable[Tensor]) -> dict[str, HalfRange]:
    """What float16 would have to hold in each block while `model`, frozen, computes `batches`; note it in the block.

    The model runs part by part, as its library's code has it, and each block's maps are computed once more in float32.
    Blocks that it does not call are left out.

    Raises:
        ValueError: the model raises for a batch.
    """
    found = {name: _Largest(block) for name, block in blocks.items()}
    composing = [module for module in model.modules() if hasattr(module, "composed")]
    hooks = [blocks[name].register_forward_pre_hook(largest.see) for name, largest in found.items()]
    try:
        for module in composing:
            module._composes = True  # nothing is packed or compiled for parts that are never called again
        for batch in batches:
            _run(model, batch)
    finally:
        for hook in hooks:
            hook.remove()
        for module in composing:
            module.__dict__.pop("_composes", None)
    ranges = {name: largest.range() for name, largest in found.items() if largest.expanded is not None}
    for name, known in ranges.items():
        blocks[name].note_half_range(known)
    return ranges


def ranges_of(model: nn.Module) -> dict[str, HalfRange]:
    """What is known of the inverted residuals in a frozen model, by their paths: of those whose weights are still the
    ones that were measured."""
    known = {name: getattr(module, "half_range", None) for name, module in model.named_modules()}
    return {name: found for name, found in known.items() if found is not None}


def _run(model: nn.Module, batch: Tensor) -> None:
    for images in batch.split(_IMAGES):
        try:
            with torch.no_grad(), torch.autocast(images.device.type, enabled=False):
                model(images)
        except (TypeError, ValueError, RuntimeError) as error:
            raise ValueError(
                f"freeze: the model does not take the example, {images.dtype} of {tuple(images.shape)}: {error}"
            ) from error


class _Largest:
    """The largest values of one block so far."""

    def __init__(self, block: Block) -> None:
        self.block = block
        self.expanded: Tensor | None = None  # of each hidden channel
        self.result = 0.0

    def see(self, block: nn.Module, inputs: tuple[Any, ...]) -> None:
        block = self.block
        x = inputs[0].detach().float()
        wide = F.silu(_computed(block.expand, x))
        y = _computed(block.project, F.silu(_computed(block.depthwise, wide)))
        largest = wide.abs().amax((0, 2, 3))
        self.expanded = largest if self.expanded is None else torch.maximum(self.expanded, largest)
        self.result = max(self.result, float((y + x if block.residual else y).abs().max()))

    def range(self) -> HalfRange:
        assert self.expanded is not None, "it has seen nothing"
        x = self.expanded.double()
        # As the kernel has them: halved before a SiLU, silu(2u) = u + u · tanh u.
        taps, bias = self.block.depthwise.weight.double().flatten(1) / 2, self.block.depthwise.bias.double() / 2
        project = self.block.project.weight.double().flatten(1)
        filtered = 2 * (bias.abs() + taps.abs().sum(1) * x)
        # Next to zero a number is rounded by half a spacing at the most, which is a standard deviation of half / √3:
        # each value of the window, each of ten partial sums, what SiLU makes of them (its slope is at most 2 · 1.1),
        # all independently; of the sum over channels four standard deviations. What weights lose is known.
        half = SPACING / 2
        slope = 2 * 1.1
        variances = 1 + slope**2 * (taps.square().sum(1) + 10)
        lost = 4 / 3**0.5 * half * (project.square() @ variances).sqrt()
        lost += project.abs() @ (slope * x * _lost(taps).sum(1)) + _lost(project) @ filtered
        lost = float(lost.max())
        taps, project = taps.abs(), project.abs()
        return HalfRange(
            expanded=float(x.max()),
            filtered=float(filtered.max()),
            weights=max(float(taps.max()), float(project.max())),
            lost=lost / self.result if self.result else math.inf if lost else 0.0,
        )


def _lost(weights: Tensor) -> Tensor:
    """What each of the weights loses that float16 only has as multiples of its spacing next to zero."""
    return (weights - weights.half()).abs() * (weights.abs() < 2.0**-14)


def _computed(conv: Convolution, x: Tensor) -> Tensor:
    """A frozen convolution in float32, without its activation."""
    weight, bias = conv.weight.float(), conv.bias.float()
    return F.conv2d(x, weight, bias, conv.stride, conv.padding, conv.dilation, conv.groups)
