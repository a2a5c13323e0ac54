"""A server under test: in this process, on a port of its own, and what `generate` says to the same prompts."""

from __future__ import annotations

import contextlib
import json
import shutil
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from conftest import DATA

SHIPPED = DATA.parent.parent / "examples/models"
TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"


def chatting(folder: Path, source: Path = SHIPPED / "llama", dtype: str = "float32") -> Path:
    """A copy of a shipped model with a chat template, loaded in a dtype."""
    copy = shutil.copytree(source, folder / source.name)
    for file, more in (("config.json", {"dtype": dtype}), ("tokenizer_config.json", {"chat_template": TEMPLATE})):
        (copy / file).write_text(json.dumps(json.loads((copy / file).read_text()) | more))
    return copy


@contextlib.contextmanager
def serving(
    model: Any,
    tokenizer: Any,
    batch: int = 4,
    context: int = 256,
    one_by_one: bool = False,
    cache: Any = "auto",
    **options: Any,
) -> Iterator[tuple[str, Any]]:
    """Its address, and its engine."""
    import uvicorn

    from ctfp8_compile.cli.patience import Patient
    from ctfp8_compile.hf.serving import OneByOne, application, engine_of
    from ctfp8_compile.hf.serving_room import Room

    room = Room(batch, context, step=32)  # prompts are read in parts
    engine = OneByOne(model, room) if one_by_one else engine_of(model, room, cache)[0]
    address = socket.create_server(("127.0.0.1", 0))
    app = application(model, tokenizer, "served", engine, **options)
    server = uvicorn.Server(uvicorn.Config(app, http=Patient, log_level="critical", lifespan="off", ws="none"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [address]}, daemon=True)
    thread.start()
    try:
        while not server.started:
            time.sleep(0.01)
        yield f"http://127.0.0.1:{address.getsockname()[1]}", engine
    finally:
        server.should_exit = True
        thread.join(10)
        engine.stop()


def alone(model: Any, tokenizer: Any, prompt: str, new_tokens: int, **more: Any) -> str:
    """What `generate` says to this prompt."""
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    with torch.no_grad():
        out = model.generate(ids, max_new_tokens=new_tokens, do_sample=False, pad_token_id=0, **more)
    return tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
