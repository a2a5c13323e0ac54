"""transformers' server for one model that is loaded already: its handlers, its engine and its answers, on our FP8 weights.

What is added is what a server for one model needs: requests are checked before anything is done with them, sampling and stop
words are each request's own, and only the routes that make text are there.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
from collections.abc import AsyncIterator
from typing import Any

import torch
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.exceptions import HTTPException
from transformers import GenerationConfig

from ..errors import UsageError
from .compat import (
    ChatCompletionHandler,
    CompletionHandler,
    GenerateManager,
    GenerationCancelled,
    GenerationState,
    ModelManager,
    ResponseHandler,
    StreamError,
    build_server,
)
from .fp8_cache import CacheDtype
from .paged_cache import paged_cache
from .serving_batch import FAILED, LOST, SEED, Batched
from .serving_checks import Refused, answer, check_chat, check_fields
from .serving_gate import Gate
from .serving_room import Room
from .serving_stops import Stops

log = logging.getLogger("ctfp8_compile")
ROUTES = ("/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/models", "/health")


def engine_of(model: Any, room: Room, cache: CacheDtype = "auto") -> tuple[Batched | OneByOne, str | None]:
    """What makes the tokens: requests batched, or, where transformers' paged cache does not fit the model, one by one and why.

    Raises:
        UsageError: the model generates no text; its cache does not fit in memory; it cannot be FP8, and is to be.
    """
    if not (hasattr(model, "generate") and model.can_generate()):
        raise UsageError(f"{type(model).__name__} does not generate text, so there is nothing to serve.")
    paged_cache(model, cache)
    batched = Batched(model, room)
    try:
        batched.start()
        batched.warm_up([[1] * 3], 2)
    except UsageError:
        raise
    except Exception as error:  # each layer of its own kind has its own way of not fitting
        batched.stop()
        log.debug("no continuous batching", exc_info=error)
        why = f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
        if cache == "fp8":
            raise UsageError(
                f"requests to {type(model).__name__} run one by one ({why}), with a cache in its dtype, not in FP8. Serve it "
                "with --cache bf16."
            ) from None
        return OneByOne(model, room), why
    return batched, None


def application(
    model: Any, tokenizer: Any, name: str, engine: Batched | OneByOne, key: str | None = None, queue: int = 64
) -> Gate:
    """The server, as an ASGI application.

    Args:
        name: what clients know the model by.
        engine: of `engine_of`.
        key: what clients must send; None asks for none.
        queue: requests that may wait while as many run as the engine has room for; those beyond are answered with 429.
    """
    if not hasattr(tokenizer, "_tokenizer"):
        raise UsageError(f"{type(tokenizer).__name__} cannot decode token by token. Give the folder a tokenizer.json.")
    manager, state = OneModel(name, model, tokenizer), _State(engine)
    handlers = [kind(model_manager=manager, generation_state=state) for kind in (_Chat, _Completions, _Responses)]
    app = build_server(manager, *handlers, None, None, generation_state=state)
    app.router.routes[:] = [route for route in app.router.routes if getattr(route, "path", None) in ROUTES]
    _answer_errors(app)
    return Gate(app, key, engine.room.batch + queue)


class OneModel(ModelManager):
    """A manager of models whose only one is loaded, stays, and is known by a name that is no place on this machine."""

    def __init__(self, name: str, model: Any, tokenizer: Any):
        self._served = (model, tokenizer)
        super().__init__(force_model=name)

    @staticmethod
    def process_model_name(model_id: str) -> str:
        return model_id

    def load_model_and_processor(self, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        return self._served

    def list_models(self, cache_dir: str | None = None) -> list[dict[str, Any]]:
        status = {"value": "loaded"}
        return [{"id": self.force_model, "object": "model", "created": 0, "owned_by": "ctfp8", "status": status}]

    def shutdown(self) -> None:
        """The model stays until the process ends."""


class OneByOne(GenerateManager):
    """One request after another, by `model.generate`, for models that have no paged cache."""

    def __init__(self, model: Any, room: Room):
        super().__init__()
        self.model, self.room = model, room

    def generate_streaming(
        self, model: Any, processor: Any, inputs: Any, gen_config: GenerationConfig, *args: Any, **kwargs: Any
    ) -> Any:
        self.room.limit(inputs["input_ids"].shape[-1], gen_config)
        queue, streamer = super().generate_streaming(model, processor, inputs, gen_config, *args, **kwargs)
        stops, enqueue = Stops(gen_config.stop_strings), streamer._enqueue

        def up_to_a_stop_word(item: Any) -> None:
            if isinstance(item, StreamError):
                log.error("a request failed: %s", item.msg)
                item = StreamError(FAILED)
            last = item is None or isinstance(item, StreamError)
            if last and (rest := stops.rest()):
                enqueue(rest)
            if last or type(item) is not str:
                enqueue(item)
            elif sure := stops.feed(item):
                enqueue(sure)

        streamer._enqueue = up_to_a_stop_word
        self._thread.submit(self._next)
        return queue, streamer

    def submit(self, fn: Any, *args: Any, **kwargs: Any) -> None:
        """What is to run once its streamer is ready."""
        self._next = fn

    async def generate_non_streaming(
        self, model: Any, processor: Any, inputs: Any, gen_config: GenerationConfig, request_id: str
    ) -> tuple[str, int, Any]:
        length = inputs["input_ids"].shape[-1]
        self.room.limit(length, gen_config)
        watch = _Watch()
        running = self.async_submit(
            model.generate, **inputs, generation_config=gen_config, tokenizer=processor, streamer=watch
        )
        running.add_done_callback(lambda done: done.cancelled() or done.exception())
        try:
            ids = (await asyncio.shield(running))[0, length:]
        except asyncio.CancelledError:
            watch.left = True
            raise
        stops = Stops(gen_config.stop_strings)
        text = stops.cut(processor.decode(ids, skip_special_tokens=True))
        if stops.found:
            gen_config.max_new_tokens = None  # not the length ended it
        return text, length, ids.tolist()

    def is_alive(self) -> bool:
        return True

    def warm_up(self, prompts: list[list[int]], new_tokens: int = 3) -> None:
        ids = torch.tensor(prompts[:1], device=self.model.device)
        self.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens, do_sample=False)


class _Watch:
    """A streamer that ends `generate` once its client has left."""

    left = False

    def put(self, value: Any) -> None:
        if self.left:
            raise GenerationCancelled

    def end(self) -> None:
        pass


class _State(GenerationState):
    """What makes tokens is one engine, whatever is asked for."""

    def __init__(self, engine: Batched | OneByOne):
        super().__init__(continuous_batching=isinstance(engine, Batched))
        self._engine, self.room = engine, engine.room

    def use_continuous_batching(self, model: Any, modality: Any) -> bool:
        return isinstance(self._engine, Batched)

    def get_manager(self, model_id: str, use_cb: bool = False) -> Any:
        return self._engine

    def is_cb_alive(self) -> bool:
        return self._engine.is_alive()

    def shutdown(self) -> None:
        self._engine.stop()


class _Checked:
    """What comes before transformers' handling of a request."""

    model_manager: Any

    generation_state: Any
    _valid_params_class: Any
    last = ""  # what a stream ends with

    async def handle_request(self, body: dict[str, Any], request_id: str) -> Any:
        model, tokenizer = self.model_manager.load_model_and_processor()
        vocabulary = model.config.get_text_config(decoder=True).vocab_size
        check_fields(body, self.model_manager.force_model, self._valid_params_class.__mutable_keys__, vocabulary)
        await self.generation_state.room.check(self._text(body), tokenizer)
        answered = await super().handle_request(body, request_id)  # type: ignore[misc]
        if isinstance(answered, StreamingResponse):
            answered.body_iterator = _ended(answered.body_iterator, self.last)
        return answered

    def _text(self, body: dict[str, Any]) -> str:
        """The whole prompt; raises `Refused` if there is none in a request of this kind."""
        raise NotImplementedError

    def _build_generation_config(self, body: dict[str, Any], *args: Any, **kwargs: Any) -> GenerationConfig:
        settings = super()._build_generation_config(body, *args, **kwargs)  # type: ignore[misc]
        if not any(body.get(limit) for limit in ("max_tokens", "max_completion_tokens", "max_output_tokens")):
            settings.max_new_tokens = None
        if body.get("temperature") or body.get("top_p") is not None:
            settings.do_sample = body.get("temperature") != 0
        if body.get("logit_bias"):
            settings.sequence_bias = {(int(token),): float(more) for token, more in body["logit_bias"].items()}
        setattr(settings, SEED, body.get("seed"))
        return settings


_DONE = "data: [DONE]\n\n"
#: How transformers' server streams that a request failed, and how OpenAI's API has it.
_FAILURES = {
    f'{{"error": "{said}"}}': json.dumps(answer(said, status, code))
    for said, status, code in ((FAILED, 500, "failed"), (LOST, 503, "unavailable"))
}


async def _ended(parts: Any, last: str) -> AsyncIterator[str]:
    """A stream with what it ends with, and failures as OpenAI's API has them."""
    async with contextlib.aclosing(parts):  # so that a client that leaves ends the request
        async for part in parts:
            failed = next((said for said in _FAILURES if said in part), None)
            yield part if failed is None else part.replace(failed, _FAILURES[failed])
            if failed is not None:
                return
    if last:
        yield last


class _Chat(_Checked, ChatCompletionHandler):
    last = _DONE

    def _text(self, body: dict[str, Any]) -> str:
        model, tokenizer = self.model_manager.load_model_and_processor()
        modality = self.model_manager.get_model_modality(model, processor=tokenizer)
        return check_chat(lambda: self.get_processor_inputs_from_messages(body["messages"], modality), body, tokenizer)


class _Responses(_Checked, ResponseHandler):
    def _text(self, body: dict[str, Any]) -> str:
        if body.get("prompt") is not None:
            raise Refused("prompt is not served here: give the text as input.", param="prompt")
        body.setdefault("stream", False)  # as OpenAI's API has it
        model, tokenizer = self.model_manager.load_model_and_processor()
        modality = self.model_manager.get_model_modality(model, processor=tokenizer)

        def messages() -> list[dict[str, Any]]:
            return self.get_processor_inputs_from_messages(self._normalize_input(body), modality)

        return check_chat(messages, {**body, "tools": self._normalize_tools(body.get("tools"))}, tokenizer)


class _Completions(_Checked, CompletionHandler):
    last = _DONE

    def _text(self, body: dict[str, Any]) -> str:
        if body.get("prompt") is None:
            raise Refused("Give a prompt: a text.", param="prompt")
        return str(body["prompt"])


def _answer_errors(app: FastAPI) -> None:
    """Errors are answered as OpenAI's API answers them; what only this machine needs to know goes to the log."""

    def said(status: int, message: str, code: str, param: str | None = None) -> JSONResponse:
        return JSONResponse(answer(message, status, code, param), status)

    async def refused(request: Request, error: Any) -> JSONResponse:
        return said(error.status, error.message, error.code, error.param)

    async def raised(request: Request, error: Any) -> JSONResponse:
        if error.status_code == 400:  # FastAPI's, of JSON that cannot be read
            return await unreadable(request, error)
        status = 400 if error.status_code == 422 else error.status_code
        return said(status, str(error.detail), "invalid_request" if status < 500 else "failed")

    async def unreadable(request: Request, error: Any) -> JSONResponse:
        return said(400, "The body is not a JSON object with content-type application/json.", "invalid_json")

    async def failed(request: Request, error: Any) -> JSONResponse:
        return said(500, "The server failed at this request; its log says why.", "failed")

    app.add_exception_handler(Refused, refused)
    app.add_exception_handler(HTTPException, raised)
    app.add_exception_handler(404, raised)
    app.add_exception_handler(405, raised)
    app.add_exception_handler(RequestValidationError, unreadable)
    app.add_exception_handler(Exception, failed)
