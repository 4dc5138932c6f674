# SPDX-License-Identifier: Apache-2.0
"""Fixtures of the tests of the op."""

from flash_stand_ins import gpu  # noqa: F401
