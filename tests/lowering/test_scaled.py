"""FP8 × FP8 matmuls for CUDA and XPU, on a machine without either: the eligibility checks, and the arithmetic of the rewritten graphs.

Lowered graphs run on the CPU: `aten._scaled_mm` has a CPU kernel, fbgemm's operators have the reference implementations
declared with their schemas, and `_scaled_grouped_mm` gets one here. All must agree with a float64 model of the same
quantization.
"""

from __future__ import annotations

import pytest
import torch
from conftest import DATA, IDS, quantize, relative_error
from hypothesis import given, settings
from hypothesis import strategies as st
from support.scaled import SM89, BlockwiseOnCpu, layer, quantized_activation

import ctfp8_compile as ctfp8
from ctfp8_compile import lowering, ops, passes
from ctfp8_compile.lowering.kernel import Problem, choose
from ctfp8_compile.target import Target

FP8 = torch.float8_e4m3fn


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 6),
    cols=st.sampled_from([128, 256]),
    activation=st.sampled_from(["token", "tensor", "tensor_dynamic", "group"]),
    dtype=st.sampled_from([torch.bfloat16, torch.float16, torch.float32]),
    exponent=st.integers(-12, 4),
    zero_row=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_quantization_is_the_float64_model(rows, cols, activation, dtype, exponent, zero_row, seed):
    torch.manual_seed(seed)
    x = (torch.randn(rows, cols) * 2.0**exponent).to(dtype)
    if zero_row:
        x[0] = 0
    scale = torch.tensor([[0.01]])
    if activation == "token":
        q, a = torch.ops.ctfp8.quantize_per_token(x)
        assert a.shape == (rows, 1)
    elif activation == "group":
        q, a = torch.ops.ctfp8.quantize_per_group(x, 128)
        assert a.shape == (rows, cols // 128)
        a = a.repeat_interleave(128, 1)
    else:
        q, a = torch.ops.ctfp8.quantize_per_tensor(x, scale if activation == "tensor" else None)
        assert a.shape == (1, 1)
    assert q.dtype == FP8
    got = q.double() * a.double()
    assert got.isfinite().all()
    torch.testing.assert_close(got, quantized_activation(x, activation, scale), rtol=1e-12, atol=0)


def test_the_meta_functions_agree():
    x = torch.randn(5, 256, dtype=torch.bfloat16)
    w, s = quantize(torch.randn(48, 256))
    q, a = torch.ops.ctfp8.quantize_per_token(x)
    ctf = torch.ops.ctfp8
    for op, args in (
        (ctf.quantize_per_token, (x,)),
        (ctf.quantize_per_group, (x, 128)),
        (ctf.quantize_per_tensor, (x, None)),
        (ctf.quantize_per_tensor, (x, torch.ones(5, 1))),
        (ctf.scaled_mm, (q, w, a, s, torch.randn(48), [1, 256], torch.float16)),
        (ctf.scaled_grouped_mm, (q, w[None], a, s[None], torch.tensor([5]), [1, 256], torch.bfloat16)),
    ):
        torch.library.opcheck(op.default, args, test_utils="test_faketensor")


CASES = [
    ("channel", "token", "cuda:sm90", "fbgemm f8f8bf16_rowwise"),
    ("channel", "token", "cuda:sm90+scaled_mm", "aten._scaled_mm"),
    ("channel", "token", SM89, "aten._scaled_mm"),
    ("channel", "token", "cuda:sm120", "aten._scaled_mm"),
    ("channel", "token", "xpu", "aten._scaled_mm"),
    ("channel", "tensor", "cuda:sm90", "fbgemm f8f8bf16_rowwise"),
    ("channel", "tensor", "xpu", "aten._scaled_mm"),
    ("tensor", "tensor", "cuda:sm90", "aten._scaled_mm"),
    ("tensor", "tensor", "cuda:sm90+fbgemm", "fbgemm f8f8bf16_rowwise"),
    ("tensor", "tensor", "xpu", "aten._scaled_mm"),
    ("tensor", "token", SM89, "aten._scaled_mm"),
    ("block", "group", "cuda:sm90", "fbgemm f8f8bf16_groupwise"),
]


@pytest.mark.quick(torch.bfloat16)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("strategy", "activation", "target", "kernel"), CASES)
def test_linear_against_float64(strategy, activation, target, kernel, bias, dtype):
    n, k = 256, 384
    module, state = layer(n, k, dtype, strategy, activation, bias)
    x = torch.randn(2, 5, k).to(dtype)
    report = ctfp8.explain(module, (x,), target=target)
    assert [e.kernel for e in report.rewritten] == [kernel]
    program = ctfp8.lower(module, (x,), target=target)
    assert not [node for node in program.graph.nodes if "ctfp8" in str(node.target)]
    block = {"channel": [1, k], "tensor": [n, k], "block": [128, 128]}[strategy]
    scale = state["a.weight_scale"].reshape(-1, 1) if strategy != "block" else state["a.weight_scale"]
    weight = state["a.weight"].double() * ops.expand_scale(scale.double(), block, n, k)
    want = quantized_activation(x.flatten(0, 1), activation, state.get("a.input_scale")) @ weight.t()
    want = (want + state["a.bias"].double() if bias else want).unflatten(0, (2, 5))
    got = program.module()(x)
    assert got.dtype == dtype
    assert relative_error(got, want) < 4e-3  # these kernels write bfloat16, whatever the model's dtype


@pytest.mark.parametrize("rows", [1, 7, 8])
@pytest.mark.parametrize("bias", [False, True])
def test_blocks_in_torch_alone(rows, bias):
    module, state = layer(256, 1024, torch.bfloat16, "block", "group", bias)
    x = torch.randn(2, rows, 1024).bfloat16()
    for shapes in (None, {"x": {1: torch.export.Dim("rows")}}) if rows > 1 else (None,):
        program = ctfp8.lower(module, (x,), target="cuda:sm90+scaled_mm", dynamic_shapes=shapes)
        assert not [node for node in program.graph.nodes if "ctfp8" in str(node.target)]
        with BlockwiseOnCpu() as mode:
            got = program.module()(x)
        assert mode.calls == 1
        weight = state["a.weight"].double() * ops.expand_scale(state["a.weight_scale"].double(), [128, 128], 256, 1024)
        want = quantized_activation(x, "group") @ weight.t() + (state["a.bias"].double() if bias else 0)
        assert relative_error(got, want) < 4e-3


XPU_BLOCKS = pytest.mark.skipif(torch.__version__ < (2, 13), reason="not in the torch of XPU before 2.13")


@XPU_BLOCKS
@pytest.mark.parametrize("block", [(128, 128), (1, 128)])
@pytest.mark.parametrize(("rows", "bias", "dtype"), [(1, False, torch.bfloat16), (7, True, torch.float32)])
def test_blocks_on_xpu(block, rows, bias, dtype):
    module, state = layer(256, 384, dtype, "block", "group", bias, block)
    x = torch.randn(2, rows, 384).to(dtype)
    for shapes in (None, {"x": {1: torch.export.Dim("rows")}}) if rows > 1 else (None,):
        program = ctfp8.lower(module, (x,), target="xpu", dynamic_shapes=shapes)
        assert not [node for node in program.graph.nodes if "ctfp8" in str(node.target)]
        (name,) = [name for name in program.state_dict if "scale" in name]
        assert name.endswith("_prepacked")  # transposed once, not at each call
        with BlockwiseOnCpu("xpu") as mode:
            got = program.module()(x)
        assert mode.calls == 1
        weight = state["a.weight"].double() * ops.expand_scale(state["a.weight_scale"].double(), list(block), 256, 384)
        want = quantized_activation(x, "group") @ weight.t() + (state["a.bias"].double() if bias else 0)
        assert got.dtype == dtype
        assert relative_error(got, want) < 4e-3


@pytest.mark.parametrize(("strategy", "activation"), [("channel", "token"), ("tensor", "tensor"), ("block", "group")])
def test_a_report_says_what_xpu_does_with_fp8(strategy, activation):
    """With the choice that may be faster: which takes it."""
    module, _ = layer(256, 384, torch.bfloat16, strategy, activation)
    x = torch.zeros(2, 384).bfloat16()
    report = ctfp8.explain(module, (x,), target="xpu")
    if report.rewritten[0].kernel != "aten._scaled_mm":
        pytest.skip("this torch has no blocks on XPU")
    assert "1 × note: oneDNN multiplies FP8 as float16 on Intel GPUs up to Xe2" in str(report)
    assert report.to_dict()["rewritten"][0]["note"].endswith("weight-only, ctfp8.kernels='triton', may be faster")
    other = ctfp8.explain(module, (x,), target="xpu+triton")
    assert [e.kernel for e in other.rewritten] == ["Triton weight-only"]
    assert "note" not in str(other)


@pytest.mark.parametrize(
    ("target", "torch_release", "changes", "first"),
    [
        ("xpu", "2.11.0", {"block": (128, 128), "activation": "group", "weight_shape": (128, 128)}, (2, 13)),
        ("cuda:sm120", "2.10.0+cu130", {}, (2, 11)),
        ("cuda:sm121", "2.10.0+cu130", {}, (2, 11)),
        ("cuda:sm89", "2.11.0", {}, (2, 12)),
        (
            "cuda:sm120",
            "2.13.0",
            {"exponents": True, "activation": "mx", "block": (1, 32), "weight_shape": (128, 128)},
            (2, 14),
        ),
    ],
)
def test_a_release_that_somebody_saw_failing_is_for_who_asks(monkeypatch, target, torch_release, changes, first):
    asked = problem(**{"x_shape": (4, 128), **changes})

    def chosen(text):
        kernels = [k for k in lowering.kernels_of(Target.parse(text)) if k.library != "fbgemm"]
        return choose(kernels, asked, Target.parse(text))

    monkeypatch.setattr(torch, "__version__", torch_release)
    kernel, why = chosen(target)
    assert kernel is None or kernel.name == "Triton weight-only"
    assert f"on {target} needs torch {first[0]}.{first[1]} or later, not {torch_release}" in why
    assert chosen(f"{target}+scaled_mm")[0].name == "aten._scaled_mm"
    monkeypatch.setattr(torch, "__version__", f"{first[0]}.{first[1]}.0")
    assert chosen(target)[0].name == "aten._scaled_mm"


@pytest.mark.parametrize("gpu", ["cuda:sm103", "cuda:sm110", "cuda:sm120", "cuda:sm121"])
def test_gpus_that_are_named(gpu):
    assert choose(fp8_kernels(Target.parse(gpu)), problem(), Target.parse(gpu))[0].name == "aten._scaled_mm"


def test_a_gpu_that_nobody_tried_is_for_who_asks():
    target = Target.parse("cuda:sm130")
    kernel, why = choose(lowering.kernels_of(target), problem(), target)
    assert kernel is lowering.weight_only.KERNEL
    assert why.endswith("not cuda:sm130; ctfp8.kernels='scaled_mm' takes it all the same")
    named = Target.parse("cuda:sm130+scaled_mm")
    assert choose(lowering.kernels_of(named), problem(), named)[0].name == "aten._scaled_mm"


def test_one_quantization_for_all_that_share_an_input():
    for name, quantizations in (("llama/FP8_DYNAMIC", 4), ("llama/FP8_BLOCK", 4)):
        block = ctfp8.from_pretrained(DATA / name).model.layers[0]
        hidden, rotary = torch.zeros(1, 5, 128, dtype=torch.bfloat16), torch.zeros(1, 5, 32, dtype=torch.bfloat16)
        program = ctfp8.lower(block, (hidden,), {"position_embeddings": (rotary, rotary)}, target="cuda:sm90")
        to_fp8 = [n for n in program.graph.nodes if n.kwargs.get("dtype") == FP8]
        assert len(to_fp8) == quantizations  # q, k, v; o; gate, up; down


@pytest.mark.quick(SM89, "cuda:sm90+scaled_mm", "xpu")
@pytest.mark.parametrize(
    ("name", "experts", "target"),
    [
        *(("llama/FP8", None, target) for target in ("cuda:sm90", SM89, "cuda:sm80", "xpu")),
        ("llama/FP8_BLOCK", None, "cuda:sm90"),
        ("qwen3moe/FP8_BLOCK", "batched_mm", "cuda:sm90"),
        ("qwen3moe/FP8_BLOCK", "grouped_mm", "cuda:sm90"),
        ("qwen3moe/FP8_DYNAMIC", "batched_mm", "cuda:sm90"),
        ("qwen3moe/FP8_DYNAMIC", "grouped_mm", "cuda:sm90+scaled_mm"),
        ("mixtral/FP8", "grouped_mm", "cuda:sm90"),
        ("mixtral/FP8", "batched_mm", "xpu"),
    ],
)  # fmt: skip
def test_whole_models(name, experts, target):
    model = ctfp8.from_pretrained(DATA / name, **({"experts_implementation": experts} if experts else {}))
    args = (IDS,), {"use_cache": False}
    program, report = ctfp8.lower(model, *args, target=target), ctfp8.explain(model, *args, target=target)
    assert not [n for n in program.graph.nodes if "ctfp8" in str(n.target) and "weight_only" not in str(n.target)]
    assert not report.kept
    got = program.module()(IDS, use_cache=False).logits
    with torch.no_grad():
        weight_only = model(IDS, use_cache=False).logits
        before = torch.export.export(model, *args).run_decompositions({})
    passes.run(before.graph, Target.parse(target), lower=False)
    before.graph_module.recompile()
    # what a target's operators give is what the nodes before lowering give …
    assert relative_error(got, before.module()(IDS, use_cache=False).logits) < 0.02
    # … and near the weight-only logits; FP8 activations re-route tokens in a tiny random MoE
    error = relative_error(got, weight_only)
    assert error < (0.02 if not report.rewritten else 0.4 if experts else 0.1)
    if report.rewritten:
        assert error > 1e-3  # the activations are quantized


def test_both_forms_of_experts_agree():
    outs = []
    for experts in ("grouped_mm", "batched_mm"):
        model = ctfp8.from_pretrained(DATA / "mixtral/FP8", experts_implementation=experts, dtype=torch.float32)
        program = ctfp8.lower(model, (IDS,), {"use_cache": False}, target="cuda:sm90+scaled_mm")
        assert "_scaled_grouped_mm" in str(program.graph)
        outs.append(program.module()(IDS, use_cache=False).logits)
    assert relative_error(outs[1], outs[0]) < 1e-5


@pytest.mark.parametrize("target", ["cuda:sm90", "cuda:sm90+scaled_mm", "xpu"])
def test_dynamic_shapes(target):
    from torch.export import Dim

    module, _ = layer(64, 128, torch.bfloat16)
    x = torch.randn(3, 5, 128, dtype=torch.bfloat16)
    shapes = {"x": {0: Dim("batch"), 1: Dim("sequence")}}
    program = ctfp8.lower(module, (x,), target=target, dynamic_shapes=shapes)
    fixed = ctfp8.lower(module, (x,), target=target)
    assert torch.equal(program.module()(x), fixed.module()(x))
    assert program.module()(torch.randn(2, 9, 128, dtype=torch.bfloat16)).shape == (2, 9, 64)


@pytest.mark.parametrize("target", ["cpu", "cuda:sm90", "xpu"])
def test_a_rewritten_output_is_still_the_programs_output(target, kernel_everywhere, tmp_path):
    module, _ = layer(64, 128, torch.bfloat16)
    x = torch.randn(3, 128, dtype=torch.bfloat16)
    program = ctfp8.lower(module, (x,), target=target)
    torch.export.save(program, tmp_path / "program.pt2")  # verifies the signature
    assert torch.equal(torch.export.load(tmp_path / "program.pt2").module()(x), program.module()(x))


def test_before_lowering_the_nodes_run_anywhere():
    module, _ = layer(64, 128, torch.bfloat16, bias=True)
    x = torch.randn(3, 128, dtype=torch.bfloat16)
    with torch.no_grad():
        program = torch.export.export(module, (x,)).run_decompositions({})
    passes.run(program.graph, Target.parse("cuda:sm90"), lower=False)
    program.graph_module.recompile()
    targets = [str(n.target) for n in program.graph.nodes if n.op == "call_function"]
    assert [t for t in targets if "ctfp8" in t] == ["ctfp8.quantize_per_token.default", "ctfp8.scaled_mm.default"]
    lowered = ctfp8.lower(module, (x,), target="cuda:sm90")
    assert relative_error(program.module()(x), lowered.module()(x)) < 4e-3


def problem(**changes):
    usual = {"kind": "linear", "x_dtype": torch.bfloat16, "x_shape": (4, 128), "weight_shape": (64, 128),
             "block": (1, 128), "activation": "token", "bias": False}  # fmt: skip
    return Problem(**(usual | changes))


def fp8_kernels(target):
    """The kernels that multiply FP8 with FP8; what they decline is for the weight-only one."""
    return [kernel for kernel in lowering.kernels_of(target) if kernel.library != "triton"]


@pytest.mark.parametrize(
    ("target", "changes", "sentence"),
    [
        ("cuda:sm80", {}, "cuda:sm80 has no FP8 tensor cores (sm89 and later have)"),
        ("cuda:sm90", {"activation": "none"}, "the checkpoint does not quantize activations (W8A16)"),
        ("cuda:sm90", {"weight_shape": (60, 128)}, "N and K must be multiples of 16, but they are 60 and 128"),
        ("xpu+scaled_mm", {"weight_shape": (64, 100)}, "N and K must be multiples of 16, but they are 64 and 100"),
        ("xpu", {"kind": "grouped_mm", "weight_shape": (4, 64, 128)},
         "there is no kernel for experts with rowwise scales on xpu"),
        ("cuda:sm89", {"kind": "gathered_mm", "weight_shape": (4, 64, 128)},
         "fbgemm and MSLK have FP8 kernels for sm90 and sm100, not cuda:sm89; aten._scaled_grouped_mm is for cuda:sm90, "
         "not cuda:sm89"),
        ("cuda:sm90", {"block": (128, 128), "activation": "group", "weight_shape": (64, 128)},
         "N and K must be multiples of 128, but they are 64 and 128; N must be a multiple of 128 and K of 512, but they "
         "are 64 and 128"),
        ("cuda:sm100+scaled_mm", {"block": (128, 128), "activation": "group", "weight_shape": (128, 512)},
         "aten._scaled_mm takes 128x128 blocks on cuda:sm90, xpu, not cuda:sm100"),
        ("cuda:sm90", {"block": (1, 64)}, "there is no kernel for a linear with groupwise scales on cuda:sm90"),
        ("cuda:sm90", {"x_dtype": torch.float64}, "activations are torch.float64, not bfloat16, float16 or float32"),
        ("xpu+fbgemm", {}, "there is no kernel for a linear with rowwise scales on xpu+fbgemm"),
        ("cuda:sm90+mslk", {}, "mslk is taken only where it is installed"),
    ],
)  # fmt: skip
def test_every_no_has_its_sentence(target, changes, sentence):
    if "mslk" in target and torch.cuda.is_available():
        pytest.skip("needs a machine without a GPU: with one, mslk is looked for")
    target = Target.parse(target)
    kernel, why = choose(
        fp8_kernels(target),
        problem(**{"x_shape": (4, changes.get("weight_shape", (0, 128))[-1]), **changes}),
        target,
    )
    assert kernel is None
    assert why == sentence


def test_sm89_needs_a_torch_that_does_not_hang(monkeypatch):
    target = Target.parse("cuda:sm89")
    monkeypatch.setattr(torch, "__version__", "2.11.0+cu130")
    kernel, why = choose(fp8_kernels(target), problem(), target)
    assert kernel is None
    assert (
        "aten._scaled_mm with scales per row on cuda:sm89 needs torch 2.12 or later, not 2.11.0+cu130; "
        "ctfp8.kernels='scaled_mm' takes it all the same"
    ) in why


@pytest.mark.parametrize("text", ["cuda:sm90+cutlass", "cuda:90", "xpu:sm90", "gpu", "cpu+"])
def test_what_is_not_a_target(text):
    with pytest.raises(ctfp8.TargetError):
        Target.parse(text)


@pytest.mark.parametrize("text", ["cuda:sm90", "cuda:sm100", "cuda:sm90+scaled_mm", "xpu", "cpu", "xpu+scaled_mm"])
def test_targets_print_as_they_are_written(text):
    assert str(Target.parse(text)) == text


def test_the_backend_takes_a_library():
    options = {"ctfp8.kernels": "cutlass"}
    module, _ = layer(64, 128, torch.bfloat16)
    with pytest.raises(
        Exception, match="'cutlass' is not a kernel library; choose one of auto, fbgemm, mslk, scaled_mm"
    ):
        torch.compile(module, backend="ctfp8", options=options)(torch.randn(2, 128, dtype=torch.bfloat16))


@pytest.mark.parametrize(
    ("target", "changes", "declined"),
    [
        ("cuda:sm90", {"activation": "none"}, ""),
        ("cuda:sm80", {}, "cuda:sm80 has no FP8 tensor cores (sm89 and later have)"),
        ("xpu", {"weight_shape": (60, 128)}, "N and K must be multiples of 16, but they are 60 and 128"),
        ("xpu", {"block": (128, 128), "activation": "group", "weight_shape": (192, 128)},
         "N and K must be multiples of 128, but they are 192 and 128"),
        ("xpu", {"block": (64, 64), "activation": "group", "weight_shape": (128, 128)},
         "aten._scaled_mm on xpu takes blocks of 128x128 and 1x128 with groups of 128 in the activation"),
        ("xpu+triton", {}, ""),
        ("cuda:sm90+triton", {}, ""),
    ],
)  # fmt: skip
def test_what_they_decline_is_weight_only(target, changes, declined):
    """The kernel comes last, and the decision keeps why those before it said no."""
    target = Target.parse(target)
    kernel, why = choose(lowering.kernels_of(target), problem(**changes), target)
    assert kernel is lowering.weight_only.KERNEL
    assert why == declined


@pytest.mark.parametrize(
    ("target", "changes", "sentence"),
    [
        ("cuda:sm70", {}, "the weight-only kernel needs sm75 or later, not cuda:sm70"),
        ("cuda:sm75", {}, "sm75 has no bfloat16: for the weight-only kernel load the model with dtype=torch.float16"),
        ("cuda:sm75", {"x_dtype": torch.float16, "x_shape": (17, 128)},
         "on sm75 the weight-only kernel takes up to 16 rows, as Triton has no matrix instructions for that GPU"),
        ("cuda:sm75", {"x_dtype": torch.float16, "x_shape": (16, 128)}, ""),
        ("xpu", {"x_dtype": torch.float64},
         "the weight-only kernel takes bfloat16, float16 and float32 activations, not torch.float64"),
    ],
)  # fmt: skip
def test_what_is_not_weight_only(target, changes, sentence):
    target = Target.parse(target)
    assert lowering.weight_only.KERNEL.supports(problem(**changes), target).why_not == sentence
