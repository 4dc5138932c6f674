# SPDX-License-Identifier: Apache-2.0
"""One file per backend; ``select`` says which of them serves a call."""
