# SPDX-License-Identifier: Apache-2.0
"""Launches that are prepared once: the addresses that they run with, and the compiled kernel that they find. They run
with real kernels in tests/gates/interpreted_networks.py."""

import contextlib

import pytest
import torch

from support.launches import Kernel, as_on_a_gpu

prepared = pytest.importorskip("mvit_kernels.backends.triton.prepared", reason="Triton is not installed")
_launch = prepared._launch


@pytest.fixture(autouse=True)
def gpu(monkeypatch):
    as_on_a_gpu(monkeypatch, _launch)


def memory() -> prepared.Memory:
    """An image that is a part of a tensor, an arena and a result."""
    image = torch.randn(2, 3, 4, 8)[1:]
    return prepared.Memory((image, torch.zeros(1024, dtype=torch.uint8), torch.zeros(4, dtype=torch.bfloat16)))


def step_of(first: prepared.Memory, kernel: Kernel):
    """A launch of an image, a strided map in the arena, a weight, nothing, and the result."""
    image, arena, result = first.tensors
    weight = torch.randn(8)
    part = arena[256:512].view(torch.bfloat16).view(2, 8, 8)[..., 2:6]
    plan = _launch.Plan(kernel, (64, True), num_warps=8, num_stages=3)
    launch = _launch.Launch(plan, (5, 2), (image, part, weight, None, result), (7, 0.5))
    return prepared.PreparedLaunch(launch, first), weight, part


def test_the_first_run_has_tensors_and_later_ones_addresses():
    kernel, first = Kernel(), memory()
    step, weight, part = step_of(first, kernel)
    prepared.run([step], first)
    ((grid, arguments, options),) = kernel.slow
    assert grid == (5, 2, 1) and arguments[3:4] + arguments[5:] == (None, 7, 0.5, 64, True)
    assert options == dict(num_warps=8, num_stages=3, enable_fp_fusion=True)
    for found, tensor in zip(arguments, (first.tensors[0], part, weight, None, first.tensors[2]), strict=False):
        if tensor is not None:
            assert found.data_ptr() == tensor.data_ptr() and found.dtype == tensor.dtype
            assert found.shape == tensor.shape and found.stride() == tensor.stride()
    for _ in range(2):
        then = memory()
        prepared.run([step], then)
        image, arena, result = then.addresses
        addresses = image, arena + 256 + 2 * 2, weight.data_ptr(), None, result
        before = 5, 2, 1, "stream of -1", "function", "metadata", None, None, None
        assert kernel.quick.pop() == (*before, *addresses, 7, 0.5, 64, True)
    assert len(kernel.slow) == 1


def test_the_first_run_compiles_with_a_sound_assembler(monkeypatch):
    """As every other launch: with the options that keep what it assembled apart from what Triton did by itself."""
    asked = []

    @contextlib.contextmanager
    def sound(architecture):
        asked.append(architecture)
        yield {"ptx_options": "marked"}

    monkeypatch.setattr(_launch.assembler, "sound", sound)
    monkeypatch.setattr(_launch, "_architecture", lambda device: 90)
    kernel, first = Kernel(), memory()
    prepared.run([step_of(first, kernel)[0]], first)
    assert asked == [90] and kernel.slow[0][2]["ptx_options"] == "marked"


def test_no_tensor_of_the_first_call_is_kept():
    first = memory()
    step, weight, _ = step_of(first, Kernel())
    kept = [tensor for tensor in step.launch.tensors if tensor is not None]
    assert len(kept) == 1 and kept[0] is weight


def test_profilers_see_every_launch(monkeypatch):
    kernel, first = Kernel(), memory()
    step, *_ = step_of(first, kernel)
    prepared.run([step], first)
    monkeypatch.setattr(_launch, "_profiled", lambda: True)
    prepared.run([step], memory())
    assert len(kernel.slow) == 2 and not kernel.quick


def test_on_another_device(monkeypatch):
    entered = []

    class Device:
        def __init__(self, index):
            self.index = index

        def __enter__(self):
            entered.append(self.index)
            monkeypatch.setattr(torch.cuda, "current_device", lambda: -1)

        def __exit__(self, *_): ...

    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(torch.cuda, "device", Device)
    kernel, first = Kernel(), memory()
    prepared.run([step_of(first, kernel)[0]], first)
    assert entered == [-1] and len(kernel.slow) == 1


def test_a_call_writes_into_the_memory_of_this_time():
    first, then = memory(), memory()
    image, arena, _ = first.tensors
    part = arena[256:512].view(torch.float32).view(8, 8)[:, 2:6]

    def call(x, out):
        out.copy_(x[0, :, :, :1].flatten()[:8, None])

    step = prepared.PreparedCall(call, [first.find(image), first.find(part)])
    prepared.run([step], then)
    written = then.tensors[1][256:512].view(torch.float32).view(8, 8)
    assert torch.equal(written[:, 2:6], then.tensors[0][0, :, :, :1].flatten()[:8, None].expand(8, 4))
    assert not written[:, :2].any() and not written[:, 6:].any() and not first.tensors[1].any()


def test_memory_knows_its_own():
    own = memory()
    image, arena, result = own.tensors
    assert own.find(torch.zeros(4)) is None
    assert own.find(arena[1023:])[:2] == (1, 1023) and own.find(result[3:])[:2] == (2, 6)
    assert own.find(image[0, 1])[:2] == (0, 4 * 8 * 4)
    assert torch.equal(own.find(image.permute(0, 3, 1, 2)).view(own), image.permute(0, 3, 1, 2))


def test_what_lies_behind_the_image_is_none_of_it():
    """A weight in the same storage: the next image need not be there."""
    flat = torch.arange(100.0)
    image, weight = flat[4:52].view(1, 4, 4, 3), flat[52:60]
    own = prepared.Memory((image, torch.zeros(8), torch.zeros(8)))
    assert own.find(weight) is None and own.find(flat[:4]) is None
    assert own.find(image[0, 3, 3, 2:])[:2] == (0, 47 * 4)
    strided = prepared.Memory((flat[:48].view(1, 4, 4, 3)[..., :2], torch.zeros(8), torch.zeros(8)))
    assert strided.find(weight) is None and strided.find(flat[46:47])[:2] == (0, 46 * 4)


def test_a_projection_s_bias_and_rows_are_in_its_plan():
    """A frozen network's 1 × 1 convolution behind a LayerNorm has a bias in float32, and may write part of a map."""
    from mvit_kernels.backends.triton import layer_norm_linear

    def of(*shape, dtype=torch.bfloat16):
        return torch.empty(shape, dtype=dtype, device="meta")

    def plan(bias=torch.bfloat16, out=None):
        with _launch.watching(90):
            out = of(1, 8, 8, 48) if out is None else out
            tensors = of(1, 8, 8, 24), of(24), of(24), of(48, 24), of(48, dtype=bias), out, of(64), of(64)
            return layer_norm_linear.launch(*tensors, 1e-5, "silu").plan

    assert plan() is plan() and plan() is not plan(torch.float32)
    part = plan(torch.float32, of(1, 8, 8, 96)[..., 48:])
    assert part is not plan(torch.float32) and part.constants[-1] == 48
