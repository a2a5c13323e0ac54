"""Rotated checkpoints (SpinQuant, QuIP), made with compressed-tensors' own transform code: applied, reported, saved bit for bit."""

from __future__ import annotations

import copy
import json
import re

import pytest
import torch
from compressed_tensors.transform.utils.hadamard import deterministic_hadamard_matrix
from conftest import relative_error
from safetensors.torch import load_file, save_file
from support.rotated import CASES, rotated
from torch import nn
from transformers import AutoModelForCausalLM

import ctfp8_compile as ctfp8
from ctfp8_compile import ops
from ctfp8_compile.checkpoint.contents import look
from ctfp8_compile.model.rotation import rotations

IDS = torch.arange(34).view(2, 17) * 7 % 128
CALL = ((IDS,), {"use_cache": False})
BOUND = 0.07  # what FP8 weights cost these models


@pytest.fixture(scope="module", params=list(CASES))
def case(request, tmp_path_factory):
    return request.param, rotated(tmp_path_factory.mktemp("rotated"), CASES[request.param])


@torch.no_grad()
def _logits(model, **kwargs):
    out = model(IDS, **(kwargs or {"use_cache": False}))
    return out["logits"]


@pytest.fixture(scope="module")
def want(case):
    return _logits(case[1].dense)


@pytest.mark.ci
@pytest.mark.quick("R3")
def test_every_way_computes_what_the_dense_model_does(case, want, tmp_path):
    model = ctfp8.from_pretrained(case[1].folder)
    eager = _logits(model)
    assert relative_error(eager, want) < BOUND
    assert torch.equal(_logits(copy.deepcopy(model)), eager)
    assert relative_error(_logits(model, use_cache=True), want) < BOUND
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="ctfp8", fullgraph=True)
    assert relative_error(_logits(compiled), want) < BOUND
    ctfp8.export(model, *CALL, path=tmp_path / "m.pt2")
    with torch.no_grad():
        assert relative_error(ctfp8.load(tmp_path / "m.pt2")(IDS)["logits"], want) < BOUND
    assert (tmp_path / "m.pt2").stat().st_size < 2 * (case[1].folder / "model.safetensors").stat().st_size


def test_eager_is_what_compressed_tensors_computes(case):
    name, made = case
    if name == "R3":
        pytest.skip("compressed-tensors 0.20 does not find the cache of transformers 5.24, and leaves keys as they are")
    if name.startswith("two"):
        pytest.skip(
            "compressed-tensors 0.20 runs two groups' hooks in an order that does not undo what is in the weights"
        )
    model = ctfp8.from_pretrained(made.folder)
    seen = {}
    for which, one in (("ours", model), ("theirs", made.hooked)):
        layer = one.model.layers[0]
        x = torch.randn(3, 5, 128, generator=torch.Generator().manual_seed(1)).bfloat16()
        with torch.no_grad():
            seen[which] = [layer.mlp(x), layer.self_attn.o_proj(x), layer.self_attn.q_proj(x)]
    assert all(torch.equal(a, b) for a, b in zip(seen["ours"], seen["theirs"], strict=True))


def test_saved_bit_for_bit_and_loaded_again(case, want, tmp_path):
    made = case[1]
    ctfp8.save_pretrained(ctfp8.from_pretrained(made.folder), tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    assert saved.keys() == made.state.keys()
    for name, tensor in made.state.items():
        assert saved[name].dtype == tensor.dtype
        assert torch.equal(saved[name].view(torch.uint8), tensor.view(torch.uint8)), name
    configs = [json.loads((f / "config.json").read_text())["quantization_config"] for f in (made.folder, tmp_path)]
    assert configs[0] == configs[1]
    assert relative_error(_logits(ctfp8.from_pretrained(tmp_path)), want) < BOUND


def test_an_edited_matrix_is_saved_as_the_model_holds_it(case, tmp_path):
    """An orthogonal one stays one with its sign turned; what does not load again is refused."""
    made = case[1]
    model = ctfp8.from_pretrained(made.folder)
    _, _, rotation = next(rotations(model))
    name = rotation.stored.name
    rotation.weight.neg_()
    model.save_pretrained(tmp_path / "out")
    saved = load_file(tmp_path / "out/model.safetensors")
    assert {k for k in saved if not torch.equal(saved[k].view(torch.uint8), made.state[k].view(torch.uint8))} == {name}
    assert torch.equal(saved[name], -made.state[name])
    assert torch.equal(_logits(ctfp8.from_pretrained(tmp_path / "out")), _logits(model))
    rotation.weight[0, 0] = torch.nan
    with pytest.raises(
        ctfp8.UsageError, match=f"{re.escape(name)} was changed, .*: holds NaN.*Load the checkpoint again"
    ):
        model.save_pretrained(tmp_path / "refused")
    assert not (tmp_path / "refused").exists()


def test_a_matrix_of_one_module_alone_and_one_taken_out_are_refused(tmp_path):
    folder = rotated(tmp_path, CASES["R4"]).folder
    model = ctfp8.from_pretrained(folder)
    (_, _, first), (second, module, _) = list(rotations(model))[:2]
    first.weight = -first.weight
    with pytest.raises(ctfp8.UsageError, match=rf"{second} and .* share the matrix .*copy_"):
        model.save_pretrained(tmp_path / "out")
    model = ctfp8.from_pretrained(folder)
    for path, module, _ in list(rotations(model)):
        del module._modules[path.rpartition(".")[2]]
    with pytest.raises(ctfp8.UsageError, match=r"down_proj: its transform R4.* was taken out.*dequantize=True"):
        model.save_pretrained(tmp_path / "out")


def test_dequantized_holds_the_transforms_in_its_weights(case, want, tmp_path):
    model = ctfp8.from_pretrained(case[1].folder, dequantize=True)
    assert relative_error(_logits(model), want) < BOUND
    assert not list(rotations(model))
    model.save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    assert torch.equal(_logits(AutoModelForCausalLM.from_pretrained(tmp_path)), _logits(model))


@pytest.mark.quick("u and v", "R4")
def test_lowered_matmuls_are_found_and_fused_behind_transforms(case):
    name, made = case
    model = ctfp8.from_pretrained(made.folder)
    program = ctfp8.lower(model, *CALL, target="cuda:sm90")
    names = [str(node.target) for node in program.graph.nodes]
    assert not [n for n in names if n.startswith("ctfp8.")]
    assert names.count("fbgemm.f8f8bf16_rowwise.default") == 8  # of 14: q, k, v and gate, up are one each
    rotated_inputs = {
        "R4": 2,
        "R4 of blocks, float32": 2,
        "inverse input": 4,
        "u and v": 22,
        "two on one input": 4,
        "two on one output": 4,
        "R3": 4,
    }
    assert names.count("aten.mm.default") == rotated_inputs[name]


@pytest.mark.quick("u and v", "R3")
def test_report_and_inspect_name_transforms(case):
    name, made = case
    report = ctfp8.explain(ctfp8.from_pretrained(made.folder), *CALL)
    applied = [
        n
        for n in made.hooked.state_dict()
        if n.rpartition(".")[0].rpartition("_")[2] in ("input", "output", "attn", "cache")
    ]
    assert {e.name for e in report.transforms} == {n.rpartition(".")[0] for n in applied}
    assert "transform" in report.summary()
    assert len(report.rewritten) == 14
    assert [t.partition(":")[0] for t in look(made.folder).transforms] == list(CASES[name])


class _Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(64, 32, bias=False), nn.Linear(64, 48)

    def forward(self, x):
        return self.a(x), self.b(x)


def _two(block=None, kind="hadamard", targets=("Linear",)):
    matrix = deterministic_hadamard_matrix(block or 64, torch.float64)
    state = {"a.R_input.weight": matrix, "b.bias": torch.randn(48)}
    for name, rows in (("a", 32), ("b", 48)):
        state |= {
            f"{name}.weight": torch.randn(rows, 64).to(ops.FP8),
            f"{name}.weight_scale": torch.rand(rows, 1) + 0.5,
        }
    fp8 = {"num_bits": 8, "type": "float", "symmetric": True}
    entry = {"targets": list(targets), "location": "input"}
    group = {"type": kind, "head_dim": block, "precision": "torch.float64", "apply": [entry]}
    config = {
        "config_groups": {"g": {"targets": ["Linear"], "weights": {**fp8, "strategy": "channel"}}},
        "transform_config": {"config_groups": {"R": group}},
    }
    return state, config, group


@pytest.mark.parametrize("block", [None, 16])
def test_any_module(block):
    state, config, _ = _two(block)
    module = ctfp8.load_state_dict(_Two(), state, config)
    x = torch.randn(5, 64)
    full = torch.block_diag(*[state["a.R_input.weight"] / (block or 64) ** 0.5] * (64 // (block or 64)))
    for got, name in zip(module(x), "ab", strict=True):
        want = x.double() @ full @ (state[f"{name}.weight"].double() * state[f"{name}.weight_scale"]).T
        want = want + state["b.bias"] if name == "b" else want
        assert relative_error(got, want) < 1e-6
    assert module.a.R_input.weight.data_ptr() == module.b.R_input.weight.data_ptr()
    meta = module.to("meta")
    assert meta.a.R_input.weight is meta.b.R_input.weight
    assert meta.a.R_input.weight.dtype == torch.float64


def _drop(state, config, group):
    del state["a.R_input.weight"]


def _tilt(state, config, group):
    state["a.R_input.weight"][0] *= 2


def _nan(state, config, group):
    state["a.R_input.weight"][3, 3] = float("nan")


BAD = {
    "a matrix is missing": (_drop, "a.R_input.weight: a needs this 64×64 matrix .*Download"),
    "not orthogonal": (_tilt, "a.R_input.weight .*not orthogonal"),
    "NaN": (_nan, "a.R_input.weight .*NaN"),
    "another size": (lambda s, c, g: s.update({"a.R_input.weight": torch.ones(32, 32)}), "64×64.*head_dim"),
    "a size that does not divide": (lambda s, c, g: g.update(head_dim=48), "head_dim=48 .*divide"),
    "no size": (lambda s, c, g: g.update(head_dim=-1), "head_dim: -1 is not a size"),
    "integers": (
        lambda s, c, g: s.update({"a.R_input.weight": torch.ones(64, 64, dtype=torch.int64)}),
        "floating-point",
    ),
    "an unknown type": (lambda s, c, g: g.update(type="butterfly"), "'butterfly'; known are hadamard"),
    "an unknown location": (lambda s, c, g: g["apply"][0].update(location="middle"), "location"),
    "no module": (lambda s, c, g: g["apply"][0].update(targets=["nothing"]), "nothing.*has no such module"),
    "attention of no model of transformers": (
        lambda s, c, g: (g["apply"][0].update(location="q_attn"), s.pop("a.R_input.weight")),
        "vLLM",
    ),
    "no permutation": (lambda s, c, g: g.update(randomize=True), "a.R_input.perm"),
    "not an object": (lambda s, c, g: c.update(transform_config=3), "transform_config is not an object"),
    "no config for the matrix": (lambda s, c, g: c.pop("transform_config"), "R_input.weight.*no group 'R'"),
    "an expression that is none": (lambda s, c, g: g["apply"][0].update(targets=["re:("]), "not a regular expression"),
}


@pytest.mark.parametrize("name", list(BAD))
def test_what_cannot_be_applied_is_refused_in_a_sentence(name):
    edit, message = BAD[name]
    state, config, group = _two()
    edit(state, config, group)
    module = _Two()
    before = {k: v.clone() for k, v in module.state_dict().items()}
    with pytest.raises(ctfp8.errors.Ctfp8Error, match=message):
        ctfp8.load_state_dict(module, state, config)
    assert all(torch.equal(v, before[k]) for k, v in module.state_dict().items())


def test_attention_implementation_set_after_loading_is_refused(tmp_path):
    model = ctfp8.from_pretrained(rotated(tmp_path, CASES["R3"]).folder)
    model.set_attn_implementation("eager")
    with pytest.raises(ctfp8.errors.UsageError, match="attn_implementation was set to 'eager'"):
        model(IDS)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("block", [8, 64])
@pytest.mark.parametrize("transposed", [False, True])
def test_operator_against_float64(dtype, block, transposed):
    x, matrix = torch.randn(2, 3, 64).to(dtype), torch.randn(block, block, dtype=torch.float64)
    args = (x, matrix, 3.0, transposed, torch.float64, "R")
    full = torch.block_diag(*[matrix.T if transposed else matrix] * (64 // block))
    assert torch.equal(ops.ROTATE(*args), (x.double() @ full / 3).to(dtype))
    torch.library.opcheck(ops.ROTATE, args, test_utils=("test_schema", "test_faketensor"))


def test_missing_shared_matrix_names_the_first_module(tmp_path):
    made = rotated(tmp_path, CASES["R4"])
    name = "model.layers.0.mlp.down_proj.R4_input.weight"
    save_file(
        {k: v for k, v in made.state.items() if k != name}, tmp_path / "model.safetensors", metadata={"format": "pt"}
    )
    with pytest.raises(ctfp8.errors.CheckpointError, match=name):
        ctfp8.from_pretrained(tmp_path)
