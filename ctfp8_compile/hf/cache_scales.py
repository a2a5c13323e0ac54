"""How a checkpoint's key-value cache is scaled, by layer, from the tensors that tools leave beside attention.

    ….layers.3.self_attn.k_scale              compressed-tensors: `[1]`, or `[heads, 1, 1]`; `k_zero_point`
    ….layers.3.self_attn.k_proj.k_scale       ModelOpt; `k_bias` of its affine caches
    ….layers.3.self_attn.k_proj.output_scale  Quark
    ….layers.3.self_attn.kv_scale             one for keys and values (AutoFP8)

A number is stored as `(x - bias) / scale` and read as `fp8 * scale + bias`. A zero point z is the bias `-z * scale`.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field

import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig
from torch import Tensor

from ..checkpoint.files import Checkpoint, TensorInfo, decode_scale
from ..checkpoint.scheme import is_fp8, word
from ..counted import counted
from ..errors import CheckpointError

_NAME = re.compile(
    r"^(?P<prefix>.*?)\b(?P<layer>\d+)\.(?:[\w.]*\.)?(?:(?P<of>kv|k|v)_|(?P<proj>[kv])_proj\.(?:[kv]_|output_))"
    r"(?P<what>scale|zero_point|bias)$"
)
#: Parts of a model that do not keep the cache of what it generates.
_ELSEWHERE = re.compile(r"(^|\.)(mtp|visual|vision\w*|audio\w*|image\w*|encoder)(\.|$)")


@dataclass(frozen=True)
class Affine:
    """How the keys, or the values, of a layer are stored.

    Attributes:
        scale: float32, `[1]` or `[heads]`; None: each token has its own.
        bias: float32, `[1, 1 or heads, 1, 1 or columns]`, or None.
    """

    scale: Tensor | None = None
    bias: Tensor | None = None


@dataclass(frozen=True)
class CacheScales:
    """Of a checkpoint.

    Attributes:
        layers: by the number of a layer and `k` or `v`.
        fp8: whether it was made to run with a cache of FP8.
        instead: the cache that it was made for if that is another one, in words.
    """

    layers: Mapping[tuple[int, str], Affine] = field(default_factory=dict)
    fp8: bool = False
    instead: str = ""

    def of(self, layer: int) -> tuple[Affine, Affine]:
        """Of keys, and of values."""
        keys, values = (self.layers.get((layer, which), Affine()) for which in "kv")
        return keys, values


def read_cache_scales(
    tensors: Checkpoint, names: Collection[str], config: QuantizationConfig, heads: Callable[[int], int | None]
) -> CacheScales:
    """Reads and checks them.

    Args:
        names: what the file has beside attention, by our names; scales of queries are no concern of a cache.
        heads: of keys and values of a layer, of the whole model; None where that is not known.

    Raises:
        CheckpointError: a scale is not finite and positive, or of no shape that a layer's heads have; names the tensor.
    """
    scheme, instead = config.kv_cache_scheme, _instead(config)
    found = _by_layer(tensors, names)
    scales = {at: _scale(tensors, name, heads(at[0])) for at, name in found.get("scale", {}).items()}
    biases = {at: _bias(tensors, name, heads(at[0])) for at, name in found.get("bias", {}).items()}
    for at, name in found.get("zero_point", {}).items():
        zero, scale = tensors.read_stored(tensors[name]).float().flatten(), scales.get(at)
        if zero.any() and not instead and scale is not None:
            biases[at] = (-zero * scale).view(1, -1, 1, 1)
    if instead or (scheme is not None and scheme.dynamic):
        scales = {}
        biases = {} if instead else biases
    layers = {at: Affine(scales.get(at), biases.get(at)) for at in {**scales, **biases}}
    return CacheScales(layers, not instead and bool(layers or scheme is not None), instead)


def cache_sentence(cache: CacheScales, names: Collection[str]) -> str:
    """What to say of the cache when a checkpoint is loaded; empty where it says nothing of one."""
    scales = f" ({counted(len(names), 'scale')} in the file, such as {next(iter(names))})" if names else ""
    if cache.instead:
        return (
            f"the checkpoint was calibrated for a key-value cache of {cache.instead} values{scales}, which there is not here: "
            "caches stay in the model's dtype. ctfp8.static_cache(model, dtype='fp8') keeps FP8, with a scale for each token."
        )
    if cache.fp8:
        return (
            f"the checkpoint was calibrated for a quantized KV cache{scales}; ctfp8.static_cache and ctfp8.dynamic_cache keep "
            "it in FP8; transformers' own caches stay in the model's dtype."
        )
    return ""


def _by_layer(tensors: Checkpoint, names: Collection[str]) -> dict[str, dict[tuple[int, str], str]]:
    """By `scale`, `zero_point` and `bias`, then by layer and `k` or `v`, the tensor; of the part of the model that generates."""
    matches = {name: m for name in names if (m := _NAME.match(name)) and not _ELSEWHERE.search(m["prefix"])}
    prefixes = Counter(m["prefix"] for m in matches.values())
    out: dict[str, dict[tuple[int, str], str]] = {}
    for name in sorted(
        matches, key=lambda name: matches[name]["of"] != "kv"
    ):  # one of its own comes before one of both
        m = matches[name]
        if m["prefix"] == prefixes.most_common(1)[0][0]:
            for which in m["of"] or m["proj"]:
                out.setdefault(m["what"], {})[int(m["layer"]), which] = name
    return out


def _scale(tensors: Checkpoint, name: str, heads: int | None) -> Tensor:
    info = tensors[name]
    scale = decode_scale(tensors.read_stored(info)).flatten()
    bad = ~(torch.isfinite(scale * 448) & (scale > 0))
    if bad.any():
        raise CheckpointError(
            f"{info}: the scale of a key-value cache is {scale[bad][0].item()}; it must be finite and positive. The calibration "
            "failed: quantize the checkpoint again, or without a kv_cache_scheme."
        )
    _check_heads(info, len(scale), heads)
    return scale


def _bias(tensors: Checkpoint, name: str, heads: int | None) -> Tensor:
    info = tensors[name]
    bias = tensors.read_stored(info).float()
    if bias.dim() == 0:
        bias = bias.view(1, 1, 1, 1)
    elif bias.dim() < 4:
        bias = bias.reshape(1, heads or 1, 1, -1) if heads and bias.numel() % heads == 0 else bias.view(1, 1, 1, -1)
    if bias.dim() != 4 or bias.shape[0] != 1 or bias.shape[2] != 1 or not torch.isfinite(bias).all():
        raise CheckpointError(
            f"{info}: not a finite bias of a key-value cache, [1, heads, 1, columns]. Quantize the checkpoint again."
        )
    _check_heads(info, bias.shape[1], heads)
    return bias


def _check_heads(info: TensorInfo, found: int, heads: int | None) -> None:
    if found != 1 and heads is not None and found != heads:
        raise CheckpointError(
            f"{info}: a key-value cache has one scale, or one for each of the layer's {counted(heads, 'head')}, not "
            f"{found}. Quantize the "
            "checkpoint again."
        )


def _instead(config: QuantizationConfig) -> str:
    """The cache a config asks for, in words, if it is not one of FP8."""
    attention = [group.input_activations for group in config.config_groups.values() if group.weights is None]
    for args in (config.kv_cache_scheme, *attention):
        if isinstance(args, QuantizationArgs) and not is_fp8(args):
            return f"{args.num_bits}-bit {word(args.type)}"
    return ""
