# SPDX-License-Identifier: Apache-2.0
"""Links out of docs/, as they work in the repository: `../examples/plain_loop.py`.

What is a page here as well becomes a link to it; any other file is copied, and offered as a download (MyST's way). A
folder cannot be, so its link becomes its name. And `{programs}` makes the page of the programs in examples/.
"""

from __future__ import annotations

import ast
from pathlib import Path

from docutils import nodes
from sphinx.addnodes import download_reference, pending_xref
from sphinx.application import Sphinx
from sphinx.transforms import SphinxTransform
from sphinx.util.docutils import SphinxDirective

ROOT = Path(__file__).resolve().parents[2]
PAGES = {
    "README.md": "index",
    "CHANGELOG.md": "changelog",
    "CONTRIBUTING.md": "contributing",
    "benchmarks/README.md": "measuring",
    "examples": "examples",
    "examples/timm_train.md": "timm_train",
}


class LinksOut(SphinxTransform):
    """Before MyST looks for the target of what it could not resolve itself."""

    default_priority = 5

    def apply(self) -> None:
        for node in list(self.document.findall(lambda each: isinstance(each, download_reference | pending_xref))):
            path = self.path(node)
            if path is None:
                continue
            if path in PAGES:
                place = dict(refdomain="doc", refdoc=self.env.docname, reftarget=PAGES[path], reftargetid=None)
                node.replace_self(pending_xref("", *node.children, reftype="myst", refexplicit=True, **place))
            elif (ROOT / path).is_dir():
                node.replace_self(nodes.inline("", "", *node.children))

    def path(self, node: nodes.Element) -> str | None:
        """What a Markdown link names, from the repository's root; None for everything inside docs/."""
        if node.get("reftype") != "myst":
            return None
        target = node["reftarget"].split("#")[0]
        if node.get("refdomain") == "doc":  # MyST takes any Markdown file for a page, by its path without the suffix
            target += ".md"
        path = Path(self.env.srcdir, self.env.docname).parent.joinpath(target).resolve()
        if not path.exists() or not path.is_relative_to(ROOT) or path.is_relative_to(self.env.srcdir):
            return None
        return path.relative_to(ROOT).as_posix()


class Programs(SphinxDirective):
    """A section for each program in examples/: what its docstring says, and its source to unfold."""

    def run(self) -> list[nodes.Node]:
        found: list[nodes.Node] = []
        for path in sorted((ROOT / "examples").glob("*.py")):
            self.env.note_dependency(str(path))
            source = path.read_text(encoding="utf-8")
            head, _, rest = (ast.get_docstring(ast.parse(source)) or path.name).partition("\n")
            section = nodes.section(ids=[path.stem.replace("_", "-")], names=[path.stem])
            section += nodes.title("", "", nodes.literal("", path.name))
            section += self.parse_text_to_nodes(head + "\n\n" + rest.strip("\n"))
            source = f":::{{literalinclude}} ../examples/{path.name}\n:language: python\n:::"
            section += self.parse_text_to_nodes(f"::::{{dropdown}} The program\n{source}\n::::")
            found.append(section)
        return found


def setup(app: Sphinx) -> dict[str, bool]:
    app.add_transform(LinksOut)
    app.add_directive("programs", Programs)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
