"""Requests batched continuously, as transformers' engine does it, with what its server leaves out: sampling of each request's
own, stop words, and an engine that is started again when it fails, with the requests that were under way.
"""

from __future__ import annotations

import asyncio
import dataclasses
import queue
import time
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import GenerationConfig

from ..errors import UsageError
from ..inductor.recipe import Compiled
from .compat import (
    CBGenerateManager,
    CBStreamer,
    ContinuousBatchingLogitsProcessor,
    ContinuousBatchingLogitsProcessorList,
    StreamError,
    response_events_to_chunks,
)
from .serving_checks import Refused
from .serving_room import Room
from .serving_stops import Stops

#: Where the server's settings of a request carry its seed.
SEED = "_ctfp8_seed"
FAILED = "The model failed at this request; the server's log says why."
LOST = "The server's engine failed and cannot be started again."


class Choice:
    """How one request's next token is chosen: what `generate` does to its logits, and a random state of its own."""

    def __init__(self, model: Any, settings: GenerationConfig, prompt: int, seed: int | None):
        self.processors = model._get_logits_processor(settings, input_ids_seq_length=prompt, device=model.device)
        self.sample = bool(settings.do_sample)
        self._random = torch.Generator(model.device)
        if self.sample:
            self._random.manual_seed(seed) if seed is not None else self._random.seed()

    @property
    def plain(self) -> bool:
        """Whether it is the likeliest token."""
        return not self.sample and not self.processors

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        """`scores` `[1, vocabulary]` with all but the chosen token at minus infinity; `ids` `[1, tokens]` come before it."""
        scores = self.processors(ids, scores)
        if self.sample:
            token = torch.multinomial(scores.softmax(-1), 1, generator=self._random)
        else:
            token = scores.argmax(-1, keepdim=True)
        return torch.full_like(scores, -torch.inf).scatter(1, token, 0.0)


class _EachItsOwn(ContinuousBatchingLogitsProcessor):
    """Applies each request's `Choice` to its row of a batch's logits; the engine then takes the largest of each row."""

    supported_kwargs: ClassVar[dict[str, type]] = {"choice": Choice}
    ignored_kwargs = ()

    def __init__(self) -> None:
        self._states: list[Any] = []

    def fill_defaults(self, int32_tensor: Tensor) -> None:
        int32_tensor.zero_()

    def prepare_tensor_args(self, requests_with_new_token: list[Any]) -> Tensor:
        self._states = [request.state for request in requests_with_new_token]
        return torch.zeros(len(self._states), dtype=torch.int32)

    def __call__(self, scores: Tensor, tensor_arg: Tensor) -> Tensor:
        for row, state in enumerate(self._states):
            choice = state.logit_processor_kwargs.get("choice")
            if choice is not None and not choice.plain:
                ids = torch.tensor([state.initial_tokens + state.generated_tokens], device=scores.device)
                scores[row : row + 1] = choice(ids, scores[row : row + 1])
        return scores


@dataclasses.dataclass(eq=False)
class _Request:
    """One that is running or waiting.

    Attributes:
        tell: called with all new tokens so far; says whether that is enough.
        over: called at the end, with why the request failed, or None.
        before: tokens that an engine made that has failed since.
    """

    name: str
    ids: list[int]
    most: int
    ends: Any
    choice: Choice
    tell: Callable[[list[int]], bool]
    over: Callable[[str | None], None]
    tokens: list[int] = dataclasses.field(default_factory=list)
    before: list[int] = dataclasses.field(default_factory=list)
    broken: bool = False
    settled: asyncio.Event = dataclasses.field(default_factory=asyncio.Event)


class Streamer(CBStreamer):
    """Text of tokens as they come, up to a stop word, for a queue that an answer is streamed from."""

    def __init__(
        self, engine: Batched, name: str, tokenizer: Any, queue: asyncio.Queue[Any], parser: Any, stops: Stops
    ):
        super().__init__(None, name, tokenizer, None, queue, response_parser=parser)
        self._engine, self._stops, self._prev_len = engine, stops, 0

    def put(self, tokens: list[int]) -> bool:
        new, self._prev_len = tokens[self._prev_len :], len(tokens)
        for token in new:
            self.total_tokens += 1
            text = self._decode_stream.step(self._tokenizer, token)
            if text is not None:
                self._say(self._stops.feed(text))
            if self._stops.found:
                return True
        return False

    def end(self) -> None:
        self._say(self._stops.rest())
        super().end()

    def _say(self, text: str) -> None:
        if not text:
            return
        if self._parser is None:
            self._queue.put_nowait(text)
            return
        for item in response_events_to_chunks(self._parser.feed(text)):
            self._queue.put_nowait(item)

    def cancel(self) -> None:
        self._engine.cancel(self._request_id)


class _Nowhere:
    """Where tokens go that nobody waits for: those made for a request between its cancelling and the engine's noticing."""

    def put(self, output: Any) -> None:
        pass

    def empty(self) -> bool:
        return True


class Batched(CBGenerateManager):
    """transformers' engine for continuous batching, kept running.

    A failure of the model ends transformers' engine, and every request with it. Here it is started again. The request that
    was alone under way is the one that fails; of several, each goes on alone with the tokens it has, so that one that makes
    the model fail is found, and the others' tokens are those they would have had.

    Its methods are called from the server's event loop; `start`, `warm_up` and `stop` before and after it runs.
    """

    def __init__(self, model: Any, room: Room):
        super().__init__(room.config())
        self.model, self.room = model, room
        self._live: dict[str, _Request] = {}
        self._waiting: list[_Request] = []
        self._recovery: asyncio.Task[None] | None = None
        self._lost: str | None = None

    def start(self) -> None:
        """Makes the cache and starts the engine's thread.

        Raises:
            UsageError: the cache does not fit in memory.
        """
        ends = self.model.generation_config.eos_token_id
        settings = GenerationConfig(do_sample=False, eos_token_id=-1 if ends is None else ends)
        engine = self.model.init_continuous_batching(settings, self._cb_config)
        engine.logit_processor = ContinuousBatchingLogitsProcessorList([_EachItsOwn()])
        engine.logit_processor.tensors_required = 1
        try:
            engine.batch_processor = engine._create_batch_processor()
        except MemoryError:
            raise UsageError(
                f"a key-value cache for {self.room.batch} requests of {self.room.context} tokens does not fit in memory. "
                "Serve fewer at a time (--max-batch), or shorter ones (--context)."
            ) from None
        engine.output_router.output_queue = _Nowhere()
        engine.start()
        self._cb = engine

    def warm_up(self, prompts: list[list[int]], new_tokens: int = 3) -> None:
        """Runs prompts together, to the end; what is to be compiled is then compiled."""
        self._cb.output_router.output_queue = queue.Queue()
        names = [self._cb.add_request(ids, max_new_tokens=new_tokens, eos_token_id=-1) for ids in prompts]
        for _ in names:
            found = None
            while found is None and self._cb.is_running():
                found = self._cb.get_result(timeout=1)
            if found is None or found.error is not None:
                fatal = self._cb.background_thread_status.fatal_error
                raise fatal or RuntimeError(getattr(found, "error", "the engine ended"))
        self._cb.output_router.output_queue = _Nowhere()

    def init_cb(self, model: Any, gen_config: GenerationConfig) -> None:
        """transformers' server calls it with each request: the engine runs already, for all of them."""

    def is_alive(self) -> bool:
        return self._lost is None

    @property
    def why_not_compiled(self) -> str | None:
        """Why steps are transformers' own though the model is compiled; None where they are graphs, or it is not."""
        return getattr(self._cb.model, "why", None) if isinstance(self.model.forward, Compiled) else None

    def generate_streaming(
        self, model: Any, processor: Any, inputs: Any, gen_config: GenerationConfig, request_id: str,
        response_parser: Any = None,
    ) -> tuple[asyncio.Queue[Any], Streamer]:  # fmt: skip
        text: asyncio.Queue[Any] = asyncio.Queue()
        stops = Stops(gen_config.stop_strings)
        streamer = Streamer(self, request_id, processor._tokenizer, text, response_parser, stops)

        def over(error: str | None) -> None:
            if error is not None:
                text.put_nowait(StreamError(error))
            streamer.end()

        self._submit(request_id, inputs["input_ids"], gen_config, streamer.put, over, stops)
        return text, streamer

    async def generate_non_streaming(
        self, model: Any, processor: Any, inputs: Any, gen_config: GenerationConfig, request_id: str
    ) -> tuple[str, int, list[int]]:
        stops, ids = Stops(gen_config.stop_strings), inputs["input_ids"]
        reader = Streamer(self, request_id, processor._tokenizer, asyncio.Queue(), None, stops)
        finished: asyncio.Future[None] = asyncio.get_running_loop().create_future()

        def over(error: str | None) -> None:
            if not finished.done():
                finished.set_result(None) if error is None else finished.set_exception(Refused(error, 500, "failed"))

        tell = reader.put if stops.words else lambda tokens: False
        request = self._submit(request_id, ids, gen_config, tell, over, stops)
        try:
            await finished
        finally:
            self.cancel(request_id)
        return stops.cut(processor.decode(request.tokens, skip_special_tokens=True)), len(ids), request.tokens

    def cancel(self, name: str) -> None:
        """Forgets a request: its client has left, or has what it wants."""
        request = self._live.pop(name, None)
        if request is None:
            return
        request.settled.set()
        if request in self._waiting:
            self._waiting.remove(request)
        elif self._cb is not None:
            with self._cb.output_router._lock:
                self._cb.output_router.result_handlers.pop(name, None)
            self._cb.cancel_request(name)

    def stop(self) -> None:
        if self._cb is not None and self._cb.is_running():
            self._cb.stop(block=True, timeout=10, hard_stop=True)

    def _submit(
        self, name: str, ids: list[int], settings: GenerationConfig, tell: Callable[[list[int]], bool],
        over: Callable[[str | None], None], stops: Stops,
    ) -> _Request:  # fmt: skip
        if self._lost is not None:
            raise Refused(self._lost, 503, "unavailable")
        most = self.room.limit(len(ids), settings)
        ends = settings.eos_token_id
        known = {ends} if isinstance(ends, int) else set(ends or ())
        choice = Choice(self.model, settings, len(ids), getattr(settings, SEED, None))

        def ended(error: str | None) -> None:
            if stops.found or (request.tokens and request.tokens[-1] in known):
                settings.max_new_tokens = None  # not the length ended it
            over(error)

        request = _Request(name, list(ids), most, ends, choice, tell, ended)
        self._live[name] = request
        if self._recovery is None:
            self._run(request)
        else:
            self._waiting.append(request)
        return request

    def _run(self, request: _Request) -> None:
        request.before, request.broken = list(request.tokens), False
        request.settled.clear()
        self._cb.register_result_handler(request.name, lambda output: self._came(request, output))
        self._cb.add_request(
            request.ids + request.before, request_id=request.name, max_new_tokens=request.most - len(request.before),
            streaming=True, eos_token_id=-1 if request.ends is None else request.ends, choice=request.choice,
        )  # fmt: skip

    def _came(self, request: _Request, output: Any) -> None:
        """What the engine has made of a request so far."""
        if self._live.get(request.name) is not request:
            return
        if output.error is not None:
            request.broken = True
            request.settled.set()
            if self._recovery is None:
                self._recovery = asyncio.get_running_loop().create_task(self._recover())
            return
        request.tokens = request.before + output.generated_tokens
        enough = request.tell(request.tokens)
        if enough and not output.is_finished():
            self.cancel(request.name)
        if enough or output.is_finished():
            self._end(request, None)

    def _end(self, request: _Request, error: str | None) -> None:
        self._live.pop(request.name, None)
        request.settled.set()
        request.over(error)

    async def _recover(self) -> None:
        try:
            await self._start_again()
            under_way = [request for request in self._live.values() if request not in self._waiting]
            if len(under_way) == 1:
                self._end(under_way.pop(), FAILED)
            for request in under_way:
                if self._live.get(request.name) is not request:
                    continue
                self._run(request)
                await request.settled.wait()
                if request.broken:
                    self._end(request, FAILED)
                    await self._start_again()
        except Exception as error:
            self._lost = LOST
            for request in list(self._live.values()):
                self._end(request, self._lost)
            raise error
        finally:
            self._recovery = None
            waiting, self._waiting = self._waiting, []
            for request in waiting:
                if self._live.get(request.name) is request:
                    self._run(request)

    async def _start_again(self) -> None:
        await asyncio.to_thread(self._cb.join, time.perf_counter())
        await asyncio.to_thread(self.start)
