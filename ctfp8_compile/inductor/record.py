"""One compilation, recorded to be kept: dynamo's guards and bytecode, and what Inductor made of the graph.

`recording` is around dynamo's compilation; dynamo calls our backend inside, which tells what came of it (`Record.finished`).
"""

from __future__ import annotations

import dis
import importlib
import io
import marshal
import pickle
import re
import secrets
import types
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from ..compat import (
    AsyncCompile,
    BoxedBool,
    BoxedDeviceIndex,
    FakeTensorMode,
    ShapeEnv,
    TracingContext,
    convert_frame,
    inductor_config,
    take_vector_isas,
    tracing,
    vector_isas,
    without_precompiled_headers,
)
from ..counted import counted
from ..kept.guards import OF_DYNAMO, Guards, Unfit, recorded, renamed, take
from ..kept.portable import NotPortable
from ..target import Target
from .finished import Finished, telling


@dataclass(frozen=True)
class KeptGraph:
    """A compiled graph, to be pickled.

    Attributes:
        guards: when it is right.
        bytecode: dynamo's, marshalled, and constants that cannot be: takes inputs from the function's arguments, calls the graph.
        called: what the bytecode calls the graph.
        compiled: pickled, what AOTAutograd keeps of it; Inductor's part lies in Inductor's own cache.
        options: of Inductor, that it was compiled with.
        vectors: the sets of vector instructions that Inductor found to work on this processor.
    """

    guards: Guards
    bytecode: tuple[bytes, dict[int, Any]]
    called: str
    compiled: bytes
    options: dict[str, Any]
    around: Finished
    vectors: tuple[str, ...]

    def revived(self, function: types.FunctionType) -> Callable[..., Any]:
        """The function, compiled; its guards must have been built, which puts what it names into the globals.

        Raises:
            Unfit: Inductor has its part no more.
        """
        compiled = self.around.around(_revived(pickle.loads(self.compiled), self.options, self.vectors))
        code, scope = _unmarshalled(*self.bytecode), function.__globals__
        name = f"__ctfp8_{secrets.token_hex(8)}"
        scope[name] = compiled
        code = _renamed(code, {self.called: name})
        made = types.FunctionType(code, scope, function.__name__, function.__defaults__, function.__closure__)
        made.__kwdefaults__ = function.__kwdefaults__
        return made


class Record:
    """What is known so far of a function's compilation."""

    def __init__(self, function: types.FunctionType):
        self.function = function
        self.guards: Guards | None = None
        self.bytecode: types.CodeType | None = None
        self.compiled: tuple[bytes, dict[str, Any], Finished] | None = None
        self.graphs = 0
        self.why = ""

    def finished(self, compiled: Any, config: dict[str, Any], around: Finished, target: Target) -> None:
        """What our backend made of a graph."""
        self.graphs += 1
        serialize = getattr(compiled, "serialize", None)
        if target.device != "cpu":
            self.why = f"graphs for {target.device} are not kept"
        elif config.get("freezing") or config.get("cpp_wrapper"):
            self.why = "graphs of frozen weights or with a C++ wrapper are not kept"
        elif serialize is None:
            self.why = "AOTAutograd did not cache it"
        else:
            plain = {name: value for name, value in config.items() if name not in _OURS}
            try:
                self.compiled = _pickled(serialize()), plain, around
                _pickled(plain)
            except Exception as why:
                self.why = f"{type(why).__name__} {why}"

    def kept(self) -> KeptGraph:
        """What is to be kept.

        Raises:
            NotPortable: it cannot be.
        """
        if self.why:
            raise NotPortable(self.why)
        if self.guards is None or self.bytecode is None or self.compiled is None or self.graphs != 1:
            raise NotPortable(f"dynamo made {self.graphs} graphs of it")
        called, imported = _named_by(self.bytecode, self.function, self.guards)
        # to names of our own: those that are dynamo's, it takes away when it forgets what it compiled
        names = {name: f"__ctfp8{name}" for name in (called, *imported, self.guards.builtins) if name}
        guards = renamed(Guards(**{**vars(self.guards), "imported": imported}), names, self.function.__globals__)
        code = _marshalled(_renamed(self.bytecode, names))
        return KeptGraph(guards, code, names[called], *self.compiled, vector_isas())


@contextmanager
def recording(record: Record) -> Iterator[None]:
    """While dynamo compiles, perhaps the record's function."""

    def bytecode(code: types.CodeType, made: types.CodeType) -> None:
        record.graphs += (
            code is not record.function.__code__
        )  # of a graph break, or of a function dynamo does not inline
        if code is record.function.__code__:
            record.bytecode = made

    def guards(code: types.CodeType, found: list[Any], graph: Any, shapes: Any) -> None:
        if code is not record.function.__code__:
            return
        try:
            record.guards = take(found, graph, shapes)
        except NotPortable as why:
            record.why = str(why)
        except Exception as why:
            record.why = f"{type(why).__name__} {why}"

    hook = convert_frame.register_bytecode_hook(bytecode)
    try:
        with recorded(guards), telling(record.finished):
            yield
    finally:
        hook.remove()


#: Options of Inductor that hold functions; the code they made is part of what is kept.
_OURS = ("post_grad_custom_pre_pass",)


def _marshalled(code: types.CodeType) -> tuple[bytes, dict[int, Any]]:
    """Code, and by their places those of its constants that marshal does not know: devices, dtypes.

    Raises:
        NotPortable: one is an object of another kind.
    """
    odd = {i: const for i, const in enumerate(code.co_consts) if not _marshals(const)}
    if strange := {
        type(const).__name__ for const in odd.values() if not isinstance(const, (torch.device, torch.dtype))
    }:
        raise NotPortable(f"its bytecode holds objects of {', '.join(sorted(strange))}")
    plain = tuple(None if i in odd else const for i, const in enumerate(code.co_consts))
    return marshal.dumps(code.replace(co_consts=plain)), odd


def _unmarshalled(data: bytes, odd: dict[int, Any]) -> types.CodeType:
    code: types.CodeType = marshal.loads(data)
    return code.replace(co_consts=tuple(odd.get(i, const) for i, const in enumerate(code.co_consts)))


def _marshals(const: Any) -> bool:
    try:
        marshal.dumps(const)
    except ValueError:
        return False
    return True


def _pickled(value: Any) -> bytes:
    file = io.BytesIO()
    pickle.Pickler(file, protocol=5).dump(value)
    return file.getvalue()


def _revived(entry: Any, options: dict[str, Any], vectors: tuple[str, ...]) -> Callable[..., Any]:
    """As AOTAutograd does at a hit in its cache, without the graph that a hit begins with."""
    take_vector_isas(vectors)
    _ = AsyncCompile  # the code that Inductor wrote finds its module there, where Inductor was imported
    entry.guards_expr = None  # those are among dynamo's
    context = TracingContext(FakeTensorMode(shape_env=ShapeEnv()))
    with inductor_config.patch(options), tracing(context), without_precompiled_headers():
        settings = {"cudagraphs": BoxedBool(False), "boxed_forward_device_index": BoxedDeviceIndex(None)}
        try:
            compiled = entry.wrap_post_compile([], entry.sanitized_aot_config, settings)
        except Exception as why:
            raise Unfit(f"Inductor has its part no more ({type(why).__name__} {why})") from why
    return lambda *args: compiled(list(args))


def _renamed(code: types.CodeType, names: Mapping[str, str]) -> types.CodeType:
    """With other names for globals."""
    return code.replace(co_names=tuple(names.get(name, name) for name in code.co_names))


def _named_by(code: types.CodeType, function: types.FunctionType, guards: Guards) -> tuple[str, dict[str, str]]:
    """What bytecode calls the graph; and modules, by what bytecode and guards call them.

    Raises:
        NotPortable: it names something else that dynamo put into the globals.
    """
    scope, imported, graphs = function.__globals__, dict(guards.imported), []
    for name in {one.argval for one in dis.get_instructions(code) if one.opname in ("LOAD_GLOBAL", "LOAD_NAME")}:
        value = scope.get(name)
        if name.startswith("__compiled_fn"):
            graphs.append(name)
        elif isinstance(value, types.ModuleType):
            imported[name] = value.__name__
        elif name in imported or name == guards.builtins:
            continue
        elif re.search(OF_DYNAMO, name) and name in scope:
            raise NotPortable(f"its bytecode needs {name}")
    if len(graphs) != 1:
        raise NotPortable(f"its bytecode calls {counted(len(graphs), 'graph')}")
    for name, module in imported.items():
        if importlib.import_module(module) is not scope.get(name, importlib.import_module(module)):
            raise NotPortable(f"{name} is not the module {module}")
    return graphs[0], imported
