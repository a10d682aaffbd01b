# SPDX-License-Identifier: Apache-2.0
"""State dicts of timm, Hugging Face, cvnets and this package, converted to one another, and what must not load."""

from __future__ import annotations

import copy

import pytest
import safetensors.torch
import timm
import torch
from kornia.models.vit_mobile import MobileViT as KorniaMobileViT
from torch import nn
from transformers import (
    MobileViTConfig,
    MobileViTForImageClassification,
    MobileViTForSemanticSegmentation,
    MobileViTModel,
)

from mvit_kernels import accelerate
from mvit_kernels.checkpoints import convert_state_dict, load_checkpoint
from mvit_kernels.checkpoints.table import LAYOUTS, network
from mvit_kernels.nn import MobileViT, register_timm_models
from support.data import land_use_checkpoint, land_use_photos

CLASSES = 5
HUGGINGFACE = {
    "xxs": {
        "hidden_sizes": [64, 80, 96],
        "neck_hidden_sizes": [16, 16, 24, 48, 64, 80, 320],
        "expand_ratio": 2.0,
    },
    "xs": {"hidden_sizes": [96, 120, 144], "neck_hidden_sizes": [16, 32, 48, 64, 80, 96, 384]},
    "s": {"hidden_sizes": [144, 192, 240], "neck_hidden_sizes": [16, 32, 64, 96, 128, 160, 640]},
}


def config(mode: str, **kwargs) -> MobileViTConfig:
    return MobileViTConfig(**HUGGINGFACE[mode], **kwargs)


def models(mode: str) -> dict[str, nn.Module]:
    """The three libraries' models that can be built here, each with its own weights."""
    return {
        "own": MobileViT(mode, num_classes=CLASSES),
        "timm": timm.create_model(f"mobilevit_{mode}", num_classes=CLASSES),
        "huggingface": MobileViTForImageClassification(config(mode, num_labels=CLASSES)),
    }


@torch.no_grad()
def randomise(model: nn.Module) -> nn.Module:
    """Draw weights and statistics in which no two tensors are alike, so that a swapped pair of keys shows."""
    torch.manual_seed(0)
    for name, tensor in model.state_dict().items():
        if tensor.ndim == 1:
            spread = torch.rand_like(tensor)
            tensor.copy_(spread + 0.5 if name.endswith(("weight", "running_var")) else 0.2 * (spread - 0.5))
        elif tensor.ndim > 1:
            nn.init.kaiming_normal_(tensor)
        else:
            tensor.fill_(7)
    return model


def logits(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        y = model.eval()(x)
    return getattr(y, "logits", y)


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return list(a) == list(b) and all(torch.equal(a[key], b[key]) for key in a)


@pytest.fixture(scope="module")
def xxs() -> dict[str, torch.Tensor]:
    """A classifier's state dict in this package's layout. Do not write to it."""
    return randomise(MobileViT("xxs", num_classes=CLASSES)).state_dict()


def snapshot(model: nn.Module) -> dict[str, torch.Tensor]:
    return {key: tensor.clone() for key, tensor in model.state_dict().items()}


# -- between the layouts


@pytest.mark.parametrize("mode", ["xxs", "xs", "s"])
def test_layouts_hold_the_same_network(mode):
    """Converted strictly both ways, and all libraries' logits agree, on an even and on a resized map."""
    every = models(mode)
    original = randomise(every["timm"]).state_dict()
    state_dict = original
    for layout in ("huggingface", "cvnets", "own", "timm", "own", "cvnets", "huggingface", "timm"):
        state_dict = convert_state_dict(state_dict, to=layout)
        if layout in every:
            assert list(state_dict) == list(network_order(every[layout]))
    assert same(state_dict, original)

    for layout in ("own", "huggingface"):
        load_checkpoint(every[layout], original)
        assert same(convert_state_dict(every[layout].state_dict(), to="timm"), original)
    for size in (256, 224) if mode == "xxs" else (224,):
        x = torch.randn(1, 3, size, size)
        expected = logits(every["timm"], x)
        for layout in ("own", "huggingface"):
            error = (logits(every[layout], x) - expected).abs().max()
            assert error <= 1e-5 * expected.abs().max(), layout


def network_order(model: nn.Module) -> list[str]:
    """The model's keys; Hugging Face's, which has a layer's norms last, in the network's order."""
    keys = list(model.state_dict())
    if not isinstance(model, MobileViTForImageClassification):
        return keys
    order = [name for names in network("huggingface").values() for name in names]
    return sorted(keys, key=lambda key: order.index(key.removeprefix("mobilevit.")))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_names_everything_once(layout):
    names = [name for names in network(layout).values() for name in names]
    assert len(names) == len(set(names)) == (347 if layout == "huggingface" else 311)


def test_land_use_checkpoint_has_exactly_the_cvnets_keys():
    state_dict = torch.load(land_use_checkpoint(), map_location="cpu", weights_only=True)
    assert sorted(state_dict) == sorted(names[0] for names in network("cvnets").values())


@pytest.mark.parametrize("library", ["own", "timm", "huggingface"])
def test_land_use_checkpoint_classifies_the_photos(library):
    photos, labels = land_use_photos()
    model = {
        "own": lambda: MobileViT("xxs", num_classes=21),
        "timm": lambda: timm.create_model("mobilevit_xxs", num_classes=21),
        "huggingface": lambda: MobileViTForImageClassification(config("xxs", num_labels=21)),
    }[library]()
    assert load_checkpoint(model, land_use_checkpoint()) is model
    y = logits(model, photos)
    assert torch.equal(y.argmax(1), labels)
    own = logits(load_checkpoint(MobileViT("xxs", num_classes=21), land_use_checkpoint()), photos[:2])
    assert (y[:2] - own).abs().max() <= 1e-5 * own.abs().max()


# -- prefixes, wrappers, files


@pytest.mark.parametrize(
    "wrap",
    [
        lambda sd: {f"module.{key}": value for key, value in sd.items()},
        lambda sd: {f"_orig_mod.module.{key}": value for key, value in sd.items()},
        lambda sd: {"state_dict": sd, "epoch": 3},
        lambda sd: {"model": {"state_dict": sd}, "optimizer": {}},
        lambda sd: {
            "state_dict": {k: torch.zeros_like(v) for k, v in sd.items()},
            "state_dict_ema": sd,
            "epoch": 3,
        },
        lambda sd: {f"model.{key}": value for key, value in sd.items()} | {"n_averaged": torch.tensor(9)},
        lambda sd: {f"encoder.{key}": value for key, value in convert_state_dict(sd, to="cvnets").items()},
        lambda sd: {key: value for key, value in sd.items() if not key.endswith("num_batches_tracked")},
    ],
    ids=[
        "DDP",
        "compile+DDP",
        "state_dict",
        "nested",
        "EMA first",
        "averaged",
        "cvnets task model",
        "no counters",
    ],
)
def test_wrapped_state_dicts_load(wrap, xxs):
    model = load_checkpoint(MobileViT("xxs", num_classes=CLASSES), wrap(xxs))
    expected = {k: v for k, v in xxs.items() if not k.endswith("num_batches_tracked")}
    state = model.state_dict()
    assert same({key: state[key] for key in expected}, expected)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors", ".bin"])
def test_files_load(suffix, xxs, tmp_path):
    """In Hugging Face's layout, to show that what convert_state_dict returns can be saved."""
    path = tmp_path / f"weights{suffix}"
    save = torch.save if suffix == ".pth" else safetensors.torch.save_file
    save(convert_state_dict(xxs, to="huggingface"), path)
    assert same(load_checkpoint(MobileViT("xxs", num_classes=CLASSES), path).state_dict(), xxs)
    assert same(load_checkpoint(MobileViT("xxs", num_classes=CLASSES), str(path)).state_dict(), xxs)


def test_wrapped_models_load(xxs):
    """torch.compile and timm's features_only rename the model's own keys."""
    compiled = load_checkpoint(torch.compile(MobileViT("xxs", num_classes=CLASSES)), xxs)
    assert same(convert_state_dict(compiled.state_dict(), to="own"), xxs)
    register_timm_models()
    for name in ("mobilevit_xxs", "mvit_kernels_mobilevit_xxs"):
        features = load_checkpoint(timm.create_model(name, features_only=True, out_indices=(0, 3)), xxs)
        layer = next(v for k, v in features.state_dict().items() if "transformer.2." in k and "qkv.weight" in k)
        assert torch.equal(layer, xxs["stages.3.1.transformer.2.qkv.weight"])


@pytest.mark.parametrize("library", ["own", "timm", "huggingface"])
def test_accelerated_models_load(library, xxs):
    """After accelerate() as before it; the model computes with the new weights, even if it has run with the old."""
    model = accelerate(models("xxs")[library], strict=True)
    x = torch.randn(1, 3, 64, 64)
    before = logits(model, x)
    expected = logits(load_checkpoint(MobileViT("xxs", num_classes=CLASSES), xxs), x)
    after = logits(load_checkpoint(model, xxs), x)
    assert (after - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert not torch.allclose(before, expected, rtol=1e-2)


def test_classifier_is_dropped_where_the_model_has_none(xxs):
    backbone = {key: value for key, value in xxs.items() if not key.startswith("classifier.")}
    for model in (
        MobileViT("xxs"),
        timm.create_model("mobilevit_xxs", num_classes=0),
        MobileViTModel(config("xxs")),
    ):
        assert same(convert_state_dict(load_checkpoint(model, xxs).state_dict(), to="own"), backbone)
        assert same(convert_state_dict(load_checkpoint(model, backbone).state_dict(), to="own"), backbone)


def test_segmentation_model_takes_the_backbone_and_its_own_head(xxs):
    model = MobileViTForSemanticSegmentation(config("xxs", num_labels=CLASSES))
    load_checkpoint(model.mobilevit, xxs)
    assert torch.equal(model.mobilevit.conv_stem.convolution.weight, xxs["stem.conv.weight"])
    other = MobileViTForSemanticSegmentation(config("xxs", num_labels=CLASSES))
    assert same(load_checkpoint(other, model.state_dict()).state_dict(), model.state_dict())


def test_flip_stem_channels(xxs):
    model = load_checkpoint(timm.create_model("mobilevit_xxs", num_classes=CLASSES), xxs, flip_stem_channels=True)
    assert torch.equal(model.stem.conv.weight, xxs["stem.conv.weight"][:, [2, 1, 0]])
    x = torch.randn(1, 3, 64, 64)
    upright = load_checkpoint(MobileViT("xxs", num_classes=CLASSES), xxs)
    assert torch.allclose(logits(model, x), logits(upright, x.flip(1)), rtol=1e-4, atol=1e-5)


def test_dtype_of_the_model_is_kept(xxs):
    half = {key: value.bfloat16() if value.is_floating_point() else value for key, value in xxs.items()}
    model = load_checkpoint(MobileViT("xxs", num_classes=CLASSES).double(), half)
    assert model.classifier.weight.dtype == torch.float64
    assert torch.equal(model.classifier.weight, half["classifier.weight"].double())


# -- what must not load: one clear error, and the model as it was


def without(sd, *prefixes):
    return {key: value for key, value in sd.items() if not key.startswith(prefixes)}


def changed(sd, key, value):
    return {**sd, key: value(sd[key])}


REFUSED = {
    "foreign network": (lambda sd: timm.create_model("resnet18").state_dict(), "not a MobileViT.*conv1.weight"),
    "MobileViTV2": (
        lambda sd: timm.create_model("mobilevitv2_050").state_dict(),
        r"nearest is timm, with 233 of 311 keys: stages\.1\.2\.conv1_1x1.*instead it has stages\.2\.1\.",
    ),
    "Kornia": (lambda sd: KorniaMobileViT("xxs").state_dict(), "Kornia's MobileViT, a different network"),
    "a layer is missing": (
        lambda sd: without(sd, "stages.3.1.transformer.3."),
        r"transformer\.3\.norm1\.weight",
    ),
    "a layer too many": (
        lambda sd: {**sd, "stages.3.1.transformer.4.norm1.weight": torch.ones(80)},
        r"and also stages\.3\.1\.transformer\.4\.norm1\.weight",
    ),
    "one key twice": (lambda sd: {**sd, "module.stem.conv.weight": sd["stem.conv.weight"]}, "mean the same"),
    "another variant": (
        lambda sd: MobileViT("xs", num_classes=CLASSES).state_dict(),
        "checkpoint is a MobileViT-XS, the model a MobileViT-XXS: build the model as 'xs'",
    ),
    "other classes": (
        lambda sd: MobileViT("xxs", num_classes=7).state_dict(),
        r"classifier\.weight is \(7, 320\), in the model \(5, 320\).*has 7 classes",
    ),
    "other channels": (lambda sd: MobileViT("xxs", 1, CLASSES).state_dict(), "images' channels differ"),
    "one odd shape": (
        lambda sd: changed(sd, "stages.0.0.expand.conv.weight", lambda t: t[:4]),
        "checkpoint's widths",
    ),
    "no classifier": (lambda sd: without(sd, "classifier."), "no classifier.weight.*num_classes=0"),
    "segmentation head": (
        lambda sd: {
            **without(sd, "classifier.", "final_conv."),
            "segmentation_head.classifier.weight": torch.ones(1),
        },
        "remove the keys that start with segmentation_head",
    ),
    "NaN": (
        lambda sd: changed(sd, "classifier.bias", lambda t: t.clone().fill_(torch.nan)),
        "NaN.*classifier.bias",
    ),
    "infinity": (
        lambda sd: changed(sd, "stem.norm.running_var", lambda t: t / 0),
        "infinite.*stem.norm.running_var",
    ),
    "quantised": (lambda sd: changed(sd, "classifier.weight", lambda t: t.to(torch.int8)), "torch.int8"),
    "beyond the dtype": (
        lambda sd: changed(sd, "stem.norm.bias", lambda t: t.double() + 1e300),
        "beyond torch.float32",
    ),
    "empty": (lambda sd: {}, "empty state dict"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_checkpoints_leave_the_model_as_it_was(case, xxs):
    spoil, message = REFUSED[case]
    model = MobileViT("xxs", num_classes=CLASSES)
    before = snapshot(model)
    with pytest.raises(ValueError, match=message):
        load_checkpoint(model, spoil(xxs))
    assert same(model.state_dict(), before)


@pytest.mark.parametrize("checkpoint", [None, 3, [torch.ones(1)], {"stem.conv.weight": 1.0}, {"lr": 0.1, "epoch": 3}])
def test_what_is_no_state_dict_is_a_type_error(checkpoint):
    with pytest.raises(TypeError, match="names"):
        load_checkpoint(MobileViT("xxs"), checkpoint)
    with pytest.raises(TypeError, match="names"):
        convert_state_dict(checkpoint, to="timm")


@pytest.mark.parametrize(
    ("model", "error", "message"),
    [
        (lambda: KorniaMobileViT("xxs"), ValueError, r"the model \(MobileViT\) is Kornia's"),
        (lambda: nn.Linear(3, 3), ValueError, r"the model \(Linear\) is not a MobileViT"),
        (lambda: "mobilevit_s", TypeError, "must be a torch.nn.Module; got str"),
        (
            lambda: MobileViTForSemanticSegmentation(config("xxs")),
            ValueError,
            r"has no segmentation_head.*load_checkpoint\(model\.mobilevit, \.\.\.\)",
        ),
        (
            lambda: MobileViTForImageClassification(config("s", num_labels=CLASSES)),
            ValueError,
            "model a MobileViT-S",
        ),
        (lambda: MobileViT("xxs", num_classes=CLASSES).to("meta"), ValueError, "meta device"),
        (lambda: nn.Sequential(nn.Linear(3, 3)), ValueError, r"\(Sequential\) is not a MobileViT"),
    ],
)
def test_refused_models(model, error, message, xxs):
    with pytest.raises(error, match=message):
        load_checkpoint(model(), xxs)


def test_refused_flip_and_conversions(xxs):
    grey = MobileViT("xxs", in_channels=1)
    with pytest.raises(ValueError, match="three input channels"):
        load_checkpoint(grey, copy.deepcopy(grey.state_dict()), flip_stem_channels=True)
    with pytest.raises(ValueError, match="to='keras' is unknown"):
        convert_state_dict(xxs, to="keras")
    with pytest.raises(ValueError, match="all five stages"):
        convert_state_dict(without(xxs, "classifier.", "final_conv.", "stages.4."), to="timm")
    with pytest.raises(ValueError, match="Kornia"):
        convert_state_dict(KorniaMobileViT("xxs").state_dict(), to="own")
    split = convert_state_dict(xxs, to="huggingface")
    query = next(key for key in split if key.endswith("query.weight"))
    with pytest.raises(ValueError, match="query, key and value must have one shape"):
        convert_state_dict(changed(split, query, lambda t: t[:-1]), to="own")
    with pytest.raises(ValueError, match="does not split"):
        qkv = "stages.2.1.transformer.0.qkv.weight"
        convert_state_dict(changed(xxs, qkv, lambda t: t[:-1]), to="huggingface")
