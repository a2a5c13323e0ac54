"""fbgemm's FP8 matmuls for CUDA, and MSLK's of the same names.

    f8f8bf16_rowwise(XQ [M, K], WQ [N, K], x_scale [M], w_scale [N], bias?) -> bfloat16 [M, N]
    f8f8bf16_groupwise(XQ [M, K], WQ [N, K], x_scale [K/128, M], w_scale [K/128, N/128]) -> bfloat16 [M, N]
    f8f8bf16_rowwise_grouped_stacked(XQ [M, K], WQ [G, N, K], x_scale [M], w_scale [G, N], M_sizes [G] int64)
        -> bfloat16 [M, N]
    f8f8bf16_groupwise_grouped(XQ [M, K], WQ [G, N, K], x_scale, w_scale [G, K/128, N/128], M_sizes [G] int64)
        -> bfloat16 [M, N]

Of the last one, `x_scale` holds for each group, one behind the other, `[K/128, rows of the group]` (fbgemm's
`f8f8bf16_groupwise_grouped_common.cuh`: the group's first row times K/128 is where it begins).

The libraries load only where there is a GPU. On other machines their schemas are declared here, with a reference
implementation in plain ATen, so that graphs can be made for a GPU, read, and checked.
"""

from __future__ import annotations

import functools
import importlib
from typing import Any

import torch
from torch import Tensor, fx

from .. import ops
from ..graph import value
from ..target import KERNEL_LIBRARIES, Target
from .declared import complete, declare, is_registered
from .kernel import Kind, Problem, ScaleLayout, Scaling, Verdict, no
from .scaled import (
    Scaled,
    ScaledKernel,
    expert_of_rows,
    multiples_of,
    numbers,
    pad_rows,
    row_scales,
    rows_of,
    token_scales,
    transposed_scales,
)
from .scaled_mm import finish

aten = torch.ops.aten
_convert = torch.ops.prims.convert_element_type.default

_SCHEMAS = (
    "f8f8bf16_rowwise(Tensor XQ, Tensor WQ, Tensor x_scale, Tensor w_scale, Tensor? bias=None, "
    "bool use_fast_accum=True) -> Tensor",
    "f8f8bf16_groupwise(Tensor XQ, Tensor WQ, Tensor x_scale, Tensor w_scale) -> Tensor",
    "f8f8bf16_rowwise_grouped_stacked(Tensor XQ, Tensor WQ, Tensor x_scale, Tensor w_scale, Tensor M_sizes) -> Tensor",
    "f8f8bf16_groupwise_grouped(Tensor XQ, Tensor WQ, Tensor x_scale, Tensor w_scale, Tensor M_sizes) -> Tensor",
)


def missing(library: str) -> str | None:
    """The sentence why a library's operators cannot be used, or None: they are registered, or declared, after this call."""
    if torch.cuda.is_available():
        if (why := _not_loaded(library)) is not None:
            return why
    elif library == "mslk":
        return "mslk is taken only where it is installed"
    elif not is_registered(library, _SCHEMAS):
        references = _rowwise_reference, _groupwise_reference, _grouped_reference, _groupwise_grouped_reference
        declare(library, KERNEL_LIBRARIES[library].module, _SCHEMAS, references, _fake)
    complete(library, _SCHEMAS, _fake)  # groupwise has no meta function in any version so far
    return None


@functools.cache
def _not_loaded(library: str) -> str | None:
    """The sentence why a library is not used on this machine's GPU, or None: it is loaded."""
    about = KERNEL_LIBRARIES[library]
    if (mismatch := about.mismatch()) is not None:
        return mismatch
    try:
        importlib.import_module(about.module)
        getattr(torch.ops, library).f8f8bf16_rowwise.default  # noqa: B018 - raises if it is not there
    except (ImportError, OSError, AttributeError, RuntimeError) as error:
        name, why = about.distributions[0], str(error).splitlines()[0]
        cure = f", and {unpaired}" if (unpaired := about.unpaired()) else f": pip install {name}"
        return f"{name} is not installed, or does not load ({why}){cure}"
    return None


def _fake(XQ: Tensor, WQ: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return XQ.new_empty((XQ.shape[0], WQ.shape[-2]), dtype=torch.bfloat16)


def _rowwise_reference(
    XQ: Tensor, WQ: Tensor, x_scale: Tensor, w_scale: Tensor, bias: Tensor | None = None, use_fast_accum: bool = True
) -> Tensor:
    scales = x_scale[:, None], w_scale[:, None]
    return torch.ops.ctfp8.scaled_mm(XQ, WQ, *scales, bias, [1, WQ.shape[1]], torch.bfloat16)


def _groupwise_reference(XQ: Tensor, WQ: Tensor, x_scale: Tensor, w_scale: Tensor) -> Tensor:
    return torch.ops.ctfp8.scaled_mm(XQ, WQ, x_scale.t(), w_scale.t(), None, [128, 128], torch.bfloat16)


def _grouped_reference(XQ: Tensor, WQ: Tensor, x_scale: Tensor, w_scale: Tensor, M_sizes: Tensor) -> Tensor:
    return torch.ops.ctfp8.scaled_grouped_mm(
        XQ, WQ, x_scale[:, None], w_scale[:, :, None], M_sizes.cumsum(0), [1, WQ.shape[2]], torch.bfloat16
    )


def _groupwise_grouped_reference(XQ: Tensor, WQ: Tensor, x_scale: Tensor, w_scale: Tensor, M_sizes: Tensor) -> Tensor:
    groups, rows = XQ.shape[1] // 128, M_sizes.tolist()
    parts = x_scale.reshape(-1)[: groups * sum(rows)].split([groups * n for n in rows])
    scale_a = x_scale.new_ones((XQ.shape[0], groups))
    scale_a[: sum(rows)] = torch.cat([part.view(groups, n).t() for part, n in zip(parts, rows, strict=True)])
    return torch.ops.ctfp8.scaled_grouped_mm(XQ, WQ, scale_a, w_scale.mT, M_sizes.cumsum(0), [128, 128], torch.bfloat16)


def _version(library: str) -> str:
    return " ".join(KERNEL_LIBRARIES[library].installed() or ("declared",))


def kernels(library: str) -> tuple[ScaledKernel, ...]:
    """The kernels of `fbgemm` or `mslk`."""

    def op(name: str) -> Any:
        return getattr(getattr(torch.ops, library), name).default

    def eligible(problem: Problem, target: Target) -> Verdict:
        if target.capability not in ((9, 0), (10, 0)):
            return no(f"fbgemm and MSLK have FP8 kernels for sm90 and sm100, not {target}")
        if problem.scaling == "blockwise" and target.capability != (9, 0):
            return no(f"fbgemm and MSLK take 128x128 blocks on sm90, not {target}")
        fits = multiples_of(128 if problem.scaling == "blockwise" else 16, problem)
        # another release's pair would load, and crash or compute nonsense; who names the library takes that on
        if fits and target.kernels == "auto" and (unpaired := KERNEL_LIBRARIES[library].unpaired()):
            return no(f"{unpaired}; ctfp8.kernels={library!r} takes the one that is installed all the same")
        return fits and Verdict(missing(library) or "")

    def build_rowwise(do: ops.Do, s: Scaled) -> fx.Node:
        rows = value(s.weight).shape[0]
        scales = token_scales(do, s, [-1]), row_scales(do, s, [rows])
        # in the kernel, but where the model's dtype holds more than the bfloat16 it writes
        fuse = s.bias is not None and value(s.bias).dtype == s.out_dtype == torch.bfloat16
        out = do(op("f8f8bf16_rowwise"), s.x, s.weight, *scales, s.bias if fuse else None)
        return finish(do, s, out, None if fuse else s.bias)

    def build_groupwise(do: ops.Do, s: Scaled) -> fx.Node:
        x, scale_a, rows = s.x, s.scale_a, value(s.x).shape[0]
        if not isinstance(rows, int) or rows > 16:  # then it reads scales by TMA, which wants rows of 16 bytes
            x, scale_a = pad_rows(do, x, 4), pad_rows(do, scale_a, 4)
        scales = transposed_scales(do, scale_a), transposed_scales(do, s.weight_scale)
        out = do(op("f8f8bf16_groupwise"), x, s.weight, *scales)
        if x is not s.x:
            out = do(aten.slice.Tensor, out, 0, 0, rows_of(do, s.x))
        return finish(do, s, out, s.bias)

    def build_grouped(do: ops.Do, s: Scaled) -> fx.Node:
        experts, rows, _ = value(s.weight).shape
        scales = token_scales(do, s, [-1]), row_scales(do, s, [experts, rows])
        counts = _groups(do, s)[1]
        return finish(do, s, do(op("f8f8bf16_rowwise_grouped_stacked"), s.x, s.weight, *scales, counts))

    def build_groupwise_grouped(do: ops.Do, s: Scaled) -> fx.Node:
        begins, counts = _groups(do, s)
        scales = _by_group(do, s, begins, counts), transposed_scales(do, s.weight_scale)
        return finish(do, s, do(op("f8f8bf16_groupwise_grouped"), s.x, s.weight, *scales, counts))

    version = functools.partial(_version, library)
    experts: tuple[Kind, ...] = ("grouped_mm", "gathered_mm")
    rowwise: tuple[Scaling, ...] = ("tensorwise", "rowwise")

    def kernel(name: str, kinds: tuple[Kind, ...], scalings: tuple[Scaling, ...], build: Any) -> ScaledKernel:
        layout: ScaleLayout = "by row" if "rowwise" in name else "transposed"
        return ScaledKernel(f"{library} {name}", library, kinds, scalings, eligible, build, version, layout)

    return (
        kernel("f8f8bf16_rowwise", ("linear",), rowwise, build_rowwise),
        kernel("f8f8bf16_groupwise", ("linear",), ("blockwise",), build_groupwise),
        kernel("f8f8bf16_rowwise_grouped_stacked", experts, rowwise, build_grouped),
        kernel("f8f8bf16_groupwise_grouped", experts, ("blockwise",), build_groupwise_grouped),
    )


def _groups(do: ops.Do, s: Scaled) -> tuple[fx.Node, fx.Node]:
    """The first row of each expert, and how many it has, int64."""
    before = do(aten.slice.Tensor, s.offs, 0, 0, value(s.weight).shape[0] - 1)
    before = do(aten.constant_pad_nd.default, before, [1, 0])
    return before, do(_convert, do(aten.sub.Tensor, s.offs, before), torch.int64)


def _by_group(do: ops.Do, s: Scaled, begins: fx.Node, counts: fx.Node) -> fx.Node:
    """`scale_a` `[M, K/128]` with the scales of each group transposed in place.

    Place p of the result is of the group that row `p // (K/128)` is of; within the group, it is the scale of row `at % count`
    and columns `at // count`.
    """
    groups, device = value(s.scale_a).shape[1], value(s.x).device
    expert = expert_of_rows(do, s.x, s.offs)
    begin, count = (do(aten.unsqueeze.default, do(aten.index.Tensor, t, [expert]), 1) for t in (begins, counts))
    count = do(aten.clamp_min.default, count, 1)
    row = do(aten.unsqueeze.default, numbers(do, rows_of(do, s.x), device), 1)
    place = numbers(do, groups, device)
    at = do(aten.add.Tensor, do(aten.mul.Tensor, do(aten.sub.Tensor, row, begin), groups), place)
    column = do(aten.div.Tensor_mode, at, count, rounding_mode="trunc")
    source = do(aten.add.Tensor, begin, do(aten.sub.Tensor, at, do(aten.mul.Tensor, column, count)))
    last = do(aten.slice.Tensor, s.offs, 0, value(s.offs).shape[0] - 1, value(s.offs).shape[0])
    past = do(aten.ge.Tensor, row, last)  # rows of no group stay where they are; nothing reads them
    return do(
        aten.index.Tensor, s.scale_a,
        [do(aten.where.self, past, row, source), do(aten.where.self, past, place, column)],
    )  # fmt: skip
