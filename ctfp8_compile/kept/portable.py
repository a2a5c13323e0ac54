"""What a value is, in words that mean the same in another process: the identities that dynamo guards, made comparable.

Dynamo guards that an object is *the same* object. Between processes that is: a class with the same functions, a function with the
same code, a module of the same name. What has no such description is not guessed at: `NotPortable`.
"""

from __future__ import annotations

import enum
import functools
import hashlib
import types
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from ..compat import HigherOrderOperator, OpOverload, OpOverloadPacket

_DEEP = 8
#: Of a class's attributes: made by Python, and nothing a forward pass depends on.
_SKIPPED = {
    "__dict__", "__weakref__", "__doc__", "__module__", "__annotations__", "__orig_bases__", "__parameters__",
    "__abstractmethods__", "_abc_impl", "__firstlineno__", "__static_attributes__", "__annotate_func__",
    "__annotations_cache__", "__classdictcell__",
}  # fmt: skip
#: Dynamo wraps them when it first compiles something, to see which modules are new; a forward pass calls neither.
_WRAPPED = {"__init__", "__setstate__", "___needs_generation_tag_patch"}
_PLAIN = (type(None), bool, int, float, complex, str, bytes, type(Ellipsis), type(NotImplemented))
_TORCH = (torch.dtype, torch.device, torch.layout, torch.memory_format, torch.Size)
_OF_C = (
    types.BuiltinFunctionType,
    types.MethodDescriptorType,
    types.WrapperDescriptorType,
    types.ClassMethodDescriptorType,
)
_OPERATORS = (OpOverload, OpOverloadPacket, HigherOrderOperator)


class NotPortable(Exception):
    """There is no saying, in another process, whether a value is this one."""


class Describer:
    """Describes values; classes and code once, as long as this object lives."""

    def __init__(self) -> None:
        self._classes: dict[type, str] = {}
        self._codes: dict[types.CodeType, str] = {}

    def value(self, value: Any, depth: int = 0) -> str:
        """A constant, a container of them, or something with an identity of its own: a class, a function, an operator, ….

        Raises:
            NotPortable: an object like any other.
        """
        if depth > _DEEP:
            raise NotPortable("a value nested more than eight deep")
        kind = type(value)
        if kind in _PLAIN or kind in _TORCH:
            return f"{value!r}"
        if kind in (tuple, list):
            return f"{kind.__name__}({', '.join(self.value(item, depth + 1) for item in value)})"
        if kind in (set, frozenset):
            return f"{kind.__name__}({', '.join(sorted(self.value(item, depth + 1) for item in value))})"
        if isinstance(value, (dict, types.MappingProxyType)):
            inside = ", ".join(f"{self.value(k, depth + 1)}: {self.value(v, depth + 1)}" for k, v in value.items())
            return f"{self.type(kind)}({inside})"
        if kind is slice:
            return f"slice {self.value((value.start, value.stop, value.step), depth + 1)}"
        return self._thing(value, depth)

    def _thing(self, value: Any, depth: int) -> str:
        if isinstance(value, type):
            return self.type(value)
        if isinstance(value, types.ModuleType):
            return f"module {value.__name__}"
        if isinstance(value, enum.Enum):
            return f"{self.type(type(value))}.{value.name}"
        if isinstance(value, (types.FunctionType, types.MethodType, types.CodeType)):
            return self.function(value, depth)
        if isinstance(value, _OF_C):
            owner = getattr(value, "__self__", None)
            if owner is not None and not isinstance(owner, (type, types.ModuleType)):
                raise NotPortable(f"a method of an object of {type(owner).__name__}")
            return f"{type(value).__name__} {getattr(value, '__module__', '')}.{value.__qualname__}"
        if isinstance(value, _OPERATORS):
            return f"{type(value).__name__} {value}"
        if isinstance(value, functools.partial):
            return f"partial {self.value((value.func, value.args, value.keywords), depth + 1)}"
        if "__wrapped__" in getattr(value, "__dict__", {}):  # functools.cache and the like
            return f"{type(value).__name__} of {self.value(value.__wrapped__, depth + 1)}"
        raise NotPortable(f"an object of {type(value).__module__}.{type(value).__qualname__}")

    def function(self, function: Any, depth: int = 0, strict: bool = True) -> str:
        """A function: its name, code, defaults, and what its code closes over.

        Args:
            strict: whether an object it holds that has no description is refused; else it is known by its class.
        """
        if isinstance(function, types.CodeType):
            return f"code {function.co_name} {self.code(function)}"
        if depth > _DEEP:
            raise NotPortable("a function nested more than eight deep")
        if isinstance(function, types.MethodType):
            return f"method {self._held(function.__self__, depth, strict)} {self.function(function.__func__, depth + 1, strict)}"
        held = [*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()]
        for cell in function.__closure__ or ():
            try:
                held.append(cell.cell_contents)
            except ValueError:
                held.append("empty")
        inside = "; ".join(self._held(one, depth, strict) for one in held)
        text = f"{function.__module__}.{function.__qualname__} {self.code(function.__code__)} [{inside}]"
        return f"function {_digest(text)} {function.__qualname__}"

    def _held(self, value: Any, depth: int, strict: bool) -> str:
        if isinstance(value, (types.FunctionType, types.MethodType)):
            return self.function(value, depth + 1, strict)
        try:
            return self.value(value, depth + 1)
        except NotPortable:
            if strict:
                raise
            return f"a {type(value).__module__}.{type(value).__qualname__}"

    def type(self, cls: Any) -> str:
        """A class: its name, and all functions and constants of it and its bases. Those of C are their names."""
        if cls not in self._classes:
            name = self._classes[cls] = f"class {cls.__module__}.{cls.__qualname__}"
            bases = [base for base in cls.__mro__ if base is not object]
            if any(base.__flags__ & _HEAP for base in bases):
                inside = " ".join(self._own(base) for base in bases)
                self._classes[cls] = f"{name} {_digest(inside)}"
        return self._classes[cls]

    def _own(self, cls: Any) -> str:
        if not cls.__flags__ & _HEAP:
            return f"{cls.__module__}.{cls.__qualname__}"
        skipped = _SKIPPED | _WRAPPED if cls is nn.Module else _SKIPPED
        own = sorted(item for item in vars(cls).items() if item[0] not in skipped)
        return f"{cls.__module__}.{cls.__qualname__}({'; '.join(f'{name}={self._member(v)}' for name, v in own)})"

    def _member(self, value: Any) -> str:
        if isinstance(value, (classmethod, staticmethod)):
            return f"{type(value).__name__} {self._member(value.__func__)}"
        if isinstance(value, property):
            return f"property {' '.join(self._member(f) for f in (value.fget, value.fset, value.fdel))}"
        if isinstance(value, functools.cached_property):
            return f"cached {self._member(value.func)}"
        try:
            return self._held(value, 0, strict=False)
        except NotPortable as why:
            return f"({why})"

    def code(self, code: types.CodeType) -> str:
        """A digest of what a code object does; where its file lies does not enter."""
        if code not in self._codes:
            consts = [
                self.code(c) if isinstance(c, types.CodeType) else f"{type(c).__name__} {self.value(c)}"
                for c in code.co_consts
            ]
            parts = (
                code.co_code, code.co_names, code.co_varnames, code.co_freevars, code.co_cellvars, code.co_flags,
                code.co_argcount, code.co_posonlyargcount, code.co_kwonlyargcount, consts,
                getattr(code, "co_exceptiontable", b""),
            )  # fmt: skip
            self._codes[code] = _digest(repr(parts))
        return self._codes[code]


def codes_in(found: Any, depth: int = 0) -> Iterator[types.CodeType]:
    """The code objects that are reached from a function, a property, a decorated function, …, each perhaps several times."""
    if depth > _DEEP:
        return
    if isinstance(found, types.CodeType):
        yield found
        for const in found.co_consts:
            if isinstance(const, types.CodeType):
                yield from codes_in(const, depth + 1)
    elif isinstance(found, types.FunctionType):
        yield from codes_in(found.__code__, depth + 1)
        for cell in found.__closure__ or ():
            try:
                inner = cell.cell_contents
            except ValueError:
                continue
            if callable(inner):
                yield from codes_in(inner, depth + 1)
    elif isinstance(found, (classmethod, staticmethod, types.MethodType)):
        yield from codes_in(found.__func__, depth + 1)
    elif isinstance(found, property):
        for function in (found.fget, found.fset, found.fdel):
            yield from codes_in(function, depth + 1)
    elif isinstance(found, functools.cached_property):
        yield from codes_in(found.func, depth + 1)
    elif not isinstance(found, type) and "__wrapped__" in getattr(found, "__dict__", {}):
        yield from codes_in(found.__wrapped__, depth + 1)


_HEAP = 1 << 9  # Py_TPFLAGS_HEAPTYPE: made by a class statement, or as good as


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:24]
