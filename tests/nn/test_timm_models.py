# SPDX-License-Identifier: Apache-2.0
"""`mvit_kernels_mobilevit_*` in timm's registry: what timm expects of its models, compared with its own
`mobilevit_*`."""

from __future__ import annotations

import inspect
import subprocess
import sys

import pytest
import timm
import timm.optim
import torch
from timm.models import create_feature_extractor, get_graph_node_names, group_parameters, load_checkpoint
from torch import nn

from mvit_kernels import MobileViT, convert_state_dict, freeze, report, use_backend
from mvit_kernels.nn import register_timm_models
from support.models import assert_same, blocks, fast_calls, sensible

register_timm_models()

OURS, STOCK = "mvit_kernels_mobilevit_xxs", "mobilevit_xxs"
X = torch.rand(2, 3, 64, 96, generator=torch.Generator().manual_seed(0))


def ours(**options) -> nn.Module:
    return timm.create_model(OURS, **options)


def stock(**options) -> nn.Module:
    return timm.create_model(STOCK, **options)


def twins(**options) -> tuple[nn.Module, nn.Module]:
    """Ours and timm's in float64, built with the same options and given the same weights."""
    theirs = sensible(stock(**options)).double()
    twin = ours(**options).double().eval()
    weights = convert_state_dict(theirs.state_dict(), to="own")
    assert twin.load_state_dict(weights, strict=False).unexpected_keys == []
    return twin, theirs


# ------------------------------------------------------------------------------------------------ making it, its config


def test_creation():
    model = ours(num_classes=5, in_chans=4, drop_rate=0.2).eval()
    assert isinstance(model, MobileViT)
    assert model.classifier_dropout == 0.2
    assert model(torch.rand(1, 4, 64, 64)).shape == (1, 5)
    assert timm.data.resolve_model_data_config(model)["input_size"] == (3, 256, 256)
    assert timm.list_models("mvit_kernels_*") == [f"mvit_kernels_mobilevit_{mode}" for mode in ("s", "xs", "xxs")]
    assert timm.list_models("mvit_kernels_*", pretrained=True) == []
    assert sum(p.numel() for p in timm.create_model("mvit_kernels_mobilevit_s").parameters()) == 5_578_632
    assert list(ours().state_dict()) == list(MobileViT("xxs", num_classes=1000).state_dict())


def test_config_is_that_of_timms_model():
    model, theirs = ours().eval(), stock()
    for key in ("input_size", "pool_size", "num_classes", "crop_pct", "interpolation", "mean", "std", "crop_mode"):
        assert model.default_cfg[key] == theirs.default_cfg[key], key
    assert model.pretrained_cfg is model.default_cfg
    weights = model.state_dict()
    for key in ("first_conv", "classifier"):
        assert f"{model.default_cfg[key]}.weight" in weights
    x = torch.rand(1, *model.default_cfg["input_size"])
    assert model.forward_features(x).shape[2:] == model.default_cfg["pool_size"]
    for name in ("num_features", "head_hidden_size", "num_classes", "in_chans", "global_pool", "grad_checkpointing"):
        assert getattr(model, name) == getattr(theirs, name), name


@pytest.mark.parametrize(
    "option",
    [
        {"device": "meta"},
        {"dtype": torch.bfloat16},
        {"dtype": torch.float64},
        {"device": "cpu", "dtype": torch.float16},
    ],
)
def test_device_and_dtype(option):
    kinds = [
        {(value.device, value.dtype) for value in model.state_dict().values()}
        for model in (ours(**option), stock(**option))
    ]
    assert kinds[0] == kinds[1]


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"global_pool": "nope"}, "global_pool='nope' is unknown; choose 'avg', 'max'"),
        ({"global_pool": ""}, "nothing to classify; give num_classes=0 too"),
        ({"output_stride": 5}, r"output_stride=5 is unknown; choose one of \(8, 16, 32\)"),
        ({"drop_path_rate": 1.5}, "drop_path=1.5 is not a probability"),
    ],
)
def test_refused_options(option, message):
    with pytest.raises(ValueError, match=message):
        ours(**option)


# --------------------------------------------------------------------------------------- the same numbers as timm's own


@pytest.mark.parametrize("output_stride", [8, 16, 32])
def test_output_stride(output_stride):
    twin, theirs = twins(output_stride=output_stride, num_classes=7)
    with torch.no_grad(), fast_calls() as calls:
        assert_same(twin(X.double()), theirs(X.double()))
        assert_same(twin.forward_features(X.double()), theirs.forward_features(X.double()))
        assert_same(freeze(twin)(X.double()), theirs(X.double()))
    assert len(calls) >= 6
    reductions = [info["reduction"] for info in theirs.feature_info]
    assert [info["reduction"] for info in twin.feature_info] == [*reductions, reductions[-1]]


@pytest.mark.parametrize("pool", ["avg", "max", "avgmax", "catavgmax", "fast", "fastmax", ""])
def test_pools_and_resetting_the_classifier(pool):
    twin, theirs = twins(num_classes=0, global_pool=pool)
    x = X.double()
    with torch.no_grad():
        assert_same(twin(x), theirs(x))
        features = theirs.forward_features(x)
        assert_same(twin.forward_head(features, pre_logits=True), theirs.forward_head(features, pre_logits=True))
        assert (twin.head_hidden_size, twin.num_features) == (theirs.head_hidden_size, theirs.num_features)
        for model in (twin, theirs):
            model.reset_classifier(6, "catavgmax")
        assert twin.get_classifier() is twin.classifier
        assert twin.get_classifier().weight.shape == theirs.get_classifier().weight.shape
        assert twin.get_classifier().weight.dtype == torch.float64
        twin.classifier.load_state_dict(theirs.get_classifier().state_dict())
        assert_same(twin(x), theirs(x))
        twin.reset_classifier(0)
        assert (twin.num_classes, twin.global_pool) == (0, "catavgmax")
        assert_same(twin(x), theirs.forward_head(features, pre_logits=True))
        twin.reset_classifier(0, "")
        assert_same(twin(x), features)
        twin.reset_classifier(2)  # a new classifier needs a pool again
        assert (twin.global_pool, twin(x).shape) == ("avg", (len(x), 2))
        assert not any(module.training for module in twin.modules())
    assert ours(num_classes=3, global_pool="catavgmax").get_classifier().weight.shape == (3, 640)


def test_drop_path_draws_what_timm_draws():
    """The same rates, rising to the last block, and the same draws. In blocks without a shortcut timm's drop-path drops
    the whole value, which ours does not do: there it is switched off in timm's."""
    twin, theirs = twins(drop_path_rate=0.3, num_classes=4)
    for block in theirs.modules():
        if type(block).__name__ == "BottleneckBlock" and block.shortcut is None:
            block.drop_path = nn.Identity()
    rates = [
        {name.rstrip("12"): m.drop_prob for name, m in model.named_modules() if getattr(m, "drop_prob", 0.0)}
        for model in (twin, theirs)
    ]
    assert rates[0] == pytest.approx(rates[1]) and len(rates[0]) == 2 + 2 + 4 + 3
    assert max(rates[0].values()) == pytest.approx(0.3)
    outputs = []
    with use_backend("reference"):
        for model, seed in ((twin, 3), (theirs, 3), (twin, 4)):
            torch.manual_seed(seed)
            outputs.append(model.train()(X.double()).detach())
    assert_same(outputs[0], outputs[1])
    assert not torch.allclose(outputs[0], outputs[2])
    assert torch.equal(twin.eval()(X.double()), twin(X.double()))


def test_dropout_before_the_classifier_draws_what_timm_draws():
    twin, theirs = twins(drop_rate=0.5, num_classes=4)
    features = theirs.forward_features(X.double()).detach()
    for pre_logits in (False, True):
        outputs = []
        for model in (twin.train(), theirs.train()):
            torch.manual_seed(1)
            outputs.append(model.forward_head(features, pre_logits=pre_logits).detach())
        assert_same(*outputs)


def test_backward_reaches_every_parameter():
    model = ours(num_classes=42).train()
    model.set_grad_checkpointing(True)
    y = model(X)
    assert y.shape == (2, 42)
    y.mean().backward()
    assert all(p.grad is not None for p in model.parameters())


# --------------------------------------------------------------------------------------------------------- feature maps


@pytest.mark.parametrize("feature_cls", [None, "getter", "list", "dict", "hook", "fx"])
@pytest.mark.parametrize("out_indices", [(0, 1, 2, 3), (1, 3)])
def test_features_only(feature_cls, out_indices):
    options = {"features_only": True, "out_indices": out_indices} | (
        {"feature_cls": feature_cls} if feature_cls else {}
    )
    extractor, theirs = ours(**options), stock(**options)
    for attribute in ("channels", "reduction", "module_name"):
        assert getattr(extractor.feature_info, attribute)() == getattr(theirs.feature_info, attribute)()
    extractor, maps = extractor.double(), []
    with fast_calls() as calls:
        maps = extractor(X.double())
    assert len(calls) == 2
    maps = list(maps.values()) if feature_cls == "dict" else maps
    reference = ours(num_classes=0).double()
    reference.load_state_dict(_as_network(extractor), strict=False)
    expected = [reference.train(extractor.training).feature_maps(X.double())[index] for index in out_indices]
    for value, other in zip(maps, expected, strict=True):
        assert_same(value.detach(), other.detach())
    sum(value.sum() for value in maps).backward()
    assert all(p.grad is not None for p in extractor.parameters())  # unused layers are gone


def _as_network(extractor: nn.Module) -> dict[str, torch.Tensor]:
    """Its weights by the network's names: extractors add a prefix, or join the first two parts."""
    state_dict = {}
    for key, value in extractor.state_dict().items():
        key = key.removeprefix("model.").removeprefix("graph_module.")
        state_dict[key.replace("stages_", "stages.", 1)] = value.clone()
    return state_dict


@pytest.mark.parametrize("out_indices", [(0, 1, 2, 3, 4), (2, -1), 2, [4, 1]])
@pytest.mark.parametrize("feature_cls", [None, "list"])
def test_features_beside_the_last_convolution(out_indices, feature_cls):
    """Unlike timm's, ours gives both the last stage (4) and the last convolution (5)."""
    options = {"feature_cls": feature_cls} if feature_cls else {}
    features = ours(features_only=True, out_indices=out_indices, **options)
    maps = features(X)
    wanted = [4, 5] if out_indices == 2 else list(out_indices)
    every = [16, 24, 48, 64, 80, 320]
    assert features.feature_info.channels() == [every[index] for index in wanted]
    if feature_cls is None or out_indices != [4, 1]:  # timm's own gives them in the network's order
        assert [y.shape[1] for y in maps] == features.feature_info.channels()
        assert [96 // y.shape[3] for y in maps] == features.feature_info.reduction()


@pytest.mark.parametrize("feature_cls", [None, "list", "hook", "dict"])
def test_features_with_gradient_checkpointing(feature_cls):
    options = {"feature_cls": feature_cls} if feature_cls else {}
    extractor = ours(features_only=True, **options).double()
    gradients, seen = [], []
    blocks(extractor)[0].register_forward_pre_hook(lambda *_: seen.append(1))
    for enable in (False, True):
        extractor.set_grad_checkpointing(enable)
        extractor.zero_grad()
        maps = extractor(X.double())
        sum(y.square().mean() for y in (maps.values() if feature_cls == "dict" else maps)).backward()
        gradients.append([p.grad.clone() for p in extractor.parameters()])
    assert len(seen) == 3  # once, then once more in backward
    for a, b in zip(*gradients, strict=True):
        assert_same(a, b)


def test_forward_intermediates():
    model = ours(num_classes=3).eval()
    every = model.feature_maps(X)
    last, maps = model.forward_intermediates(X, indices=[0, 2])
    assert torch.equal(last, model.forward_features(X))
    assert all(torch.equal(a, b) for a, b in zip(maps, [every[0], every[2]], strict=True))
    last, maps = model.forward_intermediates(X, indices=[2, 0], stop_early=True)
    assert torch.equal(last, every[2])
    assert [y.shape[1] for y in maps] == [48, 16]
    assert len(model.forward_intermediates(X, intermediates_only=True)) == 6
    assert [y.shape[1] for y in model.forward_intermediates(X, indices=2)[1]] == [80, 320]
    with pytest.raises(ValueError, match="output_fmt='NLC'"):
        model.forward_intermediates(X, output_fmt="NLC")
    for indices, message in ((9, "last 9 maps were requested, of 6"), (0, "last 0"), ([9], "no map 9; take -6 to 5")):
        with pytest.raises(ValueError, match=message):
            model.forward_intermediates(X, indices=indices)


@pytest.mark.parametrize("indices", [[1, 2], 1, [-1]])
def test_pruning(indices):
    model, theirs = ours(), stock()
    expected = model.eval().forward_intermediates(X, indices, intermediates_only=True)
    assert model.prune_intermediate_layers(indices)[-1] == (2 if indices == [1, 2] else 5)
    theirs.prune_intermediate_layers(indices)
    for name in ("num_features", "head_hidden_size", "num_classes", "global_pool"):
        assert getattr(model, name) == getattr(theirs, name), name
    assert model(X).shape == theirs(X).shape
    assert torch.equal(model(X), expected[-1])
    model.reset_classifier(3, "avg")
    assert model(X).shape == (2, 3)


# ------------------------------------------------------------------------------- tracers, optimizers, checkpoints


@pytest.mark.parametrize("training", [False, True])
def test_fx(training):
    """Traced as in timm's own tests: a block is one node of the graph."""
    model = ours(num_classes=5).double().train(training)
    nodes = get_graph_node_names(model)[not training]
    assert "stages.2.1" in nodes and not any(".transformer" in node for node in nodes)
    traced = create_feature_extractor(model, return_nodes=[nodes[-1]]).train(training)
    assert len(report(traced).accelerated) == 3
    with fast_calls() as calls:
        (y,) = traced(X.double()).values()
        assert_same(y.detach(), model(X.double()).detach())
    assert len(calls) == 6
    y.sum().backward()
    assert all(p.grad is not None for p in traced.parameters())


def test_export_and_compile():
    """Of the first three stages: the others repeat their modules, and make a compilation four times as long."""
    model = ours(num_classes=0, global_pool="avgmax")
    model.prune_intermediate_layers([2])
    model.reset_classifier(5, "avgmax")
    expected = model.eval()(X)
    torch.testing.assert_close(torch.export.export(model, (X,)).module()(X), expected, rtol=1e-4, atol=1e-5)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(X), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("coarse", [False, True])
def test_layers_for_the_learning_rates_decay(coarse):
    groups = [group_parameters(model, model.group_matcher(coarse=coarse), reverse=True) for model in (ours(), stock())]
    depths = [sorted(set(group.values())) for group in groups]
    assert depths[0] == depths[1]
    optimizer = timm.optim.create_optimizer_v2(ours(), opt="adamw", layer_decay=0.7, weight_decay=0.05)
    scales = {group["lr_scale"] for group in optimizer.param_groups}
    assert len(scales) > 5 and max(scales) == 1.0


def test_inner_methods_are_there():
    """With timm's names, and timm's arguments in timm's order."""
    model, theirs = ours(), stock()
    lacking = {"head", "stage_ends", "drop_rate"}  # where timm's own network keeps things
    for name in {n for n in dir(theirs) if not n.startswith("_")} - set(dir(nn.Module)) - lacking:
        assert hasattr(model, name), name
        value = getattr(theirs, name)
        if inspect.ismethod(value):
            wanted = [p for p in inspect.signature(value).parameters if p not in ("reset_other", "exclude_final_conv")]
            assert list(inspect.signature(getattr(model, name)).parameters) == wanted


@pytest.mark.parametrize("source", ["own", "timm", "huggingface"])
def test_pretrained_weights_of_any_layout(source, tmp_path):
    """`checkpoint_path` takes its own; `pretrained` with a file takes what `load_checkpoint` takes."""
    theirs = sensible(stock(num_classes=1000))
    path = tmp_path / "weights.pth"
    torch.save(convert_state_dict(theirs.state_dict(), to=source), path)
    overlay = {"file": str(path)}
    with torch.no_grad():
        expected = theirs(X)
        model = ours(pretrained=True, pretrained_cfg_overlay=overlay).eval()
        torch.testing.assert_close(model(X), expected, rtol=1e-3, atol=1e-3)
        if source == "own":
            model = ours(checkpoint_path=str(path)).eval()
            torch.testing.assert_close(model(X), expected, rtol=1e-3, atol=1e-3)
            load_checkpoint(ours(), str(path))
        other = ours(pretrained=True, pretrained_cfg_overlay=overlay, num_classes=5, in_chans=1).eval()
        assert other(X[:, :1]).shape == (2, 5)
        weight = next(value for key, value in theirs.state_dict().items() if key == "stem.conv.weight")
        torch.testing.assert_close(other.stem.conv.weight, weight.sum(1, keepdim=True))
        features = ours(pretrained=True, pretrained_cfg_overlay=overlay, features_only=True).eval()
        torch.testing.assert_close(features(X)[0], model.feature_maps(X, [0])[0])


def test_there_is_nothing_to_download():
    for create in (ours, lambda **options: stock(pretrained_cfg_overlay={"hf_hub_id": None}, **options)):
        with pytest.raises(RuntimeError, match="no weights of its own|No pretrained weights exist"):
            create(pretrained=True)


# -------------------------------------------------------------------------------------------------------- registration


REGISTRATION = """
import sys, warnings
import mvit_kernels.nn as nn
assert "timm" not in sys.modules

def assert_registered(nn):
    model = timm.create_model("mvit_kernels_mobilevit_xxs", num_classes=2)
    assert model.num_classes == 2 and isinstance(model, nn.MobileViT)
nn.register_timm_models(); nn.register_timm_models()
import timm
assert_registered(nn)

for name in [name for name in sys.modules if name.startswith("mvit_kernels.nn")]:
    del sys.modules[name]
warnings.simplefilter("ignore")  # timm's, that the names are registered already
import mvit_kernels.nn as again
assert_registered(again)
"""


def test_registration_in_a_fresh_process():
    """timm is not imported unasked; called, and twice; on import, where timm was imported before. One process tries all
    three: to import torch and timm takes it three to six seconds."""
    command = [sys.executable, "-W", "error::UserWarning:timm", "-c", REGISTRATION]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
