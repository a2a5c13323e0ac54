"""Every private name of torch that this package leans on, and the releases it was seen in; which releases are tested.

A release of torch may move or drop a private name, so each is named here once, and the rest of the package imports it from
here (`hf.compat` does the same for transformers). It is looked up at its first use; where it is gone, one sentence says so.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import json
import sys
import threading
import warnings
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import UsageError

if TYPE_CHECKING:
    from torch.export import ExportedProgram

#: Name here: where torch has it, and the releases it was seen in.
PRIVATE = {
    "compiler_functions": ("torch._dynamo.backends.registry._COMPILER_FNS", "2.11 2.13 2.14"),  # by name
    "register_backend": ("torch._dynamo.register_backend", "2.11 2.13 2.14"),
    "compile_fx": ("torch._inductor.compile_fx.compile_fx", "2.11 2.13 2.14"),
    "CompileWrapper": ("torch._TorchCompileInductorWrapper", "2.11 2.13 2.14"),  # checks and expands mode and options
    "InvalidCxxCompiler": ("torch._inductor.exc.InvalidCxxCompiler", "2.11 2.13 2.14"),
    "CppCompileError": ("torch._inductor.exc.CppCompileError", "2.11 2.13 2.14"),
    "CustomGraphPass": ("torch._inductor.custom_graph_pass.CustomGraphPass", "2.11 2.13 2.14"),
    "inductor_config": ("torch._inductor.config", "2.11 2.13 2.14"),
    "ir": ("torch._inductor.ir", "2.11 2.13 2.14"),  # InputBuffer, ConstantBuffer
    "valid_vec_isa_list": ("torch._inductor.cpu_vec_isa.valid_vec_isa_list", "2.11 2.13 2.14"),
    "lowerings": ("torch._inductor.lowering.lowerings", "2.11 2.13 2.14"),
    "register_lowering": ("torch._inductor.lowering.register_lowering", "2.11 2.13 2.14"),
    "aot_compile": ("torch._inductor.aot_compile", "2.11 2.13 2.14"),
    "schema": ("torch._export.serde.schema", "2.11 2.13 2.14"),  # of a .pt2's JSON
    "_Union": ("torch._export.serde.union._Union", "2.11 2.13 2.14"),
    "deserialize_scalar_type": ("torch._export.serde.serialize.deserialize_scalar_type", "2.11 2.13 2.14"),
    "ExportedProgramDeserializer": ("torch._export.serde.serialize.ExportedProgramDeserializer", "2.11 2.13 2.14"),
    "GraphModuleDeserializer": ("torch._export.serde.serialize.GraphModuleDeserializer", "2.11 2.13 2.14"),
    "package_pt2": ("torch.export.pt2_archive._package.package_pt2", "2.11 2.13 2.14"),
    "AOTICompiledModel": ("torch.export.pt2_archive._package.AOTICompiledModel", "2.11 2.13 2.14"),
    "AOTIModelPackageLoader": ("torch._C._aoti.AOTIModelPackageLoader", "2.11 2.13 2.14"),
    "callback_handler": ("torch._dynamo.callback_handler", "2.11 2.13 2.14"),  # around each compilation
    "dynamo_config": ("torch._dynamo.config", "2.11 2.13 2.14"),  # specialize_float
    "symbols_config": ("torch.fx.experimental._config", "2.11 2.13 2.14"),  # use_duck_shape
    "CallbackTrigger": ("torch._dynamo.callback.CallbackTrigger", "2.11 2.13 2.14"),
    "FailOnRecompileLimitHit": ("torch._dynamo.exc.FailOnRecompileLimitHit", "2.11 2.13 2.14"),
    "RestartAnalysis": ("torch._dynamo.exc.RestartAnalysis", "2.11 2.13 2.14"),
    "guard_failures": ("torch._dynamo.guard_failures", "2.11 2.13 2.14"),  # of each code object
    "make_fx": ("torch.fx.experimental.proxy_tensor.make_fx", "2.11 2.13 2.14"),
    "functional_collectives": ("torch.distributed._functional_collectives", "2.11 2.13 2.14"),
    "resolve_process_group": ("torch.distributed.distributed_c10d._resolve_process_group", "2.11 2.13 2.14"),
    "_world": ("torch.distributed.distributed_c10d._world", "2.11 2.13 2.14"),
    "free_symbols": ("torch.fx.experimental.symbolic_shapes.free_symbols", "2.11 2.13 2.14"),
    "statically_known_true": ("torch.fx.experimental.symbolic_shapes.statically_known_true", "2.11 2.13 2.14"),
    "detect_fake_mode": ("torch._guards.detect_fake_mode", "2.11 2.13 2.14"),
    "enable_python_dispatcher": ("torch._dispatch.python.enable_python_dispatcher", "2.11 2.13 2.14"),
    "dispatch_functionalize": ("torch._subclasses.functional_tensor.dispatch_functionalize", "2.11 2.13 2.14"),
    "DisableTorchFunctionSubclass": ("torch._C.DisableTorchFunctionSubclass", "2.11 2.13 2.14"),
    "in_transform": ("torch._C._are_functorch_transforms_active", "2.11 2.13 2.14"),  # torch.func's
    "is_functorch_wrapped_tensor": ("torch._C._functorch.is_functorch_wrapped_tensor", "2.11 2.13 2.14"),
    "HigherOrderOperator": ("torch._ops.HigherOrderOperator", "2.11 2.13 2.14"),
    "invoke_subgraph": ("torch._higher_order_ops.invoke_subgraph.invoke_subgraph", "2.11 2.13 2.14"),
    "OpOverloadPacket": ("torch._ops.OpOverloadPacket", "2.11 2.13 2.14"),
    "OpOverload": ("torch._ops.OpOverload", "2.11 2.13 2.14"),
    "AsyncCompile": ("torch._inductor.async_compile.AsyncCompile", "2.11 2.13 2.14"),  # cpp_pybinding
    "LambdaFuture": ("torch._inductor.codecache.LambdaFuture", "2.11 2.13 2.14"),
    # of graphs kept between processes; a release without one of them keeps none
    "CheckFunctionManager": ("torch._dynamo.guards.CheckFunctionManager", "2.13 2.14"),
    "GuardBuilder": ("torch._dynamo.guards.GuardBuilder", "2.13 2.14"),
    "guard_closure_vars": ("torch._dynamo.guards._get_closure_vars", "2.13 2.14"),
    "dispatch_keys": ("torch._C._dispatch_keys", "2.13 2.14"),
    "GlobalSource": ("torch._dynamo.source.GlobalSource", "2.13 2.14"),
    "DynamoGuard": ("torch._guards.Guard", "2.13 2.14"),
    "GuardsSet": ("torch._guards.GuardsSet", "2.13 2.14"),
    "OrderedSet": ("torch.utils._ordered_set.OrderedSet", "2.13 2.14"),
    "CompileContext": ("torch._guards.CompileContext", "2.13 2.14"),
    "compile_context": ("torch._guards.compile_context", "2.13 2.14"),
    "TracingContext": ("torch._guards.TracingContext", "2.13 2.14"),
    "tracing": ("torch._guards.tracing", "2.13 2.14"),
    "metrics_context": ("torch._dynamo.utils.get_metrics_context", "2.13 2.14"),
    "OutputGraphCommon": ("torch._dynamo.output_graph.OutputGraphCommon", "2.13 2.14"),
    "OutputGraphGuardsState": ("torch._dynamo.output_graph.OutputGraphGuardsState", "2.13 2.14"),
    "builtins_dict": ("torch._dynamo.output_graph.get_builtins_dict", "2.13 2.14"),
    "convert_frame": ("torch._dynamo.convert_frame", "2.13 2.14"),  # CheckFunctionManager, register_bytecode_hook
    "codecache": ("torch._inductor.codecache", "2.13 2.14"),  # _precompile_header
    "functorch_config": ("torch._functorch.config", "2.13 2.14"),
    "BoxedBool": ("torch._inductor.utils.BoxedBool", "2.13 2.14"),
    "BoxedDeviceIndex": ("torch._inductor.cudagraph_utils.BoxedDeviceIndex", "2.13 2.14"),
    "FakeTensorMode": ("torch._subclasses.FakeTensorMode", "2.13 2.14"),
    "ShapeEnv": ("torch.fx.experimental.symbolic_shapes.ShapeEnv", "2.13 2.14"),
}
RECOMPILE_LOGGER = (
    "torch._dynamo.convert_frame"  # 2.11 2.13 2.14; warns as follows, with limit's name, limit, function, reason
)
AT_RECOMPILE_LIMIT = "torch._dynamo hit config."
_reading = threading.Lock()
TRITON_LOGGER = "torch._library.triton"  # 2.11 2.13 2.14
#: What the whole suite passed with; `pytest --record-tested` writes it, and the README's table.
TESTED = Path(__file__).with_name("tested.json")


def __getattr__(name: str) -> Any:
    return look_up("torch", PRIVATE, __name__, name)


def look_up(distribution: str, private: Mapping[str, tuple[str, str]], module: str, name: str) -> Any:
    """A module's `__getattr__` for the private names of a distribution.

    Raises:
        AttributeError: not one of them.
        UsageError: the installed release has it no more.
    """
    if name not in private:
        raise AttributeError(f"module {module!r} has no attribute {name!r}")
    path, seen = private[name]
    warn_if_newer(distribution)
    owner, _, attribute = path.rpartition(".")
    try:
        value = getattr(importlib.import_module(owner), attribute)
    except (ImportError, AttributeError) as why:
        raise UsageError(
            f"{distribution} {version(distribution)} has no {path}, which this ctfp8 needs; it was seen in "
            f"{seen.replace(' ', ', ')}. Install one of these releases, or a newer ctfp8-compile."
        ) from why
    setattr(sys.modules[module], name, value)
    return value


def export_arguments() -> dict[str, Any]:
    """What `torch.export.export` is told besides: before 2.13 it refuses a dynamic sequence for attention otherwise."""
    return {"prefer_deferred_runtime_asserts_over_guards": release(version("torch")) < (2, 13)}


def small_loops_alone(threads: int) -> dict[str, Any]:
    """For Inductor on a CPU: one thread runs loops of up to 16,384 elements, about as fast as several, which have to be started.

    Inductor shares them from 512 elements a thread on: each norm of a decode step waits for all threads, on a busy machine
    for milliseconds.
    """
    least = __getattr__("inductor_config").cpp.min_chunk_size
    return {"cpp.min_chunk_size": max(least, 16384 // threads)}


def vector_isas() -> tuple[str, ...]:
    """The sets of vector instructions that Inductor found to work, best first."""
    return tuple(map(str, __getattr__("valid_vec_isa_list")()))


def take_vector_isas(known: tuple[str, ...]) -> None:
    """Tells Inductor what it found on this very processor before; it tries each in a process of its own, for half a second.

    Where the processor's flags promise others than it found then, it is left to find out.
    """
    found = __getattr__("valid_vec_isa_list")
    if not found.cache_info().currsize:
        with __getattr__("inductor_config").patch({"cpp.vec_isa_ok": True}):
            promised = vector_isas()
        if promised != known:
            found.cache_clear()


@contextmanager
def without_precompiled_headers() -> Iterator[None]:
    """While code is loaded that was compiled: Inductor runs the preprocessor over torch's headers first, used or not."""
    codecache = __getattr__("codecache")
    plain = codecache._precompile_header
    codecache._precompile_header = lambda *args, **kwargs: ""
    try:
        yield
    finally:
        codecache._precompile_header = plain


def following(program: ExportedProgram) -> AbstractContextManager[Any]:
    """While nodes are replaced, the program's signature, which names those that are outputs, follows."""
    return program.graph_module._set_replace_hook(program.graph_signature.get_replace_hook())


@contextmanager
def values_made_once() -> Iterator[None]:
    """While a graph is deserialized, values described alike are one: their sizes are parsed by sympy once, not at each node."""
    reader, made = __getattr__("GraphModuleDeserializer"), {}
    plain = reader.deserialize_tensor_meta

    def once(self: Any, described: Any) -> Any:
        key = id(self), repr(described)
        if key not in made:
            made[key] = plain(self, described)
        return made[key]

    with _reading:
        reader.deserialize_tensor_meta = once
        try:
            yield
        finally:
            reader.deserialize_tensor_meta = plain


def forget_example_inputs(program: ExportedProgram) -> None:
    """They would be pickled into the file."""
    program._example_inputs = None


def process_groups() -> list[Any]:
    """The process groups that this process is in, in the order they were made."""
    return list(__getattr__("_world").pg_map)


def set_range_constraints(program: ExportedProgram, ranges: dict[Any, Any]) -> None:
    program._range_constraints = ranges


def version(distribution: str) -> str:
    """The version of an installed distribution, or of a package that is only on the path; `unknown` where neither is."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return str(getattr(sys.modules.get(distribution.replace("-", "_")), "__version__", "unknown"))


@functools.cache
def tested(distribution: str) -> tuple[str, ...]:
    """The releases of `torch`, `transformers` or `compressed-tensors` that the whole suite passed with, oldest first."""
    found = {row[distribution].partition("+")[0] for row in json.loads(TESTED.read_text())}
    return tuple(sorted(found, key=release))


@functools.cache
def warn_if_newer(distribution: str) -> None:
    """Warns, once, of a release newer than those tested. A patch release of a tested one counts as tested."""
    installed, known = version(distribution), tested(distribution)
    if known and release(installed)[:2] > release(known[-1])[:2]:
        warnings.warn(
            f"{distribution} {installed} is newer than the releases this ctfp8 was tested with ({', '.join(known)}). ctfp8 "
            f"goes on; if something fails, install {distribution} {known[-1]}.",
            stacklevel=4,
        )


def release(version: str) -> tuple[int, ...]:
    """`2.14.1+cu130` as `(2, 14, 1)`."""
    parts = version.partition("+")[0].split(".")
    return tuple(int(part) for part in parts if part.isdigit())
