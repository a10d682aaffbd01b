# SPDX-License-Identifier: Apache-2.0
"""Before a release: the tag, ``__version__`` and the changelog's newest entry are one version.

python release/check_tag.py v0.1.0
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from release.metadata import ROOT, version  # noqa: E402


def newest_entry() -> tuple[str, str]:
    """Version and date of the changelog's newest entry that has both; ("", "") if none has."""
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    entry = re.search(r"^## \[([^\]]+)\] - (\d{4}-\d\d-\d\d)$", text, re.MULTILINE)
    return entry.groups() if entry else ("", "")


def main() -> None:
    tag, (entry, date) = sys.argv[1], newest_entry()
    if tag != f"v{version()}":
        raise SystemExit(f"error: the tag is {tag} and mvit_kernels.__version__ is {version()}")
    if entry != version():
        raise SystemExit(f"error: CHANGELOG.md's newest dated entry is {entry or 'missing'}, and {version()} is wanted")
    print(f"{tag}, {date}")


if __name__ == "__main__":
    main()
