"""Where a model's config holds its quantization config: at its top, in a part of it, in a file beside it, or in the user's hand.

transformers finds our quantizer by a private `quant_method` in the config, while it loads. Afterwards each holder has again what
it had, so that what is saved is what was read.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PretrainedConfig

from ..checkpoint import files as ckpt
from ..checkpoint.folder import Folder, check_config_file
from ..checkpoint.formats import SIDE_FILE, SPELLED_ANYHOW, legacy_config, read_side_file
from ..checkpoint.inferred import inferred
from ..checkpoint.scheme import Schemes
from ..errors import SchemeError
from .compat import cached_file
from .quantizer import METHOD, Config

_HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token",
                  "trust_remote_code", "code_revision")  # fmt: skip

#: Arguments of the loader that configs have as attributes, too.
_OF_THE_LOADER = ("dtype", "torch_dtype", "attn_implementation", "experts_implementation", *_HUB_ARGUMENTS)


@dataclass(frozen=True)
class Holders:
    """Which parts of a config hold a quantization config.

    Attributes:
        parts: names of sub-configs, "" for the config itself: what they hold.
        side_file: ModelOpt's file, as it was, and whether `config.json` has no other; None where there is none.
    """

    parts: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    side_file: tuple[str, bool] | None = None

    def put_back(self, config: Any) -> None:
        """Gives the parts what they held. The top keeps the quantizer's config where it held one, or nothing else does."""
        for name, part in _parts(config).items():
            if name and name in self.parts:
                part.quantization_config = copy.deepcopy(dict(self.parts[name]))
        if "" not in self.parts and hasattr(config, "quantization_config"):
            del config.quantization_config

    def take_away(self, config: Any) -> None:
        """Leaves no quantization config anywhere: the model is a plain one."""
        for part in _parts(config).values():
            if "quantization_config" in vars(part):
                del part.quantization_config


def private_config(
    path_or_id: str | Path, kwargs: dict[str, Any], strict: bool, files: Folder | None
) -> tuple[PretrainedConfig, Holders]:
    """The checkpoint's config with `quant_method` swapped for our private name; taken out of `kwargs` if given there.

    Raises:
        SchemeError: there is no quantization config, or it is none that we read.
    """
    config, given = kwargs.pop("config", None), kwargs.pop("quantization_config", None)
    hub = {k: kwargs[k] for k in _HUB_ARGUMENTS if k in kwargs}
    if config is None:
        if Path(path_or_id).is_dir() and "subfolder" not in kwargs:
            check_config_file(Path(path_or_id))
        config = AutoConfig.from_pretrained(path_or_id, **hub)
        for name in [
            k for k in kwargs if k not in _OF_THE_LOADER and hasattr(config, k)
        ]:  # use_cache=False, num_labels=3
            setattr(config, name, kwargs.pop(name))
    config = copy.deepcopy(config)
    if getattr(config, "quantization_config", None) is None and (legacy := legacy_config(vars(config))) is not None:
        config.quantization_config = legacy
    found = {name: held for name, part in _parts(config).items() if (held := _held(part)) is not None}
    side_file = cached_file(path_or_id, SIDE_FILE, _raise_exceptions_for_missing_entries=False, **hub)
    if not found and side_file:
        found = {"": read_side_file(Path(side_file))}
    if found and given is not None:
        raise SchemeError(
            f"{path_or_id}: its config.json has a quantization_config, so do not pass one. Correct it there."
        )
    if not found and given is not None:
        given = given if isinstance(given, Mapping) else given.to_dict()
        Schemes(given)
        config.quantization_config = Config.of(given, strict)
        return config, Holders({"": given})
    said = None if found or files is None else inferred(files.open(SPELLED_ANYHOW))
    if said is not None:
        config.quantization_config = Config.of(said, strict)
        return config, Holders()
    if not found:
        raise SchemeError(
            f"{path_or_id}: its config.json has no quantization_config, there is no {SIDE_FILE}, and no FP8 weight in its "
            "files has a scale beside it (weight_scale, weight_scale_inv). If it is quantized, pass the config that it was made "
            "with: from_pretrained(..., quantization_config={...}); if it is not, load it with transformers."
        )
    for name, held in found.items():
        Schemes(held)  # says what is wrong with it, in our words
        _parts(config)[name].quantization_config = Config.of(held, strict)
    if "" not in found:  # transformers looks at the top
        config.quantization_config = Config.of(next(iter(found.values())), strict)
    aside = "" in found and "quantization" in found[""] if side_file else False
    return config, Holders(found, (Path(side_file).read_text(), aside) if side_file else None)


def settle_dtype(config: PretrainedConfig, files: Folder | None, kwargs: Mapping[str, Any]) -> None:
    """Where neither config nor user say a dtype, that of the tensors that are not quantized: transformers would take the first's,
    which may be a scale's."""
    said = getattr(config, "dtype", None)
    if "dtype" in kwargs or "torch_dtype" in kwargs or files is None or not _is_missing(said):
        return
    sizes: dict[str, int] = {}
    for name, info in files.open().items():
        if info.dtype in ckpt.SCALE_DTYPES and not name.endswith(("_scale", "_scale_inv", "_scale_2", "_bias")):
            sizes[info.dtype] = sizes.get(info.dtype, 0) + ckpt.nbytes(info)
    if sizes:
        dtype = ckpt.SCALE_DTYPES[max(sizes, key=lambda name: sizes[name])]
        for part in _parts(config).values():
            part.dtype = dtype


def _is_missing(dtype: Any) -> bool:
    return dtype is None or "float8" in str(dtype)


def _held(part: Any) -> Mapping[str, Any] | None:
    held = getattr(part, "quantization_config", None)
    if held is None or (isinstance(held, Mapping) and held.get("quant_method") == METHOD):
        return None
    return held if isinstance(held, Mapping) else held.to_dict()


def _parts(config: Any) -> dict[str, Any]:
    """A config, under "", and its sub-configs by name."""
    subs = {name: getattr(config, name, None) for name in getattr(config, "sub_configs", {})}
    text = config.get_text_config(decoder=True)
    parts = {"": config, **{name: sub for name, sub in subs.items() if isinstance(sub, PretrainedConfig)}}
    return parts if any(text is part for part in parts.values()) else {**parts, "text_config": text}
