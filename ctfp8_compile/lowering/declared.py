"""Operators of a library that is not loaded, declared so that graphs can name them, and so that the library may still follow.

A declaration is a schema, a reference for the CPU and a meta function. Loading the library defines the same schemas, which torch
answers by ending the process; so what was declared goes when its module is about to run. Graphs that were made before
hold on to the operators: a kernel on a dispatch key that nobody uses keeps torch's entry for them, which then is the library's.
"""

from __future__ import annotations

import importlib.abc
import sys
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import torch

#: Nothing here runs on such a device.
_UNUSED_KEY = "FPGA"
#: By library, its declarations, which go with the object; and what stays for as long as the process.
_declared: dict[str, torch.library.Library] = {}
_kept: list[torch.library.Library] = []


def is_registered(library: str, schemas: Sequence[str]) -> bool:
    """Whether all these operators are there, whoever registered them."""
    return all(hasattr(getattr(torch.ops, library), _name(schema)) for schema in schemas)


def declare(
    library: str, module: str, schemas: Sequence[str], references: Sequence[Callable[..., Any]], fake: Any
) -> None:
    """Declares operators of a library, until its module is imported."""
    fragment = torch.library.Library(library, "FRAGMENT")
    for schema, reference in zip(schemas, references, strict=True):
        name = _name(schema)
        fragment.define(schema)
        fragment.impl(name, reference, "CPU")
        torch.library.register_fake(f"{library}::{name}", fake, lib=fragment)
    _declared[library] = fragment
    anchor = torch.library.Library(library, "IMPL")
    for name, reference in zip(map(_name, schemas), references, strict=True):
        anchor.impl(name, reference, _UNUSED_KEY)
    _kept.append(anchor)
    sys.meta_path.insert(0, _BeforeTheLibrary(library, module))


def complete(library: str, schemas: Sequence[str], fake: Any) -> None:
    """Gives operators of the real library the meta functions it lacks."""
    if library in _declared:
        return
    fragment = torch.library.Library(library, "IMPL")
    for name in map(_name, schemas):
        if not getattr(getattr(torch.ops, library), name).default.has_kernel_for_dispatch_key("Meta"):
            fragment.impl(name, fake, "Meta")  # register_fake refuses operators of a C++ module
    _kept.append(fragment)


class _BeforeTheLibrary(importlib.abc.MetaPathFinder):
    """Takes the declarations away when the library's module, or the package that it is in, is about to run.

    Who only looks whether there is such a module, as transformers does, changes nothing.
    """

    def __init__(self, library: str, module: str):
        self.library, self.modules = library, (module, module.partition(".")[0])

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> ModuleSpec | None:
        if fullname not in self.modules or self.library not in _declared:
            return None
        others = [finder for finder in sys.meta_path if finder is not self]
        spec = next((spec for finder in others if (spec := finder.find_spec(fullname, path, target))), None)
        if spec is not None and (loader := spec.loader) is not None:
            run = loader.exec_module

            def exec_module(module: ModuleType) -> None:
                if self.library in _declared:
                    _declared.pop(self.library)._destroy()
                run(module)

            loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def _name(schema: str) -> str:
    return schema.partition("(")[0]
