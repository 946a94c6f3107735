"""Engines elsewhere, and the dialect of local apps: what they say arrives as they said it, and what
goes wrong there is told here. The engines are a second server of ours, llama_cpp.server, and
sockets that misbehave."""

import contextlib
import json
import logging
import socket
import struct
import subprocess
import sys
import threading
import time

import httpx
import openai
import pytest

import conftest
import server
from features import downloads, elsewhere, models
from test_limits import HI, listening, wait_for

KEY, KEY_THERE = "sk-of-our-client", "sk-for-the-engine-there"
THERE = "org/there"  # what the second server's model is called, too
MODEL = str(conftest.ROOT / "models" / downloads.DEFAULT_MODEL)
SMALL = {"n_ctx": 512, "parallel": 2, "n_threads": 1}
CHAT = {"messages": HI, "max_tokens": 8, "temperature": 0}
APP = {"messages": HI, "config": {"temperature": 0, "maxTokens": 8}}
SYSTEM = [{"role": "system", "content": "You are a pirate."}, *HI,
          {"role": "assistant", "content": "Ahoy!"}, {"role": "user", "content": "Who are you?"}]
CHATS = ("/v1/chat/completions", "/chat", "/chat/stream")
OK, STREAM = b"HTTP/1.1 200 OK\r\n", b"Content-Type: text/event-stream\r\n"
HOLD, RESET = "hold", "reset"


class Fake:
    """An engine whose every connection gets the same bytes, in pieces with pauses between them.
    Then it closes; or resets; or holds, until it is closed at the other end."""

    def __init__(self, *pieces: bytes, pause=0.0, then=None):
        self.pieces, self.pause, self.then = pieces, pause, then
        self.requests: list[tuple[str, bytes]] = []  # head, body
        self.closed_at: list[float] = []
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.listener.getsockname()[1]}/v1"

    def __enter__(self):
        threading.Thread(target=self.accept, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()

    def accept(self):
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self.listener.accept()
                threading.Thread(target=self.serve, args=(connection,), daemon=True).start()

    def serve(self, connection):
        with connection, contextlib.suppress(OSError):
            file = connection.makefile("rb")
            head = b"".join(iter(file.readline, b"\r\n")).decode("latin-1")
            sizes = [line for line in head.lower().splitlines() if "content-length:" in line]
            self.requests.append((head, file.read(int(sizes[0].split()[1])) if sizes else b""))
            for piece in self.pieces:
                connection.sendall(piece)
                time.sleep(self.pause)
            if self.then == RESET:
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                file.close()
            if self.then == HOLD:
                with contextlib.suppress(ConnectionError):
                    file.read()
                self.closed_at.append(time.monotonic())


def reply(body: bytes | dict, status="200 OK", *headers: str) -> bytes:
    """A whole response."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    lines = [f"HTTP/1.1 {status}", *headers, f"Content-Length: {len(data)}", "\r\n"]
    return "\r\n".join(lines).encode() + data


def chunked(*pieces: bytes) -> bytes:
    return b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces)


def events(*chunks: dict) -> bytes:
    """The stream of a chat completion, up to the close."""
    lines = [b"data: %b\n\n" % json.dumps(chunk).encode() for chunk in chunks]
    return OK + STREAM + b"\r\n" + b"".join(lines) + b"data: [DONE]\n\n"


def delta(text: str, end=None) -> dict:
    return {"choices": [{"index": 0, "delta": {"content": text}, "finish_reason": end}]}


@contextlib.contextmanager
def relaying(url, more=None, **entry):
    """A server whose only model, `far`, is elsewhere."""
    far = conftest.entry(base_url=url, **entry)
    with listening(models={"far": far}, **{"drain_seconds": 1, **(more or {})}) as running:
        yield running


def post(url, path, body, key=KEY):
    content = body if isinstance(body, bytes) else json.dumps(body)
    return httpx.post(url + path, content=content, timeout=60, headers={
        "authorization": f"Bearer {key}", "content-type": "application/json"})


def body_for(path: str, **more) -> dict:
    """One body for both dialects."""
    return {"messages": HI, "model" if path.startswith("/v1") else "model_key": "far", **more}


def lines_of(answer) -> list[dict]:
    assert answer.headers["content-type"] == "application/x-ndjson; charset=utf-8"
    assert answer.text.endswith("\n")
    return [json.loads(line) for line in answer.text.splitlines()]


def send_raw(running, path, body, version="1.1", read=0):
    """A connection with a request on it, of whose answer so many bytes have been read."""
    data = json.dumps(body).encode()
    raw = socket.create_connection(("127.0.0.1", running.server_port), timeout=20)
    raw.sendall(f"POST {path} HTTP/{version}\r\nHost: localhost\r\nx-api-key: {KEY}\r\n"
                f"Content-Length: {len(data)}\r\n\r\n".encode() + data)
    got = b""
    while len(got) < read:
        got += (piece := raw.recv(65536))
        assert piece, got
    return raw


def all_of(raw) -> bytes:
    with raw:
        return b"".join(iter(lambda: raw.recv(65536), b""))


@pytest.fixture(scope="module")
def there():
    """A second server of ours."""
    with listening(api_keys=[KEY_THERE], model_path=MODEL, model_aliases=[THERE],
                   **SMALL) as running:
        running.models.start()
        yield running


@pytest.fixture(scope="module")
def cpp():
    """llama_cpp.server; gives its address."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    process = subprocess.Popen(
        [sys.executable, "-m", "llama_cpp.server", "--model", MODEL, "--port", str(port),
         "--n_ctx", "512", "--n_threads", "1", "--n_threads_batch", "1", "--embedding", "true",
         "--api_key", KEY_THERE, "--model_alias", "org/smol", "--interrupt_requests", "false"],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def answers():
        with contextlib.suppress(httpx.HTTPError):
            return httpx.get(f"http://127.0.0.1:{port}/v1/models").status_code == 401
    try:
        wait_for(answers, 60)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(timeout=30)


@pytest.fixture(scope="module")
def here(there, cpp):
    """The server that is asked: it has a model, and knows the other two."""
    entries = {"small": conftest.entry(model_path=MODEL),
               "ours": conftest.entry(base_url=f"{there.url}/v1/", api_key=KEY_THERE,
                                         model=there.models.default.name),
               "cpp": conftest.entry(base_url=f"{cpp}/v1", api_key=KEY_THERE, model="org/smol")}
    with listening(api_keys=[KEY], models=entries, max_body_mb=0.1, **SMALL) as running:
        running.models.start()
        yield running


# ==== What is passed on ===================================================================


def summary(answer):
    """What must be the same in two answers; of a stream, its texts as one."""
    assert answer.status_code == 200, answer.text
    data = [json.loads(line.removeprefix("data: ")) for line in answer.text.splitlines()
            if line not in ("", "data: [DONE]")]
    choices = [choice for value in data for choice in value.get("choices", ())]
    texts = [choice["text"] if "text" in choice else
             (choice.get("delta") or choice.get("message") or {}).get("content") or ""
             for choice in choices]
    return (answer.headers["content-type"], answer.text.endswith("data: [DONE]\n\n"),
            "".join(texts), [choice["finish_reason"] for choice in choices],
            [(value["model"], sorted(value), value.get("data")) for value in data])


@pytest.mark.parametrize("name", ["ours", "cpp"])
@pytest.mark.parametrize("path, body", [
    ("/v1/chat/completions", CHAT), ("/v1/chat/completions", {**CHAT, "stream": True}),
    ("/v1/completions", {"prompt": "Once upon", "max_tokens": 8, "temperature": 0}),
    ("/v1/completions", {"prompt": "Once upon", "max_tokens": 8, "temperature": 0,
                         "stream": True}),
    ("/v1/embeddings", {"input": "Once upon"})])
def test_an_engine_says_the_same_through_us(here, name, path, body):
    """Direct and relayed, streamed or not, at temperature 0."""
    far = here.models.named[name]
    direct = summary(post(far.base_url, path[3:], {**body, "model": far.model}, KEY_THERE))
    assert summary(post(here.url, path, {**body, "model": name})) == direct
    assert direct[4][0][0] == far.model and (direct[2] or direct[4][0][2])


@pytest.mark.parametrize("name", ["ours", "cpp"])
def test_the_openai_client_works_through_us(here, name):
    """Streamed, not streamed, and embeddings."""
    client = openai.OpenAI(base_url=f"{here.url}/v1", api_key=KEY, max_retries=0)
    whole = client.chat.completions.create(model=name, **CHAT)
    stream = client.chat.completions.create(model=name, stream=True, **CHAT)
    texts = [choice.delta.content or "" for chunk in stream for choice in chunk.choices]
    assert "".join(texts) == whole.choices[0].message.content and len(texts) > 4
    found = client.embeddings.create(model=name, input="a", encoding_format="float").data
    assert found[0].object == "embedding"
    assert {"small", "ours", "cpp"} == {model.id for model in client.models.list()}


ODD = (b": a comment\r\n\r\ndata: {\"a\": \"\xc3", b"\xa9\"}\r\rid: 7\n", b"\x00\xff\xfe data:\n\n",
       b"data: no end")


@pytest.mark.parametrize("framing", ["chunked", "length", "close"])
def test_a_stream_is_passed_on_byte_for_byte_as_it_comes(framing):
    """Split characters, comments, odd line ends, no [DONE]; each piece at once."""
    head = OK + STREAM + {"chunked": b"Transfer-Encoding: chunked\r\n", "close": b"", "length":
                          b"Content-Length: %d\r\n" % len(b"".join(ODD))}[framing] + b"\r\n"
    pieces = [chunked(piece) for piece in ODD] if framing == "chunked" else list(ODD)
    last = [b"0\r\n\r\n"] if framing == "chunked" else []
    with Fake(head + pieces[0], *pieces[1:], *last, pause=0.3) as fake, \
            relaying(fake.url) as running, httpx.stream(
                "POST", running.url + CHATS[0], json=body_for("/v1", stream=True)) as answer:
        began, got = time.monotonic(), []
        for piece in answer.iter_raw():
            got.append((time.monotonic() - began, piece))
        assert [piece for _, piece in got] == list(ODD)
        assert all(abs(at - 0.3 * index) < 0.2 for index, (at, _) in enumerate(got))
        assert answer.headers["content-type"] == "text/event-stream"


def test_a_request_is_passed_on_as_it_came_but_for_name_and_key():
    """The engine's own name and key in place of the client's; unknown fields, odd spelling stay."""
    with Fake(reply({})) as fake:
        body = b'{ "model":"far",\t"x_unknown": [1.0, "\\u00e9"], "n": null,"messages":[ ] }'
        with relaying(fake.url + "/", {"api_keys": [KEY]}) as running:
            for path in ("/v1/chat/completions", "/v1/completions", "/v1/embeddings/"):
                assert post(running.url, path, body).json() == {}
        with relaying(fake.url, {"api_keys": [KEY]}, api_key=KEY_THERE, model="org/x") as running:
            httpx.post(running.url + CHATS[0], content=body, headers={"x-api-key": KEY})
        plain, (named, sent) = fake.requests[:3], fake.requests[3]
        assert [head.split()[1] for head, _ in plain] == [
            "/v1/chat/completions", "/v1/completions", "/v1/embeddings"]
        assert all(got == body and "authorization" not in head.lower() for head, got in plain)
        assert f"Authorization: Bearer {KEY_THERE}\r\n" in named
        assert json.loads(sent) == {**json.loads(body), "model": "org/x"}
        assert KEY not in str(fake.requests)


@pytest.mark.parametrize("path", CHATS)
def test_a_default_model_elsewhere_is_called_by_its_name(path):
    """Who names no model gets it under the name that it has there, or else ours."""
    for entry, name in (({"model": "org/x"}, "org/x"), ({}, "far")):
        with Fake(events(delta("Hi", "stop"))) as fake, relaying(fake.url, **entry) as running:
            assert post(running.url, path, {"messages": HI}).status_code == 200
            assert json.loads(fake.requests[0][1])["model"] == name


# ==== Clients that hang up ================================================================


@pytest.mark.parametrize("path", CHATS)
@pytest.mark.parametrize("sent", [b"", events(delta("Hi"))[:-14]], ids=["before", "amid"])
def test_the_engine_sees_within_a_second_that_the_client_hung_up(path, sent):
    """Both before its first byte and amid its stream."""
    with Fake(sent, then=HOLD) as fake, relaying(fake.url) as running:
        raw = send_raw(running, path, body_for(path, **{"stream": True} if "v1" in path else {}))
        wait_for(lambda: fake.requests)
        time.sleep(0.2)
        gone = time.monotonic()
        raw.close()
        wait_for(lambda: fake.closed_at, 5)
        assert fake.closed_at[0] - gone < 1
        wait_for(lambda: running.in_flight == 0)
        assert list(running.answered) == [(f"POST {path}", 499)]


@pytest.mark.parametrize("path, model", [
    (CHATS[0], "ours"), ("/chat/stream", "ours"), ("/chat", "ours"), ("/chat/stream", "small")])
def test_a_hang_up_frees_the_slot(here, there, path, model):
    """In the server that generates, be it the next or the one after."""
    more = {"model": model, "stream": True, "ignore_eos": True} if "v1" in path else {
        "model_key": model, "config": {"maxTokens": 450}}
    story = [{"role": "user", "content": "Count from 1 to 1000, all of them, one a line."}]
    target = here if model == "small" else there
    busy = lambda: sum(m.engine.stats.n_busy for m in target.models.loaded())  # noqa: E731
    raw = send_raw(here, path, {"messages": story, **more}, read=300 * ("stream" in str(more)))
    wait_for(busy)
    raw.close()
    wait_for(lambda: not busy(), 2)


def test_a_client_that_stops_reading_is_given_up():
    """It is the client that is late, not the engine: no 504, no event amid its bytes."""
    flood = OK + STREAM + b"\r\n" + b"data: x\n\n" * 10**6
    with Fake(flood, then=HOLD) as fake, relaying(
            fake.url, {"client_timeout": 0.5}, timeout=60) as running:
        raw = send_raw(running, CHATS[0], body_for("/v1", stream=True), read=100)
        wait_for(lambda: running.answered, 5)
        assert list(running.answered) == [(f"POST {CHATS[0]}", 499)]
        raw.close()


# ==== What goes wrong there ===============================================================


def refusals(running, status, words):
    """The same refusal in each dialect."""
    for path in CHATS:
        answer = post(running.url, path, body_for(path))
        assert answer.status_code == status, (path, answer.text)
        sent = answer.json()
        message = sent["error"]["message"] if "v1" in path else sent["detail"]
        assert words in message and len(sent) == 1, (path, message)
        assert "v1" not in path or set(sent["error"]) == {"message", "type", "param", "code"}


def test_an_engine_that_is_not_there_is_a_502():
    """Refused or unknown; the sentence is what local apps look for."""
    with Fake() as gone:
        pass
    with relaying(gone.url) as running:
        refusals(running, 502, "Could not connect to far: Connection refused")
        answer = post(running.url, "/chat", body_for("/chat"))
        assert answer.json() == {"detail": "Could not connect to far: Connection refused"}
    with relaying("http://no-such-host.invalid/v1") as running:
        refusals(running, 502, "Could not connect to far: ")


@pytest.mark.parametrize("status", ["400 Bad Request", "401 Unauthorized", "404 Not Found",
                                    "429 Too Many", "500 Oops", "503 Busy", "520 Unknown",
                                    "529 Overloaded", "302 Found", "307 Temporary Redirect"])
def test_its_own_errors_are_passed_on(status):
    """With status, body and Retry-After, also statuses without a name; a redirect is not followed,
    and to an app no answer."""
    with Fake(reply(b'{"error":{"message":"so \xc3\xa9"},"x": 1}', status, "Retry-After: 7",
                    "Content-Type: application/json", "Location: http://127.0.0.1:9/")) as fake, \
            relaying(fake.url) as running:
        number = int(status[:3])
        answer = post(running.url, CHATS[0], body_for("/v1", stream=True))
        assert answer.status_code == number and answer.headers["retry-after"] == "7"
        assert answer.content == b'{"error":{"message":"so \xc3\xa9"},"x": 1}'
        for path in CHATS[1:]:
            app = post(running.url, path, body_for(path))
            assert app.status_code == (502 if number < 400 else number)
            assert list(app.json()) == ["detail"]
            assert "so é" in app.json()["detail"] or number < 400
        assert len(fake.requests) == 3


def test_an_app_is_told_when_to_come_back():
    """Retry-After is passed on to it, too."""
    with Fake(reply({}, "429 Too Many", "Retry-After: 7")) as fake, relaying(fake.url) as running:
        for path in CHATS:
            assert post(running.url, path, body_for(path)).headers["retry-after"] == "7"


@pytest.mark.parametrize("pieces", [
    (b"SSH-2.0-OpenSSH_9.6\r\n",), (b"\x16\x03\x01\x00",), (b"",), (OK + b"X: " + b"y" * 70_000,),
    (OK + b"X: y\r\n" * 200 + b"\r\n",), (b"HTTP/1.1 99999 No\r\n\r\n",)])
@pytest.mark.parametrize("then", [None, RESET])
def test_what_is_no_http_is_a_502(pieces, then):
    """Garbage, nothing, endless heads; closed or reset."""
    with Fake(*pieces, then=then) as fake, relaying(fake.url) as running:
        refusals(running, 502, "far")


def test_an_engine_that_is_silent_for_too_long_is_a_504():
    """Before the first byte a status, amid a stream an event; pauses that are shorter are none."""
    with Fake(then=HOLD) as fake, relaying(fake.url, timeout=0.3) as running:
        refusals(running, 504, "far sent nothing for 0.3 seconds")
    with Fake(*[b""] * 3, events(delta("Hi"))[:-14], then=HOLD) as fake, \
            relaying(fake.url, timeout=0.5) as running:
        last = post(running.url, CHATS[0], body_for("/v1", stream=True)).text.splitlines()[-2]
        assert json.loads(last.removeprefix("data: "))["error"]["code"] == "upstream_timeout"
        assert lines_of(post(running.url, "/chat/stream", body_for("/chat")))[-1] == {
            "type": "error", "detail": "far sent nothing for 0.5 seconds"}


@pytest.mark.parametrize("then", [None, RESET])
@pytest.mark.parametrize("rest", [b"", b"9\r\ndata: {\"c", b"data: {\"c"])
def test_a_stream_that_breaks_off_ends_with_an_error_event(then, rest):
    """A whole one, also where the engine was cut off amid a line; then nothing."""
    rest = b"%x\r\n%b\r\n" % (len(rest), rest) if rest[:1] == b"d" else rest
    begun = chunked(b"data: %b\n\n" % json.dumps(delta("Hi")).encode())
    with Fake(OK + STREAM + b"Transfer-Encoding: chunked\r\n\r\n" + begun + rest, pause=0.2,
              then=then) as fake, relaying(fake.url) as running:
        text = post(running.url, CHATS[0], body_for("/v1", stream=True)).text
        assert text.startswith("data: ") and "[DONE]" not in text
        event = text.rstrip("\n").split("\n\n")[-1]
        assert event.startswith("data: {\"error\"") and text.endswith("\n\n")
        assert json.loads(event[6:])["error"]["type"] == "server_error"
        first, last = lines_of(post(running.url, "/chat/stream", body_for("/chat")))
        assert first == {"type": "fragment", "content": "Hi"} and last["type"] == "error"
        assert "far" in last["detail"] and list(last) == ["type", "detail"]
        assert post(running.url, "/chat", body_for("/chat")).status_code == 502


@pytest.mark.parametrize("then", [None, RESET])
@pytest.mark.parametrize("head", [b"Content-Length: 99\r\n\r\n{", b"Transfer-Encoding: chunked"
                                  b"\r\n\r\n1\r\n{\r\n"], ids=["length", "chunked"])
def test_a_body_that_breaks_off_closes_the_connection_short(then, head):
    """No client takes the beginning for the whole."""
    with Fake(OK + b"Content-Type: application/json\r\n" + head, pause=0.2, then=then) as fake, \
            relaying(fake.url) as running, pytest.raises(httpx.RemoteProtocolError):
        post(running.url, CHATS[0], body_for("/v1"))


@pytest.mark.parametrize("bad", [5, [], "error", None, {"choices": None}, {"choices": [None]},
                                 {"choices": 5}, {"choices": [{"delta": 5}]},
                                 {"choices": [], "usage": {}}, {"choices": [], "usage": 7}])
def test_chunks_of_an_unknown_shape_end_an_apps_stream_not_the_server(bad, caplog):
    """They are taken for nothing, or are the engine's fault: 502, not a 500 of ours."""
    with Fake(events(delta("Hi"), bad)) as fake, relaying(fake.url) as running:
        assert post(running.url, "/chat", body_for("/chat")).status_code in (200, 502)
        last = lines_of(post(running.url, "/chat/stream", body_for("/chat")))[-1]
        assert last["type"] in ("done", "error") and "internal" not in str(last)
    assert "Traceback" not in caplog.text


@pytest.mark.parametrize("size", [b"-1", b"-5", b"zz"])
def test_a_chunk_of_a_size_that_is_none_is_the_engines_fault(size, caplog):
    """Some readers take -1 for all there is."""
    with Fake(OK + STREAM + b"Transfer-Encoding: chunked\r\n\r\n" + size + b"\r\nabc") as fake, \
            relaying(fake.url) as running:
        assert post(running.url, "/chat", body_for("/chat")).status_code == 502
    assert "Traceback" not in caplog.text


def test_hints_before_the_answer_are_left_out():
    """What counts is the answer, read on from where the hints end."""
    hints = b"HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n"
    with Fake(hints + hints + reply({"choices": []})) as fake, relaying(fake.url) as running:
        answer = post(running.url, CHATS[0], body_for("/v1"))
        assert answer.status_code == 200 and answer.json() == {"choices": []}
    with Fake(b"HTTP/1.1 101 Switching\r\n\r\n") as fake, relaying(fake.url) as running:
        refusals(running, 502, "far")


def test_an_error_event_that_quotes_the_key_is_told_without_it(caplog):
    caplog.set_level(0)
    with Fake(events({"error": {"message": f"bad key {KEY_THERE}"}})) as fake, \
            relaying(fake.url, api_key=KEY_THERE) as running:
        assert "bad key ***" in post(running.url, "/chat", body_for("/chat")).text
    assert KEY_THERE not in caplog.text


def test_draining_lets_a_relayed_stream_finish():
    """It has drain_seconds, like a stream of our own."""
    pieces = [OK + STREAM + b"\r\n", *[b"data: %d\n\n" % n for n in range(8)]]
    with Fake(*pieces, pause=0.2) as fake, relaying(fake.url, {"drain_seconds": 9}) as running:
        raw = send_raw(running, CHATS[0], body_for("/v1", stream=True), read=100)
        running.drain()
        assert raw.recv(65536).endswith(b"data: 7\n\n\r\n0\r\n\r\n")


def test_a_number_that_no_json_holds_is_not_passed_on():
    with Fake(reply({})) as fake, relaying(fake.url, model="other") as running:
        answer = post(running.url, CHATS[0], b'{"model": "far", "temperature": 1e999}')
        assert answer.status_code == 400 and "too large" in answer.text and not fake.requests


def test_a_reply_without_a_body_leaves_the_connection_clean():
    """A 204 has no body, not even the end of a chunked one: the next reply is itself."""
    with Fake(b"HTTP/1.1 204 No Content\r\n\r\n") as fake, relaying(fake.url) as running:
        raw = send_raw(running, CHATS[0], body_for("/v1"))
        raw.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        first, _, rest = all_of(raw).partition(b"\r\n\r\n")
        assert first.startswith(b"HTTP/1.1 204") and b"Transfer-Encoding" not in first
        assert rest.startswith(b"HTTP/1.1 200 OK")


@pytest.mark.parametrize("n_servers", [1, 2])
def test_a_loop_is_a_508(n_servers):
    """A server that points at itself, or two that point at each other: for chats, and for lists."""
    with contextlib.ExitStack() as stack:
        ring = [stack.enter_context(listening(
            openai_base_url="http://unused/v1", default_regular_model="far", drain_seconds=1))
            for _ in range(n_servers)]
        for one, other in zip(ring, [*ring[1:], ring[0]]):
            far = elsewhere.Upstream("upstream", f"{other.url}/v1")
            one.models.named[server.ANY] = far
            one.models.default = server.dataclasses.replace(far, model="far")
        refusals(ring[0], 508, "leads back")
        for path in ("/v1/models", "/models"):
            assert httpx.get(ring[0].url + path, timeout=20).status_code == 200
        assert sum(sum(one.answered.values()) for one in ring) < 20


def test_no_log_line_has_a_key(caplog):
    """Whatever goes wrong, also where the engine's own error quotes the key."""
    caplog.set_level(logging.DEBUG)
    quoting = reply({"error": {"message": f"Incorrect API key provided: {KEY_THERE}"}}, "401 No")
    for pieces in ((quoting,), (b"garbage",), (events(delta("Hi", "stop")),)):
        with Fake(*pieces) as fake, relaying(
                fake.url, {"api_keys": [KEY], "openai_base_url": fake.url,
                           "openai_api_key": KEY_THERE}, api_key=KEY_THERE) as running:
            for path in CHATS:
                answer = post(running.url, path, body_for(path))
                assert "v1" in path or KEY_THERE not in answer.text
            httpx.get(running.url + "/models", headers={"x-api-key": KEY})
        assert f"Bearer {KEY_THERE}" in str(fake.requests)
    said = [record.getMessage() for record in caplog.records if record.name == "server"]
    assert len(said) >= 12 and not any(KEY in line or KEY_THERE in line for line in said)


# ==== A server for all other names ========================================================


def test_the_order_in_which_the_two_features_are_named_changes_nothing():
    """A pool stands in the place of the one model, whichever names its own first."""
    for features in (["elsewhere", "models"], ["models", "elsewhere"]):
        house = server.load_features(features)
        entry = house.type_of(models.ModelEntry)
        running = server.Server(house.Config(
            port=0, default_regular_model="near", openai_base_url="http://box:2/v1", models={
                "far": entry(base_url="http://box:1/v1"), "near": entry(model_path="near.gguf")}))
        running.server_close()
        assert {*running.models.names()} == {"far", "near"}
        assert running.models.find(None) is running.models.find("near")
        assert running.models.find("else").base_url == "http://box:2/v1"
        assert running.models.find("else").model == "else"
        assert running.models.find("far").base_url == "http://box:1/v1"


def test_unknown_names_go_to_openai_base_url(there, caplog):
    """Its models are in both lists; while it is down these still work, with a warning. A default
    model there means that nothing is loaded here, and that all is well."""
    settings = {"openai_api_key": KEY_THERE, "default_regular_model": THERE,
                "models": {"own": conftest.entry(model_path=MODEL)}, "drain_seconds": 1}
    with listening(openai_base_url=f"{there.url}/v1", **settings) as running:
        running.models.start()
        assert httpx.get(running.url + "/health").json() == {"status": "ok"}
        direct = post(there.url, CHATS[0], CHAT, KEY_THERE).json()
        for chosen in ({}, {"model": THERE}):
            answer = post(running.url, CHATS[0], {**CHAT, **chosen}).json()
            assert answer["choices"] == direct["choices"] and answer["model"] == THERE
        for path, chosen in (("/chat", {}), ("/chat/regular", {}), ("/chat", {"model_key": THERE})):
            answer = post(running.url, path, {**APP, **chosen}).json()
            assert answer["content"] == direct["choices"][0]["message"]["content"]
            assert answer["model"] == THERE
        unknown = post(running.url, CHATS[0], {**CHAT, "model": "no/such"})
        assert unknown.status_code == 404 and "no/such" in unknown.json()["error"]["message"]
        assert post(running.url, "/chat", {**APP, "model_key": "no/such"}).status_code == 404
        listed = httpx.get(running.url + "/v1/models").json()["data"]
        names = list(there.models.names())
        assert [entry["id"] for entry in listed] == ["own", *names] and "meta" in listed[1]
        listed = httpx.get(running.url + "/models").json()
        assert listed == {"loaded": [], "available": [
            {"model_key": "own", "vision": False, "loaded": False},
            *({"model_key": name, "engine": "upstream"} for name in names)]}
        assert not running.models.loaded()
    with Fake() as gone:
        pass
    with listening(openai_base_url=gone.url, **settings) as running:
        for path, field in (("/v1/models", "data"), ("/models", "available")):
            caplog.clear()
            assert len(httpx.get(running.url + path).json()[field]) == 1
            assert "cannot list the models elsewhere: Could not connect" in caplog.text
        assert httpx.get(running.url + "/health").status_code == 200
        assert "Connection refused" in post(running.url, "/chat", APP).json()["detail"]


# ==== The dialect of local apps ===========================================================


@pytest.mark.parametrize("name", ["small", "ours", "cpp"])
def test_a_chat_says_the_same_in_each_dialect(here, name):
    """Its keys and their order; the text, the count and the reason are the OpenAI route's."""
    key = {} if name == "small" else {"model_key": name}
    plain = post(here.url, CHATS[0], {**CHAT, "messages": SYSTEM, "model": name}).json()
    for path in ("/chat", "/chat/regular"):
        answer = post(here.url, path, {**APP, "messages": SYSTEM, **key})
        assert answer.status_code == 200 and "x-ignored-fields" not in answer.headers
        whole = answer.json()
        assert set(whole) == {"model", "content", "stop_reason", "predicted_tokens"}
        assert whole["content"] == plain["choices"][0]["message"]["content"]
        assert whole["model"] == name and whole["stop_reason"] == "length"
        assert whole["predicted_tokens"] == plain["usage"]["completion_tokens"] == 8
        *fragments, done = lines_of(post(here.url, path + "/stream",
                                         {**APP, "messages": SYSTEM, **key}))
        assert "".join(line["content"] for line in fragments) == whole.pop("content")
        assert len(fragments) > 3 and all(list(line) == ["type", "content"] and
                                          line["type"] == "fragment" for line in fragments)
        assert done == {"type": "done", **whole}


def test_what_an_app_asks_for_arrives_under_the_openai_names():
    """Each option, images in front of the text, Base64 bare or as a URI; an end without a reason is
    a stop."""
    told = {"choices": [], "usage": {"completion_tokens": 42}}
    with Fake(events(delta("Hi"), delta("!"), told)) as fake, \
            relaying(fake.url, {"default_vision_model": "far"}, model="org/x") as running:
        images = [{"data_base64": "QUJD", "mime_type": "image/jpeg"},
                  {"data_base64": "data:image/png;base64,QUJD"}]
        body = {"messages": [{"role": "user", "content": "What?", "images": images, "odd": 1}],
                "config": {"temperature": 2, "maxTokens": 5, "topP": 0, "presencePenalty": -2,
                           "frequencyPenalty": 2, "topK": 3}, "system": "x"}
        for path in ("/chat", "/chat/vision"):
            answer = post(running.url, path, body)
            assert answer.json() == {"model": "org/x", "content": "Hi!", "stop_reason": "stop",
                                     "predicted_tokens": 42}
            ignored = set(answer.headers["x-ignored-fields"].split(", "))
            assert ignored == {"system", "config.topK", "messages[0].odd"}
        assert json.loads(fake.requests[0][1]) == {
            "model": "org/x", "temperature": 2, "max_tokens": 5, "top_p": 0, "stream": True,
            "presence_penalty": -2, "frequency_penalty": 2,
            "stream_options": {"include_usage": True}, "messages": [{"role": "user", "content": [
                {"type": "image_url", "image_url": {"url": "data:image/jpeg;base64,QUJD"}},
                {"type": "image_url", "image_url": {"url": "data:image/png;base64,QUJD"}},
                {"type": "text", "text": "What?"}]}]}


def test_predicted_tokens_is_what_the_engine_told_or_else_the_pieces():
    """Told in any chunk, also where others follow."""
    told = {**delta("!"), "usage": {"completion_tokens": 42}}
    for chunks, count in (((delta("Hi"), delta("!")), 2), ((delta("Hi"), told, delta("")), 42)):
        with Fake(events(*chunks)) as fake, relaying(fake.url) as running:
            assert post(running.url, "/chat", body_for("/")).json()["predicted_tokens"] == count


def config(**options) -> dict:
    return {"messages": HI, "config": options}


BAD = [  # status, words of the detail, body
    *((400, name, config(**{name: value})) for name, values in (
        ("temperature", (-0.1, 2.1, "1", True, [])), ("topP", (-0.1, 1.1, "x")),
        ("maxTokens", (0, -2, 1.5, "8")), ("presencePenalty", (-2.1, 2.1, {})),
        ("frequencyPenalty", (-2.1, 2.1, False))) for value in values),
    *((400, "role", {"messages": [{"role": role, "content": "x"}]})
      for role in ("tool", "developer", "", None, 5)),
    (400, "messages[0].role is required", {"messages": [{"content": "x"}]}),
    (400, "messages", {}), (400, "messages", {"messages": []}), (400, "messages", {"messages": 5}),
    (400, "messages[0]", {"messages": ["x"]}), (400, "messages", {"messages": None}),
    (400, "content", {"messages": [{"role": "user", "content": 5}]}),
    (400, "content", {"messages": [{"role": "user", "content": [{"type": "text"}]}]}),
    (400, "images", {"messages": [{"role": "user", "images": "x"}]}),
    (400, "data_base64", {"messages": [{"role": "user", "images": [{}]}]}),
    (400, "reads no images", {"messages": [{"role": "user", "images": [{"data_base64": "QQ=="}]}]}),
    (400, "config", {"messages": HI, "config": 5}), (400, "model_key", {**APP, "model_key": 5}),
    (404, "does not exist", {**APP, "model_key": "no/such"}), (404, "", {**APP, "model_key": ""}),
    (400, "context is 512", {"messages": [{"role": "user", "content": "a b " * 600}]}),
    (400, "bad JSON", b"{"), (400, "bad JSON", b""), (400, "must be an object", b"[]"),
    (400, "bad JSON", b"\xff"), (400, "bad JSON", b'{"messages": NaN}'),
    (400, "bad JSON", b"[" * 50_000), (413, "max_body_mb", b" " * 110_000)]


def test_every_bad_value_is_refused_with_a_detail(here):
    """In all six paths, streamed or not, the same status and nothing but the detail."""
    paths = [path for _, path in conftest.house().routes if path.startswith("/chat") and not path.endswith("completions")]
    assert len(paths) == 6

    def check(answer, status, words):
        assert answer.status_code == status and list(answer.json()) == ["detail"], answer.text
        assert isinstance(answer.json()["detail"], str) and words in answer.json()["detail"]

    with httpx.Client(base_url=here.url, headers={"x-api-key": KEY}) as client:
        for path in paths:
            for status, words, body in BAD:
                if "vision" in path and status < 413:
                    body = body if isinstance(body, bytes) else {"model_key": "small", **body}
                content = body if isinstance(body, bytes) else json.dumps(body)
                check(client.post(path, content=content), status, words)
            check(client.get(path), 405, "does not take GET")
            check(client.post(path, headers={"x-api-key": "no"}, json=APP), 401, "key is wrong")
            check(client.post(path, headers={"x-api-key": ""}, json=APP), 401, "key is missing")
            check(client.post(path, headers={"host": "evil.com"}, json=APP), 403, "evil.com")
            if "vision" in path:
                check(client.post(path, json=APP), 503, "Chat service unavailable: No vision model")


@pytest.mark.parametrize("path", ["/chat", "/chat/stream", "/chat/regular", "/chat/regular/stream"])
def test_without_a_model_the_chat_service_is_unavailable(path):
    """The sentences that local apps look for; a server that ends says so, too."""
    with listening() as running:
        answer = post(running.url, path, APP)
        assert answer.status_code == 503 and "retry-after" in answer.headers
        assert answer.json()["detail"].startswith("Chat service unavailable: the model is still")
        running.models.default.is_off = True  # unloaded by hand
        answer = post(running.url, path, APP)
        assert answer.status_code == 503
        assert answer.json() == {"detail": "Chat service unavailable: No model loaded"}


@pytest.mark.parametrize("path", ["/chat", "/chat/stream"])
def test_a_failure_amid_a_chat_is_told(here, monkeypatch, path):
    """As a status where nothing was sent, else as the last line; the slot is free."""
    loaded, calls = here.models.default.engine, []
    decode = loaded.context.decode
    monkeypatch.setattr(loaded.context, "decode", lambda chunks: (
        calls.append(0), decode(chunks) if len(calls) < 6 else 1 / 0)[1])
    answer = post(here.url, path, {**APP, "config": {"maxTokens": 30, "temperature": 0}})
    monkeypatch.undo()
    last = lines_of(answer)[-1] if "stream" in path else answer.json()
    assert last.pop("type", "error") == "error" and list(last) == ["detail"]
    assert answer.status_code == (200 if "stream" in path else 500)
    wait_for(lambda: loaded.stats.n_busy == 0)
    assert post(here.url, "/chat", APP).status_code == 200


@pytest.mark.parametrize("name", ["small", "ours"])
def test_http_1_0_gets_its_chat_bare(here, name):
    """No chunks: the stream goes on to the close."""
    for path, body in (("/chat", APP), ("/chat/stream", APP),
                       (CHATS[0], {**CHAT, "stream": True, "model": name})):
        head, _, text = all_of(send_raw(here, path, {**body, "model_key": name}, "1.0")
                               ).decode().partition("\r\n\r\n")
        assert head.startswith("HTTP/1.1 200") and "chunked" not in head
        if path == CHATS[0]:
            assert text.startswith("data: {") and text.endswith("data: [DONE]\n\n")
        else:
            lines = [json.loads(line) for line in text.splitlines()]
            assert lines[-1]["stop_reason"] == "length" and text.endswith("}\n")
