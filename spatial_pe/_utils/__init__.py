# SPDX-License-Identifier: Apache-2.0
"""Shared helpers, independent of attention: progress bar, atomic writer, cache folder, user errors, environment."""
