"""The values that a model holds, whole on the first of several ranks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..checkpoint.shard import Cuts, take
from ..checkpoint.source import same_bits
from ..errors import UsageError
from ..model.parametrization import Dequantize, quantized_parameters, stored_weight
from .compat import load_offloaded_parameter
from .origin import plain_state
from .parallel import gather, gather_quantized, gather_scales


@dataclass(frozen=True)
class Wanted:
    """What all ranks send to the first in one step: a parameter, or some of it.

    Attributes:
        experts: of an FP8 one, with their scales.
        rows: of its first dimension; of an FP8 one without scales.
        scales: those of an FP8 matrix alone.
    """

    name: str
    experts: range | None = None
    rows: range | None = None
    scales: bool = False


class Held:
    """Values of a model's parameters and buffers. Every rank asks for the same in the same order."""

    def __init__(self, model: Any, quantizer: Any):
        self.model, self.plans = model, quantizer.plans
        self.cuts: Mapping[str, tuple[tuple[int, ...], Cuts]] = quantizer.cuts
        self.plain = plain_state(model)
        self.fp8 = {name: (owner, how) for name, owner, how in quantized_parameters(model)}

    def value(self, name: str, rows: range | None = None) -> Tensor:
        """A parameter or buffer; of one that is cut, `rows` of its first dimension if they are given.

        Of an FP8 one that is cut: its weight.
        """
        if name in self.cuts:
            return gather(self._weight(name) if name in self.fp8 else self.plain[name], *self.cuts[name], rows)
        value = self.plain[name]
        return load_offloaded_parameter(self.model, name) if value.device.type == "meta" else value

    def holds(self, name: str, value: Tensor) -> bool:
        """Whether a parameter that is not FP8 has these values, as far as this rank has it."""
        if name not in self.plain:
            return False
        if name in self.cuts:
            return same_bits(take(value, self.cuts[name][1]), self.plain[name])
        return same_bits(value, self.value(name))

    def quantized(self, name: str, experts: range | None = None) -> tuple[Tensor, Dequantize]:
        """An FP8 parameter and its scales.

        Args:
            experts: of one that is cut, see `model.experts`; None: all.
        """
        weight, (_, how) = self._weight(name), self.fp8[name]
        if name in self.cuts:
            return gather_quantized(weight, how, self.plans[name], experts)
        if weight.device.type == "meta":
            raise UsageError(f"{name} was moved out of memory, and cannot be saved from there. Load the model again.")
        return weight, how

    def scales(self, name: str) -> Dequantize:
        """Of an FP8 matrix that is cut, all but its weight."""
        return gather_scales(self.fp8[name][1], self.plans[name])

    def follow(self, all_wanted: Iterable[Wanted]) -> None:
        """What ranks other than the first do while that one writes."""
        for wanted in all_wanted:
            if wanted.scales:
                self.scales(wanted.name)
            elif wanted.name in self.fp8 and wanted.rows is None:
                self.quantized(wanted.name, wanted.experts)
            else:
                self.value(wanted.name, wanted.rows)

    def _weight(self, name: str) -> Tensor:
        return stored_weight(self.fp8[name][0], name.rpartition(".")[2])
