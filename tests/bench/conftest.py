# SPDX-License-Identifier: Apache-2.0
"""What the tests of measurements share."""

import pytest

from mvit_kernels.bench import ceilings


@pytest.fixture
def quick_ceilings(monkeypatch):
    """The machine's rates, measured in no time."""
    monkeypatch.setattr(ceilings, "SQUARES", {"cpu": (32, 64)})
    monkeypatch.setattr(ceilings, "CONVOLUTION", (8, 6))
    monkeypatch.setattr(ceilings, "COPY_BYTES", {"cpu": 2**12})
    monkeypatch.setattr(ceilings, "SECONDS", {"cpu": 0.01})
