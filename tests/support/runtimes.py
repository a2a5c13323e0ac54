"""ONNX Runtime and OpenVINO, on one thread and in float32, and what of a model each keeps as FP8."""

from __future__ import annotations

import collections
from pathlib import Path

import onnx
import onnxruntime
import openvino


def onnx_types(path: Path) -> collections.Counter[str]:
    return collections.Counter(onnx.TensorProto.DataType.Name(i.data_type) for i in onnx.load(path).graph.initializer)


def session(path: Path, optimized: Path | None = None) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 3, 1
    if optimized is not None:
        options.optimized_model_filepath = str(optimized)
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def compiled(path: Path) -> openvino.CompiledModel:
    return openvino.compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1})


def fp8_in_openvino(model: openvino.CompiledModel) -> int:
    """Constants that the compiled model keeps as FP8."""
    return sum(
        op.get_rt_info()["layerType"].astype(str) == "Const"
        and op.get_rt_info()["outputPrecisions"].astype(str) == "f8e4m3"
        for op in model.get_runtime_model().get_ops()
    )
