"""`quantize_activations`: static activations as QuantizeLinear and DequantizeLinear, against the same arithmetic in float64."""

from __future__ import annotations

import collections

import numpy as np
import onnx
import pytest
import torch
from conftest import DATA, fp8_config, quantize
from support.runtimes import compiled, session
from torch import nn
from torch.export import Dim

import ctfp8_compile as ctfp8
from ctfp8_compile.model.parametrization import quantized_parameters


def _through_fp8(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Float32 divides, as a runtime does; the rest is exact."""
    q = (x.float() / scale.float()).clamp(-448, 448).to(torch.float8_e4m3fn)
    return q.double() * scale.double()


def _operators(path):
    return collections.Counter(node.op_type for node in onnx.load(path, load_external_data=False).graph.node)


class Two(nn.Module):
    """A linear whose activation is static, and one whose is not quantized."""

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(72, 160), nn.Linear(160, 64, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.two(torch.relu(self.one(x)))


def _two(activations: tuple[str | None, str | None], dtype=torch.float32):
    torch.manual_seed(0)
    model, state = Two().to(dtype).eval(), {}
    config = fp8_config("channel", None)
    for i, (name, activation) in enumerate(zip(("one", "two"), activations, strict=True)):
        group = fp8_config("channel", activation)["config_groups"]["group_0"]
        config["config_groups"][f"group_{i}"] = group | {"targets": [f"re:.*{name}$"]}
        state[f"{name}.weight"], state[f"{name}.weight_scale"] = quantize(getattr(model, name).weight.detach().float())
        if activation == "tensor":
            state[f"{name}.input_scale"] = torch.tensor([0.004])
    state["one.bias"] = model.one.bias.detach()
    return ctfp8.load_state_dict(model, state, config), state


@pytest.mark.quick("three dimensions")
@pytest.mark.parametrize(
    ("shape", "dtype"),
    [((5, 72), torch.float32), ((2, 5, 72), torch.bfloat16)],
    ids=["two dimensions", "three dimensions"],
)
def test_a_linear(shape, dtype, tmp_path):
    """Values beyond 448 scales saturate; the other linear's activation stays as it is."""
    model, state = _two(("tensor", "token"), dtype)
    x = torch.randn(shape)
    assert (x.abs() > 448 * 0.004).any()
    weights = {n: state[f"{n}.weight"].double() * state[f"{n}.weight_scale"].double() for n in ("one", "two")}
    first = _through_fp8(x, state["one.input_scale"]) @ weights["one"].T + state["one.bias"].double()
    want = (torch.relu(first) @ weights["two"].T).numpy()
    plain = (torch.relu(x.double() @ weights["one"].T + state["one.bias"].double()) @ weights["two"].T).numpy()
    for name in ("m.onnx", "m.xml"):
        shapes = ({len(shape) - 2: Dim("rows")},)
        example = x[..., :3, :].to(dtype)
        done = ctfp8.export(model, (example,), path=tmp_path / name, dynamic_shapes=shapes, quantize_activations=True)
        assert "Activations with a static scale go through FP8. Those with a dynamic scale are not quantized" in str(
            done
        )
        run = (
            session(tmp_path / name).run(None, {"x": x.numpy()})[0]
            if name == "m.onnx"
            else compiled(tmp_path / name)(x.numpy())[0]
        )
        error = np.abs(run - want).max() / np.abs(want).max()
        # OpenVINO 2026.4 rounds to FP8 through float16, and a few values to the other side (findings/)
        assert error < (1e-5 if name == "m.onnx" else 0.03)
        assert np.linalg.norm(run - want) < 0.4 * np.linalg.norm(plain - want)
    assert _operators(tmp_path / "m.onnx")["QuantizeLinear"] == 1


@pytest.mark.quick("m.onnx")
@pytest.mark.parametrize("name", ["m.onnx", "m.xml"])
def test_experts_take_the_scale_of_their_own(name, tmp_path):
    model = ctfp8.from_pretrained(DATA / "mixtral/FP8", dtype=torch.float32)
    experts = model.model.layers[0].mlp.experts
    found = {n: quantized for n, _, quantized in quantized_parameters(experts)}
    gate_up, down = (getattr(experts, n).detach().double() for n in ("gate_up_proj", "down_proj"))
    count, hidden = gate_up.shape[0], gate_up.shape[-1]
    scale = {n: quantized.input_scale.amax(-1) for n, quantized in found.items()}
    torch.manual_seed(0)
    x = torch.randn(6, hidden)
    ids = torch.stack([torch.randperm(count)[:2] for _ in range(6)])
    share = torch.softmax(torch.randn(6, 2), -1)
    want = torch.zeros(6, hidden, dtype=torch.float64)
    for row in range(6):
        for expert, weight in zip(ids[row], share[row], strict=True):
            both = gate_up[expert] @ _through_fp8(x[row], scale["gate_up_proj"][expert])
            gate, up = both.chunk(2)
            inner = (torch.nn.functional.silu(gate) * up).float()
            want[row] += weight * (down[expert] @ _through_fp8(inner, scale["down_proj"][expert]))
    experts.config._experts_implementation = "batched_mm"
    ctfp8.export(experts, (x, ids, share), path=tmp_path / name, quantize_activations=True)
    feed = dict(
        zip(("hidden_states", "top_k_index", "top_k_weights"), (t.numpy() for t in (x, ids, share)), strict=True)
    )
    got = session(tmp_path / name).run(None, feed)[0] if name == "m.onnx" else compiled(tmp_path / name)(feed)[0]
    difference = np.linalg.norm(got - want.numpy()) / want.norm().item()
    assert difference < (
        0.003 if name == "m.onnx" else 0.03
    )  # a float32 beside a border of FP8 may fall on its other side


@pytest.mark.long
@pytest.mark.ci("m.onnx")
@pytest.mark.parametrize("name", ["m.onnx", "m.xml"])
def test_a_language_model(name, tmp_path):
    """Each linear's input, put through FP8 by a hook in torch."""
    model = ctfp8.from_pretrained(DATA / "llama/FP8")
    ctfp8.export(model, path=tmp_path / name, quantize_activations=True)
    model = ctfp8.from_pretrained(DATA / "llama/FP8", dtype=torch.float32)
    ids = torch.arange(5, 45).reshape(2, 20)
    with torch.no_grad():
        plain = model(ids, use_cache=False).logits.numpy()
        for _, linear, quantized in quantized_parameters(model):
            scale = quantized.input_scale
            linear.register_forward_pre_hook(lambda _, args, scale=scale: _through_fp8(args[0], scale).float())
        want = model(ids, use_cache=False).logits.numpy()
    config = model.config
    mask = np.ones((2, 20), np.int64)
    feed = {"input_ids": ids.numpy(), "attention_mask": mask, "position_ids": mask.cumsum(1) - 1}
    if name == "m.onnx":
        nothing = np.zeros((2, config.num_key_value_heads, 0, config.head_dim), np.float32)
        there = session(tmp_path / name)
        feed |= {i.name: nothing for i in there.get_inputs() if i.name.startswith("past")}
        got = there.run(["logits"], feed)[0]
    else:
        got = compiled(tmp_path / name)(feed | {"beam_idx": np.arange(2, dtype=np.int32)})["logits"]
    error, without = (np.linalg.norm(one - want) / np.linalg.norm(want) for one in (got, plain))
    assert error < (0.01 if name == "m.onnx" else without)
    assert without > 0.03  # it does something


@pytest.mark.parametrize("activations", [("token", "token"), (None, None)], ids=["dynamic", "none"])
def test_a_scale_that_is_not_in_the_file_is_refused(activations, tmp_path):
    model, _ = _two(activations)
    with pytest.raises(ctfp8.UsageError, match="no activation of this model has a static scale"):
        ctfp8.export(model, (torch.ones(5, 72),), path=tmp_path / "m.onnx", quantize_activations=True)
    assert not [*tmp_path.iterdir()]
