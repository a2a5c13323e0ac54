"""Tiny checkpoints with layers for multi-token prediction, in the names that each architecture's published files have, FP8.

made = make_mtp("glm4_moe", "FP8_DYNAMIC", tmp_path)
made.folder        # the FP8 checkpoint
made.reference     # the same model in float32: what its FP8 weights and scales say, as numbers

The decoder layer of an MTP layer is one of the model's own class, so that its tensors get their names as those of the main
layers do: by undoing transformers' conversions. What is around it (two norms, a projection, a norm) is named here.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PretrainedConfig,
    PreTrainedModel,
    modeling_layers,
)
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import PrefixChange, revert_weight_conversion

SCHEMES = ("FP8_DYNAMIC", "fp8", "MXFP8")
needs_mtp = pytest.mark.skipif(not hasattr(modeling_layers, "MtpModel"), reason="from transformers 5.24 on")
VOCAB, HIDDEN, HEADS = 128, 64, 4
#: Not quantized by anybody: norms, tables, heads, routers, convolutions.
_PLAIN = re.compile(
    r"norm|embed|lm_head|shared_head|mlp\.gate\.|moe\.gate\.weight|conv|bias|audio|vis|A_log|dt_|query_key_value|w13"
)


def _behind(layer: int, name: str, depth: int, hidden_layers: int) -> str:
    return re.sub(r"layers\.\d+\.", f"layers.{hidden_layers + depth}.", name, count=1)


def _around(depth: int, hidden_layers: int) -> dict[str, str]:
    at = f"model.layers.{hidden_layers + depth}."
    return {"enorm": f"{at}enorm", "hnorm": f"{at}hnorm", "eh_proj": f"{at}eh_proj", "post": f"{at}shared_head.norm"}


def _mellum(layer: int, name: str, depth: int, hidden_layers: int) -> str:
    return re.sub(r"^model\.layers\.\d+\.", f"mtp.layers.{depth}.", name)


def _mellum_around(depth: int, hidden_layers: int) -> dict[str, str]:
    return {
        "enorm": "mtp.pre_fc_norm_embedding", "hnorm": "mtp.pre_fc_norm_hidden", "eh_proj": "mtp.fc", "post": "mtp.norm",
    }  # fmt: skip


def _inkling(layer: int, name: str, depth: int, hidden_layers: int) -> str:
    return re.sub(r"^model\.llm\.layers\.\d+\.", f"model.mtp.layers.{depth}.transformer_block.", name)


def _inkling_around(depth: int, hidden_layers: int) -> dict[str, str]:
    at = f"model.mtp.layers.{depth}."
    return {"enorm": f"{at}embed_norm", "hnorm": f"{at}hidden_norm", "eh_proj": f"{at}input_proj"}


@dataclass(frozen=True)
class MtpArchitecture:
    """`own` names a tensor of a decoder layer where an MTP layer has it, `around` what is around that layer."""

    config: Callable[[int], PretrainedConfig]
    auto_class: Any = AutoModelForCausalLM
    own: Callable[[int, str, int, int], str] = _behind
    around: Callable[[int, int], dict[str, str]] = _around
    most: int = 3


_SETTINGS = {
    "vocab_size": VOCAB, "hidden_size": HIDDEN, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": HEADS, "num_key_value_heads": 2, "max_position_embeddings": 128, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": None, "tie_word_embeddings": False, "moe_intermediate_size": 32,
}  # fmt: skip
_LATENT = {
    "q_lora_rank": 32, "kv_lora_rank": 32, "qk_rope_head_dim": 16, "qk_nope_head_dim": 16, "v_head_dim": 32,
    "num_key_value_heads": HEADS,
}  # fmt: skip
_ROUTED = {
    "n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "first_k_dense_replace": 1, "n_group": 1,
    "topk_group": 1,
}  # fmt: skip


def _of(model_type: str, **own: Any) -> Callable[[int], PretrainedConfig]:
    def config(layers: int) -> PretrainedConfig:
        return AutoConfig.for_model(model_type, **{**_SETTINGS, "num_nextn_predict_layers": layers, **own})

    return config


def _bailing_config(layers: int) -> PretrainedConfig:
    own = {
        "layer_group_size": 2, "head_dim": 16, "num_local_experts": 4, "mtp_layer_types": ["full_attention"] * layers,
        "mtp_mlp_layer_types": ["sparse"] * layers,
    }  # fmt: skip
    return _of("bailing_hybrid", **{**_LATENT, **_ROUTED, **own})(layers)


def _mellum_config(layers: int) -> PretrainedConfig:
    own = {
        "num_experts": 4, "num_experts_per_tok": 2, "head_dim": 16, "sliding_window": 8,
        "layer_types": ["full_attention", "sliding_attention"],
    }  # fmt: skip
    return AutoConfig.for_model("mellum", **{**_SETTINGS, "num_mtp_layers": layers, **own})


def _inkling_config(layers: int) -> PretrainedConfig:
    text = {
        **_SETTINGS, "head_dim": 16, "swa_num_attention_heads": HEADS, "swa_num_key_value_heads": 2, "swa_head_dim": 16,
        "sliding_window_size": 8, "d_rel": 4, "rel_extent": 32, "n_routed_experts": 4, "num_experts_per_tok": 2,
        "n_shared_experts": 1, "logits_mup_width_multiplier": 2.0, "layer_types": ["hybrid_sliding", "hybrid"],
        "mlp_layer_types": ["dense", "sparse"],
    }  # fmt: skip
    audio = {"n_mel_bins": 4, "mel_vocab_size": 8, "text_hidden_size": HIDDEN}
    vision = {
        "hidden_size": 32,
        "num_hidden_layers": 4,
        "num_attention_heads": 2,
        "patch_size": 2,
    }  # fewer layers: scipy
    mtp = {"num_nextn_predict_layers": layers, "chain_hidden_post_norm": True}
    return AutoConfig.for_model(
        "inkling_mm_model", text_config=text, audio_config=audio, vision_config=vision, mtp_config=mtp
    )


def _step_config(layers: int) -> PretrainedConfig:
    text = {
        **_SETTINGS, "head_dim": 16, "n_routed_experts": 4, "num_experts_per_tok": 2, "share_expert_dim": 32,
        "sliding_window": 8,
        "layer_types": ["full_attention"] * (2 + layers), "mlp_layer_types": ["dense", *["sparse"] * (1 + layers)],
        "num_nextn_predict_layers": layers,
    }  # fmt: skip
    vision = {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 56,
        "patch_size": 14,
    }  # fmt: skip
    return AutoConfig.for_model("step3p7", text_config=text, vision_config=vision)


MTP_ARCHITECTURES = {
    "deepseek_v3": MtpArchitecture(_of("deepseek_v3", **_LATENT, **_ROUTED)),
    "glm4_moe": MtpArchitecture(_of("glm4_moe", head_dim=16, use_qk_norm=True, **_ROUTED)),
    "sarvam_mla": MtpArchitecture(_of("sarvam_mla", **_LATENT, **_ROUTED)),
    "sarvam_moe": MtpArchitecture(_of("sarvam_moe", head_dim=16, **_ROUTED)),
    "bailing_hybrid": MtpArchitecture(_bailing_config),
    "mellum": MtpArchitecture(_mellum_config, own=_mellum, around=_mellum_around, most=1),
    "step3p7": MtpArchitecture(_step_config, AutoModelForImageTextToText),
    "inkling_mm_model": MtpArchitecture(_inkling_config, AutoModelForImageTextToText, _inkling, _inkling_around),
}


@dataclass(frozen=True)
class Made:
    """`names`: of the tensors of the MTP layers that are FP8, in the file."""

    folder: Path
    reference: Path
    auto_class: Any
    names: frozenset[str]


def make_mtp(name: str, scheme: str, folder: Path, layers: int = 1, seed: int = 0) -> Made:
    """Writes a model with `layers` MTP layers to `folder / "fp8"`, and what it says in float32 to `folder / "plain"`."""
    spec = MTP_ARCHITECTURES[name]
    config = spec.config(layers)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        state = _file_tensors(spec, config)
        state |= _mtp_tensors(spec, config, layers)
    mtp = {key for key in state if _is_mtp(key, config)}
    return write(state, config, scheme, folder, spec.auto_class, mtp)


def write(
    state: dict[str, Tensor], config: PretrainedConfig, scheme: str, folder: Path, auto_class: Any, mtp: set[str]
) -> Made:
    """Quantizes what is a linear's and writes both folders."""
    fp8: dict[str, Tensor] = {}
    plain: dict[str, Tensor] = {}
    names = set()
    for key, value in state.items():
        if value.dim() < 2 or _PLAIN.search(key) or not value.is_floating_point():
            fp8[key] = plain[key] = value.contiguous()
            continue
        stored, plain[key] = _QUANTIZE[scheme](key, value)
        fp8 |= stored
        names.add(key)
    said = {**_CONFIGS[scheme], **({} if scheme == "fp8" else {"ignore": ["lm_head"]})}
    for where, tensors, own in ((folder / "fp8", fp8, {"quantization_config": said}), (folder / "plain", plain, {})):
        where.mkdir(parents=True)
        save_file(
            {k: t.contiguous().clone() for k, t in tensors.items()}, where / "model.safetensors", {"format": "pt"}
        )
        written = {**config.to_dict(), "dtype": "float32", **own}
        written["architectures"] = [auto_class._model_mapping[type(config)].__name__]
        (where / "config.json").write_text(json.dumps(written))
    return Made(folder / "fp8", folder / "plain", auto_class, frozenset(names & mtp))


def _file_tensors(spec: MtpArchitecture, config: PretrainedConfig) -> dict[str, Tensor]:
    """A random model's tensors under the names that files have."""
    model: PreTrainedModel = spec.auto_class.from_config(copy.deepcopy(config), dtype=torch.float32)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if parameter.dim() >= 2:
                parameter.copy_(torch.randn(parameter.shape) * parameter.shape[-1] ** -0.5)
            elif not key.endswith(("A_log", "dt_bias")):
                parameter.add_(torch.randn(parameter.shape) * 0.1)
    conversions = get_model_conversion_mapping(model, add_legacy=False)
    model._weight_conversions = [c for c in conversions if not isinstance(c, PrefixChange)]
    return revert_weight_conversion(model, model.state_dict())


def _mtp_tensors(spec: MtpArchitecture, config: PretrainedConfig, layers: int) -> dict[str, Tensor]:
    """Those of decoder layers of the kind that MTP layers have, and what is around each."""
    text = config.get_mtp_config()
    donor = text if text.model_type == config.model_type else copy.deepcopy(config)
    if donor is not text:
        donor.text_config = text
    hidden_layers = config.get_text_config().num_hidden_layers
    out: dict[str, Tensor] = {}
    for key, value in _file_tensors(spec, donor).items():
        if (found := re.search(r"layers\.(\d+)\.", key)) and not re.search("audio|vis", key):
            out[spec.own(int(found[1]), key, int(found[1]), hidden_layers)] = value
    for depth in range(layers):
        for part, name in spec.around(depth, hidden_layers).items():
            shape = (HIDDEN, 2 * HIDDEN) if part == "eh_proj" else (HIDDEN,)
            noise = torch.randn(shape)
            out[f"{name}.weight"] = noise * 0.09 if part == "eh_proj" else 1 + 0.1 * noise
    if spec.around is _inkling_around:
        out["model.mtp.chain_norm.weight"] = 1 + 0.1 * torch.randn(HIDDEN)
    if spec.around is _around:  # as DeepSeek's files have them: copies that nothing reads
        out[f"model.layers.{hidden_layers}.embed_tokens.weight"] = torch.zeros(VOCAB, HIDDEN)
        out[f"model.layers.{hidden_layers}.shared_head.head.weight"] = torch.zeros(VOCAB, HIDDEN)
    return out


def _is_mtp(key: str, config: PretrainedConfig) -> bool:
    first = config.get_text_config().num_hidden_layers
    found = re.match(r"model\.layers\.(\d+)\.", key)
    return "mtp." in key or (found is not None and int(found[1]) >= first)


# --- quantization, written out: FP8 values and scales, and the float32 numbers they stand for ------------------------------------

_INVERSE = "weight_scale_inv"


def _channel(key: str, value: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    scale = (value.abs().amax(-1, keepdim=True) / 448).to(torch.bfloat16)
    stored = (value / scale.float()).clamp(-448, 448).to(torch.float8_e4m3fn)
    return {key: stored, key + "_scale": scale}, stored.float() * scale.float()


def _block(key: str, value: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    rows, columns = -(-value.shape[-2] // 32), -(-value.shape[-1] // 32)
    wide = torch.zeros(*value.shape[:-2], rows * 32, columns * 32)
    wide[..., : value.shape[-2], : value.shape[-1]] = value
    blocks = wide.unflatten(-1, (columns, 32)).unflatten(-3, (rows, 32)).abs().amax((-1, -3))
    scale = (blocks.clamp_min(1e-6) / 448).to(torch.bfloat16).float()
    spread = scale.repeat_interleave(32, -1).repeat_interleave(32, -2)[..., : value.shape[-2], : value.shape[-1]]
    stored = (value / spread).clamp(-448, 448).to(torch.float8_e4m3fn)
    return {key: stored, key + "_scale_inv": scale}, stored.float() * spread


def _mx(key: str, value: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    if value.shape[-1] % 32:
        return {key: value}, value
    groups = value.unflatten(-1, (-1, 32)).abs().amax(-1).clamp_min(1e-6)
    exponent = (groups / 448).log2().ceil()
    spread = exponent.exp2().repeat_interleave(32, -1)
    stored = (value / spread).clamp(-448, 448).to(torch.float8_e4m3fn)
    return {key: stored, key + "_scale": (exponent + 127).to(torch.uint8)}, stored.float() * spread


_QUANTIZE = {"FP8_DYNAMIC": _channel, "fp8": _block, "MXFP8": _mx}


def _groups(weights: dict[str, Any], inputs: dict[str, Any], format: str) -> dict[str, Any]:
    common = {"num_bits": 8, "type": "float", "symmetric": True}
    group = {"targets": ["Linear"], "weights": {**common, "dynamic": False, **weights}}
    return {
        "quant_method": "compressed-tensors", "format": format, "quantization_status": "compressed",
        "config_groups": {"group_0": {**group, "input_activations": {**common, "dynamic": True, **inputs}, "format": format}},
    }  # fmt: skip


_MX_ARGS = {"strategy": "group", "group_size": 32, "scale_dtype": "torch.uint8"}
_CONFIGS: dict[str, dict[str, Any]] = {
    "FP8_DYNAMIC": _groups({"strategy": "channel"}, {"strategy": "token"}, "float-quantized"),
    "fp8": {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [32, 32]},
    "MXFP8": _groups(_MX_ARGS, _MX_ARGS, "mxfp8-quantized"),
}
