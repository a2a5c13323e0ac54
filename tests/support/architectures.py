"""Tiny configurations of the model architectures that `forge` writes checkpoints for, and how each lays its experts out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSequenceClassification,
    PretrainedConfig,
)
from transformers.modeling_outputs import MoeCausalLMOutputWithPast

if transformers.__version__ == "5.24.0":
    # There every Llama 4 raises, unquantized too: the model reads its text model's `image_outputs`, which has none.
    MoeCausalLMOutputWithPast.image_outputs = None

SCHEMES = ("FP8_DYNAMIC", "FP8", "FP8_BLOCK", "W8A16")
#: Tried for each architecture beside the schemes that llm-compressor writes to `float-quantized` files: MXFP8, and 128×128 blocks in
#: the words of `fp8` files (DeepSeek, Qwen).
FORMATS = ("fp8", "MXFP8")
#: transformers cannot trace these with images: their vision tower splits a tensor by its own values
UNTRACEABLE = {"qwen2_vl", "qwen3_vl_moe"}
VOCAB, HEADS, KV_HEADS, EXPERTS = 256, 4, 2, 4
IMAGE_TOKEN, VISION_START, VISION_END, VIDEO_TOKEN = 250, 251, 252, 253


@dataclass(frozen=True)
class Sizes:
    """The widths that decide how weights fall on 128×128 blocks; by default whole ones, several each way."""

    hidden: int = 256
    intermediate: int = 384
    expert: int = 256


#: Every weight ends in a partial block in both directions, and gate/up halves do not end on a block.
ODD = Sizes(hidden=144, intermediate=208, expert=176)
#: MXFP8 has no partial groups of 32.
MXFP8_ODD = Sizes(hidden=160, intermediate=224, expert=96)


@dataclass(frozen=True)
class Experts:
    """How an architecture's model fuses its experts, and what the file calls the parts.

    In the model `gate_up_proj` is `[E, 2I, H]`, or `[E, H, 2I]` if `transposed`; gate and up are its halves, or its
    even and odd rows if `interleaved`. Ungated experts have `up_proj` alone. In the file each expert is Linears named
    `names`; if `whole`, it is instead one three-dimensional tensor for all experts under each of `whole`'s two names.
    """

    transposed: bool = False
    interleaved: bool = False
    gated: bool = True
    names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
    whole: tuple[str, str] | None = None


Inputs = dict[str, Tensor]


def _text(config: PretrainedConfig) -> Inputs:
    return {"input_ids": torch.arange(5, 37).mul(7).remainder(VOCAB - 16).add(3).reshape(2, 16)}


def _qwen_image(config: PretrainedConfig) -> Inputs:
    """One image of 4×4 patches, which the 2×2 merger makes four tokens, then text."""
    vision = config.vision_config
    width = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    ids = torch.tensor([[VISION_START, *[IMAGE_TOKEN] * 4, VISION_END, *range(20, 30)]])
    return {
        "input_ids": ids,
        "mm_token_type_ids": (ids == IMAGE_TOKEN).int(),
        "pixel_values": torch.linspace(-1, 1, 16 * width).sin().mul(2).reshape(16, width),
        "image_grid_thw": torch.tensor([[1, 4, 4]]),
    }


def _llava_image(config: PretrainedConfig) -> Inputs:
    """One image of 2×2 patches; CLIP's class token is dropped."""
    ids = torch.tensor([[5, *[IMAGE_TOKEN] * 4, *range(20, 31)]])
    return {"input_ids": ids, "pixel_values": torch.linspace(-1, 1, 3 * 16 * 16).sin().reshape(1, 3, 16, 16)}


@dataclass(frozen=True)
class Architecture:
    """What `forge` needs to know of a architecture. `ignore` is the recipe's list, as llm-compressor's examples give it."""

    config: Callable[[Sizes], PretrainedConfig]
    auto_class: type = AutoModelForCausalLM
    experts: Experts | None = None
    ignore: tuple[str, ...] = ("lm_head",)
    inputs: Callable[[PretrainedConfig], Inputs] = _text
    schemes: tuple[str, ...] = SCHEMES
    odd: Sizes = ODD


def _settings(s: Sizes) -> dict[str, Any]:
    return {
        "vocab_size": VOCAB, "hidden_size": s.hidden, "intermediate_size": s.intermediate, "num_hidden_layers": 2,
        "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS, "max_position_embeddings": 128,
        "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": False,
    }  # fmt: skip


def _model(model_type: str, **extra: Any) -> Callable[[Sizes], PretrainedConfig]:
    """`extra` may hold functions of the sizes."""

    def config(s: Sizes) -> PretrainedConfig:
        own = {key: value(s) if callable(value) else value for key, value in extra.items()}
        return AutoConfig.for_model(model_type, **{**_settings(s), **own})

    return config


def _expert_width(s: Sizes) -> int:
    return s.expert


def _moe(model_type: str, **extra: Any) -> Callable[[Sizes], PretrainedConfig]:
    """Architectures that have both an `intermediate_size` and a `moe_intermediate_size`."""
    own = {"num_experts": EXPERTS, "num_experts_per_tok": 2, "moe_intermediate_size": _expert_width}
    return _model(model_type, **{**own, **extra})


def _local_moe(model_type: str, **extra: Any) -> Callable[[Sizes], PretrainedConfig]:
    """Architectures whose `intermediate_size` is the experts'."""
    own = {"num_local_experts": EXPERTS, "num_experts_per_tok": 2, "intermediate_size": _expert_width}
    return _model(model_type, **{**own, **extra})


#: DeepSeek's: a dense first layer, a shared expert, grouped sigmoid routing, latent attention with its own widths.
_DEEPSEEK = {
    "n_routed_experts": EXPERTS, "n_shared_experts": 1, "first_k_dense_replace": 1, "n_group": 2, "topk_group": 1,
    "q_lora_rank": 48, "kv_lora_rank": 40, "qk_rope_head_dim": 16, "qk_nope_head_dim": 24, "v_head_dim": 32,
    "num_key_value_heads": HEADS,
}  # fmt: skip
#: One linear-attention layer and one of full attention.
_HYBRID = {
    "head_dim": 32, "linear_key_head_dim": 16, "linear_value_head_dim": 16, "linear_num_key_heads": 2,
    "linear_num_value_heads": 4, "layer_types": ["linear_attention", "full_attention"],
    "shared_expert_intermediate_size": _expert_width,
}  # fmt: skip
#: Mamba in layer 0, attention and experts in layer 1.
_JAMBA = {
    "num_experts": EXPERTS, "attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2,
    "expert_layer_offset": 1, "mamba_d_state": 8, "mamba_dt_rank": 16,
}  # fmt: skip
#: One layer each of Mamba 2, experts (without a gate) and attention.
_NEMOTRON = {
    "head_dim": 32, "n_routed_experts": EXPERTS, "moe_shared_expert_intermediate_size": _expert_width,
    "layers_block_type": ["mamba", "moe", "attention"], "num_hidden_layers": 3, "mamba_num_heads": 4,
    "mamba_head_dim": 32, "ssm_state_size": 16, "n_groups": 2, "chunk_size": 16,
}  # fmt: skip
_QWEN_TOKENS = {
    "image_token_id": IMAGE_TOKEN, "video_token_id": VIDEO_TOKEN, "vision_start_token_id": VISION_START,
    "vision_end_token_id": VISION_END, "tie_word_embeddings": False,
}  # fmt: skip


def _qwen2_vl(s: Sizes) -> PretrainedConfig:
    vision = {"depth": 1, "embed_dim": 32, "num_heads": 2, "hidden_size": s.hidden, "patch_size": 4, "mlp_ratio": 2}
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [s.hidden // HEADS // 2 - 8, 4, 4]}
    text = {**_settings(s), "rope_parameters": rope}
    return AutoConfig.for_model("qwen2_vl", text_config=text, vision_config=vision, **_QWEN_TOKENS)


def _qwen3_vl_moe(s: Sizes) -> PretrainedConfig:
    vision = {
        "depth": 1, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "patch_size": 4,
        "out_hidden_size": s.hidden, "num_position_embeddings": 16, "deepstack_visual_indexes": [0],
    }  # fmt: skip
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [8, 4, 4], "mrope_interleaved": True}
    own = {"head_dim": 32, "num_experts": EXPERTS, "num_experts_per_tok": 2, "moe_intermediate_size": s.expert}
    text = {**_settings(s), **own, "rope_parameters": rope}
    return AutoConfig.for_model("qwen3_vl_moe", text_config=text, vision_config=vision, **_QWEN_TOKENS)


def _llava(s: Sizes) -> PretrainedConfig:
    vision = {
        "model_type": "clip_vision_model", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 2, "image_size": 16, "patch_size": 8, "projection_dim": 32,
    }  # fmt: skip
    text = {"model_type": "llama", **_settings(s)}
    return AutoConfig.for_model("llava", text_config=text, vision_config=vision, image_token_index=IMAGE_TOKEN,
                                image_seq_length=4, tie_word_embeddings=False)  # fmt: skip


def _llama4(s: Sizes) -> PretrainedConfig:
    vision = {
        "hidden_size": 32, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 2,
        "image_size": 16, "patch_size": 8, "vision_output_dim": 32, "projector_input_dim": 32,
        "projector_output_dim": 32,
    }  # fmt: skip
    # Layer 1 has experts and a shared expert, layer 0 is dense.
    own = {"head_dim": 32, "num_local_experts": EXPERTS, "intermediate_size": s.expert, "moe_layers": [1],
           "intermediate_size_mlp": s.intermediate, "attention_chunk_size": 64}  # fmt: skip
    return AutoConfig.for_model("llama4", text_config={**_settings(s), **own}, vision_config=vision,
                                image_token_index=IMAGE_TOKEN, boi_token_index=VISION_START,
                                eoi_token_index=VISION_END, tie_word_embeddings=False)  # fmt: skip


_GATES = (r"re:.*mlp\.gate$", r"re:.*block_sparse_moe\.gate$", r"re:.*shared_expert_gate$")
_ROUTERS = ("lm_head", "re:.*router.*", *_GATES)
_VISION = ("re:.*lm_head", r"re:.*visual\..*", "re:.*vision_tower.*", "re:.*multi_modal_projector.*")
_LLAMA4 = ("re:.*lm_head", "re:.*self_attn", "re:.*router", "re:.*vision_model.*", "re:.*multi_modal_projector.*")
_IMAGES = AutoModelForImageTextToText
_head_dim = {"head_dim": 32}
_grouped = {"n_routed_experts": EXPERTS, "n_shared_experts": 1, "first_k_dense_replace": 1, **_head_dim}

ARCHITECTURES: dict[str, Architecture] = {
    "llama": Architecture(_model("llama")),
    "mistral": Architecture(_model("mistral", **_head_dim)),
    "qwen2": Architecture(_model("qwen2")),
    "qwen3": Architecture(_model("qwen3", **_head_dim)),
    # The published checkpoints tie lm_head to the embedding.
    "gemma3": Architecture(_model("gemma3_text", **_head_dim, tie_word_embeddings=True)),
    "phi3": Architecture(_model("phi3")),
    "bert": Architecture(_model("bert", num_labels=7), AutoModelForSequenceClassification, ignore=("classifier",)),
    "mixtral": Architecture(_local_moe("mixtral"), experts=Experts(), ignore=_ROUTERS),
    # What llm-compressor wrote while it was for transformers 4, where the experts were Linears of these names.
    "mixtral_w123": Architecture(_local_moe("mixtral"), experts=Experts(names=("w1", "w3", "w2")), ignore=_ROUTERS),
    "qwen2_moe": Architecture(
        _moe("qwen2_moe", shared_expert_intermediate_size=_expert_width), experts=Experts(), ignore=_ROUTERS
    ),
    "qwen3_moe": Architecture(_moe("qwen3_moe", **_head_dim), experts=Experts(), ignore=_ROUTERS),
    "olmoe": Architecture(_moe("olmoe", intermediate_size=_expert_width), experts=Experts(), ignore=_ROUTERS),
    "deepseek_v3": Architecture(_moe("deepseek_v3", **_DEEPSEEK), experts=Experts(), ignore=_ROUTERS),
    "glm4_moe": Architecture(_moe("glm4_moe", **_grouped), experts=Experts(), ignore=_ROUTERS),
    "granitemoe": Architecture(_local_moe("granitemoe"), experts=Experts(), ignore=_ROUTERS),
    # What llm-compressor wrote while it was for transformers 4. It could not give a per-tensor scale three dimensions.
    "granitemoe_3d": Architecture(
        _local_moe("granitemoe"),
        experts=Experts(whole=("input_linear", "output_linear")),
        ignore=_ROUTERS,
        schemes=("FP8_DYNAMIC", "FP8_BLOCK", "W8A16"),
        odd=Sizes(hidden=128, intermediate=208, expert=192),  # an expert's rows must be whole blocks, columns need not
    ),
    "gpt_oss": Architecture(
        _local_moe("gpt_oss", **_head_dim), experts=Experts(transposed=True, interleaved=True), ignore=_ROUTERS
    ),
    "llama4": Architecture(_llama4, _IMAGES, Experts(transposed=True), _LLAMA4),
    "phimoe": Architecture(_local_moe("phimoe"), experts=Experts(), ignore=_ROUTERS),
    "jamba": Architecture(_model("jamba", **_JAMBA), experts=Experts(), ignore=_ROUTERS),
    "nemotron_h": Architecture(
        _moe("nemotron_h", **_NEMOTRON), experts=Experts(gated=False), ignore=(*_ROUTERS, r"re:.*mixer\.gate$")
    ),
    "minimax_m2": Architecture(_local_moe("minimax_m2", **_head_dim), experts=Experts(), ignore=_ROUTERS),
    "ernie4_5_moe": Architecture(
        _moe("ernie4_5_moe", moe_num_experts=EXPERTS, moe_k=2, moe_num_shared_experts=1),
        experts=Experts(),
        ignore=_ROUTERS,
    ),
    # A short convolution in layer 0, which is dense; attention and experts in layer 1.
    "lfm2_moe": Architecture(
        _moe("lfm2_moe", num_dense_layers=1, layer_types=["conv", "full_attention"]),
        experts=Experts(),
        ignore=(*_ROUTERS, r"re:.*feed_forward\.gate$"),
    ),
    "qwen3_5_moe": Architecture(_moe("qwen3_5_moe_text", **_HYBRID), experts=Experts(), ignore=_ROUTERS),
    "qwen2_vl": Architecture(_qwen2_vl, _IMAGES, ignore=_VISION, inputs=_qwen_image),
    "qwen3_vl_moe": Architecture(_qwen3_vl_moe, _IMAGES, Experts(), (*_VISION, *_ROUTERS), _qwen_image),
    "llava": Architecture(_llava, _IMAGES, ignore=_VISION, inputs=_llava_image),
}
