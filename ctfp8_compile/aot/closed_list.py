"""The closed list: for each class of torch.export's schema whose values torch trusts, what a graph of ours may hold.

One function a class; what it returns is what torch gets. Names become Python source, symbolic sizes are evaluated, argument
structures look classes up by name.
"""

from __future__ import annotations

import ast
import functools
import json
import keyword
import re
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

from ..compat import _Union, schema
from ..counted import counted
from . import typed
from .operators import check_operator
from .typed import Misfit, short


def checks(devices: set[str]) -> typed.Checks:
    """The list, for graphs whose tensors are on these kinds of devices."""
    return {**_CHECKS, schema.Device: lambda device: _check_device(device, devices)}


_IDENTIFIER = re.compile(r"[A-Za-z_]\w*", re.ASCII)
#: Names of tensors in the module.
_PATH = re.compile(r"(?!__)[\w\-/]+(\.(?!__)[\w\-/]+)*", re.ASCII)
#: Names that the source of a `forward` function uses itself.
_TAKEN = {"torch", "self", *keyword.kwlist}
_ARGUMENTS = re.compile(
    r"as_(none|tensors?|ints?|floats?|strings?|bools?|sym_(int|float|bool)s?|scalar_type|memory_format|layout|device"
    r"|optional_tensors?|complex)"
)
_INPUTS = ("user_input", "parameter", "buffer", "tensor_constant", "constant_input")
_OUTPUTS = ("user_output", "buffer_mutation", "user_input_mutation")


def _name(text: str) -> str:
    if not _IDENTIFIER.fullmatch(text) or text in _TAKEN:
        raise Misfit(f"the graph has {short(text)} for a name")
    return text


def _path(text: str) -> str:
    if not _PATH.fullmatch(text):
        raise Misfit(f"the graph has a tensor {short(text)}, which no module could have")
    return text


def _check_node(node: schema.Node) -> schema.Node:
    check_operator(node.target)
    if node.name is not None:
        _name(node.name)
    if node.is_hop_single_tensor_return is not None:
        raise Misfit("the graph calls functions")
    return replace(node, metadata={})


def _check_argument(argument: schema.Argument) -> schema.Argument:
    if not _ARGUMENTS.fullmatch(str(argument.type)):
        raise Misfit(f"the graph passes functions or objects around ({argument.type})")
    if str(argument.type) == "as_layout":
        _check_layout(argument.value)
    if str(argument.type) == "as_scalar_type":
        _check_dtype(argument.value)
    return argument


def _check_layout(layout: schema.Layout) -> None:
    if layout != schema.Layout.Strided:
        raise Misfit("it has tensors that are not strided")


def _check_dtype(dtype: schema.ScalarType) -> None:
    if dtype == schema.ScalarType.UNKNOWN:
        raise Misfit("it has tensors of unknown dtype")


def _check_device(device: schema.Device, allowed: set[str]) -> schema.Device:
    if device.type not in allowed or not 0 <= (device.index or 0) < 1024:
        raise Misfit(f"it has tensors on {short(device.type)}, which it was not made for")
    return device


def _check_tensor(meta: schema.TensorMeta) -> schema.TensorMeta:
    _check_layout(meta.layout)
    _check_dtype(meta.dtype)
    if len(meta.sizes) != len(meta.strides) or len(meta.sizes) > 64:
        raise Misfit(
            f"it has a tensor of {counted(len(meta.sizes), 'size')} and {counted(len(meta.strides), 'stride')}"
        )
    for size in (*meta.sizes, *meta.strides, meta.storage_offset):
        if isinstance(size.value, int) and size.value < 0:
            raise Misfit(f"it has a tensor with a size, stride or offset of {size.value}")
    return replace(meta, requires_grad=False)


_SIZE_NODES = (ast.Expression, ast.Call, ast.Name, ast.Load, ast.keyword, ast.Constant, ast.UnaryOp, ast.USub)
#: A size is written as sympy's own constructor calls, such as `Mul(Integer(2), Symbol('s72', positive=True))`.
_SIZE_CALLS = re.compile(
    r"Symbol|Integer|Float|Rational|Add|Mul|Pow|PowByNatural|Max|Min|Abs|Mod|PythonMod|FloorDiv|CeilDiv|CleanDiv"
    r"|ModularIndexing|(Ceil|Floor|Trunc|Round)ToInt|IntTrueDiv|FloatTrueDiv|ToFloat|Equality|Unequality"
    r"|(Strict)?(Less|Greater)Than|And|Or|Not"
)


def _check_expression(expression: schema.SymExpr) -> schema.SymExpr:
    return replace(expression, expr_str=size_of(expression.expr_str))


@functools.lru_cache(1024)
def size_of(text: str) -> str:
    """A symbolic size, written anew, if it is nothing but arithmetic that cannot grow large."""
    try:
        tree = ast.parse(text, mode="eval") if len(text) < 10_000 else None
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        tree = None
    powers = 0
    for node in ast.walk(tree) if tree is not None else [ast.Slice()]:
        fine = isinstance(node, _SIZE_NODES)
        if isinstance(node, ast.Call):
            fine = isinstance(node.func, ast.Name) and _SIZE_CALLS.fullmatch(node.func.id) is not None
            if fine and "Pow" in node.func.id:  # type: ignore[attr-defined]
                powers += 1
                fine = powers < 8 and len(node.args) == 2 and _number(node.args[1]) in range(-3, 9)
        elif isinstance(node, ast.Constant):
            kind, value = type(node.value), node.value
            fine = (kind is str and re.fullmatch(r"\w{1,50}", value, re.ASCII) is not None) or (  # type: ignore[arg-type]
                kind in (int, float, bool) and abs(value) < 2**63  # type: ignore[arg-type]
            )
        elif isinstance(node, ast.keyword):
            fine = isinstance(node.value, ast.Constant) and type(node.value.value) is bool
        if not fine:
            raise Misfit(f"the graph has a size {short(text)} that is no arithmetic")
    assert tree is not None
    return ast.unparse(tree)


def _number(node: ast.expr) -> Any:
    """The value of `Integer(3)` or `3`."""
    if isinstance(node, ast.Call) and len(node.args) == 1:
        return _number(node.args[0])
    if isinstance(node, ast.UnaryOp):
        value = _number(node.operand)
        return -value if type(value) is int else None
    return node.value if isinstance(node, ast.Constant) else None


def _check_call(call: schema.ModuleCallSignature) -> schema.ModuleCallSignature:
    for name in call.forward_arg_names or []:
        _name(name)
    return replace(call, in_spec=tree_of(call.in_spec), out_spec=tree_of(call.out_spec))


@dataclass
class _Tree:
    """As `torch.utils._pytree` writes an argument structure; `context` is JSON in a string."""

    type: str | None
    context: str | None
    children_spec: list[_Tree]


def tree_of(text: str) -> str:
    """An argument structure, written anew, if it holds only containers of Python.

    For other types torch looks their class up by name; enums, wherever in a context, by importing their module.
    """
    data = typed.parse(text)
    if type(data) is not list or len(data) != 2 or data[0] != 1:
        raise Misfit(f"the call has a structure {short(text)} of another version")
    return json.dumps([1, _tree(typed.build(_Tree, data[1], where="the call"))])


def _tree(tree: _Tree) -> dict[str, Any]:
    children = [_tree(child) for child in tree.children_spec]
    context = tree.context
    if tree.type is None:
        if context is not None or children:
            raise Misfit("the call has a leaf with contents")
    elif tree.type in ("builtins.tuple", "builtins.list"):
        if context != "null":
            raise Misfit(f"the call has a {tree.type} of {short(context)}")
    elif tree.type == "builtins.dict" and context is not None:
        keys = typed.parse(context)
        if type(keys) is not list or any(type(k) not in (str, int, bool) for k in keys) or len(keys) != len(children):
            raise Misfit(f"the call has a dict of {short(keys)}")
        if len({*keys}) != len(keys):
            raise Misfit("the call has a dict with a key twice")
        context = json.dumps(keys)
    else:
        raise Misfit(f"the call holds a {short(tree.type)}, which ctfp8.export does not write")
    return {"type": tree.type, "context": context, "children_spec": children}


def _check_graph(graph: schema.Graph) -> schema.Graph:
    if graph.custom_obj_values or graph.is_single_tensor_return:
        raise Misfit("the graph holds objects")
    for values in (graph.tensor_values, graph.sym_int_values, graph.sym_bool_values, graph.sym_float_values):
        for name in values:
            _name(name)
    return graph


def _check_module(module: schema.GraphModule) -> schema.GraphModule:
    if module.treespec_namedtuple_fields:
        raise Misfit("the call holds named tuples")
    root = [entry for entry in module.module_call_graph if not entry.fqn]
    if len(root) != 1 or root[0].signature is None:
        raise Misfit("the graph does not say how it is called")
    return replace(module, module_call_graph=root, metadata={})


def _check_exported(program: schema.ExportedProgram) -> schema.ExportedProgram:
    for name in program.range_constraints:
        _name(name)
    if program.verifiers != ["ATEN"]:
        raise Misfit(f"the graph names the verifiers {short(program.verifiers)}")
    return replace(program, guards_code=[])  # Python source; inputs are checked against the manifest instead


def _kind(allowed: tuple[str, ...]) -> Callable[[_Union], _Union]:
    def check(spec: _Union) -> _Union:
        if str(spec.type) not in allowed:
            raise Misfit(f"the graph has a {spec.type} among its inputs and outputs")
        return spec

    return check


def _names_in(spec: Any) -> Any:
    """Checks each field of a small class of the schema that holds the name of a node, an argument or a tensor."""
    for field in fields(spec):
        value = getattr(spec, field.name, None)
        if isinstance(value, str):
            (_path if field.name in ("parameter_name", "buffer_name", "tensor_constant_name") else _name)(value)
    return spec


def _check_sym(argument: Any) -> Any:
    if str(argument.type) == "as_name":
        _name(argument.value)
    return argument


_NAMED = (
    schema.TensorArgument,
    schema.InputToParameterSpec,
    schema.InputToBufferSpec,
    schema.InputToTensorConstantSpec,
    schema.InputToConstantInputSpec,
    schema.BufferMutationSpec,
    schema.UserInputMutationSpec,
)
_CHECKS: typed.Checks = {
    schema.Node: _check_node,
    schema.Argument: _check_argument,
    schema.SymExpr: _check_expression,
    schema.TensorMeta: _check_tensor,
    schema.ModuleCallSignature: _check_call,
    schema.Graph: _check_graph,
    schema.GraphModule: _check_module,
    schema.ExportedProgram: _check_exported,
    schema.InputSpec: _kind(_INPUTS),
    schema.OutputSpec: _kind(_OUTPUTS),
    **dict.fromkeys((schema.SymIntArgument, schema.SymFloatArgument, schema.SymBoolArgument), _check_sym),
    **dict.fromkeys(_NAMED, _names_in),
}
