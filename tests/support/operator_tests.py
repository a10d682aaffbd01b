# SPDX-License-Identifier: Apache-2.0
"""The tests that every operator has, on every path.

Example, from an operator's file:
    >>> class TestLinearResidual(OperatorTests):
    ...     operator, cases, small, refused = "linear_residual", CASES, dict(shape=(2, 3, 5, 24), n=40), REFUSED
    ...     tiny = [dict(shape=(2, 3, 4), n=3)]
    ...     repeated = dict(shape=(50, 64), n=64)

An operator to which a test does not apply sets it to None; one that needs more overrides it. What the tests are
parametrised over is in `pytest_generate_tests`, and the checks themselves are in `support.checks`.
"""

from __future__ import annotations

from typing import Any

import pytest

from support.cases import DTYPES, Sizes, differentiable, paths
from support.checks import (
    check,
    check_autocast,
    check_gradients,
    check_gradients_one_by_one,
    check_graph_only_where_needed,
    check_meta,
    check_refusal,
    check_registration,
    check_same_bits,
)
from support.layouts import LAYOUTS


class OperatorTests:
    operator: str
    cases: list[Sizes]  # for values and gradients
    small: Sizes  # for what is not about sizes
    tiny: list[Sizes]  # for finite differences
    repeated: Sizes  # for a call that is made again and again
    refused: list[tuple[dict[str, Any], type[Exception], tuple[str, ...]]]  # what is changed in `small`; what it raises
    gradients_in: tuple[str, ...] = DTYPES

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        every = paths(self.operator)
        kernels = [path for path in every if path not in ("reference", "raw")]
        exact = [path for path in paths(self.operator, "float64") if differentiable(self.operator, path)]
        over = {
            "test_values_and_gradients": {"sizes": self.cases, "dtype": DTYPES, "path": every},
            "test_layouts": {"dtype": ("float32", "bfloat16"), "layout": LAYOUTS, "path": every},
            "test_norm_parameters_in_float32": {"dtype": ("bfloat16", "float16"), "path": every},
            "test_autocast": {"path": [path for path in every if path != "raw"]},
            "test_graph": {"path": every},
            "test_finite_differences": {"sizes": self.tiny, "path": exact},
            "test_registration": {  # kernels may want dense rows
                "backend, layout": [
                    *(("reference", layout) for layout in ("contiguous", "permuted")),
                    *((kernel, "contiguous") for kernel in kernels),
                ]
            },
            "test_same_bits": {"path": every},
            "test_refuses": {
                "change, error, says": [pytest.param(*case, id=",".join(case[0])) for case in self.refused]
            },
        }
        for names, values in over.get(metafunc.function.__name__, {}).items():
            metafunc.parametrize(names, values, ids=str if names == "sizes" else None)

    @pytest.mark.filterwarnings("ignore:var_mean")  # PyTorch warns of a LayerNorm of no rows at all
    def test_values_and_gradients(self, sizes, dtype, path):
        check(self.operator, sizes, dtype=dtype, path=path, gradients=dtype in self.gradients_in)

    def test_layouts(self, layout, dtype, path):
        check(self.operator, self.small, dtype=dtype, path=path, layout=layout, gradients=dtype in self.gradients_in)

    def test_norm_parameters_in_float32(self, dtype, path):
        check(self.operator, self.small, dtype=dtype, norm_dtype="float32", path=path)

    def test_autocast(self, path):
        check_autocast(self.operator, self.small, path)

    def test_graph(self, path):
        check_graph_only_where_needed(self.operator, self.small, path)
        check_gradients_one_by_one(self.operator, self.small, path)

    def test_finite_differences(self, sizes, path):
        check_gradients(self.operator, sizes, path, twice=path == "reference")

    def test_registration(self, backend, layout):
        check_registration(self.operator, self.small, layout, backend)

    def test_same_bits(self, path):
        check_same_bits(self.operator, self.repeated, path)

    def test_refuses(self, change, error, says):
        check_refusal(self.operator, self.small, change, error, *says)

    def test_meta_device(self):
        check_meta(self.operator, self.small, "reference")
