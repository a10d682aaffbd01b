# SPDX-License-Identifier: Apache-2.0
"""``transformer`` in CUDA C++: its kernel's own source, executed on the CPU, against float64.

What only a GPU shows (rounding inside tensor cores, time) is not tested here. Where there is one, the operators' own
tests run on path ``cuda``.
"""

import functools

import pytest
import torch

from mvit_kernels.backends.cuda import packing, plans
from support.cases import call, convert, make, structured
from support.cuda import check_launch, run
from support.emulation import Driver, EmulationFault
from support.oracle import sequences
from support.tolerance import assert_close_as_pytorch

OP = "transformer"
DTYPES = (torch.bfloat16, torch.float16)
H100 = (132, 232_448)


@pytest.fixture(scope="module")
def driver():
    return Driver(OP)


def launched(driver, sizes, dtype, per_block=None, tiles=None, slot=None, tensors=None, seed=0):
    """The kernel's result for the case, planned as for an H100 or with the given sequences a block, tiles a warp and
    bytes copied at once (0: the least that it can be)."""
    made, settings = make(OP, sizes)
    tensors = convert(tensors or made, dtype)
    s = structured(OP, tensors)
    x, layers = s["x"], s["layers"]
    heads, patch = settings["num_heads"], settings["patch_size"]
    head_dim = layers[0].proj_weight.shape[1] // heads
    places = patch[0] * patch[1]
    tokens = x.shape[1] * x.shape[2] // places
    plan = plans.plan_transformer(x.shape[3], head_dim, tokens, x.shape[0] * places, *H100)
    assert not isinstance(plan, str), plan
    least = plans.Layout(x.shape[3], head_dim).least_slot
    slot = plan.slot if slot is None else slot or least
    plan = plans.TransformerPlan(tiles or plan.tiles, per_block or plan.sequences_of_a_block, slot)
    packed = packing.pack_transformer(layers, s["final_norm"], num_heads=heads, dtype=dtype)
    hidden, final_norm = layers[0].fc1_weight.shape[0], s["final_norm"] is not None
    return run(driver, x, packed, len(layers), head_dim, hidden, final_norm, patch, settings["eps"], plan, seed)


check = functools.partial(check_launch, OP, launched)


# ------------------------------------------------------------------------------------------------------------- values


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("d", plans.WIDTHS)
def test_small(driver, d, dtype):
    check(driver, dict(shape=(1, 4, 6, d), heads=4, patch=(2, 2)), dtype)  # N = 6, warps of 16 rows


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("d", plans.WIDTHS)
def test_kornia(driver, d, dtype):
    """Four heads of 8 whatever d is, no qkv bias, no final norm."""
    sizes = dict(shape=(1, 8, 10, d), heads=4, head_dim=8, qkv_bias=False, final_norm=False, patch=(2, 2), layers=1)
    check(driver, {**sizes, "ratio": 4 if d in (64, 120, 240) else 2}, dtype)


FULL = {64: (32, 32), 80: (16, 16), 96: (32, 32), 120: (32, 16), 144: (32, 32), 192: (32, 32), 240: (16, 16)}


@pytest.mark.parametrize("d", plans.WIDTHS)
def test_full_size(driver, d):
    """A map of the model at 256 pixels, and larger ones: N = 256, 64, 128."""
    check(driver, dict(shape=(1, *FULL[d], d), heads=4, patch=(2, 2), layers=1), torch.bfloat16)


@pytest.mark.parametrize(
    "sizes, per_block",
    [
        (dict(shape=(3, 4, 4, 96), patch=(2, 2)), 5),  # several sequences a block, the last block with two of five
        (dict(shape=(1, 16, 16, 64), patch=(2, 2)), 4),  # two warps a sequence
        (dict(shape=(1, 14, 14, 80), patch=(2, 2)), 3),  # N = 49, as stage 4 has at 224 pixels
        (dict(shape=(1, 6, 34, 64), patch=(2, 2)), 2),  # N = 51: two warps, keys end inside the second step
        (dict(shape=(2, 2, 2, 240), patch=(2, 2)), 8),  # N = 1
        (dict(shape=(1, 2, 17, 64), patch=(2, 1)), 1),  # N = 17
        (dict(shape=(1, 9, 4, 144), patch=(3, 2)), 2),  # patches that are not square: 6 places, N = 6
        (dict(shape=(1, 16, 16, 64), patch=(1, 1)), 1),  # the whole map is one sequence
        (dict(shape=(1, 16, 16, 192), patch=(2, 2)), 3),  # N = 64, hidden units by sixteen
        (dict(shape=(1, 4, 4, 64), patch=(2, 2), layers=4), 4),
        (dict(shape=(1, 4, 4, 120), patch=(2, 2), ratio=1, layers=3), 4),  # hidden: 120 of 128
    ],
    ids=str,
)
def test_shapes(driver, sizes, per_block):
    check(driver, dict(heads=4, layers=1) | sizes, torch.bfloat16, per_block=per_block)


@pytest.mark.parametrize("d", [80, 144, 240])
def test_what_is_copied_at_once_changes_no_bit(driver, d):
    """Several chunks of the MLP, all of key and value and of the out-projection, or one of each at a time."""
    sizes = dict(shape=(1, 4, 6, d), heads=4, patch=(2, 2))
    at_once, single = (launched(driver, sizes, torch.bfloat16, slot=slot) for slot in (None, 0))
    assert torch.equal(at_once, single)


@pytest.mark.parametrize("dtype", DTYPES)
def test_eps(driver, dtype):
    check(driver, dict(shape=(1, 4, 6, 120), heads=4, patch=(2, 2), eps=0.5), dtype)


def far_from_zero(tensors):
    tensors["x"] += 100


def uneven(tensors):
    """Each row has a different mean."""
    height, width = tensors["x"].shape[1:3]
    tensors["x"] += torch.arange(height * width).view(height, width, 1) % 7


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("d", [64, 120])
def test_large_mean(driver, d, dtype):
    """LayerNorm applied after the product loses no more to cancellation than the input's own rounding."""
    check(driver, dict(shape=(1, 4, 6, d), heads=4, patch=(2, 2), layers=1), dtype, far_from_zero)


@pytest.mark.parametrize("d", plans.WIDTHS)
def test_the_last_norm_of_equal_values_is_its_bias(driver, d):
    """For rows that the layer leaves as they are. (The norms before qkv and fc1 are applied after those products, whose
    rounding is that of the values and not of their spread.)"""
    sizes = dict(shape=(1, 4, 6, d), heads=4, patch=(2, 2), layers=1)
    tensors, _ = make(OP, sizes)
    for name in ("proj_weight", "proj_bias", "fc2_weight", "fc2_bias"):
        tensors[f"layers.0.{name}"] = torch.zeros_like(tensors[f"layers.0.{name}"])
    tensors["x"] = (12.3 * torch.arange(24).double()).reshape(1, 4, 6, 1).expand(1, 4, 6, d).contiguous()
    ours = launched(driver, sizes, torch.bfloat16, tensors=tensors)
    assert torch.equal(ours, tensors["final_norm.bias"].bfloat16().expand_as(ours))


SEVERAL_STEPS = dict(shape=(1, 16, 16, 80), heads=4, patch=(2, 2), layers=1)


def sharp_scores(tensors):
    """Scores that differ by much more than the slack of the softmax's reference."""
    tensors["layers.0.qkv_weight"][:160] *= 6


def low_scores(tensors):
    """Scores around -250: without a reference, all weights would be 0."""
    tensors["layers.0.qkv_bias"][:80] += 8
    tensors["layers.0.qkv_bias"][80:160] -= 8


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("change", [sharp_scores, low_scores])
def test_references_of_the_softmax(driver, change, dtype):
    check(driver, SEVERAL_STEPS, dtype, change)


# ---------------------------------------------------------------------------------------------------------- properties


def test_no_bank_conflicts(driver):
    before = driver.matrix_conflicts()
    for d in plans.WIDTHS:
        launched(driver, dict(shape=(1, 8, 8, d), heads=4, patch=(2, 2), layers=1), torch.bfloat16)
    assert driver.matrix_conflicts() == before == 0


def test_same_bits_in_any_order_of_threads(driver):
    sizes = dict(shape=(1, 12, 12, 96), heads=4, patch=(2, 2), layers=1)
    first = launched(driver, sizes, torch.bfloat16, per_block=2)
    for seed in range(1, 6):
        assert torch.equal(launched(driver, sizes, torch.bfloat16, per_block=2, seed=seed), first)


def test_the_cut_changes_no_bit(driver):
    sizes = dict(shape=(2, 8, 8, 64), heads=4, patch=(2, 2), layers=1)
    first = launched(driver, sizes, torch.float16, per_block=1)
    for per_block in (3, 8):
        assert torch.equal(launched(driver, sizes, torch.float16, per_block=per_block), first)


@pytest.mark.parametrize("value", [1.0, torch.nan])
def test_a_pixel_changes_its_own_sequence_only(driver, value):
    sizes = dict(shape=(2, 8, 6, 64), heads=4, patch=(2, 3), layers=1)
    tensors, _ = make(OP, sizes)
    before = launched(driver, sizes, torch.bfloat16, per_block=6)
    tensors["x"][1, 5, 4] += value
    after = launched(driver, sizes, torch.bfloat16, per_block=6, tensors=tensors)
    changed = (after != before).any(-1)
    expected = torch.zeros(2, 48, dtype=torch.bool)
    expected[1, next(tokens for tokens in sequences(8, 6, (2, 3)) if 5 * 6 + 4 in tokens)] = True
    assert torch.equal(changed, expected.reshape(2, 8, 6))
    assert torch.equal(after.isnan().any(-1), changed if value != value else torch.zeros_like(changed))


def test_permuted_tokens_permute_the_result(driver):
    sizes = dict(shape=(1, 8, 12, 80), heads=4, patch=(2, 2))
    tensors, settings = make(OP, sizes)
    order = torch.arange(96)
    for tokens in sequences(8, 12, (2, 2)):
        order[torch.tensor(tokens)] = torch.tensor(tokens).flip(0)  # its own inverse
    low = convert(tensors, torch.bfloat16)
    tensors["x"] = tensors["x"].flatten(1, 2)[:, order].reshape(tensors["x"].shape)
    ours = launched(driver, sizes, torch.bfloat16, tensors=tensors).flatten(1, 2)[:, order].reshape(1, 8, 12, 80)
    truth = call(OP, convert(low, torch.float64), settings, "oracle")
    assert_close_as_pytorch("permuted", ours, call(OP, low, settings, "usual"), truth)


# -------------------------------------------------------------------------------------------------------------- faults

# Where the ring advances.
WAITS = "    wait_copies<0>();\n    sync_threads();\n    const Shared ready"
SEVERAL = dict(shape=(1, 10, 14, 80), heads=4, patch=(2, 2), layers=2)  # N = 35: two warps, the second with three rows
TWO_CHUNKS = 2 * plans.Layout(80, 20).mlp_chunk  # of five, at once
FEW = dict(shape=(1, 2, 6, 80), heads=4, patch=(2, 2), layers=1)  # N = 3

ONE = ["MVIT_ONLY_ONE=launch_transformer<BFloat16, 80, 20, 2>"]

REPORTED = {
    "the ring's barrier": (WAITS, "    wait_copies<0>();\n    const Shared ready"),
    "the wait for copies": (WAITS, "    sync_threads();\n    const Shared ready"),
    "a wait that is one group short": (WAITS, WAITS.replace("0", "1")),
    "a slot that is still read": ("here = args.slot - here;", "here = 0;"),
    "the barrier behind keys and values": ("          sync_threads();  // keys and values are there\n", ""),
    "a chunk that is too short": ("i < bytes; i += threads * 16", "i < bytes - 16; i += threads * 16"),
    "a step too many": ("step < args.tokens; step += ROWS", "step < args.tokens + ROWS; step += ROWS"),
    "a chunk of the MLP too many": ("ahead = args.copies.mlp - 1;", "ahead = args.copies.mlp;"),
    "rows past the sequence": ("|| token >= args.tokens) return nullptr", ") return nullptr"),
    "the row seven further on": ("+ half * 8 + lane_index() / 4;", "+ half * 7 + lane_index() / 4;"),
}
WRONG = {
    "keys that only fill the tile": ("% 2 >= args.tokens)", "% 2 > args.tokens)", FEW, None),
    "the reference's first step": (
        "step == 0 || most > slack ? most",
        "most > slack ? most",
        SEVERAL_STEPS,
        low_scores,
    ),
    "sums that are not scaled": ("            sum[m][half] *= factor;\n", "", SEVERAL_STEPS, sharp_scores),
    "results that are not scaled": ("o[m][n][2 * half] *= factor, ", "", SEVERAL_STEPS, sharp_scores),
    "a column of the statistics": ("sum[m][half] += low + high; });", "sum[m][half] += low; });", SEVERAL, None),
    "a head's place": ("if (h == head)", "if (h == (head ^ 1))", SEVERAL, None),
    "the residual": ("unpack_low<T>(x.z) + right[0]", "right[0]", SEVERAL, None),
    "the mean of another row": ("- norm[m][half].x * v.x)", "- norm[m][0].x * v.x)", SEVERAL, uneven),
}


@pytest.mark.parametrize("name", REPORTED)
def test_planted_races_are_reported(name):
    faulty = Driver(OP, [REPORTED[name]], macros=ONE)
    for seed in range(3):
        with pytest.raises(EmulationFault):
            launched(faulty, SEVERAL, torch.bfloat16, per_block=2, slot=TWO_CHUNKS, seed=seed)


@pytest.mark.parametrize("name", WRONG)
def test_planted_errors_are_out_of_tolerance(name):
    text, other, sizes, change = WRONG[name]
    with pytest.raises(AssertionError, match="is over"):
        check(Driver(OP, [(text, other)], macros=ONE), sizes, torch.bfloat16, change, tiles=2)


@pytest.mark.parametrize("sizes, change", [(s, c) for *_, s, c in WRONG.values()], ids=list(WRONG))
def test_without_the_fault(sizes, change):
    check(Driver(OP, macros=ONE), sizes, torch.bfloat16, change, tiles=2)
