# SPDX-License-Identifier: Apache-2.0
"""Words of docstrings, comments and messages: plain technical English. A failure names the place of each offence."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
FILES = [
    file
    for folder in ("spatial_pe", "benchmarks", "examples", "tools")
    for file in sorted((ROOT / folder).rglob("*.py"))
]
# a docstring begins with a verb ("Return ...") or a noun phrase, not with a question or half a sentence
FIRST = re.compile(r'[`" ]*(What|Which|Who|Whose|Where|Whether|How|Why|When|If|That|Those|Of|As|For|It)\b')
BANNED = re.compile(r"\b(turn(s|ed|ing)?|in place of|goes on)\b", re.IGNORECASE)
PLAIN = "rotate (or: round, iteration order, flip), instead of, resumes"
ALLOWED = re.compile(r"\bin turn\b|\bturn(s|ed)? (out|into|off|on)\b", re.IGNORECASE)
OWNERS = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def first_words(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """(line, offending first word) of the docstrings."""
    for node in ast.walk(tree):
        if isinstance(node, OWNERS) and (text := ast.get_docstring(node, clean=False)) and (match := FIRST.match(text)):
            yield node.body[0].lineno, match[1]


def prose(source: str, tree: ast.Module) -> Iterator[tuple[int, str]]:
    """(line, text) of what BANNED matches in comments and in strings of three words or more."""
    if not BANNED.search(source):
        return
    for number, line in enumerate(source.splitlines(), 1):
        if "# " in line:
            yield number, line.partition("# ")[2]
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and len(node.value.split()) > 2:
            yield from enumerate(node.value.splitlines(), node.lineno)


def test_words():
    found = []
    for file in FILES:
        source, name = file.read_text(encoding="utf-8"), file.relative_to(ROOT)
        tree = ast.parse(source)
        found += [
            f"{name}:{line}: begins with {word!r}: say what it does or returns" for line, word in first_words(tree)
        ]
        found += [f"{name}:{line}: {match!r}: say {PLAIN}" for line, match in banned(prose(source, tree))]
    for file in sorted((ROOT / "csrc").rglob("*")):
        if file.suffix in (".h", ".cpp", ".cu"):
            lines = enumerate(file.read_text(encoding="utf-8").splitlines(), 1)
            found += [f"{file.relative_to(ROOT)}:{line}: {match!r}: say {PLAIN}" for line, match in banned(lines)]
    assert not found, "\n".join(found)


def banned(lines: Iterator[tuple[int, str]]) -> Iterator[tuple[int, str]]:
    for number, line in lines:
        if match := BANNED.search(ALLOWED.sub("", line)):
            yield number, match[0]
