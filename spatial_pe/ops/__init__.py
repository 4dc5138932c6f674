# SPDX-License-Identifier: Apache-2.0
"""The operators: rope_attention, apply_rotary, and the selection of a backend.

Read ``attention`` (the op), ``select`` (selection of the backend), ``composed`` and ``flash`` (a rotation before
torch's attention or an installed flash-attn); then ``rotate``, ``batching`` (vmap), ``decompositions`` (export).
"""
