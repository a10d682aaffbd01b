# SPDX-License-Identifier: Apache-2.0
"""`{mermaid}`: the boxes of CONTRIBUTING's map, one below the other. A code host draws the arrows; that takes a
script of three megabytes, and what they say is the order."""

from __future__ import annotations

import re

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective


class Boxes(SphinxDirective):
    """Every node `name["label"]` or `name[("label")]` in its order."""

    has_content = True

    def run(self) -> list[nodes.Node]:
        boxes = nodes.bullet_list("", classes=["layers"])
        text = nodes.paragraph()
        before = ""
        for label in re.findall(r'\w+\[\(?"(.+?)"\)?\]', "\n".join(self.content)):
            if "<b>" not in label and before and "<b>" not in before:  # side by side
                text += nodes.Text(f" · {label}")
                continue
            before, text = label, nodes.paragraph()
            for bold, plain in re.findall(r"<b>(.*?)</b>|([^<]+)", label.replace("<br/>", " ")):
                text += nodes.strong("", bold) if bold else nodes.Text(plain)
            boxes += nodes.list_item("", text)
        return [boxes]


def setup(app: Sphinx) -> dict[str, bool]:
    app.add_directive("mermaid", Boxes)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
