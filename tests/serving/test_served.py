"""The server with real clients: tokens are those of `generate` alone, whoever else asks, leaves, asks for too much or fails."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import http.client
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import transformers
from support.served import alone, chatting, serving
from transformers import AutoTokenizer

import ctfp8_compile as ctfp8

pytest.importorskip("fastapi")
openai = pytest.importorskip("openai")
pytestmark = [pytest.mark.long, pytest.mark.filterwarnings("ignore")]
PROMPTS = ["Return a list of ", "def main(", "The quick brown fox", "import os\n", "x" * 90, "class A", "Raises ", "a"]
POISON = "\x07"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return chatting(tmp_path_factory.mktemp("served"))


@pytest.fixture(scope="module")
def loaded(folder):
    return ctfp8.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def want(loaded):
    return [alone(*loaded, prompt, 24) for prompt in PROMPTS]


@pytest.fixture(scope="module")
def server(folder, loaded):
    model, tokenizer = ctfp8.from_pretrained(folder), loaded[1]
    plain, fails = model.forward, {POISON: tokenizer(POISON).input_ids[-1]}

    def forward(input_ids=None, **kwargs):
        if (input_ids == fails[POISON]).any():
            raise RuntimeError("poisoned at /a/secret/place")
        return plain(input_ids=input_ids, **kwargs)

    model.forward = forward
    with serving(model, tokenizer, queue=8) as (url, engine):
        yield url, engine


@pytest.fixture
def client(server):
    return openai.OpenAI(base_url=f"{server[0]}/v1", api_key="none", max_retries=0, timeout=60)


def complete(client, prompt, stream=False, new_tokens=24, model="served", **more):
    found = client.completions.create(
        model=model, prompt=prompt, max_tokens=new_tokens, temperature=0, stream=stream, **more
    )
    return "".join(chunk.choices[0].text for chunk in found) if stream else found.choices[0].text


def post(url, body, path="/v1/completions"):
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    request = urllib.request.Request(url + path, data, {"content-type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=60) as found:
            return found.status, json.load(found)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def raw(url, body, path="/v1/completions"):
    """A socket on which a request was sent."""
    host, port = url.removeprefix("http://").split(":")
    found = socket.create_connection((host, int(port)))
    data = json.dumps(body).encode()
    found.sendall(
        b"POST %s HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
        % (path.encode(), len(data))
        + data
    )
    return found


def quiet(engine):
    """Waits until nothing runs, nor is anything remembered of what ran."""
    for _ in range(500):
        scheduler = engine._cb.batch_processor.scheduler
        if not engine._live and not scheduler.active_requests and not scheduler.waiting_requests:
            break
        time.sleep(0.02)
    assert not engine._live
    assert not engine._cb.output_router.result_handlers
    assert not scheduler.active_requests
    assert type(engine._cb.output_router.output_queue).__name__ == "_Nowhere"


@pytest.mark.parametrize("stream", [False, True])
def test_tokens_are_those_of_generate_alone(client, want, stream):
    assert [complete(client, prompt, stream) for prompt in PROMPTS] == want
    with ThreadPoolExecutor(8) as pool:
        for _ in range(2):  # and again, with prefixes that are cached
            assert list(pool.map(lambda prompt: complete(client, prompt, stream), PROMPTS)) == want


def test_a_long_prompt_read_in_parts_beside_others(loaded):
    model, tokenizer = loaded
    long = "def f(a, b):\n    return a\n" * 60
    expected = [alone(model, tokenizer, long, 16), alone(model, tokenizer, PROMPTS[0], 16)]
    with serving(model, tokenizer, context=2048) as (url, _), ThreadPoolExecutor(8) as pool:
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
        assert list(pool.map(lambda p: complete(client, p, new_tokens=16), [long, PROMPTS[0]] * 3)) == expected * 3


def test_a_model_without_a_paged_cache_is_served_one_request_after_another(loaded, want):
    with serving(*loaded, one_by_one=True) as (url, _), ThreadPoolExecutor(8) as pool:
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
        raw(url, {"prompt": PROMPTS[0], "max_tokens": 200}).close()
        for stream in (False, True):
            assert list(pool.map(lambda prompt: complete(client, prompt, stream), PROMPTS[:4])) == want[:4]  # noqa: B023
            word = want[0][9:12]
            assert complete(client, PROMPTS[0], stream, stop=[word]) == want[0][: want[0].find(word)]
        assert post(url, {"prompt": "x" * 300})[0] == 400


def test_chat_and_responses_use_the_checkpoints_template(client, loaded):
    messages = [{"role": "system", "content": "Be brief"}, {"role": "user", "content": "Return a list"}]
    expected = alone(*loaded, "system: Be brief\nuser: Return a list\nassistant:", 16)
    found = client.chat.completions.create(model="served", messages=messages, max_tokens=16, temperature=0)
    assert found.choices[0].message.content == expected
    assert found.usage.total_tokens == found.usage.prompt_tokens + 16
    chunks = list(
        client.chat.completions.create(model="served", messages=messages, max_tokens=16, temperature=0, stream=True)
    )
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == expected
    assert chunks[-1].choices[0].finish_reason == "length"
    assert chunks[-1].usage.completion_tokens == 16
    made = client.responses.create(
        model="served", instructions="Be brief", input="Return a list", max_output_tokens=16, temperature=0
    )
    assert made.output_text == expected
    events = list(
        client.responses.create(
            model="served",
            instructions="Be brief",
            input="Return a list",
            max_output_tokens=16,
            temperature=0,
            stream=True,
        )
    )
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == expected
    assert events[-1].type == "response.completed"


@pytest.mark.parametrize("stream", [False, True])
def test_stop_words_end_a_text_before_them(client, server, want, stream):
    for text, prompt in zip(want, PROMPTS, strict=True):
        word = text[9:12]
        before = text[: text.find(word)]
        assert complete(client, prompt, stream, stop=[word, "never there"]) == before
    found = client.completions.create(
        model="served", prompt=PROMPTS[0], max_tokens=24, temperature=0, stop=want[0][9:12]
    )
    assert found.choices[0].finish_reason == "stop"
    assert found.usage.completion_tokens < 24
    quiet(server[1])


def test_a_stream_ends_as_openais_does(server, want):
    with raw(server[0], {"prompt": PROMPTS[0], "max_tokens": 24, "temperature": 0, "stream": True}) as asked:
        said = b""
        while b"[DONE]" not in said:
            said += asked.recv(4096)
    lines = [line[6:] for line in said.split(b"\r\n") for line in line.split(b"\n") if line.startswith(b"data: ")]
    assert lines[-1] == b"[DONE]"
    assert "".join(json.loads(line)["choices"][0]["text"] for line in lines[:-1]) == want[0]


def test_connections_that_send_no_request_are_closed_and_hold_nobody_up(server, client, want, monkeypatch):
    from ctfp8_compile.cli.patience import Patient

    monkeypatch.setattr(Patient, "seconds", 1.0)
    host, port = server[0].removeprefix("http://").split(":")
    halves = [
        b"",
        b"P",
        b"POST /v1/completions HTTP/1.1\r\nHost: a\r\n",
        b"GET /health HTTP/1.1\r\nHost: a\r\n\r\nGET /",
    ]
    opened = [socket.create_connection((host, int(port))) for _ in range(100)]
    for i, one in enumerate(opened):
        one.sendall(halves[i % len(halves)])
    begin = time.monotonic()
    assert complete(client, PROMPTS[0]) == want[0]
    for one in opened:
        one.settimeout(10)
        while one.recv(4096):
            pass
        one.close()
    assert time.monotonic() - begin < 10


def test_sampling_is_each_requests_own(client, want):
    def sampled(seed, temperature=1.0, **more):
        found = client.completions.create(
            model="served", prompt=PROMPTS[0], max_tokens=24, seed=seed, temperature=temperature, **more
        )
        return found.choices[0].text

    first = sampled(1)
    with ThreadPoolExecutor(8) as pool:
        jobs = [pool.submit(complete, client, prompt) for prompt in PROMPTS]
        jobs += [pool.submit(sampled, seed) for seed in (1, 1, 2)]
        found = [job.result() for job in jobs]
    assert found[:8] == want  # those that do not sample beside those that do
    assert found[8:10] == [first, first]
    assert found[10] != first
    kinds = [
        {"seed": i, "temperature": t, "top_p": p} for i, (t, p) in enumerate([(0.3, 1), (0.7, 0.9), (1.5, 1), (2, 0.5)])
    ]
    each = [sampled(**kind) for kind in kinds]
    with ThreadPoolExecutor(8) as pool:
        jobs = [pool.submit(sampled, **kind) for kind in kinds * 2]
        assert [job.result() for job in jobs] == each * 2
    assert len({*each, want[0]}) >= 4
    assert sampled(3, top_p=1e-6) == want[0] == sampled(3, temperature=1e-9)
    banned = client.completions.create(
        model="served", prompt="a", max_tokens=4, temperature=0, logit_bias={"98": 100.0}
    )
    assert len(set(banned.choices[0].text)) == 1


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        (b"{", 400, "invalid_json"),
        (b"[]", 400, "invalid_json"),
        (b"\xff\xfe", 400, "invalid_json"),
        (b"[" * 100_000, 400, "invalid_json"),
        (b'{"prompt": "a", "max_tokens": ' + b"9" * 5000 + b"}", 400, "invalid_json"),
        (b'{"prompt": "a", "seed": ' + b"9" * 4000 + b"}", 400, "invalid_request"),
        (b'{"prompt": "a", "temperature": NaN}', 400, "invalid_request"),
        (b'{"max_tokens": 3}', 400, "invalid_request"),
        ({"prompt": "a", "logit_bias": {"99999": 1}}, 400, "invalid_request"),
        (b'{"prompt": "a", "nonsense": 1}', 400, "invalid_request"),
        (b'{"prompt": "a", "n": 3}', 400, "invalid_request"),
        (b'{"prompt": "a", "logprobs": 2}', 400, "invalid_request"),
        (b'{"prompt": "' + b"x" * (1 << 20) + b'"}', 400, "context_length_exceeded"),
        (b'{"prompt": "' + b"x" * (5 << 20) + b'"}', 413, "too_long"),
        ({"prompt": "a", "model": "gpt-4"}, 404, "model_not_found"),
        ({"prompt": "a", "model": "../../etc"}, 404, "model_not_found"),
        ({"prompt": "x" * 257}, 400, "context_length_exceeded"),
        ({"prompt": "a", "max_tokens": 256}, 400, "context_length_exceeded"),
        ({"prompt": ""}, 400, "invalid_request"),
        ({"prompt": 5}, 400, "invalid_request"),
        ({"prompt": "a", "stream": True, "max_tokens": 999}, 400, "context_length_exceeded"),
    ],
)
def test_what_is_refused_is_one_sentence(server, body, status, code):
    found = post(server[0], body)
    assert found[0] == status
    error = found[1]["error"]
    assert error["code"] == code or code is None
    assert error["message"]
    assert str(Path.cwd()) not in json.dumps(found[1])


VALUES = [
    None, True, False, 0, 1, -1, 5, 1.5, "", "a", "x" * 300, [], ["a"], [1], [[]], {}, {"a": 1}, {"1": 2}, 1e308, -1e308, 2**70,
    [{"role": "user", "content": "a"}], [{"role": "user", "content": None}], [{"role": None}], [{"type": "function"}], "\0", "😀",
]  # fmt: skip
SAMPLING = [
    "temperature",
    "top_p",
    "seed",
    "stop",
    "logit_bias",
    "frequency_penalty",
    "stream_options",
    "user",
    "model",
]
ROUTES = {
    "/v1/completions": ("prompt", "max_tokens", SAMPLING),
    "/v1/chat/completions": (
        "messages",
        "max_tokens",
        [*SAMPLING, "tools", "chat_template_kwargs", "max_completion_tokens"],
    ),
    "/v1/responses": (
        "input",
        "max_output_tokens",
        ["temperature", "top_p", "instructions", "tools", "metadata", "store"],
    ),
}


@pytest.mark.parametrize("path", ROUTES)
def test_no_body_makes_the_server_fail(server, path):
    """Fields with values of other kinds: 200, or a refusal that names one."""
    chosen, (text, limit, fields) = random.Random(0), ROUTES[path]
    fine = [{"role": "user", "content": "a"}] if text == "messages" else "a"
    for _ in range(200):
        body = {field: chosen.choice(VALUES) for field in chosen.sample(fields, chosen.randint(0, 3))}
        body |= {text: fine if chosen.random() < 0.8 else chosen.choice(VALUES), limit: 1}
        status, found = post(server[0], body, path)
        assert status in (200, 400, 404), (body, found)
        assert status == 200 or found["error"]["message"]


@pytest.mark.parametrize(
    "path", ["/load_model", "/reset", "/v1/systemone", "/v1/audio/transcriptions", "/docs", "/openapi.json", "/nowhere"]
)
def test_routes_that_do_more_than_make_text_are_not_there(server, path):
    status, found = post(server[0], {"model": "hub/other"}, path)
    assert status == 404
    assert found["error"]["message"]


def test_an_answer_has_no_limit_but_the_context(client):
    found = client.completions.create(model="served", prompt="def f(", temperature=0)
    assert found.usage.total_tokens <= 256
    assert found.choices[0].finish_reason in ("stop", "length")


def test_clients_that_leave_change_nothing(client, server, want):
    """While waiting, while their prompt is read, while tokens come; streamed or not."""
    url, engine = server
    with ThreadPoolExecutor(8) as pool:
        jobs = [pool.submit(complete, client, prompt, i % 2 == 0) for i, prompt in enumerate(PROMPTS[:4])]
        for i in range(12):
            left = raw(url, {"prompt": "leaving " * 20, "max_tokens": 90, "stream": i % 2 == 0})
            time.sleep(0.01 * i)
            left.close()
        assert [job.result() for job in jobs] == want[:4]
    quiet(engine)
    assert engine._cb.batch_processor.cache.compute_free_capacity() > 0.5


def test_more_requests_than_fit_are_told_so(server, want, client):
    url, engine = server  # 4 run, 8 wait
    held = [raw(url, {"prompt": "a" * (i + 1), "max_tokens": 200}) for i in range(12)]
    time.sleep(0.2)
    status, found = post(url, {"prompt": "one more"})
    assert (status, found["error"]["code"]) == (429, "queue_full")
    for one in held:
        one.close()
    quiet(engine)
    assert complete(client, PROMPTS[0]) == want[0]


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_that_makes_the_model_fail_fails_alone(client, server, want, stream):
    url, engine = server
    with ThreadPoolExecutor(8) as pool:
        jobs = [pool.submit(complete, client, prompt, stream) for prompt in PROMPTS[:4]]
        time.sleep(0.3)
        status, found = post(url, {"prompt": f"bad {POISON}", "max_tokens": 4})
        assert [job.result() for job in jobs] == want[:4]
    assert status == 500
    assert "secret" not in json.dumps(found)
    with raw(url, {"prompt": POISON, "stream": True}) as bad:
        bad.settimeout(20)
        said = b""
        while b"error" not in said:
            said += bad.recv(4096)
    assert b"secret" not in said
    assert {"message", "type", "code", "param"} == set(
        json.loads(said[said.index(b'{"error"') :].split(b"\n")[0])["error"]
    )
    with pytest.raises(openai.APIError, match="The model failed at this request"):
        complete(client, POISON, True)
    assert complete(client, PROMPTS[5], stream) == want[5]
    assert client.models.list().data[0].id == "served"
    with urllib.request.urlopen(f"{url}/health") as health:
        assert health.status == 200
    quiet(engine)


def resident():
    """Bytes of this process, without those that were freed and are kept for the next allocation."""
    gc.collect()
    with contextlib.suppress(AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
    return int(re.search(r"VmRSS:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024


def _many(url, count):
    """Short ones, streamed and not, that stop, that are refused, whose clients leave; of few words, which a tokenizer keeps."""

    def ask(i):
        body = {"prompt": f"{i % 7} " * (1 + i % 9), "max_tokens": 1 + i % 4, "stop": ["q"], "stream": i % 20 < 10}
        if i % 10 == 9:
            raw(url, body).close()
            return
        if i % 10 == 8:
            body["prompt"] = "a" * 300
        asked = http.client.HTTPConnection(url.removeprefix("http://"), timeout=60)  # urllib keeps some of each
        asked.request("POST", "/v1/completions", json.dumps(body), {"content-type": "application/json"})
        found = asked.getresponse()
        assert found.status in ((400,) if i % 10 == 8 else (200, 429)), found.read()
        found.read()
        asked.close()

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(ask, range(count)))


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
@pytest.mark.parametrize("count", [600, pytest.param(10_000, marks=pytest.mark.nightly)])
def test_memory_stays_flat_over_many_short_requests(server, count):
    url, engine = server
    transformers.logging.set_verbosity_error()  # as the command does: pytest keeps every line that is logged
    _many(url, 600)
    before = resident()
    _many(url, count)
    quiet(engine)
    grown = resident() - before
    assert grown < (2 << 20), f"{grown} bytes, {grown / before:.2%}"  # 2 % would be some 10 MB


@contextlib.contextmanager
def command(folder, *options):
    """`ctfp8 serve` as a process of its own: it, its address, and the file of what it says."""
    run = [sys.executable, "-m", "ctfp8_compile", "serve", str(folder), "--port", "0", "--context", "256", *options]
    log = folder.parent / "serve.log"
    with log.open("w") as out:
        process = subprocess.Popen(run, stderr=out, env={**os.environ, "TORCH_LOGS": "recompiles"})
    try:
        while not (found := re.search(r"^(\S+) at (http://127\.0\.0\.1:\d+)/v1", log.read_text(), re.M)):
            assert process.poll() is None, log.read_text()
            time.sleep(0.1)
        assert found[1] == "llama"
        yield process, found[2], log
    finally:
        process.kill()


def test_the_command_end_to_end(folder, want):
    """Another process: its progress, its key, its name for the model, and that it finishes what runs when it is ended."""
    with command(folder, "--max-batch", "4", "--eager", "--api-key", "secret") as (process, url, _):
        with pytest.raises(openai.AuthenticationError):
            openai.OpenAI(base_url=f"{url}/v1", api_key="wrong", max_retries=0).models.list()
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="secret", max_retries=0)
        assert [model.id for model in client.models.list()] == ["llama"]
        with ThreadPoolExecutor(4) as pool:
            jobs = [pool.submit(complete, client, prompt, model="llama") for prompt in PROMPTS[:4]]
            time.sleep(0.15)
            process.send_signal(signal.SIGINT)
            assert [job.result() for job in jobs] == want[:4]
        assert process.wait(20) == 0


@pytest.mark.parametrize("cache", ["auto", pytest.param("fp8", marks=pytest.mark.nightly)])
def test_the_compiled_server_end_to_end(folder, loaded, cache):
    """Completions and chats at a time, streamed and not, by OpenAI's client and by curl; nothing is compiled meanwhile."""

    def expected(prompt, new_tokens=24):
        kept = {"cache": ctfp8.dynamic_cache(loaded[0], "fp8")} if cache == "fp8" else {}
        return alone(*loaded, prompt, new_tokens, **kept)

    want = [expected(prompt) for prompt in PROMPTS]
    chats = [f"user: {prompt}\nassistant:" for prompt in PROMPTS]
    want_chats = [expected(chat) for chat in chats]
    with command(folder, "--cache", cache) as (process, url, log):
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=120)

        def chat(prompt, stream):
            found = client.chat.completions.create(
                model="llama",
                messages=[{"role": "user", "content": prompt}],
                max_tokens=24,
                temperature=0,
                stream=stream,
            )
            if not stream:
                return found.choices[0].message.content
            return "".join(chunk.choices[0].delta.content or "" for chunk in found)

        def curl(prompt):
            body = {"prompt": prompt, "max_tokens": 24, "temperature": 0}
            if shutil.which("curl") is None:
                return post(url, body)[1]["choices"][0]["text"]
            run = [
                "curl",
                "-s",
                f"{url}/v1/completions",
                "-H",
                "content-type: application/json",
                "-d",
                json.dumps(body),
            ]
            return json.loads(subprocess.run(run, capture_output=True, check=True).stdout)["choices"][0]["text"]

        before = log.read_text().count("Recompiling")
        assert before >= 2  # three graphs, which the warm-up made
        with ThreadPoolExecutor(16) as pool:
            jobs = [
                pool.submit(call, *arguments)
                for i, prompt in enumerate(PROMPTS)
                for call, *arguments in (
                    (lambda p, s: complete(client, p, s, model="llama"), prompt, i % 2 == 0),
                    (chat, prompt, i % 2 == 1),
                    (curl, prompt),
                )
            ]
            found = [job.result() for job in jobs]
            assert (found[::3], found[1::3], found[2::3]) == (want, want_chats, want)
            for _ in range(2):  # other sizes of batches
                assert list(pool.map(lambda p: complete(client, p, True, model="llama"), PROMPTS[:5])) == want[:5]
        streams = [
            client.completions.create(model="llama", prompt=p, max_tokens=120, temperature=0, stream=True)
            for p in PROMPTS[:3]
        ]
        begun = [next(stream).choices[0].text for stream in streams]
        process.send_signal(signal.SIGINT)
        for prompt, text, stream in zip(PROMPTS, begun, streams, strict=False):
            text += "".join(chunk.choices[0].text for chunk in stream)
            assert text == expected(prompt, 120)  # to the end
        assert process.wait(30) == 0
        assert log.read_text().count("Recompiling") == before
        assert "Traceback" not in log.read_text()


def test_an_address_that_is_taken_is_told_before_the_model_loads(folder):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        command = [sys.executable, "-m", "ctfp8_compile", "serve", str(folder), "--port", port]
        found = subprocess.run(command, capture_output=True, text=True, check=False)
    assert found.returncode == 1
    assert f"cannot listen on 127.0.0.1:{port}" in found.stderr
