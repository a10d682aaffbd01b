# SPDX-License-Identifier: Apache-2.0
"""What cannot see inside raw operators: forward-mode AD, torch.func's transforms, and gradients of gradients."""

import copy
import functools

import pytest
import torch
from torch.autograd import forward_ad
from torch.func import functional_call, functionalize, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

import mvit_kernels
from mvit_kernels import freeze
from mvit_kernels._utils import transforms
from mvit_kernels.rounding import RoundedArithmetic
from support import models
from support.cases import DIFFERENTIABLE, SMALL, call, convert, make
from support.fake_backend import NAME, fake_backend
from support.models import fast_calls, output
from support.recorder import Recorder
from support.tolerance import assert_close_as_pytorch

NO_DROPOUT = {**SMALL, "transformer_layer": {**SMALL["transformer_layer"], "dropout": None}}


def normal(*shape, seed=5):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ----------------------------------------------------------------------------------------------------------- operators


def dual(function, x, tangent):
    with torch.no_grad(), forward_ad.dual_level():
        return forward_ad.unpack_dual(function(forward_ad.make_dual(x, tangent)))[:]


TRANSFORMS = {
    "dual_level": dual,
    "jvp": lambda f, x, t: jvp(f, (x,), (t,)),
    "grad": lambda f, x, t: grad(lambda z: f(z).square().sum())(x),
    "vjp": lambda f, x, t: vjp(f, x)[1](f(x).detach()),
    "jacrev": lambda f, x, t: jacrev(lambda s: f(x + s * t).sum(0))(torch.zeros((), dtype=x.dtype)),
    "jacfwd": lambda f, x, t: jacfwd(lambda s: f(x + s * t).sum(0))(torch.zeros((), dtype=x.dtype)),
    "hessian": lambda f, x, t: hessian(lambda s: f(x + s * t).square().sum())(torch.zeros((), dtype=x.dtype)),
    "functionalize": lambda f, x, t: functionalize(f)(x),
    "vmap": lambda f, x, t: vmap(f)(torch.stack((x, t))),
}


@pytest.fixture(autouse=True)
def attention_with_tangents():
    """Stock models and oracles use the one form of PyTorch's attention that has derivatives of every order; ours choose
    by themselves, whatever is enabled."""
    with sdpa_kernel([SDPBackend.MATH, SDPBackend.FLASH_ATTENTION]):
        yield


def assert_all_close(ours, expected, tolerance=1e-9):
    ours, expected = torch.utils._pytree.tree_leaves(ours), torch.utils._pytree.tree_leaves(expected)
    assert len(ours) == len(expected)
    for value, truth in zip(ours, expected, strict=True):
        torch.testing.assert_close(value, truth, rtol=0, atol=tolerance * max(truth.abs().max().item(), 1.0))


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("operator", NO_DROPOUT)
def test_operators(operator, transform):
    """Right although a backend would serve everything, forward and backward; an error if it was asked for by name."""
    tensors, settings = make(operator, NO_DROPOUT[operator])
    first, x = next(iter(tensors.items()))
    tangent = normal(*x.shape)

    def transformed(path):
        return TRANSFORMS[transform](lambda z: call(operator, {**tensors, first: z}, settings, path), x, tangent)

    if transform == "vmap":
        expected = torch.stack([call(operator, {**tensors, first: z}, settings, "oracle") for z in (x, tangent)])
    else:
        expected = transformed("oracle")
    with fake_backend([operator]):
        assert_all_close(transformed(None), expected)
        with pytest.raises(mvit_kernels.BackendError, match="forward-mode AD is active|transform of torch.func"):
            transformed(NAME)
    assert_all_close(transformed("reference"), expected)


def test_a_dual_weight():
    """Only the AD level is looked at, not the tensors: a tangent may come with any of them."""
    tensors, settings = make("linear_residual", SMALL["linear_residual"])

    def function(weight, path):
        return call("linear_residual", {**tensors, "weight": weight}, settings, path)

    tangent = normal(*tensors["weight"].shape)
    with fake_backend(["linear_residual"]):
        ours = dual(lambda w: function(w, None), tensors["weight"], tangent)
    assert_all_close(ours, dual(lambda w: function(w, "oracle"), tensors["weight"], tangent))


def test_the_choice_outside_is_not_remembered_inside():
    qkv = make("patch_attention", SMALL["patch_attention"])[0]["qkv"]

    def function(qkv):
        return mvit_kernels.patch_attention(qkv, num_heads=2, patch_size=2)

    with fake_backend(["patch_attention"]) as module:
        function(qkv)
        jvp(function, (qkv,), (qkv,))
        function(qkv)
        assert len(module.asked) == 2  # the second one inside the transform, which is not part of the key


@pytest.mark.parametrize("transform", ["grad", "jvp", "vmap"])
def test_compiled_transforms(transform):
    """The transforms that torch.compile traces itself. (It cannot trace PyTorch's own layer_norm under jvp.)"""
    torch._dynamo.reset()
    tensors, settings = make("patch_attention", SMALL["patch_attention"])
    tangent = normal(*tensors["qkv"].shape)

    def transformed(qkv, path):
        return TRANSFORMS[transform](lambda z: call("patch_attention", {"qkv": z}, settings, path), qkv, tangent)

    with fake_backend(["patch_attention"]):
        ours = torch.compile(lambda qkv: transformed(qkv, None), backend="aot_eager", fullgraph=True)(tensors["qkv"])
    assert_all_close(ours, transformed(tensors["qkv"], "reference"))
    torch._dynamo.reset()


def test_asking_leaves_nothing_in_a_compiled_graph():
    torch._dynamo.reset()
    graphs = []

    def keep(graph, inputs):
        graphs.append([str(node.target) for node in graph.graph.nodes if node.op == "call_function"])
        return graph

    x = torch.randn(3, 4)
    torch.compile(lambda x: mvit_kernels.linear_residual(x, x[:2], None, x[:, :2]), backend=keep, fullgraph=True)(x)
    assert not [target for target in graphs[0] if "functorch" in target]
    torch._dynamo.reset()


# -------------------------------------------------------------------------------------------------------------- models

OF_MODELS = {
    **{name: TRANSFORMS[name] for name in ("dual_level", "jvp", "grad", "jacfwd", "hessian", "functionalize")},
    "vmap of grad": lambda f, x, t: vmap(grad(lambda image: f(image[None]).square().sum()))(x),
    "is_grads_batched": lambda f, x, t: batched(f, x.clone().requires_grad_()),
}


def batched(function, x):
    y = function(x)
    return torch.autograd.grad(y, x, torch.stack((y.detach(), y.detach().cos())), is_grads_batched=True)


WHOLE = [("timm", "dual_level"), ("huggingface", "dual_level"), ("timm", "grad")]
PARTS = [("first block", transform) for transform in OF_MODELS if ("timm", transform) not in WHOLE]


@pytest.mark.parametrize("library, transform", WHOLE + PARTS)
def test_models(library, transform):
    """Accelerated, in float64: the blocks take the fast path, composed of PyTorch's operators, and lose no tangent.
    Frozen, in float32, where everything would otherwise be one native call. Whole networks for one transform of each
    direction: up to the first block, where the yardstick is computed in a third of the time, for the others."""
    model = models.first_block() if library == "first block" else models.build(library)
    model.requires_grad_(transform != "dual_level")
    x = models.images(2, 64, 64)
    tangent = normal(*x.shape)

    def transformed(candidate, dtype):
        x_, tangent_ = x.to(dtype), tangent.to(dtype)
        values = OF_MODELS[transform](lambda z: output(candidate(z)), x_, tangent_)
        return [value.detach() for value in torch.utils._pytree.tree_leaves(values)]

    stock = copy.deepcopy(model).double()
    with sdpa_kernel(SDPBackend.MATH):
        truth = transformed(stock, torch.float64)
        pytorch = transformed(copy.deepcopy(model), torch.float32)
    with fast_calls() as calls:
        assert_all_close(transformed(models.accelerated(stock), torch.float64), truth)
    assert len(calls) >= len(models.blocks(model))

    @functools.cache
    def careful(seed):
        with RoundedArithmetic(torch.float32, seed), sdpa_kernel(SDPBackend.MATH):
            return transformed(stock, torch.float64)

    for index, value in enumerate(transformed(freeze(model), torch.float32)):
        name, sample = f"frozen, {transform}, {index}", lambda seed, index=index: careful(seed)[index]
        assert_close_as_pytorch(name, value, pytorch[index], truth[index], sample)


def test_a_transform_of_a_model_whose_backend_was_named():
    model = models.accelerated(models.build("timm"))
    x = models.images(1, 64, 64)
    with fake_backend(["transformer"]), mvit_kernels.use_backend(NAME), torch.no_grad():
        model(x)
        with pytest.raises(mvit_kernels.BackendError, match="forward-mode AD is active"):
            dual(model, x, x)


@pytest.mark.parametrize("library", ["huggingface", "timm"])
def test_other_buffers_for_one_call_of_a_frozen_model(library):
    """torch.func.functional_call swaps them in without telling the modules; packed weights would be the old ones."""
    first, second = models.build(library), models.sensible(models.build(library), seed=9)
    frozen, x = freeze(first), models.images(1, 64, 64)
    with torch.no_grad():
        expected = output(freeze(second)(x))
        before = output(frozen(x))
        ours = output(functional_call(frozen, dict(freeze(second).state_dict()), (x,)))
        assert not torch.allclose(before, expected, rtol=1e-2)
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())
        assert torch.equal(output(frozen(x)), before)


# -------------------------------------------------------------------------------------------------- second derivatives


@pytest.mark.parametrize("path", [None, "reference"])
@pytest.mark.parametrize("operator", DIFFERENTIABLE)
def test_second_derivatives(operator, path):
    """Kernels have those of the composed operators, for every tensor; first derivatives are the kernels' own."""
    sizes = SMALL if path is None else NO_DROPOUT
    tensors, settings = make(operator, sizes[operator])
    names = [name for name, value in tensors.items() if value is not None]

    def function(*values):
        return call(operator, {**tensors, **dict(zip(names, values, strict=True))}, settings, path)

    values = [tensors[name].requires_grad_() for name in names]
    with fake_backend([operator]):
        assert torch.autograd.gradcheck(function, values, fast_mode=True, check_batched_grad=True)
        assert torch.autograd.gradgradcheck(function, values, fast_mode=True)


def test_a_tensor_that_comes_in_twice():
    x = normal(3, 4, 4)

    def function(x):
        weight = x[0]
        return mvit_kernels.linear_residual(x, weight, None, x)

    with fake_backend(["linear_residual"]):
        assert torch.autograd.gradgradcheck(function, [x.requires_grad_()])


def gradient_penalty(model, x):
    """The output, and the gradients of ‖∂‖y‖²/∂x‖² with respect to images and parameters."""
    x = x.clone().requires_grad_()
    y = output(model(x))
    (slope,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    parameters = dict(model.named_parameters())
    gradients = torch.autograd.grad(slope.square().sum(), [x, *parameters.values()], allow_unused=True)
    return {
        name: torch.zeros_like(p) if g is None else g
        for (name, p), g in zip({"images": x, **parameters}.items(), gradients, strict=True)
    }


@pytest.mark.parametrize("library, backend", [("huggingface", None), ("timm", None), ("timm", "reference")])
def test_gradient_penalty(library, backend):
    model = models.build(library).double()
    x = models.images(1, 64, 64).double()
    with sdpa_kernel(SDPBackend.MATH):
        expected = gradient_penalty(model, x)
    with mvit_kernels.use_backend(backend), fast_calls() as calls:
        ours = gradient_penalty(models.accelerated(model), x)
    assert len(calls) == 3
    largest = max(value.abs().max().item() for value in expected.values())
    for name, value in expected.items():
        torch.testing.assert_close(
            ours[name], value, rtol=1e-8, atol=1e-12 * largest, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_gradient_penalty_under_autocast():
    """All layers' weights are then cast at once, and that cast has a second derivative too."""
    model = models.build("huggingface")
    x = models.images(2, 64, 64)
    penalties = []
    for candidate in (models.accelerated(model), model):
        with fake_backend(DIFFERENTIABLE), torch.autocast("cpu", torch.bfloat16):
            penalties.append(gradient_penalty(candidate, x))
    truth = gradient_penalty(copy.deepcopy(model).double(), x.double())
    for name in ("images", "mobilevit.encoder.layer.3.transformer.layer.1.intermediate.dense.weight"):
        error, allowed = ((penalty[name].double() - truth[name]).norm() for penalty in penalties)
        assert error <= 2 * allowed, (name, error, allowed)


def test_gradients_of_once_are_by_kernels():
    """Second derivatives cost nothing unless they are asked for, in compiled functions too."""
    torch._dynamo.reset()
    tensors, settings = make("layer_norm_linear", SMALL["layer_norm_linear"])
    tensors = {name: t.requires_grad_() for name, t in convert(tensors, torch.float32).items()}

    def loss(x):
        return call("layer_norm_linear", {**tensors, "x": x}, settings, None).square().sum()

    for function in (loss, torch.compile(loss, backend="aot_eager", fullgraph=True)):
        with fake_backend(["layer_norm_linear"]):
            value = function(tensors["x"])
            with Recorder() as recorder:
                value.backward()
        assert recorder.ours() == [f"layer_norm_linear_backward.{NAME}"]
    torch._dynamo.reset()


def test_attention_whose_backward_pytorch_cannot_differentiate():
    """This is why the reference has a second way: once PyTorch can do it, that may go."""
    q = normal(1, 2, 8, 4).requires_grad_()
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION), pytest.raises(RuntimeError, match="not implemented"):
        torch.autograd.grad(scaled_dot_product_attention(q, q, q).sum(), q, create_graph=True)[0].sum().backward()
    assert not transforms.transform()
    with forward_ad.dual_level():
        assert "forward-mode AD" in transforms.transform()
    assert not transforms.transform()
