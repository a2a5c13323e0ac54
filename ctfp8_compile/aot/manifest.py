"""What an artifact says of itself: a JSON file inside the `.pt2`, read before anything else of it is.

format, version     this file's own format; a reader takes only the version it knows
package             "program" (a graph) or "aoti" (machine code)
target              what the graph was made for, such as cuda:sm90
schemes             how many weights each quantization scheme covers
kernels             how many weights each kernel took, on the machine that exported
report              `Report.to_dict()`: each weight, and why it was kept dequantized where it was
versions            of the packages the artifact was made with
positional, inputs  the call: names of positional arguments, and each tensor or constant of the flattened arguments
notes               what rules found in the graph, for the loading machine's kernels (`passes.Note`)
ranges              of the symbols in the inputs' shapes: [least, most or null]
ranks               null, or which rank of how many the graph is for, and who is in its process groups (`ranks.Ranks`)
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch

from ..errors import ArtifactError, TargetError
from ..passes import Note
from ..report import Entry, Ran, Report
from ..target import Target
from . import typed
from .archive import AGAIN, Archive
from .call import Input
from .ranks import Ranks
from .typed import Misfit, short

NAME = "ctfp8.json"
FORMAT = "ctfp8 artifact"
VERSION = 2
PACKAGES = ("program", "aoti")


@dataclass(frozen=True)
class Manifest:
    """See the head of this file."""

    package: str
    target: str
    schemes: Mapping[str, int]
    kernels: Mapping[str, int]
    report: Mapping[str, Any]
    versions: Mapping[str, str]
    positional: tuple[str, ...]
    inputs: tuple[Input, ...]
    ranges: Mapping[str, tuple[int, int | None]]
    notes: tuple[Note, ...]
    ranks: Ranks | None

    def to_json(self) -> str:
        return json.dumps({"format": FORMAT, "version": VERSION, **asdict(self)}, indent=1)

    def exported(self) -> Report:
        """The report of the exporting machine."""
        return typed.build(Report, self.report, _CHECKS, "its report")


def read_manifest(archive: Archive) -> Manifest:
    """Reads and checks an archive's manifest; nothing else of it is read.

    Raises:
        ArtifactError: there is none, or naming the field that is wrong.
    """
    path = archive.path
    if f"extra/{NAME}" not in archive.records:
        raise ArtifactError(
            f"{path}: has no {NAME}, so ctfp8.export did not write it. Load another tool's .pt2 with that tool."
        )
    try:
        data = typed.parse(archive.read(f"extra/{NAME}"))
        if type(data) is not dict or data.pop("format", None) != FORMAT:
            raise ArtifactError(f"{path}: its {NAME} is not a ctfp8 manifest. {AGAIN}")
        if (version := data.pop("version", None)) != VERSION:
            raise ArtifactError(
                f"{path}: format version {typed.short(version)}, this ctfp8 reads version {VERSION}. Export the model again "
                "with this version of ctfp8-compile, or load the file with the one that wrote it."
            )
        return typed.build(Manifest, data, _CHECKS, "its manifest")
    except typed.Misfit as problem:
        raise ArtifactError(f"{path}: {NAME} was edited or damaged: {problem}. {AGAIN}") from None


def _check(manifest: Manifest) -> Manifest:
    if manifest.package not in PACKAGES:
        raise Misfit(f"it is of package {short(manifest.package)}")
    if manifest.target == "cuda":
        raise Misfit("its target is no one GPU")
    try:
        Target.parse(manifest.target)
    except TargetError as error:
        raise Misfit(str(error).rstrip(".")) from None
    if any(least < 0 or (most is not None and most < least) for least, most in manifest.ranges.values()):
        raise Misfit("a range ends before it starts")
    manifest.exported()
    return manifest


def _check_ranks(ranks: Ranks) -> Ranks:
    known = set(range(ranks.world))
    if (
        ranks.rank not in known
        or not ranks.groups
        or any(
            ranks.rank not in members or not known.issuperset(members) or len({*members}) != len(members)
            for members in ranks.groups.values()
        )
    ):
        raise Misfit(f"it is for {short(str(ranks))} with groups that these cannot form")
    return ranks


def _check_input(one: Input) -> Input:
    if one.dtype is not None and not isinstance(getattr(torch, one.dtype, None), torch.dtype):
        raise Misfit(f"input {short(one.name)} is of dtype {short(one.dtype)}")
    return _printable(one)


def _check_entry(entry: Entry) -> Entry:
    ranks = (len(entry.shape), len(entry.block))  # of a weight, of stacked ones, of a cache, of a transform
    if ranks not in ((2, 2), (3, 2), (4, 0), (2, 0)) or min(*entry.shape, *entry.block, entry.uses) < 0:
        raise Misfit(f"its report says that {short(entry.name)} is of {entry.shape} in blocks of {entry.block}")
    return _printable(entry)


def _printable(data: Any) -> Any:
    """Checks that printing it shows it: a terminal obeys control characters."""
    for field in fields(data):
        value = getattr(data, field.name)
        for text in value if isinstance(value, tuple) else (value,):
            if isinstance(text, str) and not text.isprintable():
                raise Misfit(f"{field.name} is {short(text)}")
    return data


_CHECKS: typed.Checks = {
    Manifest: _check,
    Input: _check_input,
    Entry: _check_entry,
    Ran: _printable,
    Note: _printable,
    Ranks: _check_ranks,
}
