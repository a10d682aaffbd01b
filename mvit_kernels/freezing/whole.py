# SPDX-License-Identifier: Apache-2.0
"""A frozen network as one native call, from the image to the logits or to the last map.

Part by part, a frozen model is several native calls (of timm's: stem, stages, last convolution; of Kornia's and Hugging
Face's: a dozen), then pooling and a linear layer in PyTorch. Each is a trip through Python and the dispatcher, whose
code is cold after a pause: at batch 1, timm's XXS in bfloat16 spent a tenth of its time between them. So `freeze`
changes the model's class to a subclass of the same name whose ``forward`` makes one call of all. Modules and
``state_dict`` stay as they are. What one call cannot serve (hooks inside, another device, tracing, a head that was
replaced by another kind, calls that ask for more) runs the library's own ``forward``.

What each library's network computes is in `mvit_kernels.freezing.chains`.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from itertools import chain
from operator import eq, is_
from typing import Any, NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from .._utils.arguments import check_model
from .._utils.plain import tensor_reason
from .._utils.text import some
from .._utils.transforms import channels_last
from . import changes
from .chains import Chain, calls_of, chain_of
from .chains._chain import is_linear
from .frozen import Frozen
from .modules import FrozenConv2d, FrozenMean, FrozenSequential
from .native import Native, hooked, is_current, kind_for, kind_on
from .program import NotNative

_CALL = "_mvit_call"  # key in the model's __dict__
_END = (object(),)
_classes: dict[type[nn.Module], type[nn.Module]] = {}


class WholeNetwork(NamedTuple):
    """A frozen model as one chain of frozen modules, from the image to the result; see `whole_network`.

    Args:
        links: the chain; ``links.native()`` is its native call.
        channels: of the result; `links` computes one more, of zeros, if the number of classes is odd.
        vector: whether the result is (B, channels); else it is a map, (B, channels, height, width).
        logits: whether the channels are classes, as opposed to features.
    """

    links: FrozenSequential
    channels: int
    vector: bool
    logits: bool

    def result(self, y: Tensor) -> Tensor:
        """The model's result from the output of `links`: contiguous logits or features, or a channels-last map."""
        if self.vector:
            return y.flatten(1)[:, : self.channels].contiguous()
        # A channel less leaves gaps between the pixels.
        return y if y.shape[1] == self.channels else channels_last(y[:, : self.channels])


def whole_network(model: nn.Module) -> WholeNetwork:
    """A frozen model as one chain, as it is now; what it computes natively is, bit for bit, what the model returns.

    Example:
        >>> whole = whole_network(mvit_kernels.freeze(MobileViT("xxs", num_classes=21)))
        >>> whole.channels, whole.vector, whole.logits
        (21, True, True)
        >>> torch.equal(whole.result(whole.links(images)), model(images))
        True

    A classifier (timm's, Hugging Face's, cvnets' and ours) has logits. DeepLabv3 (Hugging Face's and ours) has a map of
    logits at the network's stride, as these models return it: it is their losses, and our ``segment``, that resize. A
    backbone has its last map, or as timm's does the pooled features. Of Hugging Face's ``MobileViTModel``, which
    returns both, it is the last map. A frozen block, or any other chain of frozen modules, is one too.

    Args:
        model: what `freeze` returned, or a part of it.

    Raises:
        TypeError: `model` is no ``nn.Module``.
        NotNative: it is no single chain on the CPU, with the reason why.
    """
    check_model("whole_network", model)
    kind = type(model).__name__
    if not any(isinstance(part, Frozen) for part in model.modules()):
        raise NotNative(f"{kind} is not frozen; give what freeze() returns")
    devices = {value.device.type for value in (*model.parameters(), *model.buffers())}
    if devices != {"cpu"}:
        raise NotNative(f"{kind} is on {some(sorted(devices))}; move it with .to('cpu')")
    training = [name or kind for name, part in model.named_modules() if part.training]
    if training:
        raise NotNative(f"{kind}: in training mode: {some(training)}; call eval() on each")
    watched = [name or kind for name, part in model.named_modules() if name and hooked([part])]
    if watched:
        raise NotNative(f"{kind}: hooks, which would not be called: {some(watched)}; remove them")
    kind = kind_on("cpu")
    call = _current(model, kind) if type(model) in _classes.values() else _call_of(model, kind)
    if isinstance(call.whole, WholeNetwork) and isinstance(call.network, Native):
        return call.whole
    reasons = [str(call.whole if isinstance(call.whole, NotNative) else call.network)]
    report = getattr(model, "freeze_report", None)
    reasons += [f"{name}: {reason}" for name, reason in (*report.left, *report.composed)] if report else []
    raise NotNative(f"{kind} is no single chain of native steps: {'; '.join(reasons)}")


def freeze_whole(model: nn.Module) -> None:
    """Make one native call of `model` if it is a network that is known and everything in it is frozen."""
    if isinstance(model, Frozen):
        return  # one call already
    devices = {value.device.type for value in (*model.parameters(), *model.buffers())}
    call = _call_of(model, kind_on("cuda" if devices == {"cuda"} else "cpu"))
    if not isinstance(call.network, Native):
        return
    for module in model.modules():
        if isinstance(module, Frozen):
            module._network = None  # its packed weights; packed again only if a call goes part by part
    model.__class__ = _in_one_call(type(model))
    model.__dict__[_CALL] = call


@dataclass(slots=True)
class _Call:
    """A model's native call, and everything that it was built from."""

    whole: WholeNetwork | NotNative
    network: Native | NotNative
    first: Frozen | None  # module of the chain
    chain: Chain | None
    owners: tuple[dict[str, Any], ...]  # the `_modules`, `_parameters` and `_buffers` that were read
    values: tuple[Any, ...]
    facts: tuple[Any, ...]
    weights: tuple[Tensor, ...]  # the classifier's; a user may change these in place
    versions: tuple[tuple[int, int], ...]
    generations: tuple[tuple[Frozen, int], ...]
    seen: object = None  # the last change of anything frozen before all generations were looked at

    def is_current(self) -> bool:
        if self.seen is not changes.last:
            now = changes.last
            if any(part.generation != generation for part, generation in self.generations):
                return False
            self.seen = now
        return (
            all(map(is_, chain(chain.from_iterable(map(dict.values, self.owners)), _END), self.values))
            and _versions(self.weights) == self.versions
            and (self.chain is None or all(map(eq, _facts(self.chain), self.facts)))
        )

    def __call__(self, x: Tensor, plan: Any) -> Tensor:
        rows = self.network.rows(x, plan)
        if self.whole.vector and self.network.out_channels == self.whole.channels:
            return rows.view(-1, self.whole.channels)
        return self.whole.result(rows.permute(0, 3, 1, 2))

    def check(self, x: Tensor) -> None:
        """Raise what the library's forward, or the first frozen module, raises of such an image."""
        for check in self.chain.checks:
            check(x)
        self.first._check(x)

    def skips_nothing(self, model: nn.Module) -> bool:
        """Whether the modules that the call goes past would do nothing now: no hook, no dropout, no patched forward."""
        if self.chain is None or model.training or any(part.training for part in self.chain.passed):
            return False
        passed = self.chain.passed if self.chain.classifier is None else (*self.chain.passed, self.chain.classifier)
        return not hooked(list(passed)) and not any("forward" in part.__dict__ for part in passed)


def as_library_class(model: nn.Module) -> nn.Module:
    """`model` itself, which `freeze_whole` may have made one call, with the class that it had before."""
    if type(model) in _classes.values():
        model.__class__ = type(model)._mvit_library_class
        model.__dict__.pop(_CALL, None)
    return model


def _in_one_call(original: type[nn.Module]) -> type[nn.Module]:
    if original in _classes:
        return _classes[original]
    calls = calls_of(original)

    @functools.wraps(original.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        x = calls.image(self, args, kwargs)
        kind = kind_for(x)
        if kind is not None:
            call = _current(self, kind)
            if type(call.network) is kind and call.skips_nothing(self):
                call.check(x)
                plan = call.network.plan(x)
                if plan is not None:
                    return calls.output(self, kwargs, call(x, plan))
        return original.forward(self, *args, **kwargs)

    def reduce(self: Any, protocol: int) -> tuple[Any, ...]:
        return _rebuild, (original,), {key: value for key, value in self.__dict__.items() if key != _CALL}

    namespace = {"forward": forward, "__reduce_ex__": reduce, "_mvit_library_class": original}
    namespace |= {name: getattr(original, name) for name in ("__module__", "__qualname__", "__doc__")}
    _classes[original] = type(original.__name__, (original,), namespace)
    return _classes[original]


def _rebuild(original: type[nn.Module]) -> nn.Module:
    """A model without state, as pickle and deepcopy want it: its class cannot be imported by name."""
    cls = _in_one_call(original)
    return cls.__new__(cls)


def _current(model: nn.Module, kind: type[Native]) -> _Call:
    """The native call for the model as it is now."""
    call = model.__dict__.get(_CALL)
    if call is None or not is_current(call.network, kind) or not call.is_current():
        call = _call_of(model, kind)
        if isinstance(call.network, Native) or call.network.lasts:
            model.__dict__[_CALL] = call
    return call


def _call_of(model: nn.Module, kind: type[Native]) -> _Call:
    known: Chain | None = None
    whole: WholeNetwork | NotNative
    network: Native | NotNative
    try:
        where = kind.place_of_weights()
        if len(devices := {value.device for value in (*model.parameters(), *model.buffers())}) > 1:
            raise NotNative(f"its weights are on several devices: {some(sorted(map(str, devices)))}")
        if any(device.type != where for device in devices):
            raise NotNative(f"its weights are not on {'the CPU' if where == 'cpu' else 'a GPU'}")
        if isinstance(model, Frozen):
            whole = WholeNetwork(_joined(model), 0, vector=False, logits=False)
        else:
            known = chain_of(model)
            whole = _whole(known)
        whole.links.cuda_graph = next(part.cuda_graph for part in model.modules() if isinstance(part, Frozen))
        network = whole.links.native(kind)
        if isinstance(network, Native):
            whole = whole._replace(channels=whole.channels or network.out_channels)
    except NotNative as reason:
        whole = network = reason.about_kind(kind)
    owned = [model, *known.passed] if known is not None else _outside(model)
    owners = [module._modules for module in owned if isinstance(module._modules, dict)]  # not a ScriptModule's
    weights: tuple[Tensor, ...] = ()
    if known is not None and known.classifier is not None:
        owners += [known.classifier._parameters, known.classifier._buffers]
        weights = tuple(value for owner in owners[-2:] for value in owner.values() if _is_plain(value))
    if any(value.is_inference() for value in weights):
        reason = NotNative("its classifier's weights are inference tensors, which do not count their changes")
        whole = network = reason.about_kind(kind)
        weights = ()
    return _Call(
        whole,
        network,
        whole.links[0] if isinstance(whole, WholeNetwork) else None,
        known,
        tuple(owners),
        tuple(chain(chain.from_iterable(map(dict.values, owners)), _END)),
        () if known is None else _facts(known),
        weights,
        _versions(weights),
        tuple((part, part.generation) for part in model.modules() if isinstance(part, Frozen)),
    )


def _whole(known: Chain) -> WholeNetwork:
    """The chain as frozen modules; raises `NotNative` if its classifier cannot be one of them."""
    dtypes = {value.dtype for part in known.body for value in part.buffers() if value.is_floating_point()}
    classifier = known.classifier
    if classifier is not None:
        dtypes |= {value.dtype for value in (*classifier.parameters(), *classifier.buffers())}
    if len(dtypes) != 1:
        raise NotNative(f"its weights are of several dtypes: {some(sorted(map(str, dtypes)))}")
    pooled = (FrozenMean(known.pools),) if known.pools else ()
    if classifier is None:
        return WholeNetwork(FrozenSequential(*known.body, *pooled), known.pools, bool(known.pools), logits=False)
    weight, bias = _matrix(classifier, bool(known.pools))
    classes = weight.shape[0]
    odd = classes % 2  # a class more, since products of pairs want even numbers of channels everywhere
    last = FrozenConv2d(F.pad(weight.detach(), (0, 0, 0, odd))[:, :, None, None], F.pad(bias.detach(), (0, odd)))
    return WholeNetwork(FrozenSequential(*known.body, *pooled, last), classes, bool(known.pools), logits=True)


def _matrix(classifier: nn.Module, after_mean: bool) -> tuple[Tensor, Tensor]:
    """The classifier's weight, (classes, features), and its bias."""
    if isinstance(classifier, Frozen):
        plain = isinstance(classifier, FrozenConv2d) and classifier.weight.shape[2:] == (1, 1)
        if after_mean or not plain or classifier.groups != 1 or classifier.activation or set(classifier.stride) != {1}:
            raise NotNative(f"its classifier is a {type(classifier).__name__} ({classifier.extra_repr()})")
        return classifier.weight.flatten(1), classifier.bias
    weight, bias = classifier._parameters.get("weight"), classifier._parameters.get("bias")
    if not after_mean or not is_linear(classifier) or weight is None:
        raise NotNative(f"its classifier is a {type(classifier).__name__}, not a linear layer")
    for name, value in (("weight", weight), ("bias", bias)):
        reason = tensor_reason(name, value)
        if reason is not None:
            raise NotNative(f"its classifier's {reason}")
    return weight, weight.new_zeros(weight.shape[0]) if bias is None else bias


def _joined(module: Frozen) -> FrozenSequential:
    return module if isinstance(module, FrozenSequential) else FrozenSequential(module)


def _outside(model: nn.Module) -> list[nn.Module]:
    """`model` and its modules that are not frozen nor inside one that is."""
    if isinstance(model, Frozen):
        return []
    return [model, *(part for child in model.children() for part in _outside(child))]


def _facts(known: Chain) -> tuple[Any, ...]:
    return tuple(getattr(owner, name, None) for owner, name in known.facts)


def _is_plain(value: Tensor | None) -> bool:
    return value is not None and tensor_reason("", value) is None


def _versions(weights: tuple[Tensor, ...]) -> tuple[tuple[int, int], ...]:
    """What tells that values were changed in place, or through ``.data``."""
    return tuple((weight._version, weight.data_ptr()) for weight in weights)
