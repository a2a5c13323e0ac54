"""Mistral's own files, `consolidated*.safetensors` with `params.json`: of a folder that holds no others.

Their tensors have Mistral's names (`layers.0.attention.wq.weight`, `qscale_weight`, `qscale_act`), which transformers reads for
the models it has a conversion from them for. For others rows of q and k lie in another order than in transformers' models.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..checkpoint.files import INDEX_FILE, SINGLE_FILE
from ..checkpoint.folder import Folder
from ..errors import CheckpointError
from .compat import get_checkpoint_conversion_mapping

_FIRST = "tok_embeddings"  #: what Mistral calls its table of embeddings


def check(folder: str | Path, files: Folder | None, config: Any) -> None:
    """Refuses Mistral's own files where transformers has no conversion from their names.

    Raises:
        CheckpointError: naming the files to take.
    """
    if files is None or not files.files[0].name.startswith("consolidated"):
        return
    if not any(name.startswith(_FIRST) for name in files.open()):
        return  # only the files' names are Mistral's
    mapping = get_checkpoint_conversion_mapping(config.model_type) or ()
    if not any(_FIRST in str(pattern) for one in mapping for pattern in one.source_patterns):
        raise CheckpointError(
            f"{folder}: {files.files[0].name} has Mistral's own names, which transformers does not read for "
            f"{config.model_type!r}. Take {SINGLE_FILE}, or {INDEX_FILE} and its shards, from the same repository, or serve "
            "the folder with vLLM, --load-format mistral --config-format mistral."
        )
