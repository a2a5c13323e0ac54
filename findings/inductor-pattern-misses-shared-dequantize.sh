#!/usr/bin/env bash
# torch 2.13.0: Inductor's register_replacement does not find `linear(x, dequantize(w))` where one dequantized weight is used twice.
#
# The pattern `x @ (w.to(float32) * scale).T` is found in one linear, for two and three dimensions of x. If the same
# dequantized weight feeds two linears it is found in neither: an inner node of a match must have no other users. With a bias (addmm) it is
# not found either. `apply` returns 0 and no message says that there was nearly a match. Seen:
#   one linear 1, x of three dimensions 1, two linears with one weight 0, with a bias 0
#
# Why it matters: a pass that keeps weights in FP8 then leaves exactly the tied or shared ones (a head tied to the embedding,
# a block used several times) dequantized, with right results. Assert the number of matches, not only the output.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6 setuptools==81.0.0
cd "$dir"
OMP_NUM_THREADS=1 TORCHINDUCTOR_CACHE_DIR="$dir/cache" venv/bin/python - <<'EOF'
import torch
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch._inductor.pattern_matcher import PatternMatcherPass, fwd_only, register_replacement
from torch.nn.functional import linear

weight, scale = torch.randn(8, 16).to(torch.float8_e4m3fn), torch.rand(8, 1)
x, bias = torch.randn(4, 16), torch.ones(8)
passes, counts = PatternMatcherPass(), []


def pattern(x, w, s):
    return x @ (w.to(torch.float32) * s).t()


def replacement(x, w, s):
    return (x @ w.to(torch.float32).t()) * s.t()


class Apply(CustomGraphPass):
    def uuid(self):
        return None

    def __call__(self, graph):
        counts.append(passes.apply(graph))


def matches(function, x):
    torch._dynamo.reset()
    counts.clear()
    torch.compile(function, options={"post_grad_custom_pre_pass": Apply()})(x, weight, scale)
    return sum(counts)


def dequantize(w, s):
    return w.to(torch.float32) * s


def twice(x, w, s):
    wide = dequantize(w, s)
    return linear(x, wide) + linear(x + 1, wide)


register_replacement(pattern, replacement, [x, weight, scale], fwd_only, passes)
found = {
    "one linear": matches(lambda x, w, s: linear(x, dequantize(w, s)), x),
    "three dimensions": matches(lambda x, w, s: linear(x, dequantize(w, s)), torch.randn(2, 4, 16)),
    "two linears, one weight": matches(twice, x),
    "with a bias": matches(lambda x, w, s: linear(x, dequantize(w, s), bias), x),
}
print("torch", torch.__version__, found)
assert list(found.values()) == [1, 1, 0, 0]
EOF
