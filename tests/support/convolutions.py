# SPDX-License-Identifier: Apache-2.0
"""Convolution layers in training: the block that has them, and the comparison of some steps with PyTorch's."""

import torch
from torch import nn

from support import models
from support.models import blocks

OPERATOR = "batch_norm_activation"


def training_block(library="timm"):
    """The first block, in float64 and channels-last, in training, and an input."""
    block = blocks(models.build(library).double())[0].train().to(memory_format=torch.channels_last)
    channels = next(module for module in block.modules() if isinstance(module, nn.Conv2d)).in_channels
    x = torch.randn(2, channels, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    return block, x.contiguous(memory_format=torch.channels_last)


def stepped(block, x, steps=2):
    """The outputs of some steps of SGD, then gradients, parameters and buffers."""
    optimizer = torch.optim.SGD(block.parameters(), lr=0.1)
    outputs = []
    for step in range(steps):
        optimizer.zero_grad()
        x = x.detach().requires_grad_()
        outputs.append(block(x + step))
        outputs[-1].square().mean().backward()
        optimizer.step()
    found = {f"output {step}": y.detach() for step, y in enumerate(outputs)} | {"gradient of x": x.grad}
    found |= {f"gradient of {name}": p.grad for name, p in block.named_parameters() if p.grad is not None}
    return found | dict(block.state_dict())


def assert_trains_alike(ours, plain, x):
    expected, found = stepped(plain, x), stepped(ours, x)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        scale = value.double().abs().max().clamp(min=1)
        torch.testing.assert_close(
            found[name], value, rtol=0, atol=1e-9 * scale.item(), msg=lambda m, n=name: f"{n}: {m}"
        )
