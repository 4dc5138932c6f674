# SPDX-License-Identifier: Apache-2.0
"""Measurements and demonstrations: demo, benchmarks, the study of encodings, caption benchmarks. Imported only by
``cli`` and the programs under benchmarks/."""
