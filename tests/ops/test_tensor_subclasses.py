# SPDX-License-Identifier: Apache-2.0
"""Weights and maps that are subclasses of Tensor: quantized, distributed, or with nothing but another name."""

import copy

import pytest
import torch
from torch import nn
from torch.distributed.tensor import Replicate, distribute_tensor
from torch.utils._pytree import tree_map

import mvit_kernels
from mvit_kernels import accelerate, report
from support import models
from support.cases import SMALL, call, make
from support.declined import evaluated
from support.fake_backend import NAME, fake_backend
from support.models import LIBRARIES, accelerated, assert_same, blocks, fast_calls


class Quantized(torch.Tensor):
    """Eight bits a value, as torchao keeps weights: PyTorch's own operators see the values, others see nothing."""

    @staticmethod
    def __new__(cls, values):
        return torch.Tensor._make_wrapper_subclass(cls, values.shape, dtype=values.dtype)

    def __init__(self, values):
        self.step = values.abs().max() / 127
        self.codes = (values / self.step).round().to(torch.int8)

    def values(self):
        return self.codes.to(self.dtype) * self.step

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.detach.default:
            return args[0]
        if function.namespace != "aten":
            raise NotImplementedError(f"{cls.__name__} does not know {function}")
        args, kwargs = tree_map(lambda v: v.values() if isinstance(v, cls) else v, (args, kwargs or {}))
        return function(*args, **kwargs)


class Named(nn.Parameter):
    """A parameter like any other."""


def quantize(block):
    for module in block.modules():
        weight = module._parameters.get("weight")
        if weight is not None and weight.dim() == 2:
            module.weight = nn.Parameter(Quantized(weight.detach()), requires_grad=False)


def dequantize(block):
    for module in block.modules():
        if isinstance(module._parameters.get("weight"), Quantized):
            module.weight = nn.Parameter(module.weight.values(), requires_grad=False)


@pytest.mark.parametrize("library", LIBRARIES)
def test_quantized_blocks(library):
    """Before and after `accelerate`: declined, with the reason, until the weights are plain again."""
    model = models.build(library).double()
    x = models.images(1, 64, 64).double()
    quantized = copy.deepcopy(model)
    quantize(blocks(quantized)[0])
    expected = evaluated(quantized, x)
    assert not torch.allclose(expected, evaluated(model, x), rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match="of class Quantized"):
        accelerate(quantized, strict=True)
    accelerate(quantized)
    after = accelerated(model)
    evaluated(after, x)
    quantize(blocks(after)[0])
    for candidate in (quantized, after):
        assert [block.accelerated for block in report(candidate).blocks] == [False, True, True]
        (reason,) = report(candidate).declined[0].reasons
        assert "more) is of class Quantized" in reason
        with fast_calls() as calls:
            assert_same(evaluated(candidate, x), expected)
        assert len(calls) == 2
    dequantize(blocks(after)[0])
    with fast_calls() as calls:
        assert_same(evaluated(after, x), expected)
    assert len(calls) == 3 and len(report(after).accelerated) == 3


def test_plain_parameters_of_another_name():
    model = models.build("timm")
    for module in blocks(model)[0].modules():
        for name, value in list(module._parameters.items()):
            if value is not None:
                module._parameters[name] = Named(value.detach())
    with fake_backend(["transformer"]), torch.no_grad(), fast_calls() as calls:
        accelerated(model)(models.images(1, 64, 64))
    assert len(calls) == 3


def test_distributed_weights(process_group):
    """Fully sharded weights are plain inside a call (adapters/test_accelerate_systems.py); these are not."""
    model = accelerated(models.build("timm").double())
    x = models.images(1, 64, 64).double()
    evaluated(model, x)
    mesh = torch.distributed.init_device_mesh("cpu", (1,))
    first = blocks(model)[0]
    for module in first.transformer.modules():
        for name, value in list(module._parameters.items()):
            module._parameters[name] = nn.Parameter(distribute_tensor(value.detach(), mesh, [Replicate()]))
    assert "of class DTensor" in report(model).declined[0].reasons[0]
    with fast_calls() as calls, pytest.raises(RuntimeError, match="mixed torch.Tensor and DTensor"):
        first(torch.randn(1, 48, 8, 8, dtype=torch.float64))  # the error of the block's own forward
    assert not calls


@pytest.mark.parametrize("operator", SMALL)
def test_operators(operator):
    """As the last tensor or as the map: PyTorch's operators serve it, and a backend asked for by name says why it
    cannot."""
    tensors, settings = make(
        operator, {**SMALL[operator], **({"dropout": None} if "dropout" in SMALL[operator] else {})}
    )
    for name in {next(iter(tensors)), [name for name in tensors if "weight" in name or name == "qkv"][-1]}:
        plain = Quantized(tensors[name])
        expected = call(operator, {**tensors, name: plain.values()}, settings, "oracle")
        with fake_backend([operator]):
            ours = call(operator, {**tensors, name: plain}, settings, None)
            torch.testing.assert_close(ours, expected, rtol=0, atol=1e-9 * expected.abs().max().item())
            with pytest.raises(mvit_kernels.BackendError, match="a tensor is of class Quantized"):
                call(operator, {**tensors, name: plain}, settings, NAME)


def test_a_map_of_fake_tensors():
    """Symbolic sizes are not keys of the cache of choices."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    qkv = torch.randn(3, 4, 6, 24)
    with fake_backend(["patch_attention"]), FakeTensorMode(shape_env=ShapeEnv()) as mode:
        fake = mode.from_tensor(qkv)
        out = mvit_kernels.patch_attention(fake, num_heads=2, patch_size=2)
        assert type(out) is type(fake) and tuple(out.shape) == (3, 4, 6, 8)
