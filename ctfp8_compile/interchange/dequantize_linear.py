"""`ctfp8::dequantize` in ONNX: one DequantizeLinear, which onnxruntime leaves alone, where it folds Cast and Mul to float32.

    scales                        DequantizeLinear (opset 21)
    one                           a scalar
    per channel                   a vector, axis 0
    per block [n, k] of columns   the same shape, axis -1, block_size k; scales of blocks of rows are repeated for each row

A byte e of MXFP8 is looked up in a table of 2^(e - 127): DequantizeLinear of FLOAT8E8M0 scales is opset 24, and onnxruntime 1.32
has no kernel for it (`findings/onnxruntime-no-e8m0-scales.sh`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

#: The first opset in which DequantizeLinear takes blocks.
OPSET = 21


def translation(whole_blocks: bool) -> Callable[..., Any]:
    """What torch.onnx calls for each marker, with onnxscript's values.

    Args:
        whole_blocks: whether who reads the file takes no block that is a part of one, as OpenVINO 2026.4 does not: a weight that
            ends in one is Cast and Mul then.
    """
    import onnxscript

    return functools.partial(_dequantize, onnxscript.opset21, whole_blocks)


def quantize(x: Any, scale: Any) -> tuple[Any, Any]:
    """`ctfp8::quantize_per_tensor` of float32 `[M, K]` with a scale `[1, 1]`: QuantizeLinear, which saturates, as ours does."""
    import onnx
    import onnxscript

    op = onnxscript.opset21
    zero = op.Constant(value=onnx.helper.make_tensor("zero", onnx.TensorProto.FLOAT8E4M3FN, [], b"\0", raw=True))
    return op.QuantizeLinear(x, op.Squeeze(scale), zero), scale


def _dequantize(
    op: Any,
    whole_blocks: bool,
    weight: Any,
    weight_scale: Any,
    input_scale: Any,
    block: Sequence[int],
    activation: str,
    dtype: int,
) -> Any:
    """Float32 times the scale, then a cast to `dtype`: the order and the rounding of `ops.dequantize_reference`."""
    rank, rows, cols = len(weight.shape), weight.shape[-2], weight.shape[-1]
    groups = weight_scale.shape[-2:]
    scale = _of_bytes(op, weight_scale) if weight_scale.dtype.name == "UINT8" else weight_scale
    if rank == 2 and groups == (1, 1):
        wide = op.DequantizeLinear(weight, op.Squeeze(scale))
    elif rank == 2 and groups == (rows, 1):
        wide = op.DequantizeLinear(weight, op.Reshape(scale, _ints(op, [-1])), axis=0)
    else:
        scale = _repeat(op, scale, [*weight_scale.shape], rank - 2, block[0], rows)
        step = cols if groups[1] == 1 else block[1]
        if whole_blocks and cols % step:
            scale = _repeat(op, scale, [*weight.shape[:-1], groups[1]], rank - 1, step, cols)
            wide = op.Mul(op.Cast(weight, to=1), scale)
        else:
            wide = op.DequantizeLinear(weight, scale, axis=rank - 1, block_size=step)
    return wide if dtype == 1 else op.Cast(wide, to=dtype)


def _repeat(op: Any, scale: Any, shape: list[int], axis: int, step: int, size: int) -> Any:
    """Scales of `shape` with each entry along `axis` `step` times, up to `size`; of one entry, `size` times."""
    count = size if shape[axis] == 1 else step
    if count == 1 or shape[axis] == size:
        return scale
    ones, repeated = [1] * (len(shape) + 1), [*shape]
    ones[axis + 1], repeated[axis] = count, shape[axis] * count
    wide = op.Expand(op.Unsqueeze(scale, _ints(op, [axis + 1])), _ints(op, ones))
    wide = op.Reshape(wide, _ints(op, repeated))
    if repeated[axis] == size:
        return wide
    return op.Slice(wide, _ints(op, [0]), _ints(op, [size]), _ints(op, [axis]))


def _of_bytes(op: Any, exponents: Any) -> Any:
    """2^(e - 127) of bytes e, exactly. 255 is no scale, and was refused when the checkpoint was read."""
    table = op.Constant(value_floats=[2.0 ** (e - 127) for e in range(255)])
    return op.Gather(table, op.Cast(exponents, to=6))


def _ints(op: Any, values: list[int]) -> Any:
    return op.Constant(value_ints=values)
