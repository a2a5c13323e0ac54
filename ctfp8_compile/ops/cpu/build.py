"""Compiles the C++ CPU kernels on first use and registers them for the `ctfp8::` operators.

The library is cached in torch's extension folder under a name that holds the hash of the sources and torch's version, so
a new version of either is compiled again and an old one is never loaded. It holds the instruction sets that this processor
runs (`processor`); where the environment variable `CTFP8_CPU_ISA` asks for one, all of them, and serves every CPU.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import shutil
import stat
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

# The operators' schemas must exist before their CPU implementations, and outlive them.
from ... import ops as ops
from ...errors import Ctfp8Error
from .processor import needed

_FOLDER = Path(__file__).parent / "csrc"
_SOURCES = sorted(_FOLDER.glob("*.cpp"))
_HEADERS = sorted(_FOLDER.glob("*.h"))


def _openmp() -> list[str]:
    """What makes at::parallel_for parallel; without it the kernels have one thread.

    Only compiled, never linked, with it: the symbols come from the OpenMP library that torch has loaded, so that there is one
    pool of threads. Apple's compiler lacks the header, which conda and Homebrew have.
    """
    if sys.platform != "darwin":
        return ["-fopenmp"]
    for folder in (os.environ.get("OMP_PREFIX", sys.prefix), sys.prefix, *_HOMEBREW):
        include = Path(folder) / "include"
        if (include / "omp.h").is_file():
            return ["-Xclang", "-fopenmp", f"-I{include}"]
    return []


_HOMEBREW = ("/opt/homebrew/opt/libomp", "/usr/local/opt/libomp")
_FLAGS = ["-O3", "-std=c++20", "-Wno-psabi", *_openmp()]

#: What to do without a C++ compiler.
INSTALL = (
    "Install one (apt install g++, dnf install gcc-c++, apk add g++, conda install gxx, xcode-select --install), or name it in "
    "the environment variable CXX."
)
_loaded = False


class KernelBuildError(Ctfp8Error, RuntimeError):
    """The C++ kernels could not be compiled or loaded; operators keep their reference implementation."""


def loaded() -> bool:
    """Whether the C++ kernels serve the `ctfp8::` operators of this process."""
    return _loaded


def isa() -> str:
    """The instruction set the kernels use: "avx512-bf16" ("+amx" where tiles are used), "avx512", "avx2", "neon-bf16", "neon" or
    "portable"."""
    if not _loaded:
        raise RuntimeError("the CPU kernels are not loaded: call load() first")
    return str(torch.ops.ctfp8_cpu.isa())


def load(build: bool = True) -> None:
    """Registers the kernels, compiling them first if no compiled copy exists. Later calls do nothing.

    Args:
        build: whether to compile; without it, a missing copy leaves the reference implementations in place.

    Raises:
        KernelBuildError: there is no C++ compiler, or it failed.
    """
    global _loaded
    if _loaded:
        return
    isas = needed()
    name = "_".join(["ctfp8_cpu", _digest(), *isas])
    try:
        library = _folder_for(name) / f"{name}.so"
        if not _intact(library):
            if not build:
                return
            with _lock(library.parent):
                if not _intact(library):
                    _compile(name, library, isas)
        torch.ops.load_library(str(library))
        torch.ops.ctfp8_cpu.isa()  # now, not at the first call, should CTFP8_CPU_ISA be wrong
    except KernelBuildError:
        raise
    except Exception as error:
        raise KernelBuildError(f"cannot load the CPU kernels: {_last_lines(error)}") from error
    _loaded = True


def _digest() -> str:
    digest = hashlib.sha256(f"{torch.__version__} {sys.platform} {_FLAGS} {os.environ.get('CXX', '')}".encode())
    for path in [*_SOURCES, *_HEADERS]:
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def _folder_for(name: str) -> Path:
    """The folder the library is cached in: torch's for extensions, or, where that cannot be written, one for this user."""
    folder = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or _cpp_extension().get_default_build_root()) / name
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK) or _intact(folder / f"{name}.so"):
            return folder
        reason = "it is not writable"
    except OSError as error:
        reason = str(error.strerror)
    private = _private_folder() / name
    private.mkdir(exist_ok=True)
    warnings.warn(
        f"{folder}: {reason}, so the CPU kernels are compiled in {private}. "
        "Name a folder that lasts in the environment variable TORCH_EXTENSIONS_DIR.",
        stacklevel=2,
    )
    return private


def _private_folder() -> Path:
    """A temporary folder that nobody else can write to, the same for all processes of this user if that can be had."""
    shared = Path(tempfile.gettempdir()) / f"ctfp8-{getattr(os, 'getuid', os.getpid)()}"
    with contextlib.suppress(OSError):
        shared.mkdir(mode=0o700, exist_ok=True)
        found = shared.lstat()
        own = found.st_uid == getattr(os, "getuid", lambda: found.st_uid)()
        if own and stat.S_ISDIR(found.st_mode) and not found.st_mode & 0o077 and os.access(shared, os.W_OK):
            return shared
    return Path(tempfile.mkdtemp(prefix="ctfp8-"))


def _record(library: Path) -> Path:
    return library.with_suffix(".sha256")


def _intact(library: Path) -> bool:
    """Whether the library is there as it was compiled: to map a truncated one would end the process."""
    try:
        return _record(library).read_text() == hashlib.sha256(library.read_bytes()).hexdigest()
    except (OSError, UnicodeDecodeError):
        return False


@contextlib.contextmanager
def _lock(folder: Path) -> Iterator[None]:
    """One process compiles at a time; the system releases the lock of a process that dies."""
    try:
        import fcntl
    except ImportError:  # Windows: two processes may both compile; each moves a whole library into place
        yield
        return
    with open(folder / "ctfp8.lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(
                f"ctfp8: waiting for another process that compiles the CPU kernels in {folder} ...",
                file=sys.stderr,
                flush=True,
            )
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _compile(name: str, library: Path, isas: tuple[str, ...]) -> None:
    """Compiles in a folder of its own, then moves the library into place: no process ever sees half of it."""
    cpp_extension = _cpp_extension()
    compiler = cpp_extension.get_cxx_compiler()
    if shutil.which(compiler) is None:
        raise KernelBuildError(f"no C++ compiler: cannot find '{compiler}'. {INSTALL}")
    for left in library.parent.glob("build-*"):  # by a process that was killed: we hold the lock
        shutil.rmtree(left, ignore_errors=True)
    print("ctfp8: compiling the CPU kernels, once, about 30 s ...", file=sys.stderr, flush=True)
    begin = time.monotonic()
    path = os.environ.get("PATH", "")
    # a new one each time: torch waits, for ever, for a lock file that a killed process left in a build folder
    work = Path(tempfile.mkdtemp(prefix="build-", dir=library.parent))
    try:
        # ninja is installed beside python; a virtual environment that was not activated is not on PATH.
        os.environ["PATH"] = os.pathsep.join([str(Path(sys.prefix) / "bin"), path])
        cpp_extension.load(
            name,
            [str(_operators(work, isas)), *(str(source) for source in _SOURCES if _isa(source) in (isas or _ISAS))],
            extra_cflags=_FLAGS,
            extra_include_paths=[str(_FOLDER)],
            build_directory=str(work),
            is_python_module=False,
        )
        _install(work / f"{name}.so", library)
    except Exception as error:
        raise KernelBuildError(f"cannot compile the CPU kernels with {compiler}: {_last_lines(error)}") from error
    finally:
        os.environ["PATH"] = path
        shutil.rmtree(work, ignore_errors=True)
    print(f"ctfp8: done in {time.monotonic() - begin:.0f} s", file=sys.stderr, flush=True)


def _operators(folder: Path, isas: tuple[str, ...]) -> Path:
    """One file of all that includes torch, whose headers take longer than the rest of it; an instruction set left out is none."""
    lines = [f'#include "{source.name}"' for source in _SOURCES if not _isa(source)]
    left_out = [isa for isa in _ISAS if isas and isa not in isas]
    if left_out:  # as on a processor of another kind
        lines += ["#undef __x86_64__", "#undef __aarch64__", "#undef __linux__"]
        lines += [f'#include "isa_{isa}.cpp"' for isa in left_out if isa != "portable"]
        lines += ["const ctfp8::Kernels* ctfp8::portable() { return nullptr; }"]
    file = folder / "operators.cpp"
    file.write_text("\n".join([*lines, ""]))
    return file


def _isa(source: Path) -> str:
    """`isa_avx2.cpp` as `avx2`; nothing of another file."""
    return source.stem.removeprefix("isa_") if source.name.startswith("isa_") else ""


_ISAS = tuple(filter(None, map(_isa, _SOURCES)))


def _cpp_extension() -> Any:
    """torch's builder of extensions. It imports setuptools, and warns where there is a CUDA toolkit and no GPU."""
    logger = logging.getLogger("torch.utils.cpp_extension")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        from torch.utils import cpp_extension
    finally:
        logger.setLevel(level)
    return cpp_extension


def _install(built: Path, library: Path) -> None:
    """Moves a library into place, then says that it is whole."""
    record = built.with_suffix(".sha256")
    record.write_text(hashlib.sha256(built.read_bytes()).hexdigest())
    os.replace(built, library)
    os.replace(record, _record(library))


def _last_lines(error: Exception, count: int = 12) -> str:
    lines = [line for line in str(error).strip().splitlines() if " -MMD " not in line]  # not ninja's echo of commands
    return "\n".join(lines[-count:])
