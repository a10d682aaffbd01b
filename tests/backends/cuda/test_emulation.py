# SPDX-License-Identifier: Apache-2.0
"""The emulation that runs CUDA kernels on the CPU: right kernels pass and give the right numbers, and each fault is
reported at every seed."""

import math
import re
from fractions import Fraction

import pytest
import torch

from support.emulation import EMULATION, KERNELS, Driver, EmulationFault

SEEDS = range(20)


@pytest.fixture(scope="module")
def examples():
    return Driver("examples")


def words(*shape):
    return torch.full(shape, -1, dtype=torch.int32)


def reported(says, function, *arguments, **named):
    """The emulation reports `function` at every seed, in these words."""
    for seed in SEEDS:
        with pytest.raises(EmulationFault, match=says):
            function(seed, *arguments, **named)


# ---------------------------------------------------------------------------------------------------------------- order


def test_a_barrier_orders(examples):
    for seed in SEEDS:
        out = words(64)
        examples.neighbour(seed, out, 0, writes=[out])
        assert out.tolist() == [*range(1, 64), 0]


def test_a_missing_barrier(examples):
    out = words(64)
    reported("no barrier|nobody wrote it", examples.neighbour, out, 1, writes=[out])
    reported("no barrier after it was (read|written) by", examples.neighbour, out, 2, writes=[out])


def test_a_barrier_of_the_warp_orders_its_lanes(examples):
    for seed in SEEDS:
        out = words(64)
        examples.neighbour_in_warp(seed, out, 0, writes=[out])
        assert out.tolist() == [*range(1, 32), 0, *range(33, 64), 32]


@pytest.mark.parametrize("fault", [1, 2])
def test_other_collectives_do_not_order_memory(examples, fault):
    out = words(64)
    reported("no barrier|nobody wrote it", examples.neighbour_in_warp, out, fault, writes=[out])


@pytest.mark.parametrize("chunks", [1, 2, 7])
def test_a_ring_of_copies(examples, chunks):
    data = torch.randint(0, 1 << 20, (chunks, 64), dtype=torch.int32)
    for seed in SEEDS:
        out = words(64)
        examples.ring(seed, data, out, chunks, 0, writes=[out])
        assert torch.equal(out, data.sum(0, dtype=torch.int32).flip(0))


@pytest.mark.parametrize(
    "fault, says",
    [
        (1, "in flight"),
        (2, "in flight"),
        (3, "in flight|nobody wrote it|with no barrier after it was written"),
        (4, "with no barrier after it was read|in flight"),
        (5, "in flight"),
    ],
)
def test_a_ring_that_is_wrong(examples, fault, says):
    data, out = words(4, 64), words(64)
    reported(says, examples.ring, data, out, 4, fault, writes=[out])


def test_collectives_of_a_warp(examples):
    for seed in SEEDS:
        out = words(64)
        examples.sum(seed, out, 0, writes=[out])
        assert out.tolist() == [sum(range(32))] * 32 + [sum(range(32, 64))] * 32


@pytest.mark.parametrize(
    "fault, says",
    [
        (1, r"deadlock: 32 threads wait at shuffle of .*; 32 threads wait at sync_threads|divergence"),
        (
            2,
            r"divergence: lanes of warp \d are at shuffle of \S+:\d+, and lane \d+ at shuffle of examples.cpp",
        ),
        (3, r"deadlock: 1 threads have ended; 63 threads wait at sync_threads of examples.cpp:\d+"),
    ],
)
def test_divergence(examples, fault, says):
    out = words(64)
    reported(says, examples.sum, out, fault, writes=[out])


# --------------------------------------------------------------------------------------------------------------- memory


@pytest.mark.parametrize(
    "fault, says",
    [
        (0, None),
        (1, "4 bytes at shared byte 256, by thread 63 .* are not inside the block's 256"),
        (2, "8 bytes at shared byte .* are not aligned"),
        (3, "shared byte 256 is read by thread 7 .* and nobody wrote it"),
        (4, "a read of 4 global bytes at .*, by thread 63 .* is outside of every buffer"),
        (5, "a read of 8 global bytes at .* is not aligned"),
        (6, "a write of 4 global bytes .* is in a buffer that is only read"),
        (7, "byte .* of an output is written by .* with no barrier after it was written by"),
        (8, "byte .* of an output is (read|written) by .* with no barrier after"),
    ],
)
def test_memory(examples, fault, says):
    data = torch.arange(65, dtype=torch.int32)[:64]
    out = words(2, 64)
    if says:
        return reported(says, examples.touch, data, out, fault, writes=[out])
    for seed in SEEDS:
        examples.touch(seed, data, out, fault, writes=[out])
        assert torch.equal(out, (2 * data).expand(2, 64))


def test_a_report_names_the_block(examples):
    data, out = words(64), words(2, 64)
    with pytest.raises(EmulationFault, match=r"examples.touch, seed 5: block \(\d, 0\): "):
        examples.touch(5, data, out, 1, writes=[out])


# ----------------------------------------------------------------------------------------------------------- arithmetic


@pytest.mark.parametrize("stride, conflicts", [(16, 0), (80, 0), (144, 0), (32, 4), (128, 28)])
@pytest.mark.parametrize("transposed", [False, True])
def test_matrices(examples, transposed, stride, conflicts):
    data = torch.arange(8 * 8 * 8, dtype=torch.int16).view(8, 8, 8)
    out = words(8, 32)
    before = examples.matrix_conflicts()
    examples.matrices(0, data, out, transposed, stride, 0, writes=[out])
    assert examples.matrix_conflicts() - before == 8 * conflicts
    wanted = data.mT if transposed else data
    assert torch.equal(out.view(torch.int16).view(8, 8, 8), wanted)  # lane l has (l / 4, 2 · (l % 4)) and the next
    reported("no barrier|nobody wrote it", examples.matrices, data, out, transposed, stride, 1, writes=[out])


@pytest.mark.parametrize("k", [8, 16])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_product(examples, dtype, k):
    generator = torch.Generator().manual_seed(k)
    a, b = torch.randn(16, k, generator=generator).to(dtype), torch.randn(k, 8, generator=generator).to(dtype)
    d = torch.full((16, 8), torch.nan)
    for seed in SEEDS:
        examples.product(seed, a, b, d, k, dtype == torch.float16, writes=[d])
        torch.testing.assert_close(d.double(), 1 + a.double() @ b.double(), rtol=0, atol=k * 2**-22)


def special_floats():
    """Every half and bfloat16, their neighbours and midpoints, and random bits, including NaN and infinities."""
    every = torch.arange(1 << 16, dtype=torch.int32)
    bfloats = (every << 16).view(torch.float32)
    halves = every.to(torch.int16).view(torch.float16).float()
    bits = torch.cat([bfloats, halves]).view(torch.int32)
    middles = (
        bits.long()[:, None] + torch.tensor([0, 1, -1, 0x8000, 0x7FFF, 0x8001, 0x1000, 0x0FFF, 0x1001])
    ).flatten()
    noise = torch.randint(-(1 << 31), 1 << 31, (1 << 18,), generator=torch.Generator().manual_seed(0))
    wide = torch.cat([middles, noise]) & 0xFFFFFFFF
    return torch.where(wide < 1 << 31, wide, wide - (1 << 32)).to(torch.int32).view(torch.float32)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rounding(examples, dtype):
    values = special_floats()
    out = torch.empty(values.shape, dtype=dtype)
    examples.on_host("rounded", values, out, values.numel(), dtype == torch.float16)
    wanted = values.to(dtype)
    assert torch.equal(out.isnan(), wanted.isnan())
    assert torch.equal(out.view(torch.int16)[~out.isnan()], wanted.view(torch.int16)[~out.isnan()])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_widening(examples, dtype):
    values = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(dtype)
    out = torch.empty(values.shape)
    examples.on_host("widened", values, out, values.numel(), dtype == torch.float16)
    wanted = values.float()
    assert torch.equal(out.isnan(), wanted.isnan())
    assert torch.equal(out.view(torch.int32)[~out.isnan()], wanted.view(torch.int32)[~out.isnan()])


@pytest.mark.parametrize(
    "index, exact, low, high, relative, absolute",
    [
        (0, torch.exp2, -120.0, 120.0, 2**-21, 0),
        (1, torch.log2, 1e-30, 1e30, 2**-21, 2**-21),
        (2, torch.reciprocal, 1e-30, 1e30, 2**-21, 0),
        (3, torch.rsqrt, 1e-30, 1e30, 2**-21, 0),
        (4, torch.tanh, -10.0, 10.0, 2**-10, 0),
    ],
)
def test_special_functions(examples, index, exact, low, high, relative, absolute):
    if low > 0:
        x = torch.logspace(torch.tensor(low).log10().item(), torch.tensor(high).log10().item(), 1 << 14)
    else:
        x = torch.linspace(low, high, 1 << 14)
    out = torch.empty_like(x)
    examples.on_host("approximated", x, out, x.numel(), index)
    error = (out.double() - exact(x.double())).abs()
    allowed = relative * exact(x.double()).abs() + absolute
    assert (error <= allowed).all()
    assert error.max() > 0  # it is no more exact than the hardware
    again = torch.empty_like(x)
    examples.on_host("approximated", x, again, x.numel(), index)
    assert torch.equal(out, again)


def test_special_functions_at_the_ends(examples):
    inf = torch.inf
    cases = {
        0: [(-inf, 0.0), (inf, inf), (0.0, 1.0), (1e-40, 1.0), (-149.0, 0.0)],
        1: [(0.0, -inf), (inf, inf)],
        2: [(inf, 0.0), (0.0, inf), (1e-40, inf)],
        3: [(inf, 0.0), (0.0, inf)],
        4: [(0.0, 0.0), (inf, 1.0), (-inf, -1.0)],
    }
    for index, pairs in cases.items():
        x, wanted = torch.tensor(pairs).unbind(-1)
        x, out = x.contiguous(), torch.empty(len(pairs))
        examples.on_host("approximated", x, out, len(pairs), index)
        torch.testing.assert_close(out, wanted, rtol=2**-10, atol=0)
        assert torch.equal(out == 0, wanted == 0)
        bad, out = torch.tensor([torch.nan]), torch.zeros(1)
        examples.on_host("approximated", bad, out, 1, index)
        assert out.isnan().all()


# ----------------------------------------------------------------------------------------------------- planting faults


def test_a_fault_is_planted_at_one_place():
    with pytest.raises(AssertionError, match="is at 0 places"):
        Driver("examples", [("simt.h", "text that no header has", "")])
    with pytest.raises(AssertionError, match="a fault is planted at one"):
        Driver("examples", [("simt.h", "MVIT_DEVICE", "")])


def test_the_report_says_where(examples):
    out = words(64)
    with pytest.raises(EmulationFault) as found:
        examples.neighbour(0, out, 2, writes=[out])
    lines = [int(number) for number in re.findall(r"examples\.cpp:(\d+)", str(found.value))]
    source = (EMULATION / "examples.cpp").read_text().splitlines()
    assert len(lines) == 2 and all("_shared<uint32_t>" in source[line - 1] for line in lines)


def test_kernels_ask_for_nothing_but_what_simt_h_names():
    """Otherwise what runs here would not be those kernels. A test of names: PTX, intrinsics, built-in variables and
    attributes."""
    foreign = re.compile(r"\basm\b|\b__\w+|\b(thread|block|grid)(Idx|Dim)\b|<<<|\bcuda[A-Z_]")
    checked = 0
    for path in sorted([*KERNELS.glob("*.h"), *KERNELS.glob("*.cu")]):
        if path.name in ("simt.h", "launch.h", "tensors.h", "row_fronts.h"):
            continue  # the names themselves, and the host's code
        code = re.sub(r"//.*", "", path.read_text())
        assert not foreign.search(code), f"{path.name}: {foreign.search(code)[0]}"
        checked += "MVIT_DEVICE" in code
    assert checked > 5


def test_products_and_sums_of_pairs_are_rounded_once(examples):
    """Random bits, NaN and infinities among them, and sums near the midpoint of two float16: against fractions."""
    generator = torch.Generator().manual_seed(0)
    a, b, c = torch.randint(-(1 << 15), 1 << 15, (3, 1 << 13), generator=generator).to(torch.int16).view(torch.float16)
    a[::4] = 1 + a[::4].abs().clamp(max=1) * 2**-3  # of products with 22 bits the sums are seldom halves
    b[::4] = b[::4].sign() * (1 + 2**-10)
    c[::4] = c[::4].sign() * torch.tensor(2.0) ** -(12 + torch.arange(1 << 11) % 12)
    out = torch.empty_like(a)
    examples.on_host("halves", a, b, c, out, len(a) // 2)
    finite = (a.isfinite() & b.isfinite() & c.isfinite()).tolist()
    for i in (i for i, number in enumerate(finite) if number):
        exact = Fraction(a[i].item()) * Fraction(b[i].item()) + Fraction(c[i].item())
        assert out[i].item() == as_half(exact), (a[i], b[i], c[i])
    wanted = a.double() * b.double() + c.double()
    rest = ~torch.tensor(finite)
    assert torch.equal(out[rest].isnan(), wanted[rest].isnan())
    assert torch.equal(out[rest].nan_to_num(0), wanted[rest].half().nan_to_num(0))


def as_half(value):
    """The float16 next to a fraction, of two as near the even one."""
    size = abs(value)
    unit = Fraction(2) ** max(-24, math.floor(math.log2(size)) - 10) if size else Fraction(1)
    unit = unit * 2 if size / unit >= 2048 else unit / 2 if unit > Fraction(2) ** -24 and size / unit < 1024 else unit
    nearest = round(size / unit) * unit  # to even
    return math.copysign(float("inf") if nearest > 65504 else float(nearest), value)


def test_tanh_of_pairs(examples):
    x = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(torch.float16)
    out = torch.empty_like(x)
    examples.on_host("halves", x, None, None, out, len(x) // 2)
    error = (out.double() - x.double().tanh()).abs()[~x.isnan()]
    assert 2**-12 < error.max() <= 2**-10.987 and out[x.isnan()].isnan().all()
    assert (out[~x.isnan()].abs() <= 1).all()
