# SPDX-License-Identifier: Apache-2.0
"""The phone form computes what `freeze`'s blocks compute: four axes, the batch where it is, and no transposes."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import mvit_kernels
from mvit_kernels.exporting.phone import PhoneBlock, PhoneRowsBlock, phone_form
from mvit_kernels.exporting.plan import Plan
from mvit_kernels.freezing.block import FrozenMobileViTBlock
from support import models
from support.networks import Draw

PLAN = Plan(sizes=((64, 64),))
FORMS: dict[str, Callable[[FrozenMobileViTBlock, Plan], nn.Module]] = {
    "one head": PhoneBlock,
    "all heads": lambda frozen, plan: PhoneBlock(frozen, plan, one_head=False),
    "means as convolutions": lambda frozen, plan: PhoneBlock(frozen, plan, one_head=False, mean="convolution"),
    "channels last": PhoneRowsBlock,
}
BLOCKS = {
    "usual": {},
    "patch 2x1": {"patch": (2, 1)},
    "patch 1x3": {"patch": (1, 3)},
    "patch 3x2": {"patch": (3, 2)},
    "patch 3x3": {"patch": (3, 3)},
    "patch 1x1": {"patch": (1, 1)},
    "one head": {"heads": 1},
    "narrow heads": {"head_dim": 5, "qkv_bias": False},
    "no final norm": {"final_norm": False, "input_first": False},
    "no fusion": {"fusion": False},
}


def random_map(channels: int, height: int, width: int) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.randn(2, channels, height, width, dtype=torch.float64, generator=generator)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", BLOCKS)
def test_a_block_equals_freezes(kind, form):
    frozen = Draw(0).block(8, 12, **BLOCKS[kind]).double()
    block = FORMS[form](frozen, PLAN).eval()
    for size in ((12, 18), (7, 11), (2, 2)):  # whole patches of every size, and of none; one of 2×2
        x = random_map(8, *size)
        models.assert_same(block(x), frozen(x))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("library", models.LIBRARIES)
def test_the_blocks_of_every_library_equal_freezes(library, form):
    frozen = mvit_kernels.freeze(models.double(library))
    blocks = [module for module in frozen.modules() if isinstance(module, FrozenMobileViTBlock)]
    assert len(blocks) == 3
    for block in blocks:
        x = random_map(block.in_channels, 8, 12)
        models.assert_same(FORMS[form](block, PLAN)(x), block(x))


@functools.cache
def graph(form: str, patch: tuple[int, int] = (2, 2), width: int = 12) -> list[torch.fx.Node]:
    """The calls of a block of one layer and two heads, exported for two maps of 6 × `width` pixels."""
    block = FORMS[form](Draw(0).block(8, 12, patch=patch, layers=1, heads=2), PLAN).eval()
    nodes = torch.export.export(block, (random_map(8, 6, width).float(),)).run_decompositions({}).graph.nodes
    return [node for node in nodes if node.op == "call_function" and isinstance(node.meta["val"], Tensor)]


def count(nodes: list[torch.fx.Node], name: str) -> int:
    return sum(name in str(node.target) for node in nodes)


@pytest.mark.parametrize(("form", "patch"), [*((form, (2, 2)) for form in FORMS), ("one head", (3, 2))])
def test_the_graph_stays_within_four_axes(form, patch):
    nodes = graph(form, patch)
    assert {node.meta["val"].dim() for node in nodes} == ({3, 4} if form == "channels last" else {4})
    assert {node.meta["val"].shape[0] for node in nodes} == {2}  # the batch
    transposes = [node for node in nodes if "transpose" in str(node.target)]
    assert transposes and all(node.args[1:] == (2, 3) for node in transposes)
    assert all("matmul" in str(user.target) for node in transposes for user in node.users)  # a flag of the product
    assert count(nodes, "permute") == (2 if form == "channels last" else 0)


def test_a_resize_is_there_only_where_it_is_needed():
    assert count(graph("one head"), "upsample") == 0
    assert count(graph("one head", width=7), "upsample") == 2


def test_every_weight_is_used_once():
    """Four convolutions around the transformer, and four linears; three norms have six means."""
    convolutions = {form: count(graph(form), "conv2d") for form in FORMS}
    assert convolutions == {"one head": 8, "all heads": 8, "means as convolutions": 8 + 6, "channels last": 4}


def test_heads_are_apart_or_together():
    """Of four patch positions and two heads; channels last has all positions in one product."""
    attentions = {form: count(graph(form), "softmax") for form in FORMS}
    assert attentions == {"one head": 8, "all heads": 4, "means as convolutions": 4, "channels last": 2}


def test_a_map_on_which_cvnets_computes_something_else_is_refused():
    network = phone_form(models.build("cvnets"), PLAN)
    block = next(module for module in network.modules() if isinstance(module, PhoneBlock))
    d = block.layers[0].proj.out_channels
    with pytest.raises(ValueError, match=rf"a MobileViT block's map is {d} × 4 pixels.*give another size"):
        block(torch.zeros(1, block.before[0][0].conv.in_channels, d, 4))


def test_a_map_for_which_kornia_raises_is_refused():
    network = phone_form(models.build("kornia"), PLAN)
    with pytest.raises(Exception, match="patch|shape|einops"):
        network(torch.zeros(1, 3, 96, 96))


def test_a_dynamic_size_is_refused():
    with pytest.raises(ValueError, match="the phone form has fixed sizes; give one, as sizes=256"):
        phone_form(models.build("own"), PLAN._replace(dynamic_size=True))
