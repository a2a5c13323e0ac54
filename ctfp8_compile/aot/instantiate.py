"""An opened `.pt2` made a module for this machine: a graph with the machine's kernels, or the machine code that it holds."""

from __future__ import annotations

import contextlib
import os
import platform
import sys
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch.export import ExportedProgram
from torch.export.passes import move_to_device_pass
from torch.utils import _pytree as pytree

from .. import lowering, passes
from ..compat import AOTICompiledModel, AOTIModelPackageLoader, ExportedProgramDeserializer, values_made_once
from ..errors import ArtifactError, Ctfp8Error, TargetError
from ..report import Report
from ..target import Target
from .archive import AGAIN, Archive
from .call import inputs_of, ranges_of
from .manifest import Manifest, read_manifest
from .module import Artifact
from .ranks import bind, join_group
from .verify import check_records, read_program


def instantiate(archive: Archive, device: torch.device | str | None, trust: bool) -> Artifact:
    """See `load`."""
    path = archive.path
    manifest = read_manifest(archive)
    target = Target.parse(manifest.target)
    if manifest.ranks is not None:
        join_group(manifest.ranks, path)
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
    unknown = [entry for entry in exported.kept if not entry.rule]  # to every machine: no rule knows their use
    weights = Report.of(str(target), [*report.rewritten, *report.kept, *unknown])
    return replace(weights, attention=report.attention, transforms=exported.transforms)


def _load_aoti(archive: Archive, manifest: Manifest, device: torch.device, trust: bool) -> Artifact:
    path = archive.path
    if not trust:
        raise ArtifactError(
            f"{path}: holds machine code (an AOTInductor package), which loading runs with your rights. If you made the file, or "
            "trust who did as you would with a program: ctfp8.load(path, trust=True)."
        )
    for name in archive.records:
        if name.startswith("data/"):
            archive.tensor(name)  # whose checksum torch's loader does not look at
    # its calls find our operators by name: build or load them first
    lowering.fingerprint(Target.parse(manifest.target))
    with _torchs_errors(path), archive.as_file() as file:
        _check_machine(path, AOTIModelPackageLoader.load_metadata_from_package(file, "model"))
        # torch.export's own load_pt2 also compiles a program for each kind of vector instruction, only to warn of others
        index = -1 if device.index is None else device.index
        runner = AOTICompiledModel(AOTIModelPackageLoader(file, "model", False, 1, index))
        spec = _call_of(path, manifest, pytree.treespec_loads(runner.loader.get_call_spec()[0]))
    return Artifact(manifest, manifest.exported(), spec, runner, device)


def _check_machine(path: Path, made_for: Mapping[str, str]) -> None:
    """Raises `TargetError` where this is not the kind of machine that the code was compiled on."""
    capability = torch.backends.cpu.get_cpu_capability()
    here = {"AOTI_PLATFORM": sys.platform, "AOTI_MACHINE": platform.machine()}
    for needs, has in (("AVX512", ("AVX512",)), ("AVX2", ("AVX2", "AVX512"))):
        if needs in made_for.get("AOTI_CPU_ISA", "") and capability not in has:
            here["AOTI_CPU_ISA"] = capability
    for key, found in here.items():
        if made_for.get(key, found) != found:
            raise TargetError(
                f"{path} is machine code for {made_for[key]}, and this machine has {found}. Export it again here, or export a "
                "program (package=None), which runs on any."
            )


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
