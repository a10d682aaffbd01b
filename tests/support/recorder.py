# SPDX-License-Identifier: Apache-2.0
"""Which operators run.

Example:
    >>> with Recorder() as recorder:
    ...     mvit_kernels.layer_norm_linear(x, *norm, weight, bias)
    >>> recorder.ours()
    ['layer_norm_linear']
"""

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class Recorder(TorchDispatchMode):
    """Records the operators that run inside, by name and with the shapes of their results."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, tuple[tuple[int, ...], ...]]] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        results = function(*args, **(kwargs or {}))
        outputs = results if isinstance(results, tuple | list) else (results,)
        self.calls.append((function.name(), tuple(tuple(t.shape) for t in outputs if isinstance(t, Tensor))))
        return results

    def names(self) -> list[str]:
        return [name for name, _ in self.calls]

    def ours(self) -> list[str]:
        """Our raw operators, without the namespace."""
        return [name.removeprefix("mvit_kernels::") for name in self.names() if name.startswith("mvit_kernels::")]
