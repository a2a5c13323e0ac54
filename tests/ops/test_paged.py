"""`ctfp8::paged_attention`: pages written and read where they lie, against float64, the operator's reference and torch's checks."""

from __future__ import annotations

import random

import pytest
import torch
from conftest import DATA  # noqa: F401

from ctfp8_compile.ops import apply, cpu, paged
from ctfp8_compile.ops.fp8 import quantize_cached_steps

LAYERS = 3


def step(texts, heads, shared, width, page, dtype, seed=0):
    """A step of texts, each of so many tokens kept and so many new ones, in pages in any order.

    Returns:
        The operator's arguments but the layer and the scale, and each text's keys and values, `[length, heads, columns]`.
    """
    torch.manual_seed(seed)
    order = random.Random(seed)
    blocks = sum(-(-(kept + new) // page) for kept, new in texts) + 2
    pages = torch.randn(blocks * LAYERS, 2, page, shared, width).to(dtype)
    free = list(range(blocks))
    order.shuffle(free)
    rows = pages.view(-1, shared, width)
    tokens = sum(new for _, new in texts)
    query, key, value = (torch.randn(1, tokens, n, width).to(dtype).transpose(1, 2) for n in (heads, shared, shared))
    write, read, starts, ends, seen, layer = [], [], [0], [0], [], 1
    for kept, new in texts:
        mine = [free.pop() for _ in range(-(-(kept + new) // page))]
        places = [mine[i // page] * LAYERS * 2 * page + i % page for i in range(kept + new)]
        write += places[kept:]
        read += places
        at = torch.tensor(places[:kept], dtype=torch.long) + 2 * layer * page
        fresh = slice(starts[-1], starts[-1] + new)
        seen.append(
            tuple(
                torch.cat([rows[at + more], states[0, :, fresh].transpose(0, 1)])
                for states, more in ((key, 0), (value, page))
            )
        )
        starts.append(starts[-1] + new)
        ends.append(ends[-1] + kept + new)
    index = [torch.tensor(t, dtype=torch.long) for t in (write, read)]
    return (query, key, value, pages, *index, *(torch.tensor(t, dtype=torch.int32) for t in (starts, ends))), seen


def exact(arguments, seen, scale):
    """In float64, each token by itself."""
    query, starts = arguments[0].double()[0], arguments[6].tolist()
    out = torch.zeros(query.shape[1], query.shape[0], query.shape[2], dtype=torch.float64)
    for text, (keys, values) in enumerate(seen):
        new = starts[text + 1] - starts[text]
        group = query.shape[0] // keys.shape[1]
        keys, values = (t.double().repeat_interleave(group, 1) for t in (keys, values))
        for i in range(new):
            end = len(keys) - new + i + 1
            scores = torch.einsum("hc,lhc->hl", query[:, starts[text] + i], keys[:end]) * scale
            out[starts[text] + i] = torch.einsum("hl,lhc->hc", scores.softmax(-1), values[:end])
    return out


CASES = {
    "one": [(0, 1)],
    "one beside many": [(5, 1), (0, 9), (64, 1), (3, 4), (63, 1), (130, 1), (1, 1)],
    "only new": [(0, 3), (0, 70), (0, 1)],
    "pages that are full": [(64, 64), (127, 1), (128, 1)],
    "none new": [(9, 1), (7, 0), (8, 1)],
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("heads", "shared", "width", "page"),
    [(4, 4, 16, 64), (8, 2, 64, 16), (6, 3, 40, 100), (2, 1, 128, 256), (70, 1, 8, 32)],
)
@pytest.mark.parametrize("texts", CASES.values(), ids=CASES)
def test_it_is_attention_of_each_text_alone(texts, heads, shared, width, page, dtype):
    cpu.load()
    arguments, seen = step(texts, heads, shared, width, page, dtype)
    scale = width**-0.5
    before = arguments[3].clone()
    out = torch.ops.ctfp8.paged_attention(*arguments, 1, scale)
    tolerance = {torch.float32: 2e-6, torch.bfloat16: 2e-2, torch.float16: 2e-3}[dtype]
    assert out.shape == (1, arguments[0].shape[2], heads, width)
    torch.testing.assert_close(out[0].double(), exact(arguments, seen, scale), atol=tolerance, rtol=tolerance)
    rows, old = (t.view(-1, shared, width) for t in (arguments[3], before))
    for states, more in ((arguments[1], 0), (arguments[2], page)):
        at = arguments[4] + 2 * page + more
        assert torch.equal(rows[at], states[0].transpose(0, 1))
        old[at] = rows[at]
    assert torch.equal(rows, old)  # and nothing else was written


# Pages of FP8 values: [keys' scale, values' scale], None where each token has its own

SCALES = {
    "tokens": (None, None),
    "one": (torch.tensor([0.013]), torch.tensor([0.02])),
    "heads": (torch.tensor([0.01, 0.02]), torch.tensor([0.03, 0.015])),
    "keys only": (torch.tensor([0.01, 0.02]), None),
    "values only": (None, torch.tensor([0.02])),
}


def stored(states, scale):
    """`[1, heads, tokens, columns]` as a cache keeps them, and what they are as numbers."""
    packed = quantize_cached_steps(apply, states, scale)
    return packed, torch.ops.ctfp8.cached(packed, scale, torch.float32)


def fp8_step(texts, heads, shared, width, page, dtype, scales):
    """`step` with its pages, keys and values kept as FP8."""
    arguments, seen = step(texts, heads, shared, width, page, dtype)
    query, key, value, pages, write, *rest = arguments
    packed = []
    for which, scale in enumerate(scales):
        # so that tokens of a page have scales of their own: the reference rounds by rows
        lines, _ = stored(pages[:, which].reshape(1, -1, shared, width).transpose(1, 2).float(), scale)
        packed.append(lines.transpose(1, 2).view(pages.shape[0], page, shared, -1))
    most = max(t.shape[-1] for t in packed)
    kept = torch.full((pages.shape[0], 2, page, shared, most), 99, dtype=torch.uint8)
    for which, lines in enumerate(packed):
        kept[:, which, ..., : lines.shape[-1]] = lines
    (key, _), (value, _) = (stored(t, scale) for t, scale in zip((key, value), scales, strict=True))
    read = [
        tuple(stored(t.transpose(0, 1)[None], s)[1][0].transpose(0, 1) for t, s in zip(kv, scales, strict=True))
        for kv in seen
    ]
    return (query, key, value, kept, write, *rest), read


@pytest.mark.parametrize("scales", SCALES.values(), ids=SCALES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("heads", "width", "page"), [(4, 16, 64), (8, 64, 16), (6, 40, 100), (2, 128, 256)])
@pytest.mark.parametrize("texts", CASES.values(), ids=CASES)
def test_pages_of_fp8_are_read_where_they_lie(texts, heads, width, page, dtype, scales):
    cpu.load()
    arguments, seen = fp8_step(texts, heads, 2, width, page, dtype, scales)
    before = arguments[3].clone()
    out = torch.ops.ctfp8.paged_attention(*arguments, 1, width**-0.5, *scales)
    tolerance = {torch.float32: 2e-6, torch.bfloat16: 3e-2, torch.float16: 3e-3}[dtype]
    assert out.dtype == dtype
    torch.testing.assert_close(out[0].double(), exact(arguments, seen, width**-0.5), atol=tolerance, rtol=tolerance)
    for which, states in enumerate(arguments[1:3]):
        at = arguments[4] + (2 + which) * page
        rows, old = (t.view(-1, *t.shape[3:])[..., : states.shape[3]] for t in (arguments[3], before))
        assert torch.equal(rows[at], states[0].transpose(0, 1))
        old[at] = rows[at]
    assert torch.equal(arguments[3], before)  # and nothing else was written


@pytest.mark.parametrize("scales", SCALES.values(), ids=SCALES)
def test_the_reference_reads_fp8_in_the_same_way(scales):
    arguments, seen = fp8_step(CASES["one beside many"], 4, 2, 16, 64, torch.float32, scales)
    out = paged._paged_attention(*arguments, 1, 0.25, *scales)
    torch.testing.assert_close(out[0].double(), exact(arguments, seen, 0.25), atol=2e-6, rtol=2e-6)


@pytest.mark.parametrize(
    ("place", "change"),
    [
        (1, lambda key: key[..., :-1]),  # no byte for the scale
        (2, lambda value: torch.cat([value, value], -1)),
        (1, lambda key: key.float()),
        (3, lambda pages: pages[..., :-1].contiguous()),
        (8, lambda scale: torch.ones(3)),
        (8, lambda scale: torch.ones(2, dtype=torch.float64)),
        (9, lambda scale: torch.ones(2)),
    ],
)
def test_fp8_that_does_not_fit_is_refused(place, change):
    cpu.load()
    arguments, _ = fp8_step(CASES["one beside many"], 4, 2, 16, 64, torch.float32, (None, None))
    arguments, scales = [*arguments], [None, None]
    if place < 8:
        arguments[place] = change(arguments[place])
    else:
        scales[place - 8] = change(None)
    with pytest.raises(RuntimeError, match="ctfp8::paged_attention"):
        torch.ops.ctfp8.paged_attention(*arguments, 1, 0.25, *scales)


def test_the_reference_is_the_same():
    arguments, seen = step(CASES["one beside many"], 4, 2, 16, 64, torch.float32)
    out = paged._paged_attention(*arguments, 1, 0.25)
    torch.testing.assert_close(out[0].double(), exact(arguments, seen, 0.25), atol=2e-6, rtol=2e-6)


def test_it_is_declared_as_it_is():
    cpu.load()
    arguments, _ = step(CASES["one beside many"], 4, 2, 16, 64, torch.float32)
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    result = torch.library.opcheck(torch.ops.ctfp8.paged_attention.default, (*arguments, 1, 0.25), test_utils=checks)
    assert set(result.values()) == {"SUCCESS"}


@pytest.mark.parametrize(
    ("place", "change"),
    [
        (4, lambda write: write + 10**6),
        (4, lambda write: write - 10**6),
        (4, lambda write: write[:-1]),
        (4, lambda write: write.int()),
        (5, lambda read: read + 10**6),
        (6, lambda starts: starts + 1),
        (7, lambda starts: starts * 2),
        (7, lambda starts: starts * 0),
        (3, lambda pages: pages.bfloat16()),
        (3, lambda pages: pages[:, :1]),
        (0, lambda query: query[:, :3]),
    ],
)
def test_what_lies_outside_is_refused(place, change):
    """Each place is looked at: a wrong one would be another text's memory, or nobody's."""
    cpu.load()
    arguments, _ = step(CASES["one beside many"], 4, 2, 16, 64, torch.float32)
    arguments = [*arguments]
    arguments[place] = change(arguments[place])
    with pytest.raises(RuntimeError, match="ctfp8::paged_attention"):
        torch.ops.ctfp8.paged_attention(*arguments, 1, 0.25)
