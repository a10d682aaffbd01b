# SPDX-License-Identifier: Apache-2.0
"""Core ML's files, whose programs PyTorch runs here operation by operation (`support.mil`): Core ML is macOS's."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from torch import Tensor

import mvit_kernels
from mvit_kernels.exporting.plan import Contents, Plan
from mvit_kernels.exporting.targets import coreml
from mvit_kernels.freezing.modules import FrozenSequential
from support import mil, models, networks

pytestmark = pytest.mark.skipif(importlib.util.find_spec("coremltools") is None, reason="coremltools is not installed")


def truth(model: torch.nn.Module, images: Tensor) -> Tensor:
    with torch.no_grad():
        return models.output(model(images))


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Every kind of layer, patches of 2×2 and 2×1, a resize, and a map as output, in float32."""
    model, _ = networks.chain()
    path = tmp_path_factory.mktemp("coreml") / "chain.mlpackage"
    return model, mvit_kernels.export(model, path, sizes=(88, 72))


def test_the_program_computes_what_the_model_computes(exported):
    model, report = exported
    images = models.images(1, 88, 72)
    (name, output), *rest = mil.run(report.path, images).items()
    expected = truth(model, images)
    assert (name, rest) == ("output", [])
    torch.testing.assert_close(output, expected, rtol=0, atol=4e-6 * expected.abs().max().item())


def test_the_program_is_in_the_phone_form(exported):
    _, report = exported
    nodes, transposes, rank = report.contents
    assert (report.target, report.form, transposes, rank) == ("coreml", "phone", 0, 4)
    assert (nodes["layer_norm"], nodes["softmax"]) == (
        2 * 5,
        2 * 4 * (4 + 2),
    )  # written out, found again by coremltools
    assert (nodes["pixel_unshuffle"], nodes["pixel_shuffle"], nodes["upsample_bilinear"]) == (1, 1, 2)
    assert report.bytes == sum(file.stat().st_size for file in Path(report.path).rglob("*") if file.is_file())
    assert "no runtime" in str(report) and "0 transposes" in str(report)


def test_the_weights_are_held_to_the_networks(exported):
    model, report = exported
    network = mvit_kernels.exporting.phone.phone_form(model, Plan(sizes=((88, 72),)))
    coreml._check_weights(network, report.path)
    with torch.no_grad():
        next(network.parameters())[0, 0, 0, 0] += 1
    with pytest.raises(RuntimeError, match=r"the weight of 0\.conv is not in the Core ML file"):
        coreml._check_weights(network, report.path)


def test_a_program_out_of_form_is_refused():
    for contents in (Contents({"transpose": 1}, 1, 4), Contents({}, 0, 5)):
        with pytest.raises(RuntimeError, match="does not stay within 0 and 4"):
            coreml.CoreML().check(contents, Plan(sizes=((64, 64),)))


@pytest.fixture(scope="module")
def several(tmp_path_factory):
    """Two sizes in one file, of which one needs a resize, in float16."""
    draw = networks.Draw(0)
    model = FrozenSequential(draw.conv(3, 8, 3, stride=2), draw.block(8, 12, layers=1, heads=2))
    path = tmp_path_factory.mktemp("coreml") / "several.mlpackage"
    report = mvit_kernels.export(model, path, sizes=[32, (38, 48)], dtype=torch.float16)
    return model, report


def test_a_file_for_several_sizes_has_a_function_for_each(several):
    import coremltools

    model, report = several
    found = coremltools.models.MLModel(str(report.path), skip_model_load=True).get_spec().description
    assert found.defaultFunctionName == "images_32x32"
    shapes = {each.name: list(each.input[0].type.multiArrayType.shape) for each in found.functions}
    assert shapes == {"images_32x32": [1, 3, 32, 32], "images_38x48": [1, 3, 38, 48]}
    weights = sum(value.numel() for value in model.buffers())
    stored = next(Path(report.path).rglob("weight.bin")).stat().st_size
    assert weights * 1.8 < stored < weights * 3.2  # float16, and each weight once
    assert report.contents.nodes["upsample_bilinear"] == 2


def test_each_function_computes_what_the_model_computes(several):
    model, report = several
    for height, width in ((32, 32), (38, 48)):
        images = torch.rand(1, 3, height, width, generator=torch.Generator().manual_seed(3))
        (output,) = mil.run(report.path, images, f"images_{height}x{width}").values()
        expected = truth(model, images)
        torch.testing.assert_close(output, expected, rtol=0, atol=4e-3 * expected.abs().max().item())


def test_wrong_arguments_are_refused(tmp_path):
    model = models.build("own")
    for options, message in (
        (dict(sizes="dynamic"), "coreml files have fixed sizes"),
        (dict(batch="dynamic"), "coreml files have a fixed one"),
        (dict(dtype=torch.bfloat16), "coreml files have float32, float16"),
        (dict(sizes=[]), "sizes is"),
    ):
        with pytest.raises(ValueError, match=message):
            mvit_kernels.export(model, tmp_path / "a.mlpackage", **options)
    assert not list(tmp_path.iterdir())
