"""What a rank holds of a parameter is that slice of the whole one, dequantized: any rank, size, scheme and cut."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ctfp8_compile.checkpoint.layout import Layout, identity, trace
from ctfp8_compile.checkpoint.scheme import Scheme
from ctfp8_compile.checkpoint.shard import Cut, blocks_of, held, local_shape, of_rank, put, shard, within
from ctfp8_compile.errors import CheckpointError, SchemeError
from ctfp8_compile.ops import FP8, dequantize_reference

SCHEMES = st.one_of(
    st.just(Scheme("tensor", (0, 0), "tensor")),
    st.just(Scheme("channel", (1, 0), "token")),
    st.builds(lambda width: Scheme("group", (1, width), "token"), st.integers(1, 17)),
    st.builds(lambda high, wide: Scheme("block", (high, wide), "group"), st.integers(1, 17), st.integers(1, 17)),
)
RANKS = st.integers(1, 4)


def _random(layout: Layout, shapes: dict[str, tuple[int, ...]], scheme: Scheme):
    """Checkpoint tensors, the stored parameter of them, its scales, and what it dequantizes to."""
    weights = {n: torch.randn(shape).to(FP8) for n, shape in shapes.items()}
    scales = {
        n: torch.rand(*shape[:-2], *scheme.scale_shapes(*shape[-2:])[0]) + 0.1
        if scheme.strategy != "tensor" or len(shape) == 2
        else torch.rand(shape[0], 1, 1) + 0.1
        for n, shape in shapes.items()
    }
    whole, scale = layout.weight(weights), layout.scale(scales, scheme)
    return weights, whole, scale, dequantize_reference(whole, scale, list(layout.block(scheme)), torch.float32)


def _check(layout, weights, whole, scale, full, scheme, cuts, read):
    """Every rank's part, put together again, and that all ranks have the same blocks."""
    parts, blocks = torch.zeros_like(whole.view(torch.uint8)), set()
    together = torch.zeros_like(scale)
    for rank in range(cuts[0].ranks):
        mine = of_rank(cuts, rank)
        part = shard(layout, mine)
        local = part.weight({n: t for n in part.sources if (t := read(weights[n], n, mine)) is not None})
        cut = part.cut_scale(scale, scheme)
        want = full
        for dim, indices in enumerate(held(layout.shape, mine)):
            want = want.index_select(dim, indices)
        got = dequantize_reference(local, cut, list(part.block(scheme)), torch.float32)
        assert torch.equal(got, want)
        put(parts, local.view(torch.uint8), mine)
        part.put_scale(together, cut, scheme)
        blocks.add(part.block(scheme)[0])
        assert tuple(local.shape) == local_shape(layout.shape, mine)
    assert torch.equal(parts, whole.view(torch.uint8))
    assert torch.equal(together, scale)
    assert len(blocks) == 1


def _fits(shape, cuts):
    return all(
        all(local_shape(shape, of_rank(cuts, r))) for r in range(cuts[0].ranks)
    )  # else there is a sentence, see below


@settings(max_examples=80, deadline=None)
@given(ranks=RANKS, n=st.integers(4, 40), k=st.integers(4, 40), dim=st.sampled_from([0, 1]), scheme=SCHEMES)
def test_linear(ranks, n, k, dim, scheme):
    cuts = (Cut(dim, ranks, 0),)
    if not _fits((n, k), cuts):
        return
    layout = identity("w", (n, k))

    def read(tensor, _, mine):
        at = held((n, k), mine)
        return tensor[at[0]][:, at[1]]

    _check(layout, *_random(layout, {"w": (n, k)}, scheme), scheme, cuts, read)


@settings(max_examples=80, deadline=None)
@given(
    ranks=RANKS,
    experts=st.integers(1, 5),
    rows=st.integers(4, 20),
    k=st.integers(4, 40),
    how=st.sampled_from(["experts", "gate and up", "columns"]),
    stacked=st.booleans(),
    scheme=SCHEMES,
)
def test_experts(ranks, experts, rows, k, how, stacked, scheme):
    """Gate and up merged from a matrix per expert, or one tensor `[E, 2 rows, K]` in the file."""
    shape = (experts, 2 * rows, k)
    cuts = ({"experts": Cut(0, ranks, 0), "gate and up": Cut(1, ranks, 0, 2), "columns": Cut(2, ranks, 0)}[how],)
    if not _fits(shape, cuts):
        return
    if stacked:
        layout, shapes = identity("w", shape), {"w": shape}
    else:
        shapes = {f"{n}.{e}": (rows, k) for n in ("gate", "up") for e in range(experts)}

        def merge(t):
            gate, up = (torch.stack([t[f"{n}.{e}"] for e in range(experts)]) for n in ("gate", "up"))
            return {"p": torch.cat([gate, up], 1)}

        layout = trace(shapes, {"p": shape}, merge)["p"]

    def read(tensor, name, mine):
        at = held(shape, mine)
        if stacked:
            return tensor[at[0]][:, at[1]][:, :, at[2]]
        if int(name.rpartition(".")[2]) not in at[0]:
            return None
        first = at[1][at[1] < rows]
        return tensor[first][:, at[2]]

    _check(layout, *_random(layout, shapes, scheme), scheme, cuts, read)


@settings(max_examples=200, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 9), st.integers(4, 20), st.integers(4, 20)),
    cut=st.builds(Cut, st.integers(0, 2), RANKS, st.just(0), st.integers(1, 2)),
    scheme=SCHEMES,
    data=st.data(),
)
def test_some_experts_of_every_rank(shape, cut, scheme, data):
    """What ranks hold of a range of experts, and of their scales, put together, is that range; a rank may hold none of it."""
    if not _fits(shape, (cut,)):
        return
    first = data.draw(st.integers(0, shape[0] - 1))
    experts = range(first, data.draw(st.integers(first + 1, shape[0])))
    layout, some = identity("w", shape), identity("w", (len(experts), *shape[1:]))
    whole = torch.arange(shape[0] * shape[1] * shape[2]).view(shape)
    scale = torch.rand(*shape[:-2], *(-(-n // b) for n, b in zip(shape[-2:], layout.block(scheme), strict=True)))
    together, scales = torch.zeros(some.shape, dtype=whole.dtype), torch.zeros(len(experts), *scale.shape[1:])
    for rank in range(cut.ranks):
        mine = of_rank((cut,), rank)
        part, own = whole, blocks_of(layout, mine)
        for dim, indices in enumerate(held(shape, mine)):
            part = part.index_select(dim, indices)
        here, clipped = within(shape, mine, experts)
        assert local_shape(some.shape, clipped) == tuple(part[here].shape)
        put(together, part[here], clipped)
        blocks_of(some, clipped).put_scale(scales, own.cut_scale(scale, scheme)[here], scheme)
    assert torch.equal(together, whole[first : experts.stop])
    assert torch.equal(scales, scale[first : experts.stop])


def test_a_border_inside_a_block_refines_it_alike_on_every_rank():
    block = Scheme("block", (128, 128), "group")
    rows = [shard(identity("w", (384, 256)), (Cut(0, 2, r),)).block(block) for r in range(2)]
    assert rows == [(64, 128)] * 2
    assert shard(identity("w", (256, 512)), (Cut(1, 4, 3),)).block(block) == (128, 128)
    assert shard(identity("w", (256, 512)), (Cut(1, 2, 0),)).block(Scheme("channel", (1, 0), "token")) == (1, 256)


def test_sentences():
    with pytest.raises(SchemeError, match="a dimension of 4 leaves nothing for rank 3 of 4"):
        shard(identity("w", (4, 8)), (Cut(0, 4, 3, 2),))
    both = trace({"gate": (2, 3, 4), "up": (2, 3, 4)}, {"p": (2, 6, 4)}, lambda t: {"p": torch.cat([*t.values()], 1)})
    with pytest.raises(SchemeError, match="where transformers does not cut it"):
        shard(both["p"], (Cut(1, 2, 0, 2),))
    with pytest.raises(CheckpointError, match=r"\[8, 8\] were read of it for this rank, \[4, 8\] are needed"):
        shard(identity("w", (8, 8)), (Cut(0, 2, 0),)).weight({"w": torch.zeros(8, 8)})
