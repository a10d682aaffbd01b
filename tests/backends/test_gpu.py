# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels on the device itself: what neither the interpreter nor the compiler can show.

Where there is a GPU, the operators' own tests have it as one more path; here are stages at their full size, streams,
CUDA graphs, tensors of more than 2³¹ elements, and compiled graphs. Without a GPU it says "no GPU" and skips. What
needs no GPU runs in Triton's interpreter as well, at the same shapes where those are small:

    TRITON_INTERPRET=1 python -m pytest tests/backends/test_gpu.py
"""

import copy
import gc

import pytest
import torch

import mvit_kernels
from mvit_kernels import LayerDropout, backends
from mvit_kernels.backends import triton
from mvit_kernels.dropout import ATTENTION_BRANCH, MLP_BRANCH, branch_factor
from mvit_kernels.ops import transformer_on_map
from support.cases import NARROW, call, convert, differentiable_on, evaluate, make
from support.checks import check, check_same_bits
from support.tolerance import assert_close_as_pytorch

DEVICE = triton.BACKEND.device_type  # "cuda", or "cpu" where Triton interprets
HAS_GPU = torch.cuda.is_available()
if DEVICE == "cuda" and not HAS_GPU:
    pytest.skip("no GPU", allow_module_level=True)
if why := backends.unavailable("triton", DEVICE):
    if "compute capability" not in why[0]:
        raise RuntimeError(f"there is a GPU, and the Triton backend cannot use it: {'; '.join(why)}")
    pytest.skip(why[0], allow_module_level=True)

needs_gpu = pytest.mark.skipif(DEVICE != "cuda", reason="no GPU: Triton's interpreter has no streams and no graphs")

STAGES = [  # d, side of the map at 256 px
    *((64, 32), (80, 16), (96, 8)),  # xxs
    *((96, 32), (120, 16), (144, 8)),  # xs
    *((144, 32), (192, 16), (240, 8)),  # s
]
LIVE = dict(projection=0.1, mlp=0.2, path1=0.3, path2=0.4)


def leaves_of(operator, sizes, dtype=torch.float32, device=DEVICE):
    tensors, settings = make(operator, sizes)
    tensors = convert(tensors, dtype, torch.float32 if operator == "transformer_layer" else None, device)
    return {name: t if t is None else t.requires_grad_() for name, t in tensors.items()}, settings


def forward_and_backward(operator, tensors, settings):
    """The result and all gradients, for a gradient of ones."""
    out = call(operator, tensors, settings, "triton")
    return [out.detach(), *torch.autograd.grad(out, [t for t in tensors.values() if t is not None], out.detach())]


# ----------------------------------------------------------------------------------------------------- full-size stages


@needs_gpu
@pytest.mark.parametrize(
    "d, side, dtype",
    [*((*stage, "bfloat16") for stage in STAGES), (64, 32, "float32"), (240, 8, "float32"), (144, 32, "float16")],
    ids=str,
)
def test_a_layer_of_every_stage(d, side, dtype):
    check("transformer_layer", dict(shape=(2, side, side, d), heads=4, patch=(2, 2)), dtype=dtype, path="triton")


@needs_gpu
@pytest.mark.parametrize("d, side", [(64, 32), (144, 32), (240, 8)], ids=str)
def test_a_layer_with_live_dropout(d, side):
    sizes = dict(shape=(2, side, side, d), heads=4, patch=(2, 2), dropout=LIVE)
    check("transformer_layer", sizes, dtype="bfloat16", path="triton")


@needs_gpu
@pytest.mark.parametrize(
    "head_dim, tokens, dtype",
    [  # each is a compilation or two
        *((head_dim, (8, 8), "bfloat16") for head_dim in (8, 16, 17, 20, 24, 30, 33, 36, 48, 60, 64, 100, 256)),
        *((36, tokens, "bfloat16") for tokens in ((1, 1), (4, 4), (7, 7), (15, 16), (16, 16), (25, 41), (32, 32))),
        *((head_dim, (7, 7), "float32") for head_dim in (8, 20, 48, 100)),
        (30, (16, 16), "float16"),
    ],
    ids=str,
)
def test_attention_of_every_head(head_dim, tokens, dtype):
    sizes = dict(shape=(1, 2 * tokens[0], tokens[1]), heads=2, head_dim=head_dim, patch=(2, 1))
    check("patch_attention", sizes, dtype=dtype, path="triton")


@needs_gpu
@pytest.mark.parametrize("rows", [1, 63, 65, 8191, 8193, 40000])
def test_row_counts(rows):
    """One row, ragged tiles, and both sides of the limits at which other programs are launched."""
    check("linear_residual", dict(shape=(rows, 80), n=96), dtype="bfloat16", path="triton")
    check("layer_norm", dict(shape=(rows, 120)), dtype="bfloat16", path="triton")
    check("layer_norm_linear", dict(shape=(rows, 80), n=240), dtype="bfloat16", path="triton")
    check("layer_norm_mlp", dict(shape=(rows, 96), hidden=192), dtype="bfloat16", path="triton")


@pytest.mark.parametrize("operator", differentiable_on("triton"))
def test_the_same_bits_every_time(operator):
    check_same_bits(operator, NARROW[operator], "triton")


def test_tf32_where_it_is_allowed():
    tensors, settings = leaves_of("linear_residual", dict(shape=(64, 64), n=64))
    exact = call("linear_residual", tensors, settings, "triton")
    torch.set_float32_matmul_precision("high")
    try:
        rounded = call("linear_residual", tensors, settings, "triton")
    finally:
        torch.set_float32_matmul_precision("highest")
    assert 1e-5 < (exact - rounded).abs().max() < 1e-2


def test_the_mask_is_the_reference_s():
    """Bit by bit, on the device: kernels and PyTorch's integer arithmetic compute the same Philox numbers."""
    tensors, settings = leaves_of("transformer_layer", NARROW["transformer_layer"])
    seed = torch.tensor([2**62 + 3, 2**61 + 5], device=DEVICE)
    with torch.no_grad():
        for name, t in tensors.items():
            if t is not None and not name.startswith("norm"):
                t.zero_()
        for place, branch, live in (("proj", ATTENTION_BRANCH, (0.3, 0.4)), ("fc2", MLP_BRANCH, (0.25, 0.5))):
            tensors["proj_bias"].fill_(float(place == "proj"))
            tensors["fc2_bias"].fill_(float(place == "fc2"))
            fields = ("projection", "path1") if place == "proj" else ("mlp", "path2")
            dropout = LayerDropout(**dict(zip(fields, live, strict=True)))
            out = call("transformer_layer", tensors, {**settings, "dropout": dropout, "seed": seed}, "triton")
            factor = branch_factor(seed, branch, out.shape, *live, (2, 2), True)
            assert torch.equal(out != 0, factor != 0)
            torch.testing.assert_close(out, factor.float(), rtol=1e-6, atol=0)


# --------------------------------------------------------------------------------------------- streams, graphs, devices


@needs_gpu
@pytest.mark.parametrize("operator", differentiable_on("triton"))
def test_the_current_stream(operator):
    """Inputs arrive late on a stream of their own: a kernel on another stream would read the old values."""
    tensors, settings = leaves_of(operator, NARROW[operator])
    expected = forward_and_backward(operator, tensors, settings)
    late = {name: None if t is None else torch.full_like(t, 7.0).requires_grad_() for name, t in tensors.items()}
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)  # clock cycles, about 50 ms
        with torch.no_grad():
            for name, t in late.items():
                if t is not None:
                    t.copy_(tensors[name])
        results = forward_and_backward(operator, late, settings)
    stream.synchronize()
    for ours, wanted in zip(results, expected, strict=True):
        assert torch.equal(ours, wanted)


def captured(function):
    """A CUDA graph of `function()`, after a warm-up on the capturing stream, and its results."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = function()
    return graph, results


@needs_gpu
@pytest.mark.parametrize("operator", differentiable_on("triton"))
def test_a_cuda_graph(operator):
    """Forward and backward are captured; a replay computes from the inputs' current values."""
    tensors, settings = leaves_of(operator, NARROW[operator], torch.bfloat16)
    graph, results = captured(lambda: forward_and_backward(operator, tensors, settings))
    first = next(iter(tensors))
    for seed in (1, 2):
        with torch.no_grad():
            generator = torch.Generator(DEVICE).manual_seed(seed)
            tensors[first].copy_(torch.randn(tensors[first].shape, generator=generator, device=DEVICE))
        graph.replay()
        replayed = [t.clone() for t in results]
        for ours, wanted in zip(replayed, forward_and_backward(operator, tensors, settings), strict=True):
            assert torch.equal(ours, wanted)


@needs_gpu
def test_a_cuda_graph_draws_new_masks():
    """Each replay drops different elements, backward drops what forward dropped, and the generator's seed decides."""
    tensors, settings = leaves_of("transformer_layer", NARROW["transformer_layer"])
    with torch.no_grad():
        for name, t in tensors.items():
            if t is not None and not name.startswith("norm"):
                t.fill_(1.0 if name == "fc2_bias" else 0.0)
    settings |= {"dropout": LayerDropout(mlp=0.5)}
    graph, results = captured(lambda: forward_and_backward("transformer_layer", tensors, settings))
    masks = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        for _ in range(2):
            graph.replay()
            out, gradient = results[0].clone(), results[list(tensors).index("fc2_bias") + 1].clone()
            torch.testing.assert_close(gradient, (out * out).flatten(0, 2).sum(0))  # Σ factor · grad, and grad is out
            masks.append(out)
    assert 0.3 < (masks[0] == 0).double().mean() < 0.7
    assert not torch.equal(masks[0], masks[1]), "two replays dropped the same"
    assert torch.equal(masks[0], masks[2]) and torch.equal(masks[1], masks[3]), "the seed does not govern"
    assert not torch.equal(masks[0], masks[4])


@needs_gpu
def test_another_device_than_the_current_one():
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU")
    expected = forward_and_backward("transformer_layer", *leaves_of("transformer_layer", NARROW["transformer_layer"]))
    tensors, settings = leaves_of("transformer_layer", NARROW["transformer_layer"], device="cuda:1")
    for ours, wanted in zip(forward_and_backward("transformer_layer", tensors, settings), expected, strict=True):
        assert ours.device.index == 1 and torch.equal(ours.to("cuda:0"), wanted)


# ------------------------------------------------------------------------------------------- more than 2³¹ elements


def enough_memory(gigabytes):
    gc.collect()
    torch.cuda.empty_cache()
    free = torch.cuda.mem_get_info()[0] / 2**30
    if free < gigabytes:
        pytest.skip(f"{free:.0f} GB of GPU memory are free, and {gigabytes} are needed")


@needs_gpu
@pytest.mark.parametrize(
    "operator, sizes, images, gigabytes",
    [
        ("layer_norm", dict(shape=(1, 64, 64, 240)), 2200, 24),  # 2.16e9 elements of x
        ("linear_residual", dict(shape=(1, 64, 64, 16), n=512), 1030, 24),  # of the result
        ("layer_norm_linear", dict(shape=(1, 64, 64, 64), n=720), 740, 16),
        ("layer_norm_mlp", dict(shape=(1, 64, 64, 240), hidden=32), 2200, 24),
        ("patch_attention", dict(shape=(1, 64, 64), heads=4, head_dim=60, patch=(2, 2)), 740, 16),  # of qkv
        ("transformer_layer", dict(shape=(1, 64, 64, 240), heads=4, patch=(2, 2)), 1100, 56),  # of qkv and hidden
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_more_elements_than_32_bits_count(operator, sizes, images, gigabytes):
    """The last image of a batch is right, forward and backward: a 32-bit offset would miss it."""
    enough_memory(gigabytes)
    one, settings = make(operator, sizes)
    one = convert(one, torch.bfloat16, device=DEVICE)
    maps = {name for name in one if name in ("x", "qkv", "residual")}

    def run(t, path, count):
        batch = {}
        for name, value in t.items():
            if name in maps and count > 1:
                value = value.expand(count, *value.shape[1:]).contiguous()
                value[: count - 1] *= 0.5  # the last image is like no other
            batch[name] = value if value is None else value.detach().requires_grad_(name in maps)
        out = call(operator, batch, settings, path)
        generator = torch.Generator().manual_seed(0)
        grad = torch.randn((1, *out.shape[1:]), generator=generator).to(torch.bfloat16).to(out.device, out.dtype)
        grads = torch.autograd.grad(out, [batch[name] for name in sorted(maps)], grad.expand(out.shape).contiguous())
        return [out.detach()[-1:].cpu(), *(g[-1:].cpu() for g in grads)]

    ours, usual = run(one, "triton", images), run(one, "usual", 1)
    truth = run(convert(one, torch.float64), "oracle", 1)
    for name, *values in zip(["out", *sorted(maps)], ours, usual, truth, strict=True):
        assert_close_as_pytorch(f"{operator}, image {images}: {name}", *values)


# ------------------------------------------------------------------------------------------------ maps, blocks, compile


def a_map(dtype=torch.float32, d=48, layers=2):
    tensors, _ = make("transformer", dict(shape=(2, 4, 6, d), heads=4, patch=(2, 2), layers=layers))
    tensors = {name: t.to(DEVICE, dtype).requires_grad_() for name, t in tensors.items()}
    weights = list(tensors.values())[1:-2]
    stack = [mvit_kernels.TransformerLayerWeights(*weights[i : i + 12]) for i in range(0, len(weights), 12)]
    x = tensors["x"].detach().permute(0, 3, 1, 2).requires_grad_()
    return x, stack, tuple(tensors.values())[-2:]


@needs_gpu  # in the interpreter it is a test in gates/interpreted.py
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
@pytest.mark.parametrize("live", [False, True])
def test_compiles_whole(live, mode):
    """Under autocast, forward and backward in one graph each. With inductor's random numbers left to PyTorch, the
    values are those of eager mode."""
    x, layers, norm = a_map()
    leaves = [x, *(t for layer in layers for t in layer), *norm]
    dropout = [LayerDropout(projection=0.2, mlp=0.3, path2=0.4)] * 2 if live else None

    def function(x):
        with torch.autocast(DEVICE, torch.bfloat16):
            return transformer_on_map(
                x, layers, norm, num_heads=4, patch_size=(2, 2), dropout=dropout, backend="triton"
            )

    def evaluated(function):
        torch.manual_seed(4)
        out = function(x)
        return [t.clone() for t in (out, *torch.autograd.grad(out.float().square().sum(), leaves))]

    eager = evaluated(function)
    torch._dynamo.reset()
    with torch._inductor.config.patch(fallback_random=True):
        compiled = torch.compile(function, fullgraph=True, mode=mode)
        for _ in range(1 if mode == "default" else 3):  # the third call replays a CUDA graph
            results = evaluated(compiled)
    if mode == "default" or not live:  # graphs of their own draw from offsets of their own
        for ours, expected in zip(results, eager, strict=True):
            torch.testing.assert_close(ours, expected, rtol=2e-2, atol=2e-2)
    else:
        assert all(t.isfinite().all() for t in results)


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_block_of_timm_s(dtype):
    """Accelerated against timm's own, both against float64: the result and every gradient."""
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    found = [m for m in timm.create_model("mobilevit_s").modules() if type(m).__name__ == "MobileVitBlock"]
    block = found[0].eval()  # batch norms as they are
    x = torch.randn(2, 96, 32, 32)

    def results(block, x):
        x = x.requires_grad_()
        out = block(x)
        parameters = [p for p in block.parameters() if p.requires_grad]
        return [t.detach() for t in (out, *torch.autograd.grad(out, [x, *parameters], torch.ones_like(out)))]

    theirs = copy.deepcopy(block).to(DEVICE, dtype)
    ours = mvit_kernels.accelerate(copy.deepcopy(theirs), backend="triton", strict=True)
    on_device = x.to(DEVICE, dtype)
    truth = results(copy.deepcopy(theirs).cpu().double(), on_device.detach().cpu().double())
    both = results(ours, on_device.detach().clone()), results(theirs, on_device.detach().clone())
    for number, (mine, yardstick, true) in enumerate(zip(*both, truth, strict=True)):
        assert_close_as_pytorch(f"result {number}", mine, yardstick, true)


@needs_gpu
def test_memory_of_a_training_step():
    """What a block's forward leaves allocated, under autocast: at most half of what timm's leaves."""
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    found = [m for m in timm.create_model("mobilevit_s").modules() if type(m).__name__ == "MobileVitBlock"]
    block = found[0].to(DEVICE).train()
    fast = mvit_kernels.accelerate(copy.deepcopy(block), backend="triton", strict=True)
    x = torch.randn(16, 96, 32, 32, device=DEVICE).to(memory_format=torch.channels_last)

    def left(block):
        with torch.autocast(DEVICE, torch.bfloat16):
            block(x).sum().backward()  # so that libraries' workspaces and the gradients are allocated
            torch.cuda.synchronize()
            before = torch.cuda.memory_allocated()
            out = block(x)
            kept = torch.cuda.memory_allocated() - before - out.nbytes
        out.sum().backward()
        return kept

    theirs, ours = left(block), left(fast)
    assert 2 * ours <= theirs, f"{ours / 2**20:.1f} MB, and timm's block {theirs / 2**20:.1f}"


def test_evaluate_runs_here():
    """This file's helper works for every operator on this device."""
    for operator in differentiable_on("triton"):
        tensors, settings = leaves_of(operator, NARROW[operator])
        names = [name for name, t in tensors.items() if t is not None]
        assert len(forward_and_backward(operator, tensors, settings)) == 1 + len(names)
        plain = {name: None if t is None else t.detach() for name, t in tensors.items()}
        assert len(evaluate(lambda t: call(operator, t, settings, "triton"), plain, True)) == 1 + len(names)  # noqa: B023
