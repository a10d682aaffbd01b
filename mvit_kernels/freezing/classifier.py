# SPDX-License-Identifier: Apache-2.0
"""A frozen classifier as one native call, from the image to the logits.

Frozen, a model of timm or of ours is three native calls (stem, stages, last convolution), then pooling and a linear
layer in PyTorch. Each is a trip through Python and the dispatcher, whose code is cold after a pause: at batch 1, XXS in
bfloat16 spent a tenth of its time between them. So `freeze` changes the model's class to a subclass of the same name
whose ``forward`` makes one call of all. Modules and ``state_dict`` stay as they are. What one call cannot serve (hooks
inside, another device, tracing, a head that was replaced by another kind) runs the library's own ``forward``.
"""

from __future__ import annotations

from itertools import chain
from operator import is_
from typing import Any, NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from .._utils.plain import does_nothing, is_global_mean, is_own, is_plain, tensor_reason
from .modules import Frozen, FrozenConv2d, FrozenMean, FrozenSequential
from .network import Network, hooked, network_allowed

_CALL = "_mvit_call"  # key in the model's __dict__
_classes: dict[type[nn.Module], type[nn.Module]] = {}


class _Parts(NamedTuple):
    """What a classifier consists of."""

    body: tuple[nn.Module, ...]  # called one after another
    head: tuple[nn.Module, ...]  # modules that pool and classify, the linear layer last


class _Call(NamedTuple):
    """A classifier's native call, and what it was built from."""

    links: FrozenSequential | None  # None: the model is not made of such parts any more
    head: tuple[nn.Module, ...]
    owners: tuple[dict, ...]  # the `_modules` and `_parameters` that were read
    values: tuple[nn.Module | Tensor | None, ...]
    weights: tuple[Tensor, ...]  # the linear layer's; unlike those of frozen modules they may be changed in place
    versions: tuple[int, ...]

    def is_current(self) -> bool:
        return (
            all(map(is_, chain.from_iterable(map(dict.values, self.owners)), self.values))
            and tuple(weight._version for weight in self.weights) == self.versions
        )


def freeze_classifier(model: nn.Module) -> None:
    """Make one native call of `model` if it is a classifier of timm or of ours whose layers are all frozen."""
    network = _network(model) if _parts_of(model) is not None else None
    if network is not None:
        for module in model.modules():
            if isinstance(module, Frozen):
                module._network = None  # its packed weights; packed again only if a call goes part by part
        model.__class__ = _in_one_call(type(model))


def as_library_class(model: nn.Module) -> nn.Module:
    """`model` itself, a frozen classifier, with the class that it had before `freeze_classifier`."""
    for original, in_one_call in _classes.items():
        if type(model) is in_one_call:
            model.__class__ = original
            model.__dict__.pop(_CALL, None)
    return model


def _in_one_call(original: type[nn.Module]) -> type[nn.Module]:
    if original in _classes:
        return _classes[original]

    def forward(self: Any, x: Tensor) -> Tensor:
        if network_allowed(x):
            network, head = _network(self), self.__dict__[_CALL].head
            if network is not None and not any(part.training for part in head[:-1]) and not hooked(head):
                for check in (getattr(self, "_check_images", None), self.__dict__[_CALL].links[0]._check):
                    if check is not None:  # the former is our own model's
                        check(x)
                if network.serves(x):
                    return network(x).flatten(1)[:, : head[-1].out_features].contiguous()
        return original.forward(self, x)

    def reduce(self: Any, protocol: int) -> tuple[Any, ...]:
        return _rebuild, (original,), {key: value for key, value in self.__dict__.items() if key != _CALL}

    namespace = {"forward": forward, "__reduce_ex__": reduce}
    namespace |= {name: getattr(original, name) for name in ("__module__", "__qualname__", "__doc__")}
    _classes[original] = type(original.__name__, (original,), namespace)
    return _classes[original]


def _rebuild(original: type[nn.Module]) -> nn.Module:
    """A classifier without state, as pickle and deepcopy want it: its class cannot be imported by name."""
    cls = _in_one_call(original)
    return cls.__new__(cls)


def _network(model: nn.Module) -> Network | None:
    """The native call for the model as it is now; None if there is none."""
    call = model.__dict__.get(_CALL)
    if call is None or not call.is_current():
        call = model.__dict__[_CALL] = _call_of(model)
    network = call.links.native() if call.links is not None else None
    return network if isinstance(network, Network) else None


def _call_of(model: nn.Module) -> _Call:
    parts = _parts_of(model)
    head = () if parts is None else parts.head
    owners = [module._modules for module in (model, *head) if module._modules]
    weights: tuple[Tensor, ...] = ()
    links = None
    if parts is not None:
        linear = head[-1]
        owners.append(linear._parameters)
        weights = tuple(value for value in linear._parameters.values() if value is not None)
        bias = linear.weight.new_zeros(linear.out_features) if linear.bias is None else linear.bias
        odd = linear.out_features % 2  # a class more, since products of pairs want even numbers of channels everywhere
        as_convolution = FrozenConv2d(
            F.pad(linear.weight.detach(), (0, 0, 0, odd))[:, :, None, None], F.pad(bias.detach(), (0, odd))
        )
        links = FrozenSequential(*parts.body, FrozenMean(linear.in_features), as_convolution)
    values = tuple(chain.from_iterable(map(dict.values, owners)))
    return _Call(links, head, tuple(owners), values, weights, tuple(weight._version for weight in weights))


def _parts_of(model: nn.Module) -> _Parts | None:
    modules = model._modules
    if is_own(model, "timm", "ByobNet") and is_own(modules.get("head"), "timm", "ClassifierHead"):
        head = model.head
        pooling, linear = head._modules.get("global_pool"), head._modules.get("fc")
        if not is_own(pooling, "timm", "SelectAdaptivePool2d") or set(pooling._modules) != {"pool", "flatten"}:
            return None
        pool, flatten = pooling.pool, pooling.flatten
        if is_own(pool, "timm", "FastAdaptiveAvgPool"):
            if not pool.flatten or getattr(pool, "input_fmt", "NCHW") != "NCHW" or not does_nothing(flatten):
                return None
        elif not is_global_mean(pool) or not is_plain(flatten, nn.Flatten) or flatten.start_dim != 1:
            return None
        idle = [part for part in head._modules.values() if part is not pooling and part is not linear]
        inside = (head, pooling, pool, flatten, *idle, linear)
    elif is_own(model, "mvit_kernels", "MobileViT"):
        idle, linear = [], modules.get("classifier")
        inside = (linear,)
    else:
        return None
    body = tuple(modules.get(name) for name in ("stem", "stages", "final_conv"))
    if not all(isinstance(part, Frozen) for part in body) or not all(map(does_nothing, idle)):
        return None
    if not is_plain(linear, nn.Linear) or linear.weight.device.type != "cpu":
        return None
    if {value.dtype for part in body for value in part.buffers()} != {linear.weight.dtype}:
        return None
    for name, value in linear._parameters.items():
        if tensor_reason(name, value) is not None or (value is not None and value.is_inference()):
            return None  # an inference tensor does not count its changes
    return _Parts(body, inside)
