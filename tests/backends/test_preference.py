# SPDX-License-Identifier: Apache-2.0
"""The automatic choice on a GPU: what the tables say, what becomes of it where a backend is missing, exclusions."""

import inspect

import pytest
import torch

from mvit_kernels import backends
from mvit_kernels.backends import Call, StackPlan, cuda, explain, gpu, preference, triton
from mvit_kernels.backends.preference import MARGIN, OPERATORS, STACKS, Exclusion, one_launch_pays, order

HALF = torch.bfloat16
WIDTHS = {3: (144, 32), 4: (192, 16), 5: (240, 8)}  # of S, by stage: width, and the map's side


def calls(batch, stage, dtype=HALF, needs_grad=False):
    """The calls of a layer of S, by operator."""
    width, side = WIDTHS[stage]
    row = Call("", "cuda", dtype, needs_grad, (batch, side, side, width), ())
    product = (("out_features", width), ("activation", None), ("contiguous", True))
    heads = (("num_heads", 4), ("head_dim", width // 4), ("patch_size", (2, 2)), ("dense_rows", True))
    return {
        "layer_norm_linear": row._replace(operator="layer_norm_linear", facts=product),
        "patch_attention": row._replace(operator="patch_attention", shape=(*row.shape[:3], 3 * width), facts=heads),
        "linear_residual": row._replace(operator="linear_residual", facts=product),
        "layer_norm_mlp": row._replace(
            operator="layer_norm_mlp", facts=(("hidden_features", 2 * width), ("contiguous", True))
        ),
    }


def stack(batch, stage, dtype=HALF, needs_grad=False):
    width, side = WIDTHS[stage]
    facts = (("num_heads", 4), ("head_dim", width // 4), ("hidden_features", 2 * width))
    facts += (("patch_size", (2, 2)), ("same_widths", True))
    return Call("transformer", "cuda", dtype, needs_grad, (batch, side, side, width), facts)


@pytest.fixture
def a_gpu(monkeypatch):
    """As if an H200 were here, with both libraries; gives a function that takes one of them away."""

    def without(*names):
        backends._choices.clear()
        for name, backend in (("cuda", cuda.BACKEND), ("triton", triton.BACKEND)):
            why = ["it is not there"] if name in names else []
            monkeypatch.setattr(backend, "unavailable", lambda device_type, why=why: why)

    monkeypatch.setattr(triton.BACKEND, "device_type", "cuda")
    monkeypatch.setattr(gpu, "limits", lambda: gpu.Limits(132, 232_448))
    without()
    yield without
    backends._choices.clear()


def chosen(batch, stage, **kind):
    return {name: backends.choose(call, "auto") for name, call in calls(batch, stage, **kind).items()}


# ----------------------------------------------------------------------------------------------------- single operators


def test_the_fastest_of_each_operator(a_gpu):
    assert chosen(64, 3) == {
        "layer_norm_linear": "triton",
        "patch_attention": "triton",
        "linear_residual": "triton",
        "layer_norm_mlp": "cuda",
    }
    assert set(chosen(64, 4).values()) == {"triton"}
    assert chosen(64, 5) == dict.fromkeys(chosen(64, 4), "triton") | {"layer_norm_mlp": "reference"}


@pytest.mark.parametrize("row", OPERATORS, ids=lambda row: f"{row.operator}-{row.width}")
def test_an_order_is_that_of_the_times(row):
    times = {"triton": row.triton, "cuda": row.cuda, "reference": row.eager * MARGIN}
    (stage,) = (stage for stage, (width, _) in WIDTHS.items() if width == row.width)
    found = order(calls(64, stage)[row.operator])
    assert sorted(times, key=times.get) == list(found)


def test_pytorch_is_first_only_up_to_the_rows_that_were_measured(a_gpu):
    mlp = calls(64, 5)["layer_norm_mlp"]
    assert [order(mlp._replace(shape=(batch, 8, 8, 240)))[0] for batch in (1, 64, 65, 256)] == [
        "reference",
        "reference",
        "triton",
        "triton",
    ]
    assert order(mlp._replace(shape=(256, 8, 8, 240)))[-1] == "reference"


def test_the_numbers_of_wider_rows_than_were_measured():
    mlp = calls(1, 3)["layer_norm_mlp"]._replace(shape=(7, 320))
    assert order(mlp)[0] == "reference" and "rows of 240" in preference.measured(mlp)


def test_an_inverted_residual_in_one_launch_is_predicted_to_be_first(a_gpu):
    call = calls(1, 3)["layer_norm_mlp"]._replace(operator="inverted_residual")
    assert order(call) == ("cuda", "triton", "reference")


@pytest.mark.parametrize(
    "width, as_wide_as", [(16, 144), (64, 144), (144, 144), (145, 192), (200, 240), (240, 240), (512, 240)]
)
def test_other_widths_go_by_the_next_wider_one(width, as_wide_as):
    (row,) = (row for row in OPERATORS if (row.operator, row.width) == ("layer_norm_mlp", as_wide_as))
    assert order(calls(1, 3)["layer_norm_mlp"]._replace(shape=(7, width))) == preference.fastest_first(row)


def test_what_was_not_measured_has_the_default(a_gpu):
    default = preference.PREFERENCE["cuda"]
    mlp = calls(1, 5)["layer_norm_mlp"]
    assert order(mlp)[0] == "reference" != default[0]
    for other in (
        mlp._replace(needs_grad=True),
        mlp._replace(dtype=torch.float32),
        mlp._replace(operator="layer_norm"),
    ):
        assert order(other) == default
    assert order(mlp._replace(device_type="cpu")) == ("cpu", "reference")
    assert order(mlp._replace(device_type="mps")) == ("reference",)


def a_map(*shape, needs_grad=True):
    facts = (("layout", "channels_last"),)
    return Call("batch_norm_activation", "cuda", HALF, needs_grad, shape, facts)


def test_small_maps_are_left_to_pytorch_in_eager_training(a_gpu):
    """Where the kernel's additional time on the host is more than what it saves on the GPU."""
    small, large = a_map(8, 64, 127, 128), a_map(8, 64, 128, 128)
    assert [backends.server(each.operator, each) for each in (small, large)] == [None, "triton"]
    assert backends.server(small.operator, small, "triton") == "triton"
    assert order(small._replace(needs_grad=False)) == order(large) == preference.PREFERENCE["cuda"]
    assert order(small._replace(device_type="cpu")) == ("cpu", "reference")

    def first(x):
        return x + ("triton", "cuda", "reference").index(order(small._replace(shape=x.shape))[0])

    x = torch.ones(2, 3)
    assert torch.equal(first(x), x + 2)
    assert torch.equal(torch.compile(first, fullgraph=True, dynamic=True, backend="eager")(x), x)


def test_without_one_of_the_two(a_gpu):
    a_gpu("triton")
    assert chosen(64, 3) | chosen(64, 3, needs_grad=True) == {
        "layer_norm_linear": "reference",  # with a gradient CUDA C++ has attention alone
        "patch_attention": "cuda",
        "linear_residual": "reference",
        "layer_norm_mlp": "reference",
    }
    assert chosen(64, 4) == {  # cuBLAS is faster than CUDA C++'s products
        "layer_norm_linear": "reference",
        "patch_attention": "cuda",
        "linear_residual": "reference",
        "layer_norm_mlp": "cuda",
    }
    a_gpu("cuda")
    assert set(chosen(64, 3).values()) == {"triton"}
    a_gpu("cuda", "triton")
    assert set(chosen(64, 3).values()) == {"reference"}


def test_a_backend_that_is_asked_for_by_name(a_gpu):
    for name in ("cuda", "triton", "reference"):
        assert {backends.choose(call, name) for call in calls(64, 5).values()} == {name}
    a_gpu("triton")
    with pytest.raises(backends.BackendError, match="it is not there"):
        backends.choose(calls(64, 5)["layer_norm_mlp"], "triton")


def test_pytorch_by_measurement_is_explained(a_gpu):
    told = explain(calls(64, 5).values())
    assert told.backends == ("triton", "reference") and told.by_kernels
    assert told.reasons == (
        "reference: PyTorch's own operators are faster for rows of 240 "
        "(on an H200, up to 4096 rows: 26 µs; triton 35, cuda 37)",
    )


def test_a_trace_folds_the_choice(a_gpu):
    """With a batch of any size, and without a graph break."""
    x = torch.ones(2, 8, 8, 240)

    def first(x):
        call = calls(1, 5)["layer_norm_mlp"]._replace(shape=x.shape)
        return x + preference.PREFERENCE["cuda"].index(order(call)[0])

    compiled = torch.compile(first, fullgraph=True, dynamic=True, backend="eager")
    assert torch.equal(compiled(x), x + 2) and torch.equal(compiled(x[:1]), x[:1] + 2)
    many = torch.ones(65, 8, 8, 240)
    assert torch.equal(compiled(many), many)


# --------------------------------------------------------------------------------------------------------------- stacks


def plan(batch, stage, requested=None, **kind):
    return backends.plan_stack(
        stack(batch, stage, **kind), calls(batch, stage, **kind)["patch_attention"], dropout=False, requested=requested
    )


def test_one_launch_where_it_was_measured_to_win(a_gpu):
    wins = {(stage, batch): plan(batch, stage) is StackPlan.WHOLE for stage in WIDTHS for batch in (1, 4, 16, 64, 256)}
    assert {stage: [wins[stage, batch] for batch in (1, 4, 16, 64, 256)] for stage in WIDTHS} == {
        3: [False, False, True, True, True],
        4: [False, False, False, True, True],
        5: [False, False, False, True, True],
    }
    assert plan(1, 5) is StackPlan.OPERATORS


@pytest.mark.parametrize("row", STACKS, ids=lambda row: f"{row.tokens}-{row.sequences}")
@pytest.mark.parametrize("alone", [False, True])
def test_every_row_of_the_table_is_heeded(row, alone):
    pays = one_launch_pays(row.tokens, row.sequences, preference.MEASURED_ON, alone=alone)
    assert pays == (row.one_launch <= MARGIN * (row.cuda_operators if alone else row.operators))


def test_a_win_below_a_loss_does_not_count(monkeypatch):
    """From some number on one launch wins at every measured one; a winner among losers is noise."""
    rows = [
        preference.Stack(64, 1, n, us, 10.0, 10.0, "") for n, us in ((132, 5.0), (264, 20.0), (528, 5.0), (660, 5.0))
    ]
    monkeypatch.setattr(preference, "STACKS", tuple(rows))
    assert preference._one_launch_from(64, False) == 4.0
    monkeypatch.setattr(preference, "STACKS", tuple(rows[:2]))
    assert preference._one_launch_from(64, False) == float("inf")


def test_other_sizes():
    """A shorter sequence goes by the next longer one, a longer one than any never; half a GPU wants half as many."""
    assert one_launch_pays(17, 256, 132, alone=False) and not one_launch_pays(17, 255, 132, alone=False)
    assert one_launch_pays(65, 64, 132, alone=False) and not one_launch_pays(257, 10**6, 132, alone=False)
    assert one_launch_pays(17, 128, 66, alone=False) and not one_launch_pays(17, 127, 66, alone=False)


def test_beside_cuda_alone_one_launch_wins_earlier(a_gpu):
    """Its products of rows are slower than Triton's; so too where it is asked for by name."""
    assert plan(16, 4) is StackPlan.OPERATORS
    assert plan(16, 4, "cuda") is StackPlan.WHOLE and plan(1, 4, "cuda") is StackPlan.OPERATORS
    a_gpu("triton")
    assert plan(16, 4) is StackPlan.WHOLE


def test_training_goes_layer_by_layer(a_gpu):
    assert plan(256, 3, needs_grad=True) is StackPlan.LAYERS
    a_gpu("cuda")
    assert plan(256, 3, needs_grad=True) is plan(256, 3) is StackPlan.LAYERS
    a_gpu("cuda", "triton")
    assert plan(256, 3) is StackPlan.SEQUENCES


# ----------------------------------------------------------------------------------------------------------- exclusions


@pytest.fixture
def faulting(a_gpu, monkeypatch):
    """Triton is not trusted with gradients on Hopper, as an entry of `EXCLUDED` would have it."""
    monkeypatch.setattr(gpu, "capabilities", lambda: ((9, 0),))
    entry = Exclusion("triton", "its launches have faulted", lambda call: call.needs_grad and preference.on_gpu((9, 0)))
    monkeypatch.setattr(preference, "EXCLUDED", (entry,))
    return a_gpu


def test_an_exclusion_holds_for_the_automatic_choice_alone(faulting):
    assert "triton" not in chosen(64, 4, needs_grad=True).values()
    assert chosen(64, 4, needs_grad=True)["patch_attention"] == "cuda"
    assert set(chosen(64, 4).values()) == {"triton"}
    assert backends.choose(calls(64, 4, needs_grad=True)["linear_residual"], "triton") == "triton"


def test_an_exclusion_is_explained(faulting):
    told = explain(calls(64, 4, needs_grad=True).values())
    assert told.backends == ("reference", "cuda") and "triton: its launches have faulted" in told.reasons
    assert explain(calls(64, 4, needs_grad=True).values(), "triton").reasons == ()


def test_stacks_heed_exclusions(faulting):
    assert plan(256, 3, needs_grad=True) is StackPlan.LAYERS  # CUDA C++'s attention, and PyTorch
    faulting("cuda")
    assert plan(256, 3, needs_grad=True) is StackPlan.SEQUENCES and plan(256, 3) is StackPlan.LAYERS
    assert plan(256, 3, "triton", needs_grad=True) is StackPlan.LAYERS


def test_what_an_exclusion_may_ask(monkeypatch):
    monkeypatch.setattr(preference, "_environment", lambda: (((8, 9), (9, 0)), "3.6.0"))
    assert (
        preference.on_gpu((9, 0)) and preference.on_gpu((8, 9), ("3.5", "3.6")) and preference.on_gpu(triton=("3.6",))
    )
    assert not preference.on_gpu((8, 0)) and not preference.on_gpu((9, 0), ("3.7",))
    monkeypatch.undo()
    capabilities, version = preference._environment()
    assert capabilities == gpu.capabilities() and (version == "" or version[0].isdigit())


def test_exclusions_are_of_backends_that_there_are():
    for entry in preference.EXCLUDED:
        assert entry.backend in backends.BACKENDS and entry.reason
        assert list(inspect.signature(entry.applies).parameters) == ["call"]
