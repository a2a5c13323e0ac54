"""A state dict, or the file that one was saved to, as a module's own names see it: without the prefix of a larger program.

ComfyUI's files say themselves how their layers are stored (`formats.comfyui`); of others a config does, or the shapes of
scales.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from ..errors import CheckpointError, SchemeError
from .files import EXPONENT_DTYPES, FP8_DTYPE, Checkpoint, InMemory, TensorInfo, scale_name
from .folder import of_folder
from .formats import PLAIN, comfyui
from .inferred import SPELLED, infer
from .notes import Notes
from .scheme import Schemes
from .view import Tiles, View

#: How many of a module's names are looked for in a file, to find what stands before them there.
_PROBES = 8


@dataclass(frozen=True)
class StateDict:
    """A state dict, seen from a module.

    Attributes:
        tensors: by the module's names.
        schemes: how its FP8 weights are quantized.
        plain: the same tensors as the file has them, FP8 values in U8 as U8.
        markers: what only says how others are stored.
    """

    tensors: Checkpoint
    schemes: Schemes
    plain: Checkpoint
    markers: Mapping[str, TensorInfo] = field(default_factory=dict)


def open_state_dict(source: Mapping[str, Tensor] | str | Path) -> Checkpoint:
    """The tensors of a dict, a safetensors file, or a folder of them.

    Raises:
        CheckpointError: a file cannot be opened.
    """
    if isinstance(source, Mapping):
        return InMemory(source)
    path = Path(source)
    return of_folder(path).open() if path.is_dir() else Checkpoint([path])


def as_module(
    source: Checkpoint, names: Collection[str], quantization_config: Mapping[str, Any] | None, notes: Notes
) -> StateDict:
    """Finds a module's tensors in a file, and how its FP8 weights are quantized.

    Args:
        names: of the module's parameters and buffers.
        notes: what the file has for other modules, and words that are not known, are noted here.

    Raises:
        CheckpointError, SchemeError: what the file says of a tensor is not what it holds, or not read.
    """
    prefix = _prefix(source, names)
    plain = source.under(prefix, PLAIN)
    markers = {name: info for name, info in plain.items() if comfyui.is_marker(name)}
    others = [name for name in source if not name.startswith(prefix)]
    if others:
        notes.add(f"not of this module, whose tensors are below {prefix!r}; not read", *others)
    if quantization_config is not None:
        schemes = Schemes(quantization_config)
        return StateDict(
            source.under(prefix, schemes.format).changed(markers, {}), schemes, plain, _known(markers, schemes)
        )
    tensors = source.under(prefix, SPELLED).changed(markers, {})
    layers = _layers(source, plain, prefix, markers)
    for name, layer in layers.items():
        if layer.unknown:
            notes.add(f"{', '.join(layer.unknown)}: unknown words of its layer", f"{prefix}{name}.weight")
    tensors = tensors.changed((), _as_said(tensors, layers))
    _check(tensors, layers)
    said = bool(layers) and not any(comfyui.is_scaled(name) for name in markers)
    return StateDict(tensors, Schemes(infer(tensors, layers, said)), plain, markers)


def _prefix(source: Checkpoint, names: Collection[str]) -> str:
    """What stands before a module's names in a file: below which most of them are, and if possible nothing."""
    found = Counter([""])
    some = sorted(names)[:: max(1, len(names) // _PROBES)]
    for name in some:
        found.update(there.removesuffix(name) for there in source if there.endswith(f".{name}"))
    most = max(found, key=lambda prefix: (sum(prefix + name in source for name in names), -len(prefix)))
    return most if any(most + name in source for name in names) else ""


def _known(markers: Mapping[str, TensorInfo], schemes: Schemes) -> Mapping[str, TensorInfo]:
    """Markers beside a config, which decides.

    Raises:
        SchemeError: they are of layers, so that there are two that may differ.
    """
    if found := next((info for name, info in markers.items() if name.endswith(comfyui.QUANT)), None):
        raise SchemeError(
            f"{found}: says how its layer is stored, and so does the quantization_config ({schemes.format.name}). Pass None."
        )
    return markers


def _layers(
    source: Checkpoint, plain: Checkpoint, prefix: str, markers: Mapping[str, TensorInfo]
) -> dict[str, comfyui.Layer]:
    """What a ComfyUI file says of its layers, by the module's names; empty of other files."""
    named = {}
    for name, layer in comfyui.of_header(source.metadata).items():
        module = name.removeprefix(prefix)
        if f"{module}.weight" in plain:  # ComfyUI's own names have the prefix, comfy-kitchen's do not
            named[module] = layer
        elif name.startswith(prefix):
            raise CheckpointError(
                f"{name}.weight: {comfyui.METADATA} in the file's header says how it is stored, but it is not there. Download "
                "the file again."
            )
    for name, info in markers.items():
        if name.endswith(comfyui.QUANT):
            module = name.removesuffix(comfyui.QUANT)
            said = comfyui.of_tensor(
                info.name.removesuffix(comfyui.QUANT), bytes(plain.read_stored(info).reshape(-1).tolist())
            )
            if named.get(module, said).tiled != said.tiled:
                raise SchemeError(
                    f"{info}: says another format than {comfyui.METADATA} in the file's header. Take one of them out."
                )
            named[module] = said
        elif comfyui.is_scaled(name) and comfyui.METADATA not in source.metadata:
            layer = comfyui.of_marker(info.name, info.dtype, math.prod(info.shape))
            for other in plain:
                if other.endswith((".scale_weight", ".weight_scale")):
                    named.setdefault(other.rpartition(".")[0], layer)
    return named


def _as_said(tensors: Checkpoint, layers: Mapping[str, comfyui.Layer]) -> dict[str, TensorInfo]:
    """FP8 weights that a file keeps as bytes, as FP8, and scales in tiles as matrices.

    Raises:
        CheckpointError: a scale is not in tiles of the weight's.
    """
    changed = {}
    for module, layer in layers.items():
        weight, scale = tensors[f"{module}.weight"], tensors.get(f"{module}.weight_scale")
        if weight.dtype == "U8":
            weight = changed[f"{module}.weight"] = replace(weight, dtype=FP8_DTYPE)
        if not layer.tiled or scale is None or weight.dtype != FP8_DTYPE:
            continue
        rows, cols = weight.shape if len(weight.shape) == 2 else (0, 0)
        tiles = Tiles(rows, math.ceil(cols / 32))
        if scale.shape != tiles.whole or scale.dtype not in EXPONENT_DTYPES:
            raise CheckpointError(
                f"{scale}: not the scales of mxfp8 of {weight}; expected {list(tiles.whole)}, U8 or F8_E8M0, in tiles of 128x4 "
                "as ComfyUI writes them. Quantize it again."
            )
        view = View(whole=scale.shape, tiles=tiles)
        changed[f"{module}.weight_scale"] = replace(scale, shape=(tiles.rows, tiles.cols), view=view)
    return changed


def _check(tensors: Checkpoint, layers: Mapping[str, comfyui.Layer]) -> None:
    """Refuses bytes that nothing says are FP8, and what changes a layer's values besides.

    Raises:
        CheckpointError: naming the tensor.
    """
    for name, info in tensors.items():
        module, _, leaf = name.rpartition(".")
        if leaf == "weight" and info.dtype == "U8" and scale_name(name) in tensors:
            raise CheckpointError(
                f"{info}: nothing says what its bytes stand for: there is no {module}{comfyui.QUANT}, and no "
                f"{comfyui.METADATA}, which the header of a file may have, and a dict of its tensors has not. Give the file's "
                "path instead; if they are FP8 values, put weight.view(torch.float8_e4m3fn) in its place."
            )
        if leaf in ("pre_quant_scale", "weight_scale_2") and module in layers:
            raise CheckpointError(
                f"{info}: changes the values of {module}, and is not read. Load the file with ComfyUI, or multiply it into the "
                "weights and leave it out."
            )
