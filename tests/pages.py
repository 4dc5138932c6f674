# SPDX-License-Identifier: Apache-2.0
"""The Python code of the README and the docs, for the tests that run it.

A block behind ``<!-- story: name -->`` needs something that only its own test has, such as a stand-in for weights of a
hub. All others of a page run one after the other, as a reader would run them (``test_docs.py``).
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])
BLOCK = re.compile(r"(?:<!-- story: (?P<story>\S+) -->\n)?^```python\n(?P<code>.*?)^```", re.DOTALL | re.MULTILINE)


class Block(NamedTuple):
    """Code of a page, and the name of its story, if it is one."""

    code: str
    story: str | None
    line: int  # of its first line of code


def blocks(page: Path) -> list[Block]:
    """Return the Python blocks of a page in their order."""
    text = page.read_text()
    return [Block(m["code"], m["story"], text[: m.start("code")].count("\n") + 1) for m in BLOCK.finditer(text)]


def story(name: str) -> str:
    """Return the code of a story; pages that tell it twice tell it alike."""
    found = {block.code for page in PAGES for block in blocks(page) if block.story == name}
    if len(found) != 1:
        raise ValueError(f"the pages hold {len(found)} different stories {name!r}: there must be one")
    return found.pop()
