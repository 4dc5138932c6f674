# SPDX-License-Identifier: Apache-2.0
"""Split head_dim into power-of-two blocks, as tl.dot requires; padding 80 to 128 would waste 37 %.

v and the output are split along their channels, into powers of two of at least 16 (``CUT``): 80 = 64 + 16, 72 likewise
with 8 empty channels, 112 = 64 + 32 + 16.

q and k are split along their *pairs*, D/2 of them: 40 = 32 + 8 (``PAIRS``). Pairs are numbered as in ``Rotary``; those
past the rotary dim R are any two channels that pass through. A block of 16 pairs or more is two operands of the product,
the first channels and the second ones, without shuffles; one of 8 pairs is one operand of 16, first and second channels
side by side, since the tensor cores need 16. The forward may join the two (``joined``). Scores do not depend on the
order of channels, as long as q and k agree. Without rotation the order is the same, so that angles of 0 and no rotary
give the same bits.

Everywhere below, ``base`` points at the first token of a block, so that ``rows``, the token offsets in the block, times
a stride fit 32 bits: 64-bit offsets for every element cost registers until the backward spills.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl


def binary_digits(number: int, least: int) -> tuple[int, ...]:
    """Return powers of two, largest first, that add up to the number rounded up to a multiple of the least."""
    rest = -(-number // least) * least
    out = []
    while rest:
        out.append(1 << (rest.bit_length() - 1))
        rest -= out[-1]
    return tuple(out)


def channel_cut(head_dim: int) -> tuple[int, ...]:
    """Return CUT: the channels of each block of v and the output."""
    return binary_digits(head_dim, 16)


def pair_cut(head_dim: int) -> tuple[int, ...]:
    """Return PAIRS: the channel pairs of each block of q and k."""
    return binary_digits(head_dim // 2, 8)


def operand_width(head_dim: int) -> int:
    """Return the channels of q and k in the products, empty ones included."""
    return 2 * sum(pair_cut(head_dim))


@triton.constexpr_function
def begin_of(sizes, i):
    """Return the start of block i."""
    return sum(sizes[:i])


@triton.constexpr_function
def total_of(sizes):
    return sum(sizes)


@triton.constexpr_function
def count_of(sizes):
    return len(sizes)


@triton.jit
def aligned(batch, token, head, ALIGN: tl.constexpr):
    """Return the same strides, known to the compiler as multiples of ALIGN. By itself it only detects 16, so every load of
    a head of 72 channels would be one of single elements."""
    return batch // ALIGN * ALIGN, token // ALIGN * ALIGN, head // ALIGN * ALIGN


# ---------------------------------------------------------------------------------------------- v, dout, out, dv


@triton.jit
def load_blocks(base, rows, stride, valid, D: tl.constexpr, CUT: tl.constexpr):
    """Load a tuple of (rows, width), 0 where a row or a channel is not valid. valid = None: all rows are."""
    out = ()
    for i in tl.static_range(count_of(CUT)):
        channel = begin_of(CUT, i) + tl.arange(0, CUT[i])
        at = base + rows[:, None] * stride + channel[None, :]
        if begin_of(CUT, i) + CUT[i] > D:
            here = (channel < D)[None, :] if valid is None else valid[:, None] & (channel < D)[None, :]
            out = out + (tl.load(at, mask=here, other=0.0),)
        elif valid is None:
            out = out + (tl.load(at),)
        else:
            out = out + (tl.load(at, mask=valid[:, None], other=0.0),)
    return out


@triton.jit
def store_blocks(base, rows, stride, valid, blocks, D: tl.constexpr, CUT: tl.constexpr):
    for i in tl.static_range(count_of(CUT)):
        channel = begin_of(CUT, i) + tl.arange(0, CUT[i])
        mask = valid[:, None]
        if begin_of(CUT, i) + CUT[i] > D:
            mask = mask & (channel < D)[None, :]
        at = base + rows[:, None] * stride + channel[None, :]
        tl.store(at, blocks[i].to(base.dtype.element_ty), mask=mask)


# ------------------------------------------------------------------------------------------------- q, k, dq, dk


@triton.constexpr_function
def run_of(D, R, PAIRING):
    """Return how many pairs have adjacent first channels, and adjacent second ones: the width of a load."""
    if PAIRING == "interleaved":
        return 1
    return math.gcd(8, D // 2, R // 4 if PAIRING == "axis_half" else R // 2)


@triton.jit
def first_channel(pair, D: tl.constexpr, R: tl.constexpr, PAIRING: tl.constexpr):
    """Return the first channel of a pair: see pair_channels in the tests for the rule in plain Python."""
    if PAIRING == "interleaved":
        rotated = 2 * pair
    elif PAIRING == "axis_half":
        rotated = pair + tl.where(pair >= R // 4, R // 4, 0)
    else:
        rotated = pair
    channel = rotated if R == D else tl.where(pair < R // 2, rotated, pair + R // 2)
    run: tl.constexpr = run_of(D, R, PAIRING)
    return tl.max_contiguous(tl.multiple_of(channel, run), run) if run > 1 else channel


@triton.jit
def second_channel(pair, D: tl.constexpr, R: tl.constexpr, PAIRING: tl.constexpr):
    if PAIRING == "interleaved":
        rotated = 2 * pair + 1
    elif PAIRING == "axis_half":
        rotated = pair + tl.where(pair >= R // 4, R // 4, 0) + R // 4
    else:
        rotated = pair + R // 2
    channel = rotated if R == D else tl.where(pair < R // 2, rotated, pair + D // 2)
    run: tl.constexpr = run_of(D, R, PAIRING)
    return tl.max_contiguous(tl.multiple_of(channel, run), run) if run > 1 else channel


@triton.jit
def load_angles(cos, sin, rows, stride, valid, pair, R: tl.constexpr):
    """Load cos and sin (rows, pairs) in float32; the identity for pairs past the rotary dim."""
    at = rows[:, None] * stride + pair[None, :]
    here = (pair < R // 2)[None, :] if valid is None else valid[:, None] & (pair < R // 2)[None, :]
    return tl.load(cos + at, mask=here, other=1.0), tl.load(sin + at, mask=here, other=0.0)


@triton.jit
def rotate(x1, x2, c, s, pair, D: tl.constexpr, R: tl.constexpr):
    """Rotate in float32. Pairs that pass through are not multiplied: sin = 0 times infinity would be NaN."""
    x1 = x1.to(tl.float32)
    x2 = x2.to(tl.float32)
    first = x1 * c - x2 * s
    second = x1 * s + x2 * c
    if R < D:
        rotated = (pair < R // 2)[None, :]
        first = tl.where(rotated, first, x1)
        second = tl.where(rotated, second, x2)
    return first, second


@triton.jit
def load_pairs(
    base, rows, stride, valid, D: tl.constexpr, R: tl.constexpr, PAIRING: tl.constexpr,
    BEGIN: tl.constexpr, COUNT: tl.constexpr, LIMIT: tl.constexpr,
):  # fmt: skip
    """Load first and second channels of COUNT pairs from BEGIN on, each (rows, COUNT); 0 for pairs from LIMIT on."""
    row = base + rows[:, None] * stride
    if PAIRING == "interleaved" and (R == D or LIMIT <= R // 2):  # adjacent: one wide load
        channel = 2 * BEGIN + tl.arange(0, 2 * COUNT)
        here = (channel < 2 * LIMIT)[None, :] if valid is None else valid[:, None] & (channel < 2 * LIMIT)[None, :]
        both = tl.load(row + channel[None, :], mask=here, other=0.0)
        x1, x2 = tl.split(tl.reshape(both, (both.shape[0], COUNT, 2)))
    else:
        pair = BEGIN + tl.arange(0, COUNT)
        first = row + first_channel(pair, D, R, PAIRING)[None, :]
        second = row + second_channel(pair, D, R, PAIRING)[None, :]
        if valid is None and BEGIN + COUNT <= LIMIT:
            x1 = tl.load(first)
            x2 = tl.load(second)
        else:
            here = (pair < LIMIT)[None, :] if valid is None else valid[:, None] & (pair < LIMIT)[None, :]
            x1 = tl.load(first, mask=here, other=0.0)
            x2 = tl.load(second, mask=here, other=0.0)
    return x1, x2


@triton.jit
def store_pairs(
    base, rows, stride, valid, x1, x2, D: tl.constexpr, R: tl.constexpr, PAIRING: tl.constexpr,
    BEGIN: tl.constexpr, COUNT: tl.constexpr, LIMIT: tl.constexpr,
):  # fmt: skip
    """Store the result of load_pairs."""
    x1 = x1.to(base.dtype.element_ty)
    x2 = x2.to(base.dtype.element_ty)
    row = base + rows[:, None] * stride
    if PAIRING == "interleaved" and (R == D or LIMIT <= R // 2):
        channel = 2 * BEGIN + tl.arange(0, 2 * COUNT)
        both = tl.reshape(tl.join(x1, x2), (x1.shape[0], 2 * COUNT))
        tl.store(row + channel[None, :], both, mask=valid[:, None] & (channel < 2 * LIMIT)[None, :])
    else:
        pair = BEGIN + tl.arange(0, COUNT)
        mask = valid[:, None] & (pair < LIMIT)[None, :]
        tl.store(row + first_channel(pair, D, R, PAIRING)[None, :], x1, mask=mask)
        tl.store(row + second_channel(pair, D, R, PAIRING)[None, :], x2, mask=mask)


@triton.jit
def materialize(x):
    """Return x, computed once: on Ampere the compiler would otherwise rotate k in the layout of mma.sync's operand, all of
    k in every warp, and spill. It does not move code with side effects, which this assembly claims to have."""
    return tl.inline_asm_elementwise(
        "mov.b32 $0, $1;", "=r,r", [x], x.dtype, is_pure=False, pack=32 // x.dtype.primitive_bitwidth
    )


@triton.jit
def side_by_side(x1, x2):
    """Join two (rows, 8) into one operand (rows, 16)."""
    return tl.reshape(tl.join(x1, x2), (x1.shape[0], 2 * x1.shape[1]))


@triton.jit
def load_rotated(
    base, rows, stride, cos, sin, table_stride, valid,
    D: tl.constexpr, R: tl.constexpr, PAIRING: tl.constexpr, PAIRS: tl.constexpr, MATERIALIZE: tl.constexpr = False,
):  # fmt: skip
    """Load the operands of rows of q or k, rotated in float32 and rounded once to the input type."""
    out = ()
    for i in tl.static_range(count_of(PAIRS)):
        pair = begin_of(PAIRS, i) + tl.arange(0, PAIRS[i])
        x1, x2 = load_pairs(base, rows, stride, valid, D, R, PAIRING, begin_of(PAIRS, i), PAIRS[i], D // 2)
        if R > 0:
            c, s = load_angles(cos, sin, rows, table_stride, valid, pair, R)
            x1, x2 = rotate(x1, x2, c, s, pair, D, R)
            x1 = x1.to(base.dtype.element_ty)
            x2 = x2.to(base.dtype.element_ty)
        if MATERIALIZE:
            x1 = materialize(x1)
            x2 = materialize(x2)
        if PAIRS[i] >= 16:
            out = out + (x1, x2)
        else:
            out = out + (side_by_side(x1, x2),)
    return out


@triton.jit
def store_inverse_rotated(
    base, rows, stride, cos, sin, table_stride, valid, operands,
    D: tl.constexpr, R: tl.constexpr, PAIRING: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    """Store the gradients of the operands after the inverse rotation, in the original order of the channels."""
    for i in tl.static_range(count_of(PAIRS)):
        pair = begin_of(PAIRS, i) + tl.arange(0, PAIRS[i])
        if PAIRS[i] >= 16:
            x1 = operands[2 * i]
            x2 = operands[2 * i + 1]
        else:
            x1, x2 = tl.split(tl.reshape(operands[2 * i], (operands[2 * i].shape[0], PAIRS[i], 2)))
        if R > 0:
            c, s = load_angles(cos, sin, rows, table_stride, valid, pair, R)
            x1, x2 = rotate(x1, x2, c, -s, pair, D, R)
        store_pairs(base, rows, stride, valid, x1, x2, D, R, PAIRING, begin_of(PAIRS, i), PAIRS[i], D // 2)


@triton.constexpr_function
def operand_cut(pairs):
    """Return the widths of the operands: two for a block of 16 pairs or more, one of 16 for one of 8."""
    return tuple(width for n in pairs for width in ((n, n) if n >= 16 else (16,)))


@triton.jit
def load_operands(base, rows, valid, PAIRS: tl.constexpr, JOIN: tl.constexpr = False):
    """Load rotated rows, operands side by side, padded: all channels are valid."""
    cut: tl.constexpr = joined_cut(PAIRS) if JOIN else operand_cut(PAIRS)
    out = ()
    for i in tl.static_range(count_of(cut)):
        channel = begin_of(cut, i) + tl.arange(0, cut[i])
        at = base + rows[:, None] * total_of(cut) + channel[None, :]
        if valid is None:
            out = out + (tl.load(at),)
        else:
            out = out + (tl.load(at, mask=valid[:, None], other=0.0),)
    return out


@triton.constexpr_function
def joined_cut(pairs):
    """Return the widths of the operands after ``joined``."""
    return tuple(2 * n for n in pairs)


@triton.jit
def joined(operands, PAIRS: tl.constexpr):
    """Join the two operands of a block, the first channels before the second ones, as in memory. With wgmma the compiler
    waits for the tensor cores between two operands."""
    out = ()
    for i in tl.static_range(count_of(PAIRS)):
        if PAIRS[i] >= 16:
            both = tl.trans(tl.join(operands[2 * i], operands[2 * i + 1]), (0, 2, 1))
            out = out + (tl.reshape(both, (both.shape[0], 2 * PAIRS[i])),)
        else:
            out = out + (operands[2 * i],)
    return out


@triton.jit
def store_operands(base, rows, valid, operands, PAIRS: tl.constexpr):
    cut: tl.constexpr = operand_cut(PAIRS)
    for i in tl.static_range(count_of(cut)):
        channel = begin_of(cut, i) + tl.arange(0, cut[i])
        at = base + rows[:, None] * total_of(cut) + channel[None, :]
        tl.store(at, operands[i].to(base.dtype.element_ty), mask=valid[:, None])


@triton.jit
def store_cut(base, rows, valid, x1, x2, INDEX: tl.constexpr, PAIRS: tl.constexpr):
    """Store the first and second channels of a block in the layout of store_operands."""
    x1 = x1.to(base.dtype.element_ty)
    x2 = x2.to(base.dtype.element_ty)
    at = base + rows[:, None] * total_of(operand_cut(PAIRS)) + 2 * begin_of(PAIRS, INDEX)
    if PAIRS[INDEX] >= 16:
        channel = tl.arange(0, PAIRS[INDEX])[None, :]
        tl.store(at + channel, x1, mask=valid[:, None])
        tl.store(at + PAIRS[INDEX] + channel, x2, mask=valid[:, None])
    else:
        tl.store(at + tl.arange(0, 16)[None, :], side_by_side(x1, x2), mask=valid[:, None])


# ------------------------------------------------------------------------------------------------------ products

# Triton's interpreter multiplies the bit patterns of bfloat16: there the operands are cast to float32 first.
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def dot(a, b, c):
    if INTERPRETED:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, c, input_precision="ieee")  # float32 stays float32: TF32 keeps 11 bits of 24


@triton.jit
def zeros(ROWS: tl.constexpr, CUT: tl.constexpr):
    out = ()
    for i in tl.static_range(count_of(CUT)):
        out = out + (tl.full((ROWS, CUT[i]), 0.0, tl.float32),)
    return out


@triton.jit
def dot_over_channels(a, b, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Return a bᵀ of two tuples of blocks: (ROWS, COLUMNS)."""
    c = tl.full((ROWS, COLUMNS), 0.0, tl.float32)
    for i in tl.static_range(len(a)):
        c = dot(a[i], tl.trans(b[i]), c)
    return c


@triton.jit
def dot_to_channels(weights, b, c):
    """Return c + weights b, block by block."""
    out = ()
    for i in tl.static_range(len(b)):
        out = out + (dot(weights, b[i], c[i]),)
    return out


@triton.jit
def scaled(blocks, factor):
    """Multiply rows by a factor each, or all by one."""
    out = ()
    for i in tl.static_range(len(blocks)):
        out = out + (blocks[i] * factor,)
    return out


@triton.jit
def kept(blocks, valid):
    """Return the blocks with 0 in rows that are not valid."""
    out = ()
    for i in tl.static_range(len(blocks)):
        out = out + (tl.where(valid[:, None], blocks[i], 0.0),)
    return out
