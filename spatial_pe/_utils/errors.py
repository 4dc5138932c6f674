# SPDX-License-Identifier: Apache-2.0
"""Errors that a user can fix: commands print the message and exit with 2, without a traceback."""


class UserError(ValueError):
    """A wrong argument, file, model or dataset; the message names it and says what to do."""
