# SPDX-License-Identifier: Apache-2.0
"""The operators' operands at each stage of MobileViT, and the arithmetic of such a call.

Example:
    >>> stage = stages(["s"], 256, batch=8)[0]
    >>> stage, stage.tokens, stage.sequence
    (Stage(variant='s', index=3, layers=2, width=144, side=32, batch=8), 8192, 256)
    >>> case = operands("patch_attention", stage)
    >>> case.public(*case.tensors).shape, case.work.gflop
    (torch.Size([8, 32, 32, 144]), 1.2...)

FLOPs count products only, two for a multiply-add; LayerNorm, softmax and SiLU cost time but are not counted. With T
tokens of width d in sequences of N tokens, a transformer layer does T · (16 d² + 4 N d) FLOPs: qkv 6 d², output
projection 2 d², MLP 8 d², scores and weighted values 2 N d each. Bytes are the minimum that must move: every input read
once, every result written once.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from ... import ops
from ...backends import reference
from ...backends.library import SCHEMAS, raw
from ...nn.mobilevit import _DEPTHS, _VARIANTS
from ...ops import transformer_on_map
from ..ceilings import Work

HEADS, PATCH, EPS = 4, (2, 2), 1e-5
OPERATORS = tuple(name for name in SCHEMAS if not name.endswith("_backward"))
VARIANTS = ("s", "xs", "xxs")


class Stage(NamedTuple):
    """The transformer of one stage of the network, on `batch` maps."""

    variant: str
    index: int  # 3, 4 or 5
    layers: int
    width: int
    side: int  # of the map, in tokens
    batch: int

    @property
    def tokens(self) -> int:
        return self.batch * self.side**2

    @property
    def sequence(self) -> int:
        return (self.side // PATCH[0]) ** 2


def stages(variants: Iterable[str], size: int, batch: int) -> list[Stage]:
    """Every stage of `variants` for images of `size` px; map sides are rounded up to multiples of the patch."""
    found = []
    for variant in variants:
        for index, (width, layers) in enumerate(zip(_VARIANTS[variant].dims, _DEPTHS, strict=True)):
            side = -(-size // (8 << index))
            found.append(Stage(variant, 3 + index, layers, width, -(-side // PATCH[0]) * PATCH[0], batch))
    return found


class Operands(NamedTuple):
    """One operator and its operands."""

    operator: str
    tensors: tuple[Tensor, ...]  # positional arguments
    activations: tuple[int, ...]  # indices of the tensors that are maps; all others are weights
    constants: tuple  # further arguments of the raw operator
    public: Callable[..., Tensor]  # (*tensors, backend=None) -> result
    plain: Callable[..., Tensor]  # (*tensors) -> result: PyTorch's composition
    flop: int  # of one forward pass

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the tensors."""
        if self.operator == "transformer":
            layers, fields = (len(self.tensors) - 3) // 12, ops.TransformerLayerWeights._fields
            weights = (f"layers[{i}].{field}" for i in range(layers) for field in fields)
            return ("x", *weights, "final_norm_weight", "final_norm_bias")
        return tuple(a.name for a in raw(self.operator, "reference")._schema.arguments[: len(self.tensors)])

    @property
    def work(self) -> Work:
        """The work of a forward pass."""
        return self._work(1, 1, 1, 1)

    @property
    def training_work(self) -> Work:
        """The work of forward and backward: a product has two gradients, each a product of the same size. Backward
        reads the maps, the weights and the result's gradient once, and writes all gradients."""
        return self._work(3, 3, 2, 3)

    def _work(self, products: int, maps: int, results: int, weights: int) -> Work:
        inputs = sum(self.tensors[i].nbytes for i in self.activations)
        parameters = sum(t.nbytes for i, t in enumerate(self.tensors) if i not in self.activations)
        moved = maps * inputs + results * self.result_bytes + weights * parameters
        return Work(products * self.flop / 1e9, moved / 1e6)

    @property
    def result_bytes(self) -> int:
        with torch.no_grad():
            meta = self.to(device="meta")
            return meta.plain(*meta.tensors).nbytes

    def to(self, *args: object, **options: object) -> Operands:
        """The same operands with every tensor converted by ``Tensor.to``."""
        return self._replace(tensors=tuple(t.to(*args, **options) for t in self.tensors))

    def with_maps(self, draw: Callable[[Tensor], Tensor]) -> tuple[Tensor, ...]:
        """The tensors, with each map replaced by ``draw(map)``."""
        return tuple(draw(t) if i in self.activations else t for i, t in enumerate(self.tensors))


def operands(operator: str, stage: Stage, *, seed: int = 0) -> Operands:
    """Random operands of `operator`, float32 on the CPU, as the stage's transformer calls it.

    ``inverted_residual`` is the block that opens the stage: stride 2, from the previous stage's channels to this one's.

    Raises:
        ValueError: an unknown operator.
    """
    generator = torch.Generator().manual_seed(seed)
    d, tokens, map_shape = stage.width, stage.tokens, (stage.batch, stage.side, stage.side)

    def random(*shape: int, std: float = 1.0, mean: float = 0.0) -> Tensor:
        return torch.randn(shape, generator=generator, device="cpu") * std + mean

    def linear(out: int, width: int) -> tuple[Tensor, Tensor]:
        return random(out, width, std=width**-0.5), random(out, std=0.1)

    def norm() -> tuple[Tensor, Tensor]:
        return random(d, std=0.1, mean=1.0), random(d, std=0.1)

    if operator == "batch_norm_activation":  # channels-last, as behind a convolution
        x = random(*map_shape, d).permute(0, 3, 1, 2)
        return Operands(
            operator,
            (x, *norm()),
            (0,),
            (EPS, "silu"),
            lambda *t, backend=None: ops.batch_norm_activation(*t, eps=EPS, backend=backend),
            lambda *t: reference.batch_norm_activation(*t, None, None, 0.0, EPS, "silu"),
            0,
        )
    if operator == "layer_norm":
        return Operands(
            operator,
            (random(*map_shape, d), *norm()),
            (0,),
            (EPS,),
            ops.layer_norm,
            lambda *t: reference.layer_norm(*t, EPS),
            0,
        )
    if operator == "layer_norm_linear":
        return Operands(
            operator,
            (random(*map_shape, d), *norm(), *linear(3 * d, d)),
            (0,),
            (EPS, ""),
            ops.layer_norm_linear,
            lambda *t: reference.layer_norm_linear(*t, EPS),
            tokens * 6 * d * d,
        )
    if operator == "patch_attention":
        scale = (d // HEADS) ** -0.5
        return Operands(
            operator,
            (random(*map_shape, 3 * d),),
            (0,),
            (HEADS, PATCH, scale),
            functools.partial(ops.patch_attention, num_heads=HEADS, patch_size=PATCH),
            lambda qkv: reference.patch_attention(qkv, HEADS, PATCH, scale),
            tokens * 4 * stage.sequence * d,
        )
    if operator == "linear_residual":
        return Operands(
            operator,
            (random(*map_shape, d), *linear(d, d), random(*map_shape, d)),
            (0, 3),
            (),
            ops.linear_residual,
            reference.linear_residual,
            tokens * 2 * d * d,
        )
    if operator == "layer_norm_mlp":
        return Operands(
            operator,
            (random(*map_shape, d), *norm(), *linear(2 * d, d), *linear(d, 2 * d)),
            (0,),
            (EPS,),
            ops.layer_norm_mlp,
            lambda *t: reference.layer_norm_mlp(*t, EPS),
            tokens * 8 * d * d,
        )
    if operator == "inverted_residual":
        variant = _VARIANTS[stage.variant]
        before, after = variant.channels[stage.index - 2 : stage.index]
        hidden, side = int(before * variant.expand_ratio), 2 * stage.side
        return Operands(
            operator,
            (
                random(stage.batch, side, side, before),
                *linear(hidden, before),
                random(hidden, 1, 3, 3, std=1 / 3),
                random(hidden, std=0.1),
                *linear(after, hidden),
            ),
            (0,),
            (2, 1, False),
            functools.partial(ops.inverted_residual, stride=2),
            lambda *t: reference.inverted_residual(*t, 2, 1, False),
            2 * hidden * (4 * tokens * before + tokens * (9 + after)),
        )

    def layer() -> tuple[Tensor, ...]:
        return (*norm(), *linear(3 * d, d), *linear(d, d), *norm(), *linear(2 * d, d), *linear(d, 2 * d))

    if operator == "transformer_layer":
        return Operands(
            operator,
            (random(*map_shape, d), *layer()),
            (0,),
            (None, HEADS, PATCH, EPS, [0.0] * 4, True),  # without a seed: no dropout
            _public_layer,
            lambda x, *t: reference.transformer_layer(x, t, HEADS, PATCH, EPS),
            tokens * (16 * d * d + 4 * stage.sequence * d),
        )
    if operator == "transformer":
        layers = [t for _ in range(stage.layers) for t in layer()]
        return Operands(
            operator,
            (random(*map_shape, d), *layers, *norm()),
            (0,),
            (HEADS, PATCH, EPS),
            _public_transformer,
            lambda x, *t: reference.transformer(x, _grouped(t[:-2]), t[-2:], HEADS, PATCH, EPS),
            stage.layers * tokens * (16 * d * d + 4 * stage.sequence * d),
        )
    raise ValueError(f"operands: unknown operator {operator!r}; choose from {', '.join(OPERATORS)}")


def _public_layer(x: Tensor, *t: Tensor, backend: str | None = None) -> Tensor:
    layer = ops.TransformerLayerWeights(*t)
    return ops.transformer_layer(x, layer, num_heads=HEADS, patch_size=PATCH, eps=EPS, backend=backend)


def _public_transformer(x: Tensor, *t: Tensor, backend: str | None = None) -> Tensor:
    """The operator, or the stack as accelerated blocks train it if a gradient is needed: the operator has none."""
    layers = [ops.TransformerLayerWeights(*layer) for layer in _grouped(t[:-2])]
    options = dict(num_heads=HEADS, patch_size=PATCH, eps=EPS, backend=backend)
    if torch.is_grad_enabled() and x.requires_grad:
        return transformer_on_map(x.permute(0, 3, 1, 2), layers, t[-2:], **options).permute(0, 2, 3, 1)
    return ops.transformer(x, layers, t[-2:], **options)


def _grouped(tensors: tuple[Tensor, ...]) -> list[tuple[Tensor, ...]]:
    size = len(ops.TransformerLayerWeights._fields)
    return [tensors[i : i + size] for i in range(0, len(tensors), size)]
