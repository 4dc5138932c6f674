# SPDX-License-Identifier: Apache-2.0
"""The study of position encodings: scenes and tasks, models, one run, all runs, their statistics.

Read ``scenes`` and ``tasks`` (what is asked), ``position_encodings`` and ``models`` (what is compared), ``train`` and
``pretrained`` (one run), ``study`` (all runs), ``findings`` (their comparisons)."""
