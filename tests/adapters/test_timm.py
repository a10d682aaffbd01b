# SPDX-License-Identifier: Apache-2.0
"""timm's MobileViT: what the adapter accepts and declines, random draws, checkpointing, ``features_only``."""

import copy

import pytest
import timm.layers
import torch
from timm.models._features_fx import FeatureGraphNet
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

import mvit_kernels
from mvit_kernels import accelerate, report
from mvit_kernels.backends import use_backend
from support import models
from support.declined import LoRA, LoRALinear, as_class, assert_declined, evaluated, replaced
from support.models import accelerated, assert_same, blocks, fast_calls

X = models.images(1, 64, 64).double()
LAYER = "transformer.0"


# ------------------------------------------------------------------------------------------------------------ declined


def _inside(path, do):
    return lambda block: do(block.get_submodule(path))


class _Shifted(timm.layers.Attention):
    def forward(self, x, **kwargs):
        return super().forward(x.roll(1, dims=1), **kwargs)


class _LearnedSwish(nn.Module):
    def __init__(self):
        super().__init__()
        self.slope = nn.Parameter(torch.tensor(2.0, dtype=torch.float64))

    def forward(self, x):
        return x * torch.sigmoid(self.slope * x)


_LearnedSwish.__name__ = "Swish"


class _Halving(nn.Module):
    def forward(self, weight):
        return weight / 2


def _norm(**options):
    return lambda norm: nn.LayerNorm(norm.normalized_shape, eps=norm.eps, dtype=torch.float64, **options)


def _gate(block):
    block.transformer[0].attn.gate = nn.Linear(64, 64).double()
    nn.init.constant_(block.transformer[0].attn.gate.weight, 0.1)
    nn.init.zeros_(block.transformer[0].attn.gate.bias)


def _with(**attributes):
    def change(module):
        for name, value in attributes.items():
            setattr(module, name, value)

    return change


def _patch_forward(attention):
    original = attention.forward
    attention.forward = lambda *args, **kwargs: 2 * original(*args, **kwargs)


DECLINED = {
    "LoRA": (replaced(f"{LAYER}.attn.qkv", LoRA), f"{LAYER}.attn.qkv is support.declined.LoRA"),
    "LoRA as a subclass": (
        replaced(f"{LAYER}.mlp.fc1", as_class(LoRALinear)),
        f"{LAYER}.mlp.fc1 is support.declined.LoRALinear",
    ),
    "parametrised": (
        _inside(f"{LAYER}.mlp.fc2", lambda m: parametrize.register_parametrization(m, "weight", _Halving())),
        f"{LAYER}.mlp.fc2 is torch.nn.utils.parametrize.ParametrizedLinear",
    ),
    "pruned weights": (
        _inside(f"{LAYER}.mlp.fc1", lambda m: prune.l1_unstructured(m, "weight", 0.5)),
        f"{LAYER}.mlp.fc1 carries a hook",
    ),
    "GELU": (replaced(f"{LAYER}.mlp.act", lambda _: nn.GELU()), f"{LAYER}.mlp.act is torch.nn.modules.activation.GELU"),
    "ReLU": (replaced("transformer.1.mlp.act", lambda _: nn.ReLU()), "transformer.1.mlp.act", "only SiLU"),
    "a Swish with a slope": (replaced(f"{LAYER}.mlp.act", lambda _: _LearnedSwish()), "only SiLU"),
    "RMSNorm": (replaced(f"{LAYER}.norm1", lambda m: nn.RMSNorm(64, dtype=torch.float64)), f"{LAYER}.norm1", "RMSNorm"),
    "LayerNormFp32": (replaced("norm", as_class(timm.layers.LayerNormFp32)), "norm is timm.layers.norm.LayerNormFp32"),
    "no affine": (replaced(f"{LAYER}.norm2", _norm(elementwise_affine=False)), f"{LAYER}.norm2 has no weight"),
    "no norm bias": (replaced("norm", _norm(bias=False)), "norm has no weight or no bias"),
    "another eps": (_inside("norm", _with(eps=0.1)), "different eps"),
    "q_norm": (
        replaced(f"{LAYER}.attn.q_norm", lambda _: nn.LayerNorm(16).double()),
        f"{LAYER}.attn.q_norm",
        "no such step",
    ),
    "k_norm": (
        replaced(f"{LAYER}.attn.k_norm", lambda _: nn.LayerNorm(16).double()),
        f"{LAYER}.attn.k_norm",
        "no such step",
    ),
    "attention norm": (replaced(f"{LAYER}.attn.norm", lambda _: nn.LayerNorm(64).double()), f"{LAYER}.attn.norm"),
    "gate": (_gate, f"{LAYER}.attn.gate is torch.nn.modules.linear.Linear", "no such step"),
    "LayerScale": (
        replaced(f"{LAYER}.ls2", lambda _: timm.layers.LayerScale(64, 0.5, dtype=torch.float64)),
        f"{LAYER}.ls2 is timm.layers.layer_scale.LayerScale",
    ),
    "MLP norm": (replaced(f"{LAYER}.mlp.norm", lambda _: nn.LayerNorm(128).double()), f"{LAYER}.mlp.norm"),
    "another attention": (
        replaced(f"{LAYER}.attn", as_class(_Shifted)),
        f"{LAYER}.attn is tests.adapters.test_timm._Shifted",
    ),
    "another dropout": (replaced(f"{LAYER}.mlp.drop2", lambda _: nn.Tanh()), f"{LAYER}.mlp.drop2", "only a Dropout"),
    "a patched forward": (_inside(f"{LAYER}.attn", _patch_forward), f"the forward of {LAYER}.attn was replaced"),
    "no projection bias": (replaced(f"{LAYER}.attn.proj", lambda _: _constant(64, 64)), "layer 0 has no bias"),
    "another layer": (replaced(LAYER, lambda _: nn.Identity()), f"{LAYER} is torch.nn.modules.linear.Identity"),
    "no layers": (replaced("transformer", lambda _: nn.Sequential()), "it has no transformer layers"),
}


def _constant(inputs, outputs):
    linear = nn.Linear(inputs, outputs, bias=False, dtype=torch.float64)
    nn.init.constant_(linear.weight, 0.01)
    return linear


@pytest.mark.parametrize("case", DECLINED)
def test_declined(case):
    change, *words = DECLINED[case]
    assert_declined("timm", change, *words)


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize(
    ("wrap", "differs"),
    [
        (parametrizations.weight_norm, False),
        (parametrizations.spectral_norm, True),
        (nn.utils.weight_norm, False),
        (nn.utils.spectral_norm, True),
    ],
)
def test_normed_weights_are_declined(wrap, differs):
    """A parametrization or a hook computes the weight anew at each call."""

    def change(block):
        torch.manual_seed(0)  # the power iteration starts at random
        wrap(block.transformer[0].attn.proj)

    assert_declined("timm", change, "attn.proj", differs=differs)


def test_another_scale_is_declined():
    """Only timm's unfused attention reads it, so nothing else would notice."""

    def change(block):
        block.transformer[0].attn.scale, block.transformer[0].attn.fused_attn = 0.5, False

    assert_declined("timm", change, "layer 0 scales its scores by 0.5")


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_dynamic_quantisation_is_declined():
    model = models.build("timm").eval()
    before = torch.ao.quantization.quantize_dynamic(model, {nn.Linear})
    accelerate(before)
    assert len(report(before).declined) == 3 and "torch.ao.nn.quantized.dynamic" in str(report(before))
    after = torch.ao.quantization.quantize_dynamic(accelerated(model), {nn.Linear})
    assert len(report(after).declined) == 3
    with fast_calls() as calls:
        assert torch.equal(evaluated(after, X.float()), evaluated(before, X.float()))
    assert not calls


# ------------------------------------------------------------------------------------------------------------ accepted


def _heads_of_eight(block):
    for layer in block.transformer:
        layer.attn.num_heads, layer.attn.head_dim, layer.attn.scale = 8, 8, 8**-0.5


def _pruned_heads(block):
    """One of four heads removed, with everything that belongs to it."""
    for layer in block.transformer:
        attention = layer.attn
        qkv, proj = nn.Linear(64, 3 * 48).double(), nn.Linear(48, 64).double()
        with torch.no_grad():
            qkv.weight.copy_(attention.qkv.weight.unflatten(0, (3, 64))[:, 16:].flatten(0, 1))
            qkv.bias.copy_(attention.qkv.bias.unflatten(0, (3, 64))[:, 16:].flatten())
            proj.weight.copy_(attention.proj.weight[:, 16:])
            proj.bias.copy_(attention.proj.bias)
        attention.qkv, attention.proj, attention.num_heads, attention.attn_dim = qkv, proj, 3, 48


def _timms_layer_norm(norm):
    norm.__class__, norm._fast_norm = timm.layers.LayerNorm, False
    return norm


ACCEPTED = {
    "other heads": _heads_of_eight,
    "heads pruned consistently": _pruned_heads,
    "no qkv bias": replaced(f"{LAYER}.attn.qkv", lambda m: _constant(64, 192)),
    "no fusion": replaced("conv_fusion", lambda _: None),
    "patches of 2 × 1": _with(patch_size=(2, 1), patch_area=2),
    "patches that do not divide": _with(patch_size=(3, 5), patch_area=15),
    "timm's LayerNorm": replaced("norm", _timms_layer_norm),
}


@pytest.mark.parametrize("case", ACCEPTED)
def test_accepted(case):
    model = models.build("timm").double()
    ACCEPTED[case](blocks(model)[0])
    with fast_calls() as calls:
        assert_same(evaluated(accelerated(model), X), evaluated(model, X))
    assert len(calls) == 3


def test_older_releases_are_accepted():
    """Attention had neither `norm` nor `gate` in timm 1.0.0; this release's forward cannot run without them."""
    model = models.build("timm")
    for block in blocks(model):
        for layer in block.transformer:
            del layer.attn.norm, layer.attn.gate
    assert len(report(accelerate(model, strict=True)).accelerated) == 3


@pytest.mark.parametrize("output_stride", [8, 16])
def test_dilated_models(output_stride):
    model = models.sensible(models.timm("xxs", output_stride=output_stride)).double()
    assert_same(evaluated(accelerated(model), X), evaluated(model, X))


# -------------------------------------------------------------------------------------------------------- random draws


def _dropping(model, **probabilities):
    """The model with these dropout probabilities, given by module name."""
    for name, module in model.named_modules():
        module.p = probabilities.get(name.rpartition(".")[2], getattr(module, "p", 0.0))
    return model


@pytest.mark.parametrize(
    ("path", "probabilities"),
    [
        (0.4, {}),
        (0.0, {"proj_drop": 0.2, "drop2": 0.3}),
        (0.0, {"attn_drop": 0.2}),
        (0.0, {"drop1": 0.2}),
        (0.2, {"attn_drop": 0.1, "proj_drop": 0.2, "drop1": 0.3, "drop2": 0.4}),
        (0.0, {"proj_drop": 1.0}),
    ],
)
@pytest.mark.parametrize("size", [(64, 64), (64, 96)])
def test_live_dropout_draws_what_timm_draws(path, probabilities, size):
    """With one seed, the same elements and the same sequences are dropped: outputs and gradients agree in float64."""
    model = _dropping(models.build("timm", drop_path_rate=path), **probabilities).double()
    x = models.images(2, *size).double()
    theirs = models.assert_same_draws(model, x)
    torch.manual_seed(6)
    with use_backend("reference"):
        assert torch.equal(model(x), theirs) is (probabilities == {"proj_drop": 1.0})


def test_drop_path_drops_whole_sequences():
    """One decision for each image and place in the patch: where every branch is dropped, pixels pass unchanged."""
    block = blocks(accelerated(models.build("timm", drop_path_rate=0.5)))[2].double()
    for layer in block.transformer:
        layer.drop_path1.drop_prob = layer.drop_path2.drop_prob = 0.7
    block.norm = nn.LayerNorm(96).double()
    block.train()
    seen = {}
    block.conv_1x1.register_forward_hook(lambda _, __, y: seen.update(before=y))
    block.conv_proj.register_forward_pre_hook(lambda _, args: seen.update(after=args[0]))
    torch.manual_seed(0)
    block(torch.randn(16, 80, 4, 4, dtype=torch.float64))
    plain = nn.functional.layer_norm(seen["before"].movedim(1, -1), (96,), eps=block.norm.eps).movedim(-1, 1)
    same = torch.isclose(seen["after"], plain).all(1)  # (B, H, W): which pixels passed unchanged
    places = same.unfold(1, 2, 2).unfold(2, 2, 2).flatten(1, 2).flatten(-2)  # (B, patches, places)
    assert torch.equal(places.any(1), places.all(1))
    assert 0 < places.all(1).sum() < 32  # of 64 sequences, each with probability 0.7⁶ (three layers, two branches)


def test_dropout_left_on_in_evaluation():
    models.assert_dropout_left_on(_dropping(models.build("timm"), proj_drop=0.2, drop2=0.3).double(), X)


# ----------------------------------------------------------------------------------------------- what timm's models do


def test_gradient_checkpointing():
    model = models.build("timm", drop_path_rate=0.2).double()
    x = models.images(2, 64, 64).double()
    models.assert_same_when_checkpointed(model, x, lambda model, on: model.set_grad_checkpointing(on))


@pytest.mark.parametrize("feature_cls", ["list", "hook", "fx", "getter"])
def test_features_only(feature_cls):
    extractor = models.sensible(models.timm("xxs", features_only=True, feature_cls=feature_cls)).double()
    ours = accelerated(extractor).eval()  # a copy of an FX graph is in training mode
    with torch.no_grad(), fast_calls() as calls:
        maps = ours(X)
    assert len(calls) == 3
    expected = extractor(X)
    assert [m.shape[1] for m in maps] == extractor.feature_info.channels()
    for value, other in zip(maps, expected, strict=True):
        assert_same(value, other.detach())


def test_feature_extraction_by_fx_after_accelerating():
    """The block stays a leaf of timm's tracer, which asks by isinstance: its inner modules are not in the graph."""
    model = accelerated(models.build("timm")).double()
    plain = FeatureGraphNet(mvit_kernels.restore(copy.deepcopy(model)), out_indices=(2, 3, 4))
    extractor = FeatureGraphNet(model, out_indices=(2, 3, 4))
    targets = [node.target for node in extractor.graph_module.graph.nodes if node.op == "call_module"]
    assert "stages.2.1" in targets and not any(".transformer" in target for target in targets)
    assert len(report(extractor).accelerated) == 3
    with torch.no_grad(), fast_calls() as calls:
        maps = extractor(X)
    assert len(calls) == 3
    for value, other in zip(maps, plain(X), strict=True):
        assert_same(value, other.detach())


def test_intermediates_and_another_head():
    model = models.build("timm").double()
    ours = accelerated(model)
    with torch.no_grad():
        (last, maps), (theirs, expected) = (m.forward_intermediates(X) for m in (ours, model))
        for value, other in zip([last, *maps], [theirs, *expected], strict=True):
            assert_same(value, other)
        for candidate in (ours, model):
            torch.manual_seed(0)
            candidate.reset_classifier(7)
            candidate.double()
        assert ours(X).shape == (1, 7)
        assert_same(ours(X), model(X))
        assert_same(ours.forward_features(X), model.forward_features(X))
    assert len(report(ours).accelerated) == 3
