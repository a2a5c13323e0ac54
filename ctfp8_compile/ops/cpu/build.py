"""Compiles the C++ CPU kernels on first use and registers them for the `ctfp8::` operators.

The library is cached in torch's extension folder under a name that holds the hash of the sources and torch's version, so
a new version of either is compiled again and an old one is never loaded. One binary serves every CPU: the instruction set
is chosen when it is loaded (`isa`), or by the environment variable `CTFP8_CPU_ISA`.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch

# The operators' schemas must exist before their CPU implementations, and outlive them.
from ... import ops as ops
from ...errors import Ctfp8Error

_FOLDER = Path(__file__).parent / "csrc"
_SOURCES = sorted(_FOLDER.glob("*.cpp"))
_HEADERS = sorted(_FOLDER.glob("*.h"))
# -fopenmp makes at::parallel_for parallel. Only compiled, never linked, with it: the symbols come from the OpenMP library
# that torch has loaded, so that there is one pool of threads.
_FLAGS = ["-O3", "-std=c++20", "-Wno-psabi", "-fopenmp"]

_loaded = False


class KernelBuildError(Ctfp8Error, RuntimeError):
    """The C++ kernels could not be compiled or loaded; operators keep their reference implementation."""


def loaded() -> bool:
    """Whether the C++ kernels serve the `ctfp8::` operators of this process."""
    return _loaded


def isa() -> str:
    """The instruction set the kernels use: "avx512-bf16", "avx512", "avx2" or "portable", "+amx" where tiles are used."""
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
    name = f"ctfp8_cpu_{_digest()}"
    try:
        folder = _build_folder(name)
        library = folder / f"{name}.so"
        if not library.exists():
            if not build:
                return
            with _lock(folder):
                if not library.exists():
                    _compile(name, folder)
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


def _build_folder(name: str) -> Path:
    from torch.utils import cpp_extension  # imports setuptools: only where it is needed

    root = os.environ.get("TORCH_EXTENSIONS_DIR") or cpp_extension.get_default_build_root()
    folder = Path(root) / name
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@contextlib.contextmanager
def _lock(folder: Path) -> Iterator[None]:
    """One process compiles at a time; the system releases the lock of a process that dies."""
    try:
        import fcntl
    except ImportError:  # Windows: torch's own lock file in the build folder remains
        yield
        return
    with open(folder / "ctfp8.lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _compile(name: str, folder: Path) -> None:
    """Compiles in a folder of this process, then moves the library into place: no process ever sees half of it."""
    from torch.utils import cpp_extension

    compiler = cpp_extension.get_cxx_compiler()
    if shutil.which(compiler) is None:
        raise KernelBuildError(f"no C++ compiler: cannot find '{compiler}'; install one, or name it in CXX")
    print("ctfp8: compiling the CPU kernels, once, about 30 s ...", file=sys.stderr, flush=True)
    begin = time.monotonic()
    path = os.environ.get("PATH", "")
    try:
        # ninja is installed beside python; a virtual environment that was not activated is not on PATH.
        os.environ["PATH"] = os.pathsep.join([str(Path(sys.prefix) / "bin"), path])
        work = folder / f"build-{os.getpid()}"
        work.mkdir(exist_ok=True)
        cpp_extension.load(
            name,
            [str(source) for source in _SOURCES],
            extra_cflags=_FLAGS,
            build_directory=str(work),
            is_python_module=False,
        )
        os.replace(work / f"{name}.so", folder / f"{name}.so")
        shutil.rmtree(work)
    except Exception as error:
        raise KernelBuildError(f"cannot compile the CPU kernels with {compiler}: {_last_lines(error)}") from error
    finally:
        os.environ["PATH"] = path
    print(f"ctfp8: done in {time.monotonic() - begin:.0f} s", file=sys.stderr, flush=True)


def _last_lines(error: Exception, count: int = 12) -> str:
    lines = [line for line in str(error).strip().splitlines() if " -MMD " not in line]  # not ninja's echo of commands
    return "\n".join(lines[-count:])
