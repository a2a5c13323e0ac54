"""Loads what `ctfp8.export` wrote: a `.pt2` file that needs neither transformers nor the checkpoint any more.

module = ctfp8.load("model.pt2")
logits = module(ids).logits
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ..paused_gc import paused_gc
from .archive import open_archive

if TYPE_CHECKING:
    from .module import Artifact


def load(path: str | Path, device: torch.device | str | None = None, trust: bool = False) -> Artifact:
    """Loads an artifact for this machine, and picks the machine's kernels for it.

    Args:
        path: a `.pt2` file from `ctfp8.export`. It is read once, into memory, and nothing of it is run: see docs/security.md.
        device: where it is to run, such as `cuda:1`; default: the first device of the kind it was made for, or, of one rank's
            artifact, that of torchrun's LOCAL_RANK.
        trust: also load an AOTInductor package, which is machine code that runs with your rights. Nothing checks that.

    Returns:
        A module that is called as the model was; where the model returned an object, its fields are read by name. It has a
        `.manifest` and a `.report`, and can be compiled with `torch.compile`.

    Raises:
        ArtifactError: the file is damaged, was edited, has another format version, is not ours, or is machine code and
            `trust` was not given.
        RankError: it is for one of several processes, and this is not that one.
        TargetError: this machine lacks the device or the operator library the artifact was made for.
    """
    with paused_gc(), open_archive(Path(path)) as archive, archive.reading_ahead():
        from .instantiate import instantiate

        return instantiate(archive, device, trust)
