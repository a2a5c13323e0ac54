"""A text model loaded from the files of a larger model, of which transformers has no renaming for that class: Gemma 3's."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from torch import Tensor

from .compat import WeightConverter, WeightRenaming, WeightTransform, rename_source_key

#: Where a larger model keeps its text model, and what the text model calls the same.
PLACES = {
    r"^language_model\.model\.": "model.",
    r"^language_model\.lm_head\.": "lm_head.",
    r"^model\.language_model\.": "model.",
}


def part_renamings(
    names: Iterable[str], declared: Mapping[str, Tensor], prefix: str, conversions: Iterable[WeightTransform]
) -> list[WeightRenaming]:
    """Renamings for what the file has under a larger model's names, and the model would not find.

    Args:
        names: of the file.
        declared: the model's tensors.
        prefix: the model's `base_model_prefix`.
        conversions: transformers' own, for its class; where one of them leads there, none is added.
    """
    if any("language_model." in name for name in declared):
        return []
    conversions = list(conversions)
    renamings = [c for c in conversions if isinstance(c, WeightRenaming)]
    converters = [c for c in conversions if isinstance(c, WeightConverter)]

    def arrives(name: str, more: list[WeightRenaming]) -> bool:
        return rename_source_key(name, [*renamings, *more], converters, prefix, declared)[0] in declared

    out = []
    for pattern, ours in PLACES.items():
        here = [name for name in names if re.match(pattern, name)]
        renaming = WeightRenaming(pattern, ours)
        if not any(arrives(name, []) for name in here) and any(arrives(name, [renaming]) for name in here):
            out.append(renaming)
    return out
