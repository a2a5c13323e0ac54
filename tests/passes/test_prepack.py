"""Scales that are prepacked once: for which kernels, that graphs stay right, and that what was made is made again in time."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from compressed_tensors.quantization.utils.mxfp_utils import generate_mx_scales
from conftest import fp8_config, quantize, relative_error
from support.scaled import BlockwiseOnCpu, MxOnCpu, layer, quantized_activation
from test_horizontal_fusion import FUSED, X, three

import ctfp8_compile as ctfp8
from ctfp8_compile import ops, passes
from ctfp8_compile.inductor import prepacked
from ctfp8_compile.model.parametrization import quantized_parameters

aten = torch.ops.aten


def scales_of(module):
    return {name: dequantize.weight_scale for name, _, dequantize in quantized_parameters(module)}


def operators(program):
    return {str(node.target) for node in program.graph.nodes if node.op == "call_function"}


def test_a_scale_for_the_whole_matrix_stays_one():
    module = three("tensor", "tensor")
    assert {tuple(scale.shape) for scale in scales_of(module).values()} == {(1, 1)}
    program = ctfp8.lower(module, (X,), target="cuda:sm90")
    (rowwise,) = (n for n in program.graph.nodes if "f8f8bf16_rowwise" in str(n.target))  # q, k, v: their scales differ
    (tensorwise,) = (n for n in program.graph.nodes if n.target is aten._scaled_mm.default)  # o
    assert [n.args[3].meta["val"].shape for n in (rowwise, tensorwise)] == [(128,), (1, 1)]
    assert [n.args[2].meta["val"].shape for n in (rowwise, tensorwise)] == [(15,), (1, 1)]
    packed = program.state_dict["q.parametrizations.weight.0.weight_scale_prepacked"]
    q, k, v = (scales_of(module)[f"{name}.weight"] for name in "qkv")
    assert torch.equal(packed[:, 0], torch.cat([q.expand(64, 1), k.expand(32, 1), v.expand(32, 1)])[:, 0])


@pytest.mark.parametrize(("rows", "packed"), [((256, 128, 128), True), ((256, 64, 128), False)])
def test_block_scales_are_transposed_once(rows, packed):
    module = three("block", "group", rows=rows)
    program = ctfp8.lower(module, (X,), target="cuda:sm90")
    groupwise = [n for n in program.graph.nodes if "groupwise" in str(n.target)]
    assert len(groupwise) == 2
    for node in groupwise:
        scale = node.args[3]
        while scale.target is aten.permute.default:
            scale = scale.args[0]
        assert scale.op == "placeholder" or not packed  # no copy at a call
    for got, want in zip(program.module()(X), module(X), strict=True):
        assert relative_error(got, want) < 0.06


@pytest.mark.usefixtures("kernel_everywhere")
def test_compiled_results_follow_the_scales():
    """Written to in place, and replaced; a layer of the same code with scales of its own."""
    first, second = three("tensor", "tensor"), three("tensor", "tensor")
    scales_of(second)["k.weight"].mul_(3)

    def run(module):
        return compiled(module, X)

    compiled = torch.compile(lambda module, x: module(x), backend="ctfp8", fullgraph=True, options=FUSED)
    for _ in range(2):
        for module in (first, second):
            assert all(relative_error(a, b) < 0.01 for a, b in zip(run(module), module(X), strict=True))
    scales_of(first)["q.weight"].mul_(2)
    assert all(relative_error(a, b) < 0.01 for a, b in zip(run(first), first(X), strict=True))
    for _, _, dequantize in quantized_parameters(first):
        dequantize.weight_scale = dequantize.weight_scale * 0.5
    assert all(relative_error(a, b) < 0.01 for a, b in zip(run(first), first(X), strict=True))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2


@pytest.mark.parametrize(
    "write",
    [
        lambda scale: scale.mul_(2),
        lambda scale: scale.data.mul_(2),
        lambda scale: scale.detach().fill_(0.5),
        lambda scale: np.multiply(scale.numpy(), 2, out=scale.numpy()),
        lambda scale: scale.view(torch.int32).data.bitwise_xor_(1 << 23),
        lambda scale: scale.set_((scale * 3).untyped_storage(), 0, scale.shape, scale.stride()),
    ],
    ids=["in place", ".data", "detached", "NumPy", "bits", "set_"],
)
@pytest.mark.parametrize("strategy", ["tensor", "channel"])
@pytest.mark.usefixtures("kernel_everywhere")
def test_no_copy_of_a_scale_outlives_it(write, strategy):
    """Some of these writes count no version, so that nothing but the values tells."""
    module = three(strategy, "none")
    compiled = torch.compile(module, backend="ctfp8", fullgraph=True, options=FUSED)
    with torch.no_grad():
        before = compiled(X)
        write(scales_of(module)["k.weight"])
        after = compiled(X)
        assert all(relative_error(a, b) < 0.01 for a, b in zip(after, module(X), strict=True))
    assert relative_error(after[1], before[1]) > 0.1


def test_what_was_made_is_made_once(monkeypatch):
    made = []
    make = prepacked.WithPrepacked._make
    monkeypatch.setattr(prepacked.WithPrepacked, "_make", lambda self, tensors: made.append(1) or make(self, tensors))
    module = three("tensor", "tensor")
    compiled = torch.compile(module, backend="ctfp8", fullgraph=True, options=FUSED)
    want = compiled(X)
    for _ in range(3):
        assert all(map(torch.equal, compiled(X), want))
    assert len(made) == 1


def test_blackwells_order_is_undone():
    scale = torch.randint(0, 255, (256, 12), dtype=torch.uint8)
    swizzled = torch.ops.ctfp8.scales_swizzled(scale)
    assert int(swizzled[512 * 3 + 5 * 16 + 2 * 4 + 1]) == int(scale[128 + 2 * 32 + 5, 1])  # tile (1, 0)
    assert torch.equal(torch.ops.ctfp8.scales_unswizzled(swizzled, 12), scale)
    for op, args in (
        (torch.ops.ctfp8.scales_swizzled, (scale,)),
        (torch.ops.ctfp8.scales_unswizzled, (swizzled, 12)),
        (torch.ops.ctfp8.scales_transposed, (torch.rand(3, 4, 5),)),
        (torch.ops.ctfp8.scales_by_row, ([torch.rand(2, 1), torch.rand(1, 1)], [6, 4])),
        (torch.ops.ctfp8.quantize_mx, (torch.randn(3, 64),)),
    ):
        torch.library.opcheck(op.default, args, test_utils="test_faketensor")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_mxfp8_activations_as_compressed_tensors_chooses_their_scales(dtype):
    torch.manual_seed(0)
    x = (torch.randn(64, 128) * torch.logspace(-30, 30, 64)[:, None]).to(dtype)
    x[0], x[1, :32], x[2, 0] = 0, 1.75, 448.0
    fp8, exponents = torch.ops.ctfp8.quantize_mx(x)
    amax = x.unflatten(1, (-1, 32)).abs().amax(-1)
    assert torch.equal(exponents[1:].float(), generate_mx_scales(amax[1:], 8).float())
    got = fp8.double() * torch.exp2(exponents.double() - 127).repeat_interleave(32, 1)
    torch.testing.assert_close(got[1:], quantized_activation(x, "mx")[1:], rtol=1e-12, atol=0)
    assert not fp8.float().isnan().any()
    assert not got[0].any()


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_mxfp8_on_sm100_against_float64(bias, dynamic):
    n, k = 256, 384
    module, state = layer(n, k, torch.bfloat16, "mx", "mx", bias)
    x = torch.randn(2, 77, k).bfloat16()
    shapes = {"x": {1: torch.export.Dim("rows")}} if dynamic else None
    program = ctfp8.lower(module, (x,), target="cuda:sm100", dynamic_shapes=shapes)
    assert not [name for name in operators(program) if "ctfp8" in name]
    (name,) = (n for n in program.state_dict if "weight_scale" in n)
    assert name.endswith("_prepacked")
    weight = state["a.weight"].double() * ops.expand_scale(state["a.weight_scale"], [1, 32], n, k)
    for rows in (77, 200) if dynamic else (77,):
        x = torch.randn(2, rows, k).bfloat16()
        with MxOnCpu() as mode:
            got = program.module()(x)
        assert mode.calls == 1
        want = quantized_activation(x, "mx") @ weight.t() + (state["a.bias"].double() if bias else 0)
        assert relative_error(got, want) < 4e-3


class Shared(torch.nn.Module):
    """Two linears with one input, whose block scales are several columns wide."""

    def __init__(self):
        super().__init__()
        self.a, self.b = torch.nn.Linear(384, 256, bias=False), torch.nn.Linear(384, 128, bias=False)

    def forward(self, x):
        return self.a(x), self.b(x)


@pytest.mark.parametrize("target", ["cuda:sm90+fbgemm", "xpu"])
def test_parts_of_packed_and_transposed_scales_have_their_strides(target):
    """The graph is verified after each pass."""
    if target == "xpu" and torch.__version__ < (2, 13):
        pytest.skip("no blocks on XPU")
    state = {}
    for name, n in (("a", 256), ("b", 128)):
        state[f"{name}.weight"], state[f"{name}.weight_scale"] = quantize(torch.randn(n, 384), "block", (128, 128))
    module = ctfp8.load_state_dict(Shared().bfloat16(), state, fp8_config("block", "group", (128, 128)))
    x = torch.randn(8, 384).bfloat16()
    with passes.verifying():
        program = ctfp8.lower(module, (x,), target=target)
    matmuls = [n for n in program.graph.nodes if "scaled_mm" in str(n.target) or "groupwise" in str(n.target)]
    assert len(matmuls) == 1  # they are one
    with BlockwiseOnCpu("xpu"):
        got = program.module()(x)
    for name, y in zip("ab", got, strict=True):
        scale = state[f"{name}.weight_scale"].double()
        weight = state[f"{name}.weight"].double() * ops.expand_scale(scale, [128, 128], *state[f"{name}.weight"].shape)
        assert relative_error(y, quantized_activation(x, "group") @ weight.t()) < 4e-3


def test_what_mxfp8_declines():
    module, _ = layer(192, 384, torch.bfloat16, "mx", "mx")
    for target, why in (
        ("cuda:sm100", "N and K must be multiples of 128, but they are 192 and 384"),
        ("cuda:sm90", "aten._scaled_mm takes MXFP8 on cuda:sm100, cuda:sm120, cuda:sm121, cuda:sm103, not cuda:sm90"),
        ("xpu", "there is no kernel for a linear with mx scales on xpu"),
    ):
        (entry,) = ctfp8.explain(module, (torch.zeros(2, 384).bfloat16(),), target=target).kept
        assert entry.reason == why
    plain, _ = layer(256, 384, torch.bfloat16, "mx", None)
    (entry,) = ctfp8.explain(plain, (torch.zeros(2, 384).bfloat16(),), target="cuda:sm100").kept
    assert entry.reason == "the checkpoint does not quantize activations (MXFP8A16)"
