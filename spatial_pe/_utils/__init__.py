# SPDX-License-Identifier: Apache-2.0
"""Helpers that know nothing of attention: progress bar, atomic writer, cache folder, the error that users can fix."""
