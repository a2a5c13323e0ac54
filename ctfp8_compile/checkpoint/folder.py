"""Which files a checkpoint folder is made of, and which of them each tensor is in.

The index says it. Files may hold more: copies of tensors that a later file replaced, experts of the model they were cut from. The
index may say more, too: names of tensors that were left out. What it says of a tensor that lies in one other file only is a slip
that can be put right. Everybody who reads a folder asks here, so that `inspect` and `from_pretrained` see the same tensors.
"""

from __future__ import annotations

import json
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

from ..errors import CheckpointError, SchemeError
from .files import INDEX_FILE, SINGLE_FILE, Checkpoint, names_in
from .formats import PLAIN, Format
from .notes import Notes
from .place import no_checkpoint


@dataclass(frozen=True)
class Folder:
    """The files of a checkpoint.

    Attributes:
        files: in an order in which the last copy of a tensor is the one that counts.
        where: of an indexed checkpoint, the file of each tensor; None where each is in one file.
        found: transformers finds these files by itself.
        stale: tensors of the files that the index does not name.
        missing: what the index names, and no file has.
        absent: what the index says is in a file that is not there, and that file; the model may not need it.
    """

    files: tuple[Path, ...]
    where: Mapping[str, Path] | None = None
    found: bool = True
    stale: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    absent: Mapping[str, str] = field(default_factory=dict)

    def open(self, format: Format = PLAIN) -> Checkpoint:
        """The tensors of the checkpoint.

        Raises:
            CheckpointError: a file cannot be opened.
        """
        return Checkpoint(self.files, format, self.where)


def of_folder(folder: str | Path, notes: Notes | None = None) -> Folder:
    """The safetensors files of a local checkpoint folder, checked to exist and to lie inside it.

    Args:
        notes: where index and files differ is noted here.

    Raises:
        CheckpointError: no weights, an unreadable index, a shard that lies outside the folder, none that is there.
    """
    folder = Path(folder)
    if (folder / INDEX_FILE).is_file():
        return _indexed(folder, Notes() if notes is None else notes)
    if (folder / SINGLE_FILE).is_file():
        return Folder((folder / SINGLE_FILE,))
    if own := _consolidated(folder):
        return Folder(own, found=False)
    raise no_checkpoint(folder)


def of_files(files: Iterable[str | Path], notes: Notes | None = None, needed: Container[str] = ()) -> Folder:
    """The checkpoint that transformers found these files of: with the index that lies beside them, if it names one of them.

    Args:
        needed: names of the model's parameters, which are read where the index does not name them, too.
    """
    given = tuple(map(Path, files))
    if given and (given[0].parent / INDEX_FILE).is_file():
        found = _indexed(given[0].parent, Notes() if notes is None else notes, needed)
        if set(given) & set(found.files):
            more = {name: file for file in given if file not in found.files for name in names_in(file)}
            where = {**(found.where or {}), **more}
            return replace(found, files=(*found.files, *dict.fromkeys(more.values())), where=where)
    if given and given[0] in (own := _consolidated(given[0].parent)):
        return Folder(own, found=False)
    return Folder(given)


def _consolidated(folder: Path) -> tuple[Path, ...]:
    """Mistral's own files. They count where no others are, which hold the same weights."""
    return tuple(sorted(folder.glob("consolidated*.safetensors")))


def _indexed(folder: Path, notes: Notes, needed: Container[str] = ()) -> Folder:
    index, weight_map = _read_index(folder)
    files = tuple(folder / name for name in sorted(set(weight_map.values())) if (folder / name).is_file())
    holders: dict[str, list[Path]] = {}
    for file in files:
        for name in names_in(file):
            holders.setdefault(name, []).append(file)
    where: dict[str, Path] = {}
    missing = []
    absent: dict[str, str] = {}
    for name, shard in weight_map.items():
        found = holders.get(name, [])
        if folder / shard in found:
            where[name] = folder / shard
        elif len(found) == 1:
            where[name] = found[0]
            notes.add(f"not where {INDEX_FILE} says, but in another of its files", name)
        elif found:
            others = " and ".join(file.name for file in found)
            raise CheckpointError(
                f"{INDEX_FILE} says that {name} is in {shard}, but it is in {others}. Correct the index."
            )
        elif folder / shard in files:
            missing.append(name)
        else:
            absent[name] = shard
    stale, added = _unnamed(holders, where, needed)
    where |= added
    for name, shard in absent.items():
        notes.add(f"in {shard}, says {INDEX_FILE}, which is missing", name)
    if missing:
        notes.add(f"named in {INDEX_FILE}, and in none of its files", *missing)
    if stale:
        notes.add(f"in a file, but not in {INDEX_FILE}; not read, unless it is all of a parameter", *stale)
    if read := [name for name in added if name in needed]:
        notes.add(f"in a file, but not in {INDEX_FILE}; read, as the model needs it", *read)
    copies = {name: found for name, found in holders.items() if len(found) > 1 and name in where}
    if copies:
        notes.add(f"in several files; read from the one that {INDEX_FILE} names", *copies)
    both = (folder / SINGLE_FILE).is_file() and folder / SINGLE_FILE not in files
    if both:
        notes.add(f"not one of the files that {INDEX_FILE} names; not read", SINGLE_FILE)
    usual = isinstance(index.get("metadata"), dict) and not both and {f.name for f in files} == set(weight_map.values())
    return Folder(_in_order(files, where, copies), where, usual, tuple(stale), tuple(missing), absent)


def _unnamed(
    holders: Mapping[str, Sequence[Path]], where: Mapping[str, Path], needed: Container[str]
) -> tuple[list[str], dict[str, Path]]:
    """Tensors that no index names: those that are not read, and the file of each that is."""
    stale: list[str] = []
    added: dict[str, Path] = {}
    for name, found in sorted(holders.items(), key=lambda item: len(item[0])):  # weights before what is beside them
        if name in where:
            continue
        known = {**where, **added}
        beside = known.get(_weight_of(name, known))
        if beside is not None and beside in found:  # a scale that was added to a file, and not to its index
            added[name] = beside
        elif name not in needed:
            stale.append(name)
        elif len(found) == 1:
            added[name] = found[0]
        else:
            both = " and ".join(file.name for file in found)
            raise CheckpointError(
                f"{name} is in {both}, and {INDEX_FILE} does not name it. Add it to the index's weight_map."
            )
    return stale, added


def _in_order(
    files: Sequence[Path], where: Mapping[str, Path], copies: Mapping[str, Sequence[Path]]
) -> tuple[Path, ...]:
    """The files so that each tensor's own comes after all that hold a copy of it."""
    before: dict[Path, set[Path]] = {file: set() for file in files}
    for name, found in copies.items():
        before[where[name]] |= set(found) - {where[name]}
    try:
        return tuple(TopologicalSorter(before).static_order())
    except CycleError as error:
        first, second, *_ = error.args[1]
        name = next(name for name, found in copies.items() if first in found and where[name] == second)
        raise CheckpointError(
            f"{first.name} holds copies of tensors that {INDEX_FILE} says are in {second.name}, and the other way round, such as "
            f"{name}. Save the checkpoint again, each tensor once."
        ) from error


def _read_index(folder: Path) -> tuple[Mapping[str, object], Mapping[str, str]]:
    try:
        index = json.loads((folder / INDEX_FILE).read_text())
        weight_map = {str(name): str(shard) for name, shard in index["weight_map"].items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{INDEX_FILE}: not a safetensors index ({error!r}). Download the file again.") from error
    for shard in sorted(set(weight_map.values())):
        if Path(shard).is_absolute() or ".." in Path(shard).parts:
            raise CheckpointError(f"{INDEX_FILE}: the shard path {shard!r} leaves the checkpoint's folder; refused.")
    if not any((folder / shard).is_file() for shard in weight_map.values()):
        raise CheckpointError(f"{INDEX_FILE}: none of the files it names is there. Download them again.")
    return index, weight_map


def _weight_of(name: str, present: Mapping[str, Path] | Sequence[str]) -> str:
    """The weight that a scale, or whatever is beside a weight, belongs to, by its name; the name itself where there is none."""
    module, _, leaf = name.rpartition(".")
    stems = [f"{module}.weight", *(name[:i] for i, char in enumerate(name) if char == "_")]
    return next((stem for stem in stems if stem in present and stem != name), name) if leaf != "weight" else name


def check_config_file(folder: Path) -> None:
    """Refuses a `config.json` that is no JSON object, or whose quantization_config is none."""
    try:
        config = json.loads((folder / "config.json").read_text())
    except FileNotFoundError as error:
        if (folder / "params.json").is_file():
            raise CheckpointError(
                f"{folder}: there is params.json, Mistral's own config, and no config.json, which transformers reads. Download "
                f"config.json, and {SINGLE_FILE} or {INDEX_FILE} with its shards, from the same repository, or serve the folder "
                "with vLLM, --load-format mistral --config-format mistral."
            ) from error
        raise CheckpointError(f"{folder}: there is no config.json. Is this a checkpoint folder?") from error
    except ValueError as error:
        raise CheckpointError(f"{folder}: config.json is not valid JSON ({error}). Download the file again.") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{folder}: config.json is not an object. Download the file again.")
    if not isinstance(config.get("quantization_config"), (dict, type(None))):
        raise SchemeError(f"{folder}: quantization_config in config.json is not an object. Download the file again.")
