# SPDX-License-Identifier: Apache-2.0
"""The package's own MobileViT: the network, its two paths, and its errors."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
from torch import nn

from mvit_kernels import accelerate, report, restore, use_backend
from mvit_kernels.nn import InvertedResidual, MobileViT, MobileViTBlock, TransformerLayer
from mvit_kernels.nn.layers import make_divisible


def set_fused(model: nn.Module, fused: bool) -> nn.Module:
    return accelerate(model) if fused else restore(model)


def paths(model: nn.Module) -> tuple[nn.Module, nn.Module]:
    """(fused, textbook) copies of a model in float64, where only an error of ours could make them differ."""
    return set_fused(copy.deepcopy(model).double(), True), set_fused(copy.deepcopy(model).double(), False)


def close(a: torch.Tensor, b: torch.Tensor, tolerance: float = 1e-11) -> bool:
    return (a - b).abs().max().item() <= tolerance * b.abs().max().item()


# -- the network


@pytest.mark.parametrize(
    ("mode", "with_head", "without", "features"),
    [("xxs", 1_272_024, 951_024, 320), ("xs", 2_317_848, 1_932_848, 384), ("s", 5_578_632, 4_937_632, 640)],
)
def test_parameter_counts_and_names(mode, with_head, without, features):
    model = MobileViT(mode, num_classes=1000)
    assert sum(p.numel() for p in model.parameters()) == with_head
    assert sum(p.numel() for p in MobileViT(mode).parameters()) == without
    assert model.num_features == features
    block = {"conv_local", "conv_in", "transformer", "norm", "conv_out", "conv_fusion"}
    for stage in (2, 3, 4):
        assert {name for name, _ in model.stages[stage][1].named_children()} == block
    assert len(model.state_dict()) == 311


def test_kornia_page_works_as_written():
    mvit = MobileViT(mode="xxs")
    assert mvit(torch.rand(1, 3, 256, 256)).shape == (1, 320, 8, 8)
    classifier = nn.Sequential(mvit, nn.AvgPool2d(256 // 32, 1), nn.Flatten(), nn.Linear(320, 1000))
    assert classifier(torch.rand(1, 3, 256, 256)).shape == (1, 1000)


@pytest.mark.parametrize(
    ("size", "patch_size"),
    [((32, 32), 2), ((33, 47), 2), ((128, 64), 2), ((160, 170), 2), ((32, 301), (1, 3)), ((96, 64), 4)],
)
def test_both_paths_agree_at_any_size(size, patch_size):
    fused, textbook = paths(MobileViT("xxs", in_channels=2, patch_size=patch_size).eval())
    x = torch.randn(2, 2, *size, dtype=torch.float64)
    with torch.no_grad():
        y = fused(x)
        assert y.shape == (2, 320, math.ceil(size[0] / 32), math.ceil(size[1] / 32))
        assert close(y, textbook(x))
        assert close(fused(x.to(memory_format=torch.channels_last)), y)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_both_paths_train_alike(dropout):
    """Every gradient, on even and resized maps; with dropout both draw the same numbers in the same order, if the
    reference serves the operators (kernels keep the rows in the map's order, and draw in that)."""
    fused, textbook = paths(MobileViT("xxs", num_classes=3, dropout=dropout, classifier_dropout=dropout).train())
    x = torch.randn(2, 3, 64, 96, dtype=torch.float64)
    for model in (fused, textbook):
        torch.manual_seed(0)
        with use_backend("reference" if dropout else "auto"):
            model(x).square().sum().backward()
    largest = max(p.grad.abs().max() for p in textbook.parameters())
    for (name, a), b in zip(fused.named_parameters(), textbook.parameters(), strict=True):
        # Some gradients are 0 in exact arithmetic (a bias before a batch norm): those are held to the largest gradient.
        assert (a.grad - b.grad).abs().max() <= 1e-9 * b.grad.abs().max() + 1e-13 * largest, name
    if dropout:
        assert not torch.equal(fused(x), fused(x))
    assert torch.equal(fused.eval()(x), fused(x))


def test_a_pixel_attends_within_its_place_in_the_patch():
    """Changing one pixel of a map only changes, after the transformer, the pixels at its place in every patch."""
    block = MobileViTBlock(8, dim=16, depth=2, patch_size=(2, 3)).eval()
    maps = []
    block.conv_out.register_forward_pre_hook(lambda _, args: maps.append(args[0]))
    block.conv_local = nn.Identity()
    x = torch.randn(1, 8, 6, 9)
    other = x.clone()
    other[0, :, 3, 4] += 1  # row 1 and column 1 of its patch
    with torch.no_grad():
        for fused in (True, False):
            maps.clear()
            set_fused(block, fused)
            block(x), block(other)
            changed = (maps[0] != maps[1]).any(1)[0]
            expected = torch.zeros(6, 9, dtype=torch.bool)
            expected[1::2, 1::3] = True
            assert torch.equal(changed, expected)


def test_fused_path_in_low_precision():
    """bfloat16, and bfloat16 autocast: as near to float64 as the textbook path is, up to rounding."""
    torch.manual_seed(0)
    model = MobileViT("xxs", num_classes=10).eval()
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        exact = copy.deepcopy(model).double()(x.double())
        band = torch.finfo(torch.bfloat16).eps * exact.abs().max()
        for autocast in (False, True):
            run = model if autocast else copy.deepcopy(model).bfloat16()
            images = x if autocast else x.bfloat16()
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                fused, textbook = (set_fused(run, value)(images) for value in (True, False))
            assert fused.dtype == textbook.dtype
            assert (fused - exact).abs().max() <= 2 * ((textbook - exact).abs().max() + band)


def test_initial_values():
    torch.manual_seed(0)
    model = MobileViT("s", num_classes=1000)
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            fan_out = module.out_channels * module.kernel_size[0] ** 2
            if module.weight.numel() > 1000:
                assert module.weight.std().item() == pytest.approx((2 / fan_out) ** 0.5, rel=0.15), name
        elif isinstance(module, nn.Linear):
            assert module.weight.abs().max() <= 0.04
            assert 0.016 <= module.weight.std() <= 0.019  # 0.02, less the tails
            assert not module.bias.any()
        elif isinstance(module, nn.BatchNorm2d | nn.LayerNorm):
            assert (module.weight == 1).all()
            assert not module.bias.any()


def test_inverted_residual():
    torch.manual_seed(0)
    x = torch.randn(1, 16, 9, 7)
    same = InvertedResidual(16, 16, expand_ratio=2, dilation=2).eval()
    assert same.residual
    assert same.depthwise.conv.weight.shape == (32, 1, 3, 3)
    assert same(x).shape == x.shape
    assert close(same(x) - x, same.project(same.depthwise(same.expand(x))), 1e-5)
    half = InvertedResidual(16, 16, stride=2).eval()
    assert not half.residual
    assert half(x).shape == (1, 16, 5, 4)
    assert [make_divisible(v) for v in (16, 27, 44, 4)] == [16, 32, 48, 8]
    assert make_divisible(75) == 72  # 72 is the nearest multiple, and no less than 90 % of 75
    assert make_divisible(11) == 16  # the nearest, 8, would be


# -- feature maps, head, checkpointing


def test_feature_maps_are_those_of_the_modules():
    model = MobileViT("xxs").eval()
    seen = {}
    for info in model.feature_info:
        module = model.get_submodule(info["module"])
        module.register_forward_hook(lambda _, __, y, name=info["module"]: seen.__setitem__(name, y))
    x = torch.rand(1, 3, 96, 64)
    with torch.no_grad():
        maps = model.feature_maps(x)
        assert len(maps) == 6
        for y, info in zip(maps, model.feature_info, strict=True):
            assert y is seen[info["module"]]
            assert y.shape == (1, info["num_chs"], 96 // info["reduction"], 64 // info["reduction"])
        assert torch.equal(model(x), maps[5])
        seen.clear()
        late, early = model.feature_maps(x, [-3, 1])
        assert torch.equal(late, maps[3])
        assert torch.equal(early, maps[1])
        assert list(seen) == ["stages.0", "stages.1", "stages.2", "stages.3"]  # nothing beyond
        assert model.feature_maps(x, []) == []
    with pytest.raises(ValueError, match="no map 6; take -6 to 5"):
        model.feature_maps(x, [6])


def test_head():
    model = MobileViT("xxs", num_classes=7).eval()
    x = torch.rand(2, 3, 64, 64)
    features = model.forward_features(x)
    assert torch.equal(model.forward_head(features, pre_logits=True), features.mean((2, 3)))
    assert torch.equal(model.forward_head(features), model(x))
    model.double().reset_classifier(4)
    assert model(x.double()).shape == (2, 4)
    model.reset_classifier(0)
    assert model(x.double()).shape == (2, 320, 2, 2)
    assert not [key for key in model.state_dict() if key.startswith("classifier")]


def test_gradient_checkpointing_gives_the_same_gradients():
    model = MobileViT("xxs", num_classes=2, dropout=0.1).double().train()
    x = torch.randn(2, 3, 32, 64, dtype=torch.float64)
    gradients, forwards = [], []
    model.stages[3][1].transformer[0].register_forward_hook(lambda *_: forwards.append(1))
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        torch.manual_seed(0)
        model(x).square().sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    assert len(forwards) == 3  # once, then once more in backward
    assert all(close(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize(
    ("fused", "training", "stages"), [(True, True, 3), (True, False, 5), (True, False, 3), (False, False, 3)]
)
def test_compiles_as_one_graph(fused, training, stages):
    """All five stages once: the last two repeat the modules of the others, and make a compilation three times as
    long. (ops/test_compile.py trains a whole network of timm's.)"""
    model = MobileViT("xxs", num_classes=2)
    if stages == 3:
        model.stages, model.final_conv, model.classifier = model.stages[:3], nn.Identity(), nn.Linear(48, 2)
    model = set_fused(model.train(training), fused)
    compiled = torch.compile(copy.deepcopy(model), fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 3, 64, 96)
    with torch.set_grad_enabled(training):
        expected, y = model(x), compiled(x)
        assert close(y, expected, 1e-5)
        if training:
            expected.sum().backward()
            y.sum().backward()
            a, b = (m.stages[2][1].transformer[1].fc1.weight.grad for m in (compiled, model))
            assert close(a, b, 1e-4)


def test_copies_and_pickles():
    model = MobileViT("xxs", num_classes=2).eval()
    x = torch.rand(1, 3, 64, 64)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(copied(x), model(x))


def test_empty_batch():
    assert MobileViT("xxs", num_classes=3).eval()(torch.rand(0, 3, 224, 224)).shape == (0, 3)


# -- what the operators would not see


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def test_touched_layers_run_by_the_textbook_path():
    """Hooks fire, and a replaced linear counts, as in any other module."""
    block = accelerate(MobileViTBlock(8, dim=16, depth=2).eval(), strict=True)
    x = torch.randn(1, 8, 4, 4)
    before = block(x)
    calls = []
    handle = block.transformer[1].fc1.register_forward_hook(lambda *_: calls.append(1))
    assert close(block(x), before, 1e-5)
    assert calls
    assert "transformer.1.fc1 carries a hook" in str(report(block))
    handle.remove()
    assert report(block).accelerated
    block.transformer[0].proj.__class__ = Doubled
    assert not close(block(x), before, 1e-5)
    block.transformer[0].proj.__class__ = nn.Linear
    torch.nn.utils.parametrizations.weight_norm(block.transformer[0].qkv)
    assert "transformer.0.qkv is" in str(report(block))
    assert close(block(x), before, 1e-5)


def test_dropout_follows_its_own_mode():
    block = accelerate(MobileViTBlock(8, dim=16, depth=1, dropout=0.5).train())
    x = torch.randn(1, 8, 4, 4)
    block.transformer[0].dropout.eval()
    assert torch.equal(block(x), block(x))
    block.transformer[0].dropout.train()
    assert not torch.equal(block(x), block(x))


# -- errors


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MobileViT("xl"), r"mode='xl' is unknown; choose one of \['xxs', 'xs', 's'\]"),
        (lambda: MobileViT("s", in_channels=0), "in_channels=0 is not a count"),
        (lambda: MobileViT("s", num_classes=-1), "num_classes=-1 is not a count"),
        (lambda: MobileViT("s", num_classes=2.5), "num_classes=2.5 is not a count"),
        (lambda: MobileViT("s", patch_size=(2, 0)), r"patch_size is \(2, 0\)"),
        (lambda: MobileViT("s", patch_size=(2, 2, 2)), r"patch_size is \(2, 2, 2\)"),
        (lambda: MobileViT("s", dropout=1.5), "dropout=1.5 is not a probability"),
        (lambda: MobileViT("s", classifier_dropout=-0.1), "classifier_dropout=-0.1 is not a probability"),
        (lambda: TransformerLayer(30), "dim=30 does not divide into num_heads=4"),
        (lambda: TransformerLayer(32, dropout=2.0), "dropout=2.0 is not a probability"),
        (lambda: MobileViTBlock(8, dim=16, depth=0), "depth=0"),
    ],
)
def test_refused_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("images", "error", "message"),
    [
        ([1, 2], TypeError, "a tensor; got list"),
        (torch.rand(3, 64, 64), ValueError, r"got shape \(3, 64, 64\): add the batch axis with x\[None\]"),
        (torch.rand(2, 64), ValueError, r"got shape \(2, 64\): reshape"),
        (torch.rand(1, 64, 64, 3), ValueError, r"channels first with x.movedim\(-1, 1\)"),
        (torch.rand(1, 4, 64, 64), ValueError, "in_channels=4"),
        (torch.rand(1, 3, 31, 64), ValueError, "H, W >= 32, the network's stride; got 31 x 64"),
        (torch.zeros(1, 3, 64, 64, dtype=torch.uint8), TypeError, r"got torch.uint8: take x.float\(\) / 255"),
        (
            torch.rand(1, 3, 64, 64, dtype=torch.float64),
            TypeError,
            "of torch.float32, as the parameters; got torch.f",
        ),
        (torch.rand(1, 3, 64, 64, device="meta"), ValueError, "on cpu, as the model is; got meta"),
    ],
)
def test_refused_images(images, error, message):
    with pytest.raises(error, match=message):
        MobileViT("xxs")(images)
