# SPDX-License-Identifier: Apache-2.0
"""The operators of CUDA C++ as PyTorch calls them: bindings, launches and kernels, run on CPU tensors by emulation."""

import importlib

import pytest
import torch
from _cases import Tensors, backward_arguments, call, convert, evaluate, lay_out_all, make, poisoned, raw_arguments
from _emulation import load_operators
from _tolerance import assert_close_as_pytorch

from mvit_kernels._library import raw

CASES = {
    "patch_attention": dict(shape=(2, 6, 8), heads=2, head_dim=20, patch=(2, 2)),
    "layer_norm_linear": dict(shape=(2, 3, 5, 40), n=72, activation="silu"),
    "linear_residual": dict(shape=(2, 3, 5, 40), n=72),
    "layer_norm_mlp": dict(shape=(2, 3, 5, 40), hidden=80),
}
LAYOUTS = ("contiguous", "permuted", "transposed", "sliced", "strided", "offset", "expanded")
DTYPES = ("bfloat16", "float16")


@pytest.fixture(scope="module", autouse=True)
def operators():
    load_operators()


def apply(operator: str, tensors: Tensors, settings: dict) -> torch.Tensor:
    """The raw operator, with autograd around it where a gradient is needed."""
    needs_grad = any(t is not None and t.requires_grad for t in tensors.values())
    module = importlib.import_module(f"mvit_kernels.ops.{operator}")
    return module.apply("cuda", needs_grad, *raw_arguments(operator, tensors, settings))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("operator", CASES)
def test_values_and_gradients(operator, layout, dtype):
    """Arguments of every layout, the gradient of the result too; and every value that is returned is written."""
    tensors, settings = make(operator, CASES[operator])
    tensors = convert(tensors, getattr(torch, dtype))
    laid_out = lay_out_all(tensors, layout)
    inputs = {name: view for name, (view, _) in laid_out.items()}
    gradients = operator == "patch_attention"
    with poisoned():
        ours = evaluate(lambda t: apply(operator, t, settings), inputs, gradients, layout)
    usual = evaluate(lambda t: call(operator, t, settings, "usual"), inputs, gradients, layout)
    exact = convert(inputs, torch.float64)
    truth = evaluate(lambda t: call(operator, t, settings, "oracle"), exact, gradients, layout)
    for name, value in ours.items():
        assert_close_as_pytorch(name, value, usual[name], truth[name])
        assert value.is_contiguous()


@pytest.mark.parametrize("operator", CASES)
def test_results_are_what_the_schema_s_fake_says(operator):
    tensors, settings = make(operator, CASES[operator])
    arguments = raw_arguments(operator, convert(tensors, torch.bfloat16), settings)
    torch.library.opcheck(raw(operator, "cuda"), arguments, test_utils=("test_schema", "test_faketensor"))
    if operator == "patch_attention":
        outputs = raw(operator, "cuda")(*arguments)
        grad_out = torch.randn(outputs[0].shape).bfloat16()
        arguments = backward_arguments(operator, convert(tensors, torch.bfloat16), settings, outputs, grad_out)
        backward = raw(f"{operator}_backward", "cuda")
        torch.library.opcheck(backward, arguments, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("operator", CASES)
def test_empty_batch(operator):
    sizes = CASES[operator]
    tensors, settings = make(operator, {**sizes, "shape": (0, *sizes["shape"][1:])})
    tensors = convert(tensors, torch.bfloat16)
    results = evaluate(lambda t: apply(operator, t, settings), tensors, operator == "patch_attention")
    assert results["out"].shape == call(operator, tensors, settings, "usual").shape


def test_long_sequences():
    """Gradients by blocks: of more keys than a block's warps can share out."""
    tensors, settings = make("patch_attention", dict(shape=(1, 18, 15), heads=1, head_dim=20, patch=(1, 1)))
    inputs = convert(tensors, torch.bfloat16)
    ours = evaluate(lambda t: apply("patch_attention", t, settings), inputs, True)
    usual = evaluate(lambda t: call("patch_attention", t, settings, "usual"), inputs, True)
    truth = evaluate(lambda t: call("patch_attention", t, settings, "oracle"), convert(inputs, torch.float64), True)
    for name, value in ours.items():
        assert_close_as_pytorch(name, value, usual[name], truth[name])


REFUSED = [
    ("patch_attention", dict(qkv=lambda t: t.float()), "the CUDA kernels take float16 and bfloat16"),
    ("patch_attention", dict(qkv=lambda t: t[..., :114]), "heads of even widths up to 64, not of 19"),
    ("patch_attention", dict(qkv=lambda t: t.repeat(1, 1, 1, 4)), "heads of even widths up to 64, not of 80"),
    ("patch_attention", dict(qkv=lambda t: t[:, :5]), "a map of 5 x 8 does not divide"),
    ("layer_norm_linear", dict(x=lambda t: t.float()), "the CUDA kernels take float16 and bfloat16"),
    ("layer_norm_linear", dict(weight=lambda t: t[:70]), "multiples of 8, and weight has 70"),
    ("layer_norm_linear", dict(weight=lambda t: t[:, :32]), "weight has another shape"),
    ("layer_norm_linear", dict(weight=lambda t: t.half()), "weight is not of x's dtype"),
    ("layer_norm_linear", dict(norm_bias=lambda t: t.double()), "norm_bias is neither float32 nor of x's dtype"),
    ("linear_residual", dict(residual=lambda t: t[1:]), "residual has another shape"),
    ("linear_residual", dict(x=lambda t: t[..., :36], weight=lambda t: t[:, :36]), "multiples of 8, and x has 36"),
    ("layer_norm_mlp", dict(fc2_weight=lambda t: t.t()), "fc2_weight has another shape"),
]


@pytest.mark.parametrize("operator, changes, says", REFUSED)
def test_refuses(operator, changes, says):
    """What the predicates of mvit_kernels.cuda keep away is an error of the binding."""
    tensors, settings = make(operator, CASES[operator])
    tensors = convert(tensors, torch.bfloat16)
    for name, change in changes.items():
        tensors[name] = change(tensors[name])
    with pytest.raises(RuntimeError, match=f"{operator}: .*{says}"):
        raw(operator, "cuda")(*raw_arguments(operator, tensors, settings))


def test_rows_that_do_not_fit():
    tensors, settings = make("linear_residual", dict(shape=(2, 2048), n=8))
    with pytest.raises(RuntimeError, match="rows of 2048 channels want .* bytes of shared memory, and this GPU has"):
        raw("linear_residual", "cuda")(*raw_arguments("linear_residual", convert(tensors, torch.bfloat16), settings))
