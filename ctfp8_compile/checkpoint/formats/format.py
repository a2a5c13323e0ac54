"""A format of FP8 files: how a writer spells its config and its tensors, in compressed-tensors' words and in our names.

One arithmetic, several spellings. What follows from here (`Schemes`, `Checkpoint`) does not know which it was; names of
tensors as their file spells them, and the config as it was read, are kept for messages and for saving.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ...errors import SchemeError

Suffixes = Mapping[str, str]
"""How tensors' names end in a format, and how they end in ours."""


@dataclass(frozen=True)
class Format:
    """A quantization config in compressed-tensors' words, and how the file's tensors are named.

    Attributes:
        name: the `quant_method` it was read from.
        config: as in a compressed-tensors checkpoint's `config.json`.
        suffixes: of scales; see `names.canonical_names`.
        weights: of weights; these names mean the same wherever they stand.
        bound: activations quantized per token count as no larger than this; fbgemm's `activation_scale_ub`.
        packed_by: what stands beside a `weight` that is packed in another format than FP8.
        inverse: how the names of those scales end, in ours, by which a value is divided.
        directed: whether the config says whether values are multiplied by scales or divided.
    """

    name: str
    config: Mapping[str, Any]
    suffixes: Suffixes = field(default_factory=dict)
    weights: Suffixes = field(default_factory=dict)
    bound: float | None = None
    packed_by: str = ""
    inverse: tuple[str, ...] = ()
    directed: bool = False


#: Of a file that is spelled as compressed-tensors does it.
PLAIN = Format("compressed-tensors", {})


def fp8_weights(strategy: str, **more: Any) -> dict[str, Any]:
    """FP8 weights in compressed-tensors' words."""
    return {"num_bits": 8, "type": "float", "symmetric": True, "strategy": strategy, **more}


def block_weights(block: Any, exponents: bool = False) -> dict[str, Any]:
    """FP8 weights with a scale for each block of `[rows, columns]`.

    Raises:
        SchemeError: not two positive sizes.
    """
    sizes = [_size(n) for n in block] if isinstance(block, (list, tuple)) else []
    if len(sizes) != 2 or not all(sizes):
        raise SchemeError(f"quantization_config: weight_block_size={block!r} is not two positive sizes.")
    rows, cols = sizes
    more: dict[str, Any] = {"scale_dtype": "torch.uint8"} if exponents else {}
    if rows == 1:
        return fp8_weights("group", group_size=cols, **more)
    return fp8_weights("block", block_structure=[rows, cols], **more)


def _size(value: Any) -> int:
    whole = isinstance(value, (int, float)) and not isinstance(value, bool) and value > 0 and value == int(value)
    return int(value) if whole else 0


MX_WEIGHTS: Mapping[str, Any] = fp8_weights("group", group_size=32, scale_dtype="torch.uint8")

#: By activation scheme (`scheme.ACTIVATIONS`), compressed-tensors' words for it.
_INPUTS: Mapping[str, Mapping[str, Any] | None] = {
    "none": None,
    "token": {"strategy": "token", "dynamic": True},
    "tensor": {"strategy": "tensor", "dynamic": False},
    "tensor_dynamic": {"strategy": "tensor", "dynamic": True},
    "group": {"strategy": "group", "dynamic": True, "group_size": 128},
    "mx": {"strategy": "group", "dynamic": True, "group_size": 32, "scale_dtype": "torch.uint8"},
}


def group(targets: list[str], weights: Mapping[str, Any], activation: str, **more: Any) -> dict[str, Any]:
    """One group of a config; `activation` is one of `scheme.ACTIVATIONS`."""
    words = _INPUTS[activation]
    inputs = None if words is None else {"num_bits": 8, "type": "float", "symmetric": True, **words}
    return {"targets": targets, "weights": dict(weights), "input_activations": inputs, **more}


def config_of_groups(groups: Mapping[str, Any], ignore: Iterable[str], cache: bool = False) -> dict[str, Any]:
    """A config in compressed-tensors' words."""
    config = {"quant_method": "compressed-tensors", "config_groups": dict(groups), "ignore": list(ignore)}
    return config | ({"kv_cache_scheme": fp8_weights("tensor")} if cache else {})


def choice(config: Mapping[str, Any], field: str, choices: Mapping[Any, Any], default: Any) -> Any:
    """What a word of a config stands for; words are compared without case, and null is the default.

    Raises:
        SchemeError: an unknown word.
    """
    value = config.get(field)
    value = default if value is None else value
    by_word = {key.lower() if isinstance(key, str) else key: meaning for key, meaning in choices.items()}
    word = value.lower() if isinstance(value, str) else value
    if not isinstance(word, (str, type(None))) or word not in by_word:
        raise SchemeError(
            f"quantization_config: {field}={value!r} is not supported; known are {', '.join(map(repr, choices))}. "
            "Serve the checkpoint with vLLM or with the package that wrote it, or quantize it again."
        )
    return by_word[word]


def names(config: Mapping[str, Any], field: str) -> list[str]:
    """A list of module names in a config; none where it has no such list.

    Raises:
        SchemeError: not a list of names.
    """
    value = config.get(field) or []
    if not isinstance(value, (list, tuple)) or not all(isinstance(name, str) for name in value):
        raise SchemeError(f"quantization_config: {field} is not a list of module names, but {value!r}.")
    return list(value)


def table(config: Mapping[str, Any], field: str) -> Mapping[str, Any]:
    """An object in a config; empty where it has none.

    Raises:
        SchemeError: not an object.
    """
    value = config.get(field) or {}
    if not isinstance(value, Mapping):
        raise SchemeError(f"quantization_config: {field} is not an object, but {value!r}.")
    return value
