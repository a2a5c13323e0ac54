"""What is in the safetensors files of a checkpoint, read from their headers alone.

Everything that can be said to be wrong with a checkpoint without reading its weights is said here, before a model is
built: truncated files, missing shards, FP8 weights without a scale, scales of an odd shape or dtype.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import CheckpointError
from .formats import PLAIN, Format, canonical_names
from .stacked import unstack
from .tensor_info import TensorInfo

FP8_DTYPE = "F8_E4M3"
PACKED = "packed"  #: of a weight in another format, seen as one tensor (`packed.seen_as_weights`)
SCALE_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
#: Of scales that are powers of two: a byte e stands for 2^(e - 127), 255 for NaN.
EXPONENT_DTYPES = {"U8": torch.uint8, "F8_E8M0": torch.float8_e8m0fnu}
#: Of values in other formats than FP8.
INTEGER_DTYPES = {"I8": torch.int8, "U8": torch.uint8, "I16": torch.int16, "I32": torch.int32}
SINGLE_FILE, INDEX_FILE = "model.safetensors", "model.safetensors.index.json"


class Checkpoint(Mapping[str, TensorInfo]):
    """The tensors of a checkpoint by name, from the headers of its files.

    Args:
        format: how names end there, and how they end here (`formats.canonical_names`).
        chosen: by the name that files have for it, which file's tensor counts; None: each is in one file. Others are not seen.

    Raises:
        CheckpointError: a file cannot be opened, or two files hold a tensor of the same name.
    """

    def __init__(self, files: Iterable[str | Path], format: Format = PLAIN, chosen: Mapping[str, Path] | None = None):
        self._tensors: dict[str, TensorInfo] = {}
        self._open_files: dict[Path, safe_open] = {}
        for file in map(Path, files):
            handle = self._open_files[file] = _open(file)
            for name in handle.keys():  # noqa: SIM118 - a safe_open handle is no mapping
                if chosen is not None and chosen.get(name) != file:
                    continue
                view = handle.get_slice(name)
                info = TensorInfo(name, file, str(view.get_dtype()), tuple(view.get_shape()))
                if name in self._tensors:
                    raise CheckpointError(
                        f"{name} is in both {self._tensors[name].file.name} and {file.name}, and there is no {INDEX_FILE} that "
                        "says which is meant. Write one, or save the checkpoint again."
                    )
                self._tensors[name] = info
        self._spell(format)

    def _spell(self, format: Format) -> None:
        self.format = format
        named = {ours: self._tensors[name] for ours, name in canonical_names(self._tensors, format).items()}
        self._tensors = {
            name: replace(info, view=replace(info.view, inverse=True)) if name.endswith(format.inverse) else info
            for name, info in unstack(named).items()
        }

    def __getitem__(self, name: str) -> TensorInfo:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Reads some (small) tensors: their values, of reciprocals the reciprocals."""
        return {name: self.value(self[name]) for name in names}

    def value(self, info: TensorInfo) -> Tensor:
        """Reads one tensor: what of it the view is."""
        return info.view.of(self.read_stored(info))

    def read_stored(self, info: TensorInfo) -> Tensor:
        """Reads a tensor by what its file calls it; FP8 that a file keeps as bytes is FP8."""
        return _as_fp8(self._open_files[info.file].get_tensor(info.name), info)

    @property
    def metadata(self) -> dict[str, str]:
        """What the headers of the files say beside the tensors."""
        return {key: text for handle in self._open_files.values() for key, text in (handle.metadata() or {}).items()}

    def read_rows(self, info: TensorInfo, rows: int) -> Tensor:
        """Reads the first rows of a tensor."""
        if not info.shape:
            return self.read_stored(info)
        return _as_fp8(self._open_files[info.file].get_slice(info.name)[:rows], info)

    def spellings(self, name: str) -> list[str]:
        """Our name of a tensor, and what files of this format usually call it."""
        there = (
            name.removesuffix(ours) + theirs for theirs, ours in self.format.suffixes.items() if name.endswith(ours)
        )
        return list(dict.fromkeys([name, next(there, name)]))

    def headers(self) -> Checkpoint:
        """The same tensors, of which nothing can be read: no file is kept open."""
        out = copy.copy(self)
        out._open_files = {}
        return out

    def under(self, prefix: str, format: Format) -> Checkpoint:
        """The tensors below a prefix of their names, named as if there were none, in another format."""
        out = copy.copy(self)
        out._tensors = {
            name.removeprefix(prefix): info for name, info in self._tensors.items() if name.startswith(prefix)
        }
        out._spell(format)
        return out

    def changed(self, hidden: Collection[str], added: Mapping[str, TensorInfo]) -> Checkpoint:
        """The same files, seen without some tensors and with others in their place."""
        out = copy.copy(self)
        out._tensors = {name: info for name, info in self._tensors.items() if name not in hidden} | dict(added)
        return out


class InMemory(Checkpoint):
    """The same view of a state dict."""

    def __init__(self, state_dict: Mapping[str, Tensor], format: Format = PLAIN):
        self._state = state_dict
        self._tensors = {
            name: TensorInfo(name, Path("state dict"), _DTYPE_NAMES.get(t.dtype, str(t.dtype)), tuple(t.shape))
            for name, t in state_dict.items()
        }
        self._spell(format)

    def read_stored(self, info: TensorInfo) -> Tensor:
        return _as_fp8(self._state[info.name], info)

    def read_rows(self, info: TensorInfo, rows: int) -> Tensor:
        return self.read_stored(info)[:rows] if info.shape else self.read_stored(info)

    @property
    def metadata(self) -> dict[str, str]:
        return {}


def _as_fp8(stored: Tensor, info: TensorInfo) -> Tensor:
    is_bytes = info.dtype == FP8_DTYPE and stored.dtype == torch.uint8
    return stored.view(torch.float8_e4m3fn) if is_bytes else stored


_DTYPE_NAMES = {
    torch.float8_e4m3fn: FP8_DTYPE,
    torch.float8_e5m2: "F8_E5M2",
    torch.float64: "F64",
    torch.int64: "I64",
} | {dtype: name for name, dtype in (SCALE_DTYPES | EXPONENT_DTYPES | INTEGER_DTYPES).items()}


def names_in(file: Path) -> list[str]:
    """Names of the tensors of a safetensors file.

    Raises:
        CheckpointError: it cannot be opened.
    """
    return list(_open(file).keys())


def nbytes(info: TensorInfo) -> int:
    """Bytes of a tensor in its file."""
    sizes = {"I64": 8, "F64": 8, "F32": 4, "I32": 4, "BF16": 2, "F16": 2, "I16": 2}
    return math.prod(info.shape) * sizes.get(info.dtype, 1)


def check_weight(info: TensorInfo) -> None:
    """Refuses a dtype that a floating-point parameter cannot be filled from without losing what it says."""
    if info.dtype.upper() == "F8_E4M3FNUZ":
        raise CheckpointError(
            f"{info}: the FP8 of AMD's MI300, other numbers for the same bits. Store it as float8_e4m3fn with the scale it has, "
            "x.float().to(torch.float8_e4m3fn), which rounds only numbers below 2^-6; or quantize the original again."
        )
    if "E5M2" in info.dtype.upper() or "FNUZ" in info.dtype.upper():
        raise CheckpointError(
            f"{info}: of all 8-bit floats, only float8_e4m3fn is read as a weight. Quantize it again."
        )
    if info.dtype == "F8_E8M0":
        raise CheckpointError(f"{info}: exponents, where the model declares numbers. Store their values: x.float().")
    if info.dtype not in (FP8_DTYPE, PACKED, "F64", *SCALE_DTYPES):
        raise CheckpointError(
            f"{info}: not a floating-point tensor, as the model declares it. Store it as one (x.float()), or declare it as the "
            "file has it."
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


def decode_scale(stored: Tensor) -> Tensor:
    """The float32 values of a scale in any dtype a file may have; a byte e is 2^(e - 127)."""
    return stored.view(torch.float8_e8m0fnu).float() if stored.dtype == torch.uint8 else stored.float()


def encode_scale(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Inverse of `decode_scale`: exact for what came from there."""
    values = decode_scale(scale)
    return values.to(torch.float8_e8m0fnu).view(torch.uint8) if dtype == torch.uint8 else values.to(dtype)


#: A model has no tensor all of whose scales are larger: weights at the end of FP8's range would be above 7000.
_LARGEST_SCALE = 16


def check_scale_values(info: TensorInfo, scale: Tensor, zero: Tensor | None = None, directed: bool = False) -> None:
    """Refuses scales that are NaN, infinite, zero or negative, or reciprocals of scales.

    Args:
        zero: where a scale may be zero.
        directed: the config says which way scales go, so that large ones are no reciprocals.
    """
    values = decode_scale(scale)
    bad = ~(torch.isfinite(values * 448) & (values > 0))
    if zero is not None:
        bad &= ~zero
    if bad.any():
        first = tuple(int(i) for i in bad.nonzero()[0]) if bad.dim() else ()
        raise CheckpointError(
            f"{info}: scale {values[first].item()} at index {list(first)}; scales must be finite and positive. "
            "The file is damaged or the calibration failed; quantize it again."
        )
    values = values[values > 0]
    if not directed and values.numel() and (smallest := float(values.min())) > _LARGEST_SCALE:
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
