"""Runs `worker.py` and reads its answer: what a compiled case would launch on a GPU that is not there."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cases import Case, Gpu

_HERE = Path(__file__).parent


@dataclass(frozen=True)
class Operand:
    """A tensor as generated code passes it."""

    dtype: str
    sizes: tuple[int, ...]
    strides: tuple[int, ...]

    @property
    def contiguous(self) -> bool:
        """In the sense of torch: dimensions of one element may have any stride."""
        expected = 1
        for size, stride in zip(reversed(self.sizes), reversed(self.strides), strict=True):
            if size != 1 and stride != expected:
                return False
            expected *= size
        return True


@dataclass(frozen=True)
class Launch:
    """A kernel: what a Triton kernel does, or an operator with its operands and settings (see `played.Launch`)."""

    name: str
    operands: dict[str, Operand]
    settings: dict[str, Any]
    source: str

    @property
    def matmul(self) -> bool:
        return "f8f8bf16" in self.name or "_scaled_" in self.name or self.weight_only

    @property
    def weight_only(self) -> bool:
        return self.name.startswith("weight-only")


@dataclass(frozen=True)
class Result:
    """A compiled case."""

    case: Case
    launches: tuple[Launch, ...]
    rewritten: dict[str, str]
    kept: dict[str, str]
    built: tuple[Any, ...]
    code: str

    @property
    def matmuls(self) -> list[Launch]:
        return [launch for launch in self.launches if launch.matmul]

    @property
    def text(self) -> str:
        """One launch a line, in order; a scaled matmul with its sizes."""
        return "\n".join(_line(launch) for launch in self.launches)


def _line(launch: Launch) -> str:
    if not launch.matmul:
        return launch.name
    a, b = list(launch.operands.values())[:2]
    return f"{launch.name} {list(a.sizes)} x {list(b.sizes)}"


@functools.cache
def compiled(gpu: Gpu, cases: tuple[Case, ...]) -> dict[Case, Result]:
    """Compiles all cases in one process.

    Raises:
        AssertionError: one of them did not compile; with the worker's traceback.
    """
    root = _HERE.parent.parent
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")])}
    request = json.dumps({"gpu": asdict(gpu), "cases": [asdict(case) for case in cases]})
    done = subprocess.run(
        [sys.executable, _HERE / "worker.py", request], capture_output=True, text=True, env=environment, check=False
    )
    lines = done.stdout.splitlines()
    assert len(lines) == len(cases), f"{gpu.name}: the worker died\n{done.stderr[-4000:]}"
    return {case: _result(gpu, case, json.loads(line)) for case, line in zip(cases, lines, strict=True)}


def _result(gpu: Gpu, case: Case, answer: dict[str, Any]) -> Result:
    assert "error" not in answer, f"{gpu.name}, {case.name}: {answer['error']}\n{answer['where'][-4000:]}"
    assert answer["graphs"] == 1, f"{gpu.name}, {case.name}: {answer['graphs']} graphs"
    return Result(
        case, tuple(map(_launch, answer["launches"])), answer["rewritten"], answer["kept"], tuple(answer["built"]),
        answer["calls"][0],
    )  # fmt: skip


def _launch(answer: dict[str, Any]) -> Launch:
    operands = {
        name: Operand(described[0], tuple(described[1]), tuple(described[2]))
        for name, described in answer["operands"].items()
    }
    return Launch(answer["name"], operands, answer["settings"], answer["source"])


def cases_of(models: Sequence[str], rows: Sequence[int | None], **settings: Any) -> tuple[Case, ...]:
    return tuple(Case(model, rows=m, **settings) for model in models for m in rows)
