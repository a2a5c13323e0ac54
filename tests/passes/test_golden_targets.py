"""Golden graphs for machines that are not here: what CUDA and XPU get, made and checked on a CPU."""

from __future__ import annotations

import unittest

import pytest
import torch
from conftest import DATA
from expecttest import TestCase

import ctfp8_compile as ctfp8
from ctfp8_compile import passes
from ctfp8_compile.graph import format_graph
from ctfp8_compile.passes import horizontal_fusion, prepack
from ctfp8_compile.target import Target

pytestmark = pytest.mark.filterwarnings("ignore:the checkpoint was calibrated")


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


class _Attention(torch.nn.Module):
    """Attention of new tokens to a layer of an FP8 cache, whose tensors are buffers."""

    def __init__(self, calibrated: bool):
        super().__init__()
        name = "llama/FP8_DYNAMIC_KV" if calibrated else "llama/FP8_DYNAMIC"
        decoder = ctfp8.StaticCacheDecoder(ctfp8.from_pretrained(DATA / name), 1, 16, dtype="fp8")
        self.layer = decoder.cache.layers[0]
        for which in ("keys", "values", "cumulative_length"):
            self.register_buffer(which, getattr(self.layer, which))

    def forward(self, query, keys, values, mask):
        for which, buffer in self.named_buffers():
            setattr(self.layer, which, buffer)
        keys, values = self.layer.update(keys, values)
        return torch.nn.functional.scaled_dot_product_attention(query, keys, values, mask, enable_gqa=True)


_STATES = (*(torch.randn(1, heads, 1, 32, dtype=torch.bfloat16) for heads in (4, 2, 2)), torch.ones(1, 1, 1, 16) > 0)


def _cached(calibrated, target):
    return format_graph(ctfp8.lower(_Attention(calibrated), _STATES, target=target).graph)


class Golden(TestCase):
    maxDiff = None

    def test_a_lowered_cache_is_read_as_it_was_written(self):
        for calibrated in (False, True):
            module, program = (
                _Attention(calibrated),
                ctfp8.lower(_Attention(calibrated), _STATES, target="xpu").module(),
            )
            for _ in range(3):  # the mask shows what the steps before left
                torch.testing.assert_close(program(*_STATES), module(*_STATES))

    def test_an_fp8_cache_on_cuda(self):
        self.assertExpectedInline(
            _cached(False, "cuda:sm90"),
            """\
%0 = placeholder : torch.uint8[1, 2, 16, 33]
%1 = placeholder : torch.uint8[1, 2, 16, 33]
%2 = placeholder : i64[]
%3 = placeholder : bf16[1, 4, 1, 32]
%4 = placeholder : bf16[1, 2, 1, 32]
%5 = placeholder : bf16[1, 2, 1, 32]
%6 = placeholder : b1[1, 1, 1, 16]
%7 = _to_copy(%4, dtype=float32) : f32[1, 2, 1, 32]
%8 = abs(%7) : f32[1, 2, 1, 32]
%9 = amax(%8, [-1], True) : f32[1, 2, 1, 1]
%10 = clamp_min(%9, 1e-12) : f32[1, 2, 1, 1]
%11 = div(%10, 448.0) : f32[1, 2, 1, 1]
%12 = view(%11, int32) : i32[1, 2, 1, 1]
%13 = detach(%12) : i32[1, 2, 1, 1]
%14 = add(%13, 8388607) : i32[1, 2, 1, 1]
%15 = bitwise_right_shift(%14, 23) : i32[1, 2, 1, 1]
%16 = clamp_max(%15, 254) : i32[1, 2, 1, 1]
%17 = _to_copy(%16, dtype=uint8) : torch.uint8[1, 2, 1, 1]
%18 = _to_copy(%17, dtype=int32) : i32[1, 2, 1, 1]
%19 = mul(%18, 8388608) : i32[1, 2, 1, 1]
%20 = clamp_min(%19, 4194304) : i32[1, 2, 1, 1]
%21 = view(%20, float32) : f32[1, 2, 1, 1]
%22 = detach(%21) : f32[1, 2, 1, 1]
%23 = div(%7, %22) : f32[1, 2, 1, 32]
%24 = clamp_min(%23, -448.0) : f32[1, 2, 1, 32]
%25 = clamp_max(%24, 448.0) : f32[1, 2, 1, 32]
%26 = _to_copy(%25, dtype=float8_e4m3fn) : f8e4m3[1, 2, 1, 32]
%27 = view(%26, uint8) : torch.uint8[1, 2, 1, 32]
%28 = detach(%27) : torch.uint8[1, 2, 1, 32]
%29 = cat([%28, %17], -1) : torch.uint8[1, 2, 1, 33]
%30 = _to_copy(%5, dtype=float32) : f32[1, 2, 1, 32]
%31 = abs(%30) : f32[1, 2, 1, 32]
%32 = amax(%31, [-1], True) : f32[1, 2, 1, 1]
%33 = clamp_min(%32, 1e-12) : f32[1, 2, 1, 1]
%34 = div(%33, 448.0) : f32[1, 2, 1, 1]
%35 = view(%34, int32) : i32[1, 2, 1, 1]
%36 = detach(%35) : i32[1, 2, 1, 1]
%37 = add(%36, 8388607) : i32[1, 2, 1, 1]
%38 = bitwise_right_shift(%37, 23) : i32[1, 2, 1, 1]
%39 = clamp_max(%38, 254) : i32[1, 2, 1, 1]
%40 = _to_copy(%39, dtype=uint8) : torch.uint8[1, 2, 1, 1]
%41 = _to_copy(%40, dtype=int32) : i32[1, 2, 1, 1]
%42 = mul(%41, 8388608) : i32[1, 2, 1, 1]
%43 = clamp_min(%42, 4194304) : i32[1, 2, 1, 1]
%44 = view(%43, float32) : f32[1, 2, 1, 1]
%45 = detach(%44) : f32[1, 2, 1, 1]
%46 = div(%30, %45) : f32[1, 2, 1, 32]
%47 = clamp_min(%46, -448.0) : f32[1, 2, 1, 32]
%48 = clamp_max(%47, 448.0) : f32[1, 2, 1, 32]
%49 = _to_copy(%48, dtype=float8_e4m3fn) : f8e4m3[1, 2, 1, 32]
%50 = view(%49, uint8) : torch.uint8[1, 2, 1, 32]
%51 = detach(%50) : torch.uint8[1, 2, 1, 32]
%52 = cat([%51, %40], -1) : torch.uint8[1, 2, 1, 33]
%53 = arange(1, device=cpu, pin_memory=False) : i64[1]
%54 = add(%53, %2) : i64[1]
%55 = add(%2, 1) : i64[]
%56 = index_copy(%0, 2, %54, %29) : torch.uint8[1, 2, 16, 33]
%57 = index_copy(%1, 2, %54, %52) : torch.uint8[1, 2, 16, 33]
%58 = slice(%56, 3, 0, 32) : torch.uint8[1, 2, 16, 32]
%59 = slice(%56, 3, 32, 33) : torch.uint8[1, 2, 16, 1]
%60 = _to_copy(%59, dtype=int32) : i32[1, 2, 16, 1]
%61 = mul(%60, 8388608) : i32[1, 2, 16, 1]
%62 = clamp_min(%61, 4194304) : i32[1, 2, 16, 1]
%63 = view(%62, float32) : f32[1, 2, 16, 1]
%64 = view(%58, float8_e4m3fn) : f8e4m3[1, 2, 16, 32]
%65 = _to_copy(%64, dtype=float32) : f32[1, 2, 16, 32]
%66 = mul(%65, %63) : f32[1, 2, 16, 32]
%67 = _to_copy(%66, dtype=bfloat16) : bf16[1, 2, 16, 32]
%68 = slice(%57, 3, 0, 32) : torch.uint8[1, 2, 16, 32]
%69 = slice(%57, 3, 32, 33) : torch.uint8[1, 2, 16, 1]
%70 = _to_copy(%69, dtype=int32) : i32[1, 2, 16, 1]
%71 = mul(%70, 8388608) : i32[1, 2, 16, 1]
%72 = clamp_min(%71, 4194304) : i32[1, 2, 16, 1]
%73 = view(%72, float32) : f32[1, 2, 16, 1]
%74 = view(%68, float8_e4m3fn) : f8e4m3[1, 2, 16, 32]
%75 = _to_copy(%74, dtype=float32) : f32[1, 2, 16, 32]
%76 = mul(%75, %73) : f32[1, 2, 16, 32]
%77 = _to_copy(%76, dtype=bfloat16) : bf16[1, 2, 16, 32]
%78 = scaled_dot_product_attention(%3, %67, %77, %6, enable_gqa=True) : bf16[1, 4, 1, 32]
return [%56, %57, %55, %78]""",
        )

    def test_a_calibrated_cache_on_xpu(self):
        self.assertExpectedInline(
            _cached(True, "xpu"),
            """\
%0 = placeholder : torch.uint8[1, 2, 16, 32]
%1 = placeholder : torch.uint8[1, 2, 16, 32]
%2 = placeholder : i64[]
%3 = placeholder : f32[1]
%4 = placeholder : f32[1]
%5 = placeholder : bf16[1, 4, 1, 32]
%6 = placeholder : bf16[1, 2, 1, 32]
%7 = placeholder : bf16[1, 2, 1, 32]
%8 = placeholder : b1[1, 1, 1, 16]
%9 = _to_copy(%6, dtype=float32) : f32[1, 2, 1, 32]
%10 = view(%3, [1, -1, 1, 1]) : f32[1, 1, 1, 1]
%11 = div(%9, %10) : f32[1, 2, 1, 32]
%12 = clamp_min(%11, -448.0) : f32[1, 2, 1, 32]
%13 = clamp_max(%12, 448.0) : f32[1, 2, 1, 32]
%14 = _to_copy(%13, dtype=float8_e4m3fn) : f8e4m3[1, 2, 1, 32]
%15 = view(%14, uint8) : torch.uint8[1, 2, 1, 32]
%16 = detach(%15) : torch.uint8[1, 2, 1, 32]
%17 = _to_copy(%7, dtype=float32) : f32[1, 2, 1, 32]
%18 = view(%4, [1, -1, 1, 1]) : f32[1, 1, 1, 1]
%19 = div(%17, %18) : f32[1, 2, 1, 32]
%20 = clamp_min(%19, -448.0) : f32[1, 2, 1, 32]
%21 = clamp_max(%20, 448.0) : f32[1, 2, 1, 32]
%22 = _to_copy(%21, dtype=float8_e4m3fn) : f8e4m3[1, 2, 1, 32]
%23 = view(%22, uint8) : torch.uint8[1, 2, 1, 32]
%24 = detach(%23) : torch.uint8[1, 2, 1, 32]
%25 = arange(1, device=cpu, pin_memory=False) : i64[1]
%26 = add(%25, %2) : i64[1]
%27 = add(%2, 1) : i64[]
%28 = index_copy(%0, 2, %26, %16) : torch.uint8[1, 2, 16, 32]
%29 = index_copy(%1, 2, %26, %24) : torch.uint8[1, 2, 16, 32]
%30 = reshape(%3, [1, -1, 1, 1]) : f32[1, 1, 1, 1]
%31 = view(%28, float8_e4m3fn) : f8e4m3[1, 2, 16, 32]
%32 = _to_copy(%31, dtype=float32) : f32[1, 2, 16, 32]
%33 = mul(%32, %30) : f32[1, 2, 16, 32]
%34 = _to_copy(%33, dtype=bfloat16) : bf16[1, 2, 16, 32]
%35 = reshape(%4, [1, -1, 1, 1]) : f32[1, 1, 1, 1]
%36 = view(%29, float8_e4m3fn) : f8e4m3[1, 2, 16, 32]
%37 = _to_copy(%36, dtype=float32) : f32[1, 2, 16, 32]
%38 = mul(%37, %35) : f32[1, 2, 16, 32]
%39 = _to_copy(%38, dtype=bfloat16) : bf16[1, 2, 16, 32]
%40 = scaled_dot_product_attention(%5, %34, %39, %8, enable_gqa=True) : bf16[1, 4, 1, 32]
return [%28, %29, %27, %40]""",
        )

    def test_llama_block_before_lowering(self):
        hidden, rotary = torch.zeros(1, 5, 128, dtype=torch.bfloat16), torch.zeros(1, 5, 32, dtype=torch.bfloat16)
        with torch.no_grad():
            program = torch.export.export(
                _layer("llama/FP8_DYNAMIC"), (hidden,), {"position_embeddings": (rotary, rotary)}
            ).run_decompositions({})
        horizontal_fusion.declare(program.graph)
        passes.run(program.graph, Target.parse("cuda:sm90"), lower=False)
        prepack.fold(program)
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
%6 = _to_copy(%5, dtype=float32) : f32[5, 128]
%7 = abs(%6) : f32[5, 128]
%8 = amax(%7, [-1], True) : f32[5, 1]
%9 = clamp_min(%8, 1e-12) : f32[5, 1]
%10 = div(%9, 448.0) : f32[5, 1]
%11 = div(%6, %10) : f32[5, 128]
%12 = clamp_min(%11, -448.0) : f32[5, 128]
%13 = clamp_max(%12, 448.0) : f32[5, 128]
%14 = _to_copy(%13, dtype=float8_e4m3fn) : f8e4m3[5, 128]
%15 = reshape(%10, [-1]) : f32[5]
%16 = reshape(%2, [512]) : f32[512]
%17 = fbgemm.f8f8bf16_rowwise(%14, %0, %15, %16, None) : bf16[5, 512]
%18 = slice(%17, 1, 0, 256) : bf16[5, 256]
%19 = clone(%18, memory_format=contiguous_format) : bf16[5, 256]
%20 = slice(%17, 1, 256, 512) : bf16[5, 256]
%21 = clone(%20, memory_format=contiguous_format) : bf16[5, 256]
%22 = reshape(%19, [1, 5, 256]) : bf16[1, 5, 256]
%23 = silu(%22) : bf16[1, 5, 256]
%24 = reshape(%21, [1, 5, 256]) : bf16[1, 5, 256]
%25 = mul(%23, %24) : bf16[1, 5, 256]
%26 = reshape(%25, [-1, 256]) : bf16[5, 256]
%27 = _to_copy(%26, dtype=float32) : f32[5, 256]
%28 = abs(%27) : f32[5, 256]
%29 = amax(%28, [-1], True) : f32[5, 1]
%30 = clamp_min(%29, 1e-12) : f32[5, 1]
%31 = div(%30, 448.0) : f32[5, 1]
%32 = div(%27, %31) : f32[5, 256]
%33 = clamp_min(%32, -448.0) : f32[5, 256]
%34 = clamp_max(%33, 448.0) : f32[5, 256]
%35 = _to_copy(%34, dtype=float8_e4m3fn) : f8e4m3[5, 256]
%36 = reshape(%31, [-1]) : f32[5]
%37 = reshape(%3, [128]) : f32[128]
%38 = fbgemm.f8f8bf16_rowwise(%35, %1, %36, %37, None) : bf16[5, 128]
%39 = reshape(%38, [1, 5, 128]) : bf16[1, 5, 128]
return [%39]""",
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
%6 = _to_copy(%5, dtype=float32) : f32[5, 128]
%7 = abs(%6) : f32[5, 128]
%8 = amax(%7, [-1], True) : f32[5, 1]
%9 = clamp_min(%8, 1e-12) : f32[5, 1]
%10 = div(%9, 448.0) : f32[5, 1]
%11 = div(%6, %10) : f32[5, 128]
%12 = clamp_min(%11, -448.0) : f32[5, 128]
%13 = clamp_max(%12, 448.0) : f32[5, 128]
%14 = _to_copy(%13, dtype=float8_e4m3fn) : f8e4m3[5, 128]
%15 = permute(%0, [1, 0]) : f8e4m3[128, 512]
%16 = reshape(%10, [-1, 1]) : f32[5, 1]
%17 = reshape(%2, [1, 512]) : f32[1, 512]
%18 = _scaled_mm(%14, %15, %16, %17, None, None, bfloat16, True) : bf16[5, 512]
%19 = slice(%18, 1, 0, 256) : bf16[5, 256]
%20 = clone(%19, memory_format=contiguous_format) : bf16[5, 256]
%21 = slice(%18, 1, 256, 512) : bf16[5, 256]
%22 = clone(%21, memory_format=contiguous_format) : bf16[5, 256]
%23 = reshape(%20, [1, 5, 256]) : bf16[1, 5, 256]
%24 = silu(%23) : bf16[1, 5, 256]
%25 = reshape(%22, [1, 5, 256]) : bf16[1, 5, 256]
%26 = mul(%24, %25) : bf16[1, 5, 256]
%27 = reshape(%26, [-1, 256]) : bf16[5, 256]
%28 = _to_copy(%27, dtype=float32) : f32[5, 256]
%29 = abs(%28) : f32[5, 256]
%30 = amax(%29, [-1], True) : f32[5, 1]
%31 = clamp_min(%30, 1e-12) : f32[5, 1]
%32 = div(%31, 448.0) : f32[5, 1]
%33 = div(%28, %32) : f32[5, 256]
%34 = clamp_min(%33, -448.0) : f32[5, 256]
%35 = clamp_max(%34, 448.0) : f32[5, 256]
%36 = _to_copy(%35, dtype=float8_e4m3fn) : f8e4m3[5, 256]
%37 = permute(%1, [1, 0]) : f8e4m3[256, 128]
%38 = reshape(%32, [-1, 1]) : f32[5, 1]
%39 = reshape(%3, [1, 128]) : f32[1, 128]
%40 = _scaled_mm(%36, %37, %38, %39, None, None, bfloat16, True) : bf16[5, 128]
%41 = reshape(%40, [1, 5, 128]) : bf16[1, 5, 128]
return [%41]""",
        )

    def test_mlp_on_sm80(self):
        self.assertExpectedInline(
            _mlp("llama/FP8_DYNAMIC", "cuda:sm80"),
            """\
%0 = placeholder : f8e4m3[512, 128]
%1 = placeholder : f8e4m3[128, 256]
%2 = placeholder : f32[512, 1]
%3 = placeholder : f32[128, 1]
%4 = placeholder : bf16[1, 5, 128]
%5 = ctfp8.weight_only_linear(%4, %0, %2, None, [1, 128]) : bf16[1, 5, 512]
%6 = slice(%5, 2, 0, 256) : bf16[1, 5, 256]
%7 = clone(%6, memory_format=contiguous_format) : bf16[1, 5, 256]
%8 = slice(%5, 2, 256, 512) : bf16[1, 5, 256]
%9 = clone(%8, memory_format=contiguous_format) : bf16[1, 5, 256]
%10 = silu(%7) : bf16[1, 5, 256]
%11 = mul(%10, %9) : bf16[1, 5, 256]
%12 = ctfp8.weight_only_linear(%11, %1, %3, None, [1, 256]) : bf16[1, 5, 128]
return [%12]""",
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
%6 = _to_copy(%5, dtype=float32) : f32[5, 128]
%7 = abs(%6) : f32[5, 128]
%8 = amax(%7, [-1], True) : f32[5, 1]
%9 = clamp_min(%8, 1e-12) : f32[5, 1]
%10 = div(%9, 448.0) : f32[5, 1]
%11 = div(%6, %10) : f32[5, 128]
%12 = clamp_min(%11, -448.0) : f32[5, 128]
%13 = clamp_max(%12, 448.0) : f32[5, 128]
%14 = _to_copy(%13, dtype=float8_e4m3fn) : f8e4m3[5, 128]
%15 = permute(%0, [1, 0]) : f8e4m3[128, 512]
%16 = reshape(%10, [-1, 1]) : f32[5, 1]
%17 = reshape(%2, [1, 512]) : f32[1, 512]
%18 = _scaled_mm(%14, %15, %16, %17, None, None, bfloat16, False) : bf16[5, 512]
%19 = slice(%18, 1, 0, 256) : bf16[5, 256]
%20 = clone(%19, memory_format=contiguous_format) : bf16[5, 256]
%21 = slice(%18, 1, 256, 512) : bf16[5, 256]
%22 = clone(%21, memory_format=contiguous_format) : bf16[5, 256]
%23 = reshape(%20, [1, 5, 256]) : bf16[1, 5, 256]
%24 = silu(%23) : bf16[1, 5, 256]
%25 = reshape(%22, [1, 5, 256]) : bf16[1, 5, 256]
%26 = mul(%24, %25) : bf16[1, 5, 256]
%27 = reshape(%26, [-1, 256]) : bf16[5, 256]
%28 = _to_copy(%27, dtype=float32) : f32[5, 256]
%29 = abs(%28) : f32[5, 256]
%30 = amax(%29, [-1], True) : f32[5, 1]
%31 = clamp_min(%30, 1e-12) : f32[5, 1]
%32 = div(%31, 448.0) : f32[5, 1]
%33 = div(%28, %32) : f32[5, 256]
%34 = clamp_min(%33, -448.0) : f32[5, 256]
%35 = clamp_max(%34, 448.0) : f32[5, 256]
%36 = _to_copy(%35, dtype=float8_e4m3fn) : f8e4m3[5, 256]
%37 = permute(%1, [1, 0]) : f8e4m3[256, 128]
%38 = reshape(%32, [-1, 1]) : f32[5, 1]
%39 = reshape(%3, [1, 128]) : f32[1, 128]
%40 = _scaled_mm(%36, %37, %38, %39, None, None, bfloat16, False) : bf16[5, 128]
%41 = reshape(%40, [1, 5, 128]) : bf16[1, 5, 128]
return [%41]""",
        )

    def test_static_scales_on_sm90(self):
        self.assertExpectedInline(
            _mlp("llama/FP8", "cuda:sm90"),
            """\
%0 = placeholder : f8e4m3[512, 128]
%1 = placeholder : f8e4m3[128, 256]
%2 = placeholder : f32[512, 1]
%3 = placeholder : f32[2]
%4 = placeholder : f32[1, 1]
%5 = placeholder : f32[1]
%6 = placeholder : bf16[1, 5, 128]
%7 = amax(%3, [-1], True) : f32[1]
%8 = reshape(%6, [-1, 128]) : bf16[5, 128]
%9 = reshape(%7, [1, 1]) : f32[1, 1]
%10 = _to_copy(%8, dtype=float32) : f32[5, 128]
%11 = div(%10, %9) : f32[5, 128]
%12 = clamp_min(%11, -448.0) : f32[5, 128]
%13 = clamp_max(%12, 448.0) : f32[5, 128]
%14 = _to_copy(%13, dtype=float8_e4m3fn) : f8e4m3[5, 128]
%15 = expand(%9, [5, 1]) : f32[5, 1]
%16 = clone(%15, memory_format=contiguous_format) : f32[5, 1]
%17 = reshape(%16, [-1]) : f32[5]
%18 = reshape(%2, [512]) : f32[512]
%19 = fbgemm.f8f8bf16_rowwise(%14, %0, %17, %18, None) : bf16[5, 512]
%20 = slice(%19, 1, 0, 256) : bf16[5, 256]
%21 = clone(%20, memory_format=contiguous_format) : bf16[5, 256]
%22 = slice(%19, 1, 256, 512) : bf16[5, 256]
%23 = clone(%22, memory_format=contiguous_format) : bf16[5, 256]
%24 = reshape(%21, [1, 5, 256]) : bf16[1, 5, 256]
%25 = silu(%24) : bf16[1, 5, 256]
%26 = reshape(%23, [1, 5, 256]) : bf16[1, 5, 256]
%27 = mul(%25, %26) : bf16[1, 5, 256]
%28 = reshape(%27, [-1, 256]) : bf16[5, 256]
%29 = reshape(%5, [1, 1]) : f32[1, 1]
%30 = _to_copy(%28, dtype=float32) : f32[5, 256]
%31 = div(%30, %29) : f32[5, 256]
%32 = clamp_min(%31, -448.0) : f32[5, 256]
%33 = clamp_max(%32, 448.0) : f32[5, 256]
%34 = _to_copy(%33, dtype=float8_e4m3fn) : f8e4m3[5, 256]
%35 = permute(%1, [1, 0]) : f8e4m3[256, 128]
%36 = _scaled_mm(%34, %35, %29, %4, None, None, bfloat16, True) : bf16[5, 128]
%37 = reshape(%36, [1, 5, 128]) : bf16[1, 5, 128]
return [%37]""",
        )

    def test_block_scales_on_sm90(self):
        self.assertExpectedInline(
            _mlp("llama/FP8_BLOCK", "cuda:sm90"),
            """\
%0 = placeholder : f8e4m3[512, 128]
%1 = placeholder : f8e4m3[128, 256]
%2 = placeholder : f32[1, 4]
%3 = placeholder : f32[2, 1]
%4 = placeholder : bf16[1, 5, 128]
%5 = permute(%2, [1, 0]) : f32[4, 1]
%6 = permute(%3, [1, 0]) : f32[1, 2]
%7 = reshape(%4, [-1, 128]) : bf16[5, 128]
%8 = _to_copy(%7, dtype=float32) : f32[5, 128]
%9 = reshape(%8, [-1, 1, 128]) : f32[5, 1, 128]
%10 = abs(%9) : f32[5, 1, 128]
%11 = amax(%10, [-1], True) : f32[5, 1, 1]
%12 = clamp_min(%11, 1e-12) : f32[5, 1, 1]
%13 = div(%12, 448.0) : f32[5, 1, 1]
%14 = div(%9, %13) : f32[5, 1, 128]
%15 = clamp_min(%14, -448.0) : f32[5, 1, 128]
%16 = clamp_max(%15, 448.0) : f32[5, 1, 128]
%17 = _to_copy(%16, dtype=float8_e4m3fn) : f8e4m3[5, 1, 128]
%18 = reshape(%17, [-1, 128]) : f8e4m3[5, 128]
%19 = squeeze(%13, -1) : f32[5, 1]
%20 = permute(%19, [1, 0]) : f32[1, 5]
%21 = permute(%5, [1, 0]) : f32[1, 4]
%22 = fbgemm.f8f8bf16_groupwise(%18, %0, %20, %21) : bf16[5, 512]
%23 = slice(%22, 1, 0, 256) : bf16[5, 256]
%24 = clone(%23, memory_format=contiguous_format) : bf16[5, 256]
%25 = slice(%22, 1, 256, 512) : bf16[5, 256]
%26 = clone(%25, memory_format=contiguous_format) : bf16[5, 256]
%27 = reshape(%24, [1, 5, 256]) : bf16[1, 5, 256]
%28 = silu(%27) : bf16[1, 5, 256]
%29 = reshape(%26, [1, 5, 256]) : bf16[1, 5, 256]
%30 = mul(%28, %29) : bf16[1, 5, 256]
%31 = reshape(%30, [-1, 256]) : bf16[5, 256]
%32 = _to_copy(%31, dtype=float32) : f32[5, 256]
%33 = reshape(%32, [-1, 2, 128]) : f32[5, 2, 128]
%34 = abs(%33) : f32[5, 2, 128]
%35 = amax(%34, [-1], True) : f32[5, 2, 1]
%36 = clamp_min(%35, 1e-12) : f32[5, 2, 1]
%37 = div(%36, 448.0) : f32[5, 2, 1]
%38 = div(%33, %37) : f32[5, 2, 128]
%39 = clamp_min(%38, -448.0) : f32[5, 2, 128]
%40 = clamp_max(%39, 448.0) : f32[5, 2, 128]
%41 = _to_copy(%40, dtype=float8_e4m3fn) : f8e4m3[5, 2, 128]
%42 = reshape(%41, [-1, 256]) : f8e4m3[5, 256]
%43 = squeeze(%37, -1) : f32[5, 2]
%44 = permute(%43, [1, 0]) : f32[2, 5]
%45 = clone(%44, memory_format=contiguous_format) : f32[2, 5]
%46 = permute(%6, [1, 0]) : f32[2, 1]
%47 = fbgemm.f8f8bf16_groupwise(%42, %1, %45, %46) : bf16[5, 128]
%48 = reshape(%47, [1, 5, 128]) : bf16[1, 5, 128]
return [%48]""",
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
%18 = _to_copy(%13, dtype=float32) : f32[10, 128]
%19 = abs(%18) : f32[10, 128]
%20 = amax(%19, [-1], True) : f32[10, 1]
%21 = clamp_min(%20, 1e-12) : f32[10, 1]
%22 = div(%21, 448.0) : f32[10, 1]
%23 = div(%18, %22) : f32[10, 128]
%24 = clamp_min(%23, -448.0) : f32[10, 128]
%25 = clamp_max(%24, 448.0) : f32[10, 128]
%26 = _to_copy(%25, dtype=float8_e4m3fn) : f8e4m3[10, 128]
%27 = reshape(%22, [-1]) : f32[10]
%28 = reshape(%3, [4, 256]) : f32[4, 256]
%29 = slice(%17, 0, 0, 3) : i32[3]
%30 = constant_pad_nd(%29, [1, 0]) : i32[4]
%31 = sub(%17, %30) : i32[4]
%32 = _to_copy(%31, dtype=int64) : i64[4]
%33 = fbgemm.f8f8bf16_rowwise_grouped_stacked(%26, %1, %27, %28, %32) : bf16[10, 256]
%34 = split(%33, 128, -1) : (bf16[10, 128], bf16[10, 128])
%35 = getitem(%34, 0) : bf16[10, 128]
%36 = getitem(%34, 1) : bf16[10, 128]
%37 = silu(%35) : bf16[10, 128]
%38 = mul(%37, %36) : bf16[10, 128]
%39 = _to_copy(%38, dtype=float32) : f32[10, 128]
%40 = abs(%39) : f32[10, 128]
%41 = amax(%40, [-1], True) : f32[10, 1]
%42 = clamp_min(%41, 1e-12) : f32[10, 1]
%43 = div(%42, 448.0) : f32[10, 1]
%44 = div(%39, %43) : f32[10, 128]
%45 = clamp_min(%44, -448.0) : f32[10, 128]
%46 = clamp_max(%45, 448.0) : f32[10, 128]
%47 = _to_copy(%46, dtype=float8_e4m3fn) : f8e4m3[10, 128]
%48 = reshape(%43, [-1]) : f32[10]
%49 = reshape(%2, [4, 128]) : f32[4, 128]
%50 = slice(%17, 0, 0, 3) : i32[3]
%51 = constant_pad_nd(%50, [1, 0]) : i32[4]
%52 = sub(%17, %51) : i32[4]
%53 = _to_copy(%52, dtype=int64) : i64[4]
%54 = fbgemm.f8f8bf16_rowwise_grouped_stacked(%47, %0, %48, %49, %53) : bf16[10, 128]
%55 = unsqueeze(%14, -1) : bf16[10, 1]
%56 = mul(%54, %55) : bf16[10, 128]
%57 = empty_like(%11, pin_memory=False) : i64[10]
%58 = arange(10, device=cpu, pin_memory=False) : i64[10]
%59 = index_put(%57, [%11], %58) : i64[10]
%60 = index(%56, [%59]) : bf16[10, 128]
%61 = view(%60, [5, 2, 128]) : bf16[5, 2, 128]
%62 = sum(%61, [1]) : bf16[5, 128]
return [%62]""",
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
%12 = add(%9, 4) : i64[10]
%13 = lt(%9, 0) : b1[10]
%14 = where(%13, %12, %9) : i64[10]
%15 = sort(%14) : (i64[10], i64[10])
%16 = getitem(%15, 0) : i64[10]
%17 = getitem(%15, 1) : i64[10]
%18 = index(%11, [%17]) : bf16[10, 128]
%19 = arange(4, dtype=int64, device=cpu) : i64[4]
%20 = unsqueeze(%19, 1) : i64[4, 1]
%21 = unsqueeze(%16, 0) : i64[1, 10]
%22 = le(%21, %20) : b1[4, 10]
%23 = sum(%22, [1]) : i64[4]
%24 = _to_copy(%23, dtype=int32) : i32[4]
%25 = _to_copy(%18, dtype=float32) : f32[10, 128]
%26 = abs(%25) : f32[10, 128]
%27 = amax(%26, [-1], True) : f32[10, 1]
%28 = clamp_min(%27, 1e-12) : f32[10, 1]
%29 = div(%28, 448.0) : f32[10, 1]
%30 = div(%25, %29) : f32[10, 128]
%31 = clamp_min(%30, -448.0) : f32[10, 128]
%32 = clamp_max(%31, 448.0) : f32[10, 128]
%33 = _to_copy(%32, dtype=float8_e4m3fn) : f8e4m3[10, 128]
%34 = reshape(%29, [-1]) : f32[10]
%35 = reshape(%3, [4, 256]) : f32[4, 256]
%36 = slice(%24, 0, 0, 3) : i32[3]
%37 = constant_pad_nd(%36, [1, 0]) : i32[4]
%38 = sub(%24, %37) : i32[4]
%39 = _to_copy(%38, dtype=int64) : i64[4]
%40 = fbgemm.f8f8bf16_rowwise_grouped_stacked(%33, %1, %34, %35, %39) : bf16[10, 256]
%41 = sort(%17) : (i64[10], i64[10])
%42 = getitem(%41, 1) : i64[10]
%43 = index(%40, [%42]) : bf16[10, 256]
%44 = unsqueeze(%43, 2) : bf16[10, 256, 1]
%45 = squeeze(%44, -1) : bf16[10, 256]
%46 = split(%45, 128, -1) : (bf16[10, 128], bf16[10, 128])
%47 = getitem(%46, 0) : bf16[10, 128]
%48 = getitem(%46, 1) : bf16[10, 128]
%49 = silu(%47) : bf16[10, 128]
%50 = mul(%49, %48) : bf16[10, 128]
%51 = unsqueeze(%50, -1) : bf16[10, 128, 1]
%52 = squeeze(%51, 2) : bf16[10, 128]
%53 = add(%9, 4) : i64[10]
%54 = lt(%9, 0) : b1[10]
%55 = where(%54, %53, %9) : i64[10]
%56 = sort(%55) : (i64[10], i64[10])
%57 = getitem(%56, 0) : i64[10]
%58 = getitem(%56, 1) : i64[10]
%59 = index(%52, [%58]) : bf16[10, 128]
%60 = arange(4, dtype=int64, device=cpu) : i64[4]
%61 = unsqueeze(%60, 1) : i64[4, 1]
%62 = unsqueeze(%57, 0) : i64[1, 10]
%63 = le(%62, %61) : b1[4, 10]
%64 = sum(%63, [1]) : i64[4]
%65 = _to_copy(%64, dtype=int32) : i32[4]
%66 = _to_copy(%59, dtype=float32) : f32[10, 128]
%67 = abs(%66) : f32[10, 128]
%68 = amax(%67, [-1], True) : f32[10, 1]
%69 = clamp_min(%68, 1e-12) : f32[10, 1]
%70 = div(%69, 448.0) : f32[10, 1]
%71 = div(%66, %70) : f32[10, 128]
%72 = clamp_min(%71, -448.0) : f32[10, 128]
%73 = clamp_max(%72, 448.0) : f32[10, 128]
%74 = _to_copy(%73, dtype=float8_e4m3fn) : f8e4m3[10, 128]
%75 = reshape(%70, [-1]) : f32[10]
%76 = reshape(%2, [4, 128]) : f32[4, 128]
%77 = slice(%65, 0, 0, 3) : i32[3]
%78 = constant_pad_nd(%77, [1, 0]) : i32[4]
%79 = sub(%65, %78) : i32[4]
%80 = _to_copy(%79, dtype=int64) : i64[4]
%81 = fbgemm.f8f8bf16_rowwise_grouped_stacked(%74, %0, %75, %76, %80) : bf16[10, 128]
%82 = sort(%58) : (i64[10], i64[10])
%83 = getitem(%82, 1) : i64[10]
%84 = index(%81, [%83]) : bf16[10, 128]
%85 = unsqueeze(%84, 2) : bf16[10, 128, 1]
%86 = squeeze(%85, -1) : bf16[10, 128]
%87 = unsqueeze(%8, -1) : bf16[10, 1]
%88 = mul(%86, %87) : bf16[10, 128]
%89 = view(%88, [5, 2, 128]) : bf16[5, 2, 128]
%90 = sum(%89, [1]) : bf16[5, 128]
return [%90]""",
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
%18 = _to_copy(%13, dtype=float32) : f32[10, 128]
%19 = abs(%18) : f32[10, 128]
%20 = amax(%19, [-1], True) : f32[10, 1]
%21 = clamp_min(%20, 1e-12) : f32[10, 1]
%22 = div(%21, 448.0) : f32[10, 1]
%23 = div(%18, %22) : f32[10, 128]
%24 = clamp_min(%23, -448.0) : f32[10, 128]
%25 = clamp_max(%24, 448.0) : f32[10, 128]
%26 = _to_copy(%25, dtype=float8_e4m3fn) : f8e4m3[10, 128]
%27 = permute(%1, [0, 2, 1]) : f8e4m3[4, 128, 256]
%28 = reshape(%22, [-1]) : f32[10]
%29 = reshape(%3, [4, 256]) : f32[4, 256]
%30 = _scaled_grouped_mm(%26, %27, %28, %29, %17, None, None, bfloat16, True) : bf16[10, 256]
%31 = split(%30, 128, -1) : (bf16[10, 128], bf16[10, 128])
%32 = getitem(%31, 0) : bf16[10, 128]
%33 = getitem(%31, 1) : bf16[10, 128]
%34 = silu(%32) : bf16[10, 128]
%35 = mul(%34, %33) : bf16[10, 128]
%36 = _to_copy(%35, dtype=float32) : f32[10, 128]
%37 = abs(%36) : f32[10, 128]
%38 = amax(%37, [-1], True) : f32[10, 1]
%39 = clamp_min(%38, 1e-12) : f32[10, 1]
%40 = div(%39, 448.0) : f32[10, 1]
%41 = div(%36, %40) : f32[10, 128]
%42 = clamp_min(%41, -448.0) : f32[10, 128]
%43 = clamp_max(%42, 448.0) : f32[10, 128]
%44 = _to_copy(%43, dtype=float8_e4m3fn) : f8e4m3[10, 128]
%45 = permute(%0, [0, 2, 1]) : f8e4m3[4, 128, 128]
%46 = reshape(%40, [-1]) : f32[10]
%47 = reshape(%2, [4, 128]) : f32[4, 128]
%48 = _scaled_grouped_mm(%44, %45, %46, %47, %17, None, None, bfloat16, True) : bf16[10, 128]
%49 = unsqueeze(%14, -1) : bf16[10, 1]
%50 = mul(%48, %49) : bf16[10, 128]
%51 = empty_like(%11, pin_memory=False) : i64[10]
%52 = arange(10, device=cpu, pin_memory=False) : i64[10]
%53 = index_put(%51, [%11], %52) : i64[10]
%54 = index(%50, [%53]) : bf16[10, 128]
%55 = view(%54, [5, 2, 128]) : bf16[5, 2, 128]
%56 = sum(%55, [1]) : bf16[5, 128]
return [%56]""",
        )

    @unittest.skipIf(torch.__version__ < (2, 13), "the torch of XPU has blocks from 2.13 on")
    def test_blocks_on_xpu(self):
        self.assertExpectedInline(
            _mlp("llama/FP8_BLOCK", "xpu"),
            """\
%0 = placeholder : f8e4m3[512, 128]
%1 = placeholder : f8e4m3[128, 256]
%2 = placeholder : f32[1, 4]
%3 = placeholder : f32[2, 1]
%4 = placeholder : bf16[1, 5, 128]
%5 = permute(%2, [1, 0]) : f32[4, 1]
%6 = permute(%3, [1, 0]) : f32[1, 2]
%7 = reshape(%4, [-1, 128]) : bf16[5, 128]
%8 = _to_copy(%7, dtype=float32) : f32[5, 128]
%9 = reshape(%8, [-1, 1, 128]) : f32[5, 1, 128]
%10 = abs(%9) : f32[5, 1, 128]
%11 = amax(%10, [-1], True) : f32[5, 1, 1]
%12 = clamp_min(%11, 1e-12) : f32[5, 1, 1]
%13 = div(%12, 448.0) : f32[5, 1, 1]
%14 = div(%9, %13) : f32[5, 1, 128]
%15 = clamp_min(%14, -448.0) : f32[5, 1, 128]
%16 = clamp_max(%15, 448.0) : f32[5, 1, 128]
%17 = _to_copy(%16, dtype=float8_e4m3fn) : f8e4m3[5, 1, 128]
%18 = reshape(%17, [-1, 128]) : f8e4m3[5, 128]
%19 = squeeze(%13, -1) : f32[5, 1]
%20 = permute(%0, [1, 0]) : f8e4m3[128, 512]
%21 = permute(%5, [1, 0]) : f32[1, 4]
%22 = _scaled_mm(%18, %20, %19, %21, None, None, bfloat16, False) : bf16[5, 512]
%23 = slice(%22, 1, 0, 256) : bf16[5, 256]
%24 = clone(%23, memory_format=contiguous_format) : bf16[5, 256]
%25 = slice(%22, 1, 256, 512) : bf16[5, 256]
%26 = clone(%25, memory_format=contiguous_format) : bf16[5, 256]
%27 = reshape(%24, [1, 5, 256]) : bf16[1, 5, 256]
%28 = silu(%27) : bf16[1, 5, 256]
%29 = reshape(%26, [1, 5, 256]) : bf16[1, 5, 256]
%30 = mul(%28, %29) : bf16[1, 5, 256]
%31 = reshape(%30, [-1, 256]) : bf16[5, 256]
%32 = _to_copy(%31, dtype=float32) : f32[5, 256]
%33 = reshape(%32, [-1, 2, 128]) : f32[5, 2, 128]
%34 = abs(%33) : f32[5, 2, 128]
%35 = amax(%34, [-1], True) : f32[5, 2, 1]
%36 = clamp_min(%35, 1e-12) : f32[5, 2, 1]
%37 = div(%36, 448.0) : f32[5, 2, 1]
%38 = div(%33, %37) : f32[5, 2, 128]
%39 = clamp_min(%38, -448.0) : f32[5, 2, 128]
%40 = clamp_max(%39, 448.0) : f32[5, 2, 128]
%41 = _to_copy(%40, dtype=float8_e4m3fn) : f8e4m3[5, 2, 128]
%42 = reshape(%41, [-1, 256]) : f8e4m3[5, 256]
%43 = squeeze(%37, -1) : f32[5, 2]
%44 = permute(%1, [1, 0]) : f8e4m3[256, 128]
%45 = permute(%6, [1, 0]) : f32[2, 1]
%46 = _scaled_mm(%42, %44, %43, %45, None, None, bfloat16, False) : bf16[5, 128]
%47 = reshape(%46, [1, 5, 128]) : bf16[1, 5, 128]
return [%47]""",
        )

    def test_static_scales_on_xpu(self):
        self.assertExpectedInline(
            _mlp("llama/FP8", "xpu"),
            """\
%0 = placeholder : f8e4m3[512, 128]
%1 = placeholder : f8e4m3[128, 256]
%2 = placeholder : f32[512, 1]
%3 = placeholder : f32[2]
%4 = placeholder : f32[1, 1]
%5 = placeholder : f32[1]
%6 = placeholder : bf16[1, 5, 128]
%7 = amax(%3, [-1], True) : f32[1]
%8 = reshape(%6, [-1, 128]) : bf16[5, 128]
%9 = reshape(%7, [1, 1]) : f32[1, 1]
%10 = _to_copy(%8, dtype=float32) : f32[5, 128]
%11 = div(%10, %9) : f32[5, 128]
%12 = clamp_min(%11, -448.0) : f32[5, 128]
%13 = clamp_max(%12, 448.0) : f32[5, 128]
%14 = _to_copy(%13, dtype=float8_e4m3fn) : f8e4m3[5, 128]
%15 = permute(%0, [1, 0]) : f8e4m3[128, 512]
%16 = expand(%9, [5, 1]) : f32[5, 1]
%17 = clone(%16, memory_format=contiguous_format) : f32[5, 1]
%18 = reshape(%17, [-1, 1]) : f32[5, 1]
%19 = reshape(%2, [1, 512]) : f32[1, 512]
%20 = _scaled_mm(%14, %15, %18, %19, None, None, bfloat16, False) : bf16[5, 512]
%21 = slice(%20, 1, 0, 256) : bf16[5, 256]
%22 = clone(%21, memory_format=contiguous_format) : bf16[5, 256]
%23 = slice(%20, 1, 256, 512) : bf16[5, 256]
%24 = clone(%23, memory_format=contiguous_format) : bf16[5, 256]
%25 = reshape(%22, [1, 5, 256]) : bf16[1, 5, 256]
%26 = silu(%25) : bf16[1, 5, 256]
%27 = reshape(%24, [1, 5, 256]) : bf16[1, 5, 256]
%28 = mul(%26, %27) : bf16[1, 5, 256]
%29 = reshape(%28, [-1, 256]) : bf16[5, 256]
%30 = reshape(%5, [1, 1]) : f32[1, 1]
%31 = _to_copy(%29, dtype=float32) : f32[5, 256]
%32 = div(%31, %30) : f32[5, 256]
%33 = clamp_min(%32, -448.0) : f32[5, 256]
%34 = clamp_max(%33, 448.0) : f32[5, 256]
%35 = _to_copy(%34, dtype=float8_e4m3fn) : f8e4m3[5, 256]
%36 = permute(%1, [1, 0]) : f8e4m3[256, 128]
%37 = _scaled_mm(%35, %36, %30, %4, None, None, bfloat16, False) : bf16[5, 128]
%38 = reshape(%37, [1, 5, 128]) : bf16[1, 5, 128]
return [%38]""",
        )

    def test_weight_only_on_xpu(self):
        self.assertExpectedInline(
            _mlp("llama/FP8_DYNAMIC", "xpu+triton"),
            """\
%0 = placeholder : f8e4m3[512, 128]
%1 = placeholder : f8e4m3[128, 256]
%2 = placeholder : f32[512, 1]
%3 = placeholder : f32[128, 1]
%4 = placeholder : bf16[1, 5, 128]
%5 = ctfp8.weight_only_linear(%4, %0, %2, None, [1, 128]) : bf16[1, 5, 512]
%6 = slice(%5, 2, 0, 256) : bf16[1, 5, 256]
%7 = clone(%6, memory_format=contiguous_format) : bf16[1, 5, 256]
%8 = slice(%5, 2, 256, 512) : bf16[1, 5, 256]
%9 = clone(%8, memory_format=contiguous_format) : bf16[1, 5, 256]
%10 = silu(%7) : bf16[1, 5, 256]
%11 = mul(%10, %9) : bf16[1, 5, 256]
%12 = ctfp8.weight_only_linear(%11, %1, %3, None, [1, 256]) : bf16[1, 5, 128]
return [%12]""",
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
%18 = ctfp8.weight_only_grouped_mm(%13, %1, %3, %17, [1, 128]) : bf16[10, 256]
%19 = split(%18, 128, -1) : (bf16[10, 128], bf16[10, 128])
%20 = getitem(%19, 0) : bf16[10, 128]
%21 = getitem(%19, 1) : bf16[10, 128]
%22 = silu(%20) : bf16[10, 128]
%23 = mul(%22, %21) : bf16[10, 128]
%24 = ctfp8.weight_only_grouped_mm(%23, %0, %2, %17, [1, 128]) : bf16[10, 128]
%25 = unsqueeze(%14, -1) : bf16[10, 1]
%26 = mul(%24, %25) : bf16[10, 128]
%27 = empty_like(%11, pin_memory=False) : i64[10]
%28 = arange(10, device=cpu, pin_memory=False) : i64[10]
%29 = index_put(%27, [%11], %28) : i64[10]
%30 = index(%26, [%29]) : bf16[10, 128]
%31 = view(%30, [5, 2, 128]) : bf16[5, 2, 128]
%32 = sum(%31, [1]) : bf16[5, 128]
return [%32]""",
        )
