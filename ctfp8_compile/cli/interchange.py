"""`ctfp8 export CKPT model.onnx`, and `model.xml`: a checkpoint for another runtime."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import UsageError
from ..interchange.export import Exported, export
from ..interchange.installed import needs
from .loading import load
from .terminal import err, escape, out, size


def write(
    checkpoint: str,
    output: Path,
    others: Mapping[str, Any],
    dtype: str | None,
    stateless: bool,
    as_json: bool,
    debug: bool,
) -> None:
    """Writes the file and says what is in it.

    Args:
        others: options of a `.pt2`, by name, as given.

    Raises:
        UsageError: one of these was given, or the other way round.
    """
    if wrong := [name for name, value in others.items() if value is not None]:
        raise UsageError(f"{output}: --{wrong[0]} is for .pt2 files; leave it out.")
    if stateless and output.suffix != ".xml":
        raise UsageError(f"{output}: --stateless is for .xml files; in an .onnx the cache goes in and out anyway.")
    needs(output.suffix)  # before a long load
    model = load(checkpoint, debug)
    with err().status("tracing, translating and writing …"):
        found = export(model, path=output, dtype=dtype, stateful=False if stateless else None)
    assert isinstance(found, Exported)
    if as_json:
        print(json.dumps(found.to_dict()))
    else:
        out().print(f"wrote {output} ({size(found.bytes)}): {escape(found.summary())}", soft_wrap=True)
