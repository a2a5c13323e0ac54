"""Whose memory is whose: a user's tensors stay where they are, and a loaded module shares nothing that can be written to."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import DATA, IDS, fp8_config, quantize, relative_error
from torch import nn

import ctfp8_compile as ctfp8
from ctfp8_compile.ops import FP8


class Shifted(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(32, 16)
        self.register_buffer("shift", torch.zeros(16))

    def forward(self, x, out=None):
        y = self.a(x) + self.shift
        if out is not None:
            out.copy_(y)
        return y


def state_of(module):
    torch.manual_seed(0)
    state = {name: torch.randn(t.shape).to(t.dtype) for name, t in module.state_dict().items()}
    state["a.weight"], state["a.weight_scale"] = quantize(state["a.weight"].reshape(16, -1), "channel")
    return state


@pytest.mark.parametrize("first", [torch.inference_mode, torch.no_grad])
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("dequantize", [False, True])
def test_a_first_run_changes_nothing_for_later_gradients(first, compiled, dequantize):
    model = ctfp8.from_pretrained(DATA / "llama/FP8", dequantize=dequantize)
    run = torch.compile(model, backend="ctfp8") if compiled and not dequantize else model
    with first():
        run(IDS, use_cache=False)
    assert not any(t.is_inference() for t in (*model.parameters(), *model.buffers()))
    x = torch.randn(1, 4, model.config.hidden_size, dtype=model.dtype, requires_grad=True)
    model(inputs_embeds=x).logits.sum().backward()
    assert x.grad is not None
    assert x.grad.isfinite().all()
    assert x.grad.abs().max() > 0


@pytest.fixture
def module():
    return ctfp8.load_state_dict(Shifted(), state_of(Shifted()), fp8_config())


@pytest.mark.parametrize("as_parameter", [False, True])
def test_an_array_that_is_used_again_is_read_again(module, as_parameter):
    array = np.ones((4, 32), dtype=np.float32)
    x = torch.from_numpy(array)
    if as_parameter:
        x = nn.Parameter(x, requires_grad=False)
    run = torch.compile(module, backend="ctfp8")
    for value in (1.0, -3.0, 0.5):
        array[:] = value
        assert relative_error(run(x), module(torch.full((4, 32), value))) < 1e-5
        assert x.data_ptr() == array.ctypes.data


def test_results_written_in_place_reach_the_array(module):
    array = np.zeros((4, 16), dtype=np.float32)
    x = torch.randn(4, 32)
    want = module(x)
    torch.compile(module, backend="ctfp8")(x, torch.from_numpy(array))
    assert relative_error(torch.from_numpy(array), want) < 1e-5


def test_a_slice_of_columns_of_an_array(module):
    x = torch.from_numpy(np.random.default_rng(0).standard_normal((4, 64)).astype(np.float32))[:, ::2]
    assert relative_error(torch.compile(module, backend="ctfp8")(x), module(x)) < 1e-5


def test_a_weight_that_is_a_slice_of_columns_of_an_array(module):
    state = state_of(Shifted())
    wide = np.zeros((16, 48), dtype=np.uint8)
    weight = torch.from_numpy(wide)[:, 8:40].view(FP8)
    weight.copy_(state["a.weight"])
    mapped = ctfp8.load_state_dict(Shifted(), state | {"a.weight": weight}, fp8_config())
    x = torch.randn(4, 32)
    run = torch.compile(mapped, backend="ctfp8")
    for _ in range(2):
        assert relative_error(run(x), module(x)) < 1e-5
    wide[:] = 0x38  # it has left the array
    assert relative_error(run(x), module(x)) < 1e-5


def test_load_state_dict_shares_nothing_that_can_be_written():
    state = state_of(Shifted())
    first, second = (ctfp8.load_state_dict(Shifted(), state, fp8_config()) for _ in range(2))
    x = torch.randn(4, 32)
    want = first(x)
    with torch.no_grad():
        for module in (second, state):
            for tensor in (module.state_dict() if isinstance(module, nn.Module) else module).values():
                if tensor.dtype != FP8:
                    tensor.fill_(9.0)
    assert torch.equal(first(x), want)


class Normed(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(32, 16)
        self.norm = nn.BatchNorm1d(16)
        self.register_buffer("mask", torch.zeros(16, dtype=torch.bool))
        self.register_buffer("order", torch.zeros(16, dtype=torch.int32))

    def forward(self, x):
        return self.norm(self.a(x)).masked_fill(self.mask, 0.0)[:, self.order.long()]


def normed_state():
    state = state_of(Normed())
    state["norm.running_var"] = torch.rand(16) + 0.5
    state["norm.num_batches_tracked"] = torch.tensor(7)
    state["mask"], state["order"] = torch.arange(16) % 3 == 0, torch.arange(16, dtype=torch.int32).flip(0)
    return state


def test_counters_masks_and_indices_are_loaded_as_they_are():
    state = normed_state()
    module = ctfp8.load_state_dict(Normed(), state, fp8_config())
    assert module.norm.num_batches_tracked.item() == 7
    twin = Normed().eval()
    twin.load_state_dict(
        {k: v for k, v in state.items() if k != "a.weight_scale"}
        | {"a.weight": state["a.weight"].float() * state["a.weight_scale"]}
    )
    x = torch.randn(5, 32)
    assert relative_error(torch.compile(module, backend="ctfp8")(x), twin(x)) < 1e-5


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"mask": torch.zeros(16)}, "mask .*declares bool"),
        ({"order": torch.zeros(16, dtype=torch.int64)}, "order .*declares int32"),
        ({"norm.running_var": torch.ones(16).to(FP8)}, "no weight matrix of this name"),
    ],
)
def test_a_buffer_of_another_kind_is_named(change, sentence):
    with pytest.raises(ctfp8.CheckpointError, match=sentence):
        ctfp8.load_state_dict(Normed(), normed_state() | change, fp8_config())


class Convolved(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Conv1d(8, 16, 4)

    def forward(self, x):
        return self.a(x)


@pytest.mark.parametrize("shape", [(), (1,), (1, 1), (1, 1, 1)])
def test_a_convolution_with_one_scale(shape):
    torch.manual_seed(0)
    weight = torch.randn(16, 8, 4) * 0.1
    scale = weight.abs().max() / 448
    state = {"a.weight": (weight / scale).to(FP8), "a.weight_scale": scale.reshape(shape), "a.bias": torch.randn(16)}
    config = fp8_config("tensor")
    config["config_groups"]["group_0"]["targets"] = ["Linear", "Conv1d"]
    module = ctfp8.load_state_dict(Convolved(), state, config)
    x = torch.randn(2, 8, 20)
    want = nn.functional.conv1d(x, state["a.weight"].float() * scale, state["a.bias"])
    assert torch.equal(module(x), want)
    assert relative_error(torch.compile(module, backend="ctfp8")(x), want) < 1e-5
