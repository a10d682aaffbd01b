# SPDX-License-Identifier: Apache-2.0
"""`freeze`: the copy computes what the model computes, faster; what cannot be frozen is left as it is, and reported."""

from __future__ import annotations

import copy
import io
import pickle
import threading

import pytest
import torch
from torch import nn

import mvit_kernels
from mvit_kernels.freezing import DTYPES
from mvit_kernels.freezing.block import FrozenMobileViTBlock
from mvit_kernels.freezing.modules import FrozenConv2d, FrozenInvertedResidual
from support import models

# Kornia takes multiples of 64 only; elsewhere 70 × 90 gives odd maps at every stage, which are resized
SIZES = {"kornia": (64, 128)}


def example(library: str, batch: int = 2) -> torch.Tensor:
    return models.images(batch, *SIZES.get(library, (70, 90)))


def run(model: nn.Module, images: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return models.output(model(images))


@pytest.mark.parametrize("library", models.LIBRARIES)
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_a_frozen_model_is_the_model(library, dtype):
    model = models.build(library)
    frozen = mvit_kernels.freeze(model, dtype=dtype)
    verification = mvit_kernels.verify(frozen, example(library), reference=model)
    assert verification.ok, f"\n{verification}"
    assert len(verification.rows) >= 4  # three blocks and the output
    report = frozen.freeze_report
    assert (len(report.blocks), len(report.inverted_residuals), len(report.convolutions)) == (3, 7, 35)
    assert report.left == report.composed == ()
    assert "3 MobileViT blocks, 7 inverted residuals and 35 convolutions frozen" in str(report)


@pytest.mark.parametrize("variant", ["xs", "s"])
def test_the_larger_variants(variant):
    model = models.build("timm", variant)
    verification = mvit_kernels.verify(mvit_kernels.freeze(model), models.images(1, 70, 90), reference=model)
    assert verification.ok, f"\n{verification}"


@pytest.mark.parametrize("dtype", DTYPES)
def test_outputs_come_in_the_dtype_asked_for(dtype):
    frozen = mvit_kernels.freeze(models.build("timm"), dtype=dtype)
    assert run(frozen, example("timm")).dtype == dtype
    assert {value.dtype for value in frozen.state_dict().values()} == {dtype}


def test_a_float64_fold_is_exact():
    model, images = models.build("timm"), example("timm").double()
    frozen = run(mvit_kernels.freeze(model, dtype=torch.float64), images)
    torch.testing.assert_close(frozen, run(model.double(), images), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("library", ["timm", "huggingface", "own"])
def test_any_input_layout(library):
    frozen = mvit_kernels.freeze(models.build(library))
    images = example(library)
    wide = torch.full((2, 3, 90, 130), 42.0)
    wide[:, :, 5:75, 7:97] = images
    expected = run(frozen, images)
    for laid_out in (images.contiguous(memory_format=torch.channels_last), wide[:, :, 5:75, 7:97]):
        assert torch.equal(run(frozen, laid_out), expected)


def test_maps_stay_channels_last_inside():
    frozen = mvit_kernels.freeze(models.build("timm"))
    seen = []

    def look(module: nn.Module, args: tuple, y: torch.Tensor) -> None:
        seen.append(y.is_contiguous(memory_format=torch.channels_last))

    for module in frozen.modules():
        if isinstance(module, (FrozenConv2d, FrozenInvertedResidual, FrozenMobileViTBlock)):
            module.register_forward_hook(look)
    run(frozen, example("timm"))
    assert len(seen) > 30
    assert all(seen)


@pytest.mark.parametrize("library", ["timm", "own"])
def test_the_model_is_left_alone(library):
    model = mvit_kernels.accelerate(models.build(library)).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    classes = [type(module) for module in model.modules()]
    frozen = mvit_kernels.freeze(model, dtype=torch.bfloat16)
    run(frozen, example(library))
    assert [type(module) for module in model.modules()] == classes
    assert all(module.training for module in model.modules())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(module.training for module in frozen.modules())
    assert not any(value.requires_grad for value in frozen.parameters())


def test_frozen_models_do_not_train():
    frozen = mvit_kernels.freeze(models.build("timm"))
    with pytest.raises(RuntimeError, match="frozen for inference and cannot be trained"):
        frozen.train()
    frozen.eval()
    # the image still gets a gradient: saliency maps need no training
    images = example("timm").requires_grad_()
    reference = example("timm").requires_grad_()
    frozen(images).square().sum().backward()
    models.build("timm")(reference).square().sum().backward()
    torch.testing.assert_close(images.grad, reference.grad, rtol=1e-3, atol=1e-4 * reference.grad.abs().max().item())


def test_copies_pickles_moves_and_loads():
    frozen = mvit_kernels.freeze(models.build("huggingface"))
    images = example("huggingface")
    expected = run(frozen, images)  # the weights are packed from here on
    buffer = io.BytesIO()
    torch.save(frozen, buffer)
    buffer.seek(0)
    copies = [
        copy.deepcopy(frozen),
        pickle.loads(pickle.dumps(frozen)),
        torch.load(buffer, weights_only=False),
    ]
    for other in copies:
        assert torch.equal(run(other, images), expected)
    assert run(copies[0].double(), images.double()).dtype == torch.float64
    other = mvit_kernels.freeze(models.sensible(models.build("huggingface"), seed=5))
    assert not torch.equal(run(other, images), expected)
    other.load_state_dict(frozen.state_dict())
    assert torch.equal(run(other, images), expected)


@pytest.mark.parametrize("feature_cls", ["list", "hook", "fx"])
def test_features_only(feature_cls):
    # Not from support.models: here the extractors are themselves the model.
    model = models.timm("xxs", features_only=True, feature_cls=feature_cls).eval()
    models.sensible(model)
    images = example("timm")
    frozen = mvit_kernels.freeze(model)
    assert len(frozen.freeze_report.blocks) == 3
    with torch.inference_mode():
        features = list(zip(frozen(images), model.double()(images.double()), strict=True))
    assert len(features) == 5
    for ours, truth in features:
        assert (ours - truth).abs().max() <= 1e-5 * truth.abs().max()


def test_hugging_face_outputs():
    frozen = mvit_kernels.freeze(models.build("huggingface"))
    images = example("huggingface")
    result = frozen(images, output_hidden_states=True)
    truth = models.build("huggingface").double()(images.double(), output_hidden_states=True)
    for ours, right in zip(result.hidden_states, truth.hidden_states, strict=True):
        assert (ours - right).abs().max() <= 1e-5 * right.abs().max()


@pytest.mark.parametrize("output_stride", [8, 16])
def test_dilated_models(output_stride):
    model = models.sensible(models.timm("xxs", output_stride=output_stride))
    verification = mvit_kernels.verify(mvit_kernels.freeze(model), models.images(1, 64, 64), reference=model)
    assert verification.ok, f"\n{verification}"


def test_a_block_or_a_unit_alone():
    model = models.build("timm")
    x = torch.randn(1, 48, 12, 10)
    for part in (model.stages[2][1], model.stages[2][1].conv_kxk):
        frozen = mvit_kernels.freeze(part)
        assert isinstance(frozen, (FrozenMobileViTBlock, FrozenConv2d))
        torch.testing.assert_close(run(frozen, x), run(part, x), rtol=1e-4, atol=1e-5)


def test_the_fold_is_the_batch_norm():
    """Checked against the formula in float64, with statistics far from neutral."""
    conv, norm = nn.Conv2d(3, 5, 3, padding=1, groups=1).double(), nn.BatchNorm2d(5, eps=0.1).double().eval()
    for value in (norm.weight.data, norm.bias.data, norm.running_mean):
        value.normal_(3, 2)
    norm.running_var.uniform_(0.01, 9)
    model = nn.Sequential(conv, norm, nn.SiLU())
    frozen = mvit_kernels.freeze(model)
    x = torch.randn(2, 3, 6, 7, dtype=torch.float64)
    torch.testing.assert_close(run(frozen, x), run(model, x), rtol=1e-12, atol=1e-12)
    assert [type(module).__name__ for module in frozen] == ["FrozenConv2d", "Identity", "Identity"]


# -- what is left as it is, and reported


def test_a_declined_block_stays_and_is_right():
    model = models.build("timm")
    model.stages[3][1].transformer[2].mlp.act = nn.GELU()
    frozen = mvit_kernels.freeze(model)
    assert len(frozen.freeze_report.blocks) == 2
    ((name, reason),) = frozen.freeze_report.left
    assert name == "stages.3.1"
    assert "transformer.2.mlp.act" in reason
    assert "stages.3.1 was not frozen" in str(frozen.freeze_report)
    assert mvit_kernels.verify(frozen, example("timm"), reference=model).ok


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda unit: unit.bn.register_forward_hook(lambda *_: None), "carries a hook"),
        (lambda unit: setattr(unit.bn, "act", nn.GELU()), "activation GELU; only SiLU and ReLU are fused"),
        (lambda unit: setattr(unit.conv, "padding_mode", "reflect"), "mode 'reflect'"),
        (lambda unit: setattr(unit, "bn", nn.InstanceNorm2d(16)), "InstanceNorm2d is not a BatchNorm2d"),
        (
            lambda unit: (setattr(unit.bn, "running_mean", None), setattr(unit.bn, "running_var", None)),
            "keeps no running statistics",
        ),
    ],
)
def test_a_convolution_that_cannot_be_folded_stays(change, reason):
    model = models.build("timm")
    change(model.stem)
    frozen = mvit_kernels.freeze(model)
    assert [(name, reason in why) for name, why in frozen.freeze_report.left] == [("stem", True)]
    assert "stem" not in frozen.freeze_report.convolutions
    torch.testing.assert_close(run(frozen, example("timm")), run(model, example("timm")), rtol=1e-3, atol=1e-4)


def test_an_inverted_residual_with_more_inside_stays():
    model = models.build("timm")
    model.stages[1][1].attn = nn.Conv2d(48, 48, 1)
    frozen = mvit_kernels.freeze(model)
    assert frozen.freeze_report.left == (("stages.1.1", "it has further modules"),)
    torch.testing.assert_close(run(frozen, example("timm")), run(model, example("timm")), rtol=1e-3, atol=1e-4)


def test_a_layer_without_a_native_call_runs_part_by_part_and_is_said():
    model = models.build("timm")
    model.stages[1][1].conv2_kxk.conv = nn.Conv2d(48, 48, 5, padding=2, groups=48, bias=False)
    frozen = mvit_kernels.freeze(model)
    assert "it is not a 1×1, a depthwise 3×3" in dict(frozen.freeze_report.left)["stages.1.1"]
    ((name, reason),) = frozen.freeze_report.composed
    assert name == "stages.1.1.conv2_kxk"
    assert "kernel_size=(5, 5)" in reason
    assert f"{name} runs part by part: it has a convolution with 48, 48" in str(frozen.freeze_report)
    assert mvit_kernels.verify(frozen, example("timm"), reference=model).ok


def test_hooks_on_what_is_replaced_are_still_called():
    model = models.build("timm")
    calls = []
    for module in (model.stem, model.stages[1][1], model.stages[2][1]):
        module.register_forward_hook(lambda *_: calls.append(1))
    run(mvit_kernels.freeze(model), example("timm"))
    assert len(calls) == 3


def test_other_libraries_own_errors_stay():
    frozen = mvit_kernels.freeze(models.build("kornia"))
    with pytest.raises(RuntimeError):
        frozen(models.images(1, 96, 96))  # 3 × 3 maps at the last stage


def test_cvnets_habit_at_as_many_patches_as_channels_is_kept():
    model = models.build("cvnets")
    images = models.images(1, 128, 128)  # stage 3: 64 patches of 64 channels
    frozen = mvit_kernels.freeze(model)
    assert mvit_kernels.verify(frozen, images, reference=model).ok
    assert run(frozen, images).shape == run(model, images).shape


# -- errors


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda m: m.stages[2][1].conv_1x1.weight.data[0].fill_(float("nan")), "stages.2.1.conv_1x1.weight"),
        (lambda m: m.stem.bn.running_var[:1].fill_(float("inf")), "stem.bn.running_var"),
        (lambda m: m.stem.bn.running_var[:1].fill_(-1.0), "stem.bn.running_var has negative variances"),
    ],
)
def test_broken_weights_are_refused(spoil, message):
    model = models.build("timm")
    spoil(model)
    with pytest.raises(ValueError, match=message):
        mvit_kernels.freeze(model)


def test_wrong_arguments():
    with pytest.raises(TypeError, match="model is dict; a torch.nn.Module is wanted"):
        mvit_kernels.freeze({})
    with pytest.raises(TypeError, match=r"dtype is torch.int8; float32, bfloat16"):
        mvit_kernels.freeze(models.build("timm"), dtype=torch.int8)


# -- around it


def test_freezing_in_inference_mode():
    model, images = models.build("huggingface"), example("huggingface")
    expected = run(mvit_kernels.freeze(model), images)
    with torch.inference_mode():
        frozen, of_inference_tensors = mvit_kernels.freeze(model), mvit_kernels.freeze(copy.deepcopy(model))
    for each in (frozen, of_inference_tensors):
        assert torch.equal(run(each, images), expected)
        with torch.no_grad():
            each.classifier.bias.add_(1)
        torch.testing.assert_close(run(each, images), expected + 1)


def test_an_empty_batch():
    assert run(mvit_kernels.freeze(models.build("timm")), torch.empty(0, 3, 64, 64)).shape == (0, 1000)


def test_compile_and_export():
    """Module by module, so that three of five stages have all there is; a whole network takes three times as long."""
    images = example("timm")
    for model, change in (
        (models.first_block(), lambda m: torch.compile(m, fullgraph=True, backend="aot_eager")),
        (models.build("timm"), lambda m: torch.export.export(m, (images,)).module()),
    ):
        frozen = mvit_kernels.freeze(model)
        with torch.no_grad():
            torch.testing.assert_close(change(frozen)(images), run(frozen, images), rtol=1e-4, atol=1e-5)


def test_two_threads_run_one_frozen_model():
    frozen, images = mvit_kernels.freeze(models.build("timm")), [models.images(1, 64, 64, seed) for seed in range(4)]
    expected = [run(copy.deepcopy(frozen), image) for image in images]
    results: list[list[torch.Tensor]] = [[], []]

    def work(out: list[torch.Tensor]) -> None:
        out.extend(run(frozen, image) for image in images for _ in range(3))

    threads = [threading.Thread(target=work, args=(out,)) for out in results]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for out in results:
        assert len(out) == 12
        assert all(torch.equal(value, expected[index // 3]) for index, value in enumerate(out))
