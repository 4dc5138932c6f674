# SPDX-License-Identifier: Apache-2.0
"""The README's tables are those of the committed results."""

import re

from benchmarks import readme


def test_readme_is_up_to_date():
    text = (readme.ROOT / "README.md").read_text()
    assert readme.written(text) == text, "run python -m benchmarks.readme"


def test_a_changed_number_is_noticed():
    text = (readme.ROOT / "README.md").read_text()
    changed = re.sub(r"\*\*(\d)\.(\d\d)x\*\*", r"**9\1.\2x**", text, count=1)
    assert changed != text
    assert readme.written(changed) == text
