# SPDX-License-Identifier: Apache-2.0
"""The one error that a user can put right: commands print its message and exit with 2, without a traceback."""


class UserError(ValueError):
    """A wrong argument, file, model or dataset; the message names it and says what to do."""
