"""Triton's interpreter, which runs kernels on the CPU in numpy. Triton chooses it when it is imported, by TRITON_INTERPRET=1.

It stores bfloat16 as its bits, and multiplies those bits in a dot; here they are widened first.
"""

from __future__ import annotations

import os

import numpy as np
import triton.language as tl
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

from ctfp8_compile.ops.triton import operators

assert os.environ.get("TRITON_INTERPRET") == "1", "run by test_triton.py, in a process of its own"
_dot = InterpreterBuilder.create_dot


def _widened(handle):
    if handle.dtype.scalar != tl.bfloat16:
        return handle
    return TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)


def _create_dot(self, a, b, *rest):
    return _dot(self, _widened(a), _widened(b), *rest)


InterpreterBuilder.create_dot = _create_dot
operators.wrap_triton = lambda kernel: kernel  # torch 2.11 wraps compiled kernels only
