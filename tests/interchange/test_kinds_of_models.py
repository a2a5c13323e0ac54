"""Decoders of each kind in onnxruntime and OpenVINO: a padded batch at once, then in steps with the cache fed back.

What has been run by hand beyond these is the table in docs/export.md.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from support import architectures
from support.forge import forge
from support.runtimes import compiled, decoder, in_steps, session

import ctfp8_compile as ctfp8

#: `architecture`, its scheme, and what its config says otherwise.
KINDS = {
    "biases, odd groups of heads, a tied head": (
        "llama",
        "FP8_DYNAMIC",
        {
            "num_attention_heads": 6,
            "num_key_value_heads": 3,
            "head_dim": 24,
            "attention_bias": True,
            "mlp_bias": True,
            "tie_word_embeddings": True,
        },
    ),
    "sliding windows": ("mistral", "FP8_DYNAMIC", {"sliding_window": 4}),
    "layers of both kinds": (
        "gemma3",
        "FP8_DYNAMIC",
        {
            "sliding_window": 4,
            "num_hidden_layers": 3,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
    ),
    "latent attention": ("deepseek_v3", "FP8_BLOCK", {}),
    "experts with biases, interleaved": ("gpt_oss", "FP8_DYNAMIC", {"sliding_window": 4}),
    "q, k, v as one": ("phi3", "FP8", {}),
    "experts of one tensor": ("granitemoe_3d", "FP8_BLOCK", {}),
}


def _forged(kind, folder, monkeypatch):
    name, scheme, extra = KINDS[kind]
    architecture = architectures.ARCHITECTURES[name]

    def config(sizes):
        made = architecture.config(sizes)
        return type(made).from_dict(made.to_dict() | extra)

    monkeypatch.setitem(architectures.ARCHITECTURES, name, dataclasses.replace(architecture, config=config))
    return forge(name, scheme, folder, odd=True).folder


@pytest.mark.long
@pytest.mark.ci("sliding windows-.onnx", "latent attention-.xml")
@pytest.mark.parametrize("suffix", [".onnx", ".xml"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_kind_of_decoder(kind, suffix, tmp_path, monkeypatch):
    folder, path = _forged(kind, tmp_path / "ckpt", monkeypatch), tmp_path / f"m{suffix}"
    ctfp8.export(ctfp8.from_pretrained(folder), path=path)
    model = ctfp8.from_pretrained(folder, dtype=torch.float32)
    ids = np.arange(3, 33).reshape(2, 15)
    mask = np.ones_like(ids)
    mask[0, :4] = 0
    positions = torch.from_numpy(np.maximum(mask.cumsum(1) - 1, 0))
    with torch.no_grad():
        call = {"attention_mask": torch.from_numpy(mask), "position_ids": positions, "use_cache": False}
        want = model(torch.from_numpy(ids), **call).logits.numpy()
    run = decoder(path)
    for steps in ([15], [11, 1, 1, 1, 1], [3, 5, 1, 6]):
        assert np.abs(in_steps(run, ids, mask, steps) - want)[mask.astype(bool)].max() < 1e-4


@pytest.mark.long
@pytest.mark.ci("lfm2_moe")
@pytest.mark.parametrize("name", ["qwen3_5_moe", "lfm2_moe", "jamba", "nemotron_h"])
def test_a_state_that_is_no_cache_is_refused_and_one_call_works(name, tmp_path):
    forged = forge(name, "FP8_DYNAMIC", tmp_path / "ckpt", odd=True)
    model = ctfp8.from_pretrained(forged.folder)
    ids = torch.arange(3, 33).reshape(2, 15)
    with torch.no_grad():
        want = ctfp8.from_pretrained(forged.folder, dtype=torch.float32)(ids, use_cache=False).logits.numpy()
    for path in (tmp_path / "m.onnx", tmp_path / "m.xml"):
        with pytest.raises(ctfp8.UsageError, match=r"Export one call without a cache"):
            ctfp8.export(model, path=path)
        ctfp8.export(model, (ids,), {"use_cache": False}, path=path)
        feed = {"input_ids": ids.numpy()}
        got = session(path).run(["logits"], feed)[0] if path.suffix == ".onnx" else compiled(path)(feed)["logits"]
        assert np.abs(got - want).max() < 2e-4  # OpenVINO's recurrences differ by 1e-4 from ours
