# SPDX-License-Identifier: Apache-2.0
"""MobileViTs of every library, with weights that expose mistakes, and what tests do with all of them alike."""

from __future__ import annotations

import contextlib
import copy
import functools
import io
import pickle
from collections.abc import Callable, Iterator
from types import FunctionType

import torch
from torch import Tensor, nn

import mvit_kernels
from mvit_kernels._utils import third_party
from mvit_kernels.adapters import _block, _convolution, adapter_of

LIBRARIES = ("timm", "huggingface", "kornia", "cvnets", "own")

# Paths in a block: modules that the fast path does not call, and those that it does.
BYPASSED = {
    "timm": ("transformer", "transformer.0.attn", "transformer.1.mlp.act", "transformer.1.drop_path1", "norm"),
    "huggingface": (
        "transformer",
        "transformer.layer.0.attention.attention.key",
        "transformer.layer.1.output",
        "layernorm",
    ),
    "kornia": ("transformer", "transformer.layers.0.0.fn.attend", "transformer.layers.1.1"),
    "cvnets": ("global_rep.0", "global_rep.0.pre_norm_mha.1", "global_rep.1.pre_norm_ffn.2", "global_rep.2"),
    "own": ("transformer.0", "transformer.1.fc1", "norm"),
}
CALLED = {
    "timm": ("conv_kxk", "conv_1x1", "conv_proj", "conv_fusion"),
    "huggingface": ("downsampling_layer", "conv_kxk", "conv_1x1", "conv_projection", "fusion"),
    "kornia": ("conv1", "conv2", "conv3", "conv4"),
    "cvnets": ("local_rep", "local_rep.conv_1x1", "conv_proj", "fusion"),
    "own": ("conv_local", "conv_in", "conv_out", "conv_fusion"),
}

_HUGGINGFACE = {
    "xxs": dict(hidden_sizes=[64, 80, 96], neck_hidden_sizes=[16, 16, 24, 48, 64, 80, 320], expand_ratio=2.0),
    "xs": dict(hidden_sizes=[96, 120, 144], neck_hidden_sizes=[16, 32, 48, 64, 80, 96, 384], expand_ratio=4.0),
    "s": dict(hidden_sizes=[144, 192, 240], neck_hidden_sizes=[16, 32, 64, 96, 128, 160, 640], expand_ratio=4.0),
}


def timm(variant: str, **options) -> nn.Module:
    return third_party.import_timm().create_model(f"mobilevit_{variant}", **options)


def huggingface_config(variant: str, **options):
    transformers = third_party.import_transformers()
    return transformers.MobileViTConfig(**{"hidden_dropout_prob": 0.0} | _HUGGINGFACE[variant] | options)


def huggingface(variant: str, task: str = "ForImageClassification", **options) -> nn.Module:
    """Without its default dropouts of 0.1, unless they are asked for."""
    cls = getattr(third_party.import_transformers(), f"MobileViT{task}")
    return cls(huggingface_config(variant, **{"num_labels": 1000, "classifier_dropout_prob": 0.0} | options))


def kornia(variant: str, **options) -> nn.Module:
    library = third_party.import_kornia()
    try:
        from kornia.models.vit_mobile import MobileViT  # since 0.8.3
    except ImportError:
        MobileViT = library.contrib.MobileViT
    return MobileViT(variant, **options)


def cvnets(variant: str, **options) -> nn.Module:
    from support import cvnets

    return cvnets.MobileViT(variant, **options)


def own(variant: str, **options) -> nn.Module:
    return mvit_kernels.MobileViT(variant, **{"num_classes": 1000} | options)


_BUILDERS: dict[str, Callable[..., nn.Module]] = {
    "timm": timm,
    "huggingface": huggingface,
    "kornia": kornia,
    "cvnets": cvnets,
    "own": own,
}


def build(library: str, variant: str = "xxs", **options) -> nn.Module:
    """A model as its library makes it, not accelerated, in evaluation mode, with `sensible` weights; the caller may
    change it."""
    return _built(library, variant, tuple(sorted(options.items()))).copy()


def double(library: str = "timm", **options) -> nn.Module:
    """As `build`, in float64."""
    return build(library, **options).double()


@functools.cache
def _built(library: str, variant: str, options: tuple) -> Template:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = mvit_kernels.restore(_BUILDERS[library](variant, **dict(options)))
    return Template(sensible(model))


class Template:
    """A model to make copies of. They are unpickled, which is in C: 7 ms instead of the 22 ms of ``copy.deepcopy``, and
    the tests take some thousand. Tensors, and classes and functions that have no importable name, are not pickled."""

    def __init__(self, model: nn.Module) -> None:
        self.parts: list[object] = []
        places: dict[int, int] = {}
        file = io.BytesIO()
        pickler = pickle.Pickler(file, protocol=pickle.HIGHEST_PROTOCOL)

        def place(value: object) -> int | None:
            if not isinstance(value, Tensor | type | FunctionType):
                return None
            if id(value) not in places:
                places[id(value)] = len(self.parts)
                self.parts.append(value)
            return places[id(value)]

        pickler.persistent_id = place
        pickler.dump(model)
        self.pickled = file.getvalue()

    def copy(self) -> nn.Module:
        unpickler = pickle.Unpickler(io.BytesIO(self.pickled))
        unpickler.persistent_load = [copy.deepcopy(part) for part in self.parts].__getitem__
        return unpickler.load()


def first_block() -> nn.Module:
    """timm's network up to the first of its three blocks, with a mean of 48 channels as its output: for what is about
    models, and not about all that is in one. `mvit_kernels.verify` takes a third of the time."""
    net = build("timm")
    return nn.Sequential(net.stem, *net.stages[:3], nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()


def sensible(model: nn.Module, seed: int = 0) -> nn.Module:
    """Redraw the weights so that nothing vanishes, nothing is neutral and nothing saturates.

    Fresh models would hide mistakes: linear weights of 0.02 make attention uniform, biases are 0 and norms 1, Hugging
    Face's batch norms are drawn from N(0, 0.02). Here linear and convolution weights keep the variance, biases and
    affine parameters are random, and the running statistics are those of random images, slightly off.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(like: Tensor, mean: float, std: float) -> Tensor:
        return torch.randn(like.shape, generator=generator) * std + mean

    with torch.no_grad():
        for module in model.modules():
            is_norm = isinstance(module, (nn.BatchNorm2d, nn.LayerNorm))
            for name, value in module.named_parameters(recurse=False):
                if is_norm:
                    value.copy_(normal(value, float(name == "weight"), 0.1))
                elif value.dim() == 1:
                    value.copy_(normal(value, 0.0, 0.1))
                else:
                    value.copy_(normal(value, 0.0, value[0].numel() ** -0.5 * (2**0.5 if value.dim() == 4 else 1)))
        norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
        momenta = [norm.momentum for norm in norms]
        for norm in norms:
            norm.momentum = 1.0
        model.train()(images(2, 128, 128))
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
            norm.running_mean += normal(norm.running_mean, 0.0, 0.05)
            norm.running_var *= torch.rand(norm.running_var.shape, generator=generator) * 0.2 + 0.9
    return model.eval()


def images(batch: int, height: int, width: int, seed: int = 1) -> Tensor:
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(seed))


def output(result) -> Tensor:
    """A model's logits or last map, whatever the library wraps them in."""
    if isinstance(result, Tensor):
        return result
    return result.logits if hasattr(result, "logits") else result.last_hidden_state


def accelerated(model: nn.Module, **options) -> nn.Module:
    """An accelerated copy; it is an error if a block is declined."""
    return mvit_kernels.accelerate(copy.deepcopy(model), strict=True, **options)


def blocks(model: nn.Module) -> list[nn.Module]:
    """The three MobileViT blocks."""
    return [module for module in model.modules() if adapter_of(module) is not None]


@contextlib.contextmanager
def fast_calls() -> Iterator[list[tuple[int, ...]]]:
    """The shapes of the maps that took the fast path inside: without this, a block that declines passes every test."""
    shapes, original = [], _block.transformer_on_map

    def counted(x, *args, **kwargs):
        shapes.append(tuple(x.shape))
        return original(x, *args, **kwargs)

    _block.transformer_on_map = counted
    try:
        yield shapes
    finally:
        _block.transformer_on_map = original


@contextlib.contextmanager
def fused_norms() -> Iterator[list[str | None]]:
    """The activations of the batch norms that convolution layers ran as one operator inside."""
    activations, original = [], _convolution.unchecked

    def counted(*args):
        activations.append(args[-1])
        return original(*args)

    _convolution.unchecked = counted
    try:
        yield activations
    finally:
        _convolution.unchecked = original


def differentiated(model: nn.Module, x: Tensor, autocast: bool = False) -> tuple[Tensor, dict[str, Tensor]]:
    """The output in training, and the gradients of the images and of every parameter, for one fixed cotangent."""
    model.train()
    model.zero_grad()
    x = x.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = output(model(x))
    cotangent = torch.randn(y.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    (y.double() * cotangent).sum().backward()
    missing = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert not missing, f"no gradient reaches {missing}"
    return y.detach(), {"images": x.grad} | {name: parameter.grad for name, parameter in model.named_parameters()}


def assert_gradients_as_pytorch(
    ours: dict[str, Tensor], pytorch: dict[str, Tensor], truth: dict[str, Tensor], unit: float
) -> None:
    """The tolerance rule for every gradient: errors as root sums of squares, the band `unit` of the module's gradient.

    Two adaptations fit the rule to a whole network's backward pass, where all errors come through the same long chain.

    - The largest error of a gradient of 16 numbers depends on luck: that of two right paths differs by up to 2.1
      times (a batch norm's weight near the input, with nothing but attention computed in another order), their root
      sums of squares by 1.4 at most. So the rule's factor of 2 is applied to those.
    - Some gradients are zero in exact arithmetic and all of their value is rounding: of a key's bias, which shifts the
      scores of a row alike, and of what adds a constant to a channel before a batch norm in training (the last
      LayerNorm's bias, in Kornia the last fc2's). How large that rounding is can be told from the rest of the module.
    """

    def module(name: str) -> str:
        return name.rpartition(".")[0]

    squares: dict[str, float] = {}
    for name, value in truth.items():
        squares[module(name)] = squares.get(module(name), 0.0) + value.square().sum().item()
    for name, value in truth.items():
        error, allowed_for = ((gradients[name].double() - value).norm().item() for gradients in (ours, pytorch))
        bound = 2 * (allowed_for + unit * squares[module(name)] ** 0.5)
        assert error <= bound, (
            f"gradient of {name}: error {error:.2e}, PyTorch's {allowed_for:.2e}, allowed {bound:.2e}"
        )


def assert_same(ours: Tensor, expected: Tensor) -> None:
    """Equal in float64 up to the order of summation: a sharper test than any tolerance in float32."""
    assert ours.dtype == expected.dtype == torch.float64
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-10 * max(expected.abs().max().item(), 1.0))


def assert_same_draws(model: nn.Module, x: Tensor) -> Tensor:
    """With one seed, live dropout drops the same in `model` and in an accelerated copy on the reference backend: output
    and gradients agree in float64. Returns the model's own output."""
    results = []
    for candidate in (accelerated(model), model):
        torch.manual_seed(5)
        with mvit_kernels.use_backend("reference"), fast_calls() as calls:
            results.append(differentiated(candidate, x))
        assert len(calls) == (3 if candidate is not model else 0)
    (ours, our_gradients), (theirs, gradients) = results
    assert_same(ours, theirs)
    assert_gradients_as_pytorch(our_gradients, gradients, gradients, unit=1e-9)
    return theirs


def assert_dropout_left_on(model: nn.Module, x: Tensor) -> None:
    """Monte Carlo dropout, where the model evaluates and its dropout modules train: an accelerated copy drops the same
    on the reference backend, and something is dropped."""
    for module in model.modules():
        module.train(isinstance(module, nn.Dropout))
    outputs = []
    for candidate in (accelerated(model), model, copy.deepcopy(model).eval()):
        torch.manual_seed(5)
        with mvit_kernels.use_backend("reference"), torch.no_grad():
            outputs.append(output(candidate(x)))
    assert_same(outputs[0], outputs[1])
    assert not torch.equal(outputs[1], outputs[2])


def assert_same_when_checkpointed(
    model: nn.Module,
    x: Tensor,
    switch: Callable[[nn.Module, bool], object],
    inside: Callable[[nn.Module], nn.Module] = lambda block: block,
) -> None:
    """With gradient checkpointing, which `switch` turns on or off, each block runs again in backward with the same
    draws: `inside` gives the part of a block that is then called twice."""
    results = []
    for candidate, checkpointing in ((model, True), (accelerated(model), True), (accelerated(model), False)):
        switch(candidate, checkpointing)
        seen = []
        for block in blocks(candidate):
            inside(block).register_forward_pre_hook(lambda module, _, seen=seen: seen.append(module))
        torch.manual_seed(5)
        with mvit_kernels.use_backend("reference"), fast_calls() as calls:
            y, gradients = differentiated(candidate, x)
        results.append((y, gradients, len(seen), len(calls)))
    theirs, ours, plain = results
    assert theirs[2:] == (6, 0) and ours[2:] == (6, 6) and plain[2:] == (3, 3)
    for other in (theirs, plain):
        assert_same(ours[0], other[0])
        assert_gradients_as_pytorch(ours[1], other[1], other[1], unit=1e-9)
