# SPDX-License-Identifier: Apache-2.0
"""`verify`: it passes what is right, and fails what is slightly wrong."""

from __future__ import annotations

import copy
import re
from typing import NamedTuple

import pytest
import torch
from torch import nn

import mvit_kernels
from mvit_kernels import verification
from mvit_kernels.ops import transformer_on_map
from mvit_kernels.rounding import RUNS
from mvit_kernels.verification import error_row
from support import models


@pytest.mark.parametrize("library", models.LIBRARIES)
def test_accelerated_models_pass(library):
    model = mvit_kernels.accelerate(models.build(library), strict=True)
    before = copy.deepcopy(model.state_dict())
    report = mvit_kernels.verify(model, models.images(1, 64, 64))
    assert report.ok, f"\n{report}"
    assert len(report.rows) >= 4
    assert report.rows[-1].name.startswith("output")
    assert all(row.scale > 0 and row.error > 0 for row in report.rows)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(block.accelerated for block in mvit_kernels.report(model).blocks)


def test_gradients():
    model = mvit_kernels.accelerate(models.first_block())
    report = mvit_kernels.verify(model, models.images(2, 64, 64), gradients=True)
    assert report.ok, f"\n{report}"
    names = {row.name for row in report.rows}
    assert names >= {f"gradient of {name}" for name, _ in model.named_parameters()}
    assert not model.training
    assert all(parameter.grad is None for parameter in model.parameters())


def _swapped_patch_sides(original):
    def wrong(x, *args, patch_size, **kwargs):
        return original(x, *args, patch_size=(patch_size[0] * 2, patch_size[1]), **kwargs)

    return wrong


def _slightly_off(original):
    def wrong(*args, **kwargs):
        return original(*args, **kwargs) * 1.00003

    return wrong


@pytest.mark.parametrize("wrong", [_swapped_patch_sides, _slightly_off])
def test_what_is_wrong_fails(wrong, monkeypatch):
    """Other patches, and a relative error of 3e-5: 250 units of float32, a fortieth of a unit of bfloat16."""
    from mvit_kernels.adapters import _block

    monkeypatch.setattr(_block, "transformer_on_map", wrong(transformer_on_map))
    model = mvit_kernels.accelerate(models.first_block())
    report = mvit_kernels.verify(model, models.images(1, 64, 64))
    assert not report.ok
    assert not report.rows[0].ok
    assert "TOO LARGE" in str(report)


def test_the_rule():
    truth = torch.tensor([1.0, -4.0], dtype=torch.float64)
    pytorch = [(truth + 1e-6).float(), truth.float()]
    band = torch.finfo(torch.float32).eps * 4
    for error, ok in ((2 * (1e-6 + band) * 0.9, True), (2 * (1e-6 + band) * 1.2, False), (float("nan"), False)):
        row = error_row("x", (truth + error).float(), pytorch, truth)
        assert row.ok is ok
        assert row.allowed == pytest.approx(2 * (1e-6 + band), rel=0.3)
    assert error_row("x", torch.empty(0), [torch.empty(0)], torch.empty(0).double()).ok
    with pytest.raises(ValueError, match="has shape"):
        error_row("x", torch.empty(3), [torch.empty(2)], truth)


def test_careful_arithmetic_decides_where_pytorch_does_not():
    """Whether PyTorch is exact by luck or gives garbage, what is as exact as the dtype allows is right."""
    truth = torch.tensor([1.0, -4.0], dtype=torch.float64)

    def careful(seed):
        return truth + 1e-4

    for pytorch in (truth.float(), truth.float() * 1e30, truth.float() * torch.nan):
        near, far = (error_row("x", (truth + off).float(), [pytorch], truth, careful=careful) for off in (1e-4, 1e-3))
        assert near.ok and not far.ok
        assert near.careful_error == pytest.approx(1e-4)  # of the first sample, which decides
        assert far.careful_error == pytest.approx(4e-4)  # of few values, four times their root mean square
    assert error_row("x", truth.float(), [truth.float()], truth, careful=None).careful_error is None


def test_samples_are_drawn_until_one_allows_the_error():
    """A later sample can only add to what is allowed."""
    truth, drawn = torch.tensor([1.0, -4.0], dtype=torch.float64), []

    def careful(seed):
        drawn.append(seed)
        return truth + 1e-4 * (seed + 1)

    for times, samples, largest in (
        (1, 1, 1e-4),
        (5, 3, 3e-4),
        (30, RUNS, None),
        (50, RUNS, None),
    ):
        drawn.clear()
        row = error_row("x", (truth + 1e-4 * times).float(), [truth.float()], truth, careful=careful)
        assert drawn == list(range(samples)) and row.ok is (times < 50)
        assert largest is None or row.careful_error == pytest.approx(largest)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_whole_models_are_as_exact_as_careful_arithmetic(dtype, monkeypatch):
    """Careful arithmetic is computed for every block; PyTorch's own error is within three times of its error."""
    monkeypatch.setattr(verification, "PLAUSIBLE_BANDS", 0)
    model = mvit_kernels.accelerate(models.build("timm")).to(dtype)
    report = mvit_kernels.verify(model, models.images(1, 64, 64).to(dtype))
    assert report.ok, f"\n{report}"
    for row in report.rows:
        assert row.careful_error / 3 < row.pytorch_error < 3 * row.careful_error, row


def test_keyword_examples():
    model = mvit_kernels.accelerate(models.build("huggingface"))
    example = {"pixel_values": models.images(1, 64, 64), "output_hidden_states": True}
    report = mvit_kernels.verify(model, example)
    assert report.ok
    assert "output.logits" in {row.name for row in report.rows}


class Wrapped(nn.Module):
    """A user's wrapper around a network: it takes something other than one batch, and casts to float32 itself."""

    def __init__(self, images) -> None:
        super().__init__()
        self.net, self.images = models.first_block(), images

    def forward(self, x=None, **inputs):
        return self.net(self.images(x if x is not None else inputs).float())


class Pair(NamedTuple):
    left: torch.Tensor
    right: torch.Tensor


ONE, OTHER = models.images(2, 32, 32)
BYTES = torch.randint(0, 256, (2, 3, 32, 32), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
WRAPPED = {
    "a list of images": (torch.stack, [ONE, OTHER]),
    "a list of batches": (torch.cat, [ONE[None], OTHER[None]]),
    "a tuple": (lambda pair: torch.stack(pair), (ONE, OTHER)),
    "a named tuple": (lambda pair: torch.stack((pair.left, pair.right)), Pair(ONE, OTHER)),
    "nested": (lambda inputs: torch.stack(inputs["pair"][0]["images"]), {"pair": ({"images": [ONE, OTHER]}, 3)}),
    "bytes": (lambda images: images.float() / 128 - 1, BYTES),
    "a dtype by name": (lambda images: images.to(torch.float32) + torch.zeros(1, dtype=torch.float32), BYTES / 128 - 1),
}


@pytest.mark.parametrize("case", WRAPPED)
def test_examples_of_any_kind(case):
    images, example = WRAPPED[case]
    model = Wrapped(images).eval()
    candidates = [(mvit_kernels.freeze(model, dtype=dtype), model) for dtype in (None, torch.bfloat16, torch.float64)]
    for candidate, reference in [*candidates, (mvit_kernels.accelerate(Wrapped(images).eval()), None)]:
        report = mvit_kernels.verify(candidate, example, reference=reference)
        assert report.ok, f"\n{report}"
    if case in ("bytes", "nested"):  # the one order can be reversed, the other cannot
        assert mvit_kernels.verify(candidate, example, gradients=True).ok


def test_the_truth_is_float64_throughout():
    """A model's own ``.float()`` would round it: PyTorch's error would be measured against a float32 truth."""
    model = mvit_kernels.accelerate(Wrapped(lambda x: x).eval())
    images = models.images(1, 64, 64)
    (row,) = [row for row in mvit_kernels.verify(model, images).rows if row.name == "output"]
    plain = mvit_kernels.verify(model.net, images).rows[-1]
    assert row._replace(name="") == plain._replace(name="")


@pytest.mark.parametrize(
    ("model", "example", "options", "error", "message"),
    [
        (None, torch.rand(1, 3, 64, 64), {}, TypeError, "model is NoneType; a torch.nn.Module is wanted"),
        ("timm", torch.rand(0, 3, 64, 64), {}, ValueError, r"the example is empty, of shape \(0, 3, 64, 64\)"),
        ("frozen", torch.rand(1, 3, 64, 64), {}, ValueError, "give the model it was made from as reference="),
        ("frozen", torch.rand(1, 3, 64, 64), {"gradients": True}, ValueError, "a frozen model has no gradients"),
        ("nan", torch.rand(1, 3, 64, 64), {}, ValueError, "not finite in float64 either"),
    ],
)
def test_errors(model, example, options, error, message):
    reference = None
    if model == "frozen":
        model = mvit_kernels.freeze(models.build("timm"))
        reference = models.build("timm") if options else None
    elif model is not None:
        spoil = model == "nan"
        model = mvit_kernels.accelerate(models.build("timm"))
        if spoil:
            nn.init.constant_(model.stem.conv.weight, float("nan"))
    with pytest.raises(error, match=message):
        mvit_kernels.verify(model, example, reference=reference, **options)


CONVOLUTIONS = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.SiLU())


def test_nothing_accelerated_is_not_ok():
    """PyTorch compared with itself passes always: whoever forgot `accelerate` would believe that it was verified."""
    images = models.images(1, 64, 64)
    for gradients in (False, True):
        with pytest.raises(ValueError, match=r"nothing is accelerated .* call mvit_kernels.accelerate\(model\) first"):
            mvit_kernels.verify(models.build("timm"), images, gradients=gradients)
        with pytest.raises(ValueError, match="no MobileViT block found; known are those of timm"):
            mvit_kernels.verify(CONVOLUTIONS, images, gradients=gradients)
    with pytest.raises(ValueError, match="give the model it was made from as reference="):
        mvit_kernels.verify(mvit_kernels.freeze(CONVOLUTIONS), images)
    assert mvit_kernels.verify(mvit_kernels.freeze(CONVOLUTIONS), images, reference=CONVOLUTIONS).ok
    assert mvit_kernels.verify(models.build("timm"), images, reference=models.build("timm")).ok


def test_declined_blocks_are_not_verified():
    """Their convolution layers are, in training."""
    model = mvit_kernels.accelerate(models.first_block())
    for block in models.blocks(model):
        block.norm.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match="its blocks are declined: norm carries a hook"):
        mvit_kernels.verify(model, models.images(1, 64, 64))
    assert mvit_kernels.verify(model, models.images(2, 64, 64), gradients=True).ok
    mvit_kernels.accelerate(model, convolutions=False)
    with pytest.raises(ValueError, match="its blocks are declined"):
        mvit_kernels.verify(model, models.images(2, 64, 64), gradients=True)


@pytest.mark.parametrize("function", ["accelerate", "restore", "report", "freeze", "verify"])
@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (3, "model is int; a torch.nn.Module is wanted, such as timm"),
        (None, "model is NoneType; a torch.nn.Module is wanted"),
        (nn.Linear, "model is the class Linear; a torch.nn.Module is wanted, which Linear(…) makes"),
        ("mobilevit_xs", "model is the str 'mobilevit_xs'; .* such as timm.create_model('mobilevit_xs')"),
        ("weights.pth", "model is the str 'weights.pth'; .* into which mvit_kernels.load_checkpoint loads a file"),
        ({"weight": ONE}, "model is dict; .* into which model.load_state_dict loads weights"),
        ([CONVOLUTIONS], "model is list; .* such as one element of this list"),
    ],
)
def test_what_is_no_model(function, wrong, words):
    arguments = (ONE,) if function == "verify" else ()
    with pytest.raises(TypeError, match=f"^{function}: {re.escape(words).replace(re.escape('.*'), '.*')}"):
        getattr(mvit_kernels, function)(wrong, *arguments)


def test_a_reference_that_is_no_model():
    with pytest.raises(TypeError, match="verify: reference is int; a torch.nn.Module is wanted"):
        mvit_kernels.verify(CONVOLUTIONS, ONE, reference=3)
