# SPDX-License-Identifier: Apache-2.0
"""`{command-line}`: a section for each command of `mvit-kernels`, made from its parser and so never out of date."""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Iterator

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

OPEN = ("options", "positional arguments")  # argparse's own titles


class CommandLine(SphinxDirective):
    """Sections, in the order of `mvit-kernels --help`."""

    def run(self) -> list[nodes.Node]:
        from mvit_kernels.__main__ import build_parser

        os.environ["COLUMNS"] = "88"  # what argparse wraps the usage at
        parser = build_parser()
        (commands,) = (each for each in parser._actions if isinstance(each, argparse._SubParsersAction))
        return [section(name, each) for name, each in commands.choices.items()]


def section(name: str, parser: argparse.ArgumentParser) -> nodes.section:
    found = nodes.section(ids=[name], names=[name])
    found += nodes.title("", "", nodes.literal("", f"mvit-kernels {name}"))
    found += paragraph(" ".join((parser.description or "").split()))
    usage = parser.format_usage().removeprefix("usage: ")
    found += nodes.literal_block(usage, usage, language="text")
    for group in parser._action_groups:
        arguments = [each for each in group._group_actions if each.help != argparse.SUPPRESS]
        if arguments:
            found += nodes.rubric("", (group.title or "").capitalize())
            found += nodes.definition_list("", *(entry(parser, each) for each in arguments), classes=["options"])
    examples, _, rest = (parser.epilog or "").removeprefix("examples:\n").partition("\n\n")
    if examples:
        commands = "\n".join(line.removeprefix("  ") for line in examples.rstrip().splitlines())
        found += [nodes.rubric("", "Examples"), nodes.literal_block(commands, commands, language="text")]
    found += list(paragraphs(rest))
    return found


def entry(parser: argparse.ArgumentParser, action: argparse.Action) -> nodes.definition_list_item:
    """`--size N|HxW`, and its help."""
    value = "" if action.nargs == 0 else " " + parser._get_formatter()._format_args(action, _default(action))
    words = ", ".join(each + value for each in action.option_strings) or str(action.metavar or action.dest)
    term = nodes.term("", "", nodes.literal("", words))
    text = (action.help or "") % {**vars(action), "prog": parser.prog} if action.help else ""
    return nodes.definition_list_item("", term, nodes.definition("", paragraph(text)))


def paragraph(text: str) -> nodes.paragraph:
    """Text, in which options are code."""
    found = nodes.paragraph()
    for index, part in enumerate(re.split(r"((?<!\S)--?[a-z][\w-]*)", text)):
        if part:
            found += nodes.literal("", part) if index % 2 else nodes.Text(part)
    return found


def _default(action: argparse.Action) -> str:
    return action.dest.upper() if action.option_strings else action.dest


def paragraphs(text: str) -> Iterator[nodes.paragraph]:
    for each in re.split(r"\n\s*\n", text.strip()):
        if each:
            yield paragraph(" ".join(each.split()))


def setup(app: Sphinx) -> dict[str, bool]:
    app.add_directive("command-line", CommandLine)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
