# SPDX-License-Identifier: Apache-2.0
"""Study of position encodings: scenes and tasks, models, one run, all runs, their statistics.

Read ``scenes`` and ``tasks`` (the questions), ``position_encodings`` and ``models`` (the compared models), ``train``
and ``pretrained`` (one run), ``study`` (all runs), ``findings`` (their comparisons)."""
