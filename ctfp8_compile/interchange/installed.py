"""The packages of other runtimes, which are optional."""

from __future__ import annotations

import importlib.util

from ..errors import UsageError

#: By suffix of a file: the extra of this package, and the modules that it brings and that write the file. `packaging` is what
#: openvino's converter imports, and does not require.
_MODULES = {
    ".onnx": ("onnx", ("onnx", "onnxscript")),
    ".xml": ("openvino", ("onnx", "onnxscript", "openvino", "packaging")),
}


def needs(suffix: str) -> None:
    """Returns if what writes a file of that suffix is installed.

    Raises:
        UsageError: it is not; says how to install it.
    """
    extra, modules = _MODULES[suffix]
    missing = [name for name in modules if not _is_there(name)]
    if missing:
        raise UsageError(
            f"{' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} not installed, and {suffix} files are written "
            f"with {'it' if len(missing) == 1 else 'them'}: pip install 'ctfp8-compile[{extra}]'"
        )


def _is_there(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ValueError:  # it is None in sys.modules
        return False
