"""FP8 weights in an nn.Module of your own, without transformers: quantize, load_state_dict, compile.

python examples/own_module.py
"""

from __future__ import annotations

import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import quantize
from compressed_tensors.quantization.utils import calculate_qparams
from torch import nn

import ctfp8_compile as ctfp8

WEIGHTS = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "channel"}
#: What llm-compressor writes into config.json for FP8_DYNAMIC; `head` stays as it is.
CONFIG = {
    "quant_method": "compressed-tensors",
    "format": "float-quantized",
    "ignore": ["head"],
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": WEIGHTS,
            "input_activations": {"num_bits": 8, "type": "float", "strategy": "token", "dynamic": True},
        }
    },
}


class Classifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.head = nn.Linear(512, 2048), nn.Linear(2048, 512), nn.Linear(512, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(x + self.down(nn.functional.gelu(self.up(x))))


def quantized(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The state dict with `up` and `down` in FP8, a scale per row beside each."""
    args, out = QuantizationArgs(**WEIGHTS), dict(state)
    for name in ("up", "down"):
        weight = state[f"{name}.weight"]
        scale, zero = calculate_qparams(weight.amin(1, keepdim=True), weight.amax(1, keepdim=True), args)
        out[f"{name}.weight"] = quantize(weight, scale, zero, args, dtype=torch.float8_e4m3fn)
        out[f"{name}.weight_scale"] = scale
    return out


@torch.no_grad()
def main() -> None:
    torch.manual_seed(0)
    plain = Classifier().eval()
    model = ctfp8.load_state_dict(Classifier(), quantized(plain.state_dict()), CONFIG)
    compiled = torch.compile(model, backend="ctfp8", fullgraph=True)
    x = torch.randn(4, 512)
    error = (compiled(x) - plain(x)).norm() / plain(x).norm()
    print(ctfp8.explain(model, (x,)))
    stored = {name: str(p.dtype).removeprefix("torch.") for name, p in model.named_parameters() if "weight" in name}
    print(f"parameters: {stored}")
    print(f"relative error against the float32 module: {error:.3f}")


if __name__ == "__main__":
    main()
