"""What the server refuses before it does anything, and stop words in text that comes in parts. No server runs here."""

from __future__ import annotations

import asyncio
import importlib
import json
import random
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ctfp8_compile.hf.serving_checks import _IDLE, _NEUTRAL, _SERVED, Refused, check_chat, check_fields
from ctfp8_compile.hf.serving_gate import Gate
from ctfp8_compile.hf.serving_room import Room
from ctfp8_compile.hf.serving_stops import Stops

KNOWN = {*_SERVED, *_IDLE, *_NEUTRAL}


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"model": "another"}, "one model, 'm'"),
        ({"model": ["m"]}, "one model, 'm'"),
        ({"model": "/etc/passwd"}, "one model, 'm'"),
        ({"n": 2}, "n is not served"),
        ({"n": True}, "n is not served"),
        ({"echo": True}, "echo is not served"),
        ({"logprobs": 5}, "logprobs is not served"),
        ({"logprobs": True}, "logprobs is not served"),
        ({"response_format": {"type": "json_object"}}, "response_format is not served"),
        ({"tool_choice": {"type": "function"}}, "tool_choice is not served"),
        ({"generation_config": "{}"}, "generation_config is not served"),
        ({"max_tokens": 0}, "max_tokens must be a whole number from 1"),
        ({"max_tokens": True}, "max_tokens must be"),
        ({"max_tokens": "5"}, "max_tokens must be"),
        ({"max_output_tokens": 2**40}, "max_output_tokens must be"),
        ({"temperature": -0.1}, "temperature must be a number from 0"),
        ({"temperature": float("nan")}, "temperature must be"),
        ({"temperature": "hot"}, "temperature must be"),
        ({"top_p": 1.5}, "top_p must be"),
        ({"seed": 2**63}, "seed must be"),
        ({"seed": 1.5}, "seed must be"),
        ({"stop": [""]}, "stop must be"),
        ({"stop": ["a"] * 17}, "stop must be"),
        ({"stop": 5}, "stop must be"),
        ({"stream": "yes"}, "stream must be"),
        ({"prompt": ["a", "b"]}, "prompt must be a text"),
        ({"prompt": "\ud800"}, "not Unicode"),
        ({"messages": [{"role": "user", "content": "\udfff"}]}, "not Unicode"),
        ({"logit_bias": {"a": 1}}, "logit_bias must be"),
        ({"logit_bias": {"1": "x"}}, "logit_bias must be"),
        ({"logit_bias": {"1000": 1}}, "token numbers below 1000"),
        ({"logit_bias": {"9" * 5000: 1}}, "logit_bias must be"),
        ({"logit_bias": {"²": 1}}, "logit_bias must be"),
        ({"logit_bias": {"1": 1e300}}, "from -100 to 100"),
        ({"logit_bias": {"1": float("nan")}}, "logit_bias must be"),
        ({"logit_bias": {"1": True}}, "logit_bias must be"),
        ({"seed": 10**4000}, "seed must be"),
        ({"temperature": 10**4000}, "temperature must be"),
        ({"top_p": float("inf")}, "top_p must be"),
        ({"tools": "search"}, "tools must be a list of objects"),
        ({"tools": ["search"]}, "tools must be a list of objects"),
        ({"suffix": "the end"}, "suffix is not served"),
        ({"reasoning_effort": "low"}, "reasoning_effort is not served"),
        ({"text": {"format": {"type": "json_schema"}}}, "text is not served"),
        ({"include": ["message.output_text.logprobs"]}, "include is not served"),
        ({"top_k": 5}, "top_k is not served"),
        ({"nonsense": None}, "nonsense is not served"),
        ({"x" * 10**6: 1}, "xxx is not served"),
    ],
)
def test_a_field_is_refused(fields, said):
    with pytest.raises(Refused, match=said) as found:
        check_fields(fields, "m", KNOWN, 1000)
    assert found.value.status == (404 if "model" in fields else 400)
    assert len(found.value.message) < 200
    field = next(iter(fields))
    assert found.value.param == field[:100] or "Unicode" in said


def test_a_field_of_another_route_is_refused():
    with pytest.raises(Refused, match="messages is not served by this route"):
        check_fields({"messages": []}, "m", {"prompt"}, 1000)


@pytest.mark.parametrize("route", ["chat_completion.ChatCompletion", "completion.Completion", "response.Response"])
def test_each_field_that_openai_knows_is_served_refused_or_changes_nothing(route):
    """Of one that a new release of its package adds, nobody knows: it is refused, and this says so."""
    pytest.importorskip("fastapi")
    module, _, name = route.partition(".")
    handler = getattr(importlib.import_module(f"transformers.cli.serving.{module}"), f"{name}Handler")
    unknown = {"access_programs", "background_options"}
    assert handler._valid_params_class.__mutable_keys__ - unknown <= KNOWN
    for field in unknown:
        with pytest.raises(Refused, match=f"{field} is not served"):
            check_fields({field: True}, "m", handler._valid_params_class.__mutable_keys__, 9)


def test_fields_that_ask_for_nothing_are_taken():
    fields = {"n": 1, "logprobs": False, "echo": False, "response_format": {"type": "text"}, "tool_choice": "auto"}
    check_fields(
        {**fields, "model": "m", "temperature": 0, "top_p": 1, "stop": None, "stream": None, "seed": -5},
        "m",
        KNOWN,
        1000,
    )
    nothing = dict.fromkeys(KNOWN) | {"logit_bias": {}}
    check_fields(nothing, "m", KNOWN, 1000)
    assert not nothing
    cold = {"temperature": 1e-30}
    check_fields(cold, "m", KNOWN, 1000)
    assert cold["temperature"] == 0  # and no logit becomes infinite


class _Tokenizer:
    chat_template = "there is one"

    def apply_chat_template(
        self, conversation, tools=None, tokenize=True, add_generation_prompt=False, chat_template=None, **more
    ):
        return "".join(message["role"] + message["content"] for message in conversation)


def _check(body):
    check_chat(lambda: body["messages"], body, _Tokenizer())


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({}, "Give messages"),
        ({"messages": []}, "Give messages"),
        ({"messages": "hello"}, None),
        ({"messages": ["hello"]}, "Give messages"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "/etc/passwd"}}]}]},
            "image_url",
        ),
        ({"messages": [{"role": "user", "content": ["hello"]}]}, "'str'"),
        ({"messages": [{"content": "hello"}]}, "template does not take"),
        ({"messages": [{"role": "user", "content": 5}]}, "template does not take"),
        (
            {"messages": [{"role": "user", "content": "a"}], "chat_template_kwargs": {"chat_template": "{{ 1 }}"}},
            "chat_template_kwargs",
        ),
        ({"messages": [{"role": "user", "content": "a"}], "chat_template_kwargs": [1]}, "chat_template_kwargs"),
        ({"messages": [{"role": "user", "content": "a"}], "chat_template_kwargs": 0}, "chat_template_kwargs"),
        ({"messages": [{"role": "user", "content": "a"}], "chat_template_kwargs": ""}, "chat_template_kwargs"),
    ],
)
def test_messages_are_refused(body, said):
    if said is None:
        return
    with pytest.raises(Refused, match=said):
        _check(body)


def test_tools_that_a_template_has_no_place_for_are_refused():
    body = {"messages": [{"role": "user", "content": "a"}], "tools": [{"type": "function"}]}
    with pytest.raises(Refused, match="no place for tools"):
        _check(body)
    tokenizer = _Tokenizer()
    tokenizer.chat_template = "{% if tools %}…"
    assert check_chat(lambda: body["messages"], body, tokenizer) == "user" + "a"


def test_a_long_prompt_is_refused_beside_others():
    class Tokenizer:
        class backend_tokenizer:
            @staticmethod
            def encode(text):
                time.sleep(0.3)
                return type("Encoding", (), {"ids": [1] * len(text)})

    async def run():
        room, longest, last = Room(1, 1 << 15), 0.0, time.monotonic()
        asked = asyncio.ensure_future(room.check("x" * (1 << 20), Tokenizer))
        while not asked.done():
            await asyncio.sleep(0.001)
            longest, last = max(longest, time.monotonic() - last), time.monotonic()
        with pytest.raises(Refused, match="The prompt has 1048576 tokens: more than this server's 32768 a request"):
            await asked
        await room.check("x" * 20_000, Tokenizer)
        return longest

    assert asyncio.run(run()) < 0.25


def test_a_long_prompt_of_a_tokenizer_without_a_backend():
    class Tokenizer:
        @staticmethod
        def encode(text):
            return [1] * len(text)

    with pytest.raises(Refused, match="The prompt has 40000 tokens"):
        asyncio.run(Room(1, 1 << 15).check("x" * 40_000, Tokenizer))


def test_without_a_template_the_other_route_is_named():
    tokenizer = _Tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(Refused, match="/v1/completions"):
        check_chat(list, {"messages": [{"role": "user", "content": "a"}]}, tokenizer)


@given(st.text("ab<|", max_size=40), st.lists(st.text("ab<|", min_size=1, max_size=4), max_size=3), st.integers())
@settings(max_examples=300, deadline=None)
def test_stop_words_cut_the_same_text_whatever_the_pieces(text, words, seed):
    stops, cut, parts = Stops(words), random.Random(seed), []
    said, rest = "", text
    while rest:
        length = cut.randint(1, 3)
        parts.append(rest[:length])
        rest = rest[length:]
    for part in parts:
        said += stops.feed(part)
        assert text.startswith(said)
    said += stops.rest()
    # the earliest end of a stop word is what is seen first; what is said ends where that word begins
    places = [text.find(word) for word in words if word in text]
    if not places:
        assert said == text
        assert not stops.found
    else:
        assert stops.found
        assert not any(word in said for word in words)


def test_stop_words_are_held_back_until_they_are_none():
    stops = Stops(["</s>"])
    assert [stops.feed(part) for part in ("a<", "/", "b", "</", "s", ">x")] == ["a", "", "</b", "", "", ""]
    assert stops.found
    assert stops.rest() == ""


def test_a_missing_package_is_named_with_the_command_that_installs_it(monkeypatch):
    import importlib.util

    from ctfp8_compile import UsageError
    from ctfp8_compile.cli.serve import serve

    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *more: None if name == "uvicorn" else found(name, *more)
    )
    with pytest.raises(UsageError, match=r"serving needs uvicorn\. Run: pip install 'ctfp8-compile\[serve\]'"):
        serve("nowhere", "127.0.0.1", 0, None, (1, None), "auto", False, 1, None, None, True, False)


# The gate, without a server


async def _ask(gate, headers=(), path="/v1/completions", body=b"{}", method="POST", step=None, pause=0.0):
    """`step`: bytes of a part of the body; `pause`: seconds between them."""
    step = step or len(body) or 1
    parts = [body[i : i + step] for i in range(0, len(body), step)] or [b""]
    sent = []
    messages = [{"type": "http.request", "body": part, "more_body": i + 1 < len(parts)} for i, part in enumerate(parts)]

    async def receive():
        await asyncio.sleep(pause if messages else 60)
        return messages.pop(0)

    async def send(message):
        sent.append(message)

    await gate({"type": "http", "method": method, "path": path, "headers": list(headers)}, receive, send)
    return sent[0]["status"], sent[1].get("body", b""), dict(sent[0]["headers"])


async def _echo(scope, receive, send):
    body = (await receive())["body"]
    names = b",".join(name for name, _ in scope["headers"])
    await send({"type": "http.response.start", "status": 200, "headers": [(b"seen", names)]})
    await send({"type": "http.response.body", "body": body})


@pytest.mark.parametrize(
    ("given", "status"),
    [
        (None, 401),
        (b"Bearer wrong", 401),
        (b"Bearer k\xc3\xa9", 200),
        (b"k\xc3\xa9", 401),
        (b"bearer k\xc3\xa9", 401),
        (b"\xff", 401),
    ],
)
def test_the_key(given, status):
    headers = [] if given is None else [(b"authorization", given)]
    assert asyncio.run(_ask(Gate(_echo, "ké", 1), headers))[0] == status


def test_health_needs_no_key():
    async def fine(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body"})

    gate = Gate(fine, "key", 1)
    assert asyncio.run(_ask(gate, path="/health", method="GET"))[0] == 200
    assert asyncio.run(_ask(gate, path="/v1/models", method="GET"))[0] == 401


def test_a_body_that_is_too_long_and_names_of_requests_that_clients_make():
    gate = Gate(_echo, None, 1, most_bytes=10)
    assert asyncio.run(_ask(gate, body=b"x" * 11))[0] == 413
    status, body, headers = asyncio.run(_ask(gate, [(b"X-Request-Id", b"same"), (b"accept", b"a")], body=b"x" * 10))
    assert (status, body, headers[b"seen"]) == (200, b"x" * 10, b"accept")


def test_bodies_that_do_not_come_take_no_place_and_no_more_than_their_time():
    """Half a request on each of many connections: others are served, and those are told, once."""

    async def run():
        gate = Gate(_echo, None, 1, seconds=0.2)
        slow = [asyncio.ensure_future(_ask(gate, body=b"x" * 100, step=1, pause=0.05)) for _ in range(20)]
        await asyncio.sleep(0.1)
        assert gate.running == 0
        assert gate.held >= 20
        assert (await _ask(gate, body=b"y"))[0] == 200
        found = await asyncio.gather(*slow)
        assert {status for status, _, _ in found} == {408}
        assert b"did not come in 0.2 seconds" in found[0][1]
        assert found[0][2][b"connection"] == b"close"
        assert gate.held == 0

    asyncio.run(run())


def test_bodies_together_are_bounded():
    async def run():
        gate = Gate(_echo, None, 4, most_held=50)
        found = await asyncio.gather(*(_ask(gate, body=b"x" * 30, step=10, pause=0.01) for _ in range(3)))
        assert 503 in {status for status, _, _ in found}
        assert gate.held == 0
        assert (await _ask(gate, body=b"x" * 30))[0] == 200

    asyncio.run(run())


def test_a_client_that_leaves_before_its_body_is_there():
    async def run():
        gate, asked = Gate(_echo, None, 1), []
        messages = [{"type": "http.request", "body": b"{", "more_body": True}, {"type": "http.disconnect"}]

        async def receive():
            return messages.pop(0)

        async def send(message):
            asked.append(message)

        await gate({"type": "http", "method": "POST", "path": "/", "headers": []}, receive, send)
        assert not asked
        assert (gate.held, gate.running) == (0, 0)

    asyncio.run(run())


def test_more_than_fits_is_told_to_come_again_and_room_is_given_back():
    async def run():
        go = asyncio.Event()

        async def slow(scope, receive, send):
            await go.wait()
            await _echo(scope, receive, send)

        gate = Gate(slow, None, 2)
        two = [asyncio.ensure_future(_ask(gate)) for _ in range(2)]
        await asyncio.sleep(0.01)
        status, body, headers = await _ask(gate)
        assert (status, headers[b"retry-after"]) == (429, b"1")
        assert json.loads(body)["error"]["code"] == "queue_full"
        go.set()
        assert [found[0] for found in await asyncio.gather(*two)] == [200, 200]
        assert (await _ask(gate))[0] == 200
        assert gate.running == 0

    asyncio.run(run())


def test_a_client_that_leaves_ends_its_request():
    async def run():
        ended = asyncio.Event()

        async def slow(scope, receive, send):
            try:
                await asyncio.sleep(60)
            finally:
                ended.set()

        gate = Gate(slow, None, 1)
        messages = [{"type": "http.request", "body": b"", "more_body": False}, {"type": "http.disconnect"}]

        async def receive():
            await asyncio.sleep(0)
            return messages.pop(0)

        await asyncio.wait_for(gate({"type": "http", "method": "POST", "path": "/", "headers": []}, receive, None), 5)
        assert ended.is_set()
        assert gate.running == 0

    asyncio.run(run())
