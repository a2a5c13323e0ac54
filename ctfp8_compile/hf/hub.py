"""Loading and saving through transformers. Its loader does the work; `quantizer` tells it what stays FP8."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import nn

from ..checkpoint import files as ckpt
from ..checkpoint.folder import Folder, of_folder
from ..checkpoint.layout import identity
from ..checkpoint.leftovers import leftovers, used_names
from ..checkpoint.notes import Notes
from ..checkpoint.packed import is_shifted
from ..checkpoint.place import is_folder
from ..checkpoint.scheme import Schemes
from ..errors import CheckpointError, UsageError
from ..inductor import recipe
from ..model.freeze import dequantize_, freeze
from ..model.parametrization import attach
from ..model.plan import plan, read_scales
from ..model.ranks import together
from ..model.storage import detach_from_mmap
from ..ops import FP8
from ..paused_gc import paused_gc
from . import consolidated, drafts, mtp, paged
from .configs import Holders, private_config, settle_dtype
from .model_class import class_of, named_class
from .origin import of_stock
from .parallel import take_config
from .quantizer import Config, Quantizer
from .rotated_attention import unrotate_attention
from .saving import SavesAsRead


@paused_gc()
def from_pretrained(
    path_or_id: str | Path,
    auto_class: Any = None,
    dequantize: bool = False,
    in_memory: bool = False,
    strict: bool = False,
    compile: bool | dict[str, Any] = False,
    **transformers_kwargs: Any,
) -> Any:
    """Loads an FP8 checkpoint with its weights, MoE experts included, left in float8_e4m3fn.

    Its quant_method is compressed-tensors, fp8 (DeepSeek, Qwen), fbgemm_fp8 or modelopt.

    Args:
        path_or_id: a checkpoint folder or a hub id.
        auto_class: which transformers class loads it: an `AutoModelFor…` or a model class. By default what config.json names
            (`architectures`); of a vision-language model, the class of its text part, if there is one.
        dequantize: return a plain model in `dtype` instead (weights bit-exact with compressed-tensors' dequantize).
        in_memory: copy all weights into this process's memory before returning, not when the model first runs. Until they
            are copied, a file that another process truncates or overwrites changes the model or ends the process.
        strict: refuse what is otherwise loaded with a warning: weights in other formats than FP8 (INT8, packed INT4, NVFP4),
            which compressed-tensors' own code dequantizes; parameters whose parts are stored in different ways, which become
            `dtype`; files that their quantization_config or their index do not fit, which are read as they are.
        compile: also do what `ctfp8.compile(model)` does, with a dict of its arguments if one is given.
        **transformers_kwargs: as for `auto_class.from_pretrained`: `dtype`, `device_map`, `attn_implementation`, ….
            `quantization_config`, of a file that has none, says how it is quantized; without one the shapes of scales do.
            `dtype` is what FP8 weights dequantize to and what the other weights are loaded in. With
            `distributed_config=DistributedConfig(tp_size=N)`, on N processes started by torchrun, each has a part.

    Returns:
        The transformers model, in eval mode, no parameter requiring a gradient.

    Raises:
        CheckpointError: a file is damaged or incomplete; names the tensor. Nothing is ever initialised at random.
        SchemeError: the config is of no FP8 format we know, or does not cover an FP8 weight.
    """
    with_info = transformers_kwargs.pop("output_loading_info", False)
    distributed = take_config(transformers_kwargs, dequantize)
    model, info, holders = _load(path_or_id, auto_class, strict, distributed, transformers_kwargs)
    holders.put_back(model.config)
    model.hf_quantizer.holders = holders
    freeze(model, SavesAsRead)
    mtp.remember(model, dequantize)
    drafts.watch(model)
    paged.watch(model)
    if in_memory:
        detach_from_mmap((*model.parameters(), *model.buffers()))
    if dequantize:
        unrotate_attention(model)
        dequantize_(model)
        model.hf_quantizer.remove_quantization_config(model)
        holders.take_away(model.config)
    if compile is not False:
        recipe.compile(model, **({} if compile is True else compile))
    return (model, info) if with_info else model


def _load(
    path_or_id: str | Path, auto_class: Any, strict: bool, distributed: Any, transformers_kwargs: dict[str, Any]
) -> tuple[Any, dict[str, Any], Holders]:
    """The model as transformers loads it with our quantizer, its loading info, and who held its quantization_config."""
    with together(distributed is not None):
        folder = Path(path_or_id)
        files = None
        if is_folder(path_or_id) and "variant" not in transformers_kwargs and "subfolder" not in transformers_kwargs:
            files = of_folder(folder)
            files.open()
        config, holders = private_config(path_or_id, transformers_kwargs, strict, files, auto_class)
        auto_class = class_of(path_or_id, config, auto_class)
        consolidated.check(path_or_id, files, config)
        settle_dtype(path_or_id, config, files, transformers_kwargs)
        if files is not None and not files.found:  # it finds one of them, of which the quantizer makes all
            config.transformers_weights = files.files[0].name
    if distributed is not None:
        transformers_kwargs["distributed_config"] = distributed
    with together(distributed is not None):
        try:
            model, info = auto_class.from_pretrained(
                path_or_id, config=config, output_loading_info=True,
                **{**transformers_kwargs, "ignore_mismatched_sizes": True},  # we name them, see _check_complete
            )  # fmt: skip
        except SafetensorError as error:
            raise CheckpointError(f"{path_or_id}: not readable as safetensors ({error}). Download it again.") from error
        _check_complete(path_or_id, model, info, files, named_class(config))
    if files is not None and not files.found:
        del model.config.transformers_weights
    return model, info, holders


def save_pretrained(model: Any, folder: str | Path, **transformers_kwargs: Any) -> None:
    """Writes the model as the checkpoint it came from: its config, and names, shapes, dtypes and bits of its tensors.

    `model.save_pretrained(folder)` does the same. What the model does not hold, such as layers for multi-token prediction, is
    copied from the files it was loaded from; what was changed in it is saved as it is, in the dtype of its file if that holds it.

    Args:
        model: loaded by `from_pretrained` or prepared by `prepare`.
        **transformers_kwargs: as for `PreTrainedModel.save_pretrained`, such as `max_shard_size`.

    Raises:
        UsageError: the files are gone, or have changed, and hold what the model does not; the model holds an adapter.
    """
    model.save_pretrained(folder, **transformers_kwargs)


def prepare(model: Any) -> Any:
    """Takes over a model that transformers loaded from a compressed-tensors FP8 checkpoint and that has not run yet.

    transformers keeps the FP8 weights of Linears until the first forward pass; this replaces that dequantization by our
    parametrization, in place.

    Returns:
        `model`, as `from_pretrained` would have returned it.

    Raises:
        UsageError: the weights were already dequantized (by a forward pass, or, for MoE experts, while loading).
        CheckpointError: a scale is missing or not usable.
    """
    config = getattr(getattr(model, "config", None), "quantization_config", None)
    if config is None:
        raise UsageError("this model was not loaded from a quantized checkpoint. Use ctfp8.from_pretrained.")
    quantizer = Quantizer(Config(config if isinstance(config, dict) else config.to_dict()))
    _refuse_unprepared(model, quantizer)
    weights = {n: m for n, m in model.named_modules() if isinstance(getattr(m, "weight", None), nn.Parameter)}
    fp8 = {name: module for name, module in weights.items() if module.weight.dtype == FP8}
    quantizer.schemes.embeddings |= {name for name, module in fp8.items() if isinstance(module, nn.Embedding)}
    _refuse_dequantized(model, quantizer.schemes, fp8)
    _attach_to_modules(model, quantizer.schemes, fp8)
    for key, hook in list(model._forward_pre_hooks.items()):
        if getattr(hook, "__module__", "").startswith("compressed_tensors"):
            del model._forward_pre_hooks[key]  # it would dequantize the weights on the first forward
    model.hf_quantizer = quantizer
    quantizer.take_over_saving(model)
    quantizer.origin = of_stock(model, quantizer.schemes.format)
    freeze(model, SavesAsRead)
    mtp.remember(model, plain=False)
    drafts.watch(model)
    paged.watch(model)
    return model


def _refuse_unprepared(model: Any, quantizer: Quantizer) -> None:
    """Raises if transformers has made of the checkpoint what cannot be taken over."""
    if (format := quantizer.schemes.format.name) != "compressed-tensors":
        raise UsageError(
            f"transformers loads {format!r} checkpoints into modules of its own, or dequantizes them. Load this one with "
            "ctfp8.from_pretrained, which keeps the model's modules and its FP8 weights."
        )
    if quantizer.transforms:
        raise UsageError(
            f"transformers left out the transforms of the checkpoint ({quantizer.transforms[0]}). Load it with "
            "ctfp8.from_pretrained, which applies them."
        )
    for name, parameter in model.named_parameters():
        if name.endswith("weight_packed") or (name.endswith(".weight") and not parameter.is_floating_point()):
            raise UsageError(
                f"{name} is in another format than FP8, which only loading dequantizes. Load the checkpoint with "
                "ctfp8.from_pretrained."
            )


def _attach_to_modules(model: Any, schemes: Schemes, fp8: Mapping[str, Any]) -> None:
    """Replaces compressed-tensors' own handling of modules by our parametrization, of all once each was read."""
    found = []
    notes = Notes()
    for name, module in fp8.items():
        own = {f"{name}.{k}": v for k, v in module.state_dict().items()}
        tensors = ckpt.InMemory(own)
        if is_shifted(tensors, schemes, name):
            raise UsageError(
                f"{name}.weight has zero points, and only loading dequantizes such a weight. Load the checkpoint with "
                "ctfp8.from_pretrained."
            )
        info = plan(tensors, schemes, identity(f"{name}.weight", module.weight.shape), model.dtype, notes)
        leftovers(tensors, used_names(info.scales, map(ckpt.input_scale_name, info.input_scales)), notes)
        found.append((module, info, *read_scales(tensors, info)))
    notes.say()
    for module, info, weight_scale, input_scale in found:
        for leaf in ("weight_scale", "input_scale", "weight_zero_point"):
            module._parameters.pop(leaf, None)
        for attribute in ("quantization_scheme", "quantization_status"):
            module.__dict__.pop(attribute, None)
        wrapped = getattr(module.__dict__.get("forward"), "__func__", None)
        if getattr(wrapped, "__globals__", {}).get("__name__", "").startswith("compressed_tensors."):
            del module.forward  # it quantizes as it goes, and writes to the weight
        attach(module, "weight", info, weight_scale, input_scale)


def _refuse_dequantized(model: Any, schemes: Schemes, fp8: dict[str, nn.Module]) -> None:
    """Raises if a weight that the config says is FP8 is not FP8 any more."""
    for name, parameter in model.named_parameters():
        module = name.rpartition(".")[0]
        expert = parameter.dim() == 3 and schemes.group(f"{module}.0.gate_proj") is not None
        linear = isinstance(model.get_submodule(module), nn.Linear) and name.endswith(".weight") and not fp8
        if parameter.dtype != FP8 and (expert or (linear and schemes.group(module) is not None)):
            raise UsageError(
                f"{name} was quantized in the checkpoint, but transformers has dequantized it to {parameter.dtype} "
                f"({'it does so with experts while loading' if expert else 'on the first forward pass'}). "
                "Load the checkpoint with ctfp8.from_pretrained, which keeps it in FP8."
            )


def _check_complete(path_or_id: str | Path, model: Any, info: Any, files: Folder | None, named: Any) -> None:
    """A weight that the model needs and the file lacks was just initialised at random: never hand that out."""
    missing = sorted(info["missing_keys"] if isinstance(info, dict) else info.missing_keys)
    mismatched = sorted(info["mismatched_keys"] if isinstance(info, dict) else info.mismatched_keys)
    if files is not None and (stale := sorted(set(missing) & set(files.stale))):
        raise CheckpointError(
            f"{path_or_id}: the model needs {stale[0]}, which a file holds, but {ckpt.INDEX_FILE} does not name ({len(stale)} in "
            "all). Add it to the index's weight_map, or save the checkpoint again."
        )
    if missing:
        saved = (
            "" if named in (None, type(model)) else f" than {type(model).__name__} (config.json names {named.__name__})"
        )
        raise CheckpointError(
            f"{path_or_id}: the model needs {missing[0]}, but no tensor of the checkpoint provides it "
            f"({len(missing)} missing in all: {', '.join(missing[:5])}{', …' if len(missing) > 5 else ''}). "
            f"The checkpoint is incomplete, or was saved for another class{saved}: pass the right auto_class."
        )
    if mismatched:
        name, found, declared = mismatched[0]
        raise CheckpointError(f"{name}: {list(found)} in the checkpoint, {list(declared)} in the model's config.")
