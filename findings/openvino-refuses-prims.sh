#!/usr/bin/env bash
# openvino 2026.4.1 (torch 2.13.0): convert_model takes an exported program with FP8 weights, unless the cast is written as a prim.
#
# `w.to(torch.float32) * scale` is converted and w stays an f8e4m3 constant. The same program with
# torch.ops.prims.convert_element_type, which is what graph passes and decompositions write for a cast, raises OpConversionFailure, after
# ExportedProgram.run_decompositions() too. Seen:
#   to(float32)                converted, constants f8e4m3 and f32
#   prims.convert_element_type OpConversionFailure "No conversion rule found for operations: prims.convert_element_type.default"
#
# Why it matters: run_decompositions makes _to_copy of `to`, but leaves a prim that a pass has put there. Write casts as
# aten._to_copy in programs that others are to read. (The converter imports `packaging`, which openvino does not require: installed below.)
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6 openvino==2026.4.1 packaging==26.4
cd "$dir"
OMP_NUM_THREADS=1 venv/bin/python - <<'EOF'
from importlib.metadata import version

import openvino
import torch


class Linear(torch.nn.Module):
    def __init__(self, cast):
        super().__init__()
        self.cast = cast
        self.register_buffer("weight", torch.randn(64, 64).to(torch.float8_e4m3fn))
        self.register_buffer("scale", torch.rand(64, 1))

    def forward(self, x):
        return torch.nn.functional.linear(x, self.cast(self.weight) * self.scale)


def program(cast):
    return torch.export.export(Linear(cast), (torch.randn(2, 64),))


print("openvino", version("openvino"), "torch", version("torch"))
model = openvino.convert_model(program(lambda weight: weight.to(torch.float32)))
constants = sorted(node.get_element_type().get_type_name() for node in model.get_ops() if node.get_type_name() == "Constant")
print("to:", constants)
assert constants == ["f32", "f8e4m3"]

prim = program(lambda weight: torch.ops.prims.convert_element_type(weight, torch.float32))
for name, refused in (("prim", prim), ("prim, decomposed", prim.run_decompositions())):
    try:
        openvino.convert_model(refused)
        raise SystemExit("prims.convert_element_type is converted now")
    except openvino.frontend.OpConversionFailure as error:
        lines = [line for line in str(error).splitlines() if "prims.convert_element_type" in line]
        print(f"{name}:", lines[0] if lines else error)
        assert lines
EOF
