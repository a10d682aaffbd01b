# SPDX-License-Identifier: Apache-2.0
"""Models by name: what is built, which weights it gets, and what its logits are."""

from types import SimpleNamespace

import pytest
import torch

from mvit_kernels import zoo
from mvit_kernels._utils.third_party import import_transformers


@pytest.mark.parametrize(
    "name",
    [
        *("own/xxs", "timm/mobilevit_xxs", "huggingface/xxs", "kornia/xxs"),
        *("deeplabv3/xxs", "apple/deeplabv3-mobilevit-xx-small"),
    ],
)
def test_models_without_weights_are_alive_and_always_the_same(name):
    state = torch.random.get_rng_state()
    model, again = zoo.load(name), zoo.load(name)
    assert torch.equal(state, torch.random.get_rng_state())
    x = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        y, same = zoo.logits(model(x)), zoo.logits(again(x))
    assert torch.equal(y, same) and y.std() > 0.1 and (y[0] - y[1]).abs().max() > 0.1
    norms = [module for module in model.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    assert not any(norm.training or norm.momentum == 1.0 for norm in norms)
    # So that each norm folds into something: none of these statistics and weights is that of a fresh norm.
    assert all(norm.running_mean.std() > 0 and norm.running_var.std() > 0 and norm.weight.std() > 0 for norm in norms)


@pytest.mark.parametrize(
    "name, num_classes, shape",
    [
        ("xxs", None, (1, 1000)),
        ("own/xs", 7, (1, 7)),
        ("mobilevit_xxs.cvnets_in1k", 7, (1, 7)),
        ("mvit_kernels_mobilevit_xxs", 7, (1, 7)),
        ("apple/mobilevit-xx-small", 7, (1, 7)),
        ("huggingface/xs", 0, (1, 384, 2, 2)),
        ("kornia/xxs", None, (1, 320, 2, 2)),
        ("deeplabv3/xs", None, (1, 21, 4, 4)),
        ("deeplabv3/xxs", 4, (1, 4, 4, 4)),
        ("apple/deeplabv3-mobilevit-x-small", None, (1, 21, 4, 4)),
        ("apple/deeplabv3-mobilevit-small", 4, (1, 4, 4, 4)),
    ],
)
def test_names(name, num_classes, shape):
    model = zoo.load(name, num_classes=num_classes)
    with torch.no_grad():
        assert zoo.logits(model(torch.rand(1, 3, 64, 64))).shape == shape


def test_checkpoint_decides_variant_and_classes(weights):
    model = zoo.load(None, checkpoint=weights)
    assert (model.mode, model.num_classes) == ("xxs", 5)
    with pytest.raises(ValueError, match="XXS"):
        zoo.load("own/s", checkpoint=weights)


@pytest.mark.parametrize("name", [None, "deeplabv3/xxs", "apple/deeplabv3-mobilevit-xx-small"])
def test_checkpoint_decides_the_task(tmp_path, weights, name):
    trained = zoo.load("deeplabv3/xxs", num_classes=4)
    torch.save(trained.state_dict(), tmp_path / "segmentation.pth")
    model = zoo.load(name, checkpoint=tmp_path / "segmentation.pth")
    x = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        expected = trained(x)
        assert (zoo.logits(model(x)) - expected).abs().max() <= 1e-5 * expected.abs().max()
    with pytest.raises(ValueError, match="of DeepLabv3 for segmentation, has no"):
        zoo.load("own/xxs", checkpoint=tmp_path / "segmentation.pth")
    with pytest.raises(ValueError, match=r"has no .*load_checkpoint\(model\.(backbone|mobilevit), "):
        zoo.load(name or "deeplabv3/xxs", checkpoint=weights)


def test_segmentation_without_classes():
    for name in ("deeplabv3/xxs", "apple/deeplabv3-mobilevit-small"):
        with pytest.raises(ValueError, match="class"):
            zoo.load(name, num_classes=0)


def test_kornia_loads_its_own_checkpoints_only(tmp_path, weights):
    model = zoo.load("kornia/xxs")
    with torch.no_grad():
        model.conv1[0].weight.fill_(0.5)
    torch.save(model.state_dict(), tmp_path / "kornia.pth")
    loaded = zoo.load("kornia/xxs", checkpoint=tmp_path / "kornia.pth")
    weights_loaded = loaded.state_dict()
    assert all(torch.equal(value, weights_loaded[key]) for key, value in model.state_dict().items())
    with pytest.raises(ValueError, match="do not fit kornia/xs"):
        zoo.load("kornia/xs", checkpoint=tmp_path / "kornia.pth")
    for name, checkpoint in (("own/xxs", tmp_path / "kornia.pth"), ("kornia/xxs", weights)):
        with pytest.raises(ValueError, match="Kornia"):
            zoo.load(name, checkpoint=checkpoint)


def test_pretrained_from_a_folder(tmp_path):
    zoo.load("huggingface/xxs", num_classes=3).save_pretrained(tmp_path)
    model = zoo.load(str(tmp_path), pretrained=True)
    expected = zoo.load("huggingface/xxs", num_classes=3).state_dict()
    assert not model.training
    assert all(torch.equal(value, expected[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("name", ["apple/mobilevit-small", "mobilevit_s"])
def test_weights_that_cannot_be_fetched(refused, monkeypatch, tmp_path, name):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    import_transformers()
    assert f"the weights of {name} could not be fetched" in refused("verify", "--model", name, "--pretrained")


def test_logits_takes_what_models_return():
    value = torch.rand(2, 3)
    for output in (
        value,
        (value, None),
        [value],
        SimpleNamespace(logits=value),
        SimpleNamespace(last_hidden_state=value),
    ):
        assert zoo.logits(output) is value
    for output in ((), {"x": value}, None):
        with pytest.raises(TypeError, match="contains no tensor"):
            zoo.logits(output)
