"""The private transformers quantizer: tells its loader which parameters stay FP8, and how to fill and save them.

The safetensors headers decide what is FP8, the config says the scheme. Scales never pass through transformers: they are
read, checked and placed before the first weight is loaded. What becomes of rows is in `conversions`.
"""

from __future__ import annotations

import copy
import math
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..checkpoint import files as ckpt
from ..checkpoint.packed import PackedParameter, PackedWeight, find, seen_as_weights, sentence
from ..checkpoint.scheme import Schemes
from ..checkpoint.shard import Cuts
from ..checkpoint.transforms import check_named, is_matrix, read_transforms
from ..errors import CheckpointError, SchemeError, UsageError
from ..model import rotation
from ..model.parametrization import Dequantize, attach, quantized_parameters, stored_weight
from ..model.plan import QuantizedParameter, plan, read_scales
from ..model.ranks import is_first
from ..ops import FP8
from .compat import (
    HfQuantizer,
    QuantizationConfigMixin,
    WeightConverter,
    WeightRenaming,
    register_quantization_config,
    register_quantizer,
    remove_tied_weights_from_state_dict,
    revert_weight_conversion,
)
from .conversions import PlaceRows, layouts, modules, per_expert_conversions
from .parallel import check_heads, cut, gather, gather_quantized, is_distributed, localize, warn_of_cut_blocks
from .parallel_styles import mark_local, rewrite_plan
from .rotated_attention import rotate_attention

#: Values of other formats take the weight's name, and so its way through all of the model's conversions.
_PACKED_ARE_WEIGHTS = WeightRenaming(r"\.weight_packed$", ".weight")

METHOD = "ctfp8"  #: the private name under which transformers finds this quantizer while it loads


@register_quantization_config(METHOD)
class Config(QuantizationConfigMixin):
    """A checkpoint's quantization config, of any format, under our name. What is saved is the one that was read."""

    def __init__(self, stored: Mapping[str, Any], strict: bool = False, **kwargs: Any):
        self.quant_method = METHOD
        self.stored = stored
        self.strict = strict

    @classmethod
    def of(cls, stored: Mapping[str, Any], strict: bool) -> dict[str, Any]:
        """What to put in a model's config so that transformers makes one of these of it."""
        return {"quant_method": METHOD, "stored": dict(stored), "strict": strict}

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
        # from here on everybody sees the stock method
        quantization_config.quant_method = self.schemes.format.name
        self.plans: dict[str, QuantizedParameter] = {}
        #: Of a mixed file, by name, the parameters in other formats than FP8.
        self.packed: dict[str, PackedParameter] = {}
        self.scales: dict[str, tuple[Tensor, Tensor | None]] = {}
        self.cache_scales: dict[str, Tensor] = {}
        #: Of a rotated checkpoint, the transforms of activations.
        self.transforms = read_transforms(self.schemes.format.config)
        #: On several ranks, by name, the whole shape of each parameter that was cut, and how.
        self.cuts: dict[str, tuple[tuple[int, ...], Cuts]] = {}

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        return True

    def get_new_dtype(self, converter: Any, param: Any, dtype: torch.dtype | None) -> torch.dtype | None:
        stored = str(param.get_dtype())
        return None if stored == ckpt.FP8_DTYPE or not stored.startswith(("F", "BF")) else dtype

    def param_element_size(self, model: Any, param_name: str, param: Tensor) -> float:
        if param_name in self.packed:  # what it takes once decompressed
            info = self.packed[param_name]
            return math.prod(info.layout.shape) * info.dtype.itemsize / param.numel()
        return param.element_size()

    def _process_model_before_weight_loading(self, model: Any, checkpoint_files: Any = None, **kwargs: Any) -> None:
        if is_distributed(model):
            check_heads(model)
            mark_local(model)
        files = tuple(map(Path, checkpoint_files or ()))
        tensors = ckpt.Checkpoint(files, self.schemes.format.suffixes)
        declared = model.state_dict()
        stored: dict[str, Tensor] = {}
        with torch.device("cpu"):  # the loader builds models on the meta device; row numbers and scales are real
            packed = find(tensors, self.schemes)
            tensors = seen_as_weights(tensors, packed)
            for target, layout in layouts(model, tensors, declared).items():
                dtype = declared[target].dtype
                if tensors[layout.sources[0]].dtype == ckpt.PACKED:
                    info = self.packed[target] = PackedParameter.of(target, layout, dtype, packed)
                    stored[target] = torch.empty(info.packed_layout.shape, dtype=info.packed_dtype, device="meta")
                else:
                    self.plans[target] = plan(tensors, self.schemes, layout, dtype)
                    stored[target] = torch.empty(layout.shape, dtype=FP8, device="meta")
            if packed:
                self._accept_packed(model, packed)
            self.scales = {target: read_scales(tensors, info) for target, info in self.plans.items()}
            self.others = {target: info.read(tensors) for target, info in self.packed.items()}
            self._set_cache_scales_aside(tensors)
            self._place_transforms(model, tensors, declared)
        self.files = files
        for target, tensor in stored.items():
            path, _, leaf = target.rpartition(".")
            model.get_submodule(path)._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)
            model.all_tied_weights_keys.pop(target, None)  # the file has its own copy: not tied to a bf16 one
        # the scales were read above; the loader finds no place for them, which is as it should be
        leaves = {leaf for weight in packed.values() for leaf in weight.parts} - {"weight", "weight_packed"}
        endings = "|".join(map(re.escape, {"weight_scale", "input_scale", *self.schemes.format.suffixes, *leaves}))
        ours = {
            rf"(^|[._])({endings})$",
            *(rf"^{re.escape(name)}$" for name in (*self.cache_scales, *self.matrix_names)),
        }
        model._keys_to_ignore_on_load_unexpected = set(model._keys_to_ignore_on_load_unexpected or ()) | ours

    def update_parallel_plan(self, model: Any, plan: dict[str, str]) -> None:
        if is_distributed(model):
            rewrite_plan(model, plan, {target for target, info in self.plans.items() if info.layout.transposed})

    def _accept_packed(self, model: Any, packed: Mapping[str, PackedWeight]) -> None:
        """Says what weights in other formats than FP8 cost, or refuses them."""
        what = sentence(packed.values(), model.dtype)
        if self.strict or not self.plans:
            why = "strict=True refuses that" if self.strict else "there is no FP8 weight beside them"
            raise SchemeError(f"{what}; {why}. Load the checkpoint with transformers.")
        if is_distributed(model):
            raise UsageError(f"{what}; with a distributed_config that is not supported. Load it on one device.")
        warnings.warn(f"{what}.", stacklevel=2)

    def _set_cache_scales_aside(self, tensors: ckpt.Checkpoint) -> None:
        """Scales of a quantized KV cache are for `fp8_cache`, and written back by `save_pretrained`."""
        used = {name for info in self.plans.values() for name in info.scales}
        used |= {ckpt.scale_name(name) for name in used}
        used |= {ckpt.input_scale_name(name) for info in self.plans.values() for name in info.input_scales}
        names = ckpt.check_leftovers(tensors, used)
        self.cache_scales = tensors.read(names)
        if names or self.schemes.config.kv_cache_scheme is not None:
            scales = f" ({len(names)} scales in the file, such as {names[0]})" if names else ""
            warnings.warn(
                f"the checkpoint was calibrated for a quantized KV cache{scales}; ctfp8.static_cache and "
                "ctfp8.dynamic_cache keep it in FP8; transformers' own caches stay in the model's dtype.",
                stacklevel=2,
            )

    def _place_transforms(self, model: Any, tensors: ckpt.Checkpoint, declared: Mapping[str, Tensor]) -> None:
        """Decides where transforms of activations are applied, and reads their matrices: they are not for the loader."""
        check_named(tensors, self.transforms)
        if self.transforms and is_distributed(model):
            raise UsageError(
                f"the checkpoint has transforms of activations ({self.transforms[0]}), which a distributed_config would "
                "cut; that is not supported. Load it on one device."
            )
        known = modules(model, tensors, declared) if self.transforms else []
        apart = {source for _, source in known}
        layouts_found = [*(p.layout for p in self.plans.values()), *(p.layout for p in self.packed.values())]
        of_merged = {source for layout in layouts_found for source in layout.sources}
        for name in sorted(of_merged | {name for name in tensors if ".experts." in name}):
            module = name.removesuffix(".weight")
            for transform in self.transforms:
                if name.endswith(".weight") and module not in apart and transform.covers(module, ("Linear", "Module")):
                    raise SchemeError(
                        f"{tensors[name]}: transform {transform} is for this expert, which the model keeps in one tensor "
                        "with others; that is not supported. Serve this checkpoint with vLLM, or quantize the model again with "
                        "the experts in the transform's ignore list."
                    )
        self.placed = rotation.place(model, self.transforms, tensors, known)
        self.matrices = rotation.read(tensors, self.placed)
        self.matrix_names = [name for name in tensors if is_matrix(name, tensors)]

    def update_weight_conversions(self, weight_conversions: list[Any], model: Any) -> list[Any]:
        conversions = [*weight_conversions, *per_expert_conversions(model, weight_conversions)]
        placed = {target: info.layout for target, info in self.plans.items()}
        placed |= {target: info.packed_layout for target, info in self.packed.items()}
        return [
            *([_PACKED_ARE_WEIGHTS] if self.packed else []),
            *(
                c.copy(
                    c._original_source_patterns,
                    c._original_target_patterns,
                    operations=[PlaceRows(placed, c.operations)],
                )
                if isinstance(c, WeightConverter)
                else c
                for c in conversions
            ),
        ]

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        elsewhere = [
            target for target in (*self.plans, *self.packed) if model.get_parameter(target).device.type == "meta"
        ]
        if elsewhere:
            raise UsageError(
                f"{elsewhere[0]} is to stay on disk ({len(elsewhere)} quantized weights in all), which is not supported: they "
                "are kept on a device or in memory. Give device_map or max_memory room for them."
            )
        if is_distributed(model):
            self.cuts = localize(model)
        for target, info in self.plans.items():
            path, _, leaf = target.rpartition(".")
            scales = self.scales.pop(target)
            local = cut(info, *scales, self.cuts[target][1]) if target in self.cuts else (info, *scales)
            attach(model.get_submodule(path), leaf, *local)
        for target, packed in self.packed.items():
            path, _, leaf = target.rpartition(".")
            value = packed.value(model.get_parameter(target).data, self.others.pop(target))
            model.get_submodule(path)._parameters[leaf] = nn.Parameter(value, requires_grad=False)
        rotation.attach(model, self.placed, self.matrices)
        rotate_attention(model, self.placed)
        self.matrices = {}
        warn_of_cut_blocks(model)
        for module in model.modules():
            # models ask for this flag to work around weights they cannot read; ours read like any other
            if isinstance(module, PreTrainedModel):
                module.config.__dict__.pop("_is_quantized", None)
        self.take_over_saving(model)
        return model

    def take_over_saving(self, model: Any) -> None:
        """From now on the state dict we give `save_pretrained` is in the checkpoint's names; transformers reverts nothing."""
        conversions = getattr(model, "_weight_conversions", None)
        self.conversions = conversions and [c for c in conversions if c is not _PACKED_ARE_WEIGHTS]
        model._weight_conversions = []

    def get_state_dict_and_metadata(self, model: Any) -> tuple[dict[str, Tensor], dict[str, str]]:
        """What `save_pretrained` writes: FP8 tensors as the checkpoint had them, the rest as transformers would save it."""
        state = model.state_dict()
        rotated = {f"{name}.{leaf}" for name, _, _ in rotation.rotations(model) for leaf in ("weight", "perm")}
        plain = {
            k: v
            for k, v in state.items()
            if ".parametrizations." not in f".{k}" and k not in rotated and k not in self.packed
        }
        plain = remove_tied_weights_from_state_dict(plain, model)
        plain = {k: gather(v, *self.cuts[k]) if k in self.cuts else v for k, v in plain.items()}
        writes = not self.cuts or is_first()
        model._weight_conversions = self.conversions
        try:
            state = revert_weight_conversion(model, plain) if writes else {}
        finally:
            model._weight_conversions = []
        for name, owner, dequantize in quantized_parameters(model):
            weight = stored_weight(owner, name.rpartition(".")[2])
            if name in self.cuts:
                weight, dequantize = gather_quantized(weight, dequantize, self.plans[name])
            if writes:
                state |= _checkpoint_tensors(dequantize, weight)
        state |= self._packed_tensors(model)
        return (state | self.cache_scales | rotation.stored_tensors(model) if writes else {}), {}

    def _packed_tensors(self, model: Any) -> dict[str, Tensor]:
        """What the file has in other formats than FP8, read from it again: dequantized, they do not give back the same bits.

        Raises:
            UsageError: the file is not there any more, or a value is not what it says.
        """
        if not self.packed:
            return {}
        try:
            tensors = ckpt.Checkpoint(self.files)
            out: dict[str, Tensor] = {}
            for target, info in self.packed.items():
                parts = {
                    name: {leaf: tensors.read_stored(part) for leaf, part in weight.parts.items()}
                    for name, weight in info.weights.items()
                }
                value = info.value(info.packed(parts), parts)
                if not torch.equal(value, model.get_parameter(target).to(value.device)):
                    raise UsageError(
                        f"{target} was decompressed and has changed since, so that it cannot be saved as it was read. Load the "
                        "checkpoint with ctfp8.from_pretrained(..., dequantize=True) to change weights."
                    )
                for name, weight in info.weights.items():
                    out |= {part.name: parts[name][leaf].clone() for leaf, part in weight.parts.items()}
        except (CheckpointError, SafetensorError) as error:
            raise UsageError(
                f"{len(self.packed)} weights were decompressed while loading, and are saved as their file has them; it has "
                f"changed since ({error}). Load the checkpoint again."
            ) from error
        return out


def _checkpoint_tensors(dequantize: Dequantize, weight: Tensor) -> dict[str, Tensor]:
    """Weights and scales of one parameter under the names, shapes and dtypes they had in the checkpoint."""
    info = dequantize.info
    out = {}
    for source, stored in info.scales.items():
        # a copy of its own: tensors that share memory cannot be saved
        out[source] = info.layout.split_weight(weight, source).clone()
        scale = info.layout.split_scale(dequantize.weight_scale, source, info.scheme, stored.shape)
        out[stored.name] = ckpt.encode_scale(scale, stored.dtype).clone()
    for source, stored in info.input_scales.items():
        out[stored.name] = dequantize.static_scale(source).clone()
    return out
