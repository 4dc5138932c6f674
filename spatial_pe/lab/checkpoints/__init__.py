# SPDX-License-Identifier: Apache-2.0
"""Pretrained weights, and the towers built from them."""
