# SPDX-License-Identifier: Apache-2.0
"""Where the network is among the keys of a state dict: its layout, its prefix, and the task of its head."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from .._utils.text import some
from .table import CHILD, HEADS, LAYOUTS, Head, head_keys, network

# Names that module wrappers insert anywhere in a key: torch.compile, FSDP, activation checkpointing.
_WRAPPERS = re.compile(r"(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
_STAGE = re.compile(r"(^|\.)stages_(\d+)\.")  # in timm's features_only
# Children of a training module that are not part of the trained network.
_ASIDE = re.compile(r"(.*_)?(loss(es)?|criterion|metrics?|teacher|optimi[sz]er)(_.*)?", re.IGNORECASE)
# Weights averaged over training: the ones that were evaluated.
AVERAGED = re.compile(r"(^|[._])(ema|swa|averaged)([._]|$)", re.IGNORECASE)
_LORA = re.compile(r"\.(lora_\w+|base_layer|modules_to_save|original_module)\.")
# An auxiliary classifier, which cvnets' segmentation can have in training.
_AUXILIARY = re.compile(r"(^|\.)seg_head\.aux_head\.")
# The segmentation's classifier in newer versions of cvnets, where no dropout and resizing are beside it.
_LATER_CLASSIFIER = re.compile(r"(^|\.)seg_head\.classifier\.block\.")
_V2 = re.compile(r"(attn\.|pre_norm_attn\.1\.)qkv_proj\.|attention\.qkv_proj\.convolution\.")


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
    found: dict[str, tuple[str, ...]]  # own key, with the task for a head -> the state dict's keys that hold it
    head: Head | None  # of another task than classification
    extra: list[str]  # other keys that may belong to the network or to a head of another task
    aside: list[str]  # other keys that do not: losses, metrics, anything beside a network with its head


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
        nearest, missing = readings[0]
        count = sum(map(len, nearest.found.values()))
        table = dict(network(nearest.layout))
        if nearest.head:  # instead of the last two layers
            table = {own: names for own, names in table.items() if not own.startswith(("final_conv.", "classifier."))}
            table.update(head_keys(nearest.head, nearest.layout))
        raise ValueError(
            f"{what} fits none of the layouts {', '.join(LAYOUTS)}. The nearest is {nearest.layout}, with "
            f"{count} of {sum(map(len, table.values()))} keys: {some(missing)} missing"
            + (f"; instead it has {some(nearest.extra)}" if nearest.extra else "")
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
    """The network below `prefix` and its head, and the names that are missing from them."""
    # Networks for other tasks, and Hugging Face's classifier, have the head beside the network, which is their child.
    child = CHILD.get(layout)
    above = prefix.removesuffix(child) if child and f".{prefix}".endswith(f".{child}") else prefix
    head = None if above == prefix else _head_at(bare, layout, above)
    owner = above if head or layout == "huggingface" else prefix
    table = network(layout)

    def key_of(name: str) -> str | None:
        outside = layout == "huggingface" and name.startswith("classifier.")
        return bare.get(prefix + name) or (bare.get(owner + name) if outside else None)

    actual = {name: key for names in table.values() for name in names if (key := key_of(name)) is not None}
    found = {own: tuple(actual[n] for n in names) for own, names in table.items() if all(n in actual for n in names)}
    order = list(table)
    upto = max(map(order.index, found), default=len(order)) + 1
    missing = [name for own in order[:upto] for name in table[own] if name not in actual and not is_counter(own)]
    for own, (name,) in head_keys(head, layout).items() if head else ():
        if owner + name in bare:
            found[own] = (bare[owner + name],)
        elif not is_counter(own):
            missing.append(name)
    extra: list[str] = []
    aside: list[str] = []
    taken = {key for names in found.values() for key in names}
    complete = head is not None or "classifier.weight" in found
    for name, key in bare.items():
        if key not in taken:
            outside = not name.startswith(owner)
            beside = _ASIDE.fullmatch(name.removeprefix(owner).partition(".")[0])
            (aside if (outside and complete) or beside or _AUXILIARY.search(name) else extra).append(key)
    stem = table[order[0]][0]
    as_saved = actual.get(stem, owner + stem).removesuffix(stem)
    return Keys(layout, as_saved.removesuffix(prefix[len(owner) :]), found, head, extra, aside), missing


def _head_at(bare: Mapping[str, str], layout: str, above: str) -> Head | None:
    """The head of another task with more than half of its keys below `above`: what lacks the rest is damaged."""
    for head in HEADS:
        names = head_keys(head, layout).values()
        if 2 * sum(above + name in bare for (name,) in names) > len(names):
            return head
    return None


def _refuse_kornia(bare: Mapping[str, str], what: str) -> None:
    stem = "conv1.0.weight"
    if any(key.endswith(stem) and f"{key.removesuffix(stem)}mv2.0.conv.0.weight" in bare for key in bare):
        raise ValueError(
            f"{what} is Kornia's MobileViT, a different network (4 heads of 8 whatever the width, no qkv bias, "
            "wider MLPs, no final norm) that cannot be converted; load_state_dict() loads it into Kornia's"
        )


def _bare(key: str) -> str:
    """`key` without wrapper names, with stages.0 instead of stages_0 (timm's features_only), and cvnets' newer name of
    a classifier as the older one."""
    key = _WRAPPERS.sub("", key)
    while key.startswith("module."):  # of DDP
        key = key.removeprefix("module.")
    return _LATER_CLASSIFIER.sub(r"\1seg_head.classifier.classifier.block.", _STAGE.sub(r"\1stages.\2.", key))
