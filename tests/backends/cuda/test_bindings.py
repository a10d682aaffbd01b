# SPDX-License-Identifier: Apache-2.0
"""The operators of CUDA C++ as PyTorch calls them: bindings, launches and kernels, run on CPU tensors by emulation."""

import importlib

import pytest
import torch

from mvit_kernels.backends import Call, cuda, gpu
from mvit_kernels.backends.library import raw
from support.cases import Tensors, backward_arguments, call, convert, evaluate, make, poisoned, raw_arguments
from support.emulation import load_operators
from support.layouts import lay_out_all
from support.tolerance import assert_close_as_pytorch

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
    """Arguments of every layout, including the gradient of the result; and every returned value has been written."""
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
    """Gradients by blocks: more keys than the warps of one block can divide among themselves."""
    tensors, settings = make("patch_attention", dict(shape=(1, 18, 15), heads=1, head_dim=20, patch=(1, 1)))
    inputs = convert(tensors, torch.bfloat16)
    ours = evaluate(lambda t: apply("patch_attention", t, settings), inputs, True)
    usual = evaluate(lambda t: call("patch_attention", t, settings, "usual"), inputs, True)
    truth = evaluate(lambda t: call("patch_attention", t, settings, "oracle"), convert(inputs, torch.float64), True)
    for name, value in ours.items():
        assert_close_as_pytorch(name, value, usual[name], truth[name])


def test_an_mlp_of_many_rows():
    """It is another kernel than that of few rows."""
    tensors, settings = make("layer_norm_mlp", dict(shape=(4100, 8), hidden=8))
    inputs = convert(tensors, torch.bfloat16)
    ours = apply("layer_norm_mlp", inputs, settings)
    usual = call("layer_norm_mlp", inputs, settings, "usual")
    truth = call("layer_norm_mlp", convert(inputs, torch.float64), settings, "oracle")
    assert_close_as_pytorch("out", ours, usual, truth)


REFUSED = [
    ("patch_attention", dict(qkv=lambda t: t.float()), "the CUDA kernels take bfloat16 and float16"),
    ("patch_attention", dict(qkv=lambda t: t[..., :114]), "heads of even widths up to 64, not of 19"),
    ("patch_attention", dict(qkv=lambda t: t.repeat(1, 1, 1, 4)), "heads of even widths up to 64, not of 80"),
    ("patch_attention", dict(qkv=lambda t: t[:, :5]), "a map of 5 x 8 does not divide"),
    ("layer_norm_linear", dict(x=lambda t: t.float()), "the CUDA kernels take bfloat16 and float16"),
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
    """What the predicates of mvit_kernels.backends.cuda reject is an error in the binding."""
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


# -------------------------------------------------------------------------------------------------------- predicates

EMULATED = gpu.Limits(4, 99 << 10)  # of emulated_cuda/tensors.h
GRID = [
    *(
        ("patch_attention", dict(shape=(1, 2, 4), heads=2, head_dim=d, patch=(2, 2)))
        for d in (1, 2, 17, 30, 64, 66, 80)
    ),
    ("patch_attention", dict(shape=(1, 1, 65), heads=1, head_dim=8, patch=(1, 1))),
    *(
        ("layer_norm_linear", dict(shape=(3, d), n=n))
        for d in (8, 12, 17, 100, 240, 256, 264, 520)
        for n in (8, 20, 64)
    ),
    *(("linear_residual", dict(shape=(3, d), n=n)) for d in (8, 33, 240, 264, 1000, 1024, 1040, 2048) for n in (8, 9)),
    *(("layer_norm_mlp", dict(shape=(3, d), hidden=h)) for d in (8, 36, 192, 200, 208, 240, 256, 264) for h in (8, 30)),
]


def call_of(operator, tensors, settings, needs_grad=False, contiguous=True, shape=None):
    """The `Call` that the public function would make."""
    first = next(iter(tensors.values()))
    if operator == "patch_attention":
        heads = settings["num_heads"]
        facts = {"num_heads": heads, "head_dim": first.shape[-1] // (3 * heads), "patch_size": settings["patch_size"]}
        facts["dense_rows"] = contiguous
    elif operator == "layer_norm_mlp":
        facts = {"hidden_features": tensors["fc1_weight"].shape[0], "contiguous": contiguous}
    else:
        facts = {"out_features": tensors["weight"].shape[0], "contiguous": contiguous}
    return Call(operator, "cuda", first.dtype, needs_grad, tuple(shape or first.shape), tuple(facts.items()))


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_predicates_admit_what_the_bindings_take(monkeypatch, dtype):
    """And nothing else, over a grid of sizes, on a GPU with little shared memory."""
    monkeypatch.setattr(gpu, "limits", lambda: EMULATED)
    admitted = 0
    for operator, sizes in GRID:
        tensors, settings = make(operator, sizes)
        tensors = convert(tensors, getattr(torch, dtype))
        reasons = cuda.BACKEND.supports[operator](call_of(operator, tensors, settings))
        try:
            raw(operator, "cuda")(*raw_arguments(operator, tensors, settings))
            assert not reasons, f"{operator} {sizes} runs, and is refused: {reasons}"
            admitted += 1
        except RuntimeError as error:
            assert reasons, f"{operator} {sizes} is admitted, and fails: {error}"
    assert (admitted > len(GRID) // 4) == (dtype == "bfloat16")


def test_predicates_say_why(monkeypatch):
    monkeypatch.setattr(gpu, "limits", lambda: EMULATED)

    def reasons(operator, *, needs_grad=False, contiguous=True, shape=None, dtype=torch.bfloat16, **sizes):
        tensors, settings = make(operator, {**CASES[operator], **sizes})
        call = call_of(operator, convert(tensors, dtype), settings, needs_grad, contiguous, shape)
        return "; ".join(cuda.BACKEND.supports[operator](call))

    for operator in CASES:
        assert reasons(operator) == ""
        assert "torch.float32 is not supported in CUDA C++" in reasons(operator, dtype=torch.float32)
        assert (" not adjacent" if "patch" in operator else "is not contiguous") in reasons(operator, contiguous=False)
        grad = reasons(operator, needs_grad=True)
        assert grad == "" if "patch" in operator else f"{operator} has no gradient in CUDA C++" in grad
    assert "heads of 19 are not supported; even ones up to 64 are" in reasons("patch_attention", head_dim=19)
    long = dict(shape=(2, 128, 128, 120))
    assert reasons("patch_attention", **long) == "" == reasons("patch_attention", **long, needs_grad=True)
    long = dict(shape=(2, 130, 260, 120))
    assert reasons("patch_attention", **long) == ""
    assert "8450 tokens are too long for a gradient; at most 4096 are supported" in reasons(
        "patch_attention", **long, needs_grad=True
    )
    assert "tokens are too long; at most 65535 are supported" in reasons("patch_attention", shape=(1, 512, 513, 120))
    assert "sequences, counting each head; at most 2147483647 are supported" in reasons(
        "patch_attention", shape=(2**29, 2, 2, 120)
    )
    assert "the width of x is 42; a positive multiple of 8, at most 1048568, is wanted" in reasons(
        "layer_norm_linear", shape=(2, 42)
    )
    assert "out_features is 12; a positive multiple of 8" in reasons("layer_norm_linear", n=12)
    assert "rows of 264 are too wide to be normalised" in reasons("layer_norm_mlp", shape=(2, 264))
    needed = cuda.operators.product_bytes(2048, normed=False)
    assert f"needs {needed} bytes of shared memory; this GPU has 101376 per block" in reasons(
        "linear_residual", shape=(2, 2048)
    )
    assert reasons("layer_norm_mlp", shape=(2, 256)) == ""
    assert "2147483648 rows; at most 2147483647 are supported" in reasons("linear_residual", shape=(2**31, 40))
