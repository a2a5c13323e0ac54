"""Times `ctfp8::dequantized_linear` against torch's bfloat16 linear on this CPU, as ratios of one process.

Calls of the two alternate, so that a change of clock or load meets both, and each call takes the next of several copies of
its weight, so that the third-level cache does not pretend to be memory. A cell is `ratio (FP8 ms)`; above 1 FP8 is faster.
`bandwidth` is the rate at which the kernel reads the FP8 weight at M = 1, as a fraction of the rate at which torch sums a
large tensor in this same process; `error` the largest ratio of the two errors against float64 (below 1 FP8 is closer).

    python benchmarks/cpu_linear.py [--quick] [--threads N] [--dtype float32]
    python benchmarks/cpu_linear.py --mxfp8          # against 128 x 128 blocks
"""

from __future__ import annotations

import argparse
import math

import torch
from rich.progress import track
from timing import COLD_BYTES, interleave, read_rate

from ctfp8_compile.ops import cpu as cpu_kernels

#: N, K of the linears of a layer.
SHAPES = {
    "Llama-3.2-1B": [(2048, 2048), (8192, 2048), (2048, 8192)],
    "Llama-3.1-8B": [(4096, 4096), (14336, 4096), (4096, 14336)],
    "Qwen3-30B-A3B": [(4096, 2048), (2048, 4096), (768, 2048), (2048, 768)],
}
ROWS = (1, 2, 4, 8, 16, 32, 64, 256, 1024)


def case(n: int, k: int, m: int, block: list[int], dtype: torch.dtype, seconds: float) -> tuple[float, float, float]:
    """Times of torch and of the kernel, and the ratio of their errors against float64 (kernel / torch)."""
    copies = max(2, math.ceil(COLD_BYTES / (n * k)))
    weight = (torch.randn(n, k) * 100).clamp(-448, 448).to(torch.float8_e4m3fn)
    scale = torch.rand(math.ceil(n / block[0]), math.ceil(k / block[1])) * 1e-3
    if block == [1, 32]:  # MXFP8
        scale = scale.to(torch.float8_e8m0fnu).view(torch.uint8)
    plain = torch.ops.ctfp8.dequantize(weight, scale, None, block, "none", dtype)
    x = torch.randn(m, k).to(dtype)
    exact = torch.ops.ctfp8.dequantize(weight[:512], scale[: -(-512 // block[0])], None, block, "none", torch.float64)
    expected = x.double() @ exact.t()
    linear, fused = torch.nn.functional.linear, torch.ops.ctfp8.dequantized_linear
    outputs = (linear(x, plain), fused(x, weight, scale, None, block))
    errors = [(out[:, :512].double() - expected).norm().item() for out in outputs]
    weights = [weight.clone() for _ in range(copies)]
    plains = [plain.clone() for _ in range(max(2, copies // plain.element_size()))]
    stock, ours = interleave(
        [
            lambda i: linear(x, plains[i % len(plains)]),
            lambda i: fused(x, weights[i % copies], scale, None, block),
        ],
        seconds,
    )
    return stock, ours, errors[1] / errors[0]


def against_blocks(n: int, k: int, m: int, seconds: float) -> float:
    """The time of an MXFP8 linear divided by that of one with 128 x 128 blocks, calls alternating."""
    copies = max(2, math.ceil(COLD_BYTES / (n * k)))
    fp8 = [torch.randint(0, 120, (n, k), dtype=torch.uint8).view(torch.float8_e4m3fn) for _ in range(2 * copies)]
    blocks = torch.rand(math.ceil(n / 128), math.ceil(k / 128)) * 1e-3
    exponents = torch.randint(112, 116, (n, k // 32), dtype=torch.uint8)
    each = [exponents.clone() for _ in range(copies)]  # as cold as the weights
    x, fused = torch.randn(m, k, dtype=torch.bfloat16), torch.ops.ctfp8.dequantized_linear
    block, mx = interleave(
        [
            lambda i: fused(x, fp8[i % copies], blocks, None, [128, 128]),
            lambda i: fused(x, fp8[copies + i % copies], each[i % copies], None, [1, 32]),
        ],
        seconds,
    )
    return mx / block


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one shape, half a second each")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32", "float16"])
    parser.add_argument("--mxfp8", action="store_true", help="only: how MXFP8 compares with 128 x 128 blocks")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    cpu_kernels.load()
    if arguments.mxfp8:
        for n, k in ((2048, 2048), (4096, 4096), (14336, 4096)):
            ratios = "  ".join(f"M = {m}: {against_blocks(n, k, m, 5):.2f}" for m in (1, 2, 4))
            print(f"{n} × {k}, {arguments.threads} threads: MXFP8's time / that of 128 x 128 blocks  {ratios}")
        return
    rate = read_rate()
    rows = (1, 4, 16, 64) if arguments.quick else ROWS
    shapes = [(4096, 4096)] if arguments.quick else [shape for model in SHAPES.values() for shape in model]
    cases = [(n, k, "channel", [1, k]) for n, k in shapes]
    for kind, block in (("128 x 128", [128, 128]), ("MXFP8", [1, 32])):
        cases += [(n, k, kind, block) for n, k in shapes if (n, k) == (4096, 4096)]
    lines = []
    for n, k, kind, block in track(cases, "timing …"):
        cells, bandwidth, worst = [], 0.0, 0.0
        for m in rows:
            stock, ours, error = case(n, k, m, block, getattr(torch, arguments.dtype), 0.5 if arguments.quick else 1.5)
            cells.append(f"{stock / ours:.2f} ({ours * 1e3:.2f})")
            worst = max(worst, error)
            if m == 1:
                bandwidth = n * k / ours / rate
        lines.append([f"{n} × {k}", kind, *cells, f"{bandwidth:.0%}", f"{worst:.2f}"])
    print(
        f"torch {torch.__version__}, {cpu_kernels.isa()}, {arguments.threads} threads, {arguments.dtype}, "
        f"memory reads at {rate / 1e9:.1f} GB/s\n"
    )
    print("| " + " | ".join(["N × K", "scales", *(f"M = {m}" for m in rows), "bandwidth", "error"]) + " |")
    print("|---" * (len(rows) + 4) + "|")
    for line in lines:
        print("| " + " | ".join(line) + " |")


if __name__ == "__main__":
    main()
