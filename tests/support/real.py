"""Writes a pretrained model as llm-compressor would: compressed-tensors' scales, FP8 values, names and config.

write_quantized(model, "FP8", folder, calibrate=lambda: model(**batch))
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import torch
from compressed_tensors.compressors import ModelCompressor
from compressed_tensors.quantization import QuantizationStatus
from support.forge import scheme_of, weight_scale
from torch import Tensor, nn
from transformers import PreTrainedModel

#: Linears that recipes leave out: heads, which share the embeddings' weight, and poolers.
_PLAIN = ("lm_head", "pooler")


@torch.no_grad()
def write_quantized(
    model: PreTrainedModel, scheme: str, folder: Path, calibrate: Callable[[], Any], plain: Collection[str] = _PLAIN
) -> Path:
    """Quantizes the Linears of a model, in place, and saves it.

    Args:
        scheme: a preset of compressed-tensors.
        calibrate: runs the model on text; static scales of activations are the largest values then seen.
        plain: parts of names of the Linears to leave alone.
    """
    linears = [m for n, m in model.named_modules() if isinstance(m, nn.Linear) and not any(p in n for p in plain)]
    quantization = scheme_of(scheme, None)
    inputs, args = quantization.input_activations, quantization.weights
    static = inputs is not None and not inputs.dynamic
    largest = _largest_inputs(linears, calibrate) if static else {}
    for linear in linears:
        weight, dtype = linear.weight, linear.weight.dtype
        linear.quantization_scheme, linear.quantization_status = quantization, QuantizationStatus.FROZEN
        scale = weight_scale(weight, args, torch.float32 if args.scale_dtype == torch.uint8 else dtype)
        linear.weight_scale = nn.Parameter(scale, False)
        if static:
            linear.input_scale = nn.Parameter((largest[linear] / 448).reshape(1).to(dtype), False)
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(folder)
    compressor.update_config(folder)
    return folder


def _largest_inputs(linears: list[nn.Linear], calibrate: Callable[[], Any]) -> dict[nn.Module, Tensor]:
    largest: dict[nn.Module, Tensor] = {}

    def watch(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        largest[module] = torch.maximum(largest.get(module, torch.zeros(())), args[0].abs().max())

    hooks = [linear.register_forward_pre_hook(watch) for linear in linears]
    calibrate()
    for hook in hooks:
        hook.remove()
    return largest
