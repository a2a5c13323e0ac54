"""Triton kernels for `x @ dequantize(weight).T`: e4m3 values are decoded in registers, scales go on the accumulator.

Tiles lie transposed, `[BN outputs, BM rows]`, so that the decoded weight is the left operand of the matrix
instruction, which Hopper and later read from registers; a right operand would go through shared memory again.

This module imports Triton; nothing imports it before a kernel is launched.
"""

from __future__ import annotations

import triton
import triton.language as tl

#: What is left to the accumulator: `decode` gives values 2^8 times too small, exactly.
UNIT = tl.constexpr(256.0)


@triton.jit
def decode(fp8, dtype: tl.constexpr):
    """e4m3 values (uint8) as floats, exactly, divided by `UNIT`.

    Sign, exponent and mantissa are moved to their places in a float16, whose exponent has one bit more. It then is off by
    the difference of the two biases, 8, for subnormals as for other numbers; nothing has to be told apart. The
    wider types hold every float16.
    """
    wide = fp8.to(tl.int8, bitcast=True).to(tl.int16)  # s_ssss_ssss_eeee_mmm: the sign comes along
    return ((wide << 7) & -0x4080).to(tl.float16, bitcast=True).to(dtype)


@triton.jit
def multiply(
    x, weight, scale, rows, outputs, cols, scale_cols,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    SPLIT: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """`[BN, BM]` float32: outputs `outputs` `[BN]` of rows `rows` `[BM]` of `x`; all of them must exist.

    Args:
        BLOCK_ROWS: rows of the weight that share a scale.
        BLOCK_COLS: columns that share one; 0 if all do, then scales are applied once, at the end.
        SPLIT: parts of a tile's columns that are multiplied apart, by a warp each, and added at the end. Where there are
            fewer outputs than warps could share, each would decode all of the weight otherwise.
        EVEN: whether K tiles end where columns and blocks of columns do, so that nothing is masked.
    """
    dtype: tl.constexpr = x.dtype.element_ty
    PART: tl.constexpr = BK // SPLIT
    w_row, x_row = outputs.to(tl.int64) * cols, rows.to(tl.int64) * cols
    s_tile = scale + (outputs // BLOCK_ROWS).to(tl.int64) * scale_cols
    if SPLIT == 1:
        w_k, x_k = tl.arange(0, BK)[None, :], tl.arange(0, BK)[:, None]
        w_tile, x_tile = weight + w_row[:, None] + w_k, x + x_row[None, :] + x_k
        acc = tl.zeros([BN, BM], tl.float32)
    else:
        k = tl.arange(0, SPLIT)[:, None] * PART + tl.arange(0, PART)[None, :]
        w_k, x_k = k[:, None, :], k[:, :, None]
        w_tile, x_tile = weight + w_row[None, :, None] + w_k, x + x_row[None, None, :] + x_k
        acc = tl.zeros([SPLIT, BN, BM], tl.float32)
    if BLOCK_COLS == 0:
        for start in range(0, cols, BK):
            if EVEN:
                fp8, xs = tl.load(w_tile + start), tl.load(x_tile + start)
            else:
                fp8 = tl.load(w_tile + start, mask=w_k < cols - start, other=0)
                xs = tl.load(x_tile + start, mask=x_k < cols - start, other=0.0)
            acc = tl.dot(decode(fp8, dtype), xs, acc, input_precision="ieee")
        if SPLIT > 1:
            acc = tl.sum(acc, 0)
        acc *= (tl.load(s_tile) * UNIT)[:, None]
    else:
        STEPS: tl.constexpr = (BLOCK_COLS + BK - 1) // BK
        for step in range(scale_cols * STEPS):
            block = step // STEPS
            start = block * BLOCK_COLS + step % STEPS * BK
            if EVEN:
                fp8, xs = tl.load(w_tile + start), tl.load(x_tile + start)
            else:
                left = tl.minimum(block * BLOCK_COLS + BLOCK_COLS, cols) - start
                fp8 = tl.load(w_tile + start, mask=w_k < left, other=0)
                xs = tl.load(x_tile + start, mask=x_k < left, other=0.0)
            part = tl.dot(decode(fp8, dtype), xs, input_precision="ieee")
            factor = tl.load(s_tile + block) * UNIT
            acc += part * (factor[:, None] if SPLIT == 1 else factor[None, :, None])
        if SPLIT > 1:
            acc = tl.sum(acc, 0)
    return acc


@triton.jit
def linear_kernel(
    x, weight, scale, bias, out, count, features, cols, scale_cols,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    SPLIT: tl.constexpr, EVEN: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """`out [count, features] = x [count, cols] @ dequantize(weight [features, cols]).T + bias`."""
    program = tl.program_id(0)
    tiles_m, tiles_n = tl.cdiv(count, BM), tl.cdiv(features, BN)
    # GROUP tiles of rows walk along the outputs together, so that both operands are still in cache
    first = program // (GROUP * tiles_n) * GROUP
    height = tl.minimum(tiles_m - first, GROUP)
    inside = program % (GROUP * tiles_n)
    m = (first + inside % height) * BM + tl.arange(0, BM)
    n = inside // height * BN + tl.arange(0, BN)
    outputs = tl.where(n < features, n, 0)
    acc = multiply(
        x,
        weight,
        scale,
        tl.where(m < count, m, 0),
        outputs,
        cols,
        scale_cols,
        BLOCK_ROWS,
        BLOCK_COLS,
        BM,
        BN,
        BK,
        SPLIT,
        EVEN,
    )
    if bias is not None:
        acc += tl.load(bias + outputs).to(tl.float32)[:, None]
    place = out + m.to(tl.int64)[None, :] * features + n[:, None]
    tl.store(place, acc.to(out.dtype.element_ty), mask=(n < features)[:, None] & (m < count)[None, :])


@triton.jit
def grouped_kernel(
    x, weight, scale, offs, out, count, features, cols, scale_rows, scale_cols, experts,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    SPLIT: tl.constexpr, EVEN: tl.constexpr, EXPERTS: tl.constexpr,
):  # fmt: skip
    """Rows of `x` sorted by expert; those of expert e end at `offs[e]`. Rows behind the last one give zeros.

    Each program finds its tile of rows by itself: tiles are numbered expert by expert, and rows behind the last expert's
    are tiles of one more. EXPERTS is a power of two greater than the number of experts.
    """
    tile = tl.program_id(0)
    e = tl.arange(0, EXPERTS)
    ends = tl.load(offs + e, mask=e < experts, other=count)
    begins = tl.load(offs + e - 1, mask=(e > 0) & (e <= experts), other=0)
    begins = tl.where(e > experts, count, begins)
    tiles = tl.cdiv(ends - begins, BM)
    tiles_before = tl.cumsum(tiles, 0) - tiles
    mine = (tiles_before <= tile) & (tile < tiles_before + tiles)
    expert = tl.sum(tl.where(mine, e, 0), 0)
    begin = tl.sum(tl.where(mine, begins + (tile - tiles_before) * BM, 0), 0)
    end = tl.sum(tl.where(mine, ends, 0), 0)  # 0 if there is no such tile
    if begin < end:
        m = begin + tl.arange(0, BM)
        n = tl.program_id(1) * BN + tl.arange(0, BN)
        place = out + m.to(tl.int64)[None, :] * features + n[:, None]
        inside = (n < features)[:, None] & (m < end)[None, :]
        if expert == experts:
            tl.store(place, tl.zeros([BN, BM], out.dtype.element_ty), mask=inside)
        else:
            matrix = expert.to(tl.int64)
            acc = multiply(
                x, weight + matrix * features * cols, scale + matrix * scale_rows * scale_cols,
                tl.where(m < end, m, begin), tl.where(n < features, n, 0), cols, scale_cols,
                BLOCK_ROWS, BLOCK_COLS, BM, BN, BK, SPLIT, EVEN,
            )  # fmt: skip
            tl.store(place, acc.to(out.dtype.element_ty), mask=inside)


@triton.jit
def gathered_kernel(
    x, weight, scale, ids, out, count, features, cols, scale_rows, scale_cols,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    SPLIT: tl.constexpr, EVEN: tl.constexpr, WINDOW: tl.constexpr,
):  # fmt: skip
    """Row t of `x` is multiplied by matrix `ids[t]`.

    There is a program a row. Within WINDOW rows the first of an expert does the work of all, so that a matrix is read once
    for them, and no rows have to be sorted.
    """
    row = tl.program_id(0)
    window = row // WINDOW * WINDOW + tl.arange(0, WINDOW)
    expert = tl.load(ids + row)
    same = (tl.load(ids + window, mask=window < count, other=-1) == expert).to(tl.int32)
    if tl.min(tl.where(same != 0, window, row), 0) == row:
        n = tl.program_id(1) * BN + tl.arange(0, BN)
        matrix = expert.to(tl.int64)
        rank = tl.cumsum(same, 0) - 1
        total = tl.sum(same, 0)
        for first in range(0, total, BM):
            slot = first + tl.arange(0, BM)
            hit = (same != 0)[:, None] & (rank[:, None] == slot[None, :])
            m = tl.sum(tl.where(hit, window[:, None], 0), 0)
            acc = multiply(
                x, weight + matrix * features * cols, scale + matrix * scale_rows * scale_cols,
                m, tl.where(n < features, n, 0), cols, scale_cols, BLOCK_ROWS, BLOCK_COLS, BM, BN, BK, SPLIT, EVEN,
            )  # fmt: skip
            place = out + m.to(tl.int64)[None, :] * features + n[:, None]
            tl.store(place, acc.to(out.dtype.element_ty), mask=(n < features)[:, None] & (slot < total)[None, :])
