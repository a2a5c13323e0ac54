"""The CPU kernels of ARM64: cross-compiled, then run by an emulator against double arithmetic (`make test-arm`)."""

from __future__ import annotations

import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch.utils.cpp_extension import include_paths

from ctfp8_compile.ops import cpu as cpu_kernels

COMPILER, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"
SOURCES = Path(cpu_kernels.__file__).parent / "csrc"

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(
        not (shutil.which(COMPILER) and shutil.which(EMULATOR)),
        reason=f"needs {COMPILER} and {EMULATOR}: apt-get install g++-aarch64-linux-gnu qemu-user",
    ),
]


def compiled(source: Path, folder: Path, *flags: str) -> Path:
    to = folder / f"{source.stem}.o"
    command = [COMPILER, "-std=c++20", "-Wno-psabi", f"-I{SOURCES}", *flags, "-c", str(source), "-o", str(to)]
    subprocess.run(command, check=True)
    return to


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The harness of tests/asan, without torch, as one file: an emulator of programs has no libraries of that processor."""
    folder = tmp_path_factory.mktemp("arm")
    files = [Path(__file__).parents[1] / "asan" / "kernels.cpp", *sorted(SOURCES.glob("isa_*.cpp"))]
    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(lambda file: compiled(file, folder, "-O3"), files))
    subprocess.run([COMPILER, "-static", *map(str, objects), "-o", str(folder / "kernels")], check=True)
    return folder / "kernels"


@pytest.mark.parametrize(
    ("processor", "isas"), [("max", ["neon-bf16", "neon", "portable"]), ("cortex-a72", ["neon", "portable"])]
)
def test_kernels(program: Path, processor: str, isas: list[str]) -> None:
    """`cortex-a72` has no bfloat16: it must not be given such instructions."""
    done = subprocess.run([EMULATOR, "-cpu", processor, program], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    *found, cases = done.stdout.splitlines()
    assert found == isas
    assert int(cases.split()[0]) >= 4500 * len(isas)


def test_operators_compile(tmp_path: Path) -> None:
    """They need torch for ARM64 to run; its headers are the same."""
    flags = [f"-I{path}" for path in include_paths() if Path(path).is_relative_to(Path(torch.__file__).parent)]
    compiled(SOURCES / "ops.cpp", tmp_path, "-O0", "-fopenmp", *flags)
