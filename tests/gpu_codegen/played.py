"""Runs the code that Inductor wrote for a GPU on fake tensors, and writes down what it would launch.

Every launch is one `Launch`: a Triton kernel with its source, or an operator with dtype, sizes and strides of each operand
as the generated code passes them. Meta functions run, so what an operator's own checks refuse is an error here too.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch._inductor.async_compile import AsyncCompile
from torch._inductor.graph import GraphLowering
from torch.utils._python_dispatch import TorchDispatchMode

#: Operators that launch nothing.
_NOTHING = ("aten.as_strided", "aten.empty", "aten.alias", "aten.detach", "aten.view", "aten.reshape", "prim.device")


@dataclass(frozen=True)
class Launch:
    """One kernel.

    Attributes:
        name: of a Triton kernel what it does (`norm, quantize`; `weight-only linear`); else the operator, such as `fbgemm.f8f8bf16_rowwise`.
        operands: by the operator's argument name, `(dtype, sizes, strides)`; None for an argument that is None.
        source: of a Triton kernel.
    """

    name: str
    operands: dict[str, Any] = field(default_factory=dict)
    source: str = ""
    settings: dict[str, Any] = field(default_factory=dict)


class TritonKernel:
    """Stands in generated code for a compiled kernel."""

    def __init__(self, name: str, source: str, launches: list[Launch]):
        self.name, self.source, self.launches = name, source, launches

    def run(self, *args: Any, **kwargs: Any) -> None:
        tensors = [_described(a) for a in args if isinstance(a, Tensor)]
        self.launches.append(Launch(purpose(self.source), dict(enumerate(tensors)), self.source))


def purpose(source: str) -> str:
    """What a Triton kernel of Inductor's does, as far as our tests care, from its code."""
    if "custom_kernel=True" in source:  # one of ours
        return "weight-only " + re.findall(r"^def (\w+)_kernel\(", source, re.M)[0]
    signature = re.search(r"'signature': (\{.*?\})", source)
    pointers = re.findall(r"'(\w+?)_?ptr\d+': '\*fp8", signature[1] if signature else "")
    reads_fp8, writes_fp8 = "in" in pointers, "out" in pointers or "in_out" in pointers
    amax = "triton_helpers.max2(" in source or "triton_helpers.maximum(_" in source
    softmax = amax and "libdevice.exp(" in source and "tl.sum(" in source
    words = {
        "norm": "libdevice.rsqrt(" in source,
        "softmax": softmax,
        "silu": re.search(r"(tmp\d+) = -tmp\d+\n(.*\n)*?.*libdevice\.exp\(\1\)", source) is not None and not softmax,
        "sort": "triton_helpers.sort" in source,
        "amax": amax and not softmax and not writes_fp8,
        "dequantize": reads_fp8 and not writes_fp8,
        "copy of fp8": reads_fp8 and writes_fp8,
        "quantize": writes_fp8 and not reads_fp8,
    }
    return ", ".join(word for word, true in words.items() if true) or "pointwise"


def _described(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value if isinstance(value, (int, float, bool, type(None))) else str(value)
    return str(value.dtype).removeprefix("torch."), [int(s) for s in value.shape], [int(s) for s in value.stride()]


def _launch(name: str, op: Any, args: Any, kwargs: Any) -> Launch:
    names = [a.name for a in op._schema.arguments]
    bound = dict(zip(names, args, strict=False)) | {k: v for k, v in kwargs.items() if k != "out"}
    tensors = {k: _described(v) for k, v in bound.items() if isinstance(v, Tensor)}
    return Launch(name, tensors, settings={k: _described(v) for k, v in bound.items() if not isinstance(v, Tensor)})


class _Operators(TorchDispatchMode):
    """Notes the operators that generated code calls itself (Inductor's fallbacks)."""

    def __init__(self, launches: list[Launch]):
        super().__init__()
        self.launches = launches
        self.inside = False

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(op).removesuffix(".default")
        on_device = any(isinstance(a, Tensor) and a.device.type != "cpu" for a in args)
        if on_device and not name.startswith(_NOTHING) and not self.inside:
            self.launches.append(_launch(name, op, args, kwargs or {}))
        return op(*args, **(kwargs or {}))


class _Externs:
    """`extern_kernels` of generated code."""

    def __init__(self, operators: _Operators):
        self.operators = operators

    def __getattr__(self, name: str) -> Callable[..., Any]:
        op = getattr(torch.ops.aten, name)
        overload = getattr(op, "default", None) or getattr(op, op.overloads()[0])

        def call(*args: Any, out: Tensor | None = None, **kwargs: Any) -> Any:
            self.operators.launches.append(_launch(f"aten.{name}", overload, args, kwargs))
            self.operators.inside = True
            result = overload(*args, **kwargs)  # its meta function checks what the kernel's host code does
            self.operators.inside = False
            if out is not None:
                assert (result.shape, result.dtype) == (out.shape, out.dtype), (name, result, out)
            return out if out is not None else result

        return call


def _reinterpret(tensor: Tensor, sizes: Any, strides: Any, offset: int = 0) -> Tensor:
    return torch.as_strided(tensor, sizes, strides, tensor.storage_offset() + offset)


@contextmanager
def playing(device: str) -> Iterator[tuple[list[Launch], list[str]]]:
    """What is compiled inside runs so; gives the launches, in order, and the source of each module Inductor wrote."""
    launches: list[Launch] = []
    modules: list[str] = []
    operators = _Operators(launches)
    compile_to_module, triton = GraphLowering.compile_to_module, AsyncCompile.triton

    def play(self: Any) -> Any:
        module = compile_to_module(self)
        modules.append(inspect.getsource(module))
        module.empty_strided_cuda = module.empty_strided_xpu = lambda sizes, strides, dtype: torch.empty_strided(
            sizes, strides, dtype=dtype, device=device
        )
        module.reinterpret_tensor = _reinterpret
        module.extern_kernels = _Externs(operators)
        module.copy_if_misaligned = lambda tensor: tensor
        module.assert_alignment = lambda *args: None
        module.get_raw_stream = lambda *args: 0
        real = module.call

        def call(args: list[Any]) -> Any:
            with operators:
                return real(args)

        module.call = call
        return module

    GraphLowering.compile_to_module = play
    AsyncCompile.triton = lambda self, name, source, device_str: TritonKernel(name, source, launches)
    try:
        yield launches, modules
    finally:
        GraphLowering.compile_to_module, AsyncCompile.triton = compile_to_module, triton
