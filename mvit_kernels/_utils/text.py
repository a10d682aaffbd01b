# SPDX-License-Identifier: Apache-2.0
"""How messages list things that may be many: a hook on every module makes 8,000 characters of reasons."""

from __future__ import annotations

from collections.abc import Iterable


def some(items: Iterable[object], most: int = 4, joint: str = ", ") -> str:
    """The first few, and how many more there are.

    Example:
        >>> some(range(9))
        '0, 1, 2, 3 and 5 more'
    """
    items = list(items)
    return joint.join(map(str, items[:most])) + (f" and {len(items) - most} more" if len(items) > most else "")


def some_lines(lines: Iterable[str], where: str, most: int = 16) -> list[str]:
    """The first few lines of a report, and a line that says how many more there are, and where."""
    lines = list(lines)
    return lines[:most] + ([f"  … and {len(lines) - most} more, in {where}"] if len(lines) > most else [])
