"""What other programs look for beside an `.onnx` or `.xml`: the config, the tokenizer, and onnxruntime-genai's own config.

file                                         read by
config.json, generation_config.json          optimum, optimum-intel
tokenizer.json, …                            all; OpenVINO GenAI wants it as openvino_tokenizer.xml
genai_config.json                            onnxruntime-genai
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers.utils import cached_file

from ..errors import UsageError

#: All that transformers reads of a tokenizer, as far as it is there.
_TOKENIZER = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
)
_NAMES = {".onnx": "model.onnx", ".xml": "openvino_model.xml"}


def check_folder(checkpoint: str, file: Path) -> None:
    """Returns if a runtime's folder can be made of the one that `file` is to be written to.

    Raises:
        UsageError: the file has another name than programs look for; or the folder is the checkpoint's own.
    """
    name = _NAMES[file.suffix]
    if file.name != name:
        raise UsageError(
            f"{file}: other programs look for {name} in a folder. Write {file.with_name(name)}, or leave --folder out."
        )
    folder = file.absolute().parent
    if Path(checkpoint).is_dir() and folder.is_dir() and folder.samefile(checkpoint):
        raise UsageError(
            f"{file}: --folder writes a config.json, and that folder has the checkpoint's. Write to another one, or leave "
            "--folder out."
        )


def write_folder(model: Any, checkpoint: str, file: Path, inputs: Mapping[str, Sequence[Any]]) -> tuple[str, ...]:
    """Writes what belongs beside a file that was exported; what is there is replaced.

    Args:
        model: of transformers, that was written to `file`.
        checkpoint: the folder or hub id that it is of, from which the tokenizer is copied as it is.
        inputs: shapes of the file's inputs by name; of a cache `[batch, heads, past, width]`.

    Returns:
        A sentence for each program that needs more than there is now.
    """
    folder, said = file.absolute().parent, []
    config = model.config.to_dict()
    config.pop("quantization_config", None)  # the file's operators say it; loaders would look for its weights
    _write(folder / "config.json", config | {"architectures": [type(model).__name__], "dtype": "float32"})
    generates = model.can_generate()
    if generates:
        _write(folder / "generation_config.json", model.generation_config.to_diff_dict())
    for name in _TOKENIZER:
        if (found := cached_file(checkpoint, name, _raise_exceptions_for_missing_entries=False)) is not None:
            shutil.copyfile(found, folder / name)
    if generates and file.suffix == ".xml":
        said.append(
            "For OpenVINO GenAI also: pip install openvino-tokenizers transformers; convert_tokenizer "
            f"{folder} --with-detokenizer -o {folder}"
        )
    if generates and file.suffix == ".onnx":
        widths = {
            tuple(shape[i] for i in (1, 3)) for name, shape in inputs.items() if name.startswith("past_key_values.")
        }
        if len(widths) == 1:
            _write(folder / "genai_config.json", _genai(model, file.name, inputs, *widths.pop()))
        else:
            said.append(
                "No genai_config.json: onnxruntime-genai takes keys and values of one width, and this model has several."
            )
    return tuple(said)


def _write(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, default=str) + "\n")


def _genai(model: Any, name: str, inputs: Mapping[str, Any], heads: int, width: int) -> dict[str, Any]:
    """onnxruntime-genai's config of a decoder, whatever its architecture: names, sizes, and what ends a text."""
    config, generation = model.config.get_text_config(decoder=True), model.generation_config
    ends = generation.eos_token_id if generation.eos_token_id is not None else config.eos_token_id
    first = ends[0] if isinstance(ends, list) else ends
    layers = sum(one.startswith("past_key_values.") for one in inputs) // 2
    named = {one: one for one in ("input_ids", "attention_mask", "position_ids") if one in inputs}
    return {
        "model": {
            "type": "decoder",
            "bos_token_id": config.bos_token_id,
            "eos_token_id": ends,
            "pad_token_id": first if config.pad_token_id is None else config.pad_token_id,
            "context_length": config.max_position_embeddings,
            "vocab_size": config.vocab_size,
            "decoder": {
                "session_options": {"provider_options": []},
                "filename": name,
                "head_size": width,
                "hidden_size": config.hidden_size,
                "num_attention_heads": config.num_attention_heads,
                "num_hidden_layers": layers,
                "num_key_value_heads": heads,
                "inputs": named
                | {"past_key_names": "past_key_values.%d.key", "past_value_names": "past_key_values.%d.value"},
                "outputs": {
                    "logits": "logits",
                    "present_key_names": "present.%d.key",
                    "present_value_names": "present.%d.value",
                },
            },
        },
        "search": {
            "do_sample": False,
            "max_length": config.max_position_embeddings,
            "past_present_share_buffer": False,
        },
    }
