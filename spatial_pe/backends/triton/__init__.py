# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels: fused forward and backward on a GPU, without a compiler on the user's machine.

backend.py        what every backend offers (backends/base.py)
plan.py           from a call to the launches that serve it; launch.py: one of them
launch_cache.py   launches kept for the next call of the same shapes
tiles.py          tile sizes, as shipped; tuning_store.py: those that `spatial-pe tune` measured on this GPU
kernels/          one kernel per file
    blocks.py         head_dim in powers of two; loads, rotations, products: what all kernels are made of
    sequences.py      which tokens a program works on: dense, packed, padded
    forward.py, backward.py   sequences of any length
    windows.py        forward and backward of sequences of at most 128 tokens
    pre_rotate.py     rotates k once, where the loop does not
    rotate.py         the rotation alone; angle_gradient.py: the gradient of its angles
"""
