# SPDX-License-Identifier: Apache-2.0
"""How timm, Hugging Face, cvnets and this package name the parameters of the one network."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from ._text import some

LAYOUTS = ("own", "timm", "huggingface", "cvnets")

# The key table. A row: what it is, then its name in
#                    own            timm           huggingface    cvnets
_STEM = (("conv+norm", "stem", "stem", "conv_stem", "conv_1"),)
_INVERTED_RESIDUAL = (
    ("conv+norm", "expand", "conv1_1x1", "expand_1x1", "exp_1x1"),
    ("conv+norm", "depthwise", "conv2_kxk", "conv_3x3", "conv_3x3"),
    ("conv+norm", "project", "conv3_1x1", "reduce_1x1", "red_1x1"),
)
_BLOCK_IN = (
    ("conv+norm", "conv_local", "conv_kxk", "conv_kxk", "local_rep.conv_3x3"),
    ("conv", "conv_in", "conv_1x1", "conv_1x1.convolution", "local_rep.conv_1x1.block.conv"),
)
_LAYER = (
    ("affine", "norm1", "norm1", "layernorm_before", "pre_norm_mha.0"),
    ("qkv", "qkv", "attn.qkv", "attention.attention", "pre_norm_mha.1.qkv_proj"),
    ("affine", "proj", "attn.proj", "attention.output.dense", "pre_norm_mha.1.out_proj"),
    ("affine", "norm2", "norm2", "layernorm_after", "pre_norm_ffn.0"),
    ("affine", "fc1", "mlp.fc1", "intermediate.dense", "pre_norm_ffn.1"),
    ("affine", "fc2", "mlp.fc2", "output.dense", "pre_norm_ffn.4"),
)
_BLOCK_OUT = (
    ("affine", "norm", "norm", "layernorm", "global_rep.{depth}"),
    ("conv+norm", "conv_out", "conv_proj", "conv_projection", "conv_proj"),
    ("conv+norm", "conv_fusion", "conv_fusion", "fusion", "fusion"),
)
_FINAL_CONV = (("conv+norm", "final_conv", "final_conv", "conv_1x1_exp", "conv_1x1_exp"),)
_CLASSIFIER = (("affine", "classifier", "head.fc", "classifier", "classifier.fc"),)

# What each calls the two parts of "conv+norm".
_CONV_NORM = (
    ("conv", "norm"),
    ("conv", "bn"),
    ("convolution", "normalization"),
    ("block.conv", "block.norm"),
)
_BATCH_NORM = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")

# Where the rows sit: stage s, block i and layer j count from 0, cvnets' stage k from 1.
_TOP = ("", "", "", "")
_RESIDUAL = ("stages.{s}.{i}.", "stages.{s}.{i}.", "encoder.layer.{s}.layer.{i}.", "layer_{k}.{i}.block.")
_DOWNSAMPLE = (
    "stages.{s}.0.",
    "stages.{s}.0.",
    "encoder.layer.{s}.downsampling_layer.",
    "layer_{k}.0.block.",
)
_BLOCK = ("stages.{s}.1.", "stages.{s}.1.", "encoder.layer.{s}.", "layer_{k}.1.")
_IN_BLOCK = ("transformer.{j}.", "transformer.{j}.", "transformer.layer.{j}.", "global_rep.{j}.")
_IN_LAYER = tuple(block + layer for block, layer in zip(_BLOCK, _IN_BLOCK, strict=True))
_DEPTHS = {2: 2, 3: 4, 4: 3}  # transformer layers of stage s

# What may stand before any of these names: the wrappers of DDP, torch.compile, Lightning and timm's
# features_only, and the attribute in which a task model holds the network (mobilevit in Hugging Face, encoder
# in cvnets).
_PREFIXES = ("module.", "_orig_mod.", "model.", "mobilevit.", "encoder.")


def _sections() -> Iterator[tuple[tuple[str, ...], tuple[tuple[str, ...], ...], dict[str, int]]]:
    """(where, rows, the numbers to fill in), in the network's order."""
    yield _TOP, _STEM, {}
    for s, i in ((0, 0), (1, 0), (1, 1), (1, 2)):
        yield _RESIDUAL, _INVERTED_RESIDUAL, {"s": s, "k": s + 1, "i": i}
    for s, depth in _DEPTHS.items():
        at = {"s": s, "k": s + 1, "depth": depth}
        yield _DOWNSAMPLE, _INVERTED_RESIDUAL, at
        yield _BLOCK, _BLOCK_IN, at
        for j in range(depth):
            yield _IN_LAYER, _LAYER, at | {"j": j}
        yield _BLOCK, _BLOCK_OUT, at
    yield _TOP, _FINAL_CONV, {}
    yield _TOP, _CLASSIFIER, {}


@functools.cache
def network(layout: str) -> dict[str, tuple[str, ...]]:
    """own key -> (key in `layout`,), or Hugging Face's three for qkv; 311 of them, in the network's order."""
    column = LAYOUTS.index(layout)
    keys: dict[str, tuple[str, ...]] = {}
    for where, rows, numbers in _sections():
        for kind, *names in rows:
            own, other = ((where[c] + names[c]).format(**numbers) for c in (0, column))
            if kind == "conv":
                keys[f"{own}.weight"] = (f"{other}.weight",)
            elif kind == "conv+norm":
                (own_conv, own_norm), (conv, norm) = _CONV_NORM[0], _CONV_NORM[column]
                keys[f"{own}.{own_conv}.weight"] = (f"{other}.{conv}.weight",)
                for leaf in _BATCH_NORM:
                    keys[f"{own}.{own_norm}.{leaf}"] = (f"{other}.{norm}.{leaf}",)
            else:
                split = kind == "qkv" and layout == "huggingface"
                parts = (".query", ".key", ".value") if split else ("",)
                for leaf in ("weight", "bias"):
                    keys[f"{own}.{leaf}"] = tuple(f"{other}{part}.{leaf}" for part in parts)
    return keys


def is_counter(own_key: str) -> bool:
    """BatchNorm's count of batches: old checkpoints lack it, and at a fixed momentum it decides nothing."""
    return own_key.endswith("num_batches_tracked")


class Keys(NamedTuple):
    """Where a state dict has the network."""

    layout: str
    found: dict[str, tuple[str, ...]]  # own key -> the state dict's keys that hold it
    extra: list[str]  # the state dict's other keys: heads of other tasks


def read_keys(keys: Iterable[str], what: str) -> Keys:
    """Find the layout of a state dict with these keys.

    Raises:
        ValueError: they are not the network from its stem up to some point, without a gap, in any layout.
            `what` names the state dict in the message.
    """
    actual: dict[str, str] = {}
    for key in keys:
        bare = _bare(key)
        if bare in actual:
            raise ValueError(f"{what} has {actual[bare]!r} and {key!r}, which mean the same; remove one")
        actual[bare] = key
    if {"conv1.0.weight", "mv2.0.conv.0.weight"} <= actual.keys():
        raise ValueError(
            f"{what} is Kornia's MobileViT, another network (4 heads of 8 whatever the width, no qkv bias, "
            "wider MLPs, no final norm) that cannot be converted; load_state_dict() loads it into Kornia's"
        )

    def matches(layout: str) -> int:
        return sum(name in actual for names in network(layout).values() for name in names)

    layout = max(LAYOUTS, key=matches)
    table = network(layout)
    found = {own: names for own, names in table.items() if all(name in actual for name in names)}
    known = {name for names in found.values() for name in names}
    extra = [key for bare, key in actual.items() if bare not in known]
    if not found:
        raise ValueError(
            f"{what} is no MobileViT: the layouts {', '.join(LAYOUTS)} have none of its keys, {some(extra)}"
        )
    order = list(table)
    upto = order.index(list(found)[-1]) + 1
    missing = [name for own in order[:upto] for name in table[own] if name not in actual and not is_counter(own)]
    if missing:
        raise ValueError(
            f"{what} fits none of the layouts {', '.join(LAYOUTS)}. The nearest is {layout}, with "
            f"{matches(layout)} of {sum(map(len, table.values()))} keys: {some(missing)} missing"
            + (f"; in their place {some(extra)}" if extra else "")
        )
    return Keys(layout, {own: tuple(actual[name] for name in names) for own, names in found.items()}, extra)


def _bare(key: str) -> str:
    """`key` without the prefixes of wrappers and task models."""
    # Hugging Face's bare model has an encoder.layer of its own: that one is no prefix.
    while not key.startswith("encoder.layer.") and (p := next(filter(key.startswith, _PREFIXES), None)):
        key = key.removeprefix(p)
    # timm's features_only makes stages_0 of stages.0.
    return f"stages.{key[7:]}" if key.startswith("stages_") else key
