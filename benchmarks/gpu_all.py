"""Everything there is to run on a GPU, in one call of at most ten minutes: linears, `tests/gpu`, experts, a model.

    python benchmarks/gpu_all.py --pack gpu.tar.xz [--torch 2.11] [--python 3.12]       where packages can be had
    python benchmarks/gpu_all.py --out gpu.md [--packages gpu.tar.xz] [--minutes 9.5]   where the GPU is
    python benchmarks/gpu_all.py --out gpu.md --device cpu                              a dry run of it all, on small shapes

For a machine without network, `--pack` puts what it lacks into one file, for its releases of Python and torch: the kernel library
that goes with that torch, transformers, compressed-tensors and what these need. It is unpacked into a temporary folder. What
was measured until the time is up is in the file; no part takes the time of those behind it.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
from pathlib import Path

from gpu_timing import parser

HERE = Path(__file__).parent
ROOT = HERE.parent
#: Name, what runs it, and how much of the time it may take.
PARTS = (
    (
        "Linear",
        [sys.executable, str(HERE / "gpu_linear.py"), "--shapes", "8B", "--rows", "1", "16", "256", "4096"],
        0.45,
    ),
    ("Tests", [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", str(ROOT / "tests/gpu")], 0.25),
    ("Experts", [sys.executable, str(HERE / "gpu_moe.py")], 0.15),
    ("Whole model", [sys.executable, str(HERE / "gpu_models.py")], 0.15),
)
#: What a machine with torch may lack, or have in an older release; of these, `constraints.txt` says which.
PACKAGES = ("transformers", "compressed-tensors", "regex", "tokenizers", "safetensors", "expecttest", "hypothesis")
WITH_NEEDS = ("pydantic", "loguru")
#: What a checkout with its packages may weigh, to travel: 64 MiB, and some air.
MOST_BYTES = 60 << 20


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--out", type=Path, default=Path("gpu.md"))
    options.add_argument("--packages", type=Path, help="what --pack wrote")
    options.add_argument("--minutes", type=float, default=9.5)
    options.add_argument("--pack", type=Path, help="write the packages, and run nothing")
    options.add_argument("--torch", default="2.11", help="of the machine with the GPU")
    options.add_argument("--python", default="3.12", help="of the machine with the GPU")
    args = options.parse_args()
    if args.pack is not None:
        pack(args.pack, args.torch, args.python)
        return
    end = time.monotonic() + args.minutes * 60
    with tempfile.TemporaryDirectory() as folder:
        if args.packages is not None:
            with tarfile.open(args.packages) as archive:
                archive.extractall(folder, filter="data")
        _register(Path(folder))
        path = [folder, str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path), "CTFP8_TEST_DEVICE": args.device}
        with args.out.open("w") as out:
            for name, command, share in PARTS:
                limit = min(end - time.monotonic(), share * args.minutes * 60)
                _run(name, command, args.device, limit, environment, out)
    print(args.out.read_text())


def _run(name: str, command: list[str], device: str, limit: float, environment: dict[str, str], out: object) -> None:
    if "pytest" not in command:
        command = [*command, "--device", device]
    if name == "Linear":
        command = [*command, "--minutes", f"{limit / 60 * 0.85:.2f}"]  # ends by itself, with what it has
    begin = time.monotonic()
    print(f"{name} …", flush=True)
    print(f"\n## {name}\n", file=out, flush=True)
    try:
        done = subprocess.run(
            command, stdout=out, stderr=subprocess.PIPE, text=True, env=environment, cwd=ROOT, timeout=max(1, limit)
        )
        what = "" if done.returncode == 0 else f"\nended with {done.returncode}:\n\n```\n{done.stderr[-3000:]}\n```"
    except subprocess.TimeoutExpired:
        what = "\nstopped: its time was up"
    print(f"{what}\n\n{time.monotonic() - begin:.0f} s", file=out, flush=True)


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
    alone = [*kernels, *(f"{name}=={pinned[name]}" for name in PACKAGES)]
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
    platforms = [f"--platform=manylinux_2_{n}_x86_64" for n in (17, 27, 28, 34)] + ["--platform=manylinux2014_x86_64"]
    tags = [f"--abi=cp{python.replace('.', '')}", "--abi=abi3", "--abi=none"]
    return [
        *(sys.executable, "-m", "pip", "download", "--quiet", "--only-binary=:all:", "--implementation=cp"),
        *(f"--python-version={python}", *platforms, *tags),
    ]


if __name__ == "__main__":
    main()
