"""`ctfp8 serve`: a checkpoint behind OpenAI's API."""

from __future__ import annotations

import importlib.util
import signal
import socket
from pathlib import Path
from typing import Any, get_args

from ..checkpoint.place import is_folder
from ..counted import counted
from ..errors import UsageError
from ..hf.fp8_cache import CacheDtype
from ..hf.serving_room import Room
from ..inductor.progress import Progress
from ..inductor.recipe import compile
from .loading import device_of, load, load_tokenizer
from .terminal import err, escape

_NEEDED = ("fastapi", "uvicorn", "openai", "pydantic")
_LOOPBACK = ("127.0.0.1", "::1", "localhost")


def serve(
    checkpoint: str, host: str, port: int, device: str | None, room: tuple[int, int | None], cache: str, mtp: bool, queue: int,
    key: str | None, name: str | None, eager: bool, debug: bool,
) -> None:  # fmt: skip
    """Loads a checkpoint, warms it up, and serves it until Ctrl-C; requests under way are finished first.

    Args:
        room: requests at a time, and tokens of each (None: 4096, or what the model was made for).
        cache: `auto`, `fp8`, `bf16`.
        mtp: whether drafts are asked for, which there are none of.

    Raises:
        UsageError: a package is missing; the address is taken; the model generates no text, or its cache does not fit, or
            cannot be FP8; drafts are asked for.
    """
    if mtp:
        raise UsageError(
            "--mtp: transformers batches requests token by token, and makes no drafts for them. Serve without --mtp; for one "
            "text at a time, ctfp8 generate --mtp drafts."
        )
    if cache not in get_args(CacheDtype):
        raise UsageError(f"--cache {cache}: a cache is fp8, bf16 (the model's own dtype) or auto.")
    if missing := [package for package in _NEEDED if importlib.util.find_spec(package) is None]:
        raise UsageError(f"serving needs {', '.join(missing)}. Run: pip install 'ctfp8-compile[serve]'")
    if key is not None and not (key and key.isprintable()):
        raise UsageError("--api-key: a key is one or more printable characters.")
    where = device_of(device)
    with bound(host, port) as address:
        tokenizer = load_tokenizer(checkpoint)
        model = load(checkpoint, debug, device=where, text=True)
        batch, context = room
        made_for = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
        context = min(made_for or 4096, 4096) if context is None else context
        if made_for is not None and context > made_for:
            raise UsageError(f"--context {context}: this model was made for {counted(made_for, 'position')}.")
        name = name or (Path(checkpoint).resolve().name if is_folder(checkpoint) else checkpoint)
        if not eager:
            compile(model)
        app, engine = warmed_up(model, tokenizer, name, Room(batch, context), cache, key, queue)
        try:
            _run(app, address, name, host, key)
        finally:
            engine.stop()


def warmed_up(
    model: Any, tokenizer: Any, name: str, room: Room, cache: Any, key: str | None, queue: int
) -> tuple[Any, Any]:
    """The server's application, and its engine, which runs; what it compiles is compiled."""
    from ..hf.serving import application, engine_of

    progress = Progress("warming up")
    try:
        engine, why = engine_of(model, room, cache)
        engine.warm_up([[1] * length for length in (3, 7, 12) if length + 4 < room.context])
        if why is not None:
            err().print(
                escape(f"{type(model).__name__}: requests run one by one, not batched ({why})."), soft_wrap=True
            )
        return application(model, tokenizer, name, engine, key, queue), engine
    finally:
        progress.stop()


def bound(host: str, port: int) -> socket.socket:
    """A socket with this address, which accepts nothing yet: a long load need not end in an address that is taken."""
    try:
        domain, kind, proto, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        found = socket.socket(domain, kind, proto)
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind(address)
    except OSError as error:
        raise UsageError(f"cannot listen on {host}:{port} ({error.strerror}). Give another --host or --port.") from None
    return found


def _run(app: Any, address: socket.socket, name: str, host: str, key: str | None) -> None:
    import uvicorn

    from .patience import Patient

    server = uvicorn.Server(
        uvicorn.Config(app, http=Patient, log_level="warning", access_log=False, lifespan="off", ws="none")
    )
    for number in (signal.SIGINT, signal.SIGTERM):  # uvicorn raises them again once it has ended
        signal.signal(number, lambda *_: None)
    port = address.getsockname()[1]
    shown = f"[{host}]" if ":" in host else host
    err().print(
        f"{escape(name)} at http://{shown}:{port}/v1; Ctrl-C finishes what is under way and ends.", soft_wrap=True
    )
    if host not in _LOOPBACK and key is None:
        err().print("Whoever reaches this address may use it: --api-key asks for a key.", soft_wrap=True)
    server.run(sockets=[address])
