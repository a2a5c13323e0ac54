"""What a user names as a checkpoint: a folder, or an id of the hub. Anything else gets a sentence that says what to give."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from pathlib import Path

from ..errors import CheckpointError
from .files import INDEX_FILE, SINGLE_FILE

#: Folders that are named where there are many.
_SHOWN = 5


def is_folder(checkpoint: str | Path) -> bool:
    """Whether it is a folder; otherwise it may be an id of the hub.

    Raises:
        CheckpointError: it is a file, or a path at which nothing is.
    """
    path = Path(checkpoint)
    if path.is_dir():
        return True
    if path.is_file():
        raise CheckpointError(f"{checkpoint} is a file. {_instead(path)}")
    if str(checkpoint).startswith((".", "/", "~")) or str(checkpoint).count("/") != 1:
        raise CheckpointError(f"{checkpoint}: no such folder, and not a hub id, which is owner/name.{near(path)}")
    return False


def no_checkpoint(folder: Path) -> CheckpointError:
    """What to say of a folder without weights."""
    inside = _named(_checkpoints(folder))
    what = f"Give one of the checkpoints in it: {inside}" if inside else "Is this a checkpoint folder?"
    return CheckpointError(f"{folder}: neither {SINGLE_FILE} nor {INDEX_FILE} is there. {what}")


def _instead(file: Path) -> str:
    if file.suffix == ".pt2":
        return "An exported one is run by ctfp8 generate, and loaded by ctfp8.load."
    if (file.parent / "config.json").is_file():
        return f"Give its folder, {file.parent}."
    what = "A checkpoint is a folder with a config.json and safetensors files."
    if file.suffix != ".safetensors":
        return what
    call = "ctfp8.load_state_dict(module, safetensors.torch.load_file(file), None)"
    return f"{what} Without a config, load it into a module: {call}."


def near(path: Path) -> str:
    """Which checkpoints lie where a path leads that is not there, the likest names first; begins with a space."""
    while not path.parent.is_dir():
        path = path.parent
    found = _checkpoints(path.parent)
    likest = difflib.get_close_matches(path.name, [one.name for one in found], n=_SHOWN, cutoff=0.5)
    named = _named([path.parent / name for name in likest] or found)
    return f" Found there: {named}" if named else ""


def _checkpoints(folder: Path) -> list[Path]:
    """The folders in one that hold a config and weights, by name."""
    return sorted(config.parent for config in folder.glob("*/config.json") if any(config.parent.glob("*.safetensors")))


def _named(folders: Iterable[Path]) -> str:
    names = [str(folder) for folder in folders]
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return f"{', '.join(names[:_SHOWN])}{more}." if names else ""
