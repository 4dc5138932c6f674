# SPDX-License-Identifier: Apache-2.0
"""Heads in pieces: what Triton multiplies has powers of two for sizes, and head_dim 80 padded to 128 wastes 37 %.

v and the output are cut along their channels, into powers of two of at least 16 (``CUT``): 80 = 64 + 16, 72 is the same
with 8 empty channels, 112 = 64 + 32 + 16.

q and k are cut along their *pairs*, D/2 of them: 40 = 32 + 8 (``PAIRS``). Pairs are numbered as in ``Rotary``; those past
the rotary dim R are any two channels that pass through. A cut of 16 pairs or more is two operands of the product, the
first channels and the second ones, which need no shuffling; one of 8 pairs is one operand of 16, first and second
channels side by side, since the tensor cores want 16. The forward may have the two joined (``joined``). Scores do not depend on the order of channels, as long as q and
k agree. Without rotation the order is the same, so that angles of 0 and no rotary give the same bits.

Everywhere below, ``base`` points at the first token of a block, so that ``rows``, the tokens' places in the block, times
a stride fit 32 bits: 64-bit offsets for every element cost registers until the backward spills.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl


def binary_digits(number: int, least: int) -> tuple[int, ...]:
    """Powers of two, largest first, that add up to the number rounded up to a multiple of the least."""
    rest = -(-number // least) * least
    out = []
    while rest:
        out.append(1 << (rest.bit_length() - 1))
        rest -= out[-1]
    return tuple(out)


def channel_cut(head_dim: int) -> tuple[int, ...]:
    """CUT: channels of each piece of v and the output."""
    return binary_digits(head_dim, 16)


def pair_cut(head_dim: int) -> tuple[int, ...]:
    """PAIRS: channel pairs of each piece of q and k."""
    return binary_digits(head_dim // 2, 8)


def operand_width(head_dim: int) -> int:
    """Channels of q and k in the products, empty ones included."""
    return 2 * sum(pair_cut(head_dim))


@triton.constexpr_function
def begin_of(sizes, i):
    """Where piece i begins."""
    return sum(sizes[:i])


@triton.constexpr_function
def total_of(sizes):
    return sum(sizes)


@triton.constexpr_function
def count_of(sizes):
    return len(sizes)


@triton.jit
def aligned(batch, token, head, ALIGN: tl.constexpr):
    """The same strides; the compiler learns that ALIGN divides them. Alone it only notices 16, so that every load of a
    head of 72 channels would be one of single elements."""
    return batch // ALIGN * ALIGN, token // ALIGN * ALIGN, head // ALIGN * ALIGN


# ---------------------------------------------------------------------------------------------- v, dout, out, dv


@triton.jit
def load_pieces(base, rows, stride, exists, D: tl.constexpr, CUT: tl.constexpr):
    """A tuple of (rows, width), 0 where a row or a channel does not exist. exists = None: all rows do."""
    out = ()
    for i in tl.static_range(count_of(CUT)):
        channel = begin_of(CUT, i) + tl.arange(0, CUT[i])
        at = base + rows[:, None] * stride + channel[None, :]
        if begin_of(CUT, i) + CUT[i] > D:
            here = (channel < D)[None, :] if exists is None else exists[:, None] & (channel < D)[None, :]
            out = out + (tl.load(at, mask=here, other=0.0),)
        elif exists is None:
            out = out + (tl.load(at),)
        else:
            out = out + (tl.load(at, mask=exists[:, None], other=0.0),)
    return out


@triton.jit
def store_pieces(base, rows, stride, exists, pieces, D: tl.constexpr, CUT: tl.constexpr):
    for i in tl.static_range(count_of(CUT)):
        channel = begin_of(CUT, i) + tl.arange(0, CUT[i])
        mask = exists[:, None]
        if begin_of(CUT, i) + CUT[i] > D:
            mask = mask & (channel < D)[None, :]
        at = base + rows[:, None] * stride + channel[None, :]
        tl.store(at, pieces[i].to(base.dtype.element_ty), mask=mask)


# ------------------------------------------------------------------------------------------------- q, k, dq, dk


@triton.constexpr_function
def run_of(D, R, PAIRING):
    """First channels of that many pairs are neighbours, and likewise second ones: the width of a load."""
    if PAIRING == "interleaved":
        return 1
    return math.gcd(8, D // 2, R // 4 if PAIRING == "axis_half" else R // 2)


@triton.jit
def first_channel(pair, D: tl.constexpr, R: tl.constexpr, PAIRING: tl.constexpr):
    """The first channel of a pair: see pair_channels in the tests for the rule in plain Python."""
    if PAIRING == "interleaved":
        turned = 2 * pair
    elif PAIRING == "axis_half":
        turned = pair + tl.where(pair >= R // 4, R // 4, 0)
    else:
        turned = pair
    channel = turned if R == D else tl.where(pair < R // 2, turned, pair + R // 2)
    run: tl.constexpr = run_of(D, R, PAIRING)
    return tl.max_contiguous(tl.multiple_of(channel, run), run) if run > 1 else channel


@triton.jit
def second_channel(pair, D: tl.constexpr, R: tl.constexpr, PAIRING: tl.constexpr):
    if PAIRING == "interleaved":
        turned = 2 * pair + 1
    elif PAIRING == "axis_half":
        turned = pair + tl.where(pair >= R // 4, R // 4, 0) + R // 4
    else:
        turned = pair + R // 2
    channel = turned if R == D else tl.where(pair < R // 2, turned, pair + D // 2)
    run: tl.constexpr = run_of(D, R, PAIRING)
    return tl.max_contiguous(tl.multiple_of(channel, run), run) if run > 1 else channel


@triton.jit
def load_angles(cos, sin, rows, stride, exists, pair, R: tl.constexpr):
    """cos and sin (rows, pairs) in float32; the identity for pairs past the rotary dim."""
    at = rows[:, None] * stride + pair[None, :]
    here = (pair < R // 2)[None, :] if exists is None else exists[:, None] & (pair < R // 2)[None, :]
    return tl.load(cos + at, mask=here, other=1.0), tl.load(sin + at, mask=here, other=0.0)


@triton.jit
def turn(x1, x2, c, s, pair, D: tl.constexpr, R: tl.constexpr):
    """In float32. Pairs that pass through are left alone: with sin = 0, an infinity would make NaN of its partner."""
    x1 = x1.to(tl.float32)
    x2 = x2.to(tl.float32)
    first = x1 * c - x2 * s
    second = x1 * s + x2 * c
    if R < D:
        turned = (pair < R // 2)[None, :]
        first = tl.where(turned, first, x1)
        second = tl.where(turned, second, x2)
    return first, second


@triton.jit
def load_pairs(
    base, rows, stride, exists, D: tl.constexpr, R: tl.constexpr, PAIRING: tl.constexpr,
    BEGIN: tl.constexpr, COUNT: tl.constexpr, LIMIT: tl.constexpr,
):  # fmt: skip
    """First and second channels of COUNT pairs from BEGIN on, each (rows, COUNT); 0 for pairs from LIMIT on."""
    row = base + rows[:, None] * stride
    if PAIRING == "interleaved" and (R == D or LIMIT <= R // 2):  # neighbours: one wide load
        channel = 2 * BEGIN + tl.arange(0, 2 * COUNT)
        here = (channel < 2 * LIMIT)[None, :] if exists is None else exists[:, None] & (channel < 2 * LIMIT)[None, :]
        both = tl.load(row + channel[None, :], mask=here, other=0.0)
        x1, x2 = tl.split(tl.reshape(both, (both.shape[0], COUNT, 2)))
    else:
        pair = BEGIN + tl.arange(0, COUNT)
        first = row + first_channel(pair, D, R, PAIRING)[None, :]
        second = row + second_channel(pair, D, R, PAIRING)[None, :]
        if exists is None and BEGIN + COUNT <= LIMIT:
            x1 = tl.load(first)
            x2 = tl.load(second)
        else:
            here = (pair < LIMIT)[None, :] if exists is None else exists[:, None] & (pair < LIMIT)[None, :]
            x1 = tl.load(first, mask=here, other=0.0)
            x2 = tl.load(second, mask=here, other=0.0)
    return x1, x2


@triton.jit
def store_pairs(
    base, rows, stride, exists, x1, x2, D: tl.constexpr, R: tl.constexpr, PAIRING: tl.constexpr,
    BEGIN: tl.constexpr, COUNT: tl.constexpr, LIMIT: tl.constexpr,
):  # fmt: skip
    """The inverse of load_pairs."""
    x1 = x1.to(base.dtype.element_ty)
    x2 = x2.to(base.dtype.element_ty)
    row = base + rows[:, None] * stride
    if PAIRING == "interleaved" and (R == D or LIMIT <= R // 2):
        channel = 2 * BEGIN + tl.arange(0, 2 * COUNT)
        both = tl.reshape(tl.join(x1, x2), (x1.shape[0], 2 * COUNT))
        tl.store(row + channel[None, :], both, mask=exists[:, None] & (channel < 2 * LIMIT)[None, :])
    else:
        pair = BEGIN + tl.arange(0, COUNT)
        mask = exists[:, None] & (pair < LIMIT)[None, :]
        tl.store(row + first_channel(pair, D, R, PAIRING)[None, :], x1, mask=mask)
        tl.store(row + second_channel(pair, D, R, PAIRING)[None, :], x2, mask=mask)


@triton.jit
def settled(x):
    """The same, but computed once: on Ampere the compiler would otherwise turn k in the layout of mma.sync's operand,
    that is all of k in every warp, and spill. It does not move what may have side effects, as this assembly claims."""
    return tl.inline_asm_elementwise(
        "mov.b32 $0, $1;", "=r,r", [x], x.dtype, is_pure=False, pack=32 // x.dtype.primitive_bitwidth
    )


@triton.jit
def side_by_side(x1, x2):
    """Two (rows, 8) as one operand (rows, 16)."""
    return tl.reshape(tl.join(x1, x2), (x1.shape[0], 2 * x1.shape[1]))


@triton.jit
def load_turned(
    base, rows, stride, cos, sin, table_stride, exists,
    D: tl.constexpr, R: tl.constexpr, PAIRING: tl.constexpr, PAIRS: tl.constexpr, SETTLE: tl.constexpr = False,
):  # fmt: skip
    """The operands of rows of q or k, turned in float32 and rounded once to the type they came in."""
    out = ()
    for i in tl.static_range(count_of(PAIRS)):
        pair = begin_of(PAIRS, i) + tl.arange(0, PAIRS[i])
        x1, x2 = load_pairs(base, rows, stride, exists, D, R, PAIRING, begin_of(PAIRS, i), PAIRS[i], D // 2)
        if R > 0:
            c, s = load_angles(cos, sin, rows, table_stride, exists, pair, R)
            x1, x2 = turn(x1, x2, c, s, pair, D, R)
            x1 = x1.to(base.dtype.element_ty)
            x2 = x2.to(base.dtype.element_ty)
        if SETTLE:
            x1 = settled(x1)
            x2 = settled(x2)
        if PAIRS[i] >= 16:
            out = out + (x1, x2)
        else:
            out = out + (side_by_side(x1, x2),)
    return out


@triton.jit
def store_turned_back(
    base, rows, stride, cos, sin, table_stride, exists, operands,
    D: tl.constexpr, R: tl.constexpr, PAIRING: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    """Gradients of the operands, turned back (the transpose of a rotation is its inverse) and stored in the channels' own
    order."""
    for i in tl.static_range(count_of(PAIRS)):
        pair = begin_of(PAIRS, i) + tl.arange(0, PAIRS[i])
        if PAIRS[i] >= 16:
            x1 = operands[2 * i]
            x2 = operands[2 * i + 1]
        else:
            x1, x2 = tl.split(tl.reshape(operands[2 * i], (operands[2 * i].shape[0], PAIRS[i], 2)))
        if R > 0:
            c, s = load_angles(cos, sin, rows, table_stride, exists, pair, R)
            x1, x2 = turn(x1, x2, c, -s, pair, D, R)
        store_pairs(base, rows, stride, exists, x1, x2, D, R, PAIRING, begin_of(PAIRS, i), PAIRS[i], D // 2)


@triton.constexpr_function
def operand_cut(pairs):
    """Widths of the operands: two for a cut of 16 pairs or more, one of 16 for one of 8."""
    return tuple(width for n in pairs for width in ((n, n) if n >= 16 else (16,)))


@triton.jit
def load_operands(base, rows, exists, PAIRS: tl.constexpr, JOIN: tl.constexpr = False):
    """Rows that are turned already, one operand beside the other, padded: no channel is missing."""
    cut: tl.constexpr = joined_cut(PAIRS) if JOIN else operand_cut(PAIRS)
    out = ()
    for i in tl.static_range(count_of(cut)):
        channel = begin_of(cut, i) + tl.arange(0, cut[i])
        at = base + rows[:, None] * total_of(cut) + channel[None, :]
        if exists is None:
            out = out + (tl.load(at),)
        else:
            out = out + (tl.load(at, mask=exists[:, None], other=0.0),)
    return out


@triton.constexpr_function
def joined_cut(pairs):
    """Widths of the operands after ``joined``."""
    return tuple(2 * n for n in pairs)


@triton.jit
def joined(operands, PAIRS: tl.constexpr):
    """The two operands of a cut as one, the first channels before the second ones, as they lie in memory. With wgmma
    the compiler waits for the tensor cores between two operands."""
    out = ()
    for i in tl.static_range(count_of(PAIRS)):
        if PAIRS[i] >= 16:
            both = tl.trans(tl.join(operands[2 * i], operands[2 * i + 1]), (0, 2, 1))
            out = out + (tl.reshape(both, (both.shape[0], 2 * PAIRS[i])),)
        else:
            out = out + (operands[2 * i],)
    return out


@triton.jit
def store_operands(base, rows, exists, operands, PAIRS: tl.constexpr):
    cut: tl.constexpr = operand_cut(PAIRS)
    for i in tl.static_range(count_of(cut)):
        channel = begin_of(cut, i) + tl.arange(0, cut[i])
        at = base + rows[:, None] * total_of(cut) + channel[None, :]
        tl.store(at, operands[i].to(base.dtype.element_ty), mask=exists[:, None])


@triton.jit
def store_cut(base, rows, exists, x1, x2, INDEX: tl.constexpr, PAIRS: tl.constexpr):
    """The first and second channels of a cut, where store_operands has its operands."""
    x1 = x1.to(base.dtype.element_ty)
    x2 = x2.to(base.dtype.element_ty)
    at = base + rows[:, None] * total_of(operand_cut(PAIRS)) + 2 * begin_of(PAIRS, INDEX)
    if PAIRS[INDEX] >= 16:
        channel = tl.arange(0, PAIRS[INDEX])[None, :]
        tl.store(at + channel, x1, mask=exists[:, None])
        tl.store(at + PAIRS[INDEX] + channel, x2, mask=exists[:, None])
    else:
        tl.store(at + tl.arange(0, 16)[None, :], side_by_side(x1, x2), mask=exists[:, None])


# ------------------------------------------------------------------------------------------------------ products

# Triton's interpreter multiplies the bit patterns of bfloat16: there the operands are widened first.
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
    """a bᵀ of two tuples of pieces: (ROWS, COLUMNS)."""
    c = tl.full((ROWS, COLUMNS), 0.0, tl.float32)
    for i in tl.static_range(len(a)):
        c = dot(a[i], tl.trans(b[i]), c)
    return c


@triton.jit
def dot_to_channels(weights, b, c):
    """c + weights b, piece by piece."""
    out = ()
    for i in tl.static_range(len(b)):
        out = out + (dot(weights, b[i], c[i]),)
    return out


@triton.jit
def scaled(pieces, factor):
    """Rows times a factor each, or all times one."""
    out = ()
    for i in tl.static_range(len(pieces)):
        out = out + (pieces[i] * factor,)
    return out


@triton.jit
def kept(pieces, exists):
    """Rows that exist; 0, whatever was there, in the others."""
    out = ()
    for i in tl.static_range(len(pieces)):
        out = out + (tl.where(exists[:, None], pieces[i], 0.0),)
    return out
