# SPDX-License-Identifier: Apache-2.0
"""The calls that every kernel is tested on."""

from __future__ import annotations

from .inputs import Case

LENGTHS = [
    # small ones with many heads: the rule compares norms of random errors
    Case(batch=4, tokens=1, heads=8, dim=64),
    Case(batch=2, tokens=7, heads=6, dim=80),
    Case(batch=2, tokens=64, heads=3, dim=72),
    Case(batch=2, tokens=196, dim=64),
    Case(tokens=257, dim=88, prefix=1),
    Case(tokens=576, dim=72),
    Case(tokens=577, heads=1, dim=128, prefix=1),
    Case(tokens=729, heads=1, dim=72),
    Case(tokens=1025, heads=1, dim=16, suffix=1),
]
# 150 tokens: two blocks of rows and two of keys
HEAD_DIMS = [Case(tokens=150, dim=dim, pairing="interleaved") for dim in (16, 64, 72, 80, 88, 96, 104, 128, 256)]
ROTATIONS = [
    Case(batch=2, tokens=37, dim=dim, rotary_dim=rotary_dim, pairing=pairing, table=table)
    for dim, rotary_dim, pairing, table in [
        (64, 64, "half", "head"),
        (64, 64, "interleaved", "sample"),
        (64, 64, "axis_half", "both"),
        (72, 72, "axis_half", "shared"),
        (80, 78, "half", "shared"),  # 39 pairs: no vector holds a whole number of them
        (80, 78, "interleaved", "both"),
        (80, 76, "axis_half", "head"),
        (80, 2, "half", "shared"),
        (64, 4, "axis_half", "sample"),
        (104, 54, "interleaved", "shared"),
        (256, 130, "half", "both"),
        (64, 0, "half", "shared"),
    ]
]
SEQUENCES = [
    Case(lengths=(64,) * 5, dim=80),
    Case(lengths=(0, 1, 37, 0, 0, 130, 1, 16, 0), dim=72, prefix=1),
    Case(lengths=(1, 1, 1, 1, 1, 1, 1, 1, 1), heads=4, dim=64),
    Case(lengths=(257,), dim=64, table="head"),
    Case(lengths=(0, 50), heads=4, kv_heads=2, dim=64),
    Case(batch=4, tokens=40, seqlens=(40, 0, 1, 23), dim=64),
    Case(batch=3, tokens=140, seqlens=(0, 139, 121), dim=80, table="sample"),
    Case(batch=2, tokens=33, seqlens=(20, 33), heads=4, kv_heads=1, dim=64),
]
VIEWS = [
    Case(batch=2, tokens=37, dim=72, layout="fused"),
    Case(batch=2, tokens=130, heads=3, dim=64, layout="wide", pairing="interleaved"),
    Case(batch=2, tokens=50, heads=3, dim=88, layout="heads_first"),
    Case(tokens=37, heads=6, kv_heads=2, dim=80, layout="fused", pairing="axis_half"),
    Case(lengths=(0, 20, 1, 65), dim=40, rotary_dim=38, layout="fused"),
    Case(lengths=(5, 16), dim=24, layout="wide", pairing="interleaved"),
    Case(batch=3, tokens=20, seqlens=(3, 20, 0), dim=64, layout="fused"),
    Case(batch=3, tokens=20, seqlens=(20, 7, 19), dim=64, layout="wide"),
]
GROUPS = [
    Case(batch=2, tokens=70, heads=8, kv_heads=2, dim=64),
    Case(tokens=130, heads=5, kv_heads=1, dim=72, pairing="interleaved"),
]
SCALES = [Case(batch=2, tokens=37, scale=scale) for scale in (-0.2, 0.0, 1.0, 1e-30)]
