"""What users do with a transformers model every day, done to one with FP8 weights; and what is done wrongly with a cache."""

from __future__ import annotations

import shutil
import subprocess
import sys

import pytest
import torch
from conftest import DATA, IDS, logits, relative_error
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification, GenerationConfig, StaticCache

import ctfp8_compile as ctfp8
from ctfp8_compile.hf.compat import cache_argument

LLAMA = DATA / "llama/FP8_DYNAMIC"
PROMPT = IDS[:1, :10]


@pytest.fixture(scope="module")
def model():
    return ctfp8.from_pretrained(LLAMA)


def generate(model, ids, cache, **kwargs):
    return model.generate(
        ids, **{cache_argument(model): cache}, do_sample=False, attention_mask=torch.ones_like(ids), **kwargs
    )


def test_a_cache_used_past_its_end_is_a_sentence(model):
    cache = ctfp8.static_cache(model, 1, 12)
    assert isinstance(cache, StaticCache)
    assert generate(model, PROMPT, cache, max_new_tokens=3, min_new_tokens=3).shape == (1, 13)
    cache.reset()
    with pytest.raises(ctfp8.UsageError, match=r"has room for 12 tokens; it holds 12, and 1 more was given"):
        generate(model, PROMPT, cache, max_new_tokens=8, min_new_tokens=8)
    with pytest.raises(ctfp8.UsageError, match=r"has room for 12 tokens; it holds 0, and 20 more were given"):
        cache.reset() or model(IDS[:1], **{cache_argument(model): cache})


def test_a_cache_used_again_without_reset_is_a_sentence_and_a_conversation_is_not(model):
    cache = ctfp8.static_cache(model, 1, 64)
    first = generate(model, PROMPT, cache, max_new_tokens=4, min_new_tokens=4)
    with pytest.raises(ctfp8.UsageError, match=r"still holds 13 tokens of another text. Call cache.reset\(\)"):
        generate(model, PROMPT, cache, max_new_tokens=4)
    going_on = torch.cat([first, PROMPT], 1)  # the next turn of a conversation
    again = generate(model, going_on, cache, max_new_tokens=4, min_new_tokens=4)
    assert torch.equal(
        again, generate(model, going_on, ctfp8.static_cache(model, 1, 64), max_new_tokens=4, min_new_tokens=4)
    )
    cache.reset()
    assert torch.equal(generate(model, PROMPT, cache, max_new_tokens=4, min_new_tokens=4), first)


def test_a_cache_for_another_batch_is_a_sentence(model):
    cache = ctfp8.static_cache(model, 1, 64)
    with pytest.raises(ctfp8.UsageError, match=r"is for 1 sequence, and the input has 2"):
        generate(model, IDS[:, :10], cache, max_new_tokens=2)
    with pytest.raises(ctfp8.UsageError, match=r"has 3 \(with beams"):
        generate(model, PROMPT, cache, max_new_tokens=2, num_beams=3)


def test_padded_prompts_in_one_cache(model):
    mask = torch.ones_like(IDS)
    mask[1, :6] = 0
    cache = ctfp8.static_cache(model, 2, 64)
    out = [
        model.generate(IDS, attention_mask=mask, **{cache_argument(model): cache}, max_new_tokens=3)
        for _ in range(2)
        if cache.reset() is None
    ]
    assert torch.equal(*out)


def test_a_disk_offloaded_weight_is_a_sentence(tmp_path):
    with pytest.raises(ctfp8.UsageError, match=r"is to stay on disk .* which is not supported"):
        ctfp8.from_pretrained(
            LLAMA, device_map={"model.embed_tokens": "cpu", "model.layers": "disk", "model.norm": "cpu", "lm_head": "cpu",
                               "model.rotary_emb": "cpu"}, offload_folder=tmp_path,
        )  # fmt: skip


@pytest.mark.parametrize("device_map", ["cpu", "auto"])
def test_device_maps_of_one_device(model, device_map):
    torch.testing.assert_close(logits(ctfp8.from_pretrained(LLAMA, device_map=device_map)), logits(model))


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of transformers, about what peft asks it
@pytest.mark.long
def test_weights_of_an_adapted_model_have_their_names(model):
    peft = pytest.importorskip("peft")
    adapted = peft.get_peft_model(ctfp8.from_pretrained(LLAMA), peft.LoraConfig(target_modules=["q_proj"], r=2))
    report = ctfp8.explain(adapted, (), {"input_ids": PROMPT, "use_cache": False}, target="xpu")
    names = {e.name for e in (*report.rewritten, *report.kept)}
    assert "base_model.model.model.layers.0.mlp.up_proj.weight" in names
    assert not [name for name in names if "__dict__" in name]
    adapted.eval()
    ctfp8.compiled_reports()
    with torch.no_grad():
        torch.compile(adapted, backend="ctfp8")(input_ids=PROMPT, use_cache=False)
    assert not [e.name for r in ctfp8.compiled_reports() for e in r.rewritten if "__dict__" in e.name]


def test_only_a_process_without_fp8_weights_is_told_that_a_graph_has_none():
    code = (
        "import warnings, torch, ctfp8_compile as c\n"
        "def run():\n"
        "  with warnings.catch_warnings(record=True) as seen:\n"
        "    warnings.simplefilter('always'); torch._dynamo.reset()\n"
        "    torch.compile(torch.sin, backend='ctfp8')(torch.ones(3))\n"
        "  print(sum('holds no FP8 weight' in str(w.message) for w in seen))\n"
        f"model = c.from_pretrained({str(LLAMA)!r}); run(); del model\n"
        "import gc; gc.collect(); run()\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.stdout.split() == ["0", "1"], run.stderr


@pytest.mark.long
def test_continuous_batching_gives_the_same_tokens(model):
    prompts = [PROMPT[0, :n].tolist() for n in (10, 4, 7)]
    one_by_one = [
        model.generate(torch.tensor([p]), max_new_tokens=5, min_new_tokens=5, do_sample=False)[0, len(p) :].tolist()
        for p in prompts
    ]
    settings = GenerationConfig(max_new_tokens=5, do_sample=False, eos_token_id=-1, num_blocks=16, max_batch_tokens=32)
    out = ctfp8.from_pretrained(LLAMA).generate_batch(inputs=prompts, generation_config=settings)
    assert [answer.generated_tokens for answer in out.values()] == one_by_one


def test_attributes_of_the_config_are_taken_as_arguments(tmp_path):
    """As transformers takes them; and a classification head is loaded with the rest."""
    shutil.copytree(LLAMA, tmp_path / "head")
    tensors = load_file(LLAMA / "model.safetensors")
    hidden = tensors["model.norm.weight"].shape[0]
    tensors["score.weight"] = torch.randn(3, hidden, dtype=torch.bfloat16)
    save_file(tensors, tmp_path / "head" / "model.safetensors", {"format": "pt"})
    head = ctfp8.from_pretrained(tmp_path / "head", AutoModelForSequenceClassification, num_labels=3, use_cache=False)
    assert torch.equal(head.score.weight, tensors["score.weight"])
    assert head(PROMPT).logits.shape == (1, 3)
    assert head.config.use_cache is False
    with pytest.raises(ctfp8.CheckpointError, match="the model needs score.weight, but no tensor"):
        ctfp8.from_pretrained(LLAMA, AutoModelForSequenceClassification, num_labels=3)


@pytest.mark.long
def test_modes_of_torch_compile_on_a_cpu(model):
    mode = torch.compile(model, backend="ctfp8", mode="reduce-overhead")
    with torch.no_grad():
        assert relative_error(mode(IDS, use_cache=False).logits, logits(model)) < 0.02


def test_the_trainer_refuses_quantized_models_as_the_readme_says(model, tmp_path):
    from transformers import Trainer, TrainingArguments

    with pytest.raises(ValueError, match="purely quantized models"):
        Trainer(model, TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to=[]))


@pytest.mark.ci("qwen3moe/FP8_BLOCK")
@pytest.mark.long
@pytest.mark.parametrize("name", ["qwen3moe/FP8_DYNAMIC", "qwen3moe/FP8_BLOCK", "mixtral/FP8"])
@pytest.mark.filterwarnings(
    "ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"
)  # PEFT's use of transformers
def test_adapters_of_experts_train_and_are_saved_like_those_of_plain_weights(name, tmp_path):
    """PEFT's `target_parameters`: a parametrization on top of ours, for each forward pass."""
    ids = IDS[:1, :12]
    plain, fp8 = (
        ctfp8.from_pretrained(DATA / name, dtype=torch.float32, dequantize=dequantize) for dequantize in (True, False)
    )
    targets = [n for n, p in plain.named_parameters() if p.dim() == 3]
    assert len(targets) == 4
    found = []
    for model in (plain, fp8):
        torch.manual_seed(0)
        config = LoraConfig(r=2, target_modules=["q_proj"], target_parameters=targets, init_lora_weights=False)
        adapted = get_peft_model(model, config).train()
        optimizer = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], 0.1)
        losses = []
        for _ in range(3):
            optimizer.zero_grad()
            losses.append(adapted(ids, labels=ids).loss)
            losses[-1].backward()
            assert all(p.grad is not None and p.grad.abs().max() > 0 for p in adapted.parameters() if p.requires_grad)
            optimizer.step()
        adapted.eval()
        found.append(torch.stack([*losses, logits(adapted).double().norm().float()]))
    assert relative_error(found[1], found[0]) < 1e-5
    assert found[1][0] > found[1][2]
    adapted.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert len(saved) == 2 * (2 + len(targets))
    again = PeftModel.from_pretrained(ctfp8.from_pretrained(DATA / name, dtype=torch.float32), tmp_path).eval()
    assert torch.equal(logits(again), logits(adapted))
    with adapted.disable_adapter():
        assert torch.equal(logits(adapted), logits(ctfp8.from_pretrained(DATA / name, dtype=torch.float32)))
    assert relative_error(logits(torch.compile(again, backend="ctfp8")), logits(again)) < 1e-5


@pytest.mark.parametrize("more", [8, -8])
def test_embeddings_of_another_size(more, tmp_path):
    model = ctfp8.from_pretrained(LLAMA)
    before = logits(model, PROMPT)
    size = model.config.vocab_size
    model.resize_token_embeddings(size + more)
    after = logits(model, PROMPT)
    assert after.shape[-1] == size + more
    assert torch.equal(after[..., : size + min(more, 0)], before[..., : size + min(more, 0)])
    ctfp8.save_pretrained(model, tmp_path)
    assert torch.equal(logits(ctfp8.from_pretrained(tmp_path), PROMPT), after)
    model.tie_weights()
    assert torch.equal(logits(model, PROMPT), after)
