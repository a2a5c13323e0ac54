"""What a checkpoint says of one quantized weight: how it is scaled, and how its input is to be quantized.

The vocabulary is compressed-tensors' own: its config classes parse and validate `quantization_config`, its matching
decides which module a group covers. This file only reduces the result to the few facts that rules and kernels ask for.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import regex
import torch
from compressed_tensors.config import CompressionFormat
from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, QuantizationScheme
from compressed_tensors.utils.match import match_targets
from pydantic import ValidationError

from ..errors import SchemeError
from .formats import read_format

#: Activation schemes: not quantized; one dynamic scale per token; one static scale per tensor (`input_scale`);
#: one dynamic scale per tensor; one dynamic scale per token and group of 128 columns; one that is a power of two per token
#: and group of 32 columns. `token<=1200.0` is `token` with a bound: larger values are taken for it.
ACTIVATIONS = ("none", "token", "tensor", "tensor_dynamic", "group", "mx")

MX_BLOCK = (1, 32)


@dataclass(frozen=True)
class Scheme:
    """How one weight `[..., N, K]` of a checkpoint is quantized.

    Attributes:
        strategy: compressed-tensors' name: `tensor`, `channel`, `block` or `group`.
        block: rows and columns of the weight that share one scale; 0 stands for "all of them".
            tensor `(0, 0)`, channel `(1, 0)`, group of 64 columns `(1, 64)`, block `(128, 128)`.
        activation: one of `ACTIVATIONS`.
        exponents: scales are powers of two, and may be stored as bytes.
    """

    strategy: str
    block: tuple[int, int]
    activation: str
    exponents: bool = False

    @property
    def scale_dtype(self) -> torch.dtype:
        """What scales are kept in: bytes where there are so many of them that it matters (MXFP8: one for 32 weights)."""
        return torch.uint8 if self.exponents and self.block == MX_BLOCK else torch.float32

    def scale_shapes(self, rows: int, cols: int) -> tuple[tuple[int, ...], ...]:
        """Shapes in which a checkpoint may store the scale of a `[rows, cols]` weight; the first is the usual one."""
        if self.strategy == "tensor":
            return ((1,), (), (1, 1))
        if self.strategy == "channel":
            return ((rows, 1), (rows,))
        return ((math.ceil(rows / self.block[0]), math.ceil(cols / self.block[1])),)

    def __str__(self) -> str:
        size = f" {self.block[0]}x{self.block[1]}" if self.strategy in ("block", "group") else ""
        return f"{self.strategy}{size}{' power-of-two' * self.exponents} weights, {self.activation} activations"


class Schemes:
    """The schemes of a checkpoint, by module name.

    Args:
        quantization_config: the dict under `quantization_config` in a checkpoint's `config.json`, of any format.

    Attributes:
        format: how the checkpoint spells its config and its tensors' names.

    Raises:
        SchemeError: a method we do not know, or a config its own classes refuse.
    """

    def __init__(self, quantization_config: Mapping[str, Any]):
        self.format = read_format(quantization_config)
        quantization_config = self.format.config
        known = {k: v for k, v in quantization_config.items() if k in QuantizationConfig.model_fields}
        try:
            self.config = QuantizationConfig.model_validate(known)
            if "format" in known:
                CompressionFormat(self.config.format)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(key) for key in first["loc"] if "(" not in str(key))
            raise SchemeError(f"quantization_config: {where}: {first['msg']}") from error
        except (NotImplementedError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise SchemeError(f"quantization_config is not a valid compressed-tensors config: {error}") from error
        if not self.config.config_groups:
            raise SchemeError(
                "quantization_config has no config_groups, so no weight is quantized. "
                "Load the checkpoint with transformers' own from_pretrained."
            )
        found = quantization_config.get("sparsity_config") or {}
        if not isinstance(found, Mapping) or found.get("format") not in (None, {}, "dense"):
            raise SchemeError(
                f"quantization_config has a sparsity_config, {found!r}, which is not supported; leaving it out would give "
                "wrong results. Load the checkpoint with transformers' own from_pretrained."
            )
        self._group_of_target: dict[str, str] = {
            target: name for name, group in self.config.config_groups.items() for target in group.targets
        }
        self._schemes: dict[str, Scheme] = {}
        for name in (*self._group_of_target, *(self.config.ignore or ())):
            try:
                regex.compile(name.removeprefix("re:") if name.startswith("re:") else "")
            except regex.error as error:
                raise SchemeError(f"quantization_config: {name!r} is not a regular expression ({error}).") from error

    def group(self, module_name: str) -> str | None:
        """Name of the config group that covers a Linear of this name in the checkpoint; None where none does.

        Matching uses the *checkpoint's* module name, because that is what targets and ignore lists were written
        against (transformers renames modules while loading).
        """
        if self.ignores(module_name):
            return None
        matched = _matches(module_name, self._group_of_target)
        return self._group_of_target[matched[0]] if matched else None

    def ignores(self, module_name: str) -> bool:
        """Whether the config's ignore list names a Linear of this name in the checkpoint."""
        return bool(_matches(module_name, self.config.ignore or ()))

    def describe(self, module_name: str) -> str:
        """The group that covers a module, in words: `group 'group_1' (4-bit int weights)`."""
        group = self.group(module_name)
        if group is None:
            return "no group"
        return f"group {group!r} ({_describe(self.config.config_groups[group].weights)} weights)"

    def scheme(self, module_name: str) -> Scheme | None:
        """The scheme of the FP8 weight of this module; None where no group covers it.

        Raises:
            SchemeError: the group that covers it is not one of FP8 weights, or not one we can honour.
        """
        group = self.group(module_name)
        if group is None:
            return None
        if group not in self._schemes:
            try:
                self._schemes[group] = _reduce(self.config.config_groups[group], self.format.bound)
            except SchemeError as error:
                raise SchemeError(f"{module_name} (group {group!r} of quantization_config): {error}") from None
        return self._schemes[group]


def _matches(module_name: str, targets: Iterable[str]) -> list[str]:
    """The targets that match a Linear of this name, in compressed-tensors' order: names, expressions, classes.

    Expressions come from a file, and may be ones that take longer than the universe; so they are matched here, in bounded time.
    """
    plain = match_targets(module_name, _LINEAR, [t for t in targets if not t.startswith("re:")])
    names = [t for t in plain if t == module_name]
    expressions = sorted(t for t in targets if t.startswith("re:") and matches_expression(module_name, t))
    return [*names, *expressions, *(t for t in plain if t != module_name)]


def matches_expression(module_name: str, target: str) -> bool:
    """Whether a `re:` target matches a module's name from its start.

    Raises:
        SchemeError: it takes too long, or is not an expression.
    """
    try:
        return regex.match(target.removeprefix("re:"), module_name, timeout=_SECONDS) is not None
    except TimeoutError:
        raise SchemeError(
            f"quantization_config: {target!r} takes longer than {_SECONDS:g} s to match {module_name}. "
            "Write it without repeats inside repeats."
        ) from None
    except regex.error as error:
        raise SchemeError(f"quantization_config: {target!r} is not a regular expression ({error}).") from None


_SECONDS = 2.0
_LINEAR = torch.nn.Linear(1, 1, device="meta")


def _reduce(scheme: QuantizationScheme, bound: float | None) -> Scheme:
    weights = scheme.weights
    if weights is None or not is_fp8(weights):
        raise SchemeError(f"its weights are not FP8 ({_describe(weights)}), but the file holds float8_e4m3fn")
    if not weights.symmetric:
        raise SchemeError("asymmetric FP8 weights (zero points) are not supported")
    if scheme.output_activations is not None:
        raise SchemeError("quantized outputs (output_activations) are not supported")
    strategy = word(weights.strategy)
    if strategy == "tensor":
        block = (0, 0)
    elif strategy == "channel":
        block = (1, 0)
    elif strategy == "group" and (weights.group_size or 0) > 0:
        block = (1, weights.group_size)
    elif strategy == "block" and weights.block_structure and min(weights.block_structure) > 0:
        block = (int(weights.block_structure[0]), int(weights.block_structure[1]))
    else:
        raise SchemeError(f"weight strategy {strategy!r} is not supported; known are tensor, channel, group and block")
    activation = _activation(scheme.input_activations)
    if bound is not None and activation == "token":
        activation = f"token<={bound}"
    return Scheme(strategy, block, activation, weights.scale_dtype == torch.uint8)


def _activation(args: QuantizationArgs | None) -> str:
    if args is None:
        return "none"
    if not is_fp8(args) or not args.symmetric:
        raise SchemeError(f"activations that are not symmetric FP8 ({_describe(args)}) are not supported")
    strategy, dynamic = word(args.strategy), args.dynamic
    if strategy == "tensor":
        return "tensor" if dynamic is False else "tensor_dynamic"
    if strategy == "token" and dynamic is True:
        return "token"
    if strategy == "group" and dynamic is True and args.group_size == 128 and args.scale_dtype != torch.uint8:
        return "group"
    if strategy == "group" and dynamic is True and args.group_size == 32 and args.scale_dtype == torch.uint8:
        return "mx"
    raise SchemeError(
        f"activation strategy {strategy!r} with dynamic={dynamic}, group_size={args.group_size} is unknown"
    )


def is_fp8(args: QuantizationArgs) -> bool:
    """Whether values are stored as 8-bit floats."""
    return word(args.type) == "float" and args.num_bits == 8


def _describe(args: QuantizationArgs | None) -> str:
    return "none" if args is None else f"{args.num_bits}-bit {word(args.type)}"


def word(enum_or_str: Any) -> str:
    """compressed-tensors keeps either."""
    return str(getattr(enum_or_str, "value", enum_or_str))
