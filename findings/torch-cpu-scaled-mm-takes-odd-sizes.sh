#!/usr/bin/env bash
# torch 2.13.0: `torch._scaled_mm` on a CPU takes sizes that the same call refuses for CUDA.
#
# For CUDA tensors, K and N must be multiples of 16 (checked in its shape function, so fake tensors show it without a GPU). For CPU
# tensors the same shapes run, and are right. Seen, M = 32:
#   K 64, N 48   cpu runs   cuda (fake) runs
#   K 60, N 48   cpu runs   cuda (fake) "Expected self.size(1) to be divisible by 16, but got self.size(1)=60"
#   K 64, N 44   cpu runs   cuda (fake) "Expected both dimensions of mat2 to be divisible by 16"
#
# Why it matters: a test suite that runs on CPUs says nothing about which layers of an FP8 checkpoint a GPU can multiply. Trace the
# graph once with fake CUDA tensors to find the ones that need padding or another path.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6
OMP_NUM_THREADS=1 "$dir/venv/bin/python" - 2> /dev/null <<'EOF'
import torch
from torch._subclasses.fake_tensor import FakeTensorMode


def product(k, n, device):
    a = torch.ones(32, k, device=device).to(torch.float8_e4m3fn)
    b = torch.ones(n, k, device=device).to(torch.float8_e4m3fn).t()
    one = torch.ones((), device=device)
    return torch._scaled_mm(a, b, one, one, out_dtype=torch.bfloat16)


print("torch", torch.__version__)
refused = []
for k, n in ((64, 48), (60, 48), (64, 44)):
    result = product(k, n, "cpu")
    assert result.shape == (32, n) and (result == k).all()
    try:
        with FakeTensorMode():
            product(k, n, "cuda")
        print(f"K {k}, N {n}: cpu runs, cuda runs")
    except RuntimeError as error:
        print(f"K {k}, N {n}: cpu runs, cuda: {error}")
        assert "divisible by 16" in str(error)
        refused.append((k, n))
assert refused == [(60, 48), (64, 44)]
EOF
