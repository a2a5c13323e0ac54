"""A pass of your own: each square of a norm, `pow(x, 2)`, becomes `mul(x, x)`, which more compilers know how to fuse.

python examples/add_a_pass.py            # explained in docs/writing-a-pass.md
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import fx

import ctfp8_compile as ctfp8
from ctfp8_compile.graph import arguments, before, call
from ctfp8_compile.passes import Context, Pass, register_pass, verifying

aten = torch.ops.aten


def multiply_squares(graph: fx.Graph, context: Context) -> int:
    """`pow(x, 2)` is `mul(x, x)`, bit for bit."""
    done = 0
    for node in graph.find_nodes(op="call_function", target=aten.pow.Tensor_Scalar):
        x, exponent = arguments(node)
        if exponent == 2:
            with before(graph, node):
                new = call(graph, aten.mul.Tensor, x, x, like=node)
            node.replace_all_uses_with(new, propagate_meta=False)
            graph.erase_node(node)
            done += 1
    return done


MULTIPLY_SQUARES = Pass(
    "multiply-squares",
    "post_grad",
    multiply_squares,
    why="behind decompose: nothing above looks for squares",
    after=("decompose",),
    operators=(aten.pow.Tensor_Scalar,),
)


@torch.no_grad()
def main() -> None:
    model = ctfp8.from_pretrained(Path(__file__).parent / "models/llama")
    ids, given = torch.arange(16)[None], {"use_cache": False}
    want = model(ids, **given).logits
    register_pass(MULTIPLY_SQUARES)
    with verifying():
        report = ctfp8.explain(model, (ids,), given, target="cuda:sm90", passes="")
        got = torch.compile(model, backend="ctfp8", fullgraph=True)(ids, **given).logits
    for ran in report.passes:
        print(f"{ran.name}: {ran.skipped or ran.matches}")
    error = (got.double() - want.double()).norm() / want.double().norm()
    print(f"relative error of the compiled model against eager: {error:.1e}")


if __name__ == "__main__":
    main()
