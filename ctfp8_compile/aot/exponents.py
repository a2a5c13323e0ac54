"""`float8_e8m0fnu` in AOTInductor's machine code: torch 2.13 has no name for it, 2.15 one that none of its headers declares."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from operator import attrgetter

import torch
from torch import fx

from ..errors import UsageError
from ..inductor.toolchain import causes, compiler_says


def as_bytes(module: fx.GraphModule) -> None:
    """Constants of `float8_e8m0fnu` become uint8, viewed as what they were where they are read; their bytes stay the same."""
    for node in module.graph.find_nodes(op="get_attr"):
        constant = attrgetter(str(node.target))(module)
        if not isinstance(constant, torch.Tensor) or constant.dtype != torch.float8_e8m0fnu:
            continue
        holder, _, name = str(node.target).rpartition(".")
        at = f"{name}_as_bytes"
        owner = module.get_submodule(holder)
        if not hasattr(owner, at):
            owner.register_buffer(at, constant.detach().view(torch.uint8))
        with module.graph.inserting_after(node):
            bits = module.graph.get_attr(f"{holder}.{at}" if holder else at)
        with module.graph.inserting_after(bits):
            exponents = module.graph.call_function(torch.ops.aten.view.dtype, (bits, torch.float8_e8m0fnu))
        node.replace_all_uses_with(exponents)
        module.graph.erase_node(node)
    module.delete_all_unused_submodules()
    module.recompile()


@contextmanager
def others_refused() -> Iterator[None]:
    """What else is `float8_e8m0fnu`, and is not compiled for it, gets one sentence.

    Raises:
        UsageError: an input, or a tensor that is computed, is of that type, and this torch does not compile it.
    """
    try:
        yield
    except Exception as error:
        if not compiler_says("Float8_e8m0fnu", error) and not _has_no_name(error):
            raise
        raise UsageError(
            f"package='aoti': torch {torch.__version__} does not compile inputs, or tensors computed, of float8_e8m0fnu. Give "
            "them as uint8 and view them inside, or export a program (package=None)."
        ) from error


def _has_no_name(error: BaseException) -> bool:
    """Whether Inductor looked the dtype up in a table that lacks it."""
    return any(isinstance(cause, KeyError) and cause.args == (torch.float8_e8m0fnu,) for cause in causes(error))
