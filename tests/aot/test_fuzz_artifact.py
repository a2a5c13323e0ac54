"""Mutated artifacts: each one loads and gives the numbers its graph says, or raises an error of ours; nothing of it runs.

pytest tests/aot/test_fuzz_artifact.py -m 'long or not long'     # 2,600 files; docs/security.md has what was found
"""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from conftest import fp8_config, quantize
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from support.hostile import records_of
from support.mutate import EVIL_MODULE, Trier, mutated
from torch import nn
from torch.export import Dim

import ctfp8_compile as ctfp8


class Small(nn.Module):
    """Linears with and without bias, a constant, a buffer, a scalar argument; a dict comes back."""

    def __init__(self):
        super().__init__()
        self.up, self.gate = nn.Linear(64, 64), nn.Linear(64, 64, bias=False)
        self.register_buffer("offset", torch.arange(64.0))

    def forward(self, x, scale=2.0):
        h = self.up(x).relu() * self.gate(x) + self.offset
        return {"out": self.gate(h / 64) * scale, "sum": h.sum(-1)}


@pytest.fixture(scope="module")
def trial(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fuzz")
    torch.manual_seed(0)
    model, state = Small(), {}
    for name, tensor in model.state_dict().items():
        state[name] = tensor
        if tensor.dim() == 2:
            state[name], state[f"{name}_scale"] = quantize(tensor)
    x = torch.randn(3, 64)
    ctfp8.export(ctfp8.load_state_dict(model, state, fp8_config()), (x,), {"scale": 2.0}, path=folder / "m.pt2",
                 dynamic_shapes={"x": {0: Dim("n", max=8)}, "scale": None})  # fmt: skip
    torch.save((x,), folder / "inputs.pt")
    mark = folder / "mark"
    (folder / f"{EVIL_MODULE}.py").write_text(f"open({str(mark)!r}, 'w').close()\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        trier = Trier(folder / "m.pt2", folder / "inputs.pt")
        yield folder, mark, trier
        trier.close()


def _fuzz(trial, number, examples):
    folder, mark, trier = trial
    records, counts = records_of(folder / "m.pt2"), Counter()

    @seed(number)
    @settings(max_examples=examples, deadline=None, database=None, phases=[Phase.generate],
              suppress_health_check=list(HealthCheck))  # fmt: skip
    @given(st.data())
    def check(data):
        path = folder / "mutated.pt2"
        path.write_bytes(mutated(data.draw, records, mark))
        result = trier(path)
        ran, _ = mark.exists(), mark.unlink(missing_ok=True)
        counts[result[0]] += 1
        assert not ran, "code of the file ran"
        assert result[0] in ("right", "refused"), result

    check()
    print(f"seed {number}: {dict(counts)}")
    assert counts["refused"] > examples / 4
    assert counts["right"] > examples / 50


def test_mutated_files(trial):
    _fuzz(trial, 0, 150)


@pytest.mark.ci(1, 2)
@pytest.mark.long
@pytest.mark.parametrize("number", range(1, 6))
def test_many_mutated_files(trial, number):
    _fuzz(trial, number, 500)
