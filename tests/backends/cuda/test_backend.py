# SPDX-License-Identifier: Apache-2.0
"""The CUDA backend's own Python around ``transformer``: packed weights, what decides about a call, the operator and
frozen models on CPU tensors by emulation, and the library with a PyTorch without CUDA. The kernel itself is tested in
test_transformer.py, its binding in test_transformer_binding.py."""

import gc
import json
import subprocess
import sys

import pytest
import torch

import mvit_kernels
from mvit_kernels import backends
from mvit_kernels.backends import cuda, gpu, library, preference
from mvit_kernels.backends.cuda import inverted_residual, kept, packing, plans, transformer
from mvit_kernels.nn import MobileViT
from mvit_kernels.ops import transformer_on_map
from mvit_kernels.ops.transformer import flatten, stack_call
from support.cases import call, convert, make, structured
from support.cuda import preferred, serving_cpu_tensors
from support.emulation import Driver, load_operators
from support.layouts import LAYOUTS, lay_out
from support.recorder import Recorder
from support.tolerance import assert_close_as_pytorch

OP = "transformer"
DTYPES = (torch.bfloat16, torch.float16)
H100 = (132, 232_448)


@pytest.fixture(scope="module")
def driver():
    return Driver(OP, macros=["MVIT_ONLY_ONE=nullptr"])  # for its sizes, which are those of all kernels


# ------------------------------------------------------------------------------------------------------------- packing


@pytest.mark.parametrize("head_dim", ["a quarter", 8])
@pytest.mark.parametrize("d", plans.WIDTHS)
def test_sizes_are_those_of_the_kernel(driver, d, head_dim):
    head_dim = d // 4 if head_dim == "a quarter" else head_dim
    out = torch.zeros(3, dtype=torch.int64)
    layout = plans.Layout(d, head_dim)
    for rows, layers, hidden in ((16, 1, 2 * d), (128, 3, 4 * d), (256, 2, 100)):
        driver.on_host("sizes", out, d, head_dim, rows, layers, hidden)
        assert out.tolist() == [layout.shared_bytes(rows), layout.packed_bytes(layers, hidden), packing.VERSION]
        assert layout.shared_bytes(rows) % 16 == 0


def packable(d=80, dtype=torch.bfloat16, **sizes):
    tensors, _ = make(OP, dict(shape=(1, 2, 2, d), heads=4, patch=(2, 2)) | sizes)
    s = structured(OP, convert(tensors, dtype))
    return s["layers"], s["final_norm"]


@pytest.mark.parametrize("d", plans.WIDTHS)
def test_packed_bytes(d):
    for sizes in (dict(), dict(head_dim=8, qkv_bias=False, final_norm=False, ratio=4, layers=1)):
        layers, final_norm = packable(d, **sizes)
        packed = packing.pack_transformer(layers, final_norm, num_heads=4, dtype=torch.bfloat16)
        layout = plans.Layout(d, layers[0].proj_weight.shape[1] // 4)
        assert packed.dtype == torch.uint8 and packed.is_contiguous()
        assert packed.numel() == layout.packed_bytes(len(layers), layers[0].fc1_weight.shape[0])


def test_packing_reads_weights_of_any_dtype():
    layers, final_norm = packable()
    wide = [type(layer)(*(t.double() for t in layer)) for layer in layers]
    wide_norm = tuple(t.float() for t in final_norm)
    packed = packing.pack_transformer(layers, final_norm, num_heads=4, dtype=torch.bfloat16)
    assert torch.equal(packing.pack_transformer(wide, wide_norm, num_heads=4, dtype=torch.bfloat16), packed)


def test_an_absent_qkv_bias_is_zeros():
    layers, final_norm = packable(qkv_bias=False)
    empty = [layer._replace(qkv_bias=torch.empty(0)) for layer in layers]
    zeros = [layer._replace(qkv_bias=torch.zeros(240)) for layer in layers]
    packed = [
        packing.pack_transformer(each, final_norm, num_heads=4, dtype=torch.float16) for each in (layers, empty, zeros)
    ]
    assert torch.equal(packed[0], packed[1]) and torch.equal(packed[0], packed[2])


def test_packing_wants_four_heads():
    with pytest.raises(ValueError, match="num_heads is 5; the kernel has 4"):
        packing.pack_transformer(*packable(), num_heads=5, dtype=torch.bfloat16)


def packed_of(layers, final_norm, dtype=torch.bfloat16):
    return transformer.packed_weights(flatten(layers, zeros=False), final_norm, 4, dtype)


def test_packed_once_and_again_when_a_weight_changes():
    layers, final_norm = packable(qkv_bias=False)
    first = packed_of(layers, final_norm)
    assert packed_of(layers, final_norm) is first
    assert packed_of(layers, final_norm, torch.float16) is not first
    for changed in (layers[1].fc2_weight, layers[0].norm1_weight, final_norm[1]):
        before = first.clone()
        changed.add_(1)
        again = packed_of(layers, final_norm)
        assert again is first and not torch.equal(first, before)  # in place: a captured graph reads it
        fresh = packing.pack_transformer(layers, final_norm, num_heads=4, dtype=torch.bfloat16)
        assert torch.equal(again, fresh)
    other = [layers[0], layers[1]._replace(fc1_bias=layers[1].fc1_bias + 1)]
    assert not torch.equal(packed_of(other, final_norm), first)
    assert packed_of(other, None).numel() == first.numel()
    assert not torch.equal(packed_of(other, None), packed_of(other, final_norm))


def test_packed_in_inference_mode_and_changed_outside():
    layers, final_norm = packable()
    with torch.inference_mode():
        first = packed_of(layers, final_norm)
    before = first.clone()
    layers[0].fc1_weight.mul_(2)
    assert packed_of(layers, final_norm) is first and not torch.equal(first, before)


def test_packed_weights_live_as_long_as_the_weights():
    layers, final_norm = packable()
    before = len(kept.packed)
    packed_of(layers, final_norm)
    assert len(kept.packed) == before + 1
    del layers, final_norm
    gc.collect()
    assert len(kept.packed) == before


def test_inference_tensors_do_not_tell_of_changes():
    with torch.inference_mode():
        layers, final_norm = packable()
        first = packed_of(layers, final_norm)
        layers[0].fc1_weight.add_(1)
        assert not torch.equal(packed_of(layers, final_norm), first)


# ------------------------------------------------------------------------------------------------------------ decisions


def ask(shape=(1, 32, 32, 144), dtype=torch.bfloat16, heads=4, head_dim=None, patch=(2, 2), grad=False, **sizes):
    tensors, settings = make(OP, dict(shape=(0, *shape[1:]), heads=heads, head_dim=head_dim, patch=patch, **sizes))
    s = structured(OP, convert(tensors, dtype))
    call = stack_call(s["x"], s["layers"], s["final_norm"], settings["num_heads"], patch)
    return cuda.BACKEND.supports[OP](call._replace(shape=shape, device_type="cuda"))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("side", [2, 14, 16, 28, 32])
@pytest.mark.parametrize("d", [64, 80, 96, 120, 144, 192])
def test_serves(d, side, dtype):
    assert ask((64, side, side, d), dtype) == []
    assert ask((64, side, side, d), dtype, head_dim=8, qkv_bias=False, final_norm=False, ratio=4) == []


@pytest.mark.parametrize("side", [2, 8, 14, 16, 22])
def test_serves_wide_rows(side):
    assert ask((64, side, side, 240)) == [] and ask((64, side, side, 240), head_dim=8) == []


@pytest.mark.parametrize(
    "case, says",
    [
        (dict(dtype=torch.float32), "torch.float32 is not supported in CUDA C++; bfloat16 and float16 are"),
        (dict(shape=(1, 32, 32, 128)), "rows of 128 are not supported; 64, 80, 96, 120, 144, 192, 240 are"),
        (dict(head_dim=16), "heads of 16 are not supported for rows of 144; 36 and 8 are"),
        (dict(shape=(1, 32, 32, 144), heads=2, head_dim=36), "2 heads are not supported; 4 are"),
        (
            dict(shape=(1, 34, 32, 144)),
            "sequences of 272 tokens are too long for one launch; up to 256 tokens are supported for rows of 144",
        ),
        (
            dict(shape=(1, 32, 32, 240)),
            "sequences of 256 tokens are too long for one launch; up to 128 tokens are supported for rows of 240",
        ),
        (dict(shape=(2**29, 4, 4, 144)), "2147483648 sequences; at most 2147483647 are supported"),
    ],
    ids=str,
)
def test_refuses(case, says):
    assert says in ask(**case)


def test_refuses_what_does_not_fit_in_shared_memory(monkeypatch):
    monkeypatch.setattr(gpu, "limits", lambda: gpu.Limits(58, 101_376))  # 8.6, 8.9 and 12.0
    assert ask((1, 32, 32, 144)) == [
        "a sequence of 256 tokens needs 164096 bytes of shared memory; this GPU has 101376 per block"
    ]
    assert ask((1, 32, 32, 64)) == [] and ask((1, 16, 16, 144)) == []


@pytest.mark.parametrize("shared", [101_376, 166_912, 232_448])
@pytest.mark.parametrize("d", plans.WIDTHS)
def test_every_plan_is_a_launch(d, shared):
    for head_dim in (d // 4, 8):
        layout = plans.Layout(d, head_dim)
        for tokens in range(1, 257):
            for many in (1, 4, 600, 100_000):
                plan = plans.plan_transformer(d, head_dim, tokens, many, 132, shared)
                if isinstance(plan, str):
                    continue
                rows = 16 * plan.tiles
                padded = -(-tokens // rows) * rows
                warps = plan.sequences_of_a_block * padded // rows
                assert 1 <= warps <= plans.MOST_WARPS
                assert plan.slot % 128 == 0 and layout.least_slot <= plan.slot <= max(
                    layout.least_slot, plans.MOST_SLOT
                )
                assert layout.shared_bytes(plan.sequences_of_a_block * padded, plan.slot) <= shared
                assert plan.sequences_of_a_block == 1 or (plan.sequences_of_a_block - 1) * 132 < many


# ----------------------------------------------------------------------------------------------- the backend as a whole


@pytest.fixture
def emulated(monkeypatch):
    with serving_cpu_tensors(monkeypatch) as launches:
        yield launches


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_operator(emulated, dtype):
    tensors, settings = make(OP, dict(shape=(2, 4, 6, 64), heads=4, patch=(2, 2), qkv_bias=False))
    mixed = convert(tensors, dtype, torch.float32)
    with torch.no_grad():
        ours = mvit_kernels.transformer(**structured(OP, mixed), **settings)
    ((*call_of, plan),) = emulated
    assert (call_of, plan[:2]) == ([64, 16, 6, 8], (1, 1)) and plan.slot >= plans.Layout(64, 16).least_slot
    truth = call(OP, convert(mixed, torch.float64), settings, "oracle")
    assert_close_as_pytorch("out", ours, call(OP, convert(mixed, dtype), settings, "usual"), truth)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(emulated, layout):
    """Strided maps are read in place if 16-byte accesses allow it; otherwise from a copy."""
    tensors, settings = make(OP, dict(shape=(2, 4, 6, 64), heads=4, patch=(2, 2), layers=1))
    low = convert(tensors, torch.bfloat16)
    low["x"], buffer = lay_out(low["x"], layout)
    before = None if buffer is None else buffer.clone()
    with torch.no_grad():
        ours = mvit_kernels.transformer(**structured(OP, low), **settings)
    assert ours.is_contiguous() and (buffer is None or torch.equal(buffer, before))
    truth = call(OP, convert(low, torch.float64), settings, "oracle")
    assert_close_as_pytorch(layout, ours, call(OP, low, settings, "usual"), truth)


def test_an_empty_batch(emulated):
    tensors, settings = make(OP, dict(shape=(0, 4, 6, 64), heads=4, patch=(2, 2), layers=1))
    assert mvit_kernels.transformer(**structured(OP, convert(tensors, torch.bfloat16)), **settings).shape == (
        0,
        4,
        6,
        64,
    )


def test_autocast_packs_once(emulated, monkeypatch):
    """Under autocast weights stay float32: they are packed from those once, not cast at every call."""
    packs = []
    pack = transformer.pack_transformer
    monkeypatch.setattr(transformer, "pack_transformer", lambda *a, **k: packs.append(1) or pack(*a, **k))
    tensors, settings = make(OP, dict(shape=(1, 4, 4, 64), heads=4, patch=(2, 2), qkv_bias=False))
    single = structured(OP, convert(tensors, torch.float32))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        first = mvit_kernels.transformer(**single, **settings)
        again = mvit_kernels.transformer(**single, **settings)
    assert len(emulated) == 2 and len(packs) == 1
    assert first.dtype == torch.bfloat16 and torch.equal(first, again)


def test_a_frozen_model(emulated, monkeypatch):
    """Every block's stack in one launch, with weights that `freeze` packed, and every inverted residual in one, with
    weights that the first call packed."""
    torch.manual_seed(0)
    model = MobileViT("xxs", num_classes=10).eval()
    before = len(kept.packed)
    fast = mvit_kernels.freeze(model, dtype=torch.bfloat16)
    assert len(kept.packed) == before + 3
    images = torch.rand(1, 3, 64, 64)
    for module in ("whole", "frozen"):  # the CPU's own ways to run it
        monkeypatch.setattr(f"mvit_kernels.freezing.{module}.kind_for", lambda x: None)
    with preferred(monkeypatch, "inverted_residual", inverted_residual.forward):
        with torch.inference_mode():
            logits = fast(images.bfloat16())
    with torch.inference_mode(), mvit_kernels.use_backend("reference"):
        usual = model.bfloat16()(images.bfloat16())
        truth = model.double()(images.double())
    assert [launch[:3] for launch in emulated] == [(64, 16, 16), (80, 20, 4), (96, 24, 1)]
    assert len(kept.packed) == before + 3 + 7
    assert_close_as_pytorch("logits", logits, usual, truth)


def test_few_sequences_go_operator_by_operator(emulated, monkeypatch):
    """When one launch would leave most of a GPU idle and the operators have kernels of their own."""
    load_operators()
    monkeypatch.setattr(cuda.BACKEND, "device_type", "cpu")
    monkeypatch.setattr(cuda, "one_launch_pays", preference.one_launch_pays)  # which `emulated` says always
    tensors, settings = make(OP, dict(shape=(1, 16, 16, 64), heads=4, patch=(2, 2), layers=1))
    low = structured(OP, convert(tensors, torch.bfloat16))
    x = low.pop("x").permute(0, 3, 1, 2)
    found = {}
    for processors in (132, 8):
        monkeypatch.setattr(gpu, "limits", lambda processors=processors: gpu.Limits(processors, 232_448))
        backends._choices.clear()  # a GPU's limits do not change, and plans are remembered
        with torch.no_grad(), Recorder() as recorder:
            found[processors] = transformer_on_map(x, **low, **settings), recorder.ours()
    operators = ["layer_norm_linear", "patch_attention", "linear_residual", "layer_norm_mlp"]
    assert found[132][1] == [f"{name}.cuda" for name in operators]
    assert found[8][1][0] == "transformer.cuda" and len(emulated) == 1
    truth = call(OP, convert(convert(tensors, torch.bfloat16), torch.float64), settings, "oracle").permute(0, 3, 1, 2)
    usual = call(OP, convert(tensors, torch.bfloat16), settings, "usual").permute(0, 3, 1, 2)
    for ours, _ in found.values():
        assert_close_as_pytorch("by operators", ours, usual, truth)


# ----------------------------------------------------------------------------------------------------- the library

LIBRARY = library.LIBRARY_DIRECTORY / "libmvit_kernels_cuda.so"


def test_the_library_loads_beside_any_pytorch():
    """Even with one without CUDA, which lacks one of its symbols; and it says what is wrong with the driver."""
    if not LIBRARY.exists():
        info = json.loads((library.LIBRARY_DIRECTORY / "build_info.json").read_text())["cuda"]
        assert info["reason"].startswith("no CUDA compiler"), info
        pytest.skip(info["reason"])
    code = f"""
import ctypes, torch
torch.ops.load_library({str(LIBRARY)!r})
import mvit_kernels
problem = ctypes.CDLL({str(LIBRARY)!r}).mvit_kernels_cuda_problem
problem.restype = ctypes.c_char_p
print(bool(problem()) or torch.cuda.is_available())
print("CUDA" in torch._C._dispatch_dump("mvit_kernels::transformer_packed.cuda"))
assert not torch.cuda.is_initialized()
"""
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert printed.returncode == 0, printed.stderr
    assert printed.stdout.split() == ["True", "True"]
    assert b"Py_" not in LIBRARY.read_bytes()


def test_unavailable_without_a_gpu(monkeypatch):
    assert cuda.BACKEND.unavailable("cpu") == ["it is for NVIDIA GPUs, and the tensors are on cpu"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cuda.BACKEND.unavailable("cuda") == ["there is no NVIDIA GPU, or this build of PyTorch has no CUDA"]
    assert OP in backends.operators("cuda")
