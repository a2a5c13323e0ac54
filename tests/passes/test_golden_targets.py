"""Golden graphs for machines that are not here: what CUDA and XPU get, made and checked on a CPU."""

from __future__ import annotations

import unittest

import torch
from conftest import DATA
from expecttest import TestCase

import ctfp8_compile as ctfp8
from ctfp8_compile import passes
from ctfp8_compile.passes import side_by_side
from ctfp8_compile.graph import format_graph
from ctfp8_compile.target import Target


def _layer(name, **kwargs):
    return ctfp8.from_pretrained(DATA / name, **kwargs).model.layers[0]


def _mlp(name, target):
    """The MLP of a block: gate and up share an input, down has its own."""
    hidden = torch.zeros(1, 5, 128, dtype=torch.bfloat16)
    return format_graph(ctfp8.lower(_layer(name).mlp, (hidden,), target=target).graph)


def _experts(form, target):
    """The experts of a block: 5 tokens, 2 experts each, by their ids and weights."""
    experts = _layer("qwen3moe/FP8_DYNAMIC", experts_implementation=form).mlp.experts
    hidden, ids = torch.zeros(5, 128, dtype=torch.bfloat16), torch.zeros(5, 2, dtype=torch.int64)
    weights = torch.zeros(5, 2, dtype=torch.bfloat16)
    return format_graph(ctfp8.lower(experts, (hidden, ids, weights), target=target).graph)


class Golden(TestCase):
    maxDiff = None

    def test_llama_block_before_lowering(self):
        hidden, rotary = torch.zeros(1, 5, 128, dtype=torch.bfloat16), torch.zeros(1, 5, 32, dtype=torch.bfloat16)
        with torch.no_grad():
            program = torch.export.export(
                _layer("llama/FP8_DYNAMIC"), (hidden,), {"position_embeddings": (rotary, rotary)}
            ).run_decompositions({})
        side_by_side.declare(program.graph)
        passes.run(program.graph, Target.parse("cuda:sm90"), lower=False)
        side_by_side.fold(program)
        self.assertExpectedInline(
            format_graph(program.graph),
            """\
%0 = placeholder : f8e4m3[256, 128]
%1 = placeholder : f8e4m3[128, 128]
%2 = placeholder : f8e4m3[512, 128]
%3 = placeholder : f8e4m3[128, 256]
%4 = placeholder : bf16[128]
%5 = placeholder : bf16[128]
%6 = placeholder : f32[256, 1]
%7 = placeholder : f32[128, 1]
%8 = placeholder : f32[512, 1]
%9 = placeholder : f32[128, 1]
%10 = placeholder : bf16[1, 5, 128]
%11 = placeholder : bf16[1, 5, 32]
%12 = placeholder : bf16[1, 5, 32]
%13 = _to_copy(%10, dtype=float32) : f32[1, 5, 128]
%14 = pow(%13, 2) : f32[1, 5, 128]
%15 = mean(%14, [-1], True) : f32[1, 5, 1]
%16 = add(%15, 1e-06) : f32[1, 5, 1]
%17 = rsqrt(%16) : f32[1, 5, 1]
%18 = mul(%13, %17) : f32[1, 5, 128]
%19 = _to_copy(%18, dtype=bfloat16) : bf16[1, 5, 128]
%20 = mul(%4, %19) : bf16[1, 5, 128]
%21 = reshape(%20, [-1, 128]) : bf16[5, 128]
%22 = ctfp8.quantize_per_token(%21) : (f8e4m3[5, 128], f32[5, 1])
%23 = getitem(%22, 0) : f8e4m3[5, 128]
%24 = getitem(%22, 1) : f32[5, 1]
%25 = ctfp8.scaled_mm(%23, %0, %24, %6, None, [1, 128], bfloat16) : bf16[5, 256]
%26 = slice(%25, 1, 0, 128) : bf16[5, 128]
%27 = clone(%26, memory_format=contiguous_format) : bf16[5, 128]
%28 = slice(%25, 1, 128, 192) : bf16[5, 64]
%29 = clone(%28, memory_format=contiguous_format) : bf16[5, 64]
%30 = slice(%25, 1, 192, 256) : bf16[5, 64]
%31 = clone(%30, memory_format=contiguous_format) : bf16[5, 64]
%32 = reshape(%27, [1, 5, 128]) : bf16[1, 5, 128]
%33 = view(%32, [1, 5, -1, 32]) : bf16[1, 5, 4, 32]
%34 = transpose(%33, 1, 2) : bf16[1, 4, 5, 32]
%35 = reshape(%29, [1, 5, 64]) : bf16[1, 5, 64]
%36 = view(%35, [1, 5, -1, 32]) : bf16[1, 5, 2, 32]
%37 = transpose(%36, 1, 2) : bf16[1, 2, 5, 32]
%38 = reshape(%31, [1, 5, 64]) : bf16[1, 5, 64]
%39 = view(%38, [1, 5, -1, 32]) : bf16[1, 5, 2, 32]
%40 = transpose(%39, 1, 2) : bf16[1, 2, 5, 32]
%41 = unsqueeze(%12, 1) : bf16[1, 1, 5, 32]
%42 = unsqueeze(%12, 1) : bf16[1, 1, 5, 32]
%43 = mul(%34, %41) : bf16[1, 4, 5, 32]
%44 = slice(%34, 3, 0, 16) : bf16[1, 4, 5, 16]
%45 = slice(%34, 3, 16, 9223372036854775807) : bf16[1, 4, 5, 16]
%46 = neg(%45) : bf16[1, 4, 5, 16]
%47 = cat([%46, %44], -1) : bf16[1, 4, 5, 32]
%48 = mul(%47, %42) : bf16[1, 4, 5, 32]
%49 = add(%43, %48) : bf16[1, 4, 5, 32]
%50 = mul(%37, %41) : bf16[1, 2, 5, 32]
%51 = slice(%37, 3, 0, 16) : bf16[1, 2, 5, 16]
%52 = slice(%37, 3, 16, 9223372036854775807) : bf16[1, 2, 5, 16]
%53 = neg(%52) : bf16[1, 2, 5, 16]
%54 = cat([%53, %51], -1) : bf16[1, 2, 5, 32]
%55 = mul(%54, %42) : bf16[1, 2, 5, 32]
%56 = add(%50, %55) : bf16[1, 2, 5, 32]
%57 = scaled_dot_product_attention(%49, %56, %40, None, 0.0, True, scale=0.1767766952966369, enable_gqa=True) : bf16[1, 4, 5, 32]
%58 = view(%57, [1, 4, 5, 32]) : bf16[1, 4, 5, 32]
%59 = transpose(%58, 1, 2) : bf16[1, 5, 4, 32]
%60 = view(%59, [1, 5, -1]) : bf16[1, 5, 128]
%61 = reshape(%60, [-1, 128]) : bf16[5, 128]
%62 = ctfp8.quantize_per_token(%61) : (f8e4m3[5, 128], f32[5, 1])
%63 = getitem(%62, 0) : f8e4m3[5, 128]
%64 = getitem(%62, 1) : f32[5, 1]
%65 = ctfp8.scaled_mm(%63, %1, %64, %7, None, [1, 128], bfloat16) : bf16[5, 128]
%66 = reshape(%65, [1, 5, 128]) : bf16[1, 5, 128]
%67 = add(%10, %66) : bf16[1, 5, 128]
%68 = _to_copy(%67, dtype=float32) : f32[1, 5, 128]
%69 = pow(%68, 2) : f32[1, 5, 128]
%70 = mean(%69, [-1], True) : f32[1, 5, 1]
%71 = add(%70, 1e-06) : f32[1, 5, 1]
%72 = rsqrt(%71) : f32[1, 5, 1]
%73 = mul(%68, %72) : f32[1, 5, 128]
%74 = _to_copy(%73, dtype=bfloat16) : bf16[1, 5, 128]
%75 = mul(%5, %74) : bf16[1, 5, 128]
%76 = reshape(%75, [-1, 128]) : bf16[5, 128]
%77 = ctfp8.quantize_per_token(%76) : (f8e4m3[5, 128], f32[5, 1])
%78 = getitem(%77, 0) : f8e4m3[5, 128]
%79 = getitem(%77, 1) : f32[5, 1]
%80 = ctfp8.scaled_mm(%78, %2, %79, %8, None, [1, 128], bfloat16) : bf16[5, 512]
%81 = slice(%80, 1, 0, 256) : bf16[5, 256]
%82 = clone(%81, memory_format=contiguous_format) : bf16[5, 256]
%83 = slice(%80, 1, 256, 512) : bf16[5, 256]
%84 = clone(%83, memory_format=contiguous_format) : bf16[5, 256]
%85 = reshape(%82, [1, 5, 256]) : bf16[1, 5, 256]
%86 = silu(%85) : bf16[1, 5, 256]
%87 = reshape(%84, [1, 5, 256]) : bf16[1, 5, 256]
%88 = mul(%86, %87) : bf16[1, 5, 256]
%89 = reshape(%88, [-1, 256]) : bf16[5, 256]
%90 = ctfp8.quantize_per_token(%89) : (f8e4m3[5, 256], f32[5, 1])
%91 = getitem(%90, 0) : f8e4m3[5, 256]
%92 = getitem(%90, 1) : f32[5, 1]
%93 = ctfp8.scaled_mm(%91, %3, %92, %9, None, [1, 256], bfloat16) : bf16[5, 128]
%94 = reshape(%93, [1, 5, 128]) : bf16[1, 5, 128]
%95 = add(%67, %94) : bf16[1, 5, 128]
return [%95]""",
        )

    def test_mlp_on_sm90(self):
        self.assertExpectedInline(
            _mlp("llama/FP8_DYNAMIC", "cuda:sm90"),
            """\
%0 = placeholder : f8e4m3[512, 128]
%1 = placeholder : f8e4m3[128, 256]
%2 = placeholder : f32[512, 1]
%3 = placeholder : f32[128, 1]
%4 = placeholder : bf16[1, 5, 128]
%5 = reshape(%4, [-1, 128]) : bf16[5, 128]
%6 = convert_element_type(%5, float32) : f32[5, 128]
%7 = abs(%6) : f32[5, 128]
%8 = amax(%7, [-1], True) : f32[5, 1]
%9 = clamp_min(%8, 1e-12) : f32[5, 1]
%10 = div(%9, 448.0) : f32[5, 1]
%11 = div(%6, %10) : f32[5, 128]
%12 = clamp(%11, -448.0, 448.0) : f32[5, 128]
%13 = convert_element_type(%12, float8_e4m3fn) : f8e4m3[5, 128]
%14 = reshape(%10, [-1]) : f32[5]
%15 = reshape(%2, [512]) : f32[512]
%16 = fbgemm.f8f8bf16_rowwise(%13, %0, %14, %15, None) : bf16[5, 512]
%17 = slice(%16, 1, 0, 256) : bf16[5, 256]
%18 = clone(%17, memory_format=contiguous_format) : bf16[5, 256]
%19 = slice(%16, 1, 256, 512) : bf16[5, 256]
%20 = clone(%19, memory_format=contiguous_format) : bf16[5, 256]
%21 = reshape(%18, [1, 5, 256]) : bf16[1, 5, 256]
%22 = silu(%21) : bf16[1, 5, 256]
%23 = reshape(%20, [1, 5, 256]) : bf16[1, 5, 256]
%24 = mul(%22, %23) : bf16[1, 5, 256]
%25 = reshape(%24, [-1, 256]) : bf16[5, 256]
%26 = convert_element_type(%25, float32) : f32[5, 256]
%27 = abs(%26) : f32[5, 256]
%28 = amax(%27, [-1], True) : f32[5, 1]
%29 = clamp_min(%28, 1e-12) : f32[5, 1]
%30 = div(%29, 448.0) : f32[5, 1]
%31 = div(%26, %30) : f32[5, 256]
%32 = clamp(%31, -448.0, 448.0) : f32[5, 256]
%33 = convert_element_type(%32, float8_e4m3fn) : f8e4m3[5, 256]
%34 = reshape(%30, [-1]) : f32[5]
%35 = reshape(%3, [128]) : f32[128]
%36 = fbgemm.f8f8bf16_rowwise(%33, %1, %34, %35, None) : bf16[5, 128]
%37 = reshape(%36, [1, 5, 128]) : bf16[1, 5, 128]
return [%37]""",
        )

    @unittest.skipIf(torch.__version__ < (2, 12), "needs torch 2.12 or later, as aten._scaled_mm on sm89 does")
    def test_mlp_on_sm89(self):
        self.assertExpectedInline(
            _mlp("llama/FP8_DYNAMIC", "cuda:sm89"),
            """\
%0 = placeholder : f8e4m3[512, 128]
%1 = placeholder : f8e4m3[128, 256]
%2 = placeholder : f32[512, 1]
%3 = placeholder : f32[128, 1]
%4 = placeholder : bf16[1, 5, 128]
%5 = reshape(%4, [-1, 128]) : bf16[5, 128]
%6 = convert_element_type(%5, float32) : f32[5, 128]
%7 = abs(%6) : f32[5, 128]
%8 = amax(%7, [-1], True) : f32[5, 1]
%9 = clamp_min(%8, 1e-12) : f32[5, 1]
%10 = div(%9, 448.0) : f32[5, 1]
%11 = div(%6, %10) : f32[5, 128]
%12 = clamp(%11, -448.0, 448.0) : f32[5, 128]
%13 = convert_element_type(%12, float8_e4m3fn) : f8e4m3[5, 128]
%14 = permute(%0, [1, 0]) : f8e4m3[128, 512]
%15 = reshape(%10, [-1, 1]) : f32[5, 1]
%16 = reshape(%2, [1, 512]) : f32[1, 512]
%17 = _scaled_mm(%13, %14, %15, %16, None, None, bfloat16, True) : bf16[5, 512]
%18 = slice(%17, 1, 0, 256) : bf16[5, 256]
%19 = clone(%18, memory_format=contiguous_format) : bf16[5, 256]
%20 = slice(%17, 1, 256, 512) : bf16[5, 256]
%21 = clone(%20, memory_format=contiguous_format) : bf16[5, 256]
%22 = reshape(%19, [1, 5, 256]) : bf16[1, 5, 256]
%23 = silu(%22) : bf16[1, 5, 256]
%24 = reshape(%21, [1, 5, 256]) : bf16[1, 5, 256]
%25 = mul(%23, %24) : bf16[1, 5, 256]
%26 = reshape(%25, [-1, 256]) : bf16[5, 256]
%27 = convert_element_type(%26, float32) : f32[5, 256]
%28 = abs(%27) : f32[5, 256]
%29 = amax(%28, [-1], True) : f32[5, 1]
%30 = clamp_min(%29, 1e-12) : f32[5, 1]
%31 = div(%30, 448.0) : f32[5, 1]
%32 = div(%27, %31) : f32[5, 256]
%33 = clamp(%32, -448.0, 448.0) : f32[5, 256]
%34 = convert_element_type(%33, float8_e4m3fn) : f8e4m3[5, 256]
%35 = permute(%1, [1, 0]) : f8e4m3[256, 128]
%36 = reshape(%31, [-1, 1]) : f32[5, 1]
%37 = reshape(%3, [1, 128]) : f32[1, 128]
%38 = _scaled_mm(%34, %35, %36, %37, None, None, bfloat16, True) : bf16[5, 128]
%39 = reshape(%38, [1, 5, 128]) : bf16[1, 5, 128]
return [%39]""",
        )

    def test_mlp_on_sm80(self):
        self.assertExpectedInline(
            _mlp("llama/FP8_DYNAMIC", "cuda:sm80"),
            """\
%0 = placeholder : f8e4m3[256, 128]
%1 = placeholder : f8e4m3[256, 128]
%2 = placeholder : f8e4m3[128, 256]
%3 = placeholder : f32[256, 1]
%4 = placeholder : f32[256, 1]
%5 = placeholder : f32[128, 1]
%6 = placeholder : bf16[1, 5, 128]
%7 = convert_element_type(%0, float32) : f32[256, 128]
%8 = mul(%7, %3) : f32[256, 128]
%9 = convert_element_type(%8, bfloat16) : bf16[256, 128]
%10 = linear(%6, %9) : bf16[1, 5, 256]
%11 = silu(%10) : bf16[1, 5, 256]
%12 = convert_element_type(%1, float32) : f32[256, 128]
%13 = mul(%12, %4) : f32[256, 128]
%14 = convert_element_type(%13, bfloat16) : bf16[256, 128]
%15 = linear(%6, %14) : bf16[1, 5, 256]
%16 = mul(%11, %15) : bf16[1, 5, 256]
%17 = convert_element_type(%2, float32) : f32[128, 256]
%18 = mul(%17, %5) : f32[128, 256]
%19 = convert_element_type(%18, bfloat16) : bf16[128, 256]
%20 = linear(%16, %19) : bf16[1, 5, 128]
return [%20]""",
        )

    def test_mlp_on_xpu(self):
        self.assertExpectedInline(
            _mlp("llama/FP8_DYNAMIC", "xpu"),
            """\
%0 = placeholder : f8e4m3[512, 128]
%1 = placeholder : f8e4m3[128, 256]
%2 = placeholder : f32[512, 1]
%3 = placeholder : f32[128, 1]
%4 = placeholder : bf16[1, 5, 128]
%5 = reshape(%4, [-1, 128]) : bf16[5, 128]
%6 = convert_element_type(%5, float32) : f32[5, 128]
%7 = abs(%6) : f32[5, 128]
%8 = amax(%7, [-1], True) : f32[5, 1]
%9 = clamp_min(%8, 1e-12) : f32[5, 1]
%10 = div(%9, 448.0) : f32[5, 1]
%11 = div(%6, %10) : f32[5, 128]
%12 = clamp(%11, -448.0, 448.0) : f32[5, 128]
%13 = convert_element_type(%12, float8_e4m3fn) : f8e4m3[5, 128]
%14 = permute(%0, [1, 0]) : f8e4m3[128, 512]
%15 = reshape(%10, [-1, 1]) : f32[5, 1]
%16 = reshape(%2, [1, 512]) : f32[1, 512]
%17 = _scaled_mm(%13, %14, %15, %16, None, None, bfloat16, True) : bf16[5, 512]
%18 = slice(%17, 1, 0, 256) : bf16[5, 256]
%19 = clone(%18, memory_format=contiguous_format) : bf16[5, 256]
%20 = slice(%17, 1, 256, 512) : bf16[5, 256]
%21 = clone(%20, memory_format=contiguous_format) : bf16[5, 256]
%22 = reshape(%19, [1, 5, 256]) : bf16[1, 5, 256]
%23 = silu(%22) : bf16[1, 5, 256]
%24 = reshape(%21, [1, 5, 256]) : bf16[1, 5, 256]
%25 = mul(%23, %24) : bf16[1, 5, 256]
%26 = reshape(%25, [-1, 256]) : bf16[5, 256]
%27 = convert_element_type(%26, float32) : f32[5, 256]
%28 = abs(%27) : f32[5, 256]
%29 = amax(%28, [-1], True) : f32[5, 1]
%30 = clamp_min(%29, 1e-12) : f32[5, 1]
%31 = div(%30, 448.0) : f32[5, 1]
%32 = div(%27, %31) : f32[5, 256]
%33 = clamp(%32, -448.0, 448.0) : f32[5, 256]
%34 = convert_element_type(%33, float8_e4m3fn) : f8e4m3[5, 256]
%35 = permute(%1, [1, 0]) : f8e4m3[256, 128]
%36 = reshape(%31, [-1, 1]) : f32[5, 1]
%37 = reshape(%3, [1, 128]) : f32[1, 128]
%38 = _scaled_mm(%34, %35, %36, %37, None, None, bfloat16, True) : bf16[5, 128]
%39 = reshape(%38, [1, 5, 128]) : bf16[1, 5, 128]
return [%39]""",
        )

    def test_static_scales_on_sm90(self):
        self.assertExpectedInline(
            _mlp("llama/FP8", "cuda:sm90"),
            """\
%0 = placeholder : f8e4m3[512, 128]
%1 = placeholder : f8e4m3[128, 256]
%2 = placeholder : f32[512, 1]
%3 = placeholder : f32[2]
%4 = placeholder : f32[128, 1]
%5 = placeholder : f32[1]
%6 = placeholder : bf16[1, 5, 128]
%7 = amax(%3, [-1]) : f32[]
%8 = reshape(%6, [-1, 128]) : bf16[5, 128]
%9 = reshape(%7, [1, 1]) : f32[1, 1]
%10 = convert_element_type(%8, float32) : f32[5, 128]
%11 = div(%10, %9) : f32[5, 128]
%12 = clamp(%11, -448.0, 448.0) : f32[5, 128]
%13 = convert_element_type(%12, float8_e4m3fn) : f8e4m3[5, 128]
%14 = slice(%13, 1, 0, 1) : f8e4m3[5, 1]
%15 = full_like(%14, 0.0, dtype=float32) : f32[5, 1]
%16 = add(%15, %9) : f32[5, 1]
%17 = reshape(%16, [-1]) : f32[5]
%18 = reshape(%2, [512]) : f32[512]
%19 = fbgemm.f8f8bf16_rowwise(%13, %0, %17, %18, None) : bf16[5, 512]
%20 = slice(%19, 1, 0, 256) : bf16[5, 256]
%21 = clone(%20, memory_format=contiguous_format) : bf16[5, 256]
%22 = slice(%19, 1, 256, 512) : bf16[5, 256]
%23 = clone(%22, memory_format=contiguous_format) : bf16[5, 256]
%24 = reshape(%21, [1, 5, 256]) : bf16[1, 5, 256]
%25 = silu(%24) : bf16[1, 5, 256]
%26 = reshape(%23, [1, 5, 256]) : bf16[1, 5, 256]
%27 = mul(%25, %26) : bf16[1, 5, 256]
%28 = amax(%5, [-1]) : f32[]
%29 = reshape(%27, [-1, 256]) : bf16[5, 256]
%30 = reshape(%28, [1, 1]) : f32[1, 1]
%31 = convert_element_type(%29, float32) : f32[5, 256]
%32 = div(%31, %30) : f32[5, 256]
%33 = clamp(%32, -448.0, 448.0) : f32[5, 256]
%34 = convert_element_type(%33, float8_e4m3fn) : f8e4m3[5, 256]
%35 = slice(%34, 1, 0, 1) : f8e4m3[5, 1]
%36 = full_like(%35, 0.0, dtype=float32) : f32[5, 1]
%37 = add(%36, %30) : f32[5, 1]
%38 = reshape(%37, [-1]) : f32[5]
%39 = reshape(%4, [128]) : f32[128]
%40 = fbgemm.f8f8bf16_rowwise(%34, %1, %38, %39, None) : bf16[5, 128]
%41 = reshape(%40, [1, 5, 128]) : bf16[1, 5, 128]
return [%41]""",
        )

    def test_block_scales_on_sm90(self):
        self.assertExpectedInline(
            _mlp("llama/FP8_BLOCK", "cuda:sm90"),
            """\
%0 = placeholder : f8e4m3[512, 128]
%1 = placeholder : f8e4m3[128, 256]
%2 = placeholder : f32[4, 1]
%3 = placeholder : f32[1, 2]
%4 = placeholder : bf16[1, 5, 128]
%5 = reshape(%4, [-1, 128]) : bf16[5, 128]
%6 = convert_element_type(%5, float32) : f32[5, 128]
%7 = reshape(%6, [-1, 1, 128]) : f32[5, 1, 128]
%8 = abs(%7) : f32[5, 1, 128]
%9 = amax(%8, [-1], True) : f32[5, 1, 1]
%10 = clamp_min(%9, 1e-12) : f32[5, 1, 1]
%11 = div(%10, 448.0) : f32[5, 1, 1]
%12 = div(%7, %11) : f32[5, 1, 128]
%13 = clamp(%12, -448.0, 448.0) : f32[5, 1, 128]
%14 = convert_element_type(%13, float8_e4m3fn) : f8e4m3[5, 1, 128]
%15 = reshape(%14, [-1, 128]) : f8e4m3[5, 128]
%16 = squeeze(%11, -1) : f32[5, 1]
%17 = permute(%16, [1, 0]) : f32[1, 5]
%18 = clone(%17, memory_format=contiguous_format) : f32[1, 5]
%19 = permute(%2, [1, 0]) : f32[1, 4]
%20 = clone(%19, memory_format=contiguous_format) : f32[1, 4]
%21 = fbgemm.f8f8bf16_groupwise(%15, %0, %18, %20) : bf16[5, 512]
%22 = slice(%21, 1, 0, 256) : bf16[5, 256]
%23 = clone(%22, memory_format=contiguous_format) : bf16[5, 256]
%24 = slice(%21, 1, 256, 512) : bf16[5, 256]
%25 = clone(%24, memory_format=contiguous_format) : bf16[5, 256]
%26 = reshape(%23, [1, 5, 256]) : bf16[1, 5, 256]
%27 = silu(%26) : bf16[1, 5, 256]
%28 = reshape(%25, [1, 5, 256]) : bf16[1, 5, 256]
%29 = mul(%27, %28) : bf16[1, 5, 256]
%30 = reshape(%29, [-1, 256]) : bf16[5, 256]
%31 = convert_element_type(%30, float32) : f32[5, 256]
%32 = reshape(%31, [-1, 2, 128]) : f32[5, 2, 128]
%33 = abs(%32) : f32[5, 2, 128]
%34 = amax(%33, [-1], True) : f32[5, 2, 1]
%35 = clamp_min(%34, 1e-12) : f32[5, 2, 1]
%36 = div(%35, 448.0) : f32[5, 2, 1]
%37 = div(%32, %36) : f32[5, 2, 128]
%38 = clamp(%37, -448.0, 448.0) : f32[5, 2, 128]
%39 = convert_element_type(%38, float8_e4m3fn) : f8e4m3[5, 2, 128]
%40 = reshape(%39, [-1, 256]) : f8e4m3[5, 256]
%41 = squeeze(%36, -1) : f32[5, 2]
%42 = permute(%41, [1, 0]) : f32[2, 5]
%43 = clone(%42, memory_format=contiguous_format) : f32[2, 5]
%44 = permute(%3, [1, 0]) : f32[2, 1]
%45 = clone(%44, memory_format=contiguous_format) : f32[2, 1]
%46 = fbgemm.f8f8bf16_groupwise(%40, %1, %43, %45) : bf16[5, 128]
%47 = reshape(%46, [1, 5, 128]) : bf16[1, 5, 128]
return [%47]""",
        )

    def test_grouped_experts_on_sm90(self):
        self.assertExpectedInline(
            _experts("grouped_mm", "cuda:sm90"),
            """\
%0 = placeholder : f8e4m3[4, 128, 128]
%1 = placeholder : f8e4m3[4, 256, 128]
%2 = placeholder : f32[4, 128, 1]
%3 = placeholder : f32[4, 256, 1]
%4 = placeholder : bf16[5, 128]
%5 = placeholder : i64[5, 2]
%6 = placeholder : bf16[5, 2]
%7 = view(%6, [-1]) : bf16[10]
%8 = view(%5, [-1]) : i64[10]
%9 = sort(%8) : (i64[10], i64[10])
%10 = getitem(%9, 0) : i64[10]
%11 = getitem(%9, 1) : i64[10]
%12 = floor_divide(%11, 2) : i64[10]
%13 = index(%4, [%12]) : bf16[10, 128]
%14 = index(%7, [%11]) : bf16[10]
%15 = _to_copy(%10, dtype=float32) : f32[10]
%16 = histc(%15, 4, 0, 3) : f32[4]
%17 = cumsum(%16, 0, dtype=int32) : i32[4]
%18 = convert_element_type(%13, float32) : f32[10, 128]
%19 = abs(%18) : f32[10, 128]
%20 = amax(%19, [-1], True) : f32[10, 1]
%21 = clamp_min(%20, 1e-12) : f32[10, 1]
%22 = div(%21, 448.0) : f32[10, 1]
%23 = div(%18, %22) : f32[10, 128]
%24 = clamp(%23, -448.0, 448.0) : f32[10, 128]
%25 = convert_element_type(%24, float8_e4m3fn) : f8e4m3[10, 128]
%26 = slice(%17, 0, 0, 3) : i32[3]
%27 = constant_pad_nd(%26, [1, 0]) : i32[4]
%28 = sub(%17, %27) : i32[4]
%29 = convert_element_type(%28, int64) : i64[4]
%30 = reshape(%22, [-1]) : f32[10]
%31 = reshape(%3, [4, 256]) : f32[4, 256]
%32 = fbgemm.f8f8bf16_rowwise_grouped_stacked(%25, %1, %30, %31, %29) : bf16[10, 256]
%33 = split(%32, 128, -1) : (bf16[10, 128], bf16[10, 128])
%34 = getitem(%33, 0) : bf16[10, 128]
%35 = getitem(%33, 1) : bf16[10, 128]
%36 = silu(%34) : bf16[10, 128]
%37 = mul(%36, %35) : bf16[10, 128]
%38 = convert_element_type(%37, float32) : f32[10, 128]
%39 = abs(%38) : f32[10, 128]
%40 = amax(%39, [-1], True) : f32[10, 1]
%41 = clamp_min(%40, 1e-12) : f32[10, 1]
%42 = div(%41, 448.0) : f32[10, 1]
%43 = div(%38, %42) : f32[10, 128]
%44 = clamp(%43, -448.0, 448.0) : f32[10, 128]
%45 = convert_element_type(%44, float8_e4m3fn) : f8e4m3[10, 128]
%46 = slice(%17, 0, 0, 3) : i32[3]
%47 = constant_pad_nd(%46, [1, 0]) : i32[4]
%48 = sub(%17, %47) : i32[4]
%49 = convert_element_type(%48, int64) : i64[4]
%50 = reshape(%42, [-1]) : f32[10]
%51 = reshape(%2, [4, 128]) : f32[4, 128]
%52 = fbgemm.f8f8bf16_rowwise_grouped_stacked(%45, %0, %50, %51, %49) : bf16[10, 128]
%53 = unsqueeze(%14, -1) : bf16[10, 1]
%54 = mul(%52, %53) : bf16[10, 128]
%55 = empty_like(%11, pin_memory=False) : i64[10]
%56 = arange(10, device=cpu, pin_memory=False) : i64[10]
%57 = index_put(%55, [%11], %56) : i64[10]
%58 = index(%54, [%57]) : bf16[10, 128]
%59 = view(%58, [5, 2, 128]) : bf16[5, 2, 128]
%60 = sum(%59, [1]) : bf16[5, 128]
return [%60]""",
        )

    def test_gathered_experts_on_sm90(self):
        self.assertExpectedInline(
            _experts("batched_mm", "cuda:sm90"),
            """\
%0 = placeholder : f8e4m3[4, 128, 128]
%1 = placeholder : f8e4m3[4, 256, 128]
%2 = placeholder : f32[4, 128, 1]
%3 = placeholder : f32[4, 256, 1]
%4 = placeholder : bf16[5, 128]
%5 = placeholder : i64[5, 2]
%6 = placeholder : bf16[5, 2]
%7 = repeat_interleave(%4, 2, 0) : bf16[10, 128]
%8 = view(%6, [-1]) : bf16[10]
%9 = view(%5, [-1]) : i64[10]
%10 = unsqueeze(%7, -1) : bf16[10, 128, 1]
%11 = squeeze(%10, 2) : bf16[10, 128]
%12 = convert_element_type(%11, float32) : f32[10, 128]
%13 = abs(%12) : f32[10, 128]
%14 = amax(%13, [-1], True) : f32[10, 1]
%15 = clamp_min(%14, 1e-12) : f32[10, 1]
%16 = div(%15, 448.0) : f32[10, 1]
%17 = div(%12, %16) : f32[10, 128]
%18 = clamp(%17, -448.0, 448.0) : f32[10, 128]
%19 = convert_element_type(%18, float8_e4m3fn) : f8e4m3[10, 128]
%20 = sort(%9) : (i64[10], i64[10])
%21 = getitem(%20, 1) : i64[10]
%22 = index(%19, [%21]) : f8e4m3[10, 128]
%23 = index(%16, [%21]) : f32[10, 1]
%24 = arange(4, dtype=int64, device=cpu) : i64[4]
%25 = unsqueeze(%9, 0) : i64[1, 10]
%26 = unsqueeze(%24, 1) : i64[4, 1]
%27 = le(%25, %26) : b1[4, 10]
%28 = sum(%27, [1]) : i64[4]
%29 = convert_element_type(%28, int32) : i32[4]
%30 = slice(%29, 0, 0, 3) : i32[3]
%31 = constant_pad_nd(%30, [1, 0]) : i32[4]
%32 = sub(%29, %31) : i32[4]
%33 = convert_element_type(%32, int64) : i64[4]
%34 = reshape(%23, [-1]) : f32[10]
%35 = reshape(%3, [4, 256]) : f32[4, 256]
%36 = fbgemm.f8f8bf16_rowwise_grouped_stacked(%22, %1, %34, %35, %33) : bf16[10, 256]
%37 = sort(%21) : (i64[10], i64[10])
%38 = getitem(%37, 1) : i64[10]
%39 = index(%36, [%38]) : bf16[10, 256]
%40 = unsqueeze(%39, 2) : bf16[10, 256, 1]
%41 = squeeze(%40, -1) : bf16[10, 256]
%42 = split(%41, 128, -1) : (bf16[10, 128], bf16[10, 128])
%43 = getitem(%42, 0) : bf16[10, 128]
%44 = getitem(%42, 1) : bf16[10, 128]
%45 = silu(%43) : bf16[10, 128]
%46 = mul(%45, %44) : bf16[10, 128]
%47 = unsqueeze(%46, -1) : bf16[10, 128, 1]
%48 = squeeze(%47, 2) : bf16[10, 128]
%49 = convert_element_type(%48, float32) : f32[10, 128]
%50 = abs(%49) : f32[10, 128]
%51 = amax(%50, [-1], True) : f32[10, 1]
%52 = clamp_min(%51, 1e-12) : f32[10, 1]
%53 = div(%52, 448.0) : f32[10, 1]
%54 = div(%49, %53) : f32[10, 128]
%55 = clamp(%54, -448.0, 448.0) : f32[10, 128]
%56 = convert_element_type(%55, float8_e4m3fn) : f8e4m3[10, 128]
%57 = sort(%9) : (i64[10], i64[10])
%58 = getitem(%57, 1) : i64[10]
%59 = index(%56, [%58]) : f8e4m3[10, 128]
%60 = index(%53, [%58]) : f32[10, 1]
%61 = arange(4, dtype=int64, device=cpu) : i64[4]
%62 = unsqueeze(%9, 0) : i64[1, 10]
%63 = unsqueeze(%61, 1) : i64[4, 1]
%64 = le(%62, %63) : b1[4, 10]
%65 = sum(%64, [1]) : i64[4]
%66 = convert_element_type(%65, int32) : i32[4]
%67 = slice(%66, 0, 0, 3) : i32[3]
%68 = constant_pad_nd(%67, [1, 0]) : i32[4]
%69 = sub(%66, %68) : i32[4]
%70 = convert_element_type(%69, int64) : i64[4]
%71 = reshape(%60, [-1]) : f32[10]
%72 = reshape(%2, [4, 128]) : f32[4, 128]
%73 = fbgemm.f8f8bf16_rowwise_grouped_stacked(%59, %0, %71, %72, %70) : bf16[10, 128]
%74 = sort(%58) : (i64[10], i64[10])
%75 = getitem(%74, 1) : i64[10]
%76 = index(%73, [%75]) : bf16[10, 128]
%77 = unsqueeze(%76, 2) : bf16[10, 128, 1]
%78 = squeeze(%77, -1) : bf16[10, 128]
%79 = unsqueeze(%8, -1) : bf16[10, 1]
%80 = mul(%78, %79) : bf16[10, 128]
%81 = view(%80, [5, 2, 128]) : bf16[5, 2, 128]
%82 = sum(%81, [1]) : bf16[5, 128]
return [%82]""",
        )

    def test_grouped_experts_in_torch_alone(self):
        self.assertExpectedInline(
            _experts("grouped_mm", "cuda:sm90+scaled_mm"),
            """\
%0 = placeholder : f8e4m3[4, 128, 128]
%1 = placeholder : f8e4m3[4, 256, 128]
%2 = placeholder : f32[4, 128, 1]
%3 = placeholder : f32[4, 256, 1]
%4 = placeholder : bf16[5, 128]
%5 = placeholder : i64[5, 2]
%6 = placeholder : bf16[5, 2]
%7 = view(%6, [-1]) : bf16[10]
%8 = view(%5, [-1]) : i64[10]
%9 = sort(%8) : (i64[10], i64[10])
%10 = getitem(%9, 0) : i64[10]
%11 = getitem(%9, 1) : i64[10]
%12 = floor_divide(%11, 2) : i64[10]
%13 = index(%4, [%12]) : bf16[10, 128]
%14 = index(%7, [%11]) : bf16[10]
%15 = _to_copy(%10, dtype=float32) : f32[10]
%16 = histc(%15, 4, 0, 3) : f32[4]
%17 = cumsum(%16, 0, dtype=int32) : i32[4]
%18 = convert_element_type(%13, float32) : f32[10, 128]
%19 = abs(%18) : f32[10, 128]
%20 = amax(%19, [-1], True) : f32[10, 1]
%21 = clamp_min(%20, 1e-12) : f32[10, 1]
%22 = div(%21, 448.0) : f32[10, 1]
%23 = div(%18, %22) : f32[10, 128]
%24 = clamp(%23, -448.0, 448.0) : f32[10, 128]
%25 = convert_element_type(%24, float8_e4m3fn) : f8e4m3[10, 128]
%26 = permute(%1, [0, 2, 1]) : f8e4m3[4, 128, 256]
%27 = reshape(%22, [-1]) : f32[10]
%28 = reshape(%3, [4, 256]) : f32[4, 256]
%29 = _scaled_grouped_mm(%25, %26, %27, %28, %17, None, None, bfloat16, True) : bf16[10, 256]
%30 = split(%29, 128, -1) : (bf16[10, 128], bf16[10, 128])
%31 = getitem(%30, 0) : bf16[10, 128]
%32 = getitem(%30, 1) : bf16[10, 128]
%33 = silu(%31) : bf16[10, 128]
%34 = mul(%33, %32) : bf16[10, 128]
%35 = convert_element_type(%34, float32) : f32[10, 128]
%36 = abs(%35) : f32[10, 128]
%37 = amax(%36, [-1], True) : f32[10, 1]
%38 = clamp_min(%37, 1e-12) : f32[10, 1]
%39 = div(%38, 448.0) : f32[10, 1]
%40 = div(%35, %39) : f32[10, 128]
%41 = clamp(%40, -448.0, 448.0) : f32[10, 128]
%42 = convert_element_type(%41, float8_e4m3fn) : f8e4m3[10, 128]
%43 = permute(%0, [0, 2, 1]) : f8e4m3[4, 128, 128]
%44 = reshape(%39, [-1]) : f32[10]
%45 = reshape(%2, [4, 128]) : f32[4, 128]
%46 = _scaled_grouped_mm(%42, %43, %44, %45, %17, None, None, bfloat16, True) : bf16[10, 128]
%47 = unsqueeze(%14, -1) : bf16[10, 1]
%48 = mul(%46, %47) : bf16[10, 128]
%49 = empty_like(%11, pin_memory=False) : i64[10]
%50 = arange(10, device=cpu, pin_memory=False) : i64[10]
%51 = index_put(%49, [%11], %50) : i64[10]
%52 = index(%48, [%51]) : bf16[10, 128]
%53 = view(%52, [5, 2, 128]) : bf16[5, 2, 128]
%54 = sum(%53, [1]) : bf16[5, 128]
return [%54]""",
        )

    def test_experts_on_xpu(self):
        self.assertExpectedInline(
            _experts("grouped_mm", "xpu"),
            """\
%0 = placeholder : f8e4m3[4, 128, 128]
%1 = placeholder : f8e4m3[4, 256, 128]
%2 = placeholder : f32[4, 128, 1]
%3 = placeholder : f32[4, 256, 1]
%4 = placeholder : bf16[5, 128]
%5 = placeholder : i64[5, 2]
%6 = placeholder : bf16[5, 2]
%7 = view(%6, [-1]) : bf16[10]
%8 = view(%5, [-1]) : i64[10]
%9 = sort(%8) : (i64[10], i64[10])
%10 = getitem(%9, 0) : i64[10]
%11 = getitem(%9, 1) : i64[10]
%12 = floor_divide(%11, 2) : i64[10]
%13 = index(%4, [%12]) : bf16[10, 128]
%14 = index(%7, [%11]) : bf16[10]
%15 = _to_copy(%10, dtype=float32) : f32[10]
%16 = histc(%15, 4, 0, 3) : f32[4]
%17 = cumsum(%16, 0, dtype=int32) : i32[4]
%18 = convert_element_type(%1, float32) : f32[4, 256, 128]
%19 = mul(%18, %3) : f32[4, 256, 128]
%20 = convert_element_type(%19, bfloat16) : bf16[4, 256, 128]
%21 = transpose(%20, -2, -1) : bf16[4, 128, 256]
%22 = _grouped_mm(%13, %21, %17) : bf16[10, 256]
%23 = split(%22, 128, -1) : (bf16[10, 128], bf16[10, 128])
%24 = getitem(%23, 0) : bf16[10, 128]
%25 = getitem(%23, 1) : bf16[10, 128]
%26 = silu(%24) : bf16[10, 128]
%27 = mul(%26, %25) : bf16[10, 128]
%28 = convert_element_type(%0, float32) : f32[4, 128, 128]
%29 = mul(%28, %2) : f32[4, 128, 128]
%30 = convert_element_type(%29, bfloat16) : bf16[4, 128, 128]
%31 = transpose(%30, -2, -1) : bf16[4, 128, 128]
%32 = _grouped_mm(%27, %31, %17) : bf16[10, 128]
%33 = unsqueeze(%14, -1) : bf16[10, 1]
%34 = mul(%32, %33) : bf16[10, 128]
%35 = empty_like(%11, pin_memory=False) : i64[10]
%36 = arange(10, device=cpu, pin_memory=False) : i64[10]
%37 = index_put(%35, [%11], %36) : i64[10]
%38 = index(%34, [%37]) : bf16[10, 128]
%39 = view(%38, [5, 2, 128]) : bf16[5, 2, 128]
%40 = sum(%39, [1]) : bf16[5, 128]
return [%40]""",
        )
