"""Reads the program of a `.pt2`: torch's own dataclasses and tensors, made anew from what was checked.

torch's loader unpickles payloads that ask for it, resolves operator names by `getattr` on `torch`, evaluates symbolic sizes
with sympy (Python's `eval`), imports the modules that argument structures name, writes names into the source of a `forward`
function, and reads strides and offsets as they come. So it never sees the file: `read_program` parses each record once,
takes what is on a closed list, and returns the objects from which torch builds the graph. See docs/security.md.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields

import torch

from ..compat import deserialize_scalar_type, schema
from ..errors import ArtifactError
from . import typed
from .archive import AGAIN, Archive
from .closed_list import checks
from .manifest import NAME
from .payloads import read_tensors
from .typed import Misfit, short

MODEL, SAMPLES = "models/model.json", "data/sample_inputs/model.pt"
#: Records of a program, and of an AOTInductor package.
_FILES = re.compile(
    r"archive_format|archive_version|byteorder|\.data/\w+|models/model\.json|data/sample_inputs/model\.pt"
    r"|data/weights/(weight_\d+|model_weights_config\.json)|data/constants/(tensor_\d+|model_constants_config\.json)"
    rf"|extra/{re.escape(NAME)}",
    re.ASCII,
)
_AOTI_FILES = re.compile(
    rf"archive_format|archive_version|byteorder|\.data/\w+|data/aotinductor/model/[\w.\-]+|extra/{re.escape(NAME)}",
    re.ASCII,
)


@dataclass(frozen=True)
class Program:
    """What torch's deserializer builds an `ExportedProgram` from."""

    graph: schema.ExportedProgram
    weights: dict[str, torch.Tensor]
    constants: dict[str, torch.Tensor]


def check_records(archive: Archive, package: str) -> None:
    """Returns if the archive holds no record that `ctfp8.export` does not write.

    Raises:
        ArtifactError: naming the record.
    """
    known = _FILES if package == "program" else _AOTI_FILES
    for name in archive.records:
        if not known.fullmatch(name):
            raise ArtifactError(
                f"{archive.path}: holds {name[:100]!a}, which ctfp8.export does not write. It was edited; not loaded."
            )
    for name, content in (("archive_format", "pt2"), ("archive_version", "0"), ("byteorder", sys.byteorder)):
        found = archive.read(name, most=100)
        if found != content.encode():
            raise ArtifactError(f"{archive.path}: its {name} is {found!r}; {content!r} is read here. {AGAIN}")


def read_program(archive: Archive, device: str) -> Program:
    """The graph and the tensors of an archive whose records were checked.

    Args:
        device: kind of device the artifact was made for.

    Raises:
        ArtifactError: saying what about it ctfp8.export does not write, or what is damaged.
        TargetError: its graph names operators of a library that is not installed here.
    """
    if archive.records.get(SAMPLES) and archive.records[SAMPLES].size:
        raise ArtifactError(
            f"{archive.path}: holds pickled sample inputs, which could run code. It was edited; not loaded."
        )
    devices, text = {"cpu", device}, archive.read(MODEL)

    with _naming(archive):
        graph = typed.build(schema.ExportedProgram, typed.parse(text), checks(devices), "the graph")
    weights = read_tensors(archive, "data/weights/", "weight_", "model_weights_config.json", devices)
    constants = read_tensors(archive, "data/constants/", "tensor_", "model_constants_config.json", devices)
    with _naming(archive):
        _check_signature(graph.graph_module, weights, constants)
    return Program(graph, weights, constants)


@contextmanager
def _naming(archive: Archive) -> Iterator[None]:
    try:
        yield
    except (Misfit, RecursionError) as problem:
        raise ArtifactError(f"{archive.path}: {problem}. It was edited or damaged; not loaded.") from None
    except ArtifactError as problem:
        raise ArtifactError(f"{archive.path}: {problem}") from None


def _check_signature(
    module: schema.GraphModule, weights: dict[str, torch.Tensor], constants: dict[str, torch.Tensor]
) -> None:
    """Every tensor that the graph takes from the file is there, with the dtype and shape that the graph says."""
    for spec in module.signature.input_specs:
        kind, value = str(spec.type), spec.value
        if kind not in ("parameter", "buffer", "tensor_constant"):
            continue
        name = next(getattr(value, f.name) for f in fields(value) if f.name.endswith("_name"))
        kept = kind == "parameter" or (kind == "buffer" and value.persistent)
        tensor = (weights if kept else constants).get(name)
        meta = module.graph.tensor_values.get(value.arg.name)
        if tensor is None or meta is None:
            raise Misfit(f"the graph takes {short(name)}, which the file lacks")
        sizes = tuple(size.value for size in meta.sizes)
        if sizes != tuple(tensor.shape) or deserialize_scalar_type(meta.dtype) != tensor.dtype:
            raise Misfit(f"{name} is {tensor.dtype} of {tuple(tensor.shape)}, which the graph does not say")
