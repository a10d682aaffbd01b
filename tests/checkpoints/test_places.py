# SPDX-License-Identifier: Apache-2.0
"""Where in a checkpoint the network is: below prefixes, in training checkpoints, next to other things."""

from __future__ import annotations

import argparse
import logging

import pytest
import timm
import torch
from torch import nn
from transformers import MobileViTConfig, MobileViTForImageClassification

from mvit_kernels.checkpoints import convert_state_dict, load_checkpoint
from mvit_kernels.nn import MobileViT

CLASSES = 5
PREFIXES = [
    *("net.", "backbone.", "student.", "model.net.", "base_model.model.", "module.", "_orig_mod.", "model._orig_mod."),
    *("ema.module.", "0.", "model.backbone.features.", "module.module.encoder."),
]
LAYOUTS = ["own", "timm", "huggingface", "cvnets"]


@pytest.fixture(scope="module")
def xxs() -> dict[str, torch.Tensor]:
    """A classifier's state dict. Do not write to it."""
    torch.manual_seed(0)
    return MobileViT("xxs", num_classes=CLASSES).state_dict()


@pytest.fixture(scope="module")
def other() -> dict[str, torch.Tensor]:
    """Another network's weights."""
    torch.manual_seed(1)
    return MobileViT("xxs", num_classes=CLASSES).state_dict()


@pytest.fixture(scope="module")
def models() -> dict[int, nn.Module]:
    """The models that are loaded into, by their number of classes."""
    return {CLASSES: MobileViT("xxs", num_classes=CLASSES), 0: MobileViT("xxs")}


@pytest.fixture
def loads(models, xxs, other, caplog):
    """Load a checkpoint into a model with other weights, which must then have exactly `xxs`. Returns the warnings."""

    def loads(checkpoint, classes=CLASSES):
        model = models[classes]
        names = model.state_dict().keys()  # once: for each key again, it took 0.4 s a test
        model.load_state_dict({key: value for key, value in other.items() if key in names})
        caplog.clear()
        with caplog.at_level(logging.INFO, logger="mvit_kernels"):
            load_checkpoint(model, checkpoint)
        assert all(torch.equal(value, xxs[key]) for key, value in model.state_dict().items())
        return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]

    return loads


def below(prefix, state_dict):
    return {prefix + key: value for key, value in state_dict.items()}


def without_classifier(state_dict):
    return {key: value for key, value in state_dict.items() if "classifier" not in key}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("prefix", PREFIXES)
def test_any_prefix_is_taken_off_and_told(prefix, layout, xxs, loads, caplog):
    assert loads(below(prefix, convert_state_dict(xxs, to=layout))) == []
    assert f"the network's keys below {prefix!r}" in caplog.text


@pytest.mark.parametrize("layout", LAYOUTS)
def test_without_a_prefix_nothing_is_told(layout, xxs, loads, caplog):
    assert loads(convert_state_dict(xxs, to=layout)) == []
    assert caplog.text == ""


def test_wrappers_inside_the_keys(xxs, loads):
    """Of blocks that were compiled, sharded or checkpointed one by one."""
    for wrapper in ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module._orig_mod."):
        loads(below("net.", {key.replace("stages.2.1.", f"stages.2.1.{wrapper}"): v for key, v in xxs.items()}))


def test_lightning_checkpoint(xxs, loads, tmp_path):
    """As Lightning writes it, with what a training module has besides its network."""
    checkpoint = {
        "epoch": 3,
        "global_step": 100,
        "pytorch-lightning_version": "2.5.0",
        "state_dict": {
            **below("net.", xxs),
            "loss.weight": torch.ones(CLASSES),
            "val_accuracy.total": torch.tensor(3.0),
            **below("teacher.", timm.create_model("resnet18").state_dict()),
        },
        "loops": {"fit_loop": {"state_dict": {}}},
        "callbacks": {"ModelCheckpoint{'monitor': 'acc'}": {"best_model_score": torch.tensor(0.9)}},
        "optimizer_states": [{"state": {0: {"exp_avg": torch.ones(2)}}}],
        "lr_schedulers": [],
        "hparams_name": "kwargs",
        "hyper_parameters": {"lr": 0.1, "config": argparse.Namespace(depth=2)},
    }
    torch.save(checkpoint, tmp_path / "epoch=3.ckpt")
    (warning,) = loads(tmp_path / "epoch=3.ckpt")
    assert "also has loss.weight, val_accuracy.total, teacher.conv1.weight" in warning and "ignored" in warning


def test_losses_and_metrics_beside_a_backbone(xxs, loads):
    backbone = {**below("backbone.", without_classifier(xxs)), "criterion.weight": torch.ones(3)}
    assert "criterion.weight" in loads(backbone, classes=0)[0]
    assert "criterion.weight" in loads({**xxs, "criterion.weight": torch.ones(3)})[0]


@pytest.mark.parametrize(
    "wrap",
    [
        *(lambda sd, key=key: {key: sd, "epoch": 3} for key in ("net", "module", "params_ema", "student", "weights")),
        *(lambda sd, key=key: {key: sd, "step": torch.tensor(3)} for key in ("state_dict", "model_state_dict", "any")),
        lambda sd: {"ema": {"module": sd, "decay": 0.99}},
        lambda sd: {"model": {"net": below("module.", sd)}, "optimizer": {"exp_avg": sd}},
        lambda sd: {"state_dict": below("model.net.", sd), "optimizer_states": [below("model.net.", sd)]},
    ],
)
def test_any_wrapper_is_opened(wrap, xxs, loads):
    assert loads(wrap(xxs)) == []


@pytest.mark.parametrize("average", ["state_dict_ema", "model_ema", "ema", "params_ema", "swa_model", "averaged_model"])
def test_averaged_weights_are_taken_and_told(average, xxs, other, loads):
    (warning,) = loads({"state_dict": other, average: xxs, "optimizer": {}})
    assert f"has weights in {average!r} (used) and in 'state_dict' (ignored)" in warning


def test_averaged_weights_in_one_state_dict(xxs, other, loads):
    (warning,) = loads({**below("net.", other), **below("net_ema.", xxs)})
    assert "also has net.stem.conv.weight" in warning
    loads({**other, **below("ema_model.module.", xxs)})


def test_the_usual_place_is_taken_and_told(xxs, other, loads):
    (warning,) = loads({"best": other, "model": xxs})
    assert "has weights in 'model' (used) and in 'best'" in warning


def test_two_networks_are_refused(xxs, other, models):
    model = models[CLASSES]
    with pytest.raises(ValueError, match=r"several state dicts, in 'student', 'teacher'.*checkpoint\['student'\]"):
        load_checkpoint(model, {"student": xxs, "teacher": other})
    both = {**below("student.", xxs), **below("teacher.", other)}
    with pytest.raises(ValueError, match=r"2 MobileViTs, below 'student.' and 'teacher.'; .*startswith\('teacher.'\)"):
        load_checkpoint(model, both)
    load_checkpoint(model, {key: value for key, value in both.items() if key.startswith("student.")})
    assert torch.equal(model.classifier.bias, xxs["classifier.bias"])


def test_heads_of_other_tasks_are_refused(xxs, models):
    """With a network that lacks its classifier, another head is what makes the model: it is not silently dropped."""
    for head in ("head.weight", "seg_head.aspp.conv.weight", "fc.bias"):
        with pytest.raises(ValueError, match=rf"and also {head}.*start with {head.split('.')[0]}"):
            load_checkpoint(models[0], {**below("backbone.", without_classifier(xxs)), head: torch.ones(3)})
    with pytest.raises(ValueError, match="has no classifier.weight"):
        load_checkpoint(models[CLASSES], below("backbone.", without_classifier(xxs)))


def test_peft(xxs, models, loads):
    """Only the prefix is removed; adapters are part of the function, and must be merged first."""
    loads(below("base_model.model.", xxs))
    qkv = "stages.2.1.transformer.0.qkv"
    adapted = below("base_model.model.", xxs)
    adapted[f"base_model.model.{qkv}.base_layer.weight"] = adapted.pop(f"base_model.model.{qkv}.weight")
    adapted[f"base_model.model.{qkv}.lora_A.default.weight"] = torch.ones(2, 64)
    adapter_alone = {f"base_model.model.{qkv}.lora_A.weight": torch.ones(2, 64)}
    for state_dict in (adapted, adapter_alone):
        with pytest.raises(ValueError, match=r"PEFT adapters.*merge_and_unload\(\)"):
            load_checkpoint(models[CLASSES], state_dict)


@pytest.mark.parametrize("wrap", [nn.Sequential, nn.DataParallel, lambda model: nn.ModuleDict({"net": model})])
def test_models_with_prefixes(wrap, xxs):
    model = MobileViT("xxs", num_classes=CLASSES)
    load_checkpoint(wrap(model), below("module.", xxs))
    assert all(torch.equal(value, xxs[key]) for key, value in model.state_dict().items())


def test_models_with_more_than_the_network(xxs):
    """A training module loads its own state dict whole; given the network's alone, the error says where that
    belongs."""
    module = nn.ModuleDict({"net": MobileViT("xxs", num_classes=CLASSES), "loss": nn.Linear(2, 2)})
    whole = {**below("net.", xxs), "loss.weight": torch.ones(2, 2), "loss.bias": torch.ones(2)}
    assert all(torch.equal(value, whole[key]) for key, value in load_checkpoint(module, whole).state_dict().items())
    with pytest.raises(ValueError, match=r"has no loss.weight, loss.bias.*load_checkpoint\(model.net, ...\)"):
        load_checkpoint(module, xxs)


def test_huggingface_below_a_prefix(xxs, other):
    """Its classifier stands next to the network, not below the network's prefix."""
    widths = {"hidden_sizes": [64, 80, 96], "neck_hidden_sizes": [16, 16, 24, 48, 64, 80, 320], "expand_ratio": 2.0}
    model = MobileViTForImageClassification(MobileViTConfig(**widths, num_labels=CLASSES))
    load_checkpoint(nn.ModuleDict({"net": model}), below("lit.", convert_state_dict(xxs, to="huggingface")))
    assert torch.equal(model.classifier.weight, xxs["classifier.weight"])


@pytest.mark.parametrize("name", ["mobilevitv2_050", "hf"])
def test_mobilevit_v2_is_named(name, models):
    if name == "hf":
        from transformers import MobileViTV2Config, MobileViTV2Model

        state_dict = MobileViTV2Model(MobileViTV2Config(width_multiplier=0.5)).state_dict()
    else:
        state_dict = timm.create_model(name).state_dict()
    with pytest.raises(ValueError, match="MobileViTv2, a different network"):
        load_checkpoint(models[CLASSES], below("net.", state_dict))


def test_the_command_line_tells(run, xxs, tmp_path):
    torch.save({"state_dict": below("net.", xxs)}, tmp_path / "a.ckpt")
    result = run("verify", "--checkpoint", tmp_path / "a.ckpt", "--size", "64")
    assert result.code == 0 and result.err == f"{tmp_path / 'a.ckpt'}: the network's keys are those below 'net.'\n"
