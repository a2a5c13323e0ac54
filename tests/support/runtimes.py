"""ONNX Runtime and OpenVINO, on one thread and in float32, and what of a model each keeps as FP8."""

from __future__ import annotations

import collections
from pathlib import Path

import numpy as np
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


class OnnxDecoder:
    """A decoder in onnxruntime, its cache fed back after each call."""

    def __init__(self, path: Path):
        self.session = session(path)
        self.inputs = self.session.get_inputs()
        self.outputs = [output.name for output in self.session.get_outputs()]

    def begin(self, batch: int) -> None:
        past = [i for i in self.inputs if i.name.startswith("past_key_values.")]
        self.past = {i.name: np.zeros((batch, i.shape[1], 0, i.shape[3]), np.float32) for i in past}

    def __call__(self, ids: np.ndarray, mask: np.ndarray, positions: np.ndarray) -> np.ndarray:
        feed = {"input_ids": ids, "attention_mask": mask, "position_ids": positions, **self.past}
        feed = {i.name: feed[i.name] for i in self.inputs}  # some take no positions
        out = dict(zip(self.outputs, self.session.run(None, feed), strict=True))
        self.past = {name: out[name.replace("past_key_values", "present")] for name in self.past}
        return out["logits"]


class OpenVinoDecoder:
    """A decoder in OpenVINO, whose cache is state."""

    def __init__(self, path: Path):
        model = compiled(path)
        self.request, self.names = model.create_infer_request(), [i.get_any_name() for i in model.inputs]

    def begin(self, batch: int) -> None:
        self.request.reset_state()
        self.rows = np.arange(batch, dtype=np.int32)

    def __call__(self, ids: np.ndarray, mask: np.ndarray, positions: np.ndarray) -> np.ndarray:
        feed = {"input_ids": ids, "attention_mask": mask, "position_ids": positions, "beam_idx": self.rows}
        self.request.infer({name: feed[name] for name in self.names})
        return self.request.get_tensor("logits").data.copy()


def decoder(path: Path) -> OnnxDecoder | OpenVinoDecoder:
    return (OpenVinoDecoder if path.suffix == ".xml" else OnnxDecoder)(path)


def in_steps(run: OnnxDecoder | OpenVinoDecoder, ids: np.ndarray, mask: np.ndarray, steps: list[int]) -> np.ndarray:
    """Logits of a padded batch that comes in several calls."""
    positions = np.maximum(mask.cumsum(1) - 1, 0)
    run.begin(len(ids))
    ends = np.cumsum(steps)
    return np.concatenate(
        [run(ids[:, a:b], mask[:, :b], positions[:, a:b]) for a, b in zip([0, *ends], ends, strict=False)], 1
    )
