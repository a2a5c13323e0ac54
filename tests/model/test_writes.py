"""A write to a dequantized weight raises; an adapter on top of FP8 weights trains as over plain ones, and they stay FP8."""

from __future__ import annotations

import copy
import gc

import peft
import pytest
import torch
import torch.nn.functional as F
from conftest import DATA, IDS, fp8_config, logits, quantize, relative_error
from torch import nn
from torch.utils.checkpoint import checkpoint

import ctfp8_compile as ctfp8
from ctfp8_compile.ops import FP8

#: What peft asks of transformers by old names.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")

LORA = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "down_proj"], init_lora_weights=False)


def _linear(rows=16, cols=32):
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(cols, rows))
    state = dict(module.state_dict())
    state["0.weight"], state["0.weight_scale"] = quantize(state["0.weight"])
    return ctfp8.load_state_dict(module, state, fp8_config())


def _add_to_data(linear):
    linear.weight.data += 1


def _assign_data(linear):
    linear.weight.data = torch.zeros(16, 32)


def _assign(linear):
    linear.weight = torch.zeros(16, 32)


def _assign_parameter(linear):
    linear.weight = nn.Parameter(torch.zeros(16, 32))


def _item(linear):
    linear.weight[0, 1] = 3.0


def _grad(linear):
    linear.weight.requires_grad = True


WRITES = {
    "data +=": _add_to_data,
    "data =": _assign_data,
    "weight =": _assign,
    "weight = Parameter": _assign_parameter,
    "weight[…] =": _item,
    "requires_grad =": _grad,
    "add_": lambda linear: linear.weight.add_(1),
    "data.add_": lambda linear: linear.weight.data.add_(1),
    "copy_": lambda linear: linear.weight.copy_(torch.zeros(16, 32)),
    "a row's zero_": lambda linear: linear.weight[2].zero_(),
    "a view's mul_": lambda linear: linear.weight.view(-1).mul_(2),
    "a chunk's fill_": lambda linear: linear.weight.chunk(2)[1].fill_(2),
    "detached": lambda linear: linear.weight.detach().sub_(1),
    "index_add_": lambda linear: linear.weight.index_add_(0, torch.tensor([0]), torch.ones(1, 32)),
    "out=": lambda linear: torch.add(torch.zeros(16, 32), 1, out=linear.weight),
    "init.zeros_": lambda linear: nn.init.zeros_(linear.weight),
    "init.kaiming_uniform_": lambda linear: nn.init.kaiming_uniform_(linear.weight),
    "init.trunc_normal_": lambda linear: nn.init.trunc_normal_(linear.weight),
    "reset_parameters": lambda linear: linear.reset_parameters(),
    "requires_grad_": lambda linear: linear.weight.requires_grad_(),
}  # fmt: skip


@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("grad", [False, True])
def test_a_write_that_would_be_lost_raises(write, grad):
    model = _linear()
    x = torch.randn(3, 32)
    before = model(x)
    with torch.set_grad_enabled(grad), pytest.raises(ctfp8.UsageError, match="dequantize=True"):
        WRITES[write](model[0])
    assert torch.equal(model(x), before)


def test_what_only_reads_gives_plain_tensors():
    weight = _linear()[0].weight
    plain = weight.clone()
    assert type(plain) is torch.Tensor
    plain += 1
    assert type(weight.float() + 1) is torch.Tensor
    assert type(weight @ weight.t()) is torch.Tensor
    assert type(copy.deepcopy(weight)) is torch.Tensor
    assert weight.requires_grad_(False) is not None
    assert int(weight.argmax()) >= 0
    assert (~(weight > 0)).sum() >= 0
    assert len(list(weight)) == 16
    assert torch.cat([weight, weight]).shape == (32, 32)
    assert weight.shape == (16, 32)
    assert weight.dtype == torch.float32
    assert weight.abs().max() in weight.abs()
    assert weight.numpy().shape == (16, 32)
    assert repr(weight)
    torch.testing.assert_close(torch.compile(lambda w: w.sum() * 2, backend="eager")(weight), weight.sum() * 2)


def test_saving_a_value_saves_a_tensor(tmp_path):
    weight = _linear()[0].weight
    torch.save({"weight": weight}, tmp_path / "w.pt")
    assert torch.equal(torch.load(tmp_path / "w.pt")["weight"], weight)


@pytest.mark.parametrize("use", ["linear", "matmul", "view", "checkpoint"])
def test_what_backward_needs_is_kept_in_fp8(use):
    """Ten uses of a weight of 1 MB in bf16: what lies between forward and backward is not ten of it."""
    model = _linear(512, 512)
    held = 0
    x = torch.randn(2, 512, requires_grad=True)
    y = x
    for _ in range(10):
        if use == "linear":
            y = F.linear(y, model[0].weight)
        elif use == "matmul":
            y = y @ model[0].weight.t()
        elif use == "view":
            y = y @ model[0].weight[:512].view(512, 512).mT.unsqueeze(0)[0]
        else:
            y = checkpoint(lambda y: F.linear(y, model[0].weight), y, use_reentrant=False)
    gc.collect()
    held = sum(
        t.untyped_storage().nbytes()
        for t in gc.get_objects()
        if isinstance(t, torch.Tensor) and t.dtype == torch.float32 and t.shape == (512, 512)
    )
    assert held == 0
    y.sum().backward()
    value = model[0].weight.clone().double()
    want = torch.ones(2, 512, dtype=torch.double)
    for _ in range(10):
        want = want @ value
    assert relative_error(x.grad, want) < 1e-5


@pytest.mark.parametrize("name", ["llama/FP8_DYNAMIC", "llama/FP8_BLOCK", "mixtral/FP8"])
def test_an_adapter_trains_as_over_plain_weights(name):
    """With PEFT: the same gradients, the same steps, and FP8 weights that are the bits they were."""
    config = copy.copy(LORA)
    if name.startswith("mixtral"):
        config.target_modules = {"q_proj", "v_proj"}
    models = []
    for dequantize in (False, True):
        base = ctfp8.from_pretrained(DATA / name, dtype=torch.float32, dequantize=dequantize)
        torch.manual_seed(0)
        models.append(peft.get_peft_model(base, config))
    ours, _ = models
    stored = {n: p.clone() for n, p in ours.named_parameters() if p.dtype == FP8}
    assert len(stored) >= 12
    size = sum(p.nbytes for p in ours.parameters() if p.dtype == FP8)
    optimizers = [torch.optim.AdamW([p for p in m.parameters() if p.requires_grad], lr=1e-2) for m in models]
    losses = []
    for _ in range(3):
        for model, optimizer in zip(models, optimizers, strict=True):
            model.train()
            optimizer.zero_grad()
            loss = model(IDS, labels=IDS, use_cache=False).loss
            loss.backward()
            losses.append(loss.item())
        gradients = [{n: p.grad for n, p in m.named_parameters() if p.grad is not None} for m in models]
        assert gradients[0].keys() == gradients[1].keys()
        assert len(gradients[0]) >= 8
        for parameter, gradient in gradients[0].items():
            assert relative_error(gradient, gradients[1][parameter]) < 1e-3, parameter
        for optimizer in optimizers:
            optimizer.step()
    assert losses[-2] < losses[0]
    after = {n: p for n, p in ours.named_parameters() if p.dtype == FP8}
    assert sum(p.nbytes for p in after.values()) == size
    assert all(torch.equal(p.view(torch.uint8), stored[n].view(torch.uint8)) for n, p in after.items())


def test_merging_an_adapter_raises_and_dequantized_merges():
    torch.manual_seed(0)
    model = peft.get_peft_model(ctfp8.from_pretrained(DATA / "llama/FP8_DYNAMIC"), LORA)
    before = logits(model)
    for merge in (model.merge_and_unload, lambda: model.merge_and_unload(safe_merge=True), model.merge_adapter):
        with pytest.raises(ctfp8.UsageError, match="merge an adapter .* dequantize=True"):
            merge()
    assert torch.equal(logits(model), before)
    torch.manual_seed(0)
    plain = peft.get_peft_model(ctfp8.from_pretrained(DATA / "llama/FP8_DYNAMIC", dequantize=True), LORA)
    assert relative_error(logits(plain.merge_and_unload()), before) < 0.02


def test_an_adapter_is_compiled_for_inference():
    torch.manual_seed(0)
    model = peft.get_peft_model(ctfp8.from_pretrained(DATA / "llama/FP8_DYNAMIC"), LORA).eval()
    assert relative_error(logits(torch.compile(model, backend="ctfp8")), logits(model)) < 0.02


def test_an_adapter_is_saved_and_loaded(tmp_path):
    torch.manual_seed(0)
    model = peft.get_peft_model(ctfp8.from_pretrained(DATA / "llama/FP8_DYNAMIC"), LORA).eval()
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(ctfp8.from_pretrained(DATA / "llama/FP8_DYNAMIC"), tmp_path)
    assert torch.equal(logits(again), logits(model))
