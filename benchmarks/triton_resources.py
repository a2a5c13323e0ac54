"""What the weight-only Triton kernels take of a GPU, built here for GPUs that are not: registers, shared memory, instructions.

    python benchmarks/triton_resources.py [--capabilities 80 90 100]

Each kernel is built as `ctfp8_compile.ops.triton` launches it for the shapes of Llama 8B and Qwen3-30B-A3B: the launch is
recorded on meta tensors, Triton compiles it, and `cuobjdump`, which comes with Triton, reads the cubin. No GPU is needed, and
nothing is timed. Instructions are those of the loop over K, per weight element that a program reads.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from triton.backends import nvidia
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from ctfp8_compile.ops.triton import operators, tiles

CAPABILITIES = (80, 89, 90, 100, 120)
_TYPES = {
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float32: "fp32",
    torch.uint8: "u8",
    torch.int32: "i32",
    torch.int64: "i64",
}
_BIN = Path(nvidia.__file__).parent / "bin"


@dataclass(frozen=True)
class Launch:
    """One kernel launch: the kernel and its arguments by name; `num_warps` and `num_stages` among them."""

    kernel: Any
    grid: tuple[Any, ...]
    arguments: dict[str, Any]


@dataclass(frozen=True)
class Built:
    """A kernel for one capability.

    Attributes:
        registers, local: of a thread; `local` are bytes it spills to memory.
        shared: bytes of a program.
        ptx, cubin: its code.
    """

    registers: int
    local: int
    shared: int
    ptx: str
    cubin: bytes

    def loop(self) -> list[str]:
        """The instructions of the longest loop that holds no other."""
        sass = _cuobjdump("-sass", self.cubin)
        found = [(int(at, 16), text) for at, text in re.findall(r"/\*([0-9a-f]{4,5})\*/\s+(.*?);", sass)]
        ends = [(int(b[1], 16), at) for at, text in found if (b := re.search(r"\bBRA\S*\s.*?0x([0-9a-f]+)", text))]
        loops = [(first, last) for first, last in ends if first < last]
        inner = [
            (first, last)
            for first, last in loops
            if not any(first <= f and g <= last and (f, g) != (first, last) for f, g in loops)
        ]
        first, last = max(inner, key=lambda ends: ends[1] - ends[0])
        return [text for at, text in found if first <= at <= last]


def shared(capability: int) -> int:
    """Kilobytes of shared memory that a program may have."""
    return tiles.SHARED.get(divmod(capability, 10), tiles.SHARED_BY_DEFAULT)


def record(call: Callable[[], Any], capability: int) -> Launch:
    """The one launch that a call makes on such a GPU."""
    launches: list[Launch] = []
    with _recording(launches), mock.patch.object(operators, "_shared", return_value=shared(capability)):
        call()
    (launch,) = launches
    return launch


@contextmanager
def _recording(launches: list[Launch]) -> Iterator[None]:
    class Recorder:
        def __init__(self, kernel: Any):
            self.kernel = kernel

        def __getitem__(self, grid: tuple[Any, ...]) -> Callable[..., None]:
            def launch(*args: Any, **kwargs: Any) -> None:
                names = dict(zip(self.kernel.arg_names, args, strict=False))
                launches.append(Launch(self.kernel, grid, {**names, **kwargs}))

            return launch

    before = operators.wrap_triton
    operators.wrap_triton = Recorder  # type: ignore[assignment]
    try:
        yield
    finally:
        operators.wrap_triton = before


def build(launch: Launch, capability: int) -> Built:
    """Compiles a launch, specialised as Triton would: constants, and sizes and addresses that are multiples of 16."""
    signature, constants, attributes = {}, {}, {}
    for i, parameter in enumerate(launch.kernel.params):
        value = launch.arguments[parameter.name]
        if parameter.is_constexpr or value is None or (isinstance(value, int) and value == 1):
            signature[parameter.name], constants[parameter.name] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[parameter.name] = f"*{_TYPES[value.dtype]}"
            attributes[(i,)] = [["tt.divisibility", 16]]
        else:
            signature[parameter.name] = "i32"
            if value % 16 == 0:
                attributes[(i,)] = [["tt.divisibility", 16]]
    options = {name: launch.arguments[name] for name in ("num_warps", "num_stages")}
    source = ASTSource(launch.kernel, signature, constants, attributes)
    made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    cubin = made.asm["cubin"]
    usage = _cuobjdump("-res-usage", cubin)
    used = re.search(r"REG:(\d+) STACK:\d+ SHARED:\d+ LOCAL:(\d+)", usage)
    assert used is not None, usage
    return Built(int(used[1]), int(used[2]), made.metadata.shared, made.asm["ptx"], cubin)


def _cuobjdump(what: str, cubin: bytes) -> str:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        return subprocess.run(
            [_BIN / "cuobjdump", what, path], check=True, capture_output=True, text=True, env={"PATH": str(_BIN)}
        ).stdout


def linear(
    rows: int, n: int, k: int, block: tuple[int, int] | None = None, dtype: torch.dtype = torch.bfloat16,
    capability: int = 90,
) -> Launch:  # fmt: skip
    """The launch of a linear of these sizes; `block` None is a scale a channel."""
    weight, scale, block = _weight((n, k), block)
    return record(lambda: operators.linear(_x(rows, k, dtype), weight, scale, None, block), capability)


def grouped(
    rows: int, e: int, n: int, k: int, block: tuple[int, int] | None = None, dtype: torch.dtype = torch.bfloat16,
    capability: int = 90,
) -> Launch:  # fmt: skip
    """The same of experts, rows sorted by expert."""
    weight, scale, block = _weight((e, n, k), block)
    offs = torch.empty(e, dtype=torch.int32, device="meta")
    return record(lambda: operators.grouped_mm(_x(rows, k, dtype), weight, scale, offs, block), capability)


def gathered(
    rows: int, e: int, n: int, k: int, block: tuple[int, int] | None = None, dtype: torch.dtype = torch.bfloat16,
    capability: int = 90,
) -> Launch:  # fmt: skip
    """The same of experts, each row with its own."""
    weight, scale, block = _weight((e, n, k), block)
    ids = torch.empty(rows, dtype=torch.int64, device="meta")
    return record(lambda: operators.gathered_mm(_x(rows, k, dtype), weight, scale, ids, block), capability)


def _weight(
    shape: tuple[int, ...], block: tuple[int, int] | None
) -> tuple[torch.Tensor, torch.Tensor, tuple[int, int]]:
    rows, cols = block or (1, shape[-1])
    scale = torch.empty(*shape[:-2], -(-shape[-2] // rows), -(-shape[-1] // cols), device="meta")
    return torch.empty(shape, dtype=torch.float8_e4m3fn, device="meta"), scale, (rows, cols)


def _x(rows: int, k: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(rows, k, dtype=dtype, device="meta")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--capabilities", type=int, nargs="+", default=[80, 90, 100])
    chosen = parser.parse_args().capabilities
    blocks = (128, 128)
    rows = [
        ("linear 4096 × 4096, 1 row", partial(linear, 1, 4096, 4096)),
        ("linear 4096 × 4096, 1 row, 128×128", partial(linear, 1, 4096, 4096, blocks)),
        ("linear 28672 × 4096, 1 row", partial(linear, 1, 28672, 4096)),
        ("linear 4096 × 4096, 32 rows", partial(linear, 32, 4096, 4096)),
        ("linear 4096 × 4096, 64 rows", partial(linear, 64, 4096, 4096)),
        ("linear 4096 × 4096, 4096 rows", partial(linear, 4096, 4096, 4096)),
        ("linear 4096 × 4096, 4096 rows, 128×128", partial(linear, 4096, 4096, 4096, blocks)),
        ("128 experts 1536 × 2048, 8 rows gathered", partial(gathered, 8, 128, 1536, 2048)),
        ("128 experts 1536 × 2048, 4096 rows grouped", partial(grouped, 4096, 128, 1536, 2048)),
        ("128 experts 1536 × 2048, 65536 rows grouped, 128×128", partial(grouped, 65536, 128, 1536, 2048, blocks)),
    ]
    print(f"| | tile | programs | {' | '.join(f'sm{c}' for c in chosen)} |")
    print(f"|---|---|---|{'---|' * len(chosen)}")
    for name, make in rows:
        tiles_of, programs_of, cells = [], [], []
        for capability in chosen:
            launch = make(capability=capability)
            built, a = build(launch, capability), launch.arguments
            parts = f" in {a['SPLIT']} parts" if a["SPLIT"] > 1 else ""
            tiles_of.append(f"{a['BM']} × {a['BN']} × {a['BK']}{parts}, {a['num_warps']} warps")
            programs_of.append(str(torch.Size(launch.grid).numel()))
            elements = a["BN"] * a["BK"] / (32 * a["num_warps"])
            cells.append(f"{built.registers}, {built.shared // 1024} KB, {len(built.loop()) / elements:.1f}")
        tile, programs = ("; ".join(dict.fromkeys(each)) for each in (tiles_of, programs_of))
        print(f"| {name} | {tile} | {programs} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
