"""A server with OpenAI's API, and clients that ask it: one text streamed, and several at a time.

    pip install 'ctfp8-compile[serve]'
    python examples/serve_and_ask.py [CKPT] [--eager]

The server is a process of its own, as `ctfp8 serve CKPT` in a shell; it compiles before it listens.
"""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from openai import OpenAI

SHIPPED = Path(__file__).parent / "models" / "llama"
PROMPTS = ["Return a list of ", "def main(", "class ", "Raises ", "import ", "The name of ", "for i in ", "if not "]


def ask(client: OpenAI, model: str, prompt: str) -> str:
    return client.completions.create(model=model, prompt=prompt, max_tokens=32, temperature=0).choices[0].text


def main() -> None:
    arguments = [a for a in sys.argv[1:] if a != "--eager"] or [str(SHIPPED)]
    command = [sys.executable, "-m", "ctfp8_compile", "serve", *arguments, "--port", "0", "--context", "256"]
    server = subprocess.Popen(
        [*command, *(["--eager"] if "--eager" in sys.argv else [])], stderr=subprocess.PIPE, text=True
    )
    try:
        assert server.stderr is not None
        found = None
        while found is None and (line := server.stderr.readline()):
            found = re.match(r"(\S+) at (http://\S+/v1)", line)
        if found is None:
            raise SystemExit("the server did not start")
        model, address = found.groups()
        print(f"{model} is served at {address}")
        client = OpenAI(base_url=address, api_key="none")

        print(PROMPTS[0], end="")
        stream = client.completions.create(model=model, prompt=PROMPTS[0], max_tokens=32, temperature=0, stream=True)
        for chunk in stream:
            print(chunk.choices[0].text, end="", flush=True)
        print()

        begin = time.monotonic()
        alone = [ask(client, model, prompt) for prompt in PROMPTS]
        middle = time.monotonic()
        with ThreadPoolExecutor(len(PROMPTS)) as pool:
            together = list(pool.map(lambda prompt: ask(client, model, prompt), PROMPTS))
        end = time.monotonic()
        print(f"{len(PROMPTS)} requests one by one: {middle - begin:.2f} s, at a time: {end - middle:.2f} s")
        print(f"the same texts: {sum(a == b for a, b in zip(alone, together, strict=True))} of {len(PROMPTS)}")
    finally:
        server.send_signal(signal.SIGINT)  # as Ctrl-C: it finishes what is under way
        server.wait()


if __name__ == "__main__":
    main()
