"""ONNX Runtime and OpenVINO beside ctfp8: one FP8 model, prefill and decode, memory while running, what stays FP8.

    python benchmarks/runtimes.py [--layers 4] [--threads 2] [--tokens 16]
    python benchmarks/runtimes.py --experts 0.2                  # a mixture of 0.2 GB instead of a Llama

Writes a random FP8_DYNAMIC checkpoint (a Llama of TinyLlama's shapes, or a Qwen3-MoE) to a temporary folder and exports it twice.
Each way then runs in a fresh process: a prompt of 64 tokens and greedy tokens after it, three times; the best is shown. Memory is
what the process took above its imports while loading and running: the peak of `RssAnon`, in which mapped files do not count, and
of all that was resident (`VmHWM`), in which they do. All compute in float32 but `ctfp8, bf16`, which computes as the checkpoint
says.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from fresh import Peak, measured

PROMPT = 64
#: One step: ids `[1, n]` and the length of the text with them; logits `[1, n, vocabulary]`.
Step = Callable[[np.ndarray, int], np.ndarray]


def ctfp8_step(folder: str, dtype: str, tokens: int) -> Callable[[], Step]:
    """The compiled model with a static cache."""
    import torch

    import ctfp8_compile as ctfp8

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    model = ctfp8.compile(ctfp8.from_pretrained(folder, dtype=getattr(torch, dtype)))
    cache = ctfp8.static_cache(model, batch_size=1, max_length=PROMPT + tokens)

    def begin() -> Step:
        cache.reset()

        def step(ids: np.ndarray, length: int) -> np.ndarray:
            with torch.no_grad():
                at = torch.arange(length - ids.shape[1], length)[None]
                return model(torch.from_numpy(ids), position_ids=at, cache=cache).logits.float().numpy()

        return step

    return begin


def onnxruntime_step(path: str) -> Callable[[], Step]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = int(os.environ["OMP_NUM_THREADS"])
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    outputs = [output.name for output in session.get_outputs()]
    caches = [i for i in session.get_inputs() if i.name.startswith("past_key_values.")]

    def begin() -> Step:
        past = {i.name: np.zeros((1, i.shape[1], 0, i.shape[3]), np.float32) for i in caches}

        def step(ids: np.ndarray, length: int) -> np.ndarray:
            found = dict(zip(outputs, session.run(None, _inputs(ids, length) | past), strict=True))
            past.update({name: found[name.replace("past_key_values", "present")] for name in past})
            return found["logits"]

        return step

    return begin


def openvino_step(path: str) -> Callable[[], Step]:
    import openvino

    settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": os.environ["OMP_NUM_THREADS"]}
    request = openvino.compile_model(path, "CPU", settings).create_infer_request()

    def begin() -> Step:
        request.reset_state()

        def step(ids: np.ndarray, length: int) -> np.ndarray:
            request.infer(_inputs(ids, length) | {"beam_idx": np.zeros(1, np.int32)})
            return request.get_tensor("logits").data

        return step

    return begin


def _inputs(ids: np.ndarray, length: int) -> dict[str, np.ndarray]:
    positions = np.arange(length - ids.shape[1], length)[None]
    return {"input_ids": ids, "attention_mask": np.ones((1, length), np.int64), "position_ids": positions}


def resident(what: str) -> int:
    """Bytes of this process that are, or at most were, in memory: `VmRSS`, `VmHWM`."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(what)).split()[1]) * 1024


def measure(way: str, folder: str, tokens: str) -> None:
    """Runs in a fresh process: prints seconds, bytes and the tokens."""
    count = int(tokens)
    if way.startswith("ctfp8"):
        import transformers.models.llama.modeling_llama  # its imports belong to the baseline
        import transformers.models.qwen3_moe.modeling_qwen3_moe  # noqa: F401

        import ctfp8_compile.inductor.backend  # noqa: F401
    else:
        __import__(way)
    memory, before = Peak(), resident("VmRSS")
    ways: dict[str, Callable[[], Any]] = {
        "ctfp8": lambda: ctfp8_step(folder, "float32", count),
        "ctfp8, bf16": lambda: ctfp8_step(folder, "bfloat16", count),
        "onnxruntime": lambda: onnxruntime_step(f"{folder}/m.onnx"),
        "openvino": lambda: openvino_step(f"{folder}/m.xml"),
    }
    begin = ways[way]()
    prefills, decodes, text = [], [], []
    for _ in range(4):  # the first is warm-up
        step, ids, text = begin(), np.arange(PROMPT)[None], []
        start = time.perf_counter()
        for length in range(PROMPT, PROMPT + count):
            ids = step(ids, length)[:, -1:].argmax(-1)
            text.append(int(ids[0, 0]))
            if length == PROMPT:
                prefills.append(time.perf_counter() - start)
                start = time.perf_counter()
        decodes.append((time.perf_counter() - start) / (count - 1))
    result = {"prefill": min(prefills[1:]), "decode": min(decodes[1:]), "peak": memory.stop(), "text": text}
    print(json.dumps(result | {"resident": resident("VmHWM") - before}))


def export(folder: Path) -> dict[str, int]:
    """Writes both files; their bytes."""
    import ctfp8_compile as ctfp8

    model = ctfp8.from_pretrained(folder)
    written = (ctfp8.export(model, path=folder / name).to_dict()["bytes"] for name in ("m.onnx", "m.xml"))
    return dict(zip(("onnxruntime", "openvino"), written, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--experts", type=float, help="gigabytes of a mixture of experts, instead of a Llama")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=16)
    args = parser.parse_args()
    from checkpoints import write_llama, write_moe
    from rich.console import Console
    from rich.table import Table

    what = f"a mixture of {args.experts} GB" if args.experts else f"a Llama of {args.layers} layers"
    console, table = Console(), Table(title=f"{what}, {args.threads} threads")
    for column in (
        "",
        "file",
        "prefill of 64",
        "decode",
        "peak memory",
        "with mapped files",
        "of ours: prefill",
        "decode",
        "memory",
        "tokens alike",
    ):
        table.add_column(column)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with console.status("writing the checkpoint and the files …"):
            if args.experts:
                write_moe(folder, args.experts)
            else:
                write_llama(folder, args.layers)
            sizes = {"ctfp8": (folder / "model.safetensors").stat().st_size} | export(folder)
        ours: Any = None
        for way in ("ctfp8", "ctfp8, bf16", "onnxruntime", "openvino"):
            found = measured(__file__, way, folder, args.tokens, OMP_NUM_THREADS=str(args.threads))
            ours = ours or found
            ratios = [f"{found[key] / ours[key]:.2f}×" for key in ("prefill", "decode", "peak")]
            alike = sum(a == b for a, b in zip(found["text"], ours["text"], strict=True))
            times = [f"{1000 * found[key]:.1f} ms" for key in ("prefill", "decode")]
            size = sizes.get(way, sizes["ctfp8"])
            memory = [f"{found[key] / 1e6:.0f} MB" for key in ("peak", "resident")]
            table.add_row(way, f"{size / 1e6:.0f} MB", *times, *memory, *ratios, f"{alike}/{args.tokens}")
    console.print(table)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--measure"]:
        measure(*sys.argv[2:5])
    else:
        main()
