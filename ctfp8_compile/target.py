"""The device a graph is rewritten for."""

from __future__ import annotations

import importlib.metadata
import re
from dataclasses import dataclass, replace

import torch

from .errors import TargetError

_SPELLING = re.compile(r"(cpu|xpu|cuda)(?::sm(\d+)(\d))?(?:\+(\w+))?")


@dataclass(frozen=True)
class KernelLibrary:
    """A package with kernels for CUDA, whose operators are in the namespace of its name.

    Attributes:
        module: registers the operators when it is imported.
        distributions: packages that bring it; the first is the one to install.
        built_for: `(distribution, its release, the release of torch it is built for)`.
    """

    name: str
    module: str
    distributions: tuple[str, ...]
    built_for: tuple[tuple[str, str, str], ...]

    def installed(self) -> tuple[str, str] | None:
        """The distribution that is installed, and its version."""
        for distribution in self.distributions:
            try:
                return distribution, importlib.metadata.version(distribution)
            except importlib.metadata.PackageNotFoundError:
                continue
        return None

    def mismatch(self) -> str | None:
        """The sentence why the installed release does not go with this torch; None where it does, or where nobody knows."""
        torch_release = _torch_release()
        found = self.installed()
        wanted = next((r for d, r, t in self.built_for if found and d == found[0] and t == torch_release), None)
        if found is None or wanted is None or f"{found[1]}.".startswith(f"{wanted}."):
            return None
        distribution, version = found
        return (
            f"{distribution} {version} is not built for torch {torch_release}, {wanted} is: "
            f"pip install '{distribution}=={wanted}.*'"
        )

    def unpaired(self) -> str | None:
        """The sentence that nobody knows which release goes with this torch; None where the table has one.

        It is about the distribution that is installed, else the one to install. One without releases in the table is for any
        torch.
        """
        distribution = (self.installed() or self.distributions)[0]
        paired = [torch_release for name, _, torch_release in self.built_for if name == distribution]
        if not paired or _torch_release() in paired:
            return None
        known = paired[0] if len(paired) == 1 else f"{paired[0]} to {paired[-1]}"
        return f"no release of {distribution} is known to be built for torch {_torch_release()}, only for torch {known}"


def _torch_release() -> str:
    """`2.14` of 2.14.1+cu130."""
    return ".".join(torch.__version__.split(".")[:2])


#: The one table of them. PyPI's `mslk` 0.0.0 is empty; the one of torch's own index is not.
KERNEL_LIBRARIES = {
    "fbgemm": KernelLibrary(
        "fbgemm", "fbgemm_gpu.experimental.gen_ai", ("fbgemm-gpu-genai",),
        tuple(("fbgemm-gpu-genai", f"1.{minor - 5}", f"2.{minor}") for minor in (11, 12, 13, 14)),
    ),
    "mslk": KernelLibrary("mslk", "mslk.gemm", ("mslk-cuda", "mslk"), (("mslk-cuda", "1.1", "2.11"),)),
}  # fmt: skip
#: Libraries a target's kernels may be limited to; `auto` takes the first that is eligible.
LIBRARIES = ("auto", *KERNEL_LIBRARIES, "scaled_mm", "triton")


@dataclass(frozen=True)
class Target:
    """A device kind, for CUDA its compute capability, and which library's kernels may be used.

    Attributes:
        device: `cpu`, `cuda` or `xpu`.
        capability: `(9, 0)` for sm90; None where the device kind has none.
        kernels: one of `LIBRARIES`.
    """

    device: str
    capability: tuple[int, int] | None = None
    kernels: str = "auto"

    @staticmethod
    def parse(text: str) -> Target:
        """From `cpu`, `xpu`, `cuda:sm90` and the like; plain `cuda` means the GPU of this machine.

        A library may follow, `cuda:sm90+scaled_mm`: see `limited_to`.

        Raises:
            TargetError: not a target, or plain `cuda` on a machine without one.
        """
        match = _SPELLING.fullmatch(text)
        if match is None or (match[2] and match[1] != "cuda"):
            raise TargetError(f"{text!r} is not a target; write cpu, xpu, cuda, or cuda:smXY such as cuda:sm90.")
        if match[1] == "cuda" and match[2] is None:
            target = Target.detect(torch.device("cuda"))
        else:
            target = Target(match[1], (int(match[2]), int(match[3])) if match[2] else None)
        return target if match[4] is None else target.limited_to(match[4])

    def limited_to(self, kernels: str) -> Target:
        """The same target with the kernels of one library only.

        Raises:
            TargetError: not one of `LIBRARIES`.
        """
        if kernels not in LIBRARIES:
            raise TargetError(f"{kernels!r} is not a kernel library; choose one of {', '.join(LIBRARIES)}.")
        return replace(self, kernels=kernels)

    @staticmethod
    def detect(device: torch.device | str = "cpu") -> Target:
        """The target that this machine's `device` is.

        Raises:
            TargetError: the machine has no such device.
        """
        device = torch.device(device)
        if device.type == "cuda":
            if not torch.cuda.is_available():
                raise TargetError("this machine has no CUDA device; name the one to compile for, such as cuda:sm90.")
            if torch.version.hip is not None:
                raise TargetError(
                    "this torch is for AMD's GPUs (ROCm), and ctfp8 has no kernels for them. Load with dequantize=True: that is "
                    "a plain model, which runs on any device."
                )
            return Target("cuda", torch.cuda.get_device_capability(device))
        if device.type in ("cpu", "xpu"):
            return Target(device.type)
        raise TargetError(
            f"no lowering for device type {device.type!r}; supported are cpu, cuda and xpu. Elsewhere load with "
            "dequantize=True: that is a plain model, which runs on any device."
        )

    def __str__(self) -> str:
        capability = "" if self.capability is None else f":sm{self.capability[0]}{self.capability[1]}"
        return f"{self.device}{capability}{'' if self.kernels == 'auto' else f'+{self.kernels}'}"
