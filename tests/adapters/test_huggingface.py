# SPDX-License-Identifier: Apache-2.0
"""Hugging Face's MobileViT: what the adapter accepts and declines, live dropout, checkpointing, task models."""

import pytest
import torch
from torch import nn
from transformers.models.mobilevit import modeling_mobilevit

import mvit_kernels
from mvit_kernels import accelerate, report
from support import models
from support.declined import LoRA, assert_declined, evaluated, replaced
from support.models import accelerated, assert_same, blocks, fast_calls

X = models.images(1, 64, 64).double()
LAYER = "transformer.layer.0"
ATTENTION = f"{LAYER}.attention.attention"


def _prune_a_head(block, keep_count=False):
    """Take one head of four out of the first layer, as pruning does; `keep_count` forgets the number of heads."""
    attention = block.transformer.layer[0].attention
    for name in ("query", "key", "value"):
        setattr(attention.attention, name, _rows(getattr(attention.attention, name), slice(16, None)))
    dense = nn.Linear(48, 64).double()
    dense.weight = nn.Parameter(attention.output.dense.weight[:, 16:].clone())
    dense.bias = attention.output.dense.bias
    attention.output.dense = dense
    attention.attention.all_head_size = 48
    attention.attention.num_attention_heads = 4 if keep_count else 3


def _rows(linear, rows):
    small = nn.Linear(linear.in_features, len(linear.weight[rows])).double()
    small.weight, small.bias = nn.Parameter(linear.weight[rows].clone()), nn.Parameter(linear.bias[rows].clone())
    return small


class _Sharper(modeling_mobilevit.MobileViTSelfAttention):
    def forward(self, hidden_states):
        return 2 * super().forward(hidden_states)


def _sharper(attention):
    attention.__class__ = _Sharper
    return attention


DECLINED = {
    "LoRA": (replaced(f"{ATTENTION}.query", LoRA), f"{ATTENTION}.query is support.declined.LoRA"),
    "GELU": (replaced(f"{LAYER}.intermediate.intermediate_act_fn", lambda _: nn.GELU()), "GELU", "only SiLU"),
    "a norm of another kind": (replaced("layernorm", lambda _: nn.RMSNorm(64).double()), "layernorm", "only LayerNorm"),
    "another attention": (replaced(ATTENTION, _sharper), f"{ATTENTION} is tests.adapters.test_huggingface._Sharper"),
    "one layer with fewer heads": (_prune_a_head, "its layers differ in their heads"),
    "a head pruned, its count not": (lambda block: _prune_a_head(block, True), "widths of layer 0", "pruned heads?"),
    "another dropout": (replaced(f"{LAYER}.output.dropout", lambda _: nn.Tanh()), f"{LAYER}.output.dropout"),
}


@pytest.mark.parametrize("case", DECLINED)
def test_declined(case):
    change, *words = DECLINED[case]
    assert_declined("huggingface", change, *words)


@pytest.mark.parametrize(
    ("path", "reason"),
    [(f"{ATTENTION}.key", "widths of layer 0"), (f"{LAYER}.output.dense", "a linear of layer 0 has no bias")],
)
def test_missing_biases_are_declined(path, reason):
    model = models.build("huggingface").double()
    blocks(model)[0].get_submodule(path).bias = None
    expected = evaluated(model, X)
    assert_same(evaluated(accelerate(model), X), expected)
    assert reason in str(report(model)) and len(report(model).accelerated) == 2


def test_a_patch_size_that_transformers_itself_cannot_take():
    model = models.build("huggingface")
    for block in blocks(model):
        block.patch_height = block.patch_width = [2, 2]
    accelerate(model)
    assert "its patch size is ([2, 2], [2, 2])" in str(report(model)) and not report(model).accelerated


@pytest.mark.parametrize(
    ("options", "change"),
    [
        ({"qkv_bias": False}, None),
        ({"num_attention_heads": 8}, None),
        ({"patch_size": 3}, None),
        ({"mlp_ratio": 4.0}, None),
        ({"layer_norm_eps": 0.1}, None),
        ({}, lambda block: [_prune_every_layer(block)]),
    ],
)
def test_accepted(options, change):
    model = models.build("huggingface", **options).double()
    if change is not None:
        change(blocks(model)[0])
    with fast_calls() as calls:
        ours = evaluated(accelerated(model), X)
    assert len(calls) == 3
    assert_same(ours, evaluated(model, X))


def _prune_every_layer(block):
    first = block.transformer.layer
    for index in range(len(first)):
        block.transformer.layer = nn.ModuleList([first[index]])
        _prune_a_head(block)
    block.transformer.layer = first


def test_query_key_and_value_are_not_mixed_up():
    """Zeroing the weights of one changes what it changes in transformers."""
    outputs = []
    for name in ("query", "key", "value"):
        model = models.build("huggingface").double()
        for block in blocks(model):
            nn.init.zeros_(block.transformer.layer[0].get_submodule(f"attention.attention.{name}").weight)
        assert_same(evaluated(accelerated(model), X), evaluated(model, X))
        outputs.append(evaluated(model, X))
    assert not torch.equal(outputs[0], outputs[2])


@pytest.mark.parametrize("size", [(64, 96), (96, 96)])
@pytest.mark.parametrize(
    "options",
    [
        {"hidden_dropout_prob": 0.1, "classifier_dropout_prob": 0.1},  # the defaults
        {"attention_probs_dropout_prob": 0.1},
        {"hidden_dropout_prob": 0.3, "attention_probs_dropout_prob": 0.2},
    ],
)
def test_live_dropout_draws_what_transformers_draws(options, size):
    model = models.build("huggingface", **options).double()
    x = models.images(2, *size).double()
    theirs = models.assert_same_draws(model, x)
    assert not torch.equal(model(x).logits, theirs)


def test_dropout_left_on_in_evaluation():
    model = models.build("huggingface", hidden_dropout_prob=0.2, attention_probs_dropout_prob=0.1).double()
    models.assert_dropout_left_on(model, X)


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing(use_reentrant):
    model = models.build("huggingface", hidden_dropout_prob=0.1).double()

    def switch(model, on):
        if on:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})

    models.assert_same_when_checkpointed(model, models.images(2, 64, 96).double(), switch, lambda block: block.conv_kxk)


def test_hidden_states_loss_and_tuples():
    model = models.build("huggingface").double()
    ours, labels = accelerated(model), torch.tensor([3])
    with torch.no_grad():
        for options in ({"output_hidden_states": True}, {"labels": labels}, {"return_dict": False}):
            values = ours(X, **options)
            expected = model(X, **options)
            assert type(values) is type(expected) and len(values) == len(expected)
            pairs = zip(torch.utils._pytree.tree_leaves(values), torch.utils._pytree.tree_leaves(expected), strict=True)
            for value, other in pairs:
                assert_same(value, other)
    assert len(ours(X, output_hidden_states=True).hidden_states) == 5


@pytest.mark.parametrize("output_stride", [8, 16, 32])
def test_segmentation(output_stride):
    """DeepLabv3 on dilated stages, in evaluation and in training."""
    model = models.build(
        "huggingface", task="ForSemanticSegmentation", num_labels=5, output_stride=output_stride, aspp_dropout_prob=0.0
    ).double()
    x = models.images(2, 64, 96).double()
    with fast_calls() as calls:
        assert_same(evaluated(accelerated(model), x), evaluated(model, x))
    assert len(calls) == 3
    (ours, our_gradients), (theirs, gradients) = (models.differentiated(m, x) for m in (accelerated(model), model))
    assert_same(ours, theirs)
    models.assert_gradients_as_pytorch(our_gradients, gradients, gradients, unit=1e-9)


def test_keyword_calls_of_the_block():
    """Hugging Face passes the block's argument by name, and so may users."""
    block = blocks(accelerated(models.build("huggingface")))[0].double()
    x = torch.randn(1, 24, 16, 16, dtype=torch.float64)
    assert_same(block(features=x), block(x))


def test_save_and_load_pretrained(tmp_path):
    model = models.build("huggingface")
    ours = accelerated(model)
    ours.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert list(loaded.state_dict()) == list(model.state_dict())
    assert torch.equal(evaluated(loaded, X.float()), evaluated(model, X.float()))
    again = accelerate(loaded, strict=True)
    torch.testing.assert_close(evaluated(again, X.float()), evaluated(ours, X.float()), rtol=0, atol=0)


def test_transformers_finds_blocks_by_name():
    """device_map and FSDP rely on `_no_split_modules`."""
    model = accelerated(models.build("huggingface"))
    (name,) = model._no_split_modules
    assert [type(block).__name__ for block in blocks(model)] == [name] * 3
    assert all(isinstance(block, modeling_mobilevit.MobileViTLayer) for block in blocks(model))


def test_a_backbone_without_its_last_convolution():
    model = models.build("huggingface", task="Model", num_labels=2).double()
    with fast_calls() as calls:
        assert_same(evaluated(accelerated(model), X), evaluated(model, X))
    assert len(calls) == 3
    assert [block.name for block in report(accelerate(model)).blocks] == [f"encoder.layer.{i}" for i in (2, 3, 4)]
    mvit_kernels.restore(model)
