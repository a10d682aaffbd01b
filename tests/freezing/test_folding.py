# SPDX-License-Identifier: Apache-2.0
"""What `freeze` folds into a convolution, and what only looks foldable: that is left as it is, and reported."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

import mvit_kernels
from mvit_kernels._utils import third_party
from mvit_kernels.freezing.modules import FrozenConv2d, FrozenMean, FrozenSequential
from support import models

IMAGES = models.images(2, 64, 64).double()


def frozen_as_exact(model: nn.Module, x: torch.Tensor = IMAGES) -> nn.Module:
    """The frozen model, checked in float64 against `model`: folding the wrong thing would be off by far more."""
    model = model.double().eval()
    frozen = mvit_kernels.freeze(model)
    with torch.no_grad():
        expected, ours = models.output(model(x)), models.output(frozen(x))
    assert (ours - expected).abs().max() <= 1e-9 * expected.abs().max()
    return frozen


def drawn(norm: nn.Module) -> nn.Module:
    """Statistics and affine values that are far from neutral."""
    generator = torch.Generator().manual_seed(0)
    for name, low, high in (("weight", 0.5, 2), ("bias", -1, 1), ("running_mean", -1, 1), ("running_var", 0.2, 4)):
        value = getattr(norm, name)
        value.data.copy_(torch.rand(value.shape, generator=generator) * (high - low) + low)
    return norm


def timm_layer(name: str, *args, **options) -> nn.Module:
    return getattr(third_party.import_timm().layers, name)(*args, **options)


def frozen_batch_norm(channels: int) -> nn.Module:
    third_party.import_timm()  # torchvision comes with it
    from torchvision.ops import FrozenBatchNorm2d

    return FrozenBatchNorm2d(channels)


# -- in a Sequential beside the network


FOLDED = {
    "BatchNorm2d": lambda: [nn.BatchNorm2d(8), nn.SiLU()],
    "SyncBatchNorm": lambda: [nn.SyncBatchNorm(8), nn.SiLU()],
    "torchvision's FrozenBatchNorm2d": lambda: [frozen_batch_norm(8), nn.SiLU()],
    "timm's BatchNormAct2d": lambda: [timm_layer("BatchNormAct2d", 8, act_layer=nn.SiLU)],
    "timm's FrozenBatchNormAct2d": lambda: [timm_layer("FrozenBatchNormAct2d", 8, act_layer=nn.SiLU)],
    "timm's BatchNormAct2d without activation": lambda: [timm_layer("BatchNormAct2d", 8, apply_act=False), nn.SiLU()],
    "a subclass that overrides nothing": lambda: [type("Norm", (nn.BatchNorm2d,), {})(8), nn.SiLU()],
    "another eps": lambda: [nn.BatchNorm2d(8, eps=0.1), nn.SiLU()],
    "ReLU": lambda: [nn.BatchNorm2d(8), nn.ReLU(inplace=True)],
    "a subclass of ReLU": lambda: [nn.BatchNorm2d(8), type("Activation", (nn.ReLU,), {})()],
    "timm's BatchNormAct2d with ReLU": lambda: [timm_layer("BatchNormAct2d", 8, act_layer=nn.ReLU)],
}


@pytest.mark.parametrize("case", FOLDED)
def test_folded(case):
    norm, *after = FOLDED[case]()
    frozen = frozen_as_exact(nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), drawn(norm), *after))
    assert [type(module) for module in frozen] == [FrozenConv2d, nn.Identity, nn.Identity][: 2 + len(after)]
    assert frozen[0].activation == ("relu" if "ReLU" in case else "silu")
    assert frozen.freeze_report.left == ()


@pytest.mark.parametrize("activation", [nn.SiLU, nn.ReLU])
def test_an_activation_without_a_norm(activation):
    frozen = frozen_as_exact(nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), activation()))
    assert [type(module) for module in frozen] == [FrozenConv2d, nn.Identity]
    assert frozen.freeze_report.convolutions == ("0",)


def test_an_activation_without_a_norm_that_somebody_watches():
    """The convolution by itself, whose hook sees what it saw before."""
    for watched in (0, 1):
        model, seen = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU()), []
        model[watched].register_forward_hook(lambda *call, seen=seen: seen.append(call[2]))
        frozen = frozen_as_exact(model)
        assert [type(module) for module in frozen] == [FrozenConv2d, nn.ReLU]
        torch.testing.assert_close(seen[0], seen[1])


def test_a_mean_before_a_convolution_is_a_link():
    def tail(mean: nn.Module) -> nn.Sequential:
        return nn.Sequential(nn.Conv2d(3, 8, 3), mean, nn.Identity(), nn.Conv2d(8, 5, 1), nn.ReLU())

    frozen = frozen_as_exact(tail(nn.AdaptiveAvgPool2d((1, 1))))
    assert type(frozen) is FrozenSequential and type(frozen[1]) is FrozenMean
    assert type(frozen_as_exact(tail(nn.AdaptiveAvgPool2d((1, 2))))[1]) is nn.AdaptiveAvgPool2d
    watched, seen = tail(nn.AdaptiveAvgPool2d(1)), []
    watched[1].register_forward_hook(lambda *call: seen.append(call[2].shape))
    frozen = frozen_as_exact(watched)
    assert type(frozen[1]) is nn.AdaptiveAvgPool2d and len(seen) == 2
    assert type(frozen_as_exact(nn.Sequential(nn.Conv2d(3, 8, 3), nn.AdaptiveAvgPool2d(1)))[1]) is nn.AdaptiveAvgPool2d


def test_a_norms_own_activation_comes_before_the_next():
    norm = drawn(timm_layer("BatchNormAct2d", 8, act_layer=nn.SiLU))
    frozen = frozen_as_exact(nn.Sequential(nn.Conv2d(3, 8, 3), norm, nn.SiLU()))
    assert [type(module) for module in frozen] == [FrozenConv2d, nn.Identity, nn.SiLU]


class DoublingNorm(nn.BatchNorm2d):
    def forward(self, x):
        return 2 * super().forward(x)


class Swish(nn.Module):
    """It has a well-known name, and another slope."""

    def forward(self, x):
        return x * torch.sigmoid(1.7 * x)


class SteepSiLU(nn.SiLU):
    def forward(self, x):
        return x * torch.sigmoid(1.7 * x)


class SteepReLU(nn.ReLU):
    def forward(self, x):
        return torch.relu(1.7 * x)


class Standardised(nn.Conv2d):
    def _conv_forward(self, x, weight, bias):
        return super()._conv_forward(x, weight - weight.mean((1, 2, 3), keepdim=True), bias)


class Shifted(nn.Sequential):
    def forward(self, x):
        return super().forward(x) + 1


def patched(module: nn.Module) -> nn.Module:
    module.forward = lambda x, forward=module.forward: 2 * forward(x)
    return module


def untracked(norm: nn.BatchNorm2d) -> nn.BatchNorm2d:
    norm.running_mean = norm.running_var = None
    return norm


LEFT = {
    "an activation inside the norm": (
        lambda: [nn.Conv2d(3, 8, 3), drawn(timm_layer("BatchNormAct2d", 8, act_layer=nn.GELU))],
        {"1": "activation GELU; only SiLU and ReLU are fused"},
    ),
    "a dropout of somebody's inside the norm": (
        lambda: [nn.Conv2d(3, 8, 3), drawn(timm_layer("BatchNormAct2d", 8, act_layer=nn.SiLU, drop_layer=nn.Tanh))],
        {"1": "has a Tanh"},
    ),
    "a norm with its own forward": (
        lambda: [nn.Conv2d(3, 8, 3), drawn(DoublingNorm(8)), nn.SiLU()],
        {"1": "DoublingNorm is a subclassed or patched batch norm"},
    ),
    "a patched norm": (
        lambda: [nn.Conv2d(3, 8, 3), patched(drawn(nn.BatchNorm2d(8))), nn.SiLU()],
        {"1": "BatchNorm2d is a subclassed or patched batch norm"},
    ),
    "a norm of the batch": (
        lambda: [nn.Conv2d(3, 8, 3), untracked(nn.BatchNorm2d(8)), nn.SiLU()],
        {"1": "keeps no running statistics"},
    ),
    "somebody's Swish": (lambda: [nn.Conv2d(3, 8, 3), drawn(nn.BatchNorm2d(8)), Swish()], {}),
    "a SiLU with its own forward": (lambda: [nn.Conv2d(3, 8, 3), drawn(nn.BatchNorm2d(8)), SteepSiLU()], {}),
    "a ReLU with its own forward": (lambda: [nn.Conv2d(3, 8, 3), drawn(nn.BatchNorm2d(8)), SteepReLU()], {}),
    "a ReLU with its own forward, without a norm": (lambda: [nn.Conv2d(3, 8, 3), SteepReLU()], {}),
    "another ReLU": (lambda: [nn.Conv2d(3, 8, 3), drawn(nn.BatchNorm2d(8)), nn.ReLU6()], {}),
    "a patched SiLU": (lambda: [nn.Conv2d(3, 8, 3), drawn(nn.BatchNorm2d(8)), patched(nn.SiLU())], {}),
    "a convolution with its own forward": (
        lambda: [Standardised(3, 8, 3), drawn(nn.BatchNorm2d(8)), nn.SiLU()],
        {"0": "Standardised is not a plain Conv2d"},
    ),
    "a patched convolution": (
        lambda: [patched(nn.Conv2d(3, 8, 3)), drawn(nn.BatchNorm2d(8)), nn.SiLU()],
        {"0": "Conv2d is not a plain Conv2d"},
    ),
    "a padding mode": (
        lambda: [nn.Conv2d(3, 8, 3, padding=1, padding_mode="reflect"), drawn(nn.BatchNorm2d(8))],
        {"0": "of mode 'reflect'"},
    ),
}


@pytest.mark.parametrize("case", LEFT)
def test_what_only_looks_foldable_is_left(case):
    modules, reasons = LEFT[case]
    frozen = frozen_as_exact(nn.Sequential(*modules()))
    left = dict(frozen.freeze_report.left)
    assert left.keys() == reasons.keys()
    assert all(reason in left[name] for name, reason in reasons.items())


def test_a_sequential_with_its_own_forward_is_not_taken_apart():
    frozen = frozen_as_exact(Shifted(nn.Conv2d(3, 8, 3), drawn(nn.BatchNorm2d(8)), nn.SiLU()))
    assert type(frozen) is Shifted
    patched_one = frozen_as_exact(patched(nn.Sequential(nn.Conv2d(3, 8, 3), drawn(nn.BatchNorm2d(8)), nn.SiLU())))
    assert [type(module).__name__ for module in patched_one] == ["FrozenConv2d", "BatchNorm2d", "SiLU"]


def test_a_norm_of_another_width_keeps_its_error():
    """One channel would broadcast over all."""
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(1))
    frozen = mvit_kernels.freeze(model)
    assert "not of 8 channels" in dict(frozen.freeze_report.left)["0"]
    with pytest.raises(RuntimeError):
        frozen(IMAGES.float())


# -- in the network


class Doubled(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return 2 * self.inner(x)


class DropPath(nn.Module):
    """It has the name of timm's."""

    def forward(self, x):
        return 0.5 * x


def _own_class(module: nn.Module) -> None:
    """A user's class of the same name, around the same modules."""
    forward = type(module).forward
    namespace = {"forward": lambda self, x: 2 * forward(self, x), "__module__": "somebodys.models"}
    module.__class__ = type(type(module).__name__, (type(module),), namespace)


IN_THE_NETWORK = {
    "a unit with anti-aliasing": (lambda m: setattr(m.stem, "aa", nn.AvgPool2d(3, 1, 1)), "stem", "further modules"),
    "a unit of somebody's": (lambda m: _own_class(m.stem), None, None),
    "a patched unit": (lambda m: patched(m.stem), None, None),
    "an inverted residual of somebody's": (lambda m: _own_class(m.stages[1][1]), None, None),
    "a patched inverted residual": (lambda m: patched(m.stages[1][1]), None, None),
    "somebody's DropPath": (
        lambda m: setattr(m.stages[1][1], "drop_path", DropPath()),
        "stages.1.1",
        "further modules",
    ),
    "a container that computes": (
        lambda m: setattr(m.stages[1][1], "attn", Doubled(nn.Identity())),
        "stages.1.1",
        "further modules",
    ),
    "an Identity with its own forward": (
        lambda m: setattr(m.stages[1][1], "attn", patched(nn.Identity())),
        "stages.1.1",
        "further modules",
    ),
    "an activation of somebody's in the transformer": (
        lambda m: setattr(m.stages[2][1].transformer[0].mlp, "act", Swish()),
        "stages.2.1",
        "only SiLU is fused",
    ),
    "a dropout of somebody's in the transformer": (
        lambda m: setattr(m.stages[2][1].transformer[0].mlp, "drop1", type("Dropout", (Doubled,), {})(nn.Identity())),
        "stages.2.1",
        "only a Dropout is supported",
    ),
}


@pytest.mark.parametrize("case", IN_THE_NETWORK)
def test_in_the_network(case):
    change, name, reason = IN_THE_NETWORK[case]
    model = models.build("timm")
    change(model)
    before = models.build("timm").double()(IMAGES)
    frozen = frozen_as_exact(model)
    assert (frozen(IMAGES) - before).abs().max() > 1e-3 * before.abs().max()
    left = dict(frozen.freeze_report.left)
    assert list(left) == ([] if name is None else [name])
    assert name is None or reason in left[name]


def test_a_hook_that_would_no_longer_be_called_keeps_an_inverted_residual():
    model, calls = models.build("timm"), []
    model.stages[1][1].attn.register_forward_hook(lambda *_: calls.append(1))
    frozen = frozen_as_exact(model)
    assert dict(frozen.freeze_report.left) == {"stages.1.1": "an inner module carries a hook"}
    assert len(calls) == 2  # the model's own call, and the frozen one's


def test_a_sequential_of_a_block_with_its_own_forward_is_called():
    """cvnets' local representation; a native call that only ran its children would leave out the 1."""
    model = models.build("cvnets")
    for block in models.blocks(model):
        block.local_rep.__class__ = Shifted
    frozen = mvit_kernels.freeze(model)
    assert "Shifted" in str(frozen.freeze_report)
    assert mvit_kernels.verify(frozen, IMAGES.float(), reference=model).ok


# -- other kinds of batch norm in the whole network


@pytest.mark.parametrize("convert", ["convert_sync_batchnorm", "freeze_batch_norm_2d"])
def test_timms_other_batch_norms(convert):
    found = frozen_as_exact(timm_layer(convert, models.build("timm"))).freeze_report
    assert (len(found.inverted_residuals), len(found.convolutions), found.left) == (7, 35, ())


@pytest.mark.parametrize("library", ["huggingface", "kornia", "cvnets", "own"])
def test_sync_batch_norms(library):
    model = nn.SyncBatchNorm.convert_sync_batchnorm(models.build(library))
    found = frozen_as_exact(model).freeze_report
    assert (len(found.inverted_residuals), len(found.convolutions), found.left) == (7, 35, ())


# -- weights that are computed at every call


def _spectral_norm(module: nn.Module) -> None:
    nn.utils.spectral_norm(module)
    for _ in range(3):  # or the estimate is a draw of its own
        module._forward_pre_hooks[next(iter(module._forward_pre_hooks))](module, None)


COMPUTED = {
    "pruned": lambda module: prune.l1_unstructured(module, "weight", 0.4),
    "pruned twice": lambda module: [prune.random_unstructured(module, "weight", 0.3) for _ in range(2)],
    "weight norm, the older": nn.utils.weight_norm,
    "spectral norm, the older": _spectral_norm,
    "weight norm": parametrizations.weight_norm,
    "spectral norm": parametrizations.spectral_norm,
}


@pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated:FutureWarning")
@pytest.mark.parametrize("case", COMPUTED)
def test_computed_weights_are_folded_as_they_are(case):
    """For every convolution and every linear; the same weights as in evaluation."""
    torch.manual_seed(0)
    model, plain = models.build("timm").double(), models.build("timm").double()
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            module.weight.data *= torch.rand_like(module.weight) + 0.5
            COMPUTED[case](module)
    frozen = frozen_as_exact(model)
    found = frozen.freeze_report
    assert (len(found.blocks), len(found.inverted_residuals), len(found.convolutions)) == (3, 7, 35)
    assert found.left == found.unhooked == ()
    assert not torch.allclose(frozen(IMAGES), plain(IMAGES), rtol=1e-3)
    # the model itself goes on computing them
    assert any(name.startswith("stem.conv.weight_") for name in model.state_dict()) or "parametrizations" in str(model)
