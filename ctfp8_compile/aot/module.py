"""A loaded artifact: called as the model was, its inputs checked against the manifest."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from ..errors import Ctfp8Error, InputError, UsageError
from ..model.ranks import ended, is_of_ranks
from ..ops import FP8
from ..report import Report
from .call import Input, dtype_name, evaluate, solve, symbols_in
from .manifest import Manifest


class Artifact(nn.Module):
    """A loaded artifact, called as the model was that it was made from.

    Attributes:
        manifest: what the file says of itself.
        report: what became of each FP8 weight here: on the CPU, kernels are chosen when an artifact is loaded.
    """

    def __init__(
        self,
        manifest: Manifest,
        report: Report,
        spec: pytree.TreeSpec,
        run: Callable[..., Any],
        device: torch.device,
    ):
        super().__init__()
        self.manifest, self.report, self.device = manifest, report, device
        self._spec, self._run = spec, run

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        args, kwargs = self._bind(args, kwargs)
        if not torch.compiler.is_compiling():
            self._check(args, kwargs)
            out = self._try(args, kwargs)
        else:
            out = self._run(*args, **kwargs)
        named = isinstance(out, dict) and all(isinstance(key, str) for key in out)
        return Output(out) if named else out

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Artifact:
        """What `.half()`, `.to(…)` and the like call: the dtypes and the device of a graph are a part of it."""
        for dtype in (torch.float32, FP8):
            changed = fn(torch.empty(0, dtype=dtype, device=self.device))
            if changed.dtype != dtype:
                raise UsageError(
                    "the dtypes of an artifact's weights and scales are part of its graph, and a cast would lose their bits. "
                    "Cast its inputs and outputs, or export the model again as from_pretrained(..., dtype=...) loads it."
                )
            if changed.device.type != self.device.type:
                raise UsageError(
                    f"this artifact was loaded for {self.device}, and its kernels chosen for it. Load it for another device: "
                    f"ctfp8.load(path, device={str(changed.device)!r})."
                )
        return super()._apply(fn, recurse)

    def _try(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        try:
            return self._run(*args, **kwargs)
        except (Ctfp8Error, torch.OutOfMemoryError):
            raise
        except Exception as error:
            if self.manifest.ranks is not None and is_of_ranks(error):
                raise ended(error) from error
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise InputError(f"this artifact's graph does not run on these inputs: {reason}") from error

    def _bind(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Sorts arguments into the positions they were exported in. Constants may be left out."""
        positional, keywords = self._spec.children()
        names = [*self.manifest.positional, *keywords.context]
        specs = [*positional.children(), *keywords.children()]
        given = dict(zip(names, args, strict=False))
        if len(args) > len(names) or given.keys() & kwargs.keys() or kwargs.keys() - set(names):
            wrong = sorted((kwargs.keys() - set(names)) | (given.keys() & kwargs.keys()))
            what = f"not {', '.join(wrong)}" if wrong else f"{len(args)} are too many"
            raise InputError(f"this artifact takes {', '.join(names)}; {what}.")
        given |= kwargs
        start = 0
        for name, spec in zip(names, specs, strict=True):
            leaves = self.manifest.inputs[start : start + spec.num_leaves]
            start += spec.num_leaves
            if name not in given:
                if any(leaf.dtype for leaf in leaves):
                    raise InputError(f"{name} is missing; this artifact takes {', '.join(names)}.")
                given[name] = pytree.tree_unflatten([leaf.constant for leaf in leaves], spec)
        values = [given[name] for name in names]
        count = len(self.manifest.positional)
        return tuple(values[:count]), dict(zip(names[count:], values[count:], strict=True))

    def _check(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Every leaf has the dtype, shape and device it was exported for; symbols have one value each, in their range."""
        leaves, spec = pytree.tree_flatten((args, kwargs))
        if spec != self._spec:
            raise InputError(f"the arguments are nested as {spec}, but were exported as {self._spec}.")
        symbols: dict[str, int] = {}
        derived: list[tuple[Input, Input, int, str]] = []
        for leaf, want in zip(leaves, self.manifest.inputs, strict=True):
            if want.dtype is None:
                if type(leaf) is not type(want.constant) or leaf != want.constant:
                    raise InputError(f"{want.name} was exported as the constant {want.constant!r}, not {leaf!r}.")
                continue
            if not isinstance(leaf, torch.Tensor):
                raise InputError(f"{want.name}: expected a tensor {want}, got {type(leaf).__name__}.")
            got = Input(want.name, dtype_name(leaf.dtype), tuple(leaf.shape))
            if got.dtype != want.dtype or len(got.shape) != len(want.shape):
                raise InputError(f"{want.name}: expected {want}, got {got}.")
            if leaf.device.type != self.device.type:
                raise InputError(f"{want.name} is on {leaf.device}, the artifact on {self.device}.")
            for size, wanted in zip(leaf.shape, want.shape, strict=True):
                if isinstance(wanted, str) and wanted not in self.manifest.ranges:
                    derived.append((got, want, size, wanted))
                else:
                    self._check_size(got, want, size, wanted, symbols)
        for got, want, size, expression in derived:
            self._check_derived(got, want, size, expression, symbols)

    def _check_size(self, got: Input, want: Input, size: int, symbol: int | str, symbols: dict[str, int]) -> None:
        if isinstance(symbol, int):
            if size != symbol:
                raise InputError(
                    f"{want.name}: expected {want}, got {got}. Dimensions that are to vary are named at export: "
                    "ctfp8.export(..., dynamic_shapes=...)."
                )
            return
        if symbols.setdefault(symbol, size) != size:
            raise InputError(
                f"{want.name}: expected {want}, got {got}, but {symbol} is {symbols[symbol]} in another input."
            )
        least, most = self.manifest.ranges[symbol]
        if size < least or (most is not None and size > most):
            raise InputError(f"{want.name}: expected {want} with {self._ends(symbol)}, got {got}.")

    def _check_derived(self, got: Input, want: Input, size: int, expression: str, symbols: dict[str, int]) -> None:
        """A size such as `2*s70`, after the plain symbols; it may be the only one that says how large its symbol is."""
        unknown = [symbol for symbol in symbols_in(expression) if symbol not in symbols]
        if len(unknown) == 1:
            found = solve(expression, size, symbols, unknown[0])
            if found is not None:
                least, most = self.manifest.ranges.get(unknown[0], (0, None))
                if found >= least and (most is None or found <= most):
                    symbols[unknown[0]] = found
                    return
            raise InputError(f"{want.name}: expected {want} with {self._ends(unknown[0])}, got {got}.")
        if not unknown and evaluate(expression, symbols) not in (size, None):
            known = ", ".join(f"{symbol} is {symbols[symbol]}" for symbol in symbols_in(expression))
            raise InputError(f"{want.name}: expected {want}, got {got}, but {known} in another input.")

    def _ends(self, symbol: str) -> str:
        least, most = self.manifest.ranges.get(symbol, (0, None))
        return f"{symbol} at least {least}" if most is None else f"{symbol} from {least} to {most}"


class Output(dict[str, Any]):
    """What the model returned: its fields by name (`out.logits`, `out["logits"]`) or by position (`out[0]`).

    A dict with keys that are no names stays a dict.
    """

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"the model returned {', '.join(self)}, no {name}") from None

    def __getitem__(self, key: Any) -> Any:
        return super().__getitem__(key) if isinstance(key, str) else tuple(self.values())[key]
