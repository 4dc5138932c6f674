# SPDX-License-Identifier: Apache-2.0
"""Backends, one file each; ``ops.select`` chooses one for a call."""
