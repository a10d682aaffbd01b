# SPDX-License-Identifier: Apache-2.0
"""How the library reads a program: a wrong one is an error that names the step, whatever Python checked before."""

from __future__ import annotations

import pytest
import torch

from mvit_kernels.backends.library import NATIVE_SCHEMAS, SCHEMAS
from mvit_kernels.freezing.network import Network
from mvit_kernels.freezing.program import (
    CONVOLUTION,
    COPY,
    DEPTHWISE_CONVOLUTION,
    INVERTED_RESIDUAL,
    MEAN,
    TO_SIZE_OF,
    TO_WHOLE_PATCHES,
    TRANSFORMER,
)
from support.native import skip_without_a_compiler
from support.networks import Draw, chain, native

skip_without_a_compiler()

call = torch.ops.mvit_kernels.network.cpu
SOURCE, TARGET, WORDS = 2, 5, 8  # of a step, beside its length and kind


@pytest.fixture(scope="module")
def made() -> tuple[Network, torch.Tensor, torch.Tensor]:
    """A chain's network, an input, and the result."""
    module, draw = chain()
    x = draw(2, 3, 33, 30)
    native(module, x)
    network = module._network
    return network, x, call(x, network.weights, network.program, network.out_channels, network.halvings)


@pytest.fixture(autouse=True)
def still_right(made):
    """After whatever was refused, the right program gives the same bits as before."""
    yield
    network, x, expected = made
    assert torch.equal(call(x, network.weights, network.program, network.out_channels, network.halvings), expected)


def steps(program: torch.Tensor, kind: int) -> list[int]:
    """Where the steps of a kind begin."""
    found, at = [], 4 + 2 * int(program[2])
    while at < len(program):
        if program[at + 1] == kind:
            found.append(at)
        at += int(program[at])
    return found


def refuses(made, program: torch.Tensor, says: str) -> None:
    network, x, _ = made
    with pytest.raises(RuntimeError, match=f"network: .*{says}"):
        call(x, network.weights, program, network.out_channels, network.halvings)


@pytest.mark.parametrize("word, says", [(0, "no program of version"), (3, "ends in the middle"), (2, "")])
def test_wrong_head(made, word, says):
    wrong = made[0].program.clone()
    wrong[word] += 1
    refuses(made, wrong, says)


def test_cut_off_anywhere(made):
    program = made[0].program
    for length in range(len(program)):
        refuses(made, program[:length].clone(), "no program of version|the program ends|has not the words")
    refuses(made, torch.cat((program, program[-1:])), "goes on after its steps")


HUGE = (2**31, 2**62, 2**63 - 1, -1, -(2**63))
WRONG = [
    # kind, word of the step, values, what is said
    *((kind, 1, (-1, 8), "has not the words of one") for kind in range(8)),
    *((kind, SOURCE, (1000, -1, *HUGE), "reads or writes what there is not") for kind in range(8)),
    *((kind, SOURCE + 1, HUGE, "reads or writes what there is not") for kind in range(8)),
    *((kind, TARGET + 2, (0, *HUGE), "reads or writes what there is not") for kind in range(8)),
    (COPY, TARGET + 2, (1,), "copies more channels than there is room for"),
    (CONVOLUTION, TARGET, (0,), "writes the input or reads the output|reads or writes what there is not"),
    (CONVOLUTION, WORDS, (0, 2, 5, *HUGE), "has a kernel"),
    (CONVOLUTION, WORDS + 1, (0, 3, *HUGE), "has a kernel"),
    (CONVOLUTION, WORDS + 2, (0, *HUGE), "has a kernel"),
    (CONVOLUTION, WORDS + 3, (3, *HUGE), "has a kernel"),
    (CONVOLUTION, WORDS + 4, (32, 2**24, *HUGE), "has weights where there are none"),
    (INVERTED_RESIDUAL, WORDS, (0, *HUGE), "has hidden channels"),
    (INVERTED_RESIDUAL, WORDS, (2**20, 2**24), "has weights where there are none"),
    (INVERTED_RESIDUAL, WORDS + 1, (0, 3, *HUGE), "has hidden channels"),
    (INVERTED_RESIDUAL, WORDS + 2, (0, *HUGE), "has hidden channels"),
    (INVERTED_RESIDUAL, WORDS + 4, (32, 2**24, *HUGE), "has weights where there are none"),
    (TRANSFORMER, WORDS, (0, 5, *HUGE), "has heads"),
    (TRANSFORMER, WORDS + 1, (0, *HUGE), "has heads"),
    (TRANSFORMER, WORDS + 2, (0, *HUGE), "has heads"),
    (TRANSFORMER, WORDS + 2, (2**16,), "has weights where there are none"),
    (TRANSFORMER, WORDS + 3, (0, 1, 3, *HUGE), "has not the words"),
    (TRANSFORMER, WORDS + 4, (0, *HUGE), "has heads"),
    (TRANSFORMER, WORDS + 5, (7,), "does not divide into patches"),
    (TRANSFORMER, WORDS + 7, (-1,), "has half a norm"),
    (TRANSFORMER, WORDS + 9, (-1, 4, 2**24), "has weights where there are none"),
    (TRANSFORMER, WORDS + 9 + 10, (-1, 4, 2**24), "has weights where there are none"),
    (TO_WHOLE_PATCHES, WORDS, (0, *HUGE), "has no patch"),
    (TO_WHOLE_PATCHES, TARGET + 2, (1,), "resizes to another number of channels"),
    (TO_SIZE_OF, WORDS, (1000, *HUGE), "takes the size of what there is not"),
    (TO_SIZE_OF, TARGET + 2, (1,), "resizes to another number of channels"),
    (DEPTHWISE_CONVOLUTION, WORDS, (0, 3, *HUGE), "has a stride"),
    (DEPTHWISE_CONVOLUTION, WORDS + 1, (0, *HUGE), "has a stride"),
    (DEPTHWISE_CONVOLUTION, WORDS + 2, (3, *HUGE), "has a stride"),
    (DEPTHWISE_CONVOLUTION, WORDS + 3, (32, 2**24, *HUGE), "has weights where there are none"),
    (DEPTHWISE_CONVOLUTION, TARGET + 2, (1,), "has two widths"),
    (MEAN, TARGET + 2, (1,), "has two widths"),
]


@pytest.mark.parametrize("kind, word, values, says", WRONG)
def test_wrong_word_of_a_step(made, kind, word, values, says):
    assert steps(made[0].program, kind)
    for at in steps(made[0].program, kind):
        for value in values:
            wrong = made[0].program.clone()
            wrong[at + word] = value
            refuses(made, wrong, says)


@pytest.mark.parametrize("word, values", [(0, (0, *HUGE)), (1, HUGE)])
def test_wrong_channels_and_borders(made, word, values):
    program = made[0].program
    for value in range(int(program[2])):
        for number in values:
            wrong = program.clone()
            wrong[4 + 2 * value + word] = number
            refuses(made, wrong, f"value {value} of the program")
    for value in (0, int(program[2]) - 1):  # the input and the result have no border
        wrong = program.clone()
        wrong[4 + 2 * value + 1] = 1
        refuses(made, wrong, f"value {value} of the program")


def test_a_dilation_that_is_wider_than_the_border(made):
    program = made[0].program
    dilated = [at for at in steps(program, CONVOLUTION) if program[at + WORDS] == 3]
    assert len(dilated) > 3
    for at in dilated:
        border = int(program[4 + 2 * int(program[at + SOURCE]) + 1])
        for dilation in (border + 1, border + 2, 2**20):
            wrong = program.clone()
            wrong[at + WORDS + 2] = dilation
            refuses(made, wrong, "reads a border that is not there")


def test_maps_too_large_for_memory(made):
    """Borders that make a map of 2^50 bytes, and some that make one of 2^43: valid numbers, but more than memory."""
    network, x, _ = made
    value = int(network.program[steps(network.program, CONVOLUTION)[0] + SOURCE])
    for border, says in ((2**23, "too large|no memory for"), (2**19, "no memory for .* bytes")):
        wrong = network.program.clone()
        wrong[4 + 2 * value + 1] = border
        with pytest.raises(RuntimeError, match=says):
            call(x, network.weights, wrong, network.out_channels, network.halvings)


def test_steps_in_another_order(made):
    program = made[0].program
    at, begins = 4 + 2 * int(program[2]), []
    while at < len(program):
        begins.append(at)
        at += int(program[at])
    parts = [program[begin:end] for begin, end in zip(begins, [*begins[1:], len(program)], strict=True)]
    head = program[: begins[0]]
    refuses(made, torch.cat((head, *parts[::-1])), "reads what no step wrote")
    targets = [int(part[TARGET]) for part in parts]
    for left_out, part in enumerate(parts):
        # One of several that write a map, or one in place: no map is missing.
        if part[1] in (CONVOLUTION, TRANSFORMER) or targets.count(targets[left_out]) > 2:
            continue
        wrong = torch.cat((head, *parts[:left_out], *parts[left_out + 1 :]))
        wrong[3] -= 1
        refuses(made, wrong, "reads what no step wrote")
    refuses(made, torch.cat((head, *parts[:-1], parts[0])), "no step of the program writes the result")


def test_a_resize_onto_itself(made):
    program = made[0].program
    whole = [at for at in steps(program, TO_SIZE_OF) if program[at + SOURCE + 2] > 16]
    assert whole
    for at in whole:
        wrong = program.clone()
        wrong[at + TARGET] = wrong[at + SOURCE]
        wrong[at + WORDS] = wrong[at + SOURCE]
        refuses(made, wrong, "writes what it reads")


def test_wrong_weights(made):
    network, x, _ = made
    weights = network.weights
    misaligned = torch.cat((weights[:1], weights))[1:]
    wrong = [weights[:-64].clone(), weights[:0], weights[None], weights.view(torch.int64), misaligned]
    wrong += [weights.repeat_interleave(2)[::2], weights.float()]
    for other in wrong:
        with pytest.raises(RuntimeError, match="has weights where there are none|must be one stretch of bytes"):
            call(x, other, network.program, network.out_channels, network.halvings)


def test_wrong_input_and_result(made):
    network, x, _ = made
    rest = network.weights, network.program, network.out_channels, network.halvings
    for other, says in ((x[:, :2], "3, H, W"), (x[0], "3, H, W"), (x[:0], "not empty"), (x.double(), "float32 or bf")):
        with pytest.raises(RuntimeError, match=says):
            call(other, *rest)
    for out_channels, halvings in ((1, 3), (network.out_channels, 2), (network.out_channels, -1), (2**62, 64)):
        with pytest.raises(RuntimeError, match=f"not {out_channels} channels of a map halved {halvings} times"):
            call(x, network.weights, network.program, out_channels, halvings)


def test_rows_of_an_input_that_has_none():
    """A network that begins with an inverted residual reads x's rows in place."""
    module, draw = Draw(1).inverted(8, 16, 8), Draw(2)
    x = draw(2, 8, 9, 10)
    expected = native(module, x)
    network = module._network
    rest = network.weights, network.program, network.out_channels, network.halvings
    with pytest.raises(RuntimeError, match="reads rows of x, whose channels are not adjacent"):
        call(x, *rest)
    rows = x.contiguous(memory_format=torch.channels_last)
    assert torch.equal(call(rows, *rest).permute(0, 3, 1, 2), expected)
    with pytest.raises(RuntimeError, match="wants x in the dtype of the weights"):
        call(rows.bfloat16(), *rest)


# -------------------------------------------------------------------------------------------------------------- fakes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [(33, 30), (1, 1), (7, 64)], ids=str)
def test_network_is_what_its_fake_says(size, dtype):
    module, draw = chain()
    module, x = module.to(dtype), draw(2, 3, *size).to(dtype)
    native(module, x)
    network = module._network
    torch.library.opcheck(call, (x, network.weights, network.program, network.out_channels, network.halvings))


def test_every_raw_operator_has_a_fake():
    names = [f"{name}.{backend}" for name in SCHEMAS for backend in ("reference", "cpu", "triton", "cuda")]
    defined = {
        name.removeprefix("mvit_kernels::") for name in torch._C._dispatch_get_all_op_names() if "mvit_k" in name
    }
    assert defined == {*names, *NATIVE_SCHEMAS}
    for name in defined:
        assert torch._library.simple_registry.singleton.find(f"mvit_kernels::{name}").fake_impl.kernel is not None, name


def test_a_fake_refuses_tensors_of_two_devices():
    """A call with a meta tensor among real ones would return memory that was never written."""
    x, weight = torch.ones(2, 3), torch.ones(4, 3)
    for first, second in ((x, weight.to("meta")), (x.to("meta"), weight)):
        with pytest.raises(ValueError, match=r"linear_residual\.cpu: tensors are on .* move all to one device"):
            torch.ops.mvit_kernels.linear_residual.cpu(first, second, None, torch.ones(2, 4))
