"""Which tile of the weight-only Triton kernel is the fastest: many are built at once, each is timed, the best are shown.

    python benchmarks/gpu_tiles.py [--kinds linear block gathered grouped] [--minutes 3] [--json FILE]

For each shape and number of rows: what `ctfp8_compile.ops.triton.tiles` chooses and the fastest tiles, as `rows × outputs ×
cols / split, warps, stages`, with microseconds, and torch's bf16 matmul. Linears are Llama 8B's, with a scale per row or
(`block`) per 128 × 128; experts are Qwen3-30B-A3B's, 128 of them, 8 a token. Calls go round more weights than a cache holds.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import astuple
from functools import cached_property
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from unittest import mock

if "cpu" in sys.argv:  # a dry run: kernels on the CPU, by Triton's interpreter
    os.environ["TRITON_INTERPRET"] = "1"

import torch
from gpu_timing import copies, header, parser, ready, row, seconds
from torch import Tensor

from ctfp8_compile.ops.triton import operators, tiles
from ctfp8_compile.ops.triton.tiles import Tile

OF_A_TOKEN, STACKED = 8, 128
#: By kind, N × K, and how many rows.
WORK = {
    "linear": ([(4096, 4096), (28672, 4096), (4096, 14336)], (1, 16, 64, 256, 2048)),
    "block": ([(4096, 4096), (28672, 4096)], (1, 16, 256, 2048)),
    "gathered": ([(1536, 2048), (2048, 768)], (1, 16)),
    "grouped": ([(1536, 2048)], (64, 512, 4096)),
}
EXPERTS = ("gathered", "grouped")


class Work:
    """One kernel on one shape. Tensors are made when they are first asked for."""

    def __init__(self, kind: str, n: int, k: int, rows: int, device: str):
        self.kind, self.n, self.k, self.rows, self.device = kind, n, k, rows, device
        self.stacked = (STACKED if device != "cpu" else 4,) if kind in EXPERTS else ()
        self.each = min(OF_A_TOKEN, *self.stacked) if self.stacked else 1
        self.block = [128, 128] if kind == "block" else [1, k]

    @cached_property
    def weights(self) -> list[Tensor]:
        number = 1 if self.device == "meta" else copies(self.n * self.k * math.prod(self.stacked), self.device)
        return [self._fp8(*self.stacked, self.n, self.k) for _ in range(number)]

    def _fp8(self, *shape: int) -> Tensor:
        fp8 = torch.randint(0, 256, shape, dtype=torch.uint8, device=self.device)
        return torch.where(fp8 & 0x7F >= 0x78, 0, fp8).view(torch.float8_e4m3fn)  # no NaN, no huge values

    @cached_property
    def scale(self) -> Tensor:
        shape = (self.n // 128, self.k // 128) if self.kind == "block" else (self.n, 1)
        return torch.rand(*self.stacked, *shape, device=self.device) * 1e-3

    @cached_property
    def x(self) -> Tensor:
        return torch.randn(self.rows * self.each, self.k, dtype=torch.bfloat16, device=self.device)

    @cached_property
    def ids(self) -> list[Tensor]:
        """For each of 8 calls, the expert of each row."""
        chosen = torch.rand(8, self.rows, *self.stacked, device=self.device).argsort(-1)[..., : self.each]
        return list(chosen.reshape(8, -1))

    @cached_property
    def offs(self) -> list[Tensor]:
        if self.device == "meta":
            return [torch.empty(*self.stacked, dtype=torch.int32, device="meta")]
        counts = [torch.bincount(ids, minlength=self.stacked[0]) for ids in self.ids]
        return [c.cumsum(0).to(torch.int32) for c in counts]

    def call(self, i: int = 0) -> Tensor:
        weight = self.weights[i % len(self.weights)]
        if self.kind == "gathered":
            return operators.gathered_mm(self.x, weight, self.scale, self.ids[i % len(self.ids)], self.block)
        if self.kind == "grouped":
            return operators.grouped_mm(self.x, weight, self.scale, self.offs[i % len(self.offs)], self.block)
        return operators.linear(self.x, weight, self.scale, None, self.block)

    def seconds(self) -> float:
        return seconds([lambda i=i: self.call(i) for i in range(max(8, len(self.weights)))], self.device)

    def bf16(self) -> float:
        """torch's: a linear, a batched matmul of weights gathered, a grouped one."""
        dense = [torch.randn(weight.shape, dtype=torch.bfloat16, device=self.device) for weight in self.weights]
        x = self.x
        if self.kind == "gathered":
            return seconds([lambda i=i: torch.bmm(dense[0][i], x[:, :, None]) for i in self.ids], self.device)
        if self.kind == "grouped":
            return seconds([lambda o=o: torch._grouped_mm(x, dense[0].mT, o) for o in self.offs], self.device)
        return seconds([lambda w=w: torch.nn.functional.linear(x, w) for w in dense], self.device)

    def candidates(self) -> list[Tile]:
        """All that may be good for so many rows of one matrix."""
        share = {"gathered": 1, "grouped": -(-self.rows * self.each // math.prod(self.stacked))}.get(
            self.kind, self.rows
        )
        if share <= 32:
            heights = {8: (8, 16), 16: (16,), 32: (32,)}[next(height for height in (8, 16, 32) if height >= share)]
            rest = (16, 32, 64, 128), (128, 256), (1, 4, 8), (4, 8), (3, 5)
        else:
            heights = (64, *([128] if share > 64 else []), *([256] if share >= 256 else []))
            rest = (64, 128), (64, 128), (1,), (4, 8), (3, 4)
        return [t for t in itertools.starmap(Tile, itertools.product(heights, *rest)) if self._fits(t)]

    def _fits(self, tile: Tile) -> bool:
        threads = 32 * tile.warps
        return (
            tile.cols // tile.split >= 32
            and tile.split in (1, tile.warps)
            and tile.stages * tile.cols * (tile.outputs + 2 * tile.rows) <= 200 << 10  # shared memory
            and 1 <= tile.outputs * tile.rows * tile.split // threads <= 128  # an accumulator's registers
            and tile.outputs * tile.cols // threads >= 16  # bytes that a thread loads
            and tile.cols <= (128 if self.kind == "block" else self.k)
        )


@contextmanager
def working_in(tile: Tile | None, launcher: Any = lambda kernel: kernel) -> Iterator[None]:
    """Kernels work in this tile; None: in the one that ctfp8 chooses."""
    with mock.patch.object(operators, "wrap_triton", launcher):
        if tile is None:
            yield
        else:
            with mock.patch.object(tiles, "choose", return_value=tile):
                yield


class Build:
    """Compiles a kernel instead of launching it."""

    def __init__(self, kernel: Any):
        self.kernel = kernel

    def __getitem__(self, grid: tuple[Any, ...]) -> Any:
        def warmup(*args: Any, **kwargs: Any) -> None:
            self.kernel.warmup(*(a.dtype if isinstance(a, Tensor) else a for a in args), grid=grid, **kwargs)

        return warmup


def build(kind: str, n: int, k: int, rows: int, tile: Tile) -> str:
    """In a process of its own: into Triton's cache; the reason if it cannot be."""
    try:
        with working_in(tile, Build):
            Work(kind, n, k, rows, "meta").call()
    except Exception as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0][:100] if str(error) else ''}"
    return ""


def shown(tile: Tile) -> str:
    return f"{tile.rows} × {tile.outputs} × {tile.cols} / {tile.split}, {tile.warps}, {tile.stages}"


@torch.no_grad()
def main() -> None:
    options = parser(__doc__)
    options.add_argument("--kinds", nargs="+", choices=list(WORK), default=list(WORK))
    options.add_argument("--minutes", type=float, default=60.0, help="begin nothing after this long")
    options.add_argument("--json", type=Path, help="all times, in seconds")
    options.add_argument("--build", action="store_true", help="fill Triton's cache, and time nothing")
    args = options.parse_args()
    print(f"{ready(args.device)}\n", flush=True)
    dry, end = args.device == "cpu", time.monotonic() + args.minutes * 60
    work = [
        Work(kind, n, k, rows, args.device)
        for kind in args.kinds
        for n, k in ([(128, 256)] if dry else WORK[kind][0])
        for rows in (WORK[kind][1][:1] if dry else WORK[kind][1])
    ]
    if not dry:
        # to Triton, sizes are all the same that are multiples of 16, or are not; but 1, which is a constant
        kernels = {
            (w.kind, tile, w.rows == 1, w.rows * w.each % 16): (w.kind, w.n, w.k, w.rows, tile)
            for w in work
            for tile in w.candidates()
        }
        todo = list(kernels.values())
        begin = time.monotonic()
        with ProcessPoolExecutor((os.cpu_count() or 2) // 2, get_context("spawn")) as pool:
            failed = [why for why in pool.map(build, *zip(*todo, strict=True), chunksize=4) if why]
        print(
            f"{len(todo)} kernels built in {time.monotonic() - begin:.0f} s; {len(failed)} not: {set(failed)}\n",
            flush=True,
        )
        if args.build:
            return
    print(header(["kind", "N × K", "rows", "bf16 µs", "chosen", "µs", "fastest", "µs", "second", "µs"]), flush=True)
    times: list[Any] = []
    for w in work:
        if time.monotonic() > end:
            print("\nthe time was up")
            break
        with working_in(None):
            ours, want = w.seconds(), w.call().float()
        found = []
        for tile in w.candidates()[: 2 if dry else None]:
            try:
                with working_in(tile):
                    error = ((w.call().float() - want).norm() / want.norm()).item()
                    assert error < 0.02, f"another result, by {error:.3f}"
                    found.append((w.seconds(), tile))
            except Exception as reason:
                times.append([w.kind, w.n, w.k, w.rows, astuple(tile), str(reason)[:100]])
        found.sort(key=lambda pair: pair[0])
        times += [[w.kind, w.n, w.k, w.rows, astuple(tile), t] for t, tile in found]
        best = [cell for t, tile in found[:2] for cell in (shown(tile), f"{t * 1e6:.1f}")]
        choice = choice_of(w)
        cells = [w.kind, f"{w.n} × {w.k}", w.rows, f"{w.bf16() * 1e6:.1f}", shown(choice), f"{ours * 1e6:.1f}", *best]
        print(row(cells), flush=True)
        times.append([w.kind, w.n, w.k, w.rows, "chosen", astuple(choice), ours])
        vars(w).clear()  # its weights
        if args.json is not None:
            args.json.write_text(json.dumps(times))


def choice_of(work: Work) -> Tile:
    """The tile that a call is launched with."""
    seen: list[Tile] = []
    choose = tiles.choose
    with mock.patch.object(tiles, "choose", lambda *args: seen.append(choose(*args)) or seen[-1]), working_in(None):
        work.call()
    return seen[0]


if __name__ == "__main__":
    main()
