"""Where transformers is not installed, a plain module is compiled all the same; that artifacts load: tests/aot."""

from __future__ import annotations

import json
import subprocess
import sys

PROGRAM = """
import json, os, sys
os.environ["TORCHINDUCTOR_FORCE_DISABLE_CACHES"] = "1"  # code from a cache brings no report
sys.modules["transformers"] = sys.modules["compressed_tensors"] = None      # an import of them fails
import torch, ctfp8_compile as ctfp8
from torch import nn

class Experts(nn.Module):
    '''A linear, then three experts, with the marker that parametrizations give.'''

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        for name, shape in (("linear", (64, 48)), ("experts", (3, 32, 64))):
            weight = torch.randn(shape).mul(40).to(torch.float8_e4m3fn)
            self.register_parameter(name, nn.Parameter(weight, requires_grad=False))
            self.register_buffer(name + "_scale", torch.rand(*shape[:-1], 1) / 40 + 0.01)

    def weight(self, name):
        stored, scale = getattr(self, name), getattr(self, name + "_scale")
        return torch.ops.ctfp8.dequantize(stored, scale, None, [1, 0], "token", torch.bfloat16)

    def forward(self, x, offs):
        x = nn.functional.linear(x, self.weight("linear"))
        return torch._grouped_mm(x, self.weight("experts").mT, offs=offs)

model = Experts()
x, offs = torch.randn(12, 48).bfloat16(), torch.tensor([4, 9, 12], dtype=torch.int32)
with torch.no_grad():
    eager, compiled = model(x, offs), torch.compile(model, backend="ctfp8", fullgraph=True)(x, offs)
weight = model.linear.double() * model.linear_scale.double()
experts = model.experts.double() * model.experts_scale.double()
hidden = (x.double() @ weight.T).split([4, 5, 3])
exact = torch.cat([h @ w.T for h, w in zip(hidden, experts)])
errors = [((y.double() - exact).norm() / exact.norm()).item() for y in (eager, compiled)]
report = ctfp8.compiled_reports()[-1]
print(json.dumps([errors, sorted(e.rule for e in report.rewritten), len(report.kept)]))
"""


def test_a_plain_module_needs_no_transformers():
    out = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=False)
    assert out.returncode == 0, out.stderr
    errors, rules, kept = json.loads(out.stdout.splitlines()[-1])
    assert max(errors) < 5e-3, errors  # two roundings to bfloat16 against float64
    assert (rules, kept) == (["grouped experts", "linear"], 0)
