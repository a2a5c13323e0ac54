"""Builds a Triton kernel that Inductor wrote, to a cubin, with its own settings."""

from __future__ import annotations

import hashlib
import importlib.util
import re
import tempfile
from pathlib import Path
from typing import Any


def build(source: str, every_configuration: bool = False) -> list[dict[str, Any]]:
    """Of each configuration Inductor would try, or of the first: bytes of machine code, shared memory, what its PTX has."""
    kernel = _module(source)
    built = []
    for config in kernel.configs if every_configuration else kernel.configs[:1]:
        binary = kernel._precompile_config(config).kernel
        ptx = binary.asm["ptx"]
        built.append(
            {
                "bytes": len(binary.asm["cubin"]),
                "shared": binary.metadata.shared,
                "target": re.search(r"\.target (\w+)", ptx)[1],
                "rounds to e4m3": len(re.findall(r"cvt\.rn\.satfinite\.e4m3x2", ptx)),
                "divides approximately": len(re.findall(r"div\.full", ptx)),
            }
        )
    return built


def _module(source: str) -> Any:
    """The kernel (a `CachingAutotuner`); Triton reads a kernel's source from its file."""
    name = "k" + hashlib.sha256(source.encode()).hexdigest()[:24]
    path = Path(tempfile.mkdtemp()) / f"{name}.py"
    path.write_text(source)
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return getattr(module, re.findall(r"^def (triton_\w+|\w+_kernel)\(", source, re.M)[-1])
