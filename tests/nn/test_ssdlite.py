# SPDX-License-Identifier: Apache-2.0
"""SSDLite on MobileViT: the network, both of its paths, and how it behaves in others' hands."""

from __future__ import annotations

import copy
import pickle
import sys

import pytest
import torch
from torch import nn

import mvit_kernels
from mvit_kernels import MobileViT, MobileViTSSDLite, accelerate, freeze, report, restore, verify, zoo
from mvit_kernels.nn import MobileViTBlock, SSDHead, SSDOutput, multibox
from support import models


def build(mode: str = "xxs", classes: int = 5, **options) -> MobileViTSSDLite:
    """In evaluation mode, with weights that expose mistakes."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = models.sensible(MobileViTSSDLite(mode, classes, **options))
    zoo.calibrate(model, [models.images(4, 320, 320)])  # of one-pixel maps two images are no statistics
    return model


@pytest.fixture(scope="module")
def xxs() -> MobileViTSSDLite:
    """Do not change it."""
    return build()


def one_box(batch: int, label: int = 2) -> list[dict[str, torch.Tensor]]:
    return [{"boxes": torch.tensor([[40.0, 30.0, 150.0, 160.0]]), "labels": torch.tensor([label])}] * batch


def worst(a: SSDOutput, b: SSDOutput) -> float:
    """The largest difference, relative to the largest value."""
    return max(((x - y).abs().max() / y.abs().max()).item() for x, y in zip(a, b, strict=True))


# -- the network


@pytest.mark.parametrize(("mode", "count"), [("xxs", 1_755_050), ("xs", 2_742_042), ("s", 5_738_826)])
def test_parameter_counts_and_names(mode, count):
    model = MobileViTSSDLite(mode)
    assert sum(p.numel() for p in model.parameters()) == count
    assert f"{count:,} ({mode})" in " ".join(MobileViTSSDLite.__doc__.split())
    assert (model.mode, model.num_classes) == (mode, 81)
    assert isinstance(model.backbone, MobileViT) and isinstance(model.backbone.final_conv, nn.Identity)
    assert len(model.extra) == 4 and all(isinstance(head, SSDHead) for head in model.heads) and len(model.heads) == 6
    assert [head.layers.predict.in_channels for head in model.heads] == [512, 256, 256, 128, 128, 64]
    assert [head.layers.predict.out_channels for head in model.heads] == [6 * 85] * 5 + [4 * 85]
    assert [hasattr(head.layers, "project") for head in model.heads] == [True, True, False, False, False, False]
    assert {name.partition(".")[0] for name in model.state_dict()} == {"backbone", "extra", "heads"}


def test_the_backbone_says_what_it_is():
    backbone = MobileViTSSDLite("xs").backbone
    x = torch.rand(1, 3, 64, 64)
    assert backbone(x).shape == (1, 96, 2, 2) and backbone.num_features == 96
    assert [m.shape[1] for m in backbone.feature_maps(x)] == [info["num_chs"] for info in backbone.feature_info]
    # Dilated by cvnets' rule: not the MobileViT blocks' convolutions.
    dilated = MobileViTSSDLite("xxs", output_stride=8).backbone
    assert {m.conv_local.conv.dilation for m in dilated.modules() if isinstance(m, MobileViTBlock)} == {(1, 1)}
    assert dilated.stages[4][0].depthwise.conv.dilation == (2, 2)


@pytest.mark.parametrize("output_stride", [8, 16, 32])
@pytest.mark.parametrize(("batch", "size"), [(1, (320, 320)), (2, (300, 500)), (3, (33, 47)), (1, (32, 32))])
def test_any_size_and_output_stride(batch, size, output_stride):
    """As many outputs as anchors; and map by map the sizes that the anchors are computed for."""
    model = MobileViTSSDLite("xxs", 3, output_stride=output_stride).eval()
    shapes = []
    for head in model.heads:
        head.register_forward_hook(lambda _, args, __: shapes.append(tuple(args[0].shape[2:])))
    asked = []
    with torch.no_grad():
        output = model(torch.rand(batch, 3, *size))
    anchors = model.anchors(*size)
    assert output.logits.shape == (batch, len(anchors), 3) and output.offsets.shape == (batch, len(anchors), 4)
    original = multibox.default_boxes
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(multibox, "default_boxes", lambda maps, *args: asked.append(maps) or original(maps, *args))
        model.anchors(*size)
    assert shapes == asked[0]
    assert len(model.detect(output, size)) == batch
    assert not anchors.is_inference() and anchors.dtype == torch.float32
    if (size, output_stride) == ((320, 320), 32):
        assert len(anchors) == 3232


@pytest.mark.parametrize("size", [(96, 160), (33, 47)])
def test_both_paths_agree_and_train_alike(xxs, size):
    fused = copy.deepcopy(xxs).double()
    textbook = restore(copy.deepcopy(fused))
    assert len(report(fused).accelerated) == 3 and not report(textbook).accelerated
    x = torch.randn(2, 3, *size, dtype=torch.float64)
    with torch.no_grad():
        assert worst(fused(x), textbook(x)) <= 1e-11
        assert worst(fused(x.to(memory_format=torch.channels_last)), textbook(x)) <= 1e-11
    gradients = []
    targets = [{"boxes": torch.tensor([[3.0, 4.0, 25.0, 30.0]]), "labels": torch.tensor([1])}] * 2
    for model in (fused.train(), textbook.train()):
        loss = model.loss(model(x), targets, size)["loss"]
        assert loss.dtype == torch.float64
        loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    largest = max(value.abs().max() for value in gradients[1].values())
    for name, value in gradients[0].items():
        assert (value - gradients[1][name]).abs().max() <= 1e-9 * largest, name
    assert all(value is not None for value in gradients[0].values())


def test_initial_values():
    torch.manual_seed(0)
    model = MobileViTSSDLite("s")
    for part in (model.extra, model.heads):
        for name, module in part.named_modules():
            if isinstance(module, nn.Conv2d):
                area = module.kernel_size[0] ** 2
                fans = (module.in_channels // module.groups + module.out_channels) * area
                bound = (6 / fans) ** 0.5
                assert 0.9 * bound <= module.weight.abs().max() <= bound, name
                assert module.bias is None or not module.bias.any()
    assert model.extra[3].conv.bias is None  # as published
    # The backbone keeps MobileViT's own.
    torch.manual_seed(0)
    alone = MobileViT("s").state_dict()
    assert all(torch.equal(value, alone[name]) for name, value in model.backbone.state_dict().items())


def test_options():
    model = MobileViTSSDLite("xxs", 3, in_channels=4, dropout=0.3, device="meta", dtype=torch.bfloat16)
    assert all(p.is_meta and p.dtype == torch.bfloat16 for p in model.parameters())
    assert model.backbone.in_channels == 4
    assert {m.p for m in model.modules() if isinstance(m, nn.Dropout)} == {0.3}
    half = MobileViTSSDLite("xxs", 3, dtype=torch.bfloat16).eval()
    output = half(torch.rand(1, 3, 64, 64).bfloat16())
    assert output.logits.dtype == output.offsets.dtype == torch.bfloat16
    assert half.detect(output, (64, 64))[0]["boxes"].dtype == torch.float32
    assert half.anchors(64, 64).dtype == torch.float32


# -- in others' hands


def test_deepcopy_and_pickle(xxs):
    x = models.images(1, 64, 96)
    with torch.no_grad():
        expected = xxs(x)
        for other in (copy.deepcopy(xxs), pickle.loads(pickle.dumps(xxs))):
            assert worst(other(x), expected) == 0
    again = pickle.loads(pickle.dumps(expected))
    assert type(again) is SSDOutput and torch.equal(again.logits, expected.logits)


def test_gradient_checkpointing(xxs):
    """The same gradients, and each stage runs again in backward."""
    x = models.images(2, 64, 64)
    found = []
    for enable in (False, True):
        model = copy.deepcopy(xxs).train()
        model.set_grad_checkpointing(enable)
        calls = []
        model.backbone.stages[2].register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        model.loss(model(x), one_box(2), (64, 64))["loss"].backward()
        assert len(calls) == 1 + enable
        found.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_autocast(xxs):
    model = copy.deepcopy(xxs).train()
    x = models.images(2, 64, 64)
    with torch.autocast("cpu", torch.bfloat16):
        output = model(x)
        assert output.logits.dtype == torch.bfloat16
        loss = model.loss(output, one_box(2), (64, 64))["loss"]
    assert loss.dtype == torch.float32
    loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())
    expected = model.loss(model(x), one_box(2), (64, 64))["loss"]
    assert (loss - expected).abs() <= 0.05 * expected


def test_compile(xxs):
    """With one of the three blocks, whose compilation is tested in nn/test_mobilevit.py; they keep a map's shape."""
    x, model = models.images(1, 64, 64), copy.deepcopy(xxs)
    for stage in model.backbone.stages[3:]:
        del stage[1:]
    compiled = torch.compile(model, fullgraph=True, backend="eager")  # what remains to do is Inductor's
    with torch.no_grad():
        output = compiled(x)
        assert isinstance(output, SSDOutput)
        assert worst(output, model(x)) <= 1e-5
    torch.compiler.reset()


def test_data_parallel(tmp_path, xxs):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        plain, model = copy.deepcopy(xxs).train(), copy.deepcopy(xxs).train()
        wrapped = nn.parallel.DistributedDataParallel(model)
        x = models.images(2, 64, 64)
        for each in (plain, wrapped):
            (each if each is plain else model).loss(each(x), one_box(2), (64, 64))["loss"].backward()
        for (name, a), b in zip(model.named_parameters(), plain.parameters(), strict=True):
            assert torch.equal(a.grad, b.grad), name
    finally:
        torch.distributed.destroy_process_group()


def test_frozen_and_verified(xxs):
    frozen = freeze(xxs)
    x = models.images(2, 64, 96)
    for found in (verify(xxs, x), verify(frozen, x, reference=xxs)):
        assert found.ok, str(found)
        assert {row.name for row in found.rows} >= {"output.logits", "output.offsets"}
    with torch.inference_mode():
        output = frozen(x)
        (found, _), (expected, _) = (model.detect(model(x), (64, 96)) for model in (frozen, xxs))
    assert isinstance(output, SSDOutput)
    assert frozen.loss(output, one_box(2), (64, 96))["loss"].isfinite()
    assert torch.equal(frozen.anchors(64, 96), xxs.anchors(64, 96))
    assert len(found["boxes"]) == len(expected["boxes"]) > 0
    half = freeze(xxs, dtype=torch.bfloat16)
    with torch.inference_mode():
        assert half.detect(half(x), (64, 96))[0]["boxes"].dtype == torch.float32
    assert len(report(accelerate(restore(copy.deepcopy(xxs)))).accelerated) == 3


def test_without_torchvision(xxs, monkeypatch):
    """The network runs; what needs torchvision names the extra that brings it."""
    multibox._default_boxes.cache_clear()
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "torchvision", None)
    with torch.no_grad():
        output = xxs(models.images(1, 64, 64))
    for call in (
        lambda: xxs.anchors(64, 64),
        lambda: xxs.loss(output, one_box(1), (64, 64)),
        lambda: xxs.detect(output, (64, 64)),
    ):
        with pytest.raises(ImportError, match=r"torchvision is not installed: pip install 'mvit_kernels\[train\]'"):
            call()


def test_it_learns_one_image():
    """Some steps on one picture with two rectangles: the surest box of each class is where its rectangle is."""
    torch.manual_seed(0)
    model = MobileViTSSDLite("xxs", 3)
    picture = torch.zeros(3, 64, 64)
    boxes = torch.tensor([[8.0, 12.0, 36.0, 44.0], [40.0, 32.0, 60.0, 56.0]])
    for channel, (x1, y1, x2, y2) in enumerate(boxes.int().tolist()):
        picture[channel, y1:y2, x1:x2] = 1.0
    images, targets = picture.expand(2, -1, -1, -1), [{"boxes": boxes, "labels": torch.tensor([1, 2])}] * 2
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    losses = []
    for _ in range(60):
        terms = model.loss(model(images), targets, (64, 64))
        optimizer.zero_grad()
        terms["loss"].backward()
        optimizer.step()
        losses.append(terms["loss"].item())
    assert losses[-1] < losses[0] / 4
    with torch.no_grad():  # in training mode: running statistics follow too slowly for so few steps
        found = model.detect(model(images), (64, 64), score=0.5)[0]
    for label, box in enumerate(boxes, 1):
        assert (found["boxes"][found["labels"] == label][0] - box).abs().max() <= 4.0


# -- errors


@pytest.mark.parametrize("classes", [1, 0, -3, 2.0, True, None])
def test_wrong_number_of_classes(classes):
    with pytest.raises(ValueError, match=r"MobileViTSSDLite: num_classes=.* an integer of 2 or more: the background"):
        MobileViTSSDLite("xxs", classes)


def test_wrong_options():
    with pytest.raises(ValueError, match="mode='m' is unknown"):
        MobileViTSSDLite("m")
    with pytest.raises(ValueError, match="output_stride=4 is unknown"):
        MobileViTSSDLite("xxs", output_stride=4)
    with pytest.raises(ValueError, match="dropout=2"):
        MobileViTSSDLite("xxs", dropout=2)


def test_wrong_calls(xxs):
    with pytest.raises(ValueError, match=r"H, W >= 32.* 31 x 64"):
        xxs(torch.rand(1, 3, 31, 64))
    with pytest.raises(ValueError, match="height=31; an integer of 32 or more"):
        xxs.anchors(31, 320)
    with pytest.raises(ValueError, match=r"width=320\.0; an integer"):
        xxs.anchors(320, 320.0)
    output = SSDOutput(torch.zeros(1, 3232, 5), torch.zeros(1, 3232, 4))
    for name, call in (
        ("loss", lambda output, size: xxs.loss(output, one_box(1), size)),
        ("detect", lambda output, size: xxs.detect(output, size)),
    ):
        message = rf"MobileViTSSDLite.{name}: the output is of 3232 anchors, and size=\(300, 500\) has 4948; give the"
        with pytest.raises(ValueError, match=message):
            call(output, (300, 500))
        with pytest.raises(ValueError, match=rf"{name}: output has logits of \(1, 3232, 7\) .* \(B, A, 5\) and"):
            call(output._replace(logits=torch.zeros(1, 3232, 7)), (320, 320))
    with pytest.raises(ValueError, match="MobileViTSSDLite.detect: score=-1"):
        xxs.detect(output, (320, 320), score=-1)
    with pytest.raises(ValueError, match="MobileViTSSDLite.loss: there are 2 targets and 1 images"):
        xxs.loss(output, one_box(2), (320, 320))


def test_exported_at_top_level():
    assert mvit_kernels.MobileViTSSDLite is MobileViTSSDLite
    assert "MobileViTSSDLite" in mvit_kernels.__all__
