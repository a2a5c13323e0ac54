"""Writes safetensors files part by part: no more than one part is in memory, and files appear when all are complete."""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import torch
from torch import Tensor

from ..errors import UsageError

#: By dtype, its name in a header.
NAMES: Mapping[torch.dtype, str] = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2", torch.float8_e8m0fnu: "F8_E8M0",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.bool: "BOOL",
    torch.uint64: "U64", torch.uint32: "U32", torch.uint16: "U16", torch.uint8: "U8", torch.complex64: "C64",
}  # fmt: skip
DTYPES: Mapping[str, torch.dtype] = {name: dtype for dtype, name in NAMES.items()}
_PART = ".part"  #: at the end of a file's name until it is complete


@dataclass(frozen=True)
class Entry:
    """One tensor to write, as a header describes it."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int

    @staticmethod
    def like(name: str, tensor: Tensor) -> Entry:
        if tensor.dtype not in NAMES:
            raise UsageError(f"{name}: {tensor.dtype} cannot be written to a safetensors file.")
        return Entry(name, NAMES[tensor.dtype], tuple(tensor.shape), tensor.numel() * tensor.element_size())


class Writer:
    """Files of a checkpoint, to which tensors are written in any order.

    A context manager: what was not finished leaves nothing behind.

    Args:
        entries: all tensors; files are filled in this order.
        most: bytes of tensors in one file; a larger tensor has a file of its own.
        variant: as in `model.<variant>.safetensors`.
        metadata: for the header of each file.
    """

    def __init__(
        self, folder: Path, entries: Iterable[Entry], most: int, variant: str | None, metadata: Mapping[str, str]
    ):
        self.folder, self.stem = folder, f"model.{variant}" if variant else "model"
        self.files = self._divide(list(entries), most)
        self.total = sum(entry.nbytes for entries in self.files.values() for entry in entries)
        self._places: dict[str, tuple[str, int, int]] = {}
        self._open: dict[str, BinaryIO] = {}
        self._metadata = {**metadata, "format": "pt"}

    def __enter__(self) -> Writer:
        self.folder.mkdir(parents=True, exist_ok=True)
        for file, entries in self.files.items():
            self._begin(file, entries)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for file, opened in self._open.items():
            opened.close()
            with contextlib.suppress(FileNotFoundError):
                (self.folder / (file + _PART)).unlink()

    def write(self, name: str, data: Tensor | Iterable[Tensor | bytes]) -> None:
        """Writes one tensor: its values, of the entry's dtype and shape, or some after the other, or its bytes."""
        file, at, size = self._places.pop(name)
        opened = self._open[file]
        opened.seek(at)
        parts = [data] if isinstance(data, Tensor) else data
        written = sum(opened.write(_bytes(part) if isinstance(part, Tensor) else part) for part in parts)
        if written != size:
            raise UsageError(f"{name}: {written} bytes where {size} were to be written; please report this.")

    def finish(self, more: Mapping[str, object]) -> None:
        """Puts the files in place of those of an earlier save, and writes the index where there are several.

        Args:
            more: for the index's metadata.
        """
        if self._places:
            raise UsageError(f"{next(iter(self._places))} was not written; please report this.")
        for opened in self._open.values():
            opened.close()
        shard = re.compile(rf"{re.escape(self.stem)}(-\d{{5}}-of-\d{{5}})?\.safetensors(\.index\.json)?$")
        for old in self.folder.iterdir():
            if shard.fullmatch(old.name) or old.name == self._index:
                old.unlink()
        for file in self.files:
            os.replace(self.folder / (file + _PART), self.folder / file)
        if len(self.files) > 1:
            where = {entry.name: file for file, entries in self.files.items() for entry in entries}
            index = {"metadata": {**more, "total_size": self.total}, "weight_map": where}
            (self.folder / self._index).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")

    @property
    def _index(self) -> str:
        """As transformers calls it: `model.safetensors.index.<variant>.json`."""
        _, _, variant = self.stem.partition(".")
        return f"model.safetensors.index.{variant}.json" if variant else "model.safetensors.index.json"

    def _divide(self, entries: Sequence[Entry], most: int) -> dict[str, list[Entry]]:
        parts: list[list[Entry]] = [[]]
        size = 0
        for entry in entries:
            if parts[-1] and size + entry.nbytes > most:
                parts.append([])
                size = 0
            parts[-1].append(entry)
            size += entry.nbytes
        if len(parts) == 1:
            return {f"{self.stem}.safetensors": parts[0]}
        return {f"{self.stem}-{i:05d}-of-{len(parts):05d}.safetensors": part for i, part in enumerate(parts, 1)}

    def _begin(self, file: str, entries: Sequence[Entry]) -> None:
        """Writes the header. Wider dtypes come first, so that each tensor lies on a multiple of its own width."""
        header: dict[str, object] = {"__metadata__": self._metadata}
        at = 0
        for entry in sorted(entries, key=lambda entry: -_width(entry.dtype)):
            header[entry.name] = {"dtype": entry.dtype, "shape": entry.shape, "data_offsets": [at, at + entry.nbytes]}
            self._places[entry.name] = (file, at, entry.nbytes)
            at += entry.nbytes
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        opened = self._open[file] = (self.folder / (file + _PART)).open("wb")
        opened.write(len(text).to_bytes(8, "little") + text)
        opened.truncate(8 + len(text) + at)
        base = 8 + len(text)
        for entry in entries:
            _, start, size = self._places[entry.name]
            self._places[entry.name] = (file, base + start, size)


def _width(dtype: str) -> int:
    return DTYPES[dtype].itemsize if dtype in DTYPES else 1


def _bytes(tensor: Tensor) -> memoryview:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return memoryview(flat.view(torch.uint8).numpy().data) if flat.numel() else memoryview(b"")
