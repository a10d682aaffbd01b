# SPDX-License-Identifier: Apache-2.0
"""A network from its file gives the bits of the frozen module: in PyTorch, and in the runtime without PyTorch. Run on
every instruction set by tests/backends/cpu/test_instruction_sets.py."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mvit_kernels import runtime
from mvit_kernels.freezing import saved
from mvit_kernels.freezing.program import build
from support.native import skip_without_a_compiler
from support.networks import Draw, FrozenSequential, chain, native

skip_without_a_compiler()

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def odd() -> FrozenSequential:
    """Widths that are no pairs: bfloat16 is then computed in float32."""
    draw = Draw(3)
    return FrozenSequential(draw.conv(3, 17, 3, stride=2), draw.inverted(17, 33, 20), draw.conv(20, 9))


def rows() -> FrozenSequential:
    """It reads the channels of its input in place."""
    draw = Draw(4)
    return FrozenSequential(draw.inverted(8, 16, 8), draw.conv(8, 16))


NETWORKS = {"chain": lambda: chain()[0], "odd": odd, "rows": rows}


def file_of(module: FrozenSequential, dtype: torch.dtype) -> bytes:
    builder = build(module, dtype)
    stored = builder.stored()
    return saved.file_of(stored, stored.out_channels, False, {}, builder.values[0][0])


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [(32, 32), (37, 50)], ids=str)
def test_a_file_gives_the_same_bits(network, dtype, size, tmp_path):
    module = NETWORKS[network]().to(DTYPES[dtype])
    content = file_of(module, DTYPES[dtype])
    (tmp_path / "network.mvit").write_bytes(content)
    x = Draw(9)(3, module.in_channels, *size)
    expected = native(module, x)
    loaded = saved.load(tmp_path / "network.mvit")
    with torch.inference_mode():
        assert torch.equal(loaded(x), expected) and loaded(x).dtype == DTYPES[dtype]
    expected = expected.float().contiguous().numpy()
    with runtime.Network(content) as without_torch:
        for threads in (1, 3):
            without_torch.threads = threads
            assert np.array_equal(without_torch(x.numpy()), expected)
            last = np.ascontiguousarray(x.numpy().transpose(0, 2, 3, 1))
            assert np.array_equal(without_torch(last, "NHWC").transpose(0, 3, 1, 2), expected)
            assert np.array_equal(without_torch(x[:1].numpy()), expected[:1])
