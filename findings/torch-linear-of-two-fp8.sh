#!/usr/bin/env bash
# torch 2.13.0: on a CPU, linear and matmul take two float8_e4m3fn tensors, and give float8_e4m3fn: rounded, and cut at 448.
#
# Most operators refuse FP8 on CPUs (add, amax, clamp, `<`), and mixing FP8 with another dtype raises "Promotion for Float8 Types is
# not supported". These two do not: sums are exact to the end, then each result is cast to FP8. Seen: the product of two
# vectors of 4096 ones is 448, random 64 x 512 matrices give results off by up to 4 (of about 84), exactly what the cast makes of them.
#
# Why it matters: code that quantizes activations by `x.to(torch.float8_e4m3fn)` and calls the model's own Linear, whose weight is
# still FP8 because nobody dequantized it, runs without an exception and without any scale.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6
OMP_NUM_THREADS=1 "$dir/venv/bin/python" - <<'EOF'
import torch

print("torch", torch.__version__)
fp8 = torch.float8_e4m3fn
ones = torch.ones(1, 4096).to(fp8)
for name, result in (("linear", torch.nn.functional.linear(ones, ones)), ("matmul", ones @ ones.t())):
    print(name, "of 4096 ones:", result.dtype, result.item())
    assert result.dtype == fp8 and result.item() == 448

torch.manual_seed(0)
a, b = torch.randn(64, 512).to(fp8), torch.randn(64, 512).to(fp8)
exact = a.double() @ b.double().t()
result = torch.nn.functional.linear(a, b)
print(f"random: largest {exact.abs().max():.1f}, off by up to {(result.double() - exact).abs().max():.2f}")
assert torch.equal(result.double(), exact.to(fp8).double())

for name, call in (("add", lambda: a + a), ("amax", lambda: a.amax()), ("mixed", lambda: torch.ones(64, 512) * a)):
    try:
        call()
        raise SystemExit(f"{name} works now")
    except (NotImplementedError, RuntimeError) as error:
        print(name, "raises:", error)
EOF
