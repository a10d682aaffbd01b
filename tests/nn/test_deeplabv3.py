# SPDX-License-Identifier: Apache-2.0
"""DeepLabv3 on MobileViT: against Hugging Face's live model, and as a network to train, segment and freeze with."""

from __future__ import annotations

import copy
import io
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mvit_kernels
from mvit_kernels import MobileViT, MobileViTDeepLabV3, convert_state_dict, load_checkpoint
from support import models
from support.models import images

PARAMETERS = {"xxs": 1_854_853, "xs": 2_944_069, "s": 6_357_941}  # with VOC's 21 classes


def theirs(mode: str, output_stride: int = 16, **options) -> nn.Module:
    """Hugging Face's model, with weights that expose mistakes and without dropout."""
    return models.build(
        "huggingface",
        mode,
        **{"task": "ForSemanticSegmentation", "num_labels": 21, "output_stride": output_stride} | options,
    )


def twin(model: nn.Module, mode: str, output_stride: int = 16) -> MobileViTDeepLabV3:
    """Ours, with the weights of Hugging Face's."""
    ours = MobileViTDeepLabV3(mode, model.config.num_labels, output_stride=output_stride, classifier_dropout=0.0)
    return load_checkpoint(ours.to(next(model.parameters()).dtype), model.state_dict()).train(model.training)


@pytest.fixture(scope="module")
def xxs() -> MobileViTDeepLabV3:
    """With five classes and sensible weights, in evaluation mode. Copy it before a change."""
    torch.manual_seed(0)
    return models.sensible(MobileViTDeepLabV3("xxs", 5, classifier_dropout=0.0))


def masks_of(*shape: int, classes: int = 5, ignored: float = 0.2, seed: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    masks = torch.randint(classes, shape, generator=generator)
    return masks.masked_fill(torch.rand(shape, generator=generator) < ignored, 255)


# -- against Hugging Face


SIZES = {
    ("xxs", 8): [(64, 64), (97, 131)],
    ("xxs", 16): [(64, 64), (304, 320), (33, 45)],  # a map of 19 × 20: wider than the largest dilation, 18
    ("xxs", 32): [(64, 64), (129, 203)],
    ("xs", 8): [(96, 64)],
    ("xs", 16): [(111, 250)],
    ("xs", 32): [(96, 96)],  # a map of 3 × 3, which is resized
    ("s", 8): [(66, 50)],
    ("s", 16): [(128, 64), (95, 65)],
    ("s", 32): [(127, 95)],
}


@pytest.mark.parametrize(("mode", "output_stride"), SIZES)
def test_same_outputs_as_huggingface(mode, output_stride):
    reference = theirs(mode, output_stride)
    model = twin(reference, mode, output_stride)
    for height, width in SIZES[mode, output_stride]:
        x = images(2, height, width)
        with torch.no_grad(), models.fast_calls() as calls:
            y, expected = model(x), reference(x).logits
        assert len(calls) == 3
        assert y.shape == (2, 21, math.ceil(height / output_stride), math.ceil(width / output_stride))
        assert (y - expected).abs().max() <= 1e-5 * expected.abs().max(), (height, width)


@pytest.mark.parametrize("mode", PARAMETERS)
def test_parameters_and_keys_are_huggingface_s(mode):
    reference = theirs(mode)
    model = twin(reference, mode)
    counts = [sum(parameter.numel() for parameter in each.parameters()) for each in (model, reference)]
    assert counts == [PARAMETERS[mode]] * 2
    back = convert_state_dict(model.state_dict(), to="huggingface")
    assert back.keys() == reference.state_dict().keys()
    assert all(torch.equal(value, back[key]) for key, value in reference.state_dict().items())


def test_same_loss_and_gradients_as_huggingface():
    """In float64 up to the order of summation, with batch statistics and ignored pixels."""
    reference = copy.deepcopy(theirs("xxs", aspp_dropout_prob=0.0)).double().train()
    model = twin(reference, "xxs")
    x, masks = images(3, 97, 130).double(), masks_of(3, 97, 130, classes=21)
    with mvit_kernels.use_backend("reference"):
        loss = model.loss(model(x), masks)["loss"]
        loss.backward()
    expected = reference(x, labels=masks).loss
    expected.backward()
    assert abs(loss.item() - expected.item()) <= 1e-12 * expected.item()
    gradients = {name: value.grad for name, value in reference.named_parameters()}
    gradients = convert_state_dict(gradients | dict(reference.named_buffers()), to="own")
    largest = max(value.grad.abs().max() for value in model.parameters())
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-8, atol=1e-12 * largest, msg=name)


def test_huggingface_s_own_model_accelerates():
    reference = theirs("xxs")
    x = images(1, 75, 96)
    with torch.no_grad(), models.fast_calls() as calls:
        y = models.accelerated(reference)(x).logits
        expected = reference(x).logits
    assert len(calls) == 3
    assert (y - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_only_inverted_residuals_are_dilated():
    """As in cvnets and Hugging Face; a plain MobileViT dilates the blocks too, as timm."""

    def dilations(network: MobileViT) -> list[int]:
        return [m.dilation[0] for stage in network.stages[3:] for m in stage.modules() if isinstance(m, nn.Conv2d)]

    assert set(dilations(MobileViTDeepLabV3("xxs", output_stride=16).backbone)) == {1}
    assert sorted(set(dilations(MobileViTDeepLabV3("xxs", output_stride=8).backbone))) == [1, 2]
    assert sorted(set(dilations(MobileViT("xxs", output_stride=8)))) == [1, 2, 4]
    backbone = MobileViTDeepLabV3("xs").backbone
    assert backbone.num_features == 96 and backbone(images(1, 64, 64)).shape == (1, 96, 4, 4)
    assert [info["reduction"] for info in backbone.feature_info] == [2, 4, 8, 16, 16]
    assert backbone.feature_maps(images(1, 64, 64), [-1])[0].shape == (1, 96, 4, 4)


# -- loss


def test_loss_is_the_mean_over_pixels_that_count(xxs):
    logits = torch.randn(2, 5, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    masks = masks_of(2, 30, 50)
    full = F.interpolate(logits, (30, 50), mode="bilinear", align_corners=False).log_softmax(1)
    counted = masks != 255
    expected = -full.gather(1, masks.where(counted, 0)[:, None])[:, 0][counted].mean()
    for dtype in (torch.uint8, torch.int32, torch.int64):
        assert torch.equal(xxs.loss(logits, masks.to(dtype))["loss"], xxs.loss(logits, masks)["loss"])
    torch.testing.assert_close(xxs.loss(logits, masks)["loss"], expected, rtol=1e-12, atol=0)
    other = masks.where(counted, -7)
    torch.testing.assert_close(xxs.loss(logits, other, ignore_index=-7)["loss"], expected, rtol=1e-12, atol=0)


def test_loss_of_ignored_images_is_zero(xxs):
    model = copy.deepcopy(xxs).train()
    loss = model.loss(model(images(2, 64, 64)), torch.full((2, 64, 64), 255))["loss"]
    loss.backward()
    assert loss.item() == 0
    assert all((parameter.grad == 0).all() for parameter in model.parameters())


def test_loss_under_autocast_is_in_float32(xxs):
    model, x, masks = copy.deepcopy(xxs).train(), images(2, 64, 64), masks_of(2, 64, 64)
    expected = model.loss(model(x), masks)["loss"]
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(x)
        loss = model.loss(logits, masks)["loss"]
    assert logits.dtype == torch.bfloat16 and loss.dtype == torch.float32
    assert torch.equal(loss, model.loss(logits.float(), masks)["loss"])
    assert abs(loss - expected) < 0.02 * expected
    loss.backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in model.parameters())


@pytest.mark.parametrize(
    ("logits", "masks", "error", "message"),
    [
        ((2, 5, 4, 4), torch.zeros(2, 64, 64), TypeError, r"class indices; got torch\.float32: take masks\.long\(\)"),
        ((2, 5, 4, 4), torch.zeros(2, 64, 64, dtype=torch.bool), TypeError, "got torch.bool"),
        ((2, 5, 4, 4), [[0]], TypeError, "a tensor; got list"),
        ((2, 5, 4, 4), torch.zeros(2, 1, 64, 64).long(), ValueError, r"\(2, 1, 64, 64\): take masks\.squeeze\(1\)"),
        ((2, 5, 4, 4), torch.zeros(3, 64, 64).long(), ValueError, r"must be \(2, H, W\).*got shape \(3, 64, 64\)"),
        ((2, 5, 4, 4), torch.zeros(2, 0, 64).long(), ValueError, r"got shape \(2, 0, 64\)"),
        ((2, 5, 4, 4), torch.zeros(2, 8, 8, device="meta").long(), ValueError, "on cpu, as the logits are; got meta"),
        ((2, 5, 4, 4), torch.full((2, 8, 8), 5), ValueError, r"0 to 4, or 255.*got \[5\] in 128 pixels"),
        ((2, 5, 4, 4), torch.full((2, 8, 8), -1), ValueError, r"got \[-1\] in 128 pixels"),
        ((2, 6, 4, 4), torch.zeros(2, 64, 64).long(), ValueError, r"logits must be \(B, 5, h, w\).*got \(2, 6, 4, 4\)"),
        ((5, 4, 4), torch.zeros(2, 64, 64).long(), ValueError, r"got \(5, 4, 4\)"),
    ],
)
def test_refused_masks(xxs, logits, masks, error, message):
    with pytest.raises(error, match=message):
        xxs.loss(torch.zeros(logits), masks)


# -- segmentation


def test_segment_is_the_largest_resized_logit(xxs):
    logits = torch.randn(2, 5, 7, 4, generator=torch.Generator().manual_seed(0))
    masks = xxs.segment(logits, torch.Size([97, 64]))
    assert masks.shape == (2, 97, 64) and masks.dtype == torch.int64 and masks.unique().numel() > 1
    full = F.interpolate(logits, (97, 64), mode="bilinear", align_corners=False)
    assert torch.equal(full.gather(1, masks[:, None])[:, 0], full.amax(1))
    assert torch.equal(xxs.segment(logits, logits.shape[2:]), logits.argmax(1))
    for size in ((0, 4), (4,), (4.0, 4)):
        with pytest.raises(ValueError, match=r"must be \(height, width\)"):
            xxs.segment(logits, size)
    with pytest.raises(ValueError, match=r"logits must be \(B, 5, h, w\)"):
        xxs.segment(logits[0], (97, 64))


# -- training


def test_one_image_in_training(xxs):
    model = copy.deepcopy(xxs).train()
    with pytest.raises(ValueError, match=r"one image in training.*model\.aspp\.pool\.norm\.eval\(\)"):
        model(images(1, 64, 64))
    model.aspp.pool.norm.eval()
    model(images(1, 64, 64)).sum().backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in model.parameters())
    model.train()(images(2, 64, 64))


def test_dropouts():
    model = MobileViTDeepLabV3("xxs", 5).train()
    assert (model.aspp.dropout.p, model.dropout.p) == (0.1, 0.1)
    x = images(2, 64, 64)
    for switch in (model.aspp.dropout, model.dropout):  # each of the two alone drops something
        model.aspp.dropout.eval(), model.dropout.eval()
        steady = [model(x) for _ in range(2)]
        assert torch.equal(*steady)
        switch.train()
        assert not torch.equal(*[model(x) for _ in range(2)])
    silent = MobileViTDeepLabV3("xxs", 5, classifier_dropout=0.0).train()
    assert torch.equal(*[silent(x) for _ in range(2)])
    inside = MobileViTDeepLabV3("xxs", 5, dropout=0.1, classifier_dropout=0.0).train()
    assert not torch.equal(*[inside(x) for _ in range(2)])


def test_gradient_checkpointing_changes_nothing(xxs):
    x, masks, results = images(2, 64, 96), masks_of(2, 64, 96), []
    for enable in (False, True):
        model = copy.deepcopy(xxs).train()
        model.set_grad_checkpointing(enable)
        with models.fast_calls() as calls:
            model.loss(model(x), masks)["loss"].backward()
        assert len(calls) == 3 * (1 + enable)
        results.append([parameter.grad for parameter in model.parameters()])
    assert all(map(torch.equal, *results))


def test_learns_a_mask():
    """A left and a right half of different brightness, in a few steps."""
    torch.manual_seed(0)
    model = MobileViTDeepLabV3("xxs", 2).train()
    masks = torch.zeros(4, 64, 64, dtype=torch.long)
    masks[:, :, 32:] = 1
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3)
    for step in range(25):
        x = masks[:, None].float() - 0.5 + 0.1 * images(4, 64, 64, seed=step)
        loss = model.loss(model(x), masks)["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    found = model.segment(model(x), (64, 64))
    assert (found == masks).float().mean() > 0.9


# -- as any module


def test_layouts_compile_copies(xxs):
    x = images(2, 97, 64)
    with torch.no_grad():
        expected = xxs(x)

        def same(model: nn.Module, y: Tensor = x) -> None:
            # PyTorch alone differs by up to 6e-6 between layouts, for other images and weights.
            assert (model(y) - expected).abs().max() <= 1e-5 * expected.abs().max()

        same(copy.deepcopy(xxs))
        same(pickle.loads(pickle.dumps(xxs)))
        same(copy.deepcopy(xxs).to(memory_format=torch.channels_last), x.to(memory_format=torch.channels_last))
        file = io.BytesIO()
        torch.save(xxs.state_dict(), file)
        file.seek(0)
        fresh = MobileViTDeepLabV3("xxs", 5)
        fresh.load_state_dict(torch.load(file, weights_only=True))
        same(fresh.eval())
        exported = torch.export.export(xxs, (x,))
        same(exported.module())


def test_compiles_as_one_graph(xxs):
    """With one of the three blocks, whose compilation is tested in nn/test_mobilevit.py; they keep a map's shape."""
    model, x = copy.deepcopy(xxs), images(2, 97, 64)
    for stage in model.backbone.stages[3:]:
        del stage[1:]
    with torch.no_grad():
        y, expected = torch.compile(model, backend="eager", fullgraph=True)(x), model(x)
    assert (y - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_compiled_training(xxs):
    """Of the head; the backbone's is tested with the operators."""
    x, results = torch.randn(2, 80, 7, 4, generator=torch.Generator().manual_seed(0)), []
    for compiled in (False, True):
        aspp = copy.deepcopy(xxs.aspp).train()
        call = torch.compile(aspp, backend="aot_eager", fullgraph=True) if compiled else aspp
        y = call(x)
        y.square().sum().backward()
        results.append([y.detach(), *(parameter.grad for parameter in aspp.parameters())])
    for ours, eager in zip(*results, strict=True):
        torch.testing.assert_close(ours, eager, rtol=1e-3, atol=1e-5 * eager.abs().max().item())


def test_restore_report_and_verify(xxs):
    model = copy.deepcopy(xxs)
    assert len(mvit_kernels.report(model).blocks) == 3 and all(b.accelerated for b in mvit_kernels.report(model).blocks)
    result = mvit_kernels.verify(model, images(2, 65, 64))
    assert result.ok, result
    mvit_kernels.restore(model)
    with models.fast_calls() as calls, torch.no_grad():
        y, expected = model(images(1, 64, 64)), xxs(images(1, 64, 64))
        assert len(calls) == 3  # of the accelerated one alone
    assert (y - expected).abs().max() <= 1e-5 * expected.abs().max()
    mvit_kernels.accelerate(model, strict=True)


def test_frozen_keeps_its_methods(xxs):
    frozen = mvit_kernels.freeze(xxs)
    x = images(2, 97, 64)
    with torch.inference_mode():
        y, expected = frozen(x), xxs(x)
    assert (y - expected).abs().max() <= 1e-5 * expected.abs().max()
    masks = masks_of(2, 97, 64)
    torch.testing.assert_close(frozen.loss(y, masks)["loss"], xxs.loss(expected, masks)["loss"])
    assert torch.equal(frozen.segment(expected, (97, 64)), xxs.segment(expected, (97, 64)))
    result = mvit_kernels.verify(frozen, x, reference=xxs)
    assert result.ok, result


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_dtypes_and_devices(dtype):
    model = MobileViTDeepLabV3("xxs", 3, dtype=dtype).eval()
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    with torch.no_grad():
        assert model(images(1, 64, 64).to(dtype)).dtype == dtype
    meta = MobileViTDeepLabV3("xxs", 3, device="meta")
    assert all(value.is_meta for value in meta.state_dict().values())


def test_reset_classifier(xxs):
    model = copy.deepcopy(xxs).bfloat16()
    model.reset_classifier(9)
    assert model.num_classes == 9 and model.classifier.weight.dtype == torch.bfloat16 and not model.classifier.training
    assert model(images(1, 64, 64).bfloat16()).shape == (1, 9, 4, 4)
    with pytest.raises(ValueError, match="num_classes=1"):
        model.reset_classifier(1)


def test_channels_of_images():
    assert MobileViTDeepLabV3("xxs", in_channels=4).eval()(torch.rand(1, 4, 64, 64)).shape == (1, 21, 4, 4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "m"}, "mode='m' is unknown"),
        ({"num_classes": 1}, "num_classes=1; give an integer of 2 or more"),
        ({"num_classes": True}, "num_classes=True"),
        ({"output_stride": 4}, "output_stride=4 is unknown"),
        ({"dropout": 1.5}, "dropout=1.5 is not a probability"),
        ({"classifier_dropout": -0.1}, "MobileViTDeepLabV3: classifier_dropout=-0.1 is not a probability"),
        ({"in_channels": 0}, "in_channels=0 is not a count"),
    ],
)
def test_refused_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        MobileViTDeepLabV3(**{"mode": "xxs"} | options)


def test_refused_images(xxs):
    with pytest.raises(ValueError, match=r"H, W >= 32.*31 x 64"):
        xxs(torch.rand(1, 3, 31, 64))
    with pytest.raises(TypeError, match="uint8"):
        xxs(torch.zeros(1, 3, 64, 64, dtype=torch.uint8))
