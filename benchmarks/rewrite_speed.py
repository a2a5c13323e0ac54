"""Time our passes take on the graph of a Llama of 10 to 80 layers (tiny width), and that it grows linearly.

    python benchmarks/rewrite_speed.py

The graph is what `torch.export` gives, the passes are those of the backend; tracing and code generation are not counted.
"""

from __future__ import annotations

import time

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from transformers import LlamaConfig, LlamaForCausalLM

import ctfp8_compile as ctfp8
from ctfp8_compile import passes

CONFIG = {
    "quant_method": "compressed-tensors",
    "ignore": ["lm_head"],
    "config_groups": {
        "group_0": {"targets": ["Linear"], "weights": {"num_bits": 8, "type": "float", "strategy": "channel"}}
    },
}


def model_of(layers: int) -> torch.nn.Module:
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=layers, num_attention_heads=2, dtype=torch.bfloat16
    )  # fmt: skip
    model = LlamaForCausalLM(config).bfloat16()
    state = dict(model.state_dict())
    for name in [n for n in state if n.endswith("_proj.weight")]:
        state[name] = state[name].to(torch.float8_e4m3fn)
        state[name + "_scale"] = torch.ones(state[name].shape[0], 1)
    return ctfp8.load_state_dict(model, state, CONFIG)


def seconds(layers: int) -> tuple[int, int, float]:
    """`(graph nodes, FP8 weights, best of three)` of the passes alone."""
    best = float("inf")
    for _ in range(3):
        with torch.no_grad():
            program = torch.export.export(
                model_of(layers), (torch.arange(8)[None],), {"use_cache": False}, strict=False
            )
            program = program.run_decompositions({})
        nodes = len(program.graph.nodes)
        start = time.perf_counter()
        report = passes.run(program.graph, ctfp8.Target("cpu"))
        program.graph_module.recompile()
        best = min(best, time.perf_counter() - start)
    return nodes, len(report.rewritten) + len(report.kept), best


def main() -> None:
    table = Table(title="rewriting a Llama graph")
    for column in ("layers", "nodes", "FP8 weights", "seconds", "ms per layer"):
        table.add_column(column, justify="right")
    for layers in track((10, 20, 40, 80), "rewriting", transient=True):
        nodes, weights, best = seconds(layers)
        table.add_row(str(layers), str(nodes), str(weights), f"{best:.2f}", f"{best / layers * 1e3:.1f}")
    Console().print(table)


if __name__ == "__main__":
    main()
