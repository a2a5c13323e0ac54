"""Attention of several texts in one row of tokens to a paged key-value cache: new tokens are written to it, and all are read.

Pages are those of transformers' continuous batching: `pages` `[pages, 2, page, heads, columns]`, each `page` tokens of one layer,
first the keys and then the values; pages of one text's tokens lie together, a layer's behind the one before. An index i of
`write` or `read` means the row `i + 2 * layer * page` of all, seen as `[rows, heads, columns]`, for a key, and the row `page`
further for its value. The pages of a text begin at multiples of `page` of its tokens.

Pages of uint8 hold FP8 values: with scales of keys and values, or with each token's own as a byte behind its values, as a cache
of ours keeps them (`fp8.quantize_cached_steps`, `ctfp8::cached`). New tokens come in that form.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .operators import operator


@operator(
    "paged_attention(Tensor query, Tensor key, Tensor value, Tensor(a!) pages, Tensor write, Tensor read, Tensor query_starts,"
    " Tensor key_starts, int layer, float scale, Tensor? key_scale=None, Tensor? value_scale=None) -> Tensor",
    meta=lambda query, *_: query.new_empty((query.shape[0], query.shape[2], query.shape[1], query.shape[3])),
)
def _paged_attention(
    query: Tensor, key: Tensor, value: Tensor, pages: Tensor, write: Tensor, read: Tensor, query_starts: Tensor,
    key_starts: Tensor, layer: int, scale: float, key_scale: Tensor | None = None, value_scale: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """`[1, tokens, heads, columns]`.

    Args:
        query, key, value: `[1, heads, tokens, columns]`, of keys a divisor of the queries' heads; keys and values of pages
            of uint8 are uint8, with a column more where tokens have scales of their own.
        write: `[tokens]` int64, where new tokens are kept.
        read: `[all]` int64, where each text's tokens are, the new ones last; one text after another.
        query_starts, key_starts: `[texts + 1]` int32, where each text's tokens begin among the new ones, and in `read`.
        key_scale, value_scale: float32 `[1]` or `[heads]`, of FP8 pages.
    """
    page = pages.shape[2]
    rows = pages.view(-1, *pages.shape[3:])
    first = 2 * layer * page
    kept = []
    for states, scale_of, at in ((key, key_scale, first), (value, value_scale, first + page)):
        lines = rows[..., : states.shape[3]]
        lines.index_copy_(0, write + at, states[0].transpose(0, 1))
        every = lines.index_select(0, read + at)
        if states.dtype == torch.uint8:
            every = torch.ops.ctfp8.cached(every.transpose(0, 1)[None], scale_of, query.dtype)[0].transpose(0, 1)
        kept.append(every)
    keys, values = kept
    out = query.new_empty((1, query.shape[2], query.shape[1], query.shape[3]))
    starts, ends = query_starts.tolist(), key_starts.tolist()
    for text in range(len(starts) - 1):
        mine, seen = slice(starts[text], starts[text + 1]), slice(ends[text], ends[text + 1])
        tokens, length = mine.stop - mine.start, seen.stop - seen.start
        if not tokens:
            continue
        mask = None  # a token sees those before it, and itself
        if tokens > 1:
            mask = torch.ones(tokens, length, dtype=torch.bool, device=query.device).tril(length - tokens)
        result = torch.nn.functional.scaled_dot_product_attention(
            query[:, :, mine], keys[None, seen].transpose(1, 2), values[None, seen].transpose(1, 2), mask,
            scale=scale, enable_gqa=query.shape[1] != key.shape[1],
        )  # fmt: skip
        out[:, mine] = result.transpose(1, 2)
    return out
