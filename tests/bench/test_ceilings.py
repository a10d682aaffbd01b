# SPDX-License-Identifier: Apache-2.0
"""The machine's rates, and the share of them that a call reaches."""

import pytest
import torch

from mvit_kernels.bench import ceilings
from mvit_kernels.bench.ceilings import Ceilings, Work
from mvit_kernels.bench.timing import Timing

pytestmark = pytest.mark.usefixtures("quick_ceilings")


def test_per_cent_are_of_the_machines_best():
    best = Ceilings(200.0, 50.0, {}, {})
    columns = best.columns(Work(gflop=0.5, megabytes=20.0), milliseconds=5.0)
    assert columns == pytest.approx(
        {"gflop_per_s": 100.0, "gb_per_s": 4.0, "percent_product": 50.0, "percent_bandwidth": 8.0}
    )


@pytest.mark.parametrize("convolution, best", [(9.0, 2 * 64**3 / 4e-3), (1e-3, 2 * 9 * 8**2 * 4**2 / 1e-6)])
def test_ceilings_are_the_best_that_was_seen(monkeypatch, convolution, best):
    timings = {"product of 32 × 32": Timing(3.0, 2, 3, 5), "product of 64 × 64": Timing(5.0, 4, 6, 5)}
    others = Timing(9.0, convolution, 9, 5), Timing(0.7, 0.5, 1, 5)
    monkeypatch.setattr(
        ceilings, "interleave", lambda calls, **_: timings | dict(zip(list(calls)[2:], others, strict=True))
    )
    found = ceilings.measure(torch.float32)
    assert found.gflop_per_s == pytest.approx(best / 1e9)  # not that of a smaller product
    assert found.gb_per_s == pytest.approx(2 * 2**12 / 0.5e-3 / 1e9)  # read and written
    assert found.amounts("product of 32 × 32")["gflop_per_s"] == pytest.approx(2 * 32**3 / 2e-3 / 1e9)
