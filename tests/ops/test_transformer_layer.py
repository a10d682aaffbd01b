# SPDX-License-Identifier: Apache-2.0
"""``transformer_layer``: values and gradients on every path, with and without live dropout, and what it refuses."""

import pytest
import torch
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from mvit_kernels import LayerDropout, TransformerLayerWeights, dropout
from mvit_kernels.dropout import drop_path
from support.cases import call, convert, device_of, evaluate, make, paths
from support.checks import check, check_gradients, check_gradients_one_by_one, check_registration, check_same_bits
from support.operator_tests import OperatorTests
from support.oracle import branch_factor as oracle_factor
from support.oracle import philox as oracle_philox

OP = "transformer_layer"
PATHS = paths(OP)
SEEDED = [path for path in PATHS if path != "reference"]  # which lets PyTorch draw the masks
DRAWING = [path for path in PATHS if path != "raw"]  # which is given a seed
SMALL = dict(shape=(2, 4, 6, 24), heads=2, patch=(2, 2))
LIVE = {
    "projection": dict(projection=0.3),
    "mlp": dict(mlp=0.2),
    "hugging face": dict(projection=0.1, mlp=0.1),
    "path1": dict(path1=0.4),
    "path2": dict(path2=0.4),
    "unscaled path": dict(path1=0.4, path2=0.2, path_scale=False),
    "certain": dict(projection=1.0, path2=1.0),
    "all": dict(projection=0.2, mlp=0.25, path1=0.3, path2=0.4),
}
CASES = [
    SMALL,
    dict(shape=(1, 4, 4, 64), heads=4, patch=(2, 2)),
    dict(shape=(1, 2, 4, 144), heads=4, patch=(2, 2)),
    dict(shape=(1, 2, 2, 240), heads=4, patch=(2, 1)),
    dict(shape=(1, 4, 4, 64), heads=4, head_dim=8, hidden=256, patch=(2, 2), qkv_bias=False),  # Kornia's
    dict(shape=(1, 6, 4, 17), heads=1, hidden=33, patch=(3, 2)),
    dict(shape=(0, 4, 4, 24), heads=2, patch=(2, 2)),
]
REFUSED = [
    (dict(x=None), TypeError, ("x is", "torch.Tensor is wanted")),
    (dict(x=lambda x: x[0]), ValueError, ("x has shape (4, 6, 24)", "(B, H, W, d)")),
    (dict(x=lambda x: x[:, :3]), ValueError, ("3 × 6 tokens", "patches of 2 × 2")),
    (dict(layer=None), TypeError, ("layer is a NoneType", "TransformerLayerWeights is wanted")),
    (
        dict(layer=lambda w: w._replace(proj_weight=w.proj_weight[:20])),
        ValueError,
        ("layer: proj_weight has shape (20, 24)", "(24, 24) is wanted"),
    ),
    (dict(layer=lambda w: w._replace(fc2_bias=w.fc2_bias.double())), TypeError, ("fc2_bias is torch.float64",)),
    (dict(num_heads=5), ValueError, ("layer: qkv_weight has 72 rows", "15")),
    (dict(num_heads=0), ValueError, ("num_heads is 0",)),
    (dict(patch_size=(2, 0)), ValueError, ("patch_size is (2, 0)",)),
    (dict(eps=-1.0), ValueError, ("eps is -1.0", "positive")),
    (dict(dropout=0.1), TypeError, ("dropout is a float", "a LayerDropout, or None, is wanted")),
    (dict(dropout=LayerDropout(mlp=1.5)), ValueError, ("dropout.mlp is 1.5", "from 0 to 1")),
    (dict(dropout=LayerDropout(path1=None)), ValueError, ("dropout.path1 is None",)),
    (dict(seed=7), TypeError, ("seed is 7", "two int64 numbers are wanted")),
    (dict(seed=torch.zeros(2)), TypeError, ("seed is torch.float32 of shape (2,)",)),
    (dict(seed=torch.zeros(1, dtype=torch.int64)), TypeError, ("seed is torch.int64 of shape (1,)",)),
    (dict(seed=torch.zeros(2, dtype=torch.int64, device="meta")), ValueError, ("seed is on meta and x on cpu",)),
    (dict(backend=3), ValueError, ("unknown backend 3",)),
]


class TestTransformerLayer(OperatorTests):
    operator, cases, small, refused = OP, CASES, SMALL, REFUSED
    tiny = [dict(shape=(1, 2, 4, 4), heads=2, hidden=6, patch=(2, 2))]
    repeated = SMALL

    def test_finite_differences(self, sizes, path):
        super().test_finite_differences(sizes, path)
        if path in SEEDED:
            check_gradients(OP, {**sizes, "dropout": LIVE["all"]}, path)

    def test_registration(self, backend, layout):
        super().test_registration(backend, layout)
        check_registration(OP, {**SMALL, "dropout": LIVE["all"]}, layout, backend)

    def test_same_bits(self, path):
        super().test_same_bits(path)
        if path in SEEDED:
            check_same_bits(OP, {**SMALL, "dropout": LIVE["all"]}, path)


@pytest.mark.parametrize("path", SEEDED)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("live", LIVE.values(), ids=LIVE.keys())
def test_live_dropout(live, dtype, path):
    """The mask is the seed's, forward and backward; the oracle computes it one element at a time."""
    for sizes in (SMALL, CASES[5]):
        check(OP, {**sizes, "dropout": live}, dtype=dtype, path=path)


@pytest.mark.parametrize("path", SEEDED)
def test_gradients_one_by_one_with_dropout(path):
    check_gradients_one_by_one(OP, {**SMALL, "dropout": LIVE["all"]}, path)


# ------------------------------------------------------------------------------------------------------------ the mask


@pytest.mark.parametrize(
    "key, counter, numbers",
    [  # the known answers of Random123, Salmon et al.'s library
        (0, (0,) * 4, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        (2**64 - 1, (2**32 - 1,) * 4, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            0x299F31D0A4093822,
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox(key, counter, numbers):
    assert oracle_philox(key, counter) == numbers
    signed = key - 2**64 if key >= 2**63 else key
    ours = dropout.philox(torch.tensor(signed), tuple(torch.tensor(c) for c in counter))
    assert tuple(int(n) for n in ours) == numbers


def test_the_factor_is_the_oracle_s():
    seed = torch.tensor([2**62 + 12345, 2**61 + 678910])
    for branch in (0, 1):
        for live in ((0.3, 0.0), (0.0, 0.4), (0.3, 0.4), (1.0, 0.4), (0.3, 1.0)):
            arguments = (seed, branch, (2, 4, 6, 10), *live, (2, 3), branch == 0)
            torch.testing.assert_close(dropout.branch_factor(*arguments), oracle_factor(*arguments), rtol=1e-15, atol=0)


def masks(path, count=1, shape=(2, 16, 32, 24), seed=None, **live):
    """The masks of one branch, whose values are made 1 everywhere and added to rows of 0."""
    place = "proj" if live.keys() & {"projection", "path1"} else "fc2"
    tensors, settings = make(OP, dict(shape=shape, heads=2, patch=(2, 2)))
    tensors = convert(tensors, torch.float32)
    for name in ("proj", "fc2"):
        tensors[f"{name}_weight"].zero_()
        tensors[f"{name}_bias"].fill_(1.0 if name == place else 0.0)
    tensors["x"].zero_()
    settings |= {"dropout": LayerDropout(**live), "seed": seed}
    return torch.stack([call(OP, tensors, settings, path) for _ in range(count)])


@pytest.mark.parametrize("path", DRAWING)
@pytest.mark.parametrize("field", ["projection", "mlp"])
def test_statistics(field, path):
    """The fraction dropped and the scale of what is kept, as in PyTorch's dropout; no pattern along any axis, and both
    neighbours and calls are independent of each other."""
    torch.manual_seed(0)
    mask = masks(path, 2, **{field: 0.3})
    assert mask.unique().tolist() == pytest.approx([0.0, 1 / 0.7])
    dropped = (mask == 0).double()
    deviation = (0.3 * 0.7 / mask.numel()) ** 0.5  # of the mean of that many draws
    assert abs(dropped.mean() - 0.3) < 5 * deviation
    for axis in range(mask.dim()):  # every call, image, row, column and channel for itself
        means = dropped.mean([a for a in range(mask.dim()) if a != axis])
        assert (means - 0.3).abs().max() < 5 * deviation * mask.shape[axis] ** 0.5
        both = (dropped.narrow(axis, 1, mask.shape[axis] - 1) * dropped.narrow(axis, 0, mask.shape[axis] - 1)).mean()
        share = (mask.shape[axis] - 1) / mask.shape[axis]
        assert abs(both - 0.09) < 5 * (0.09 * 0.91 / (mask.numel() * share)) ** 0.5 * 3**0.5  # neighbours overlap


@pytest.mark.parametrize("path", DRAWING)
@pytest.mark.parametrize("field", ["path1", "path2"])
def test_drop_path_decides_once_a_sequence(field, path):
    torch.manual_seed(0)
    mask = masks(path, shape=(128, 4, 4, 8), **{field: 0.25})[0]
    assert mask.unique().tolist() == pytest.approx([0.0, 4 / 3])
    groups = mask.unflatten(1, (2, 2)).unflatten(3, (2, 2)).permute(0, 2, 4, 1, 3, 5).flatten(3)  # image, place, token
    assert torch.equal(groups, groups[..., :1].expand_as(groups))
    decisions = (groups[..., 0] == 0).double()
    assert abs(decisions.mean() - 0.25) < 5 * (0.25 * 0.75 / decisions.numel()) ** 0.5
    for axis in range(3):
        assert not torch.equal(decisions, decisions.narrow(axis, 0, 1).expand_as(decisions))


@pytest.mark.parametrize("path", DRAWING)
def test_pytorch_s_seed_governs(path):
    def draw(seed):
        torch.manual_seed(seed)
        return masks(path, 2, shape=(1, 4, 4, 24), projection=0.5)

    first = draw(1)
    assert torch.equal(first, draw(1)) and not torch.equal(first, draw(2)) and not torch.equal(first[0], first[1])


@pytest.mark.parametrize("path", SEEDED)
def test_the_seed_given_is_the_seed_taken(path):
    state, seed = torch.random.get_rng_state(), torch.tensor([1, 2])
    first, second = masks(path, 2, shape=(1, 4, 4, 24), seed=seed, mlp=0.5)
    assert torch.equal(first, second)
    for other in ([1, 3], [0, 2], [1, 2 + 2**40], [1 + 2**40, 2]):  # all 126 bits count
        assert not torch.equal(first, masks(path, shape=(1, 4, 4, 24), seed=torch.tensor(other), mlp=0.5)[0])
    assert torch.equal(torch.random.get_rng_state(), state), "a random number was drawn"


@pytest.mark.parametrize("path", SEEDED)
def test_branches_are_dropped_independently(path):
    seed = torch.tensor([1, 2])
    first, second = (masks(path, shape=(1, 8, 8, 24), seed=seed, **{field: 0.5})[0] for field in ("projection", "mlp"))
    assert 0.4 < (first == second).double().mean() < 0.6


@pytest.mark.parametrize("path", DRAWING)
def test_gradient_checkpointing_drops_the_same_again(path):
    tensors, settings = make(OP, SMALL)
    tensors = convert(tensors, torch.float32, device=device_of(path))
    settings |= {"dropout": LayerDropout(projection=0.3, mlp=0.3, path1=0.2, path2=0.2), "seed": None}

    def layer(*values):
        return call(OP, dict(zip(tensors, values, strict=True)), settings, path)

    def run(function):
        torch.manual_seed(3)
        return evaluate(lambda t: function(*t.values()), tensors, True)

    plain, again = run(layer), run(lambda *values: checkpoint(layer, *values, use_reentrant=False))
    assert all(torch.equal(value, again[name]) for name, value in plain.items())


def test_the_reference_draws_as_pytorch_does():
    """A plain layer with PyTorch's own dropout makes the same draws in the same order."""
    tensors, settings = make(OP, SMALL)
    live = LayerDropout(0.1, 0.2, 0.15, 0.25, 0.3, 0.4)
    torch.manual_seed(5)
    out = call(OP, tensors, {**settings, "dropout": live}, "reference")
    w = TransformerLayerWeights(*list(tensors.values())[1:])
    torch.manual_seed(5)
    x, d = tensors["x"], (24,)
    qkv = F.linear(F.layer_norm(x, d, w.norm1_weight, w.norm1_bias, 1e-5), w.qkv_weight, w.qkv_bias)
    sequences = qkv.unflatten(1, (2, 2)).unflatten(3, (3, 2)).permute(0, 2, 4, 1, 3, 5).flatten(0, 2).flatten(1, 2)
    q, k, v = sequences.unflatten(-1, (3, 2, 12)).permute(2, 0, 3, 1, 4)
    attended = F.scaled_dot_product_attention(q, k, v, dropout_p=0.1).transpose(1, 2).flatten(2)
    attended = attended.unflatten(0, (2, 2, 2)).unflatten(3, (2, 3)).permute(0, 3, 1, 4, 2, 5).reshape(x.shape)
    branch = F.dropout(F.linear(attended, w.proj_weight, w.proj_bias), 0.2)
    x = x + drop_path(branch, 0.3, (2, 2))
    hidden = F.silu(F.linear(F.layer_norm(x, d, w.norm2_weight, w.norm2_bias, 1e-5), w.fc1_weight, w.fc1_bias))
    branch = F.dropout(F.linear(F.dropout(hidden, 0.15), w.fc2_weight, w.fc2_bias), 0.25)
    torch.testing.assert_close(out, x + drop_path(branch, 0.4, (2, 2)), rtol=1e-12, atol=1e-12)
