"""Where a model's config holds its quantization config: at its top, in a part of it, in a file beside it, or in the user's hand.

transformers finds our quantizer by a private `quant_method` in the config, while it loads. Afterwards each holder has again what
it had, so that what is saved is what was read.
"""

from __future__ import annotations

import copy
import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import PretrainedConfig

from ..checkpoint import files as ckpt
from ..checkpoint.folder import Folder, check_config_file
from ..checkpoint.formats import LEGACY, SIDE_FILE, SPELLED_ANYHOW, legacy_config, read_side_file, write_side_file
from ..checkpoint.inferred import inferred
from ..checkpoint.scheme import Schemes
from ..errors import SchemeError
from .compat import cached_file
from .quantizer import METHOD, Config
from .read_config import is_computed_in, read_config, settled_argument

_HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token",
                  "trust_remote_code", "code_revision")  # fmt: skip

#: Arguments of the loader that configs have as attributes, too.
_OF_THE_LOADER = ("dtype", "torch_dtype", "attn_implementation", "experts_implementation", *_HUB_ARGUMENTS)


@dataclass(frozen=True)
class Holders:
    """Which parts of a config hold a quantization config.

    Attributes:
        read: the whole config, as it was read.
        parts: names of sub-configs, "" for the config itself: what they hold.
        side_file: ModelOpt's file, as it was, and whether `config.json` has no other; None where there is none.
    """

    read: PretrainedConfig
    parts: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    side_file: tuple[str, bool] | None = None

    def put_back(self, config: Any) -> None:
        """Gives the parts what they held. The top keeps the quantizer's config where it held one, or nothing else does."""
        if path := _path_to(self.read, type(config)):  # a class for a part of the model
            held = self.parts.get(path[-1], self.parts.get(""))
            if held is not None:
                config.quantization_config = copy.deepcopy(dict(held))
            return
        for name, part in _parts(config).items():
            if name and name in self.parts:
                part.quantization_config = copy.deepcopy(dict(self.parts[name]))
        if "" not in self.parts and hasattr(config, "quantization_config"):
            del config.quantization_config

    def take_away(self, config: Any) -> None:
        """Leaves no quantization config anywhere: the model is a plain one."""
        for part in _parts(config).values():
            for name in ("quantization_config", LEGACY):
                if name in vars(part):
                    delattr(part, name)

    def write(self, config: Any, folder: Path, tensors: Mapping[str, ckpt.TensorInfo]) -> None:
        """Makes a `config.json` that transformers wrote fit what is saved: the tensors of the whole checkpoint, in its dtypes."""
        if path := _path_to(self.read, type(config)):
            self._with(config, path).save_pretrained(folder)
        if self.side_file is not None:
            write_side_file(folder, *self.side_file)
        file = folder / "config.json"
        written = json.loads(file.read_text())
        own = unquantized_dtype(tensors) if _is_missing(self.read.dtype) else self.read.dtype
        for name, part in _parts(self.read).items():
            there = written.get(name) if name else written
            dtype = part.dtype
            if _is_missing(dtype) and (dtype is not None or not name):
                dtype = own
            if isinstance(there, dict) and not _is_missing(dtype):
                there["dtype"] = str(dtype).removeprefix("torch.")
        file.write_text(json.dumps(written, indent=2, sort_keys=True) + "\n")

    def _with(self, config: Any, path: tuple[str, ...]) -> Any:
        """The whole config with this as a part of it."""
        whole, own = copy.deepcopy(self.read), copy.deepcopy(config)
        *above, name = path
        parent = functools.reduce(getattr, above, whole)
        read = getattr(parent, name)
        own.architectures = read.architectures
        if getattr(own, "tie_word_embeddings", False) and getattr(whole, "tie_word_embeddings", False):
            own.tie_word_embeddings = read.tie_word_embeddings  # the top says it, see `embeddings.tie_absent_head`
        if "quantization_config" in vars(own):
            del own.quantization_config
        if (held := getattr(read, "quantization_config", None)) is not None:
            own.quantization_config = held
        setattr(parent, name, own)
        return whole


def private_config(
    path_or_id: str | Path, kwargs: dict[str, Any], strict: bool, files: Folder | None, auto_class: Any
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
        config = read_config(path_or_id, **hub)
        for name in [
            k for k in kwargs if k not in _OF_THE_LOADER and hasattr(config, k)
        ]:  # use_cache=False, num_labels=3
            setattr(config, name, kwargs.pop(name))
    read, config = config, copy.deepcopy(config)
    ours = functools.partial(Config.of, strict=strict, tied=bool(getattr(read, "tie_word_embeddings", False)))
    legacy = legacy_config(vars(config)) if getattr(config, "quantization_config", None) is None else None
    if legacy is not None:
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
        config.quantization_config = ours(given)
        return config, Holders(read, {"": given})
    said = None if found or files is None else inferred(files.open(SPELLED_ANYHOW))
    if said is not None:
        config.quantization_config = ours(said)
        return config, Holders(read)
    if not found:
        raise SchemeError(
            f"{path_or_id}: its config.json has no quantization_config, there is no {SIDE_FILE}, and no FP8 weight in its "
            "files has a scale beside it (weight_scale, weight_scale_inv). If it is quantized, pass the config that it was made "
            "with: from_pretrained(..., quantization_config={...}); if it is not, load it with transformers."
        )
    for name, held in found.items():
        Schemes(held)  # says what is wrong with it, in our words
        _parts(config)[name].quantization_config = ours(held)
    if "" not in found:  # transformers looks at the top
        config.quantization_config = ours(next(iter(found.values())))
    aside = "" in found and "quantization" in found[""] if side_file else False
    if path := _path_to(config, getattr(auto_class, "config_class", None)):  # a class for a part of the model
        held = found.get(path[-1]) or found.get("") or next(iter(found.values()))
        config = functools.reduce(getattr, path, config)
        config.quantization_config = ours(held)
    if legacy is not None:
        found = {}  # it stays where it is
    return config, Holders(read, found, (Path(side_file).read_text(), aside) if side_file else None)


def settle_dtype(
    path_or_id: str | Path, config: PretrainedConfig, files: Folder | None, kwargs: dict[str, Any]
) -> None:
    """Where neither config nor user say a dtype, that of the tensors that are not quantized: transformers would take the first's,
    which may be a scale's.

    Raises:
        UsageError: the user says one that nothing is computed in, such as float8_e4m3fn, or none at all.
    """
    for name in ("dtype", "torch_dtype"):
        if name in kwargs:
            kwargs[name] = settled_argument(name, kwargs[name])
    if any(kwargs.get(name) not in (None, "auto") for name in ("dtype", "torch_dtype")):
        return
    if not _is_missing(own := getattr(config, "dtype", None)):
        for part in _parts(config).values():
            part.dtype = own if part.dtype is not None and _is_missing(part.dtype) else part.dtype
        return
    said = [part.dtype for part in _parts(config).values() if not _is_missing(getattr(part, "dtype", None))]
    dtype = said[0] if said else unquantized_dtype(_tensors(path_or_id, files, kwargs))
    if dtype is not None:
        for part in _parts(config).values():
            part.dtype = dtype


def unquantized_dtype(tensors: Mapping[str, ckpt.TensorInfo]) -> torch.dtype | None:
    """The dtype of most bytes of floating-point tensors that are neither quantized nor what quantization needs; None: of none."""
    sizes: dict[str, int] = {}
    for name, info in tensors.items():
        leaf = name.rpartition(".")[2]
        if info.dtype in ckpt.SCALE_DTYPES and "scale" not in leaf and not leaf.endswith(("_zero_point", "_bias")):
            sizes[info.dtype] = sizes.get(info.dtype, 0) + ckpt.nbytes(info)
    return ckpt.SCALE_DTYPES[max(sizes, key=lambda name: sizes[name])] if sizes else None


def _tensors(path_or_id: str | Path, files: Folder | None, kwargs: Mapping[str, Any]) -> Mapping[str, ckpt.TensorInfo]:
    """What the files of a folder hold, or those that transformers finds elsewhere."""
    if files is not None:
        return files.open()
    hub = {k: kwargs[k] for k in _HUB_ARGUMENTS if k in kwargs and k != "trust_remote_code"}
    variant = kwargs.get("variant")
    single, index = (f"model.{variant}.safetensors", f"model.safetensors.index.{variant}.json") if variant else (
        ckpt.SINGLE_FILE, ckpt.INDEX_FILE
    )  # fmt: skip

    def find(name: str) -> str | None:
        found: str | None = cached_file(path_or_id, name, _raise_exceptions_for_missing_entries=False, **hub)
        return found

    if file := find(single):
        return ckpt.Checkpoint([file])
    names = json.loads(Path(found).read_text())["weight_map"].values() if (found := find(index)) else ()
    return ckpt.Checkpoint(file for name in sorted(set(names)) if (file := find(name)))


def _is_missing(dtype: Any) -> bool:
    return dtype is None or (isinstance(dtype, torch.dtype) and not is_computed_in(dtype))


def _held(part: Any) -> Mapping[str, Any] | None:
    held = getattr(part, "quantization_config", None)
    if held is None or (isinstance(held, Mapping) and held.get("quant_method") == METHOD):
        return None
    return held if isinstance(held, Mapping) else held.to_dict()


def _path_to(config: Any, kind: Any) -> tuple[str, ...]:
    """Where in a config the part is that a class of models is for; () where that is the config itself, or there is none."""
    if kind is None or isinstance(config, kind):
        return ()
    for name in getattr(config, "sub_configs", {}):
        part = getattr(config, name, None)
        if type(part) is kind:
            return (name,)
        if isinstance(part, PretrainedConfig) and (path := _path_to(part, kind)):
            return (name, *path)
    return ()


def _parts(config: Any) -> dict[str, Any]:
    """A config, under "", and its sub-configs by name."""
    subs = {name: getattr(config, name, None) for name in getattr(config, "sub_configs", {})}
    text = config.get_text_config(decoder=True)
    parts = {"": config, **{name: sub for name, sub in subs.items() if isinstance(sub, PretrainedConfig)}}
    return parts if any(text is part for part in parts.values()) else {**parts, "text_config": text}
