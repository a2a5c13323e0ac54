"""Servers with OpenAI's API, asked by several clients at a time: ctfp8, transformers' in bf16, llama.cpp's if there is a file.

    python benchmarks/serving.py [--layers 22] [--clients 1 4 16 64] [--requests 2] [--new-tokens 32] [--gguf FILE]

Writes a random Llama FP8_DYNAMIC checkpoint and the same in bf16 to a temporary folder. All servers run at the same time, and are
asked in turn: each client sends so many requests, one after another, with prompts of 8 to 128 tokens, and reads their streams.
Shown are tokens a second of all clients, the time to the first token and between tokens (median, 95th percentile), and what
became of ctfp8's tokens a second as a multiple of each other's. `--gguf` is a model for `python -m llama_cpp.server`.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib.util
import random
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from checkpoints import write_llama
from rich.console import Console
from rich.table import Table

VOCABULARY = 32000
LENGTHS = (8, 16, 32, 64, 128)


@dataclass
class Seen:
    """What clients saw of one server: seconds."""

    first: list[float] = field(default_factory=list)
    between: list[float] = field(default_factory=list)
    tokens: int = 0
    took: float = 0.0

    @property
    def rate(self) -> float:
        return self.tokens / self.took


def write_tokenizer(folder: Path) -> None:
    """A word for each token: `t0 t1 …`. So each token that a random model makes is text, which a stream shows."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({f"t{i}": i for i in range(VOCABULARY)}, unk_token="t0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.decoder = decoders.WordPiece(prefix="##")
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(folder)


def write_models(folder: Path, layers: int) -> tuple[Path, Path]:
    """The checkpoint, and what it is in bf16."""
    import ctfp8_compile as ctfp8

    ours, plain = folder / "fp8", folder / "bf16"
    ours.mkdir()
    write_llama(ours, layers)
    ctfp8.from_pretrained(ours, dequantize=True).save_pretrained(plain)
    for one in (ours, plain):
        write_tokenizer(one)
    return ours, plain


@contextmanager
def server(command: Sequence[str], port: int, log: Path) -> Iterator[str]:
    """Runs it until the block ends; its address, once it answers."""
    with log.open("w") as out:
        process = subprocess.Popen([sys.executable, *command], stdout=out, stderr=out)
        try:
            while True:
                with suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/v1/models"):
                    break
                if process.poll() is not None:
                    raise SystemExit(f"{command[1]} ended:\n{log.read_text()[-2000:]}")
                time.sleep(0.2)
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            process.terminate()
            process.wait()


async def one_client(client: object, model: str, prompts: Sequence[str], new_tokens: int, seen: Seen) -> None:
    for prompt in prompts:
        last = begin = time.perf_counter()
        stream = await client.completions.create(  # type: ignore[attr-defined]
            model=model, prompt=prompt, max_tokens=new_tokens, temperature=0, stream=True
        )
        async for chunk in stream:
            if not chunk.choices or not chunk.choices[0].text:
                continue
            now = time.perf_counter()
            (seen.between if last > begin else seen.first).append(now - last)
            seen.tokens += 1
            last = now


async def ask(address: str, model: str, prompts: Sequence[Sequence[str]], new_tokens: int, seen: Seen) -> None:
    """All clients at a time."""
    from openai import AsyncOpenAI

    async with AsyncOpenAI(base_url=address, api_key="none", max_retries=0, timeout=3600) as client:
        begin = time.perf_counter()
        await asyncio.gather(*(one_client(client, model, mine, new_tokens, seen) for mine in prompts))
        seen.took += time.perf_counter() - begin


def table(clients: int, results: dict[str, Seen]) -> Table:
    shown = Table(f"{clients} at a time", "tokens/s", "ctfp8 is", "first token", "p95", "between", "p95", box=None)
    for name, seen in results.items():
        times = [t for values in (seen.first, seen.between) for t in middle_and_most(values)]
        rate = f"{results['ctfp8'].rate / seen.rate:.2f}×"
        shown.add_row(name, f"{seen.rate:.1f}", rate, *(f"{t * 1e3:.0f} ms" for t in times))
    return shown


def middle_and_most(values: list[float]) -> tuple[float, float]:
    ordered = sorted(values) or [float("nan")]
    return statistics.median(ordered), ordered[min(len(ordered) - 1, int(0.95 * len(ordered)))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=22)
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 4, 16, 64])
    parser.add_argument("--requests", type=int, default=2, help="of each client")
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--port", type=int, default=8310)
    parser.add_argument("--gguf", type=Path)
    options = parser.parse_args()
    console, batch = Console(), max(options.clients)
    with tempfile.TemporaryDirectory() as temporary, ExitStack() as servers:
        folder = Path(temporary)
        ours, plain = write_models(folder, options.layers)
        room = str(batch * (max(LENGTHS) + options.new_tokens) // 64 + 2 * batch)
        commands = {
            "ctfp8": ["-m", "ctfp8_compile", "serve", str(ours), "--max-batch", str(batch), "--context", "256", "--name", "m"],
            "transformers, bf16": [
                "-m", "transformers.cli.transformers", "serve", str(plain), "--continuous-batching", "--device", "cpu",
                "--attn-implementation", "sdpa", "--cb-block-size", "64", "--cb-num-blocks", room,
                "--cb-max-batch-tokens", "512",
            ],
        }  # fmt: skip
        if options.gguf is not None:
            if importlib.util.find_spec("llama_cpp") is None:
                raise SystemExit("--gguf needs llama.cpp's server: pip install 'llama-cpp-python[server]'")
            commands["llama.cpp"] = [
                "-m",
                "llama_cpp.server",
                "--model",
                str(options.gguf),
                "--n_ctx",
                str(256 * batch),
            ]
        addresses = {}
        for i, (name, command) in enumerate(commands.items()):
            port = options.port + i
            with console.status(f"{name} starts …"):
                addresses[name] = servers.enter_context(
                    server([*command, "--port", str(port)], port, folder / f"{i}.log")
                )
        names = {"ctfp8": "m", "transformers, bf16": str(plain), "llama.cpp": "m"}
        chosen = random.Random(0)
        for name, address in addresses.items():  # the first request of a process is slower
            asyncio.run(ask(address, names[name], [["t1 t2 t3"]] * 2, 3, Seen()))
        for clients in options.clients:
            results = {name: Seen() for name in addresses}
            for _ in range(options.rounds):
                prompts = [
                    [
                        " ".join(f"t{chosen.randrange(VOCABULARY)}" for _ in range(chosen.choice(LENGTHS)))
                        for _ in range(options.requests)
                    ]
                    for _ in range(clients)
                ]
                for name, address in addresses.items():
                    asyncio.run(ask(address, names[name], prompts, options.new_tokens, results[name]))
            console.print(table(clients, results))


if __name__ == "__main__":
    main()
