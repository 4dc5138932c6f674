# SPDX-License-Identifier: Apache-2.0
"""Triton kernels: fused forward and backward on a GPU, without a compiler on the user's machine.

backend.py        implementation of the Backend protocol (backends/base.py)
plan.py           maps a call to its launches; launch.py: one launch
launch_cache.py   cache of launches, for later calls of the same shapes
tiles.py          tile sizes, as shipped; tuning_store.py: those that `spatial-pe tune` measured on this GPU
kernels/          one kernel per file
    blocks.py         head_dim in power-of-two blocks; loads, rotations, products: shared by all kernels
    sequences.py      tokens of a program: dense, packed, padded
    forward.py, backward.py   sequences of any length
    windows.py        forward and backward of sequences of at most 128 tokens
    pre_rotate.py     rotates k once, where the loop does not
    rotate.py         rotation without attention; angle_gradient.py: the gradient of its angles
"""
