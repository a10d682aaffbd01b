# SPDX-License-Identifier: Apache-2.0
"""Networks as they are stored, for any processor, and what is packed of them: a wrong one is an error."""

from __future__ import annotations

import pytest
import torch

from mvit_kernels.freezing.network import Network
from mvit_kernels.freezing.program import (
    CONVOLUTION,
    COPY,
    DEPTHWISE_CONVOLUTION,
    INVERTED_RESIDUAL,
    TO_SIZE_OF,
    TRANSFORMER,
    Stored,
    build,
)
from support.native import skip_without_a_compiler
from support.networks import Draw, chain, native

skip_without_a_compiler()

pack = torch.ops.mvit_kernels.pack_network.cpu
SOURCE, TARGET, WORDS = 2, 5, 8  # of a step, beside its length and kind
HUGE = (2**31, 2**62, 2**63 - 1, -1, -(2**63))


@pytest.fixture(scope="module")
def stored() -> Stored:
    return build(chain()[0], torch.float32).stored()


def parts_of(program: torch.Tensor) -> tuple[list[int], list[int]]:
    """Where the values and where the steps begin."""
    values, at = [], 4
    for _ in range(int(program[2])):
        values.append(at)
        at += 3 + int(program[at + 2])
    steps = []
    while at < len(program):
        steps.append(at)
        at += int(program[at])
    return values, steps


def refuses(stored: Stored, program: torch.Tensor, says: str) -> None:
    with pytest.raises(RuntimeError, match=f"(pack_)?network: .*({says})"):
        pack(program, stored.weights)


def changed(program: torch.Tensor, at: int, word: int) -> torch.Tensor:
    wrong = program.clone()
    wrong[at] = word
    return wrong


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_same_module_gives_the_same_bytes(dtype):
    first, second = (build(chain()[0].to(dtype), dtype).stored() for _ in range(2))
    assert torch.equal(first.program, second.program) and torch.equal(first.weights, second.weights)
    for one, other in zip(pack(first.program, first.weights), pack(second.program, second.weights), strict=True):
        assert torch.equal(one, other)
    torch.library.opcheck(pack, (first.program, first.weights), test_utils=("test_schema", "test_faketensor"))


def test_weights_are_stored_once_in_their_own_dtype(stored):
    module, _ = chain()
    count = sum(buffer.numel() * 4 for buffer in module.buffers())
    assert count <= stored.weights.numel() < 1.2 * count
    half = build(module.half(), torch.float16).stored()
    assert half.weights.numel() < 0.7 * stored.weights.numel()


def test_float16_weights_are_read_exactly():
    """Also subnormal ones, infinities and zeros: as float32 they are the same numbers."""
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.float16)
    values = bits[bits.isfinite()][: 63 * 1024].view(-1, 32)
    draw = Draw(0)
    for rows in values.split(252):
        conv = draw.conv(32, len(rows), act=False)
        conv.weight, conv.bias = rows[:, :, None, None].clone(), torch.zeros(len(rows), dtype=torch.float16)
        half = build(conv, torch.float16).stored()
        wide = build(conv.float(), torch.float32).stored()
        assert torch.equal(pack(half.program, half.weights)[1], pack(wide.program, wide.weights)[1])


def test_cut_off_anywhere(stored):
    for length in range(len(stored.program)):
        refuses(stored, stored.program[:length].clone(), "no stored network|the words end|has not the words|go on")
    refuses(stored, torch.cat((stored.program, stored.program[-1:])), "go on after the steps")


@pytest.mark.parametrize(
    "word, values, says",
    [
        (0, (0, 2, *HUGE), "no stored network of version 1"),
        (1, (3, *HUGE), "weights of a type"),
        (2, (0, 1, *HUGE), "the words end"),
        (3, (0, *HUGE), "the words end"),
    ],
)
def test_wrong_head(stored, word, values, says):
    for value in values:
        refuses(stored, changed(stored.program, word, value), says)


def test_wrong_values(stored):
    values, _ = parts_of(stored.program)
    several = [at for at in values if stored.program[at + 2] > 1]
    assert several
    for at in values:
        for word in (0, *HUGE, int(stored.program[at]) + 1):
            refuses(stored, changed(stored.program, at, word), "which its parts are not")
        for border in HUGE:
            refuses(stored, changed(stored.program, at + 1, border), "which its parts are not")
        for parts in (0, *HUGE):
            refuses(stored, changed(stored.program, at + 2, parts), "end in value")
    for at in several:
        wrong = stored.program.clone()  # of the same sum, but parts of other widths
        wrong[at + 3] += 4
        wrong[at + 4] -= 4
        refuses(stored, wrong, "which are no part of it")


WRONG = [
    *((kind, 1, (-1, 8, 2**62), "has not the words of one") for kind in range(8)),
    *((kind, SOURCE, (1000, *HUGE), "reads or writes what there is not") for kind in range(8)),
    *((kind, SOURCE + 1, HUGE, "reads or writes what there is not") for kind in range(8)),
    *((kind, TARGET + 2, (0, *HUGE), "reads or writes what there is not") for kind in range(8)),
    (COPY, TARGET + 2, (1,), "no part of it|copies more channels"),
    (CONVOLUTION, WORDS, (0, 2, 5, *HUGE), "a convolution of"),
    *((CONVOLUTION, WORDS + word, (32, 2**40, *HUGE), "weights where there are none") for word in (4, 5)),
    (INVERTED_RESIDUAL, WORDS, (0, *HUGE), "hidden channels"),
    *((INVERTED_RESIDUAL, WORDS + word, (32, 2**40, *HUGE), "weights where there are none") for word in range(4, 10)),
    *((TRANSFORMER, WORDS + word, (0, *HUGE), "heads or widths") for word in range(3)),
    (TRANSFORMER, WORDS + 3, (0, 1, 3, *HUGE), "has not the words"),
    (TRANSFORMER, WORDS + 7, (-1,), "has half a norm"),
    *((TRANSFORMER, WORDS + 9 + word, (32, 2**40, 2**62), "weights where there are none") for word in range(12)),
    (TO_SIZE_OF, WORDS, (1000, *HUGE), "takes the size of what there is not"),
    *((DEPTHWISE_CONVOLUTION, WORDS + word, (32, 2**40, *HUGE), "weights where there are none") for word in (3, 4)),
]


@pytest.mark.parametrize("kind, word, values, says", WRONG)
def test_wrong_word_of_a_step(stored, kind, word, values, says):
    steps = [at for at in parts_of(stored.program)[1] if stored.program[at + 1] == kind]
    assert steps
    for at in steps:
        for value in values:
            refuses(stored, changed(stored.program, at + word, value), says)


def test_wrong_weights(stored):
    weights = stored.weights
    misaligned = torch.cat((weights[:1], weights))[1:]
    for other in (weights[:-64].clone(), weights[:0], weights[None], misaligned, weights.float()):
        with pytest.raises(RuntimeError, match="weights where there are none|must be one stretch of bytes"):
            pack(stored.program, other)
    with pytest.raises(RuntimeError, match="one stretch of int64"):
        pack(stored.program.int(), weights)


def test_a_network_of_a_changed_program_runs_as_it_says(stored):
    """The words are what runs: another activation gives another result, and that of a module with it."""
    module, x = Draw(1).conv(8, 8, act="silu"), Draw(2)(1, 8, 9, 9)
    native(module, x)
    words = build(module, torch.float32).stored()
    (at,) = parts_of(words.program)[1]
    program, weights = pack(changed(words.program, at + WORDS + 3, 2), words.weights)
    rows = x.contiguous(memory_format=torch.channels_last)
    relu = torch.ops.mvit_kernels.network.cpu(rows, weights, program, 8, 0).permute(0, 3, 1, 2)
    module.activation = "relu"
    module._changed()
    assert torch.equal(native(module, x), relu)
    assert isinstance(module.native(), Network)
