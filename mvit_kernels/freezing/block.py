# SPDX-License-Identifier: Apache-2.0
"""The frozen MobileViT block, which `freeze` puts in place of any library's block."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .. import backends
from ..adapters._block import FrozenBlock
from ..backends import Serving
from ..ops import TransformerLayerWeights, transformer_on_map
from ..ops.serving import transformer_serving
from .frozen import Frozen
from .program import Builder, NotNative, Place, links_of


class FrozenMobileViTBlock(FrozenBlock, Frozen):
    """A MobileViT block of any library for inference: convolutions frozen, transformer weights joined and cast once.

    Args:
        downsampling, before, after, fusion, input_first: as in ``adapters._block.BlockParts``.
        layers: `TransformerLayerWeights` of each layer.
        final_norm: (weight, bias) of the last LayerNorm, or None.
        num_heads, patch_size, eps, backend: as in `mvit_kernels.transformer`.
        fallback, takes: where ``takes(fallback, x)`` is false, or the input is not a single tensor, the library's own
            block `fallback` serves the call: maps for which Kornia raises, maps that cvnets normalizes differently, and
            video tuples. It is not a submodule of this module, and reads this module's weights.
        tied: (module of `fallback`, name of its parameter, name of the buffer here) of each weight that both use.
    """

    def __init__(
        self,
        *,
        downsampling: nn.Module | None,
        before: Sequence[nn.Module],
        layers: Sequence[TransformerLayerWeights],
        final_norm: tuple[Tensor, Tensor] | None,
        after: Sequence[nn.Module],
        fusion: nn.Module | None,
        input_first: bool,
        num_heads: int,
        patch_size: tuple[int, int],
        eps: float,
        fallback: nn.Module | None = None,
        takes: Callable[[nn.Module, Tensor], bool] | None = None,
        tied: Sequence[tuple[nn.Module, str, str]] = (),
        backend: str | None = None,
    ) -> None:
        super().__init__()
        self.downsampling = downsampling
        self.before, self.after, self.fusion = nn.Sequential(*before), nn.Sequential(*after), fusion
        self.input_first, self.num_heads, self.patch_size, self.eps = input_first, num_heads, patch_size, eps
        self.takes, self.backend, self.num_layers = takes, backend, len(layers)
        for index, layer in enumerate(layers):
            for name, value in layer._asdict().items():
                self.register_buffer(f"layer{index}_{name}", value)
        for name, value in zip(("weight", "bias"), final_norm or (None, None), strict=True):
            self.register_buffer(f"final_norm_{name}", value)
        self.__dict__["fallback"], self.tied = fallback, tuple(tied)
        self._tie()

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.fallback is not None and (args or kwargs or not isinstance(x, Tensor)):
            return self.fallback(x, *args, **kwargs)
        return super().forward(x)

    def _tie(self) -> None:
        """Make the fallback read this module's buffers."""
        for module, name, buffer in self.tied:
            module._parameters.pop(name, None)
            module._buffers[name] = self._buffers[buffer]

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        super()._apply(*args, **kwargs)
        self._tie()
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._tie()  # assign=True replaces the tensors

    @property
    def in_channels(self) -> int:
        return links_of(self.before if self.downsampling is None else self.downsampling)[0].in_channels

    def place(self, builder: Builder) -> Place | None:
        return self._joint_place(builder) if self.downsampling is None else self.downsampling.place(builder)

    def _joint_place(self, builder: Builder) -> Place | None:
        """The input's channels of the concatenated map that the fusion reads; the other channels are the result's."""
        first, last = links_of(self.before)[0], links_of(self.after)[-1]
        if self.fusion is None:
            return first.place(builder)
        width = last.weight.shape[0]
        readers = (first, links_of(self.fusion)[0])
        border = max(conv.dilation[0] * (conv.weight.shape[2] // 2) for conv in readers)
        widths = (first.in_channels, width) if self.input_first else (width, first.in_channels)
        return builder.side_by_side(*widths, border=border)[0 if self.input_first else 1]

    def emit(self, builder: Builder, source: Place, target: Place | None) -> Place:
        if self.backend not in (None, "auto", *builder.backends):
            raise NotNative(f"backend {self.backend!r} was requested")
        if self.takes is not None:
            builder.takes.append((self, source.channels, builder.halvings[source.value]))
        if self.downsampling is not None:
            source = builder.chain(links_of(self.downsampling), source, self._joint_place(builder))
        y = builder.chain(links_of(self.before), source)
        y = builder.transformer(y, self.layers(), self.final_norm(), self.num_heads, self.patch_size, self.eps)
        if self.fusion is None:
            return builder.chain(links_of(self.after), y, target)
        builder.chain(links_of(self.after), y, builder.parts[source.value][1 if self.input_first else 0])
        return builder.chain(links_of(self.fusion), builder.whole(source), target)

    def composed(self, x: Tensor) -> Tensor:
        if self.takes is not None and not self.takes(self.fallback, x):
            return self.fallback(x)
        if self.downsampling is not None:
            x = self.downsampling(x)
        y = self.before(x)
        y = transformer_on_map(
            y,
            self.layers(),
            self.final_norm(),
            num_heads=self.num_heads,
            patch_size=self.patch_size,
            eps=self.eps,
            backend=self.backend,
        )
        y = self.after(y)
        if self.fusion is None:
            return y
        x = x.to(y.dtype)
        return self.fusion(torch.cat((x, y) if self.input_first else (y, x), dim=1))

    def serving(self) -> Serving:
        layers = self.layers()
        weight = layers[0].proj_weight
        return transformer_serving(
            weight.shape[0],
            [(layer.proj_weight.shape[1], layer.fc1_weight.shape[0]) for layer in layers],
            final_norm=self.final_norm() is not None,
            num_heads=self.num_heads,
            patch_size=self.patch_size,
            device=weight.device,
            dtype=weight.dtype,
            training=False,
            backend=self.backend,
        )

    def pack(self) -> None:
        """Let the backend that will serve the transformer pack its weights now instead of at the first call."""
        layers = self.layers()
        backends.pack(layers, self.final_norm(), self.num_heads, layers[0].proj_weight.dtype)

    def layers(self) -> list[TransformerLayerWeights]:
        """The weights of each transformer layer."""
        return [
            TransformerLayerWeights(
                *(self._buffers[f"layer{index}_{name}"] for name in TransformerLayerWeights._fields)
            )
            for index in range(self.num_layers)
        ]

    def final_norm(self) -> tuple[Tensor, Tensor] | None:
        """(weight, bias) of the last LayerNorm, or None."""
        return None if self.final_norm_weight is None else (self.final_norm_weight, self.final_norm_bias)
