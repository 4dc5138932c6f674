# SPDX-License-Identifier: Apache-2.0
"""The kernels: one per file, built from ``blocks`` and ``sequences``."""
