"""The files that a model was loaded from, as they were then: what of them a model does not hold is copied when it is saved."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from ..errors import CheckpointError
from .files import Checkpoint
from .writer import DTYPES

_CHUNK = 1 << 24


@dataclass(frozen=True)
class Stored:
    """One tensor of a file, by what the file says: `dtype` as safetensors spells it.

    Attributes:
        begin, end: where its bytes lie in the file.
    """

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def nbytes(self) -> int:
        return self.end - self.begin

    def rows(self, rows: range) -> Stored:
        """Some of its first dimension, one after the other, as a tensor of its own."""
        one = self.nbytes // self.shape[0]
        shape = (len(rows), *self.shape[1:])
        return replace(self, shape=shape, begin=self.begin + rows.start * one, end=self.begin + rows.stop * one)

    def read(self) -> Tensor:
        """Its values."""
        data = bytearray(b"".join(self.chunks()))
        dtype = DTYPES[self.dtype]
        return torch.frombuffer(data, dtype=dtype).reshape(self.shape) if data else torch.empty(self.shape, dtype=dtype)

    def is_value(self, value: Tensor) -> bool:
        """Whether a tensor holds what the file does, in its own dtype, bit for bit."""
        if tuple(value.shape) != self.shape or self.dtype not in DTYPES:
            return False
        flat, at = value.detach().cpu().reshape(-1), 0
        for chunk in self.chunks():
            read = torch.frombuffer(bytearray(chunk), dtype=DTYPES[self.dtype])
            if not same_bits(read.to(value.dtype), flat[at : at + len(read)]):
                return False
            at += len(read)
        return True

    def chunks(self) -> Iterator[bytes]:
        """Its bytes, a few megabytes at a time.

        Raises:
            CheckpointError: the file ends before they do.
        """
        with self.file.open("rb") as file:
            file.seek(self.begin)
            left = self.nbytes
            while left:
                chunk = file.read(min(left, _CHUNK))
                if not chunk:
                    raise CheckpointError(f"{self.name}: {self.file.name} became shorter while it was read.")
                left -= len(chunk)
                yield chunk


#: Size, time of the last change and number of a file: other ones, another file.
Stamp = tuple[int, int, int]


@dataclass(frozen=True)
class Source:
    """The tensors of a checkpoint by the names of its files, in the files' order.

    Attributes:
        stamps: of each file, when the model was loaded.
        metadata: what stands in the headers beside the tensors, such as torchao's descriptions of them.
    """

    tensors: Mapping[str, Stored]
    stamps: Mapping[Path, Stamp]
    metadata: Mapping[str, str]

    @staticmethod
    def of(checkpoint: Checkpoint) -> Source:
        """What its files hold of it; copies that an index does not name are left out."""
        holders = {info.name: info.file for info in checkpoint.values()}
        tensors: dict[str, Stored] = {}
        metadata: dict[str, str] = {}
        stamps = {}
        for file in sorted(set(holders.values())):
            stamps[file] = _stamp(file)
            own, found = _header(file)
            metadata = own | metadata
            tensors |= {t.name: t for t in sorted(found, key=lambda t: t.begin) if holders.get(t.name) == file}
        return Source(tensors, stamps, metadata)

    def gone(self) -> str | None:
        """Which file is not what it was when the model was loaded, in words; None: all are."""
        for file, stamp in self.stamps.items():
            try:
                now = _stamp(file)
            except OSError:
                return f"{file} is gone"
            if now != stamp:
                return f"{file} has changed"
        return None


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are the same, NaN and the sign of zero included."""
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    bits = [t.detach().cpu().contiguous().reshape(-1) for t in (one, other)]
    return bits[0].numel() == 0 or torch.equal(*(t.view(torch.uint8) for t in bits))


def _stamp(file: Path) -> Stamp:
    found = file.stat()
    return found.st_size, found.st_mtime_ns, found.st_ino


def _header(file: Path) -> tuple[dict[str, str], Iterable[Stored]]:
    """Metadata and tensors of a safetensors file that was opened before, and so is one."""
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        header = json.loads(opened.read(length))
    base = 8 + length
    metadata = header.pop("__metadata__", None) or {}
    found = [
        Stored(name, file, entry["dtype"], tuple(entry["shape"]), *(base + at for at in entry["data_offsets"]))
        for name, entry in header.items()
    ]
    return metadata, found
