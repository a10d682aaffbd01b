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


def test_what_a_call_returns_is_memory_until_it_is_released():
    """The steps behind it find it where it is this time."""
    kernel, first = Kernel(), memory()
    made = []

    def call(x):
        made.append(x + 1)
        return made[-1]

    steps = [prepared.PreparedCall(call, [first.find(first.tensors[0])])]
    steps[0].run_slowly(first)
    plan = _launch.Plan(kernel, (), num_warps=4, num_stages=1)
    steps.append(prepared.PreparedLaunch(_launch.Launch(plan, (1,), (made[0],), ()), first))
    steps[1].run_slowly(first)
    steps.append(prepared.Release(3))
    then = memory()
    prepared.run(steps, then)
    assert torch.equal(made[1], then.tensors[0] + 1)
    assert kernel.quick[0][-1] == made[1].data_ptr() != made[0].data_ptr()
    assert then.tensors[3] is None


def test_memory_knows_its_own():
    own = memory()
    image, arena, result = own.tensors
    assert own.find(torch.zeros(4)) is None
    assert own.find(arena[1023:])[:2] == (1, 1023) and own.find(result[3:])[:2] == (2, 6)
    assert own.find(image[0, 1])[:2] == (0, 4 * 8 * 4)
    assert torch.equal(own.find(image.permute(0, 3, 1, 2)).view(own), image.permute(0, 3, 1, 2))
