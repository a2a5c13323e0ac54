"""Linears on a GPU, quantization of the activation included, against bf16 and other ways to run the same FP8 weight.

    python benchmarks/gpu_linear.py [--device cuda] [--shapes 8B 70B 30B-A3B]

Milliseconds of torch's bf16 linear, and how many times as fast each other way is:

- ctfp8: `torch.compile(backend="ctfp8")`;
- transformers: its `CompressedTensorsFP8Linear`, compiled by Inductor;
- torchao: `Float8DynamicActivationFloat8WeightConfig(PerRow())`, compiled by Inductor, where it is installed.

Each result is compared with the dequantized weight's before it is timed.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from typing import Any

import torch
from gpu_timing import header, kernels, parser, ready, row, seconds
from torch import Tensor, nn
from transformers.integrations.compressed_tensors import CompressedTensorsFP8Linear

import ctfp8_compile as ctfp8

#: N × K of a model's linears; q, k, v and gate, up as one.
SHAPES = {
    "8B": [(6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336)],
    "70B": [(10240, 8192), (8192, 8192), (57344, 8192), (8192, 28672)],
    "30B-A3B": [(5120, 2048), (2048, 4096)],
    "dry": [(256, 128), (128, 256)],
}
ROWS = (1, 16, 64, 256, 1024, 4096, 16384)
CONFIG = {
    "quant_method": "compressed-tensors",
    "format": "float-quantized",
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {"num_bits": 8, "type": "float", "strategy": "channel"},
            "input_activations": {"num_bits": 8, "type": "float", "strategy": "token", "dynamic": True},
        }
    },
}


class Layer(nn.Module):
    """One linear, as a model has it."""

    def __init__(self, n: int, k: int, device: str):
        super().__init__()
        self.linear = nn.Linear(k, n, bias=False, dtype=torch.bfloat16, device=device)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)


def ways(n: int, k: int, device: str) -> tuple[Tensor, dict[str, Callable[[Tensor], Any]]]:
    """The dequantized weight, and by name what multiplies with it."""
    dense = torch.randn(n, k, device=device) * 0.05
    scale = dense.abs().amax(1, keepdim=True) / 448
    weight = (dense / scale).to(torch.float8_e4m3fn)
    dense = (weight.float() * scale).bfloat16()
    ours = ctfp8.load_state_dict(
        Layer(n, k, device), {"linear.weight": weight, "linear.weight_scale": scale}, CONFIG
    ).to(device)
    found: dict[str, Callable[[Tensor], Any]] = {
        "bf16": lambda x: nn.functional.linear(x, dense),
        "ctfp8": torch.compile(ours, backend="ctfp8", fullgraph=True, dynamic=True),
    }
    theirs = CompressedTensorsFP8Linear(k, n).to(device)
    theirs.weight = nn.Parameter(weight, requires_grad=False)
    theirs.weight_scale = nn.Parameter(scale.reshape(1, n), requires_grad=False)
    found["transformers"] = torch.compile(theirs, dynamic=True)  # not one graph with torch 2.11
    with contextlib.suppress(ImportError):
        from torchao.quantization import Float8DynamicActivationFloat8WeightConfig, PerRow, quantize_

        layer = Layer(n, k, device)
        layer.linear.weight = nn.Parameter(dense, requires_grad=False)
        quantize_(layer, Float8DynamicActivationFloat8WeightConfig(granularity=PerRow()))
        found["torchao"] = torch.compile(layer, fullgraph=True, dynamic=True)
    return dense, found


@torch.no_grad()
def main() -> None:
    options = parser(__doc__)
    options.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=["8B", "70B"])
    args = options.parse_args()
    print(f"{ready(args.device)}\n", flush=True)
    dry = args.device == "cpu"
    printed, failed = False, dict[str, str]()
    for name in ["dry"] if dry else args.shapes:
        for n, k in SHAPES[name]:
            torch._dynamo.reset()
            dense, found = ways(n, k, args.device)
            if not printed:
                print(header(["model", "N × K", "M", "bf16 ms", *list(found)[1:]]), flush=True)
                printed = True
            for m in ROWS[:3] if dry else ROWS:
                x = torch.randn(m, k, device=args.device, dtype=torch.bfloat16)
                want = nn.functional.linear(x, dense).float()
                times = {}
                for way, call in found.items():
                    try:
                        out = call(x)
                    except Exception as reason:
                        if way in ("bf16", "ctfp8"):
                            raise
                        failed[way] = str(reason).splitlines()[0][:120]
                        times[way] = math.nan
                        continue
                    error = ((out.float() - want).norm() / want.norm()).item()
                    assert error < 0.06, f"{way}: wrong by {error:.2f} at M = {m}"
                    times[way] = seconds(lambda call=call, x=x: call(x), args.device)
                bf16 = times.pop("bf16")
                cells = ["–" if math.isnan(t) else f"{bf16 / t:.2f}×" for t in times.values()]
                print(row([name, f"{n} × {k}", m, f"{bf16 * 1e3:.3f}", *cells]), flush=True)
    for way, reason in failed.items():
        print(f"\n{way} did not run: {reason}")
    print(f"\n{kernels(found['ctfp8']._orig_mod, x, device=args.device)}")


if __name__ == "__main__":
    main()
