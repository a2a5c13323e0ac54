"""llama.cpp as a peer, by its Python package: `pip install llama-cpp-python gguf`, which builds it for this processor."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any


def is_installed() -> bool:
    return all(importlib.util.find_spec(name) is not None for name in ("llama_cpp", "gguf"))


def write_gguf(folder: Path, path: Path, words: Sequence[str] = ()) -> None:
    """A Llama FP8 checkpoint as a GGUF file: matrices as Q8_0 (8.5 bits a weight), norms as float32.

    Args:
        words: its vocabulary, of single characters, which no merges are for; none: a file without one.
    """
    import gguf
    from gguf import GGMLQuantizationType, GGUFWriter

    import ctfp8_compile as ctfp8

    model = ctfp8.from_pretrained(folder, dequantize=True)
    config = model.config
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    writer = GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.hidden_size // heads)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("llama" if words else "no_vocab")
    if words:
        writer.add_token_list(list(words))
        writer.add_token_scores([0.0] * len(words))
        writer.add_token_types([gguf.TokenType.NORMAL] * len(words))
        writer.add_add_bos_token(False)
        writer.add_add_space_prefix(False)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q8_0)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        known = names.get_name(name, try_suffixes=(".weight",))
        assert known is not None, name
        rows = tensor.float()
        for which, count in (("q_proj", heads), ("k_proj", kv_heads)):  # its rotary embedding turns neighbours
            if name.endswith(f"{which}.weight"):
                rows = rows.view(count, 2, -1, rows.shape[1]).transpose(1, 2).reshape(rows.shape)
        if tensor.dim() == 1:
            writer.add_tensor(known, rows.numpy())
        else:
            kind = GGMLQuantizationType.Q8_0
            writer.add_tensor(known, gguf.quants.quantize(rows.contiguous().numpy(), kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def load(path: Path, threads: int, q8_cache: bool = False) -> Callable[..., Callable[[int, int], int]]:
    """Given a number of sequences and room for tokens of each, what runs so many tokens of each from a position on.

    Args:
        q8_cache: keys and values are kept as Q8_0, not as float16.
    """
    import ctypes

    import llama_cpp
    import numpy as np

    llama_cpp.llama_backend_init()
    silent = llama_cpp.llama_log_callback(lambda level, text, data: None)
    llama_cpp.llama_log_set(silent, ctypes.c_void_p(0))
    model = llama_cpp.llama_model_load_from_file(str(path).encode(), llama_cpp.llama_model_default_params())
    vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
    kept: list[Any] = [silent]

    def of(rows: int, room: int, most: int) -> Callable[[int, int], int]:
        given = llama_cpp.llama_context_default_params()
        given.n_ctx, given.n_batch, given.n_ubatch, given.n_seq_max = (
            room * rows,
            most * rows,
            min(512, most * rows),
            rows,
        )
        given.n_threads = given.n_threads_batch = threads
        if q8_cache:  # which only its own attention reads
            given.type_k = given.type_v = llama_cpp.GGML_TYPE_Q8_0
            given.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED
        context = llama_cpp.llama_init_from_model(model, given)
        batch = llama_cpp.llama_batch_init(most * rows, 0, 1)
        kept.extend((context, batch))

        def call(tokens: int, position: int) -> int:
            memory = llama_cpp.llama_get_memory(context)
            for row in range(rows):  # what was written from here on is forgotten
                llama_cpp.llama_memory_seq_rm(memory, row, position, -1)
            for at in range(rows * tokens):
                row, token = divmod(at, tokens)
                batch.token[at], batch.pos[at] = token + 1, position + token
                batch.n_seq_id[at], batch.seq_id[at][0] = 1, row
                batch.logits[at] = token == tokens - 1
            batch.n_tokens = rows * tokens
            if llama_cpp.llama_decode(context, batch):
                raise RuntimeError(f"llama.cpp did not take {tokens} tokens of {rows} sequences at {position}")
            logits = llama_cpp.llama_get_logits_ith(context, -1)
            return int(np.ctypeslib.as_array(logits, (vocabulary,)).argmax())

        return call

    return of
