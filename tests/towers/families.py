# SPDX-License-Identifier: Apache-2.0
"""Every tower that the tests run, by name."""

from __future__ import annotations

from family import Family, outputs, randn, randomize, to
from towers_with_rope import WITH_ROPE
from towers_without_rope import WITHOUT_ROPE as PLAIN

__all__ = ["FAMILIES", "HERE", "WITHOUT_ROPE", "WITH_TABLES", "Family", "outputs", "randn", "randomize", "to"]

FAMILIES = {**WITH_ROPE, **PLAIN}
HERE = [name for name, family in FAMILIES.items() if family.available()]
WITH_TABLES = [name for name in WITH_ROPE if name in HERE]
WITHOUT_ROPE = [name for name in PLAIN if name in HERE]
