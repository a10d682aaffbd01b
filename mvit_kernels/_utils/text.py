# SPDX-License-Identifier: Apache-2.0
"""Shortened lists for messages: with a hook on every module, the full list of reasons has 8,000 characters."""

from __future__ import annotations

from collections.abc import Iterable


def some(items: Iterable[object], most: int = 4, joint: str = ", ") -> str:
    """The first few items, and how many more there are.

    Example:
        >>> some(range(9))
        '0, 1, 2, 3 and 5 more'

    Args:
        items: what to list.
        most: how many to show.
        joint: the text between two items.
    """
    items = list(items)
    return joint.join(map(str, items[:most])) + (f" and {len(items) - most} more" if len(items) > most else "")


def some_lines(lines: Iterable[str], where: str, most: int = 16) -> list[str]:
    """The first few lines of a report, and a line that says how many more there are and where to find them.

    Args:
        lines: the whole report.
        where: where the rest is, for the last line.
        most: how many to show.
    """
    lines = list(lines)
    return lines[:most] + ([f"  … and {len(lines) - most} more, in {where}"] if len(lines) > most else [])
