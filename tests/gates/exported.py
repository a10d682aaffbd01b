# SPDX-License-Identifier: Apache-2.0
"""LiteRT's and ExecuTorch's files, written and run: `make test-targets`, in an environment that has their libraries.

They are 800 and 300 MB, want other versions of some libraries than the tests do, and convert a network in minutes.
"""

from __future__ import annotations

import pytest
import torch

import mvit_kernels
from support import models, networks

TARGETS = {"litert": "tflite", "executorch": "pte"}


@pytest.fixture(scope="module", params=TARGETS)
def exported(request, tmp_path_factory):
    """Every kind of layer, patches of 2×2 and 2×1, a resize, and a map as output."""
    model, _ = networks.chain()
    path = tmp_path_factory.mktemp(request.param) / f"chain.{TARGETS[request.param]}"
    return mvit_kernels.export(model, path, sizes=(88, 72))


def test_the_file_computes_what_the_model_computes(exported):
    assert [row.inputs for row in exported.differences] == ["random 88x72", "photos 88x72"]
    assert exported.ok and all(0 < row.relative < 4e-6 for row in exported.differences), exported


def test_the_file_is_in_the_phone_form(exported):
    nodes, transposes, rank = exported.contents
    assert (exported.form, rank) == ("phone", 4)
    if exported.target == "executorch":
        assert transposes == 0 and nodes["XnnpackBackend"] <= 8 and nodes.total() <= 14, exported
    else:
        assert nodes["SOFTMAX"] == 4 * 4 and nodes["BATCH_MATMUL"] == 2 * nodes["SOFTMAX"]
        assert transposes <= nodes["SOFTMAX"] + 3, exported  # of keys, and around the network


@pytest.mark.parametrize("target", TARGETS)
def test_a_network_of_hugging_face_with_another_head(target, tmp_path):
    model = models.build("huggingface", task="ForSemanticSegmentation", num_labels=5)
    report = mvit_kernels.export(model, tmp_path / f"segmentation.{TARGETS[target]}", sizes=64)
    assert {row.output for row in report.differences} == {"logits"} and report.ok
    assert sum(value.numel() for value in model.parameters()) * 4 < report.bytes * 1.1


def test_several_images_are_one_batch(tmp_path):
    report = mvit_kernels.export(models.first_block(), tmp_path / "batch.pte", sizes=64, batch=3)
    assert report.ok and report.images == "3 × 3 × 64x64"


@pytest.mark.parametrize("target", TARGETS)
def test_wrong_arguments_are_refused(target, tmp_path):
    for options, message in (
        (dict(sizes="dynamic"), f"{target} files have fixed sizes"),
        (dict(sizes=[64, 96]), f"{target} files take one size"),
        (dict(dtype=torch.float16), f"{target} files have float32"),
    ):
        with pytest.raises(ValueError, match=message):
            mvit_kernels.export(models.build("own"), tmp_path / f"a.{TARGETS[target]}", **options)
    assert not list(tmp_path.iterdir())
