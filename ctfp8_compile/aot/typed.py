"""Builds dataclasses from JSON, strictly: what a field's type does not allow is refused, never converted.

The dataclasses are ours (`Manifest`, `Entry`, notes) and torch.export's (`torch._export.serde.schema`), whose own reader
ignores unknown keys and takes any value for any type.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import types
import typing
from collections.abc import Callable, Mapping
from enum import IntEnum
from typing import Any

from ..counted import counted


class Misfit(Exception):
    """What does not fit, and where."""


#: Called with each object of a class that was built; returns what takes its place, or raises `Misfit`.
Checks = Mapping[type, Callable[[Any], Any]]

_INFINITE = ("Infinity", "-Infinity", "NaN")  # as torch writes them


def parse(text: bytes | str) -> Any:
    """JSON in which no key is there twice.

    Raises:
        Misfit: it is not.
    """
    try:
        return json.loads(text, object_pairs_hook=_pairs)
    except (ValueError, RecursionError) as error:
        raise Misfit(f"it is not JSON ({error})") from None


def build(cls: Any, data: Any, checks: Checks = types.MappingProxyType({}), where: str = "") -> Any:
    """`data`, from JSON, as `cls`: a dataclass, a tagged union of torch's schema, a container, an enum or a plain type.

    Raises:
        Misfit: naming the first place where the two do not fit.
    """
    origin, args, members = _shape(cls)
    if origin is typing.Annotated:
        return build(args[0], data, checks, where)
    if origin in (typing.Union, types.UnionType):
        if data is None and type(None) in args:
            return None
        fitting = [a for a in args if a is not type(None) and (not isinstance(a, type) or type(data) is a)]
        return build(fitting[0] if fitting else args[0], data, checks, where)
    if origin in (list, tuple):
        of = args if origin is tuple and args[-1] is not ... else (args[0],) * len(_is(list, data, where))
        if len(_is(list, data, where)) != len(of):
            raise Misfit(f"{where} has {counted(len(data), 'value')}, not {len(of)}")
        return origin(
            build(kind, item, checks, f"{where}[{i}]") for i, (kind, item) in enumerate(zip(of, data, strict=True))
        )
    if origin in (dict, Mapping):
        return {k: build(args[1], v, checks, f"{where}.{k}") for k, v in _is(dict, data, where).items()}
    if dataclasses.is_dataclass(cls) and isinstance(cls, type):
        return checks.get(cls, _same)(_fields(cls, _is(dict, data, where), checks, where))
    if members is not None:
        if type(data) is not int or data not in members:
            raise Misfit(f"{where} is {short(data)}, no {cls.__name__}")
        return cls(data)
    return _plain(cls, data, where)


def _fields(cls: Any, data: dict[str, Any], checks: Checks, where: str) -> Any:
    hints = _hints(cls)
    for key in data:
        if key not in hints:
            raise Misfit(f"{where} adds {short(key)}, which is not known here")
    if hasattr(cls, "create"):  # a tagged union: one of its fields
        if len(data) != 1:
            raise Misfit(f"{where} is {len(data)} of the kinds of {cls.__name__}, not one")
        ((key, value),) = data.items()
        return cls.create(**{key: build(hints[key], value, checks, f"{where}.{key}")})
    for field in dataclasses.fields(cls):
        needed = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if needed and field.name not in data:
            raise Misfit(f"{where} lacks {field.name!r}")
    return cls(**{key: build(hints[key], value, checks, f"{where}.{key}") for key, value in data.items()})


@functools.cache
def _shape(cls: Any) -> tuple[Any, tuple[Any, ...], frozenset[int] | None]:
    """Origin and arguments of a generic type; of an enum its values. A graph asks for them a hundred thousand times."""
    enum = isinstance(cls, type) and issubclass(cls, IntEnum)
    return typing.get_origin(cls), typing.get_args(cls), frozenset(map(int, cls)) if enum else None


@functools.cache
def _hints(cls: Any) -> dict[str, Any]:
    return typing.get_type_hints(cls)


def _plain(cls: Any, data: Any, where: str) -> Any:
    if cls is Any:
        return data
    if cls is float and (type(data) is int or data in _INFINITE):
        return float(data)
    if type(data) is not cls or (cls is int and not -(2**63) <= data < 2**63):
        raise Misfit(f"{where} is {short(data)}, no {cls.__name__}")
    return data


def _is(cls: type, data: Any, where: str) -> Any:
    if type(data) is not cls:
        raise Misfit(f"{where} is {short(data)}")
    return data


def _pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out = dict(pairs)
    if len(out) != len(pairs):
        raise ValueError("a key is there twice")
    return out


def _same(value: Any) -> Any:
    return value


def short(data: Any) -> str:
    """For messages: the start of what was found, with nothing that a terminal would obey."""
    text = ascii(data) if not isinstance(data, dict | list) or len(data) < 20 else f"a {type(data).__name__}"
    return text if len(text) < 60 else text[:57] + "…"
