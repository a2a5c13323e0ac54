"""A mixture-of-experts layer on a GPU, routing and quantization included: ctfp8 against bf16, eager and Inductor.

    python benchmarks/gpu_moe.py [--device cuda]

The sparse block of Qwen3-30B-A3B: 128 experts of 768 × 2048, 8 a token. Milliseconds of bf16 compiled by Inductor, and how
many times as fast each other way is, in both forms in which transformers runs experts.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from checkpoints import write_moe
from gpu_timing import header, kernels, parser, ready, row, seconds

import ctfp8_compile as ctfp8

TOKENS = (1, 4, 16, 64, 256, 1024, 4096)
FORMS = ("grouped_mm", "batched_mm")


def blocks(folder: str, form: str, device: str) -> dict[str, Any]:
    """By name, the first layer's sparse block."""
    load = {"experts_implementation": form, "device_map": device}
    ours, dense = ctfp8.from_pretrained(folder, **load), ctfp8.from_pretrained(folder, dequantize=True, **load)
    ours, dense = ours.model.layers[0].mlp, dense.model.layers[0].mlp
    compiled = {"fullgraph": True, "dynamic": True}
    return {
        "bf16 Inductor": torch.compile(dense, **compiled),
        "bf16 eager": dense,
        "ctfp8": torch.compile(ours, backend="ctfp8", **compiled),
        **{
            f"ctfp8, {name}": torch.compile(ours, backend="ctfp8", options={"ctfp8.kernels": library}, **compiled)
            for name, library in (("scaled_mm", "scaled_mm"), ("weight-only", "triton"))
        },
    }


@torch.no_grad()
def main() -> None:
    args = parser(__doc__).parse_args()
    print(f"{ready(args.device)}\n", flush=True)
    dry = args.device == "cpu"
    hidden, intermediate, experts = (256, 128, 8) if dry else (2048, 768, 128)
    sizes = {"hidden": hidden, "intermediate": intermediate, "experts": experts}
    with tempfile.TemporaryDirectory() as folder:
        write_moe(Path(folder), layers=1, heads=8 if dry else 32, top_k=2 if dry else 8, **sizes)
        for form in FORMS:
            torch._dynamo.reset()
            found = blocks(folder, form, args.device)
            first, *others = found
            print(header(["experts", "tokens", f"{first} ms", *others]), flush=True)
            for tokens in TOKENS[:3] if dry else TOKENS:
                if form == "batched_mm" and tokens > 64:
                    break  # it gathers a weight for each row; transformers takes it for decoding only
                # other tokens go to other experts, so that few of a call's weights are in a cache
                xs = [
                    torch.randn(1, tokens, hidden, device=args.device, dtype=torch.bfloat16)
                    for _ in range(2 if dry else 16)
                ]
                times = {
                    name: seconds([lambda call=call, x=x: call(x) for x in xs], args.device)
                    for name, call in found.items()
                }
                first, *rest = times.values()
                print(row([form, tokens, f"{first * 1e3:.3f}", *(f"{first / t:.2f}×" for t in rest)]), flush=True)
            print(f"\n{kernels(found['ctfp8']._orig_mod, xs[0], device=args.device)}\n", flush=True)


if __name__ == "__main__":
    main()
