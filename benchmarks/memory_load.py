"""Peak anonymous memory of loading a ~1 GB FP8 MoE and running one forward pass, against transformers' own path.

    python benchmarks/memory_load.py [--gigabytes 1.0]

Writes a random Qwen3-MoE FP8_DYNAMIC checkpoint (one Linear per expert, as llm-compressor does) to a temporary folder,
then loads it in one fresh process per way and samples `RssAnon` every 2 ms. Anonymous memory is what counts: mapped file
pages can be dropped by the kernel at any time. The baseline after imports is subtracted.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

HIDDEN, INTERMEDIATE, EXPERTS, HEADS = 1024, 512, 32, 8
WAYS = ("ctfp8 eager", "ctfp8 compiled", "transformers")


def write_checkpoint(folder: Path, gigabytes: float) -> int:
    """Random FP8 values in the layout llm-compressor writes; returns the bytes of the file."""
    from safetensors.torch import save_file
    from transformers import Qwen3MoeConfig

    per_layer = EXPERTS * 3 * HIDDEN * INTERMEDIATE + 4 * HIDDEN * HIDDEN
    layers = max(1, round(gigabytes * 1e9 / per_layer))
    config = Qwen3MoeConfig(
        vocab_size=1024, hidden_size=HIDDEN, moe_intermediate_size=INTERMEDIATE, num_hidden_layers=layers,
        num_attention_heads=HEADS, num_key_value_heads=HEADS, head_dim=HIDDEN // HEADS, num_experts=EXPERTS,
        num_experts_per_tok=4, dtype=torch.bfloat16, tie_word_embeddings=False, architectures=["Qwen3MoeForCausalLM"],
    )  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    state: dict[str, torch.Tensor] = {}

    def fp8(name: str, rows: int, cols: int) -> None:
        codes = torch.randint(0, 120, (rows, cols), dtype=torch.uint8, generator=generator)
        state[f"{name}.weight"] = codes.view(torch.float8_e4m3fn)
        state[f"{name}.weight_scale"] = torch.full((rows, 1), 1e-4, dtype=torch.bfloat16)

    for i in range(layers):
        layer = f"model.layers.{i}"
        for which in "qkvo":
            fp8(f"{layer}.self_attn.{which}_proj", HIDDEN, HIDDEN)
        for e in range(EXPERTS):
            fp8(f"{layer}.mlp.experts.{e}.gate_proj", INTERMEDIATE, HIDDEN)
            fp8(f"{layer}.mlp.experts.{e}.up_proj", INTERMEDIATE, HIDDEN)
            fp8(f"{layer}.mlp.experts.{e}.down_proj", HIDDEN, INTERMEDIATE)
        state[f"{layer}.mlp.gate.weight"] = torch.randn(EXPERTS, HIDDEN, generator=generator).bfloat16()
        for which in ("self_attn.q_norm", "self_attn.k_norm"):
            state[f"{layer}.{which}.weight"] = torch.ones(HIDDEN // HEADS, dtype=torch.bfloat16)
        for which in ("input_layernorm", "post_attention_layernorm"):
            state[f"{layer}.{which}.weight"] = torch.ones(HIDDEN, dtype=torch.bfloat16)
    state["model.norm.weight"] = torch.ones(HIDDEN, dtype=torch.bfloat16)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        state[name] = torch.randn(1024, HIDDEN, generator=generator).bfloat16()
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    scheme = {
        "format": "float-quantized", "targets": ["Linear"],
        "weights": {"num_bits": 8, "type": "float", "strategy": "channel"},
        "input_activations": {"num_bits": 8, "type": "float", "strategy": "token", "dynamic": True},
    }  # fmt: skip
    quantization = {
        "quant_method": "compressed-tensors", "format": "float-quantized", "quantization_status": "compressed",
        "config_groups": {"group_0": scheme}, "ignore": ["lm_head", "re:.*mlp.gate$"], "kv_cache_scheme": None,
        "global_compression_ratio": None, "sparsity_config": {}, "transform_config": {}, "version": "0.19.0",
    }  # fmt: skip
    (folder / "config.json").write_text(
        json.dumps(config.to_dict() | {"quantization_config": quantization}, default=str)
    )
    return (folder / "model.safetensors").stat().st_size


def anonymous() -> int:
    """`RssAnon` of this process in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("this kernel does not report RssAnon")


def measure(way: str, folder: str) -> None:
    """Runs in a fresh process: prints the peaks of loading and of load + forward above the import baseline, in bytes."""
    from transformers import AutoModelForCausalLM

    import ctfp8_compile as ctfp8

    peak, stop = 0, threading.Event()

    def sample() -> None:
        nonlocal peak
        while not stop.is_set():
            peak = max(peak, anonymous())
            time.sleep(0.002)

    if way == "ctfp8 compiled":  # the compiler's own memory belongs to the baseline: compile something first
        torch.compile(torch.nn.Linear(8, 8), backend="inductor")(torch.randn(2, 8))
    base = anonymous()
    sampler = threading.Thread(target=sample, daemon=True)
    sampler.start()
    model = (AutoModelForCausalLM if way == "transformers" else ctfp8).from_pretrained(folder)
    loaded = peak
    forward = torch.compile(model.forward, backend="ctfp8") if way == "ctfp8 compiled" else model
    with torch.no_grad():
        forward(torch.arange(64)[None], use_cache=False)
    stop.set()
    sampler.join()
    print(json.dumps({"load": loaded - base, "peak": peak - base}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=1.0)
    parser.add_argument("--measure", nargs=2, metavar=("WAY", "FOLDER"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        measure(*args.measure)
        return
    console = Console()
    table = Table(title="peak anonymous memory / file size")
    for column in ("way", "load", "load + forward (64 tokens)"):
        table.add_column(column)
    with tempfile.TemporaryDirectory() as folder:
        with console.status("writing the checkpoint …"):
            size = write_checkpoint(Path(folder), args.gigabytes)
        for way in WAYS:
            with console.status(f"{way} …"):
                command = [sys.executable, __file__, "--measure", way, folder]
                out = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            result = json.loads(out.splitlines()[-1])
            table.add_row(way, f"{result['load'] / size:.2f}×", f"{result['peak'] / size:.2f}×")
    console.print(f"file: {size / 1e9:.2f} GB")
    console.print(table)


if __name__ == "__main__":
    main()
