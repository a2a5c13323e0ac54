"""The folder of kept graphs: `CTFP8_CACHE_DIR`, or `ctfp8` in the user's cache folder.

A kept graph is pickled, and to unpickle is to run code. So each file begins with an HMAC of all that follows, under a key that
lies in the user's *config* folder, readable by this user alone: a file that anybody else wrote or changed is never unpickled.

    <folder>/<of this key>/<of a model>/<of a graph>.kept
    magic, HMAC-SHA256, length of the facts, facts (JSON: what `ctfp8 cache list` shows), what is kept
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import hmac
import json
import logging
import os
import secrets
import stat
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import UsageError

log = logging.getLogger("ctfp8_compile")

_MAGIC = b"ctfp8kept1\n"
_MAC = 32
_ENDING = ".kept"
#: Bytes that the folder may hold, unless `CTFP8_CACHE_SIZE` says another number of megabytes.
_LIMIT_MB = 1024
#: Graphs of one model: all are read when it starts.
_MOST = 16


@dataclass(frozen=True)
class Entry:
    """A kept graph in the folder.

    Attributes:
        facts: what `write` was told of it.
        size: of the file, bytes.
        used: when it was last read or written, seconds since the epoch.
    """

    path: Path
    facts: dict[str, Any]
    size: int
    used: float


def place() -> Path | None:
    """The folder, which need not be there yet; None where `CTFP8_CACHE_DIR` is empty: then nothing is kept."""
    given = os.environ.get("CTFP8_CACHE_DIR")
    if given is not None:
        return Path(given).expanduser() if given.strip() else None
    return _own_folder("XDG_CACHE_HOME", ".cache", "Library/Caches") / "ctfp8"


def limit() -> int:
    """Bytes that the folder may hold.

    Raises:
        UsageError: CTFP8_CACHE_SIZE is no number.
    """
    given = os.environ.get("CTFP8_CACHE_SIZE", str(_LIMIT_MB))
    try:
        megabytes = float(given)
        if not 0 <= megabytes < float("inf"):
            raise ValueError
    except ValueError:
        raise UsageError(
            f"CTFP8_CACHE_SIZE={given!r} is no size. Give megabytes, such as CTFP8_CACHE_SIZE=500; 0 keeps nothing."
        ) from None
    return int(megabytes * 1e6)


def names(model: str) -> list[str]:
    """The graphs kept for a model, newest first; `model` is what `write` called it."""
    with _unusable("read"):
        found = sorted(_folder(model).glob(f"*{_ENDING}"), key=lambda file: -file.stat().st_mtime)
        return [file.stem for file in found]
    return []


def read(model: str, graph: str) -> bytes | None:
    """What was kept; None if it is gone, torn, or was not written by this user."""
    with _unusable("read"):
        path = _folder(model) / f"{graph}{_ENDING}"
        found = _opened(path, model)
        if found is not None:
            with contextlib.suppress(OSError):  # a folder of an image, which nobody may write
                os.utime(path)
            return found[1]
        log.info("%s: torn, or not written by this user; it is not used", path)
    return None


def write(model: str, graph: str, facts: dict[str, Any], kept: bytes) -> bool:
    """Keeps a graph, and drops those that were not used for longest where the folder would be too large.

    Returns:
        Whether it is kept.
    """
    if limit() < len(kept):
        return False
    with _unusable("written"):
        head = json.dumps(facts).encode()
        body = len(head).to_bytes(8, "little") + head + kept
        folder = _folder(model)
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        _replace(folder / f"{graph}{_ENDING}", _MAGIC + _mac(model, body) + body)
        for old in names(model)[_MOST:]:
            forget(model, old)
        _evict()
        return True
    return False


def forget(model: str, graph: str) -> None:
    """Drops a graph that turned out to be of no use."""
    with contextlib.suppress(OSError):
        (_folder(model) / f"{graph}{_ENDING}").unlink()


def entries() -> list[Entry]:
    """All graphs kept by this user, those used last first."""
    found = []
    for path in _files():
        with contextlib.suppress(OSError):
            opened, about = _opened(path, path.parent.name), path.stat()
            if opened is not None:
                found.append(Entry(path, opened[0], about.st_size, about.st_mtime))
    return sorted(found, key=lambda entry: -entry.used)


def clear() -> tuple[int, int]:
    """Drops everything this user has there, torn files included. Returns how many files, and bytes."""
    count = size = 0
    for path in list(_files()):
        with contextlib.suppress(OSError):
            size += path.stat().st_size
            path.unlink()
            count += 1
    _drop_empty()
    return count, size


def _files() -> Iterator[Path]:
    folder = place()
    if folder is not None and (key := _key(make=False)) is not None:
        yield from (folder / _name_of(key)).glob(f"*/*{_ENDING}")


def _folder(model: str) -> Path:
    folder = place()
    assert folder is not None
    return folder / _name_of(_key()) / model


def _opened(path: Path, model: str) -> tuple[dict[str, Any], bytes] | None:
    """Facts and what is kept, if the file is as this user wrote it for this model."""
    data = path.read_bytes()
    body = data[len(_MAGIC) + _MAC :]
    if not data.startswith(_MAGIC) or len(body) < 8:
        return None
    if not hmac.compare_digest(data[len(_MAGIC) : len(_MAGIC) + _MAC], _mac(model, body)):
        return None
    end = 8 + int.from_bytes(body[:8], "little")
    return json.loads(body[8:end]), body[end:]


def _mac(model: str, body: bytes) -> bytes:
    return hmac.digest(_key(), _MAGIC + model.encode() + b"\0" + body, "sha256")


def _replace(path: Path, data: bytes) -> None:
    """Writes a file beside, then moves it into place: no process ever sees half of one."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=".", suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        os.replace(name, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(name)
        raise


def _evict() -> None:
    """Drops files, those unused for longest first, until the folder is within its limit; and what killed processes left."""
    sizes = {}
    for path in _files():
        with contextlib.suppress(OSError):
            about = path.stat()
            sizes[path] = (about.st_mtime, about.st_size)
    over = sum(size for _, size in sizes.values()) - limit()
    for path, (_, size) in sorted(sizes.items(), key=lambda item: item[1]):
        if over <= 0:
            break
        with contextlib.suppress(OSError):
            path.unlink()
            over -= size
    for left in (_folder("") if _key() else Path()).glob("*/.*.tmp"):
        with contextlib.suppress(OSError):
            if left.stat().st_mtime < time.time() - 3600:
                left.unlink()
    _drop_empty()


def _drop_empty() -> None:
    folder = place()
    if folder is not None and (key := _key(make=False)) is not None:
        for model in (folder / _name_of(key)).glob("*"):
            with contextlib.suppress(OSError):
                model.rmdir()  # refuses where something is in it


@contextlib.contextmanager
def _unusable(what: str) -> Iterator[None]:
    """A folder that cannot be used is one line of log, and nothing is kept."""
    try:
        yield
    except (OSError, ValueError) as why:
        _say_once(f"compiled graphs cannot be {what} in {place()}: {why}")


@functools.cache
def _say_once(line: str) -> None:
    log.warning("%s. CTFP8_CACHE_DIR names another folder; empty, it keeps none.", line)


def key_file() -> Path:
    """Where this user's key lies."""
    return _own_folder("XDG_CONFIG_HOME", ".config", "Library/Application Support") / "ctfp8" / "key"


def _key(make: bool = True) -> bytes:
    """This user's key, made at its first use.

    Raises:
        OSError: it cannot be made, or somebody else can read it.
    """
    path = key_file()
    try:
        return _read_key(path)
    except FileNotFoundError:
        if not make:
            return None  # type: ignore[return-value]
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    handle, name = tempfile.mkstemp(dir=path.parent)  # 0600
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(secrets.token_bytes(32))
        os.link(name, path)  # refuses where another process was first
    except FileExistsError:
        pass
    finally:
        os.unlink(name)
    return _read_key(path)


def _read_key(path: Path) -> bytes:
    with open(path, "rb") as file:
        about = os.fstat(file.fileno())
        if hasattr(os, "getuid") and (about.st_uid != os.getuid() or stat.S_IMODE(about.st_mode) & 0o077):
            raise PermissionError(f"{path} is not this user's alone; delete it, and a new one is made")
        key = file.read()
    if len(key) != 32:
        raise PermissionError(f"{path} is no key; delete it, and a new one is made")
    return key


def _name_of(key: bytes) -> str:
    return hashlib.sha256(b"name" + key).hexdigest()[:12]


def _own_folder(variable: str, usual: str, on_mac: str) -> Path:
    """A folder of this user, by the conventions of the system."""
    if os.environ.get(variable):
        return Path(os.environ[variable])
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData/Local")
    return Path.home() / (on_mac if sys.platform == "darwin" else usual)
