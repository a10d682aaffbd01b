# SPDX-License-Identifier: Apache-2.0
"""``transformer``: the whole stack's values on every path (gradients by the reference), and what it refuses."""

import pytest
import torch

from mvit_kernels import TransformerLayerWeights
from mvit_kernels.backends.contract import REGISTRY
from support.cases import call, convert, device_of, evaluate, make, paths, plain_dtype
from support.checks import check, check_autocast, check_registration
from support.operator_tests import OperatorTests
from support.oracle import sequences
from support.tolerance import assert_close_as_pytorch

OP = "transformer"
PATHS = paths(OP)
SMALL = dict(shape=(2, 4, 6, 24), heads=2, patch=(2, 2))


def served(path, sizes=SMALL):
    """The sizes with a width and heads that the path has kernels for: CUDA only has MobileViT's."""
    return {**sizes, "shape": (*sizes["shape"][:3], 64), "heads": 4} if path == "cuda" else sizes


CASES = [
    *(
        dict(shape=(1, 4, 4, d), heads=4, patch=(2, 2), layers=layers)
        for d, layers in ((64, 2), (80, 4), (96, 3), (144, 2), (240, 3))
    ),
    *(  # Kornia: 4 heads of 8 whatever d is, no qkv bias, no final norm
        dict(shape=(1, 4, 6, d), heads=4, head_dim=8, ratio=ratio, qkv_bias=False, final_norm=False, patch=(2, 2))
        for d, ratio in ((64, 2), (80, 4))
    ),
    *(dict(shape=(2, 8, 6, 24), heads=3, patch=patch) for patch in ((2, 1), (1, 2), (4, 2), (1, 1), (2, 3))),
    dict(shape=(1, 4, 4, 17), heads=1, patch=(2, 2)),
    dict(shape=(1, 4, 4, 33), heads=3, patch=(2, 2), final_norm=False),
    dict(shape=(1, 2, 4, 100), heads=5, patch=(2, 2), ratio=1, layers=1),
    dict(shape=(2, 2, 2, 24), heads=8, patch=(2, 2)),  # N = 1
    dict(shape=(0, 4, 6, 24), heads=2, patch=(2, 2)),
]


def _replaced(**fields):
    """The layers, with fields of the last one replaced (by a value, or by a function of the right one)."""

    def replace(layers):
        last = layers[-1]
        values = {name: value(getattr(last, name)) if callable(value) else value for name, value in fields.items()}
        return [*layers[:-1], last._replace(**values)]

    return replace


REFUSED = [
    (dict(x=None), TypeError, ("x is", "torch.Tensor is wanted")),
    (dict(x=lambda x: x[0]), ValueError, ("x has shape (4, 6, 24)", "4 axes (B, H, W, d)")),
    (dict(x=lambda x: x.int()), TypeError, ("x is torch.int32",)),
    (dict(x=lambda x: x[:, :3]), ValueError, ("x is a map of 3 × 6", "patches of 2 × 2")),
    (dict(layers=[]), ValueError, ("layers is empty",)),
    (dict(layers=lambda layers: [tuple(layers[0])]), TypeError, ("layers[0] is a tuple", "TransformerLayerWeights")),
    (dict(layers=lambda layers: [None]), TypeError, ("layers[0] is a NoneType", "TransformerLayerWeights")),
    (dict(num_heads=5), ValueError, ("layers[0]", "qkv_weight has 72 rows", "3 · num_heads = 15")),
    (dict(num_heads=-2), ValueError, ("num_heads is -2",)),
    (dict(patch_size=(2,)), ValueError, ("patch_size is (2,)", "(height, width)")),
    (dict(eps=0), ValueError, ("eps is 0", "positive")),
    *(
        (dict(layers=_replaced(**{name: None})), TypeError, ("layers[1]", f"{name} is", "torch.Tensor is wanted"))
        for name in TransformerLayerWeights._fields
        if name != "qkv_bias"
    ),
    *(
        (dict(layers=_replaced(**{name: torch.ones(25)})), ValueError, ("layers[1]", f"{name} has shape (25,)"))
        for name in TransformerLayerWeights._fields
    ),
    (dict(layers=_replaced(qkv_weight=torch.tensor(1.0))), ValueError, ("layers[1]", "qkv_weight has shape ()")),
    (dict(layers=_replaced(qkv_weight=lambda w: w[:, 1:])), ValueError, ("layers[1]", "qkv_weight has shape (72, 23)")),
    (dict(layers=_replaced(proj_weight=lambda w: w[:, 1:])), ValueError, ("layers[1]", "(24, 24) is wanted")),
    (dict(layers=_replaced(fc2_weight=lambda w: w.t())), ValueError, ("layers[1]", "(24, 48) is wanted")),
    (dict(layers=_replaced(fc1_weight=lambda w: w.half())), TypeError, ("layers[1]", "fc1_weight is torch.float16")),
    (dict(layers=_replaced(fc1_bias=lambda w: w.to("meta"))), ValueError, ("layers[1]", "fc1_bias is on meta")),
    (dict(final_norm=torch.ones(24)), TypeError, ("final_norm is a Tensor", "pair (weight, bias)")),
    (dict(final_norm=(None, None)), TypeError, ("final_norm_weight is", "torch.Tensor is wanted")),
    (dict(final_norm=(torch.ones(23), torch.ones(24))), ValueError, ("final_norm weight has shape (23,)",)),
    (dict(final_norm=(torch.ones(24), torch.ones(24).double())), TypeError, ("final_norm_bias is torch.float64",)),
    (dict(backend="fast"), ValueError, ("unknown backend 'fast'",)),
]


class TestTransformer(OperatorTests):
    operator, cases, small, refused = OP, CASES, SMALL, REFUSED
    tiny = [dict(shape=(1, 2, 4, 2), heads=1, patch=(2, 2), layers=1)]
    repeated = dict(shape=(1, 8, 8, 64), heads=4, patch=(2, 2))
    test_graph = None  # kernels have no gradient

    def test_autocast(self, path):
        if path not in REGISTRY or not REGISTRY[path].packs_weights:
            check_autocast(OP, served(path), path)
            return
        # It folds float32 weights and rounds once; cast by hand they were rounded before: other bits, no larger error.
        tensors, settings = make(OP, served(path))
        single = convert(tensors, torch.float32, device=device_of(path))
        with torch.no_grad(), torch.autocast(device_of(path), torch.bfloat16):
            ours = call(OP, single, settings, path)
        truth = call(OP, convert(single, torch.float64), settings, "oracle")
        assert_close_as_pytorch("autocast", ours, call(OP, convert(single, torch.bfloat16), settings, "usual"), truth)

    def test_registration(self, backend, layout):
        sizes = dict(shape=(2, 4, 6, 24), heads=2, patch=(2, 2), layers=1, qkv_bias=layout == "permuted")
        check_registration(OP, served(backend, sizes), layout, backend)


@pytest.mark.parametrize("path", PATHS)
def test_eps_of_every_norm(path):
    check(OP, {**SMALL, "eps": 0.5}, path=path)


@pytest.mark.parametrize("path", PATHS)
def test_a_pixel_changes_its_own_sequence_only(path):
    tensors, settings = make(OP, served(path, dict(shape=(2, 8, 6, 24), heads=2, patch=(2, 3))))
    tensors = convert(tensors, plain_dtype(path))
    before = call(OP, tensors, settings, path)
    tensors["x"][1, 5, 4] += 1
    changed = (call(OP, tensors, settings, path) != before).any(-1)
    expected = torch.zeros(2, 48, dtype=torch.bool)
    expected[1, next(tokens for tokens in sequences(8, 6, (2, 3)) if 5 * 6 + 4 in tokens)] = True
    assert torch.equal(changed, expected.reshape(2, 8, 6))


@pytest.mark.parametrize("path", PATHS)
def test_permuted_tokens_permute_the_result(path):
    tensors, settings = make(OP, served(path, dict(shape=(1, 4, 6, 24), heads=2, patch=(2, 2))))
    order = torch.arange(24)
    for tokens in sequences(4, 6, (2, 2)):
        order[torch.tensor(tokens)] = torch.tensor(tokens).flip(0)  # its own inverse
    single = convert(tensors, plain_dtype(path))

    def shuffled(t):
        x = t["x"].flatten(1, 2)[:, order].reshape(t["x"].shape)
        return call(OP, {**t, "x": x}, settings, path).flatten(1, 2)[:, order].reshape(t["x"].shape)

    ours = evaluate(shuffled, single, False)["out"]
    truth = call(OP, convert(single, torch.float64), settings, "oracle")
    assert_close_as_pytorch("permuted", ours, call(OP, single, settings, "usual"), truth)


@pytest.mark.parametrize("path", PATHS)
def test_nan_stays_in_its_sequence(path):
    tensors, settings = make(OP, served(path))
    tensors = convert(tensors, plain_dtype(path))
    tensors["x"][0, 1, 3, 5] = torch.nan
    found = call(OP, tensors, settings, path).isnan().all(-1)
    expected = torch.zeros(2, 24, dtype=torch.bool)
    expected[0, sequences(4, 6, (2, 2))[3]] = True
    assert torch.equal(found, expected.reshape(2, 4, 6))


def test_autocast_in_a_bfloat16_model_without_a_last_norm():
    check_autocast(OP, {**SMALL, "final_norm": False, "qkv_bias": False})
