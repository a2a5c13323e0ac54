"""The cache of the compiled CPU kernels: killed, failed and concurrent builds, a damaged library, a folder that is not ours."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ctfp8_compile.ops import cpu as cpu_kernels
from ctfp8_compile.ops.cpu import build, processor

# In a process of its own, whose compiler takes no time: it installs the library that was compiled for this process.
SCRIPT = """
import os, shutil, sys, time
from pathlib import Path
from ctfp8_compile.ops.cpu import build, processor
from torch.utils import cpp_extension

def compiled(name, sources, build_directory, **kwargs):
    if os.environ.get("FAILS"):
        (Path(build_directory) / "half.o").write_text("half")
        raise RuntimeError("a sentence of the compiler")
    print("compiled", flush=True)
    time.sleep(float(os.environ.get("TAKES", 0)))
    shutil.copy(os.environ["LIBRARY"], Path(build_directory) / f"{name}.so")

cpp_extension.load = compiled
try:
    build.load()
    print("loaded", build.isa())
except build.KernelBuildError as error:
    print("error", error)
"""


@pytest.fixture(scope="module")
def real() -> Path:
    cpu_kernels.load()
    name = f"ctfp8_cpu_{build._digest()}"
    return build._folder_for(name) / f"{name}.so"


def start(real: Path, root: Path, **env: str) -> subprocess.Popen[str]:
    env = {**os.environ, "LIBRARY": str(real), "TORCH_EXTENSIONS_DIR": str(root), **env}
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def run(real: Path, root: Path, **env: str) -> tuple[str, str]:
    return start(real, root, **env).communicate(timeout=120)


def test_to_load_it_runs_no_code_that_is_for_one_instruction_set(real: Path) -> None:
    """A table that is filled at loading was so by AVX-512, and ended the process on every processor without it."""
    symbols = subprocess.run(["nm", str(real)], check=True, capture_output=True, text=True).stdout
    assert "_GLOBAL__sub_I_operators.cpp" in symbols  # the operators' registration: what is looked for is seen
    assert "_GLOBAL__sub_I_isa_" not in symbols


def test_a_library_is_kept_and_a_damaged_one_compiled_again(real: Path, tmp_path: Path) -> None:
    assert "compiled" in run(real, tmp_path)[0]
    assert "compiled" not in run(real, tmp_path)[0]
    (library,) = tmp_path.glob("*/*.so")
    with library.open("r+b") as file:
        file.truncate(library.stat().st_size // 2)  # to map this would end the process
    out, _ = run(real, tmp_path)
    assert "compiled" in out
    assert "loaded" in out
    assert hashlib.sha256(library.read_bytes()).digest() == hashlib.sha256(real.read_bytes()).digest()


def test_a_killed_build_holds_nobody_up(real: Path, tmp_path: Path) -> None:
    killed = start(real, tmp_path, TAKES="100")
    assert killed.stdout is not None
    assert killed.stdout.readline() == "compiled\n"
    killed.kill()
    killed.communicate()
    (left,) = tmp_path.glob("*/build-*")
    (left / "lock").touch()  # torch's
    (left.parent / "build-1").mkdir()
    assert "loaded" in run(real, tmp_path)[0]
    assert not list(tmp_path.glob("*/build-*"))


@pytest.mark.long
def test_who_waits_says_so_and_compiles_nothing(real: Path, tmp_path: Path) -> None:
    first = start(real, tmp_path, TAKES="15")
    assert first.stdout is not None
    assert first.stdout.readline() == "compiled\n"
    begin = time.monotonic()
    out, err = run(real, tmp_path)
    assert "compiled" not in out
    assert "loaded" in out
    if time.monotonic() - begin < 100:
        assert "waiting for another process" in err
    assert "loaded" in first.communicate(timeout=60)[0]


def test_a_failed_build_leaves_no_folder(real: Path, tmp_path: Path) -> None:
    assert "a sentence of the compiler" in run(real, tmp_path, FAILS="1")[0]
    assert not list(tmp_path.glob("*/build-*"))


def test_a_folder_that_cannot_be_made_gives_way_to_a_private_one(real: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "tmp").mkdir()
    out, err = run(real, tmp_path / "file", TMPDIR=str(tmp_path / "tmp"))
    assert "loaded" in out
    assert "TORCH_EXTENSIONS_DIR" in err
    (library,) = (tmp_path / "tmp").glob("ctfp8-*/*/*.so")
    assert not library.parents[1].stat().st_mode & 0o077
    assert "compiled" not in run(real, tmp_path / "file", TMPDIR=str(tmp_path / "tmp"))[0]
    library.parents[1].chmod(0o777)  # others can write there now
    assert "compiled" in run(real, tmp_path / "file", TMPDIR=str(tmp_path / "tmp"))[0]


def test_openmp_of_apples_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert build._openmp() == ["-fopenmp"]
    monkeypatch.setattr(build.sys, "platform", "darwin")
    monkeypatch.setattr(build, "_HOMEBREW", (str(tmp_path),))
    monkeypatch.setenv("OMP_PREFIX", str(tmp_path / "none"))
    assert build._openmp() == []
    (tmp_path / "include").mkdir()
    (tmp_path / "include" / "omp.h").touch()
    assert build._openmp() == ["-Xclang", "-fopenmp", f"-I{tmp_path}/include"]


@pytest.mark.parametrize(
    ("flags", "wanted"),
    [
        ("sse4_2 avx", ()),
        ("avx2 fma f16c", ("avx2",)),
        ("avx2 fma f16c avx512f avx512bw", ("avx2",)),
        ("avx2 fma f16c avx512f avx512bw avx512vl avx512dq", ("avx512", "avx2")),
        ("avx2 fma f16c avx512f avx512bw avx512vl avx512dq avx512_bf16", ("avx512", "avx2")),
        (
            "avx2 fma f16c avx512f avx512bw avx512vl avx512dq avx512vbmi avx512_bf16 amx_bf16",
            ("avx512_bf16", "avx512", "avx2"),
        ),
        (None, ()),
    ],
)
def test_what_this_processor_runs_is_compiled(monkeypatch, tmp_path, flags, wanted):
    def cpuinfo(path: Path) -> str:
        if flags is None:
            raise FileNotFoundError(path)
        return f"processor\t: 0\nflags\t\t: {flags}\n"

    monkeypatch.delenv("CTFP8_CPU_ISAS")
    monkeypatch.setattr(processor.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(processor.Path, "read_text", cpuinfo)
    assert processor.needed() == wanted
    for name, value in (("CTFP8_CPU_ISA", "avx2"), ("CTFP8_CPU_ISAS", "all")):
        with monkeypatch.context() as patch:
            patch.setenv(name, value)
            assert processor.needed() == ()
    monkeypatch.setattr(processor.platform, "machine", lambda: "aarch64")
    assert processor.needed() == ()


@pytest.mark.long
def test_the_library_for_this_processor_is_the_whole_ones_part_of_it(tmp_path):
    script = (
        "import torch, ctfp8_compile.ops.cpu as cpu; cpu.load()\n"
        "w, s = torch.arange(64 * 64).remainder(120).to(torch.uint8).view(64, 64).view(torch.float8_e4m3fn), torch.ones(64, 1)\n"
        "x = torch.linspace(-1, 1, 3 * 64).view(3, 64)\n"
        "for dtype in (torch.bfloat16, torch.float32):\n"
        "    y = torch.ops.ctfp8.dequantized_linear(x.to(dtype), w, s, None, [1, 64])\n"
        "    print(cpu.isa(), y.double().sum().item())\n"
    )
    said = []
    for env in ({"CTFP8_CPU_ISAS": "", "TORCH_EXTENSIONS_DIR": str(tmp_path)}, {}):
        done = subprocess.run([sys.executable, "-c", script], env={**os.environ, **env}, capture_output=True, text=True)
        assert not done.returncode, done.stderr
        said.append(done.stdout)
    assert said[0] == said[1]
    assert len(said[0].splitlines()) == 2
