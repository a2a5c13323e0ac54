"""The CPU kernels of processors that are not here, run by an emulator against double arithmetic (`make test-arm`)."""

from __future__ import annotations

import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch.utils.cpp_extension import include_paths

from ctfp8_compile.ops import cpu as cpu_kernels

SOURCES = Path(cpu_kernels.__file__).parent / "csrc"
#: By processor: its compiler, its emulator, and what the emulator is to be and the kernels are then to find.
PROCESSORS = {
    "ARM64": ("aarch64-linux-gnu-g++", "qemu-aarch64", {
        "max": ["neon-bf16", "neon", "portable"],
        "cortex-a72": ["neon", "portable"],  # no bfloat16
    }),
    "x86-64": ("g++", "qemu-x86_64", {
        "Nehalem": ["portable"],  # no AVX; of AVX2, qemu 7.2 reads what a masked load masks, beyond the end of memory
    }),
}  # fmt: skip

pytestmark = pytest.mark.long


def needing(processor: str) -> pytest.MarkDecorator:
    compiler, emulator, _ = PROCESSORS[processor]
    return pytest.mark.skipif(
        not (shutil.which(compiler) and shutil.which(emulator)),
        reason=f"needs {compiler} and {emulator}: apt-get install g++-aarch64-linux-gnu qemu-user",
    )


def compiled(compiler: str, source: Path, folder: Path, *flags: str) -> Path:
    to = folder / f"{source.stem}.o"
    command = [compiler, "-std=c++20", "-Wno-psabi", f"-I{SOURCES}", *flags, "-c", str(source), "-o", str(to)]
    subprocess.run(command, check=True)
    return to


@pytest.mark.parametrize("processor", [pytest.param(name, marks=needing(name)) for name in PROCESSORS])
def test_kernels(processor: str, tmp_path: Path) -> None:
    """The harness of tests/asan, without torch, as one file: an emulator of programs has no libraries of that processor.

    A kernel must not be given an instruction that its processor lacks, nor may loading the others run one.
    """
    compiler, emulator, models = PROCESSORS[processor]
    files = [Path(__file__).parents[1] / "asan" / "kernels.cpp", *sorted(SOURCES.glob("isa_*.cpp"))]
    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(lambda file: compiled(compiler, file, tmp_path, "-O3"), files))
    program = tmp_path / "kernels"
    subprocess.run([compiler, "-static", *map(str, objects), "-o", str(program)], check=True)
    for model, isas in models.items():
        done = subprocess.run([emulator, "-cpu", model, program], capture_output=True, text=True)
        assert done.returncode == 0, model + done.stdout + done.stderr
        *found, cases = done.stdout.splitlines()
        assert found == isas
        assert int(cases.split()[0]) >= 4500 * len(isas)


@needing("ARM64")
@pytest.mark.parametrize("file", ["ops.cpp", "selection.cpp"])
def test_operators_compile(file: str, tmp_path: Path) -> None:
    """They need torch for ARM64 to run; its headers are the same."""
    flags = [f"-I{path}" for path in include_paths() if Path(path).is_relative_to(Path(torch.__file__).parent)]
    compiled(PROCESSORS["ARM64"][0], SOURCES / file, tmp_path, "-O0", "-fopenmp", *flags)
