"""A call as OpenVINO's IR, through ONNX and OpenVINO's converter of that; a decoder's cache becomes state inside the model."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..model.call import Call
from . import onnx
from .installed import needs


def write(call: Call, path: Path, notes: Sequence[str], stateful: bool, quantize_activations: bool = False) -> None:
    """Writes `path` (`.xml`) and, beside it, `.bin` with all weights.

    Args:
        stateful: whether the cache of a decoder is kept in the model between calls, as OpenVINO GenAI expects, not passed.
        quantize_activations: see `static_activations.quantize_static`.

    Raises:
        UsageError: OpenVINO is not installed; torch.onnx has no translation for an operator of the model.
    """
    needs(".xml")
    import openvino

    with tempfile.TemporaryDirectory() as folder:
        between = Path(folder) / "model.onnx"
        onnx.write(call, between, notes, True, quantize_activations)
        # the converter alone; `convert_model` also folds casts, and bfloat16 would be float32 in the file
        model = openvino.Core().read_model(between)
        _name(model, call)
        if stateful and call.states:
            _keep_states(model, call)
        model.set_rt_info(" ".join(notes), ["ctfp8"])
        openvino.save_model(model, path, compress_to_fp16=False)


def _name(model: Any, call: Call) -> None:
    for port, name in zip(model.inputs, call.inputs, strict=True):
        port.get_tensor().set_names({name})


def _keep_states(model: Any, call: Call) -> None:
    """Keys and values are variables of the model; `beam_idx` says which row of the batch goes on in which."""
    from openvino import PartialShape, Type, opset13
    from openvino._offline_transformations import apply_make_stateful_transformation

    beams = opset13.parameter(PartialShape([-1]), Type.i32, name="beam_idx")
    beams.output(0).get_tensor().set_names({"beam_idx"})
    ids = model.input("input_ids")
    shapes = {name: list(call.inputs[name].shape) for name in call.states}
    for name in call.states:
        port = model.input(name)
        readers = list(port.get_target_inputs())
        chosen = opset13.gather(port, beams, opset13.constant(0, Type.i64))
        for reader in readers:
            reader.replace_source_output(chosen.output(0))
    model.add_parameters([beams])
    model.validate_nodes_and_infer_types()
    apply_make_stateful_transformation(model, dict(call.states))
    batch = opset13.gather(opset13.shape_of(ids), opset13.constant([0], Type.i64), opset13.constant(0, Type.i64))
    for op in model.get_ops():
        if op.get_type_name() == "ReadValue" and op.get_input_size() == 0:
            variable = op.get_attributes()["variable_id"]
            heads, width = next((s[1], s[3]) for name, s in shapes.items() if variable.startswith(name))
            sizes = opset13.concat([batch, opset13.constant([heads, 0, width], Type.i64)], 0)
            nothing = opset13.constant(0, op.get_output_element_type(0))
            op.set_arguments([opset13.broadcast(nothing, sizes).output(0)])
    model.validate_nodes_and_infer_types()
