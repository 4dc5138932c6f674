# SPDX-License-Identifier: Apache-2.0
"""Plug-ins for other packages, each imported only by its host package."""
