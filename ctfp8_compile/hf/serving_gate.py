"""What stands before the server, at the level of ASGI: the key, the length of a request, the queue, clients that leave."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import json
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from .serving_checks import answer

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]


class Gate:
    """An ASGI application that lets through to another what is admitted.

    A request is read whole before it is let through, and takes a place only then, so that those who send nothing take none.
    From then on its connection is watched: when the client leaves, the request's task is cancelled, whatever it waits for.

    Args:
        key: what clients must send as `Authorization: Bearer …`; None asks for none. `/health` is open.
        most: requests at a time, running and waiting; those beyond are answered with 429.
        most_bytes: of a request's body.
        most_held: bytes of all bodies that are being read.
        seconds: in which a body has to come.
    """

    def __init__(
        self, app: Any, key: str | None, most: int, most_bytes: int = 4 << 20, most_held: int = 64 << 20, seconds: float = 60
    ):  # fmt: skip
        self.app, self.most, self.most_bytes, self.most_held, self.seconds = app, most, most_bytes, most_held, seconds
        self._key = None if key is None else b"Bearer " + key.encode()
        self.running = self.held = 0

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        # Clients name their requests as they like, and two alike: names that keep requests apart are made here.
        headers = [(name, value) for name, value in scope["headers"] if name.lower() != b"x-request-id"]
        scope = {**scope, "headers": headers}
        given = dict(headers).get(b"authorization", b"")
        if self._key is not None and scope["path"] != "/health" and not hmac.compare_digest(given, self._key):
            await _refuse(send, 401, "Wrong or missing key. Send it as Authorization: Bearer KEY.", "invalid_api_key")
        elif scope["method"] != "POST":
            await self.app(scope, receive, send)
        elif (body := await self._body(receive, send)) is None:
            pass
        elif self.running >= self.most:
            await _refuse(send, 429, f"{self.running} requests are running or waiting. Ask again soon.", "queue_full")
        else:
            self.running += 1
            try:
                await self._let_through(scope, receive, send, body)
            finally:
                self.running -= 1

    async def _body(self, receive: Receive, send: Send) -> bytes | None:
        """What a request holds; None where that was refused, or the client has left."""
        body, left = bytearray(), False

        async def read() -> tuple[int, str, str] | None:
            """Why it is refused: a status, a sentence, a code."""
            nonlocal left
            more = True
            while more:
                message = await receive()
                left = message["type"] == "http.disconnect"
                part, more = message.get("body", b""), message.get("more_body", False)
                body.extend(part)
                self.held += len(part)
                if len(body) > self.most_bytes:
                    return 413, f"A request is at most {self.most_bytes} bytes long.", "too_long"
                if self.held > self.most_held:
                    return 503, "The server is reading too many long requests. Ask again soon.", "unavailable"
            return None

        try:
            refused = await asyncio.wait_for(read(), self.seconds)
        except asyncio.TimeoutError:
            refused = 408, f"The request did not come in {self.seconds:g} seconds.", "too_slow"
        finally:
            self.held -= len(body)
        if refused is not None:
            await _refuse(send, *refused)
        return None if left or refused is not None else bytes(body)

    async def _let_through(self, scope: MutableMapping[str, Any], receive: Receive, send: Send, body: bytes) -> None:
        gone, told = asyncio.Event(), False

        async def replay() -> Message:
            nonlocal told
            if told:
                await gone.wait()
                return {"type": "http.disconnect"}
            told = True
            return {"type": "http.request", "body": body, "more_body": False}

        async def leave() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass
            gone.set()

        serving, leaving = asyncio.ensure_future(self.app(scope, replay, send)), asyncio.ensure_future(leave())
        try:
            await asyncio.wait({serving, leaving}, return_when=asyncio.FIRST_COMPLETED)
            if not serving.done():
                serving.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await serving
                return
            await serving
        finally:
            for task in (serving, leaving):
                task.cancel()


async def _refuse(send: Send, status: int, message: str, code: str) -> None:
    body = json.dumps(answer(message, status, code)).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    if status in (429, 503):
        headers.append((b"retry-after", b"1"))
    if status in (408, 413):  # the rest of it may still come
        headers.append((b"connection", b"close"))
    if status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
