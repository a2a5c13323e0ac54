"""Archives that no honest writer makes: records changed one by one, and zip files that two readers read differently."""

from __future__ import annotations

import io
import json
import struct
import warnings
import zipfile
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

Change = Callable[[bytes], bytes]


class Touch:
    """Unpickling this creates a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> Any:
        return open, (str(self.path), "w")


def pickled(value: Any) -> Change:
    """A record that unpickles to `value`, whatever was there."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return lambda data: buffer.getvalue()


def edited_json(change: Callable[[Any], None]) -> Change:
    def apply(data: bytes) -> bytes:
        content = json.loads(data)
        change(content)
        return json.dumps(content).encode()

    return apply


def edited(file: Path, to: Path, changes: Mapping[str, Change]) -> Path:
    """A copy of an archive with `{record: bytes -> bytes}` applied; a record that is not there is added."""
    with zipfile.ZipFile(file) as old, zipfile.ZipFile(to, "w") as new:
        root = old.namelist()[0].split("/")[0]
        for name in old.namelist():
            data, record = old.read(name), name.partition("/")[2]
            new.writestr(name, changes[record](data) if record in changes else data)
        for record in changes.keys() - {name.partition("/")[2] for name in old.namelist()}:
            new.writestr(f"{root}/{record}", changes[record](b""))
    return to


def stored(records: list[tuple[str, bytes]]) -> bytes:
    """A zip file of these records, one name twice included."""
    buffer = io.BytesIO()
    with warnings.catch_warnings(), zipfile.ZipFile(buffer, "w") as archive:
        warnings.simplefilter("ignore")
        for name, data in records:
            archive.writestr(name, data)
    return buffer.getvalue()


def records_of(file: Path) -> list[tuple[str, bytes]]:
    with zipfile.ZipFile(file) as archive:
        return [(name, archive.read(name)) for name in archive.namelist()]


def _local(name: bytes, data: bytes) -> bytes:
    header = struct.pack("<4s5H3I2H", b"PK\3\4", 20, 0, 0, 0, 0, zlib.crc32(data), len(data), len(data), len(name), 0)
    return header + name + data


def _listed(name: bytes, data: bytes, offset: int) -> bytes:
    size = len(data)
    return struct.pack("<4s6H3I5H2I", b"PK\1\2", 20, 20, 0, 0, 0, 0, zlib.crc32(data), size, size, len(name), 0, 0, 0, 0, 0,
                       offset) + name  # fmt: skip


def two_directories(honest: list[tuple[str, bytes]], other: Mapping[str, bytes]) -> bytes:
    """One zip file, two contents: Python's zipfile reads the honest one, torch the one with `other` in it.

    The last record says where the central directory is, and how large. torch goes where it says. Python takes the directory
    that ends where that record begins, and adds the difference to every offset, as for a program that unpacks itself.
    """
    body, shown, hidden = bytes(100 * len(honest)), [], []  # so that no offset becomes negative
    for name, data in honest:
        shown.append((name.encode(), data, len(body)))
        body += _local(name.encode(), data)
        if name in other:
            hidden.append((name.encode(), other[name], len(body)))
            body += _local(name.encode(), other[name])
        else:
            hidden.append(shown[-1])
    torchs = b"".join(_listed(*entry) for entry in hidden)
    pythons = b"".join(
        _listed(name, data, offset - len(torchs)) for name, data, offset in shown if offset >= len(torchs)
    )
    assert len(pythons) == len(torchs)
    end = struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, len(honest), len(honest), len(torchs), len(body), 0)
    return body + torchs + pythons + end
