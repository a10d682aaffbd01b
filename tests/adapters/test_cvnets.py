# SPDX-License-Identifier: Apache-2.0
"""cvnets' MobileViT, played by a stand-in with its names: keys, video, and the quirk of its LayerNorm."""

import copy

import pytest
import torch
from torch import nn

from mvit_kernels import accelerate, freeze, report, verify
from support import cvnets, data, models
from support.declined import LoRA, assert_declined, evaluated, replaced
from support.models import accelerated, assert_same, blocks, fast_calls

X = models.images(1, 64, 64).double()
LAYER = "global_rep.0"
GENERATIONS = {
    "0.1": {"unit": cvnets.ConvLayer, "norm": cvnets.PlainLayerNorm},
    "0.3": {"unit": cvnets.ConvLayer2d, "norm": cvnets.LayerNorm},
}


# ------------------------------------------------------------------------------------------------- the stand-in itself


@pytest.mark.parametrize(("variant", "parameters"), [("xxs", 1_272_024), ("xs", 2_317_848), ("s", 5_578_632)])
def test_the_stand_in_has_the_papers_parameters(variant, parameters):
    assert sum(parameter.numel() for parameter in cvnets.MobileViT(variant).parameters()) == parameters


def test_the_stand_in_has_cvnets_keys():
    """A checkpoint trained in cvnets' layout loads strictly and classifies its ten photos correctly, before and after
    acceleration."""
    model = cvnets.MobileViT("xxs", num_classes=21, norm=cvnets.PlainLayerNorm)
    model.load_state_dict(torch.load(data.land_use_checkpoint(), map_location="cpu", weights_only=True))
    model.eval()
    photos, labels = data.land_use_photos()
    for candidate in (model, accelerated(model)):
        assert torch.equal(evaluated(candidate, photos).argmax(1), labels)


@pytest.mark.parametrize("options", GENERATIONS.values(), ids=GENERATIONS)
def test_every_generation_is_accelerated_and_freezes(options):
    """The convolutional unit has another name, and layers of its own, since 0.3."""
    model = models.build("cvnets", **options)
    assert any(type(module) is options["unit"] for module in model.modules())
    frozen = freeze(model)
    found = frozen.freeze_report
    assert (len(found.blocks), len(found.inverted_residuals), len(found.convolutions)) == (3, 7, 35)
    assert found.left == found.composed == ()
    for fast, reference in ((frozen, model), (accelerated(model), None)):
        verification = verify(fast, models.images(1, 64, 96), reference=reference)
        assert verification.ok, f"\n{verification}"


# ------------------------------------------------------------------------------------------------------------- refusal


class _SingleHeadAttention(cvnets.MultiHeadAttention):
    pass


def _as(cls):
    def make(module):
        module.__class__ = cls
        return module

    return make


class _LayerNormFP32(cvnets.LayerNorm):
    """cvnets has a class of that name; a subclass may compute something else."""

    def forward(self, x):
        return 2 * super().forward(x)


def _scaling(block):
    block.global_rep[0].pre_norm_mha[1].scaling = 0.5


DECLINED = {
    "LoRA": (replaced(f"{LAYER}.pre_norm_mha.1.out_proj", lambda m: LoRA(m)), f"{LAYER}.pre_norm_mha.1.out_proj"),
    "ReLU": (replaced(f"{LAYER}.pre_norm_ffn.2", lambda _: nn.ReLU()), f"{LAYER}.pre_norm_ffn.2", "only SiLU"),
    "another norm": (replaced(f"{LAYER}.pre_norm_mha.0", lambda _: nn.RMSNorm(64).double()), "only LayerNorm is fused"),
    "LayerNormFP32": (replaced("global_rep.2", _as(_LayerNormFP32)), "global_rep.2", "_LayerNormFP32"),
    "another scaling": (_scaling, "layer 0 scales its scores by 0.5"),
    "softmax over queries": (replaced(f"{LAYER}.pre_norm_mha.1.softmax", lambda _: nn.Softmax(-2)), "softmax"),
}


@pytest.mark.parametrize("case", DECLINED)
def test_declined(case):
    change, *words = DECLINED[case]
    assert_declined("cvnets", change, *words)


def test_other_attentions_are_declined():
    """cvnets has a class of its own for one head, without `num_heads`."""

    def change(block):
        attention = block.global_rep[0].pre_norm_mha[1]
        attention.__class__ = _SingleHeadAttention
        attention.__dict__.pop("num_heads")

    assert_declined("cvnets", change, f"{LAYER}.pre_norm_mha.1", "MultiHeadAttention is wanted", runs=False)


def test_channel_first_linears_are_declined():
    def change(block):
        block.global_rep[0].pre_norm_ffn[1].channel_first = True

    assert_declined("cvnets", change, f"{LAYER}.pre_norm_ffn.1 is channel-first", runs=False)


def test_nothing_but_the_last_norm():
    assert_declined(
        "cvnets", lambda block: block.global_rep.__delitem__(slice(0, 2)), "no transformer layers", runs=False
    )


# ------------------------------------------------------------------------------------------------------------ accepted


def test_vendored_packages_and_linears_of_pytorch():
    """A copy of cvnets inside another package, and nn.Linear in place of cvnets' own."""
    model = models.build("cvnets").double()
    linear = nn.Linear(64, 128).double()
    blocks(model)[0].global_rep[0].pre_norm_ffn[1] = linear
    vendored = type("MobileViTBlock", (cvnets.MobileViTBlock,), {"__module__": "third_party.cvnets.modules"})
    blocks(model)[1].__class__ = vendored
    with fast_calls() as calls:
        assert_same(evaluated(accelerated(model), X), evaluated(model, X))
    assert len(calls) == 3


def _copied(model: nn.Module, **changed) -> nn.Module:
    """cvnets' classes copied into a user's ``model.py``; those named in `changed` get another forward."""
    classes: dict[type, type] = {}
    for module in model.modules():
        cls = type(module)
        if cls.__module__.startswith("cvnets."):
            body = {"__module__": "model"} | ({"forward": changed[cls.__name__]} if cls.__name__ in changed else {})
            module.__class__ = classes.setdefault(cls, type(cls.__name__, (cls,), body))
    return model


@pytest.mark.parametrize("options", GENERATIONS.values(), ids=GENERATIONS)
def test_copies_in_another_package(options):
    """Recognised by name, children and keys, and then tried out, for which no hook is called."""
    model, calls = _copied(models.build("cvnets", **options)), []
    model.layer_1[0].block.register_forward_hook(lambda *_: calls.append(1))
    model.layer_3[1].local_rep[0].register_forward_hook(lambda *_: calls.append(1))
    frozen, ours = freeze(model), accelerated(model)
    assert not calls
    found = frozen.freeze_report
    assert (len(found.blocks), len(found.inverted_residuals), len(found.convolutions)) == (3, 6, 35)
    assert found.left == (("layer_1.0", "an inner module carries a hook"),)
    for fast, reference in ((frozen, model), (ours, None)):
        verification = verify(fast, models.images(1, 64, 96), reference=reference)
        assert verification.ok, f"\n{verification}"


@pytest.mark.parametrize("name", ["MobileViTBlock", "ConvLayer2d", "InvertedResidual", "TransformerEncoder"])
def test_copies_that_compute_something_else_are_left(name):
    original = getattr(cvnets, name).forward
    model = _copied(models.build("cvnets"), **{name: lambda self, x, *args: original(self, x, *args).sin()})
    frozen = freeze(model)
    found = frozen.freeze_report
    served, inverted_residuals = (0, 7) if name in ("MobileViTBlock", "TransformerEncoder") else (3, 0)
    assert (len(found.blocks), len(found.inverted_residuals)) == (served, inverted_residuals)
    assert "computes something different" in str(found)
    x = models.images(1, 64, 96)
    assert verify(frozen, x, reference=model).ok
    ours = accelerate(copy.deepcopy(model))
    assert len(report(ours).accelerated) == served
    assert verify(ours, x, reference=model).ok


def test_without_fusion():
    torch.manual_seed(0)
    block = cvnets.MobileViTBlock(8, 16, 2, cvnets.LayerNorm, fusion=False).double()
    x = torch.randn(2, 8, 6, 10, dtype=torch.float64)
    with fast_calls() as calls:
        assert_same(accelerated(block)(x).detach(), block(x).detach())
    assert len(calls) == 1


# -------------------------------------------------------------------------------------------------- cvnets' own quirks


@pytest.mark.parametrize("variant", ["xxs", "s"])
def test_layer_norm_over_patches_is_kept(variant):
    """As many patches as channels: XXS at 128 px (64 in stage 3), S at 192 px (144). cvnets then normalises over
    patches; the block itself serves that call, and no other."""
    size = {"xxs": 128, "s": 192}[variant]
    model = models.build("cvnets", variant).double()
    plain = models.build("cvnets", variant, norm=cvnets.PlainLayerNorm).double()
    plain.load_state_dict(model.state_dict())
    x = models.images(1, size, size).double()
    results = {}
    for name, candidate in (("trap", model), ("plain", plain)):
        ours = accelerated(candidate)
        with fast_calls() as calls:
            results[name] = evaluated(ours, x)
        assert_same(results[name], evaluated(candidate, x))
        assert len(calls) == {"trap": 2, "plain": 3}[name]
        assert len(report(ours).accelerated) == 3
    assert (results["trap"] - results["plain"]).abs().max() > 1e-3

    bigger = models.images(1, size + 64, size + 64).double()
    assert_same(evaluated(accelerated(model), bigger), evaluated(plain, bigger))


@pytest.mark.parametrize("size", [(15, 16), (16, 15), (8, 32)])
def test_layer_norm_over_patches_after_resizing(size):
    """What counts is the number of patches that the resized map has: 8 × 8, or 4 × 16."""
    model = models.build("cvnets").double()
    block, ours = blocks(model)[0], blocks(accelerated(model))[0]
    x = torch.randn(1, 48, *size, dtype=torch.float64)
    with fast_calls() as calls:
        assert_same(ours(x).detach(), block(x).detach())
    assert not calls


def test_a_tuple_is_video_and_passes_through():
    """Frame by frame: a tuple (map, patches of the previous frame) gives a tuple, all computed by cvnets."""
    model = models.build("cvnets").double()
    block, ours = blocks(model)[0], blocks(accelerated(model))[0]
    frames = torch.randn(3, 1, 48, 6, 8, dtype=torch.float64)
    previous = torch.randn(4, 12, 64, dtype=torch.float64)
    with fast_calls() as calls:
        for frame in frames:
            y, patches = ours((frame, previous))
            expected, expected_patches = block((frame, previous))
            assert torch.equal(y, expected) and torch.equal(patches, expected_patches)
            previous = patches
    assert not calls
    assert_same(ours(frames[0]).detach(), block(frames[0]).detach())


@pytest.mark.parametrize(
    "dropouts",
    [
        {"dropout": 0.1},
        {"attn_dropout": 0.1},
        {"ffn_dropout": 0.2},
        {"path": 0.3},
        {"dropout": 0.2, "ffn_dropout": 0.1},
    ],
)
def test_live_dropout_draws_what_cvnets_draws(dropouts):
    model = models.build("cvnets", **dropouts).double()
    x = models.images(2, 64, 96).double()
    theirs = models.assert_same_draws(model, x)
    assert not torch.equal(model(x), theirs)


def test_releases_without_stochastic_depth():
    """`drop_path` came with 0.4."""
    model = models.build("cvnets").double()
    expected = evaluated(model, X)
    older = copy.deepcopy(model)
    for block in blocks(older):
        for layer in list(block.global_rep)[:-1]:
            layer.drop_path = None
            del layer.drop_path
    with fast_calls() as calls:
        assert_same(evaluated(accelerate(older, strict=True), X), expected)
    assert len(calls) == 3
