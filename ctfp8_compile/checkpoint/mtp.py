"""Which tensors of a checkpoint are of layers for multi-token prediction (MTP), which draft tokens behind the last layer."""

from __future__ import annotations

import re
from collections.abc import Container, Iterable

#: A layer behind the last one (DeepSeek, GLM, Step, Ling): what combines an embedding and a hidden state says what it is.
_COMBINING = re.compile(r"^(.*?(?:^|\.)layers\.(\d+)\.)(?:eh_proj|enorm|hnorm)\.")
#: Layers in a part of their own (Qwen, Mellum, Inkling, MiMo, ERNIE).
_OWN_PART = re.compile(r"(^|\.)mtp(_\w+)?\.")


def mtp_patterns(names: Iterable[str], behind: Container[int] | None = None) -> set[str]:
    """What the names of such tensors match, and those of what is merged of them; whether a class builds them is another question.

    Args:
        names: of a checkpoint's tensors.
        behind: numbers of the layers behind the last one that count; default: all.
    """
    names = list(names)
    combining = [found for name in names if (found := _COMBINING.match(name))]
    layers = {found[1] for found in combining if behind is None or int(found[2]) in behind}
    parts = {_OWN_PART.pattern} if any(map(_OWN_PART.search, names)) else set()
    return parts | {rf"^{re.escape(layer)}" for layer in layers}


def mtp_names(names: Iterable[str], behind: Container[int] | None = None) -> set[str]:
    """The names themselves, see `mtp_patterns`."""
    names = list(names)
    patterns = mtp_patterns(names, behind)
    return {name for name in names if any(re.search(pattern, name) for pattern in patterns)}
