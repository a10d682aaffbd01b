# SPDX-License-Identifier: Apache-2.0
"""``transformer_on_map``: the resize rule, memory formats, live dropout and drop-path, and which operators it runs."""

from functools import partial

import pytest
import torch

from mvit_kernels.dropout import LayerDropout, drop_path
from mvit_kernels.ops import transformer_on_map
from support.cases import INFERENCE, carefully, convert, evaluate, make, structured
from support.fake_backend import NAME, fake_backend
from support.layouts import lay_out
from support.oracle import sequences
from support.oracle import transformer_on_map as oracle
from support.recorder import Recorder
from support.tolerance import Compared, assert_close_as_pytorch, assert_close_over_draws
from support.usual import transformer_on_map as usual

COMPOSED = ("layer_norm_linear", "patch_attention", "linear_residual", "layer_norm_mlp")
SIZES = dict(shape=(2, 4, 6, 24), heads=2, patch=(2, 2))


def case(sizes, dtype="float32", norm_dtype=None, seed=0):
    """Tensors with a (B, d, H, W) map for the (B, H, W, d) of `sizes`, and the other arguments."""
    tensors, settings = make("transformer", sizes, seed)
    tensors["x"] = tensors["x"].permute(0, 3, 1, 2).contiguous()
    return convert(tensors, getattr(torch, dtype), norm_dtype), settings


def run(function, tensors, settings, **more):
    return function(**structured("transformer", tensors), **settings, **more)


def compare(sizes, dtype="float32", gradients=True, **more):
    """The result and all gradients, by the tolerance rule."""

    def draw(seed):
        tensors, settings = case(sizes, dtype, seed=seed)
        ours = evaluate(lambda t: run(transformer_on_map, t, settings, **more), tensors, gradients)
        as_usual = convert(tensors, torch.float32) if dtype == "float64" else tensors
        pytorch = evaluate(lambda t: run(usual, t, settings), as_usual, gradients)
        exact = convert(tensors, torch.float64)
        truth = evaluate(lambda t: run(oracle, t, settings), exact, gradients)
        careful = carefully(lambda t: run(usual, t, settings), exact, gradients, as_usual["x"].dtype)
        return {
            f"transformer_on_map: {name}": Compared(value, pytorch[name], truth[name], partial(careful, name))
            for name, value in ours.items()
        }

    assert_close_over_draws(draw)


# -------------------------------------------------------------------------------------------------- sizes and layouts


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64"])
@pytest.mark.parametrize(
    "height, width, patch",
    [
        (4, 6, (2, 2)),
        (7, 7, (2, 2)),  # 224 px, stage 5: resized to 8 × 8
        (5, 9, (2, 2)),
        (6, 5, (2, 2)),  # one side only
        (1, 1, (2, 2)),
        (1, 6, (2, 2)),
        (5, 7, (4, 2)),
        (5, 7, (2, 1)),
        (5, 4, (1, 2)),
        (3, 5, (4, 8)),  # a patch larger than the map
        (5, 7, (1, 1)),
    ],
    ids=str,
)
def test_values_and_gradients(height, width, patch, dtype):
    compare(dict(shape=(2, height, width, 24), heads=2, patch=patch, layers=1), dtype)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "sizes",
    [
        dict(
            shape=(1, 7, 8, 64), heads=4, head_dim=8, ratio=4, qkv_bias=False, final_norm=False, patch=(2, 2)
        ),  # Kornia
        dict(shape=(1, 5, 5, 144), heads=4, patch=(2, 2), layers=2),
        dict(shape=(1, 4, 4, 17), heads=1, patch=(2, 2), layers=3, final_norm=False),
        dict(shape=(0, 5, 6, 24), heads=2, patch=(2, 2)),
    ],
    ids=str,
)
def test_other_networks(sizes, dtype):
    compare(sizes, dtype)


@pytest.mark.parametrize("height, width", [(4, 6), (5, 7)])
@pytest.mark.parametrize("gradients", [True, False])
def test_memory_format_is_kept(height, width, gradients):
    tensors, settings = case(dict(shape=(2, height, width, 24), heads=2, patch=(2, 2), layers=1))
    expected = run(transformer_on_map, tensors, settings)
    for memory_format in (torch.contiguous_format, torch.channels_last):
        x = tensors["x"].contiguous(memory_format=memory_format).requires_grad_(gradients)
        out = run(transformer_on_map, {**tensors, "x": x}, settings)
        assert out.is_contiguous(memory_format=memory_format)
        torch.testing.assert_close(out, expected)


@pytest.mark.parametrize("layout", ["transposed", "sliced", "strided", "offset", "expanded"])
def test_layouts(layout):
    """Other strides give the same values as a dense copy; neither x nor the memory around it is written."""
    tensors, settings = case(dict(shape=(2, 5, 6, 24), heads=2, patch=(2, 2), layers=1))
    x, buffer = lay_out(tensors["x"], layout)
    before = (x if buffer is None else buffer).clone()
    out = run(transformer_on_map, {**tensors, "x": x}, settings)
    assert out.is_contiguous()
    torch.testing.assert_close(out, run(transformer_on_map, {**tensors, "x": x.contiguous()}, settings))
    assert torch.equal(x if buffer is None else buffer, before)


@pytest.mark.parametrize("memory_format, copies", [(torch.channels_last, 2), (torch.contiguous_format, 3)])
def test_few_copies_of_the_map(memory_format, copies):
    """One into sequence order before the first layer, one back after the last, one more to NCHW; none in between."""
    tensors, settings = case(dict(shape=(2, 8, 8, 24), heads=2, patch=(2, 2), layers=3))
    tensors["x"] = tensors["x"].contiguous(memory_format=memory_format)
    with torch.no_grad(), Recorder() as recorder:
        run(transformer_on_map, tensors, settings, backend="reference")
    elements = 2 * 8 * 8 * 24
    sizes = [
        torch.Size(shapes[0]).numel()
        for name, shapes in recorder.calls
        if name.partition(".")[0] in ("aten::clone", "aten::copy_")
    ]
    assert sizes.count(elements) <= copies and max(sizes) <= elements


# ------------------------------------------------------------------------------------------------------------- autocast


@pytest.mark.parametrize("size", [(4, 6), (5, 7)])
@pytest.mark.parametrize("live", [False, True])
@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16])
def test_autocast(x_dtype, live, size):
    """Autocast's dtype comes out whatever goes in, even with dropout in both halves of every layer."""
    tensors, settings = case(dict(shape=(2, *size, 24), heads=2, patch=(2, 2)))
    tensors["x"] = tensors["x"].to(x_dtype)
    dropout = [LayerDropout(projection=0.1, mlp=0.1, path1=0.1, path2=0.1)] * 2 if live else None
    with torch.autocast("cpu", torch.bfloat16):
        torch.manual_seed(0)
        out = run(transformer_on_map, tensors, settings, dropout=dropout)
    assert out.dtype == torch.bfloat16
    if size == (4, 6):  # no resize, which happens in x's dtype: then it equals casting by hand
        cast = {name: t if "norm" in name else t.bfloat16() for name, t in tensors.items()}
        torch.manual_seed(0)
        assert torch.equal(out, run(transformer_on_map, cast, settings, dropout=dropout))


def test_norm_parameters_in_float32():
    tensors, settings = case(SIZES, "bfloat16", torch.float32)
    ours, pytorch = run(transformer_on_map, tensors, settings), run(usual, tensors, settings)
    assert_close_as_pytorch("mixed", ours, pytorch, run(oracle, convert(tensors, torch.float64), settings))


# ---------------------------------------------------------------------------------------------- dropout and drop-path

LIVE = {
    "attention": LayerDropout(attention=0.3),
    "projection": LayerDropout(projection=0.3),
    "activation": LayerDropout(activation=0.3),
    "mlp": LayerDropout(mlp=0.3),
    "path1": LayerDropout(path1=0.4),
    "path2": LayerDropout(path2=0.4),
    "unscaled path": LayerDropout(path1=0.4, path2=0.2, path_scale=False),
    "certain path": LayerDropout(path1=1.0),
    "hugging face": LayerDropout(projection=0.1, mlp=0.1),
    "all": LayerDropout(0.1, 0.2, 0.15, 0.25, 0.3, 0.4),
}


@pytest.mark.parametrize("size", [(4, 6), (5, 7)])
@pytest.mark.parametrize("live", LIVE.values(), ids=LIVE.keys())
def test_the_same_draws_as_on_sequences(live, size):
    """The same seed gives the values and gradients of the usual implementation, which unfolds sequences."""
    tensors, settings = case(dict(shape=(2, *size, 24), heads=2, patch=(2, 2)), "float64")
    dropout = [live, live._replace(projection=live.projection / 2)]  # each layer has its own

    def seeded(function):
        def call(t):
            torch.manual_seed(7)
            more = {"backend": "reference"} if function is transformer_on_map else {}
            return run(function, t, settings, dropout=dropout, **more)

        return evaluate(call, tensors, True)

    ours, expected = seeded(transformer_on_map), seeded(usual)
    for name, value in ours.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-10, atol=1e-10, msg=lambda m: f"{name}: {m}")  # noqa: B023
    without = run(transformer_on_map, tensors, settings, backend="reference")
    assert not torch.allclose(ours["out"], without, rtol=1e-3, atol=1e-3), "nothing was dropped"


def test_zero_dropout_is_none():
    tensors, settings = case(SIZES)
    state = torch.random.get_rng_state()
    out = run(transformer_on_map, tensors, settings, dropout=[LayerDropout()] * 2)
    assert torch.equal(out, run(transformer_on_map, tensors, settings))
    assert torch.equal(torch.random.get_rng_state(), state), "a random number was drawn"


@pytest.mark.parametrize("field, place", [("projection", "proj"), ("mlp", "fc2")])
def test_dropout_statistics(field, place):
    """A branch of ones shows its mask: the fraction dropped, the scale of what is kept, no pattern."""
    tensors, settings = case(dict(shape=(2, 32, 32, 24), heads=2, patch=(2, 2), layers=1, final_norm=False))
    for name in ("proj", "fc2"):
        tensors[f"layers.0.{name}_weight"].zero_()
        tensors[f"layers.0.{name}_bias"].fill_(1.0 if name == place else 0.0)
    tensors["x"].zero_()
    torch.manual_seed(0)
    mask = run(transformer_on_map, tensors, settings, dropout=[LayerDropout(**{field: 0.3})])
    assert mask.unique().tolist() == pytest.approx([0.0, 1 / 0.7])
    dropped = (mask == 0).double()
    deviation = (0.3 * 0.7 / mask.numel()) ** 0.5  # of the mean of that many draws
    assert abs(dropped.mean() - 0.3) < 5 * deviation
    for axis in range(4):  # every channel, row, column and image for itself
        means = dropped.mean([a for a in range(4) if a != axis])
        assert (means - 0.3).abs().max() < 5 * deviation * mask.shape[axis] ** 0.5


def test_drop_path_decides_once_a_sequence():
    """One decision for each (image, patch position), the same for all its tokens and channels."""
    torch.manual_seed(0)
    mask = drop_path(torch.ones(64, 8, 6, 5), 0.25, (4, 2))
    assert mask.unique().tolist() == pytest.approx([0.0, 4 / 3])
    groups = torch.stack([mask.flatten(1, 2)[:, tokens] for tokens in sequences(8, 6, (4, 2))], 1)  # (64, 8, N, 5)
    assert torch.equal(groups, groups[:, :, :1, :1].expand_as(groups))
    decisions = (groups[:, :, 0, 0] == 0).double()
    deviation = (0.25 * 0.75 / decisions.numel()) ** 0.5
    assert abs(decisions.mean() - 0.25) < 5 * deviation
    assert 0 < decisions[0].sum() < 8 or 0 < decisions[1].sum() < 8, "the sequences of an image are one decision"
    assert not torch.equal(decisions, decisions[:1].expand_as(decisions)), "the images are one decision"


def test_drop_path_draws_alike_on_maps_and_on_sequences():
    x = torch.randn(3, 4, 6, 5)
    torch.manual_seed(1)
    on_map = drop_path(x, 0.5, (2, 2)).flatten(1, 2)
    torch.manual_seed(1)
    groups = torch.stack([x.flatten(1, 2)[:, tokens] for tokens in sequences(4, 6, (2, 2))], 1).flatten(0, 1)
    on_sequences = drop_path(groups.unsqueeze(2), 0.5, (1, 1)).squeeze(2).unflatten(0, (3, 4))
    for place, tokens in enumerate(sequences(4, 6, (2, 2))):
        assert torch.equal(on_map[:, tokens], on_sequences[:, place])


def test_drop_path_at_its_ends():
    x = torch.randn(2, 4, 4, 3)
    assert drop_path(x, 0.0, (2, 2)) is x
    assert torch.equal(drop_path(x, 1.0, (2, 2)), torch.zeros_like(x))
    torch.manual_seed(0)
    assert set((drop_path(x, 0.5, (2, 2), scale_by_keep=False) / x).unique().tolist()) == {0.0, 1.0}


# ----------------------------------------------------------------------------------------------- which operators it
# runs


def operators_run(sizes=SIZES, gradients=False, dropout=None, backend=None):
    tensors, settings = case(sizes)
    if gradients:
        tensors["x"].requires_grad_()
    with Recorder() as recorder:
        out = run(transformer_on_map, tensors, settings, dropout=dropout, backend=backend)
    return recorder.ours(), out


def test_without_kernels_nothing_but_pytorch_runs():
    assert operators_run(backend="reference")[0] == []


def test_the_kernel_of_the_whole_stack_is_used_once():
    with fake_backend(
        INFERENCE + COMPOSED,
        refuses=lambda call: ["for inference"] * (call.operator == "transformer" and call.needs_grad),
    ):
        expected = operators_run(backend="reference")[1]
        ran, out = operators_run()
        assert ran == [f"transformer.{NAME}"]
        torch.testing.assert_close(out, expected)
        ran, out = operators_run(backend=NAME)
        assert ran == [f"transformer.{NAME}"]
        ran, _ = operators_run(dropout=[LayerDropout(mlp=0.1)] * 2)
        assert f"transformer.{NAME}" not in ran
        ran, _ = operators_run(gradients=True)
        layer = [f"{name}.{NAME}" for name in COMPOSED]
        assert ran == layer * 2


def test_asking_for_the_automatic_choice_is_like_not_asking():
    with fake_backend(INFERENCE + COMPOSED):
        assert operators_run(backend="auto")[0] == operators_run()[0] == [f"transformer.{NAME}"]


@pytest.mark.parametrize("height, width", [(4, 6), (5, 7)])
def test_kernels_work_on_the_map_as_it_lies(height, width):
    """Where a kernel serves attention, tokens stay in map order: values and gradients are the same."""
    with fake_backend(COMPOSED) as module:
        compare(dict(shape=(2, height, width, 24), heads=2, patch=(2, 2)), backend=NAME)
        attention = [call for call in module.asked if call.operator == "patch_attention"]
    assert attention and all(call.fact("patch_size") == (2, 2) for call in attention)


def test_kernels_get_dense_rows_of_any_map():
    with fake_backend(COMPOSED) as module:
        for layout in ("permuted", "transposed", "strided"):
            tensors, settings = case(SIZES)
            run(transformer_on_map, {**tensors, "x": lay_out(tensors["x"], layout)[0]}, settings)
    assert all(call.fact("contiguous") for call in module.asked if "contiguous" in dict(call.facts))
    assert all(call.fact("dense_rows") for call in module.asked if call.operator == "patch_attention")


def test_no_copy_of_the_map_with_kernels_and_channels_last():
    tensors, settings = case(dict(shape=(2, 8, 8, 24), heads=2, patch=(2, 2), layers=3))
    tensors["x"] = tensors["x"].contiguous(memory_format=torch.channels_last)
    with fake_backend(COMPOSED), torch.no_grad(), Recorder() as recorder:
        run(transformer_on_map, tensors, settings)
    assert not [name for name in recorder.names() if "copy" in name or "clone" in name or "empty" in name]


@pytest.mark.parametrize("live", ["path1", "path2", "unscaled path"])
def test_drop_path_with_kernels_drops_the_same_sequences(live):
    """In map order or in sequence order, the decisions are drawn in the same order."""
    tensors, settings = case(dict(shape=(3, 4, 6, 24), heads=2, patch=(2, 2)))
    dropout = [LIVE[live]] * 2
    torch.manual_seed(2)
    expected = run(transformer_on_map, tensors, settings, dropout=dropout, backend="reference")
    with fake_backend(COMPOSED):
        torch.manual_seed(2)
        out = run(transformer_on_map, tensors, settings, dropout=dropout)
    torch.testing.assert_close(out, expected)


def test_attention_dropout_with_kernels_for_the_rest():
    tensors, settings = case(SIZES)
    dropout = [LayerDropout(attention=0.2)] * 2
    torch.manual_seed(2)
    expected = run(transformer_on_map, tensors, settings, dropout=dropout, backend="reference")
    with fake_backend(COMPOSED), Recorder() as recorder:
        torch.manual_seed(2)
        out = run(transformer_on_map, tensors, settings, dropout=dropout)
    torch.testing.assert_close(out, expected)
    assert recorder.ours() == [f"{name}.{NAME}" for name in COMPOSED if name != "patch_attention"] * 2


# ------------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    "change, error, says",
    [
        (dict(x=None), TypeError, ("transformer_on_map: x is", "torch.Tensor is wanted")),
        (dict(x=lambda x: x[0]), ValueError, ("transformer_on_map: x has shape (24, 4, 6)", "(B, d, H, W)")),
        (dict(x=lambda x: x[:, :, :0]), ValueError, ("transformer_on_map: x is an empty map of 0 × 6",)),
        (dict(x=lambda x: x.int()), TypeError, ("x is torch.int32",)),
        (dict(x=lambda x: x[:, :23]), ValueError, ("norm1_weight has shape (24,)", "(23,) is wanted")),
        (dict(x=lambda x: x.double()), TypeError, ("norm_weight is torch.float32", "torch.float64")),
        (dict(layers=[]), ValueError, ("transformer_on_map: layers is empty",)),
        (dict(num_heads=0), ValueError, ("transformer_on_map: num_heads is 0",)),
        (dict(num_heads=5), ValueError, ("transformer: layers[0]: qkv_weight has 72 rows", "15")),
        (dict(patch_size=(0, 2)), ValueError, ("transformer_on_map: patch_size is (0, 2)",)),
        (dict(patch_size=None), ValueError, ("transformer_on_map: patch_size is None",)),
        (
            dict(dropout=[LayerDropout(mlp=0.1)]),
            ValueError,
            ("transformer_on_map: dropout has 1 entries for 2 layers",),
        ),
        (dict(eps=0.0), ValueError, ("eps is 0.0", "positive")),
        (dict(backend="fast"), ValueError, ("unknown backend 'fast'",)),
    ],
    ids=lambda v: ",".join(v) if isinstance(v, dict) else "",
)
def test_refuses(change, error, says):
    tensors, settings = case(SIZES)
    arguments = {**structured("transformer", tensors), **settings}
    for name, value in change.items():
        arguments[name] = value(arguments[name]) if callable(value) else value
    with pytest.raises(error) as raised:
        transformer_on_map(**arguments)
    for fragment in says:
        assert fragment in str(raised.value)


def test_a_patch_size_of_one_number():
    tensors, settings = case(SIZES)
    expected = run(transformer_on_map, tensors, settings)
    assert torch.equal(run(transformer_on_map, tensors, {**settings, "patch_size": 2}), expected)
