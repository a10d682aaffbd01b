# SPDX-License-Identifier: Apache-2.0
"""Tensors that need a gradient and are cropped, expanded, transposed or offset in memory, x and weights alike: each
gets the gradient that the same values get when contiguous, and the tensor that it was cropped or expanded from gets it
where PyTorch would put it."""

import pytest
import torch

from support.cases import DIFFERENTIABLE, NARROW, call, convert, device_of, differentiable, evaluate, make, paths, takes
from support.layouts import lay_out

LAYOUTS = ("sliced", "permuted", "transposed", "strided", "offset", "expanded")
PATHS = [(operator, path) for operator in DIFFERENTIABLE for path in paths(operator) if differentiable(operator, path)]


def cases(operator, path, dtype):
    """(the name of one tensor, its layout, all tensors with that one laid out so, the settings), with a mean far from 0
    for x."""
    tensors, settings = make(operator, NARROW[operator])
    for name in ("x", "residual"):
        if name in tensors and operator != "batch_norm_activation":  # which has nothing else left in bfloat16
            tensors[name] = tensors[name] + 100
    tensors = convert(tensors, getattr(torch, dtype), device=device_of(path))
    for name, tensor in tensors.items():
        for layout in LAYOUTS:
            view = lay_out(tensor, layout)[0]
            if view.stride() != tensor.stride() or layout == "offset":
                yield name, layout, {**tensors, name: view}, settings


def contiguous(operator, tensor):
    """A batch norm's map is channels-last, and sums of another layout's pixels round otherwise."""
    is_map = operator == "batch_norm_activation" and tensor.dim() == 4
    return tensor.contiguous(memory_format=torch.channels_last if is_map else torch.contiguous_format)


def refuses_strides(operator, path, name, tensor):
    """GPU kernels need dense activations, all kernels a batch norm's map dense and the channels of qkv adjacent."""
    if path in ("reference", "raw") or name not in ("x", "residual", "qkv"):
        return False
    if operator == "batch_norm_activation":
        return not tensor.is_contiguous(memory_format=torch.channels_last)
    return tensor.stride(-1) != 1 if name == "qkv" else path != "cpu" and not tensor.is_contiguous()


def assert_same(ours, expected, path, where):
    """The same bits from kernels; PyTorch's own products take different routes for different strides."""
    assert ours.shape == expected.shape, where
    if path in ("reference", "raw"):
        error = (ours.double() - expected.double()).abs().max()
        assert error <= 4 * torch.finfo(ours.dtype).eps ** 0.75 * expected.double().abs().max(), f"{where}: {error}"
    else:
        assert torch.equal(ours, expected), where


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("operator, path", PATHS)
def test_strides_of_a_leaf_change_no_gradient(operator, path, dtype):
    if not takes(path, dtype):
        return
    for name, layout, tensors, settings in cases(operator, path, dtype):
        if refuses_strides(operator, path, name, tensors[name]):
            continue
        dense = {key: None if t is None else contiguous(operator, t) for key, t in tensors.items()}
        ours, expected = (
            evaluate(lambda t, s=settings: call(operator, t, s, path), each, True) for each in (tensors, dense)
        )
        for key, value in expected.items():
            assert_same(ours[key], value, path, f"{operator} by {path}: {key}, where {name} is {layout}")


@pytest.mark.parametrize("operator, path", PATHS)
def test_what_a_tensor_is_a_part_of_gets_its_gradient(operator, path):
    """A crop's gradient among zeros; an expanded tensor's added up."""
    dtype = "float32" if takes(path, "float32") else "bfloat16"
    tensors, settings = make(operator, NARROW[operator])
    tensors = convert(tensors, getattr(torch, dtype), device=device_of(path))

    def gradient(name, whole, part):
        """The gradient of `whole`, from which `part` makes the tensor, and that of the tensor itself."""
        whole = whole.detach().requires_grad_()
        inner = part(whole)
        inner = inner.contiguous() if refuses_strides(operator, path, name, inner) else inner
        inner.retain_grad()
        out = call(operator, {**tensors, name: inner}, settings, path)
        out.backward(torch.ones_like(out) + torch.arange(out.shape[-1], device=out.device) % 3)
        alone = {**tensors, name: inner.detach().clone().requires_grad_()}
        out = call(operator, alone, settings, path)
        out.backward(torch.ones_like(out) + torch.arange(out.shape[-1], device=out.device) % 3)
        return whole.grad, alone[name].grad

    for name, tensor in tensors.items():
        for axis in range(tensor.dim()):
            side = tensor.shape[axis]
            wide = torch.full([s + 3 * (a == axis) for a, s in enumerate(tensor.shape)], 42.0).to(tensor)
            wide.narrow(axis, 2, side).copy_(tensor)
            found, expected = gradient(name, wide, lambda t, a=axis, s=side: t.narrow(a, 2, s))
            assert_same(found.narrow(axis, 2, side), expected, path, f"{operator} by {path}: {name} cropped at {axis}")
            found.narrow(axis, 2, side).zero_()
            assert not found.any(), f"{operator} by {path}: around {name}, cropped at {axis}"
            one = tensor.narrow(axis, 0, 1).clone()
            found, expected = gradient(name, one, lambda t, to=tensor.shape: t.expand(to))
            error = (found.double() - expected.double().sum(axis, keepdim=True)).abs().max()
            # PyTorch adds up in float32 and rounds once
            unit = max(1e-5, torch.finfo(found.dtype).eps / 2)
            assert error <= unit * expected.double().abs().sum(axis).max(), (
                f"{operator} by {path}: {name} expanded at {axis}: {error}"
            )
