#!/usr/bin/env bash
# onnxruntime 1.32.0, onnx 1.23.2: how an FP8 weight is dequantized in the graph decides whether it is FP8 in memory.
#
# The same weight and scale, the same Gemm, twice. As Cast and Mul (what torch.onnx.export makes of `w.to(float32) * scale`) the session
# folds them when it is created, at ORT_ENABLE_BASIC already: one float32 initializer, four times the bytes. As one
# DequantizeLinear it is left alone and the weight stays FLOAT8E4M3FN, at ORT_ENABLE_ALL too. Seen in the optimized model:
#   Cast, Mul          -> nodes ['Gemm'], initializers ['FLOAT']
#   DequantizeLinear   -> nodes ['DequantizeLinear', 'Gemm'], initializers ['FLOAT', 'FLOAT8E4M3FN']
#
# Why it matters: both files are small and both give the right numbers, so nothing shows that the first one grows fourfold when loaded.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet numpy==2.4.6 ml_dtypes==0.6.0 onnx==1.23.2 onnxruntime==1.32.0
cd "$dir"
venv/bin/python - <<'EOF'
import ml_dtypes
import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

print("onnx", onnx.__version__, "onnxruntime", onnxruntime.__version__)
rng = np.random.default_rng(0)
weight = rng.standard_normal((256, 256)).astype(ml_dtypes.float8_e4m3fn)
scale = rng.random(256).astype(np.float32)
x = rng.standard_normal((2, 256)).astype(np.float32)
exact = x.astype(np.float64) @ (weight.astype(np.float64) * scale[:, None]).T


def optimized(nodes, scale, level):
    nodes = [*nodes, helper.make_node("Gemm", ["x", "d"], ["y"], transB=1)]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 256]) for name in "xy"]
    constants = [numpy_helper.from_array(weight, "w"), numpy_helper.from_array(scale, "s")]
    graph = helper.make_graph(nodes, "g", ends[:1], ends[1:], constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=11)
    onnx.checker.check_model(model, full_check=True)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.graph_optimization_level = level
    options.optimized_model_filepath = "optimized.onnx"
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    assert np.abs(session.run(None, {"x": x})[0] - exact).max() < 1e-3
    graph = onnx.load("optimized.onnx").graph
    return [node.op_type for node in graph.node], sorted(TensorProto.DataType.Name(c.data_type) for c in graph.initializer)


arithmetic = [helper.make_node("Cast", ["w"], ["f"], to=TensorProto.FLOAT), helper.make_node("Mul", ["f", "s"], ["d"])]
dequantize = [helper.make_node("DequantizeLinear", ["w", "s"], ["d"], axis=0)]
for level in (onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC, onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL):
    first, second = optimized(arithmetic, scale[:, None], level), optimized(dequantize, scale, level)
    print(level, "Cast, Mul:", *first)
    print(level, "DequantizeLinear:", *second)
    assert first == (["Gemm"], ["FLOAT"])
    assert second == (["DequantizeLinear", "Gemm"], ["FLOAT", "FLOAT8E4M3FN"])
EOF
