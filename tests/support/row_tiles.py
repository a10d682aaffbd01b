# SPDX-License-Identifier: Apache-2.0
"""The row-wise Triton kernels' tiles for many rows on compute capability 9.0, wherever they are planned for."""

from __future__ import annotations

import importlib

MODULES = ("layer_norm_linear", "layer_norm_mlp", "linear_residual")


def as_for_many_rows(monkeypatch, programs: int = 2) -> None:
    """Plan launches of 16-bit rows as 9.0's for many rows, with at most so many programs where they share tiles."""
    for name in MODULES:
        module = importlib.import_module(f"mvit_kernels.backends.triton.{name}")
        monkeypatch.setattr(module, "FEW_ROWS", -1)
        monkeypatch.setattr(module, "tile_key", _for_hopper(module.tile_key))
        for value in vars(module).values():
            if hasattr(value, "cache_clear"):
                value.cache_clear()
    resident_key = module.resident_key
    monkeypatch.setattr(module, "resident_key", lambda kind, arch, *sizes: resident_key(kind, 90, *sizes))
    rows = {most: row._replace(programs=programs) for most, row in module._RESIDENT.items()}
    monkeypatch.setattr(module, "_RESIDENT", rows)


def _for_hopper(tile_key):
    return lambda kind, arch, *more: tile_key(kind, 90, *more)
