"""Row placement: merging, interleaving and transposing keep each row with its own scale, at any size."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ctfp8_compile.checkpoint.layout import Layout, identity, trace
from ctfp8_compile.checkpoint.scheme import Scheme
from ctfp8_compile.ops import FP8, dequantize_reference


def _cdiv(a, b):
    return -(-a // b)


def _sources(experts, rows, cols, block):
    """Random FP8 matrices `gate.e`, `up.e` and their block scales."""
    weights, scales = {}, {}
    for name in ("gate", "up"):
        for e in range(experts):
            weights[f"{name}.{e}"] = torch.randn(rows, cols).to(FP8)
            scales[f"{name}.{e}"] = torch.rand(_cdiv(rows, block[0]), _cdiv(cols, block[1])) + 0.1
    return weights, scales


def _merge(tensors, experts, interleave, transpose):
    """What transformers does: stack gate and up over experts, concatenate rows, maybe interleave and transpose."""
    gate, up = (torch.stack([tensors[f"{n}.{e}"] for e in range(experts)]) for n in ("gate", "up"))
    merged = torch.cat([gate, up], 1)
    if interleave:
        e, n, k = merged.shape
        merged = merged.view(e, 2, n // 2, k).transpose(1, 2).reshape(e, n, k)
    return merged.transpose(1, 2).contiguous() if transpose else merged


@settings(max_examples=60, deadline=None)
@given(
    experts=st.integers(1, 3),
    rows=st.integers(1, 40),
    cols=st.integers(2, 40),
    block=st.tuples(st.integers(1, 17), st.integers(1, 17)),
    interleave=st.booleans(),
    transpose=st.booleans(),
)
def test_merged_parameter_dequantizes_like_its_parts(experts, rows, cols, block, interleave, transpose):
    weights, scales = _sources(experts, rows, cols, block)
    shapes = {n: tuple(w.shape) for n, w in weights.items()}
    declared = (experts, cols, 2 * rows) if transpose else (experts, 2 * rows, cols)
    layout = trace(shapes, {"p": declared}, lambda t: {"p": _merge(t, experts, interleave, transpose)})["p"]
    scheme = Scheme("block", block, "group")
    parts = {n: dequantize_reference(weights[n], scales[n], list(block), torch.float32) for n in weights}
    stored, scale = layout.weight(weights), layout.scale(scales, scheme)
    got = dequantize_reference(stored, scale, list(layout.block(scheme)), torch.float32)
    want = _merge(parts, experts, interleave, transpose)
    assert torch.equal(got.transpose(1, 2) if layout.transposed else got, want)
    for name in weights:
        assert torch.equal(layout.split_weight(stored, name).view(torch.uint8), weights[name].view(torch.uint8))
        assert torch.equal(layout.split_scale(scale, name, scheme, tuple(scales[name].shape)), scales[name])


def test_aligned_blocks_stay_whole_and_others_are_refined():
    def block(rows):
        weights, _ = _sources(2, rows, 256, (128, 128))
        shapes = {n: tuple(w.shape) for n, w in weights.items()}
        layout = trace(shapes, {"p": (2, 2 * rows, 256)}, lambda t: {"p": _merge(t, 2, False, False)})["p"]
        return layout.block(Scheme("block", (128, 128), "group"))

    assert block(256) == (128, 128)
    assert block(192) == (64, 128)  # up starts at row 192
    assert block(176) == (16, 128)


def test_a_single_tensor_is_not_copied():
    weight = torch.randn(8, 4).to(FP8)
    assert identity("w", (8, 4)).weight({"w": weight}) is weight


def test_three_dimensional_tensor_of_a_file():
    layout = identity("w", (3, 10, 6))
    scheme = Scheme("block", (4, 4), "group")
    scale = torch.rand(3, 3, 2)
    assert torch.equal(layout.scale({"w": scale}, scheme), scale)
    assert torch.equal(layout.split_scale(scale, "w", scheme, (3, 3, 2)), scale)
    weight = torch.randn(3, 10, 6).to(FP8)
    assert layout.split_weight(weight, "w").shape == (3, 10, 6)


def test_scalar_and_channel_scales_in_every_shape_a_file_has():
    layout = identity("w", (5, 7))
    for shape in ((), (1,), (1, 1)):
        got = layout.scale({"w": torch.full(shape, 2.0)}, Scheme("tensor", (0, 0), "token"))
        assert torch.equal(got, torch.full((1, 1), 2.0))
    column = torch.rand(5, 1)
    for shape in ((5,), (5, 1)):
        got = layout.scale({"w": column.view(shape)}, Scheme("channel", (1, 0), "token"))
        assert torch.equal(got, column)
        assert isinstance(layout, Layout)
