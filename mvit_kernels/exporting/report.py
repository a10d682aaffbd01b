# SPDX-License-Identifier: Apache-2.0
"""What `export` wrote, and how far it is from the model."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch

from .comparison import Agreement, Difference
from .plan import Contents

_MOST_KINDS = 12  # of nodes that are printed


class ExportReport(NamedTuple):
    """What `export` wrote, and how far it is from the model; printable."""

    target: str
    path: Path
    bytes: int  # of all files
    form: str  # "plain" or "phone"
    dtype: torch.dtype
    images: str  # the shapes that the file takes
    contents: Contents
    differences: tuple[Difference, ...]  # empty where this machine has no runtime for the file
    agreement: Agreement | None = None  # of a classifier

    def as_dict(self) -> dict[str, Any]:
        """The report as JSON can hold it."""
        rows = [{**row._asdict(), "relative": row.relative, "ok": row.ok} for row in self.differences]
        return {
            **self._asdict(),
            "path": str(self.path),
            "dtype": str(self.dtype).removeprefix("torch."),
            "contents": {**self.contents._asdict(), "nodes": dict(self.contents.nodes)},
            "differences": rows,
            "agreement": None if self.agreement is None else self.agreement._asdict(),
            "ok": self.ok,
        }

    @property
    def ok(self) -> bool:
        """Whether every difference is allowed; true of none."""
        return all(row.ok for row in self.differences)

    def __str__(self) -> str:
        nodes, transposes, rank = self.contents
        kinds = sorted(nodes.items(), key=lambda item: (-item[1], item[0]))
        most = ", ".join(f"{count} {kind}" for kind, count in kinds[:_MOST_KINDS])
        more = f" and {len(kinds) - _MOST_KINDS} other kinds" if len(kinds) > _MOST_KINDS else ""
        dtype = str(self.dtype).removeprefix("torch.")
        lines = [
            f"{self.path}: {self.target}, {self.bytes / 1e6:.2f} MB, {dtype}, {self.form} form, images {self.images}",
            f"  {transposes} transposes of {nodes.total()} nodes"
            + ("" if rank is None else f", no tensor of more than {rank} axes"),
            f"  {most}{more}",
        ]
        if self.differences:
            width = max(len(f"{row.inputs}, {row.output}") for row in self.differences)
            lines.append(f"  {'':<{width}}  {'error':>9}  {'relative':>9}  {'PyTorch':>9}  {'allowed':>9}")
            for row in self.differences:
                numbers = f"{row.error:9.2e}  {row.relative:9.2e}  {row.pytorch_error:9.2e}  {row.allowed:9.2e}"
                name = f"{row.inputs}, {row.output}"
                lines.append(f"  {name:<{width}}  {numbers}  {'ok' if row.ok else 'TOO LARGE'}")
        else:
            lines.append("  not run: there is no runtime for it on this machine")
        if self.agreement is not None:
            lines.append(f"  the same class on {self.agreement.same} of {self.agreement.images} images")
        return "\n".join(lines)
