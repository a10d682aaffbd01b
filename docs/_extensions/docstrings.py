# SPDX-License-Identifier: Apache-2.0
"""Docstrings as they stand in the sources: `name` in single backticks is a link if that name has an entry, else code.

Entries have the names that users import (`mvit_kernels.verify`). A docstring may say `verify`, `feature_maps` of its
own class, `mvit_kernels.verify`, or where it is defined (`mvit_kernels.ops.patch_attention`): all find the entry.
"""

from __future__ import annotations

import builtins

from docutils import nodes
from docutils.parsers.rst import roles
from sphinx.addnodes import pending_xref
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment

FOREIGN = (
    "torch",
    "nn",
    "Tensor",
    "Dataset",
    "NamedTuple",
    "enum",
    "abc",
    "pathlib",
)  # their entries are on other sites


def name_role(name, rawtext, text, lineno, inliner, options=None, content=None):
    """The default role: resolved by `resolve`, once all entries are known."""
    context = inliner.document.settings.env.ref_context
    code = nodes.literal(rawtext, text, classes=["name"])
    node = pending_xref(rawtext, code, refdomain="", reftype="name", reftarget=text, refexplicit=True, refwarn=False)
    node["home"] = context.get("py:class") or ""
    return [node], []


def resolve(app: Sphinx, env: BuildEnvironment, node: pending_xref, contnode: nodes.Element) -> nodes.Element | None:
    """A `name` to its entry, or to its text alone; what autodoc links of Python's and PyTorch's to its text."""
    target = node["reftarget"].strip("()")
    if node["reftype"] != "name":
        foreign = hasattr(builtins, target) or target.split(".")[0] in FOREIGN
        return contnode if node.get("refdomain") == "py" and foreign else None
    places = [target, f"mvit_kernels.{target}", f"mvit_kernels.{node['home']}.{target}"]
    if target.startswith("mvit_kernels."):
        places.append("mvit_kernels." + target.rsplit(".", 1)[-1])
    entries = env.domains.python_domain.objects
    place = next((each for each in places if each in entries), None)
    if place is None:
        return contnode
    return env.domains.python_domain.resolve_xref(env, node["refdoc"], app.builder, "obj", place, node, contnode)


def without_field_numbers(app: Sphinx, what: str, name: str, found: object, options: object, lines: list[str]) -> None:
    """What a `NamedTuple` says of its fields by itself: "Alias for field number 0"."""
    if lines and lines[0].startswith("Alias for field number"):
        lines.clear()


def setup(app: Sphinx) -> dict[str, bool]:
    roles.register_local_role("name", name_role)
    app.connect("missing-reference", resolve)
    app.connect("autodoc-process-docstring", without_field_numbers)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
