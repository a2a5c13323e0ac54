"""Modules of one's own as `.onnx` and `.xml`: every scheme, odd sizes, experts; numbers against the same arithmetic in torch."""

from __future__ import annotations

import numpy as np
import openvino
import pytest
import torch
from conftest import fp8_config, quantize
from support.programs import draw
from support.runtimes import compiled, fp8_in_openvino, onnx_types, session
from torch import nn
from torch.export import Dim

import ctfp8_compile as ctfp8
from ctfp8_compile.model.in_dtype import in_dtype
from ctfp8_compile.ops import expand_scale

EXPERTS, IDS = 3, torch.tensor([2, 0, 2, 1, 0])


class Layers(nn.Module):
    """Linears of odd sizes, one with a bias, and experts that are gathered for each row."""

    def __init__(self, cols: int):
        super().__init__()
        self.one = nn.Linear(cols, 160)
        self.two = nn.Linear(160, 64, bias=False)
        self.experts = nn.Parameter(torch.zeros(EXPERTS, 40, 64))

    def forward(self, x: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        y = self.two(torch.relu(self.one(x)))
        return torch.bmm(self.experts[ids], y.unsqueeze(-1)).squeeze(-1)


def _layers(strategy: str, dtype: torch.dtype, cols: int) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """A module with FP8 weights, and each weight by name in float64."""
    torch.manual_seed(0)
    block = (16, 32)
    model, state, exact = Layers(cols).to(dtype).eval(), {}, {}
    nn.init.normal_(model.experts, std=0.1)
    for name, parameter in model.named_parameters():
        weight = parameter.detach()
        if name.endswith("bias"):
            state[name], exact[name] = weight, weight.double()
            continue
        parts = [quantize(matrix.float(), strategy, block) for matrix in weight.reshape(-1, *weight.shape[-2:])]
        fp8, scale = (torch.stack(tensors) if weight.dim() == 3 else tensors[0] for tensors in zip(*parts, strict=True))
        state[name], state[f"{name}_scale"] = fp8, scale
        step = {"mx": [1, 32], "block": [*block]}.get(strategy, [1, weight.shape[-1]])
        if strategy == "tensor":
            step = [*weight.shape[-2:]]
            scale = scale.reshape(*scale.shape[:-1], 1, 1)
        wide = expand_scale(scale.reshape(*scale.shape[: weight.dim()]), step, *weight.shape[-2:])
        exact[name] = fp8.double() * wide.double()
    config = fp8_config(strategy, None, block)
    config["config_groups"]["group_0"]["targets"] = ["re:.*"]
    return ctfp8.load_state_dict(model, state, config), exact


def _truth(exact: dict[str, torch.Tensor], x: torch.Tensor) -> np.ndarray:
    y = torch.relu(x.double() @ exact["one.weight"].T + exact["one.bias"]) @ exact["two.weight"].T
    return torch.einsum("tnk,tk->tn", exact["experts"][IDS], y).numpy()


SCHEMES = [("tensor", 128), ("channel", 128), ("channel", 72), ("block", 128), ("block", 72), ("mx", 96)]


@pytest.mark.quick("block-72-bfloat16")
@pytest.mark.ci("block-128-bfloat16", "mx-96-bfloat16", "tensor-128-bfloat16", "channel-72-float32")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bfloat16", "float32"])
@pytest.mark.parametrize(("strategy", "cols"), SCHEMES)
def test_every_scheme_is_exact_and_stays_fp8(strategy, cols, dtype, tmp_path):
    """In the file, and in the memory of both runtimes; a block of 32 columns of 72 too."""
    model, exact = _layers(strategy, dtype, cols)
    x = torch.randn(5, cols)
    call = (model, (x[:3].to(dtype), IDS[:3]))
    shapes = {"x": {0: Dim("rows")}, "ids": {0: Dim("rows")}}
    for name in ("m.onnx", "m.xml"):
        done = ctfp8.export(*call, path=tmp_path / name, dynamic_shapes=shapes)
        assert (done.inputs, done.outputs, done.weights) == (("x", "ids"), ("output",), 3)
        assert (dtype == torch.bfloat16) == any(
            "float32, where the model computes in bfloat16" in n for n in done.notes
        )
    assert onnx_types(tmp_path / "m.onnx")["FLOAT8E4M3FN"] == 3
    feed, want = {"x": x.numpy(), "ids": IDS.numpy()}, _truth(exact, x)
    got = session(tmp_path / "m.onnx", tmp_path / "o.onnx").run(None, feed)[0]
    assert np.abs(got - want).max() < 1e-5 * np.abs(want).max()
    assert onnx_types(tmp_path / "o.onnx")["FLOAT8E4M3FN"] == 3  # of the session, behind all optimizations
    there = compiled(tmp_path / "m.xml")
    assert np.abs(there(feed)[0] - want).max() < 1e-5 * np.abs(want).max()
    assert fp8_in_openvino(there) == 2  # those of linears; it dequantizes experts as it compiles


@pytest.mark.long
@pytest.mark.ci(9, 22)
@pytest.mark.parametrize("seed", [0, 1, 5, 9, 11, 13, 17, 18, 20, 22, 24, 27])
def test_forms_of_matmuls(seed, tmp_path):
    """As the model computes in float32, from which bfloat16 differs by its own rounding."""
    case = draw(seed)
    x = case.inputs(5)[0].float()
    with torch.no_grad():
        want = in_dtype(case.module, torch.float32)(x).numpy()
    for name, run in (
        ("m.onnx", lambda p: session(p).run(None, {"x": x.numpy()})),
        ("m.xml", lambda p: compiled(p)(x.numpy())),
    ):
        ctfp8.export(case.module, case.inputs(3), path=tmp_path / name, dynamic_shapes=({0: Dim("rows")},))
        assert np.abs(run(tmp_path / name)[0] - want).max() < 1e-5 * np.abs(want).max(), str(case)


def test_the_model_stays_as_it_is():
    """Its tensors are those of the copy that is exported; what it computes in, its classes and its forward are not."""
    model, _ = _layers("channel", torch.bfloat16, 64)
    x = torch.randn(5, 64).bfloat16()
    before = model(x, IDS)
    made = in_dtype(ctfp8.compile(model), torch.float32)
    assert made(x.float(), IDS).dtype == torch.float32
    assert {id(p) for p in made.parameters()} == {id(p) for p in model.parameters()}
    assert torch.equal(type(model).forward(model, x, IDS), before)
    assert model.one.bias.dtype == torch.bfloat16


def test_float16(tmp_path):
    model, exact = _layers("channel", torch.bfloat16, 64)
    x = torch.randn(5, 64)
    done = ctfp8.export(model, (x.bfloat16(), IDS), path=tmp_path / "m.onnx", dtype="float16")
    assert "It computes in float16" in str(done)
    got = session(tmp_path / "m.onnx").run(None, {"x": x.half().numpy(), "ids": IDS.numpy()})[0]
    want = _truth(exact, x)
    assert got.dtype == np.float16
    assert np.abs(got - want).max() < 0.01 * np.abs(want).max()


@pytest.mark.parametrize(
    ("path", "arguments", "message"),
    [
        ("m.onnx", {"target": "cuda:sm90"}, "target= is for .pt2 files"),
        ("m.xml", {"package": "aoti"}, "package= is for .pt2 files"),
        ("m.pt2", {"dtype": "float16"}, "dtype= is for .onnx and .xml files"),
        ("m.onnx", {"dtype": torch.bfloat16}, "dtype='bfloat16': it is 'float32' or 'float16'"),
        ("m.xml", {"dtype": "float16"}, "INFERENCE_PRECISION_HINT"),
        ("m.onnx", {"stateful": True}, "stateful= is for"),
        ("m.onnx", {"args": ()}, "is no transformers model: pass the arguments of one call"),
        ("m.onnx", {"args": ([torch.ones(2, 64)], IDS)}, "x: a list, and these files take tensors alone"),
        ("m.bin", {}, "a .pt2, .onnx or .xml file"),
    ],
)
def test_what_does_not_fit_is_said_before_anything_is_traced(path, arguments, message, tmp_path):
    model, _ = _layers("channel", torch.bfloat16, 64)
    arguments = {"args": (torch.ones(5, 64).bfloat16(), IDS), **arguments}
    with pytest.raises(ctfp8.UsageError, match=message):
        ctfp8.export(model, path=tmp_path / path, **arguments)
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize(("path", "missing"), [("m.onnx", "onnxscript"), ("m.xml", "openvino")])
def test_what_is_not_installed_is_named(path, missing, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, missing, None)
    model, _ = _layers("channel", torch.bfloat16, 64)
    with pytest.raises(ctfp8.UsageError, match=rf"{missing} is not installed.*pip install 'ctfp8-compile\[o"):
        ctfp8.export(model, (torch.ones(5, 64).bfloat16(), IDS), path=tmp_path / path)


@pytest.mark.quick("mx-True", "block-False")
@pytest.mark.parametrize("dynamo", [True, False])
@pytest.mark.parametrize("strategy", ["channel", "block", "mx"])
def test_torch_onnx_export_takes_a_model_as_it_is(strategy, dynamo, tmp_path):
    """By either of its exporters."""
    model, exact = _layers(strategy, torch.float32, 96)
    x = torch.randn(5, 96)
    torch.onnx.export(
        model, (x, IDS), tmp_path / "m.onnx", dynamo=dynamo, verbose=False, input_names=["x", "ids"], opset_version=20
    )
    got, want = session(tmp_path / "m.onnx").run(None, {"x": x.numpy(), "ids": IDS.numpy()})[0], _truth(exact, x)
    assert np.abs(got - want).max() < 1e-5 * np.abs(want).max()


def test_convert_model_says_how():
    model, _ = _layers("channel", torch.float32, 64)
    with pytest.raises(Exception, match=r"ctfp8\.export\(model, path='model\.xml'\)"):
        openvino.convert_model(model, example_input=(torch.randn(5, 64), IDS))
    assert torch.jit.trace(model, (torch.randn(5, 64), IDS)) is not None
