"""Rotated checkpoints: what `transform_config` says is applied to activations, and where the file keeps the matrices.

A transform at a weight location (`weight_input`, `weight_output`: SpinQuant's R1 and R2) is in the weights already. One at
`input`, `output`, `q_attn` or `k_cache` is multiplied to an activation at run time: by `{module}.{group}_{location}.weight`,
`[B, B]`, the block of a block-diagonal matrix. All modules of a group that need one size share it, and a file stores it once,
under the first module's name.

| `type` | a block | its inverse |
|---|---|---|
| `hadamard`, `random-hadamard` | the stored ±1, rows and columns permuted by `perm` where there is one, over √B | its transpose |
| `random-matrix` | as stored | stored as such, under the name of the module that applies it |
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from compressed_tensors.transform import TransformConfig
from pydantic import ValidationError
from torch import Tensor

from ..errors import CheckpointError, SchemeError
from .files import SCALE_DTYPES, Checkpoint
from .scheme import matches_expression, word

IN_WEIGHTS = ("weight_input", "weight_output")
AROUND = ("input", "output")  #: of a linear
ATTENTION = ("q_attn", "k_cache")
HADAMARD = ("hadamard", "random-hadamard")
TYPES = (*HADAMARD, "random-matrix")
_DTYPES = SCALE_DTYPES | {"F64": torch.float64}
#: How names of matrices end in a file, and of the permutations that go with some.
_NAME = re.compile(rf"^(.+)\.([^.]+)_({'|'.join((*AROUND, *ATTENTION))})\.(weight|perm)$")


@dataclass(frozen=True)
class Transform:
    """One entry of a group of `transform_config` that is applied at run time.

    Attributes:
        group: the name of its group, such as `R4`.
        type: one of `TYPES`.
        location: one of `AROUND` or `ATTENTION`.
        inverse: whether the inverse of the group's matrix is applied.
        block: size of a block; None: the matrix is as large as the activation.
        precision: what the product is computed in.
        randomized: the matrix's rows and columns are permuted by `perm`.
        targets, ignore: module names, `re:` patterns and class names.
    """

    group: str
    type: str
    location: str
    inverse: bool
    block: int | None
    precision: torch.dtype
    randomized: bool
    targets: tuple[str, ...]
    ignore: tuple[str, ...]

    @property
    def name(self) -> str:
        """`R4_input`: what its module is called inside the module that it is applied to."""
        return f"{self.group}_{self.location}"

    @property
    def transposed(self) -> bool:
        """Whether the matrix applied is the stored one transposed."""
        return self.inverse and self.type in HADAMARD

    def covers(self, module: str, classes: Collection[str]) -> bool:
        """Whether it is applied to a module of this name in the checkpoint, of a class of these names (with its bases)."""
        return _matches(module, classes, self.targets) and not _matches(module, classes, self.ignore)

    def __str__(self) -> str:
        size = f", blocks of {self.block}" if self.block else ""
        return f"{self.name} ({self.type}{size}{', inverse' * self.inverse})"


@dataclass(frozen=True)
class Matrix:
    """Where a file keeps the matrix of a transform.

    Attributes:
        name: of its tensor `[B, B]`, float64 or narrower.
        perm: of the int64 permutation `[B]` of its rows and columns; empty where there is none.
        scale: what to divide by: √B of a Hadamard matrix, else 1.
    """

    name: str
    perm: str
    scale: float


def read_transforms(config: Mapping[str, Any]) -> tuple[Transform, ...]:
    """The transforms of a quantization config that are applied at run time, in the order of their groups.

    Raises:
        SchemeError: `transform_config` is not what compressed-tensors writes, or has a type or location we do not know.
    """
    found = config.get("transform_config") or {}
    if not isinstance(found, Mapping):
        raise SchemeError(f"quantization_config: transform_config is not an object, but {found!r}. {_AGAIN}")
    groups = found.get("config_groups") or {}
    for name, group in groups.items() if isinstance(groups, Mapping) else ():
        kind = group.get("type") if isinstance(group, Mapping) else None
        if kind not in TYPES:
            raise SchemeError(
                f"quantization_config: transform_config: group {name!r} is of type {kind!r}; known are {', '.join(TYPES)}. "
                f"{_AGAIN}"
            )
    if not groups:
        return ()
    try:
        parsed = TransformConfig.model_validate(dict(found))
    except (ValidationError, ValueError, TypeError, AttributeError) as error:
        what = error.errors()[0] if isinstance(error, ValidationError) else {"loc": (), "msg": str(error)}
        where = ".".join(map(str, ("transform_config", *what["loc"])))
        raise SchemeError(f"quantization_config: {where}: {what['msg']}. {_AGAIN}") from error
    out = []
    for name, scheme in parsed.config_groups.items():
        if scheme.head_dim is not None and scheme.head_dim < 1:
            raise SchemeError(
                f"quantization_config: transform_config.config_groups.{name}.head_dim: {scheme.head_dim} is not a size. {_AGAIN}"
            )
        for entry in scheme.apply:
            if (location := word(entry.location)) not in IN_WEIGHTS:
                out.append(
                    Transform(
                        name, scheme.type, location, entry.inverse, scheme.head_dim, scheme.precision,
                        scheme.randomize and scheme.type in HADAMARD, tuple(entry.targets), tuple(entry.ignore),
                    )
                )  # fmt: skip
    return tuple(out)


def describe_transforms(config: Mapping[str, Any]) -> tuple[str, ...]:
    """Each group of `transform_config` in words; what is wrong with it, where something is."""
    try:
        applied = read_transforms(config)
    except SchemeError as error:
        return (str(error),)
    groups = (config.get("transform_config") or {}).get("config_groups") or {}
    out = []
    for name, group in groups.items():
        size = f", blocks of {group['head_dim']}" if group.get("head_dim") else ""
        online = [
            f"{t.location}{' (inverse)' * t.inverse} of {', '.join(t.targets)}" for t in applied if t.group == name
        ]
        out.append(f"{name}: {group['type']}{size}; {'; '.join(online) or 'in the weights'}")
    return tuple(out)


_AGAIN = "Quantize the model again without this transform, or serve the checkpoint with vLLM."


def is_matrix(name: str, tensors: Collection[str]) -> bool:
    """Whether a tensor of a file is the matrix of a transform, or its permutation: a module inside a linear or attention."""
    match = _NAME.match(name)
    return match is not None and (match[3] in ATTENTION or f"{match[1]}.weight" in tensors)


def check_named(tensors: Checkpoint, transforms: Iterable[Transform]) -> None:
    """Refuses matrices that no group of the config applies: without them the model computes something else.

    Raises:
        CheckpointError: naming the tensor.
    """
    known = {transform.name for transform in transforms}
    for name in tensors:
        match = _NAME.match(name)
        if match and f"{match[2]}_{match[3]}" not in known and is_matrix(name, tensors):
            raise CheckpointError(
                f"{tensors[name]}: the matrix of a transform, but transform_config in quantization_config has no group "
                f"{match[2]!r} with location {match[3]!r}. Take the config.json that was written with the file."
            )


class Matrices:
    """Which tensor of a file is the matrix of each transform of each module.

    Args:
        places: every module that a transform is applied to, by its name in the checkpoint, and the size of what is
            transformed there; in the model's order.
    """

    def __init__(self, tensors: Checkpoint, places: Iterable[tuple[Transform, str, int]]):
        self._tensors = tensors
        self._stored: dict[tuple[Any, ...], list[str]] = {}
        for transform, module, size in places:
            if (name := f"{module}.{transform.name}.weight") in tensors:
                names = self._stored.setdefault(_kind(transform, _block(transform, module, size)), [])
                if name not in names:
                    names.append(name)

    def of(self, transform: Transform, module: str, size: int) -> Matrix:
        """The matrix of one transform: stored under the module's own name, or under that of one it shares it with.

        Raises:
            CheckpointError: it is in the file under neither, or has another shape or dtype than it must.
        """
        block = _block(transform, module, size)
        own = f"{module}.{transform.name}.weight"
        names = [own] if own in self._tensors else self._stored.get(_kind(transform, block), [])[:1]
        if not names:
            raise CheckpointError(
                f"{own}: {module} needs this {block}×{block} matrix of transform {transform}, and neither it nor one it could "
                "share is in the checkpoint. Download the file again, or quantize the model again."
            )
        info = self._tensors[names[0]]
        if info.shape != (block, block) or info.dtype not in _DTYPES:
            raise CheckpointError(
                f"{info}: {module} needs a {block}×{block} matrix of floating-point numbers for transform {transform}. Correct "
                "head_dim in transform_config, or quantize the model again."
            )
        perm = names[0].removesuffix("weight") + "perm" if transform.randomized else ""
        if perm and (
            perm not in self._tensors or self._tensors[perm].shape != (block,) or self._tensors[perm].dtype != "I64"
        ):
            raise CheckpointError(
                f"{perm}: transform {transform} is randomized, and this permutation of {block} int64 numbers is not in the "
                "checkpoint. Download the file again, or quantize the model again."
            )
        return Matrix(names[0], perm, math.sqrt(block) if transform.type in HADAMARD else 1.0)


def read_matrix(tensors: Checkpoint, transform: Transform, matrix: Matrix) -> tuple[Tensor, Tensor | None]:
    """Reads and checks a matrix, `[B, B]` as stored, and its permutation, int64 `[B]`.

    Raises:
        CheckpointError: NaN or infinite values, a Hadamard matrix that is not orthogonal, no permutation.
    """
    weight = tensors.read_stored(tensors[matrix.name])
    if (said := fault(weight, transform, matrix)) is not None:
        raise CheckpointError(f"{tensors[matrix.name]}: {said}. Download the file again, or quantize the model again.")
    if not matrix.perm:
        return weight, None
    perm = tensors.read_stored(tensors[matrix.perm])
    if not torch.equal(perm.sort().values, torch.arange(len(perm))):
        raise CheckpointError(f"{tensors[matrix.perm]}: not a permutation. Download the file again.")
    return weight, perm


def fault(weight: Tensor, transform: Transform, matrix: Matrix) -> str | None:
    """Why values cannot be a transform's matrix; None where they can."""
    if not torch.isfinite(weight).all():
        return "holds NaN or infinite values"
    if transform.type in HADAMARD and not _is_orthogonal(weight, matrix.scale):
        return f"not orthogonal, so not the Hadamard matrix that transform {transform} is said to be"
    return None


def _is_orthogonal(weight: Tensor, scale: float) -> bool:
    """Whether `W Wᵀ = scale² I`, seen by a few vectors: the whole product of a large matrix takes minutes."""
    probe = torch.randn(len(weight), 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    wide = weight.double() / scale
    return torch.allclose(wide @ (wide.T @ probe), probe, rtol=0, atol=1e-2)


def _block(transform: Transform, module: str, size: int) -> int:
    block = transform.block or size
    if size % block:
        raise SchemeError(
            f"{module}: its {transform.location} has {size} columns, which head_dim={block} of transform {transform} does not "
            "divide. Correct head_dim in transform_config."
        )
    return block


def _kind(transform: Transform, block: int) -> tuple[Any, ...]:
    """What transforms must have in common to share a matrix; the inverse of a random one is a matrix of its own."""
    return transform.group, block, transform.inverse and transform.type not in HADAMARD


def _matches(module: str, classes: Collection[str], targets: Iterable[str]) -> bool:
    return any(matches_expression(module, t) if t.startswith("re:") else t == module or t in classes for t in targets)
