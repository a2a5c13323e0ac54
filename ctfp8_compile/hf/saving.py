"""Writes a model as the checkpoint it came from: every tensor of that, one parameter in memory at a time."""

from __future__ import annotations

import inspect
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from huggingface_hub import HfApi
from torch import Tensor

from ..checkpoint.writer import Writer
from ..errors import UsageError
from ..model.freeze import KeepsFP8
from ..model.ranks import agree, is_first, together
from .held import Wanted
from .parallel import is_distributed
from .save_plan import SavePlan
from .unit import Unit


class SavesAsRead(KeepsFP8):
    """Mixed into the class of a transformers model with FP8 weights."""

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
        """transformers' `save_pretrained`, whose tensors are those of the checkpoint that was loaded."""
        stock: Callable[..., Any] = super().save_pretrained  # type: ignore[misc]
        quantizer = getattr(self, "hf_quantizer", None)
        if quantizer is None or getattr(
            self, "_hf_peft_config_loaded", False
        ):  # an adapter of transformers': saved alone
            return stock(save_directory, *args, **kwargs)
        given = inspect.signature(stock).bind(save_directory, *args, **kwargs)
        arguments = {**given.arguments, **given.arguments.pop("kwargs", {})}
        with together(is_distributed(self)):
            _save(self, quantizer, stock, Path(arguments.pop("save_directory")), arguments)
        return None

    def barrier_after_gathered_checkpoint_save(self, distributed_config: Any) -> None:
        """transformers' `save_pretrained` waits here for all ranks; ours calls it on the first alone, and waits by itself."""
        if not self.hf_quantizer.writes:  # type: ignore[attr-defined]
            super().barrier_after_gathered_checkpoint_save(distributed_config)  # type: ignore[misc]


@torch.no_grad()
def _save(model: Any, quantizer: Any, stock: Callable[..., Any], folder: Path, arguments: dict[str, Any]) -> None:
    _check(quantizer, folder, arguments)
    most = _bytes(arguments.get("max_shard_size", "50GB"))
    push = arguments.pop("push_to_hub", False)
    upload: dict[str, Any] = {
        key: arguments.pop(key) for key in ("repo_id", "commit_message", "create_pr") if key in arguments
    }
    saves = arguments.get("is_main_process", True) and is_first()
    plan = SavePlan(model, quantizer)
    before = model._get_files_timestamps(folder) if push and saves and folder.is_dir() else {}
    gathers = [wanted for unit in plan.units for wanted in unit.gathers] if is_first() else []
    if is_distributed(model):
        gathers = _of_first(gathers)
    if not is_first():
        plan.held.follow(gathers)
    elif not saves:
        plan.held.follow(wanted for wanted in gathers if wanted.name in plan.held.cuts)
    else:
        entries = [entry for unit in plan.units for entry in unit.entries]
        metadata = {} if plan.origin is None else plan.origin.source.metadata
        with Writer(folder, entries, most, arguments.get("variant"), metadata) as writer:
            for unit in plan.units:
                _write(writer, unit)
            _configs(model, quantizer, stock, folder, arguments)
            writer.finish({"total_parameters": model.num_parameters()})
        plan.say()
    if is_distributed(model):
        agree()
    if push and saves:
        _upload(model, folder, before, arguments.get("token"), upload)


def whole_state(model: Any, quantizer: Any) -> dict[str, Tensor]:
    """All that is saved, in memory: for programs of transformers' that ask for a model's tensors to write them themselves."""
    if getattr(model, "_hf_peft_config_loaded", False):
        return {k: v for k, v in model.state_dict().items() if ".parametrizations." not in k}
    plan = SavePlan(model, quantizer)
    out: dict[str, Tensor] = {}
    for unit in plan.units:
        made = unit.make() if unit.make is not None else {t.name: t.read() for t in unit.stored}
        for entry in unit.entries:
            value = made[entry.name]
            out[entry.name] = value.clone() if isinstance(value, Tensor) else torch.cat(list(value))
    return out


def _check(quantizer: Any, folder: Path, arguments: dict[str, Any]) -> None:
    """Refuses what cannot be done before anything is."""
    if folder.is_file():
        raise UsageError(f"{folder} is a file; a checkpoint is saved to a folder.")
    source = [] if quantizer.origin is None else quantizer.origin.source.stamps
    if any(folder.resolve() in (file.parent.resolve(), file.resolve().parent) for file in source):
        raise UsageError(f"{folder}: the model's weights are mapped from the files there; save to another folder.")
    if arguments.get("state_dict") is not None:
        raise UsageError("state_dict: a model with FP8 weights is saved as it is. Leave it out.")
    if arguments.get("distributed_checkpoint"):
        raise UsageError(
            "distributed_checkpoint=True is not supported with FP8 weights; without it, rank 0 writes all."
        )


def _write(writer: Writer, unit: Unit) -> None:
    if unit.make is None:
        for stored in unit.stored:
            writer.write(stored.name, stored.chunks())
        return
    made = unit.make()
    for entry in unit.entries:
        writer.write(entry.name, made[entry.name])


def _configs(model: Any, quantizer: Any, stock: Callable[..., Any], folder: Path, arguments: dict[str, Any]) -> None:
    """Everything but the tensors: transformers writes it, and puts back what it changes in the model's config."""
    quantizer.writes = True
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Attempting to save a model with offloaded modules")
            stock(folder, **arguments)
    finally:
        quantizer.writes = False
    if quantizer.holders is not None:
        quantizer.holders.write(model.config, folder, quantizer.origin.tensors)


def _upload(model: Any, folder: Path, before: Any, token: Any, given: dict[str, Any]) -> None:
    repo = HfApi(token=token).create_repo(given.get("repo_id", folder.name), exist_ok=True).repo_id
    model._upload_modified_files(
        folder, repo, before, commit_message=given.get("commit_message"), token=token,
        create_pr=given.get("create_pr", False),
    )  # fmt: skip


def _of_first(gathers: list[Wanted]) -> list[Wanted]:
    agree()
    said: list[Any] = [gathers]
    dist.broadcast_object_list(said, src=0)
    found: list[Wanted] = said[0]
    return found


def _bytes(size: int | str) -> int:
    """Of `50GB`, `200KB` or a number, as transformers takes it."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)B?\s*", str(size), re.IGNORECASE)
    if found is None:
        raise UsageError(f"max_shard_size={size!r} is not a size such as '5GB'.")
    return int(float(found[1]) * 1000 ** " KMGT".index(found[2].upper() or " "))
