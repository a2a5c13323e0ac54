"""Modules of our own that ask of a kernel what whole models rarely do."""

from __future__ import annotations

import torch
from conftest import fp8_config, quantize
from torch import Tensor, nn

import ctfp8_compile as ctfp8

K = 512
#: By scheme of llm-compressor's: strategy of the weights, of the activations.
SCHEMES = {
    "FP8_DYNAMIC": ("channel", "token"),
    "FP8": ("tensor", "tensor"),
    "FP8_BLOCK": ("block", "group"),
    "MXFP8": ("mx", "mx"),
}


class Views(nn.Module):
    """Activations that are not row-major."""

    def __init__(self) -> None:
        super().__init__()
        self.transposed = nn.Linear(K, 256, bias=False)
        self.sliced = nn.Linear(K, 256, bias=False)
        self.expanded = nn.Linear(K, 256, bias=False)
        self.swapped = nn.Linear(K, 256, bias=False)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """`x`: `[M, K]`."""
        rows = x.shape[0]
        return (
            self.transposed(x.reshape(K, rows).t()),
            self.sliced(torch.cat([x, x], 1)[:, 1 : K + 1]),
            self.expanded(x[:1].expand(rows, K)),
            self.swapped(x.reshape(rows, 1, K).expand(rows, 2, K).transpose(0, 1)),
        )


class Biased(nn.Module):
    """Two linears with one input and biases: they are fused, and so are the biases."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(K, 256)
        self.up = nn.Linear(K, 256)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.silu(self.gate(x)) * self.up(x)


class Wide(nn.Module):
    """More columns than one block of threads reduces at once."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Linear(14336, 256, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(nn.functional.silu(x.repeat(1, 28)) * 2)


MODULES = {"wide": Wide, "views": Views, "biased": Biased}


def own(name: str, scheme: str) -> nn.Module:
    """One of `MODULES` with FP8 weights."""
    torch.manual_seed(0)
    module = MODULES[name]().bfloat16()
    strategy, activation = SCHEMES[scheme]
    state: dict[str, Tensor] = {}
    for linear, parameter in module.named_parameters():
        if linear.endswith("weight"):
            state[linear], state[f"{linear}_scale"] = quantize(parameter.detach().float(), strategy)
            if activation == "tensor":
                state[linear.replace("weight", "input_scale")] = torch.tensor([0.02])
        else:
            state[linear] = parameter.detach()
    return ctfp8.load_state_dict(module, state, fp8_config(strategy, activation))
