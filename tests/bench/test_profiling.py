# SPDX-License-Identifier: Apache-2.0
"""Profiles: launches, categories of operators and of a model's time, copies between layouts, and the command."""

import contextlib
import csv
import json
import math
from types import SimpleNamespace

import pytest
import torch

import mvit_kernels
from mvit_kernels import backends
from mvit_kernels.__main__ import main
from mvit_kernels.bench import profiling
from mvit_kernels.bench.peers import PEERS, Subject
from mvit_kernels.bench.profiling import LAUNCH_GAPS, OTHER, category, layout_copies, time_by_category
from mvit_kernels.bench.profiling import table as profile_table
from support import models


def test_launches_are_kernels_alone(monkeypatch):
    """Of a GPU's events: no copies, no fills, no ranges with a name, and nothing that the host does."""
    kinds = torch.autograd.DeviceType
    names = [("aten::add", kinds.CPU), ("add_kernel", kinds.CUDA), ("_fused", kinds.CUDA), ("Memcpy DtoD", kinds.CUDA)]
    names += [("Memset (Device)", kinds.CUDA), ("Torch-Compiled Region", kinds.CUDA)]
    events = [SimpleNamespace(name=n, device_type=k, is_user_annotation="Region" in n) for n, k in names]
    calls = []

    @contextlib.contextmanager
    def profile(**options):
        calls.append("profile")
        yield SimpleNamespace(events=lambda: events)

    monkeypatch.setattr(profiling, "profile", profile)
    monkeypatch.setattr(profiling, "synchronize", lambda device: calls.append("synchronize"))
    assert profiling.launches(lambda: calls.append("call"), "cuda") == 2
    assert calls == ["call", "synchronize", "profile", "call", "synchronize"]


def test_profile_prints_categories(tmp_path, capsys):
    path = tmp_path / "profile.csv"
    assert main(f"profile --model own/xxs --size 64 --calls 1 --operators 3 --output {path}".split()) == 0
    output = capsys.readouterr().out
    for words in ("convolution", "linear", "attention", "norm and activation", "launch gaps", "total", "accelerated"):
        assert words in output
    rows = list(csv.DictReader(path.open()))
    assert {row["candidate"] for row in rows} == {"eager", "accelerated", "frozen"}
    assert main("profile --model own/xxs --size 64 --calls 1 --peers eager --json".split()) == 0
    assert {row["category"] for row in json.loads(capsys.readouterr().out)} == {row["category"] for row in rows}


# --- categories


@pytest.mark.parametrize(
    "operator, expected",
    [
        ("aten::mkldnn_convolution", "convolution"),
        ("aten::_conv_depthwise2d", "convolution"),
        ("mkldnn::_convolution_pointwise", "convolution"),
        ("aten::convolution_backward", "convolution"),
        ("aten::addmm", "linear"),
        ("mvit_kernels::layer_norm_linear", "linear"),
        ("mvit_kernels::layer_norm_mlp_backward", "linear"),
        ("aten::_scaled_dot_product_flash_attention_for_cpu", "attention"),
        ("aten::_softmax_backward_data", "attention"),
        ("mvit_kernels::patch_attention", "attention"),
        ("mvit_kernels::transformer", "fused transformer"),
        ("aten::native_layer_norm", "norm and activation"),
        ("aten::cudnn_batch_norm_backward", "norm and activation"),
        ("aten::silu_", "norm and activation"),
        ("aten::copy_", "layout copies"),
        ("aten::cat", "layout copies"),
        ("aten::add_relu_of_the_future", OTHER),
        ("aten::view", OTHER),
    ],
)
def test_category_of_an_operator(operator, expected):
    assert category(operator) == expected


ALLOCATION = set("empty empty_like empty_strided new_empty resize_ fill_".split())
VIEWS = set(
    "_nnpack_available _reshape_alias _unsafe_view alias as_strided as_strided_ chunk detach expand flatten narrow "
    "permute reshape resolve_conj select slice split squeeze t to transpose unbind unflatten unsqueeze view".split()
)
POOLING = set("adaptive_avg_pool2d mean sum".split())  # once per model, over its last and smallest map


@pytest.mark.parametrize(
    ("form", "backend", "expected"),
    [
        ("eager", None, ("convolution", "linear", "attention", "norm and activation", "layout copies")),
        ("accelerated", "reference", ("convolution", "linear", "attention", "norm and activation", "layout copies")),
        ("accelerated", None, ("convolution", "fused transformer", "norm and activation")),
        ("frozen", None, ("frozen network",)),
    ],
)
def test_categories_cover_what_a_model_runs(form, backend, expected):
    subject = Subject(models.build("timm", "xxs"), torch.rand(1, 3, 192, 192), backend=backend)
    model, images = PEERS[form].build(subject)
    with torch.no_grad():
        profile = time_by_category(lambda: model(images), calls=1)
    assert sum(profile.categories.values()) == pytest.approx(profile.wall_ms)
    work = profile.wall_ms - profile.categories[LAUNCH_GAPS]
    assert work == pytest.approx(sum(operator.ms for operator in profile.operators))
    for name in expected:
        assert profile.categories[name] > 0, name
    # Which operators are left over, not how long they took: shares of the time depend on what else the machine does.
    other = {operator.name.removeprefix("aten::") for operator in profile.operators if operator.category == OTHER}
    assert other <= ALLOCATION | VIEWS | POOLING, other - ALLOCATION - VIEWS - POOLING
    assert expected[0] in profile_table({form: profile})


# --- layout copies


def test_layout_copies_finds_each_copy_and_no_other():
    x = torch.rand(2, 8, 6, 4)
    assert layout_copies(lambda: (x.permute(0, 2, 3, 1), x.contiguous(), x.flatten(), x + 1, x.to(torch.float32))) == []
    rows = x.permute(0, 2, 3, 1)
    found = layout_copies(lambda: (rows.contiguous(), rows.contiguous(), rows.reshape(-1, 8), x.bfloat16(), x.clone()))
    assert sorted(found) == [
        ("aten::clone", (2, 8, 6, 4), 1),
        ("aten::contiguous", (2, 6, 4, 8), 2),
        ("aten::reshape", (2, 6, 4, 8), 1),
        ("aten::to", (2, 8, 6, 4), 1),
    ]
    assert layout_copies(lambda: torch.cat([x, x])) == [("aten::cat", (), 1)]


def _copies_of_the_map(block, x, width):
    """Copies at least as large as the (B, H, W, width) map between the 1 × 1 convolutions in and out.

    All other maps of the block are narrower (C < width), but for fusion's concatenation, which is a cat.
    """
    with torch.no_grad():
        block(x)
        copies = layout_copies(lambda: block(x))
    tokens = x.numel() // x.shape[1]
    return sum(copy.count for copy in copies if math.prod(copy.shape) >= tokens * width)


@pytest.mark.parametrize(
    "backend, expected",
    [
        ("reference", 2),  # into sequence order and back, once per block
        ("auto", 0),  # where the C++ attention is built, which reads rows where they are
    ],
)
@pytest.mark.parametrize("library", ["timm", "huggingface", "own"])
def test_accelerated_block_copies_no_map(library, backend, expected):
    if backend == "auto" and backends.unavailable("cpu", "cpu"):
        pytest.skip(backends.unavailable("cpu", "cpu")[0])
    if library == "huggingface":
        block = models.build(library).mobilevit.encoder.layer[2]
        block.downsampling_layer = torch.nn.Conv2d(48, 48, 3, padding=1)  # its stride of 2 is in the others' stage
    else:
        block = models.build(library).stages[2][1]
    block = block.to(memory_format=torch.channels_last)
    x = torch.rand(2, 48, 32, 32).contiguous(memory_format=torch.channels_last)
    as_it_was = _copies_of_the_map(block, x, 64)
    mvit_kernels.accelerate(block, backend=backend, strict=True)
    assert _copies_of_the_map(block, x, 64) == expected
    # timm copies the map six times, our own textbook path three: if none were seen, 0 would prove nothing
    assert as_it_was > max(2, expected)
