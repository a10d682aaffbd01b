# SPDX-License-Identifier: Apache-2.0
"""``torch.compile(fullgraph=True)`` and ``torch.export``: one graph, the same values, no recompile storm."""

import importlib

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import mvit_kernels
from mvit_kernels._utils.third_party import import_timm
from mvit_kernels.backends import use_backend
from mvit_kernels.backends.library import raw
from mvit_kernels.dropout import LayerDropout
from mvit_kernels.ops import transformer_on_map
from mvit_kernels.ops.transformer import flatten
from support import models
from support.cases import convert, make, structured
from support.fake_backend import NAME, fake_backend
from support.recorder import Recorder

# the modules: `mvit_kernels.ops` gives the functions of the same names
layer_norm_linear, patch_attention, linear_residual, layer_norm_mlp = (
    importlib.import_module(f"mvit_kernels.ops.{name}")
    for name in ("layer_norm_linear", "patch_attention", "linear_residual", "layer_norm_mlp")
)
OURS = ("layer_norm_linear", "patch_attention", "linear_residual", "layer_norm_mlp")


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def weights(layers=1, d=24, heads=2, dtype=torch.float32):
    """The arguments of a stack, except its map."""
    tensors, settings = make("transformer", dict(shape=(1, 2, 2, d), heads=heads, patch=(2, 2), layers=layers))
    arguments = structured("transformer", convert(tensors, dtype))
    return arguments["layers"], arguments["final_norm"], settings


def layer_by_public_functions(x, w):
    qkv = mvit_kernels.layer_norm_linear(x, *w[:4])
    attended = mvit_kernels.patch_attention(qkv, num_heads=2, patch_size=(2, 2))
    x = mvit_kernels.linear_residual(attended, w.proj_weight, w.proj_bias, x)
    return mvit_kernels.layer_norm_mlp(x, *w[6:])


def layer_by_raw_operators(x, w):
    """A layer through the autograd functions around the raw operators, as on every backend with kernels."""

    qkv = layer_norm_linear.apply("reference", True, x, *w[:4], 1e-5, "")
    attended = patch_attention.apply("reference", True, qkv, 2, (2, 2), 12**-0.5)
    x = linear_residual.apply("reference", True, attended, w.proj_weight, w.proj_bias, x)
    return layer_norm_mlp.apply("reference", True, x, *w[6:], 1e-5)


def differentiated(function, x, w):
    """The result and the gradients of x and of every weight."""
    x, w = x.detach().requires_grad_(), type(w)(*(t.detach().requires_grad_() for t in w))
    out = function(x, w)
    return out.detach(), *torch.autograd.grad(out.square().sum(), (x, *w))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_raw_operators_with_their_gradients(backend):
    """One graph, and the strides that were traced: the map is NCHW in memory."""
    (w,), _, _ = weights(dtype=torch.float64)
    x = torch.randn(2, 24, 4, 6, dtype=torch.float64).permute(0, 2, 3, 1)
    compiled = torch.compile(layer_by_raw_operators, fullgraph=True, backend=backend)
    for ours, expected in zip(
        differentiated(compiled, x, w), differentiated(layer_by_public_functions, x, w), strict=True
    ):
        torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-10)


def test_public_functions_with_their_gradients():
    (w,), _, _ = weights(dtype=torch.float64)
    x = torch.randn(2, 4, 6, 24, dtype=torch.float64)
    compiled = torch.compile(layer_by_public_functions, fullgraph=True, backend="aot_eager")
    for ours, expected in zip(
        differentiated(compiled, x, w), differentiated(layer_by_public_functions, x, w), strict=True
    ):
        torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-10)


def test_public_functions_under_autocast():
    (w,), _, _ = weights()
    x = torch.randn(2, 4, 6, 24)

    def step(x, w):
        with torch.autocast("cpu", torch.bfloat16):
            return layer_by_public_functions(x, w)

    expected = step(x, w)
    out = torch.compile(step, fullgraph=True, backend="aot_eager")(x, w)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out, expected)


def test_operators_for_inference():
    layers, final_norm, settings = weights(layers=2)
    block, more = make("inverted_residual", dict(shape=(2, 4, 6, 24), hidden=48, out=24))
    block = convert(block, torch.float32)

    def public(x):
        x = mvit_kernels.inverted_residual(x, *list(block.values())[1:], **more)
        return mvit_kernels.transformer(x, layers, final_norm, **settings)

    def raw_operators(x):
        x = raw("inverted_residual", "reference")(x, *list(block.values())[1:], *more.values())
        return raw("transformer", "reference")(x, flatten(layers), *final_norm, *settings.values())

    x = block["x"]
    with torch.no_grad():
        expected = public(x)
        for function in (public, raw_operators):
            out = torch.compile(function, fullgraph=True, backend="aot_eager")(x)
            torch.testing.assert_close(out, expected)


def test_no_recompile_storm():
    """After the first two sizes, one graph serves any: multi-scale training must not compile each one anew."""
    layers, final_norm, settings = weights()
    counter = CompileCounterWithBackend("aot_eager")

    def function(x):
        return transformer_on_map(x, layers, final_norm, **settings)

    compiled = torch.compile(function, fullgraph=True, backend=counter)

    def graphs_after(*shapes):
        for batch, height, width in shapes:
            x = torch.randn(batch, 24, height, width)
            torch.testing.assert_close(compiled(x), function(x))
        return counter.frame_count

    with torch.no_grad():
        assert graphs_after((2, 4, 6), (3, 4, 6), (5, 4, 6)) == 2
        graphs = graphs_after((4, 6, 8))
        assert graphs <= 3
        assert graphs_after((4, 8, 6), (3, 14, 6), (7, 8, 16), (2, 16, 16)) == graphs


def test_raw_operators_with_a_dynamic_batch():
    (w,), _, _ = weights(dtype=torch.float64)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer_by_raw_operators, fullgraph=True, backend=counter, dynamic=True)
    for batch in (2, 3, 7):
        x = torch.randn(batch, 4, 6, 24, dtype=torch.float64)
        for ours, expected in zip(
            differentiated(compiled, x, w), differentiated(layer_by_public_functions, x, w), strict=True
        ):
            torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-10)
    assert counter.frame_count == 1


def test_the_choice_is_folded_and_guarded():
    """The chosen kernels are in the graph, the choosing is not; another choice makes another graph."""
    (w,), _, _ = weights()
    graphs = []

    def keep(graph, inputs):
        graphs.append([str(node.target) for node in graph.graph.nodes if node.op == "call_function"])
        return graph

    x = torch.randn(2, 4, 6, 24)
    with fake_backend(OURS), torch.no_grad():
        compiled = torch.compile(layer_by_public_functions, fullgraph=True, backend=keep)
        expected = layer_by_public_functions(x, w)
        torch.testing.assert_close(compiled(x, w), expected)
        assert [name for name in graphs[-1] if "mvit" in name] == [f"mvit_kernels.{name}.{NAME}" for name in OURS]
        with use_backend("reference"):
            torch.testing.assert_close(compiled(x, w), expected)
        assert len(graphs) == 2 and not [name for name in graphs[-1] if "mvit" in name]
        compiled(x, w)
        assert len(graphs) == 2


@pytest.mark.parametrize("size", [(4, 6), (5, 7)])
def test_live_dropout(size):
    layers, final_norm, settings = weights()
    dropout = [LayerDropout(projection=0.2, mlp=0.2, path1=0.2, path2=0.2)]

    def function(x):
        return transformer_on_map(x, layers, final_norm, dropout=dropout, **settings)

    x = torch.randn(2, 24, *size)
    torch.manual_seed(0)
    expected = function(x)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    compiled(x)
    torch.manual_seed(0)
    torch.testing.assert_close(compiled(x), expected)
    assert not torch.allclose(compiled(x), expected), "the draws are the same each time"


# -------------------------------------------------------------------------------------------------------------- export


class Stack(torch.nn.Module):
    def __init__(self):
        super().__init__()
        layers, final_norm, self.settings = weights(layers=2)
        self.layers = torch.nn.ModuleList(torch.nn.ParameterList(layer) for layer in layers)
        self.final_norm = torch.nn.ParameterList(final_norm)

    def forward(self, x):
        layers = [mvit_kernels.TransformerLayerWeights(*layer) for layer in self.layers]
        return transformer_on_map(x, layers, tuple(self.final_norm), **self.settings)


@pytest.mark.parametrize("size, strict", [((4, 6), False), ((5, 7), False), ((5, 7), True)])
def test_export_is_plain_pytorch(size, strict):
    """Whichever backend would serve the model, even one asked for by name; the batch size stays dynamic."""
    model = Stack().eval()
    x = torch.randn(2, 24, *size)
    expected = model(x)
    with fake_backend((*OURS, "transformer")), use_backend(NAME):
        with torch.no_grad(), Recorder() as recorder:
            model(x)
        assert recorder.ours() == [f"transformer.{NAME}"]
        batch = torch.export.Dim("batch", min=1, max=64)
        exported = torch.export.export(model, (x,), dynamic_shapes={"x": {0: batch}}, strict=strict)
    targets = {str(node.target) for node in exported.graph.nodes if node.op == "call_function"}
    assert targets and not [target for target in targets if "mvit" in target]
    torch.testing.assert_close(exported.module()(x), expected)
    x = torch.randn(3, 24, *size)
    torch.testing.assert_close(exported.module()(x), model(x))


# ------------------------------------------------------------------------------------------------------------ the model


def losses(model, x):
    return model(x).square().sum()


def test_accelerated_timm_model_in_evaluation():
    """In one graph, up to the first block, whose map of 9 × 9 is resized. (A whole network is compiled for evaluation
    in nn/test_mobilevit.py.)"""
    model = models.accelerated(models.first_block()).double()
    x = models.images(2, 72, 72).double()
    with torch.no_grad():
        ours = torch.compile(losses, fullgraph=True, backend="aot_eager")(model, x)
        torch.testing.assert_close(ours, losses(model, x), rtol=1e-10, atol=0)


def test_accelerated_timm_model_in_training():
    """mobilevit_xxs in one graph, with the gradients of every parameter."""
    timm = import_timm()
    torch.manual_seed(0)
    model = mvit_kernels.accelerate(timm.create_model("mobilevit_xxs", num_classes=10), strict=True)
    model.double().train()
    x = torch.randn(2, 3, 96, 96, dtype=torch.float64)  # stage 5 has a map of 3 × 3: resized
    compiled = torch.compile(losses, fullgraph=True, backend="aot_eager")
    results = []
    for function in (compiled, losses):
        before = {name: buffer.clone() for name, buffer in model.named_buffers()}
        gradients = torch.autograd.grad(function(model, x), list(model.parameters()))
        after = {name: buffer.clone() for name, buffer in model.named_buffers()}
        results.append([*zip((name for name, _ in model.named_parameters()), gradients, strict=True), *after.items()])
        model.load_state_dict(before, strict=False)
    largest = max(value.abs().max().item() for _, value in results[1])
    for (name, ours), (_, expected) in zip(*results, strict=True):
        assert (ours - expected).abs().max() <= 1e-10 * largest, name
