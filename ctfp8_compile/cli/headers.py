"""A checkpoint named on the command line: a folder, or a repository of the hub, whose headers are read without its weights."""

from __future__ import annotations

import contextlib
import json
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.utils import disable_progress_bars

from ..checkpoint.place import near
from ..errors import CheckpointError

_CONFIGS = ("config.json", "hf_quant_config.json", "model.safetensors.index.json")


@contextlib.contextmanager
def headers(repository: str) -> Iterator[Path]:
    """A temporary folder with the checkpoint's JSON files, and safetensors files whose weights are holes.

    A header is read by one or two range requests, about 100 kB a shard.

    Raises:
        CheckpointError: the hub cannot be reached, has no such repository, or the repository no safetensors files.
    """
    disable_progress_bars()
    api = HfApi()
    with tempfile.TemporaryDirectory() as folder:
        try:
            found = api.get_safetensors_metadata(repository)
            for name in _CONFIGS:
                if api.file_exists(repository, name):
                    shutil.copy(api.hf_hub_download(repository, name), Path(folder, name))
        except Exception as error:  # of the hub, or of the HTTP library it happens to use, which has classes of its own
            raise CheckpointError(
                f"{repository}: no such folder, and the hub does not give its headers ({_first_line(error)}). "
                f"Is the id right? A private or gated repository needs `hf auth login`.{near(Path(repository))}"
            ) from error
        for name, metadata in found.files_metadata.items():
            tensors = {
                tensor: {"dtype": info.dtype, "shape": info.shape, "data_offsets": info.data_offsets}
                for tensor, info in metadata.tensors.items()
            }
            text = json.dumps(tensors).encode()
            end = max((info.data_offsets[1] for info in metadata.tensors.values()), default=0)
            with open(Path(folder, Path(name).name), "wb") as file:
                file.write(len(text).to_bytes(8, "little") + text)
                file.truncate(8 + len(text) + end)
        yield Path(folder)


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
