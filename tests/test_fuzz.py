"""Thousands of broken requests against one server: the same ones in each run.

Behind each stands a marker, a request whose answer nothing else looks like. h11 reads the same
bytes, an independent judge of where each request ends: where it and the server differ, a proxy
and the server could differ, too. `pytest --long` sends about 10,000 requests, else 1,500.
"""

import collections
import concurrent.futures
import contextlib
import functools
import json
import os
import re
import socket
import subprocess
import threading
import time

import h11
import httpx
import pytest
from conftest import ROOT, server_python
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

TIMEOUT, SLACK = 2, 20  # seconds: the server's client_timeout; what slow cores may add
SENDERS = 48  # connections at a time: most of them wait for a timeout
SETTINGS = {"CLIENT_TIMEOUT": str(TIMEOUT), "KEEP_ALIVE_TIMEOUT": str(TIMEOUT), "N_CTX": "256",
            "MAX_TOKENS": "1", "PARALLEL": "4", "MAX_BODY_MB": "0.25", "PYTHONUNBUFFERED": "1"}
MARKER = b"GET /v1/models/marker HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
Live = collections.namedtuple("Live", "url port log")


@pytest.fixture(scope="module")
def live():
    """A server whose whole log is kept."""
    process = subprocess.Popen(
        [server_python(), str(ROOT / "server.py"), "--port", "0"], cwd=ROOT, text=True,
        env=os.environ | SETTINGS, errors="replace", stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT)
    log: list[str] = []
    while not (ready := re.search(r"try: curl (http://\S+:(\d+))/v1/chat", "".join(log))):
        log.append(process.stdout.readline())
        assert log[-1], f"the server did not start: {''.join(log)}"
    threading.Thread(target=lambda: log.extend(process.stdout), daemon=True).start()
    yield Live(ready[1], int(ready[2]), log)
    process.kill()  # one that hangs does not stop for less
    process.wait()


@pytest.fixture(scope="module")
def scale(request):
    """How many times as many random requests as in the short run."""
    return 9 if request.config.getoption("--long", default=False) else 1


# ---- What was sent, what came back -------------------------------------------------------

def talk(port: int, payload: bytes, hangs_up: bool) -> bytes:
    """All that the server answers, until it closes."""
    received = b""
    with socket.create_connection(("127.0.0.1", port), timeout=2 * TIMEOUT + SLACK) as raw:
        with contextlib.suppress(ConnectionError):  # it may close before it has read everything
            raw.sendall(payload)
            if hangs_up:
                raw.shutdown(socket.SHUT_WR)
            while block := raw.recv(65536):
                received += block
    return received


def requests_in(payload: bytes) -> list[h11.Request]:
    """The complete requests in the bytes, up to the first that h11 refuses or that closes."""
    found: list[h11.Request] = []
    with contextlib.suppress(h11.RemoteProtocolError):
        while payload:
            judge = h11.Connection(h11.SERVER, max_incomplete_event_size=2**20)
            judge.receive_data(re.sub(rb"^\r?\n", b"", payload, count=1))  # may lead, says the RFC
            head = event = judge.next_event()
            while type(event) is not h11.EndOfMessage:
                if event is h11.NEED_DATA:
                    return found
                event = judge.next_event()
            found.append(head)
            wish = b",".join(value for name, value in head.headers if name == b"connection").lower()
            if b"close" in wish or head.http_version == b"1.0" and b"keep-alive" not in wish:
                return found
            payload = judge.trailing_data[0]
    return found


def read_answer(data: bytes, method: bytes) -> tuple[int, bool, bytes, bytes]:
    """Status, whether it closes, and body of the first response, by h11; and what follows it."""
    judge, body = h11.Connection(h11.CLIENT), b""
    judge.send(h11.Request(method=method, target="/", headers=[("Host", "x")]))
    judge.send(h11.EndOfMessage())
    judge.receive_data(data)
    judge.receive_data(b"")
    while type(event := judge.next_event()) is not h11.EndOfMessage:
        if type(event) is h11.Response:
            head = event
        body += bytes(getattr(event, "data", b""))
    rest, closes = judge.trailing_data[0], (b"connection", b"close") in head.headers
    if method == b"HEAD" and closes and rest:  # refused before the server knew that it was HEAD
        return read_answer(data, b"GET")
    return head.status_code, closes, body, rest


def check(live: Live, payload: bytes, hangs_up: bool = False) -> list[int] | str:
    """Send the bytes; return the statuses that came back, or what is wrong."""
    statuses: list[int] = []
    closes = False
    try:
        asked, data = requests_in(payload), talk(live.port, payload, hangs_up)
        if hangs_up:  # an invitation to send the body may be all that could be said
            data = data.removesuffix(b"HTTP/1.1 100 Continue\r\n\r\n")
        while data:
            request = asked[len(statuses)] if len(statuses) < len(asked) else None
            status, closes, body, data = read_answer(data, request.method if request else b"GET")
            statuses.append(status)
            assert not (closes and data), "something follows the last answer"
            assert status < 500 or status in (501, 505), "the server is at fault"
            if status >= 400 and body:
                error = json.loads(body)["error"]
                assert error.keys() == {"message", "type", "param", "code"}, "not OpenAI's shape"
            asks_marker = bool(request) and request.target == b"/v1/models/marker"
            may_refuse = closes and (  # XGET is no GET; a bare LF may lead a request, or may not
                status in (501, 505) or re.search(rb"(?<!\r)\n" + MARKER, payload))
            assert asks_marker == (b'model \\"marker\\" does not exist' in body) or may_refuse, \
                "an answer to another request"
            assert request or closes, "an answer to nothing, and the connection goes on"
        assert closes or hangs_up or len(statuses) == len(asked), "a request without an answer"
    except (AssertionError, h11.RemoteProtocolError, OSError, ValueError, KeyError) as error:
        return f"{type(error).__name__}: {error}\n    got {statuses}, sent {payload[:2000]!r}"
    return statuses


def check_all(live: Live, payloads, hangs_up: bool = False) -> list[list[int]]:
    """Many at a time."""
    with concurrent.futures.ThreadPoolExecutor(SENDERS) as senders:
        results = list(senders.map(lambda payload: check(live, payload, hangs_up), payloads))
    if wrong := [result for result in results if isinstance(result, str)]:
        pytest.fail(f"{len(wrong)} of {len(results)}:\n" + "\n".join(wrong[:20]))
    return results


def drawn(strategy, count: int) -> list[bytes]:
    """Examples, the same in each run. They are collected, to be sent many at a time."""
    examples = []
    collect = settings(max_examples=count, derandomize=True, database=None, deadline=None,
                       phases=[Phase.generate], suppress_health_check=list(HealthCheck))(
        given(strategy)(lambda example: examples.append(example + MARKER)))
    collect()
    return examples


# ---- The requests ------------------------------------------------------------------------

def get(target=b"/health", more=b"", version=b"1.1", method=b"GET") -> bytes:
    return b"%b %b HTTP/%b\r\nHost: localhost\r\n%b\r\n" % (method, target, version, more)


def post(body: bytes, more: bytes = b"", path: bytes = b"/tokenize") -> bytes:
    """With a Content-Length, if no other length is among the headers `more`."""
    more += b"" if re.search(b"(?i)length|coding", more) else b"Content-Length: %d\r\n" % len(body)
    return get(path, more, method=b"POST") + body


chunked = functools.partial(post, more=b"Transfer-Encoding: chunked\r\n")


HI, LAST = b'{"content":"hi"}', b"0\r\n\r\n"
CHUNK = b"10\r\n" + HI + b"\r\n"
CHAT = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 1}
CHAT_PATH = b"/v1/chat/completions"
ALIVE, EXPECT = b"Connection: keep-alive\r\n", b"Expect: 100-continue\r\n"
BY_HAND = {  # the only statuses that are safe: the last is the marker's 404, or a refusal
    (200, 404): [
        get(), get(b"http://localhost/health"), b"\r\n" + get(), get(more=EXPECT), post(HI, EXPECT),
        get(version=b"1.0", more=ALIVE), get(method=b"HEAD"), chunked(CHUNK + LAST),
        get(more=b"Content-Length: 5\r\n") + b"hello", chunked(b"010;a=b" + CHUNK[2:] + LAST),
        chunked(CHUNK + b"0\r\nX: y\r\n\r\n"),
        post(CHUNK + LAST, b"transfer-ENCODING:\tChunked \r\n")],
    (200,): [get(version=b"1.0"), get(more=b"Connection: close\r\n")],
    (200,) * 20 + (404,): [get() * 20, post(HI) * 20, chunked(CHUNK + LAST) * 20],
    (204, 404): [get(method=b"OPTIONS"), get(b"*", method=b"OPTIONS")],
    (403,): [get(more=b"Origin: http://evil.example\r\n"), get(more=b"Origin: null\r\n")],
    (404, 404): [get(b"/x"), get(b"/%2e%2e/health"), get(b"//health"), get(b"/x/../health")],
    (405, 404): [get(method=b"DELETE"), post(b"", path=b"/health")],
    (400,): [  # lengths; codings; chunks; first lines; headers
        post(LAST, b"Content-Length: 5\r\nTransfer-Encoding: x\r\n"),
        chunked(LAST).replace(b"1.1", b"1.0"), post(HI, b"Content-Length: 16\r\n" * 2),
        *(post(HI, b"Content-Length" + rest + b"\r\n") for rest in (
            b" : 16", b":", b": 16\r\nContent-Length: 0", b": +16", b": -1", b": 0x10",
            b": 16, 16", b": 1e1", b": 1_6", b": 16 0", b": \xb2")),
        *(post(LAST, b"Transfer-Encoding" + rest + b"\r\n") for rest in (
            b": chunked\r\nTransfer-Encoding: chunked", b":\r\n chunked", b": \x0bchunked",
            b" : chunked", b": chunked\r\nContent-Length: 5")),
        *(chunked(size + CHUNK[2:] + LAST) for size in (
            b"-10", b"+10", b"0x10", b"1_0", b"", b"g", b" 10", b"10\0", b"10 x", b"10\r", b"\xff",
            b"10;a\rb", b"10;a\nb", b"10;" + b"x" * 999)),
        chunked(CHUNK[:-2] + LAST), chunked(b"10\n" + HI + b"\r\n" + LAST),
        chunked(CHUNK + b"0\r\nno trailer\r\n\r\n"), b"GET /\r\n", get(version=b"1.11"),
        get().replace(b"Host", b"Hos"), get(b" /"), get(b"*"), get(b"health"), get(b"/\xc3\xa9"),
        get(b"ftp://localhost/"), b"\x16\x03\x01\x02\0\x01\0\x01\xfc\r\n", *(
            get(more=line + b"\r\n") for line in (
                b"X", b"X y: z", b": z", b"X: a\0b", b"X: a\rb", b"X: y\r\n fold", b"\xe9: x",
                b"Host: localhost", b"Authorization: a\r\nAuthorization: b"))],
    (411,): [get(method=b"POST")], (414,): [get(b"/" + b"x" * 9000)],
    (413,): [post(HI, b"Content-Length: 9999999999\r\n"), chunked(b"ffffffff" + CHUNK[2:]),
             post(b"x" * 300_000)],
    (431,): [get(more=b"X: y\r\n" * 200), get(more=b"X: " + b"y" * 200_000 + b"\r\n")],
    (501,): [get(b"localhost:80", method=b"CONNECT"), *(
        post(LAST, b"Transfer-Encoding: " + coding + b"\r\n") for coding in (
            b"chunked, chunked", b"identity", b"gzip, chunked", b"", b"xchunked", b'"chunked"'))],
    (505,): [b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"]}

BASES = [get(), post(HI, EXPECT + ALIVE), chunked(CHUNK + LAST), get(more=b"Accept: */*\r\n"),
         post(json.dumps(CHAT).encode(), b"", CHAT_PATH)]
NASTY = [b"\r", b"\n", b"\r\n", b"\r\n\r\n", b"\0", b"\r\n ", b"\t", b" ", b":", b";", b"\x85",
         b"-", b"\xc3\xa9", b"%00", b"0", b"fffffffff", b"1" * 400, b"x" * 70_000, *(
             b"\r\n" + line for line in (
                 b"Host: other", b"Host:", b"Content-Length: 0", b"Content-Length: 99", b"X: y",
                 b"Transfer-Encoding: chunked", b"Transfer-Encoding: x", b"Connection: close",
                 b"Connection: keep-alive", b"Expect: 100-continue", b"Origin: null"))]
BODIES = {CHAT_PATH: CHAT, b"/apply-template": CHAT, b"/tokenize": {"content": "Hi"},
          b"/v1/completions": {"prompt": "Hi", "max_tokens": 1}, b"/detokenize": {"tokens": [5]},
          b"/v1/embeddings": {"input": "Hi"}}
FIELDS = ["messages", "prompt", "input", "content", "tokens", "model", "stop", "n",
          "stream", "tools", "temperature", "logit_bias", "response_format", "tool_choice"]
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9) | \
    st.sampled_from([10**40, 2**31, 1e308, "\ud800", "\0", "<|im_end|>", "\x1b[2J", "1" * 500])
VALUES = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
    st.sampled_from(["role", "type", "content", "\udfff"]), inner, max_size=3), max_leaves=6)
HEADERS = st.fixed_dictionaries({}, optional={name: st.sampled_from(values) for name, values in {
    b"Authorization": [b"Bearer x", b"Basic \xff", b""], b"x-api-key": [b"k", b"\xe9"],
    b"Origin": [b"null", b"http://localhost:3000", b"http://[", b"http://evil.example"],
    b"Connection": [b"keep-alive", b"close", b"upgrade"], b"Accept": [b"text/event-stream", b""],
    b"Content-Type": [b"text/plain", b"application/json; charset=utf-16"]}.items()})


@st.composite
def mutations(draw):
    """A good request with up to three edits, at the ends of its words and lines or anywhere."""
    sent = draw(st.sampled_from(BASES))
    for _ in range(draw(st.integers(1, 3))):
        ends = [match.start() for match in re.finditer(rb"\r\n| ", sent)] or [0]
        start = draw(st.sampled_from(ends) | st.integers(0, len(sent)))
        new = draw(st.sampled_from([*NASTY, sent[start:start + 40]]) | st.binary(max_size=4))
        sent = sent[:start] + new + sent[start + draw(st.sampled_from([0, 0, 0, 1, 2, 8])):]
    return sent


@st.composite
def json_requests(draw):
    """A body, from nearly right to no JSON at all, for any route, under any headers."""
    path, body = draw(st.sampled_from(list(BODIES.items())))
    changed = body | draw(st.dictionaries(st.sampled_from(FIELDS), VALUES, max_size=2))
    text = json.dumps(draw(st.sampled_from([changed, changed, draw(VALUES)])))
    second = [f'{text[:-1]},"{draw(st.sampled_from(FIELDS))}":{value}}}' for value in (
        "1e999", "-0", "9" * 5000, "NaN", '"\\ud83d"', "01", '"\t"', "0.1e-9999", "[" * 9000)]
    text = draw(st.sampled_from([text] * len(second) + second + [text[:-1], text + "x"]))
    coding = draw(st.sampled_from(["utf-8"] * 9 + ["utf-16", "utf-8-sig", "utf-32", "utf-7"]))
    lines = b"".join(b"%b: %b\r\n" % line for line in draw(HEADERS).items())
    return post(text.encode(coding, "surrogatepass"), lines, path)


# ---- The tests ---------------------------------------------------------------------------

def test_each_trick_of_request_smuggling_gets_the_one_answer_that_is_safe(live):
    """Taken whole, and then the marker is answered; or refused, and nothing behind it is read."""
    for allowed, sent in BY_HAND.items():
        got = check_all(live, [one + MARKER for one in sent])
        assert {one: statuses for one, statuses in zip(sent, got) if statuses != [*allowed]} == {}


@pytest.mark.slow
def test_a_request_that_ends_anywhere_leaves_nothing_behind(live, scale):
    """A client that hangs up is let go at once, one that falls silent after client_timeout."""
    cut = [base[:end] for base in BASES[-2 * scale:] for end in range(len(base))]
    check_all(live, cut, hangs_up=True)
    check_all(live, cut[::4])


def test_broken_requests_never_put_the_answers_out_of_step(live, scale):
    """Whatever the server takes, h11 takes, and both see it end at the same byte."""
    noise = st.binary(max_size=200) | st.text(max_size=99).map(str.encode)
    check_all(live, drawn(mutations(), 480 * scale) + drawn(noise, 40 * scale))


@pytest.mark.slow
def test_no_body_breaks_a_route_or_the_connection(live, scale):
    """Each answer is the route's or an error in the OpenAI shape; then the marker's comes."""
    check_all(live, drawn(json_requests(), 480 * scale))


@pytest.mark.parametrize("opens, closes", [("[", "]"), ('{"a":', "}")])
def test_json_of_any_depth_is_taken_or_refused(live, opens, closes):
    """Near Python's recursion limit, what could be read may be too deep to be described."""
    def row(path: bytes, body: dict) -> bytes:  # on one connection
        field = min(body)  # in its place
        return b"".join(post(json.dumps(body | {field: "?"}).replace(
            '"?"', opens * depth + "1" + closes * depth).encode(), b"", path)
            for depth in range(950, 1000))
    check_all(live, [row(path, body) + MARKER for path, body in BODIES.items()])


def test_a_head_of_blanks_keeps_nobody_waiting(live):
    """A pattern that tried every way to cut blanks off a value would hold the GIL for hours."""
    start = time.monotonic()
    assert check(live, get(more=b"X:" + b" " * 4000 + b"\1\r\n") + MARKER) == [400]
    assert check(live, get(more=b"X: a" + b" " * 30_000 + b"b\r\n") + MARKER) == [200, 404]
    assert time.monotonic() - start < 5


def test_after_all_that_the_server_is_as_it_was(live):
    """It works, no connection is left, and its log does not tell of a fault of its own."""
    def metrics() -> str:
        return httpx.get(live.url + "/metrics").text
    deadline = time.monotonic() + 2 * TIMEOUT + SLACK
    while "twofile_connections 1\n" not in metrics() and time.monotonic() < deadline:
        time.sleep(0.1)  # the last ones linger
    assert "twofile_connections 1\n" in metrics()
    assert httpx.get(live.url + "/health").json()["status"] == "ok"
    assert httpx.post(live.url + CHAT_PATH.decode(), json=CHAT, timeout=SLACK).status_code == 200
    for fault in ("Traceback", "internal error", " 500 ", "Exception"):
        assert not (found := [line for line in live.log if fault in line]), found[:9]
