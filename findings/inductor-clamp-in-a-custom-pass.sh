#!/usr/bin/env bash
# torch 2.13.0: a custom pass of Inductor that quantizes to FP8 cannot use `aten.clamp`.
#
# `post_grad_custom_pre_pass` sees a graph that has been decomposed already. A node for an operator that has a decomposition and no
# lowering (aten.clamp.default, aten.full_like.default) ends the compilation with
#   AssertionError: both a fallback and a decomp for same op: aten.clamp.default
# which names neither the pass nor the remedy. clamp_min followed by clamp_max has lowerings and compiles to the same code.
#
# Why it matters: clamp(x / scale, -448, 448) is how every FP8 quantization is written, and torch.compile of that very expression works,
# because it is decomposed before. Build the pass's nodes from operators with a lowering.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6 setuptools==81.0.0
cd "$dir"
OMP_NUM_THREADS=1 TORCHINDUCTOR_CACHE_DIR="$dir/cache" venv/bin/python - <<'EOF'
import torch
from torch._inductor.custom_graph_pass import CustomGraphPass

aten = torch.ops.aten


class BoundRelu(CustomGraphPass):
    """Replaces relu(x) by x within the range of e4m3fn."""

    def __init__(self, steps):
        self.steps = steps

    def uuid(self):
        return None

    def __call__(self, graph):
        for node in graph.find_nodes(op="call_function", target=aten.relu.default):
            value = node.args[0]
            with graph.inserting_before(node):
                for target, *bounds in self.steps:
                    value = graph.call_function(target, (value, *bounds))
                    value.meta["val"] = node.meta["val"]
            node.replace_all_uses_with(value)
            graph.erase_node(node)


def compiled(*steps):
    torch._dynamo.reset()
    options = {"post_grad_custom_pre_pass": BoundRelu(steps)}
    return torch.compile(lambda x: torch.relu(x) + 0, options=options)(torch.tensor([-1e4, 3.0, 1e4])).tolist()


print("torch", torch.__version__)
try:
    compiled((aten.clamp.default, -448, 448))
    raise SystemExit("aten.clamp compiles now")
except torch._inductor.exc.InductorError as error:
    print(str(error).splitlines()[0])
    assert "both a fallback and a decomp for same op: aten.clamp.default" in str(error)
bounded = compiled((aten.clamp_min.default, -448), (aten.clamp_max.default, 448))
print("clamp_min, clamp_max:", bounded)
assert bounded == [-448.0, 3.0, 448.0]
EOF
