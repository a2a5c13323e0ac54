"""Linears on a GPU, quantization of the activation included, against bf16 and other ways to run the same FP8 weight.

    python benchmarks/gpu_linear.py [--device cuda] [--shapes 8B 70B 30B-A3B] [--rows 1 16 …] [--minutes 4]

For each shape and number of rows, compiled anew for that number: microseconds, the bandwidth at which the weight is read (GB/s)
and the arithmetic (TFLOP/s) of

- bf16: torch's linear;
- ctfp8: `torch.compile(backend="ctfp8")`, and with one library's kernels only; with scales per tensor, and per 128 × 128 block;
- fbgemm, `_scaled_mm`: their matmuls alone, of activations that are quantized already;
- transformers: its `CompressedTensorsFP8Linear`, compiled by Inductor;
- torchao: `Float8DynamicActivationFloat8WeightConfig(PerRow())`, compiled by Inductor, where it is installed.

Calls go round more weights than a cache holds. Each result is compared with the dequantized weight's before it is timed. What
does not run is named below the table, and the others go on. Then, by the profiler's names, what ctfp8 launches.
"""

from __future__ import annotations

import sys
import time
import traceback
from collections.abc import Callable, Sequence
from typing import Any

import torch
from gpu_timing import copies, header, kernels, launched, parser, ready, row, seconds
from torch import Tensor, nn

import ctfp8_compile as ctfp8
from ctfp8_compile.ops import quantize_per_token_steps
from ctfp8_compile.ops.fp8 import apply

#: N × K of a model's linears; q, k, v and gate, up as one.
SHAPES = {
    "8B": [(4096, 4096), (28672, 4096), (4096, 14336), (6144, 4096)],
    "8B MLP": [(28672, 4096), (4096, 14336)],
    "70B": [(10240, 8192), (8192, 8192), (57344, 8192), (8192, 28672)],
    "30B-A3B": [(5120, 2048), (2048, 4096)],
    "dry": [(256, 128)],
}
ROWS = (1, 16, 64, 256, 1024, 4096)


def _config(weights: dict[str, Any], inputs: dict[str, Any]) -> dict[str, Any]:
    float8 = {"num_bits": 8, "type": "float"}
    group = {"targets": ["Linear"], "weights": {**float8, **weights}, "input_activations": {**float8, **inputs}}
    return {"quant_method": "compressed-tensors", "format": "float-quantized", "config_groups": {"group_0": group}}


CONFIG = _config({"strategy": "channel"}, {"strategy": "token", "dynamic": True})
CONFIGS = {
    "channel": CONFIG,
    "tensor": _config({"strategy": "tensor"}, {"strategy": "tensor", "dynamic": False}),
    "block": _config(
        {"strategy": "block", "block_structure": [128, 128]}, {"strategy": "group", "group_size": 128, "dynamic": True}
    ),
}
#: One call of a way: an activation, and the number of the weight.
Call = Callable[[Tensor, int], Any]


class Layer(nn.Module):
    """One linear, as a model has it."""

    def __init__(self, n: int, k: int, device: str):
        super().__init__()
        self.linear = nn.Linear(k, n, bias=False, dtype=torch.bfloat16, device=device)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)


class Weights:
    """Several weights of one shape, in FP8 with a scale per row, dequantized, and with one scale for all."""

    def __init__(self, n: int, k: int, device: str):
        self.n, self.k, self.device = n, k, device
        self.count = copies(n * k, device)
        self.fp8, self.scales, self.dense = [], [], []
        for _ in range(self.count):
            dense = torch.randn(n, k, device=device) * 0.05
            scale = dense.abs().amax(1, keepdim=True) / 448
            self.fp8.append((dense / scale).to(torch.float8_e4m3fn))
            self.scales.append(scale)
            self.dense.append((self.fp8[-1].float() * scale).bfloat16())

    def layers(self, scheme: str = "channel") -> list[nn.Module]:
        """A module for each; of other schemes than `channel`, all FP8 values have the first one's scale."""
        found = []
        for fp8, scale in zip(self.fp8, self.scales, strict=True):
            one = scale[:1]
            scales = {"channel": scale, "tensor": one[0], "block": one.expand(self.n // 128, self.k // 128).clone()}
            state = {"linear.weight": fp8, "linear.weight_scale": scales[scheme]}
            if scheme == "tensor":
                state["linear.input_scale"] = torch.tensor([4 / 448], device=self.device)
            layer = ctfp8.load_state_dict(Layer(self.n, self.k, self.device), state, CONFIGS[scheme])
            found.append(layer.to(self.device))
        return found


def of_layers(compiled: Callable[[nn.Module, Tensor], Any], layers: Sequence[nn.Module]) -> Call:
    return lambda x, i: compiled(layers[i % len(layers)], x)


def _apply_layer(layer: nn.Module, x: Tensor) -> Any:
    return layer(x)


def compiled(layers: Sequence[nn.Module], **options: Any) -> Call:
    return of_layers(torch.compile(_apply_layer, dynamic=False, **options), layers)


def ours(weights: Weights, scheme: str = "channel", library: str = "auto") -> Call:
    options = {"ctfp8.kernels": library}
    return compiled(weights.layers(scheme), backend="ctfp8", fullgraph=True, options=options)


class Quantized:
    """An activation in FP8; that of the last call is kept, so that only the matmul is timed."""

    def __init__(self) -> None:
        self.last: tuple[Tensor, tuple[Tensor, Tensor]] | None = None

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if self.last is None or self.last[0] is not x:
            self.last = x, quantize_per_token_steps(apply, x)
        return self.last[1]


def fbgemm(weights: Weights) -> Call:
    import fbgemm_gpu.experimental.gen_ai  # noqa: F401 - registers them

    op, quantized = torch.ops.fbgemm.f8f8bf16_rowwise, Quantized()
    flat = [scale.reshape(-1) for scale in weights.scales]
    return lambda x, i: op(quantized(x)[0], weights.fp8[i], quantized(x)[1].reshape(-1), flat[i])


def scaled_mm(weights: Weights) -> Call:
    flat, quantized = [scale.reshape(1, -1) for scale in weights.scales], Quantized()
    fast = weights.device == "cuda"

    def call(x: Tensor, i: int) -> Tensor:
        fp8, scale = quantized(x)
        return torch._scaled_mm(fp8, weights.fp8[i].t(), scale, flat[i], out_dtype=torch.bfloat16, use_fast_accum=fast)

    return call


def transformers(weights: Weights) -> Call:
    from transformers.integrations.compressed_tensors import CompressedTensorsFP8Linear

    layers = []
    for fp8, scale in zip(weights.fp8, weights.scales, strict=True):
        layers.append(CompressedTensorsFP8Linear(weights.k, weights.n).to(weights.device))
        layers[-1].weight = nn.Parameter(fp8, requires_grad=False)
        layers[-1].weight_scale = nn.Parameter(scale.reshape(1, -1), requires_grad=False)
    return compiled(layers)  # not one graph with torch 2.11


def torchao(weights: Weights) -> Call:
    from torchao.quantization import Float8DynamicActivationFloat8WeightConfig, PerRow, quantize_

    layers = []
    for dense in weights.dense:
        layers.append(Layer(weights.n, weights.k, weights.device))
        layers[-1].linear.weight = nn.Parameter(dense, requires_grad=False)
        quantize_(layers[-1], Float8DynamicActivationFloat8WeightConfig(granularity=PerRow()))
    return compiled(layers, fullgraph=True)


def ways(weights: Weights) -> dict[str, Callable[[], Call]]:
    """By name, how to make what multiplies; making one may fail where what it needs is not there."""
    return {
        "bf16": lambda: lambda x, i: nn.functional.linear(x, weights.dense[i]),
        "ctfp8": lambda: ours(weights),
        "ctfp8, scaled_mm": lambda: ours(weights, library="scaled_mm"),
        "ctfp8, weight-only": lambda: ours(weights, library="triton"),
        "ctfp8, tensor": lambda: ours(weights, "tensor"),
        "ctfp8, block": lambda: ours(weights, "block"),
        "ctfp8, block, scaled_mm": lambda: ours(weights, "block", "scaled_mm"),
        "ctfp8, block, weight-only": lambda: ours(weights, "block", "triton"),
        "fbgemm alone": lambda: fbgemm(weights),
        "_scaled_mm alone": lambda: scaled_mm(weights),
        "transformers": lambda: transformers(weights),
        "torchao": lambda: torchao(weights),
    }


#: Whose values are other ones: its FP8 values have another scale.
OTHER_VALUES = ("ctfp8, tensor", "ctfp8, block", "ctfp8, block, scaled_mm", "ctfp8, block, weight-only")


@torch.no_grad()
def main() -> None:
    options = parser(__doc__)
    options.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=["8B", "70B"])
    options.add_argument("--rows", nargs="+", type=int, default=list(ROWS))
    options.add_argument("--ways", nargs="+", help="only these, by their names in the table")
    options.add_argument("--minutes", type=float, default=60.0, help="begin nothing after this long")
    args = options.parse_args()
    print(f"{ready(args.device)}\n", flush=True)
    dry, end = args.device == "cpu", time.monotonic() + args.minutes * 60
    failed: dict[str, str] = {}
    names: list[str] = []
    printed = False
    for model, (n, k) in [(name, shape) for name in (["dry"] if dry else args.shapes) for shape in SHAPES[name]]:
        weights = Weights(n, k, args.device)
        makers = ways(weights)
        if not printed:
            print(header(["model", "N × K", "M", "way", "µs", "× bf16", "weight GB/s", "TFLOP/s"]), flush=True)
            printed = True
        for m in args.rows[:2] if dry else args.rows:
            if time.monotonic() > end:
                failed[f"{model} {n} × {k}, M = {m}"] = "the time was up"
                continue
            x = torch.randn(m, k, device=args.device, dtype=torch.bfloat16)
            bf16 = 0.0
            for way, make in makers.items():
                if args.ways is not None and way not in args.ways:
                    continue
                torch._dynamo.reset()
                try:
                    call = make()
                    for i, dense in enumerate(weights.dense):
                        want = nn.functional.linear(x, dense).float()
                        error = ((call(x, i).float() - want).norm() / want.norm()).item()
                        assert way in OTHER_VALUES or error < 0.06, f"{way}: wrong by {error:.2f} at M = {m}"
                    time_of_one = seconds(
                        [lambda call=call, x=x, i=i: call(x, i) for i in range(weights.count)], args.device
                    )
                except Exception as reason:
                    if way.startswith("ctfp8"):
                        traceback.print_exc()
                    failed[way] = f"{type(reason).__name__}: {(str(reason) or ' ').splitlines()[0][:160]}"
                    continue
                bf16 = bf16 or time_of_one
                read = n * k * (2 if way == "bf16" else 1) / time_of_one / 1e9
                flops = 2 * m * n * k / time_of_one / 1e12
                cells = [f"{time_of_one * 1e6:.1f}", f"{bf16 / time_of_one:.2f}", f"{read:.0f}", f"{flops:.1f}"]
                print(row([model, f"{n} × {k}", m, way, *cells]), flush=True)
                if way.startswith("ctfp8"):
                    found = launched(lambda c=call, x=x: c(x, 0), args.device)
                    names.append(f"{n} × {k}, M = {m}, {way}: {'; '.join(found)}")
        del weights, makers
    for way, reason in failed.items():
        print(f"\n{way} did not run: {reason}")
    print("\nWhat ctfp8 launches, with microseconds (the profiler's):\n")
    print("\n".join(f"- {line}" for line in names))
    n, k = SHAPES["dry"][0]
    one = Weights(n, k, args.device).layers()[0]
    print(f"\n{kernels(one, torch.zeros(16, k, device=args.device, dtype=torch.bfloat16), device=args.device)}")
    sys.exit(any(way.startswith("ctfp8") for way in failed))


if __name__ == "__main__":
    main()
