"""Servers with OpenAI's API, asked by several clients at a time: ctfp8, transformers' in bf16, llama.cpp's Python one in Q8_0.

    python benchmarks/serving.py [--layers 22] [--clients 1 4 16 64] [--requests 2] [--most 64] [--new-tokens 24] [--wait 0]

Writes a random 1.1B Llama as FP8_DYNAMIC, as bf16 and, where `pip install 'llama-cpp-python[server]' gguf` was run, as
Q8_0. All servers run at the same time, and are asked in turn, while the others are stopped: each client sends `--requests`
requests, one after another (fewer where that were more than `--most` in all), with prompts of 8 to 64 tokens, and reads their
streams. Shown are tokens a second of all clients, ctfp8's as a multiple of each other's, the time to the first token and between
tokens (median, 95th percentile), the CPU seconds of each server, and how many cores other programs took meanwhile; then how
ctfp8 at many clients compares with ctfp8 at one, and what it compiled while it served. `--wait`: so many seconds at most, before
each server is asked, for a machine on which nothing else runs. llama.cpp's Python server runs one request
after another, so that four clients at most ask it.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib.util
import os
import random
import signal
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

import llamacpp
from checkpoints import write_llama
from rich.console import Console
from rich.table import Table

VOCABULARY = 32000
LENGTHS = (8, 16, 32, 64)
#: Clients at most of a server that runs one request after another: more would wait longer, and change nothing else.
SERIAL = 4
OURS, BF16, LLAMA_CPP = "ctfp8", "transformers, bf16", "llama.cpp, Q8_0"


@dataclass
class Seen:
    """What clients saw of one server: seconds."""

    first: list[float] = field(default_factory=list)
    between: list[float] = field(default_factory=list)
    tokens: int = 0
    took: float = 0.0
    cpu: float = 0.0
    others: float = 0.0

    @property
    def rate(self) -> float:
        return self.tokens / self.took


@dataclass(frozen=True)
class Server:
    """One that runs: `name` is what its model is asked for by."""

    process: subprocess.Popen[bytes]
    address: str
    name: str
    log: Path

    def cpu(self) -> float:
        """Seconds so far."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def busy() -> float:
    """CPU seconds of all programs since the machine started."""
    fields = [int(field) for field in Path("/proc/stat").read_text().splitlines()[0].split()[1:]]
    return (sum(fields) - fields[3] - fields[4]) / os.sysconf("SC_CLK_TCK")  # but idle, and waiting for a disk


def wait_for_quiet(seconds: float) -> None:
    """Until programs take less than a tenth of a core for two seconds, or for so long."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        begin, before = time.monotonic(), busy()
        time.sleep(2)
        if busy() - before < 0.1 * (time.monotonic() - begin):
            return


def words() -> list[str]:
    """A character for each token: so each token that a random model makes is text, which a stream shows."""
    return [chr(c) for c in (*range(0x4E00, 0xA000), *range(0xAC00, 0xD7A4))][:VOCABULARY]


def write_tokenizer(folder: Path) -> None:
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words())}, unk_token=words()[0]))
    made.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    made.decoder = decoders.Fuse()
    PreTrainedTokenizerFast(tokenizer_object=made).save_pretrained(folder)


def write_models(folder: Path, layers: int, gguf: bool) -> None:
    """`fp8`, `bf16` and, if it is wanted, `q8_0.gguf`."""
    import ctfp8_compile as ctfp8

    (folder / "fp8").mkdir()
    write_llama(folder / "fp8", layers)
    ctfp8.from_pretrained(folder / "fp8", dequantize=True).save_pretrained(folder / "bf16")
    for one in ("fp8", "bf16"):
        write_tokenizer(folder / one)
    if gguf:
        llamacpp.write_gguf(folder / "fp8", folder / "q8_0.gguf", words())


def commands(folder: Path, batch: int, cache: str, gguf: bool) -> dict[str, list[str]]:
    threads = str(len(os.sched_getaffinity(0)))
    pages = str(batch * (max(LENGTHS) + 64) // 64 + 2 * batch)
    found = {
        OURS: [
            "-m", "ctfp8_compile", "serve", str(folder / "fp8"), "--max-batch", str(batch), "--context", "256", "--name", "m",
            "--cache", cache,
        ],
        BF16: [
            "-m", "transformers.cli.transformers", "serve", str(folder / "bf16"), "--continuous-batching", "--device", "cpu",
            "--attn-implementation", "sdpa", "--cb-block-size", "64", "--cb-num-blocks", pages, "--cb-max-batch-tokens", "512",
        ],
    }  # fmt: skip
    if gguf:
        found[LLAMA_CPP] = [
            "-m", "llama_cpp.server", "--model", str(folder / "q8_0.gguf"), "--model_alias", "m", "--n_ctx", "256",
            "--n_threads", threads, "--n_threads_batch", threads, "--interrupt_requests", "false",
        ]  # fmt: skip
    return found


@contextmanager
def running(command: Sequence[str], port: int, name: str, log: Path) -> Iterator[Server]:
    """Runs it until the block ends."""
    with log.open("w") as out:
        environment = {**os.environ, "TORCH_LOGS": "recompiles"}
        process = subprocess.Popen(
            [sys.executable, *command, "--port", str(port)], stdout=out, stderr=out, env=environment
        )
        try:
            while True:
                with suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/v1/models"):
                    break
                if process.poll() is not None:
                    raise SystemExit(f"{command[1]} ended:\n{log.read_text()[-2000:]}")
                time.sleep(0.2)
            yield Server(process, f"http://127.0.0.1:{port}/v1", name, log)
        finally:
            process.send_signal(signal.SIGCONT)
            process.terminate()
            process.wait()


@contextmanager
def alone(server: Server, servers: Sequence[Server]) -> Iterator[None]:
    """The others are stopped."""
    others = [one for one in servers if one is not server]
    for one in others:
        one.process.send_signal(signal.SIGSTOP)
    try:
        yield
    finally:
        for one in others:
            one.process.send_signal(signal.SIGCONT)


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
            seen.tokens += len(chunk.choices[0].text)
            last = now


async def ask(server: Server, prompts: Sequence[Sequence[str]], new_tokens: int, seen: Seen) -> None:
    """All clients at a time."""
    from openai import AsyncOpenAI

    async with AsyncOpenAI(base_url=server.address, api_key="none", max_retries=0, timeout=3600) as client:
        begin, cpu, every, own = time.perf_counter(), server.cpu(), busy(), time.process_time()
        await asyncio.gather(*(one_client(client, server.name, mine, new_tokens, seen) for mine in prompts))
        seen.took += time.perf_counter() - begin
        took = server.cpu() - cpu
        seen.cpu += took
        seen.others += busy() - every - took - (time.process_time() - own)


def table(clients: int, results: dict[str, Seen]) -> Table:
    columns = ("tokens/s", "ctfp8 is", "first token", "p95", "between", "p95", "CPU", "others")
    shown = Table(f"{clients} at a time", *columns, box=None)
    for name, seen in results.items():
        times = [t for values in (seen.first, seen.between) for t in middle_and_most(values)]
        rate = f"{results[OURS].rate / seen.rate:.2f}×"
        shown.add_row(
            name,
            f"{seen.rate:.1f}",
            rate,
            *(f"{t * 1e3:.0f} ms" for t in times),
            f"{seen.cpu:.0f} s",
            f"{seen.others / seen.took:.1f}",
        )
    return shown


def middle_and_most(values: list[float]) -> tuple[float, float]:
    ordered = sorted(values) or [float("nan")]
    return statistics.median(ordered), ordered[min(len(ordered) - 1, int(0.95 * len(ordered)))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=22)
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 4, 16, 64])
    parser.add_argument("--requests", type=int, default=2, help="of each client")
    parser.add_argument("--most", type=int, default=64, help="requests of all clients")
    parser.add_argument("--new-tokens", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--cache", choices=["bf16", "fp8"], default="bf16", help="of ctfp8")
    parser.add_argument("--wait", type=float, default=0)
    parser.add_argument("--port", type=int, default=8310)
    options = parser.parse_args()
    console, batch, chosen = Console(), max(options.clients), random.Random(0)
    gguf = llamacpp.is_installed() and importlib.util.find_spec("sse_starlette") is not None
    if not gguf:
        console.print("llama.cpp's server is not installed, and left out: pip install 'llama-cpp-python[server]' gguf")
    with tempfile.TemporaryDirectory() as temporary, ExitStack() as stack:
        folder = Path(temporary)
        write_models(folder, options.layers, gguf)
        servers: dict[str, Server] = {}
        for i, (name, command) in enumerate(commands(folder, batch, options.cache, gguf).items()):
            model = str(folder / "bf16") if name == BF16 else "m"
            with console.status(f"{name} starts …"):
                servers[name] = stack.enter_context(running(command, options.port + i, model, folder / f"{i}.log"))
        for server in servers.values():  # the first request of a process is slower
            asyncio.run(ask(server, [[words()[5] * 3]] * 2, 3, Seen()))
        compiled = servers[OURS].log.read_text().count("Recompiling")
        results: dict[int, dict[str, Seen]] = {}
        for clients in options.clients:
            results[clients] = {name: Seen() for name in servers}
            for _ in range(options.rounds):
                count = max(1, min(options.requests, options.most // clients))
                prompts = [
                    ["".join(chosen.choices(words(), k=chosen.choice(LENGTHS))) for _ in range(count)]
                    for _ in range(clients)
                ]
                for name, server in servers.items():
                    mine = prompts[:SERIAL] if name == LLAMA_CPP else prompts
                    with alone(server, list(servers.values())):
                        wait_for_quiet(options.wait)
                        asyncio.run(ask(server, mine, options.new_tokens, results[clients][name]))
            console.print(table(clients, results[clients]))
        few, *more = ((n, results[n][OURS]) for n in sorted(results))
        for clients, seen in more:
            late = [middle_and_most(one.between)[1] for one in (seen, few[1])]
            console.print(
                f"ctfp8, {clients} clients against {few[0]}: {seen.rate / few[1].rate:.2f}× the tokens/s, "
                f"{late[0] / late[1]:.2f}× the time between tokens (p95)"
            )
        console.print(f"recompilations while serving: {servers[OURS].log.read_text().count('Recompiling') - compiled}")


if __name__ == "__main__":
    main()
