"""Seconds, peak anonymous memory and file size of exporting a 1.1B-parameter FP8 Llama.

    python benchmarks/export_memory.py [--target cpu] [--layers 22]

Writes a random Llama FP8_DYNAMIC checkpoint (TinyLlama's shapes) to a temporary folder, then loads and exports it in a
fresh process, with batch and sequence dynamic, and samples `RssAnon` every 2 ms. The baseline after imports is subtracted;
mapped file pages do not count, because the kernel can drop them at any time.
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
from memory_load import anonymous
from rich.console import Console
from rich.table import Table

HIDDEN, INTERMEDIATE, VOCABULARY, HEADS, KV_HEADS = 2048, 5632, 32000, 32, 4


def write_checkpoint(folder: Path, layers: int) -> int:
    """Random FP8 values in the layout llm-compressor writes; returns the bytes of the FP8 weights."""
    from safetensors.torch import save_file
    from transformers import LlamaConfig

    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=HIDDEN, intermediate_size=INTERMEDIATE, num_hidden_layers=layers,
        num_attention_heads=HEADS, num_key_value_heads=KV_HEADS, dtype=torch.bfloat16, tie_word_embeddings=False,
        architectures=["LlamaForCausalLM"],
    )  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    state: dict[str, torch.Tensor] = {}
    kv = HIDDEN // HEADS * KV_HEADS
    shapes = {"self_attn.q_proj": (HIDDEN, HIDDEN), "self_attn.k_proj": (kv, HIDDEN), "self_attn.v_proj": (kv, HIDDEN),
              "self_attn.o_proj": (HIDDEN, HIDDEN), "mlp.gate_proj": (INTERMEDIATE, HIDDEN),
              "mlp.up_proj": (INTERMEDIATE, HIDDEN), "mlp.down_proj": (HIDDEN, INTERMEDIATE)}  # fmt: skip
    fp8_bytes = 0
    for i in range(layers):
        for name, (rows, cols) in shapes.items():
            codes = torch.randint(0, 120, (rows, cols), dtype=torch.uint8, generator=generator)
            state[f"model.layers.{i}.{name}.weight"] = codes.view(torch.float8_e4m3fn)
            state[f"model.layers.{i}.{name}.weight_scale"] = torch.full((rows, 1), 1e-4, dtype=torch.bfloat16)
            fp8_bytes += rows * cols
        for which in ("input_layernorm", "post_attention_layernorm"):
            state[f"model.layers.{i}.{which}.weight"] = torch.ones(HIDDEN, dtype=torch.bfloat16)
    state["model.norm.weight"] = torch.ones(HIDDEN, dtype=torch.bfloat16)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        state[name] = torch.randn(VOCABULARY, HIDDEN, generator=generator).bfloat16()
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    scheme = {
        "targets": ["Linear"], "weights": {"num_bits": 8, "type": "float", "strategy": "channel"},
        "input_activations": {"num_bits": 8, "type": "float", "strategy": "token", "dynamic": True},
    }  # fmt: skip
    quantization = {
        "quant_method": "compressed-tensors", "format": "float-quantized", "quantization_status": "compressed",
        "config_groups": {"group_0": scheme}, "ignore": ["lm_head"],
    }  # fmt: skip
    (folder / "config.json").write_text(
        json.dumps(config.to_dict() | {"quantization_config": quantization}, default=str)
    )
    return fp8_bytes


def measure(folder: str, target: str) -> None:
    """Runs in a fresh process: prints seconds and bytes."""
    import transformers.models.llama.modeling_llama
    from torch.export import Dim

    import ctfp8_compile as ctfp8
    import ctfp8_compile.export  # its imports belong to the baseline

    peak, stop = 0, threading.Event()

    def sample() -> None:
        nonlocal peak
        while not stop.is_set():
            peak = max(peak, anonymous())
            time.sleep(0.002)

    base = anonymous()
    sampler = threading.Thread(target=sample, daemon=True)
    sampler.start()
    model = ctfp8.from_pretrained(folder)
    loaded = peak
    path = Path(folder) / "model.pt2"
    start = time.perf_counter()
    report = ctfp8.export(
        model, (torch.arange(32).reshape(2, 16),), {"use_cache": False}, path=path, target=target,
        dynamic_shapes={"input_ids": {0: Dim("batch"), 1: Dim("sequence")}, "use_cache": None},
    )  # fmt: skip
    seconds = time.perf_counter() - start
    stop.set()
    sampler.join()
    result = {"seconds": seconds, "loaded": loaded - base, "peak": peak - base, "file": path.stat().st_size}
    print(json.dumps(result | {"report": report.summary(), "transformers": transformers.__version__}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", default="cpu")
    parser.add_argument("--layers", type=int, default=22)
    parser.add_argument("--measure", nargs=2, metavar=("FOLDER", "TARGET"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        measure(*args.measure)
        return
    console = Console()
    table = Table(title=f"exporting a Llama of {args.layers} layers for {args.target}")
    for column in ("export", "peak / FP8 bytes", "of which loading", "file / checkpoint"):
        table.add_column(column)
    with tempfile.TemporaryDirectory() as folder:
        with console.status("writing the checkpoint …"):
            fp8 = write_checkpoint(Path(folder), args.layers)
        checkpoint = (Path(folder) / "model.safetensors").stat().st_size
        with console.status("loading and exporting …"):
            command = [sys.executable, __file__, "--measure", folder, args.target]
            out = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        result = json.loads(out.splitlines()[-1])
    table.add_row(
        f"{result['seconds']:.0f} s",
        f"{result['peak'] / fp8:.2f}×",
        f"{result['loaded'] / fp8:.2f}×",
        f"{result['file'] / checkpoint:.4f}×",
    )
    console.print(f"FP8 weights {fp8 / 1e9:.2f} GB, checkpoint {checkpoint / 1e9:.2f} GB; {result['report']}")
    console.print(table)


if __name__ == "__main__":
    main()
