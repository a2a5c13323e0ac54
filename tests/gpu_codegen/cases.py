"""What is compiled, and for which GPU. Read by the tests and, in processes of their own, by `worker.py`."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Gpu:
    """A GPU that is played.

    Attributes:
        target: as `ctfp8.Target` prints it.
        fbgemm: whether fbgemm's operators are there.
        kernels: the option `ctfp8.kernels`.
    """

    target: str
    fbgemm: bool = False
    kernels: str = "auto"

    @property
    def name(self) -> str:
        return (
            self.target.replace(":", "_")
            + ("_fbgemm" if self.fbgemm else "")
            + ("" if self.kernels == "auto" else f"_{self.kernels}")
        )


@dataclass(frozen=True)
class Case:
    """One compilation.

    Attributes:
        model: `llama/FP8`: a checkpoint of tests/data; `forged:llama/FP8`: one that support.forge writes, with widths of
            several blocks; `own:views/FP8`: a module of `modules.py`.
        part: `layer` (the first decoder layer), `model`, or `decoder` (with a static FP8 cache inside); of a module of ours there is but one.
        rows: tokens; None compiles for any number, and runs with 23.
        experts: how transformers runs experts.
        options: for torch.compile.
        build: which configurations of each Triton kernel to build: `no`, the `first`, or `all`.
    """

    model: str
    part: str = "layer"
    rows: int | None = 16
    experts: str | None = None
    options: tuple[tuple[str, str | bool], ...] = ()
    build: str = "no"

    @property
    def name(self) -> str:
        rows = "any" if self.rows is None else str(self.rows)
        return " ".join([self.model, self.part, f"M={rows}", *([self.experts] if self.experts else [])])
