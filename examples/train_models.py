"""Trains the byte-level models in `examples/models` and writes them as FP8_DYNAMIC compressed-tensors checkpoints.

    python examples/train_models.py llama --minutes 20
    python examples/train_models.py moe --minutes 20
    python examples/train_models.py mtp --minutes 20

`mtp` has a layer for multi-token prediction, trained together with the model as DeepSeek-V3 was (arXiv 2412.19437, section
2.2): it sees the model's hidden states and the next token, and learns the token after that.

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
from typing import Any

import torch
from compressed_tensors.quantization import QuantizationConfig, QuantizationStatus, preset_name_to_scheme
from compressed_tensors.quantization.lifecycle.forward import quantize
from compressed_tensors.quantization.utils import calculate_qparams
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor, nn
from transformers import (
    GenerationConfig,
    Glm4MoeConfig,
    Glm4MoeForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)
from transformers.modeling_layers import MtpModel

LENGTH, BATCH, PEAK_LR = 256, 8, 3e-3
END = 0  # byte 0 separates documents: bos, eos and pad
HELDOUT_EVERY, HELDOUT_BYTES = 20, 48_000
DRAFT_LOSS = 0.3  # its weight beside the model's own loss: DeepSeek-V3's
BALANCE = 1e-3  # what a router's bias changes by in a step


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
    if kind == "mtp":
        return Glm4MoeForCausalLM(Glm4MoeConfig(
            hidden_size=192, intermediate_size=384, moe_intermediate_size=128, num_hidden_layers=6, num_attention_heads=6,
            num_key_value_heads=3, use_qk_norm=True, n_routed_experts=4, num_experts_per_tok=2, n_shared_experts=1,
            first_k_dense_replace=5, n_group=1, topk_group=1, num_nextn_predict_layers=1, tie_word_embeddings=False,
            **shared))  # fmt: skip
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(
        hidden_size=224, moe_intermediate_size=160, num_hidden_layers=4, num_attention_heads=7, num_key_value_heads=7,
        num_experts=6, num_experts_per_tok=2, norm_topk_prob=True, tie_word_embeddings=True, output_router_logits=True,
        router_aux_loss_coef=0.01, **shared))  # fmt: skip


class Draft(nn.Module):
    """The model's layer for multi-token prediction.

    Attributes:
        layers: what transformers drafts with, on the model's embeddings and head.
        decoder: a model of one layer, that of `layers`: it initializes it, and names its tensors as a file does.
    """

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        self.decoder = type(model)(model.config.get_mtp_config())
        self.layers = MtpModel(model, 1)
        self.layers.layers[0].mtp_block = self.decoder.model.layers[0]

    def loss(self, hidden_states: Tensor, ids: Tensor) -> Tensor:
        """Of the token after next, from the model's hidden states `[rows, length, hidden]` and the next token."""
        positions = torch.arange(1, ids.shape[1])[None]
        hidden_states = self.layers.forward_layer(0, hidden_states[:, :-1], positions, None, input_ids=ids[:, 1:])
        logits = self.layers._project_to_logits(hidden_states[:, :-1])
        return nn.functional.cross_entropy(logits.flatten(0, 1).float(), ids[:, 2:].flatten())

    def tensors(self, number: int) -> dict[str, Tensor]:
        """As a file has them, the layer being `model.layers.{number}`."""
        layer = self.layers.layers[0]
        saved, _ = file_tensors(self.decoder)
        parts = {
            "enorm": layer.enorm,
            "hnorm": layer.hnorm,
            "eh_proj": layer.eh_proj,
            "shared_head.norm": layer.post_norm,
        }
        state = {n.removeprefix("model.layers.0."): v for n, v in saved.items() if n.startswith("model.layers.0.")}
        state |= {f"{name}.weight": part.weight.detach().to(torch.bfloat16) for name, part in parts.items()}
        return {f"model.layers.{number}.{name}": value for name, value in state.items()}


@torch.no_grad()
def balance(router: nn.Module, args: tuple[Tensor, ...], routed: tuple[Tensor, Tensor, Tensor]) -> None:
    """Has a sigmoid router choose the experts less that it chose more, without a loss (arXiv 2408.15664)."""
    if router.training:
        load = torch.bincount(routed[2].flatten(), minlength=router.num_experts).float()
        router.e_score_correction_bias += BALANCE * (load.mean() - load).sign()


def train(model: PreTrainedModel, draft: Draft | None, data: Tensor, minutes: float) -> None:
    """AdamW with warm-up and a cosine to zero over the time budget, which counts the time of one core."""
    learned = [*model.parameters(), *(draft.layers.layers.parameters() if draft else ())]
    decay = [p for p in learned if p.dim() > 1]
    rest = [p for p in learned if p.dim() <= 1]
    for module in (*model.modules(), *(draft.layers.modules() if draft else ())):
        if hasattr(module, "e_score_correction_bias"):
            module.register_forward_hook(balance)
    groups = [{"params": decay, "weight_decay": 0.05}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=PEAK_LR, betas=(0.9, 0.95))
    generator = torch.Generator().manual_seed(0)
    start, step, seen, shown = time.process_time(), 0, 0, 0.0
    while (spent := (time.process_time() - start) / (60 * minutes)) < 1:
        for group in optimizer.param_groups:
            group["lr"] = PEAK_LR * min(1, (step + 1) / 100) * 0.5 * (1 + math.cos(math.pi * spent))
        at = torch.randint(len(data) - LENGTH, (BATCH,), generator=generator)
        ids = torch.stack([data[i : i + LENGTH] for i in at]).long()
        with torch.autocast("cpu", torch.bfloat16, enabled=draft is None):  # matmuls this narrow are faster in float32
            out = model(input_ids=ids, labels=ids, use_cache=False, output_hidden_states=draft is not None)
            loss = out.loss
            ahead = draft.loss(out.hidden_states[-1], ids) if draft else torch.zeros(())
        (loss + DRAFT_LOSS * ahead).backward()
        nn.utils.clip_grad_norm_(learned, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step, seen = step + 1, seen + ids.numel()
        if spent - shown > 0.01:
            shown = spent
            print(
                f"{spent:4.0%}  step {step:5d}  {seen / 1e6:5.2f} M bytes  loss {loss.item():.3f}  {ahead.item():.3f}",
                flush=True,
            )


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


def file_tensors(model: PreTrainedModel) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """A model's tensors in bf16 under the names of a file, and its config. Corrections of a router's choice stay float32."""
    with tempfile.TemporaryDirectory() as dense:
        model.save_pretrained(dense)
        state = load_file(Path(dense) / "model.safetensors")
        config = json.loads((Path(dense) / "config.json").read_text())
    state = {n: v if n.endswith("e_score_correction_bias") else v.to(torch.bfloat16) for n, v in state.items()}
    return state, {**config, "dtype": "bfloat16"}


def save_fp8(model: PreTrainedModel, draft: Draft | None, folder: Path) -> None:
    """bf16 weights → FP8_DYNAMIC, in the names and dtypes llm-compressor writes."""
    scheme = preset_name_to_scheme("FP8_DYNAMIC", ["Linear"])
    state, config = file_tensors(model)
    if draft is not None:
        state |= draft.tensors(model.config.num_hidden_layers)
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
    parser.add_argument("kind", choices=["llama", "moe", "mtp"])
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "models")
    args = parser.parse_args()
    training, heldout = corpus()
    model = build(args.kind).train()
    draft = Draft(model).train() if args.kind == "mtp" else None
    parameters, size = sum(p.numel() for p in model.parameters()), sum(map(len, training))
    print(f"{args.kind}: {parameters / 1e6:.2f} M parameters, {size / 1e6:.2f} MB of text")
    train(model, draft, encode(training), args.minutes)
    model.eval()
    test = encode(heldout)[:HELDOUT_BYTES]
    print(f"held-out bits per byte, float32: {bits_per_byte(model, test):.3f}")
    save_fp8(model, draft, args.out / args.kind)
    print(f"held-out bits per byte, bfloat16: {bits_per_byte(model.to(torch.bfloat16), test):.3f}")
    (args.out / "heldout.txt").write_bytes(bytes(test.tolist()))


if __name__ == "__main__":
    main()
