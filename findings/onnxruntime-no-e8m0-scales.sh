#!/usr/bin/env bash
# onnx 1.23.2, onnxruntime 1.32.0, openvino 2026.4.1: an MXFP8 weight in the words of ONNX opset 24 is valid, and onnxruntime has no kernel.
#
# DequantizeLinear-24 takes FLOAT8E8M0 scales with block_size=32, which is MXFP8 exactly. The onnx checker accepts the model, OpenVINO
# converts it; onnxruntime, which knows the type and casts to and from it, ends in
#   NOT_IMPLEMENTED : Could not find an implementation for DequantizeLinear(24)
# With the same scales cast to FLOAT by a node of the graph, it runs, and is exact.
#
# Why it matters: to bring an MXFP8 checkpoint to onnxruntime, write Cast(scale) before DequantizeLinear; the scale stays one byte.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet numpy==2.4.6 ml_dtypes==0.6.0 onnx==1.23.2 onnxruntime==1.32.0 openvino==2026.4.1
cd "$dir"
venv/bin/python - <<'EOF'
from importlib.metadata import version

import ml_dtypes
import numpy as np
import onnx
import onnxruntime
import openvino
from onnx import TensorProto, helper, numpy_helper

print(*(f"{name} {version(name)}" for name in ("onnx", "onnxruntime", "openvino")))
rng = np.random.default_rng(0)
weight = rng.standard_normal((64, 64)).astype(ml_dtypes.float8_e4m3fn)
scale = rng.integers(120, 130, (64, 2)).astype(np.uint8).view(ml_dtypes.float8_e8m0fnu)
exact = weight.astype(np.float32) * np.repeat(scale.astype(np.float32), 32, axis=1)


def model(nodes):
    constants = [numpy_helper.from_array(weight, "w"), numpy_helper.from_array(scale, "s")]
    output = helper.make_tensor_value_info("y", TensorProto.FLOAT, [64, 64])
    graph = helper.make_graph(nodes, "g", [], [output], constants)
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 24)], ir_version=12)
    onnx.checker.check_model(made, full_check=True)
    return made


direct = model([helper.make_node("DequantizeLinear", ["w", "s"], ["y"], axis=1, block_size=32, output_dtype=TensorProto.FLOAT)])
try:
    onnxruntime.InferenceSession(direct.SerializeToString())
    raise SystemExit("onnxruntime has the kernel now")
except onnxruntime.capi.onnxruntime_pybind11_state.NotImplemented as error:
    print("onnxruntime:", error)
    assert "Could not find an implementation for DequantizeLinear(24)" in str(error)

onnx.save(direct, "direct.onnx")
result = openvino.compile_model(openvino.convert_model("direct.onnx"), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})({})[0]
print("openvino, largest difference:", np.abs(result - exact).max())
assert np.array_equal(result, exact)

cast = [
    helper.make_node("Cast", ["s"], ["f"], to=TensorProto.FLOAT),
    helper.make_node("DequantizeLinear", ["w", "f"], ["y"], axis=1, block_size=32),
]
result = onnxruntime.InferenceSession(model(cast).SerializeToString()).run(None, {})[0]
print("onnxruntime with Cast, largest difference:", np.abs(result - exact).max())
assert np.array_equal(result, exact)
EOF
