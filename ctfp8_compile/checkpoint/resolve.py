"""How one FP8 weight of a checkpoint is scaled: the word of its config where that fits the file, else what the file says.

What a tensor is stored as decides. A group of the config that covers the weight, and whose scales would have the shape that the
file's have, is believed in everything. Otherwise the shape of the scale says the scheme, if it can be that of only one; a note
says so. A shape that fits several schemes, or none, is refused.
"""

from __future__ import annotations

import math
from collections.abc import Container, Sequence
from dataclasses import dataclass, replace

from ..errors import CheckpointError, SchemeError
from .files import (
    EXPONENT_DTYPES,
    SCALE_DTYPES,
    Checkpoint,
    TensorInfo,
    input_scale_name,
    scale_name,
)
from .grid import Grid, as_matrix, squeezed
from .notes import Notes
from .scheme import MX_BLOCK, Scheme, Schemes, UnlikeError, strategy_of

#: Blocks that files have whose config does not say: all rows and columns, one row, and squares.
_SQUARES = (128, 64, 32, 256)
_SMALLEST_GROUP = 8
#: Rows or columns of a run (a head, or one rank's part of a weight): fewer would be no matrix.
_SMALLEST_RUN = 16


@dataclass(frozen=True)
class Reading:
    """How the scale of one FP8 weight is to be read.

    Attributes:
        scheme: of a parameter made of this weight alone; its block divides the grid's.
        grid: how the file has its scales.
    """

    scheme: Scheme
    grid: Grid


def resolve(tensors: Checkpoint, schemes: Schemes, name: str, notes: Notes) -> Reading:
    """Decides how an FP8 weight is scaled, from headers and config.

    Args:
        name: ours, of a weight that is float8_e4m3fn in the file.
        notes: where the config does not fit the file is noted here.

    Raises:
        CheckpointError: its scale is missing, of a dtype that scales do not have, or of a shape that fits no scheme or several.
        SchemeError: the config asks for something that we cannot honour.
    """
    weight, module = tensors[name], name.removesuffix(".weight")
    scale = _scale(tensors, name)
    exponents = scale.dtype in EXPONENT_DTYPES
    said: Scheme | None = None
    refused: SchemeError | None = None
    activation = "none"
    groups = schemes.covering(module)
    for group in groups:
        try:
            scheme = schemes.scheme_of_group(group, module)
        except UnlikeError:
            continue
        except SchemeError as error:
            refused = refused or error
            continue
        if grid := _grid(weight, scale, scheme.block):
            if schemes.ignores(module):
                notes.add(f"FP8, though quantization_config leaves it out; read by its group {group!r}", weight.name)
            if scale.dtype == "U8" and not scheme.exponents and scheme.block != MX_BLOCK:
                notes.add(
                    "scales stored as bytes, which quantization_config does not say; read as powers of two", weight.name
                )
            return _reading(tensors, name, grid, replace(scheme, exponents=scheme.exponents or exponents), notes)
        said = said or scheme
    if refused is not None:
        raise refused
    if said is not None:
        activation = said.activation
    elif groups:
        activation = schemes.activation_of_group(groups[0])
    grid = _by_shape(weight, scale, schemes.blocks(), said, schemes.heads)
    if said is not None and said.activation == "group" and grid.block[1] != 128:
        activation = "none"
    scheme = Scheme("", grid.common(*weight.shape[-2:]), activation, exponents)
    if grid.whole:
        what = str(replace(scheme, strategy=strategy_of(scheme.block))).split(",")[0]
        notes.add(
            f"FP8; quantization_config says {said or _nothing(schemes, module)}, the shape of the scale {what}",
            weight.name,
        )
    return _reading(tensors, name, grid, scheme, notes)


def by_shape(weight: TensorInfo, scale: TensorInfo) -> Scheme:
    """The scheme that the shape of a scale says, without any config; activations are not quantized.

    Raises:
        CheckpointError: it says none, or several.
    """
    block = _by_shape(weight, scale, [], None, ()).block
    return Scheme(strategy_of(block), block, "none", scale.dtype in EXPONENT_DTYPES)


def _nothing(schemes: Schemes, module: str) -> str:
    groups = schemes.covering(module)
    return f"other weights (group {groups[0]!r})" if groups else "nothing of it"


def _scale(tensors: Checkpoint, name: str) -> TensorInfo:
    found = scale_name(name)
    if found not in tensors:
        raise CheckpointError(
            f"{tensors[name]}: FP8 weight without a scale; {' or '.join(tensors.spellings(found))} is not in the checkpoint. "
            "Quantize it again."
        )
    scale = tensors[found]
    if scale.dtype not in SCALE_DTYPES | EXPONENT_DTYPES:
        raise CheckpointError(
            f"{scale}: a scale must be float32, bfloat16 or float16, or bytes (U8, F8_E8M0), which stand for powers of two. "
            "Quantize it again."
        )
    return scale


def _reading(tensors: Checkpoint, name: str, grid: Grid, scheme: Scheme, notes: Notes) -> Reading:
    """Checks what a scheme says of activations against the file."""
    weight = tensors[name]
    block = grid.common(*weight.shape[-2:])
    scheme = replace(scheme, strategy=strategy_of(block), block=block)
    if not grid.whole:
        run = [size // n for size, n in zip(weight.shape[-2:], grid.runs, strict=True)]
        notes.add(
            f"scaled in blocks of {grid.block[0]}x{grid.block[1]} that begin anew every {run[0]} rows and {run[1]} columns; read "
            f"as blocks of {block[0]}x{block[1]}",
            weight.name,
        )
    if scheme.activation == "mx" and not (scheme.exponents and block[1] == 32):
        raise SchemeError(
            f"{weight.name}: quantization_config says that inputs are quantized in groups of 32, which only goes with MXFP8 "
            "weights, and its scales are others. Correct input_activations of its group."
        )
    if scheme.activation == "tensor":
        found = tensors.get(input_scale_name(name))
        if found is None:
            notes.add("no input_scale, which the scheme wants; its input is quantized by token", weight.name)
            scheme = replace(scheme, activation="token")
        elif found.dtype not in SCALE_DTYPES or math.prod(found.shape) not in (1, math.prod(weight.shape[:-2])):
            raise CheckpointError(
                f"{found}: a static input_scale must be one float32, bfloat16 or float16 number. Quantize it again."
            )
    return Reading(scheme, grid)


def _of_matrices(weight: TensorInfo, scale: TensorInfo) -> Sequence[int]:
    """The shape of the scale of each matrix of a weight; `[]` where one value stands for all."""
    lead = weight.shape[:-2]
    if lead and scale.shape[: len(lead)] == lead:
        return scale.shape[len(lead) :]
    return () if math.prod(scale.shape) == 1 else scale.shape if not lead else (-1,)


def _grid(weight: TensorInfo, scale: TensorInfo, block: tuple[int, int]) -> Grid | None:
    """The grid of a block that the config names, if the scale has the shape of it."""
    return Grid(block) if _fits(Grid(block), weight, _of_matrices(weight, scale)) else None


def _fits(grid: Grid, weight: TensorInfo, found: Sequence[int]) -> bool:
    """Whether the scale of each matrix of a weight may have this shape."""
    rows, cols = weight.shape[-2:]
    if (
        len(weight.shape) > 2 and len(found) == 2 and 1 in found
    ):  # of experts in one tensor rows may be inputs or outputs
        return grid.shape(rows, cols) == tuple(found)
    return grid.fits(rows, cols, found)


def _runs(rows: int, cols: int, found: Sequence[int], block: tuple[int, int]) -> list[tuple[int, int]]:
    """Into how many equal runs the rows, or the columns, can be cut so that as many blocks come of it."""
    found = as_matrix(found)
    if len(found) != 2:
        return []
    many = [(n, 1) for n in _divisors(rows)] + [(1, n) for n in _divisors(cols)]
    return [runs for runs in many if Grid(block, runs).shape(rows, cols) == tuple(found)]


def _divisors(size: int) -> list[int]:
    return [n for n in range(2, size // _SMALLEST_RUN + 1) if size % n == 0]


def _by_shape(
    weight: TensorInfo,
    scale: TensorInfo,
    blocks: Sequence[tuple[int, int]],
    said: Scheme | None,
    heads: Container[int],
) -> Grid:
    """The only grid of FP8 weights that gives a scale of this shape.

    Raises:
        CheckpointError: there is none, or are several.
    """
    rows, cols = weight.shape[-2:]
    found = _of_matrices(weight, scale)
    if math.prod(found) == 1:
        return Grid((0, 0))
    fitting = [Grid(block) for block in blocks if _fits(Grid(block), weight, found)]
    if not fitting:
        fitting = _unnamed(weight, found)
        if scale.dtype != "U8":  # which may be the bytes of anything
            fitting += [Grid(b, r) for b in dict.fromkeys(blocks) if min(b) > 1 for r in _runs(rows, cols, found, b)]
    distinct = {grid.borders(rows, cols): grid for grid in reversed(fitting)}
    by_head = [grid for grid in distinct.values() if math.prod(grid.runs) in heads and not grid.whole]
    if len(distinct) == 1 or len(by_head) == 1:
        return by_head[0] if by_head else next(iter(distinct.values()))
    if not distinct:
        raise _unreadable(weight, scale, said)
    what = " or ".join(map(str, distinct.values()))
    raise CheckpointError(
        f"{scale}: fits {weight} in blocks of {what}, and quantization_config does not say which. Store one scale for each row "
        f"instead, as [{rows}, {scale.shape[-1]}], or add a group that says it (strategy, block_structure)."
    )


def _unnamed(weight: TensorInfo, found: Sequence[int]) -> list[Grid]:
    """The grids that files have whose config does not say, of those that give a scale of this shape."""
    rows, cols = weight.shape[-2:]
    some = squeezed(found)
    wide = some[-1] if len(some) > 1 else 0
    groups = [cols // wide] if wide > 1 and cols % wide == 0 and cols // wide >= _SMALLEST_GROUP else []
    usual = [Grid(b) for b in ((1, 0), *((n, n) for n in _SQUARES), *((1, n) for n in (32, 64, 128, *groups)))]
    if len(weight.shape) > 2:
        usual.append(Grid((0, 1)))  # rows are inputs, columns outputs
    fitting = [grid for grid in usual if _fits(grid, weight, found)]
    fitting = fitting or [grid for grid in usual if grid.fits(rows, cols, found)]
    return [grid for grid in fitting if grid.shape(rows, cols) == tuple(as_matrix(found))] or fitting


def _unreadable(weight: TensorInfo, scale: TensorInfo, said: Scheme | None) -> CheckpointError:
    rows, cols = weight.shape[-2:]
    want = "" if said is None else f" with {said}; expected shape {list(Grid(said.block).shape(rows, cols))}"
    if said is not None and said.strategy in ("tensor", "channel"):
        want = f" with {said}; expected shape {[1] if said.strategy == 'tensor' else [rows, 1]}"
    return CheckpointError(
        f"{scale}: does not fit {weight.name} {list(weight.shape)}{want}; its shape does not say how it is quantized either. Add "
        "a group of quantization_config that does (strategy, block_structure; weight_block_size), or quantize it again."
    )
