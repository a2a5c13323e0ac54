"""Loads what `ctfp8.export` wrote: a `.pt2` file that needs neither transformers nor the checkpoint any more.

module = ctfp8.load("model.pt2")
logits = module(ids).logits
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram
from torch.export.passes import move_to_device_pass
from torch.export.pt2_archive._package import load_pt2
from torch.utils import _pytree as pytree

from .. import lowering
from ..errors import ArtifactError, Ctfp8Error, InputError, TargetError
from ..report import Entry, Report
from ..target import Target
from . import sites
from . import verify as archive
from .manifest import Input, Manifest


def load(path: str | Path, device: torch.device | str | None = None) -> Artifact:
    """Loads an artifact for this machine, and picks the machine's kernels for it.

    Args:
        path: a `.pt2` file from `ctfp8.export`. An AOTInductor package runs machine code; a program does not, but see
            docs/security.md before loading a file you do not trust.
        device: where it is to run, such as `cuda:1`; default: the first device of the kind it was made for.

    Returns:
        A module that is called as the model was; where the model returned an object, its fields are read by name. It has a
        `.manifest` and a `.report`, and can be compiled with `torch.compile`.

    Raises:
        ArtifactError: the file is damaged, was edited, has another format version, or is not ours.
        TargetError: this machine lacks the device or the operator library the artifact was made for.
    """
    path = Path(path)
    manifest = archive.read_manifest(path)
    device = _device(path, Target.parse(manifest.target), device)
    archive.look_over(path, manifest)
    if manifest.package == "aoti":
        return _load_aoti(path, manifest, device)
    program = _read(path).exported_programs["model"]
    spec, exported = _call_of(path, manifest, program.call_spec.in_spec), read_report(path, manifest)
    if manifest.inputs != inputs_of(program) or dict(manifest.ranges) != ranges_of(program):
        raise ArtifactError(f"{path}: its manifest describes other inputs than its graph takes. It was edited.")
    if device.type != "cpu":
        program = move_to_device_pass(program, str(device))
    target = Target.parse(manifest.target)
    entries = sites.pick(program.graph, target)
    program.graph_module.recompile()
    module = program.module(check_guards=False)  # guards are stored as source code; our own checks replace them
    return Artifact(manifest, merge(target, entries) if target.device == "cpu" else exported, spec, module, device)


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
        out = self._run(*args, **kwargs)
        return Output(out) if isinstance(out, dict) else out

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
        sizes: dict[str, int] = {}
        for leaf, want in zip(leaves, self.manifest.inputs, strict=True):
            if want.dtype is None:
                if type(leaf) is not type(want.constant) or leaf != want.constant:
                    raise InputError(f"{want.name} was exported as the constant {want.constant!r}, not {leaf!r}.")
                continue
            if not isinstance(leaf, torch.Tensor):
                raise InputError(f"{want.name}: expected a tensor {want}, got {type(leaf).__name__}.")
            got = Input(want.name, _name(leaf.dtype), tuple(leaf.shape))
            if got.dtype != want.dtype or len(got.shape) != len(want.shape):
                raise InputError(f"{want.name}: expected {want}, got {got}.")
            if leaf.device.type != self.device.type:
                raise InputError(f"{want.name} is on {leaf.device}, the artifact on {self.device}.")
            for size, symbol in zip(leaf.shape, want.shape, strict=True):
                self._check_size(got, want, size, symbol, sizes)

    def _check_size(self, got: Input, want: Input, size: int, symbol: int | str, sizes: dict[str, int]) -> None:
        if isinstance(symbol, int):
            if size != symbol:
                raise InputError(
                    f"{want.name}: expected {want}, got {got}. Dimensions that are to vary are named at export: "
                    "ctfp8.export(..., dynamic_shapes=...)."
                )
            return
        if symbol not in self.manifest.ranges:
            return  # an expression of other symbols
        if sizes.setdefault(symbol, size) != size:
            raise InputError(
                f"{want.name}: expected {want}, got {got}, but {symbol} is {sizes[symbol]} in another input."
            )
        least, most = self.manifest.ranges[symbol]
        if size < least or (most is not None and size > most):
            ends = f"at least {least}" if most is None else f"from {least} to {most}"
            raise InputError(f"{want.name}: expected {want} with {symbol} {ends}, got {got}.")


class Output(dict[str, Any]):
    """What the model returned, its fields by name (`out.logits`, `out["logits"]`) or by position (`out[0]`)."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"the model returned {', '.join(self)}, no {name}") from None

    def __getitem__(self, key: Any) -> Any:
        return super().__getitem__(key) if isinstance(key, str) else tuple(self.values())[key]


def inputs_of(program: ExportedProgram) -> tuple[Input, ...]:
    """The flattened call of a program."""
    values = {node.name: node.meta.get("val") for node in program.graph.nodes if node.op == "placeholder"}
    out = []
    for i, name in enumerate(program.graph_signature.user_inputs):
        value = values.get(name) if isinstance(name, str) else None
        if isinstance(value, torch.Tensor):
            out.append(Input(name, _name(value.dtype), tuple(s if type(s) is int else str(s) for s in value.shape)))
        else:
            out.append(Input(f"input {i}", constant=name))
    return tuple(out)


def ranges_of(program: ExportedProgram) -> dict[str, tuple[int, int | None]]:
    """The ends of each symbol that an input's shape names."""
    named = {size for i in inputs_of(program) for size in i.shape if isinstance(size, str)}
    return {
        str(symbol): (int(r.lower), int(r.upper) if r.upper.is_Integer else None)
        for symbol, r in sorted(program.range_constraints.items(), key=str)
        if str(symbol) in named
    }


def merge(target: Target, entries: Sequence[Entry]) -> Report:
    """A report with one entry a parameter; where it is used several times, a use that stayed dequantized decides."""
    by_name: dict[str, Entry] = {}
    for entry in entries:
        first = by_name.get(entry.name)
        kept = entry if first is None or (entry.reason and not first.reason) else first
        by_name[entry.name] = replace(kept, uses=1 if first is None else first.uses + 1)
    done = tuple(e for e in by_name.values() if not e.reason)
    return Report(str(target), done, tuple(e for e in by_name.values() if e.reason))


def _entry(fields: dict[str, Any]) -> Entry:
    """From JSON, which has lists where an entry has tuples."""
    plain: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()}
    return Entry(**plain)


def read_report(path: Path, manifest: Manifest) -> Report:
    """The report of the exporting machine."""
    try:
        rewritten, kept = (tuple(map(_entry, manifest.report[key])) for key in ("rewritten", "kept"))
        return Report(manifest.target, rewritten, kept)
    except (TypeError, KeyError) as error:
        raise ArtifactError(f"{path}: the report in its manifest was edited ({error}).") from None


def _load_aoti(path: Path, manifest: Manifest, device: torch.device) -> Artifact:
    lowering.fingerprint(
        Target.parse(manifest.target)
    )  # its calls find our operators by name: build or load them first
    index = -1 if device.index is None else device.index
    runner = _read(path, device_index=index).aoti_runners["model"]
    spec = _call_of(path, manifest, pytree.treespec_loads(runner.loader.get_call_spec()[0]))
    return Artifact(manifest, read_report(path, manifest), spec, runner, device)


def _call_of(path: Path, manifest: Manifest, spec: pytree.TreeSpec | None) -> pytree.TreeSpec:
    """How arguments are nested, if the manifest describes the same."""
    if (
        spec is None
        or spec.num_leaves != len(manifest.inputs)
        or spec.child(0).num_children != len(manifest.positional)
    ):
        raise ArtifactError(f"{path}: its manifest describes other inputs than it takes. It was edited.")
    return spec


def _read(path: Path, **options: Any) -> Any:
    """torch's loader, its many ways to fail on a damaged file made one."""
    try:
        return load_pt2(str(path), **options)
    except Ctfp8Error:
        raise
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ArtifactError(f"{path}: torch cannot read it ({reason}). Copy or export the file again.") from error


def _device(path: Path, target: Target, wanted: torch.device | str | None) -> torch.device:
    """The device to run on, checked against what the artifact was made for and what this machine has."""
    with contextlib.suppress(RuntimeError):
        wanted = None if wanted is None else torch.device(wanted)
    if isinstance(wanted, str):
        raise TargetError(f"{wanted!r} is not a device.")
    if wanted is not None and wanted.type != target.device:
        raise TargetError(
            f"{path} was made for {target} and cannot run on {wanted}. Export it again for {wanted.type}."
        )
    if target.device == "cpu":
        return torch.device("cpu")
    present = torch.cuda.is_available() if target.device == "cuda" else torch.xpu.is_available()
    if not present:
        build = f"torch {torch.__version__}"
        raise TargetError(
            f"{path} was made for {target}, and {build} sees no {target.device} device here. Load it on a machine with one, "
            'or export the model again for this one: ctfp8.export(..., target="cpu").'
        )
    device = wanted if wanted is not None and wanted.index is not None else torch.device(target.device, 0)
    found = Target.detect(device)
    if target.capability is not None and found.capability is not None:
        (major, minor), (has_major, has_minor) = target.capability, found.capability
        if major != has_major or minor > has_minor:
            raise TargetError(
                f"{path} was made for {target}, but {device} is {found}. Export it again: ctfp8.export(..., "
                f'target="{found}").'
            )
    return device


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
