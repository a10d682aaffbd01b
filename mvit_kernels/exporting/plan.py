# SPDX-License-Identifier: Apache-2.0
"""What is to be written, what a file contains, and what a model's outputs are called in a file."""

from __future__ import annotations

from collections import Counter
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..verification import named_outputs

IMAGES = "images"  # the input's name in every file


class Plan(NamedTuple):
    """What a target is asked to write: the same for all of them."""

    sizes: tuple[tuple[int, int], ...]  # (height, width) of the images; the first is the example's
    outputs: tuple[str, ...] = ("output",)  # names, each usable as an identifier
    batch: int = 1  # of the example, and of the file unless `dynamic_batch`
    channels: int = 3
    dtype: torch.dtype = torch.float32  # of weights and arithmetic; images and outputs are float32
    dynamic_batch: bool = False
    dynamic_size: bool = False  # any size; `sizes` has then one, the example's
    attention: str = "products"  # how the plain form computes it: a method of `plain.TransformerLayer`
    opset: int = 18  # of ONNX's operators

    def example(self, size: tuple[int, int] | None = None, seed: int = 0) -> Tensor:
        """Random images (batch, channels, height, width) in [0, 1), float32, of `size` or else of the first size."""
        generator = torch.Generator().manual_seed(seed)
        shape = (self.batch, self.channels, *(size or self.sizes[0]))
        return torch.rand(shape, generator=generator, device="cpu")


class Contents(NamedTuple):
    """What a written file consists of."""

    nodes: Counter[str]  # how many nodes of each kind, by the target's own names, without constants
    transposes: int  # of them, nodes that permute axes
    highest_rank: int | None = None  # of a tensor; None where the file does not say


class FlatOutputs(nn.Module):
    """A model with its outputs in a tuple, whatever their structure, as float32: the graphs of files know no other.

    Args:
        model: takes images; its outputs are what `named_outputs` finds.
        dtype: that the model computes in.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.model, self.dtype = model, dtype

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        if self.dtype == torch.float32:
            return tuple(named_outputs(self.model(images)).values())
        outputs = named_outputs(self.model(images.to(self.dtype)))
        return tuple(value.float() for value in outputs.values())


def output_names(output: Any) -> tuple[str, ...]:
    """The names of a model's outputs in a file, in order: "output" of a single tensor; "logits" of a class's field;
    "output0" of a list's first."""
    names = (name.removeprefix("output.") for name in named_outputs(output))
    return tuple(f"output{name}" if name.isdigit() else name for name in names)


def outputs_by_name(output: Any) -> dict[str, Tensor]:
    """A model's outputs under the names that a file gives them."""
    return dict(zip(output_names(output), named_outputs(output).values(), strict=True))
