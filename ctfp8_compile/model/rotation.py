"""Transforms of a rotated checkpoint on an nn.Module: hooks whose only trace in a graph is one `ctfp8::rotate` node each."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..checkpoint.files import Checkpoint
from ..checkpoint.transforms import AROUND, ATTENTION, Matrices, Matrix, Transform, read_matrix
from ..errors import CheckpointError, SchemeError, UsageError
from ..ops import ROTATE


class Rotation(nn.Module):
    """The matrix of a transform in a module that it is applied to, as the file stored it; one tensor for all that share it.

    It is a module of each: of one in several places torch.export loses the path, and so the names of the weights there.

    Buffers:
        weight: `[B, B]`, in the file's dtype; permuted where there is a permutation, which the graph then need not do.
        perm: int64 `[B]`, the order of the stored matrix's rows and columns; None where they stay.
    """

    weight: Tensor
    perm: Tensor | None

    def __init__(self, stored: Matrix, weight: Tensor, perm: Tensor | None, moved: Moved):
        super().__init__()
        self.stored = stored
        self.moved = moved
        self.register_buffer("weight", weight)
        self.register_buffer("perm", perm)

    def forward(self, x: Tensor, transform: Transform) -> Tensor:
        """`x` `[..., K]` times the transform's matrix, block by block."""
        weight = self._buffers["weight"]
        return ROTATE(x, weight, self.stored.scale, transform.transposed, transform.precision, transform.name)

    def stored_tensors(self) -> dict[str, Tensor]:
        """The matrix, and its permutation, as the file has them."""
        if self.perm is None:
            return {self.stored.name: self.weight}
        back = self.perm.argsort()
        return {self.stored.name: self.weight[back][:, back], self.stored.perm: self.perm}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Rotation:
        for name, tensor in self._buffers.items():
            if tensor is not None:
                self._buffers[name] = self.moved(tensor, fn)
        return self

    def extra_repr(self) -> str:
        return f"{self.stored.name}, {list(self.weight.shape)}, {self.weight.dtype}"


class Moved:
    """What `Module.to` makes of buffers that several modules share: one tensor again, of the dtype it had."""

    def __init__(self) -> None:
        self.last: dict[torch.dtype, tuple[weakref.ref[Tensor], Tensor]] = {}

    def __call__(self, tensor: Tensor, fn: Callable[[Tensor], Tensor]) -> Tensor:
        # a cast of the model must not round a matrix; where it lies, it may change
        device = fn(torch.empty(0, dtype=tensor.dtype, device=tensor.device)).device
        if device == tensor.device and device.type != "meta":
            return tensor
        before, after = self.last.get(tensor.dtype, (None, tensor))
        if before is None or before() is not tensor or after.device != device:
            after = torch.empty_like(tensor, device=device) if device.type == "meta" else tensor.to(device)
            self.last[tensor.dtype] = weakref.ref(tensor), after
        return after


@dataclass(frozen=True)
class RotateInput:
    """Forward pre-hook: a module's first argument goes through its rotation."""

    transform: Transform

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        rotation = module._modules[self.transform.name]
        return (rotation(args[0], self.transform), *args[1:])  # type: ignore[misc]


@dataclass(frozen=True)
class RotateOutput:
    """Forward hook: what a module returns goes through its rotation."""

    transform: Transform

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        rotation = module._modules[self.transform.name]
        return rotation(output, self.transform)  # type: ignore[misc]


@dataclass(frozen=True)
class Placed:
    """A transform that a module of the model needs.

    Attributes:
        module: its name in the model.
        source: its name in the checkpoint.
        size: columns of what is transformed.
    """

    transform: Transform
    module: str
    source: str
    size: int
    matrix: Matrix


def place(
    model: nn.Module, transforms: Iterable[Transform], tensors: Checkpoint, modules: Iterable[tuple[str, str]]
) -> list[Placed]:
    """Decides which matrix is applied where, from headers alone.

    Args:
        modules: names of the model's modules that the checkpoint has, and their names there, in the model's order.

    Raises:
        CheckpointError, SchemeError: a matrix is missing or of another shape, or a transform is where we cannot apply it.
    """
    modules = list(modules)
    found: list[tuple[Transform, str, str, int]] = []
    for transform in transforms:
        before = len(found)
        for name, source in modules:
            module = model.get_submodule(name)
            classes = {cls.__name__ for cls in type(module).__mro__}
            if transform.covers(source, classes):
                found.append((transform, name, source, _size(transform, source, module)))
        if len(found) == before:
            raise SchemeError(
                f"transform_config: transform {transform} is for {', '.join(transform.targets)}, and the model has no such "
                "module. Correct its targets, or serve this checkpoint with vLLM."
            )
    matrices = Matrices(tensors, [(transform, source, size) for transform, _, source, size in found])
    return [Placed(t, name, source, size, matrices.of(t, source, size)) for t, name, source, size in found]


def _size(transform: Transform, source: str, module: nn.Module) -> int:
    if transform.location in AROUND and isinstance(module, nn.Linear):
        return module.in_features if transform.location == "input" else module.out_features
    if (
        transform.location in ATTENTION
        and transform.block
        and hasattr(module, "config")
        and hasattr(module, "layer_idx")
    ):
        return int(getattr(module, "head_dim", transform.block))
    raise SchemeError(
        f"{source}: transform {transform} cannot be applied to a {type(module).__name__} here, only to the input and the output "
        "of Linears, and to queries and keys of transformers' attention by blocks of head_dim. Serve this checkpoint with "
        "vLLM, or quantize the model without that transform."
    )


def read(tensors: Checkpoint, placed: Iterable[Placed]) -> dict[Matrix, tuple[Tensor, Tensor | None]]:
    """Reads and checks each matrix once.

    Raises:
        CheckpointError: its values are not what its type says.
    """
    return {one.matrix: read_matrix(tensors, one.transform, one.matrix) for one in placed}


def attach(model: nn.Module, placed: Iterable[Placed], matrices: dict[Matrix, tuple[Tensor, Tensor | None]]) -> None:
    """Puts transforms on a loaded model; a matrix is once on each device that needs it.

    Of transforms of attention, only their matrices: `hf.rotated_attention` hooks them.

    Raises:
        CheckpointError: a module has something of the transform's name already.
    """
    made: dict[tuple[Matrix, torch.device], tuple[Tensor, Tensor | None, Moved]] = {}
    for one in placed:
        module = model.get_submodule(one.module)
        device = next((t.device for t in (*module.parameters(), *module.buffers())), torch.device("cpu"))
        if one.transform.name in module._modules:
            raise CheckpointError(
                f"{one.source}: transform {one.transform} is applied twice, or the module has a {one.transform.name} of its own. "
                "Name each group and location once in transform_config."
            )
        if (one.matrix, device) not in made:
            weight, perm = matrices[one.matrix]
            weight = weight if perm is None else weight[perm][:, perm]
            made[one.matrix, device] = weight.to(device), None if perm is None else perm.to(device), Moved()
        module.add_module(one.transform.name, Rotation(one.matrix, *made[one.matrix, device]).eval())
        if one.transform.location == "input":
            # weights were multiplied by group after group, so that what is nearest to the matmul is the last group's:
            # x A B (W A⁻ᵀ B⁻ᵀ)ᵀ = x Wᵀ. compressed-tensors' own hooks run in the other order, which is right for one group only
            module.register_forward_pre_hook(RotateInput(one.transform))
        elif one.transform.location == "output":
            module.register_forward_hook(RotateOutput(one.transform), prepend=True)


def rotations(model: nn.Module) -> Iterator[tuple[str, nn.Module, Rotation]]:
    """All uses of a transform: `(name, the module it is applied to, its matrix)`. A shared matrix comes once for each use."""
    for path, module in model.named_modules():
        for name, child in module._modules.items():
            if isinstance(child, Rotation):
                yield f"{path}.{name}" if path else name, module, child


def stored_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Every matrix, and every permutation, once, under the name the file had it.

    Raises:
        UsageError: modules that share a matrix hold different values of it.
    """
    out: dict[str, Tensor] = {}
    users: dict[str, str] = {}
    for user, _, rotation in rotations(model):
        for name, tensor in rotation.stored_tensors().items():
            if name in out and out[name] is not tensor and not torch.equal(out[name].cpu(), tensor.cpu()):
                raise UsageError(
                    f"{user} and {users[name]} share the matrix {name} of the checkpoint, and hold different ones now. Write to "
                    "it in place, which changes it for all (rotation.weight.copy_(...)), or load the checkpoint again."
                )
            out[name], users[name] = tensor, user
    return out


def fold_(model: nn.Module) -> None:
    """Multiplies every transform into the plain weight (and bias) of its Linear, in float64, and takes its hook off.

    x R Wᵀ = x (W Rᵀ)ᵀ                    (x Wᵀ + b) U = x (Uᵀ W)ᵀ + b U
    """
    for module in {id(m): m for _, m, _ in rotations(model)}.values():
        _fold_module(module)  # type: ignore[arg-type]


@torch.no_grad()
def _fold_module(module: nn.Linear) -> None:
    weight = module.weight.double()
    bias = None if module.bias is None else module.bias.double()
    # what is nearest to the matmul is folded first
    for key, hook in reversed(list(module._forward_pre_hooks.items())):
        if isinstance(hook, RotateInput):
            weight = _rotate(module, hook.transform, weight, not hook.transform.transposed)
            del module._forward_pre_hooks[key]
    for key, after in list(module._forward_hooks.items()):
        if isinstance(after, RotateOutput):
            weight = _rotate(module, after.transform, weight.T, after.transform.transposed).T
            bias = None if bias is None else _rotate(module, after.transform, bias, after.transform.transposed)
            del module._forward_hooks[key]
    module.weight = nn.Parameter(weight.to(module.weight.dtype).contiguous(), requires_grad=False)
    if bias is not None:
        module.bias = nn.Parameter(bias.to(module.bias.dtype), requires_grad=False)
    for name in [n for n, child in module._modules.items() if isinstance(child, Rotation)]:
        del module._modules[name]


def _rotate(module: nn.Linear, transform: Transform, value: Tensor, transposed: bool) -> Tensor:
    rotation = module._modules[transform.name]
    assert isinstance(rotation, Rotation)
    return ROTATE(value, rotation.weight.double(), rotation.stored.scale, transposed, torch.float64, transform.name)
