"""Times the mixture-of-experts kernels against torch's bfloat16 `_grouped_mm` and `bmm` on this CPU, as ratios of one run.

Each case is one projection of a decoding step: every token's row goes to `top` experts. Calls alternate, and each takes the
next of several copies of the weights, so that they are read from memory. torch is given whichever of its two ways is faster.

    python benchmarks/cpu_moe.py [--quick] [--threads N]
"""

from __future__ import annotations

import argparse
import math

import torch
from timing import COLD_BYTES, interleave

from ctfp8_compile.ops import cpu as cpu_kernels


def case(experts: int, top: int, n: int, k: int, tokens: int, block: list[int], seconds: float) -> list[float]:
    """Median times of torch's grouped mm and bmm, and of the grouped and the gathered kernel."""
    op = torch.ops.ctfp8
    copies = max(2, math.ceil(COLD_BYTES / (experts * n * k)))
    weights = [
        torch.randint(0, 120, (experts, n, k), dtype=torch.uint8).view(torch.float8_e4m3fn) for _ in range(copies)
    ]
    scale = torch.rand(experts, math.ceil(n / block[0]), math.ceil(k / block[1]))
    plains = [
        op.dequantize(weight, scale, None, block, "none", torch.bfloat16) for weight in weights[: max(2, copies // 2)]
    ]
    rounds = []
    for _ in range(32):
        ids = torch.stack([torch.randperm(experts)[:top] for _ in range(tokens)]).flatten().sort().values
        rounds.append(
            (ids, torch.bincount(ids, minlength=experts).cumsum(0).int(), torch.randn(len(ids), k).bfloat16())
        )

    def stock_grouped(i: int) -> object:
        _, offs, x = rounds[i % 32]
        return torch._grouped_mm(x, plains[i % len(plains)].transpose(-2, -1), offs=offs)

    def stock_gathered(i: int) -> object:
        ids, _, x = rounds[i % 32]
        return torch.bmm(plains[i % len(plains)][ids], x.unsqueeze(-1)).squeeze(-1)

    def grouped(i: int) -> object:
        _, offs, x = rounds[i % 32]
        return op.dequantized_grouped_mm(x, weights[i % copies], scale, offs, block)

    def gathered(i: int) -> object:
        ids, _, x = rounds[i % 32]
        return op.dequantized_gathered_mm(x, weights[i % copies], scale, ids, block)

    return interleave([stock_grouped, stock_gathered, grouped, gathered], seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="half a second for each case")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    cpu_kernels.load()
    print(f"torch {torch.__version__}, {cpu_kernels.isa()}, {arguments.threads} threads; times in ms")
    print("   experts        N x K      block tokens _grouped_mm     bmm  grouped gathered       ratio")
    for experts, top, n, k in [(8, 2, 2048, 1408), (64, 6, 2048, 1408), (64, 6, 1408, 2048)]:
        for block in ([1, k], [128, 128]):
            for tokens in (1,) if arguments.quick else (1, 4, 64):
                times = case(experts, top, n, k, tokens, block, 0.5 if arguments.quick else 1.5)
                best = min(times[:2])
                kind = "channel" if block[0] == 1 else "128 x 128"
                print(
                    f"{f'{experts} top-{top}':>10} {f'{n} x {k}':>12} {kind:>10} {tokens:>6} {times[0] * 1e3:>11.2f} "
                    f"{times[1] * 1e3:>7.2f} {times[2] * 1e3:>8.2f} {times[3] * 1e3:>8.2f} "
                    f"{best / times[2]:>5.2f} {best / times[3]:>5.2f}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
