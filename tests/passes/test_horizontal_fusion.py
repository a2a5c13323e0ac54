"""Linears with one input as one matmul: which are fused, that nothing is copied, and that nothing else changes."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from conftest import DATA, fp8_config, logits, quantize, relative_error
from support.scaled import SM89
from torch import nn
from torch._inductor.utils import run_and_get_code
from torch._subclasses import FakeTensorMode

import ctfp8_compile as ctfp8
from ctfp8_compile.inductor import backend, packed  # noqa: F401 - Inductor's modules import each other in one order only
from ctfp8_compile.model.parametrization import quantized_parameters, stored_weight
from ctfp8_compile.ops import FP8

pytestmark = pytest.mark.usefixtures("kernel_everywhere")
FUSED = {"ctfp8.horizontal_fusion": True}


class Three(nn.Module):
    """Three linears of one input and one of another, as attention has them."""

    def __init__(self, rows=(64, 32, 32), bias=False, dtype=torch.bfloat16):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(128, n, bias=bias, dtype=dtype) for n in rows)
        self.o = nn.Linear(rows[0], 128, bias=bias, dtype=dtype)

    def forward(self, x):
        q, k, v = self.q(x), self.k(x), self.v(x)
        return self.o(q), k.flatten(0, -2), v.view(-1)


def three(strategy="channel", activation="token", **kwargs):
    torch.manual_seed(0)
    module = Three(**kwargs)
    state = {}
    for name, tensor in module.state_dict().items():
        state[name] = torch.randn_like(tensor)
        if name.endswith("weight"):
            state[name], state[name + "_scale"] = quantize(torch.randn(tensor.shape) * 0.1, strategy)
            if activation == "tensor":
                state[name.replace("weight", "input_scale")] = torch.rand(1) * 0.01 + 0.01
    return ctfp8.load_state_dict(module, state, fp8_config(strategy, activation))


def matmuls(program):
    return [n for n in program.graph.nodes if "scaled_mm" in str(n.target) or "fbgemm" in str(n.target)]


X = torch.randn(3, 5, 128).bfloat16()


@pytest.mark.parametrize("target", ["cuda:sm90", SM89, "xpu"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("strategy", "activation"), [("channel", "token"), ("tensor", "tensor"), ("tensor", "token")])
def test_a_program_has_one_matmul_for_one_input(strategy, activation, bias, target):
    module = three(strategy, activation, bias=bias)
    program = ctfp8.lower(module, (X,), target=target)
    assert len(matmuls(program)) == 2  # q, k, v; o
    assert sum(p.shape[0] for p in program.state_dict.values() if p.dtype == FP8) == 64 + 32 + 32 + 128
    assert sum(p.dtype == FP8 for p in program.state_dict.values()) == 2
    report = ctfp8.explain(module, (X,), target=target)
    assert [e.name for e in report.rewritten] == ["q.weight", "k.weight", "v.weight", "o.weight"]
    for got, want in zip(program.module()(X), module(X), strict=True):
        assert relative_error(got, want) < 0.06  # its activations are quantized


def test_static_scales_fuse_to_the_largest():
    module = three("tensor", "tensor")
    scales = [q.input_scale for _, _, q in quantized_parameters(module)][:3]
    assert len({float(s) for s in scales}) == 3
    fused = ctfp8.lower(module, (X,), target="xpu").module()(X)
    for scale in scales:
        scale.copy_(max(scales))
    assert all(map(torch.equal, fused, ctfp8.lower(module, (X,), target="xpu").module()(X)))


@pytest.mark.parametrize(
    ("rows", "strategy", "fused", "weight_only"),
    [
        ((64, 32, 32), "channel", [128, 128], 0),
        ((64, 40, 32), "channel", [96, 128], 1),  # k has no multiple of 16 rows: only the weight-only kernel takes it
        ((256, 128, 128), "block", [512, 128], 0),
        ((256, 64, 128), "block", [384, 128], 1),  # and so with a partial block in the middle
    ],
)
def test_what_would_not_be_taken_fused_stays_apart(rows, strategy, fused, weight_only):
    module = three(strategy, "group" if strategy == "block" else "token", rows=rows)
    program = ctfp8.lower(module, (X,), target="cuda:sm90")
    assert [n.meta["val"].shape[-1] for n in matmuls(program)] == fused
    ours = [n.target for n in program.graph.nodes if "ctfp8" in str(n.target)]
    assert ours == weight_only * [torch.ops.ctfp8.weight_only_linear.default]
    assert len(ctfp8.explain(module, (X,), target="cuda:sm90").rewritten) == 4
    for got, want in zip(program.module()(X), module(X), strict=True):
        assert relative_error(got, want) < 0.06


def test_where_nothing_is_rewritten_nothing_is_fused():
    module = three()
    program = ctfp8.lower(module, (X,), target="cuda:sm75")
    assert all(map(torch.equal, program.module()(X), module(X)))
    assert set(program.state_dict) == set(module.state_dict())


@pytest.mark.parametrize("bias", [False, True])
def test_a_compiled_graph_reads_them_in_place(bias):
    module = three(bias=bias)
    want = module(X)
    before = {n: t.clone() for n, t in module.state_dict().items()}
    got, [code] = run_and_get_code(torch.compile(module, backend="ctfp8", fullgraph=True, options=FUSED), X)
    for a, b in zip(got, want, strict=True):
        assert relative_error(a, b) < 0.01
    assert code.count("dequantized_linear.default(") == 2
    assert "torch.ops.ctfp8.pack" not in code
    assert "aten.cat" not in code
    assert "cat" not in code.partition("def call")[2]
    weights = [stored_weight(getattr(module, name), "weight") for name in "qkv"]
    assert len({w.untyped_storage().data_ptr() for w in weights}) == 1
    assert weights[0].untyped_storage().nbytes() == sum(w.nbytes for w in weights) + 256  # where no allocation begins
    after = module.state_dict()
    assert list(before) == list(after)
    assert all(torch.equal(before[n].view(torch.uint8), after[n].view(torch.uint8)) for n in before)


def test_parameters_that_were_moved_away_are_moved_together_again():
    module = three()
    compiled = torch.compile(module, backend="ctfp8", fullgraph=True, options=FUSED)
    want = compiled(X)
    for name in "kq":
        weight = stored_weight(getattr(module, name), "weight")
        weight.data = weight.data.clone()
    assert all(map(torch.equal, compiled(X), want))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_parameters_that_are_packed_by_chance_are_moved_into_one_storage():
    """As a GPU's allocator puts them. torch refuses to read a tensor beyond the end of its own storage."""
    module = three()
    want = module(X)
    memory, end = bytearray(3 * 128 * 128), 0
    for name in "qkv":
        weight = stored_weight(getattr(module, name), "weight")
        placed = torch.frombuffer(memory, dtype=torch.uint8, count=weight.nbytes, offset=end)
        end += weight.nbytes
        weight.data = placed.view(weight.shape).copy_(weight.view(torch.uint8)).view(weight.dtype)
    weights = [stored_weight(getattr(module, name), "weight") for name in "qkv"]
    assert weights[1].data_ptr() == weights[0].data_ptr() + weights[0].nbytes
    got = torch.compile(module, backend="ctfp8", fullgraph=True, options=FUSED)(X)
    assert all(relative_error(a, b) < 0.01 for a, b in zip(got, want, strict=True))
    assert len({w.untyped_storage().data_ptr() for w in weights}) == 1


def test_first_calls_of_several_threads_read_the_right_weights(monkeypatch):
    """Four threads call at once what was never called: one moves the parameters, the others wait, and all read them whole."""
    rows, cols, parts = 64, 256, 4
    graph = torch.fx.Graph()
    nodes = [graph.placeholder(f"p{i}") for i in range(parts)]
    with FakeTensorMode():
        for node in nodes:
            node.meta["val"] = torch.empty(rows, cols)

    def reads(*args):
        whole = torch.as_strided(args[0], (rows * parts, cols), (cols, 1))
        return all(bool((whole[i * rows : (i + 1) * rows] == i).all()) for i in range(parts))

    moves = []
    move = packed.move_together

    def slowly(tensors):
        moves.append("begin")
        time.sleep(0.02)  # long enough for the others to arrive
        move(tensors)
        moves.append("end")

    monkeypatch.setattr(packed, "move_together", slowly)
    packing = packed.WithPacked(reads, packed.places_of(graph, [nodes]))
    with ThreadPoolExecutor(4) as pool:
        for trial in range(5):
            tensors = [torch.full((rows, cols), float(i)) for i in range(parts)]
            moves.clear()
            assert all(pool.map(lambda _, tensors=tensors: packing(*tensors), range(4))), trial
            assert moves == ["begin", "end"]


def test_blocks_of_a_model_compiled_one_by_one():
    blocks = [three() for _ in range(3)]
    with torch.no_grad():
        for i, block in enumerate(blocks):
            stored_weight(block.q, "weight").data.view(torch.uint8).bitwise_xor_(i << 7)  # other signs
    want = [block(X) for block in blocks]
    for block in blocks:
        block.compile(backend="ctfp8", fullgraph=True, options=FUSED)
    for _ in range(2):
        for block, outs in zip(blocks, want, strict=True):
            assert all(relative_error(a, b) < 0.01 for a, b in zip(block(X), outs, strict=True))


def test_a_model_compiles_again_and_saves_as_before(tmp_path):
    model = ctfp8.from_pretrained(DATA / "llama/FP8")
    want = logits(ctfp8.from_pretrained(DATA / "llama/FP8"))
    mlp = model.model.layers[1].mlp
    compiled = torch.compile(mlp, backend="ctfp8", fullgraph=True, dynamic=False, options=FUSED)
    gate, up = (stored_weight(layer, "weight") for layer in (mlp.gate_proj, mlp.up_proj))
    with torch.no_grad():
        for rows in (3, 5):  # at the second its weights share storage
            x = torch.randn(rows, 128).bfloat16()
            got = compiled(x)  # before the model runs eagerly: its weights are in the mapped file, one behind the other
            assert up.untyped_storage().data_ptr() == gate.untyped_storage().data_ptr()
            assert up.data_ptr() == gate.data_ptr() + gate.nbytes
            assert gate.untyped_storage().resizable()  # memory of its own
            assert relative_error(got, mlp(x)) < 0.02
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2
    assert torch.equal(logits(model), want)
    ctfp8.save_pretrained(model, tmp_path)
    assert torch.equal(logits(ctfp8.from_pretrained(tmp_path)), want)
