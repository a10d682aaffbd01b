# SPDX-License-Identifier: Apache-2.0
"""What the binding of ``transformer`` in CUDA C++ checks, and the map that it is given to write, by emulation."""

import pytest
import torch

from backends.cuda.test_backend import packable
from mvit_kernels.backends.cuda import packing
from support.cuda import serving_cpu_tensors


@pytest.fixture
def emulated(monkeypatch):
    with serving_cpu_tensors(monkeypatch):
        yield


PACKED = dict(version=packing.VERSION, layers=2, head_dim=16, hidden=128, tiles=1, sequences=1, slot=8448)


@pytest.mark.parametrize(
    "change, says",
    [
        (dict(version=0), "packed by version 0 of the order, and the library reads version 1"),
        (dict(layers=3), "not those of 3 layers with 128 hidden units"),
        (dict(hidden=160), "not those of 2 layers with 160 hidden units"),
        (dict(head_dim=12), "no kernel for rows of 64, heads of 12 and warps of 16 rows"),
        (dict(tiles=3), "no kernel for rows of 64, heads of 16 and warps of 48 rows"),
        (dict(sequences=9), "9 sequences of 6 tokens are no block"),
        (dict(sequences=0), "0 sequences of 6 tokens are no block"),
        (dict(sequences=2**32 + 1), "4294967297 sequences of 6 tokens are no block"),
        (dict(sequences=2**62), "sequences of 6 tokens are no block"),
        (dict(layers=2**62), "not those of 4611686018427387904 layers"),
        (dict(hidden=2**63 - 1), "not those of 2 layers with 9223372036854775807 hidden units"),
        (dict(tiles=2**62), "no kernel for rows of 64"),
        (dict(slot=8447), "slots of 8447 bytes; multiples of 128 from 8448 on"),
        (dict(slot=8320), "slots of 8320 bytes; multiples of 128 from 8448 on"),
        (dict(slot=2**40), "slots of 1099511627776 bytes"),
        (dict(x=torch.zeros(1, 4, 6, 64)), "take float16 and bfloat16"),
        (dict(x=torch.zeros(4, 6, 64).bfloat16()), "not of 3 axes"),
        (dict(x=torch.zeros(1, 3, 6, 64).bfloat16()), "a map of 3 x 6 does not divide"),
        (dict(packed=torch.zeros(8)), "not those of 2 layers"),
        (dict(out=torch.zeros(1, 4, 6, 32).bfloat16()), "out must be .* for this x"),
        (dict(out=torch.zeros(1, 4, 6, 66).bfloat16()[..., :64]), "do not begin at a multiple of 16 bytes"),
    ],
    ids=str,
)
def test_the_binding_checks_again(emulated, change, says):
    x, out = (torch.zeros(1, 4, 6, 64).bfloat16() for _ in range(2))
    with pytest.raises(RuntimeError, match=says):
        call_packed(**dict(x=x, out=out) | change)


def test_the_binding_writes_no_x(emulated):
    x = torch.zeros(1, 4, 6, 64).bfloat16()
    with pytest.raises(RuntimeError, match="out lies in x's memory, which other blocks still read"):
        call_packed(x=x, out=x)


def test_the_binding_writes_between_other_channels(emulated):
    """Of a larger map, which stay as they are."""
    x, alone = torch.randn(2, 4, 6, 64).bfloat16(), torch.zeros(2, 4, 6, 64).bfloat16()
    call_packed(x=x, out=alone)
    joined = torch.full((2, 4, 6, 80), torch.nan).bfloat16()
    call_packed(x=x, out=joined[..., 8:72])
    assert torch.equal(joined[..., 8:72], alone) and alone.any()
    assert joined[..., :8].isnan().all() and joined[..., 72:].isnan().all()


def call_packed(**given):
    layers, final_norm = packable(64)
    packed = packing.pack_transformer(layers, final_norm, num_heads=4, dtype=torch.bfloat16)
    given = dict(packed=packed) | PACKED | given
    named = [given[name] for name in ("x", "packed", "version", "layers", "head_dim", "hidden")]
    last = [given[name] for name in ("tiles", "sequences", "slot", "out")]
    torch.ops.mvit_kernels.transformer_packed.cuda(*named, True, (2, 2), 1e-5, *last)


def test_the_binding_is_what_its_fake_says(emulated):
    layers, final_norm = packable(64)
    packed = packing.pack_transformer(layers, final_norm, num_heads=4, dtype=torch.bfloat16)
    settings = (packing.VERSION, 2, 16, 128, True, (2, 2), 1e-5, 1, 1, 8448)
    for x in (torch.randn(1, 4, 6, 64), torch.randn(2, 64, 4, 6).permute(0, 2, 3, 1)):
        tests = ("test_schema", "test_faketensor")
        operator = torch.ops.mvit_kernels.transformer_packed.cuda
        out = torch.empty(x.shape).bfloat16()
        torch.library.opcheck(operator, (x.bfloat16(), packed, *settings, out), test_utils=tests)
