# SPDX-License-Identifier: Apache-2.0
"""`spatial-pe bench`: what a user gains on this machine, against what they would use instead.

Read in this order: ``cases`` (shapes and inputs), ``variants`` and ``peers`` (what is compared), ``timing``, ``suites``
(what is measured), ``report`` and ``charts``."""
