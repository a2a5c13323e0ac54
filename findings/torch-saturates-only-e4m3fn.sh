#!/usr/bin/env bash
# torch 2.13.0, ml_dtypes 0.6.0, numpy 2.4.6: what a number too large for FP8 becomes depends on the FP8 type and on the library.
#
# torch's cast on CPUs saturates for float8_e4m3fn alone: 10000, and infinity too, become 448. The same cast to e4m3fnuz and e5m2fnuz
# gives NaN, and to e5m2 infinity. ml_dtypes, with which numpy, JAX and ONNX tools write FP8, gives NaN for e4m3fn. Seen:
#   torch e4m3fn 448.0 448.0 | e5m2 57344.0 -> inf inf | e4m3fnuz nan nan | e5m2fnuz nan nan | ml_dtypes e4m3fn nan nan
#
# Why it matters: a writer that forgets to clamp leaves NaN in the file with one library, and a clipped but finite weight with another. A
# search of the file for NaN finds the first fault and not the second, and a quantizer that was right on e4m3fn fails on AMD's FNUZ types.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6 ml_dtypes==0.6.0
OMP_NUM_THREADS=1 "$dir/venv/bin/python" - <<'EOF'
import math
from importlib.metadata import version

import ml_dtypes
import numpy as np
import torch

print("torch", version("torch"), "ml_dtypes", version("ml_dtypes"))
large = [1e6, math.inf]
expected = {"float8_e4m3fn": 448.0, "float8_e5m2": math.inf, "float8_e4m3fnuz": math.nan, "float8_e5m2fnuz": math.nan}
for name, value in expected.items():
    got = torch.tensor(large).to(getattr(torch, name)).float()
    print("torch", name, got.tolist())
    assert torch.equal(got.nan_to_num(nan=-1), torch.full((2,), value).nan_to_num(nan=-1)), name

got = np.array(large, dtype=np.float32).astype(ml_dtypes.float8_e4m3fn).astype(np.float32)
print("ml_dtypes float8_e4m3fn", got.tolist())
assert np.isnan(got).all()

# They part from 464 on, halfway between 448 and the 480 that does not exist.
edge = np.array([464.0, 464.5], dtype=np.float32)
assert torch.from_numpy(edge).to(torch.float8_e4m3fn).float().tolist() == [448.0, 448.0]
assert np.isnan(edge.astype(ml_dtypes.float8_e4m3fn).astype(np.float32)).tolist() == [False, True]
EOF
