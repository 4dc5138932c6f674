# SPDX-License-Identifier: Apache-2.0
"""The kernels: one per file, made of ``blocks`` and ``sequences``."""
