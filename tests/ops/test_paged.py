"""`ctfp8::paged_attention`: pages written and read where they lie, against float64, the operator's reference and torch's checks."""

from __future__ import annotations

import random

import pytest
import torch
from conftest import DATA  # noqa: F401

from ctfp8_compile.ops import cpu, paged

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
