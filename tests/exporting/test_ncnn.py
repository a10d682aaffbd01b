# SPDX-License-Identifier: Apache-2.0
"""ncnn's files: written by pnnx, run by ncnn."""

from __future__ import annotations

import importlib.util

import pytest
import torch

import mvit_kernels
from support import models, networks

pytestmark = pytest.mark.skipif(
    None in map(importlib.util.find_spec, ("ncnn", "pnnx")), reason="ncnn or pnnx is not installed"
)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Every kind of layer, patches of 2×2 and 2×1, a resize, and a map as output."""
    model, _ = networks.chain()
    return mvit_kernels.export(model, tmp_path_factory.mktemp("ncnn") / "chain.param", sizes=(88, 72))


def test_the_file_computes_what_the_model_computes(exported):
    assert [row.inputs for row in exported.differences] == ["random 88x72", "photos 88x72"]
    assert exported.ok and all(0 < row.relative < 4e-6 for row in exported.differences), exported


def test_the_file_is_in_the_phone_form(exported):
    nodes, transposes, _ = exported.contents
    assert (exported.target, exported.form) == ("ncnn", "phone")
    assert nodes["Softmax"] == transposes == 2 * (4 + 2)  # of the queries, of every layer and patch position
    assert (nodes["Reorg"], nodes["PixelShuffle"], nodes["Interp"]) == (1, 1, 2)
    assert not any("." in kind or "_" in kind for kind in nodes), nodes  # Tensor.reshape, torch.unbind: not ncnn's


def test_input_and_output_have_the_names_of_all_files(exported):
    words = exported.path.read_text().split()
    assert {"images", "output"} <= set(words) and not {"in0", "out0"} & set(words)


def test_a_detector_has_two_outputs_and_half_the_bytes_in_float16(tmp_path):
    model = models.sensible(mvit_kernels.MobileViTSSDLite("xxs", num_classes=3))
    report = mvit_kernels.export(model, tmp_path / "detector.param", sizes=128, dtype=torch.float16)
    assert {row.output for row in report.differences} == {"logits", "offsets"} and report.ok
    weights = sum(value.numel() for value in model.parameters())
    assert weights * 1.9 < (tmp_path / "detector.bin").stat().st_size < weights * 2.2


def test_wrong_arguments_are_refused(tmp_path):
    model = models.build("own")
    for options, message in (
        (dict(sizes="dynamic"), "ncnn files have fixed sizes"),
        (dict(sizes=[64, 96]), "ncnn files take one size"),
        (dict(sizes=64, batch=2), "ncnn's maps have no batch axis, so batch=1 is wanted"),
    ):
        with pytest.raises(ValueError, match=message):
            mvit_kernels.export(model, tmp_path / "a.param", **options)
    assert not list(tmp_path.iterdir())
