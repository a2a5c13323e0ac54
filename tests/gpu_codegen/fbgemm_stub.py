"""fbgemm-gpu-genai as its wheels 1.6 to 1.9 register themselves, without their code.

Schemas, dispatch keys and meta kernels are theirs: CUDA and Meta for rowwise and its grouped form, CUDA alone for
groupwise and its. Import it before the lowering asks for the library.
"""

from __future__ import annotations

import sys
import types
from typing import Any

import torch
from torch import Tensor

from ctfp8_compile.target import KernelLibrary

library = torch.library.Library("fbgemm", "DEF")
_SCHEMAS = (
    "f8f8bf16_rowwise(Tensor XQ, Tensor WQ, Tensor x_scale, Tensor w_scale, Tensor? bias=None, "
    "bool use_fast_accum=True) -> Tensor",
    "f8f8bf16_groupwise(Tensor XQ, Tensor WQ, Tensor x_scale, Tensor w_scale) -> Tensor",
    "f8f8bf16_rowwise_grouped_stacked(Tensor XQ, Tensor WQ, Tensor x_scale, Tensor w_scale, Tensor M_sizes) -> Tensor",
    "f8f8bf16_groupwise_grouped(Tensor XQ, Tensor WQ, Tensor x_scale, Tensor w_scale, Tensor M_sizes) -> Tensor",
)


def _no_code(*args: Any, **kwargs: Any) -> Any:
    raise AssertionError("a kernel of a GPU that is not there was called")


def _meta(XQ: Tensor, WQ: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return XQ.new_empty((XQ.shape[0], WQ.shape[-2]), dtype=torch.bfloat16)


def install() -> None:
    """Registers the operators, and makes the wheel's modules importable, as of a release for the torch at hand."""
    KernelLibrary.unpaired = lambda self: None
    register()
    for module in ("fbgemm_gpu", "fbgemm_gpu.experimental", "fbgemm_gpu.experimental.gen_ai"):
        sys.modules[module] = types.ModuleType(module)


def register() -> None:
    """Registers the operators, as loading the wheel's library does."""
    for schema in _SCHEMAS:
        library.define(schema)
        name = schema.partition("(")[0]
        library.impl(name, _no_code, "CUDA")
        if "groupwise" not in name:
            library.impl(name, _meta, "Meta")
