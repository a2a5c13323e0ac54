"""What is in the safetensors files of a checkpoint, read from their headers alone.

Everything that can be said to be wrong with a checkpoint without reading its weights is said here, before a model is
built: truncated files, missing shards, FP8 weights without a scale, scales of an odd shape or dtype.
"""

from __future__ import annotations

import copy
import json
import math
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import CheckpointError, SchemeError
from .formats import Suffixes, canonical_names
from .scheme import Scheme

FP8_DTYPE = "F8_E4M3"
PACKED = "packed"  #: of a weight in another format, seen as one tensor (`packed.seen_as_weights`)
SCALE_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
#: Of scales that are powers of two: a byte e stands for 2^(e - 127), 255 for NaN.
EXPONENT_DTYPES = {"U8": torch.uint8, "F8_E8M0": torch.float8_e8m0fnu}
#: Of values in other formats than FP8.
INTEGER_DTYPES = {"I8": torch.int8, "U8": torch.uint8, "I16": torch.int16, "I32": torch.int32}
SINGLE_FILE, INDEX_FILE = "model.safetensors", "model.safetensors.index.json"


@dataclass(frozen=True)
class TensorInfo:
    """One tensor as a safetensors header describes it: `name` is the file's, `dtype` the format's, such as `F8_E4M3`."""

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.name} ({self.dtype} {list(self.shape)} in {self.file.name})"


class Checkpoint(Mapping[str, TensorInfo]):
    """The tensors of a checkpoint by name, from the headers of its files.

    Args:
        suffixes: how names of a format end, and how they end here (`formats.canonical_names`).

    Raises:
        CheckpointError: a file cannot be opened, or two files hold a tensor of the same name.
    """

    def __init__(self, files: Iterable[str | Path], suffixes: Suffixes = MappingProxyType({})):
        self._tensors: dict[str, TensorInfo] = {}
        self._open_files: dict[Path, safe_open] = {}
        for file in map(Path, files):
            handle = self._open_files[file] = _open(file)
            for name in handle.keys():  # noqa: SIM118 - a safe_open handle is no mapping
                view = handle.get_slice(name)
                info = TensorInfo(name, file, str(view.get_dtype()), tuple(view.get_shape()))
                if name in self._tensors:
                    raise CheckpointError(
                        f"{name} is in both {self._tensors[name].file.name} and {file.name}; "
                        "the checkpoint was merged from two. Save it again."
                    )
                self._tensors[name] = info
        self._spell(suffixes)

    def _spell(self, suffixes: Suffixes) -> None:
        self._suffixes = suffixes
        if suffixes:
            self._tensors = {ours: self._tensors[name] for ours, name in canonical_names(self, suffixes).items()}

    def __getitem__(self, name: str) -> TensorInfo:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Reads some (small) tensors."""
        return {name: self.read_stored(self[name]) for name in names}

    def read_stored(self, info: TensorInfo) -> Tensor:
        """Reads a tensor by what its file calls it."""
        return self._open_files[info.file].get_tensor(info.name)

    def spellings(self, name: str) -> list[str]:
        """Our name of a tensor, and what files of this format usually call it."""
        there = (name.removesuffix(ours) + theirs for theirs, ours in self._suffixes.items() if name.endswith(ours))
        return list(dict.fromkeys([name, next(there, name)]))

    def changed(self, hidden: Collection[str], added: Mapping[str, TensorInfo]) -> Checkpoint:
        """The same files, seen without some tensors and with others in their place."""
        out = copy.copy(self)
        out._tensors = {name: info for name, info in self._tensors.items() if name not in hidden} | dict(added)
        return out


class InMemory(Checkpoint):
    """The same view of a state dict."""

    def __init__(self, state_dict: Mapping[str, Tensor], suffixes: Suffixes = MappingProxyType({})):
        self._state = state_dict
        self._tensors = {
            name: TensorInfo(name, Path("state dict"), _DTYPE_NAMES.get(t.dtype, str(t.dtype)), tuple(t.shape))
            for name, t in state_dict.items()
        }
        self._spell(suffixes)

    def read_stored(self, info: TensorInfo) -> Tensor:
        return self._state[info.name]


_DTYPE_NAMES = {
    torch.float8_e4m3fn: FP8_DTYPE,
    torch.float8_e5m2: "F8_E5M2",
    torch.float64: "F64",
    torch.int64: "I64",
} | {dtype: name for name, dtype in (SCALE_DTYPES | EXPONENT_DTYPES | INTEGER_DTYPES).items()}


def nbytes(info: TensorInfo) -> int:
    """Bytes of a tensor in its file."""
    sizes = {"I64": 8, "F64": 8, "F32": 4, "I32": 4, "BF16": 2, "F16": 2, "I16": 2}
    return math.prod(info.shape) * sizes.get(info.dtype, 1)


def checkpoint_files(folder: str | Path) -> list[Path]:
    """The safetensors files of a local checkpoint folder, checked to exist and to lie inside it.

    Raises:
        CheckpointError: no weights, an unreadable index, a shard that is missing or lies outside the folder.
    """
    folder = Path(folder)
    index = folder / INDEX_FILE
    if not index.is_file():
        if (folder / SINGLE_FILE).is_file():
            return [folder / SINGLE_FILE]
        raise CheckpointError(
            f"{folder}: neither {SINGLE_FILE} nor {INDEX_FILE} is there. Is this a checkpoint folder?"
        )
    try:
        weight_map = json.loads(index.read_text())["weight_map"]
        names = sorted({str(shard) for shard in weight_map.values()})
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index.name}: not a safetensors index ({error!r}). Download the file again.") from error
    for name in names:
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise CheckpointError(f"{index.name}: the shard path {name!r} leaves the checkpoint's folder; refused.")
        if not (folder / name).is_file():
            raise CheckpointError(f"{index.name} names the shard {name}, which is missing. Download it again.")
    present = Checkpoint(folder / name for name in names)
    for tensor, shard in weight_map.items():
        if tensor not in present or present[tensor].file.name != Path(shard).name:
            raise CheckpointError(f"{index.name} says that {tensor} is in {shard}, but it is not. Download both again.")
    return [folder / name for name in names]


def check_config_file(folder: Path) -> None:
    """Refuses a `config.json` that is no JSON object, or whose quantization_config is none."""
    try:
        config = json.loads((folder / "config.json").read_text())
    except FileNotFoundError as error:
        raise CheckpointError(f"{folder}: there is no config.json. Is this a checkpoint folder?") from error
    except ValueError as error:
        raise CheckpointError(f"{folder}: config.json is not valid JSON ({error}). Download the file again.") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{folder}: config.json is not an object. Download the file again.")
    if not isinstance(config.get("quantization_config"), (dict, type(None))):
        raise SchemeError(f"{folder}: quantization_config in config.json is not an object. Download the file again.")


def check_weight(info: TensorInfo) -> None:
    """Refuses a dtype that a floating-point parameter cannot be filled from without losing what it says."""
    if info.dtype == "F8_E5M2":
        raise CheckpointError(f"{info}: float8_e5m2 weights are not supported, only float8_e4m3fn. Quantize it again.")
    if info.dtype not in (FP8_DTYPE, PACKED, "F64", *SCALE_DTYPES):
        raise CheckpointError(
            f"{info}: not a floating-point tensor, as the model declares it. Download the file again."
        )


def check_dtype(info: TensorInfo, dtype: torch.dtype) -> None:
    """Refuses another dtype than the model declares, where a cast could change what is counted or chosen."""
    if info.dtype != _DTYPE_NAMES.get(dtype, str(dtype)):
        raise CheckpointError(f"{info}: the module declares {str(dtype).removeprefix('torch.')}.")


def scale_name(weight_name: str) -> str:
    """Name of the scale of a weight: `….weight` → `….weight_scale`."""
    return weight_name + "_scale"


def input_scale_name(weight_name: str) -> str:
    """Name of the static activation scale: `….weight` → `….input_scale`, `….gate_up_proj` → `….gate_up_proj_input_scale`."""
    module, _, leaf = weight_name.rpartition(".")
    return f"{module}." * bool(module) + ("input_scale" if leaf == "weight" else f"{leaf}_input_scale")


def check_scale(checkpoint: Checkpoint, weight: TensorInfo, scheme: Scheme) -> None:
    """Checks that the scales an FP8 weight needs are in the file, in a shape and dtype its scheme allows.

    Raises:
        CheckpointError: naming the tensor that is missing or wrong.
    """
    name = scale_name(weight.name)
    if name not in checkpoint:
        raise CheckpointError(
            f"{weight}: FP8 weight without a scale; {' or '.join(checkpoint.spellings(name))} is not in the checkpoint. "
            "Quantize it again."
        )
    scale = checkpoint[name]
    if scale.dtype not in (SCALE_DTYPES | EXPONENT_DTYPES if scheme.exponents else SCALE_DTYPES):
        raise CheckpointError(
            f"{scale}: a scale must be float32, bfloat16 or float16; bytes (U8, F8_E8M0), which stand for powers of two, "
            "only where the config says so (scale_dtype torch.uint8, scale_fmt ue8m0)."
        )
    lead, (rows, cols) = weight.shape[:-2], weight.shape[-2:]
    allowed = [(*lead, *shape) for shape in scheme.scale_shapes(rows, cols)]
    if lead and scheme.strategy == "tensor":
        allowed += [(*lead, 1, 1), lead, *((1,) * dims for dims in range(len(weight.shape) + 1))]
    if scheme.strategy == "block":  # as ModelOpt writes them
        allowed += [(*s[:-1], 1, s[-1], 1) for s in allowed]
    if scale.shape not in allowed:
        raise CheckpointError(
            f"{scale}: does not fit {weight.name} {list(weight.shape)} with {scheme}; "
            f"expected shape {' or '.join(str(list(s)) for s in allowed)}. Correct the strategy or block size in "
            "quantization_config (weight_block_size), or quantize it again."
        )
    if scheme.activation == "tensor":
        name = input_scale_name(weight.name)
        if name not in checkpoint:
            raise CheckpointError(f"{weight}: its scheme has a static activation scale, but {name} is missing.")
        scale = checkpoint[name]
        if scale.dtype not in SCALE_DTYPES or scale.shape not in ((1,), (), (1, 1), *([lead] if lead else [])):
            raise CheckpointError(f"{scale}: a static input_scale must be one float32, bfloat16 or float16 number.")


def check_leftovers(checkpoint: Checkpoint, used: Collection[str]) -> list[str]:
    """Refuses quantization parameters that no FP8 weight uses: leaving them out would change what the model computes.

    Args:
        used: names of the FP8 weights that are loaded, and of the scales they use.

    Returns:
        The names of the scales of the KV cache and of attention, which say how a cache may be stored.
    """
    cache = [name for name in checkpoint if _CACHE_SCALE.search(name)]
    for name in sorted(set(checkpoint) - set(used) - set(cache)):
        module, _, leaf = name.rpartition(".")
        if leaf not in _PARAMETERS:
            continue
        weight = checkpoint.get(f"{module}.weight")
        if weight is not None and weight.dtype == FP8_DTYPE:
            if leaf in ("weight_scale", "input_scale") and weight.name not in used:
                continue  # a layer the model leaves out, such as one for multi-token prediction
            reason = f"the scheme of {weight.name} uses no {leaf}"
        else:
            reason = f"{module}.weight is " + (f"{weight.dtype}, not FP8" if weight else "missing")
        raise CheckpointError(f"{checkpoint[name]}: {reason}. The file does not fit its config; quantize it again.")
    return cache


#: What compressed-tensors stores beside a weight.
_PARAMETERS = frozenset(
    [f"{of}_{what}" for of in ("weight", "input", "output") for what in ("scale", "zero_point", "global_scale")]
    + ["weight_g_idx", "weight_shape"]
)
_CACHE_SCALE = re.compile(r"\.([kvq]_scale|kv_scale|[kvq]_zero_point|[kv]_proj\.output_scale)$")


def decode_scale(stored: Tensor) -> Tensor:
    """The float32 values of a scale in any dtype a file may have; a byte e is 2^(e - 127)."""
    return stored.view(torch.float8_e8m0fnu).float() if stored.dtype == torch.uint8 else stored.float()


def encode_scale(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Inverse of `decode_scale`: exact for what came from there."""
    values = decode_scale(scale)
    return values.to(torch.float8_e8m0fnu).view(torch.uint8) if dtype == torch.uint8 else values.to(dtype)


#: A model has no tensor all of whose scales are larger: weights at the end of FP8's range would be above 7000.
_LARGEST_SCALE = 16


def check_scale_values(info: TensorInfo, scale: Tensor) -> None:
    """Refuses scales that are NaN, infinite, zero or negative, or reciprocals of scales."""
    values = decode_scale(scale)
    bad = ~(torch.isfinite(values * 448) & (values > 0))
    if bad.any():
        first = tuple(int(i) for i in bad.nonzero()[0]) if bad.dim() else ()
        raise CheckpointError(
            f"{info}: scale {values[first].item()} at index {list(first)}; scales must be finite and positive. "
            "The file is damaged or the calibration failed; quantize it again."
        )
    if values.numel() and (smallest := float(values.min())) > _LARGEST_SCALE:
        raise CheckpointError(
            f"{info}: scales from {smallest:g} on, so weights of up to {448 * smallest:g}: these look like the reciprocals "
            "of scales. A weight is its FP8 value times its scale; write 1 / scale instead."
        )


def check_powers(info: TensorInfo, scale: Tensor) -> None:
    """Refuses scales that are to be kept as bytes and are no powers of two."""
    if not torch.equal(decode_scale(encode_scale(scale, torch.uint8)), decode_scale(scale)):
        raise CheckpointError(
            f"{info}: scales that are no powers of two, but quantization_config says that they are (scale_dtype torch.uint8, "
            "scale_fmt ue8m0). Correct it."
        )


def has_nan(weight: Tensor) -> bool:
    """Whether a float8_e4m3fn tensor holds one of its two NaN values: 0x7f, the largest int8, and 0xff, the largest uint8."""
    data = weight.detach().view(torch.uint8).reshape(-1)
    return data.numel() > 0 and (int(data.view(torch.int8).max()) == 0x7F or int(data.max()) == 0xFF)


def _open(file: Path) -> safe_open:
    try:
        return safe_open(file, framework="pt", device="cpu")
    except FileNotFoundError as error:
        raise CheckpointError(f"{file}: no such file.") from error
    except (SafetensorError, OSError) as error:
        size = file.stat().st_size if file.is_file() else 0
        raise CheckpointError(
            f"{file.name}: not a readable safetensors file ({error}; {size} bytes on disk). Download it again."
        ) from error
