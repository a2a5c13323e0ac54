"""FP8 parameters in an nn.Module: a parametrization whose only output is one `ctfp8::dequantize` node.

The module's own code stays as it is. It asks for `self.weight` and gets the dequantized tensor; a tracer sees the marker.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling, is_dynamo_compiling, is_exporting
from torch.nn.utils import parametrize

from ..checkpoint import files as ckpt
from ..errors import CheckpointError, UsageError
from ..ops import FP8, dequantize_plainly, embedding
from .adapters import removable
from .dequantized import WRITE, Dequantized
from .embedding import Rows, asks_for_rows, gathering
from .plan import QuantizedParameter

CAST = (
    "this model holds float8_e4m3fn weights, and changing its dtype (.to(dtype), .half(), .float(), .bfloat16()) would "
    "cast them too and throw their scales away. Choose the dtype when loading, from_pretrained(..., dtype=...), "
    "or load with dequantize=True for a plain model; .to(device) is fine."
)


_dequantize = torch.ops.ctfp8.dequantize.default


def leaving() -> bool:
    """Whether `torch.onnx.export(model)` is tracing, to which our marker says nothing: then the weight is plain arithmetic.

    Raises:
        UsageError: OpenVINO's `convert_model(model)` is, which gets some of that arithmetic wrong.
    """
    if not torch.jit.is_tracing() and not is_exporting():
        return False  # torch.onnx imports at each question, and this is asked for each weight of each call
    if torch.jit.is_tracing() and not torch.onnx.is_in_onnx_export():
        frame = inspect.currentframe()
        while frame is not None and not frame.f_globals.get("__name__", "").startswith("openvino."):
            frame = frame.f_back
        if frame is not None:
            raise UsageError(
                "openvino.convert_model cannot take a model with FP8 weights as it is. Write it with ctfp8.export(model, "
                "path='model.xml'), or with args=(…) for one call, and read that: openvino.Core().read_model('model.xml')."
            )
    return torch.onnx.is_in_onnx_export()


class Dequantize(nn.Module):
    """Parametrization of one FP8 parameter: float8_e4m3fn `[..., N, K]` in, `dtype` out.

    Buffers:
        weight_scale: `[..., ceil(N / block[0]), ceil(K / block[1])]`, float32, or the bytes of powers of two (MXFP8).
        input_scale: float32, one per checkpoint tensor merged into this one: `[S]` for a linear, `[E, S]` for experts;
            None where activations are not static.
    """

    weight_scale: Tensor
    input_scale: Tensor | None

    def __init__(self, info: QuantizedParameter, weight_scale: Tensor, input_scale: Tensor | None):
        super().__init__()
        self.info = info
        #: What is needed at each use, one step away: dynamo guards each step of each weight.
        self.constants = (
            list(info.layout.block(info.scheme)),
            info.scheme.activation,
            info.dtype,
            info.layout.transposed,
        )
        self.register_buffer("weight_scale", weight_scale)
        self.register_buffer("input_scale", input_scale)

    def forward(self, weight: Tensor) -> Tensor:
        value = self.value(weight)
        if is_compiling() or type(value) is not Tensor or leaving():  # a tracer's own kind of tensor
            return value
        return Dequantized.of(value, functools.partial(self.value, weight))

    def value(self, weight: Tensor) -> Tensor:
        """The weight as the model wants it: in `dtype`, `[..., K, N]` where it keeps it transposed."""
        if leaving():
            block, _, dtype, transposed = self.constants
            out = dequantize_plainly(weight, self.weight_scale, block, dtype)
            return out.transpose(-1, -2) if transposed else out
        return _value(weight, self)

    def right_inverse(self, value: Tensor) -> Tensor:
        """What assigning to the parameter (`linear.weight = …`) calls."""
        if value.dtype == FP8:
            raise NotImplementedError  # as it is registered: the parameter is stored already
        raise UsageError(WRITE.format(what="the assignment"))

    def static_scale(self, source: str) -> Tensor:
        """The static activation scales of one checkpoint tensor, as the file stored them."""
        assert self.input_scale is not None
        groups = self.input_scale.view(-1, self.input_scale.shape[-1])
        seen = [0] * groups.shape[0]
        found = []
        for p in self.info.layout.placements:  # the order in which `read_scales` grouped them
            group = p.start // self.info.layout.shape[-2]
            if p.source == source:
                found.append(groups[group, seen[group]])
            seen[group] += 1
        stored = self.info.input_scales[source]
        return torch.stack(found[: math.prod(stored.shape)]).reshape(stored.shape).to(stored.dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Dequantize:
        # a cast of the model (autocast helpers, .float()) must not round the scales
        if fn(torch.empty(0, dtype=FP8, device=self.weight_scale.device)).dtype != FP8:
            raise UsageError(CAST)
        return super()._apply(fn, recurse)

    def extra_repr(self) -> str:
        return f"{self.info.scheme}, block={tuple(self.constants[0])}, {self.info.dtype}"


def _value(weight: Tensor, how: Any) -> Tensor:
    block, activation, dtype, transposed = how.constants
    scales = how._buffers
    out = _dequantize(weight, scales["weight_scale"], scales["input_scale"], block, activation, dtype)
    return out.transpose(-1, -2) if transposed else out


class Single(parametrize.ParametrizationList):
    """The parametrization of one FP8 parameter, with nothing on top of it.

    torch's list, which is for any number, costs dynamo twice as much to trace and to guard, for each weight.
    """

    def forward(self) -> Tensor:
        dequantize: Dequantize = getattr(self, "0")
        return dequantize.value(self.original) if is_compiling() else dequantize(self.original)

    def stand_in(self) -> Tensor:
        """What an embedding's forward gets for its table, where it only asks for rows."""
        how: Any = self._modules["0"]
        table: Tensor = self.original

        def rows(ids: Tensor) -> Tensor:
            return embedding(ids, table, how.weight_scale, how.constants[0], how.info.dtype)

        return Rows.of(table.shape, how.info.dtype, table.device, rows, lambda: how(table))

    def append(self, module: nn.Module) -> Any:
        self.__class__ = Several  # type: ignore[assignment]
        return self.append(module)


class Several(parametrize.ParametrizationList):
    """The parametrization of one FP8 parameter with others on top of it, such as PEFT's of an adapter, for one forward pass."""

    def append(self, module: nn.Module) -> Any:
        return super().append(removable(module))

    def __delitem__(self, index: Any) -> None:
        super().__delitem__(index)
        if len(self) == 1:
            self.__class__ = Single  # type: ignore[assignment]


@functools.cache
def _reader(name: str) -> Callable[[nn.Module], Tensor]:
    """What `module.weight` calls, as torch's own does, but for what is for scripting and for `parametrize.cached`."""

    def read(module: nn.Module) -> Tensor:
        # through the dicts: dynamo looks for a module's attribute in all of them, and guards each, for each weight
        chain: Any = module._modules["parametrizations"]._modules[name]  # type: ignore[union-attr]
        # to dynamo what follows, without the calls of modules, each of which it would trace for each weight
        if is_dynamo_compiling() and not is_exporting() and isinstance(chain, Single):
            return _value(chain._parameters["original"], chain._modules["0"])  # type: ignore[arg-type]
        if isinstance(chain, Single) and asks_for_rows(module):
            return chain.stand_in()
        return chain()

    return read


def quantized_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Module, Dequantize]]:
    """All FP8 parameters of a model: `(name, owning module, parametrization)`.

    The FP8 tensor itself is `owner.parametrizations[name.rpartition(".")[2]].original`.
    """
    for path, module in model.named_modules():
        if isinstance(parametrizations := getattr(module, "parametrizations", None), nn.ModuleDict):
            for name, chain in parametrizations.items():
                dequantize = next(iter(chain.children()), None)
                if isinstance(dequantize, Dequantize):
                    yield (f"{path}.{name}" if path else name), module, dequantize


def stored_weight(module: nn.Module, name: str) -> Tensor:
    """The float8_e4m3fn tensor behind parameter `name` (no dots) of `module`."""
    return module.parametrizations[name].original  # type: ignore[index,union-attr]


def attach(
    module: nn.Module, name: str, info: QuantizedParameter, weight_scale: Tensor, input_scale: Tensor | None
) -> None:
    """Puts the parametrization on a module whose parameter `name` already is the stored FP8 tensor.

    Raises:
        CheckpointError: the weight holds NaN values.
    """
    weight = module._parameters[name]
    if weight is None or weight.dtype != FP8 or weight.device.type == "meta":
        raise CheckpointError(f"{info.layout.sources[0]}: was not loaded as float8_e4m3fn; please report this.")
    if ckpt.has_nan(weight):
        raise CheckpointError(
            f"{info.layout.sources[0]}: holds NaN values (0x7f or 0xff). The file is damaged or the weights overflowed; "
            "quantize it again."
        )
    weight.requires_grad_(False)
    device = weight.device
    dequantize = Dequantize(info, weight_scale.to(device), None if input_scale is None else input_scale.to(device))
    dequantize.eval()
    own_class(module)
    parametrize.register_parametrization(module, name, dequantize, unsafe=True)
    module.parametrizations.eval()  # type: ignore[union-attr]
    module.parametrizations[name].__class__ = Single  # type: ignore[index]
    _share_class(module)


class _Shared(type):
    """The class of all modules of one class with the same FP8 parameters.

    torch makes one for each module. `torch.compile` guards a module's class, so that layers alike, compiled one by one, would
    be as many compilations.
    """

    def __setattr__(cls, name: str, value: Any) -> None:
        """torch parametrizes another tensor of one module: the others keep theirs as it is."""
        super().__setattr__(name, _of_some(name, value) if isinstance(value, property) else value)

    def __delattr__(cls, name: str) -> None:
        """torch takes the parametrization off one module: the others keep theirs."""
        found = vars(cls).get(name)
        if isinstance(found, property):
            super().__setattr__(name, _of_some(name, found))
        else:
            super().__delattr__(name)


def _of_some(name: str, of_parametrized: property) -> property:
    """A property of a class some of whose modules have that tensor parametrized, and some as it is."""

    parametrized = of_parametrized.fget
    assert parametrized is not None

    def read(module: nn.Module) -> Any:
        if name in module.parametrizations:  # type: ignore[operator]
            return parametrized(module)
        for tensors in (module._parameters, module._buffers):
            if name in tensors:
                return tensors[name]
        raise AttributeError(name)

    return property(read, of_parametrized.fset)  # assigning to a plain one does not come here


_shared: dict[tuple[type, tuple[str, ...]], type] = {}


def _share_class(module: nn.Module) -> None:
    """From the class that torch's parametrization made for a module alone, to that of all modules like it."""
    alone, names = type(module), tuple(module.parametrizations)  # type: ignore[arg-type]
    (base,) = alone.__bases__
    if (base, names) not in _shared:
        own: dict[str, Any] = {k: v for k, v in vars(alone).items() if k not in ("__dict__", "__weakref__")}
        own |= {name: property(_reader(name), own[name].fset) for name in names}
        meta = _Shared if type(base) is type else type("_Shared", (_Shared, type(base)), {})
        own["register_parameter"] = _register_parameter
        if issubclass(base, nn.Embedding):
            own["forward"] = gathering(base.forward)
        _shared[base, names] = meta(alone.__name__, (base,), own)
    module.__class__ = _shared[base, names]


def own_class(module: nn.Module) -> None:
    """Gives a module that shares its class one of its own, which can be changed."""
    cls = type(module)
    if isinstance(cls, _Shared):
        own = {k: v for k, v in vars(cls).items() if k not in ("__dict__", "__weakref__")}
        module.__class__ = type(cls.__bases__[0])(cls.__name__, cls.__bases__, own)


def _register_parameter(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
    """What `linear.weight = nn.Parameter(…)` calls: torch would say that the attribute is there already."""
    if name in self.parametrizations:  # type: ignore[operator]
        raise UsageError(WRITE.format(what="the assignment"))
    nn.Module.register_parameter(self, name, param)


def detach(module: nn.Module, name: str, value: Tensor) -> None:
    """Takes the parametrization off parameter `name` of a module, and puts `value` in its place."""
    own_class(module)
    parametrize.remove_parametrizations(module, name, leave_parametrized=False)
    module._parameters[name] = nn.Parameter(value, requires_grad=False)
    if parametrize.is_parametrized(module):  # in other parameters
        _share_class(module)
