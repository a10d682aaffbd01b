# SPDX-License-Identifier: Apache-2.0
"""``torch.compile`` of what has Triton's kernels: layers, with the same values; and an accelerated network, whose
kernels are chosen automatically as on a GPU, and nothing is launched: one graph, all of whose operators are ours, and
one more for all other sizes. backends/triton/test_backend.py runs this file in a process of its own, like
interpreted.py:

    TRITON_INTERPRET=1 python -m pytest tests/gates/interpreted_compile.py
"""

import contextlib
from collections import Counter

import pytest
import torch
from functorch.compile import make_boxed_func
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters

import mvit_kernels
from mvit_kernels import backends
from mvit_kernels.backends.triton.target import INTERPRETED
from mvit_kernels.ops import transformer_on_map
from support.layers import layer_of, operators_of, weights_of

assert INTERPRETED, "run it with TRITON_INTERPRET=1"
launch = pytest.importorskip("mvit_kernels.backends.triton._launch")
SIZES = [(2, 32), (3, 48), (5, 64), (4, 80), (2, 48)]  # images, pixels


class Network(nn.Module):
    """The stem of timm's mobilevit_xxs and its first block, with one transformer layer."""

    def __init__(self):
        super().__init__()
        timm = pytest.importorskip("timm")
        whole = timm.create_model("mobilevit_xxs")
        self.stem, self.widen = whole.stem, nn.Conv2d(16, 48, 1)
        self.block = next(m for m in whole.modules() if type(m).__name__ == "MobileVitBlock")
        self.block.transformer = self.block.transformer[:1]

    def forward(self, x):
        return self.block(self.widen(self.stem(x))).mean((2, 3))


@pytest.fixture
def chosen(monkeypatch):
    """Triton is the automatic choice, as on a GPU, and launches nothing."""
    monkeypatch.setitem(backends.PREFERENCE, "cpu", ("triton", "reference"))
    monkeypatch.setattr(launch.Plan, "__call__", lambda *given: None)
    backends._choices.clear()
    torch._dynamo.reset()
    counters.clear()
    yield
    backends._choices.clear()
    torch._dynamo.reset()


@pytest.mark.parametrize("training", [True, False], ids=["training", "inference"])
def test_one_graph_and_one_for_all_other_sizes(chosen, training):
    """Forward, loss and backward under autocast. The second size makes batch and sides symbolic, on which kernels are
    chosen, refused and divided into no further cases; a graph break would raise."""
    model = mvit_kernels.accelerate(Network().train(training).to(memory_format=torch.channels_last), strict=True)
    operators = []

    def keep(graph, inputs):
        operators.append(Counter(str(node.target) for node in graph.graph.nodes if node.op == "call_function"))
        return make_boxed_func(graph.forward)

    def step(x, target):
        with torch.autocast("cpu", torch.bfloat16):
            out = model(x)
        return nn.functional.cross_entropy(out.float(), target)

    counter = CompileCounterWithBackend(aot_autograd(fw_compiler=keep, bw_compiler=keep))
    compiled = torch.compile(step, fullgraph=True, backend=counter)
    graphs = []
    for images, side in SIZES:
        x = torch.randn(images, 3, side, side).to(memory_format=torch.channels_last)
        with contextlib.nullcontext() if training else torch.no_grad():
            loss = compiled(x, torch.zeros(images, dtype=torch.long))
            if training:
                loss.backward()
        graphs.append(counter.frame_count)
    assert graphs == [1, 2, 2, 2, 2] and not counters["graph_break"]

    assert len(operators) == (4 if training else 2)
    for names in operators:
        ours = {name.split(".")[1]: n for name, n in names.items() if name.startswith("mvit_kernels.")}
        assert all(name.endswith(".triton") for name in names if name.startswith("mvit_kernels."))
        theirs = [name for name in names if "norm" in name and not name.startswith("mvit_kernels.")]
        backward = "_backward" if any(name.endswith("_backward") for name in ours) else ""
        if training:  # the stem's batch norm and the block's three
            assert ours == {
                f"batch_norm_activation{backward}": 4,
                f"transformer_layer{backward}": 1,
                f"layer_norm{backward}": 1,
            }
            assert not theirs and not [name for name in names if "silu" in name or "sigmoid" in name]
        else:
            assert ours == {"transformer_layer": 1, "layer_norm": 1}


@pytest.mark.parametrize("function", [operators_of, layer_of])
def test_compiles_whole(function):
    """One graph, forward and backward, with the operators themselves in it; the same values."""
    layer = weights_of(32, torch.float32)
    x = torch.randn(1, 4, 4, 32, requires_grad=True)
    expected = function(x, layer)
    gradients = torch.autograd.grad(expected.square().sum(), [x, *layer])
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    out = compiled(x, layer)
    assert torch.equal(out, expected)
    for ours, eager in zip(torch.autograd.grad(out.square().sum(), [x, *layer]), gradients, strict=True):
        torch.testing.assert_close(ours, eager, rtol=1e-6, atol=1e-6)


def test_a_map_with_live_dropout_compiles_whole():
    """Under autocast: casts of all weights at once, seeds, layers and the final LayerNorm in one graph. Without
    inductor's own random numbers the values are those of eager mode."""
    layers, norm = [weights_of(16, torch.float32) for _ in range(2)], tuple(weights_of(16, torch.float32)[:2])
    leaves = [t for layer in layers for t in layer] + list(norm)
    x = torch.randn(2, 16, 2, 4, requires_grad=True)
    dropout = [mvit_kernels.LayerDropout(projection=0.2, mlp=0.3, path2=0.4)] * 2

    def function(x):
        with torch.autocast("cpu", torch.bfloat16):
            return transformer_on_map(
                x, layers, norm, num_heads=4, patch_size=(2, 2), dropout=dropout, backend="triton"
            )

    def evaluated(function):
        torch.manual_seed(4)
        out = function(x)
        return out, *torch.autograd.grad(out.float().square().sum(), [x, *leaves])

    eager = evaluated(function)
    with torch._inductor.config.patch(fallback_random=True):
        compiled = evaluated(torch.compile(function, fullgraph=True))
    for ours, expected in zip(compiled, eager, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)
    again = evaluated(function)
    assert all(torch.equal(first, second) for first, second in zip(again, eager, strict=True))
