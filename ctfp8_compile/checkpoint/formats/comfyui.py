"""ComfyUI's single files: no config beside them; tensors, or the file's header, say how each layer is stored.

{layer}.comfy_quant             U8, the bytes of JSON: {"format": "float8_e4m3fn", "full_precision_matrix_mult": true}
_quantization_metadata          in the header, JSON: {"layers": {layer: {"format": …}}}
scaled_fp8                      of files older than both: its dtype is that of the weights; two elements stand for
                                full_precision_matrix_mult
weight                          F8_E4M3, or U8 that holds the same bits
weight_scale (scale_weight), input_scale (scale_input)       float32 []
weight_scale of mxfp8           U8 or F8_E8M0, [N, K/32] in tiles of 128×4 as cuBLAS reads them (`view.Tiles`)

As ComfyUI's QUANTIZATION.md and its comfy/ops.py, quant_ops.py and utils.py say; comfy-kitchen 0.2.40 wrote the file in
tests/data/comfyui.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ...errors import SchemeError
from .format import Suffixes

QUANT, ATTENTION, SCALED = ".comfy_quant", ".comfy_attention.config", "scaled_fp8"
METADATA = "_quantization_metadata"
SUFFIXES: Suffixes = {".scale_weight": ".weight_scale", ".scale_input": ".input_scale"}

#: By what a file calls it, whether scales are exponents in tiles. Rows and blocks are convert_to_quant's; scales say them.
_FORMATS = {
    "float8_e4m3fn": False,
    "float8_e4m3fn_rowwise": False,
    "float8_e4m3fn_blockwise": False,
    "mxfp8": True,
}
#: Words of a layer that change nothing of its values, or that its scale says as well.
_WORDS = frozenset(
    [
        "format",
        "full_precision_matrix_mult",
        "orig_dtype",
        "orig_shape",
        "group_size",
        "block_size",
        "num_experts",
        "params",
    ]
)
#: Words of weights that were rotated before they were quantized.
_ROTATED = ("convrot", "hadamard", "rotation")
_CURE = "Load the file with ComfyUI, or take one whose layers are float8_e4m3fn or mxfp8"


@dataclass(frozen=True)
class Layer:
    """What a file says of one of its layers.

    Attributes:
        tiled: MXFP8, whose scales lie in tiles.
        full_precision: inputs are not quantized, whatever scale there is for them.
        unknown: words that are not known.
    """

    tiled: bool = False
    full_precision: bool = False
    unknown: tuple[str, ...] = ()


def is_marker(name: str) -> bool:
    """Whether a tensor only says how others are stored, or how ComfyUI is to run a layer."""
    return name.endswith((QUANT, ATTENTION)) or is_scaled(name)


def is_scaled(name: str) -> bool:
    """Whether a tensor is the marker of the files that came before `comfy_quant`."""
    return name.rpartition(".")[2] == SCALED


def of_header(metadata: Mapping[str, str]) -> dict[str, Layer]:
    """The layers that a file's header names.

    Raises:
        SchemeError: it is no JSON, or names a format that is not read.
    """
    if METADATA not in metadata:
        return {}
    where = f"{METADATA} in the file's header"
    layers = _object(metadata[METADATA], where).get("layers")
    if not isinstance(layers, Mapping):
        raise SchemeError(f"{where} has no object 'layers', which ComfyUI reads there. {_CURE}.")
    return {name: _layer(words, name, where) for name, words in layers.items()}


def of_tensor(layer: str, stored: bytes) -> Layer:
    """What the `comfy_quant` of a layer says.

    Raises:
        SchemeError: it is no JSON, or names a format that is not read.
    """
    where = f"{layer}{QUANT}"
    return _layer(_object(stored, where), layer, where)


def of_marker(name: str, dtype: str, elements: int) -> Layer:
    """What a `scaled_fp8` says of all layers with a scale.

    Raises:
        SchemeError: its dtype says that they are not float8_e4m3fn.
    """
    if dtype == "F8_E5M2":
        return _layer("float8_e5m2", "the weights with a scale", f"{name} ({dtype})")
    return Layer(full_precision=elements == 2)


def _object(text: str | bytes, where: str) -> Mapping[str, Any]:
    try:
        found = json.loads(text)
    except ValueError as error:
        raise SchemeError(f"{where} is not valid JSON ({error}). Download the file again.") from error
    if not isinstance(found, Mapping):
        raise SchemeError(f"{where} is not a JSON object, but {found!r}. Download the file again.")
    return found


def _layer(words: Any, name: str, where: str) -> Layer:
    words = {"format": words} if isinstance(words, str) else words
    if not isinstance(words, Mapping):
        raise SchemeError(f"{where} says nothing that is known of {name}: {words!r}. {_CURE}.")
    format = words.get("format")
    if not isinstance(format, str) or format not in _FORMATS:
        raise SchemeError(
            f"{name}: {where} says format={format!r}, which is not read; known are {', '.join(map(repr, _FORMATS))}. {_CURE}."
        )
    inner = words.get("params")
    more = {**(inner if isinstance(inner, Mapping) else {}), **words}
    if rotated := next((word for word in _ROTATED if more.get(word)), None):
        raise SchemeError(
            f"{name}: {where} says {rotated}={more[rotated]!r}, so its weight was rotated before it was quantized; that is not "
            f"read. {_CURE}, not rotated."
        )
    unknown = tuple(sorted(set(more) - _WORDS - set(_ROTATED)))
    return Layer(_FORMATS[format], bool(words.get("full_precision_matrix_mult")), unknown)
