"""What is known of torch's scaled matmuls, by GPU: where each kind of scales runs, from which torch on, and who says so.

docs/targets.md shows the table. A GPU without a row is not refused because it would fail, but because nobody is known to have
tried; `ctfp8.kernels="scaled_mm"` takes it all the same, and an older release of torch too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from ..compat import release
from ..target import Target
from .kernel import YES, Scaling, Verdict, no

#: By our own tests on that GPU; by somebody else who ran it; by nobody we know of, though torch has the kernel.
Evidence = Literal["seen", "reported", "never tried"]


@dataclass(frozen=True)
class Known:
    """One kind of scales of `aten._scaled_mm` on some GPUs.

    Attributes:
        gpus: targets, without a library.
        says: the source, with versions.
        since: the first release of torch that takes it; None where all do that this package takes.
    """

    scaling: Scaling
    gpus: tuple[str, ...]
    evidence: Evidence
    says: str
    since: tuple[int, int] | None = None


_BUILT = "built for it in the wheel torch 2.14.1+cu130"
LINEAR: tuple[Known, ...] = (
    Known("tensorwise", ("cuda:sm90",), "seen", "H100, torch 2.11.0+cu130"),
    Known("tensorwise", ("cuda:sm89",), "reported", "torch's tests of FP8 run from sm89 on"),
    Known("tensorwise", ("cuda:sm100",), "reported", "pytorch#152150, B200"),
    Known("tensorwise", ("cuda:sm120",), "reported", "torch 2.10.0+cu130, RTX PRO 5000: pytorch#192707"),
    Known("tensorwise", ("cuda:sm103", "cuda:sm110", "cuda:sm121"), "never tried", "cuBLAS, as on sm100 and sm120"),
    Known("tensorwise", ("xpu",), "reported", "vllm#49664; torch 2.11 names it in its errors: vllm#41677"),
    Known("rowwise", ("cuda:sm90",), "seen", "H100, torch 2.11.0+cu130"),
    Known("rowwise", ("cuda:sm89",), "reported", "hangs before torch 2.12: pytorch#177651", (2, 12)),
    Known("rowwise", ("cuda:sm100",), "reported", "B200, August 2025: ao#2904"),
    Known("rowwise", ("cuda:sm103",), "never tried", _BUILT),
    Known("rowwise", ("cuda:sm110",), "never tried", "pytorch#161236 sends it to CUTLASS, as sm120"),
    Known("rowwise", ("cuda:sm120", "cuda:sm121"), "never tried",
          f"failed with torch 2.10.0+cu130: pytorch#192707; {_BUILT}", (2, 11)),
    Known("rowwise", ("xpu",), "reported", "torch 2.11, Qwen3-8B-FP8-dynamic: vllm#41677"),
    Known("blockwise", ("cuda:sm90",), "seen", "H100, torch 2.11.0+cu130; cuBLAS has it on sm90 alone: CUDALibrarySamples#270"),
    Known("blockwise", ("xpu",), "reported",
          "not in torch 2.11 (vllm#41677), in by pytorch#176043; vllm#50826, sglang#35605, ao#4548 (B580)", (2, 13)),
    Known("mx", ("cuda:sm100",), "reported", "torch's tests of MXFP8 run from sm100 on"),
    Known("mx", ("cuda:sm120",), "reported", "torch 2.14.0+cu130, RTX 5060 Ti and 5080, the layout of inference: pytorch#198126",
          (2, 14)),
    Known("mx", ("cuda:sm121",), "never tried", "as sm120", (2, 14)),
    Known("mx", ("cuda:sm103",), "never tried", "as sm100"),
)  # fmt: skip
_WHAT = {"tensorwise": "one scale each", "rowwise": "scales per row", "blockwise": "128x128 blocks", "mx": "MXFP8"}
_ALL_THE_SAME = "ctfp8.kernels='scaled_mm' takes it all the same"


def known(scaling: Scaling, target: Target) -> Verdict:
    """Whether `aten._scaled_mm` is known to take such scales on a GPU, with this torch.

    Who names the library has a GPU that nobody tried, and a release that somebody saw failing; but not blocks and MXFP8 where
    there is no kernel for them.
    """
    gpu = str(target.limited_to("auto"))
    rows = [row for row in LINEAR if row.scaling == scaling]
    row = next((row for row in rows if gpu in row.gpus), None)
    named = target.kernels == "scaled_mm"
    if row is None:
        gpus = ", ".join(gpu for row in rows for gpu in row.gpus)
        if scaling in ("blockwise", "mx"):
            return no(f"aten._scaled_mm takes {_WHAT[scaling]} on {gpus}, not {gpu}")
        return YES if named else no(f"aten._scaled_mm is known for {gpus}, not {gpu}; {_ALL_THE_SAME}")
    if row.since is None or named or release(torch.__version__) >= row.since:
        return YES
    needed = ".".join(map(str, row.since))
    return no(
        f"aten._scaled_mm with {_WHAT[scaling]} on {gpu} needs torch {needed} or later, not {torch.__version__}; {_ALL_THE_SAME}"
    )
