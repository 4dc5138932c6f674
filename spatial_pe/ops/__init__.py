# SPDX-License-Identifier: Apache-2.0
"""The operators: rope_attention, apply_rotary, and how a call finds its backend.

Read ``attention`` (the op), ``select`` (which backend computes a call), ``composed`` and ``flash`` (a rotation in front
of torch's attention or an installed flash-attn); then ``rotate``, ``batching`` (vmap), ``decompositions`` (export).
"""
