# SPDX-License-Identifier: Apache-2.0
"""Model of the expected times on an H200, made before anything was measured. Needs no torch.

Its numbers appear in the report where nothing was measured, marked "modelled", and plan the three steps (dry.py).
Users' calls do not depend on it.
"""

from __future__ import annotations

LARGE = 36_864  # tokens, 16 heads; as cases.py
HEADS = 16
# Bytes a second of a memory-bound kernel: 85 % of the 4.3e12 of a copy.
BANDWIDTH = 3.65e12
# (tokens, head_dim) -> microseconds of a forward of the large batch: our rotary kernel and cuDNN's attention; our
# Triton kernels. From public rates of cuDNN and FlashAttention 3 on H100 (335, 373, 408 TFLOP/s at 512, 1k, 4k tokens
# of 64), and from the instructions of our kernels.
FORWARD = {
    (64, 64): (240, 120),
    (64, 80): (290, 150),
    (196, 64): (230, 150),
    (256, 64): (245, 165),
    (576, 64): (340, 300),
    (729, 72): (500, 520),
    (1024, 64): (490, 435),
    (1025, 64): (495, 445),
    (1024, 80): (670, 675),
    (4096, 64): (1600, 1540),
}
# FLOP of a backward are 2.5 times those of a forward, at a slightly lower rate.
BACKWARD = 2.7
# The rotation in float32 with torch's operators moves twelve times the bytes of one kernel.
EAGER = 12
# Time of a launch by the host, however small the kernel.
LEAST_MS = 0.02
OURS = ("ours", "off", "cuda", "cuda-off", "auto")


def rotary_ms(dim: int, tokens: int = LARGE) -> float:
    """Return the time of reading and writing q and k once, 2 bytes an element."""
    return 1e3 * 4 * tokens * HEADS * dim * 2 / BANDWIDTH


def milliseconds(variant: str, size: list[int], direction: str = "forward") -> float | None:
    """Return the time of one call; None for a shape or a variant without a model. size: [batch, heads, tokens,
    head_dim]."""
    batch, _, tokens, dim = size
    if (tokens, dim) not in FORWARD:
        return None
    share = batch * tokens / LARGE
    if direction == "rotary":
        return max(LEAST_MS, share * rotary_ms(dim) * (EAGER if variant == "eager" else 1))
    separate, ours = (us / 1e3 for us in FORWARD[tokens, dim])
    times = {"rotary": separate, "eager": separate + (EAGER - 1) * rotary_ms(dim)}
    if variant in OURS:
        forward = ours
    elif variant == "eager-loop":
        return share * LARGE / tokens * 0.015 * (1 if direction == "forward" else 3)
    elif (kind := variant.partition("-")[0]) in times:
        forward = times[kind]
    else:
        return None
    factor = {"forward": 1.0, "backward": BACKWARD, "forward+backward": 1 + BACKWARD}[direction]
    return max(LEAST_MS, share * forward * factor)
