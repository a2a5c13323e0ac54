"""`ctfp8 export CKPT OUT`: a checkpoint as one file for torch (`.pt2`), or for another runtime (`.onnx`, `.xml`)."""

from __future__ import annotations

import contextlib
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from .. import StaticCacheDecoder, Target
from ..aot.export import check_suffix
from ..errors import UsageError
from ..hf.runtime_folder import check_folder, write_folder
from ..interchange.export import Exported, export
from ..interchange.installed import needs
from .loading import device_of, example, load
from .place import check_place
from .terminal import err, escape, out, size


def write_program(
    checkpoint: str,
    output: Path,
    target: str | None,
    package: str | None,
    cache: int | None,
    as_json: bool,
    debug: bool,
) -> None:
    """Writes a `.pt2` and says what became of the weights.

    Raises:
        TargetError: not a target.
        UsageError: the path is of no file that is written, or in no folder.
    """
    target = str(Target.detect(device_of(None)) if target is None else Target.parse(target))
    check_place(output)
    check_suffix(output)
    # machine code is made where the model is, a graph anywhere
    model = load(checkpoint, debug, device=device_of(None)) if package else load(checkpoint, debug)
    args, kwargs = example(model, batch=2)
    ids = args[0]
    shapes: Any = {
        "input_ids": {0: torch.export.Dim("batch"), 1: torch.export.Dim("sequence")},
        **dict.fromkeys(kwargs),
    }
    if cache is not None:
        model = StaticCacheDecoder(model, 1, cache)
        args, kwargs = (ids[:1], torch.tensor(0, device=ids.device)), {}
        shapes = ({1: torch.export.Dim("tokens", max=cache)}, None)
    with err().status("tracing, rewriting and writing …"):
        report = export(model, args, kwargs, output, target, shapes, package)
    _say(output, output.stat().st_size, report, as_json)


@dataclass(frozen=True)
class Wanted:
    """Options of an `.onnx` or `.xml`, as `ctfp8.export` has them; and whether config and tokenizer are to be beside it."""

    dtype: str | None
    stateless: bool
    quantize_activations: bool
    folder: bool


def write_other(
    checkpoint: str, output: Path, given: dict[str, Any], wanted: Wanted, as_json: bool, debug: bool
) -> None:
    """Writes an `.onnx` or `.xml` and says what is in it.

    Args:
        given: options of a `.pt2`, by name, as given.

    Raises:
        UsageError: one of these was given; the path is in no folder; what writes the file is not installed.
    """
    if wrong := [name for name, value in given.items() if value is not None]:
        raise UsageError(f"{output}: --{wrong[0]} is for .pt2 files; leave it out.")
    if wanted.stateless and output.suffix != ".xml":
        raise UsageError(f"{output}: --stateless is for .xml files; in an .onnx the cache goes in and out anyway.")
    if wanted.folder:
        check_folder(checkpoint, output)
    needs(output.suffix)  # before a long load
    if wanted.folder:
        with contextlib.suppress(OSError):  # said below
            output.absolute().parent.mkdir(exist_ok=True)
    check_place(output)
    model = load(checkpoint, debug)
    with err().status("tracing, translating and writing …"):
        found = export(
            model,
            path=output,
            dtype=wanted.dtype,
            stateful=False if wanted.stateless else None,
            quantize_activations=wanted.quantize_activations,
        )
    assert isinstance(found, Exported)
    if wanted.folder:
        found = replace(found, notes=(*found.notes, *write_folder(model, checkpoint, output, found.shapes)))
    _say(output, found.to_dict()["bytes"], found, as_json)


def _say(output: Path, written: int, found: Any, as_json: bool) -> None:
    if as_json:
        print(json.dumps({**found.to_dict(), "path": str(output), "bytes": written}))
    else:
        out().print(f"wrote {output} ({size(written)}); {escape(found.summary())}", soft_wrap=True)
