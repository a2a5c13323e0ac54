"""What a checkpoint folder holds, from the headers of its files and its config: nothing of it is loaded."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, SchemeError
from .files import FP8_DTYPE, Checkpoint, TensorInfo, nbytes
from .folder import Folder, check_config_file, of_folder
from .formats import PLAIN, SPELLED_ANYHOW, config_of_folder
from .inferred import inferred
from .mtp import mtp_names
from .notes import Notes
from .packed import PackedWeight, find, seen_as_weights
from .resolve import resolve
from .scheme import Schemes, heads_of
from .transforms import describe_transforms, is_matrix

#: What models call tables of embeddings.
_EMBEDDING = re.compile(r"(^|\.)([\w.]*embed\w*|wte|wpe|shared)\.weight$")


@dataclass(frozen=True)
class Row:
    """Tensors whose names differ by numbers only, and which are alike otherwise.

    Attributes:
        name: with `*` for the numbers.
        what: of an FP8 weight its scheme; of others why they are not FP8; of what is wrong, what is.
    """

    name: str
    count: int
    shape: tuple[int, ...]
    dtype: str
    nbytes: int
    fp8: bool
    what: str


@dataclass(frozen=True)
class Contents:
    """A checkpoint by kinds of tensors; sizes are in bytes.

    Attributes:
        format: the `quant_method` of its config.
        transforms: of a rotated checkpoint, each group of transforms, and where it is applied.
        bf16_bytes: what the model takes when dequantized.
        mtp_fp8_weights, mtp_bytes: of the layers for multi-token prediction, which sizes and rows count, too.
        notes: what its files and its config differ in; loading it warns of that.
    """

    model: str
    files: int
    format: str
    schemes: str
    transforms: tuple[str, ...]
    rows: tuple[Row, ...]
    fp8_bytes: int
    scale_bytes: int
    other_bytes: int
    bf16_bytes: int
    mtp_fp8_weights: int
    mtp_bytes: int
    notes: str

    def to_dict(self) -> dict[str, Any]:
        """Plain types only."""
        return asdict(self)


def look(folder: Path) -> Contents:
    """Reads the headers of all safetensors files of a folder, and its config.

    Raises:
        CheckpointError: a file is missing or damaged, an index is wrong.
    """
    notes = Notes()
    files = of_folder(folder, notes)
    check_config_file(folder)
    config = json.loads((folder / "config.json").read_text())
    schemes, instead = _schemes(folder, config, files)
    tensors = files.open(PLAIN if schemes is None else schemes.format)
    if schemes is not None:  # there is no model to ask which modules are embeddings
        schemes.embeddings |= {name.rpartition(".")[0] for name in tensors if _EMBEDDING.search(name)}
    packed, why_not = _packed(tensors, schemes)
    counts: Counter[tuple[str, tuple[int, ...], str, int, str]] = Counter()
    fp8 = scales = other = bf16 = mtp_bytes = 0
    tensors = seen_as_weights(tensors, packed)
    mtp = mtp_names(tensors)
    for name, info in tensors.items():
        size = sum(map(nbytes, packed[name].parts.values())) if name in packed else nbytes(info)
        mtp_bytes += size * (name in mtp)
        what = (
            "the matrix of a transform" if is_matrix(name, tensors) else _what(name, tensors, schemes, why_not, notes)
        )
        if name in packed:
            weight = packed[name]
            info = weight.packed
            other, bf16 = other + size, bf16 + 2 * math.prod(weight.info.shape)
            what = f"another format, dequantized while loading: {weight.kind}"
        elif info.dtype == FP8_DTYPE:
            fp8, bf16 = fp8 + size, bf16 + 2 * size
        elif name.endswith(("_scale", "_zero_point")):
            scales += size
            continue
        else:
            other, bf16 = other + size, bf16 + size
        counts[re.sub(r"\d+", "*", info.name), info.shape, info.dtype, size, what] += 1
    rows = [
        Row(name, n, shape, dtype, n * size, dtype == FP8_DTYPE, what)
        for (name, shape, dtype, size, what), n in counts.items()
    ]
    rows.sort(key=lambda row: (not row.fp8, row.what, -row.nbytes, row.name))
    described = Counter(row.what for row in rows if row.fp8)
    return Contents(
        model=", ".join(config.get("architectures") or [config.get("model_type", "unknown model")]),
        files=len(files.files),
        format="" if schemes is None else schemes.format.name,
        schemes=instead if schemes is None else "; ".join(described) or "no FP8 weights",
        transforms=() if schemes is None else describe_transforms(schemes.format.config),
        rows=tuple(rows),
        fp8_bytes=fp8,
        scale_bytes=scales,
        other_bytes=other,
        bf16_bytes=bf16,
        mtp_fp8_weights=sum(tensors[name].dtype == FP8_DTYPE for name in mtp),
        mtp_bytes=mtp_bytes,
        notes=str(notes),
    )


def _schemes(folder: Path, config: dict[str, Any], files: Folder) -> tuple[Schemes | None, str]:
    """The checkpoint's schemes; or None, and what it is instead."""
    try:
        parts = (part.get("quantization_config") for part in config.values() if isinstance(part, dict))  # `text_config`
        quantization = config_of_folder(folder) or next(filter(None, parts), None)
        if quantization is None:
            quantization = inferred(files.open(SPELLED_ANYHOW))
        if quantization is None:
            return None, "not quantized: config.json has no quantization_config, and no FP8 weight has a scale"
        schemes = Schemes(quantization)
        schemes.heads = heads_of(config)
        return schemes, ""
    except SchemeError as error:
        return None, f"another format: {error}"


def _packed(tensors: Checkpoint, schemes: Schemes | None) -> tuple[dict[str, PackedWeight], str]:
    """Weights in other formats; or none, and why they cannot be read."""
    try:
        return ({} if schemes is None else find(tensors, schemes, read_shapes=False)), ""
    except (CheckpointError, SchemeError) as error:
        return {}, str(error)


def _what(name: str, tensors: Checkpoint, schemes: Schemes | None, why_not: str, notes: Notes) -> str:
    info: TensorInfo = tensors[name]
    module, _, leaf = name.rpartition(".")
    if schemes is None:
        return "not a matrix" if len(info.shape) < 2 else f"{info.dtype} matrices"
    if info.dtype == FP8_DTYPE:
        try:
            return str(resolve(tensors, schemes, name, notes).scheme)
        except (CheckpointError, SchemeError) as error:
            return str(error)
    if leaf == "weight_packed" or info.dtype in ("I8", "U8"):
        return f"another format: {why_not}"
    if leaf != "weight" or len(info.shape) < 2:
        return "not a matrix"
    if schemes.ignores(module):
        return "ignored by the config"
    if "embed" in name:
        return "an embedding"
    return "no target of the config" if schemes.group(module) is None else "left as it is in the file"
