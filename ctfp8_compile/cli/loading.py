"""What commands that run a model need of transformers: the model under its own class, its tokenizer, arguments to trace with."""

from __future__ import annotations

import inspect
import os
import sys
from typing import Any

import torch
import transformers
from huggingface_hub.utils import disable_progress_bars
from transformers.distributed import DistributedConfig

from .. import from_pretrained
from ..checkpoint.folder import of_folder
from ..checkpoint.packed import sentence
from ..checkpoint.place import is_folder
from ..counted import counted
from ..errors import CheckpointError, TargetError, UsageError
from ..hf.model_class import named_class
from ..hf.read_config import read_config
from .terminal import err, escape

CPU = torch.device("cpu")


def device_of(wanted: str | None) -> torch.device:
    """Where a model is to run: where the user says, or the GPU if there is one, or the CPU.

    Raises:
        UsageError: that is no device.
        TargetError: this machine has none of the kind.
    """
    if wanted is None:
        found = torch.accelerator.current_accelerator(check_available=True)
        return found if found is not None and found.type in ("cuda", "xpu") else CPU
    try:
        device = torch.device(wanted)
        if device.type not in ("cpu", "cuda", "xpu"):
            raise RuntimeError
    except RuntimeError:
        raise UsageError(f"--device {wanted}: not a device. Write cpu, cuda, cuda:1 or xpu.") from None
    if device.type != "cpu":
        backend = getattr(torch, device.type)
        kind = f"{device.type.upper()} device"
        count = backend.device_count() if backend.is_available() else 0
        if (device.index or 0) >= count:
            raise TargetError(
                f"--device {wanted}: this machine has {counted(count, kind) if count else f'no {kind}'}. Leave "
                "it out to run where this machine can."
            )
    return device


def load(checkpoint: str, debug: bool = False, tp: bool = False, device: torch.device = CPU, text: bool = False) -> Any:
    """The model under the class its config names: a causal language model, an encoder, ….

    Args:
        tp: spread it over the processes that torchrun started, on the device of each.
        device: where it is to be.
        text: of a model that also sees or hears, the part that makes text.
    """
    ranks = int(os.environ.get("WORLD_SIZE", 1))
    if tp and ranks == 1:
        raise UsageError(
            "--tp is for several processes. Start them with: torchrun --nproc-per-node 2 -m ctfp8_compile …"
        )
    if not debug:
        transformers.logging.set_verbosity_error()
    if not sys.stderr.isatty():
        transformers.logging.disable_progress_bar()
        disable_progress_bars()
    if is_folder(checkpoint):
        of_folder(checkpoint)  # before transformers asks for a config
    config = read_config(checkpoint)
    place: dict[str, Any] = {"distributed_config": DistributedConfig(tp_size=ranks)} if tp else {}
    if not tp and device != CPU:
        place = {"device_map": device}
    model = from_pretrained(checkpoint, None if text else named_class(config), **place)
    packed = getattr(getattr(model, "hf_quantizer", None), "packed", {})
    if weights := [weight for info in packed.values() for weight in info.weights.values()]:
        err().print(escape(f"{sentence(weights, model.dtype)}."), soft_wrap=True)
    return model


def load_tokenizer(checkpoint: str) -> Any:
    """The checkpoint's tokenizer.

    Raises:
        CheckpointError: there is none. transformers then makes an empty one, which turns any text into no tokens.
    """
    is_folder(checkpoint)
    tokenizer, why = None, None
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(checkpoint)
    except (OSError, ValueError) as error:
        why = error
    if tokenizer is None or not tokenizer("a text\n", add_special_tokens=False).input_ids:
        raise CheckpointError(
            f"{checkpoint}: no tokenizer that transformers can read is there. Copy tokenizer.json and tokenizer_config.json "
            "of the original model into the folder."
        ) from why
    return tokenizer


def example(model: Any, batch: int = 1) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments to trace a model with: 16 tokens, no cache."""
    ids = torch.arange(16 * batch, device=model.device).reshape(batch, 16) % min(
        model.config.get_text_config().vocab_size, 256
    )
    caches = "use_cache" in inspect.signature(model.forward).parameters
    return (ids,), {"use_cache": False} if caches else {}
