# SPDX-License-Identifier: Apache-2.0
"""Progress on a terminal and in a log, files that are written whole, paths that cannot be written."""

from __future__ import annotations

import io
import os
import re
import sys

import pytest

from spatial_pe._utils import files
from spatial_pe._utils.console import first_line, progress
from spatial_pe._utils.errors import UserError


class Terminal(io.StringIO):
    encoding = "utf-8"

    def isatty(self) -> bool:
        return True


@pytest.fixture
def on_terminal(monkeypatch):
    """A function that runs another on a terminal and returns what it shows there."""
    pytest.importorskip("tqdm", reason="comes with transformers")

    def run(function) -> str:
        with monkeypatch.context() as patched:  # around the call: pytest sets its own stderr after a fixture
            patched.setattr(sys, "stderr", Terminal())
            function()
            return sys.stderr.getvalue()

    return run


def test_a_bar_grows_on_a_terminal_and_ends_with_its_line(on_terminal):
    def steps():
        show = progress("Timing")
        for done in range(5):
            show(done, 4)

    text = on_terminal(steps)
    drawn = [line for line in text.split("\r") if line.strip()]
    assert re.findall(r"(\d)/4", text)[-1] == "4"
    full = [line.count("█") for line in drawn]
    assert full == sorted(full) and full[0] == 0 < full[-1]
    assert all(line.startswith("Timing") for line in drawn)
    assert text.endswith("\n") and text.count("\n") == 1


def test_a_bar_names_the_step_and_begins_again_after_its_end(on_terminal):
    def steps():
        show = progress()
        for _ in range(2):
            show(0, 2, "first case")
            show(1, 2, "second case")
            show(2, 2)

    text = on_terminal(steps)
    assert text.index("first case") < text.index("second case") < text.rindex("first case")
    assert text.count("\n") == 2


def test_a_log_has_lines_and_no_bar(capsys):
    steps, one = progress(), progress("Timing fp32")
    steps(0, 2, "a")
    steps(1, 2, "b")
    steps(2, 2)
    for done in range(3):
        one(done, 2)
    assert capsys.readouterr().err.splitlines() == ["0/2 a", "1/2 b", "2/2 ", "Timing fp32"]


def test_first_line_of_an_error():
    assert first_line(ValueError("\n one\n two")) == "one"
    assert first_line(ValueError("\x1b[96mone\x1b[0m\ntwo")) == "one"  # of torch.export
    assert first_line(KeyError()) == "KeyError"


def test_a_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "new" / "a.json"
    files.write_whole(path, "é\n")
    assert path.read_bytes() == "é\n".encode()

    def fails(*_):
        raise OSError("disk")

    monkeypatch.setattr(os, "replace", fails)
    with pytest.raises(OSError, match="disk"):
        files.write_whole(path, "half of")
    assert path.read_text(encoding="utf-8") == "é\n" and list(path.parent.iterdir()) == [path]


def test_what_can_be_written_is_left_as_it_was(tmp_path):
    old = tmp_path / "old"
    old.write_text("content")
    files.check_writable("--out", old)
    assert old.read_text() == "content"
    files.check_writable("--out", tmp_path / "deep" / "er" / "new")
    assert not any((tmp_path / "deep" / "er").iterdir())


@pytest.mark.parametrize(
    ("path", "why"),
    [
        (".", "is a folder: name a file"),
        ("file/a.json", "cannot be written: Not a directory"),
        ("file/deep/a.json", "cannot be written: Not a directory"),
        ("n" * 300, "cannot be written: File name too long"),
    ],
)
def test_what_cannot_be_written_says_why(path, why, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=rf"^--json '.*' {why}$"):
        files.check_writable("--json", tmp_path / path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]
