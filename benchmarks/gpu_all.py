"""Everything there is to run on a GPU, in one call of at most ten minutes: the tests of `tests/gpu`, then the benchmarks.

    python benchmarks/gpu_all.py --out gpu.md [--device cuda] [--wheels FOLDER] [--minutes 9.5]

For a machine without network, FOLDER holds wheels (fbgemm-gpu-genai, transformers, compressed-tensors, …): they are installed
into a temporary folder, without their dependencies. What was measured until the time is up is in the file.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from gpu_timing import parser

HERE = Path(__file__).parent
#: Longest last; each gets what time is left.
PARTS = {
    "Tests": [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(HERE.parent / "tests/gpu")],
    "Whole model": [sys.executable, str(HERE / "gpu_models.py")],
    "Experts": [sys.executable, str(HERE / "gpu_moe.py")],
    "Linear": [sys.executable, str(HERE / "gpu_linear.py")],
}


def _register(folder: Path) -> None:
    """Tells Python of this checkout's backend, as an installation would: `torch.compile` finds it by its entry point."""
    project = (HERE.parent / "pyproject.toml").read_text()
    version = re.search(r'^version = "(.+)"', project, re.M)[1]
    points = project.partition("[project.entry-points.torch_dynamo_backends]\n")[2].splitlines()[0]
    info = folder / f"ctfp8_compile-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: ctfp8-compile\nVersion: {version}\n")
    (info / "entry_points.txt").write_text(f"[torch_dynamo_backends]\n{points.replace(chr(34), '')}\n")


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--out", type=Path, default=Path("gpu.md"))
    options.add_argument("--wheels", type=Path)
    options.add_argument("--minutes", type=float, default=9.5)
    args = options.parse_args()
    end = time.monotonic() + args.minutes * 60
    with tempfile.TemporaryDirectory() as installed:
        path = [installed, str(HERE.parent), os.environ.get("PYTHONPATH", "")]
        _register(Path(installed))
        if args.wheels is not None:
            wheels = sorted(map(str, args.wheels.glob("*.whl")))
            install = [
                sys.executable,
                "-m",
                "pip",
                "install",
                "--quiet",
                "--no-index",
                "--no-deps",
                "--target",
                installed,
            ]
            subprocess.run([*install, *wheels], check=True)
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path), "CTFP8_TEST_DEVICE": args.device}
        with args.out.open("w") as out:
            for name, command in PARTS.items():
                if "pytest" not in command:
                    command = [*command, "--device", args.device]
                begin = time.monotonic()
                print(f"{name} …", flush=True)
                print(f"\n## {name}\n", file=out, flush=True)
                try:
                    done = subprocess.run(
                        command,
                        stdout=out,
                        stderr=subprocess.PIPE,
                        text=True,
                        env=environment,
                        timeout=max(1, end - begin),
                    )
                    what = (
                        ""
                        if done.returncode == 0
                        else f"\nended with {done.returncode}:\n\n```\n{done.stderr[-3000:]}\n```"
                    )
                except subprocess.TimeoutExpired:
                    what = "\nstopped: the time was up"
                print(f"{what}\n\n{time.monotonic() - begin:.0f} s", file=out, flush=True)
    print(args.out.read_text())


if __name__ == "__main__":
    main()
