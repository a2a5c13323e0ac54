"""Times `ctfp8::dequantized_linear` against torch's bfloat16 linear on this CPU, as ratios taken in one run.

Calls of the two alternate, so that a change of clock or load meets both, and each call takes the next of several copies of
its weight, so that the third-level cache does not pretend to be memory. The last column is the rate at which the kernel
reads the FP8 weight, as a fraction of the rate at which torch sums a large tensor of bytes in this same process.

    python benchmarks/cpu_linear.py [--quick] [--threads N] [--dtype float32]
"""

from __future__ import annotations

import argparse
import math

import torch
from timing import COLD_BYTES, interleave, read_rate

from ctfp8_compile.lowering import cpu_kernels


def case(n: int, k: int, m: int, block: list[int], dtype: torch.dtype, seconds: float) -> tuple[float, float, float]:
    """Times of torch and of the kernel, and the ratio of their errors against float64 (kernel / torch)."""
    copies = max(2, math.ceil(COLD_BYTES / (n * k)))
    weight = (torch.randn(n, k) * 100).clamp(-448, 448).to(torch.float8_e4m3fn)
    scale = torch.rand(math.ceil(n / block[0]), math.ceil(k / block[1])) * 1e-3
    plain = torch.ops.ctfp8.dequantize(weight, scale, None, block, "none", dtype)
    x = torch.randn(m, k).to(dtype)
    expected = (x.double() @ torch.ops.ctfp8.dequantize(weight, scale, None, block, "none", torch.float64).t())[:, :512]
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer sizes, half a second each")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32", "float16"])
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    cpu_kernels.load()
    rate = read_rate()
    print(
        f"torch {torch.__version__}, {cpu_kernels.isa()}, {arguments.threads} threads, memory reads at {rate / 1e9:.1f} GB/s"
    )
    print(
        f"{'N x K':>13} {'block':>10} {'M':>5} {'torch ms':>9} {'fp8 ms':>8} {'ratio':>6} {'error':>6} {'bandwidth':>9}"
    )
    quick = arguments.quick
    for n, k in [(4096, 4096)] if quick else [(4096, 4096), (14336, 4096), (4096, 14336)]:
        for block in ([1, k], [128, 128]):
            for m in (1, 4, 16, 64) if quick else (1, 2, 4, 8, 16, 32, 64, 256, 1024):
                if m > 64 and (n, k) != (4096, 4096):
                    continue
                stock, ours, error = case(n, k, m, block, getattr(torch, arguments.dtype), 0.5 if quick else 1.5)
                kind = "channel" if block[0] == 1 else "128 x 128"
                print(
                    f"{f'{n} x {k}':>13} {kind:>10} {m:>5} {stock * 1e3:>9.2f} {ours * 1e3:>8.2f} "
                    f"{stock / ours:>6.2f} {error:>6.2f} {n * k / ours / rate:>9.2f}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
