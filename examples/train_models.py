"""Trains the two byte-level models in `examples/models` and writes them as FP8_DYNAMIC compressed-tensors checkpoints.

    python examples/train_models.py llama --minutes 20
    python examples/train_models.py moe --minutes 20

The text is what comes with Python: `pydoc_data/topics.py` and the docstrings of the standard library. Scales and FP8
values come from compressed-tensors' own functions.
"""

from __future__ import annotations

import argparse
import ast
import json
import math
import re
import shutil
import sysconfig
import tempfile
import time
from pathlib import Path

import torch
from compressed_tensors.quantization import QuantizationConfig, QuantizationStatus, preset_name_to_scheme
from compressed_tensors.quantization.lifecycle.forward import quantize
from compressed_tensors.quantization.utils import calculate_qparams
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import (
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

LENGTH, BATCH, PEAK_LR = 256, 8, 3e-3
END = 0  # byte 0 separates documents: bos, eos and pad
HELDOUT_EVERY, HELDOUT_BYTES = 20, 48_000


def corpus() -> tuple[list[str], list[str]]:
    """English prose from the standard library: `(training documents, held-out documents)`."""
    library = Path(sysconfig.get_paths()["stdlib"])
    documents: list[str] = []
    topics: dict[str, str] = {}
    exec((library / "pydoc_data" / "topics.py").read_text(), topics)
    documents += [re.sub(r"\n{3,}", "\n\n", text) for text in topics["topics"].values()]  # type: ignore[attr-defined]
    for file in sorted(library.rglob("*.py")):
        if {"test", "tests", "site-packages", "idlelib", "lib2to3", "encodings"} & set(file.parts):
            continue
        try:
            tree = ast.parse(file.read_text())
        except (SyntaxError, UnicodeDecodeError):
            continue
        for node in ast.walk(tree):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
                documents.append(ast.get_docstring(node) or "")
    documents = [d.strip() for d in dict.fromkeys(documents) if len(d) > 80 and d.isascii() and d.count(">>>") < 4]
    return ([d for i, d in enumerate(documents) if i % HELDOUT_EVERY],
            [d for i, d in enumerate(documents) if i % HELDOUT_EVERY == 0])  # fmt: skip


def encode(documents: list[str]) -> Tensor:
    """All documents as one row of bytes, each followed by `END`."""
    return torch.tensor(list("".join(d + chr(END) for d in documents).encode()), dtype=torch.uint8)


def build(kind: str) -> PreTrainedModel:
    torch.manual_seed(0)
    shared = dict(vocab_size=256, max_position_embeddings=512, bos_token_id=END, eos_token_id=END, pad_token_id=END,
                  rms_norm_eps=1e-5, head_dim=32)  # fmt: skip
    if kind == "llama":
        return LlamaForCausalLM(LlamaConfig(
            hidden_size=256, intermediate_size=640, num_hidden_layers=5, num_attention_heads=8, num_key_value_heads=4,
            tie_word_embeddings=False, **shared))  # fmt: skip
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(
        hidden_size=224, moe_intermediate_size=160, num_hidden_layers=4, num_attention_heads=7, num_key_value_heads=7,
        num_experts=6, num_experts_per_tok=2, norm_topk_prob=True, tie_word_embeddings=True, output_router_logits=True,
        router_aux_loss_coef=0.01, **shared))  # fmt: skip


def train(model: PreTrainedModel, data: Tensor, minutes: float) -> None:
    """AdamW with warm-up and a cosine to zero over the time budget."""
    decay = [p for p in model.parameters() if p.dim() > 1]
    rest = [p for p in model.parameters() if p.dim() <= 1]
    groups = [{"params": decay, "weight_decay": 0.05}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=PEAK_LR, betas=(0.9, 0.95))
    generator = torch.Generator().manual_seed(0)
    start, step, seen, shown = time.monotonic(), 0, 0, 0.0
    while (spent := (time.monotonic() - start) / (60 * minutes)) < 1:
        for group in optimizer.param_groups:
            group["lr"] = PEAK_LR * min(1, (step + 1) / 100) * 0.5 * (1 + math.cos(math.pi * spent))
        at = torch.randint(len(data) - LENGTH, (BATCH,), generator=generator)
        ids = torch.stack([data[i : i + LENGTH] for i in at]).long()
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step, seen = step + 1, seen + ids.numel()
        if spent - shown > 0.01:
            shown = spent
            print(f"{spent:4.0%}  step {step:5d}  {seen / 1e6:5.2f} M bytes  loss {loss.item():.3f}", flush=True)


@torch.no_grad()
def bits_per_byte(model: PreTrainedModel, data: Tensor) -> float:
    rows = data[: len(data) // LENGTH * LENGTH].view(-1, LENGTH).long()
    loss = sum(torch.nn.functional.cross_entropy(model(r[None]).logits[0, :-1].float(), r[1:]).item() for r in rows)
    return loss / len(rows) / math.log(2)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Token id = byte value."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    printable = [b for b in range(256) if chr(b) in alphabet]
    others = [b for b in range(256) if b not in printable]
    character = {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(others)}  # GPT-2's byte map
    tokenizer = Tokenizer(models.BPE(vocab={character[b]: b for b in range(256)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    end = character[END]
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=end, eos_token=end, pad_token=end,
                                   clean_up_tokenization_spaces=False)  # fmt: skip


def save_fp8(model: PreTrainedModel, folder: Path) -> None:
    """bf16 weights → FP8_DYNAMIC, in the names and dtypes llm-compressor writes."""
    scheme = preset_name_to_scheme("FP8_DYNAMIC", ["Linear"])
    with tempfile.TemporaryDirectory() as dense:
        model.to(torch.bfloat16).save_pretrained(dense)
        state = load_file(Path(dense) / "model.safetensors")
        config = json.loads((Path(dense) / "config.json").read_text())
    ignored = [n.removesuffix(".weight") for n in state if n.endswith((".gate.weight", "lm_head.weight"))]
    for name in [n for n in state if n.endswith("_proj.weight")]:
        weight = state[name]
        low, high = weight.amin(1, keepdim=True), weight.amax(1, keepdim=True)
        scale, zero = calculate_qparams(low, high, scheme.weights)
        state[name] = quantize(weight, scale, zero, scheme.weights, dtype=torch.float8_e4m3fn)
        state[name + "_scale"] = scale.to(torch.bfloat16)
    scheme.format = "float-quantized"
    quantization = QuantizationConfig(
        config_groups={"group_0": scheme},
        format="float-quantized",
        quantization_status=QuantizationStatus.COMPRESSED,
        ignore=list(dict.fromkeys([*ignored, "lm_head"])),
    )
    config["quantization_config"] = json.loads(quantization.model_dump_json())
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    save_file({k: v.contiguous() for k, v in state.items()}, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    GenerationConfig(bos_token_id=END, eos_token_id=END, pad_token_id=END).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=["llama", "moe"])
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "models")
    args = parser.parse_args()
    training, heldout = corpus()
    model = build(args.kind)
    parameters, size = sum(p.numel() for p in model.parameters()), sum(map(len, training))
    print(f"{args.kind}: {parameters / 1e6:.2f} M parameters, {size / 1e6:.2f} MB of text")
    train(model.train(), encode(training), args.minutes)
    model.eval()
    test = encode(heldout)[:HELDOUT_BYTES]
    print(f"held-out bits per byte, float32: {bits_per_byte(model, test):.3f}")
    print(f"held-out bits per byte, bfloat16: {bits_per_byte(model.to(torch.bfloat16), test):.3f}")
    save_fp8(model, args.out / args.kind)
    (args.out / "heldout.txt").write_bytes(bytes(test.tolist()))


if __name__ == "__main__":
    main()
