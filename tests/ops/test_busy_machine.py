"""What a decode step does about other programs on its cores: fewer regions that wait, fewer threads after long waits."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from conftest import fp8_config, quantize, relative_error
from torch import Tensor, nn
from torch._inductor.utils import run_and_get_code
from torch.utils.data import DataLoader, Dataset

import ctfp8_compile as ctfp8
from ctfp8_compile.ops import cpu as cpu_kernels

cpu_kernels.load()

TEAM = """
#include "team.h"
#include <cstdio>
#define CHECK(what) if (!(what)) return std::printf("line %d: %s\\n", __LINE__, #what), 1
using namespace std::chrono_literals;
int main() {
  ctfp8::Team team;
  CHECK(team.size(16) == 16);
  for (int i = 0; i < 1000; ++i) team.ended(16, 100us, 90us), team.ended(16, 9ms, 5ms);
  for (int i = 0; i < 1000; ++i) team.ended(16, 300us, i % 30 ? 5us : 5ms);  // now and then one is late
  CHECK(team.size(16) == 16);
  for (int i = 0; i < 100; ++i) team.ended(16, 100us, 1us);
  for (int i = 0; i < 3; ++i) team.ended(16, 100us, 3ms);
  CHECK(team.size(16) == 8 && team.size(4) == 4);
  team.ended(8, 100us, 3ms);
  CHECK(team.size(16) == 4);
  for (int i = 0; i < 3; ++i) team.ended(4 >> i, 100us, 3ms);
  CHECK(team.size(16) == 1);  // never none
  int regions = 1;
  while (team.size(16) == 1) ++regions;
  CHECK(regions > 200 && team.size(16) == 16);  // after five long waits
  for (int i = 0; i < 1000; ++i) team.ended(16, 100us, 1us);  // all is well
  for (int i = 0; team.size(16) == 16; ++i) team.ended(16, 100us, 3ms);
  for (regions = 0; team.size(16) == 8; ++regions) {}
  CHECK(regions < 20);
  for (int i = 0; i < 100; ++i) team.ended(2, 100us, 3ms);
  for (regions = 0; team.size(2) == 1; ++regions) {}
  CHECK(regions < 3000);  // it always tries again
}
"""


def test_threads_after_long_waits(tmp_path: Path) -> None:
    (tmp_path / "team.cpp").write_text(TEAM)
    csrc = Path(cpu_kernels.__file__).parent / "csrc"
    build = ["g++", "-std=c++20", f"-I{csrc}", str(tmp_path / "team.cpp"), "-o", str(tmp_path / "team")]
    subprocess.run(build, check=True)
    done = subprocess.run([tmp_path / "team"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.fixture
def others() -> Iterator[None]:
    """Two processes a thread of ours, so that some thread is always without a core."""
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(4)]
    yield
    for process in busy:
        process.kill()
        process.wait()


def product(x: Tensor, weight: Tensor) -> Tensor:
    return torch.ops.ctfp8.dequantized_linear(x, weight, torch.ones(len(weight), 1), None, [1, weight.shape[1]])


def test_results_on_a_busy_machine_are_those_of_one_thread(others: None) -> None:
    before = torch.get_num_threads()
    weight = torch.randint(0, 120, (512, 1024), dtype=torch.uint8).view(torch.float8_e4m3fn)
    try:
        for m in (1, 3, 40):
            x = torch.randn(m, 1024).bfloat16()
            torch.set_num_threads(1)
            alone = product(x, weight)
            torch.set_num_threads(2)
            assert all(torch.equal(product(x, weight), alone) for _ in range(150))
    finally:
        torch.set_num_threads(before)


class Products(Dataset[Tensor]):
    def __init__(self, weight: Tensor):
        self.weight = weight

    def __len__(self) -> int:
        return 4

    def __getitem__(self, item: int) -> Tensor:
        return product(torch.full((2, 1024), 1.0 + item), self.weight)


def test_workers_forked_after_our_threads_ran() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        data = Products(torch.randint(0, 120, (512, 1024), dtype=torch.uint8).view(torch.float8_e4m3fn))
        want = [data[i] for i in range(4)]
        got = list(DataLoader(data, batch_size=None, num_workers=2, multiprocessing_context="fork", timeout=120))
        assert all(map(torch.equal, got, want))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(("tokens", "shared"), [(1, False), (64, True)])
def test_small_loops_are_not_shared(tokens: int, shared: bool) -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.linear = nn.RMSNorm(2048), nn.Linear(2048, 64, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(self.norm(x) * 2)

    weight, scale = quantize(torch.randn(64, 2048) * 0.1, "channel")
    state = {"norm.weight": torch.ones(2048), "linear.weight": weight, "linear.weight_scale": scale}
    module = ctfp8.load_state_dict(Block(), state, fp8_config("channel", "token"))
    before = torch.get_num_threads()
    torch.set_num_threads(2)  # so is the code
    try:
        x = torch.randn(tokens, 2048)
        got, [code] = run_and_get_code(torch.compile(module, backend="ctfp8", fullgraph=True, dynamic=False), x)
        assert relative_error(got, module(x)) < 0.01
    finally:
        torch.set_num_threads(before)
    assert "cpp_fused" in code
    assert ("#pragma omp" in code) == shared
