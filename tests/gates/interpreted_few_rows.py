# SPDX-License-Identifier: Apache-2.0
"""The projection with the MLP's first half, of few rows, in Triton's interpreter; see interpreted.py:

TRITON_INTERPRET=1 python -m pytest tests/gates/interpreted_few_rows.py
"""

import pytest
import torch
import torch.nn.functional as F

from mvit_kernels.backends.triton.target import INTERPRETED
from support.tolerance import assert_close_as_pytorch

assert INTERPRETED, "run it with TRITON_INTERPRET=1"
pytest.importorskip("triton", reason="Triton is not installed")
from mvit_kernels.backends.triton import projection_norm_linear  # noqa: E402


def composed(x, proj_weight, proj_bias, residual, norm_weight, norm_bias, weight, bias, middle=None):
    """By PyTorch's operators: the rows between, and what the second half reads; of `middle` if it is given."""
    made = residual + F.linear(x, proj_weight, proj_bias)
    norm = F.layer_norm(made if middle is None else middle, made.shape[-1:], norm_weight, norm_bias, 1e-5)
    return made, F.silu(F.linear(norm, weight, bias))


def draw(rows, inner, d, hidden, dtype, norm=None):
    generator = torch.Generator().manual_seed(0)

    def of(*shape, std=1.0):
        return (torch.randn(shape, generator=generator) * std).to(dtype)

    return [
        *(of(rows, inner), of(d, inner, std=inner**-0.5), of(d), of(rows, d)),
        *(v.to(norm or dtype) for v in (1 + of(d, std=0.1), of(d, std=0.1))),
        *(of(hidden, d, std=d**-0.5), of(hidden)),
    ]


def launched(tensors):
    x, *_, weight, _ = tensors
    middle, hidden = torch.full_like(tensors[3], torch.nan), x.new_full((x.shape[0], weight.shape[0]), torch.nan)
    projection_norm_linear.launch(*tensors, middle, hidden, 1e-5).run()
    return middle, hidden


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "rows, inner, d, hidden",
    [(33, 144, 144, 288), (16, 240, 240, 480), (5, 64, 64, 128), (17, 32, 20, 72), (1, 8, 16, 8), (515, 16, 16, 16)],
)
def test_values(rows, inner, d, hidden, dtype):
    """Ragged rows, and widths that fill no chunk."""
    tensors = draw(rows, inner, d, hidden, dtype, norm=torch.float32 if hidden == 72 else None)
    middle, found = launched(tensors)
    low = [tensor.to(dtype) for tensor in tensors]
    exact = [tensor.double() for tensor in tensors]
    usual, truth = composed(*low)[0], composed(*exact)[0]
    assert_close_as_pytorch("middle", middle, usual, truth)
    usual, truth = composed(*low, middle)[1], composed(*exact, middle.double())[1]
    assert_close_as_pytorch("hidden", found, usual, truth)


def test_rows_that_are_far_from_zero():
    """The variance is that of differences from the mean."""
    tensors = draw(16, 32, 144, 64, torch.bfloat16)
    tensors[2] += 300
    middle, found = launched(tensors)
    truth = composed(*(tensor.double() for tensor in tensors), middle.double())[1]
    assert_close_as_pytorch("hidden", found, composed(*tensors, middle)[1], truth)


def test_a_row_is_its_own_alone():
    tensors = draw(18, 32, 48, 80, torch.bfloat16)
    middle, found = launched(tensors)
    changed = [tensor.clone() for tensor in tensors]
    changed[0][3], changed[3][17] = torch.nan, torch.nan
    after = launched(changed)
    kept = [row for row in range(18) if row not in (3, 17)]
    for before, then in zip((middle, found), after, strict=True):
        assert torch.equal(then[kept], before[kept]) and then[3].isnan().all() and then[17].isnan().all()
