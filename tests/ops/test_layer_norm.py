# SPDX-License-Identifier: Apache-2.0
"""``layer_norm``: values and gradients on every path, and what it refuses."""

import torch

from support.operator_tests import OperatorTests

OP = "layer_norm"
SMALL = dict(shape=(2, 3, 5, 24))
CASES = [
    *(dict(shape=(2, 3, d)) for d in (64, 80, 96, 120, 144, 192, 240)),  # of xxs, xs and s
    *(dict(shape=(5, d)) for d in (1, 17, 33, 100, 300, 512)),
    dict(shape=(24,)),
    dict(shape=(300, 24)),
    dict(shape=(40, 64), mean=1e3),
    dict(shape=(5, 24), eps=0.1),
    dict(shape=(0, 4, 24)),
]
REFUSED = [
    (dict(x=None), TypeError, ("x is", "torch.Tensor is wanted")),
    (dict(x=lambda x: x.to(torch.uint8)), TypeError, ("x is torch.uint8",)),
    (dict(x=torch.tensor(1.0)), ValueError, ("x has no axes",)),
    (dict(norm_weight=lambda w: w[:23]), ValueError, ("norm_weight has shape (23,)", "(24,) is wanted")),
    (dict(norm_bias=lambda b: b.double()), TypeError, ("norm_bias is torch.float64", "x torch.float32")),
    (dict(norm_bias=lambda b: b.to("meta")), ValueError, ("norm_bias is on meta", ".to(device)")),
    (dict(eps=0.0), ValueError, ("eps is 0.0", "positive")),
    (dict(backend="fast"), ValueError, ("unknown backend 'fast'",)),
]


class TestLayerNorm(OperatorTests):
    operator, cases, small, refused = OP, CASES, SMALL, REFUSED
    tiny = [dict(shape=(2, 3, 4))]
    repeated = dict(shape=(50, 64))
