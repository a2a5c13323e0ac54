"""Every architecture transformers knows, in llm-compressor's naming: loaded bit-exactly, saved back to the same bits, rewritten."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from conftest import ARCHITECTURE_REWRITES
from safetensors.torch import load_file
from support.architectures import UNTRACEABLE
from support.forge import ARCHITECTURES, FORMATS, forge

import ctfp8_compile as ctfp8
from ctfp8_compile.model.parametrization import quantized_parameters
from ctfp8_compile.ops import FP8

QUICK = {("qwen3_moe", True), ("llama4", True)}
#: odd sizes: partial last blocks in both dimensions, and gate and up halves that do not align to a block once merged
CASES = [
    (architecture, scheme, odd)
    for architecture in ARCHITECTURES
    for scheme in ARCHITECTURES[architecture].schemes
    for odd in ((True, False) if scheme == "FP8_BLOCK" else (True,))
]
#: The same in `fp8` checkpoints' words and in MXFP8: each architecture's experts and names, few of them in the quick suite.
FORMAT_CASES = [
    pytest.param(architecture, scheme, odd, marks=[] if (architecture, odd) in QUICK else [pytest.mark.long])
    for architecture in ARCHITECTURES
    for scheme in FORMATS
    for odd in (True, False)
]


def _output(model, inputs):
    with torch.no_grad():
        out = model(**inputs)
    return out.logits if hasattr(out, "logits") else out[0]


def _expected(model, forged):
    """The reference's output, from weights that lie in memory as the model's: on some CPUs torch's sums in bf16 depend on that."""
    weights = dict(forged.reference.named_parameters())
    for name, owner, _ in quantized_parameters(model):
        if name in weights and getattr(owner, name.rpartition(".")[2]).mT.is_contiguous():
            weights[name].data = weights[name].data.mT.contiguous().mT
    return _output(forged.reference, forged.inputs)


@pytest.mark.parametrize(("architecture", "scheme", "odd"), [*CASES, *FORMAT_CASES])
def test_loads_bit_exactly_and_saves_the_same_bits(architecture, scheme, odd, tmp_path):
    forged = forge(architecture, scheme, tmp_path / "in", odd=odd)
    model = ctfp8.from_pretrained(forged.folder, forged.auto_class)
    loaded = [s for _, _, d in quantized_parameters(model) for s in d.info.layout.sources]
    assert sorted(loaded) == sorted(forged.fp8_names)
    assert torch.equal(_output(model, forged.inputs), _expected(model, forged))
    ctfp8.save_pretrained(model, tmp_path / "out")
    before, after = _tensors(forged.folder), _tensors(tmp_path / "out")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert (tensor.dtype, tensor.shape) == (after[name].dtype, after[name].shape), name
        assert torch.equal(tensor.view(torch.uint8), after[name].view(torch.uint8)), name


def _tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: t for file in folder.glob("*.safetensors") for name, t in load_file(file).items()}


@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("architecture", ["llama", "mixtral", "gpt_oss"])
def test_scale_dtypes(architecture, scale_dtype, tmp_path):
    forged = forge(architecture, "FP8_DYNAMIC", tmp_path / "in", scale_dtype=scale_dtype, odd=True)
    model = ctfp8.from_pretrained(forged.folder, forged.auto_class)
    assert torch.equal(_output(model, forged.inputs), _expected(model, forged))
    ctfp8.save_pretrained(model, tmp_path / "out")
    assert {t.dtype for n, t in _tensors(tmp_path / "out").items() if n.endswith("_scale")} == {scale_dtype}


@pytest.mark.parametrize("architecture", ["qwen3_moe", "gpt_oss", "llama4"])
def test_sharded(architecture, tmp_path):
    forged = forge(architecture, "FP8_BLOCK", tmp_path / "in", shards=3)
    model = ctfp8.from_pretrained(forged.folder, forged.auto_class)
    assert torch.equal(_output(model, forged.inputs), _expected(model, forged))


@pytest.mark.quick("bert", "gpt_oss", "jamba", "llama4", "phi3", "qwen3_5_moe")
@pytest.mark.parametrize("architecture", sorted(set(ARCHITECTURES) - UNTRACEABLE))
def test_every_weight_is_rewritten(architecture, tmp_path, kernel_everywhere):
    forged = forge(architecture, "FP8_DYNAMIC", tmp_path / "in")
    model = ctfp8.from_pretrained(forged.folder, forged.auto_class)
    inputs = dict(forged.inputs) if architecture == "bert" else {**forged.inputs, "use_cache": False}
    report = ctfp8.explain(model, (), inputs)
    names = {name for name, _, _ in quantized_parameters(model)}
    assert {e.name for e in (*report.rewritten, *report.kept)} == names
    assert [(e.name, e.reason) for e in report.kept] == ARCHITECTURE_REWRITES.get(architecture, [])
    assert sum(p.dtype == FP8 for p in model.parameters()) == len(names)


def test_the_table_in_the_docs_names_every_architecture():
    """docs/architectures.md is written by a benchmark that needs minutes; here: no row is missing, stale, or less than exact."""
    page = (Path(__file__).parents[2] / "docs/architectures.md").read_text()
    table = page.partition("<!-- table")[2].partition("<!-- end")[0]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines() if line.startswith("| ")]
    assert [row[0] for row in rows[1:]] == list(ARCHITECTURES)
    for name, model, experts, *outcomes in rows[1:]:
        config = ARCHITECTURES[name].config(ARCHITECTURES[name].odd)
        assert model.strip("`") == ARCHITECTURES[name].auto_class._model_mapping[type(config)].__name__
        assert all(f"`{own}`" in experts for own in _names(ARCHITECTURES[name].experts))
        assert outcomes[:3] == ["exact"] * 3
    assert set(re.findall(r"`(\w+)` (?:keeps|and)", page)) >= {*ARCHITECTURE_REWRITES, *sorted(UNTRACEABLE)[:1]}


def _names(experts):
    return () if experts is None else experts.whole or experts.names[0 if experts.gated else 1 :]
