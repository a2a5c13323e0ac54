"""Dynamo's guards, kept: what each looked at is compared in the other process, then all are built anew on the objects there.

Dynamo can serialize guards itself, but not those of identity, which it then refuses or drops (`caching_precompile`): a hook, a
patched function or another class would pass. Here a guard is kept as where it looks and how, beside a description of what it saw
there (`portable`). Where every description fits, dynamo's own builder makes the guards again, of identity too, for the objects of
this process; from then on they are what `torch.compile` would have.
"""

from __future__ import annotations

import functools
import importlib
import io
import pickle
import re
import types
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..compat import (
    CheckFunctionManager,
    CompileContext,
    DynamoGuard,
    GlobalSource,
    GuardBuilder,
    GuardsSet,
    OrderedSet,
    OutputGraphCommon,
    OutputGraphGuardsState,
    builtins_dict,
    compile_context,
    convert_frame,
    dispatch_keys,
    guard_closure_vars,
    metrics_context,
)
from .code_places import codes_at, places_of
from .portable import Describer, NotPortable

#: By how a guard is made: what it looks at, described.
_Look = Callable[[Describer, Any, Mapping[str, Any]], str]
#: Of these dynamo keeps, or we do, what they compare with; whether they hold is asked when all are built.
_BY_THEMSELVES = {
    "AUTOGRAD_SAVED_TENSORS_HOOKS", "DEFAULT_DEVICE", "DETERMINISTIC_ALGORITHMS", "DUPLICATE_INPUT", "GLOBAL_STATE", "GRAD_MODE",
    "SHAPE_ENV", "TORCH_FUNCTION_STATE",
}  # fmt: skip


@dataclass(frozen=True)
class Guard:
    """One guard.

    Attributes:
        source: where it looks, as dynamo says it.
        kind: the method of dynamo's builder that makes it.
        how: that method's arguments.
        seen: what was there.
    """

    source: Any
    kind: str
    how: tuple[tuple[str, Any], ...]
    seen: str


@dataclass(frozen=True)
class Guards:
    """All guards of one graph, to be pickled.

    Attributes:
        state: dynamo's, but for the guards and for what is of one process.
        shapes: the guards of sizes, as dynamo's C++ or Python checks them.
        codes: of each function that was traced: its module, its name, its code.
        imported: module by the name that guards and bytecode have for it.
        builtins: what they call the dictionary of builtins; "" if nothing.
    """

    guards: tuple[Guard, ...]
    state: dict[str, Any]
    shapes: Any
    codes: tuple[tuple[str, str, str], ...]
    imported: dict[str, str]
    builtins: str


class Unfit(Exception):
    """What was kept is not for this call; the message says why."""


def take(guards: list[Any], graph: Any, shapes: Any) -> Guards:
    """What is to be kept of a graph's guards, while what they look at is as it was traced.

    Args:
        guards: dynamo's.
        graph: dynamo's, of what it traced.
        shapes: what dynamo made of the guards of sizes.

    Raises:
        NotPortable: one of them has no meaning in another process.
    """
    if graph.torch_function_mode_stack or graph.functorch_layers or graph.export:
        raise NotPortable("a mode of torch was on, or a transform")
    describer = Describer()
    look = _Looking({"L": graph.local_scope, "G": graph.global_scope})
    kept = []
    for guard in guards:
        kind, how = _made_by(guard.create_fn)
        sizes = graph.input_source_to_sizes_strides.get(guard.originating_source)
        kept.append(
            Guard(
                guard.originating_source, kind, how, _seen(describer, look, guard.originating_source, kind, how, sizes)
            )
        )
    names = (
        "guard_on_key_order",
        "dual_level",
        "functorch_layers",
        "current_device",
        "global_state_guard",
        "export_constraints",
    )
    state = {name: getattr(graph, name) for name in names}
    state["_aotautograd_guards"] = list(graph.aotautograd_guards)
    state["input_source_to_sizes_strides"] = {
        source: {what: _concrete(sizes) for what, sizes in facts.items()}
        for source, facts in graph.input_source_to_sizes_strides.items()
    }
    codes = places_of(set(graph.traced_code), set(graph.import_sources.values()), describer)
    builtins = graph.name_of_builtins_dict_key_in_fglobals or ""
    return Guards(tuple(kept), state, shapes, codes, dict(graph.import_sources), builtins)


def renamed(kept: Guards, names: Mapping[str, str], scope: Mapping[str, Any]) -> Guards:
    """With other names for what dynamo put into a function's globals: it refuses a name that is there when it comes by it again.

    Args:
        scope: those globals. Modules that guards alone name, as dynamo does torch, become imports, too.

    Raises:
        NotPortable: a guard looks at something else that dynamo put there.
    """
    modules: dict[str, str] = {}

    class Renaming(pickle.Pickler):
        def reducer_override(self, value: Any) -> Any:
            if type(value) is not GlobalSource or value.global_name.startswith("__ctfp8"):
                return NotImplemented
            name = value.global_name
            if name not in names and re.search(OF_DYNAMO, name):
                if not isinstance(module := scope.get(name), types.ModuleType):
                    raise NotPortable(f"a guard looks at {name}")
                modules[f"__ctfp8{name}"] = module.__name__
                return GlobalSource, (f"__ctfp8{name}",)
            return GlobalSource, (names.get(name, name),)

    file = io.BytesIO()
    Renaming(file, protocol=5).dump(kept)
    found: Guards = pickle.loads(file.getvalue())
    imported = {names.get(name, name): module for name, module in found.imported.items()} | modules
    return replace(found, imported=imported, builtins=names.get(found.builtins, found.builtins))


#: Names of globals that dynamo makes up; `__name__` and its like are Python's.
OF_DYNAMO = r"^__(?!(?:name|file|doc|package|builtins)__$)|_c\d+$"


def build(kept: Guards, code: types.CodeType, local: dict[str, Any], scope: dict[str, Any]) -> Any:
    """Dynamo's guards for the objects of this process, if what they look at is what they saw.

    Args:
        code: of the function that was compiled.
        local: its arguments, and what it closes over, by name.
        scope: its globals; modules that guards look into are put there under dynamo's names for them, as dynamo does.

    Returns:
        dynamo's manager of guards; `check(local)` says whether a call fits.

    Raises:
        Unfit: something is not as it was.
    """
    install(kept, scope)
    look = _Looking({"L": local, "G": scope})
    for expression in kept.shapes.python_code_parts.exprs if kept.shapes else ():
        if not look.holds(expression):
            raise Unfit(f"not {expression}")
    describer = Describer()
    sizes = kept.state["input_source_to_sizes_strides"]
    for guard in kept.guards:
        try:
            seen = _seen(describer, look, guard.source, guard.kind, guard.how, sizes.get(guard.source))
        except Exception as why:
            raise Unfit(f"{guard.source.name}: {type(why).__name__} {why}") from why
        if seen != guard.seen:
            raise Unfit(f"{guard.source.name} was {guard.seen}, and is {seen}")
    for module, name, digest in kept.codes:
        if not any(describer.code(found) == digest for found in codes_at(module, name)):
            raise Unfit(f"{module}.{name} has other code")
    return _built(kept, code, local, scope)


def install(kept: Guards, scope: dict[str, Any]) -> None:
    """Puts the modules that guards and bytecode name into a function's globals."""
    for alias, module in kept.imported.items():
        found = importlib.import_module(module)
        if scope.setdefault(alias, found) is not found:
            raise Unfit(f"{alias} is another module")
    if kept.builtins and scope.setdefault(kept.builtins, builtins_dict(scope)) is not builtins_dict(scope):
        raise Unfit(f"{kept.builtins} are other builtins")


def _built(kept: Guards, code: types.CodeType, local: dict[str, Any], scope: dict[str, Any]) -> Any:
    guards = [
        DynamoGuard(
            guard.source,
            functools.partial(getattr(GuardBuilder, guard.kind), **dict(guard.how))
            if guard.how
            else getattr(GuardBuilder, guard.kind),
        )
        for guard in kept.guards
    ]
    state = OutputGraphGuardsState(
        local_scope=local,
        global_scope=scope,
        torch_function_mode_stack=[],
        name_of_builtins_dict_key_in_fglobals=kept.builtins or None,
        skip_guards_check=True,
        _guards=GuardsSet(OrderedSet(guards)),
        **kept.state,
    )
    with compile_context(CompileContext(None)), metrics_context():
        made = CheckFunctionManager(
            code, OutputGraphCommon(state), shape_code_parts=kept.shapes, runtime_global_scope=scope
        ).guard_manager
    if not made.check(local):
        raise Unfit(str(made.check_verbose(local)))
    return made


class _Looking:
    """Values where guards look."""

    def __init__(self, scope: dict[str, Any]):
        self.scope, self.closure = scope, guard_closure_vars()
        self.cache: dict[Any, Any] = {}

    def at(self, source: Any) -> Any:
        return source.get_value(self.scope, self.closure, self.cache)

    def holds(self, expression: str) -> bool:
        try:
            return bool(eval(expression, {**self.closure, **self.scope}))
        except Exception:
            return False


def _made_by(create_fn: Any) -> tuple[str, tuple[tuple[str, Any], ...]]:
    """The method's name, and its arguments but those that hold a value of this process."""
    if not isinstance(create_fn, functools.partial):
        return create_fn.__name__, ()
    if create_fn.args:
        raise NotPortable(f"a guard {create_fn.func.__name__} with arguments by position")
    how = {name: value for name, value in create_fn.keywords.items() if name not in ("value", "recompile_hint")}
    return create_fn.func.__name__, tuple(how.items())


def _seen(
    describer: Describer, look: _Looking, source: Any, kind: str, how: tuple[tuple[str, Any], ...], sizes: Any
) -> str:
    if kind in _BY_THEMSELVES:
        return ""
    if kind == "TENSOR_MATCH":
        if sizes is None:
            raise NotPortable(f"{source.name}: a tensor whose sizes are not known")
        return _tensor(describer, look.at(source), sizes)
    if kind not in _LOOKS:
        raise NotPortable(f"a guard {kind} of {source.name}")
    try:
        return _LOOKS[kind](describer, look.at(source), dict(how))
    except NotPortable as why:
        raise NotPortable(f"{source.name}: {why}") from None


def _tensor(describer: Describer, value: Tensor, sizes: Any) -> str:
    """What a graph depends on in a tensor: a size that it is not compiled for stays out."""
    marks = [getattr(value, name, None) for name in _MARKS]
    static = [
        ["*" if want is None else have for want, have in zip(_concrete(sizes[what]), actual, strict=True)]
        for what, actual in (("size", value.size()), ("stride", value.stride()))
    ]
    keys = dispatch_keys(value).raw_repr()
    return (
        f"{describer.type(type(value))} {value.dtype} {value.device} {value.layout} {value.requires_grad} {keys} "
        f"{value.is_inference()} {static} {describer.value(marks)}"
    )


_MARKS = (
    "_dynamo_dynamic_indices", "_dynamo_weak_dynamic_indices", "_dynamo_unbacked_indices", "_dynamo_strict_unbacked_indices",
    "_dynamo_static_indices",
)  # fmt: skip


def _concrete(sizes: Any) -> list[int | None]:
    """Sizes as numbers; None where they vary, which dynamo says by a symbol."""
    found: list[int | None] = []
    for size in sizes:
        if isinstance(size, int):
            found.append(size)
        elif isinstance(size, torch.SymInt) and size.node.maybe_as_int() is not None:
            found.append(size.node.maybe_as_int())
        else:
            found.append(None)
    return found


def _value(describer: Describer, value: Any, how: Mapping[str, Any]) -> str:
    return describer.value(value)


def _code(describer: Describer, value: Any, how: Mapping[str, Any]) -> str:
    """Dynamo compares a function's code here; its defaults, and what it closes over, have guards of their own."""
    return describer.value(getattr(value, "__code__", value))


def _type(describer: Describer, value: Any, how: Mapping[str, Any]) -> str:
    return describer.type(type(value))


def _length(describer: Describer, value: Any, how: Mapping[str, Any]) -> str:
    return f"{len(value)} of {describer.type(type(value))}"


def _keys(describer: Describer, value: Any, how: Mapping[str, Any]) -> str:
    return f"{describer.type(type(value))} of {[describer.value(key) for key in value]}"


def _hooks(describer: Describer, value: Any, how: Mapping[str, Any]) -> str:
    return f"hooks: {len(value)}"


def _has(describer: Describer, value: Any, how: Mapping[str, Any]) -> str:
    return f"{how['attr']}: {hasattr(value, how['attr'])}"


def _own(describer: Describer, value: Any, how: Mapping[str, Any]) -> str:
    return f"{how['attr']}: {how['attr'] in value.__dict__}"


def _contains(describer: Describer, value: Any, how: Mapping[str, Any]) -> str:
    return f"{describer.value(how['key'])}: {how['key'] in value}"


_LOOKS: dict[str, _Look] = {
    **dict.fromkeys(("CONSTANT_MATCH", "EQUALS_MATCH", "BOOL_MATCH", "NONE_MATCH", "DISPATCH_KEY_SET_MATCH"), _value),
    **dict.fromkeys(("ID_MATCH", "CLASS_MATCH", "FUNCTION_MATCH", "BUILTIN_MATCH", "MODULE_MATCH"), _value),
    **dict.fromkeys(("DICT_CONTAINS", "DICT_NOT_CONTAINS", "SET_CONTAINS", "SET_NOT_CONTAINS"), _contains),
    **dict.fromkeys(("DICT_KEYS_MATCH", "MAPPING_KEYS_CHECK"), _keys),
    **dict.fromkeys(("TYPE_MATCH", "NOT_NONE_MATCH"), _type),
    "CLOSURE_MATCH": _code,
    "SEQUENCE_LENGTH": _length,
    "EMPTY_NN_MODULE_HOOKS_DICT": _hooks,
    "HASATTR": _has,
    "NOT_PRESENT_IN_GENERIC_DICT": _own,
}


@contextmanager
def recorded(taken: Callable[[types.CodeType, list[Any], Any, Any], None]) -> Iterator[None]:
    """While dynamo compiles: `taken` gets a function's code, its guards, its graph, and what was made of the guards of sizes."""
    plain = convert_frame.CheckFunctionManager

    if not hasattr(
        plain, "serialize_guards"
    ):  # a release that serializes them elsewhere: nothing is recorded, nor kept
        yield
        return

    class Recording(plain):  # type: ignore[misc, valid-type]
        def __init__(self, f_code: Any, output_graph: Any, *args: Any, **kwargs: Any):
            self.code = f_code
            super().__init__(f_code, output_graph, *args, **{**kwargs, "save_guards": True})

        def serialize_guards(self, builder: Any, sorted_guards: list[Any], output_graph: Any) -> bytes:
            taken(self.code, sorted_guards, output_graph, self.shape_code_parts)
            return b"kept"

    convert_frame.CheckFunctionManager = Recording
    try:
        yield
    finally:
        convert_frame.CheckFunctionManager = plain
