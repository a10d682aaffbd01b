# SPDX-License-Identifier: Apache-2.0
"""The contract between the operators and the backends below them.

Example:
    >>> class Tpu(Backend):
    ...     name, device_type, dtypes = "tpu", "xla", (torch.bfloat16,)
    ...     supports = {"layer_norm": lambda call: [] if call.shape[-1] % 8 == 0 else ["rows of odd width"]}
    ...
    ...     def unavailable(self, device_type):
    ...         return [] if device_type == "xla" else [f"it is for TPUs, and the tensors are on {device_type}"]

An operator describes a call by a `Call`: devices, dtypes and shapes, never values, so that ``torch.compile`` folds
everything that follows from it. A backend answers with its reasons against the call; an empty list means that it serves
it. The same reasons feed the automatic choice, the error where a backend was requested by name, the log, and
``mvit-kernels info``.
"""

from __future__ import annotations

import enum
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from .._utils.compiling import assume_constant_result
from .library import SCHEMAS, TransformerLayerWeights, raw


class Call(NamedTuple):
    """All that a backend may base its answer on. `facts` are specific to the operator: widths, heads, patch size, …"""

    operator: str
    device_type: str
    dtype: torch.dtype
    needs_grad: bool
    shape: tuple[int, ...]  # of the operator's first tensor
    facts: tuple[tuple[str, Any], ...]
    obstacle: str = ""  # why only PyTorch's own operators can serve it

    def fact(self, name: str) -> Any:
        """The operator's fact `name`.

        Raises:
            KeyError: the operator has no such fact.
        """
        return dict(self.facts)[name]


Predicate = Callable[[Call], list[str]]  # the reasons why a backend cannot serve a call; empty if it can


class StackPlan(enum.Enum):
    """How a stack of transformer layers is divided into calls (`mvit_kernels.ops.transformer_on_map`).

    It says where the stack is cut. The backend of each piece is chosen for that piece, as for any other call.
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
    supports: Mapping[str, Predicate]  # an entry for each operator that it has kernels for
    # Whether it packs the weights of ``transformer`` once and recognises them by identity: they are then passed as they
    # are, not cast to the dtype of the rows.
    packs_weights: ClassVar[bool] = False

    @abstractmethod
    def unavailable(self, device_type: str) -> list[str]:
        """Why it cannot be used at all, on this machine, for tensors on `device_type`; empty if it can.

        Raises:
            ValueError: the user set it up in a way that nobody can follow. That never falls back to another backend.
        """

    def variant(self, dtype: torch.dtype) -> str:
        """Which of its kernels run here on tensors of `dtype`, for reports; "" where there is nothing to tell apart."""
        return ""

    def reasons_against(self, call: Call) -> list[str]:
        """Why it cannot serve `call`; empty if it can. All reasons are collected, not just the first."""
        reasons = list(unavailable(self.name, call.device_type))
        if call.obstacle:
            reasons.append(call.obstacle)
        if call.needs_grad and f"{call.operator}_backward" not in SCHEMAS:
            reasons.append(f"{call.operator} is for inference, and this call needs a gradient")
        predicate = self.supports.get(call.operator)
        return [*reasons, f"it has no {call.operator}"] if predicate is None else reasons + predicate(call)

    def run(self, name: str, *arguments: Any) -> Any:
        """Run the raw operator `name` for a call that it serves; a backend that has two ways takes the faster one.

        Args:
            name: of an operator with a gradient, or of its backward.
            arguments: of its schema.
        """
        return raw(name, self.name)(*arguments)

    def plan_stack(self, stack: Call, attention: Call, dropout: bool, alone: bool) -> StackPlan | None:
        """How it wants a stack of layers divided; None if it serves no part of it.

        Args:
            stack: the call of ``transformer`` for the whole stack.
            attention: the call of ``patch_attention`` in one of its layers.
            dropout: whether dropout or drop-path is live, which ``transformer`` does not have.
            alone: whether no other backend's kernels would serve the pieces: it was asked for by name, or they cannot.
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
        """Pack the weights of a frozen stack before its first call; does nothing by default.

        Args:
            layers, final_norm, num_heads: as in `mvit_kernels.transformer`.
            dtype: of the rows.
        """


REGISTRY: dict[str, Backend] = {}  # in the order of `mvit_kernels.backends.library.BACKENDS`


@assume_constant_result  # it may load a library, which must not be traced
def unavailable(backend: str, device_type: str) -> tuple[str, ...]:
    """Why `backend` cannot be used at all, on this machine, for tensors on `device_type`; empty if it can."""
    if backend not in REGISTRY:
        return (f"this version of mvit_kernels has no {backend} kernels",)
    return tuple(REGISTRY[backend].unavailable(device_type))
