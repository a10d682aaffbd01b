# SPDX-License-Identifier: Apache-2.0
"""What of the package's metadata depends on where and from what it is built; setup.py asks for it.

    MVIT_KERNELS_REPOSITORY=https://example.com/owner/mvit_kernels make wheel

The repository's public address is written nowhere, since the sources do not know it: it is given when a release is
built (on GitHub by the workflow's own variables). With it the README's relative links and images, which PyPI cannot
resolve, become absolute; without it links become text and images are left out, so that nothing is broken there.
"""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

PAPER = "https://arxiv.org/abs/2110.02178"
ROOT = Path(__file__).resolve().parent.parent
COMMIT_FILE = Path("release", "COMMIT")  # in an sdist, which has no .git


def version() -> str:
    """``__version__``, read without importing the package."""
    text = (ROOT / "mvit_kernels" / "__init__.py").read_text(encoding="utf-8")
    return re.search(r'^__version__ = "([^"]+)"$', text, re.MULTILINE)[1]


def commit() -> str:
    """The commit of these sources, followed by "+" if files differ from it; "" if it is not known."""
    if (ROOT / COMMIT_FILE).exists():
        return (ROOT / COMMIT_FILE).read_text(encoding="ascii").strip()
    if not (ROOT / ".git").exists():  # perhaps unpacked inside another project's checkout
        return ""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--abbrev=12", "--exclude=*", "--dirty=+"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def repository() -> str:
    """The address that this build was told, "" if none."""
    told = os.environ.get("MVIT_KERNELS_REPOSITORY", "")
    if not told and os.environ.get("GITHUB_REPOSITORY"):
        told = f"{os.environ.get('GITHUB_SERVER_URL', '')}/{os.environ['GITHUB_REPOSITORY']}"
    told = told.rstrip("/").removesuffix(".git")
    if told and not re.fullmatch(r"https://[\w.-]+(/[\w.~-]+)+", told):
        raise SystemExit(
            f"error: MVIT_KERNELS_REPOSITORY is {told!r}; an address such as https://example.com/owner/name is wanted"
        )
    return told


def revision() -> str:
    """What the links point at: the tag that a workflow runs for, else the newest commit."""
    tagged = os.environ.get("GITHUB_REF_TYPE") == "tag"
    return os.environ.get("GITHUB_REF_NAME", "HEAD") if tagged else "HEAD"


def urls() -> dict[str, str]:
    """``[project.urls]``."""
    source = repository()
    if not source:
        return {"Paper": PAPER}
    return {
        "Source": source,
        "Issues": f"{source}/issues",
        "Changelog": f"{source}/blob/{revision()}/CHANGELOG.md",
        "Paper": PAPER,
    }


# Code, in which nothing is a link; images, perhaps as a link's text; links. In this order at every place.
_CODE = r"^(?P<fence>```+|~~~+).*?^(?P=fence)[^\n]*$|(?P<ticks>`+)(?!`).+?(?<!`)(?P=ticks)(?!`)"
_IMAGE = r"!\[[^\]]*\]\((?P<image>[^)\s]+)[^)]*\)"
_PICTURE = r"<picture\b.*?</picture>|<img\b[^>]*>"
_LINK = r"\[(?P<text>(?:!\[[^\]]*\]\([^)]*\)|`[^`]*`|[^\[\]`])*)\]\((?P<target>[^)\s]+)[^)]*\)"
_PARTS = re.compile(f"(?P<code>{_CODE})|{_IMAGE}|(?P<picture>{_PICTURE})|{_LINK}", re.MULTILINE | re.DOTALL)
_SOURCES = re.compile(r'\b(src|srcset)="([^"]+)"')


def long_description(readme: str) -> str:
    """The README as PyPI shows it."""
    source, at = repository(), revision()

    def is_whole(target: str) -> bool:
        return bool(re.match(r"[a-z][a-z+.-]*:", target))

    def page(target: str) -> str:
        return f"{source}/blob/{at}/{'README.md' if target.startswith('#') else ''}{target.removeprefix('./')}"

    def image(target: str) -> str:
        return target if is_whole(target) else f"{source}/raw/{at}/{target.removeprefix('./')}"

    def replaced(part: re.Match) -> str:
        whole = part[0]
        if part["code"]:
            return whole
        if part["image"]:
            if source or is_whole(part["image"]):
                return whole.replace(f"({part['image']}", f"({image(part['image'])}")
            return ""
        if part["picture"]:
            targets = [target for _, target in _SOURCES.findall(whole)]
            if source or all(map(is_whole, targets)):
                return _SOURCES.sub(lambda found: f'{found[1]}="{image(found[2])}"', whole)
            return ""
        text = _PARTS.sub(replaced, part["text"])
        if is_whole(part["target"]):
            return f"[{text}]({part['target']})" if text else ""
        return f"[{text}]({page(part['target'])})" if source else text

    return re.sub(r"\n{3,}", "\n\n", _PARTS.sub(replaced, readme))
