# SPDX-License-Identifier: Apache-2.0
"""What the tests of the adapters share."""

import pytest

from support.convolutions import OPERATOR
from support.fake_backend import fake_backend


@pytest.fixture
def fused_batch_norm():
    """A backend that serves `batch_norm_activation` in float64, so that everything is compared to the last digits."""
    with fake_backend([OPERATOR]):
        yield
