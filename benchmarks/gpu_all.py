"""Everything there is to run on a GPU, in one call of at most ten minutes: linears, `tests/gpu`, tiles, experts, a model.

    python benchmarks/gpu_all.py --pack gpu.tar.xz [--torch 2.11] [--python 3.12]       where packages can be had
    python benchmarks/gpu_all.py --out gpu [--packages gpu.tar.xz] [--minutes 9.5]      where the GPU is
    python benchmarks/gpu_all.py --out gpu --device cpu                                 a dry run of it all, on small shapes

First the tests, beside them all that is to be timed, for its compilations only; then, with all in the compilers' caches, one part
after the other. Into the folder `--out` goes a file for each, and what was measured until the time was up is in it; no part takes
the time of those behind it.

For a machine without network, `--pack` puts what it lacks into one file, for its releases of Python and torch: the kernel library
that goes with that torch, transformers, compressed-tensors and what these need. It is unpacked into a temporary folder.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
from pathlib import Path
from typing import IO, NamedTuple

from gpu_timing import parser

HERE = Path(__file__).parent
ROOT = HERE.parent
LLAMA = str(ROOT / "examples/models/llama")
ROWS = ("1", "16", "256", "4096")


class Part(NamedTuple):
    """Something to run.

    Attributes:
        command: what is timed: a script of this folder, or a module with `-m`, and its arguments.
        share: of the time for what is timed, at most.
        first: what to run before, beside all others: its compilations are then in caches.
    """

    name: str
    command: tuple[str, ...]
    share: float
    first: tuple[tuple[str, ...], ...]

    @staticmethod
    def of(name: str, share: float, *command: str, first: tuple[tuple[str, ...], ...] | None = None) -> Part:
        return Part(name, command, share, (command,) if first is None else first)


#: Linears first.
PARTS = (
    Part.of("linear", 0.35, "gpu_linear.py", "--shapes", "8B", "--rows", *ROWS,
            first=tuple(("gpu_linear.py", "--shapes", "8B", "--rows", m) for m in ROWS)),
    Part.of("tiles", 0.2, "gpu_tiles.py", first=(("gpu_tiles.py", "--build"),)),
    Part.of("experts", 0.15, "gpu_moe.py"),
    Part.of("model", 0.2, "gpu_models.py",
            first=tuple(("gpu_models.py", "--ways", way) for way in ("bf16", "ctfp8", "ctfp8, apart"))),
    Part.of("command-line", 0.1, "-m", "ctfp8_compile", "bench", LLAMA, "--inductor"),
)  # fmt: skip
WORKERS = str(min(8, os.cpu_count() or 8))
TESTS = ("-m", "pytest", "-p", "no:cacheprovider", "-n", WORKERS, "--durations", "10", str(ROOT / "tests/gpu"))
#: What a machine with torch may lack, or have in an older release; of these, `constraints.txt` says which.
PACKAGES = (
    "transformers", "compressed-tensors", "regex", "tokenizers", "safetensors", "expecttest", "hypothesis", "torchao",
)  # fmt: skip
WITH_NEEDS = ("pydantic", "loguru")
#: What a checkout with its packages may weigh, to travel: 64 MiB, and some air.
MOST_BYTES = 60 << 20


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--out", type=Path, default=Path("gpu"))
    options.add_argument("--packages", type=Path, help="what --pack wrote")
    options.add_argument("--minutes", type=float, default=9.5)
    names = [part.name for part in PARTS]
    options.add_argument(
        "--parts", nargs="+", choices=names, default=names, help="what is compiled, and whether it runs"
    )
    options.add_argument("--time", nargs="*", choices=names, help="those of them that are timed; default: all")
    options.add_argument("--first", type=float, default=0.5, help="the share of the time for compilations and tests")
    options.add_argument("--no-tests", action="store_true", help="leave tests/gpu out")
    options.add_argument("--pack", type=Path, help="write the packages, and run nothing")
    options.add_argument("--torch", default="2.11", help="of the machine with the GPU")
    options.add_argument("--python", default="3.12", help="of the machine with the GPU")
    args = options.parse_args()
    if args.pack is not None:
        pack(args.pack, args.torch, args.python)
        return
    end = time.monotonic() + args.minutes * 60
    args.out.mkdir(parents=True, exist_ok=True)
    parts = [part for part in PARTS if part.name in args.parts]
    with tempfile.TemporaryDirectory() as folder:
        if args.packages is not None:
            with tarfile.open(args.packages) as archive:
                archive.extractall(folder, filter="data")
        _register(Path(folder))
        path = [folder, str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(path),
            "CTFP8_TEST_DEVICE": args.device,
            "TORCHINDUCTOR_CACHE_DIR": str(Path(folder) / "inductor"),
            "TRITON_CACHE_DIR": str(Path(folder) / "triton"),
            "TORCH_EXTENSIONS_DIR": os.environ.get("TORCH_EXTENSIONS_DIR", str(Path(folder) / "extensions")),
        }
        first = [(f"first-{part.name}-{i}", arguments) for part in parts for i, arguments in enumerate(part.first)]
        if not args.no_tests:
            first.insert(0, ("tests", TESTS))
        _together(first, args.device, time.monotonic() + args.minutes * 60 * args.first, environment, args.out)
        timed = [part for part in parts if args.time is None or part.name in args.time]
        left = sum(part.share for part in timed)
        for part in timed:
            limit = (end - time.monotonic()) * part.share / left
            left -= part.share
            _run(part, args.device, limit, environment, args.out / f"{part.name}.md")
    for name in ([] if args.no_tests else ["tests"]) + [part.name for part in timed]:
        print(f"\n## {name}\n\n{(args.out / f'{name}.md').read_text()[-6000:]}")


def _command(arguments: tuple[str, ...], device: str) -> list[str]:
    if arguments[0] == "-m":
        return [sys.executable, *arguments, *(["--device", device] if "pytest" not in arguments else [])]
    return [sys.executable, str(HERE / arguments[0]), *arguments[1:], "--device", device]


def _together(
    commands: list[tuple[str, tuple[str, ...]]], device: str, end: float, environment: dict[str, str], out: Path
) -> None:
    """All at once; each compiles in its own process, so that they do not start more than there are processors."""
    environment = {**environment, "TORCHINDUCTOR_COMPILE_THREADS": "1"}
    begin, running = time.monotonic(), []
    print(f"{', '.join(name for name, _ in commands)} …", flush=True)
    for name, arguments in commands:
        file = (out / f"{name}.md").open("w")
        process = subprocess.Popen(
            _command(arguments, device), stdout=file, stderr=subprocess.STDOUT, env=environment, cwd=ROOT,
            start_new_session=True,
        )  # fmt: skip
        running.append((process, file))
    for process, file in running:
        try:
            process.wait(max(1, end - time.monotonic()))
            print(f"\nended with {process.returncode} after {time.monotonic() - begin:.0f} s", file=file)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGINT)  # pytest then says what has failed so far
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(10)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            print("\nstopped: its time was up", file=file)
        file.close()


def _run(part: Part, device: str, limit: float, environment: dict[str, str], path: Path) -> None:
    command = _command(part.command, device)
    if part.name in ("linear", "tiles"):
        command += ["--minutes", f"{limit / 60 * 0.85:.2f}"]  # ends by itself, with what it has
    if part.name == "tiles":
        command += ["--json", str(path.with_suffix(".json"))]
    begin = time.monotonic()
    print(f"{part.name} …", flush=True)
    with path.open("w") as out:
        what = _wait(command, out, limit, environment)
        print(f"{what}\n\n{time.monotonic() - begin:.0f} s", file=out)


def _wait(command: list[str], out: IO[str], limit: float, environment: dict[str, str]) -> str:
    """Runs it; what there is to say of its end."""
    try:
        done = subprocess.run(
            command, stdout=out, stderr=subprocess.PIPE, text=True, env=environment, cwd=ROOT, timeout=max(1, limit)
        )
    except subprocess.TimeoutExpired:
        return "\nstopped: its time was up"
    return "" if done.returncode == 0 else f"\nended with {done.returncode}:\n\n```\n{done.stderr[-3000:]}\n```"


def _register(folder: Path) -> None:
    """Tells Python of this checkout's backend, as an installation would: `torch.compile` finds it by its entry point."""
    project = (ROOT / "pyproject.toml").read_text()
    version = re.search(r'^__version__ = "(.+)"', (ROOT / "ctfp8_compile/__init__.py").read_text(), re.M)[1]
    points = project.partition("[project.entry-points.torch_dynamo_backends]\n")[2].splitlines()[0]
    info = folder / f"ctfp8_compile-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: ctfp8-compile\nVersion: {version}\n")
    (info / "entry_points.txt").write_text(f"[torch_dynamo_backends]\n{points.replace(chr(34), '')}\n")


def pack(path: Path, torch: str, python: str) -> None:
    """Writes the packages, one tar: compressed as one they take a third of what their wheels take.

    Raises:
        SystemExit: with the checkout they weigh more than may travel.
    """
    sys.path.insert(0, str(ROOT))
    from ctfp8_compile.target import KERNEL_LIBRARIES

    pinned = dict(re.findall(r"^([\w-]+)==(\S+)", (ROOT / "constraints.txt").read_text(), re.M))
    kernels = [f"{d}=={release}.*" for d, release, of in KERNEL_LIBRARIES["fbgemm"].built_for if of == torch]
    alone = [*kernels, *(f"{name}=={pinned[name]}" if name in pinned else name for name in PACKAGES)]
    with tempfile.TemporaryDirectory() as folder:
        for needs, names in ((["--no-deps"], alone), ([], WITH_NEEDS)):
            subprocess.run([*_download(python), *needs, "--dest", folder, *names], check=True)
        site = Path(folder) / "site"
        for wheel in sorted(Path(folder).glob("*.whl")):
            zipfile.ZipFile(wheel).extractall(site)
            print(f"{wheel.name}  {wheel.stat().st_size / 2**20:.1f} MiB")
        with tarfile.open(path, "w:xz", preset=1) as archive:  # quick, and small enough
            archive.add(site, ".")
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    checkout = sum((ROOT / name).lstat().st_size for name in tracked.split("\0") if name)
    total = checkout + path.stat().st_size
    print(f"checkout {checkout / 2**20:.1f} MiB, with packages {total / 2**20:.1f} MiB")
    if total > MOST_BYTES:
        sys.exit(f"that is more than {MOST_BYTES >> 20} MiB")


def _download(python: str) -> list[str]:
    platforms = [f"--platform=manylinux_2_{n}_x86_64" for n in (17, 24, 27, 28, 34)] + [
        "--platform=manylinux2014_x86_64"
    ]
    tags = [f"--abi=cp{python.replace('.', '')}", "--abi=abi3", "--abi=none"]
    return [
        *(sys.executable, "-m", "pip", "download", "--quiet", "--only-binary=:all:", "--implementation=cp"),
        *(f"--python-version={python}", *platforms, *tags),
    ]


if __name__ == "__main__":
    main()
