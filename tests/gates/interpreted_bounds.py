# SPDX-License-Identifier: Apache-2.0
"""That `support.bounds` sees what the kernels' other tests in the interpreter would run past."""

import pytest
import torch

from mvit_kernels.backends.triton.target import INTERPRETED

assert INTERPRETED, "run it with TRITON_INTERPRET=1"
linear_residual = pytest.importorskip("mvit_kernels.backends.triton.linear_residual")


def test_accesses_are_checked_against_the_tensors():
    """A kernel that is told of more rows than there are reads and writes past their end, also inside of a storage."""
    x, weight, out = torch.zeros(70, 24), torch.zeros(8, 24), torch.zeros(70, 8)
    linear_residual.product(x, weight, None, None, out, 70, transposed=True).run()
    with pytest.raises(Exception, match="a load of 4 bytes outside of the launch.*\\+0 bytes from the end"):
        linear_residual.product(x[:64], weight, None, None, out, 70, transposed=True).run()
    with pytest.raises(Exception, match="a store of 4 bytes outside of the launch.*8 lanes"):
        linear_residual.product(x, weight, None, None, out[:69], 70, transposed=True).run()
