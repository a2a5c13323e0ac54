"""Looks a `.pt2` file over before `torch.export.load` sees it, which trusts what it reads.

torch's loader unpickles payloads that ask for it, resolves operator names by `getattr` on `torch`, evaluates symbolic sizes
with sympy (Python's `eval`), writes names into the source of a `forward` function, and loads shared libraries. Nothing that
`ctfp8.export` writes needs to be trusted with that, apart from the libraries of an AOTInductor package, so a file that is
other is refused. See docs/security.md for what remains.
"""

from __future__ import annotations

import ast
import importlib
import json
import re
import zipfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from ..errors import ArtifactError, TargetError
from .manifest import NAME, Manifest

#: Operator namespaces of graphs we write. For those that a library registers: its module, and the package to install.
LIBRARIES = {
    "fbgemm": ("fbgemm_gpu.experimental.gen_ai", "fbgemm-gpu-genai"),
    "mslk": ("mslk", "mslk"),
}
NAMESPACES = ("aten", "prims", "ctfp8", *LIBRARIES)

#: Operators that reach files.
_FORBIDDEN = re.compile(r"torch\.ops\.aten\.(from_file|_?save)\b")
_OPERATOR = re.compile(rf"torch\.ops\.({'|'.join(NAMESPACES)})\.(\w+)\.(\w+)")
#: Arithmetic on symbolic sizes.
_SCALAR = re.compile(
    r"_operator\.(add|sub|mul|floordiv|truediv|mod|pow|neg|pos|eq|ne|lt|le|gt|ge|and_|or_|not_|getitem)"
    r"|torch\.(sym_\w+)|math\.(ceil|floor|trunc)"
)
#: A size is written as sympy's own constructor calls, such as `Mul(Integer(2), Symbol('s72', positive=True))`.
_SIZE_CALLS = re.compile(
    r"Symbol|Integer|Float|Rational|Add|Mul|Pow|PowByNatural|Max|Min|Abs|Mod|PythonMod|FloorDiv|CeilDiv|CleanDiv"
    r"|ModularIndexing|(Ceil|Floor|Trunc|Round)ToInt|IntTrueDiv|FloatTrueDiv|ToFloat|Equality|Unequality"
    r"|(Strict)?(Less|Greater)Than|And|Or|Not"
)
_SIZE_NODES = (ast.Expression, ast.Call, ast.Name, ast.Load, ast.keyword, ast.Constant, ast.UnaryOp, ast.USub)
#: Names of nodes and arguments, and of tensors in the module: they become source code.
_NAME, _PATH = re.compile(r"[A-Za-z_]\w*"), re.compile(r"[\w.\-/]+")
_PATHS = {"parameter_name", "buffer_name", "tensor_constant_name", "custom_obj_name"}
_FILES = re.compile(
    r"archive_format|archive_version|byteorder|\.data/\w+|models/model\.json|data/sample_inputs/model\.pt"
    r"|data/weights/(weight_\d+|model_weights_config\.json)|data/constants/(tensor_\d+|model_constants_config\.json)"
    rf"|extra/{re.escape(NAME)}"
)
_AOTI_FILES = re.compile(
    rf"archive_format|archive_version|byteorder|\.data/\w+|data/aotinductor/.*|extra/{re.escape(NAME)}"
)


def read_manifest(path: Path) -> Manifest:
    """The manifest of an artifact; nothing else of the file is read.

    Raises:
        ArtifactError: not readable as a `.pt2`, or not ours.
    """
    with _open(path) as (archive, root):
        if f"{root}extra/{NAME}" not in archive.namelist():
            raise ArtifactError(
                f"{path}: has no {NAME}, so ctfp8.export did not write it. Load another tool's .pt2 with that tool."
            )
        return Manifest.from_json(archive.read(f"{root}extra/{NAME}"), path)


def look_over(path: Path, manifest: Manifest) -> None:
    """Returns if the file holds nothing but what `ctfp8.export` writes, undamaged.

    Raises:
        ArtifactError: saying what it holds.
        TargetError: its graph names operators of a library that is not installed here.
    """
    with _open(path) as (archive, root):
        names = archive.namelist()
        known = _FILES if manifest.package == "program" else _AOTI_FILES
        count = Counter(names)
        for name in names:
            if not name.startswith(root) or not known.fullmatch(name[len(root) :]) or count[name] > 1:
                raise ArtifactError(
                    f"{path}: holds {name!r}, which ctfp8.export does not write. It was edited; not loaded."
                )
        if manifest.package == "program":
            _look_over_program(path, archive, root)
        if damaged := archive.testzip():  # torch does not compare the checksums of weights
            raise ArtifactError(f"{path}: {damaged} is damaged. Copy or export the file again.")


@contextmanager
def _open(path: Path) -> Iterator[tuple[zipfile.ZipFile, str]]:
    """The archive and the folder that all its records are in."""
    if not path.is_file():
        raise ArtifactError(f"{path}: no such file.")
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            yield archive, names[0].split("/")[0] + "/" if names else ""
    except (zipfile.BadZipFile, EOFError, OSError, UnicodeDecodeError, NotImplementedError) as error:
        raise ArtifactError(f"{path}: truncated or damaged ({error}). Copy or export the file again.") from error


def _look_over_program(path: Path, archive: zipfile.ZipFile, root: str) -> None:
    for which in ("weights", "constants"):
        _check_payloads(path, _json(path, archive, f"{root}data/{which}/model_{which}_config.json"))
    inputs = f"{root}data/sample_inputs/model.pt"
    if inputs in archive.namelist() and archive.read(inputs):
        raise ArtifactError(f"{path}: holds pickled sample inputs, which could run code. It was edited; not loaded.")
    _check_graph(path, _json(path, archive, f"{root}models/model.json"))


def _json(path: Path, archive: zipfile.ZipFile, name: str) -> Any:
    try:
        return json.loads(archive.read(name))
    except (KeyError, ValueError) as error:
        raise ArtifactError(f"{path}: {name} is missing or damaged ({error}). Copy or export the file again.") from None


def _check_payloads(path: Path, config: Any) -> None:
    for found in _dicts(config):
        if found.get("use_pickle"):
            raise ArtifactError(f"{path}: holds a pickled tensor, which could run code. It was edited; not loaded.")


def _check_graph(path: Path, model: Any) -> None:
    """Every operator is one that a graph of ours may name and is registered here; every size is arithmetic."""
    for found in _dicts(model):
        if "target" in found and "inputs" in found and "outputs" in found:
            _check_operator(path, found["target"])
        if "as_operator" in found or "as_custom_obj" in found:
            raise ArtifactError(f"{path}: its graph passes functions or objects around. It was edited; not loaded.")
        if "expr_str" in found:
            _check_size(path, found["expr_str"])
        names = [found.get("name"), found.get("as_name"), *(found.get("forward_arg_names") or [])]
        if any(isinstance(name, str) and name and not _NAME.fullmatch(name) for name in names):
            raise ArtifactError(f"{path}: its graph has names that are no identifiers. It was edited; not loaded.")
        if any(not _PATH.fullmatch(str(found[key])) for key in _PATHS & found.keys()):
            raise ArtifactError(f"{path}: its graph has tensors that no module could have. It was edited; not loaded.")
        for spec in ("in_spec", "out_spec"):
            if isinstance(found.get(spec), str):
                _check_tree(path, found[spec])


def _check_operator(path: Path, target: Any) -> None:
    if not isinstance(target, str) or _FORBIDDEN.match(target):
        raise ArtifactError(f"{path}: its graph calls {target}, which ctfp8 does not load.")
    match = _OPERATOR.fullmatch(target)
    if match is None:
        if not _SCALAR.fullmatch(target):
            raise ArtifactError(f"{path}: its graph calls {target}, which ctfp8 does not load.")
        return
    namespace, name, overload = match.groups()
    if _registered(namespace, name, overload):
        return
    if namespace not in LIBRARIES:
        raise ArtifactError(
            f"{path}: its graph calls {target}, which torch {torch.__version__} does not have. Export the model again with "
            "this version of torch."
        )
    module, package = LIBRARIES[namespace]
    try:
        importlib.import_module(module)
    except Exception as error:  # a library without its GPU fails in ways of its own (OSError, RuntimeError, …)
        raise TargetError(
            f"{path}: its graph calls {target}, and {module} cannot be imported here ({error}). "
            f"Install it: pip install {package}"
        ) from error
    if not _registered(namespace, name, overload):
        raise TargetError(f"{path}: its graph calls {target}, which the installed {package} does not have. Update it.")


def _registered(namespace: str, name: str, overload: str) -> bool:
    return hasattr(getattr(torch.ops, namespace), name) and hasattr(
        getattr(getattr(torch.ops, namespace), name), overload
    )


def _check_size(path: Path, text: Any) -> None:
    try:
        nodes = list(ast.walk(ast.parse(text, mode="eval")))
    except (SyntaxError, TypeError, ValueError, RecursionError):
        nodes = [ast.Slice()]
    for node in nodes:
        fine = isinstance(node, _SIZE_NODES)
        if isinstance(node, ast.Name):
            fine = _SIZE_CALLS.fullmatch(node.id) is not None
        elif isinstance(node, ast.Constant):
            fine = not isinstance(node.value, str) or re.fullmatch(r"\w+", node.value) is not None
        if not fine:
            raise ArtifactError(f"{path}: its graph has a size {str(text)[:60]!r} that is no arithmetic; not loaded.")


def _check_tree(path: Path, text: str) -> None:
    """Only the containers Python has: other types are resolved by name, enums by importing their module."""
    for found in _dicts(json.loads(text)):
        if found.get("type") not in ("builtins.tuple", "builtins.list", "builtins.dict", None) or "__enum__" in text:
            raise ArtifactError(f"{path}: its call holds a {found.get('type')}, which ctfp8.export does not write.")


def _dicts(data: Any) -> Iterator[dict[str, Any]]:
    """Every JSON object in `data`."""
    stack = [data]
    while stack:
        item = stack.pop()
        if isinstance(item, dict):
            yield item
            stack.extend(item.values())
        elif isinstance(item, list):
            stack.extend(item)
