# SPDX-License-Identifier: Apache-2.0
"""The one contract between the operators and the backends below them.

Example:
    >>> class Tpu(Backend):
    ...     name, device_type, dtypes = "tpu", "xla", (torch.bfloat16,)
    ...     supports = {"layer_norm": lambda call: [] if call.shape[-1] % 8 == 0 else ["rows of odd width"]}
    ...
    ...     def unavailable(self, device_type):
    ...         return [] if device_type == "xla" else [f"it is for TPUs, and the tensors are on {device_type}"]

An operator describes itself by a `Call`: devices, dtypes and shapes, never values, so that ``torch.compile`` folds
whatever follows from it. A backend answers with reasons: an empty list means that it serves the call. The same reasons
feed the automatic choice, the error where a backend was asked for by name, the log, and ``mvit-kernels info``.
"""

from __future__ import annotations

import enum
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from .library import SCHEMAS, TransformerLayerWeights


class Call(NamedTuple):
    """What a backend may base its answer on. `facts` are the operator's own: widths, heads, patch, …"""

    operator: str
    device_type: str
    dtype: torch.dtype
    needs_grad: bool
    shape: tuple[int, ...]
    facts: tuple[tuple[str, Any], ...]
    obstacle: str = ""  # why nothing but PyTorch's own operators can serve it

    def fact(self, name: str) -> Any:
        """The operator's own fact `name`."""
        return dict(self.facts)[name]


Predicate = Callable[[Call], list[str]]  # the reasons why a backend cannot serve the call


class StackPlan(enum.Enum):
    """How a stack of transformer layers is divided into calls (`mvit_kernels.ops.transformer_on_map`).

    It says where the cuts are. Which backend serves each piece is chosen for that piece, as for any other call.
    """

    WHOLE = "the operator `transformer`, once"
    LAYERS = "one `transformer_layer` a layer where a backend has it, else as OPERATORS"
    OPERATORS = "the four operators of a layer, one after another, on rows in the map's order"
    SEQUENCES = "plain PyTorch, on rows that are put into sequence order once a stack"


class Backend(ABC):
    """One implementation of some of the operators, for one type of device.

    Its raw operators are registered as ``mvit_kernels::<operator>.<name>`` (`mvit_kernels.backends.library`).
    """

    name: ClassVar[str]
    device_type: str  # of the tensors that its kernels take
    dtypes: tuple[torch.dtype, ...]
    supports: Mapping[str, Predicate]  # an entry for each operator that there are kernels for
    # Whether it packs the weights of ``transformer`` once and recognises them by identity: they are then handed over as
    # they are, not cast to the dtype of the rows.
    packs_weights: ClassVar[bool] = False

    @abstractmethod
    def unavailable(self, device_type: str) -> list[str]:
        """Why it cannot be used on this machine's `device_type` at all; empty if it can."""

    def reasons_against(self, call: Call) -> list[str]:
        """Why it cannot serve `call`; empty if it can."""
        reasons = list(unavailable(self.name, call.device_type))
        if call.obstacle:
            reasons.append(call.obstacle)
        if call.needs_grad and f"{call.operator}_backward" not in SCHEMAS:
            reasons.append(f"{call.operator} is for inference, and this call needs a gradient")
        predicate = self.supports.get(call.operator)
        return [*reasons, f"it has no {call.operator}"] if predicate is None else reasons + predicate(call)

    def plan_stack(self, stack: Call, attention: Call, dropout: bool) -> StackPlan | None:
        """How it would have a stack of layers divided; None where it has no part in it.

        Args:
            stack: the call of ``transformer`` that would be all of it.
            attention: the call of ``patch_attention`` of one of its layers.
            dropout: whether dropout or drop-path is live, which ``transformer`` has none of.
        """
        if not dropout and not self.reasons_against(stack):
            return StackPlan.WHOLE
        return None if self.reasons_against(attention) else StackPlan.LAYERS

    def pack(  # noqa: B027 (most have nothing to prepare)
        self,
        layers: Sequence[TransformerLayerWeights],
        final_norm: tuple[Tensor, Tensor] | None,
        num_heads: int,
        dtype: torch.dtype,
    ) -> None:
        """Prepare the weights of a frozen stack before its first call; by default there is nothing to prepare."""


REGISTRY: dict[str, Backend] = {}  # in the order of `mvit_kernels.backends.library.BACKENDS`


@torch.compiler.assume_constant_result  # it may load a library, which is no business of a trace
def unavailable(backend: str, device_type: str) -> tuple[str, ...]:
    """Why `backend` cannot run on this machine's `device_type` at all; empty if it can."""
    if backend not in REGISTRY:
        return (f"this version of mvit_kernels has no {backend} kernels",)
    return tuple(REGISTRY[backend].unavailable(device_type))
