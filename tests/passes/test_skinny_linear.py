"""Large linears that are not quantized, such as a decoder's head: what is rewritten, what is left, and that it computes the same."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import DATA, relative_error
from expecttest import assert_expected_inline
from support.fresh import run_fresh
from torch import Tensor, nn
from torch._inductor.utils import run_and_get_code

import ctfp8_compile as ctfp8
from ctfp8_compile.graph import op_name
from ctfp8_compile.ops import cpu
from ctfp8_compile.passes import skinny_linear
from ctfp8_compile.passes.pipeline import run
from ctfp8_compile.target import Target

N, K = 4097, 1024
ROWS = torch.export.Dim("rows", max=64)


@pytest.fixture
def everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if this machine had the kernel; its operator is torch's where it has not."""
    monkeypatch.setattr(skinny_linear, "has_streaming_gemv", lambda target, dtype: target.device == "cpu")


def rewritten(
    module: nn.Module, *inputs: Tensor, target: str = "cpu", decompose: bool = False, dynamic: bool = False
) -> str:
    shapes = ({0: ROWS},) if dynamic else None
    program = torch.export.export(module, inputs, dynamic_shapes=shapes)
    program = program.run_decompositions(None if decompose else {})
    run(program.graph, Target.parse(target))
    program.graph.lint()
    nodes = [node for node in program.graph.nodes if node.op == "call_function"]
    return " ".join(op_name(node) for node in nodes)


def head(bias: bool = False, dtype: torch.dtype = torch.bfloat16, n: int = N) -> nn.Module:
    return nn.Linear(K, n, bias, dtype=dtype)


@pytest.mark.usefixtures("everywhere")
def test_the_graph() -> None:
    program = torch.export.export(head(bias=True), (torch.randn(1, K).bfloat16(),)).run_decompositions()
    run(program.graph, Target.parse("cpu"))
    program.graph.eliminate_dead_code()
    assert_expected_inline(
        str(program.graph).strip(),
        """\
graph():
    %p_weight : [num_users=1] = placeholder[target=p_weight]
    %p_bias : [num_users=1] = placeholder[target=p_bias]
    %input : [num_users=1] = placeholder[target=input]
    %linear_default : [num_users=1] = call_function[target=torch.ops.ctfp8.linear.default](args = (%input, %p_weight, %p_bias), kwargs = {})
    return (linear_default,)""",
    )


@pytest.mark.usefixtures("everywhere")
@pytest.mark.parametrize("decompose", [False, True])
@pytest.mark.parametrize(
    ("module", "x", "taken"),
    [
        (head(), torch.zeros(1, K), True),
        (head(), torch.zeros(2, 2, K), True),
        (head(bias=True), torch.zeros(4, K), True),
        (head(), torch.zeros(5, K), False),
        (head(), torch.zeros(2, 3, K), False),
        (head(n=4095), torch.zeros(1, K), False),
    ],
)
def test_what_is_taken_and_what_is_left(module: nn.Module, x: Tensor, taken: bool, decompose: bool) -> None:
    assert ("ctfp8.linear" in rewritten(module, x.bfloat16(), decompose=decompose)) == taken
    assert "ctfp8.linear" not in rewritten(module, x.bfloat16(), target="cuda:sm90", decompose=decompose)


@pytest.mark.usefixtures("everywhere")
def test_dynamic_rows_are_counted_where_it_runs() -> None:
    assert "ctfp8.linear" in rewritten(head(), torch.zeros(8, K).bfloat16(), dynamic=True)


class Product(nn.Module):
    def __init__(self, way: Callable[..., Tensor]):
        super().__init__()
        self.way = way

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.way(*inputs)


@pytest.mark.usefixtures("everywhere")
@pytest.mark.parametrize(
    ("way", "shape"),
    [
        (lambda x, w: x @ w, (4096, K)),  # not transposed
        (lambda x, w: x @ (w * 2).t(), (K, 4096)),  # no parameter
        (lambda x, w: torch.addmm(torch.zeros(1, K).bfloat16(), x, w.t(), beta=2), (K, 4096)),
        (lambda x, w: torch.addmm(torch.zeros(1, K).bfloat16(), x, w.t()), (K, 4096)),  # an addend that is broadcast
    ],
)
def test_products_of_other_forms_are_left(way: Callable[..., Tensor], shape: tuple[int, int]) -> None:
    x, w = torch.zeros(1, 4096).bfloat16(), torch.zeros(shape).bfloat16()
    assert "ctfp8.linear" not in rewritten(Product(way), x, w, decompose=True)


def test_float32_is_torchs() -> None:
    assert "ctfp8.linear" not in rewritten(head(dtype=torch.float32), torch.zeros(1, K))


def with_large_vocabulary() -> tuple[nn.Module, nn.Module]:
    """A model in bfloat16, and the same in float64."""
    folder = DATA / "llama/FP8_DYNAMIC"
    model, exact = (
        ctfp8.from_pretrained(folder, dtype=torch.bfloat16),
        ctfp8.from_pretrained(folder, dequantize=True).double(),
    )
    head = torch.randn((1 << 22) // model.config.hidden_size + 1, model.config.hidden_size)
    model.lm_head.weight, exact.lm_head.weight = nn.Parameter(head.bfloat16()), nn.Parameter(head.bfloat16().double())
    return model, exact


@pytest.mark.ci
@pytest.mark.long
@pytest.mark.parametrize("regions", [False, True])
def test_a_compiled_model_with_a_large_vocabulary(regions: bool) -> None:
    """Batches of one to five texts through `ctfp8.compile`, against float64."""
    model, exact = with_large_vocabulary()
    ctfp8.compile(model, options={"ctfp8.regions": regions})
    sources: list[str] = []
    for batch in (1, 2, 4, 5):
        ids = torch.randint(0, 64, (batch, 7), generator=torch.Generator().manual_seed(batch))
        with torch.no_grad():
            out, code = run_and_get_code(model, ids, logits_to_keep=1)
            assert relative_error(out.logits, exact(ids, logits_to_keep=1).logits) < 0.02
        sources += code
    assert all(("ctfp8.linear" in code) == torch.ops.ctfp8_cpu.has_streaming_gemv() for code in sources)
    assert sources


def test_an_artifact_in_a_fresh_process(tmp_path: Path) -> None:
    """It holds the linear as it was; the machine that loads it, with three tokens here, chooses."""
    model, exact = with_large_vocabulary()
    ids = torch.tensor([[5, 9, 2]])
    ctfp8.export(model, (ids,), {"use_cache": False}, path=tmp_path / "m.pt2")
    with torch.no_grad():
        want = exact(ids).logits
    assert relative_error(run_fresh([tmp_path / "m.pt2"], ids, tmp_path)[0], want) < 0.02
    targets = [node.target for node in ctfp8.load(tmp_path / "m.pt2")._run.graph.nodes]
    assert (torch.ops.ctfp8.linear.default in targets) == torch.ops.ctfp8_cpu.has_streaming_gemv()


def test_x86_has_the_kernel() -> None:
    cpu.load()
    for isa in torch.ops.ctfp8_cpu.isas():
        torch.ops.ctfp8_cpu.set_isa(isa)
        assert torch.ops.ctfp8_cpu.has_streaming_gemv() == isa.startswith("avx")
    torch.ops.ctfp8_cpu.set_isa("")
