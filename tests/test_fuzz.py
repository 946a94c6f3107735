"""Thousands of broken requests against one server: the same ones in each run.

    1  by hand      the known tricks of request smuggling, each with the only answers allowed
    2  cut short    a request that ends at any of its bytes
    3  mutations    hypothesis breaks good requests; random bytes
    4  JSON         bodies that hypothesis makes or breaks, under random headers
    5  afterwards   the server works as before, and its log shows no fault

Behind each request stands a marker, a request whose answer nothing else looks like. h11 reads the
same bytes: an independent judge of where each request ends. Where it and the server differ, a
proxy and the server could differ, too. `pytest --long` sends about 10,000 requests, else 1,500.
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

CLIENT_TIMEOUT = 2  # seconds, as for the server
SLACK = 20  # seconds that slow cores may add
SENDERS = 48  # connections at a time: most of them wait for a timeout
SETTINGS = {"CLIENT_TIMEOUT": str(CLIENT_TIMEOUT), "KEEP_ALIVE_TIMEOUT": str(CLIENT_TIMEOUT),
            "N_CTX": "256", "MAX_TOKENS": "1", "PARALLEL": "4", "MAX_BODY_MB": "0.25"}
MARKER = b"GET /v1/models/marker HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
Live = collections.namedtuple("Live", "url port pid log")
Answer = collections.namedtuple("Answer", "status closes body")


@pytest.fixture(scope="module")
def live():
    """A server whose whole log is kept."""
    process = subprocess.Popen(
        [server_python(), str(ROOT / "server.py"), "--port", "0"], cwd=ROOT, text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1", **SETTINGS}, errors="replace",
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    log: list[str] = []
    url = next((match[1] for line in process.stdout if log.append(line) is None and
                (match := re.match(r"try: curl (http://\S+)/v1/chat", line))), None)
    assert url, f"the server did not start: {''.join(log)}"
    threading.Thread(target=lambda: log.extend(process.stdout), daemon=True).start()
    yield Live(url, int(url.rsplit(":", 1)[1]), process.pid, log)
    process.kill()  # one that hangs does not stop for less
    process.wait()


@pytest.fixture(scope="module")
def scale(request):
    """How many times as many requests as in the short run."""
    return 8 if request.config.getoption("--long", default=False) else 1


# ---- what was sent, what came back -------------------------------------------------------

def talk(port: int, payload: bytes, hangs_up: bool = False) -> bytes:
    """All that the server answers, until it closes. hangs_up: we end our side behind the payload."""
    received = b""
    with socket.create_connection(("127.0.0.1", port), timeout=2 * CLIENT_TIMEOUT + SLACK) as raw:
        with contextlib.suppress(ConnectionError):  # it may close before it has read everything
            raw.sendall(payload)
            if hangs_up:
                raw.shutdown(socket.SHUT_WR)
            while block := raw.recv(65536):
                received += block
    return received


def requests_in(payload: bytes) -> list[h11.Request]:
    """The complete requests in bytes on one connection, up to the first that h11 refuses."""
    found: list[h11.Request] = []
    while payload:
        judge = h11.Connection(h11.SERVER, max_incomplete_event_size=2**20)
        judge.receive_data(payload.removeprefix(b"\r\n"))  # an empty line may come first
        try:
            event = head = judge.next_event()
            while type(event) is not h11.EndOfMessage:
                if event is h11.NEED_DATA:
                    return found
                event = judge.next_event()
        except h11.RemoteProtocolError:
            return found
        found.append(head)
        wish = b",".join(value for name, value in head.headers if name == b"connection").lower()
        if b"close" in wish or head.http_version == b"1.0" and b"keep-alive" not in wish:
            return found
        payload = judge.trailing_data[0]
    return found


def read_answer(data: bytes, method: bytes) -> tuple[Answer, bytes]:
    """The first response in the data, by h11, and what follows it."""
    judge = h11.Connection(h11.CLIENT)
    judge.send(h11.Request(method=method, target="/", headers=[("Host", "x")]))
    judge.send(h11.EndOfMessage())
    judge.receive_data(data)
    judge.receive_data(b"")
    body = b""
    while type(event := judge.next_event()) is not h11.EndOfMessage:
        if type(event) is h11.Response:
            head = event
        body += bytes(getattr(event, "data", b""))
    return Answer(head.status_code, (b"connection", b"close") in head.headers, body), \
        judge.trailing_data[0]


def check(live: Live, payload: bytes, hangs_up: bool = False) -> list[int]:
    """Send the bytes; check what comes back; return the statuses."""
    try:
        data = talk(live.port, payload, hangs_up)
        asked, answers = requests_in(payload), []
        while data:
            request = asked[len(answers)] if len(answers) < len(asked) else None
            method = request.method if request else b"GET"
            answer, rest = read_answer(data, method)
            if answer.closes and method == b"HEAD" and rest:  # the server could not read HEAD
                answer, rest = read_answer(data, b"GET")
            data = rest
            assert not (answer.closes and data), "something follows the last answer"
            assert answer.status < 500 or answer.status in (501, 505), "the server is at fault"
            body = answer.body
            if answer.status >= 400 and body:
                error = json.loads(body)["error"]
                assert error.keys() == {"message", "type", "param", "code"}, "a shape of its own"
                assert error["message"] and error["type"] == "invalid_request_error"
            answers.append(answer)
            is_marker = b'the model \\"marker\\" does not exist' in body
            asks_marker = bool(request) and request.target == b"/v1/models/marker"
            assert is_marker == asks_marker, "an answer to another request"
            assert request or answer.closes, "an answer to nothing, and the connection goes on"
        if not (answers and answers[-1].closes or hangs_up):
            assert len(answers) == len(asked), "a request without an answer"
        return [answer.status for answer in answers]
    except (AssertionError, h11.RemoteProtocolError, OSError, ValueError, KeyError) as error:
        raise AssertionError(f"{type(error).__name__}: {error}\nsent: {payload[:3000]!r}") from error


def check_all(live: Live, payloads, hang_up=()) -> None:
    """Many at a time; all failures are told at once."""
    with concurrent.futures.ThreadPoolExecutor(SENDERS) as senders:
        results = [senders.submit(check, live, payload) for payload in payloads]
        results += [senders.submit(check, live, payload, True) for payload in hang_up]
    failures = [str(result.exception()) for result in results if result.exception()]
    assert not failures, f"{len(failures)} of {len(results)}:\n" + "\n".join(failures[:20])


def drawn(strategy, count: int) -> list:
    """Examples, the same in each run. They are collected to be sent many at a time."""
    examples: list = []

    @settings(max_examples=count, derandomize=True, database=None, deadline=None,
              phases=[Phase.generate], suppress_health_check=list(HealthCheck))
    @given(strategy)
    def collect(example):
        examples.append(example)
    collect()
    return examples


# ==== 1. By hand ==========================================================================

def get(target: bytes = b"/health", more: bytes = b"", version: bytes = b"1.1") -> bytes:
    return b"GET %b HTTP/%b\r\nHost: localhost\r\n%b\r\n" % (target, version, more)


def post(body: bytes, more: bytes = b"", path: bytes = b"/tokenize") -> bytes:
    length = b"" if b"ength:" in more or b"oding:" in more else b"Content-Length: %d\r\n" % len(body)
    return b"POST %b HTTP/1.1\r\nHost: localhost\r\n%b%b\r\n%b" % (path, length, more, body)


HI, CHUNKED = b'{"content":"hi"}', b"Transfer-Encoding: chunked\r\n"
HI_CHUNK, LAST = b"10\r\n%b\r\n" % HI, b"0\r\n\r\n"
TAKEN, REFUSED = [200, 404], [400]  # the marker is answered by 404; a refusal is the last answer
BY_HAND = [
    (get(), TAKEN), (get(b"http://localhost/health"), TAKEN), (b"\r\n" + get(), TAKEN),
    (get(b"/health", version=b"1.0"), [200]), (get(more=b"Connection: close\r\n"), [200]),
    (get(version=b"1.0", more=b"Connection: keep-alive\r\n"), TAKEN),
    (get().replace(b"GET", b"HEAD"), TAKEN), (get().replace(b"GET", b"OPTIONS"), [204, 404]),
    (get(b"*").replace(b"GET", b"OPTIONS"), [204, 404]), (get() * 20, [200] * 20 + [404]),
    (get(more=b"Content-Length: 5\r\n") + b"hello", TAKEN),
    (get(more=b"Expect: 100-continue\r\n"), TAKEN), (post(HI), TAKEN), (post(HI) * 9, [200] * 9 + [404]),
    (post(HI, b"Expect: 100-continue\r\n"), TAKEN), (post(HI_CHUNK + LAST, CHUNKED), TAKEN),
    (post(b"010;a=b\r\n" + HI + b"\r\n0\r\nTrailer: x\r\n\r\n", CHUNKED), TAKEN),
    (post(HI_CHUNK + LAST, b"transfer-ENCODING:\tchunked \r\n"), TAKEN),
    (get(b"/nothing"), [404, 404]), (get(b"/%2e%2e/health"), [404, 404]),
    (post(b"", path=b"/health"), [405, 404]), (get(more=b"Origin: http://evil.example\r\n"), [403, 404]),
    # Two lengths, or none that can be read.
    (post(HI, b"Content-Length: 16\r\nContent-Length: 16\r\n"), REFUSED),
    (post(HI, b"Content-Length: 16\r\nContent-Length: 0\r\n"), REFUSED),
    (post(LAST, CHUNKED + b"Content-Length: 5\r\n"), REFUSED), (post(LAST, CHUNKED * 2), REFUSED),
    *((post(HI, b"Content-Length: %b\r\n" % n), REFUSED) for n in (
        b"+16", b"-1", b"0x10", b"16, 16", b"1e1", b"", b"16 0", b"\xb2", b"1_6")),
    (post(HI, b"Content-Length : 16\r\n"), REFUSED), (post(HI, b"Content-Length: 9999999999\r\n"), [413]),
    (post(HI, b"Encoding: x\r\n"), [411]), (post(b"x" * 300_000), [413]),
    # Codings that are nearly chunked.
    *((post(LAST, b"Transfer-Encoding: %b\r\n" % coding), [501]) for coding in (
        b"chunked, chunked", b"identity", b"gzip, chunked", b"", b"xchunked", b'"chunked"', b"\xe2chunked")),
    *((post(LAST, line), REFUSED) for line in (
        b"Transfer-Encoding : chunked\r\n", b" Transfer-Encoding: chunked\r\n",
        b"Transfer-Encoding:\r\n chunked\r\n", b"Transfer-Encoding: \x0bchunked\r\n")),
    (post(LAST, CHUNKED).replace(b"1.1", b"1.0", 1), REFUSED),
    # Chunks: of impossible sizes, with ends that others read differently.
    *((post(size + b"\r\n" + HI + b"\r\n" + LAST, CHUNKED), REFUSED) for size in (
        b"-10", b"+10", b"0x10", b"1_0", b"", b"g", b" 10", b"10\0", b"000000010", b"10 x",
        b"10;" + b"x" * 999, b"10;a\rb", b"10;a\nb", b"10\r", b"\xff")),
    (post(b"ffffffff\r\n" + HI, CHUNKED), [413]), (post(HI_CHUNK[:-2] + LAST, CHUNKED), REFUSED),
    (post(b"10\n" + HI_CHUNK[4:] + LAST, CHUNKED), REFUSED),
    (post(HI_CHUNK + b"0\r\nno trailer\r\n\r\n", CHUNKED), REFUSED),
    # Heads.
    (b"GET /\r\n", REFUSED), (b"GET / HTTP/1.1\r\n\r\n", REFUSED), (b"GET / HTTP/1.11\r\n\r\n", REFUSED),
    (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", [505]), (b"\x16\x03\x01\x02\0\x01\0\x01\xfc\r\n", REFUSED),
    (b"GET  / HTTP/1.1\r\nHost: localhost\r\n\r\n", REFUSED), (get(b"health"), REFUSED),
    (get(b"localhost:80").replace(b"GET", b"CONNECT"), [501]), (get(b"*"), REFUSED),
    (get("/é".encode()), REFUSED), (get(b"ftp://localhost/health"), REFUSED),
    (get(b"/" + b"x" * 9000), [414]), (get(more=b"X: y\r\n" * 200), [431]),
    (get(more=b"X: " + b"y" * 200_000 + b"\r\n"), [431]),
    *((get(more=line + b"\r\n"), REFUSED) for line in (
        b"X", b"X y: z", b": z", b"X: a\0b", b"X: a\rb", b"X: y\r\n folded", b"\xe9: x", b"X:\x7f",
        b"Host: localhost", b"Authorization: a\r\nAuthorization: b")),
]


def test_each_trick_of_request_smuggling_gets_the_one_answer_that_is_safe(live):
    """Taken whole, and then the marker is answered; or refused, and nothing behind it is read."""
    with concurrent.futures.ThreadPoolExecutor(SENDERS) as senders:
        results = list(senders.map(lambda case: check(live, case[0] + MARKER), BY_HAND))
    wrong = [(sent[:300], got, allowed) for (sent, allowed), got in zip(BY_HAND, results)
             if got != allowed]
    assert not wrong, "\n".join(map(str, wrong))


# ==== 2. Cut short ========================================================================

CHAT = b'{"messages":[{"role":"user","content":"Hi"}],"max_tokens":1}'
CHAT_PATH = b"/v1/chat/completions"
BASES = [get(), post(HI), post(HI_CHUNK + LAST, CHUNKED), post(CHAT, path=CHAT_PATH),
         get(more=b"Authorization: Bearer a\r\nOrigin: http://localhost\r\nAccept: */*\r\n"),
         post(HI, b"Expect: 100-continue\r\nConnection: keep-alive\r\n")]


def test_a_request_that_ends_anywhere_leaves_nothing_behind(live, scale):
    """A client that hangs up is let go at once, one that falls silent after client_timeout."""
    cut = [base[:end] for base in BASES[:2 * scale] for end in range(len(base))]
    check_all(live, cut[::5], hang_up=cut)


# ==== 3. Mutations ========================================================================

NASTY = [b"\r", b"\n", b"\r\n", b"\r\n\r\n", b"\0", b"\r\n ", b"\t", b" ", b":", b";", b"\x85", b"\xff",
         "é".encode(), b"%00", b"-", b"0", b"fffffffff", b"1" * 400, b"x" * 70_000, *(
             b"\r\n" + line for line in (
                 b"Host: other", b"Host:", b"Content-Length: 0", b"Content-Length: 99",
                 b"Transfer-Encoding: chunked", b"Transfer-Encoding: x", b"Connection: close",
                 b"Connection: keep-alive", b"Expect: 100-continue", b"Origin: null", b"X: y"))]


@st.composite
def mutations(draw):
    """A good request with up to three edits, at the ends of its lines or anywhere."""
    sent = draw(st.sampled_from(BASES))
    for _ in range(draw(st.integers(1, 3))):
        ends = [match.start() for match in re.finditer(rb"\r\n| ", sent)]
        start = draw(st.one_of(st.sampled_from(ends or [0]), st.integers(0, len(sent))))
        length = draw(st.sampled_from([0, 0, 0, 1, 2, 8]))
        new = draw(st.one_of(st.sampled_from(NASTY), st.binary(max_size=4),
                             st.just(sent[start:start + 40])))
        sent = sent[:start] + new + sent[start + length:]
    return sent


def test_broken_requests_never_put_the_answers_out_of_step(live, scale):
    """Whatever the server takes, h11 takes, and both see it end at the same byte."""
    sent = drawn(mutations(), 500 * scale)
    sent += drawn(st.binary(max_size=200) | st.text(max_size=99).map(str.encode), 40 * scale)
    check_all(live, [one + MARKER for one in sent])


# ==== 4. JSON =============================================================================

BODIES = {CHAT_PATH: json.loads(CHAT), b"/v1/completions": {"prompt": "Hi", "max_tokens": 1},
          b"/v1/embeddings": {"input": "Hi"}, b"/tokenize": {"content": "Hi"},
          b"/detokenize": {"tokens": [5]}, b"/apply-template": json.loads(CHAT)}
FIELDS = ["messages", "prompt", "input", "content", "tokens", "model", "stop", "n", "stream", "tools",
          "temperature", "logit_bias", "response_format", "tool_choice", "logprobs", "suffix", "x\u2028"]
SCALARS = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=9), st.sampled_from(
    [10**40, 2**31, -2**63, 1e308, "\ud800", "\0", "<|im_end|>", "\x1b[2J", [0], "1" * 500]))
VALUES = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
    st.sampled_from(["role", "type", "content", "text", "\udfff"]), inner, max_size=3), max_leaves=6)
HEADERS = {  # of each header: what may stand in it
    b"Authorization": [b"Bearer x", b"Basic \xff", b""], b"x-api-key": [b"k", b"\xe9"],
    b"Origin": [b"null", b"http://localhost:3000", b"http://[", b"http://evil.example"],
    b"Connection": [b"keep-alive", b"close", b"upgrade"], b"Accept": [b"text/event-stream", b""],
    b"Content-Type": [b"text/plain", b"application/json; charset=utf-16"]}


@st.composite
def json_requests(draw):
    """A body, from nearly right to no JSON at all, for any route."""
    path, body = draw(st.sampled_from(list(BODIES.items())))
    changed = body | draw(st.dictionaries(st.sampled_from(FIELDS), VALUES, max_size=2))
    text = json.dumps(draw(st.one_of(st.just(changed), st.just(changed), VALUES)))
    name, depth = draw(st.sampled_from(FIELDS)), draw(st.integers(1, 1200))
    deep = draw(st.sampled_from(["[" * depth + "]" * depth, '{"a":' * depth + "1" + "}" * depth]))
    tricks = [text[:-1] + f',"{name}":{value}}}' for value in (  # a second key, too
        deep, "1e999", "-0", "9" * 5000, "NaN", '"\\ud83d"', "01", '"\t"', "0.1e-9999")]
    text = draw(st.sampled_from([text] * len(tricks) + tricks + [text[:-1], text + "x", deep]))
    coding = draw(st.sampled_from(["utf-8"] * 9 + ["utf-16", "utf-8-sig", "utf-32", "utf-7"]))
    chosen = draw(st.fixed_dictionaries({}, optional={
        name: st.sampled_from(values) for name, values in HEADERS.items()}))
    lines = b"".join(b"%b: %b\r\n" % line for line in chosen.items())
    return post(text.encode(coding, "surrogatepass"), lines, path)


def test_no_body_breaks_a_route_or_the_connection(live, scale):
    """Each answer is the route's or an error in the OpenAI shape; then the marker's comes."""
    check_all(live, [one + MARKER for one in drawn(json_requests(), 500 * scale)])


# ==== 5. Afterwards =======================================================================

def test_a_head_of_blanks_keeps_nobody_waiting(live):
    """A pattern that tries every way to cut blanks from a value would hold the GIL for hours."""
    start = time.monotonic()
    assert check(live, get(more=b"X:" + b" " * 4000 + b"\1\r\n") + MARKER) == REFUSED
    assert check(live, get(more=b"X: a" + b" " * 30_000 + b"b\r\n") + MARKER) == TAKEN
    assert time.monotonic() - start < 5


def test_after_all_that_the_server_is_as_it_was(live):
    """Healthy, no thread or file lost, and no line in the log that tells of a fault of its own."""
    deadline = time.monotonic() + 2 * CLIENT_TIMEOUT + SLACK
    n_threads = functools.partial(os.listdir, f"/proc/{live.pid}/task")
    while len(n_threads()) > 30 and time.monotonic() < deadline:  # the last ones linger
        time.sleep(0.1)
    assert httpx.get(live.url + "/health").json()["status"] == "ok"
    reply = httpx.post(live.url + CHAT_PATH.decode(), content=CHAT, timeout=SLACK)
    assert reply.status_code == 200 and reply.json()["choices"]
    assert "twofile_connections 1\n" in httpx.get(live.url + "/metrics").text
    text = "".join(live.log)
    for fault in ("Traceback", "internal error", " 500 ", "Exception", "twofile_error"):
        assert fault not in text, text[max(0, text.index(fault) - 3000):][:6000]
