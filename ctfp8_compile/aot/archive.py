"""Reads the zip file that a `.pt2` is, once and strictly: what two readers could understand differently is refused.

The layout that is taken is the one torch (and Python's zipfile, without compression) writes, from the first byte to the last:

    for each record:    local header, name, extra field, the bytes as they are, perhaps a data descriptor
    for each record:    its entry in the central directory
    perhaps:            end of central directory for more than 4 GiB (zip64), and its locator
    last 22 bytes:      end of central directory

Nothing lies before, between or after; local headers say what the central directory says; nothing is compressed or encrypted.
So no record is larger than the file, there is one central directory, and every byte belongs to one record.
https://pkware.cachefly.net/webdocs/casestudies/APPNOTE.TXT names the fields.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import stat
import tempfile
import zlib
from collections.abc import Iterator
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from struct import Struct, error, unpack_from
from threading import Lock
from typing import BinaryIO

import torch

from ..counted import counted
from ..errors import ArtifactError

_LOCAL = Struct("<4s5H3I2H")  # signature, version, flags, method, time, date, crc, packed, size, name, extra
_ENTRY = Struct("<4s6H3I5H2I")  # signature, made by, and as above; comment, disk, attributes (2, 4), offset
_END = Struct("<4s4H2IH")  # signature, disk, disk of directory, entries here, entries, size, offset, comment
_END64 = Struct("<4sQ2H2I4Q")  # signature, size of this, versions, disks, entries here, entries, size, offset
_LOCATOR = Struct("<4sIQI")  # signature, disk, offset of _END64, disks

_DESCRIPTOR, _UTF8 = 0x0008, 0x0800
_ZIP64, _PADDING = 0x0001, 0x4246  # ids of extra fields; torch pads with "FB" so that tensors are aligned
_FULL16, _FULL32 = 0xFFFF, 0xFFFFFFFF  # stands for "see the zip64 field"
#: A directory entry is at least its name; a file of ours has some thousand records.
_MOST_RECORDS, _LONGEST_NAME = 1_000_000, 1024
_CHUNK, _LARGE = 16 << 20, 1 << 20


@dataclass(frozen=True)
class Record:
    """One file of the archive: where its bytes are, how many, and their CRC-32."""

    name: str
    offset: int
    size: int
    crc: int


class Archive:
    """The records of an open file, by their name under the archive's one folder."""

    def __init__(self, path: Path, file: BinaryIO, records: dict[str, Record]):
        self.path, self.records = path, records
        self._file, self._reading, self._left = file, Lock(), False
        self._ahead: dict[str, Future[torch.Tensor]] = {}

    def read(self, name: str, most: int = 1 << 30) -> bytes:
        """The bytes of a record.

        Raises:
            ArtifactError: there is no such record, it is damaged, or it is larger than `most`.
        """
        if name not in self.records:
            raise ArtifactError(f"{self.path}: {name} is missing. {AGAIN}")
        if self.records[name].size > most:
            raise ArtifactError(f"{self.path}: {name} is larger than the {most} bytes that are read of such a record.")
        out = bytearray(self.records[name].size)
        self._fill(self.records[name], memoryview(out))
        return bytes(out)

    def tensor(self, name: str) -> torch.Tensor:
        """The bytes of a record, read once into a tensor's own memory.

        Raises:
            ArtifactError: as `read`.
        """
        ahead = self._ahead.pop(name, None)
        return self._tensor(name) if ahead is None else ahead.result()

    @contextmanager
    def reading_ahead(self) -> Iterator[None]:
        """Meanwhile, a thread reads what is large, for `tensor`: reading, and checksums, leave Python to others."""
        with ThreadPoolExecutor(1) as reader:
            for name, record in self.records.items():
                if name.startswith("data/") and record.size >= _LARGE:
                    self._ahead[name] = reader.submit(self._tensor, name)
            try:
                yield
            finally:
                self._left = True
                reader.shutdown(cancel_futures=True)

    @contextmanager
    def as_file(self) -> Iterator[str]:
        """A name of the open file, for a loader that wants one: whatever is done to the path, it is this file."""
        with tempfile.TemporaryDirectory() as folder:
            name, open_file = f"{folder}/model.pt2", Path(f"/proc/self/fd/{self._file.fileno()}")
            if open_file.exists():
                os.symlink(open_file, name)
            else:
                with open(name, "wb") as copy:
                    self._file.seek(0)
                    shutil.copyfileobj(self._file, copy, _CHUNK)
            yield name

    def _tensor(self, name: str) -> torch.Tensor:
        record = self.records[name]
        out = torch.empty(record.size, dtype=torch.uint8)
        if record.size:
            self._fill(record, memoryview((ctypes.c_ubyte * record.size).from_address(out.data_ptr())))
        return out

    def _fill(self, record: Record, memory: memoryview) -> None:
        crc = 0
        for start in range(0, record.size, _CHUNK):
            part = memory[start : start + _CHUNK]
            if self._left:
                raise CancelledError
            with self._reading:
                self._file.seek(record.offset + start)
                count = self._file.readinto(part)  # type: ignore[attr-defined]
            if count != len(part):
                raise ArtifactError(f"{self.path}: it was cut while it was read. {AGAIN}")
            crc = zlib.crc32(part, crc)
        if crc != record.crc:
            raise ArtifactError(f"{self.path}: {record.name} is damaged. {AGAIN}")


AGAIN = "Copy or export the file again."


@contextmanager
def open_archive(path: Path) -> Iterator[Archive]:
    """Opens a `.pt2`; whatever is done to the path afterwards, the same file is read.

    Raises:
        ArtifactError: not there, or not the layout at the head of this file.
    """
    try:
        # not to wait for the other end of a pipe
        file = open(path, "rb", opener=lambda name, flags: os.open(name, flags | getattr(os, "O_NONBLOCK", 0)))  # noqa: SIM115
    except FileNotFoundError:
        raise ArtifactError(f"{path}: no such file.") from None
    except OSError as problem:
        raise ArtifactError(f"{path}: cannot be opened ({problem.strerror}).") from None
    with file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise ArtifactError(f"{path}: no such file.")
        try:
            records = _records(file, os.fstat(file.fileno()).st_size)
        except (error, UnicodeDecodeError, OSError) as problem:
            raise ArtifactError(f"{path}: truncated or damaged ({problem}). {AGAIN}") from None
        except _Layout as problem:
            raise ArtifactError(f"{path}: truncated or damaged, or edited: {problem}. {AGAIN}") from None
        yield Archive(path, file, records)


class _Layout(Exception):
    """What about the file is not the layout at the head of this file."""


def _records(file: BinaryIO, length: int) -> dict[str, Record]:
    start, size, count = _directory(file, length)
    file.seek(start)
    directory = file.read(size)
    records: dict[str, Record] = {}
    seen: set[str] = set()
    root, at, place = "", 0, 0
    for _ in range(count):
        entry, name, at = _entry(directory, at)
        offset, place = _check_local(file, entry, name, place, start)
        folder, _, rest = name.partition("/")
        if not rest or (root and folder != root):
            raise _Layout(f"{name!r} is not in the archive's one folder")
        root = folder
        if name.casefold() in seen:
            raise _Layout(f"{name!r} is there twice")
        seen.add(name.casefold())
        records[rest] = Record(rest, offset, entry.size, entry.crc)
    if at != size or place != start:
        raise _Layout("it holds bytes that belong to no record")
    return records


def _directory(file: BinaryIO, length: int) -> tuple[int, int, int]:
    """Where the central directory starts, its size, and how many records it lists."""
    if length < _END.size:
        raise _Layout("it ends too early")
    signature, *disks, here, count, size, start, comment = _END.unpack(_at(file, length - _END.size, _END.size))
    end = length - _END.size
    if signature != b"PK\5\6" or any(disks) or here != count or comment:
        raise _Layout("its last bytes are not the end of a zip file")
    if end >= _LOCATOR.size + _END64.size:
        mark, disk, where, total = _LOCATOR.unpack(_at(file, end - _LOCATOR.size, _LOCATOR.size))
        if mark == b"PK\6\7":
            end -= _LOCATOR.size + _END64.size
            signature, rest, *_, disk1, disk2, here64, count64, size64, start64 = _END64.unpack(
                _at(file, end, _END64.size)
            )
            given = ((count, count64, _FULL16), (size, size64, _FULL32), (start, start64, _FULL32))
            if (
                (signature, rest, where, total) != (b"PK\6\6", _END64.size - 12, end, 1)
                or (disk, disk1, disk2, here64) != (0, 0, 0, count64)
                or any(short not in (long, full) for short, long, full in given)
            ):
                raise _Layout("its two ends of the central directory differ")
            count, size, start = count64, size64, start64
    if start + size != end:
        raise _Layout("it has bytes before or after its zip file, or two central directories")
    if count > min(_MOST_RECORDS, size // _ENTRY.size) or size > count * (_ENTRY.size + 2 * _LONGEST_NAME):
        raise _Layout(f"its central directory of {size} bytes does not list {counted(count, 'record')}")
    return start, size, count


@dataclass(frozen=True)
class _Entry:
    flags: int
    crc: int
    size: int
    offset: int


def _entry(directory: bytes, at: int) -> tuple[_Entry, str, int]:
    """An entry of the central directory, its name, and where the next one starts."""
    fields = _ENTRY.unpack_from(directory, at)
    signature, _made, _needs, flags, method, _time, _date, crc, packed, size, n, extra, comment, disk, _, _, offset = (
        fields
    )
    at += _ENTRY.size
    raw, at = directory[at : at + n], at + n
    more = _extra(directory[at : at + extra])
    if signature != b"PK\1\2" or comment or disk or len(raw) != n:
        raise _Layout("its central directory is damaged")
    if flags & ~(_DESCRIPTOR | _UTF8):
        raise _Layout("a record is encrypted, or stored in a way that torch does not use")
    long = iter(more)
    size = next(long, -1) if size == _FULL32 else size
    packed = next(long, -1) if packed == _FULL32 else packed
    offset = next(long, -1) if offset == _FULL32 else offset
    if method or packed != size:
        raise _Layout("a record is compressed, which torch does not do")
    if min(size, offset) < 0 or next(long, None) is not None:
        raise _Layout("a record's zip64 sizes are damaged")
    return _Entry(flags, crc, size, offset), raw.decode(), at + extra


def _extra(data: bytes) -> tuple[int, ...]:
    """The sizes in a zip64 field, if there is one; padding is passed over."""
    at, sizes = 0, None
    while at < len(data):
        kind, length = unpack_from("<2H", data, at)
        at += 4
        if at + length > len(data) or (kind == _ZIP64 and (length % 8 or length > 24 or sizes is not None)):
            raise _Layout("an extra field is damaged")
        if kind == _ZIP64:
            sizes = unpack_from(f"<{length // 8}Q", data, at)
        elif kind != _PADDING:
            raise _Layout(f"an extra field is of the unknown kind {kind:#06x}")
        at += length
    return sizes or ()


def _check_local(file: BinaryIO, entry: _Entry, name: str, place: int, limit: int) -> tuple[int, int]:
    """Where the record's bytes start, and where the next local header does, if this one says what the directory says."""
    if entry.offset != place:
        raise _Layout(f"{name} does not follow the record before it")
    signature, _, flags, method, _, _, crc, packed, size, n, extra = _LOCAL.unpack(_at(file, place, _LOCAL.size))
    tail = _at(file, place + _LOCAL.size, n + extra)
    more = _extra(tail[n:])
    start = place + _LOCAL.size + n + extra
    end = start + entry.size
    if (signature, flags, method, tail[:n]) != (b"PK\3\4", entry.flags, 0, name.encode()) or end > limit:
        raise _Layout(f"{name}: the record's own header differs from the central directory")
    size, packed = more if len(more) == 2 and (size, packed) == (_FULL32, _FULL32) else (size, packed)
    expected = (entry.crc, entry.size, entry.size)
    if any(long not in (entry.size, entry.offset) for long in more):
        raise _Layout(f"{name}: the record's own header differs from the central directory")
    if not flags & _DESCRIPTOR:
        if (crc, size, packed) != expected:
            raise _Layout(f"{name}: the record's own header differs from the central directory")
        return start, end
    if (crc, size, packed) not in ((0, 0, 0), expected, (0, *expected[1:])):
        raise _Layout(f"{name}: the record's own header differs from the central directory")
    form = Struct("<4s3I" if not more and entry.size < _FULL32 else "<4sI2Q")
    if form.unpack(_at(file, end, form.size)) != (b"PK\7\x08", *expected):
        raise _Layout(f"{name}: what follows the record differs from the central directory")
    return start, end + form.size


def _at(file: BinaryIO, offset: int, count: int) -> bytes:
    file.seek(offset)
    return file.read(count)
