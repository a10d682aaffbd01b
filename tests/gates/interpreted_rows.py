# SPDX-License-Identifier: Apache-2.0
"""The row-wise kernels' tiles for many rows, in Triton's interpreter, at few rows: several tiles of rows a program, and
rows that end inside a tile. backends/triton/test_backend.py runs this file in a process of its own, like
interpreted.py:

    TRITON_INTERPRET=1 python -m pytest tests/gates/interpreted_rows.py
"""

import importlib

import pytest
import torch

from mvit_kernels.backends.triton.target import INTERPRETED
from support.checks import check
from support.row_tiles import as_for_many_rows

assert INTERPRETED, "run it with TRITON_INTERPRET=1"
linear_residual = importlib.import_module("mvit_kernels.backends.triton.linear_residual")

WIDTHS = [  # rows, width: one tail of each kind, and a width that is not even a multiple of 16
    (130, 144),  # 64 + 64 + 16, or 4 · 32 + 16
    (70, 192),
    (65, 240),
    (129, 96),  # 64 + 32
    (150, 120),  # 64 + 64, the last with 8 columns beyond the row
    (66, 77),  # 64 + 16, the last with 3
]


@pytest.fixture(autouse=True)
def many_rows(monkeypatch):
    as_for_many_rows(monkeypatch)


@pytest.mark.parametrize("rows, d", WIDTHS)
@pytest.mark.parametrize(
    "operator, more",
    [
        ("layer_norm_linear", lambda d: dict(n=d + 24, activation="silu")),
        ("linear_residual", lambda d: dict(n=d)),
        ("layer_norm_mlp", lambda d: dict(hidden=d // 2)),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_tiles_for_many_rows(operator, more, rows, d):
    gradients = operator == "linear_residual" and d in (144, 192)  # the same kernel, the weight not transposed
    check(operator, dict(shape=(rows, d), **more(d)), dtype="bfloat16", path="triton", gradients=gradients)


def test_a_layer_with_dropout():
    """Masks are of an element's place in the map, whichever program and part of columns computes it."""
    sizes = dict(
        shape=(1, 8, 10, 80), heads=4, patch=(2, 2), dropout=dict(projection=0.3, mlp=0.2, path1=0.2, path2=0.2)
    )
    check("transformer_layer", sizes, dtype="bfloat16", path="triton", gradients=False)


@pytest.mark.parametrize("programs", [1, 2, 3, 7])
def test_results_do_not_depend_on_the_number_of_programs(programs, monkeypatch):
    """What a program's next tile is follows from their number; what it computes does not."""
    generator = torch.Generator().manual_seed(0)
    x, weight, residual = (torch.randn(*shape, generator=generator) for shape in ((390, 48), (80, 48), (390, 80)))
    tensors = [t.bfloat16() for t in (x, weight, torch.ones(80), residual)]
    results = []
    for most in (programs, 264):
        as_for_many_rows(monkeypatch, programs=most)
        results.append(linear_residual.forward(*tensors))
    assert linear_residual.launch(*tensors, results[0]).grid == (7, 1)
    assert torch.equal(*results)
