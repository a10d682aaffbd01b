# SPDX-License-Identifier: Apache-2.0
"""The site is built without a warning, and what no warning tells: entries, links and anchors, ways to every page."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urldefrag

import pytest

import mvit_kernels
from mvit_kernels import backends
from mvit_kernels.__main__ import build_parser
from support import ROOT

for module in ("sphinx", "myst_parser", "furo", "timm"):
    pytest.importorskip(module)

DOCS = ROOT / "docs"
PAGES = sorted(path.relative_to(DOCS).with_suffix("").as_posix() for path in DOCS.rglob("*.md"))


class Page(HTMLParser):
    """Targets of links, images and scripts; anchors; the text."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.links: list[str] = []
        self.sources: list[str] = []
        self.anchors: set[str] = set()
        self.text = path.read_text(encoding="utf-8")
        self.feed(self.text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        found = dict(attributes)
        self.anchors.update(filter(None, (found.get("id"), found.get("name"))))
        if tag == "a" and found.get("href"):
            self.links.append(unquote(found["href"]))
        elif tag in ("img", "script", "link", "source") and found.get("rel") != "prev":
            self.sources += filter(None, (found.get("src"), found.get("href")))


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> dict[str, Page]:
    """What `make docs` builds, by page. In a process of its own, as there: Sphinx changes locale and modules."""
    target = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "sphinx", "-q", "-E", "-b", "html", "-n", "-W", "--keep-going", str(DOCS)]
    # No compiled library and no GPU: the pages are the same everywhere.
    settings = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "MVIT_KERNELS_LIBRARIES": str(target / "none")}
    done = subprocess.run([*command, str(target)], capture_output=True, text=True, env=os.environ | settings, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert not done.stderr, done.stderr
    return {path.relative_to(target).as_posix(): Page(path) for path in sorted(target.rglob("*.html"))} | {
        "": target  # type: ignore[dict-item]
    }


def pages(site: dict[str, Page]) -> Iterator[tuple[str, Page]]:
    return ((name, page) for name, page in site.items() if name)


def test_every_public_name_has_one_entry(site):
    where = {name: [page for page, each in pages(site) if f"mvit_kernels.{name}" in each.anchors]
             for name in mvit_kernels.__all__}  # fmt: skip
    assert {name: found for name, found in where.items() if len(found) != 1 or not found[0].startswith("api/")} == {}


def test_every_command_and_option_is_there(site):
    """With its help, in a section of its own."""
    text = site["command_line.html"].text
    (commands,) = (each for each in build_parser()._actions if isinstance(each.choices, dict))
    for name, parser in commands.choices.items():
        section = re.search(rf'<section id="{name}">(.*?)</section>', text, flags=re.DOTALL).group(1)
        terms = [re.sub("<.*?>", "", term) for term in re.findall(r"<dt>(.*?)</dt>", section, flags=re.DOTALL)]
        assert len(terms) == section.count("<dd>") == len(parser._actions), name
        for action in parser._actions:
            words = ", ".join(action.option_strings) or action.metavar or action.dest
            assert any(term.startswith(words.split(",")[0]) for term in terms), (name, words)


def test_links_lead_somewhere(site):
    root, broken = site[""], []
    for name, page in pages(site):
        for link in page.links + page.sources:
            path, anchor = urldefrag(link)
            if re.match(r"[a-z]+:", path):
                continue
            target = (root / name).parent.joinpath(path.split("?")[0]).resolve() if path else root / name
            known = site.get(target.relative_to(root).as_posix())
            if not target.exists() or (anchor and known is not None and anchor not in known.anchors):
                broken.append(f"{name}: {link}")
    assert not broken


def test_every_page_is_in_the_navigation_of_the_first(site):
    first = site["index.html"]
    assert [page for page in PAGES if page != "index" and f"{page}.html" not in first.links] == []


def test_nothing_comes_from_the_network(site):
    for name, page in pages(site):
        assert [each for each in page.sources if re.match(r"(https?:)?//", each)] == [], name
    for style in site[""].rglob("*.css"):
        assert not re.search(r"(@import|url\()\s*[\"']?(https?:)?//", style.read_text(encoding="utf-8")), style


def test_pages_look_as_they_were_written(site):
    """Markup that was taken for text: a role, a fence, a footnote of an error."""
    for name, page in pages(site):
        body = re.sub(r"<pre>.*?</pre>|<script.*?</script>", "", page.text, flags=re.DOTALL)
        assert not re.search(r"system-message|:::|\{(py:\w+|doc|ref)\}|Alias for field number", body), name


# -- what pages say, beside the code ---------------------------------------------------------------------------------


def test_support_tables_know_every_operator_of_each_backend():
    text = (DOCS / "backends.md").read_text(encoding="utf-8")
    for name, backend in ((name, backends.contract.REGISTRY[name]) for name in backends.BACKENDS):
        section = re.search(rf"^### `{name}`\n(.*?)(?=^##)", text, flags=re.DOTALL | re.MULTILINE).group(1)
        rows = [line for line in section.splitlines() if line.startswith("| `")]
        named = {operator: row for row in rows for operator in re.findall(r"`(\w+)`", row.split("|")[1])}
        operators = set(backends.operators("reference"))
        assert operators <= set(named), name
        lacking = {operator for operator in operators if "not there" in named[operator]}
        assert lacking == operators - set(backend.supports), name


def test_environment_variables_are_told():
    """All that are read, or told at the head of setup.py, and no other."""
    sources = [*(ROOT / "mvit_kernels").rglob("*.py"), *(ROOT / "csrc").rglob("*.cpp"), *(ROOT / "tests").rglob("*.py")]
    reads = r"(?:environ(?:\.get)?[(\[]|getenv\()f?\"(MVIT_KERNELS_[A-Z_]+)"
    read = {
        name for path in [*sources, ROOT / "setup.py"] for name in re.findall(reads, path.read_text(encoding="utf-8"))
    }
    read = {name + "AARCH64" * (name == "MVIT_KERNELS_CXX_") for name in read}
    read |= set(re.findall(r"MVIT_KERNELS_[A-Z_]+", (ROOT / "setup.py").read_text(encoding="utf-8")))
    told = set(re.findall(r"MVIT_KERNELS_[A-Z_0-9]+", (DOCS / "environment.md").read_text(encoding="utf-8")))
    assert told == read


def test_extras_are_told():
    tomllib = pytest.importorskip("tomllib")
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    table = re.search(
        r"## Extras\n(.*?)\n## ", (DOCS / "install.md").read_text(encoding="utf-8"), flags=re.DOTALL
    ).group(1)
    told = {
        name
        for line in re.findall(r"^\| (`.*?) \|", table, flags=re.MULTILINE)
        for name in re.findall(r"`(\w+)`", line)
    }
    assert set(extras) <= told


def test_pages_have_no_figure_of_speed_by_hand():
    """They come from the committed results (`make report`: benchmarks.md). Measured facts of kernels, and of
    training on real photos, stand with their origin on pages of their own."""
    free = {"benchmarks", "changelog", "measuring", "training"}
    for page in PAGES:
        if page not in free and not page.startswith("kernels/"):
            text = (DOCS / f"{page}.md").read_text(encoding="utf-8")
            assert not re.findall(r"\b\d+(?:\.\d+)?\s?(?:ms|µs|×|GFLOP|TFLOP|GB/s|images/s)(?!\w| \d)", text), page
