"""Layers for multi-token prediction (MTP), read from the files that their model was read from, and as they are stored there: FP8.

transformers builds them when `generate(use_mtp=True)` asks for a draft, from the checkpoint's name and without a quantizer: FP8
values would become numbers, their scales would be left out. For models of ours its `MtpModel.from_pretrained` comes here.
"""

from __future__ import annotations

import contextlib
import functools
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..checkpoint import files as ckpt
from ..checkpoint.leftovers import leftovers
from ..checkpoint.mtp import mtp_names
from ..checkpoint.notes import Notes
from ..checkpoint.packed import find, seen_as_weights
from ..checkpoint.packed import sentence as packed_sentence
from ..counted import counted
from ..errors import CheckpointError, SchemeError, UsageError
from ..model.freeze import dequantize_, freeze
from ..model.mixed import sentence as mixed_sentence
from ..model.parametrization import attach
from ..model.plan import QuantizedParameter, read_scales
from ..model.planned import Planned
from ..model.storage import detach_from_mmap
from ..ops import FP8
from . import compat
from .conversions import Arrivals, arrivals, convert_sources, layouts
from .embeddings import embedding_names
from .quantizer import Quantizer

#: Modules of the draft that are the main model's own.
_SHARED = ("embed_tokens.", "shared_head.", "rotary_emb.")
_WITHOUT = "Generate without use_mtp"


@dataclass
class MtpSource:
    """Where the MTP layers of a model are, and what they were read as.

    Attributes:
        quantizer: of the model, which knows files and schemes.
        plain: the model was dequantized, and so is its draft.
        draft: the layers, once something asked for them.
        compiled: the same compiled, and their cache.
    """

    quantizer: Quantizer
    plain: bool
    draft: Any = None
    compiled: Any = None


def remember(model: Any, plain: bool) -> None:
    """Notes where the MTP layers of a model that was just loaded are, if there are any, or its class builds some."""
    config = model.config.get_text_config(decoder=True)
    quantizer = model.hf_quantizer
    if getattr(config, "num_mtp_layers", None) or _stored(quantizer):
        vars(model)["_ctfp8_mtp"] = MtpSource(quantizer, plain)  # not a module's child: not of its parameters
        with contextlib.suppress(UsageError):  # before 5.24 there is none
            _take_over(compat.MtpModel)


def source_of(model: Any) -> MtpSource | None:
    """None of models that are not ours, or have nothing to do with MTP."""
    return vars(model).get("_ctfp8_mtp")


def _stored(quantizer: Quantizer) -> set[str]:
    """Our names of the tensors of MTP layers in the files."""
    return set() if quantizer.origin is None else mtp_names(quantizer.origin.tensors)


def has_layers(model: Any) -> bool:
    """Whether `mtp_layers` has something to build: the class declares MTP layers, and the files hold some."""
    source = source_of(model)
    config = model.config.get_text_config(decoder=True)
    declared = getattr(config, "num_mtp_layers", None)
    return source is not None and bool(declared) and bool(_stored(source.quantizer))


def check(model: Any) -> MtpSource:
    """Says in words why a model has no draft of its own.

    Raises:
        UsageError: its class builds no MTP layers, or its files hold none.
    """
    source, config = source_of(model), model.config.get_text_config(decoder=True)
    stored = [] if source is None else sorted(_stored(source.quantizer))
    declared = getattr(config, "num_mtp_layers", None)
    if stored and not declared:
        raise UsageError(
            f"{stored[0]} is of a layer for multi-token prediction ({counted(len(stored), 'tensor')} in all), but "
            "transformers builds none "
            f"for {type(model).__name__} ({'its config says 0' if declared == 0 else 'its config has no num_mtp_layers'}). The "
            f"layers are kept when the model is saved. {_WITHOUT}, or with assistant_model= or prompt_lookup_num_tokens=."
        )
    if source is not None and source.quantizer.origin is None:
        raise UsageError(
            "which files this model was loaded from is not known, as ctfp8.prepare took it over, and with them the layers for "
            "multi-token prediction. Load the checkpoint with ctfp8.from_pretrained."
        )
    if source is None or not stored:
        raise UsageError(
            f"no file of this model holds a layer for multi-token prediction, so there is nothing to draft with. {_WITHOUT}, or "
            "with assistant_model= or prompt_lookup_num_tokens=; or load a checkpoint that has kept these layers."
        )
    return source


def mtp_layers(main: Any, device: torch.device | None = None) -> Any:
    """The MTP layers of a model of ours, a `MtpModel` of transformers that shares embeddings and head with it.

    They are read once. On several ranks each has all of them.

    Args:
        device: where they are to be; default: that of the model's last layer.

    Raises:
        UsageError: as `check`; or the files have changed, or have transforms for these layers.
        CheckpointError, SchemeError: as for `from_pretrained`; names the tensor.
    """
    source = check(main)
    device = next(main.get_decoder().layers[-1].parameters()).device if device is None else device
    if source.draft is None:
        source.draft = _read(main, source, device)
    elif next(source.draft.layers.parameters()).device != device:
        source.draft.layers.to(device)
    source.draft.tie_with_main_model(main)
    return source.draft


def _take_over(owner: Any) -> None:
    """Has `MtpModel.from_pretrained` come here for models of ours; for others it does what it did."""
    stock = owner.from_pretrained
    if hasattr(stock, "_ctfp8_stock"):
        return

    @functools.wraps(stock.__func__)
    def from_pretrained(cls: Any, main_model: Any, device_map: Any = None, **kwargs: Any) -> Any:
        if source_of(main_model) is None:
            return stock.__func__(cls, main_model, device_map=device_map, **kwargs)
        device = None if device_map is None else torch.device(next(iter(device_map.values())))
        return mtp_layers(main_model, device)

    from_pretrained._ctfp8_stock = stock  # type: ignore[attr-defined]
    owner.from_pretrained = classmethod(from_pretrained)


def _read(main: Any, source: MtpSource, device: torch.device) -> Any:
    model = _built(main)
    declared = {name: t for name, t in model.state_dict().items() if not name.startswith(_SHARED)}
    if main.config.dtype in (torch.bfloat16, torch.float16):
        declared = {name: t.float() if _stays_float32(main, name) else t for name, t in declared.items()}
    with torch.device("cpu"):
        values, plans, scales = _from_file(main, model, declared, source.quantizer)
    for target, value in values.items():
        _put(model, target, value.to(device), declared[target], target in plans)
    for target, info in plans.items():
        path, _, leaf = target.rpartition(".")
        attach(model.get_submodule(path), leaf, info, *scales[target])
    _begin_buffers(main, model, device)
    model.tie_with_main_model(main)
    if source.plain:
        dequantize_(model)
    else:
        freeze(model)
        detach_from_mmap((*model.layers.parameters(), *model.layers.buffers()))
    return model.eval()


def _built(main: Any) -> Any:
    """The layers on the meta device."""
    try:
        main.config.get_mtp_config()
    except ValueError as error:
        raise UsageError(
            f"transformers cannot build the layers for multi-token prediction of {type(main).__name__} ({error}). Name their "
            "kinds in config.json (mtp_layer_types, mtp_mlp_layer_types), or generate without use_mtp."
        ) from error
    with contextlib.ExitStack() as built:
        for context in compat.MtpModel.get_init_context(main.config.dtype, False, False, None):
            built.enter_context(context)
        return compat.MtpModel(main, main.config.get_text_config(decoder=True).num_mtp_layers)


def _from_file(
    main: Any, model: Any, declared: Mapping[str, Tensor], quantizer: Quantizer
) -> tuple[dict[str, Tensor], dict[str, QuantizedParameter], dict[str, tuple[Tensor, Tensor | None]]]:
    """By name, all parameters; of those that are FP8, how they are quantized, and their scales."""
    tensors, notes = _tensors(main, quantizer), Notes()
    packed = find(tensors, quantizer.schemes)
    tensors, known = seen_as_weights(tensors, packed), _conversions(main, model)
    arrived = arrivals(model, tensors, declared, known=known)
    _check_complete(main, declared, arrived, tensors)
    found = layouts(model, tensors, declared, arrived)
    quantizer.schemes.embeddings |= embedding_names(model, found)
    planned = Planned.of(found, declared, tensors, quantizer.schemes, packed, notes)
    leftovers(tensors, planned.used, notes)
    notes.say(quantizer.strict)
    for what in [
        *([packed_sentence(packed.values(), model.dtype)] if packed else []),
        *([mixed_sentence(planned.mixed)] if planned.mixed else []),
    ]:
        if quantizer.strict:
            raise SchemeError(f"{what}; strict=True refuses that. Leave it out.")
        warnings.warn(f"{what}.", stacklevel=3)
    scales = {target: read_scales(tensors, info) for target, info in planned.fp8.items()}
    values = {
        target: info.layout.weight({name: tensors.read_stored(tensors[name]) for name in info.layout.sources})
        for target, info in planned.fp8.items()
    }
    values |= {target: info.again(tensors)[0] for target, info in planned.mixed.items()}
    values |= {target: info.again(tensors)[0] for target, info in planned.packed.items()}
    for target in arrived.by_target:
        if target not in values:
            values |= _plain(model, target, tensors, declared, arrived)
    return values, planned.fp8, scales


def _tensors(main: Any, quantizer: Quantizer) -> ckpt.Checkpoint:
    """The MTP layers' part of the files.

    Raises:
        UsageError: they have changed since the model was loaded, or hold transforms for these layers.
    """
    origin = quantizer.origin
    assert origin is not None
    if (changed := origin.source.gone()) is not None:
        raise UsageError(
            f"the layers for multi-token prediction are in the files that the model was loaded from, and {changed}. Load the "
            "checkpoint again."
        )
    tensors = origin.folder.open(quantizer.schemes.format)
    config = main.config.get_text_config(decoder=True)
    ours = mtp_names(tensors, range(config.num_hidden_layers, config.num_hidden_layers + config.num_mtp_layers))
    if quantizer.transforms and any(tensors[name].dtype == ckpt.FP8_DTYPE for name in ours):
        raise UsageError(
            f"the checkpoint has transforms of activations ({quantizer.transforms[0]}), which are not applied to layers for "
            f"multi-token prediction. {_WITHOUT}, or with assistant_model= or prompt_lookup_num_tokens=."
        )
    return tensors.changed([name for name in tensors if name not in ours], {})


def _conversions(main: Any, model: Any) -> list[Any]:
    """From the file's names to `MtpModel`'s. It asks the main model for those it was loaded by, which ours has put away."""
    own = vars(main).get("_weight_conversions")
    main._weight_conversions = compat.get_model_conversion_mapping(main)
    try:
        return model.get_weight_conversions(main)
    finally:
        if own is None:
            del main._weight_conversions
        else:
            main._weight_conversions = own


def _stays_float32(main: Any, name: str) -> bool:
    """What transformers keeps in float32 of the main model's layers, however it is told to load them, such as a router's bias."""
    kept = getattr(main, "_keep_in_fp32_modules_strict", None) or ()
    return any(re.search(rf"(^|\.){part}(\.|$)", name) for part in kept)


def _check_complete(main: Any, declared: Mapping[str, Tensor], arrived: Arrivals, tensors: ckpt.Checkpoint) -> None:
    """Refuses layers of which a tensor is missing, and says which tensors have no place in them."""
    missing = sorted(set(declared) - set(arrived.targets()))
    where = Path(getattr(main.config, "_name_or_path", "") or "the checkpoint").name
    if missing:
        raise CheckpointError(
            f"{where}: the layers for multi-token prediction need {missing[0]}, but no tensor of the checkpoint provides it "
            f"({len(missing)} missing in all: {', '.join(missing[:5])}{', …' if len(missing) > 5 else ''}). {_WITHOUT}, or "
            "download the checkpoint again."
        )
    used = {name for sources in arrived.by_target.values() for name, _ in sources}
    ignored = re.compile("|".join([*compat.MtpModel._keys_to_ignore_on_load_unexpected, r"rotary_emb\.inv_freq$"]))
    weights = [n for n in tensors if n not in used and not ignored.search(n) and not _beside_a_weight(n, tensors)]
    if weights:
        warnings.warn(
            f"{where}: layers for multi-token prediction hold {counted(len(weights), 'tensor')} that transformers "
            "does not build, such as "
            f"{tensors[weights[0]]}; drafts are made without them.",
            stacklevel=2,
        )


def _beside_a_weight(name: str, tensors: ckpt.Checkpoint) -> bool:
    module, _, leaf = name.rpartition(".")
    return leaf.endswith(("_scale", "_zero_point", "_global_scale", "_g_idx", "_shape")) or (
        leaf != "weight" and f"{module}.weight" in tensors and leaf.startswith(("weight_", "input_"))
    )


def _plain(
    model: Any, target: str, tensors: ckpt.Checkpoint, declared: Mapping[str, Tensor], arrived: Arrivals
) -> dict[str, Tensor]:
    """By name, parameters that the file holds as numbers."""
    sources = arrived.by_target[target]
    pattern = sources[0][1]
    values = {name: tensors.value(tensors[name]) for name, _ in sources}
    if pattern is None:
        return {target: values[sources[0][0]]}
    made = convert_sources(model, arrived.converters[pattern], target, sources, tensors, values)
    return {name: value for name, value in made.items() if name in declared}


def _put(model: Any, target: str, value: Tensor, declared: Tensor, fp8: bool) -> None:
    path, _, leaf = target.rpartition(".")
    module = model.get_submodule(path)
    if not fp8:
        if tuple(value.shape) != tuple(declared.shape):
            raise CheckpointError(
                f"{target} (multi-token prediction): {list(value.shape)} in the checkpoint, {list(declared.shape)} in the config."
            )
        value = value.to(declared.dtype)
    assert not fp8 or value.dtype == FP8
    if leaf in module._buffers:
        module._buffers[leaf] = value
    else:
        module._parameters[leaf] = nn.Parameter(value, requires_grad=False)


def _begin_buffers(main: Any, model: Any, device: torch.device) -> None:
    """What no file holds: buffers that the architecture computes."""
    for module in model.layers.modules():
        empty = [name for name, buffer in module._buffers.items() if buffer is not None and buffer.is_meta]
        for name in empty:
            module._buffers[name] = torch.empty_like(module._buffers[name], device=device)
        if empty:
            for tensor in module.parameters(recurse=False):
                tensor._is_hf_initialized = True
            main._init_weights(module)
