"""FP8 tables of embeddings: rows are gathered and scaled, in every mode; a tied head is the same tensor; files come back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import fp8_config, relative_error
from safetensors.torch import load_file
from support.tables import BLOCKS, HEADS, HIDDEN, VOCAB, quantize, write
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import ctfp8_compile as ctfp8
from ctfp8_compile.model.parametrization import quantized_parameters, stored_weight
from ctfp8_compile.ops import FP8, dequantize_reference, embedding

IDS = torch.arange(24).mul(7).remainder(VOCAB).view(2, 12)
STRATEGIES = ("tensor", "channel", "group", "block")


class Largest(TorchDispatchMode):
    """The largest tensor that an operator makes anew; views of what is there are none."""

    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and not func.is_view and out.device.type != "meta":
            self.numel = max(self.numel, out.numel())
        return out


def run(model: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=IDS, use_cache=False).logits


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_checkpoint_is_right_and_comes_back(strategy: str, head: str, tmp_path: Path) -> None:
    tables = write(tmp_path / "in", strategy, head, shards=2 if strategy == "tensor" else 1)
    model = ctfp8.from_pretrained(tables.folder, dtype=torch.float32)
    assert relative_error(run(model), run(tables.exact)) < 1e-6
    assert model.dtype == model.model.dtype == torch.float32
    model.tie_weights()
    assert relative_error(run(model), run(tables.exact)) < 1e-6
    table = stored_weight(model.model.embed_tokens, "weight")
    assert table.dtype == FP8
    if head == "tied":
        assert stored_weight(model.lm_head, "weight") is table
    ctfp8.save_pretrained(model, tmp_path / "out")
    before, after = (
        {n: t for f in folder.glob("*.safetensors") for n, t in load_file(f).items()}
        for folder in (tables.folder, tmp_path / "out")
    )
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert tensor.dtype == after[name].dtype, name
        assert torch.equal(tensor.view(torch.uint8), after[name].view(torch.uint8)), name


@pytest.mark.ci("channel", "block")
@pytest.mark.long
@pytest.mark.parametrize(
    ("strategy", "head"), [("tensor", "tied"), ("channel", "bf16"), ("block", "tied"), ("group", "fp8")]
)
def test_compiled_and_exported(strategy: str, head: str, tmp_path: Path) -> None:
    tables = write(tmp_path / "in", strategy, head)
    model = ctfp8.from_pretrained(tables.folder, dtype=torch.float32)
    want = run(tables.exact)
    before = len(ctfp8.compiled_reports())
    assert relative_error(run(torch.compile(model, backend="ctfp8", fullgraph=True)), want) < 1e-5
    [report] = ctfp8.compiled_reports()[before:]
    assert not [e for e in report.kept if "could not be built" not in e.reason]
    assert ("model.embed_tokens.weight", "embedding") in {(e.name, e.rule) for e in report.rewritten}
    ctfp8.export(model, (IDS,), {"use_cache": False}, path=tmp_path / "m.pt2")
    loaded = ctfp8.load(tmp_path / "m.pt2")
    assert relative_error(loaded(IDS, use_cache=False).logits, want) < 1e-5
    for target in ("cuda:sm90", "cuda:sm80", "xpu"):
        graph = ctfp8.lower(model, (IDS,), {"use_cache": False}, target=target).graph
        gathered = [n for n in graph.nodes if n.target is torch.ops.aten.embedding.default]
        assert {n.meta["val"].dtype for n in gathered} <= {FP8, torch.float32}
        assert FP8 in {n.meta["val"].dtype for n in gathered}


def test_eager_never_holds_the_table(tmp_path: Path) -> None:
    """Of 4000 rows, 24 are asked for; nothing that is made is larger than what the rest of the model makes."""
    for kind in ("llama", "gemma3_text"):  # gemma's embedding has a forward of its own
        tables = write(tmp_path / kind, "channel", "bf16", kind, vocab_size=4000)
        model = ctfp8.from_pretrained(tables.folder)
        assert tuple(stored_weight(model.model.embed_tokens, "weight").shape) == (4000, HIDDEN)
        with torch.no_grad(), Largest() as seen:
            rows = model.model.embed_tokens(IDS)
        assert seen.numel <= rows.numel()
        whole = model.model.embed_tokens.weight
        assert torch.equal(
            rows, whole[IDS] * getattr(model.model.embed_tokens, "embed_scale", torch.tensor(1)).to(whole.dtype)
        )


@pytest.mark.parametrize("dynamic", [False, True])
def test_no_graph_holds_the_table(tmp_path: Path, dynamic: bool) -> None:
    tables = write(tmp_path / "in", "channel", "bf16", vocab_size=4000)
    model = ctfp8.from_pretrained(tables.folder)
    shapes = {"input_ids": {1: torch.export.Dim("tokens", min=2, max=32)}, "use_cache": None} if dynamic else None
    graph = ctfp8.lower(model, (), {"input_ids": IDS, "use_cache": False}, dynamic_shapes=shapes).graph
    made = [
        tuple(n.meta["val"].shape)
        for n in graph.nodes
        if n.op == "call_function" and isinstance(n.meta.get("val"), Tensor)
    ]
    assert (4000, HIDDEN) not in made


@pytest.mark.parametrize("exponents", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("strategy", list(BLOCKS))
@pytest.mark.parametrize("shape", [(), (1,), (5,), (2, 3, 4), (0,)])
def test_rows_are_those_of_the_dequantized_table(
    strategy: str, dtype: Any, exponents: bool, shape: tuple[int, ...]
) -> None:
    fp8, scale, _ = quantize(torch.randn(VOCAB, HIDDEN, generator=torch.Generator().manual_seed(0)), BLOCKS[strategy])
    if exponents:
        scale = torch.randint(110, 140, scale.shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    ids = torch.randint(0, VOCAB, shape, generator=torch.Generator().manual_seed(2))
    want = dequantize_reference(fp8, scale, list(BLOCKS[strategy]), dtype)[ids]
    assert torch.equal(embedding(ids, fp8, scale, BLOCKS[strategy], dtype), want)
    assert torch.equal(embedding(ids.int(), fp8, scale, BLOCKS[strategy], dtype), want)


class Uses(nn.Module):
    """A table in each way that code reads rows of it."""

    def __init__(self, how: str):
        super().__init__()
        self.table = nn.Embedding(VOCAB, HIDDEN, padding_idx=3 if how == "padded" else None)
        self.how = how

    def forward(self, ids: Tensor) -> Tensor:
        if self.how == "functional":
            return nn.functional.embedding(ids, self.table.weight)
        if self.how == "index_select":
            return self.table.weight.index_select(0, ids.flatten())
        return self.table(ids)


@pytest.mark.parametrize("how", ["module", "padded", "functional", "index_select"])
def test_ways_to_ask_for_rows(how: str, kernel_everywhere: None) -> None:
    torch.manual_seed(0)
    fp8, scale, exact = quantize(torch.randn(VOCAB, HIDDEN), (1, HIDDEN))
    config = fp8_config()
    config["config_groups"]["group_0"]["targets"] = ["Embedding"]
    module = ctfp8.load_state_dict(Uses(how), {"table.weight": fp8, "table.weight_scale": scale}, config)
    want = exact[IDS] if how != "index_select" else exact[IDS.flatten()]
    compiled = torch.compile(module, backend="ctfp8", fullgraph=True)
    for call in (module, compiled, torch.compile(module, backend="ctfp8", fullgraph=True, dynamic=True)):
        assert torch.equal(call(IDS), want)
        assert torch.equal(call(IDS[:, :5]), want.view(2, 12, HIDDEN)[:, :5].reshape(call(IDS[:, :5]).shape))
    assert [e.rule for e in ctfp8.compiled_reports()[-1].rewritten] == ["embedding"]
    with pytest.raises(IndexError):
        module(torch.tensor([[VOCAB]]))


def test_a_plain_model_again(tmp_path: Path) -> None:
    model = ctfp8.from_pretrained(write(tmp_path, "channel", "tied").folder, dequantize=True, dtype=torch.float32)
    assert type(model.model.embed_tokens) is nn.Embedding
    assert model.lm_head.weight is model.model.embed_tokens.weight or torch.equal(
        model.lm_head.weight, model.model.embed_tokens.weight
    )
    assert not list(quantized_parameters(model))
    assert model.dtype == torch.float32
    model.half()


def test_static_caches_have_the_dtype_of_numbers(tmp_path: Path) -> None:
    model = ctfp8.from_pretrained(write(tmp_path, "channel", "tied").folder)
    assert model.dtype == torch.float32 or model.dtype == torch.bfloat16
    cache = ctfp8.static_cache(model, 1, 16)
    assert {layer.keys.dtype for layer in cache.layers} == {model.dtype}
    assert model.generate(IDS[:1], cache=cache, max_new_tokens=3, do_sample=False).shape == (1, 15)
