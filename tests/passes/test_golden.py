"""Golden graphs: one block of a real Llama and of a real MoE after the rules, for review."""

from __future__ import annotations

import pytest
import torch
from conftest import DATA, fp8_config
from expecttest import TestCase
from support.tables import quantize

import ctfp8_compile as ctfp8
from ctfp8_compile.graph import format_graph

pytestmark = pytest.mark.usefixtures("kernel_everywhere")


def _lowered(name, which="layer"):
    layer = ctfp8.from_pretrained(DATA / name).model.layers[0]
    hidden, rotary = torch.zeros(1, 5, 128, dtype=torch.bfloat16), torch.zeros(1, 5, 32, dtype=torch.bfloat16)
    if which == "layer":
        program = ctfp8.lower(layer, (hidden,), {"position_embeddings": (rotary, rotary)})
    else:
        program = ctfp8.lower(getattr(layer, which), (hidden,))
    return format_graph(program.graph)


class Golden(TestCase):
    maxDiff = None

    def test_llama_block(self):
        self.assertExpectedInline(
            _lowered("llama/FP8_DYNAMIC"),
            """\
%0 = placeholder : f8e4m3[128, 128]
%1 = placeholder : f8e4m3[64, 128]
%2 = placeholder : f8e4m3[64, 128]
%3 = placeholder : f8e4m3[128, 128]
%4 = placeholder : f8e4m3[256, 128]
%5 = placeholder : f8e4m3[256, 128]
%6 = placeholder : f8e4m3[128, 256]
%7 = placeholder : bf16[128]
%8 = placeholder : bf16[128]
%9 = placeholder : f32[128, 1]
%10 = placeholder : f32[64, 1]
%11 = placeholder : f32[64, 1]
%12 = placeholder : f32[128, 1]
%13 = placeholder : f32[256, 1]
%14 = placeholder : f32[256, 1]
%15 = placeholder : f32[128, 1]
%16 = placeholder : bf16[1, 5, 128]
%17 = placeholder : bf16[1, 5, 32]
%18 = placeholder : bf16[1, 5, 32]
%19 = _to_copy(%16, dtype=float32) : f32[1, 5, 128]
%20 = pow(%19, 2) : f32[1, 5, 128]
%21 = mean(%20, [-1], True) : f32[1, 5, 1]
%22 = add(%21, 1e-06) : f32[1, 5, 1]
%23 = rsqrt(%22) : f32[1, 5, 1]
%24 = mul(%19, %23) : f32[1, 5, 128]
%25 = _to_copy(%24, dtype=bfloat16) : bf16[1, 5, 128]
%26 = mul(%7, %25) : bf16[1, 5, 128]
%27 = ctfp8.dequantized_linear(%26, %0, %9, None, [1, 128]) : bf16[1, 5, 128]
%28 = view(%27, [1, 5, -1, 32]) : bf16[1, 5, 4, 32]
%29 = transpose(%28, 1, 2) : bf16[1, 4, 5, 32]
%30 = ctfp8.dequantized_linear(%26, %1, %10, None, [1, 128]) : bf16[1, 5, 64]
%31 = view(%30, [1, 5, -1, 32]) : bf16[1, 5, 2, 32]
%32 = transpose(%31, 1, 2) : bf16[1, 2, 5, 32]
%33 = ctfp8.dequantized_linear(%26, %2, %11, None, [1, 128]) : bf16[1, 5, 64]
%34 = view(%33, [1, 5, -1, 32]) : bf16[1, 5, 2, 32]
%35 = transpose(%34, 1, 2) : bf16[1, 2, 5, 32]
%36 = unsqueeze(%18, 1) : bf16[1, 1, 5, 32]
%37 = unsqueeze(%18, 1) : bf16[1, 1, 5, 32]
%38 = mul(%29, %36) : bf16[1, 4, 5, 32]
%39 = slice(%29, 3, 0, 16) : bf16[1, 4, 5, 16]
%40 = slice(%29, 3, 16, 9223372036854775807) : bf16[1, 4, 5, 16]
%41 = neg(%40) : bf16[1, 4, 5, 16]
%42 = cat([%41, %39], -1) : bf16[1, 4, 5, 32]
%43 = mul(%42, %37) : bf16[1, 4, 5, 32]
%44 = add(%38, %43) : bf16[1, 4, 5, 32]
%45 = mul(%32, %36) : bf16[1, 2, 5, 32]
%46 = slice(%32, 3, 0, 16) : bf16[1, 2, 5, 16]
%47 = slice(%32, 3, 16, 9223372036854775807) : bf16[1, 2, 5, 16]
%48 = neg(%47) : bf16[1, 2, 5, 16]
%49 = cat([%48, %46], -1) : bf16[1, 2, 5, 32]
%50 = mul(%49, %37) : bf16[1, 2, 5, 32]
%51 = add(%45, %50) : bf16[1, 2, 5, 32]
%52 = scaled_dot_product_attention(%44, %51, %35, None, 0.0, True, scale=0.1767766952966369, enable_gqa=True) : bf16[1, 4, 5, 32]
%53 = view(%52, [1, 4, 5, 32]) : bf16[1, 4, 5, 32]
%54 = transpose(%53, 1, 2) : bf16[1, 5, 4, 32]
%55 = view(%54, [1, 5, -1]) : bf16[1, 5, 128]
%56 = ctfp8.dequantized_linear(%55, %3, %12, None, [1, 128]) : bf16[1, 5, 128]
%57 = add(%16, %56) : bf16[1, 5, 128]
%58 = _to_copy(%57, dtype=float32) : f32[1, 5, 128]
%59 = pow(%58, 2) : f32[1, 5, 128]
%60 = mean(%59, [-1], True) : f32[1, 5, 1]
%61 = add(%60, 1e-06) : f32[1, 5, 1]
%62 = rsqrt(%61) : f32[1, 5, 1]
%63 = mul(%58, %62) : f32[1, 5, 128]
%64 = _to_copy(%63, dtype=bfloat16) : bf16[1, 5, 128]
%65 = mul(%8, %64) : bf16[1, 5, 128]
%66 = ctfp8.dequantized_linear(%65, %4, %13, None, [1, 128]) : bf16[1, 5, 256]
%67 = silu(%66) : bf16[1, 5, 256]
%68 = ctfp8.dequantized_linear(%65, %5, %14, None, [1, 128]) : bf16[1, 5, 256]
%69 = mul(%67, %68) : bf16[1, 5, 256]
%70 = ctfp8.dequantized_linear(%69, %6, %15, None, [1, 256]) : bf16[1, 5, 128]
%71 = add(%57, %70) : bf16[1, 5, 128]
return [%71]""",
        )

    def test_moe_of_qwen3moe(self):
        self.assertExpectedInline(
            _lowered("qwen3moe/FP8_BLOCK", "mlp"),
            """\
%0 = placeholder : f8e4m3[4, 128, 128]
%1 = placeholder : f8e4m3[4, 256, 128]
%2 = placeholder : bf16[4, 128]
%3 = placeholder : f32[4, 1, 1]
%4 = placeholder : f32[4, 2, 1]
%5 = placeholder : bf16[1, 5, 128]
%6 = view(%5, [-1, 128]) : bf16[5, 128]
%7 = view(%6, [-1, 128]) : bf16[5, 128]
%8 = linear(%7, %2) : bf16[5, 4]
%9 = softmax(%8, -1, float32) : f32[5, 4]
%10 = topk(%9, 2) : (f32[5, 2], i64[5, 2])
%11 = getitem(%10, 0) : f32[5, 2]
%12 = getitem(%10, 1) : i64[5, 2]
%13 = _to_copy(%11, dtype=bfloat16) : bf16[5, 2]
%14 = view(%13, [-1]) : bf16[10]
%15 = view(%12, [-1]) : i64[10]
%16 = sort(%15) : (i64[10], i64[10])
%17 = getitem(%16, 0) : i64[10]
%18 = getitem(%16, 1) : i64[10]
%19 = floor_divide(%18, 2) : i64[10]
%20 = index(%6, [%19]) : bf16[10, 128]
%21 = index(%14, [%18]) : bf16[10]
%22 = _to_copy(%17, dtype=float32) : f32[10]
%23 = histc(%22, 4, 0, 3) : f32[4]
%24 = cumsum(%23, 0, dtype=int32) : i32[4]
%25 = ctfp8.dequantized_grouped_mm(%20, %1, %4, %24, [128, 128]) : bf16[10, 256]
%26 = split(%25, 128, -1) : (bf16[10, 128], bf16[10, 128])
%27 = getitem(%26, 0) : bf16[10, 128]
%28 = getitem(%26, 1) : bf16[10, 128]
%29 = silu(%27) : bf16[10, 128]
%30 = mul(%29, %28) : bf16[10, 128]
%31 = ctfp8.dequantized_grouped_mm(%30, %0, %3, %24, [128, 128]) : bf16[10, 128]
%32 = unsqueeze(%21, -1) : bf16[10, 1]
%33 = mul(%31, %32) : bf16[10, 128]
%34 = empty_like(%18, pin_memory=False) : i64[10]
%35 = arange(10, device=cpu, pin_memory=False) : i64[10]
%36 = index_put(%34, [%18], %35) : i64[10]
%37 = index(%33, [%36]) : bf16[10, 128]
%38 = view(%37, [5, 2, 128]) : bf16[5, 2, 128]
%39 = sum(%38, [1]) : bf16[5, 128]
%40 = view(%39, [1, 5, 128]) : bf16[1, 5, 128]
return [%40]""",
        )


def _embedded(strategy):
    """A table of 6 rows, in the graph of a target-independent program."""
    block = {"tensor": (6, 8), "channel": (1, 8), "block": (4, 3)}[strategy]
    fp8, scale, _ = quantize(torch.ones(6, 8), block)
    config = fp8_config(strategy, None, block)
    config["config_groups"]["group_0"]["targets"] = ["Linear", "Embedding"]  # the root has no name to be known by
    scale = scale.reshape(1) if strategy == "tensor" else scale
    table = torch.nn.Embedding(6, 8, dtype=torch.bfloat16)
    module = ctfp8.load_state_dict(table, {"weight": fp8, "weight_scale": scale}, config)
    return format_graph(ctfp8.lower(module, (torch.tensor([[1, 2, 3]]),)).graph)


class GoldenEmbedding(TestCase):
    maxDiff = None

    def test_a_scale_per_channel(self):
        self.assertExpectedInline(
            _embedded("channel"),
            """\
%0 = placeholder : f8e4m3[6, 8]
%1 = placeholder : f32[6, 1]
%2 = placeholder : i64[1, 3]
%3 = embedding(%0, %2) : f8e4m3[1, 3, 8]
%4 = _to_copy(%3, dtype=float32) : f32[1, 3, 8]
%5 = embedding(%1, %2) : f32[1, 3, 1]
%6 = mul(%4, %5) : f32[1, 3, 8]
%7 = _to_copy(%6, dtype=bfloat16) : bf16[1, 3, 8]
return [%7]""",
        )

    def test_a_scale_per_tensor(self):
        self.assertExpectedInline(
            _embedded("tensor"),
            """\
%0 = placeholder : f8e4m3[6, 8]
%1 = placeholder : f32[1, 1]
%2 = placeholder : i64[1, 3]
%3 = embedding(%0, %2) : f8e4m3[1, 3, 8]
%4 = _to_copy(%3, dtype=float32) : f32[1, 3, 8]
%5 = select(%1, 0, 0) : f32[1]
%6 = mul(%4, %5) : f32[1, 3, 8]
%7 = _to_copy(%6, dtype=bfloat16) : bf16[1, 3, 8]
return [%7]""",
        )

    def test_blocks_whose_last_is_a_part(self):
        self.assertExpectedInline(
            _embedded("block"),
            """\
%0 = placeholder : f8e4m3[6, 8]
%1 = placeholder : f32[2, 3]
%2 = placeholder : i64[1, 3]
%3 = embedding(%0, %2) : f8e4m3[1, 3, 8]
%4 = _to_copy(%3, dtype=float32) : f32[1, 3, 8]
%5 = div(%2, 4, rounding_mode=floor) : i64[1, 3]
%6 = embedding(%1, %5) : f32[1, 3, 3]
%7 = slice(%4, -1, 0, 6) : f32[1, 3, 6]
%8 = reshape(%7, [1, 3, 2, 3]) : f32[1, 3, 2, 3]
%9 = slice(%6, -1, 0, 2) : f32[1, 3, 2]
%10 = unsqueeze(%9, -1) : f32[1, 3, 2, 1]
%11 = mul(%8, %10) : f32[1, 3, 2, 3]
%12 = reshape(%11, [1, 3, 6]) : f32[1, 3, 6]
%13 = slice(%4, -1, 6, 8) : f32[1, 3, 2]
%14 = reshape(%13, [1, 3, 1, 2]) : f32[1, 3, 1, 2]
%15 = slice(%6, -1, 2, 3) : f32[1, 3, 1]
%16 = unsqueeze(%15, -1) : f32[1, 3, 1, 1]
%17 = mul(%14, %16) : f32[1, 3, 1, 2]
%18 = reshape(%17, [1, 3, 2]) : f32[1, 3, 2]
%19 = cat([%12, %18], -1) : f32[1, 3, 8]
%20 = _to_copy(%19, dtype=bfloat16) : bf16[1, 3, 8]
return [%20]""",
        )
