"""Where functions are found again whose code was traced: dynamo guards none of it, as it cannot change while a process runs."""

from __future__ import annotations

import importlib
import os
import sys
import sysconfig
import types
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from ..compat import convert_frame
from .portable import Describer, NotPortable, codes_in

#: Of one release each, which the key of a model names: the standard library, and what dynamo puts in the place of functions.
_OF_RELEASES = ("<frozen", str(Path(convert_frame.__file__).parent) + os.sep)
_STANDARD = str(Path(sysconfig.get_paths()["stdlib"])) + os.sep
_INSTALLED = tuple(sysconfig.get_paths()[name] + os.sep for name in ("purelib", "platlib"))


def places_of(
    codes: Iterable[types.CodeType], modules: Iterable[str], describer: Describer
) -> tuple[tuple[str, str, str], ...]:
    """Module, name and digest of each.

    Args:
        modules: where to look for classes whose functions were generated, such as a dataclass's.

    Raises:
        NotPortable: one is not found under its name.
    """
    by_file = {file: name for name, module in list(sys.modules.items()) if (file := getattr(module, "__file__", None))}
    found, elsewhere = set(), set()
    for code in codes:
        if _of_a_release(code.co_filename):
            continue
        digest, module, name = describer.code(code), by_file.get(code.co_filename, ""), _name(code)
        if module and any(describer.code(there) == digest for there in codes_at(module, name)):
            found.add((module, name, digest))
        else:
            elsewhere.add(code)
    if elsewhere:
        generated = _generated({*modules, *(module for module, _, _ in found)}, describer)
        for code in elsewhere:
            if (place := generated.get(describer.code(code))) is None:
                raise NotPortable(f"{_name(code)} of {code.co_filename}, which no module has under that name")
            found.add((*place, describer.code(code)))
    return tuple(sorted(found))


def codes_at(module: str, name: str) -> Iterator[types.CodeType]:
    """The code objects that are reached from what a module has under a name; of a function in a function, from the outer."""
    found: Any = importlib.import_module(module)
    for part in name.split(".<locals>")[0].split("."):
        members = [vars(base) for base in getattr(found, "__mro__", (found,))]
        found = next((own[part] for own in members if part in own), None)
    yield from codes_in(found)


def _name(code: types.CodeType) -> str:
    """Before Python 3.11 code does not know which class it is of; such a function is not found, and its graph not kept."""
    return getattr(code, "co_qualname", code.co_name)


def _of_a_release(file: str) -> bool:
    return file.startswith(_OF_RELEASES) or (file.startswith(_STANDARD) and not file.startswith(_INSTALLED))


def _generated(modules: Iterable[str], describer: Describer) -> dict[str, tuple[str, str]]:
    """By digest: module and name of the functions in classes that these modules have."""
    places: dict[str, tuple[str, str]] = {}
    for module in sorted(modules):
        for name, cls in list(vars(importlib.import_module(module)).items()):
            for member, value in vars(cls).items() if isinstance(cls, type) else ():
                if isinstance(value, types.FunctionType):
                    for code in codes_in(value):
                        places.setdefault(describer.code(code), (module, f"{name}.{member}"))
    return places
