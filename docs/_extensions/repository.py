# SPDX-License-Identifier: Apache-2.0
"""Links out of docs/, as they work in the repository: `../examples/plain_loop.py`.

What is a page here as well becomes a link to it; any other file is copied, and offered as a download (MyST's way). A
folder cannot be, so its link becomes its name. And `{programs}` makes the page of the programs in examples/.
"""

from __future__ import annotations

import ast
import os
from pathlib import Path

from docutils import nodes
from sphinx.addnodes import download_reference, pending_xref
from sphinx.application import Sphinx
from sphinx.transforms import SphinxTransform
from sphinx.util.docutils import SphinxDirective

ROOT = Path(__file__).resolve().parents[2]
# Files outside docs/ that are pages here, by `{include}`; and examples/, whose programs are sections of one.
PAGES = {
    "README.md": "index",
    "CHANGELOG.md": "changelog",
    "CONTRIBUTING.md": "contributing",
    "benchmarks/README.md": "measuring",
    "examples/README.md": "examples",
    "examples/timm_train.md": "timm_train",
    "examples": "examples",
}
FOLDERS = {page: Path(file).parent for file, page in PAGES.items() if file != "examples"}  # that their links start from


class LinksOut(SphinxTransform):
    """Before MyST looks for the target of what it could not resolve itself."""

    default_priority = 5

    def apply(self) -> None:
        for node in list(self.document.findall(lambda each: isinstance(each, download_reference | pending_xref))):
            if node.get("reftype") == "myst":
                self.redirect(node)

    def redirect(self, node: nodes.Element) -> None:
        target, _, anchor = node["reftarget"].partition("#")
        anchor = anchor or node.get("reftargetid")
        folder = ROOT / FOLDERS.get(self.env.docname, Path("docs", self.env.docname).parent)
        if node.get("refdomain") == "doc":  # MyST takes any Markdown file for a page, by its path without the suffix
            folder, target = Path(self.env.srcdir), f"{target}.md"
        path = (folder / target).resolve()
        if not target or not path.exists() or not path.is_relative_to(ROOT):
            return
        page = PAGES.get(path.relative_to(ROOT).as_posix())
        place = dict(refdomain="doc", reftarget=page, reftargetid=anchor or None)
        if path.suffix == ".md" and path.is_relative_to(self.env.srcdir):
            place["reftarget"] = self.env.path2doc(path)
        elif path.suffix == ".py" and path.parent == ROOT / "examples":
            place = dict(refdomain="std", reftype="ref", reftarget=path.name)
        if place["reftarget"]:
            settings = dict(reftype="myst", refexplicit=True, refwarn=True, refdoc=self.env.docname) | place
            node.replace_self(pending_xref("", *node.children, **settings))
        elif path.is_dir():
            node.replace_self(nodes.inline("", "", *node.children))
        elif isinstance(node, pending_xref):  # of an included file: a download that MyST did not find from here
            target = os.path.relpath(path, Path(self.env.srcdir, self.env.docname).parent)
            settings = dict(reftype="myst", refdomain=None, refexplicit=True, refdoc=self.env.docname)
            node.replace_self(download_reference("", *node.children, reftarget=target, **settings))


class Programs(SphinxDirective):
    """A section for each program in examples/: what its docstring says, and its source to unfold."""

    def run(self) -> list[nodes.Node]:
        found: list[nodes.Node] = []
        for path in sorted((ROOT / "examples").glob("*.py")):
            self.env.note_dependency(str(path))
            source = path.read_text(encoding="utf-8")
            head, _, rest = (ast.get_docstring(ast.parse(source)) or path.name).partition("\n")
            name = path.name.replace("_", "-").replace(".", "-")
            section = nodes.section(ids=[name], names=[path.name])
            self.env.domains.standard_domain.labels[path.name] = self.env.docname, name, path.name
            self.env.domains.standard_domain.anonlabels[path.name] = self.env.docname, name
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
