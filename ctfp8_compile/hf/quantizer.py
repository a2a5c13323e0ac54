"""The private transformers quantizer: tells its loader which parameters stay FP8, and how to fill and save them.

The safetensors headers decide what is FP8, the config says the scheme. Scales never pass through transformers: they are
read, checked and placed before the first weight is loaded. What becomes of rows is in `conversions`.
"""

from __future__ import annotations

import copy
import itertools
import math
import re
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..checkpoint import files as ckpt
from ..checkpoint.folder import of_files
from ..checkpoint.layout import Turned
from ..checkpoint.leftovers import leftovers
from ..checkpoint.mtp import mtp_patterns
from ..checkpoint.notes import Notes
from ..checkpoint.packed import PackedParameter, PackedWeight, find, seen_as_weights, sentence
from ..checkpoint.scheme import Schemes, heads_of
from ..checkpoint.shard import Cuts
from ..checkpoint.source import Source
from ..checkpoint.transforms import check_named, is_matrix, read_transforms
from ..counted import counted
from ..errors import Ctfp8Error, SchemeError, UsageError
from ..model import rotation
from ..model.mixed import MixedParameter
from ..model.mixed import sentence as mixed_sentence
from ..model.plan import QuantizedParameter, read_scales
from ..model.planned import Planned
from ..ops import FP8
from .cache_scales import CacheScales, cache_sentence, read_cache_scales
from .cache_shapes import cache_shapes
from .compat import (
    HfQuantizer,
    QuantizationConfigMixin,
    WeightConverter,
    WeightRenaming,
    get_model_conversion_mapping,
    register_quantization_config,
    register_quantizer,
)
from .conversions import (
    Arrivals,
    arrivals,
    check_absent,
    layouts,
    merged,
    modules,
    per_expert_conversions,
    takes,
)
from .embeddings import attach_tied, embedding_names, leave_tied, tie_absent_head, untie
from .filling import Filling, PlaceRows, for_single_tensors
from .origin import Origin
from .parallel import check_heads, cut, is_distributed, localize, warn_of_cut_blocks
from .parallel_styles import mark_local, rewrite_plan
from .parts import Parts
from .rotated_attention import rotate_attention
from .saving import whole_state
from .text_part import part_renamings

_STALE = "not_in_the_index"


def _hidden(names: tuple[str, ...]) -> Any:
    """Keeps the loader from tensors of a file that the index does not name: none of the model's parameters is called so."""
    return WeightRenaming(f"^(?:{'|'.join(map(re.escape, names))})$", _STALE)


METHOD = "ctfp8"  #: the private name under which transformers finds this quantizer while it loads


@register_quantization_config(METHOD)
class Config(QuantizationConfigMixin):
    """A checkpoint's quantization config, of any format, under our name. What is saved is the one that was read."""

    def __init__(self, stored: Mapping[str, Any], strict: bool = False, tied: bool = False, **kwargs: Any):
        self.quant_method = METHOD
        self.stored = stored
        self.strict = strict
        self.tied = tied

    @classmethod
    def of(cls, stored: Mapping[str, Any], strict: bool, tied: bool = False) -> dict[str, Any]:
        """What to put in a model's config so that transformers makes one of these of it.

        Args:
            tied: whether the config, at its top, ties the head to the table of embeddings.
        """
        return {"quant_method": METHOD, "stored": dict(stored), "strict": strict, "tied": tied}

    def to_dict(self) -> dict[str, Any]:
        return copy.deepcopy(dict(self.stored))

    def to_diff_dict(self) -> dict[str, Any]:
        return self.to_dict()


@register_quantizer(METHOD)
class Quantizer(HfQuantizer):
    """Tells transformers' loader which parameters are FP8, and how to fill them."""

    requires_calibration = True
    is_trainable = True  # of adapters; the model itself refuses (`model.freeze`)
    is_compileable = True

    def __init__(self, quantization_config: Config, **kwargs: Any):
        super().__init__(quantization_config, **kwargs)
        self.schemes = Schemes(quantization_config.stored)
        self.strict = quantization_config.strict
        self.tied = quantization_config.tied
        # from here on everybody sees the stock method
        quantization_config.quant_method = self.schemes.format.name
        #: What is a weight under another name takes the weight's, and so its way through all of the model's conversions.
        weights = {".weight_packed": ".weight", **self.schemes.format.weights}
        self.renamings = [WeightRenaming(rf"{re.escape(theirs)}$", ours) for theirs, ours in weights.items()]
        self.own_conversions: list[Any] = []
        #: What a text model needs to find its tensors in a larger model's file.
        self.part: list[WeightRenaming] = []
        #: What the model was loaded from; None: nobody knows.
        self.origin: Origin | None = None
        #: Whether only what is beside the tensors is being written, see `saving`.
        self.writes = False
        #: The config that was read, and which parts of it held ours: `configs.Holders`.
        self.holders: Any = None
        self.plans: dict[str, QuantizedParameter] = {}
        #: Of a mixed file, by name, the parameters in other formats than FP8.
        self.packed: dict[str, PackedParameter] = {}
        #: Of those, their tensors beside the packed values.
        self.others: dict[str, dict[str, dict[str, Tensor]]] = {}
        #: By name, the parameters whose parts are stored in different ways.
        self.mixed: dict[str, MixedParameter] = {}
        self.scales: dict[str, tuple[Tensor, Tensor | None]] = {}
        self.cache_scales: dict[str, Tensor] = {}
        #: Of a rotated checkpoint, the transforms of activations.
        self.transforms = read_transforms(self.schemes.format.config)
        #: Where in the model they are.
        self.placed: list[rotation.Placed] = []
        #: What they say.
        self.cache = CacheScales()
        #: Of the file, by its names, what no weight uses: saved as it was.
        self.unused: dict[str, Tensor] = {}
        #: On several ranks, by name, the whole shape of each parameter that was cut, and how.
        self.cuts: dict[str, tuple[tuple[int, ...], Cuts]] = {}
        #: What this rank has, while it loads.
        self.parts: Parts | None = None
        #: What was raised while it did.
        self.faults: list[Ctfp8Error] = []

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        return True

    def update_dtype(self, dtype: torch.dtype) -> torch.dtype:
        return torch.bfloat16 if dtype.itemsize == 1 else dtype  # of what is not quantized

    def get_new_dtype(self, converter: Any, param: Any, dtype: torch.dtype | None) -> torch.dtype | None:
        stored = str(param.get_dtype())
        return None if stored == ckpt.FP8_DTYPE or not stored.startswith(("F", "BF")) else dtype

    def param_element_size(self, model: Any, param_name: str, param: Tensor) -> float:
        if param_name in self.packed:  # what it takes once dequantized
            info = self.packed[param_name]
            return math.prod(info.layout.shape) * info.dtype.itemsize / param.numel()
        return param.element_size()

    def _process_model_before_weight_loading(self, model: Any, checkpoint_files: Any = None, **kwargs: Any) -> None:
        if is_distributed(model):
            check_heads(model)
            mark_local(model)
        notes = Notes()
        self.schemes.heads = heads_of(model.config.to_dict())
        declared = model.state_dict()
        folder = of_files(checkpoint_files or (), notes, declared)
        stock, prefix = get_model_conversion_mapping(model), model.base_model_prefix
        check_absent(folder.absent, takes(model, declared, part_renamings(folder.absent, declared, prefix, stock)))
        tensors = folder.open(self.schemes.format)
        self.stale = folder.stale
        if checkpoint_files is not None:  # the loader's own list: it reads them in this order, and keeps the last copy
            checkpoint_files[:] = map(str, folder.files)
        source = Source.of(tensors)
        with torch.device("cpu"):  # the loader builds models on the meta device; row numbers and scales are real
            packed = find(tensors, self.schemes)
            tensors = seen_as_weights(tensors, packed)
            self.part = part_renamings(tensors, declared, prefix, stock)
            arrived = arrivals(model, tensors, declared, self.part)
            self.origin = Origin(source, folder, tensors.headers(), declared, arrived)
            if self.tied:
                tie_absent_head(model, set(arrived.targets()))
            found = layouts(model, tensors, declared, arrived)
            self.schemes.embeddings |= embedding_names(model, found)
            planned = Planned.of(found, declared, tensors, self.schemes, packed, notes)
            self.plans, self.packed, self.mixed = planned.fp8, planned.packed, planned.mixed
            if packed:
                self._accept_packed(model, packed)
            self.scales = {target: read_scales(tensors, info) for target, info in self.plans.items()}
            self.others = {target: info.read(tensors) for target, info in self.packed.items()}
            self._set_leftovers_aside(model, tensors, planned.used, takes(model, declared, self.part), notes)
            self._place_transforms(model, tensors, arrived)
            if self.mixed:
                self._accept_mixed(model)
            notes.say(self.strict)
        self._declare(model, declared)
        untie(model, self.plans, tensors)
        # the scales were read above; the loader finds no place for them, which is as it should be
        leaves = {part.name.rpartition(".")[2] for weight in packed.values() for part in weight.parts.values()}
        leaves |= {info.name.rpartition(".")[2] for name, info in tensors.items() if name.endswith("_scale")}
        endings = "|".join(map(re.escape, leaves - {"weight", "weight_packed"}))
        ours = {
            _STALE,
            rf"(^|[.])({endings})$",
            *(rf"^{re.escape(name)}$" for name in (*self.cache_scales, *self.unused, *self.matrix_names)),
        }
        ours |= mtp_patterns(tensors)  # read when something is drafted
        model._keys_to_ignore_on_load_unexpected = set(model._keys_to_ignore_on_load_unexpected or ()) | ours

    def _declare(self, model: Any, declared: Mapping[str, Tensor]) -> None:
        """Puts an empty parameter, of what is read for it, in place of each that is quantized in the files."""
        if is_distributed(model):  # as the plan has them; packed values are dequantized as soon as they are read
            stored = {target: (tuple(declared[target].shape), FP8) for target in self.plans}
            stored |= {target: (tuple(declared[target].shape), info.dtype) for target, info in self.packed.items()}
            fp8 = {target: info.layout for target, info in self.plans.items()}
            turned = (target for target, layout in fp8.items() if isinstance(layout, Turned))
            self.parts = Parts(model, fp8, (*turned, *self.packed, *self.mixed))
        else:
            stored = {target: (info.layout.shape, FP8) for target, info in self.plans.items()}
            stored |= {target: (info.packed_layout.shape, info.packed_dtype) for target, info in self.packed.items()}
        for target, (shape, dtype) in stored.items():
            path, _, leaf = target.rpartition(".")
            model.get_submodule(path)._parameters[leaf] = nn.Parameter(
                torch.empty(shape, dtype=dtype, device="meta"), requires_grad=False
            )
            model.all_tied_weights_keys.pop(target, None)  # the file has its own copy: not tied to a bf16 one

    def update_parallel_plan(self, model: Any, plan: dict[str, str]) -> None:
        if is_distributed(model):
            rewrite_plan(model, plan)

    def _accept_packed(self, model: Any, packed: Mapping[str, PackedWeight]) -> None:
        """Says what weights in other formats than FP8 cost, or refuses them."""
        what = sentence(packed.values(), model.dtype)
        shifted = any(weight.packed.dtype == ckpt.FP8_DTYPE for weight in packed.values())
        if self.strict or not (self.plans or self.mixed or shifted):
            if self.strict:
                raise SchemeError(f"{what}; strict=True refuses that. Leave it out to have them dequantized.")
            raise SchemeError(
                f"{what}; there is no FP8 weight beside them, and so nothing for ctfp8 to do. Load the checkpoint with "
                "transformers or vLLM."
            )
        warnings.warn(f"{what}.", stacklevel=2)

    def _accept_mixed(self, model: Any) -> None:
        """Says what parameters of unlike parts cost, or refuses them."""
        what = mixed_sentence(self.mixed)
        if self.strict:
            raise SchemeError(f"{what}; strict=True refuses that. Leave it out.")
        warnings.warn(f"{what}.", stacklevel=2)

    def _set_leftovers_aside(
        self, model: Any, tensors: ckpt.Checkpoint, used: set[str], taken: Callable[[str], bool], notes: Notes
    ) -> None:
        """Scales of a quantized KV cache are for `fp8_cache`; they, and what is superfluous, are written back when saving."""
        found = leftovers(tensors, used, notes, taken)
        self.cache_scales = tensors.read(found.cache)
        self.unused = {tensors[name].name: tensors.read_stored(tensors[name]) for name in found.unused}
        layers = getattr(model.config.get_text_config(decoder=True), "num_hidden_layers", 0)
        heads = [None if shape is None else shape.heads for shape in cache_shapes(model, layers)] if found.cache else []
        self.cache = read_cache_scales(
            tensors, found.cache, self.schemes.config, lambda i: heads[i] if i < len(heads) else None
        )
        if sentence := cache_sentence(self.cache, found.cache):
            warnings.warn(sentence, stacklevel=2)

    def _place_transforms(self, model: Any, tensors: ckpt.Checkpoint, arrived: Arrivals) -> None:
        """Decides where transforms of activations are applied, and reads their matrices: they are not for the loader."""
        check_named(tensors, self.transforms)
        if self.transforms and is_distributed(model):
            raise UsageError(
                f"the checkpoint has transforms of activations ({self.transforms[0]}), which a distributed_config would "
                "cut; that is not supported. Load it on one device."
            )
        for transform, name in itertools.product(self.transforms, merged(arrived)):
            if name.endswith(".weight") and transform.covers(name.removesuffix(".weight"), ("Linear", "Module")):
                raise SchemeError(
                    f"{tensors[name]}: transform {transform} is for this expert, which the model keeps in one tensor "
                    "with others; that is not supported. Serve this checkpoint with vLLM, or quantize the model again with "
                    "the experts in the transform's ignore list."
                )
        self.placed = rotation.place(model, self.transforms, tensors, modules(model, arrived))
        self.matrices = rotation.read(tensors, self.placed)
        self.matrix_names = [name for name in tensors if is_matrix(name, tensors)]

    def update_weight_conversions(self, weight_conversions: list[Any], model: Any) -> list[Any]:
        conversions = [*weight_conversions, *self.part, *per_expert_conversions(model, weight_conversions)]
        filling = self._filling()
        self.faults = filling.faults
        own = for_single_tensors(filling)
        self.own_conversions = [*self.renamings, *own]
        return [
            *self.renamings,
            *([_hidden(self.stale)] if self.stale else []),
            *(
                c.copy(
                    c._original_source_patterns,
                    c._original_target_patterns,
                    operations=[PlaceRows(filling, c.operations)],
                    force_cpu=c.force_cpu or filling.on_cpu,
                )
                if isinstance(c, WeightConverter)
                else c
                for c in conversions
            ),
            *own,
        ]

    def _filling(self) -> Filling:
        """What the loader is to do for parameters that are not plain."""
        layouts = {target: info.layout for target, info in self.plans.items()}
        made = {target: (info.layout.sources, info.value) for target, info in self.mixed.items()}
        if self.parts is None:
            layouts |= {target: info.packed_layout for target, info in self.packed.items()}
        else:
            for target, info in self.packed.items():
                made[target] = (info.layout.sources, partial(info.merged, others=self.others[target]))
        return Filling(layouts, made, self.parts)

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        if self.faults:
            raise self.faults[0]
        elsewhere = [
            target for target in (*self.plans, *self.packed) if model.get_parameter(target).device.type == "meta"
        ]
        if elsewhere:
            raise UsageError(
                f"{elsewhere[0]} is to stay on disk ({counted(len(elsewhere), 'quantized weight')} in all), which is "
                "not supported: they "
                "are kept on a device or in memory. Give device_map or max_memory room for them."
            )
        if is_distributed(model):
            assert self.parts is not None
            self.cuts = localize(model) | self.parts.cuts
            self.parts.end()
        shards = {} if self.parts is None else self.parts.shards
        for target, info in self.plans.items():
            path, _, leaf = target.rpartition(".")
            scales = self.scales.pop(target)
            local = cut(info, *scales, shards[target]) if target in shards else (info, *scales)
            attach_tied(model, target, *local, self.schemes)
        leave_tied(model, self.plans)
        for target, packed in self.packed.items():
            if self.parts is None:  # else it was, when it was read
                path, _, leaf = target.rpartition(".")
                value = packed.value(model.get_parameter(target).data, self.others.pop(target))
                model.get_submodule(path)._parameters[leaf] = nn.Parameter(value, requires_grad=False)
        self.others = {}
        rotation.attach(model, self.placed, self.matrices)
        rotate_attention(model, self.placed)
        self.matrices = {}
        warn_of_cut_blocks(model)
        for module in model.modules():
            # models ask for this flag to work around weights they cannot read; ours read like any other
            if isinstance(module, PreTrainedModel):
                module.config.__dict__.pop("_is_quantized", None)
        self.take_over_saving(model)
        if self.origin is not None:
            self.origin.keep_computed(model)
        return model

    def take_over_saving(self, model: Any) -> None:
        """From now on the state dict we give `save_pretrained` is in the checkpoint's names; transformers reverts nothing."""
        conversions = getattr(model, "_weight_conversions", None)
        ours = self.own_conversions
        self.conversions = conversions and [
            c for c in conversions if not any(c is r for r in ours) and _STALE not in c.target_patterns
        ]
        model._weight_conversions = []

    def get_state_dict_and_metadata(self, model: Any) -> tuple[dict[str, Tensor], dict[str, str]]:
        """What transformers' own `save_pretrained` writes: nothing while ours does, see `saving`."""
        if self.writes:
            return {}, {}
        return whole_state(model, self), {}
