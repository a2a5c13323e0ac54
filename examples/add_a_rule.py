"""A rule of your own: FP8 weights on the left of a matmul, `matmul(W, x)`, which the built-in rules leave dequantized.

python examples/add_a_rule.py            # explained in docs/writing-a-rule.md
"""

from __future__ import annotations

import torch
from torch import nn

import ctfp8_compile as ctfp8
from ctfp8_compile.graph import trace_weight
from ctfp8_compile.passes import Match, Rule, View, register

aten = torch.ops.aten


class WeightOnTheLeft(Rule):
    """`matmul(W, x)` with `x` `[..., K, T]` is `linear(x.mT, W).mT`."""

    name = "weight on the left"
    roots = (aten.matmul.default, aten.bmm.default, aten.mm.default)

    def pattern(self, node):
        weight = trace_weight(node.args[0])
        if weight is None or weight.transposed or weight.expert_ids is not None:
            return None
        turned = [View("transpose", (-2, -1))]
        return Match.of(node, "linear", node.args[1], weight, x_views=turned, out_views=turned)


class Channels(nn.Module):
    """Mixes the channels of a signal `[batch, channels, time]`: its weight is on the left."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(256, 128, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.mix.weight @ x


def model() -> nn.Module:
    torch.manual_seed(0)
    weight = torch.randn(128, 256)
    scale = weight.abs().amax(1, keepdim=True) / 448
    weights = {"num_bits": 8, "type": "float", "strategy": "channel"}
    config = {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
    }
    state = {"mix.weight": (weight / scale).to(torch.float8_e4m3fn), "mix.weight_scale": scale}
    return ctfp8.load_state_dict(Channels(), state, config)


@torch.no_grad()
def main() -> None:
    module, x = model(), torch.randn(2, 256, 50)
    print("before:", ctfp8.explain(module, (x,)).summary())
    register(WeightOnTheLeft())
    print("after: ", ctfp8.explain(module, (x,)).summary())
    got = torch.compile(module, backend="ctfp8", fullgraph=True)(x)
    print(f"relative error against the dequantized module: {(got - module(x)).norm() / module(x).norm():.1e}")


if __name__ == "__main__":
    main()
