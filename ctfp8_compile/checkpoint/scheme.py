"""What a checkpoint says of one quantized weight: how it is scaled, and how its input is to be quantized.

The vocabulary is compressed-tensors' own: its config classes parse and validate `quantization_config`, its matching
decides which module a group covers. This file only reduces the result to the few facts that rules and kernels ask for.
"""

from __future__ import annotations

import fnmatch
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
from .aliases import aliases
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
        high, wide = (size or "all" for size in self.block)
        size = f" {high}x{wide}" if self.strategy in ("block", "group") else ""
        return f"{self.strategy}{size}{' power-of-two' * self.exponents} weights, {self.activation} activations"


class Schemes:
    """The schemes of a checkpoint, by module name.

    Args:
        quantization_config: the dict under `quantization_config` in a checkpoint's `config.json`, of any format.

    Attributes:
        format: how the checkpoint spells its config and its tensors' names.
        heads: numbers of heads of the model's attention, in which weights may have been quantized one by one.
        embeddings: names of modules that are embeddings; all others are taken for Linears.

    Raises:
        SchemeError: a method we do not know, or a config its own classes refuse.
    """

    def __init__(self, quantization_config: Mapping[str, Any]):
        self.format = read_format(quantization_config)
        quantization_config = self.format.config
        known = {k: v for k, v in quantization_config.items() if k in QuantizationConfig.model_fields}
        if not known.get("config_groups") and known.get(
            "kv_cache_scheme"
        ):  # a file of which the cache alone is quantized
            known["config_groups"] = {"group_0": {"targets": []}}
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
                "quantization_config has no config_groups, so no weight is quantized. If the file holds FP8 weights all the "
                "same, pass the config that they were made with: from_pretrained(..., quantization_config={...}); if it holds "
                "none, remove quantization_config from its config.json and load it with transformers."
            )
        _refuse_unread(quantization_config)
        self._group_of_target: dict[str, str] = {
            target: name for name, group in self.config.config_groups.items() for target in group.targets
        }
        self.heads: frozenset[int] = frozenset()
        self._schemes: dict[str, Scheme] = {}
        self.embeddings: set[str] = set()
        self._covering: dict[tuple[str, bool], list[str]] = {}
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
        return None if self.ignores(module_name) else next(iter(self.covering(module_name)), None)

    def covering(self, module_name: str) -> list[str]:
        """Names of all groups that cover a module of this name, whatever the ignore list says: those that name it first, then
        those that name it fused or unfused, then those that name its class."""
        kind, key = self._kind(module_name), (module_name, module_name in self.embeddings)
        if key not in self._covering:
            targets = self._group_of_target
            named = [t for name in (module_name, *aliases(module_name)) for t in _named(name, targets, kind)]
            found = [self._group_of_target[t] for t in (*named, *_matches(module_name, targets, kind))]
            self._covering[key] = list(dict.fromkeys(found))
        return self._covering[key]

    def ignores(self, module_name: str) -> bool:
        """Whether the config's ignore list names a Linear of this name in the checkpoint."""
        return bool(_matches(module_name, self.config.ignore or (), self._kind(module_name)))

    def _kind(self, module_name: str) -> torch.nn.Module:
        return _EMBEDDING if module_name in self.embeddings else _LINEAR

    def describe(self, module_name: str) -> str:
        """The group that covers a module, in words: `group 'group_1' (4-bit int weights)`."""
        group = self.group(module_name)
        if group is None:
            return "no group"
        return f"group {group!r} ({_describe(self.config.config_groups[group].weights)} weights)"

    def scheme(self, module_name: str) -> Scheme | None:
        """What the config says of the FP8 weight of this module; None where no group covers it.

        Raises:
            SchemeError: the group that covers it is not one of FP8 weights, or not one we can honour.
        """
        group = self.group(module_name)
        return None if group is None else self.scheme_of_group(group, module_name)

    def scheme_of_group(self, group: str, module_name: str) -> Scheme:
        """What a group says of the FP8 weight of a module.

        Raises:
            UnlikeError: it is a group of other weights than FP8 ones, or of a strategy that FP8 weights do not have.
            SchemeError: it asks for something that we cannot honour.
        """
        if group not in self._schemes:
            try:
                self._schemes[group] = _reduce(self.config.config_groups[group], self.format.bound)
            except SchemeError as error:
                where = f"{module_name} (group {group!r} of quantization_config)"
                raise type(error)(f"{where}: {error}") from None
        return self._schemes[group]

    def activation_of_group(self, group: str) -> str:
        """What a group says of inputs: one of `ACTIVATIONS`.

        Raises:
            SchemeError: they are quantized in a way that we cannot honour.
        """
        return _activation(self.config.config_groups[group].input_activations, self.format.bound)

    def blocks(self) -> list[tuple[int, int]]:
        """The blocks of all groups of FP8 weights."""
        found = []
        for scheme in self.config.config_groups.values():
            try:
                found.append(_block(scheme.weights))
            except SchemeError:
                continue
        return list(dict.fromkeys(found))


def _refuse_unread(config: Mapping[str, Any]) -> None:
    """Refuses what changes the values of a model and is not read here. Transforms are read by `transforms`."""
    found = config.get("sparsity_config") or {}
    if not isinstance(found, Mapping) or found.get("format") not in (None, {}, "dense"):
        raise SchemeError(
            f"quantization_config has a sparsity_config, {found!r}, which is not read here; leaving it out would give wrong "
            "results, as transformers does. Serve the checkpoint with vLLM, or quantize it without."
        )


class UnlikeError(SchemeError):
    """A group is not one of FP8 weights that a file could hold."""


def _named(module_name: str, targets: Iterable[str], kind: torch.nn.Module) -> list[str]:
    """The targets that are a module's name or match it, without those that are its class."""
    return [t for t in _matches(module_name, targets, kind) if t == module_name or "*" in t or t.startswith("re:")]


def _matches(module_name: str, targets: Iterable[str], kind: torch.nn.Module) -> list[str]:
    """The targets that match a module of this name and kind, in compressed-tensors' order: names, expressions, classes.

    Expressions come from a file, and may be ones that take longer than the universe; so they are matched here, in bounded time.
    """
    words = [t for t in targets if not t.startswith("re:")]
    plain = match_targets(module_name, kind, words)
    plain += [t for t in words if t.lower() == "linear" and kind is _LINEAR and t not in plain]
    names = [t for t in words if t == module_name or ("*" in t and fnmatch.fnmatchcase(module_name, t))]
    expressions = sorted(t for t in targets if t.startswith("re:") and matches_expression(module_name, t))
    return [*names, *expressions, *(t for t in plain if t not in names)]


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
_LINEAR, _EMBEDDING = torch.nn.Linear(1, 1, device="meta"), torch.nn.Embedding(1, 1, device="meta")


def _reduce(scheme: QuantizationScheme, bound: float | None) -> Scheme:
    weights = scheme.weights
    block = _block(weights)
    assert weights is not None
    if scheme.output_activations is not None:
        raise SchemeError("quantized outputs (output_activations) are not supported")
    activation = _activation(scheme.input_activations, bound)
    return Scheme(strategy_of(block), block, activation, weights.scale_dtype == torch.uint8)


def _block(weights: QuantizationArgs | None) -> tuple[int, int]:
    """Rows and columns that share a scale."""
    if weights is None or not is_fp8(weights):
        raise UnlikeError(f"its weights are not FP8 ({_describe(weights)}), but the file holds float8_e4m3fn")
    strategy = word(weights.strategy)
    if strategy == "tensor":
        return (0, 0)
    if strategy == "channel":
        return (1, 0)
    if strategy == "group" and (weights.group_size or 0) > 0:
        return (1, weights.group_size)
    if strategy == "block" and weights.block_structure and min(weights.block_structure) > 0:
        return int(weights.block_structure[0]), int(weights.block_structure[1])
    raise UnlikeError(f"weight strategy {strategy!r} is not supported; known are tensor, channel, group and block")


def strategy_of(block: tuple[int, int]) -> str:
    """compressed-tensors' name of weights that have a scale for each of these blocks."""
    usual = {(0, 0): "tensor", (1, 0): "channel"}
    return usual.get(block, "group" if block[0] == 1 else "block")


def _activation(args: QuantizationArgs | None, bound: float | None) -> str:
    if args is None:
        return "none"
    if not is_fp8(args) or not args.symmetric:
        raise SchemeError(f"activations that are not symmetric FP8 ({_describe(args)}) are not supported")
    strategy, dynamic = word(args.strategy), args.dynamic
    if strategy == "tensor":
        return "tensor" if dynamic is False else "tensor_dynamic"
    if strategy == "token" and dynamic is True:
        return "token" if bound is None else f"token<={bound}"
    if strategy == "group" and dynamic is True and args.group_size == 128 and args.scale_dtype != torch.uint8:
        return "group"
    if strategy == "group" and dynamic is True and args.group_size == 32:
        return "mx"  # where its weights are not MXFP8, `resolve` refuses it
    raise SchemeError(
        f"activation strategy {strategy!r} with dynamic={dynamic}, group_size={args.group_size} is unknown"
    )


def heads_of(config: Mapping[str, Any]) -> frozenset[int]:
    """The numbers of heads that a `config.json`, or a part of it, names."""
    found = {n for k, n in config.items() if str(k).endswith("_heads") and isinstance(n, int)}
    parts = (heads_of(part) for part in config.values() if isinstance(part, Mapping))
    return frozenset(found).union(*parts) - {0, 1}


def is_fp8(args: QuantizationArgs) -> bool:
    """Whether values are stored as 8-bit floats."""
    return word(args.type) == "float" and args.num_bits == 8


def _describe(args: QuantizationArgs | None) -> str:
    return "none" if args is None else f"{args.num_bits}-bit {word(args.type)}"


def word(enum_or_str: Any) -> str:
    """compressed-tensors keeps either."""
    return str(getattr(enum_or_str, "value", enum_or_str))
