"""What PEFT does not do with parameters that have a parametrization, as FP8 ones have: seams for `target_parameters`.

PEFT 0.21 adapts a parameter for one forward pass, by a parametrization of one of two classes, and takes off the first kind alone;
and it matches the end of a name (`mlp.experts.gate_up_proj`) only where a parameter has no parametrization. Each seam looks for
what it mends, and does nothing in a release of PEFT that has changed.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn
from torch.nn.utils import parametrize

_mended: set[type] = set()


def removable(module: nn.Module) -> nn.Module:
    """An adapter's parametrization that PEFT finds again after the forward pass."""
    layer = sys.modules.get("peft.tuners.lora.layer")
    removed, left = (getattr(layer, name, None) for name in ("_LoraParameterProxy", "_LoraFactorsProxy"))
    if removed is not None and left is not None and type(module) is left and not issubclass(left, removed):
        module.__class__ = type(left.__name__, (left, removed), {})
    return module


def match_ends_of_names() -> None:
    """Lets PEFT, if it is imported, match the ends of the names of parametrized parameters as it does of others."""
    tuner = getattr(sys.modules.get("peft.tuners.tuners_utils"), "BaseTuner", None)
    inject = getattr(tuner, "_inject_parameters", None)
    if tuner is not None and inject is not None and tuner not in _mended:
        _mended.add(tuner)
        tuner._inject_parameters = _with_whole_names(inject)


def _with_whole_names(inject: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(inject)
    def call(self: Any, peft_config: Any, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        wanted = peft_config.target_parameters
        whole = [name for name in _parametrized(model) if any(_ends(name, end) for end in wanted or ())]
        peft_config.target_parameters = list(dict.fromkeys([*(wanted or ()), *whole]))
        try:
            return inject(self, peft_config, model, *args, **kwargs)
        finally:
            peft_config.target_parameters = wanted

    return call


def _parametrized(model: nn.Module) -> Iterator[str]:
    for path, module in model.named_modules():
        if parametrize.is_parametrized(module):
            for name in module.parametrizations:
                yield f"{path}.{name}"


def _ends(name: str, end: str) -> bool:
    plain = name.replace(".base_layer", "")  # of another adapter
    return plain == end or plain.endswith(f".{end}")
