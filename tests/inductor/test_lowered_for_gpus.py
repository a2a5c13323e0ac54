"""What CUDA and XPU get, compiled by Inductor for the CPU: the same graphs at the same hook, the kernels as references.

The GPU's own code is written and built in tests/gpu_codegen; this is the cheapest test that a graph of ours compiles at all,
and that what Inductor makes of it is still right.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from conftest import DATA, relative_error
from support.scaled import BlockwiseOnCpu, layer, quantized_activation
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.lowering import lowerings

import ctfp8_compile as ctfp8
from ctfp8_compile import ops
from ctfp8_compile.inductor import backend
from ctfp8_compile.target import Target

aten = torch.ops.aten
TARGETS = ("cuda:sm80", "cuda:sm89", "cuda:sm90", "cuda:sm90+scaled_mm", "cuda:sm100", "cuda:sm120", "xpu")
#: Operators the passes put into graphs in this module, at the hook behind Inductor's decompositions.
_emitted: set[Any] = set()


@pytest.fixture
def compiled_for(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """`compiled_for(target, fn)`: `torch.compile(fn, backend="ctfp8")` with a target that is not the tensors' device."""

    def compiled_for(target: str, fn: Any, **kwargs: Any) -> Any:
        torch._dynamo.reset()
        monkeypatch.setattr(backend, "_target", lambda wanted, marked: Target.parse(target))
        return torch.compile(fn, backend="ctfp8", fullgraph=True, **kwargs)

    run = backend.passes.run

    def recorded(graph: torch.fx.Graph, target: Target) -> Any:
        before = set(graph.nodes)
        report = run(graph, target)
        _emitted.update(n.target for n in graph.nodes if n.op == "call_function" and n not in before)
        return report

    monkeypatch.setattr(backend.passes, "run", recorded)
    yield compiled_for
