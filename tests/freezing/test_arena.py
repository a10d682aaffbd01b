# SPDX-License-Identifier: Apache-2.0
"""Maps that live at the same time do not overlap, and those that do not share memory."""

import random

from mvit_kernels.freezing.arena import ALIGNMENT, Region, place


def most_alive(regions: list[Region]) -> int:
    times = range(1 + max(region.last for region in regions))
    return max(sum(one.bytes for one in regions if one.first <= at <= one.last) for at in times)


def test_a_chain_needs_its_largest_pair():
    sizes = [4, 16, 8, 8, 2, 1]
    regions = [Region(size * 1024, at, at + 1) for at, size in enumerate(sizes)]
    assert place(regions) == 24 * 1024 == most_alive(regions)


def test_random_lives():
    draw = random.Random(0)
    for _ in range(300):
        regions = []
        for _ in range(draw.randint(1, 14)):
            first = draw.randint(0, 12)
            regions.append(Region(draw.randint(1, 5000), first, first + draw.randint(0, 6)))
        total = place(regions)
        for i, one in enumerate(regions):
            assert one.offset >= 0 and one.offset % ALIGNMENT == 0 and one.offset + one.bytes <= total
            for other in regions[:i]:
                if one.first <= other.last and other.first <= one.last:
                    assert one.offset + one.bytes <= other.offset or other.offset + other.bytes <= one.offset
        assert total <= 2 * most_alive(regions) + ALIGNMENT * len(regions)


def test_nothing():
    assert place([]) == 0
