# SPDX-License-Identifier: Apache-2.0
"""`Inspector`: reads the parts of a block for an adapter, and checks each of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from .._utils.plain import is_identity, is_plain, is_silu
from .._utils.transforms import is_shard, overrides, why_not
from ._block import BlockParts, LayerModules, Refusal, Seen, has_hooks, original_class


class Inspector:
    """Collects the reasons against a block while an adapter reads its parts; paths are relative to the block.

    Types are compared exactly, and a library's own classes by package as well: a subclass, a quantized, LoRA-wrapped
    or parametrized linear, or an unrelated class of the same name computes something else. For the same reason the
    bypassed part of the block must not contain a module that the adapter did not read.

    Args:
        block: the library's block, accelerated or not.
        package: the library's import name; "" if its classes were copied into another package.
        name: name of the block's class.
        bypassed: children of the block that the fast path does not call, with everything below them.
    """

    def __init__(self, block: nn.Module, package: str, name: str, bypassed: Sequence[str]) -> None:
        self.package = package
        self.reasons: list[str] = []
        self._modules = {"": block}
        for child in bypassed:
            root = block._modules[child]
            if root is not None:
                self._modules.update(root.named_modules(prefix=child, remove_duplicate=False))
        self._looked_at = {""}
        self._facts: list[tuple[nn.Module, str, Any]] = []
        self._heads: list[tuple[int, int | None, float | None]] = []
        cls = original_class(block)
        self.require(
            cls.__name__ == name,
            f"it is a {cls.__name__}, derived from {name}, and may compute something different (call fully_shard after "
            "accelerate)",
        )
        replaced = cls is type(block) and "forward" in block.__dict__
        self.require(not replaced, "its forward was replaced on the instance")

    def get(self, path: str) -> nn.Module | None:
        """The module at `path`; None, and a reason, if there is none."""
        self._looked_at.add(path)
        module = self._modules.get(path)
        if module is None:
            self.reasons.append(f"it has no {path}")
        return module

    def own(self, path: str, name: str) -> nn.Module | None:
        """The module at `path`, exactly of the library's class `name`: the fast path replaces its forward."""
        module = self.get(path)
        if module is None or self._is_own(module, name):
            return module
        return self._refuse(path, module, f"{self.package or 'the library'}'s {name} is wanted")

    def sequence(self, path: str, cls: type[nn.Sequential] | type[nn.ModuleList], length: int | None = None) -> int:
        """Require a plain container at `path`; return its length, or 0 if it is something else."""
        module = self.get(path)
        if type(module) is not cls:
            self._refuse(path, module, f"a plain {cls.__name__} is wanted")
            return 0
        if length is not None and len(module) != length:
            self.reasons.append(f"{path} has {len(module)} steps instead of {length}")
        return len(module)

    def linear(self, path: str) -> nn.Linear | None:
        module = self.get(path)
        if type(module) is nn.Linear:
            return module
        return self._refuse(
            path, module, "only a plain nn.Linear is fused, none that is quantised, LoRA-wrapped or parametrised"
        )

    def norm(self, path: str) -> nn.LayerNorm | None:
        """nn.LayerNorm, or the library's subclass of that name (timm's can use apex; cvnets': see `cvnets.takes`)."""
        norm = self.get(path)
        if type(norm) is not nn.LayerNorm:
            if not (isinstance(norm, nn.LayerNorm) and self._is_own(norm, "LayerNorm")):
                return self._refuse(path, norm, "only LayerNorm is fused")
        self._facts.append((norm, "eps", norm.eps))
        if norm.weight is None or norm.bias is None:
            self.reasons.append(f"{path} has no weight or no bias")
        if len(norm.normalized_shape) != 1:
            self.reasons.append(f"{path} normalises over several axes; only the last is fused")
        return norm

    def silu(self, path: str) -> None:
        module = self.get(path)
        if not is_silu(module):
            self._refuse(path, module, "only SiLU is fused")

    def dropout(self, path: str, also: str = "") -> nn.Module | None:
        """An identity, nn.Dropout, the library's own Dropout, or its class `also`."""
        module = self.get(path)
        if is_identity(module) or type(module) is nn.Dropout or self._is_own(module, also):
            return module
        if not self.package and self._is_own(module, "Identity"):
            return module
        if self._is_own(module, "Dropout") or is_plain(module, nn.Dropout):
            return module
        return self._refuse(path, module, "only a Dropout is supported there")

    def softmax(self, path: str) -> None:
        module = self.get(path)
        if type(module) is not nn.Softmax or module.dim != -1:
            self._refuse(path, module, "a softmax over the last axis is wanted")

    def absent(self, owner: str, name: str) -> None:
        """Require that a step the fast path lacks is Identity, None, or missing in this release of the library."""
        if getattr(self._modules.get(owner), name, None) is not None:
            path = f"{owner}.{name}"
            module = self.get(path)
            if type(module) is not nn.Identity:
                self._refuse(path, module, "the fast path has no such step")

    def fact(self, path: str, name: str) -> Any:
        """A plain attribute that affects the computation, or None. Its value is compared again at every call."""
        module = self._modules.get(path)
        value = getattr(module, name, None)
        if value is not None:
            self._facts.append((module, name, value))
        return value

    def heads(
        self, path: str, num_heads: str = "num_heads", head_dim: str | None = None, scale: str | None = None
    ) -> None:
        """Record how a layer's attention splits its channels; `head_dim` and `scale` if the library has these too."""
        heads = self.fact(path, num_heads)
        if not isinstance(heads, int) or heads < 1:
            self.reasons.append(f"{path} has no {num_heads}, a positive int")
        else:
            self._heads.append((heads, head_dim and self.fact(path, head_dim), scale and self.fact(path, scale)))

    def require(self, condition: bool, reason: str) -> None:
        if not condition:
            self.reasons.append(reason)

    def parts(
        self,
        *,
        layers: Sequence[LayerModules],
        final_norm: nn.LayerNorm | None,
        before: Sequence[nn.Module],
        after: Sequence[nn.Module],
        fusion: nn.Module | None,
        patch_size: Any,
        downsampling: nn.Module | None = None,
        input_first: bool = True,
    ) -> BlockParts:
        """The block as `BlockParts`; raises `Refusal` if there is any reason against it."""
        for path, module in self._modules.items():
            if path and has_hooks(module):
                self.reasons.append(f"{path} carries a hook, which would no longer be called; put it on the block")
            if path and "forward" in module.__dict__:
                self.reasons.append(f"the forward of {path} was replaced on the instance")
        if not torch.compiler.is_compiling():  # tracers replace parameters with tensor subclasses of their own
            self._subclasses()
        if not layers:
            self.reasons.append("it has no transformer layers")
        pair = isinstance(patch_size, tuple) and len(patch_size) == 2
        if not (pair and all(isinstance(side, int) and side >= 1 for side in patch_size)):
            self.reasons.append(f"its patch size is {patch_size!r}; two positive ints are wanted")
        seen = Seen(tuple(self._modules.values()), tuple(self._facts))
        if self.reasons:
            raise Refusal(self.reasons, seen)

        for path, module in self._modules.items():
            if path not in self._looked_at:
                self.reasons.append(f"{path}, a {type(module).__name__}, is not part of this library's block")
        self.require(len({heads for heads, _, _ in self._heads}) == 1, "its layers differ in their heads")
        norms = [norm for layer in layers for norm in (layer.norm1, layer.norm2)]
        norms += [final_norm] if final_norm is not None else []
        self.require(len({norm.eps for norm in norms}) == 1, "its LayerNorms have different eps")
        for index, layer in enumerate(layers):
            self._widths(index, layer, final_norm)
        if self.reasons:
            raise Refusal(self.reasons, seen)
        return BlockParts(
            downsampling=downsampling,
            before=tuple(before),
            layers=tuple(layers),
            final_norm=final_norm,
            after=tuple(after),
            fusion=fusion,
            input_first=input_first,
            num_heads=self._heads[0][0],
            patch_size=patch_size,
            eps=norms[0].eps,
            seen=seen,
        )

    def _subclasses(self) -> None:
        """Add a reason for each Tensor subclass among the parameters. Shards pass: FSDP gathers them before a call."""
        found: dict[type, list[str]] = {}
        for path, module in self._modules.items():
            for name, value in module._parameters.items() if path else ():
                if overrides(type(value)) and not is_shard(type(value)):
                    found.setdefault(type(value), []).append(f"{path}.{name}")
        for cls, names in found.items():
            more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
            self.reasons.append(f"{names[0]}{more} is {why_not(cls)}")

    def _widths(self, index: int, layer: LayerModules, final_norm: nn.LayerNorm | None) -> None:
        d, inner = layer.norm1.normalized_shape[0], layer.proj.in_features
        heads, head_dim, scale = self._heads[index]
        fits = (
            all(linear.out_features * len(layer.qkv) == 3 * inner for linear in layer.qkv)
            and all(linear.in_features == d for linear in (*layer.qkv, layer.fc1))
            and len({linear.bias is None for linear in layer.qkv}) == 1
            and inner % heads == 0
            and head_dim in (None, inner // heads)
            and layer.proj.out_features == layer.fc2.out_features == layer.norm2.normalized_shape[0] == d
            and layer.fc1.out_features == layer.fc2.in_features
            and (final_norm is None or final_norm.normalized_shape[0] == d)
        )
        if not fits:
            self.reasons.append(f"the widths of layer {index} do not fit together (pruned heads?)")
        elif scale not in (None, (inner // heads) ** -0.5):
            self.reasons.append(f"layer {index} scales its scores by {scale}, not by head_dim ** -0.5")
        if layer.proj.bias is None or layer.fc1.bias is None or layer.fc2.bias is None:
            self.reasons.append(f"a linear of layer {index} has no bias")

    def _is_own(self, module: nn.Module, name: str) -> bool:
        """Whether `module` is exactly the library's class `name`, also if the library is vendored (``x.cvnets.y``)."""
        return type(module).__name__ == name and (
            not self.package or self.package in type(module).__module__.split(".")
        )

    def _refuse(self, path: str, module: nn.Module | None, why: str) -> None:
        """Add the reason, unless `get` already reported that the module is missing."""
        if module is not None:
            self.reasons.append(f"{path} is {type(module).__module__}.{type(module).__name__}; {why}")
