"""Which tile a weight-only kernel works in: fixed per range of rows, so that nothing is measured at the first call.

Few rows are bound by the bandwidth of memory: tiles are narrow, so that there are enough programs to keep every multiprocessor
reading. Many rows are bound by the matrix instructions: tiles are as large as their accumulators allow.

Chosen on an H100 (`benchmarks/gpu_tiles.py`) for up to 16 rows of a matrix, and for one matrix with scales per row; the others by
what is known of the hardware.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

#: As many programs keep the multiprocessors of a large GPU (an H100 has 132) busy; with fewer, tiles are made smaller.
_PROGRAMS = 128
#: Kilobytes of shared memory that a program may have, by capability (CUDA C++ Programming Guide, technical specifications).
SHARED = {(7, 5): 64, (8, 0): 163, (9, 0): 227, (10, 0): 227, (10, 3): 227}
#: Of all others: sm86, sm89, sm120 and sm121 have as much, and it is a fair guess for Intel's GPUs.
SHARED_BY_DEFAULT = 99


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


def choose(
    rows: Any,
    outputs: int,
    cols: int,
    block_cols: int,
    matrices: int = 1,
    itemsize: int = 2,
    shared: int = SHARED_BY_DEFAULT,
) -> Tile:
    """The tile for `rows` rows of each of some matrices `[outputs, cols]`; rows that are not known take a middle one.

    Args:
        block_cols: columns that share a scale, 0 if all do; a wider tile would be cut where they end.
        itemsize: bytes of an element of `x`.
        shared: kilobytes of shared memory that a program may have.
    """
    fit = _fit(block_cols or cols)
    if isinstance(rows, int) and rows <= 16:
        tile = _few(rows, outputs, fit, bool(block_cols), matrices)
    else:
        large = shared > 2 * SHARED_BY_DEFAULT and itemsize <= 2
        tile = _many(rows, outputs, fit, bool(block_cols), matrices, large)
    return _within(tile, itemsize, shared - 2 << 10)


def _within(tile: Tile, itemsize: int, room: int) -> Tile:
    """The tile, or a smaller one, that takes no more than `room` bytes of shared memory."""
    loaded = tile.cols * (tile.outputs + itemsize * tile.rows)
    if itemsize <= 2:
        return replace(tile, stages=max(2, min(tile.stages, room // loaded)))
    # float32 operands come from shared memory, the decoded weight too; of what is loaded, one tile less is there
    decoded = tile.outputs * tile.cols * itemsize
    if loaded + decoded > room:
        return _within(replace(tile, cols=tile.cols // 2, split=max(1, tile.split // 2)), itemsize, room)
    return replace(tile, stages=max(2, min(tile.stages, 1 + (room - decoded) // loaded)))


def _few(rows: int, outputs: int, fit: int, blocks: bool, matrices: int) -> Tile:
    height, span = 8 if rows <= 8 else 16, min(256, fit)
    split = min(4, span // 16)
    if blocks:
        return Tile(height, 64 if height == 8 else 32, min(128, fit), 1, 4, 5)
    if matrices > 1:
        return Tile(height, 64, span, 1, 4, 3)
    if outputs >= 128 * _PROGRAMS:
        return Tile(height, 128, span, 1, 4, 3) if height == 8 else Tile(height, 32, span, split, 4, 3)
    return Tile(height, 32 if outputs >= 2048 else 16, span, split, 4, 5)


def _many(rows: Any, outputs: int, fit: int, blocks: bool, matrices: int, large: bool) -> Tile:
    middle = Tile(64, 64, min(128, fit), 1, 4, 3)
    if not isinstance(rows, int):
        return middle
    if rows <= 32:
        return Tile(32, 64, min(128, fit), 1, 4, 4)
    if large and matrices == 1 and not blocks and -(-rows // 256) * -(-outputs // 128) >= _PROGRAMS:
        return Tile(256, 128, min(64, fit), 1, 8, 4)
    if matrices * (rows // 128) * (outputs // 128) >= _PROGRAMS:
        # scales per block need a second accumulator, which takes the registers of more warps
        return Tile(128, 128, min(64, fit), 1, 8 if blocks else 4, 3)
    if rows > 64 and matrices == 1 and not blocks:
        return Tile(128, 64, min(128, fit), 1, 4, 3)
    return middle


def _fit(cols: int) -> int:
    """The largest power of two that divides a number of columns, if that is 32 or more; else the next greater one."""
    divides = cols & -cols
    return divides if divides >= 32 else max(16, power_of_two(cols))


def power_of_two(number: int) -> int:
    """The smallest that is not less."""
    return 1 << max(0, number - 1).bit_length()
