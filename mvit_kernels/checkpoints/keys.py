# SPDX-License-Identifier: Apache-2.0
"""The names that timm, Hugging Face, cvnets and this package give to the parameters of the same network."""

from __future__ import annotations

import functools
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

from .._utils.text import some

LAYOUTS = ("own", "timm", "huggingface", "cvnets")

# The key table. Each row: kind of layer, then its name in
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

# Names of the two parts of "conv+norm" in each layout.
_CONV_NORM = (
    ("conv", "norm"),
    ("conv", "bn"),
    ("convolution", "normalization"),
    ("block.conv", "block.norm"),
)
_BATCH_NORM = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")

# Prefixes of the rows: stage s, block i and layer j count from 0, cvnets' stage k from 1.
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

# Names that module wrappers insert anywhere in a key: torch.compile, FSDP, activation checkpointing.
_WRAPPERS = re.compile(r"(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
_STAGE = re.compile(r"(^|\.)stages_(\d+)\.")  # in timm's features_only
# Children of a training module that are not part of the trained network.
_ASIDE = re.compile(r"(.*_)?(loss(es)?|criterion|metrics?|teacher|optimi[sz]er)(_.*)?", re.IGNORECASE)
# Weights averaged over training: the ones that were evaluated.
AVERAGED = re.compile(r"(^|[._])(ema|swa|averaged)([._]|$)", re.IGNORECASE)
_LORA = re.compile(r"\.(lora_\w+|base_layer|modules_to_save|original_module)\.")
_V2 = re.compile(r"(attn\.|pre_norm_attn\.1\.)qkv_proj\.|attention\.qkv_proj\.convolution\.")


def _sections() -> Iterator[tuple[tuple[str, ...], tuple[tuple[str, ...], ...], dict[str, int]]]:
    """(prefixes, rows, numbers to fill in), in the network's order."""
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
    """own key -> (key in `layout`,), or Hugging Face's three keys for qkv; 311 entries, in the network's order."""
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
    """Whether it is batch norm's count of batches: old checkpoints lack it, and a fixed momentum does not use it."""
    return own_key.endswith("num_batches_tracked")


_STEMS = (*{f".{next(iter(network(layout).values()))[0]}" for layout in LAYOUTS}, ".conv1.0.weight")  # Kornia's


def is_stem(key: object) -> bool:
    """Whether this is the first key of a MobileViT, after any prefix."""
    return isinstance(key, str) and f".{_bare(key)}".endswith(_STEMS)


class Keys(NamedTuple):
    """Where the network is in a state dict."""

    layout: str
    prefix: str  # common prefix of the network's keys, apart from the one of the layout itself
    found: dict[str, tuple[str, ...]]  # own key -> the state dict's keys that hold it
    extra: list[str]  # other keys that may belong to the network or to a head of another task
    aside: list[str]  # other keys that do not: losses, metrics, anything beside a network with its classifier


def read_keys(keys: Iterable[str], what: str) -> Keys:
    """Find the network among these keys: its layout and its prefix.

    Args:
        keys: keys of a state dict.
        what: names the state dict in error messages.

    Raises:
        ValueError: no layout matches from the stem up to some point without a gap, or there are two networks.
    """
    keys = list(keys)
    lora = [key for key in keys if _LORA.search(key)]
    if lora:
        raise ValueError(
            f"{what} has PEFT adapters, such as {lora[0]}, next to or instead of the weights that they change; merge "
            "them first: model.merge_and_unload().state_dict()"
        )
    bare: dict[str, str] = {}
    for key in keys:
        first = bare.setdefault(_bare(key), key)
        if first != key:
            raise ValueError(f"{what} has {first!r} and {key!r}, which mean the same; remove one")
    _refuse_kornia(bare, what)
    places = _places(bare)
    if not places:
        raise ValueError(
            f"{what} is not a MobileViT: the layouts {', '.join(LAYOUTS)} have none of its keys, {some(keys)}"
        )
    readings = [_read_at(bare, layout, prefix) for layout, prefix in places]
    whole = [reading for reading, missing in readings if not missing]
    if not whole:
        keys, missing = readings[0]
        count = sum(map(len, keys.found.values()))
        raise ValueError(
            f"{what} fits none of the layouts {', '.join(LAYOUTS)}. The nearest is {keys.layout}, with "
            f"{count} of {sum(map(len, network(keys.layout).values()))} keys: {some(missing)} missing"
            + (f"; instead it has {some(keys.extra)}" if keys.extra else "")
            + ("; by its attention it is a MobileViTv2, a different network" if any(map(_V2.search, bare)) else "")
        )
    if len(whole) > 1:
        whole = [reading for reading in whole if AVERAGED.search(reading.prefix)] or whole
    if len(whole) > 1:
        prefixes = [reading.prefix for reading in whole]
        raise ValueError(
            f"{what} has {len(whole)} MobileViTs, below {' and '.join(map(repr, prefixes))}; pass the keys of one, as "
            f"{{key: value for key, value in state_dict.items() if key.startswith({prefixes[-1]!r})}}"
        )
    return whole[0]


def _places(bare: Mapping[str, str]) -> list[tuple[str, str]]:
    """(layout, prefix) of possible networks, best first: those with at least half as many keys as the best."""
    votes: Counter[tuple[str, str]] = Counter()
    known = {layout: {name for names in network(layout).values() for name in names} for layout in LAYOUTS}
    for key in bare:
        tail, start = key, 0
        while True:
            votes.update((layout, key[:start]) for layout in LAYOUTS if tail in known[layout])
            _, dot, tail = tail.partition(".")
            if not dot:
                break
            start = len(key) - len(tail)
    best: dict[str, tuple[int, str]] = {}  # prefix -> (number of keys, layout); on a tie the first layout
    for layout in LAYOUTS:
        for (other, prefix), count in votes.items():
            if other == layout and count > best.get(prefix, (0, ""))[0]:
                best[prefix] = (count, layout)
    most = max((count for count, _ in best.values()), default=0)
    order = sorted(best.items(), key=lambda item: -item[1][0])
    return [(layout, prefix) for prefix, (count, layout) in order if 2 * count >= most]


def _read_at(bare: Mapping[str, str], layout: str, prefix: str) -> tuple[Keys, list[str]]:
    """The network below `prefix`, and the names that are missing from it."""
    # Hugging Face's task models have the classifier beside the network, which is their child `mobilevit`.
    owner = prefix.removesuffix("mobilevit.") if layout == "huggingface" else prefix
    table = network(layout)

    def key_of(name: str) -> str | None:
        return bare.get(prefix + name) or (bare.get(owner + name) if name.startswith("classifier.") else None)

    actual = {name: key for names in table.values() for name in names if (key := key_of(name)) is not None}
    found = {own: tuple(actual[n] for n in names) for own, names in table.items() if all(n in actual for n in names)}
    order = list(table)
    upto = max(map(order.index, found), default=len(order)) + 1
    missing = [name for own in order[:upto] for name in table[own] if name not in actual and not is_counter(own)]
    extra, aside = [], []
    taken = {key for names in found.values() for key in names}
    has_classifier = "classifier.weight" in found
    for name, key in bare.items():
        if key not in taken:
            outside = not name.startswith(owner)
            child = name.removeprefix(owner).partition(".")[0]
            (aside if (outside and has_classifier) or _ASIDE.fullmatch(child) else extra).append(key)
    stem = table[order[0]][0]
    as_saved = actual.get(stem, owner + stem).removesuffix(stem)
    return Keys(layout, as_saved.removesuffix(prefix[len(owner) :]), found, extra, aside), missing


def _refuse_kornia(bare: Mapping[str, str], what: str) -> None:
    stem = "conv1.0.weight"
    if any(key.endswith(stem) and f"{key.removesuffix(stem)}mv2.0.conv.0.weight" in bare for key in bare):
        raise ValueError(
            f"{what} is Kornia's MobileViT, a different network (4 heads of 8 whatever the width, no qkv bias, "
            "wider MLPs, no final norm) that cannot be converted; load_state_dict() loads it into Kornia's"
        )


def _bare(key: str) -> str:
    """`key` without wrapper names, and with stages.0 instead of stages_0 (timm's features_only)."""
    key = _WRAPPERS.sub("", key)
    while key.startswith("module."):  # of DDP
        key = key.removeprefix("module.")
    return _STAGE.sub(r"\1stages.\2.", key)
