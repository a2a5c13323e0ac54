"""What each tensor of a saved checkpoint is taken from: the files that the model was loaded from, or the model.

FP8 weights and scales are the model's. What else a parameter was loaded from is compared with it: bytes of the file where it
has not changed, its own values where it has, in the dtype that the file had if that holds them. What no parameter was loaded
from (layers for multi-token prediction, a vision tower that a text model leaves out) is copied.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from ..checkpoint.source import Stored, same_bits
from ..checkpoint.transforms import fault
from ..checkpoint.writer import DTYPES, NAMES, Entry
from ..counted import agreeing, counted, such_as
from ..errors import CheckpointError, UsageError
from ..model.experts import of_experts
from ..model.parametrization import Dequantize
from ..model.plan import QuantizedParameter
from ..model.ranks import is_first
from ..model.rotation import stored_tensors
from ..model.stored import scales_of, tensors_of
from .compat import revert_weight_conversion
from .conversions import convert_sources
from .held import Held, Wanted
from .origin import Group, Origin, place
from .unit import Compared, Unit, experts_in_turn, floating_dtype, holds_scale, is_exact, is_one_matrix, rows_in_turn


class SavePlan:
    """Decides, for one model. `units` on the first rank are what to write; elsewhere there are none.

    Raises:
        UsageError: the model holds tensors that nothing would load again, or a weight cannot be written as it was.
    """

    def __init__(self, model: Any, quantizer: Any):
        self.model, self.quantizer = model, quantizer
        self.origin: Origin | None = quantizer.origin
        self.held = Held(model, quantizer)
        self.gone = self.origin.source.gone() if self.origin else None
        self.raw: Mapping[str, Stored] = self.origin.source.tensors if self.origin else {}
        self.units: list[Unit] = []
        self.done: set[str] = set()
        self.dropped: list[str] = []
        self.inexact: list[str] = []
        self.rounded: list[str] = []
        refuse_adapters(model)
        self._refuse_added()
        self._quantized()
        self._read_again()
        self._plain()
        self._rotations()
        self._rest()
        order = {name: i for i, name in enumerate(self.raw)}
        self.units.sort(key=lambda unit: order.get(unit.entries[0].name, len(order)))

    def _add(self, unit: Unit) -> None:
        if unit.entries:
            self.units.append(unit)
            self.done |= {entry.name for entry in unit.entries}

    # --- FP8 -----------------------------------------------------------------------------------------------------

    def _quantized(self) -> None:
        for name, (_, how) in self.held.fp8.items():
            info = self.quantizer.plans.get(name, how.info)  # whole, where a rank has a part
            entries = self._fp8_entries(info)
            if self._is_of_files(name, entries):
                self._add(Unit.of_files(self.raw[key] for key in entries))
                continue
            if not self._holds_scales(how):
                self.rounded.append(name)
            if name in self.held.cuts and is_one_matrix(info):
                self._matrix(name, info, entries)
                continue
            for some in (name in self.held.cuts and experts_in_turn(info)) or (None,):
                own = entries if some is None else self._fp8_entries(of_experts(info, some))
                wanted = Wanted(name, some)
                self._add(Unit(tuple(own.values()), partial(self._fp8_tensors, wanted), gathers=(wanted,)))

    def _matrix(self, name: str, info: QuantizedParameter, entries: Mapping[str, Entry]) -> None:
        """One FP8 matrix that is cut, by its rows."""
        runs = rows_in_turn(info.layout.shape, itemsize=1)
        weight = info.names[info.layout.sources[0]]

        def make() -> dict[str, Tensor | Iterator[Tensor]]:
            return {**scales_of(self.held.scales(name)), weight: (self.held.value(name, rows) for rows in runs)}

        gathers = (Wanted(name, scales=True), *(Wanted(name, rows=rows) for rows in runs if weight in entries))
        self._add(Unit(tuple(entries.values()), make, gathers=gathers))

    def _fp8_entries(self, info: QuantizedParameter) -> dict[str, Entry]:
        entries: dict[str, Entry] = {}
        for source, scale in info.scales.items():
            entries |= self._entry(info.names[source], "F8_E4M3", info.shapes[source])
            entries |= self._entry(scale.name, NAMES[scale.dtype], scale.view.whole or scale.shape)
        for scale in info.input_scales.values():
            entries |= self._entry(scale.name, NAMES[scale.dtype], scale.view.whole or scale.shape)
        return {key: entry for key, entry in entries.items() if key not in self.done}  # tied to one that was

    def _holds_scales(self, how: Dequantize) -> bool:
        """Whether the dtypes that scales have in the files hold those of a parameter, as far as this rank has them."""
        stored = {source: scale for source, scale in how.info.scales.items() if not scale.view.inverse}
        kinds = {scale.dtype for scale in stored.values()} - {torch.float32}
        if not kinds:
            return True
        if len(kinds) == 1 and len({scale.dtype for scale in how.info.scales.values()}) == 1:
            return holds_scale(how.weight_scale, kinds.pop())
        return bool(self.held.cuts) or all(
            holds_scale(how.info.stored_scale(s, how.weight_scale), t.dtype) for s, t in stored.items()
        )

    def _entry(self, name: str, dtype: str, shape: tuple[int, ...]) -> dict[str, Entry]:
        if name in self.raw and self.origin is not None and not self.origin.stock:
            stored = self.raw[name]
            return {name: Entry(name, stored.dtype, stored.shape, stored.nbytes)}
        return {name: Entry.like(name, torch.empty(shape, dtype=DTYPES[dtype], device="meta"))}

    def _is_of_files(self, name: str, entries: Iterable[str]) -> bool:
        """Whether what transformers loaded, and rounded, is what the files say."""
        if self.origin is None or not self.origin.stock or self.gone or not all(key in self.raw for key in entries):
            return False
        return all(self.raw[key].is_value(value) for key, value in self._fp8_tensors(Wanted(name)).items())

    def _fp8_tensors(self, wanted: Wanted) -> dict[str, Tensor]:
        weight, how = self.held.quantized(wanted.name, wanted.experts)
        return tensors_of(how, weight)

    # --- dequantized while loading -------------------------------------------------------------------------------

    def _read_again(self) -> None:
        """What was dequantized while loading: its values do not give back the bits of its file."""
        again = {**self.quantizer.packed, **self.quantizer.mixed}
        if not again:
            return
        try:
            if self.origin is None or self.gone is not None:
                raise CheckpointError(self.gone or "it is not known any more")
            tensors = self.origin.folder.open(self.quantizer.schemes.format)
            for target, info in again.items():
                value, stored = info.again(tensors)
                if not self.held.holds(target, value):
                    raise UsageError(
                        f"{target} was dequantized and has changed since, so that it cannot be saved as it was read. Load the "
                        "checkpoint with ctfp8.from_pretrained(..., dequantize=True) to change weights."
                    )
                self._add(Unit.of_files(self.raw[name] for name in stored if name not in self.done))
        except (CheckpointError, SafetensorError) as error:
            raise UsageError(
                f"{counted(len(again), 'weight')} dequantized while loading would be saved as in the file, which has changed "
                f"since ({error}). Load the checkpoint again."
            ) from error

    # --- everything else -----------------------------------------------------------------------------------------

    def _plain(self) -> None:
        left = {k for k in self.held.plain if k not in self.quantizer.packed and k not in self.quantizer.mixed}
        loaded: set[object] = set()
        special = {*self.held.fp8, *self.quantizer.packed, *self.quantizer.mixed}
        for group in self.origin.groups(special) if self.origin else ():
            present = [name for name in group.targets if name in left]
            left -= set(present)
            loaded |= {place(self.model, name, self.held.plain[name]) for name in present}
            if len(present) < len(group.targets):
                self._removed(group, present)
            elif group.targets:
                self._loaded(group)
        values = {}
        for name in sorted(left):
            where = place(self.model, name, self.held.plain[name])
            made = self.origin.computed.get(name) if self.origin else None
            tied = where in loaded
            if not tied and (made is None or not same_bits(made, self.held.plain[name])):
                loaded.add(where)
                values[name] = self.held.value(name)
        if values and is_first():
            for name, tensor in self._reverted(values).items():
                self._hold(name, tensor, partial(_itself, tensor))

    def _removed(self, group: Group, present: list[str]) -> None:
        """The model has no such parameter any more, or not all of those that one tensor of the files became."""
        names = [self.origin.tensors[name].name for name, _ in group.sources]  # type: ignore[union-attr]
        self.dropped += names
        self.done |= set(names)
        for name in present:
            value = self.held.value(name)
            if is_first():
                self._hold(name, value, partial(_itself, value))

    def _loaded(self, group: Group) -> None:
        assert self.origin is not None
        stored = [self.raw[self.origin.tensors[name].name] for name, _ in group.sources]
        if group.pattern is None and group.first in self.held.cuts:
            self._add_cut(group.first, stored)
            return
        values = {name: self.held.value(name) for name in group.targets}
        if not is_first():
            return
        if not self.gone and self._unchanged(group, values, stored):
            self._add(Unit.of_files(stored))
        elif group.pattern is None:
            (value,) = values.values()
            for there in stored:
                self._hold(there.name, value, partial(self.held.value, group.first))
        else:
            self.done |= {tensor.name for tensor in stored}
            for name, tensor in self._reverted(values).items():
                self._hold(name, tensor, partial(_itself, tensor))

    def _add_cut(self, name: str, stored: list[Stored]) -> None:
        """What each rank has a part of, looked at a few rows at a time."""
        shape, _ = self.held.cuts[name]
        seen = [Compared(tensor, not self.gone and tensor.shape == shape) for tensor in stored]
        for rows in rows_in_turn(shape, self.held.plain[name].itemsize):
            value = self.held.value(name, rows)
            seen = [one.and_of(rows, value) for one in seen] if is_first() else seen
        if not is_first():
            return
        if any(one.same for one in seen):
            self._add(Unit.of_files(stored))
            return
        like = torch.empty(shape, dtype=self.held.plain[name].dtype, device="meta")
        runs = rows_in_turn(shape, like.itemsize)

        def make() -> Iterator[Tensor]:
            return (self.held.value(name, rows) for rows in runs)

        for one in seen:
            self._hold_as(one.stored.name, like, one.exact, make, tuple(Wanted(name, rows=rows) for rows in runs))

    def _unchanged(self, group: Group, values: Mapping[str, Tensor], stored: list[Stored]) -> bool:
        """Whether the files give what the model holds."""
        if group.pattern is None:
            (value,) = values.values()
            return any(tensor.is_value(value) for tensor in stored)
        read = {name: tensor.read() for (name, _), tensor in zip(group.sources, stored, strict=True)}
        try:
            again = convert_sources(
                self.model, group.found.converters[group.pattern], group.first, list(group.sources),
                self.origin.tensors, read,  # type: ignore[union-attr]
            )  # fmt: skip
        except CheckpointError:
            return False
        return all(name in again and same_bits(again[name].to(v.dtype), v) for name, v in values.items())

    def _hold(self, name: str, value: Tensor, make: Callable[[], Tensor]) -> None:
        """Writes a value of the model, in the dtype of its file where that holds it."""
        self._hold_as(name, value, name not in self.raw or is_exact(value, self.raw[name]), make)

    def _hold_as(
        self,
        name: str,
        like: Tensor,
        exact: bool,
        make: Callable[[], Tensor | Iterator[Tensor]],
        gathers: tuple[Wanted, ...] = (),
    ) -> None:
        dtype = like.dtype
        if name in self.raw and (stored := floating_dtype(self.raw[name])) is not None and dtype.is_floating_point:
            dtype = stored if exact else dtype
            if not exact:
                self.inexact.append(name)
        entry = Entry.like(name, torch.empty(like.shape, dtype=dtype, device="meta"))
        self._add(Unit((entry,), lambda: {name: _cast(make(), dtype)}, gathers=gathers))

    def _reverted(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors of a file that these parameters make, by transformers' own conversions."""
        self.model._weight_conversions = self.quantizer.conversions
        try:
            found: dict[str, Tensor] = revert_weight_conversion(self.model, dict(values))
            return found
        finally:
            self.model._weight_conversions = []

    # --- neither -------------------------------------------------------------------------------------------------

    def _rotations(self) -> None:
        """Matrices of transforms: the model's, which a user may have changed since they were read."""
        held = stored_tensors(self.model)
        modules = dict(self.model.named_modules())
        for one in self.quantizer.placed:
            name = one.matrix.name
            if name not in held and one.module in modules:
                raise UsageError(
                    f"{one.module}: its transform {one.transform} was taken out, which is not what the config says. Load the "
                    "checkpoint with dequantize=True, which multiplies transforms into the weights, or load it again."
                )
            if name in held and (said := fault(held[name].cpu(), one.transform, one.matrix)) is not None:
                raise UsageError(
                    f"{name} was changed, and would not be loaded again: {said}. Load the checkpoint again."
                )
        for name, tensor in held.items():
            if not self.gone and name in self.raw and self.raw[name].is_value(tensor):
                self._add(Unit.of_files([self.raw[name]]))
            else:
                self._hold(name, tensor, partial(_itself, tensor))

    def _rest(self) -> None:
        """Tensors that the class does not build, and scales of the cache and of activations that no kernel uses."""
        for name, how in self.quantizer.plans.items():
            if name not in self.held.fp8:  # the model has lost it, or has it in another dtype
                names = {
                    *how.names.values(),
                    *(scale.name for scale in (*how.scales.values(), *how.input_scales.values())),
                }
                self.dropped += sorted(names - self.done)
                self.done |= names
        rest = [tensor for name, tensor in self.raw.items() if name not in self.done]
        if not self.gone:
            for tensor in rest:
                self._add(Unit.of_files([tensor]))
            rest = []
        kept = {**self.quantizer.unused, **self.quantizer.cache_scales}
        for name, tensor in kept.items():
            if name not in self.done and (self.gone or self.origin is None):
                self._add(Unit((Entry.like(name, tensor),), partial(dict, ((name, tensor),))))
        if lost := [tensor.name for tensor in rest if tensor.name not in self.done]:
            raise UsageError(
                f"{lost[0]} is in the files that the model was loaded from, and not in the model "
                f"({counted(len(lost), 'tensor')} in all, such as layers for multi-token prediction). It is saved as it was "
                f"read, and the files have changed since ({self.gone}). Load the checkpoint again."
            )

    def say(self) -> None:
        """Warns of what is not saved as it was read."""
        if self.dropped:
            warnings.warn(
                f"{such_as(len(self.dropped), 'tensor', self.dropped[0])} of the checkpoint "
                f"{agreeing(len(self.dropped), 'is', 'are')} not saved: the model has no such "
                "parameter any more. If it should, load it again.",
                stacklevel=2,
            )
        if self.inexact:
            number = len(self.inexact)
            warnings.warn(
                f"{such_as(number, 'tensor', self.inexact[0])} {agreeing(number, 'has', 'have')} values that "
                f"{agreeing(number, 'its', 'their')} dtype in the checkpoint ({self.raw[self.inexact[0]].dtype}) does not hold: "
                f"{agreeing(number, 'it is', 'they are')} saved in the model's.",
                stacklevel=2,
            )
        if self.rounded:
            warnings.warn(
                f"scales of {such_as(len(self.rounded), 'weight', self.rounded[0])} have values that their dtype in the "
                "checkpoint does not hold: they are rounded.",
                stacklevel=2,
            )

    def _refuse_added(self) -> None:
        """Raises where the model has tensors that its class does not make: whoever loads them gets another model."""
        if self.origin is None:
            return
        added = [name for name in self.held.plain if name not in self.origin.declared]
        if not added:
            return
        with torch.device("meta"):
            built = set(type(self.model)(self.model.config).state_dict())
        if added := [name for name in added if name not in built]:
            raise UsageError(
                f"{added[0]} is not a tensor that {type(self.model).__name__} has ({len(added)} in all), so that nothing would "
                "load it again. Take it out, or change the config so that the model has it."
            )


def refuse_adapters(model: Any) -> None:
    """Raises where adapters are inside: their tensors would be saved under names that nothing loads."""
    for name, module in model.named_modules():
        if type(module).__module__.startswith("peft."):
            raise UsageError(
                f"{name} holds an adapter, which a checkpoint of the model has no place for. Save the adapter with "
                "peft_model.save_pretrained(folder), and the model after peft_model.unload()."
            )


def _cast(value: Tensor | Iterator[Tensor], dtype: torch.dtype) -> Tensor | Iterator[Tensor]:
    return value.to(dtype) if isinstance(value, Tensor) else (rows.to(dtype) for rows in value)


def _itself(tensor: Tensor) -> Tensor:
    return tensor
