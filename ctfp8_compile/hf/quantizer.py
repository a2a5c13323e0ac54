"""The private transformers quantizer: tells its loader which parameters stay FP8, and how to fill and save them.

The safetensors headers decide what is FP8, the config says the scheme. Every conversion transformers applies while
loading (merging experts, renaming, transposing) is traced once with row numbers (see `layout`), and then done for FP8
parameters by placing rows into one preallocated tensor. Scales never pass through transformers: they are read, checked
and laid out before the first weight is loaded.
"""

from __future__ import annotations

import copy
import re
import warnings
from collections import Counter, defaultdict
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    ConversionOps,
    Interleave,
    MergeModulelist,
    Transpose,
    WeightConverter,
    WeightRenaming,
    WeightTransform,
    dot_natural_key,
    rename_source_key,
    revert_weight_conversion,
)
from transformers.modeling_utils import remove_tied_weights_from_state_dict
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import CompressedTensorsConfig, QuantizationMethod

from ..checkpoint import files as ckpt
from ..checkpoint.layout import Layout, identity, trace
from ..checkpoint.scheme import Schemes
from ..errors import CheckpointError, SchemeError
from ..model.parametrization import Dequantize, attach, quantized_parameters, stored_weight
from ..model.plan import QuantizedParameter, plan, read_scales
from ..ops import FP8

METHOD = "ctfp8"  #: the private name under which transformers finds this quantizer while it loads


@register_quantization_config(METHOD)
class Config(CompressedTensorsConfig):
    """compressed-tensors' config under our name. What is saved says compressed-tensors again."""

    def __init__(self, *args: Any, quant_method: str | None = None, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.quant_method = METHOD


@register_quantizer(METHOD)
class Quantizer(HfQuantizer):
    """Tells transformers' loader which parameters are FP8, and how to fill them."""

    requires_calibration = True
    is_trainable = False
    is_compileable = True

    def __init__(self, quantization_config: Config, **kwargs: Any):
        super().__init__(quantization_config, **kwargs)
        # from here on everybody, the saved config included, sees the stock method
        quantization_config.quant_method = QuantizationMethod.COMPRESSED_TENSORS
        self.schemes = Schemes(quantization_config.quantization_config.model_dump())
        self.plans: dict[str, QuantizedParameter] = {}
        self.scales: dict[str, tuple[Tensor, Tensor | None]] = {}
        self.cache_scales: dict[str, Tensor] = {}

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        return True

    def get_new_dtype(self, converter: Any, param: Any, dtype: torch.dtype | None) -> torch.dtype | None:
        return None if str(param.get_dtype()) == ckpt.FP8_DTYPE else dtype

    def param_element_size(self, model: Any, param_name: str, param: Tensor) -> float:
        return param.element_size()

    def _process_model_before_weight_loading(self, model: Any, checkpoint_files: Any = None, **kwargs: Any) -> None:
        tensors = ckpt.Checkpoint(checkpoint_files or ())
        _refuse_other_formats(tensors, self.schemes)
        declared = model.state_dict()
        with torch.device("cpu"):  # the loader builds models on the meta device; row numbers and scales are real
            for target, layout in _layouts(model, tensors, declared).items():
                self.plans[target] = plan(tensors, self.schemes, layout, declared[target].dtype)
            self.scales = {target: read_scales(tensors, info) for target, info in self.plans.items()}
            self._set_cache_scales_aside(tensors)
        for target, info in self.plans.items():
            path, _, leaf = target.rpartition(".")
            stored = torch.empty(info.layout.shape, dtype=FP8, device="meta")
            model.get_submodule(path)._parameters[leaf] = nn.Parameter(stored, requires_grad=False)
            model.all_tied_weights_keys.pop(target, None)  # the file has its own FP8 copy: not tied to a bf16 one
        # the scales were read above; the loader finds no place for them, which is as it should be
        ours = {r"(^|[._])(weight_scale|input_scale)$", *(rf"^{re.escape(name)}$" for name in self.cache_scales)}
        model._keys_to_ignore_on_load_unexpected = set(model._keys_to_ignore_on_load_unexpected or ()) | ours

    def _set_cache_scales_aside(self, tensors: ckpt.Checkpoint) -> None:
        """Scales of a quantized KV cache are not used here, and written back by `save_pretrained`."""
        used = {name for info in self.plans.values() for name in info.scales}
        used |= {ckpt.scale_name(name) for name in used}
        used |= {ckpt.input_scale_name(name) for info in self.plans.values() for name in info.input_scales}
        names = ckpt.check_leftovers(tensors, used)
        self.cache_scales = tensors.read(names)
        if names or self.schemes.config.kv_cache_scheme is not None:
            scales = f" ({len(names)} scales in the file, such as {names[0]})" if names else ""
            warnings.warn(
                f"the checkpoint was calibrated for a quantized KV cache{scales}; here the cache stays in the model's "
                "dtype, and these scales are not used. save_pretrained keeps them.",
                stacklevel=2,
            )

    def update_weight_conversions(self, weight_conversions: list[Any], model: Any) -> list[Any]:
        conversions = [*weight_conversions, *_per_expert_conversions(model, weight_conversions)]
        return [
            c.copy(
                c._original_source_patterns,
                c._original_target_patterns,
                operations=[_PlaceRows(self.plans, c.operations)],
            )
            if isinstance(c, WeightConverter)
            else c
            for c in conversions
        ]

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        for target, info in self.plans.items():
            path, _, leaf = target.rpartition(".")
            attach(model.get_submodule(path), leaf, info, *self.scales.pop(target))
        for module in model.modules():
            # models ask for this flag to work around weights they cannot read; ours read like any other
            if isinstance(module, PreTrainedModel):
                module.config.__dict__.pop("_is_quantized", None)
        self.take_over_saving(model)
        return model

    def take_over_saving(self, model: Any) -> None:
        """From now on the state dict we give `save_pretrained` is in the checkpoint's names; transformers reverts nothing."""
        self.conversions, model._weight_conversions = getattr(model, "_weight_conversions", None), []

    def get_state_dict_and_metadata(self, model: Any) -> tuple[dict[str, Tensor], dict[str, str]]:
        """What `save_pretrained` writes: FP8 tensors as the checkpoint had them, the rest as transformers would save it."""
        plain = {k: v for k, v in model.state_dict().items() if ".parametrizations." not in f".{k}"}
        plain = remove_tied_weights_from_state_dict(plain, model)
        model._weight_conversions = self.conversions
        try:
            state = revert_weight_conversion(model, plain)
        finally:
            model._weight_conversions = []
        for name, owner, dequantize in quantized_parameters(model):
            weight = stored_weight(owner, name.rpartition(".")[2])
            state |= _checkpoint_tensors(dequantize, weight)
        return state | self.cache_scales, {}


def _checkpoint_tensors(dequantize: Dequantize, weight: Tensor) -> dict[str, Tensor]:
    """Weights and scales of one parameter under the names, shapes and dtypes they had in the checkpoint."""
    info = dequantize.info
    out = {}
    for source, stored in info.scales.items():
        # a copy of its own: tensors that share memory cannot be saved
        out[source] = info.layout.split_weight(weight, source).clone()
        scale = info.layout.split_scale(dequantize.weight_scale, source, info.scheme, stored.shape)
        out[ckpt.scale_name(source)] = scale.to(stored.dtype).clone()
    for source, stored in info.input_scales.items():
        value = dequantize.static_scale(source)
        out[ckpt.input_scale_name(source)] = value.to(stored.dtype).reshape(stored.shape).clone()
    return out


class _PlaceRows(ConversionOps):
    """Fills FP8 parameters by their layout; every other parameter goes through transformers' own operations.

    transformers stacks, then concatenates, which peaks at two copies of a layer's experts; placing rows peaks at one.
    """

    supports_many_to_many = True

    def __init__(self, plans: Mapping[str, QuantizedParameter], operations: list[ConversionOps]):
        self.plans, self.operations = plans, operations
        self.supports_many_to_many = any(op.supports_many_to_many for op in operations)

    def __deepcopy__(self, memo: dict[int, Any]) -> _PlaceRows:
        return _PlaceRows(self.plans, copy.deepcopy(self.operations, memo))

    def convert(
        self,
        input_dict: dict[str, Any],
        source_patterns: list[str],
        target_patterns: list[str],
        full_layer_name: str = "",
        **kwargs: Any,
    ) -> dict[str, Any]:
        targets = {pattern: full_layer_name.replace(target_patterns[0], pattern) for pattern in target_patterns}
        if any(name in self.plans for name in targets.values()):
            return {
                pattern: self._place(self.plans[name], input_dict, source_patterns) for pattern, name in targets.items()
            }
        for operation in self.operations:
            input_dict = operation.convert(
                input_dict, source_patterns=source_patterns, target_patterns=target_patterns,
                full_layer_name=full_layer_name, **kwargs,
            )  # fmt: skip
        return input_dict

    @staticmethod
    def _place(info: QuantizedParameter, collected: dict[str, Any], source_patterns: list[str]) -> Tensor:
        tensors = [t for pattern in source_patterns if pattern in collected for t in _as_list(collected[pattern])]
        return info.layout.weight(dict(zip(info.layout.sources, tensors, strict=True)))

    @property
    def reverse_op(self) -> ConversionOps:
        return _Chain([op.reverse_op for op in reversed(self.operations)])


class _Chain(ConversionOps):
    """Operations run one after the other: how `_PlaceRows` undoes those it wraps."""

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


def _layouts(model: Any, tensors: ckpt.Checkpoint, declared: Mapping[str, Tensor]) -> dict[str, Layout]:
    """For each parameter of the model that the checkpoint holds in FP8: what its rows come from."""
    conversions = get_model_conversion_mapping(model)
    conversions += _per_expert_conversions(model, conversions)
    renamings = [c for c in conversions if isinstance(c, WeightRenaming)]
    converters = [c for c in conversions if isinstance(c, WeightConverter)]
    by_pattern = {pattern: c for c in converters for pattern in c.source_patterns}
    arrivals: dict[str, list[tuple[str, str | None]]] = defaultdict(list)
    for name in sorted(tensors, key=dot_natural_key):
        target, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, declared)
        if target not in declared and name in declared:
            target, pattern = name, None
        if target in declared:
            arrivals[target].append((name, pattern))
    layouts: dict[str, Layout] = {}
    traced: dict[Any, dict[str, Layout]] = {}
    for target, sources in arrivals.items():
        if declared[target].is_floating_point():
            for name, _ in sources:
                ckpt.check_weight(tensors[name])
        pattern = sources[0][1]
        fp8 = [tensors[name].dtype == ckpt.FP8_DTYPE for name, _ in sources]
        if not any(fp8):
            if pattern is not None:  # transformers' own error would name nothing
                empty = {name: torch.empty(tensors[name].shape, device="meta") for name, _ in sources}
                _convert(model, by_pattern[pattern], target, sources, tensors, empty)
            continue
        if not all(fp8):
            raise CheckpointError(
                f"{tensors[sources[fp8.index(False)][0]]} is not FP8, but {tensors[sources[fp8.index(True)][0]]} is, and "
                f"both are part of {target}. Quantize all of them, or none."
            )
        if pattern is None:
            info = tensors[sources[0][0]]
            if len(info.shape) < 2 or info.shape != tuple(declared[target].shape):
                raise CheckpointError(f"{info}: the model declares {target} as {list(declared[target].shape)}.")
            layouts[target] = identity(info.name, info.shape)
            continue
        layouts |= _trace_converter(model, by_pattern[pattern], target, sources, tensors, declared, traced)
    return layouts


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
    # the order in which `_PlaceRows` will see them
    order = [name for pattern in converter.source_patterns for name, p in sources if p == pattern]
    shapes = {name: tensors[name].shape for name in order}
    targets = {p: target.replace(converter.target_patterns[0], p) for p in converter.target_patterns}
    wanted = {name: tuple(declared[name].shape) for name in targets.values() if name in declared}
    key = (id(converter), tuple(shapes.values()), tuple(p for _, p in sources), tuple(wanted.values()))
    if key in traced:
        first = traced[key]
        return {n: _renamed(layout, order) for n, layout in zip(wanted, first.values(), strict=True)}

    def convert(numbers: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        return _convert(model, converter, target, sources, tensors, numbers)

    result = trace(shapes, wanted, convert)
    traced[key] = {name: result[name] for name in wanted}
    return traced[key]


def _convert(
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
        return {k: _as_list(v)[0] for k, v in probe.convert(target, model=model, config=model.config).items()}
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


def _per_expert_conversions(model: Any, conversions: list[WeightTransform]) -> list[WeightConverter]:
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
    transpose: list[ConversionOps] = [Transpose(1, 2)] if getattr(experts, "is_transposed", False) else []
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


def _refuse_other_formats(tensors: ckpt.Checkpoint, schemes: Schemes) -> None:
    """INT4 and other packed formats, INT8, and MXFP8, whose weights are float8 but whose scales are exponents."""
    found: dict[str, ckpt.TensorInfo] = {}
    for name, info in tensors.items():
        module, _, leaf = name.rpartition(".")
        if (
            leaf == "weight_packed"
            or (leaf == "weight" and info.dtype in ("I8", "U8"))
            or (leaf == "weight_scale" and info.dtype == "U8")
        ):
            found[module] = info
    if found:
        groups = sorted({schemes.describe(module) for module in found})
        more = f" and {len(found) - 1} more" if len(found) > 1 else ""
        raise SchemeError(
            f"{next(iter(found.values()))}{more}: quantized in another format than FP8, {' and '.join(groups)}; only "
            "float8_e4m3fn weights with float scales are supported. Load the checkpoint with transformers."
        )


def _as_list(value: Any) -> list[Tensor]:
    return list(value) if isinstance(value, (list, tuple)) else [value]
