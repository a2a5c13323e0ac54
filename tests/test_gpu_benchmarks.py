"""The GPU benchmarks get one chance on a GPU, so they must not fail there for what can be seen here."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import relative_error

from ctfp8_compile import compat

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import gpu_all  # noqa: E402
import gpu_linear  # noqa: E402
import gpu_tiles  # noqa: E402
import gpu_timing  # noqa: E402


def test_linears_come_first_and_no_part_takes_the_time_of_another():
    assert gpu_all.PARTS[0].name == "linear"
    assert sum(part.share for part in gpu_all.PARTS) == pytest.approx(1)
    commands = [command for part in gpu_all.PARTS for command in (part.command, *part.first)]
    assert all((BENCHMARKS / command[0]).exists() for command in commands if command[0] != "-m")


def test_tiles_are_built_and_timed_for_what_is_launched():
    """On tensors without storage: each tile reaches the kernel."""
    for kind, (shapes, rows) in gpu_tiles.WORK.items():
        for n, k in shapes:
            for m in rows:
                work = gpu_tiles.Work(kind, n, k, m, "meta")
                found = work.candidates()
                assert len(found) >= 16
                for tile in (found[0], found[-1]):
                    with gpu_tiles.working_in(tile, _Launched):
                        work.call()
                    assert _Launched.tile == (tile.rows, tile.outputs, tile.cols, tile.split, tile.warps, tile.stages)


class _Launched:
    tile = None

    def __init__(self, kernel):
        pass

    def __getitem__(self, grid):
        def launch(*args, **kwargs):
            _Launched.tile = tuple(kwargs[name] for name in ("BM", "BN", "BK", "SPLIT", "num_warps", "num_stages"))

        return launch


def test_a_checkout_is_found_as_a_backend(tmp_path):
    gpu_all._register(tmp_path)
    (found,) = importlib.metadata.distributions(path=[str(tmp_path)])
    (point,) = found.entry_points
    assert (point.group, point.name) == ("torch_dynamo_backends", "ctfp8")
    assert callable(point.load())


def test_calls_go_round_more_than_a_cache():
    for nbytes in (4096 * 4096, 28672 * 4096):
        assert gpu_timing.copies(nbytes, "cuda") * nbytes > gpu_timing.ROTATE_BYTES
    seen = []
    gpu_timing.seconds([lambda i=i: seen.append(i) for i in range(3)], "cpu")
    assert seen[-3:] == [0, 1, 2]


def test_each_way_multiplies_the_weight_it_is_asked_for():
    """All that run on a CPU, uncompiled; the others name what they lack."""
    weights = gpu_linear.Weights(128, 128, "cpu")
    x = torch.randn(16, 128).bfloat16()
    absent: list[str] = []
    with torch.compiler.set_stance("force_eager"), torch.no_grad():
        for way, make in gpu_linear.ways(weights).items():
            if way in ("_scaled_mm alone", "transformers") and compat.release(torch.__version__) < (2, 12):
                continue  # there scaled matmuls on a CPU take only one scale
            try:
                call = make()
            except ImportError:
                absent.append(way)
                continue
            for i in range(weights.count):
                error = relative_error(call(x, i), x @ weights.dense[i].t())
                assert way in gpu_linear.OTHER_VALUES or error < 0.06, (way, i)
    assert set(absent) <= {"fbgemm alone", "torchao", "transformers"}


@pytest.mark.ci("linear")
@pytest.mark.long(minutes=3)
@pytest.mark.parametrize("part", ["tests", *(part.name for part in gpu_all.PARTS)])
def test_a_dry_run(part, tmp_path):
    """Each part alone: first for its compilations, then timed."""
    command = [sys.executable, BENCHMARKS / "gpu_all.py", "--device", "cpu", "--out", tmp_path, "--minutes", "30"]
    command += ["--time", "--parts", "linear"] if part == "tests" else ["--no-tests", "--parts", part]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    text = (tmp_path / f"{part}.md").read_text()
    assert "stopped" not in text, text
    if part == "tests":
        assert " passed" in text
        assert "ended with 0" in text
    else:
        assert "ended with" not in text, text
    if part == "linear":
        assert "| dry | 256 × 128 | 16 | ctfp8 |" in text
