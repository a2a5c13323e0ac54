"""What two checkpoints hold: compared tensor by tensor, as their files say."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file


def stored(folder: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """By name, what the files say of each tensor, and its bytes."""
    out = {}
    for file in folder.glob("*.safetensors"):
        content = file.read_bytes()
        base = 8 + int.from_bytes(content[:8], "little")
        for name, entry in json.loads(content[8:base]).items():
            if name != "__metadata__":
                begin, end = (base + at for at in entry["data_offsets"])
                out[name] = entry["dtype"], tuple(entry["shape"]), content[begin:end]
    return out


def differing(before: Path, after: Path) -> set[str]:
    """Names of the tensors that are not the same in both; none may be missing in one."""
    a, b = stored(before), stored(after)
    assert a.keys() == b.keys()
    return {name for name in a if a[name] != b[name]}


def write(folder: Path, state: dict[str, torch.Tensor], source: Path, metadata: dict[str, str] | None = None) -> Path:
    """A checkpoint of these tensors, with the config of another one."""
    folder.mkdir(parents=True)
    shutil.copy(source / "config.json", folder)
    save_file(
        {k: t.contiguous() for k, t in state.items()},
        folder / "model.safetensors",
        {"format": "pt", **(metadata or {})},
    )
    return folder
