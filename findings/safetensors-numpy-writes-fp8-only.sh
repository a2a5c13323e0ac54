#!/usr/bin/env bash
# safetensors 0.8.0, numpy 2.4.6, ml_dtypes 0.6.0: safetensors.numpy writes FP8 tensors that it cannot read back.
#
# save_file takes arrays of ml_dtypes.float8_e4m3fn and writes the right header ("F8_E4M3"). load_file on that very file ends in
#   AttributeError: module 'numpy' has no attribute 'float8_e4m3fn'
# with ml_dtypes installed and imported. safetensors' own torch reader takes the file.
#
# Why it matters: a tool that edits checkpoints without torch (renames tensors, splits shards, counts bytes) fails on every FP8
# checkpoint; read the header and the bytes, and view them as ml_dtypes.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet safetensors==0.8.0 numpy==2.4.6 ml_dtypes==0.6.0
cd "$dir"
venv/bin/python - <<'EOF'
import json
from importlib.metadata import version

import ml_dtypes
import numpy as np
from safetensors.numpy import load_file, save_file

print("safetensors", version("safetensors"), "numpy", version("numpy"), "ml_dtypes", version("ml_dtypes"))
weight = np.array([[1.0, -448.0]], dtype=ml_dtypes.float8_e4m3fn)
save_file({"weight": weight}, "fp8.safetensors")

data = open("fp8.safetensors", "rb").read()
length = int.from_bytes(data[:8], "little")
header = json.loads(data[8 : 8 + length])
print("header:", header)
assert header["weight"]["dtype"] == "F8_E4M3"
assert np.frombuffer(data[8 + length :], dtype=ml_dtypes.float8_e4m3fn).tolist() == [1.0, -448.0]

try:
    load_file("fp8.safetensors")
    raise SystemExit("load_file reads it now")
except AttributeError as error:
    print("load_file:", error)
    assert "has no attribute 'float8_e4m3fn'" in str(error)
EOF
