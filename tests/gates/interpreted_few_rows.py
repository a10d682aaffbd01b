# SPDX-License-Identifier: Apache-2.0
"""The projection with the MLP's first half, of few rows, in Triton's interpreter; see interpreted.py:

TRITON_INTERPRET=1 python -m pytest tests/gates/interpreted_few_rows.py
"""

import pytest
import torch

from mvit_kernels.backends.triton.target import INTERPRETED

assert INTERPRETED, "run it with TRITON_INTERPRET=1"
pytest.importorskip("triton", reason="Triton is not installed")
from mvit_kernels.backends.triton import projection_norm_linear  # noqa: E402
from support import few_rows  # noqa: E402

SIZES = [(33, 144, 144, 288), (16, 240, 240, 480), (5, 64, 64, 128), (17, 32, 20, 72), (1, 8, 16, 8), (515, 16, 16, 16)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("rows, inner, d, hidden", SIZES)
def test_values(rows, inner, d, hidden, dtype):
    """Ragged rows, and widths that fill no chunk."""
    few_rows.check(rows, inner, d, hidden, dtype, norm=torch.float32 if hidden == 72 else None)


@pytest.mark.parametrize("how", [dict(activation=""), dict(bias=False, activation=""), dict(beside=24)], ids=str)
def test_forms(how):
    """Without SiLU, as before attention; without a bias; and into a part of a map."""
    few_rows.check(17, 96, 48, 72, torch.bfloat16, **how)


def test_rows_between_that_nobody_reads():
    tensors = few_rows.draw(9, 32, 48, 40, torch.bfloat16)
    wanted, out = few_rows.launched(tensors)[1], torch.full((9, 40), torch.nan, dtype=torch.bfloat16)
    projection_norm_linear.launch(*tensors, None, out, 1e-5, "silu").run()
    assert torch.equal(out, wanted)


def test_rows_that_are_far_from_zero():
    """The variance is that of differences from the mean."""

    def change(tensors):
        tensors[2] += 300

    few_rows.check(16, 32, 144, 64, torch.bfloat16, change=change)


def test_a_row_is_its_own_alone():
    tensors = few_rows.draw(18, 32, 48, 80, torch.bfloat16)
    middle, found = few_rows.launched(tensors)
    changed = [tensor.clone() for tensor in tensors]
    changed[0][3], changed[3][17] = torch.nan, torch.nan
    after = few_rows.launched(changed)
    kept = [row for row in range(18) if row not in (3, 17)]
    for before, then in zip((middle, found), after, strict=True):
        assert torch.equal(then[kept], before[kept]) and then[3].isnan().all() and then[17].isnan().all()
