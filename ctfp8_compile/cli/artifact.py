"""An artifact with a key-value cache inside: its first token waits for no transformers and no compiler."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tokenizers import Tokenizer
from torch import Tensor

from ..aot.load import load
from ..counted import agreeing, counted
from ..errors import ArtifactError, CheckpointError, UsageError
from .steps import Steps, Text, ends_of

if TYPE_CHECKING:
    from ..aot.module import Artifact  # with what is imported while the file is read


class ArtifactDecoder(Steps):
    """What `ctfp8 export --cache` wrote: `logits = artifact(input_ids, position)`, a position of 0 beginning a text."""

    def __init__(self, artifact: Artifact):
        super().__init__()
        self._artifact, self._device = artifact, artifact.device

    def begin(self) -> None:
        pass

    def logits(self, ids: Tensor, position: int) -> Tensor:
        out: Tensor = self._artifact(ids.to(self._device), torch.tensor(position, device=self._device))
        return out[0, -1]


def of_artifact(path: Path, tokenizer: str | None, prompt: str, max_new_tokens: int, trust: bool) -> Text:
    """A prompt for an artifact; `tokenizer` is a folder with tokenizer.json and the configs that say which tokens end a text.

    Raises:
        UsageError: no tokenizer was named, the artifact has no cache inside, or it has no room for the text.
        CheckpointError: the tokenizer cannot be read.
        ArtifactError: the artifact cannot be.
    """
    if tokenizer is None:
        raise UsageError(
            f"{path} holds no tokenizer. Name the folder of the checkpoint it was made from: --tokenizer CKPT"
        )
    folder = Path(tokenizer)
    try:
        tokens = Tokenizer.from_file(str(folder / "tokenizer.json"))
    except Exception as error:  # the library raises Exception itself
        raise CheckpointError(f"{folder / 'tokenizer.json'}: not a readable tokenizer ({error}).") from None
    ids = torch.tensor([tokens.encode(prompt).ids], dtype=torch.int64)
    if not ids.numel():
        raise UsageError(
            "the prompt is empty, and this tokenizer begins no text by itself. Give --prompt at least a character."
        )
    if not path.is_file():
        raise ArtifactError(f"{path}: no such file.")
    artifact = load(path, trust=trust)
    manifest = artifact.manifest
    if manifest.positional != ("input_ids", "position"):
        raise UsageError(
            f"{path} has no key-value cache inside. Export it again with room for a text: ctfp8 export --cache"
        )
    room = manifest.ranges.get(str(manifest.inputs[0].shape[-1]), (0, None))[1]
    if room is not None and ids.shape[1] + max_new_tokens > room:
        raise UsageError(
            f"{path} has room for {counted(room, 'token')}; the prompt has {ids.shape[1]}, and "
            f"{counted(max_new_tokens, 'new one')} {agreeing(max_new_tokens, 'is', 'are')} more. Give a "
            "smaller --max-new-tokens, or export it again with a larger --cache."
        )
    return Text(prompt, ArtifactDecoder(artifact), ids, _decode(tokens), _ends(folder))


def _decode(tokens: Tokenizer) -> Any:
    return lambda ids: tokens.decode(ids, skip_special_tokens=False)


def _ends(folder: Path) -> frozenset[int]:
    for name in ("generation_config.json", "config.json"):
        if (folder / name).is_file():
            found = json.loads((folder / name).read_text()).get("eos_token_id")
            if found is not None:
                return ends_of(found)
    return frozenset()
