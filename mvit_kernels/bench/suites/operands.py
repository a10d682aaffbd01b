# SPDX-License-Identifier: Apache-2.0
"""The operators' operands, at each stage of MobileViT or of any shape, and the arithmetic of such a call.

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
import inspect
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

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
    shape, sizes = (stage.batch, stage.side, stage.side, stage.width), {}
    if operator == "transformer":
        sizes = {"layers": stage.layers}
    if operator == "inverted_residual":
        variant = _VARIANTS[stage.variant]
        before, after = variant.channels[stage.index - 2 : stage.index]
        shape = (stage.batch, 2 * stage.side, 2 * stage.side, before)
        sizes = {"hidden": int(before * variant.expand_ratio), "out_features": after, "stride": 2}
    return operands_of(operator, shape, seed=seed, **sizes)


def operands_of(operator: str, shape: Sequence[int], *, seed: int = 0, **sizes: Any) -> Operands:
    """Random operands of `operator`, float32 on the CPU, for an input of `shape`.

    Example:
        >>> operands_of("patch_attention", (8, 32, 32, 144), num_heads=4).tensors[0].shape
        torch.Size([8, 32, 32, 432])

    Args:
        operator: its name.
        shape: batch, height, width and channels of the map; for what works on rows any number of axes, channels last.
            The channels of ``patch_attention`` are those of its result: q, k and v have as many each.
        seed: of the random numbers.
        sizes: those of `sizes_of(operator)`; what is not given is as in MobileViT.

    Raises:
        ValueError: an unknown operator, a size that it does not have, or a shape that it does not take.
    """
    sizes = check_call(operator, shape, **sizes)
    return _MAKERS[operator](_Random(seed), tuple(shape), **sizes)


def check_call(operator: str, shape: Sequence[int], **sizes: Any) -> dict[str, Any]:
    """All sizes of the call that `operands_of` would draw; raises what it raises."""
    if operator not in _MAKERS:
        raise ValueError(f"unknown operator {operator!r}; choose from {', '.join(OPERATORS)}")
    known = sizes_of(operator)
    for name in sizes:
        if name not in known:
            raise ValueError(f"{operator} has no {name}; its sizes are the shape{''.join(f', {n}' for n in known)}")
    shape, sizes = tuple(shape), known | sizes
    on_rows = operator in ("layer_norm", "layer_norm_linear", "linear_residual", "layer_norm_mlp")
    if len(shape) != 4 and not (on_rows and len(shape) >= 2):
        wanted = "2 or more numbers, channels last" if on_rows else "4: batch, height, width, channels"
        raise ValueError(f"{operator}: shape {','.join(map(str, shape))} has {len(shape)} numbers; give {wanted}")
    if "num_heads" in sizes:
        name, inner = ("inner", sizes["inner"]) if sizes.get("inner") else ("the channels", shape[-1])
        if inner % sizes["num_heads"]:
            raise ValueError(f"{operator}: {name}, {inner}, are no multiple of num_heads, {sizes['num_heads']}")
        if any(side % patch for side, patch in zip(shape[1:3], sizes["patch_size"], strict=True)):
            (h, w), (ph, pw) = shape[1:3], sizes["patch_size"]
            raise ValueError(f"{operator}: a map of {h} × {w} has no whole number of patches of {ph} × {pw}")
    if sizes.get("residual") and (sizes["stride"] != 1 or sizes["out_features"] not in (None, shape[-1])):
        raise ValueError(f"{operator}: residual takes stride 1, and as many out_features as channels ({shape[-1]})")
    return sizes


def sizes_of(operator: str) -> dict[str, Any]:
    """The sizes that a call of `operator` has beyond the shape of its input, with their values in MobileViT; None
    follows from the channels."""
    parameters = list(inspect.signature(_MAKERS[operator]).parameters.values())[2:]
    return {parameter.name: parameter.default for parameter in parameters}


# --------------------------------------------------------------------------------------------------- one by one


class _Random:
    """Draws of operands: rows and weights with the variances of a trained network."""

    def __init__(self, seed: int) -> None:
        self._generator = torch.Generator().manual_seed(seed)

    def __call__(self, *shape: int, std: float = 1.0, mean: float = 0.0) -> Tensor:
        return torch.randn(shape, generator=self._generator, device="cpu") * std + mean

    def linear(self, out: int, width: int) -> tuple[Tensor, Tensor]:
        return self(out, width, std=width**-0.5), self(out, std=0.1)

    def norm(self, width: int) -> tuple[Tensor, Tensor]:
        return self(width, std=0.1, mean=1.0), self(width, std=0.1)

    def layer(self, width: int, inner: int, hidden: int) -> tuple[Tensor, ...]:
        attention = (*self.norm(width), *self.linear(3 * inner, width), *self.linear(width, inner))
        return (*attention, *self.norm(width), *self.linear(hidden, width), *self.linear(width, hidden))


def _batch_norm_activation(draw: _Random, shape: tuple[int, ...], activation: str | None = "silu") -> Operands:
    x = draw(*shape).permute(0, 3, 1, 2)  # channels-last, as behind a convolution
    return Operands(
        "batch_norm_activation",
        (x, *draw.norm(shape[-1])),
        (0,),
        (EPS, activation or ""),
        lambda *t, backend=None: ops.batch_norm_activation(*t, eps=EPS, activation=activation, backend=backend),
        lambda *t: reference.batch_norm_activation(*t, None, None, 0.0, EPS, activation),
        0,
    )


def _layer_norm(draw: _Random, shape: tuple[int, ...]) -> Operands:
    return Operands(
        "layer_norm",
        (draw(*shape), *draw.norm(shape[-1])),
        (0,),
        (EPS,),
        ops.layer_norm,
        lambda *t: reference.layer_norm(*t, EPS),
        0,
    )


def _layer_norm_linear(
    draw: _Random, shape: tuple[int, ...], out_features: int | None = None, activation: str | None = None
) -> Operands:
    d, out = shape[-1], out_features or 3 * shape[-1]
    return Operands(
        "layer_norm_linear",
        (draw(*shape), *draw.norm(d), *draw.linear(out, d)),
        (0,),
        (EPS, activation or ""),
        functools.partial(ops.layer_norm_linear, activation=activation),
        lambda *t: reference.layer_norm_linear(*t, EPS, activation),
        2 * math.prod(shape) * out,
    )


def _patch_attention(
    draw: _Random, shape: tuple[int, ...], num_heads: int = HEADS, patch_size: tuple[int, int] = PATCH
) -> Operands:
    *map_shape, inner = shape
    scale = (inner // num_heads) ** -0.5
    return Operands(
        "patch_attention",
        (draw(*map_shape, 3 * inner),),
        (0,),
        (num_heads, patch_size, scale),
        functools.partial(ops.patch_attention, num_heads=num_heads, patch_size=patch_size),
        lambda qkv: reference.patch_attention(qkv, num_heads, patch_size, scale),
        4 * math.prod(shape) * sequence_of(shape, patch_size),
    )


def _linear_residual(draw: _Random, shape: tuple[int, ...], out_features: int | None = None) -> Operands:
    *rows, d = shape
    out = out_features or d
    return Operands(
        "linear_residual",
        (draw(*shape), *draw.linear(out, d), draw(*rows, out)),
        (0, 3),
        (),
        ops.linear_residual,
        reference.linear_residual,
        2 * math.prod(shape) * out,
    )


def _layer_norm_mlp(draw: _Random, shape: tuple[int, ...], hidden: int | None = None) -> Operands:
    d, hidden = shape[-1], hidden or 2 * shape[-1]
    return Operands(
        "layer_norm_mlp",
        (draw(*shape), *draw.norm(d), *draw.linear(hidden, d), *draw.linear(d, hidden)),
        (0,),
        (EPS,),
        ops.layer_norm_mlp,
        lambda *t: reference.layer_norm_mlp(*t, EPS),
        4 * math.prod(shape) * hidden,
    )


def _inverted_residual(
    draw: _Random,
    shape: tuple[int, ...],
    hidden: int | None = None,
    out_features: int | None = None,
    stride: int = 1,
    dilation: int = 1,
    residual: bool = False,
) -> Operands:
    batch, height, width, before = shape
    hidden, after = hidden or 4 * before, out_features or before
    pixels = batch * -(-height // stride) * -(-width // stride)
    return Operands(
        "inverted_residual",
        (
            draw(*shape),
            *draw.linear(hidden, before),
            draw(hidden, 1, 3, 3, std=1 / 3),
            draw(hidden, std=0.1),
            *draw.linear(after, hidden),
        ),
        (0,),
        (stride, dilation, residual),
        functools.partial(ops.inverted_residual, stride=stride, dilation=dilation, residual=residual),
        lambda *t: reference.inverted_residual(*t, stride, dilation, residual),
        2 * hidden * (math.prod(shape) + pixels * (9 + after)),
    )


def _transformer_layer(
    draw: _Random,
    shape: tuple[int, ...],
    num_heads: int = HEADS,
    patch_size: tuple[int, int] = PATCH,
    inner: int | None = None,
    hidden: int | None = None,
) -> Operands:
    d, inner, hidden = shape[-1], inner or shape[-1], hidden or 2 * shape[-1]
    return Operands(
        "transformer_layer",
        (draw(*shape), *draw.layer(d, inner, hidden)),
        (0,),
        (None, num_heads, patch_size, EPS, [0.0] * 4, True),  # without a seed: no dropout
        functools.partial(_public_layer, num_heads=num_heads, patch_size=patch_size),
        lambda x, *t: reference.transformer_layer(x, t, num_heads, patch_size, EPS),
        _flop_of_layer(shape, patch_size, inner, hidden),
    )


def _transformer(
    draw: _Random,
    shape: tuple[int, ...],
    num_heads: int = HEADS,
    patch_size: tuple[int, int] = PATCH,
    inner: int | None = None,
    hidden: int | None = None,
    layers: int = 2,
) -> Operands:
    d, inner, hidden = shape[-1], inner or shape[-1], hidden or 2 * shape[-1]
    return Operands(
        "transformer",
        (draw(*shape), *(t for _ in range(layers) for t in draw.layer(d, inner, hidden)), *draw.norm(d)),
        (0,),
        (num_heads, patch_size, EPS),
        functools.partial(_public_transformer, num_heads=num_heads, patch_size=patch_size),
        lambda x, *t: reference.transformer(x, _grouped(t[:-2]), t[-2:], num_heads, patch_size, EPS),
        layers * _flop_of_layer(shape, patch_size, inner, hidden),
    )


_MAKERS: dict[str, Callable[..., Operands]] = {
    "batch_norm_activation": _batch_norm_activation,
    "layer_norm": _layer_norm,
    "layer_norm_linear": _layer_norm_linear,
    "patch_attention": _patch_attention,
    "linear_residual": _linear_residual,
    "layer_norm_mlp": _layer_norm_mlp,
    "inverted_residual": _inverted_residual,
    "transformer_layer": _transformer_layer,
    "transformer": _transformer,
}


def sequence_of(shape: tuple[int, ...], patch_size: tuple[int, int]) -> int:
    """The number of tokens in a sequence of a map (B, H, W, C): one for each patch."""
    return (shape[1] // patch_size[0]) * (shape[2] // patch_size[1])


def _flop_of_layer(shape: tuple[int, ...], patch_size: tuple[int, int], inner: int, hidden: int) -> int:
    tokens, d = math.prod(shape[:-1]), shape[-1]
    return tokens * (8 * d * inner + 4 * d * hidden + 4 * sequence_of(shape, patch_size) * inner)


def _public_layer(x: Tensor, *t: Tensor, backend: str | None = None, **heads: Any) -> Tensor:
    return ops.transformer_layer(x, ops.TransformerLayerWeights(*t), eps=EPS, backend=backend, **heads)


def _public_transformer(x: Tensor, *t: Tensor, backend: str | None = None, **heads: Any) -> Tensor:
    """The operator, or the stack as accelerated blocks train it if a gradient is needed: the operator has none."""
    layers = [ops.TransformerLayerWeights(*layer) for layer in _grouped(t[:-2])]
    options = dict(eps=EPS, backend=backend, **heads)
    if torch.is_grad_enabled() and x.requires_grad:
        return transformer_on_map(x.permute(0, 3, 1, 2), layers, t[-2:], **options).permute(0, 2, 3, 1)
    return ops.transformer(x, layers, t[-2:], **options)


def _grouped(tensors: tuple[Tensor, ...]) -> list[tuple[Tensor, ...]]:
    size = len(ops.TransformerLayerWeights._fields)
    return [tensors[i : i + size] for i in range(0, len(tensors), size)]
