# SPDX-License-Identifier: Apache-2.0
"""The key table: what timm, Hugging Face, cvnets and this package call the parameters of the same networks."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor

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
            keys.update(_leaves(kind, own, other, layout))
    return keys


def _leaves(kind: str, own: str, other: str, layout: str) -> Iterator[tuple[str, tuple[str, ...]]]:
    """The keys of one row: of the parameters and buffers of a layer."""
    if kind == "conv":
        yield f"{own}.weight", (f"{other}.weight",)
    elif kind == "conv+norm":
        (own_conv, own_norm), (conv, norm) = _CONV_NORM[0], _CONV_NORM[LAYOUTS.index(layout)]
        yield f"{own}.{own_conv}.weight", (f"{other}.{conv}.weight",)
        for leaf in _BATCH_NORM:
            yield f"{own}.{own_norm}.{leaf}", (f"{other}.{norm}.{leaf}",)
    else:
        split = kind == "qkv" and layout == "huggingface"
        parts = (".query", ".key", ".value") if split else ("",)
        for leaf in ("weight", "bias"):
            yield f"{own}.{leaf}", tuple(f"{other}{part}.{leaf}" for part in parts)


# -- networks for other tasks: the network above as a child, without its last convolution and classifier, and a head

# Where such a network keeps the one above. Hugging Face's classifier has it there too.
CHILD = {"own": "backbone.", "huggingface": "mobilevit.", "cvnets": "encoder."}


class Head(NamedTuple):
    """The head of another task than classification."""

    task: str  # what the network does; it also tells the head's own keys from the network's ("segmentation:aspp.…")
    name: str  # of the network
    layouts: tuple[str, ...]  # of the names in each row, after the kind of layer
    rows: tuple[tuple[str, ...], ...]
    # A bias by which the classes are counted, the number of predictions that it holds, and what each of them has
    # besides a value for every class.
    counted: tuple[str, int, int]

    def classes(self, own: Mapping[str, Tensor]) -> int | None:
        """The number of classes, by the head's tensors under their own keys; None if the counted one has no such
        shape."""
        key, predictions, others = self.counted
        size = own[f"{self.task}:{key}"].numel()
        return None if size % predictions or size // predictions <= others else size // predictions - others


@functools.cache
def head_keys(head: Head, layout: str) -> dict[str, tuple[str, ...]]:
    """own key, with the task -> (key in `layout`,); empty for a layout without this task."""
    if layout not in head.layouts:
        return {}
    column = head.layouts.index(layout)
    rows = ((kind, f"{head.task}:{names[0]}", names[column]) for kind, *names in head.rows)
    return dict(leaf for kind, own, other in rows for leaf in _leaves(kind, own, other, layout))


_DEEPLABV3 = (
    *(
        ("conv+norm", f"aspp.branches.{i}", f"segmentation_head.aspp.convs.{i}", f"seg_head.aspp.aspp_layer.convs.{i}")
        for i in range(4)
    ),
    (
        *("conv+norm", "aspp.pool"),
        *("segmentation_head.aspp.convs.4.conv_1x1", "seg_head.aspp.aspp_layer.convs.4.aspp_pool.conv_1x1"),
    ),
    ("conv+norm", "aspp.project", "segmentation_head.aspp.project", "seg_head.aspp.aspp_layer.project"),
    (
        *("affine", "classifier"),
        *("segmentation_head.classifier.convolution", "seg_head.classifier.classifier.block.conv"),
    ),
)

_SSDLITE = (
    *(
        ("conv+norm", f"extra.{i}.{own}", f"extra_layers.os_{stride}.{cvnets}")
        for i, stride in enumerate((64, 128, 256))
        for own, cvnets in (("depthwise", "dw_conv"), ("pointwise", "pw_conv"))
    ),
    ("conv", "extra.3.conv", "extra_layers.os_-1.1.block.conv"),
    *(
        row
        for i in range(5)
        for row in (
            *((("conv+norm", f"heads.{i}.layers.project", f"ssd_heads.{i}.proj_layer"),) if i < 2 else ()),
            ("conv+norm", f"heads.{i}.layers.depthwise", f"ssd_heads.{i}.loc_cls_layer.dw_conv"),
            ("affine", f"heads.{i}.layers.predict", f"ssd_heads.{i}.loc_cls_layer.pw_conv.block.conv"),
        )
    ),
    ("affine", "heads.5.layers.predict", "ssd_heads.5.loc_cls_layer.block.conv"),
)

HEADS = (
    Head("segmentation", "DeepLabv3", ("own", "huggingface", "cvnets"), _DEEPLABV3, counted=("classifier.bias", 1, 0)),
    # The last head predicts four boxes a pixel, each with four offsets beside its logits.
    Head("detection", "SSDLite", ("own", "cvnets"), _SSDLITE, counted=("heads.5.layers.predict.bias", 4, 4)),
)
