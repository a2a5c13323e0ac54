"""FP8 parameters in an nn.Module: a parametrization whose only output is one `ctfp8::dequantize` node.

The module's own code stays as it is. It asks for `self.weight` and gets the dequantized tensor; a tracer sees the marker.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from . import checkpoint as ckpt
from .errors import CheckpointError, SchemeError, UsageError
from .layout import Layout, identity
from .lowering import cpu_kernels
from .mapped import LeaveFiles
from .ops import FP8
from .scheme import Scheme, Schemes


@dataclass(frozen=True)
class StoredScale:
    """How the file stored a scale, so that saving gives back the same bits."""

    dtype: torch.dtype
    shape: tuple[int, ...]


@dataclass(frozen=True)
class QuantizedParameter:
    """All that is known of one FP8 parameter of a model.

    Attributes:
        scheme: the checkpoint's scheme.
        layout: which checkpoint tensors it is made of.
        dtype: what it dequantizes to.
        scales, input_scales: by checkpoint weight name, how the file stored them.
    """

    scheme: Scheme
    layout: Layout
    dtype: torch.dtype
    scales: Mapping[str, StoredScale]
    input_scales: Mapping[str, StoredScale]


class Dequantize(nn.Module):
    """Parametrization of one FP8 parameter: float8_e4m3fn `[..., N, K]` in, `dtype` out.

    Buffers:
        weight_scale: float32 `[..., ceil(N / block[0]), ceil(K / block[1])]`.
        input_scale: float32, one per checkpoint tensor merged into this one: `[S]` for a linear, `[E, S]` for experts;
            None where activations are not static.
    """

    weight_scale: Tensor
    input_scale: Tensor | None

    def __init__(self, info: QuantizedParameter, weight_scale: Tensor, input_scale: Tensor | None):
        super().__init__()
        self.info = info
        self.block = list(info.layout.block(info.scheme))
        self.register_buffer("weight_scale", weight_scale)
        self.register_buffer("input_scale", input_scale)

    def forward(self, weight: Tensor) -> Tensor:
        out = torch.ops.ctfp8.dequantize(
            weight, self.weight_scale, self.input_scale, self.block, self.info.scheme.activation, self.info.dtype
        )
        return out.transpose(-1, -2) if self.info.layout.transposed else out

    def static_scale(self, source: str) -> Tensor:
        """The static activation scale of one checkpoint tensor: float32, no dimensions."""
        assert self.input_scale is not None
        groups = self.input_scale.view(-1, self.input_scale.shape[-1])
        seen = [0] * groups.shape[0]
        for p in self.info.layout.placements:  # the order in which `read_scales` grouped them
            group = p.start // self.info.layout.shape[-2]
            if p.source == source:
                return groups[group, seen[group]]
            seen[group] += 1
        raise KeyError(source)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Dequantize:
        # a cast of the model (autocast helpers, .float()) must not round the scales
        if fn(torch.empty(0, dtype=FP8, device=self.weight_scale.device)).dtype != FP8:
            raise UsageError(_CAST)
        return super()._apply(fn, recurse)

    def extra_repr(self) -> str:
        return f"{self.info.scheme}, block={tuple(self.block)}, {self.info.dtype}"


_CAST = (
    "this model holds float8_e4m3fn weights, and changing its dtype (.to(dtype), .half(), .float(), .bfloat16()) would "
    "cast them too and throw their scales away. Choose the dtype when loading, from_pretrained(..., dtype=...), "
    "or load with dequantize=True for a plain model; .to(device) is fine."
)


class _KeepsFP8:
    """Mixed into the class of a model with FP8 weights: casts and pickles are refused before anything is half done."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        device = next((q.weight_scale.device for _, _, q in quantized_parameters(self)), None)  # type: ignore[arg-type]
        if device is not None and fn(torch.empty(0, dtype=FP8, device=device)).dtype != FP8:
            raise UsageError(_CAST)
        return super()._apply(fn, recurse)  # type: ignore[misc]

    def _refuse_cast(self) -> Any:
        raise UsageError(_CAST)

    # transformers overrides these two with a message of its own, so `_apply` alone would not be asked
    half = float = _refuse_cast

    def requires_grad_(self, requires_grad: bool = True) -> Any:
        if requires_grad:
            raise UsageError(_TRAIN)
        return super().requires_grad_(False)  # type: ignore[misc]

    def train(self, mode: bool = True) -> Any:
        if mode:
            raise UsageError(_TRAIN)
        return super().train(False)  # type: ignore[misc]

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        from copy import deepcopy

        new = self.__new__(type(self))
        memo[id(self)] = new
        new.__dict__ = deepcopy(self.__dict__, memo)
        return new

    def __getstate__(self) -> Any:
        raise UsageError(
            "a model with FP8 weights cannot be pickled (torch.save(model)). Save it as a checkpoint with "
            "ctfp8.save_pretrained(model, folder), its tensors with torch.save(model.state_dict(), file), "
            "or its graph with ctfp8.export."
        )


_TRAIN = (
    "FP8 weights are for inference; this model cannot be trained. Load it with "
    "ctfp8.from_pretrained(..., dequantize=True) for a plain model that can."
)


def protect(model: nn.Module) -> None:
    """Makes the root of a model refuse what would lose its FP8 weights; also sets `eval()` and no gradients.

    If the C++ CPU kernels were built before, eager code takes them from here on; compiling a model builds them. When the
    model first runs, its CPU weights leave the mapped files.
    """
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    model.eval()
    with contextlib.suppress(cpu_kernels.KernelBuildError):  # the compiler will say so where it matters
        cpu_kernels.load(build=False)
    cls = type(model)
    if not isinstance(model, _KeepsFP8):
        namespace = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__}
        model.__class__ = type(cls.__name__, (_KeepsFP8, cls), namespace)
        model.register_forward_pre_hook(LeaveFiles(model))


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
        CheckpointError: the weight holds NaN codes.
    """
    weight = module._parameters[name]
    if weight is None or weight.dtype != FP8 or weight.device.type == "meta":
        raise CheckpointError(f"{info.layout.sources[0]}: was not loaded as float8_e4m3fn; please report this.")
    if ckpt.has_nan_code(weight):
        raise CheckpointError(
            f"{info.layout.sources[0]}: holds NaN codes (0x7f or 0xff). The file is damaged or the weights overflowed; "
            "quantize it again."
        )
    weight.requires_grad_(False)
    device = weight.device
    dequantize = Dequantize(info, weight_scale.to(device), None if input_scale is None else input_scale.to(device))
    dequantize.eval()
    parametrize.register_parametrization(module, name, dequantize, unsafe=True)
    module.parametrizations.eval()  # type: ignore[union-attr]


def dequantize_(model: nn.Module) -> nn.Module:
    """Replaces every FP8 parameter by its dequantized value, in place: a plain model, twice the memory."""
    for path, module, _ in list(quantized_parameters(model)):
        name = path.rpartition(".")[2]
        value = getattr(module, name).contiguous()
        parametrize.remove_parametrizations(module, name, leave_parametrized=False)
        module._parameters[name] = nn.Parameter(value, requires_grad=False)
    if isinstance(model, _KeepsFP8):
        model.__class__ = type(model).__mro__[2]
    return model


def load_state_dict(
    module: nn.Module, state_dict: Mapping[str, Tensor], quantization_config: Mapping[str, Any]
) -> nn.Module:
    """Loads a state dict with FP8 weights into any nn.Module, without transformers.

    Args:
        module: its parameters may be on the meta device; names are those of the state dict. A parameter `p` that the
            state dict holds in float8_e4m3fn needs `p_scale` beside it (`weight` → `weight_scale`).
        state_dict: FP8 weights, scales, and everything else the module has.
        quantization_config: as in a compressed-tensors checkpoint's `config.json`.

    Returns:
        `module`, in eval mode, its quantized parameters still float8_e4m3fn. They dequantize to the dtype the module's
        parameter had.

    Raises:
        CheckpointError: a parameter or scale is missing, left over, of the wrong shape or value.
        SchemeError: the config does not cover an FP8 weight, or is not compressed-tensors FP8.
    """
    schemes = Schemes(quantization_config)
    tensors = ckpt.InMemory(state_dict)
    own = module.state_dict()
    plans: dict[str, QuantizedParameter] = {}
    used: set[str] = set()
    for name, parameter in own.items():
        if name not in tensors:
            raise CheckpointError(f"{name}: the module needs it, the state dict lacks it.")
        used.add(name)
        if tuple(parameter.shape) != tensors[name].shape:
            raise CheckpointError(f"{tensors[name]}: the module declares {list(parameter.shape)}.")
        ckpt.check_weight(tensors[name])
        if tensors[name].dtype == ckpt.FP8_DTYPE:
            plans[name] = plan(tensors, schemes, identity(name, tensors[name].shape), parameter.dtype)
            used |= {ckpt.scale_name(name), ckpt.input_scale_name(name)}
    if extra := sorted(set(tensors) - used):
        raise CheckpointError(
            f"{extra[0]}: in the state dict, but the module has no such parameter ({len(extra)} in all)."
        )
    scales = {name: read_scales(tensors, info) for name, info in plans.items()}
    for name in own:
        path, _, leaf = name.rpartition(".")
        owner = module.get_submodule(path)
        value = state_dict[name].detach()
        if leaf in owner._buffers:
            owner._buffers[leaf] = value.to(own[name].dtype)
            continue
        owner._parameters[leaf] = nn.Parameter(
            value if name in plans else value.to(own[name].dtype), requires_grad=False
        )
        if name in plans:
            attach(owner, leaf, plans[name], *scales[name])
    protect(module)
    return module


def plan(tensors: ckpt.Checkpoint, schemes: Schemes, layout: Layout, dtype: torch.dtype) -> QuantizedParameter:
    """Decides how one parameter is quantized and checks all that it needs, from headers alone.

    Raises:
        CheckpointError, SchemeError: naming the tensor.
    """
    found: dict[str, Scheme] = {}
    for source in layout.sources:
        scheme = schemes.scheme(source.removesuffix(".weight"))
        if scheme is None:
            raise SchemeError(
                f"{tensors[source]}: FP8 in the file, but quantization_config has no group that covers it "
                "(or ignores it). Correct its targets or ignore list."
            )
        ckpt.check_scale(tensors, tensors[source], scheme)
        found[source] = scheme
    first = layout.sources[0]
    for source, scheme in found.items():
        if scheme != found[first]:
            raise SchemeError(
                f"{source} ({scheme}) and {first} ({found[first]}) are merged, but differ in their scheme."
            )

    def stored(name: str) -> StoredScale:
        return StoredScale(ckpt.SCALE_DTYPES[tensors[name].dtype], tensors[name].shape)

    static = found[first].activation == "tensor"
    return QuantizedParameter(
        found[first],
        layout,
        dtype,
        {s: stored(ckpt.scale_name(s)) for s in layout.sources},
        {s: stored(ckpt.input_scale_name(s)) for s in layout.sources} if static else {},
    )


def read_scales(tensors: ckpt.Checkpoint, info: QuantizedParameter) -> tuple[Tensor, Tensor | None]:
    """Reads, checks and lays out the scales of one parameter: `(weight_scale, input_scale)`, float32.

    Raises:
        CheckpointError: a scale is NaN, infinite, zero or negative.
    """
    names = [ckpt.scale_name(s) for s in info.scales] + [ckpt.input_scale_name(s) for s in info.input_scales]
    values = tensors.read(names)
    for name, value in values.items():
        ckpt.check_scale_values(tensors[name], value)
    weight_scale = info.layout.scale({s: values[ckpt.scale_name(s)] for s in info.scales}, info.scheme)
    if not info.input_scales:
        return weight_scale, None
    # one value per matrix, grouped by the expert it went to: [S] for a linear, [E, S] for experts
    groups: list[list[Tensor]] = [[] for _ in range(math.prod(info.layout.shape[:-2]))]
    for p in info.layout.placements:
        groups[p.start // info.layout.shape[-2]].append(values[ckpt.input_scale_name(p.source)].reshape(()).float())
    return weight_scale, torch.stack([torch.stack(g) for g in groups]).view(*info.layout.shape[:-2], -1)
