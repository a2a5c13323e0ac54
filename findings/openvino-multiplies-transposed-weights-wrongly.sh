#!/usr/bin/env bash
# openvino 2026.4.1, onnx 1.23.2, numpy 2.4.6, ml_dtypes 0.6.0: the product of two transposed quantized weights is wrong on the CPU.
#
# y = x (W1ᵀ W2ᵀ), W1 and W2 behind DequantizeLinear and Transpose, is compiled and runs without a word; its values have nothing to do
# with the product. The same weights stored the other way around (no Transpose) are right, and so are float32 weights with both. FP8 and
# INT8 alike, scales per channel or one for all. Relative error of y against float64, seen:
#   float8_e4m3fn  stored as multiplied 1.7e-07, transposed 1.6, (x W1ᵀ) W2ᵀ 2.5e-07
#   int8           stored as multiplied 2.1e-07, transposed 1.8, (x W1ᵀ) W2ᵀ 0.0073
#   float32        stored as multiplied 2.5e-07, transposed 1.8e-07, (x W1ᵀ) W2ᵀ 2e-07
#
# Why it matters: exporters write a linear as MatMul(x, Transpose(weight)), and two linears with nothing between them, such as low-rank
# factors or latent projections, are one product of constants to whoever reorders them. Written as (x W1ᵀ) W2ᵀ it is right. Compare what an
# exported model gives with the source before it is used.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet onnx==1.23.2 openvino==2026.4.1 numpy==2.4.6 ml_dtypes==0.6.0
cd "$dir"
venv/bin/python - <<'EOF'
from importlib.metadata import version

import ml_dtypes
import numpy as np
import onnx
import openvino
from onnx import TensorProto, helper, numpy_helper

print("openvino", version("openvino"), "onnx", version("onnx"))
STORED = {
    "float8_e4m3fn": lambda v: v.astype(ml_dtypes.float8_e4m3fn),
    "int8": lambda v: np.clip(np.round(v * 20), -127, 127).astype(np.int8),
    "float32": lambda v: v.astype(np.float32),
}


def error(kind: str, transposed: bool, factored: bool = False) -> float:
    """Of y, relative to its largest value."""
    random = np.random.default_rng(0)
    shapes = [(64, 48), (40, 64)] if transposed else [(48, 64), (64, 40)]
    weights = [STORED[kind](3 * random.standard_normal(shape)) for shape in shapes]
    scales = [(random.random(shape[0]) + 0.1).astype(np.float32) for shape in shapes]
    constants, nodes, factors, exact = [], [], [], []
    for i, (weight, scale) in enumerate(zip(weights, scales)):
        if kind == "float32":
            constants += [numpy_helper.from_array(weight, f"w{i}"), numpy_helper.from_array(scale[:, None], f"s{i}")]
            nodes.append(helper.make_node("Mul", [f"w{i}", f"s{i}"], [f"d{i}"]))
        else:
            constants += [numpy_helper.from_array(weight, f"w{i}"), numpy_helper.from_array(scale, f"s{i}")]
            nodes.append(helper.make_node("DequantizeLinear", [f"w{i}", f"s{i}"], [f"d{i}"], axis=0))
        if transposed:
            nodes.append(helper.make_node("Transpose", [f"d{i}"], [f"t{i}"], perm=[1, 0]))
        factors.append(f"t{i}" if transposed else f"d{i}")
        value = weight.astype(np.float64) * scale[:, None]
        exact.append(value.T if transposed else value)
    if factored:
        nodes += [helper.make_node("MatMul", ["x", factors[0]], ["p"]), helper.make_node("MatMul", ["p", factors[1]], ["y"])]
    else:
        nodes += [helper.make_node("MatMul", factors, ["p"]), helper.make_node("MatMul", ["x", "p"], ["y"])]
    graph = helper.make_graph(
        nodes, "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 48])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 40])],
        constants,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    onnx.checker.check_model(model)
    onnx.save(model, "m.onnx")
    core = openvino.Core()
    run = core.compile_model(core.read_model("m.onnx"), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    x = random.standard_normal((5, 48)).astype(np.float32)
    want = x.astype(np.float64) @ (exact[0] @ exact[1])
    return float(np.abs(run({"x": x})[0] - want).max() / np.abs(want).max())


for kind in STORED:
    plain, transposed, factored = error(kind, False), error(kind, True), error(kind, True, factored=True)
    print(f"{kind}: stored as multiplied {plain:.2g}, transposed {transposed:.2g}, (x W1ᵀ) W2ᵀ {factored:.2g}")
    assert plain < 1e-5
    assert factored < 0.02
    assert (transposed > 0.5) == (kind != "float32")
EOF
