"""FP8 tables of embeddings, and the heads that are tied to them: one tensor in memory, and in the file."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from ..checkpoint.files import Checkpoint
from ..checkpoint.layout import Layout
from ..checkpoint.scheme import Schemes
from ..errors import SchemeError
from ..model.parametrization import attach
from ..model.plan import QuantizedParameter


def embedding_names(model: nn.Module, found: Mapping[str, Layout]) -> set[str]:
    """The checkpoint's names of the modules whose weights are tables of embeddings in the model."""
    return {
        source.removesuffix(".weight")
        for target, layout in found.items()
        if isinstance(model.get_submodule(target.rpartition(".")[0]), nn.Embedding)
        for source in layout.sources
    }


def untie(model: Any, fp8: Collection[str], tensors: Checkpoint) -> None:
    """Keeps a head that the file has a copy of, in another dtype, from being tied to an FP8 table."""
    for head, table in list(model.all_tied_weights_keys.items()):
        if table in fp8 and head in tensors:
            del model.all_tied_weights_keys[head]


def tie_absent_head(model: Any, arriving: Collection[str]) -> None:
    """Ties the heads of a text model as the larger one does that its file is of, where the file has none.

    The larger model goes by the top of the config, the text model by its own part of it, which often does not say.

    Args:
        arriving: the model's parameters that tensors of the file become.
    """
    if getattr(model.config, "tie_word_embeddings", None) is not False:
        return
    model.config.tie_word_embeddings = True
    tied: dict[str, str] = model.get_expanded_tied_weights_keys(all_submodels=False)
    if tied and all(head not in arriving and table in arriving for head, table in tied.items()):
        model.all_tied_weights_keys.update(tied)
    else:
        model.config.tie_word_embeddings = False


def leave_tied(model: nn.Module, fp8: Collection[str]) -> None:
    """Takes FP8 weights out of what `tie_weights()` ties: they are one tensor already, or two that differ."""
    for path, part in model.named_modules():
        keys = getattr(part, "_tied_weights_keys", None)
        if isinstance(keys, dict):
            within = path + "." if path else ""
            own = [name.removeprefix(within) for name in fp8 if name.startswith(within)]
            kept = {
                head: table
                for head, table in keys.items()
                if not any(re.fullmatch(pattern, name) for pattern in (head, table) for name in own)
            }
            if len(kept) < len(keys):
                part._tied_weights_keys = kept


def attach_tied(
    model: nn.Module,
    target: str,
    info: QuantizedParameter,
    weight_scale: Tensor,
    input_scale: Tensor | None,
    schemes: Schemes,
) -> None:
    """`attach`, to a parameter and to whatever else in the model is the same tensor.

    A head's activations are quantized as the config says for the head; a table of embeddings has none.
    """
    weight = model.get_parameter(target)
    owners = [(name, module, leaf) for name, module in model.named_modules()
              for leaf, found in module._parameters.items() if found is weight]  # fmt: skip
    for name, module, leaf in owners:
        own = info
        if f"{name}.{leaf}" != target or isinstance(module, nn.Embedding):
            own = replace(info, scheme=replace(info.scheme, activation=_activation(name, module, schemes)))
        static = own.scheme.activation == "tensor"
        attach(module, leaf, own, weight_scale, input_scale if static else None)


def _activation(name: str, module: nn.Module, schemes: Schemes) -> str:
    """Of a module whose weight the file stores under another's name; a static scale would have been stored there, too."""
    try:
        scheme = None if isinstance(module, nn.Embedding) else schemes.scheme(name)
    except SchemeError:
        return "none"
    return "none" if scheme is None or scheme.activation == "tensor" else scheme.activation
