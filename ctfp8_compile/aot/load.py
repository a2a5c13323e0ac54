"""Loads what `ctfp8.export` wrote: a `.pt2` file that needs neither transformers nor the checkpoint any more.

module = ctfp8.load("model.pt2")
logits = module(ids).logits
"""

from __future__ import annotations

import contextlib
import gc
import os
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch.export import ExportedProgram
from torch.export.passes import move_to_device_pass
from torch.utils import _pytree as pytree

from .. import lowering, passes
from ..compat import ExportedProgramDeserializer, PT2ArchiveWriter, load_pt2, values_made_once
from ..errors import ArtifactError, Ctfp8Error, TargetError
from ..report import Report
from ..target import Target
from .archive import AGAIN, Archive, open_archive
from .call import inputs_of, ranges_of
from .manifest import Manifest, read_manifest
from .module import Artifact
from .ranks import bind, join
from .verify import check_records, read_program


def load(path: str | Path, device: torch.device | str | None = None, trust: bool = False) -> Artifact:
    """Loads an artifact for this machine, and picks the machine's kernels for it.

    Args:
        path: a `.pt2` file from `ctfp8.export`. It is read once, into memory, and nothing of it is run: see docs/security.md.
        device: where it is to run, such as `cuda:1`; default: the first device of the kind it was made for, or, of one rank's
            artifact, that of torchrun's LOCAL_RANK.
        trust: also load an AOTInductor package, which is machine code that runs with your rights. Nothing checks that.

    Returns:
        A module that is called as the model was; where the model returned an object, its fields are read by name. It has a
        `.manifest` and a `.report`, and can be compiled with `torch.compile`.

    Raises:
        ArtifactError: the file is damaged, was edited, has another format version, is not ours, or is machine code and
            `trust` was not given.
        RankError: it is for one of several processes, and this is not that one.
        TargetError: this machine lacks the device or the operator library the artifact was made for.
    """
    with _without_collector():
        return _load(Path(path), device, trust)


def _load(path: Path, device: torch.device | str | None, trust: bool) -> Artifact:
    with open_archive(path) as archive:
        manifest = read_manifest(archive)
        target = Target.parse(manifest.target)
        if manifest.ranks is not None:
            join(manifest.ranks, path)
        device = _device(path, target, device, int(os.environ.get("LOCAL_RANK", 0)) if manifest.ranks else 0)
        check_records(archive, manifest.package)
        if manifest.package == "aoti":
            return _load_aoti(archive, manifest, device, trust)
        checked = read_program(archive, target.device)
    with _torchs_errors(path):
        with values_made_once():
            program = ExportedProgramDeserializer().deserialize(checked.graph, checked.weights, checked.constants)
        try:
            bind(program.graph, manifest.ranks)
        except ArtifactError as problem:
            raise ArtifactError(f"{path}: {problem}. It was edited or damaged; not loaded.") from None
        spec = _call_of(path, manifest, program.call_spec.in_spec)
        if manifest.inputs != inputs_of(program) or dict(manifest.ranges) != ranges_of(program):
            raise ArtifactError(f"{path}: its manifest describes other inputs than its graph takes. It was edited.")
        if device.type != "cpu":
            program = move_to_device_pass(program, str(device))
        report = _rewrite(path, program, target, manifest)
        module = program.module(check_guards=False)  # guards are source code; our own checks replace them
    return Artifact(manifest, report, spec, module, device)


@contextlib.contextmanager
def _without_collector() -> Iterator[None]:
    """A graph is many objects, all of which stay: to look for garbage among them took a fifth of the time of a load."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


@contextlib.contextmanager
def _torchs_errors(path: Path) -> Iterator[None]:
    """The many ways in which torch fails on a graph that does not fit together, made one."""
    try:
        yield
    except Ctfp8Error:
        raise
    except Exception as error:
        reason = str(error).strip().splitlines()[-1] if str(error).strip() else type(error).__name__
        raise ArtifactError(f"{path}: torch cannot read its graph ({reason}). {AGAIN}") from error


def _rewrite(path: Path, program: ExportedProgram, target: Target, manifest: Manifest) -> Report:
    """On the CPU, puts this machine's kernels where the exporting one found matmuls with an FP8 weight."""
    exported = manifest.exported()
    if target.device != "cpu":
        return exported
    try:
        decisions = passes.select(passes.read(manifest.notes, program.graph), target)
        report = passes.apply(program.graph, target, decisions)
    except Ctfp8Error as error:
        raise ArtifactError(f"{path}: {error}") from None
    program.graph.eliminate_dead_code()
    program.graph_module.recompile()
    unknown = [entry for entry in exported.kept if not entry.rule]  # to every machine: no rule knows their use
    return replace(Report.of(str(target), [*report.rewritten, *report.kept, *unknown]), attention=report.attention)


def _load_aoti(archive: Archive, manifest: Manifest, device: torch.device, trust: bool) -> Artifact:
    path = archive.path
    if not trust:
        raise ArtifactError(
            f"{path}: holds machine code (an AOTInductor package), which loading runs with your rights. If you made the file, or "
            "trust who did as you would with a program: ctfp8.load(path, trust=True)."
        )
    # its calls find our operators by name: build or load them first
    lowering.fingerprint(Target.parse(manifest.target))
    index = -1 if device.index is None else device.index
    with tempfile.TemporaryDirectory() as folder, _torchs_errors(path):
        file = f"{folder}/model.pt2"  # the loader takes a name: of a file that no one replaces
        with PT2ArchiveWriter(file) as writer:
            for name in archive.records:
                if name.startswith("data/"):
                    data = archive.tensor(name)
                    writer.archive_file.write_record(name, data.data_ptr(), data.numel())
        runner = load_pt2(file, device_index=index).aoti_runners["model"]
        spec = _call_of(path, manifest, pytree.treespec_loads(runner.loader.get_call_spec()[0]))
    return Artifact(manifest, manifest.exported(), spec, runner, device)


def _call_of(path: Path, manifest: Manifest, spec: pytree.TreeSpec | None) -> pytree.TreeSpec:
    """How arguments are nested, if the manifest describes the same."""
    if (
        spec is None
        or spec.num_leaves != len(manifest.inputs)
        or spec.child(0).num_children != len(manifest.positional)
    ):
        raise ArtifactError(f"{path}: its manifest describes other inputs than it takes. It was edited.")
    return spec


def _device(path: Path, target: Target, wanted: torch.device | str | None, default: int = 0) -> torch.device:
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
    device = wanted if wanted is not None and wanted.index is not None else torch.device(target.device, default)
    found = Target.detect(device)
    if target.capability is not None and found.capability is not None:
        (major, minor), (has_major, has_minor) = target.capability, found.capability
        if major != has_major or minor > has_minor:
            raise TargetError(
                f"{path} was made for {target}, but {device} is {found}. Export it again: ctfp8.export(..., "
                f'target="{found}").'
            )
    return device
