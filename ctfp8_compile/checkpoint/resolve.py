"""How one FP8 weight of a checkpoint is scaled: the word of its config where that fits the file, else what the file says.

What a tensor is stored as decides. A group of the config that covers the weight, and whose scales would have the shape that the
file's have, is believed in everything. Otherwise the shape of the scale says the scheme, if it can be that of only one; a note
says so. A shape that fits several schemes, or none, is refused.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
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
from .grid import Grid
from .notes import Notes
from .scheme import Scheme, Schemes, UnlikeError, strategy_of

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
            return _reading(tensors, name, grid, replace(scheme, exponents=scheme.exponents or exponents), notes)
        said = said or scheme
    if refused is not None:
        raise refused
    if said is not None:
        activation = said.activation
    elif groups:
        activation = schemes.activation_of_group(groups[0])
    grid = _by_shape(weight, scale, schemes.blocks(), said)
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
    block = _by_shape(weight, scale, [], None).block
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
    found = [n for i, n in enumerate(found) if n != 1 or len(found) < 3 or i % 2 == 0]  # as ModelOpt writes them
    if len(found) != 2:
        return []
    many = [(n, 1) for n in _divisors(rows)] + [(1, n) for n in _divisors(cols)]
    return [runs for runs in many if Grid(block, runs).shape(rows, cols) == tuple(found)]


def _divisors(size: int) -> list[int]:
    return [n for n in range(2, size // _SMALLEST_RUN + 1) if size % n == 0]


def _by_shape(weight: TensorInfo, scale: TensorInfo, blocks: Sequence[tuple[int, int]], said: Scheme | None) -> Grid:
    """The only grid of FP8 weights that gives a scale of this shape.

    Raises:
        CheckpointError: there is none, or are several.
    """
    rows, cols = weight.shape[-2:]
    found = _of_matrices(weight, scale)
    if math.prod(found) == 1:
        return Grid((0, 0))
    wide = squeezed_last(found)
    groups = [cols // wide] if wide and cols % wide == 0 and cols // wide >= _SMALLEST_GROUP and wide > 1 else []
    named = [block for block in blocks if _fits(Grid(block), weight, found)]
    usual = [(1, 0), *((n, n) for n in _SQUARES), *((1, n) for n in (32, 64, 128, *groups))]
    if len(weight.shape) > 2:
        usual.append((0, 1))  # rows are inputs, columns outputs
    fitting = named or [block for block in usual if _fits(Grid(block), weight, found)]
    fitting = [block for block in fitting if Grid(block).shape(rows, cols) == tuple(found)] or fitting
    distinct = {_meaning(block, rows, cols): block for block in reversed(fitting)}
    if len(distinct) == 1:
        return Grid(next(iter(distinct.values())))
    if distinct:
        what = " or ".join(f"{b[0] or rows}x{b[1] or cols}" for b in distinct.values())
        raise CheckpointError(
            f"{scale}: fits {weight} in blocks of {what}, and quantization_config does not say which. Add a group for it "
            "(config_groups: targets, weights.strategy, weights.block_structure)."
        )
    cut = [Grid(b, r) for b in dict.fromkeys(blocks) if min(b) > 1 for r in _runs(rows, cols, found, b)]
    if len(cut) == 1 and scale.dtype != "U8":  # which may be the bytes of anything
        return cut[0]
    raise _unreadable(weight, scale, said, cut)


def _unreadable(weight: TensorInfo, scale: TensorInfo, said: Scheme | None, cut: Sequence[Grid]) -> CheckpointError:
    rows, cols = weight.shape[-2:]
    if cut:
        many = " or ".join(f"{math.prod(grid.runs)}" for grid in cut)
        return CheckpointError(
            f"{scale}: more scales than {weight} has blocks. They could be those of {many} parts of it, each in blocks of its "
            f"own, and the file does not say how many. Store one scale for each row instead, as [{rows}, {scale.shape[-1]}]."
        )
    want = "" if said is None else f" with {said}; expected shape {list(Grid(said.block).shape(rows, cols))}"
    if said is not None and said.strategy in ("tensor", "channel"):
        want = f" with {said}; expected shape {[1] if said.strategy == 'tensor' else [rows, 1]}"
    return CheckpointError(
        f"{scale}: does not fit {weight.name} {list(weight.shape)}{want}; its shape does not say how it is quantized either. Add "
        "a group of quantization_config that does (strategy, block_structure; weight_block_size), or quantize it again."
    )


def _meaning(block: tuple[int, int], rows: int, cols: int) -> tuple[int, int]:
    """Blocks that reach beyond a weight are the same as one that has it all."""
    high, wide = block
    return (high if 0 < high < rows else 0, wide if 0 < wide < cols else 0)


def squeezed_last(found: Sequence[int]) -> int:
    """Columns of a grid of scales, in any of its shapes."""
    some = [n for n in found if n != 1]
    return some[-1] if len(some) > 1 else 0
