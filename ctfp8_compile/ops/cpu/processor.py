"""Which instruction sets of the CPU kernels this processor needs: the others are not compiled, until somebody asks for them."""

from __future__ import annotations

import os
import platform
from pathlib import Path

#: By file, best first: what `/proc/cpuinfo` must list for it, as the file itself asks the processor, and whose code it uses.
_X86 = {
    "avx512_bf16": ("avx2 fma f16c avx512f avx512bw avx512vl avx512dq avx512vbmi avx512_bf16", ("avx512", "avx2")),
    "avx512": ("avx2 fma f16c avx512f avx512bw avx512vl avx512dq", ("avx2",)),
    "avx2": ("avx2 fma f16c", ()),
}


def needed() -> tuple[str, ...]:
    """Names of `isa_….cpp`; none of them: all, where an instruction set is asked for by name, or there is no telling.

    `CTFP8_CPU_ISAS=all` compiles all of them, as tests do that run one after the other.
    """
    if os.environ.get("CTFP8_CPU_ISA") or os.environ.get("CTFP8_CPU_ISAS") or platform.machine() != "x86_64":
        return ()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ()
    flags = next((line.partition(":")[2].split() for line in lines if line.startswith("flags")), [])
    for name, (asked, besides) in _X86.items():
        if set(asked.split()) <= set(flags):
            return (name, *besides)
    return ()
