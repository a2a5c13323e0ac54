"""What transformers' conversions (merging experts, renaming, transposing) make of a checkpoint's rows.

Every conversion is traced once with row numbers (see `checkpoint.layout`); `filling` then does it.
"""

from __future__ import annotations

import copy
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..checkpoint import files as ckpt
from ..checkpoint.layout import Layout, identity, trace, turned
from ..errors import CheckpointError
from .compat import (
    Concatenate,
    ConversionOps,
    Interleave,
    MergeModulelist,
    Transpose,
    WeightConverter,
    WeightRenaming,
    WeightTransform,
    dot_natural_key,
    get_model_conversion_mapping,
    rename_source_key,
)


@dataclass(frozen=True)
class Arrivals:
    """Where the tensors of a checkpoint go in a model.

    Attributes:
        by_target: by parameter or buffer, the tensors it comes from, each with the pattern of its converter; None: it is only
            renamed. Of several targets of one converter the first.
        converters: by pattern.
    """

    by_target: Mapping[str, list[tuple[str, str | None]]]
    converters: Mapping[str, WeightConverter]

    def targets_of(self, first: str) -> tuple[str, ...]:
        """All parameters that its converter makes of the tensors of one of `by_target`."""
        pattern = self.by_target[first][0][1]
        if pattern is None:
            return (first,)
        patterns = self.converters[pattern].target_patterns
        return tuple(first.replace(patterns[0], p) for p in patterns)

    def targets(self) -> Iterator[str]:
        for first in self.by_target:
            yield from self.targets_of(first)


def arrivals(
    model: Any,
    tensors: ckpt.Checkpoint,
    declared: Mapping[str, Tensor],
    more: Iterable[WeightRenaming] = (),
    known: list[WeightTransform] | None = None,
) -> Arrivals:
    """Where the tensors of a checkpoint go.

    Args:
        more: renamings beside transformers' own.
        known: the conversions; default: those that transformers has for the model.
    """
    renamings, converters = _conversions(model, known)
    renamings = [*renamings, *more]
    found: dict[str, list[tuple[str, str | None]]] = defaultdict(list)
    for name in sorted(tensors, key=dot_natural_key):
        target, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, declared)
        if target not in declared and name in declared:
            target, pattern = name, None
        if target in declared:
            found[target].append((name, pattern))
    return Arrivals(found, {pattern: c for c in converters for pattern in c.source_patterns})


def _conversions(
    model: Any, known: list[WeightTransform] | None = None
) -> tuple[list[WeightRenaming], list[WeightConverter]]:
    conversions = get_model_conversion_mapping(model) if known is None else [*known]
    conversions += per_expert_conversions(model, conversions)
    renamings = [c for c in conversions if isinstance(c, WeightRenaming)]
    return renamings, [c for c in conversions if isinstance(c, WeightConverter)]


def layouts(
    model: Any, tensors: ckpt.Checkpoint, declared: Mapping[str, Tensor], arrived: Arrivals
) -> dict[str, Layout]:
    """For each parameter of the model that the checkpoint holds in FP8, or packed, or of which it does so in part: what its
    rows come from."""
    by_pattern = arrived.converters
    found: dict[str, Layout] = {}
    traced: dict[Any, dict[str, Layout]] = {}
    for target, sources in arrived.by_target.items():
        if declared[target].is_floating_point():
            for name, _ in sources:
                ckpt.check_weight(tensors[name])
        pattern = sources[0][1]
        kinds = [
            dtype if (dtype := tensors[name].dtype) in (ckpt.FP8_DTYPE, ckpt.PACKED) else "" for name, _ in sources
        ]
        if not any(kinds):
            if pattern is not None:  # transformers' own error would name nothing
                empty = {name: torch.empty(tensors[name].shape, device="meta") for name, _ in sources}
                convert_sources(model, by_pattern[pattern], target, sources, tensors, empty)
            continue
        if pattern is None:
            info = tensors[sources[0][0]]
            if len(info.shape) < 2 and info.shape == tuple(declared[target].shape):
                raise CheckpointError(
                    f"{info}: FP8, and a vector: only matrices are read as FP8, and a norm or a bias has no scale. Store it as "
                    "the original model has it."
                )
            if len(info.shape) < 2 or info.shape != tuple(declared[target].shape):
                raise CheckpointError(f"{info}: the model declares {target} as {list(declared[target].shape)}.")
            source = sources[0][0]
            found[target] = (
                turned(source, info.shape) if _keeps_inputs_first(model, target) else identity(source, info.shape)
            )
            continue
        found |= _trace_converter(model, by_pattern[pattern], target, sources, tensors, declared, traced)
    return found


def modules(model: Any, arrived: Arrivals) -> list[tuple[str, str]]:
    """The model's modules that the checkpoint has, in the model's order: the model's name of each, and the checkpoint's.

    A module without tensors of its own, such as attention, is named by those inside it. Experts that become one tensor have no
    module.
    """
    found: dict[str, str] = {}
    for target, name in (
        (target, name) for target, sources in arrived.by_target.items() for name, p in sources if p is None
    ):
        ours, theirs = target.split("."), name.split(".")
        while ours and theirs and ours[-1] == theirs[-1]:
            del ours[-1], theirs[-1]
            if ours and theirs:
                found.setdefault(".".join(ours), ".".join(theirs))
    return [(name, found[name]) for name, _ in model.named_modules() if name in found]


def merged(arrived: Arrivals) -> list[str]:
    """The checkpoint's tensors that become a part of a parameter, such as each expert's."""
    return [name for sources in arrived.by_target.values() for name, pattern in sources if pattern is not None]


def takes(model: Any, declared: Mapping[str, Tensor], more: Iterable[WeightRenaming] = ()) -> Callable[[str], bool]:
    """A function that says whether the model makes a parameter, or a part of one, of a tensor of this name in a checkpoint.

    Args:
        more: renamings beside transformers' own.
    """
    renamings, converters = _conversions(model)
    renamings = [*renamings, *more]

    def taken(name: str) -> bool:
        target, _ = rename_source_key(name, renamings, converters, model.base_model_prefix, declared)
        return target in declared or name in declared

    return taken


def check_absent(absent: Mapping[str, str], taken: Callable[[str], bool]) -> None:
    """Refuses a checkpoint of which files are missing that the model needs.

    Args:
        absent: by name, tensors that an index says are in a file that is not there, and that file.
        taken: whether the model makes something of a name.

    Raises:
        CheckpointError: one of them is a parameter of the model, or a part of one.
    """
    for name in filter(taken, absent):
        raise CheckpointError(
            f"{ckpt.INDEX_FILE} names the shard {absent[name]}, which is missing, and the model needs {name} of it. Download it "
            "again."
        )


def _keeps_inputs_first(model: Any, target: str) -> bool:
    """Whether a parameter is of experts that are declared as inputs × outputs, as Llama 4's and gpt-oss's are."""
    owner = model.get_submodule(target.rpartition(".")[0])
    gate_up, down = (getattr(owner, name, None) for name in ("gate_up_proj", "down_proj"))
    if not isinstance(gate_up, Tensor) or not isinstance(down, Tensor) or gate_up.dim() != 3:
        return False
    return gate_up.shape[-1] != down.shape[-2]


def per_expert_conversions(model: Any, conversions: list[WeightTransform]) -> list[WeightConverter]:
    """Conversions for checkpoints with one Linear per expert, where transformers only knows experts merged or as w1/w2/w3.

    llm-compressor turns every MoE into per-expert `gate_proj`, `up_proj` and `down_proj` before it quantizes.
    """
    known = {s for c in conversions if isinstance(c, WeightConverter) for s in c.source_patterns}
    if any(s.replace("\\", "").endswith("experts.*.gate_proj.weight") for s in known):
        return []
    experts = next((m for m in model.modules() if isinstance(getattr(m, "gate_up_proj", None), nn.Parameter)), None)
    if experts is None or experts.gate_up_proj.dim() != 3:
        return []
    interleave: list[ConversionOps] = (
        [] if getattr(experts, "is_concatenated", True) else [Interleave(dim=1, inverse=True)]
    )
    # what the first makes, the second reads; Llama 4 and gpt-oss keep both as inputs × outputs
    transposed = _keeps_inputs_first(experts, "gate_up_proj")
    transpose: list[ConversionOps] = [Transpose(1, 2)] if transposed else []
    merge: list[ConversionOps] = [MergeModulelist(dim=0), Concatenate(dim=1), *interleave]
    gate, up, down = (r"experts.*.gate_proj", r"experts.*.up_proj", r"experts.*.down_proj")
    out = [
        WeightConverter([f"{gate}.weight", f"{up}.weight"], "experts.gate_up_proj", [*merge, *transpose]),
        WeightConverter(f"{down}.weight", "experts.down_proj", [MergeModulelist(dim=0), *transpose]),
    ]
    if getattr(experts, "has_bias", False) or hasattr(experts, "gate_up_proj_bias"):
        out.append(WeightConverter([f"{gate}.bias", f"{up}.bias"], "experts.gate_up_proj_bias", merge))
        out.append(WeightConverter(f"{down}.bias", "experts.down_proj_bias", [MergeModulelist(dim=0)]))
    return out


def _trace_converter(
    model: Any,
    converter: WeightConverter,
    target: str,
    sources: list[tuple[str, str | None]],
    tensors: ckpt.Checkpoint,
    declared: Mapping[str, Tensor],
    traced: dict[Any, dict[str, Layout]],
) -> dict[str, Layout]:
    """Layouts of what one converter makes for one layer. Layers of equal shapes are traced once."""
    # the order in which `PlaceRows` will see them
    order = [name for pattern in converter.source_patterns for name, p in sources if p == pattern]
    shapes = {name: tensors[name].shape for name in order}
    targets = {p: target.replace(converter.target_patterns[0], p) for p in converter.target_patterns}
    wanted = {name: tuple(declared[name].shape) for name in targets.values() if name in declared}
    key = (id(converter), tuple(shapes.values()), tuple(p for _, p in sources), tuple(wanted.values()))
    if key in traced:
        first = traced[key]
        return {n: _renamed(layout, order) for n, layout in zip(wanted, first.values(), strict=True)}

    def convert(numbers: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        return convert_sources(model, converter, target, sources, tensors, numbers)

    result = trace(shapes, wanted, convert)
    traced[key] = {name: result[name] for name in wanted}
    return traced[key]


def convert_sources(
    model: Any,
    converter: WeightConverter,
    target: str,
    sources: list[tuple[str, str | None]],
    tensors: ckpt.Checkpoint,
    values: Mapping[str, Tensor],
) -> dict[str, Tensor]:
    """What a converter of transformers makes of `values`, by parameter name.

    Raises:
        CheckpointError: it cannot, naming the tensor whose shape is unlike the others'.
    """
    probe = copy.deepcopy(converter)
    for name, pattern in sources:
        probe.add_tensor(target, name, pattern, values[name])
    try:
        return {k: as_list(v)[0] for k, v in probe.convert(target, model=model, config=model.config).items()}
    except Exception as error:  # an operation of transformers met shapes it does not expect
        alike = Counter((pattern, tensors[name].shape) for name, pattern in sources)
        odd = min(sources, key=lambda source: alike[source[1], tensors[source[0]].shape])[0]
        raise CheckpointError(
            f"{target}: its checkpoint tensors, such as {tensors[odd]}, cannot be merged into it ({error}). "
            "A tensor is missing or has another shape than the config says."
        ) from error


def _renamed(layout: Layout, order: list[str]) -> Layout:
    """The same layout for the tensors of another layer, given in the same order."""
    names = dict(zip(layout.sources, order, strict=True))
    placements = tuple(type(p)(names[p.source], p.index, p.start, p.step, p.rows) for p in layout.placements)
    return Layout(layout.shape, layout.transposed, placements)


def as_list(value: Any) -> list[Tensor]:
    return list(value) if isinstance(value, (list, tuple)) else [value]
