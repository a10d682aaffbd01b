# SPDX-License-Identifier: Apache-2.0
"""Random shapes, dtypes and layouts for every operator on every path; a failure prints the case to paste.

``MVIT_KERNELS_FUZZ=5000 pytest tests/ops/test_fuzz.py`` searches longer; a number always gives the same case.
"""

import os
import random

import pytest

from support.cases import DIFFERENTIABLE, DTYPES, INFERENCE, paths
from support.checks import check
from support.layouts import LAYOUTS

CASES = int(os.environ.get("MVIT_KERNELS_FUZZ", "40"))


def _rows(r: random.Random) -> tuple[int, ...]:
    return tuple(r.choice((1, 2, 3, 5, 9)) for _ in range(r.randint(0, 4)))


def _map(r: random.Random, patch: tuple[int, int], most: int) -> tuple[int, int, int]:
    return r.choice((1, 1, 2, 3)), patch[0] * r.randint(1, most), patch[1] * r.randint(1, most)


def _width(r: random.Random) -> int:
    return r.choice((1, 2, 3, 7, 8, 15, 16, 17, 24, 31, 32, 33, 60, 64, 100, 144))


def _mean(r: random.Random, d: int) -> float:
    """Far from zero for wide rows only: two values around 30 may be too close for a dtype to distinguish."""
    return r.choice((0.0, 0.0, 30.0)) if d >= 15 else 0.0


def _patch(r: random.Random) -> tuple[int, int]:
    return r.choice(((2, 2), (2, 2), (1, 1), (2, 1), (1, 2), (4, 2), (3, 3)))


def sizes_of(operator: str, r: random.Random) -> dict:
    """The sizes that `cases.make` takes."""
    if operator == "batch_norm_activation":
        sides = [r.choice((1, 2, 3, 5, 8, 13)) for _ in range(2)]
        mean = r.choice((0.0, 0.0, 30.0)) if sides[0] * sides[1] >= 15 else 0.0
        shape = (r.choice((2, 3, 5)), _width(r), *sides)
        return dict(shape=shape, activation=r.choice((None, "silu", "silu")), mean=mean)
    if operator == "layer_norm":
        d = _width(r)
        return dict(shape=(*_rows(r), d), mean=_mean(r, d))
    if operator == "layer_norm_linear":
        d = _width(r)
        more = dict(bias=r.random() < 0.7, activation=r.choice((None, "silu")), mean=_mean(r, d))
        return dict(shape=(*_rows(r), d), n=_width(r), **more)
    if operator == "linear_residual":
        return dict(shape=(*_rows(r), _width(r)), n=_width(r), bias=r.random() < 0.7)
    if operator == "layer_norm_mlp":
        d = _width(r)
        return dict(shape=(*_rows(r), d), hidden=_width(r), mean=_mean(r, d))
    if operator == "patch_attention":
        patch = _patch(r)
        head_dim = r.choice((1, 2, 5, 8, 16, 17, 20, 24, 30, 36, 48, 60, 64, 65, 100))
        scale = r.choice((None, None, 0.3, 0.1, -0.2))
        return dict(shape=_map(r, patch, 6), heads=r.randint(1, 5), head_dim=head_dim, patch=patch, scale=scale)
    if operator == "inverted_residual":
        residual = r.random() < 0.4
        c, out = r.choice((1, 3, 8, 16, 17)), r.choice((1, 5, 8, 24))
        shape = (r.choice((1, 2)), r.randint(3, 9), r.randint(3, 9), c)
        stride = 1 if residual else r.choice((1, 2))
        more = dict(stride=stride, dilation=r.choice((1, 1, 2, 3)), residual=residual)
        return dict(shape=shape, hidden=r.choice((1, 8, 31, 32, 64)), out=c if residual else out, **more)
    patch, heads = _patch(r), r.choice((1, 2, 4))
    d = heads * r.choice((1, 4, 9, 16))
    if operator == "transformer_layer":
        more = dict(head_dim=r.choice((None, 8, 5)), hidden=r.choice((None, 33, 4 * d)), qkv_bias=r.random() < 0.7)
        return dict(shape=(*_map(r, patch, 3), d), heads=heads, patch=patch, **more)
    more = dict(
        layers=r.randint(1, 2), qkv_bias=r.random() < 0.7, final_norm=r.random() < 0.7, ratio=r.choice((1, 2, 4))
    )
    return dict(shape=(*_map(r, patch, 3), d), heads=heads, head_dim=r.choice((None, 8, 5)), patch=patch, **more)


def case_of(operator: str, number: int) -> tuple[dict, dict]:
    """The sizes and the keywords of `checks.check`."""
    r = random.Random(f"{operator} {number}")
    sizes = sizes_of(operator, r)
    dtype = r.choice(DTYPES)
    keywords = dict(dtype=dtype, path=r.choice(paths(operator)), layout=r.choice(LAYOUTS), seed=number)
    if operator == "batch_norm_activation" and r.random() < 0.5:
        keywords["layout"] = "channels_last"
    if dtype in ("bfloat16", "float16") and r.random() < 0.3:
        keywords["norm_dtype"] = "float32"
    if operator == "transformer_layer" and keywords["path"] != "reference" and r.random() < 0.5:
        names = ("projection", "mlp", "path1", "path2")
        sizes["dropout"] = {name: r.choice((0.0, 0.1, 0.5)) for name in names} | {"path_scale": r.random() < 0.7}
    if operator == "inverted_residual" and dtype in ("bfloat16", "float16"):
        keywords["gradients"] = False  # see test_inverted_residual
    return sizes, keywords


@pytest.mark.parametrize("operator", DIFFERENTIABLE + INFERENCE)
def test_random_cases(operator):
    for number in range(CASES):
        sizes, keywords = case_of(operator, number)
        try:
            check(operator, sizes, **keywords)
        except Exception as error:
            literal = "".join(f", {key}={value!r}" for key, value in keywords.items())
            case = f"check({operator!r}, {sizes!r}{literal})"
            raise AssertionError(f'PYTHONPATH=tests python -c "from support.checks import *; {case}"') from error
