"""What an artifact says of itself: a JSON file inside the `.pt2`, read before anything else of it is.

format, version     this file's own format; a reader takes only the version it knows
package             "program" (a graph) or "aoti" (machine code)
target              what the graph was made for, such as cuda:sm90
schemes             how many weights each quantization scheme covers
kernels             how many weights each kernel took, on the machine that exported
report              `Report.to_dict()`: each weight, and why it was kept dequantized where it was
versions            of the packages the artifact was made with
positional, inputs  the call: names of positional arguments, and each tensor or constant of the flattened arguments
ranges              of the symbols in the inputs' shapes: [least, most or null]
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from ..errors import ArtifactError, TargetError
from ..target import Target

NAME = "ctfp8.json"
FORMAT = "ctfp8 artifact"
VERSION = 1
PACKAGES = ("program", "aoti")


@dataclass(frozen=True)
class Input:
    """One leaf of the flattened call: a tensor (`dtype` and `shape`, symbols by name) or, without a dtype, a constant."""

    name: str
    dtype: str | None = None
    shape: tuple[int | str, ...] = ()
    constant: Any = None

    def __str__(self) -> str:
        return f"{self.dtype}[{', '.join(map(str, self.shape))}]" if self.dtype else repr(self.constant)


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

    def to_json(self) -> str:
        return json.dumps({"format": FORMAT, "version": VERSION, **asdict(self)}, indent=1)

    @staticmethod
    def from_json(text: bytes | str, path: Any) -> Manifest:
        """Reads and checks a manifest.

        Raises:
            ArtifactError: naming the field that is wrong.
        """
        try:
            data = json.loads(text)
        except ValueError as error:
            raise ArtifactError(f"{path}: its {NAME} is not JSON ({error}). {_AGAIN}") from None
        if not isinstance(data, dict) or data.pop("format", None) != FORMAT:
            raise ArtifactError(f"{path}: its {NAME} is not a ctfp8 manifest. {_AGAIN}")
        if (version := data.pop("version", None)) != VERSION:
            raise ArtifactError(
                f"{path}: format version {version!r}, this ctfp8 reads version {VERSION}. Export the model again with this "
                "version of ctfp8-compile, or load the file with the one that wrote it."
            )
        names = {f.name for f in fields(Manifest)}
        if wrong := sorted(names ^ set(data)):
            raise ArtifactError(f"{path}: its {NAME} {'lacks' if wrong[0] in names else 'adds'} {wrong[0]!r}. {_AGAIN}")
        for name, fine in _CHECKS.items():
            if not fine(data[name]):
                raise ArtifactError(f"{path}: its {NAME} was edited: {name!r} is {_short(data[name])}. {_AGAIN}")
        try:
            Target.parse(data["target"])
            data["inputs"] = tuple(Input(**{**i, "shape": tuple(i["shape"])}) for i in data["inputs"])
        except (TargetError, TypeError, KeyError) as error:
            raise ArtifactError(f"{path}: its {NAME} was edited ({error}). {_AGAIN}") from None
        data["positional"] = tuple(data["positional"])
        data["ranges"] = {symbol: tuple(ends) for symbol, ends in data["ranges"].items()}
        return Manifest(**data)


_AGAIN = "Copy or export the file again."


def _is_counts(data: Any) -> bool:
    return isinstance(data, dict) and all(isinstance(n, int) for n in data.values())


def _is_input(data: Any) -> bool:
    return (
        isinstance(data, dict)
        and isinstance(data.get("name"), str)
        and isinstance(data.get("dtype"), str | None)
        and isinstance(data.get("shape"), list)
        and all(isinstance(size, int | str) for size in data["shape"])
    )


def _is_range(data: Any) -> bool:
    return isinstance(data, list) and len(data) == 2 and isinstance(data[0], int) and isinstance(data[1], int | None)


_CHECKS = {
    "package": lambda d: d in PACKAGES,
    "target": lambda d: isinstance(d, str) and d != "cuda",
    "schemes": _is_counts,
    "kernels": _is_counts,
    "report": lambda d: isinstance(d, dict),
    "versions": lambda d: isinstance(d, dict),
    "positional": lambda d: isinstance(d, list) and all(isinstance(name, str) for name in d),
    "inputs": lambda d: isinstance(d, list) and all(_is_input(i) for i in d),
    "ranges": lambda d: isinstance(d, dict) and all(_is_range(r) for r in d.values()),
}


def _short(data: Any) -> str:
    text = repr(data)
    return text if len(text) < 60 else text[:57] + "…"
