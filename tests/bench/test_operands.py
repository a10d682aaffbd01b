# SPDX-License-Identifier: Apache-2.0
"""The operators' operands, at a stage of the network and at a shape of one's own: a call's arithmetic and its sizes."""

import pytest
import torch

from mvit_kernels.__main__ import build_parser
from mvit_kernels.bench.suites import networks
from mvit_kernels.bench.suites.operands import OPERATORS, operands, operands_of, sizes_of, stages
from mvit_kernels.cli import measuring
from support.suites import TINY


def test_work_of_the_stacks_is_what_the_networks_do():
    """GFLOP of the published variants at 256 px, by hand: S stage 3 is 2 layers of 1024 tokens, of which each costs
    6 · 144² + 2 · 144² + 8 · 144² for the linear layers, and 2 · 2 · 256 · 144 for attention to 256 tokens."""
    first = operands("transformer", stages(["s"], 256, 1)[0]).work
    assert first.gflop == pytest.approx(2 * 1024 * (16 * 144**2 + 4 * 256 * 144) / 1e9)
    for variant, total in (("s", 1816), ("xs", 836), ("xxs", 424)):
        gflop = [operands("transformer", stage).work.gflop for stage in stages([variant], 256, 1)]
        assert round(sum(gflop) * 1e3) == total
    assert [stage.side for stage in stages(["s"], 224, 1)] == [28, 14, 8]  # 7 × 7 becomes 8 × 8


@pytest.mark.parametrize("operator", OPERATORS)
def test_work_counts_what_pytorch_counts(operator):
    """FlopCounterMode counts the products of linear layers, convolutions and attention: all that `Work` counts."""
    case = operands(operator, TINY)
    with networks.sdpa_kernel(networks.SDPBackend.MATH), networks.FlopCounterMode(display=False) as counter:
        out = case.plain(*case.tensors)
    assert case.work.gflop == pytest.approx(counter.get_total_flops() / 1e9)
    assert case.training_work.gflop == pytest.approx(3 * case.work.gflop)
    moved = sum(t.nbytes for t in case.tensors) + out.nbytes
    assert case.work.megabytes == pytest.approx(moved / 1e6)
    assert case.to(dtype=torch.bfloat16).work.megabytes == pytest.approx(moved / 2e6)
    torch.testing.assert_close(case.public(*case.tensors, backend="reference"), out)


@pytest.mark.parametrize(
    "operator, shape, sizes",
    [
        ("transformer", (2, 6, 8, 20), dict(num_heads=5, patch_size=(3, 2), inner=10, hidden=24, layers=3)),
        ("transformer_layer", (1, 4, 4, 24), dict(num_heads=2, inner=16, hidden=40)),
        ("patch_attention", (2, 4, 6, 24), dict(num_heads=3, patch_size=(2, 3))),
        ("inverted_residual", (2, 7, 8, 20), dict(hidden=24, out_features=12, stride=2)),
        ("inverted_residual", (2, 7, 8, 20), dict(residual=True, dilation=2)),
        ("layer_norm_linear", (9, 20), dict(out_features=12, activation="silu")),
        ("linear_residual", (3, 5, 20), dict(out_features=12)),
        ("layer_norm_mlp", (9, 20), dict(hidden=7)),
        ("layer_norm", (9, 20), {}),
        ("batch_norm_activation", (2, 3, 4, 20), dict(activation=None)),
    ],
)
def test_own_sizes(operator, shape, sizes):
    """Every size is that of the call: the products that PyTorch counts are those of the formula."""
    case = operands_of(operator, shape, **sizes)
    with networks.sdpa_kernel(networks.SDPBackend.MATH), networks.FlopCounterMode(display=False) as counter:
        out = case.plain(*case.tensors)
    assert case.work.gflop == pytest.approx(counter.get_total_flops() / 1e9)
    torch.testing.assert_close(case.public(*case.tensors, backend="reference"), out)


def test_every_operator_has_a_size_for_each_flag():
    """The flags are the operators' sizes, and the help names every operator."""
    parser = build_parser()
    assert {name for operator in OPERATORS for name in sizes_of(operator)} == set(measuring.SIZES)
    text = parser._subparsers._group_actions[0].choices["bench"].format_help()
    assert all(operator in text for operator in OPERATORS)
