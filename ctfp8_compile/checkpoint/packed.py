"""Weights of a mixed file that are not FP8 (INT8, packed INT4, NVFP4), or FP8 with zero points: compressed-tensors' own code
dequantizes them.

A file may quantize some layers to FP8 and others to another format. No kernel here reads the others; so that the whole model
runs, they are made plain weights once, while loading. Their values are carried to the parameter as they are, like FP8 values,
since a row of them is a row of the weight in all of these formats (`layout`); there they are dequantized.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.compressors.format import infer_module_format
from compressed_tensors.config import CompressionFormat
from compressed_tensors.quantization import QuantizationScheme
from torch import Tensor

from ..counted import agreeing, such_as
from ..errors import CheckpointError, SchemeError
from .files import FP8_DTYPE, INTEGER_DTYPES, PACKED, SCALE_DTYPES, Checkpoint, TensorInfo, nbytes
from .layout import Layout
from .scheme import Scheme, Schemes, is_fp8, word

#: What stands beside weights whose activations are quantized too. Those stay as they are: it is not read.
_ACTIVATIONS = ("input_scale", "input_zero_point", "input_global_scale")


@dataclass(frozen=True)
class PackedWeight:
    """One weight in another format than FP8.

    Attributes:
        name: `….weight`; `info` is it as if it were a tensor of its own, of dtype `PACKED`.
        packed: the tensor that holds it: `….weight_packed`, or `….weight` of integers.
        parts: all tensors of the file that belong to it, by the last part of their names.
        group: the config's name of the group that covers it.
        format: compressed-tensors' name of the format.
        scheme: the group.
    """

    info: TensorInfo
    packed: TensorInfo
    parts: Mapping[str, TensorInfo]
    group: str
    format: str
    scheme: QuantizationScheme

    @property
    def kind(self) -> str:
        """In words: `4-bit int, pack-quantized`."""
        return f"{self.scheme.weights.num_bits}-bit {word(self.scheme.weights.type)}, {self.format}"

    @property
    def packed_dtype(self) -> torch.dtype:
        return torch.float8_e4m3fn if self.packed.dtype == FP8_DTYPE else INTEGER_DTYPES[self.packed.dtype]

    @property
    def leaf(self) -> str:
        """The last part of the packed tensor's name, in compressed-tensors' words."""
        return next(leaf for leaf, part in self.parts.items() if part == self.packed)

    def dequantize(self, parts: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
        """The weight's values, from the tensors of `parts`.

        Raises:
            CheckpointError: they do not fit each other, or give values that are not finite.
        """
        compressor = BaseCompressor.get_value_from_registry(self.format)
        try:
            value = compressor.decompress(dict(parts), self.scheme)["weight"]
        except (AssertionError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"{self.packed}: cannot be dequantized as {self.format} ({error!r}). Download it again."
            ) from error
        if tuple(value.shape) != self.info.shape or not torch.isfinite(value).all():
            raise CheckpointError(
                f"{self.packed}: dequantized as {self.format}, it has values that are not finite, or another shape than "
                f"{list(self.info.shape)}. The file is damaged; quantize it again."
            )
        return value.to(dtype)


def find(tensors: Checkpoint, schemes: Schemes, read_shapes: bool = True) -> dict[str, PackedWeight]:
    """The weights of a checkpoint in other formats, by name, checked as far as headers and stored shapes tell.

    Args:
        read_shapes: also read `weight_shape`, which is no header. Without it a last column may be counted that is none.

    Raises:
        CheckpointError, SchemeError: one cannot be read, naming the tensor.
    """
    found = {}
    for name, info in tensors.items():
        module, _, leaf = name.rpartition(".")
        integers = leaf == "weight" and info.dtype in INTEGER_DTYPES and len(info.shape) == 2
        if leaf == "weight_packed" or integers or (leaf == "weight" and is_shifted(tensors, schemes, module)):
            found[f"{module}.weight"] = _packed(tensors, schemes, module, leaf, read_shapes)
    return found


def is_shifted(tensors: Checkpoint, schemes: Schemes, module: str) -> bool:
    """Whether the FP8 weight of a module is asymmetric: its zero points are not all zero, and its group says that it has some.

    Raises:
        SchemeError: it is a stack of matrices.
    """
    weight, zero = tensors.get(f"{module}.weight"), tensors.get(f"{module}.weight_zero_point")
    if weight is None or zero is None or weight.dtype != FP8_DTYPE:
        return False
    groups = (schemes.config.config_groups[name].weights for name in schemes.covering(module))
    if not any(args is not None and is_fp8(args) and not args.symmetric for args in groups):
        return False
    if not tensors.read_stored(zero).float().any():
        return False
    if len(weight.shape) != 2:
        raise SchemeError(
            f"{weight}: asymmetric, and a stack of matrices, which is not read. Store one for each expert."
        )
    return True


def seen_as_weights(tensors: Checkpoint, packed: Mapping[str, PackedWeight]) -> Checkpoint:
    """The same checkpoint, in which each of these weights is one tensor of dtype `PACKED`."""
    hidden = {f"{name.removesuffix('weight')}{leaf}" for name, weight in packed.items() for leaf in weight.parts}
    return tensors.changed(hidden, {name: weight.info for name, weight in packed.items()})


def sentence(packed: Iterable[PackedWeight], dtype: torch.dtype) -> str:
    """What dequantizing costs: `6 weights are not FP8 (4-bit int, pack-quantized): …`."""
    weights = list(packed)
    kinds = sorted({weight.kind for weight in weights})
    what = "FP8 with zero points" if all(map(_is_fp8, weights)) else f"not FP8 ({'; '.join(kinds)})"
    count = len(weights)
    values = sum(math.prod(weight.info.shape) for weight in weights) * dtype.itemsize
    stored = sum(nbytes(part) for weight in weights for part in weight.parts.values())
    return (
        f"{such_as(count, 'weight', weights[0].info.name)} {agreeing(count, 'is', 'are')} {what}"
        f": dequantized to {str(dtype).removeprefix('torch.')} by compressed-tensors, {agreeing(count, 'it takes', 'they take')} "
        f"{values:,} bytes of memory "
        f"where the file has {stored:,}"
    )


def _is_fp8(weight: PackedWeight) -> bool:
    return weight.packed.dtype == FP8_DTYPE


@dataclass(frozen=True)
class PackedParameter:
    """A parameter of a model that is made of such weights.

    Attributes:
        layout: of its values, as the model's rows.
        dtype: what it is dequantized to.
        weights: by name.
    """

    layout: Layout
    dtype: torch.dtype
    weights: Mapping[str, PackedWeight]

    @staticmethod
    def of(layout: Layout, dtype: torch.dtype, packed: Mapping[str, PackedWeight]) -> PackedParameter:
        """The values of merged weights lie in one tensor: `model.mixed` is for those that cannot."""
        weights = {source: packed[source] for source in layout.sources}
        return PackedParameter(layout, dtype, weights)

    @property
    def packed_layout(self) -> Layout:
        return replace(self.layout, shape=(*self.layout.shape[:-1], self._any.packed.shape[-1]))

    @property
    def packed_dtype(self) -> torch.dtype:
        return self._any.packed_dtype

    @property
    def _any(self) -> PackedWeight:
        return next(iter(self.weights.values()))

    def read(self, tensors: Checkpoint) -> dict[str, dict[str, Tensor]]:
        """By weight, all its tensors but the packed values."""
        return {name: {leaf: tensors.value(part) for leaf, part in weight.parts.items() if part != weight.packed}
                for name, weight in self.weights.items()}  # fmt: skip

    def again(self, tensors: Checkpoint) -> tuple[Tensor, dict[str, Tensor]]:
        """The parameter's value, and by their names in the file all tensors that it is made of, read anew."""
        parts = {
            name: {leaf: tensors.value(part) for leaf, part in w.parts.items()} for name, w in self.weights.items()
        }
        stored = {part.name: tensors.read_stored(part) for w in self.weights.values() for part in w.parts.values()}
        return self.merged({n: parts[n][w.leaf] for n, w in self.weights.items()}, parts), stored

    def merged(self, packed: Mapping[str, Tensor], others: Mapping[str, Mapping[str, Tensor]]) -> Tensor:
        """`value` of the packed values of each weight."""
        return self.value(self.packed_layout.weight(packed), others)

    def value(self, packed: Tensor, others: Mapping[str, Mapping[str, Tensor]]) -> Tensor:
        """The parameter as the model declares it, on the device of its packed values."""
        layout = self.layout
        out = torch.empty(layout.shape, dtype=self.dtype, device=packed.device)
        rows = out.view(-1, layout.shape[-1])
        for name, weight in self.weights.items():
            parts = {leaf: tensor.to(packed.device) for leaf, tensor in others[name].items()}
            parts[weight.leaf] = self.packed_layout.split_weight(packed, name)
            value = weight.dequantize(parts, self.dtype)
            for p in layout.placements:
                if p.source == name:
                    rows[p.span] = value if p.index is None else value[p.index]
        return out.transpose(-1, -2).contiguous() if layout.transposed else out


def _covered_as_fp8(schemes: Schemes, module: str) -> bool:
    """Whether a module's weight is FP8 by all that its config says."""
    groups = schemes.config.config_groups
    found = [args for name in schemes.covering(module) if (args := groups[name].weights) is not None]
    return bool(found) and all(is_fp8(args) for args in found)


def _packed(tensors: Checkpoint, schemes: Schemes, module: str, leaf: str, read_shapes: bool) -> PackedWeight:
    packed = tensors[f"{module}.{leaf}"]
    groups = schemes.config.config_groups
    shifted = packed.dtype == FP8_DTYPE
    fitting = (name for name in schemes.covering(module) if (args := groups[name].weights) and is_fp8(args) == shifted)
    group = next((name for name in fitting if not shifted or not groups[name].weights.symmetric), None)
    scheme = None if group is None else groups[group]
    if packed.dtype == "U8" and f"{module}.{leaf}" == f"{module}.weight" and _covered_as_fp8(schemes, module):
        raise SchemeError(
            f"{packed}: bytes, where {schemes.describe(module)} of quantization_config has FP8. If they are the bits of FP8, as "
            "MLX writes them, store them as that: x.view(torch.float8_e4m3fn)."
        )
    if group is None or scheme is None:
        raise SchemeError(
            f"{packed}: quantized in another format than FP8, but {schemes.describe(module)} of quantization_config covers it. "
            "Correct its targets or ignore list."
        )
    try:
        format_ = str(CompressionFormat(scheme.format or infer_module_format(torch.nn.Linear, scheme)).value)
        names = BaseCompressor.get_value_from_registry(format_).compression_param_names(scheme)
    except (KeyError, NotImplementedError, StopIteration, ValueError) as error:
        raise SchemeError(
            f"{packed}: group {group!r} says format={scheme.format!r}, which compressed-tensors cannot dequantize."
        ) from error
    missing = [name for name in names if name.startswith("weight") and f"{module}.{name}" not in tensors]
    if leaf not in names or missing:
        what = f"which needs {module}.{missing[0]}" if missing else f"which has no {leaf}"
        raise CheckpointError(
            f"{packed}: group {group!r} says {format_}, {what}. The file does not fit its config; quantize it again."
        )
    parts = {name: tensors[f"{module}.{name}"] for name in (*names, *_ACTIVATIONS) if f"{module}.{name}" in tensors}
    shape = packed.shape if leaf == "weight" else ()
    shape = shape or _shape(tensors, packed, parts.get("weight_shape") if read_shapes else None, scheme)
    _check_scales(packed, parts, shape, scheme)
    info = TensorInfo(f"{module}.weight", packed.file, PACKED, shape)
    return PackedWeight(info, packed, parts, group, format_, scheme)


def _shape(
    tensors: Checkpoint, packed: TensorInfo, stored: TensorInfo | None, scheme: QuantizationScheme
) -> tuple[int, ...]:
    """Of the weight: stored in the file, or what the packed values hold."""
    if packed.dtype not in (*INTEGER_DTYPES, FP8_DTYPE) or len(packed.shape) != 2:
        raise CheckpointError(
            f"{packed}: not a matrix of packed values. The file does not fit its config; quantize it again."
        )
    rows, cols = packed.shape
    held, bits = 8 * INTEGER_DTYPES[packed.dtype].itemsize, int(scheme.weights.num_bits)
    if stored is None:
        return rows, cols * held // bits
    shape = tuple(int(n) for n in tensors.read_stored(stored).reshape(-1))
    if len(shape) != 2 or shape[0] != rows or math.ceil(shape[1] * bits / held) != cols:
        raise CheckpointError(
            f"{packed}: does not hold a weight of {bits} bits of the shape in {stored.name}, {list(shape)}. The file does not "
            "fit its config; quantize it again."
        )
    return shape


def _check_scales(
    packed: TensorInfo, parts: Mapping[str, TensorInfo], shape: tuple[int, ...], scheme: QuantizationScheme
) -> None:
    """compressed-tensors spreads scales of other shapes as torch does, which gives some value: refuse them."""
    args = scheme.weights
    scale, (rows, cols) = parts["weight_scale"], shape
    strategy = word(args.strategy).replace("tensor_group", "group")
    block = tuple(args.block_structure or (1, args.group_size or 0))
    allowed = Scheme(strategy, block, "none").scale_shapes(rows, cols)[: 3 if strategy == "tensor" else 1]
    dtypes = set(SCALE_DTYPES) if args.scale_dtype is None else {*SCALE_DTYPES, "U8", FP8_DTYPE}
    if args.num_bits == 4 and word(args.type) == "float":
        dtypes = {FP8_DTYPE} if args.group_size == 16 else {"U8"}
    if scale.shape not in allowed or scale.dtype not in dtypes:
        raise CheckpointError(
            f"{scale}: not a scale of {packed}, by its group of quantization_config; expected shape "
            f"{' or '.join(str(list(s)) for s in allowed)} and {' or '.join(sorted(dtypes))}. Quantize it again."
        )
    whole = parts.get("weight_global_scale")
    if whole is not None and (math.prod(whole.shape) != 1 or whole.dtype not in SCALE_DTYPES):
        raise CheckpointError(f"{whole}: of {packed}; expected shape [1]. Quantize it again.")
    zero = parts.get("weight_zero_point")
    packed_rows = math.ceil(rows * args.num_bits / 32) if "weight_packed" in parts else rows
    if zero is not None and zero.shape not in (scale.shape, (packed_rows, *scale.shape[1:])):
        raise CheckpointError(
            f"{zero}: not the zero points of {packed}; its shape does not fit the scale's. Quantize it again."
        )
