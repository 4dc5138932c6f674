# SPDX-License-Identifier: Apache-2.0
"""Published caption benchmarks (What'sUp, COCO-spatial, VG-spatial, VSR), scored by a CLIP-like model."""
