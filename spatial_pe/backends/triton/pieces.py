# SPDX-License-Identifier: Apache-2.0
"""Heads in pieces: what Triton multiplies has powers of two for sizes, and head_dim 80 padded to 128 wastes 37 %.

A head of D channels is D/2 pairs. Pairs are numbered as in ``Rotary``; those past the rotary dim R are any two channels
that pass through. A piece is a power of two of pairs, at least 8, and so 16 channels or more: 80 = 64 + 16, 72 is the
same with four empty pairs, 112 = 64 + 32 + 16.

q and k appear in the products in *operand order*: pair by pair, first and second channel side by side. Scores do not
depend on the order of channels, as long as q and k agree. v and the output keep their own order, cut at the same widths.

Everywhere below, ``base`` points at the first token of a block, so that ``rows``, the tokens' places in the block, times
a stride fit 32 bits: 64-bit offsets for every element cost registers until the backward spills.
"""

from __future__ import annotations

import triton
import triton.language as tl


def widths(head_dim: int) -> tuple[int, ...]:
    """Channels of each piece, largest first: the binary digits of head_dim rounded up to a multiple of 16."""
    rest = -(-head_dim // 16) * 16
    out = []
    while rest:
        out.append(1 << (rest.bit_length() - 1))
        rest -= out[-1]
    return tuple(out)


def starts(head_dim: int) -> tuple[int, ...]:
    """First channel (twice the first pair) of each piece."""
    sizes = widths(head_dim)
    return tuple(sum(sizes[:i]) for i in range(len(sizes)))


@triton.jit
def aligned(stride, ALIGN: tl.constexpr):
    """The same number; the compiler learns that ALIGN divides it. Alone it only notices 16, so that every load of a
    head of 72 channels would be one of single elements."""
    return stride // ALIGN * ALIGN


@triton.jit
def first_channel(pair, D: tl.constexpr, R: tl.constexpr, PAIRING: tl.constexpr):
    """The first channel of a pair: see pair_channels in the tests for the rule in plain Python."""
    if PAIRING == "interleaved":
        turned = 2 * pair
    elif PAIRING == "axis_half":
        turned = pair + tl.where(pair >= R // 4, R // 4, 0)
    else:
        turned = pair
    return turned if R == D else tl.where(pair < R // 2, turned, pair + R // 2)


@triton.jit
def second_channel(pair, D: tl.constexpr, R: tl.constexpr, PAIRING: tl.constexpr):
    if PAIRING == "interleaved":
        turned = 2 * pair + 1
    elif PAIRING == "axis_half":
        turned = pair + tl.where(pair >= R // 4, R // 4, 0) + R // 4
    else:
        turned = pair + R // 2
    return turned if R == D else tl.where(pair < R // 2, turned, pair + D // 2)


@triton.jit
def load_pieces(base, rows, stride, exists, D: tl.constexpr, START: tl.constexpr, WIDTH: tl.constexpr):
    """Channels in their own order: a tuple of (rows, width), 0 where a row or a channel does not exist."""
    out = ()
    for i in tl.static_range(len(WIDTH)):
        channel = START[i] + tl.arange(0, WIDTH[i])
        mask = exists[:, None]
        if START[i] + WIDTH[i] > D:
            mask = mask & (channel < D)[None, :]
        out = out + (tl.load(base + rows[:, None] * stride + channel[None, :], mask=mask, other=0.0),)
    return out


@triton.jit
def store_pieces(base, rows, stride, exists, pieces, D: tl.constexpr, START: tl.constexpr, WIDTH: tl.constexpr):
    for i in tl.static_range(len(WIDTH)):
        channel = START[i] + tl.arange(0, WIDTH[i])
        mask = exists[:, None]
        if START[i] + WIDTH[i] > D:
            mask = mask & (channel < D)[None, :]
        at = base + rows[:, None] * stride + channel[None, :]
        tl.store(at, pieces[i].to(base.dtype.element_ty), mask=mask)


@triton.jit
def load_operand(base, rows, exists, START: tl.constexpr, WIDTH: tl.constexpr):
    """Rows that are turned already, in operand order, padded: no channel is missing."""
    out = ()
    for i in tl.static_range(len(WIDTH)):
        channel = START[i] + tl.arange(0, WIDTH[i])
        at = base + rows[:, None] * (START[len(WIDTH) - 1] + WIDTH[len(WIDTH) - 1]) + channel[None, :]
        out = out + (tl.load(at, mask=exists[:, None], other=0.0),)
    return out


@triton.jit
def store_operand(base, rows, exists, pieces, START: tl.constexpr, WIDTH: tl.constexpr):
    for i in tl.static_range(len(WIDTH)):
        channel = START[i] + tl.arange(0, WIDTH[i])
        at = base + rows[:, None] * (START[len(WIDTH) - 1] + WIDTH[len(WIDTH) - 1]) + channel[None, :]
        tl.store(at, pieces[i].to(base.dtype.element_ty), mask=exists[:, None])


@triton.jit
def load_angles(cos, sin, rows, stride, exists, pair, R: tl.constexpr):
    """cos and sin (rows, pairs) in float32; the identity for pairs past the rotary dim."""
    mask = exists[:, None] & (pair < R // 2)[None, :]
    at = rows[:, None] * stride + pair[None, :]
    return tl.load(cos + at, mask=mask, other=1.0), tl.load(sin + at, mask=mask, other=0.0)


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
def load_turned(
    base, rows, stride, cos, sin, table_stride, exists,
    D: tl.constexpr, R: tl.constexpr, PAIRING: tl.constexpr, START: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Rows in operand order, turned in float32 and rounded once to the type they came in."""
    out = ()
    for i in tl.static_range(len(WIDTH)):
        pair = START[i] // 2 + tl.arange(0, WIDTH[i] // 2)
        if PAIRING == "interleaved" and R == D:  # neighbours: one wide load
            channel = START[i] + tl.arange(0, WIDTH[i])
            at = base + rows[:, None] * stride + channel[None, :]
            both = tl.load(at, mask=exists[:, None] & (channel < D)[None, :], other=0.0)
            x1, x2 = tl.split(tl.reshape(both, (both.shape[0], WIDTH[i] // 2, 2)))
        else:
            mask = exists[:, None] & (pair < D // 2)[None, :]
            row = base + rows[:, None] * stride
            x1 = tl.load(row + first_channel(pair, D, R, PAIRING)[None, :], mask=mask, other=0.0)
            x2 = tl.load(row + second_channel(pair, D, R, PAIRING)[None, :], mask=mask, other=0.0)
        if R > 0:
            c, s = load_angles(cos, sin, rows, table_stride, exists, pair, R)
            x1, x2 = turn(x1, x2, c, s, pair, D, R)
            x1 = x1.to(base.dtype.element_ty)
            x2 = x2.to(base.dtype.element_ty)
        out = out + (tl.reshape(tl.join(x1, x2), (x1.shape[0], WIDTH[i])),)
    return out


@triton.jit
def store_turned_back(
    base, rows, stride, cos, sin, table_stride, exists, pieces,
    D: tl.constexpr, R: tl.constexpr, PAIRING: tl.constexpr, START: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Gradients in operand order, turned back (the transpose of a rotation is its inverse) and stored in the channels'
    own order."""
    for i in tl.static_range(len(WIDTH)):
        pair = START[i] // 2 + tl.arange(0, WIDTH[i] // 2)
        piece = pieces[i]
        x1, x2 = tl.split(tl.reshape(piece, (piece.shape[0], WIDTH[i] // 2, 2)))
        if R > 0:
            c, s = load_angles(cos, sin, rows, table_stride, exists, pair, R)
            x1, x2 = turn(x1, x2, c, -s, pair, D, R)
        x1 = x1.to(base.dtype.element_ty)
        x2 = x2.to(base.dtype.element_ty)
        if PAIRING == "interleaved" and R == D:
            channel = START[i] + tl.arange(0, WIDTH[i])
            both = tl.reshape(tl.join(x1, x2), (x1.shape[0], WIDTH[i]))
            at = base + rows[:, None] * stride + channel[None, :]
            tl.store(at, both, mask=exists[:, None] & (channel < D)[None, :])
        else:
            mask = exists[:, None] & (pair < D // 2)[None, :]
            row = base + rows[:, None] * stride
            tl.store(row + first_channel(pair, D, R, PAIRING)[None, :], x1, mask=mask)
            tl.store(row + second_channel(pair, D, R, PAIRING)[None, :], x2, mask=mask)


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
def zeros(ROWS: tl.constexpr, WIDTH: tl.constexpr):
    out = ()
    for i in tl.static_range(len(WIDTH)):
        out = out + (tl.full((ROWS, WIDTH[i]), 0.0, tl.float32),)
    return out


@triton.jit
def dot_over_channels(a, b, ROWS: tl.constexpr, COLUMNS: tl.constexpr, WIDTH: tl.constexpr):
    """a bᵀ of two operands in pieces: (ROWS, COLUMNS)."""
    c = tl.full((ROWS, COLUMNS), 0.0, tl.float32)
    for i in tl.static_range(len(WIDTH)):
        c = dot(a[i], tl.trans(b[i]), c)
    return c


@triton.jit
def dot_to_channels(weights, b, c, WIDTH: tl.constexpr):
    """c + weights b, in pieces."""
    out = ()
    for i in tl.static_range(len(WIDTH)):
        out = out + (dot(weights, b[i], c[i]),)
    return out


@triton.jit
def scaled(pieces, factor, WIDTH: tl.constexpr):
    """Rows times a factor each, or all times one."""
    out = ()
    for i in tl.static_range(len(WIDTH)):
        out = out + (pieces[i] * factor,)
    return out


@triton.jit
def kept(pieces, exists, WIDTH: tl.constexpr):
    """Rows that exist; 0, whatever was there, in the others."""
    out = ()
    for i in tl.static_range(len(WIDTH)):
        out = out + (tl.where(exists[:, None], pieces[i], 0.0),)
    return out
