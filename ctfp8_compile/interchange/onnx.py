"""A call as an ONNX file, through `torch.onnx.export`: FP8 weights stay FP8, in the file and, in onnxruntime, in memory."""

from __future__ import annotations

import contextlib
import inspect
import logging
import re
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.export import Dim, ExportedProgram

from ..aot.lower import trace
from ..compat import version
from ..errors import UsageError
from ..graph import MARKER
from ..model.call import Call
from ..passes import decompose
from ..passes.plain import plain
from . import dequantize_linear
from .installed import needs
from .static_activations import QUANTIZE, quantize_static


def program_of(call: Call, quantize_activations: bool = False) -> ExportedProgram:
    """A call traced: plain ATen but for the markers of weights; inputs are tensors, in the order of the call's.

    Args:
        quantize_activations: see `static_activations.quantize_static`.
    """
    program = trace(call.module, tuple(call.inputs.values()), None, _dynamic_shapes(call))
    if quantize_activations:
        quantize_static(program.graph)
    decompose(program.graph, weights=False)
    for node in program.graph.find_nodes(op="call_function", target=torch.ops.aten._assert_tensor_metadata.default):
        program.graph.erase_node(node)
    plain(program.graph)
    program.graph.eliminate_dead_code()
    program.graph_module.recompile()
    return program


def _dynamic_shapes(call: Call) -> dict[str, Any]:
    """As torch.export wants them: by argument of forward; of `*rest`, a tuple."""
    each = [dict.fromkeys(call.dims.get(name, {}), Dim.DYNAMIC) or None for name in call.inputs]
    return dict(inspect.signature(call.module.forward).bind(*each).arguments)


def write(
    call: Call, path: Path, notes: Sequence[str], whole_blocks: bool = False, quantize_activations: bool = False
) -> None:
    """Writes `path` and, beside it, `path.data` with all weights.

    Args:
        notes: sentences that the file's metadata is to hold.
        whole_blocks: see `dequantize_linear.translation`.
        quantize_activations: see `static_activations.quantize_static`.

    Raises:
        UsageError: onnx or onnxscript is not installed; torch.onnx has no translation for an operator of the model.
    """
    needs(".onnx")
    with torch.no_grad(), _quiet():
        program = program_of(call, quantize_activations)
        try:
            made: Any = torch.onnx.export(
                program,
                input_names=list(call.inputs),
                output_names=list(call.outputs()),
                opset_version=dequantize_linear.OPSET,
                custom_translation_table={
                    MARKER: dequantize_linear.translation(whole_blocks),
                    QUANTIZE: dequantize_linear.quantize,
                },
                optimize=False,  # it would fold small FP8 weights to float32
                verbose=False,
            )
        except torch.onnx.OnnxExporterError as error:
            raise _untranslated(error) from error
        _simplify(made.model)
    _tidy(made.model, call, notes)
    made.save(str(path), external_data=True)


def _simplify(model: Any) -> None:
    """Folds what is computed of shapes and numbers, and nothing that is computed of a weight or a scale."""
    import onnxscript.optimizer

    def should_fold(node: Any) -> bool | None:
        return False if any(value is not None and value.is_initializer() for value in node.inputs) else None

    onnxscript.optimizer.optimize_ir(model, should_fold=should_fold, onnx_shape_inference=False)


def _untranslated(error: Exception) -> UsageError:
    """One sentence of torch's page of them."""
    chain, seen = [error], set()
    while (cause := chain[-1].__cause__) is not None and cause not in seen:
        seen.add(cause)
        chain.append(cause)  # type: ignore[arg-type]
    last = str(chain[-1]).strip().splitlines()
    what = last[0] if last else type(chain[-1]).__name__
    return UsageError(
        f"torch.onnx cannot express this model: {what}. Leave out that part of the model, or write a .pt2 file, which torch runs."
    )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what the exporter says about packages that are not needed, and about its own code."""
    logger = logging.getLogger("torch.onnx._internal.exporter._registration")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            warnings.simplefilter("ignore", UserWarning)
            yield
    finally:
        logger.setLevel(before)


_PARAMETRIZED = re.compile(r"parametrizations\.(\w+)\.(?:original|0\.weight(?P<scale>_scale))$")


def _tidy(model: Any, call: Call, notes: Sequence[str]) -> None:
    """The checkpoint's names for weights, the call's for dimensions; no paths of this machine."""
    import onnx_ir

    onnx_ir.passes.common.ClearMetadataAndDocStringPass()(model)
    for node in model.graph:
        node.metadata_props.clear()
    for held in list(model.graph.initializers.values()):
        held.name = _PARAMETRIZED.sub(lambda m: m[1] + (m["scale"] or ""), held.name.removeprefix("model."))
    for port in (*model.graph.inputs, *model.graph.outputs):
        sizes = list(port.shape)
        for dim, name in call.dims.get(port.name, {}).items():
            sizes[dim] = name
        port.shape = onnx_ir.Shape(sizes)
    model.producer_name, model.producer_version = "ctfp8", version("ctfp8-compile")
    model.metadata_props["ctfp8"] = " ".join(notes)
