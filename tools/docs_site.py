# SPDX-License-Identifier: Apache-2.0
"""Hooks of mkdocs: pages of the site that are files of the repository elsewhere, and links that work in both places.

The README is the site's first page; CONTRIBUTING, CHANGELOG and each script of ``examples/`` are pages too. Text links
as GitHub does, relative to the file that it stands in; here every link is rewritten to where its target is on the site.
"""

from __future__ import annotations

import ast
import posixpath
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]

# file of the repository -> where it is on the site, relative to docs/
PAGES = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
PAGES |= {f"examples/{path.name}": f"examples/{path.stem}.md" for path in sorted(ROOT.glob("examples/*.py"))}
FILES = {"CITATION.cff": "CITATION.cff", "LICENSE": "LICENSE"}
FOLDERS = {"examples": "examples/patch_qwen_vl.md"}

LINK = re.compile(r"(?P<before>\]\()(?P<target>[^)#\s]+)(?P<after>(#[^)\s]*)?\))")


def links(text: str) -> list[str]:
    """Return the targets of a page's relative links and pictures, without anchors; code blocks do not count."""
    prose = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    found = (match["target"] for match in LINK.finditer(re.sub(r"`[^`\n]*`", "", prose)))
    return [target for target in found if not re.match(r"[a-z]+:", target)]


def rewritten(text: str, source: str) -> str:
    """Return a page's text with its links as they are on the site; ``source`` is the page's file in the repository.

    A link that leaves docs/ for a file that is not on the site stays as it is, and fails the strict build.
    """
    page = site_path(source)

    def link(match: re.Match[str]) -> str:
        target = match["target"]
        if re.match(r"[a-z]+:", target):
            return match[0]
        where = site_path(posixpath.normpath(posixpath.join(posixpath.dirname(source), target)))
        return match[0] if where is None else match["before"] + _relative(where, page or "") + match["after"]

    return LINK.sub(link, text)


def site_path(file: str) -> str | None:
    """Return where a file of the repository is on the site, relative to docs/, or None if it is not there."""
    inside = file.removeprefix("docs/") if file.startswith("docs/") else None
    return {**PAGES, **FILES, **FOLDERS}.get(file, inside)


def _relative(target: str, page: str) -> str:
    return posixpath.relpath(target, posixpath.dirname(page) or ".")


def example_page(source: str) -> str:
    """Return the page of an example: its docstring, then its code."""
    text = (ROOT / source).read_text()
    docstring = ast.parse(text).body[0]
    title, _, rest = (ast.get_docstring(ast.parse(text)) or "").partition("\n")
    code = "\n".join(text.splitlines()[docstring.end_lineno :]).strip()
    return f"# {title.rstrip('.')}\n{rest}\n\n`python {source}`\n\n```python\n{code}\n```\n"


def on_files(files: Any, config: Any) -> Any:
    from mkdocs.structure.files import File

    for source, page in PAGES.items():
        text = example_page(source) if source.endswith(".py") else (ROOT / source).read_text()
        files.append(File.generated(config, page, content=rewritten(text, source)))
    for source, page in FILES.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text()))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    source = f"docs/{page.file.src_uri}"
    return rewritten(markdown, source) if (ROOT / source).is_file() else markdown
