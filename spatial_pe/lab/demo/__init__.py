# SPDX-License-Identifier: Apache-2.0
"""`spatial-pe demo`: a pretrained tower before and after patch()."""
