#!/usr/bin/env bash
# torch 2.13.0, ml_dtypes 0.6.0, onnx 1.23.2 (reference), onnxruntime 1.32.0: four casts to E8M0, the type of MXFP8 scales, four answers.
#
# E8M0 has no zero, no sign and no infinity. Seen for (0, -2, infinity, 3):
#   torch         2^-127    2        NaN     4      the sign is dropped without a word
#   ml_dtypes     NaN       NaN      NaN     4
#   onnx          2^-127    2        NaN     4      the reference evaluator, saturate=1, round_mode=nearest
#   onnxruntime   2^-127    2^-127   2^127   4      the same model
# And torch.zeros(..., dtype=torch.float8_e8m0fnu) is full of 2^-127, which is not zero. (Rounding of 3 to 4 is no fault either, but
# the OCP specification's own recipe for scales rounds down, to 2.)
#
# Why it matters: a buffer "of zeros" for scales gives a tiny weight instead of zero, a scale with a wrong sign passes torch unseen, and a
# group of zeros (amax 0) or an overflow gets different bytes from different writers of MXFP8.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6 ml_dtypes==0.6.0 onnx==1.23.2 onnxruntime==1.32.0
OMP_NUM_THREADS=1 "$dir/venv/bin/python" - <<'EOF'
from importlib.metadata import version

import ml_dtypes
import numpy as np
import onnxruntime
import torch
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator

print(*(f"{name} {version(name)}" for name in ("torch", "ml_dtypes", "onnx", "onnxruntime")))
values = np.array([0.0, -2.0, np.inf, 3.0], dtype=np.float32)
low, nan = 2.0**-127, np.nan

nodes = [
    helper.make_node("Cast", ["x"], ["e8m0"], to=TensorProto.FLOAT8E8M0, saturate=1, round_mode="nearest"),
    helper.make_node("Cast", ["e8m0"], ["y"], to=TensorProto.FLOAT),
]
ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [4]) for name in "xy"]
model = helper.make_model(helper.make_graph(nodes, "g", ends[:1], ends[1:]), opset_imports=[helper.make_opsetid("", 24)], ir_version=12)

answers = {
    "torch": (torch.from_numpy(values).to(torch.float8_e8m0fnu).float().numpy(), [low, 2, nan, 4]),
    "ml_dtypes": (values.astype(ml_dtypes.float8_e8m0fnu).astype(np.float32), [nan, nan, nan, 4]),
    "onnx": (ReferenceEvaluator(model).run(None, {"x": values})[0], [low, 2, nan, 4]),
    "onnxruntime": (onnxruntime.InferenceSession(model.SerializeToString()).run(None, {"x": values})[0], [low, low, 2.0**127, 4]),
}
for name, (got, expected) in answers.items():
    print(name, got.tolist())
    assert np.array_equal(got, np.array(expected, dtype=np.float32), equal_nan=True), name

zeros = torch.zeros(2, dtype=torch.float8_e8m0fnu)
print("torch.zeros", zeros.float().tolist())
assert zeros.float().tolist() == [low, low]
EOF
