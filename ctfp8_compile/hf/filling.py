"""How the loader fills parameters that are not just what transformers makes of a file's tensors: FP8 ones, dequantized ones.

Rows of FP8 weights are placed into one preallocated tensor, by the parameter's layout.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from ..checkpoint.layout import Layout, Turned
from ..errors import Ctfp8Error
from .compat import ConversionOps, WeightConverter
from .conversions import as_list
from .parts import Parts


@dataclass(frozen=True)
class Filling:
    """How parameters are filled that are not just what transformers makes of a file's tensors.

    Attributes:
        layouts: of those whose rows are rows of tensors.
        made: of other ones, the tensors, in order, and what makes the parameter's whole value of these, by name.
        parts: what this rank has; None: all.
        faults: what was raised while parameters were filled.
    """

    layouts: Mapping[str, Layout]
    made: Mapping[str, tuple[Sequence[str], Callable[[Mapping[str, Tensor]], Tensor]]]
    parts: Parts | None = None
    faults: list[Ctfp8Error] = field(default_factory=list)

    def __contains__(self, name: object) -> bool:
        return name in self.layouts or name in self.made

    @property
    def on_cpu(self) -> bool:
        """Whether tensors are read of which a device is to have a part."""
        return self.parts is not None and bool(self.parts.whole)

    def value(self, name: str, tensors: Sequence[Tensor | None]) -> Tensor:
        """A parameter, or this rank's part of it, from what was read of its tensors; None: another rank has that one."""
        if name in self.made:
            sources, make = self.made[name]
            whole = make(dict(zip(sources, tensors, strict=True)))  # type: ignore[arg-type]
            return whole if self.parts is None else self.parts.of(name, whole)
        layout = self.layouts[name]
        if self.parts is not None:
            layout = self.parts.shards.get(name, layout)
        read = [tensor for tensor in tensors if tensor is not None]
        return layout.weight(dict(zip(layout.sources, read, strict=True)))


def for_single_tensors(filling: Filling) -> list[WeightConverter]:
    """Conversions for parameters that are one tensor of the file, turned or dequantized: transformers knows none for them."""
    names = [name for name, layout in filling.layouts.items() if isinstance(layout, Turned)]
    names += [name for name, (sources, _) in filling.made.items() if len(sources) == 1]
    tails = dict.fromkeys(r"\.".join(name.split(".")[-2:]) for name in names)
    return [
        WeightConverter(rf"{tail}$", tail.replace("\\", ""), [PlaceRows(filling, [])], force_cpu=filling.on_cpu)
        for tail in tails
    ]


class PlaceRows(ConversionOps):
    """Fills FP8 parameters by their layout; every other parameter goes through transformers' own operations.

    transformers stacks, then concatenates, which peaks at two copies of a layer's experts; placing rows peaks at one.
    """

    supports_many_to_many = True

    def __init__(self, filling: Filling, operations: list[ConversionOps]):
        self.filling, self.operations = filling, operations
        self.supports_many_to_many = any(op.supports_many_to_many for op in operations)

    def __deepcopy__(self, memo: dict[int, Any]) -> PlaceRows:
        return PlaceRows(self.filling, copy.deepcopy(self.operations, memo))

    def convert(
        self,
        input_dict: dict[str, Any],
        source_patterns: list[str],
        target_patterns: list[str],
        full_layer_name: str = "",
        **kwargs: Any,
    ) -> dict[str, Any]:
        targets = {pattern: full_layer_name.replace(target_patterns[0], pattern) for pattern in target_patterns}
        if any(name in self.filling for name in targets.values()):
            found = (input_dict[pattern] for pattern in source_patterns if pattern in input_dict)
            tensors = [tensor for some in found for tensor in as_list(some)]
            return {pattern: self._fill(name, tensors, kwargs["model"]) for pattern, name in targets.items()}
        if not self.operations:  # of another layer, where it is the tensor of the file
            return dict(zip(target_patterns, input_dict.values(), strict=True))
        for operation in self.operations:
            input_dict = operation.convert(
                input_dict, source_patterns=source_patterns, target_patterns=target_patterns,
                full_layer_name=full_layer_name, **kwargs,
            )  # fmt: skip
        return input_dict

    def _fill(self, name: str, tensors: list[Tensor], model: Any) -> Tensor:
        try:
            return self.filling.value(name, tensors)
        except Ctfp8Error as error:  # the loader would go on, and then raise an error of its own that names nothing
            self.filling.faults.append(error)
            declared = model.get_parameter(name)
            local = declared.to_local() if isinstance(declared, DTensor) else declared
            return torch.empty_like(local, device="cpu")

    @property
    def reverse_op(self) -> ConversionOps:
        return _Chain([op.reverse_op for op in reversed(self.operations)])


class _Chain(ConversionOps):
    """Operations run one after the other: how `PlaceRows` undoes those it wraps."""

    def __init__(self, operations: list[ConversionOps]):
        self.operations = operations
        self.supports_many_to_many = any(op.supports_many_to_many for op in operations)

    def convert(self, input_dict: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        for operation in self.operations:
            input_dict = operation.convert(input_dict, **kwargs)
        return input_dict

    @property
    def reverse_op(self) -> ConversionOps:
        return _Chain([op.reverse_op for op in reversed(self.operations)])
