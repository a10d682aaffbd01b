# SPDX-License-Identifier: Apache-2.0
"""The Triton backend where no GPU is needed: what it refuses, how it launches, and its kernels in the interpreter.

What the compiler makes of the kernels is tested in test_compile.py. On a GPU the operators' own tests run on path
``triton``.
"""

import contextlib
import importlib
import os
import subprocess
import sys

import pytest
import torch

from mvit_kernels import backends
from mvit_kernels.backends import Call, triton
from support import TESTS
from support.launches import Kernel, as_on_a_gpu

FACTS = {
    "batch_norm_activation": dict(layout="channels_last"),
    "layer_norm": dict(contiguous=True),
    "layer_norm_linear": dict(out_features=48, activation=None, contiguous=True),
    "patch_attention": dict(num_heads=2, head_dim=12, patch_size=(2, 2), dense_rows=True),
    "linear_residual": dict(out_features=24, contiguous=True),
    "layer_norm_mlp": dict(hidden_features=48, contiguous=True),
    "transformer_layer": dict(
        num_heads=2, head_dim=12, hidden_features=48, patch_size=(2, 2), contiguous=True, inner_dropout=False
    ),
    "inverted_residual": dict(
        hidden_features=48, out_features=24, stride=1, dilation=1, residual=True, dense_rows=True
    ),
}


def ask(operator, dtype=torch.bfloat16, shape=None, **facts):
    shape = shape or ((2, 4, 6, 72) if operator == "patch_attention" else (2, 4, 6, 24))
    call = Call(operator, "cuda", dtype, True, shape, tuple({**FACTS[operator], **facts}.items()))
    return triton.BACKEND.supports[operator](call)


# ------------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize("operator", FACTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_serves(operator, dtype):
    assert ask(operator, dtype) == []


REFUSED = [
    *((name, dict(dtype=torch.float64), "torch.float64 is not supported in Triton") for name in FACTS),
    ("layer_norm_linear", dict(contiguous=False), "x is not contiguous; call .contiguous() first"),
    ("linear_residual", dict(contiguous=False), "x or residual is not contiguous"),
    ("layer_norm_mlp", dict(contiguous=False), "x is not contiguous"),
    ("patch_attention", dict(dense_rows=False), "channels of qkv are not adjacent"),
    ("patch_attention", dict(head_dim=257), "heads of 257 are too wide; up to 256 are supported"),
    ("layer_norm_linear", dict(shape=(4, 513)), "rows of 513 are too wide"),
    ("layer_norm_mlp", dict(shape=(4, 513)), "rows of 513 are too wide"),
    ("linear_residual", dict(shape=(2**16, 2**15, 24)), "2147483648 rows; at most"),
    ("linear_residual", dict(shape=(4, 0)), "the width of x is 0; at least 1"),
    ("linear_residual", dict(out_features=0), "out_features is 0"),
    ("layer_norm_mlp", dict(hidden_features=0), "hidden_features is 0"),
    ("batch_norm_activation", dict(layout="contiguous"), "x is not channels-last; call .to(memory_format="),
    ("batch_norm_activation", dict(layout="strided"), "x is not channels-last"),
    ("batch_norm_activation", dict(shape=(2**15, 8, 2**8, 2**8)), "2147483648 pixels; at most 1073741824"),
    ("batch_norm_activation", dict(shape=(2, 2**20, 2, 2)), "1048576 channels; at most 524288"),
    ("transformer_layer", dict(shape=(1, 4, 4, 513)), "rows of 513 are too wide"),
    ("transformer_layer", dict(contiguous=False), "x is not contiguous"),
    ("transformer_layer", dict(head_dim=257), "heads of 257 are too wide"),
    ("inverted_residual", dict(dense_rows=False), "channels of x are not adjacent"),
    ("inverted_residual", dict(hidden_features=0), "hidden_features is 0; at least 1"),
    ("inverted_residual", dict(shape=(2**15, 256, 256, 24)), "more than 2147483647 pixels; split the batch"),
    ("inverted_residual", dict(shape=(1, 2, 2, 0)), "x has no channels"),
    ("transformer_layer", dict(inner_dropout=True), "dropout on attention weights or after SiLU is active"),
]


@pytest.mark.parametrize("operator, change, says", REFUSED, ids=str)
def test_refuses(operator, change, says):
    reasons = ask(operator, **change)
    assert len(reasons) == 1 and says in reasons[0]


def test_wide_rows_go_where_no_norm_is():
    assert ask("linear_residual", shape=(4, 4096)) == []


def test_needs_a_gpu(monkeypatch):
    monkeypatch.setattr(triton.target, "INTERPRETED", False)
    monkeypatch.setattr(triton.BACKEND, "device_type", "cuda")
    assert triton.BACKEND.unavailable("cpu") == ["it is for NVIDIA GPUs, and the tensors are on cpu"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert triton.BACKEND.unavailable("cuda") == ["there is no NVIDIA GPU, or this build of PyTorch has no CUDA"]


def test_needs_a_capable_gpu(monkeypatch):
    monkeypatch.setattr(triton.target, "INTERPRETED", False)
    monkeypatch.setattr(triton.BACKEND, "device_type", "cuda")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: [(9, 0), (7, 5)][index])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "Tesla T4")
    assert triton.BACKEND.unavailable("cuda") == ["GPU 1 (Tesla T4) has compute capability 7.5; 8.0 is wanted"]


def python(code, **environment):
    path = os.pathsep.join(p for p in sys.path if p)
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": path, **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_the_kernels_are_not_imported_before_they_are_needed():
    code = "import sys, mvit_kernels; mvit_kernels.patch_attention\n"
    code += "print(*sorted(m.rpartition('.')[2] for m in sys.modules if m.startswith('mvit_kernels.backends.triton.')))"
    done = python(code)
    assert done.stdout == "assembler operators target\n", done.stderr


def test_without_triton():
    """The package works, and says what is missing when the backend is asked for by name."""
    code = """
import sys
sys.modules["triton"] = None
import torch, mvit_kernels
qkv = torch.ones(1, 2, 2, 12)
print(mvit_kernels.patch_attention(qkv, num_heads=2, patch_size=2).shape)
try:
    mvit_kernels.patch_attention(qkv, num_heads=2, patch_size=2, backend="triton")
except mvit_kernels.BackendError as error:
    print(error)
"""
    done = python(code, TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stderr
    shape, refusal = done.stdout.splitlines()
    assert shape == "torch.Size([1, 2, 2, 4])" and "Triton is not installed" in refusal


def test_the_package_does_not_hide_triton():
    code = "import mvit_kernels.backends.triton._launch as ours, triton; print(ours.triton is triton, triton.__name__)"
    assert python(code).stdout == "True triton\n"


# ---------------------------------------------------------------------------------------------------------------
# launches


@pytest.fixture
def launch(monkeypatch):
    module = pytest.importorskip("mvit_kernels.backends.triton._launch", reason="Triton is not installed")
    as_on_a_gpu(monkeypatch, module)
    return module


def test_a_kernel_is_looked_up_once(launch):
    """The first launch is Triton's own; later ones call the compiled kernel's ``run``, with all arguments in order."""
    kernel, x = Kernel(), torch.zeros(8)
    plan = launch.Plan(kernel, (64, "tf32"), num_warps=8, num_stages=3)
    for rows in (5, 6, 7):
        plan((rows, 2), (x, None), (rows, 0.5))
    assert kernel.slow == [
        ((5, 2), (x, None, 5, 0.5, 64, "tf32"), dict(num_warps=8, num_stages=3, enable_fp_fusion=True))
    ]
    assert [tuple(each) for each in kernel.quick] == [
        (rows, 2, 1, "stream of -1", "function", "metadata", None, None, None, x, None, rows, 0.5, 64, "tf32")
        for rows in (6, 7)
    ]


def test_registers_can_be_limited(launch):
    kernel = Kernel()
    launch.Plan(kernel, (), num_warps=8, num_stages=3, registers=128)((1,), (torch.zeros(8),))
    assert kernel.slow[0][2] == dict(num_warps=8, num_stages=3, enable_fp_fusion=True, maxnreg=128)


def test_kernels_for_hopper_are_assembled_soundly(launch, monkeypatch):
    """`assembler.sound` is entered for the compilation, and its options reach the launch."""
    entered = []

    @contextlib.contextmanager
    def sound(architecture):
        entered.append(architecture)
        yield dict(ptx_options="--warn-on-spills")

    monkeypatch.setattr(launch, "_architecture", lambda device: 90)
    monkeypatch.setattr(launch.assembler, "sound", sound)
    kernel = Kernel()
    launch.Plan(kernel, (), num_warps=4, num_stages=2)((1,), (torch.zeros(8),))
    assert entered == [90] and kernel.slow[0][2]["ptx_options"] == "--warn-on-spills"


def test_unaligned_pointers_never_take_the_aligned_kernel(launch):
    """A kernel compiled for 16-byte aligned pointers reads wrong addresses, or faults, with others."""
    kernel, buffer = Kernel(), torch.zeros(64)
    assert buffer.data_ptr() % 16 == 0
    plan = launch.Plan(kernel, (), num_warps=4, num_stages=2)
    plan((1,), (buffer, buffer))
    plan((1,), (buffer, buffer[1:]))
    plan((1,), (buffer[4:], buffer))
    plan((1,), (buffer[2:], buffer))
    assert len(kernel.slow) == 3 and len(kernel.quick) == 1


def test_profilers_see_every_launch(launch, monkeypatch):
    kernel, x = Kernel(), torch.zeros(8)
    plan = launch.Plan(kernel, (), num_warps=4, num_stages=2)
    plan((1,), (x,))
    monkeypatch.setattr(launch, "_profiled", lambda: True)
    plan((1,), (x,))
    assert len(kernel.slow) == 2 and not kernel.quick


def test_profiler_hooks_are_noticed():
    knobs = pytest.importorskip("triton", reason="Triton is not installed").knobs
    launch = pytest.importorskip("mvit_kernels.backends.triton._launch")

    def hook(*arguments):
        pass

    assert not launch._profiled()
    knobs.runtime.launch_enter_hook.add(hook)
    try:
        assert launch._profiled()
    finally:
        knobs.runtime.launch_enter_hook.remove(hook)


@pytest.mark.parametrize("operator", ["layer_norm", "layer_norm_linear", "layer_norm_mlp"])
def test_a_layer_norm_of_two_dtypes_shares_no_plan(operator):
    """A kernel that was compiled for a bias in bfloat16 reads one in float32 as twice as many wrong numbers."""
    pytest.importorskip("mvit_kernels.backends.triton._launch", reason="Triton is not installed")
    module = importlib.import_module(f"mvit_kernels.backends.triton.{operator}")
    launch = importlib.import_module("mvit_kernels.backends.triton._launch")

    def plans(weight, bias):
        def of(*shape, dtype=torch.bfloat16):
            return torch.empty(shape, dtype=dtype, device="meta")

        x, norm, rows = of(64, 24), (of(24, dtype=weight), of(24, dtype=bias)), of(64, dtype=torch.float32)
        linear = (of(48, 24), of(48))
        with launch.watching(90) as launches:
            if operator == "layer_norm":
                module.forward(x, *norm, 1e-5)
                module.backward(x, x, rows, rows, norm[0])
            elif operator == "layer_norm_linear":
                module.forward(x, *norm, *linear, 1e-5, "")
                module.backward(of(64, 48), x, rows, rows, *norm, *linear, "")
            else:
                module.forward(x, *norm, *linear, of(24, 48), of(24), 1e-5)
                module.backward(x, x, rows, rows, *norm, *linear, of(24, 48))
        return {id(each.plan) for each in launches if any(t is norm[1] for t in each.tensors)}

    same, mixed = plans(torch.bfloat16, torch.bfloat16), plans(torch.bfloat16, torch.float32)
    assert same and mixed and not same & mixed


def test_kinds_of_calls_share_no_plan():
    """What a plan does not look at (dtypes, absent tensors, the device, the precision) is in the key of its cache."""
    pytest.importorskip("mvit_kernels.backends.triton._launch", reason="Triton is not installed")
    from mvit_kernels.backends.triton import linear_residual
    from mvit_kernels.backends.triton._launch import watching

    def plan(dtype=torch.bfloat16, bias=True, rows=64, precision="highest", target=90):
        x, weight = (torch.empty(s, 64, dtype=dtype, device="meta") for s in (rows, 64))
        torch.set_float32_matmul_precision(precision)
        try:
            with watching(target) as launches:
                linear_residual.forward(x, weight, weight[0] if bias else None, x)
        finally:
            torch.set_float32_matmul_precision("highest")
        return launches[0].plan

    assert plan() is plan(rows=80)
    others = [
        plan(dtype=torch.float16),
        plan(bias=False),
        plan(dtype=torch.float32),
        plan(dtype=torch.float32, precision="high"),
        plan(target=80),
    ]
    assert len({id(each) for each in (plan(), *others)}) == 6
    assert "ieee" in others[2].constants and "tf32" in others[3].constants


@pytest.fixture
def default_precision():
    yield
    torch.backends.fp32_precision = torch.backends.cuda.matmul.fp32_precision = "none"
    torch.set_float32_matmul_precision("highest")
    torch.backends.cuda.matmul.fp32_precision = "none"


@pytest.mark.parametrize(
    "legacy, everywhere, of_products, kind",
    [
        (None, None, None, "ieee"),
        ("high", None, None, "tf32"),
        ("medium", None, None, "tf32"),
        ("highest", None, None, "ieee"),
        (None, None, "tf32", "tf32"),  # since here PyTorch's older getter raises
        (None, None, "ieee", "ieee"),
        (None, "tf32", None, "tf32"),
        (None, "tf32", "ieee", "ieee"),
        ("high", None, "ieee", "ieee"),
        ("highest", "tf32", "tf32", "tf32"),
    ],
)
def test_float32_follows_both_settings_of_pytorch(default_precision, legacy, everywhere, of_products, kind):
    """Whichever was used, and both in one program: the last that concerns products counts, and nothing raises."""
    kind_of = pytest.importorskip("mvit_kernels.backends.triton._launch", reason="Triton is not installed").kind_of
    if legacy is not None:
        torch.set_float32_matmul_precision(legacy)
    if everywhere is not None:
        torch.backends.fp32_precision = everywhere
    if of_products is not None:
        torch.backends.cuda.matmul.fp32_precision = of_products
    assert kind_of(torch.float32) == kind
    assert kind_of(torch.bfloat16) == kind_of(torch.float16) == "half"


# ------------------------------------------------------------------------------------------------------ the interpreter


def test_in_the_interpreter():
    """In one process: another for each file would take four seconds before its first test."""
    pytest.importorskip("triton", reason="Triton is not installed")
    files = sorted((TESTS / "gates").glob("interpreted*.py"))
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *files],
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
        capture_output=True,
        text=True,
        timeout=2400,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


def test_info_knows_the_backend():
    assert set(backends.operators("triton")) == set(FACTS)
