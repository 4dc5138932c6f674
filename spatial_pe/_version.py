# SPDX-License-Identifier: Apache-2.0
"""The version, where modules below the package itself can import it."""

__version__ = "0.1.0"
