"""A Llama of 8B parameters on a GPU, end to end with CUDA graphs: ctfp8 against bf16.

    python benchmarks/gpu_models.py [--device cuda] [--ways ctfp8 …]

Random weights, made on the device. Prefill of 2048 tokens, then 64 steps of one token, batch 1, static cache,
`torch.compile(mode="reduce-overhead")` for every way: milliseconds of the prefill and of a step (medians of 3 generations),
graphs and recompilations after the first generation, memory. `ctfp8, apart` is ctfp8 with
`ctfp8.horizontal_fusion` off: q, k, v and gate, up as matmuls of their own.
"""

from __future__ import annotations

import contextlib
import gc
import statistics
import time
from collections.abc import Iterator
from typing import Any

import torch
from gpu_linear import CONFIG
from gpu_timing import header, kernels, parser, ready, row
from transformers import LlamaConfig, LlamaForCausalLM

import ctfp8_compile as ctfp8
from ctfp8_compile.hf.compat import cache_argument

WAYS = ("bf16", "ctfp8", "ctfp8, apart")


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """What tensors have whose dtype nobody says."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def build(way: str, device: str, dry: bool) -> Any:
    """The model, with random weights, FP8 ones where the way asks for them."""
    sizes = (256, 512, 512, 2, 8, 4) if dry else (4096, 14336, 128256, 32, 32, 8)
    hidden, intermediate, vocabulary, layers, heads, kv_heads = sizes
    config = LlamaConfig(
        hidden_size=hidden, intermediate_size=intermediate, vocab_size=vocabulary, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=kv_heads, dtype=torch.bfloat16,
    )  # fmt: skip
    with torch.device(device), default_dtype(torch.bfloat16):  # made in float32, it would take twice the memory first
        model = LlamaForCausalLM(config).eval().requires_grad_(False)
    if way == "bf16":
        return model
    state = dict(model.state_dict())
    for name in [n for n in state if n.endswith("_proj.weight")]:
        fp8 = torch.randint(0, 256, state[name].shape, dtype=torch.uint8, device=device)
        fp8[fp8 & 0x7F >= 0x78] = 0  # no NaN, no huge values
        state[name] = fp8.view(torch.float8_e4m3fn)
        state[f"{name}_scale"] = torch.full((len(fp8), 1), 2e-4, device=device)
    return ctfp8.load_state_dict(model, state, {**CONFIG, "ignore": ["lm_head"]})


def generate(model: Any, forward: Any, prompt: int, tokens: int, device: str) -> tuple[float, float]:
    """One generation: seconds of the prefill, and of a step."""

    def wait() -> float:
        if device != "cpu":
            getattr(torch, device).synchronize()
        return time.perf_counter()

    cache = {cache_argument(model): ctfp8.static_cache(model, max_length=prompt + tokens)}
    ids = torch.arange(prompt, device=device)[None] % 256
    position = torch.arange(prompt, device=device)[None]
    times = []
    for step in range(tokens + 1):
        begin = wait()
        torch.compiler.cudagraph_mark_step_begin()
        logits = forward(ids, **cache, position_ids=position, logits_to_keep=1).logits
        ids = logits[:, -1:].argmax(-1).clone()
        times.append(wait() - begin)
        position = torch.full((1, 1), prompt + step, device=device)
    return times[0], statistics.median(times[1:])


@torch.no_grad()
def main() -> None:
    options = parser(__doc__)
    options.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    args = options.parse_args()
    print(f"{ready(args.device)}\n", flush=True)
    dry, device = args.device == "cpu", args.device
    prompt, tokens = (16, 4) if dry else (2048, 64)
    mode = "default" if dry else "reduce-overhead"
    columns = [f"prefill {prompt} ms", "a step ms", "graphs", "recompilations", "weights GB", "peak GB"]
    print(header(["way", *columns]), flush=True)
    first: tuple[float, float] | None = None
    what = ""
    for way in args.ways:
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        gc.collect()
        if device == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        model = build(way, device, dry)
        weights = sum(t.nbytes for t in {t.data_ptr(): t for t in (*model.parameters(), *model.buffers())}.values())
        if way == "bf16":
            forward = torch.compile(model.forward, mode=mode, fullgraph=True, dynamic=False)
        else:
            ours = {"ctfp8.horizontal_fusion": way == "ctfp8"}
            inductor = {} if dry else torch._inductor.list_mode_options(mode)
            forward = torch.compile(
                model.forward, backend="ctfp8", options={**inductor, **ours}, fullgraph=True, dynamic=False
            )
        generate(model, forward, prompt, tokens, device)
        graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        runs = [generate(model, forward, prompt, tokens, device) for _ in range(3)]
        again = torch._dynamo.utils.counters["stats"]["unique_graphs"] - graphs
        times = tuple(statistics.median(column) for column in zip(*runs, strict=True))
        first = first or times
        cells = [f"{t * 1e3:.2f} ({f / t:.2f}×)" for t, f in zip(times, first, strict=True)]
        peak = f"{torch.cuda.max_memory_allocated() / 1e9:.2f}" if device == "cuda" else "–"
        print(row([way, *cells, graphs, again, f"{weights / 1e9:.2f}", peak]), flush=True)
        if way == "ctfp8":
            ids = torch.zeros(1, 1, dtype=torch.int64, device=device)
            what = kernels(model, ids, device=device, use_cache=False)
        del model, forward
    print(f"\n{what}")


if __name__ == "__main__":
    main()
