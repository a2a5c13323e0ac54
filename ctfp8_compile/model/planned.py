"""In which of three ways each parameter is made of what a checkpoint does not store as plain numbers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from ..checkpoint import files as ckpt
from ..checkpoint.layout import Layout
from ..checkpoint.leftovers import used_names
from ..checkpoint.notes import Notes
from ..checkpoint.packed import PackedParameter, PackedWeight
from ..checkpoint.scheme import Schemes
from .mixed import MixedParameter, is_mixed, mix
from .plan import QuantizedParameter, plan


@dataclass(frozen=True)
class Planned:
    """By name, parameters of a model.

    Attributes:
        fp8: they stay FP8.
        packed: in other formats throughout, dequantized while loading.
        mixed: of parts that are stored in different ways, dequantized where they must be.
    """

    fp8: dict[str, QuantizedParameter] = field(default_factory=dict)
    packed: dict[str, PackedParameter] = field(default_factory=dict)
    mixed: dict[str, MixedParameter] = field(default_factory=dict)

    @staticmethod
    def of(
        layouts: Mapping[str, Layout],
        declared: Mapping[str, Tensor],
        tensors: ckpt.Checkpoint,
        schemes: Schemes,
        packed: Mapping[str, PackedWeight],
        notes: Notes,
    ) -> Planned:
        """Decides, by what the tensors of each parameter are stored as.

        Args:
            layouts: by parameter, the tensors that it is made of.
            declared: what the model declares them as.
            packed: the checkpoint's weights in other formats.

        Raises:
            CheckpointError, SchemeError: as `plan` and `mix`.
        """
        out = Planned()
        for target, layout in layouts.items():
            dtype = declared[target].dtype
            if is_mixed(layout, tensors, packed):
                out.mixed[target] = mix(tensors, schemes, layout, dtype, packed, notes)
            elif tensors[layout.sources[0]].dtype == ckpt.PACKED:
                out.packed[target] = PackedParameter.of(layout, dtype, packed)
            else:
                out.fp8[target] = plan(tensors, schemes, layout, dtype, notes)
        return out

    @property
    def used(self) -> set[str]:
        """What FP8 weights take from the files, see `checkpoint.leftovers`."""
        weights = {name for info in self.fp8.values() for name in info.scales}
        weights |= {name for info in self.mixed.values() for name in info.grids}
        inputs = [ckpt.input_scale_name(name) for info in self.fp8.values() for name in info.input_scales]
        return used_names(weights, inputs)
