"""The device a graph is rewritten for."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch

from .errors import TargetError

_SPELLING = re.compile(r"(cpu|xpu|cuda)(?::sm(\d+)(\d))?")


@dataclass(frozen=True)
class Target:
    """A device kind and, for CUDA, its compute capability.

    Attributes:
        device: `cpu`, `cuda` or `xpu`.
        capability: `(9, 0)` for sm90; None where the device kind has none.
    """

    device: str
    capability: tuple[int, int] | None = None

    @staticmethod
    def parse(text: str) -> Target:
        """From `cpu`, `xpu`, `cuda:sm90` and the like; plain `cuda` means the GPU of this machine.

        Raises:
            TargetError: not a target, or plain `cuda` on a machine without one.
        """
        match = _SPELLING.fullmatch(text)
        if match is None or (match[2] and match[1] != "cuda"):
            raise TargetError(f"{text!r} is not a target; write cpu, xpu, cuda, or cuda:smXY such as cuda:sm90.")
        if match[1] == "cuda" and match[2] is None:
            return Target.detect(torch.device("cuda"))
        return Target(match[1], (int(match[2]), int(match[3])) if match[2] else None)

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
            return Target("cuda", torch.cuda.get_device_capability(device))
        if device.type in ("cpu", "xpu"):
            return Target(device.type)
        raise TargetError(f"no lowering for device type {device.type!r}; supported are cpu, cuda and xpu.")

    def __str__(self) -> str:
        return self.device if self.capability is None else f"{self.device}:sm{self.capability[0]}{self.capability[1]}"
