"""Which tile a weight-only kernel works in: fixed per range of rows, so that nothing is measured at the first call.

**Chosen by what is known of the hardware, not yet measured on a GPU.** Few rows are bound by the bandwidth of memory: tiles are
narrow, so that there are enough programs to keep every multiprocessor reading. Many rows are bound by the matrix
instructions: tiles are as large as their accumulators allow.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

#: As many programs keep the multiprocessors of a large GPU (an H100 has 132) busy; with fewer, tiles are made smaller.
_PROGRAMS = 256


@dataclass(frozen=True)
class Tile:
    """What a program takes at a time.

    Attributes:
        rows, outputs, cols: of `x`, of the result, and of both operands.
        split: parts of the columns that warps take apart.
        warps, stages: warps of a program; how many tiles it loads ahead.
    """

    rows: int
    outputs: int
    cols: int
    split: int
    warps: int
    stages: int


def choose(rows: Any, outputs: int, cols: int, block_cols: int, matrices: int = 1, itemsize: int = 2) -> Tile:
    """The tile for `rows` rows of each of some matrices `[outputs, cols]`; rows that are not known take a middle one.

    Args:
        block_cols: columns that share a scale, 0 if all do; a wider tile would be cut where they end.
        itemsize: bytes of an element of `x`.
    """
    tile = _tile(rows, outputs, cols, block_cols, matrices)
    # float32 tiles are twice as large; three of them do not fit the 99 KB that sm89 and sm120 have
    return tile if itemsize <= 2 else replace(tile, stages=2)


def _tile(rows: Any, outputs: int, cols: int, block_cols: int, matrices: int) -> Tile:
    fit = _fit(block_cols or cols)
    if not isinstance(rows, int):
        return Tile(64, 64, min(128, fit), 1, 4, 3)
    if rows <= 16:
        few, span = 8 if rows <= 8 else 16, min(256, fit)
        if matrices * outputs >= 64 * _PROGRAMS:
            return Tile(few, 64, span, 1, 4, 4)
        return Tile(few, 16, span, min(4, span // 16), 4, 4)
    if rows <= 32:
        return Tile(32, 64, min(128, fit), 1, 4, 4)
    if 2 * matrices * (rows // 128) * (outputs // 128) >= _PROGRAMS:
        # scales per block need a second accumulator, which takes the registers of more warps
        return Tile(128, 128, min(64, fit), 1, 8 if block_cols else 4, 3)
    return Tile(64, 64, min(128, fit), 1, 4, 3)


def _fit(cols: int) -> int:
    """The largest power of two that divides a number of columns, if that is 32 or more; else the next greater one."""
    divides = cols & -cols
    return divides if divides >= 32 else max(16, power_of_two(cols))


def power_of_two(number: int) -> int:
    """The smallest that is not less."""
    return 1 << max(0, number - 1).bit_length()
