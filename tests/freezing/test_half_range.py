# SPDX-License-Identifier: Apache-2.0
"""``freeze(model, example=images)``: which inverted residuals are known to be within float16's range, what they are
held to, and how long it is known. That the kernel then computes in float16: tests/gates/interpreted_half_filter.py."""

from __future__ import annotations

import copy
import io
import math

import pytest
import torch
from torch import nn

import mvit_kernels
from mvit_kernels.backends import cuda
from mvit_kernels.backends.cuda.inverted_residual_packing import pack_inverted_residual
from mvit_kernels.freezing import half_range, launched, program
from mvit_kernels.freezing.half_range import HalfRange
from mvit_kernels.freezing.modules import FrozenInvertedResidual
from mvit_kernels.nn import MobileViT
from mvit_kernels.nn.layers import ConvNormAct, InvertedResidual


def made(seed: int = 0) -> nn.Sequential:
    """A stem and three inverted residuals, two of whose shapes have a kernel that filters in float16."""
    torch.manual_seed(seed)
    model = nn.Sequential(
        ConvNormAct(3, 16, 3, stride=2),
        InvertedResidual(16, 32),
        InvertedResidual(32, 32),
        InvertedResidual(32, 48, stride=2),
    )
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, std=0.3)
            nn.init.uniform_(module.running_var, 0.5, 2)
    return model.eval()


IMAGES = torch.randn(2, 3, 20, 22, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def frozen():
    return mvit_kernels.freeze(made(), example=IMAGES)


def blocks(model: nn.Module) -> dict[str, FrozenInvertedResidual]:
    return {name: part for name, part in model.named_modules() if isinstance(part, FrozenInvertedResidual)}


def known(model: nn.Module) -> list[bool]:
    return [block.half_range is not None for block in blocks(model).values()]


# ------------------------------------------------------------------------------------------------------------- findings


def test_what_is_found(frozen):
    """Against what the model itself makes of the images, in float64."""
    seen = {}
    model = made().double()
    for name in ("1", "2", "3"):
        part = model[int(name)]
        part.expand.register_forward_hook(lambda module, x, y, name=name: seen.setdefault(name, []).append(y))
        part.register_forward_hook(lambda module, x, y, name=name: seen.setdefault(name, []).append(y))
    with torch.no_grad():
        model(IMAGES.double())
    found = dict(frozen.freeze_report.half_ranges)
    assert list(found) == ["1", "2", "3"] == list(seen)
    for name, (expanded, result) in seen.items():
        block, range_ = blocks(frozen)[name], found[name]
        assert block.half_range == range_ and range_.reason is None
        assert range_.expanded == pytest.approx(expanded.abs().max().item(), rel=1e-4)
        # The bound holds for every partial sum of every order, and is reached but for the values' places.
        windows = nn.functional.unfold(expanded, 3, padding=1).unflatten(1, (-1, 9)).abs()
        taps = block.depthwise.weight.double().flatten(1)[None, :, :, None].abs()
        largest = ((windows * taps).sum(2) + block.depthwise.bias.double().abs()[:, None]).max().item()
        assert largest <= range_.filtered * (1 + 1e-5) <= 3 * largest
        assert range_.weights == pytest.approx(
            max(taps.max().item() / 2, block.project.weight.abs().max().item()), rel=1e-5
        )
        assert 0 < range_.lost < 2**-11 and result.isfinite().all()
        assert range_.headroom == min(65504 / max(range_.expanded, range_.filtered), 2**-9 / range_.lost)


def test_nothing_changes_on_a_cpu(frozen):
    plain = mvit_kernels.freeze(made())
    with torch.inference_mode():
        assert torch.equal(frozen(IMAGES), plain(IMAGES))
    assert known(plain) == [False] * 3 and plain.freeze_report.half_ranges == ()
    assert "float16" not in str(plain.freeze_report) and "float16" not in repr(plain)
    least = min(range_.headroom for _, range_ in frozen.freeze_report.half_ranges)
    said = f"3 inverted residuals within float16's range on the example, with a headroom of {least:.3g} and more"
    assert said in str(frozen.freeze_report)
    assert repr(frozen).count("float16 inside: within its range on the example, headroom") == 3


def test_a_whole_network():
    """Of which no part is left packed on its own, and whose training goes on as it was."""
    model = MobileViT("xxs", num_classes=5).train()
    images = torch.randn(1, 3, 64, 64)
    before = copy.deepcopy(model.state_dict())
    frozen = mvit_kernels.freeze(model, dtype=torch.bfloat16, example=images)
    assert known(frozen) == [True] * 7 and len(frozen.freeze_report.half_ranges) == 7
    assert model.training and all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any("_composes" in vars(part) or vars(part).get("_network") for part in frozen.modules())
    with torch.inference_mode():
        assert torch.equal(frozen(images), mvit_kernels.freeze(model, dtype=torch.bfloat16)(images))


def test_the_largest_of_all_batches(frozen):
    small, large = IMAGES * 0.1, IMAGES * 3
    several = mvit_kernels.freeze(made(), example=[small, large, small])
    alone = mvit_kernels.freeze(made(), example=large)
    assert several.freeze_report.half_ranges == alone.freeze_report.half_ranges
    (_, first), *_ = several.freeze_report.half_ranges
    assert first.expanded > 2 * frozen.freeze_report.half_ranges[0][1].expanded


@pytest.mark.parametrize("largest, passes", [(65504 / 5, True), (65504 / 3, False), (1e6, False)])
def test_the_expanded_map_s_size(largest, passes):
    """Between 3 and 5 times float16's range lies the headroom that is asked for. What comes out is right either way."""
    model = made()
    with torch.no_grad():
        norm(model[2].expand).bias[5] += largest  # one channel, far above all others
        convolution(model[2].depthwise).weight[5] *= 0.1
        convolution(model[2].project).weight[:, 5] *= 1e-3
    frozen = mvit_kernels.freeze(model, example=IMAGES)
    found = dict(frozen.freeze_report.half_ranges)["2"]
    assert found.expanded == pytest.approx(largest, rel=0.01)
    assert (found.reason is None) == passes and dict(frozen.freeze_report.half_ranges)["1"].reason is None
    report = str(frozen.freeze_report)
    assert ("2 filters in float32: on the example its expanded map reaches" in report) != passes
    with torch.no_grad():
        torch.testing.assert_close(frozen(IMAGES), model(IMAGES), rtol=1e-3, atol=1e-3)


def convolution(part: nn.Module) -> nn.Conv2d:
    return next(module for module in part.modules() if isinstance(module, nn.Conv2d))


def norm(part: nn.Module) -> nn.BatchNorm2d:
    return next(module for module in part.modules() if isinstance(module, nn.BatchNorm2d))


@pytest.mark.parametrize(
    "change, says",
    [
        (dict(expanded=20000.0), "its expanded map reaches 2e+04, its depthwise sums 5; float16 ends at 65504"),
        (dict(filtered=20000.0), "its expanded map reaches 3, its depthwise sums 2e+04; float16 ends at 65504"),
        (dict(weights=65505.0), "a weight is 6.55e+04, and float16 ends at 65504"),
        (dict(lost=0.001), "its results could change by 0.001 of the largest; 0.00049 is allowed"),
        (dict(expanded=math.inf), "the example makes values that are not finite in it"),
        (dict(filtered=math.nan), "the example makes values that are not finite in it"),
        (dict(lost=math.nan), "the example makes values that are not finite in it"),
    ],
    ids=str,
)
def test_reasons(change, says):
    fine = HalfRange(expanded=3.0, filtered=5.0, weights=2.0, lost=1e-5)
    assert fine.reason is None and fine.headroom == 2**-9 / 1e-5
    assert HalfRange(0.0, 0.0, 0.0, 0.0).reason is None
    assert fine._replace(filtered=65504 / 4).reason is None
    assert says in fine._replace(**change).reason


def test_values_next_to_zero(frozen):
    """Taps ten thousand times as small, and a projection as much larger: they lie between float16's numbers."""
    small = copy.deepcopy(frozen)
    block, found = blocks(small)["2"], []
    for factor in (1, 1e-2, 1e-2):
        block.depthwise.weight.mul_(factor), block.depthwise.bias.mul_(factor)
        block.project.weight.div_(factor)
        found.append(half_range.measure(small, {"2": block}, [IMAGES])["2"])
        assert block.half_range == found[-1]
    assert found[0].reason is None
    assert found[1].lost > 10 * found[0].lost
    assert "so far apart in float16" in found[2].reason


# ------------------------------------------------------------------------------------------------------ how long known


def copied(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model)


def reloaded(model: nn.Module) -> nn.Module:
    stream = io.BytesIO()
    torch.save(model, stream)
    return torch.load(io.BytesIO(stream.getvalue()), weights_only=False)


@pytest.mark.parametrize(
    "moved",
    [
        copied,
        reloaded,
        lambda model: copied(model).to(torch.bfloat16),
        lambda model: copied(model).half().float(),
        lambda model: copied(model).double(),
        lambda model: reloaded(copied(model).to("cpu")).to(torch.bfloat16),
    ],
    ids=["copy", "pickle", "bfloat16", "float16 and back", "float64", "several"],
)
def test_goes_with_copies_and_moves(frozen, moved):
    other = moved(frozen)
    assert known(other) == [True] * 3 == known(frozen)
    assert [block.half_range for block in blocks(other).values()] == [
        range_ for _, range_ in frozen.freeze_report.half_ranges
    ]


def in_place(block):
    block.depthwise.weight.mul_(2)


def by_state_dict(block):
    block.load_state_dict({name: value * 2 for name, value in block.state_dict().items()})


def by_assignment(block):
    block.load_state_dict({name: value * 2 for name, value in block.state_dict().items()}, assign=True)


def another_tensor(block):
    block.project.weight = block.project.weight.clone()


def another_module(block):
    block.expand = copy.deepcopy(block.expand)


def applied(block):
    block._apply(lambda value: value * 1.1)


def to_meta(block):
    block.to("meta")


CHANGES = [in_place, by_state_dict, by_assignment, another_tensor, another_module, applied, to_meta]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_is_dropped_when_a_weight_changes(frozen, change):
    other = copied(frozen)
    change(blocks(other)["2"])
    assert known(other) == [True, False, True]
    assert known(copied(other)) == [True, False, True] and "headroom" not in repr(blocks(other)["2"])
    if change is not to_meta:
        assert filtered_in_half(program.build(other, torch.bfloat16)) == [True, False, True]


def filtered_in_half(builder: program.Builder) -> list[bool]:
    return [index in builder.half_filters for index in inverted(builder)]


def inverted(builder: program.Builder) -> list[int]:
    return [index for index, step in enumerate(builder.steps) if step[0] == program.INVERTED_RESIDUAL]


def test_what_a_gpu_would_get(frozen, monkeypatch):
    """Weights in float16 for blocks within the range whose shape has such a kernel; in the map's dtype else."""
    pytest.importorskip("triton", reason="Triton is not installed")
    monkeypatch.setattr(cuda.BACKEND, "unavailable", lambda device_type: [])
    other = copied(frozen)
    in_place(blocks(other)["3"])
    builder = program.build(other, torch.bfloat16)
    assert filtered_in_half(program.build(frozen, torch.bfloat16)) == [True] * 3
    assert filtered_in_half(builder) == [True, True, False]
    first, second, third = inverted(builder)
    for index, name, half_filter in ((first, "1", True), (third, "3", False)):
        block, found = blocks(other)[name], launched._packed(builder, index)
        parts = (block.expand, block.depthwise, block.project)
        weights = [value for part in parts for value in (part.weight.to(torch.bfloat16), part.bias)]
        weights = [value.flatten(1) if i in (0, 4) else value for i, value in enumerate(weights)]
        assert found.half_filter == half_filter
        assert torch.equal(
            found.packed, pack_inverted_residual(*weights, dtype=torch.bfloat16, half_filter=half_filter)
        )
    found = launched._packed(builder, second)  # 32 to 32 has no kernel
    assert not found.half_filter and found.packed is None


def test_a_file_says_what_was_found(frozen, tmp_path):
    frozen.save(tmp_path / "network.mvit", labels=None)
    saved = mvit_kernels.load(tmp_path / "network.mvit").metadata["half_ranges"]
    assert {name: HalfRange(**found) for name, found in saved.items()} == dict(frozen.freeze_report.half_ranges)
    mvit_kernels.freeze(made()).save(tmp_path / "plain.mvit")
    assert "half_ranges" not in mvit_kernels.load(tmp_path / "plain.mvit").metadata


# ------------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    "example, error, says",
    [
        (1.0, TypeError, r"freeze: example is float; a batch of images, \(B, C, H, W\), or a list of such batches"),
        ("photos", TypeError, "freeze: example is str"),
        (iter([IMAGES]), TypeError, "freeze: example is list_iterator"),
        ([], ValueError, "freeze: example has no batches"),
        ([IMAGES, None], TypeError, r"freeze: example\[1\] is NoneType"),
        (IMAGES.mul(255).byte(), TypeError, "freeze: example is torch.uint8; float images, scaled and normalized"),
        (IMAGES[0], ValueError, r"freeze: example has shape \(3, 20, 22\)"),
        ([IMAGES[:0]], ValueError, r"freeze: example\[0\] has shape \(0, 3, 20, 22\)"),
        (IMAGES.to("meta"), ValueError, r"freeze: example is on meta and the model on cpu; move it with .to\('cpu'\)"),
        (IMAGES / 0, ValueError, "freeze: example has values that are not finite"),
        (IMAGES[:, :2], ValueError, r"freeze: the model does not take the example, torch.float32 of \(2, 2, 20, 22\)"),
    ],
    ids=range(11),
)
def test_refuses(example, error, says):
    model = made()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(error, match=says):
        mvit_kernels.freeze(model, example=example)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_refuses_where_there_is_nothing_to_try():
    with pytest.raises(
        ValueError, match="freeze: example is for inverted residuals, and none was frozen; leave it out"
    ):
        mvit_kernels.freeze(nn.Sequential(ConvNormAct(3, 8, 3)), example=IMAGES)
