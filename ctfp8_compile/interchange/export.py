"""`ctfp8.export`: what a path ends in says what is written: `.pt2` for torch, `.onnx` and `.xml` for other runtimes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..aot import export as aot
from ..aot.parts import is_spread
from ..counted import counted
from ..errors import UsageError
from ..model.call import Call
from ..model.in_dtype import in_dtype
from ..model.parametrization import quantized_parameters, stored_weight
from ..report import Report
from ..target import Target
from . import arguments, onnx, openvino
from .installed import needs

_DTYPES = {"float32": torch.float32, "float16": torch.float16}


@dataclass(frozen=True)
class Exported:
    """What was written for another runtime.

    Attributes:
        path: the file; its weights are in another beside it.
        bytes: of both.
        weights: how many are FP8 in the file, and how many bytes these are.
        dtype: what the model computes in there.
        inputs, outputs: their names.
        shapes: of inputs of the call, by name, as it was traced: batch and tokens are examples.
        notes: what is other than in the model, a sentence each.
    """

    path: str
    bytes: int
    weights: int
    weight_bytes: int
    dtype: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    notes: tuple[str, ...]
    shapes: Mapping[str, tuple[int, ...]]

    def summary(self) -> str:
        """A line, and the notes."""
        return " ".join([f"{counted(self.weights, 'FP8 weight')}.", *self.notes])

    __str__ = summary

    def to_dict(self) -> dict[str, Any]:
        """As JSON holds it."""
        return asdict(self)


def export(
    model: nn.Module,
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
    path: str | Path = "model.pt2",
    target: str | Target | None = None,
    dynamic_shapes: Any = None,
    package: str | None = None,
    dtype: str | torch.dtype | None = None,
    stateful: bool | None = None,
    quantize_activations: bool = False,
) -> Report | Exported:
    """Writes a model to a file: `.pt2`, which `ctfp8.load` runs without transformers; `.onnx`; or `.xml`, OpenVINO's IR.

    FP8 weights stay FP8 in all of them.

    A `.pt2` is torch.export's own archive with a manifest in it. For cpu its graph is plain ATen, so `torch.export.load` runs it
    without this package too; `ctfp8.load` puts the CPU kernels of its machine back. For cuda and xpu it may name operators of
    fbgemm, and of this package (weight-only matmuls). Of a model that is spread over several processes each writes a file of its
    own, which `load` takes on that rank only. For a language model with a static cache see `StaticCacheDecoder`.

    `.onnx` and `.xml` are written by torch.onnx and by OpenVINO's converter: see docs/export.md. Weights lie in one file beside
    them. With no `args`, a transformers model that generates text is written as a decoder with its cache as inputs and outputs
    (of an `.xml`, as state), any other one that reads a text as that; batch and sequence are dynamic.

    Args:
        model: with FP8 weights, from `from_pretrained`, `prepare` or `load_state_dict`.
        args, kwargs: example inputs, as the model is called. What is no tensor (`use_cache=False`) is fixed in the file.
        path: a file name that ends in `.pt2`, `.onnx` or `.xml`; what is there is replaced.
        target: of a `.pt2`: such as `"cpu"` or `"cuda:sm90"`, which need not be on this machine; default: the device the model
            is on.
        dynamic_shapes: as for `torch.export.export`; a dimension that is not named there has its example's size for good.
        package: of a `.pt2`: None for a program, `"aoti"` for AOTInductor's machine code for this machine.
        dtype: of an `.onnx`: what it computes in, `"float32"` (the default) or `"float16"`. An `.xml` says float32; OpenVINO
            chooses what it computes in when it runs (`INFERENCE_PRECISION_HINT`).
        stateful: of an `.xml` without `args`: whether the cache is state inside the model (the default), as OpenVINO GenAI wants
            it, or goes in and out.
        quantize_activations: of an `.onnx` or `.xml`: whether activations with a static scale in the checkpoint go through
            FP8, as pairs of QuantizeLinear and DequantizeLinear. By default they stay as they are, as on CPUs.

    Returns:
        Of a `.pt2`, what became of each FP8 weight, as from `explain`; of the others, what was written.

    Raises:
        TargetError: not a target, or `package="aoti"` for another machine.
        UsageError: the call takes or returns objects that only transformers can rebuild; a package that writes the file is not
            installed; torch.onnx cannot express an operator of the model; activations that are to be quantized are not static.
    """
    path = Path(path)
    given = {"target": target, "package": package, "dtype": dtype, "stateful": stateful}
    given["quantize_activations"] = quantize_activations or None
    _check(path, {name: value for name, value in given.items() if value is not None}, bool(args or kwargs))
    if path.suffix not in _OTHERS:
        return aot.export(model, args, kwargs, path, target, dynamic_shapes, package)
    kwargs = dict(kwargs or {})
    return _export(
        model, args, kwargs, path, dynamic_shapes, _dtype(dtype), stateful is not False, quantize_activations
    )


_OTHERS = (".onnx", ".xml")


def _check(path: Path, given: Mapping[str, Any], called: bool) -> None:
    """Refuses what is for files of another kind.

    Args:
        given: arguments that are for some files, as far as they were given.
        called: whether the arguments of a call were.
    """
    if path.suffix not in _OTHERS:
        if wrong := [name for name in ("dtype", "stateful", "quantize_activations") if name in given]:
            raise UsageError(f"{path}: {wrong[0]}= is for .onnx and .xml files; a .pt2 has what the model has.")
        return
    if wrong := [name for name in ("target", "package") if name in given]:
        raise UsageError(
            f"{path}: {wrong[0]}= is for .pt2 files. What runs an {path.suffix} file chooses its own kernels."
        )
    if "stateful" in given and (path.suffix != ".xml" or called):
        raise UsageError(f"{path}: stateful= is for a language model's .xml without args.")
    if path.suffix == ".xml" and _dtype(given.get("dtype")) != torch.float32:
        raise UsageError(
            f"{path}: dtype= is for .onnx files. OpenVINO chooses what it computes in when it runs: compile_model(…, "
            "config={'INFERENCE_PRECISION_HINT': 'f16'})."
        )


def _dtype(dtype: str | torch.dtype | None) -> torch.dtype:
    """Raises `UsageError` where it is none of them."""
    name = "float32" if dtype is None else str(dtype).removeprefix("torch.")
    if name not in _DTYPES:
        raise UsageError(f"dtype={name!r}: it is 'float32' or 'float16'; runtimes on CPUs have no kernels for others.")
    return _DTYPES[name]


def _export(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    path: Path,
    dynamic_shapes: Any,
    dtype: torch.dtype,
    stateful: bool,
    quantize_activations: bool,
) -> Exported:
    needs(path.suffix)  # before anything is traced
    if is_spread(model):
        raise UsageError(f"{path}: this process has a part of the model. Load it in one process to write it.")
    notes = _notes(model, dtype, quantize_activations)
    made = in_dtype(model, dtype)
    call = _call(made, args, kwargs, dynamic_shapes, dtype)
    if path.suffix == ".onnx":
        onnx.write(call, path, notes, quantize_activations=quantize_activations)
        files = [path, path.with_name(f"{path.name}.data")]
    else:
        openvino.write(call, path, notes, stateful, quantize_activations)
        files = [path, path.with_suffix(".bin")]
    stored = [stored_weight(owner, name.rpartition(".")[2]) for name, owner, _ in quantized_parameters(model)]
    return Exported(
        str(path),
        sum(file.stat().st_size for file in files),
        len(stored),
        sum(weight.numel() for weight in stored),
        str(dtype).removeprefix("torch."),
        tuple(call.inputs),
        call.outputs(),
        notes,
        {name: tuple(tensor.shape) for name, tensor in call.inputs.items()},
    )


def _call(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], dynamic_shapes: Any, dtype: torch.dtype
) -> Call:
    if args or kwargs:
        if hasattr(model, "set_experts_implementation"):
            from ..hf.calls import gather_experts

            gather_experts(model)
        return arguments.call_of(model, args, kwargs, dynamic_shapes, dtype)
    if not hasattr(model, "config") or not hasattr(model, "can_generate"):
        raise UsageError(
            f"{type(model).__name__} is no transformers model: pass the arguments of one call as args or kwargs."
        )
    from ..hf.calls import call_of

    return call_of(model)


def _notes(model: nn.Module, dtype: torch.dtype, quantize_activations: bool) -> tuple[str, ...]:
    """What is other there than in the model."""
    found = {quantized.info.dtype for _, _, quantized in quantized_parameters(model)}
    said = []
    name = str(dtype).removeprefix("torch.")
    if found - {dtype}:
        was = ", ".join(sorted(str(d).removeprefix("torch.") for d in found - {dtype}))
        said.append(
            f"It computes in {name}, where the model computes in {was}; the weights are the checkpoint's, bit for bit."
        )
    activations = {quantized.info.scheme.activation for _, _, quantized in quantized_parameters(model)} - {"none"}
    if quantize_activations:
        said.append("Activations with a static scale go through FP8.")
        activations -= {"tensor"}
    if activations:
        those = "Those with a dynamic scale" if quantize_activations else "Activations"
        said.append(f"{those} are not quantized: they stay as they are, as on CPUs.")
    return tuple(said)
