# SPDX-License-Identifier: Apache-2.0
"""`spatial-pe bench`: speed on this machine, compared with alternatives.

Read in this order: ``cases`` (shapes and inputs), ``variants`` and ``peers`` (the compared functions), ``timing``,
``suites`` (the measurements), ``report`` and ``charts``."""
