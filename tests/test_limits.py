"""What keeps a server fit to be left running: keys, limits, browsers, clients that dawdle or lie,
and what it tells of itself. Most tests need no model: a server without one answers 503."""

import contextlib
import gc
import http.client
import json
import logging
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import types
import weakref

import httpx
import openai
import pytest
from prometheus_client import parser as prometheus

import conftest
import engine
import server
from features import apps, crowds, rates

KEY = "sk-a-secret-key"
HI = [{"role": "user", "content": "Say hello."}]


@contextlib.contextmanager
def listening(**settings):
    """A server in this process, without a model."""
    running = server.Server(conftest.config(port=0, **settings))
    threading.Thread(target=running.serve_forever, args=(0.02,), daemon=True).start()
    try:
        yield running
    finally:
        running.drain()


def ask(running, path="/v1/models", method="GET", body=None, **headers):
    """One request; underscores in header names stand for dashes."""
    headers = {name.replace("_", "-"): value for name, value in headers.items()}
    return httpx.request(method, running.url + path, content=body, headers=headers)


def send_raw(running, *pieces: bytes, pause=0.0) -> bytes:
    """Send bytes, wait between the pieces, and read until the server closes."""
    answer = b""
    with socket.create_connection(("127.0.0.1", running.server_port), timeout=20) as raw:
        try:
            for piece in pieces:
                raw.sendall(piece)
                time.sleep(pause)
        except OSError:
            pass  # it has closed already; what it said can still be read
        with contextlib.suppress(ConnectionResetError):
            while block := raw.recv(65536):
                answer += block
    return answer


def wait_for(condition, seconds=10):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


# ==== Keys ================================================================================


def test_with_keys_only_root_and_health_are_public(caplog):
    """Every other path is 401 without a key, in OpenAI's shape, and 200 or 503 with one."""
    caplog.set_level(logging.DEBUG, logger="server")
    with listening(api_keys=["other", KEY]) as running:
        for path in ("/v1/models", "/metrics", "/slots", "//v1/models", "/v1/models/",
                     "/v1/models/x", "/%761/models", "/health/../v1/models",
                     "http://localhost/v1/models"):
            status = ask(running, path).status_code if path[0] == "/" else int(send_raw(
                running, b"GET %b HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
                % path.encode()).split()[1])
            assert status in (401, 404), path
        refused = ask(running, "/v1/chat/completions", "POST", b"{}", authorization="Bearer wrong")
        assert refused.status_code == 401 and refused.headers["www-authenticate"] == "Bearer"
        assert refused.json()["error"]["code"] == "invalid_api_key"
        assert "API key is missing" in ask(running).json()["error"]["message"]
        for headers in ({"authorization": f"Bearer {KEY}"}, {"authorization": f"bearer  {KEY}"},
                        {"x_api_key": KEY}, {"x_api_key": KEY, "authorization": "Bearer no"}):
            assert ask(running, **headers).json()["error"]["code"] == "loading"
            assert ask(running, "/metrics", **headers).status_code == 200
        assert ask(running, "/").status_code == 200
        assert ask(running, "/health").json() == {"status": "loading", "progress": 0.0}
        ask(running, f"/v1/models?key={KEY}")
        for line in (b"Authorization : Bearer %b", b"a: b\r\n Bearer %b", b"x-api-key: %b\0"):
            send_raw(running, b"GET / HTTP/1.1\r\nHost: localhost\r\n" + line % KEY.encode()
                     + b"\r\n\r\n")
        send_raw(running, b"GET /?key=%b HTTP/1.1 \r\n\r\n" % KEY.encode())
        with pytest.raises(openai.AuthenticationError):
            openai.OpenAI(base_url=f"{running.url}/v1", api_key="wrong").models.list()
    said = [record.getMessage() for record in caplog.records if record.name == "server"]
    assert any("/v1/models" in line for line in said) and not any(KEY in line for line in said)


def test_metrics_are_public_by_a_switch_and_keys_can_be_switched_off():
    with listening(api_keys=[KEY], public_metrics=True) as running:
        assert ask(running, "/metrics").status_code == 200
        assert ask(running, "/slots").status_code == 401
    with listening(api_keys=[KEY], auth_enabled=False) as running:
        assert ask(running).status_code == 503


@pytest.mark.parametrize("text, environ, words", [
    ("auth: {enabled: true}", {}, "auth is enabled, but there are no api_keys"),
    ("auth_enabled: true", {}, "auth is enabled, but there are no api_keys"),
    (f"auth: {{api_keys: {KEY}}}", {}, "api_keys: expected a list (each item a string), got"),
    ("auth: {api_keys: [sk-secret-1234, {secret: 1}]}", {}, "api_keys[1]: expected a string, got"),
    ("auth: {api_keys: [sk secret]}", {}, "api_keys[0]: what was sent must be printable ASCII"),
    ("", {"API_KEYS": "sk-secret,sk-sécret"}, "api_keys[1]: what was sent must be printable ASCII"),
    ("server: {enabled: true}", {}, "unknown key 'enabled'"),
    ("allowed_hosts: ['box.example:80']", {}, "must be like box.example, without a port"),
    ("host: ''", {}, "host: \"\" must be an address, such as 127.0.0.1"),
    ("", {"FEATURES": "browsers", "CORS_ORIGINS": "https://app.example/"}, "must be like https://app.example"),
    ("", {"FEATURES": "browsers", "CORS_ORIGINS": "app.example"}, "must be like https://app.example"),
])
def test_wrong_settings_are_refused_without_showing_a_key(tmp_path, text, environ, words):
    file = tmp_path / "c.yaml"
    file.write_text(text)
    with pytest.raises(server.ConfigError) as caught:
        server.load_config(["--config", str(file)], environ)
    assert words in str(caught.value) and "secret" not in str(caught.value)


# ==== How often ===========================================================================


def test_the_rate_limit_counts_each_key_and_else_each_address():
    """429 says when to come back; guesses of keys count for the address they come from."""
    with listening(api_keys=[KEY, "other"], rate_limiting_enabled=True,
                   requests_per_minute=3) as running:
        left = [ask(running, x_api_key=KEY).headers["x-ratelimit-remaining-requests"]
                for _ in range(3)]
        assert left == ["2", "1", "0"]
        refused = ask(running, x_api_key=KEY)
        assert refused.status_code == 429 and 0 < int(refused.headers["retry-after"]) <= 20
        assert refused.headers["x-ratelimit-limit-requests"] == "3"
        assert re.fullmatch(r"(59|60)\.\d{3}s", refused.headers["x-ratelimit-reset-requests"])
        assert refused.json()["error"]["code"] == "rate_limit_exceeded"
        assert ask(running, x_api_key="other").status_code == 503
        guesses = [ask(running, x_api_key=str(guess), x_forwarded_for=str(guess)).status_code
                   for guess in range(5)]
        assert guesses == [401, 401, 401, 429, 429]
        assert ask(running, "/health").status_code == 503  # never counted
        with pytest.raises(openai.RateLimitError):
            openai.OpenAI(base_url=f"{running.url}/v1", api_key=KEY, max_retries=0).models.list()


def test_a_bucket_fills_evenly_and_the_memory_is_bounded(monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(rates.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(rates, "MAX_BUCKETS", 10)
    limiter = rates.RateLimiter(per_minute=6)
    for _ in range(6):
        limiter.take("a")
    for seconds, may in ((9, False), (1, True), (5, False), (5, True), (1000, True)):
        now[0] += seconds
        with contextlib.nullcontext() if may else pytest.raises(server.ApiError):
            limiter.take("a")
    for number in range(100):
        limiter.take(str(number))
    assert len(limiter.buckets) == 10 and "99" in limiter.buckets


def test_a_key_that_looks_like_an_address_is_not_the_address():
    """Who guesses keys uses up what the address may ask, and no key's."""
    with listening(api_keys=["127.0.0.1"], rate_limiting_enabled=True, requests_per_minute=1) as running:
        assert [ask(running, x_api_key="guess").status_code for _ in range(2)] == [401, 429]
        assert ask(running, x_api_key="127.0.0.1").status_code == 503  # no model, but no 429


def test_an_ipv6_client_is_its_network():
    """Who owns a /64 has 2**64 addresses to come from."""
    assert rates.client_of("2001:db8::1") == rates.client_of("2001:db8::ffff:2")
    assert rates.client_of("2001:db8::1") != rates.client_of("2001:db8:0:1::1")
    assert rates.client_of("::ffff:10.0.0.1") == "10.0.0.1" == rates.client_of("10.0.0.1")
    assert rates.client_of("fe80::1%eth0") == "fe80::/64"


# ==== Browsers ============================================================================


def test_on_a_loopback_address_only_our_own_names_are_served():
    """DNS rebinding (CVE-2024-28224): a page whose name now points at 127.0.0.1."""
    with listening(allowed_hosts=["Box.example"]) as running:
        for host in ("localhost", "localhost:9", "127.0.0.1:80", "[::1]:80", "127.9.9.9",
                     "[::ffff:127.0.0.1]", "localhost.", "LOCALHOST", "app.localhost",
                     "box.example:443"):
            assert ask(running, host=host).status_code == 503, host
        for host in ("evil.com", "127.0.0.1.evil.com", "localhost.evil.com", "8.8.8.8",
                     "evil.com:80", "[2001:db8::1]"):
            refused = ask(running, host=host)
            assert refused.status_code == 403, host
            assert refused.json()["error"]["code"] == "host_not_allowed"
        for host in ("a b", "localhost@evil.com", "[::1", "localhost:x"):
            assert ask(running, host=host).status_code == 400, host
    with listening(host="0.0.0.0") as running:
        answer = send_raw(running, b"GET / HTTP/1.1\r\nHost: box.lan\r\nConnection: close\r\n\r\n")
        assert answer.startswith(b"HTTP/1.1 200")
        page = (b"POST /v1/completions HTTP/1.1\r\nHost: %b\r\nOrigin: http://%b\r\n"
                b"Content-Length: 2\r\nConnection: close\r\n\r\n{}")
        for host, status in ((b"evil.com", 403), (b"10.0.0.1:80", 400)):  # a name can be rebound
            assert send_raw(running, page % (host, host)).startswith(b"HTTP/1.1 %d" % status)
    with listening(host="0.0.0.0", allowed_hosts=["box.lan"]) as running:
        for host, status in (("box.lan", 503), ("localhost", 503), ("evil.com", 403)):
            answer = send_raw(running, b"GET /health HTTP/1.1\r\nHost: %b\r\nConnection: close"
                              b"\r\n\r\n" % host.encode())
            assert answer.startswith(b"HTTP/1.1 %d" % status), host


def test_web_pages_from_elsewhere_are_refused_unless_named():
    """Also simple requests, which a browser sends without asking first."""
    with listening(cors_origins=["https://app.example"], max_body_mb=1 / 16) as running:
        for origin in ("http://localhost:3000", "http://127.0.0.1", "https://app.example",
                       "tauri://localhost", running.url):
            answer = ask(running, origin=origin)
            assert answer.status_code == 503
            assert answer.headers["access-control-allow-origin"] == origin
            assert answer.headers["vary"] == "Origin"
            too_large = ask(running, "/v1/completions", "POST", b"x" * 2**17, origin=origin)
            assert too_large.status_code == 413  # and the page may know why
            assert too_large.headers["access-control-allow-origin"] == origin
        for origin in ("https://evil.com", "null", "https://app.example.evil.com", "http://[",
                       "https://app.example:444", "http://localhost.evil.com"):
            refused = ask(running, "/v1/chat/completions", "POST", b"{}", origin=origin,
                          content_type="text/plain")
            assert refused.status_code == 403, origin
            assert "access-control-allow-origin" not in refused.headers
    with listening(cors_origins=["*"]) as running:
        answer = ask(running, origin="https://any.example")
        assert answer.headers["access-control-allow-origin"] == "*"
        assert "access-control-allow-credentials" not in answer.headers


def test_a_preflight_passes_without_a_key():
    with listening(api_keys=[KEY], rate_limiting_enabled=True, requests_per_minute=1) as running:
        for _ in range(3):
            answer = ask(running, "/v1/chat/completions", "OPTIONS", origin="http://localhost:3000",
                         access_control_request_method="POST",
                         access_control_request_headers="authorization, x-stainless-lang")
            assert answer.status_code == 204 and answer.content == b""
            assert "POST" in answer.headers["access-control-allow-methods"]
            assert "x-stainless-lang" in answer.headers["access-control-allow-headers"]
        assert ask(running, "/v1/chat/completions", "OPTIONS", origin="http://evil.com",
                   access_control_request_method="POST").status_code == 403
        assert ask(running, "/health", "OPTIONS").headers["allow"] == "GET, HEAD, OPTIONS"
        assert ask(running, "/nowhere", "OPTIONS").status_code == 404
        refused = ask(running, "/health", "DELETE")  # the same methods
        assert (refused.status_code, refused.headers["allow"]) == (405, "GET, HEAD, OPTIONS")
        every = send_raw(running, b"OPTIONS * HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        assert re.search(rb"\nAllow: DELETE, GET, HEAD, OPTIONS, POST\r", every)


def test_an_open_door_is_warned_of():
    """Listening on the network without a key is allowed, but said."""
    command = [sys.executable, "-u", str(conftest.ROOT / "server.py"), "--port", "0"]
    for settings, warns in (({"HOST": "0.0.0.0"}, True), ({"HOST": "127.0.0.1"}, False),
                            ({"HOST": "0.0.0.0", "API_KEYS": KEY}, False)):
        process = subprocess.Popen(command, env={**os.environ, **settings}, text=True,
                                   stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        lines = [process.stdout.readline() for _ in range(2)]
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=30) == 0
        assert ("asks for no key" in "".join(lines)) == warns, lines
        assert KEY not in "".join(lines) + process.stdout.read()


# ==== Bad clients =========================================================================

POST = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n"
GET = b"GET /health HTTP/1.1\r\nHost: localhost\r\n"
CHUNKED = POST + b"Transfer-Encoding: chunked\r\n\r\n"


@pytest.mark.parametrize("sent, status", [
    (POST + b"Content-Length: 2\r\nContent-Length: 2\r\n\r\n{}", 400),
    (POST + b"Content-Length: 2\r\nContent-Length: 3\r\n\r\n{}", 400),
    (POST + b"Content-Length: 2, 2\r\n\r\n{}", 400),
    (POST + b"Content-Length: +2\r\n\r\n{}", 400),
    (POST + b"Content-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 400),
    (POST + b"Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n", 501),
    (POST + b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 400),
    (b"POST / HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 400),
    (GET + b"a: b\rContent-Length: 5\r\n\r\n", 400),
    (GET + b"a: b\r\n folded\r\n\r\n", 400),
    (GET + b"a : b\r\n\r\n", 400),
    (GET + b"a: b\n\r\n", 400),
    (b"GET / HTTP/1.0\n\n", 400),
    (b"\r\n\r\n", 400),
    (GET + b"a: b\x00\r\n\r\n", 400),
    (GET + b"no colon\r\n\r\n", 400),
    (GET + b"Host: evil.com\r\n\r\n", 400),
    (b"GET /health HTTP/1.1\r\n\r\n", 400),
    (b"GET  /health HTTP/1.1\r\nHost: localhost\r\n\r\n", 400),
    (b"GET health HTTP/1.1\r\nHost: localhost\r\n\r\n", 400),
    (b"GET /hea\rlth HTTP/1.1\r\nHost: localhost\r\n\r\n", 400),
    (b"CONNECT evil.com:443 HTTP/1.1\r\nHost: evil.com\r\n\r\n", 501),
    (b"BREW /health HTTP/1.1\r\nHost: x\r\n\r\n", 501),
    (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 505),
    (CHUNKED + b"x\r\n", 400),
    (CHUNKED + b"-1\r\n", 400),
    (CHUNKED + b"2\r\n{}0\r\n\r\n", 400),
    (CHUNKED + b"2\n{}\r\n0\r\n\r\n", 400),
    (CHUNKED + b"2;a\rb\r\n{}\r\n0\r\n\r\n", 400),
    (CHUNKED + b"2\r\n{}\r\n0\r\nno trailer\r\n\r\n", 400),
    (CHUNKED + b"2\r\n{}\n0\r\n\r\n", 400),
    (CHUNKED + b"2" + b";x" * 200 + b"\r\n{}\r\n0\r\n\r\n", 400),
    (CHUNKED + b"ffffffff\r\n", 413),
    (CHUNKED + b"fffffffff\r\n", 400),
    (CHUNKED + b"0\r\n" + b"t: x\r\n" * 200, 400),
    (CHUNKED + b"8000\r\n" + b"x" * 0x8000 + b"\r\n8001\r\n", 413),
])
def test_what_two_servers_could_read_differently_is_refused(sent, status):
    """Request smuggling: after the refusal the connection closes, and what stands behind it is
    no request."""
    with listening(max_body_mb=1 / 16, client_timeout=5) as running:
        answer = send_raw(running, sent + GET + b"\r\n")
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 %d " % status), answer
    assert set(json.loads(body)["error"]) == {"message", "type", "param", "code"}
    assert answer.count(b"x-request-id") == 1 and b"Connection: close" in head


@pytest.mark.parametrize("blanks", [b"X:" + b" " * 30_000 + b"\x01",
                                    b"X: a" + b" " * 30_000 + b"a"])
def test_no_header_takes_long_to_read(blanks):
    """A pattern that can match blanks in two ways tries them all, with the GIL held."""
    with listening() as running:
        started = time.monotonic()
        answer = send_raw(running, GET + b"Connection: close\r\n" + blanks + b"\r\n\r\n")
        assert answer.startswith((b"HTTP/1.1 400", b"HTTP/1.1 503"))
        assert time.monotonic() - started < 1


def test_an_empty_line_behind_a_body_is_no_request(url):
    """Old clients send one; an answer to it would be taken for that to the next request."""
    port = int(url.rsplit(":", 1)[1])
    with socket.create_connection(("127.0.0.1", port), timeout=20) as raw:
        raw.sendall(POST + b"Content-Length: 2\r\n\r\n{}\r\n" + GET
                    + b"Connection: close\r\n\r\n")
        answer = b"".join(iter(lambda: raw.recv(65536), b""))
    assert re.findall(rb"HTTP/1.1 (\d+)", answer) == [b"400", b"200"]
    with listening(keep_alive_timeout=0.3, client_timeout=0.3) as running:
        answer = send_raw(running, GET + b"\r\n\r\n")
        assert answer.count(b"x-request-id") == 1


@pytest.mark.parametrize("method, path", [("OPTIONS", "/v1/chat/completions"), ("GET", "/health")])
def test_a_large_body_that_nobody_reads_is_not_kept_in_memory(method, path):
    """Not even of those who need no key."""
    with listening(api_keys=[KEY]) as running:
        head = f"{method} {path} HTTP/1.1\r\nHost: localhost\r\n".encode()
        assert b" 413 " in send_raw(running, head + b"Content-Length: 70000\r\n\r\n")[:20]
        chunked = head + b"Transfer-Encoding: chunked\r\n\r\n11171\r\n" + bytes(70_001)
        assert b" 413 " in send_raw(running, chunked)[:20]


def test_an_error_of_the_servers_own_is_not_taken_for_a_client_that_left(monkeypatch):
    """Too many open files is an OSError, too."""
    def fail(handler):
        raise OSError(24, "Too many open files")
    monkeypatch.setitem(conftest.house().routes, ("GET", "/fail"), server.Route(fail, "fails"))
    with listening() as running:
        assert ask(running, "/fail").status_code == 500


def test_a_half_sent_head_does_not_delay_the_end():
    with listening() as running:
        raw = socket.create_connection(("127.0.0.1", running.server_port))
        raw.sendall(b"GET / HT")
        wait_for(lambda: running.models.crowd.unready)
        started = time.monotonic()
    assert time.monotonic() - started < 2
    raw.close()


@pytest.mark.parametrize("method, path, status", [
    ("HEAD", "/health", 503), ("HEAD", "/", 200), ("HEAD", "/nowhere", 404),
    ("GET", "/nowhere", 404), ("HEAD", "/v1/completions", 405), ("DELETE", "/health", 405),
    ("OPTIONS", "*", 204),
    ("PUT", "/v1/completions", 405)])
def test_every_method_is_answered_and_the_connection_goes_on(method, path, status):
    """Framing: a HEAD and a 204 have no body, whatever their headers say."""
    with listening() as running:
        connection = http.client.HTTPConnection("127.0.0.1", running.server_port, timeout=20)
        for _ in range(2):
            connection.request(method, path, b"" if method == "PUT" else None)
            answer = connection.getresponse()
            body = answer.read()
            assert answer.status == status
            assert bool(body) == (method != "HEAD" and status != 204)
            assert (answer.headers["Allow"] is not None) == (status in (204, 405))
            if body and status >= 400:
                assert set(json.loads(body)["error"]) == {"message", "type", "param", "code"}
        connection.close()


def test_a_chunked_body_is_accepted_and_the_next_request_stands_behind_it(url):
    """Extensions and trailers mean nothing; `Expect: 100-continue` is answered first."""
    body = json.dumps({"prompt": "Once", "max_tokens": 1}).encode()
    cut = len(body) // 2
    port = int(url.rsplit(":", 1)[1])
    sent = (CHUNKED.replace(b"\r\n\r\n", b"\r\nExpect: 100-continue\r\n\r\n")
            + b"%x;name=value\r\n%b\r\n%X\r\n%b\r\n0\r\ntrailer: x\r\n\r\n" % (
                cut, body[:cut], len(body) - cut, body[cut:])
            + GET + b"Connection: close\r\n\r\n")
    with socket.create_connection(("127.0.0.1", port), timeout=20) as raw:
        raw.sendall(sent)
        answer = b"".join(iter(lambda: raw.recv(65536), b""))
    assert re.findall(rb"HTTP/1.1 (\d+)", answer) == [b"100", b"200", b"200"]
    assert b'"text_completion"' in answer and b'"status":"ok"' in answer


@pytest.mark.parametrize("pieces, words", [
    ([b"G", b"E", b"T", b" ", b"/", b" ", b"H"], b"408"),
    ([POST + b"Content-Length: 10\r\n\r\n", *[b" "] * 6], b"408"),
    ([CHUNKED, *[b"1\r\n \r\n"] * 6], b"408"),
    ([b""], b""),
    ([GET + b"\r\n"], b"503"),
])
def test_who_dawdles_is_timed_out_however_regularly_bytes_come(pieces, words):
    """A limit for the whole head and the whole body, and for a connection that just waits."""
    with listening(client_timeout=0.5, keep_alive_timeout=0.5) as running:
        started = time.monotonic()
        answer = send_raw(running, *pieces, pause=0.15)
        assert answer.startswith(b"HTTP/1.1 " + words) if words else not answer
        assert time.monotonic() - started < 5
        wait_for(lambda: not running.models.crowd.connections)


def test_at_the_limit_idle_connections_make_room_and_busy_ones_are_not_disturbed(monkeypatch):
    """503 only when every connection is being answered; the oldest debtor goes first."""
    finish = threading.Event()
    monkeypatch.setitem(conftest.house().routes, ("GET", "/slow"),
                        server.Route(lambda handler: finish.wait(20) and handler.send_json(
                            {"done": True}), "takes a while"))
    with listening(max_connections=4) as running:
        idle = [socket.create_connection(("127.0.0.1", running.server_port)) for _ in range(20)]
        assert ask(running, "/").status_code == 200
        wait_for(lambda: len(running.models.crowd.connections) <= 4)
        answers = []
        busy = [threading.Thread(target=lambda: answers.append(ask(running, "/slow").json()))
                for _ in range(4)]
        for thread in busy:
            thread.start()
        wait_for(lambda: running.in_flight == 4)
        refused = ask(running, "/")
        assert refused.status_code == 503 and refused.headers["retry-after"]
        assert refused.json()["error"]["code"] == "too_many_connections"
        assert refused.headers["connection"] == "close"
        finish.set()
        for thread in busy:
            thread.join()
        assert answers == [{"done": True}] * 4 and ask(running, "/").status_code == 200
        for connection in idle:
            connection.close()


def test_who_is_to_be_refused_takes_nobody_s_place(monkeypatch):
    """A connection above the limit that says nothing is not one of those that are served: when one of
    them falls idle, it makes room for the next client, as ever."""
    finish = threading.Event()
    monkeypatch.setitem(conftest.house().routes, ("GET", "/slow"),
                        server.Route(lambda handler: finish.wait(20) and handler.send_json(
                            {"done": True}), "takes a while"))
    with listening(max_connections=2) as running, contextlib.ExitStack() as stack:
        busy = [stack.enter_context(socket.create_connection(("127.0.0.1", running.server_port)))
                for _ in range(2)]
        for connection in busy:
            connection.sendall(GET.replace(b"/health", b"/slow") + b"\r\n")
        wait_for(lambda: running.in_flight == 2)
        silent = stack.enter_context(socket.create_connection(("127.0.0.1", running.server_port)))
        wait_for(lambda: running.models.crowd.refused)
        finish.set()
        assert all(connection.recv(65536).startswith(b"HTTP/1.1 200") for connection in busy)
        wait_for(lambda: len(running.models.crowd.unready) == 2)
        assert ask(running, "/").status_code == 200
        silent.sendall(GET + b"\r\n")
        assert silent.recv(65536).startswith(b"HTTP/1.1 503")


def test_a_body_in_chunks_does_not_get_past_the_limit_of_connections(monkeypatch):
    """Whatever the body is like, who is refused is told so before it is looked at."""
    finish = threading.Event()
    monkeypatch.setitem(conftest.house().routes, ("GET", "/slow"),
                        server.Route(lambda handler: finish.wait(20) and handler.send_json({}), "takes a while"))
    with listening(max_connections=1) as running, \
            socket.create_connection(("127.0.0.1", running.server_port)) as busy:
        busy.sendall(GET.replace(b"/health", b"/slow") + b"\r\n")
        wait_for(lambda: running.in_flight == 1)
        answer = send_raw(running, GET + b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n")
        assert answer.startswith(b"HTTP/1.1 503") and b"too_many_connections" in answer
        finish.set()


def test_a_server_that_is_over_is_forgotten():
    """No feature keeps it for ever."""
    with listening(rate_limiting_enabled=True) as running:
        forgotten = weakref.ref(running)
    del running
    gc.collect()
    assert forgotten() is None


def test_who_does_not_read_a_stream_makes_room_too(monkeypatch):
    """A write that the client keeps waiting is the client's debt, in the middle of a stream, too."""
    def flood(handler):
        handler.start_stream({"Content-Type": "text/plain"})
        while True:
            handler.write_piece(b"x" * 2**16)
    monkeypatch.setitem(conftest.house().routes, ("GET", "/flood"), server.Route(flood, "without end"))
    with listening(max_connections=2, client_timeout=30) as running, contextlib.ExitStack() as stack:
        for _ in range(2):
            raw = stack.enter_context(socket.create_connection(("127.0.0.1", running.server_port)))
            raw.sendall(GET.replace(b"/health", b"/flood") + b"\r\n")
        wait_for(lambda: len(running.models.crowd.unready) == 2)
        assert ask(running, "/").status_code == 200


def test_half_a_request_does_not_hold_up_the_end():
    with listening(drain_seconds=20) as running:
        with socket.create_connection(("127.0.0.1", running.server_port)) as raw:
            raw.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n{")
            wait_for(lambda: running.models.crowd.unready)
            began = time.monotonic()
            running.stopping.set()
            with running.changed:
                assert running.changed.wait_for(lambda: running.in_flight == 0, timeout=5)
            assert time.monotonic() - began < 5


def test_a_length_with_leading_zeros_is_a_length():
    with listening() as running:
        answer = send_raw(running, b"POST /v1/nothing HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
                                   b"Content-Length: 00000000000000000000005\r\n\r\nabcde")
        assert answer.startswith(b"HTTP/1.1 404")


def test_who_does_not_read_the_answers_makes_room_too():
    """Pipelined requests whose answers nobody reads block their threads in a write."""
    with listening(max_connections=2, client_timeout=30) as running:
        greedy = []
        for _ in range(2):
            raw = socket.socket()
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
            raw.connect(("127.0.0.1", running.server_port))
            raw.setblocking(False)
            greedy.append(raw)
        pipelined, stuck_since = b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n" * 500, [0.0, 0.0]
        while min(stuck_since) < 1:  # seconds without room for another byte
            for number, raw in enumerate(greedy):
                try:
                    raw.send(pipelined)
                    stuck_since[number] = 0.0
                except BlockingIOError:
                    stuck_since[number] += 0.01
            time.sleep(0.01)
        assert ask(running, "/").status_code == 200
        for raw in greedy:
            raw.close()


# ==== Load and truth ======================================================================


def test_a_silent_stream_gets_comments_and_openais_client_does_not_mind(start_server):
    """A long prefill is silent for seconds; some clients give up on a silent stream."""
    def body(word):
        return {"messages": [{"role": "user", "content": f"{word} " * 100}], "stream": True,
                "max_tokens": 2}

    for interval, pings in (("0.02", True), ("0", False)):
        http_client = start_server(PING_INTERVAL=interval)
        with httpx.stream("POST", f"{http_client.base_url}/v1/chat/completions",
                          json=body("word"), timeout=5 if pings else 60) as reply:  # of each read
            text = reply.read().decode()
        assert text.startswith(": ping\n\n") == pings and text.endswith("data: [DONE]\n\n")
        client = openai.OpenAI(base_url=f"{http_client.base_url}/v1", api_key="unused")
        chunks = list(client.chat.completions.create(model="gpt-4o-mini", **body("other")))
        assert chunks[0].choices[0].delta.role == "assistant"
        assert chunks[-1].choices[0].finish_reason in ("length", "stop")


def scrape(text: str) -> dict[tuple, float]:
    """The samples by name and labels, as Prometheus' own parser reads them."""
    return {(sample.name.removeprefix("twofile_"), *sorted(sample.labels.values())): sample.value
            for family in prometheus.text_string_to_metric_families(text)
            for sample in family.samples}


def test_metrics_add_up_and_are_told_during_a_prefill(start_server):
    """Each request, prompt token and generated token is counted once."""
    http_client = start_server(PARALLEL="2")
    before = scrape(http_client.get("/metrics").text)
    body = {"messages": HI, "max_tokens": 5, "temperature": 0, "ignore_eos": True}
    usages = [http_client.post("/v1/chat/completions", json=body).json()["usage"] for _ in range(3)]
    http_client.post("/v1/chat/completions", json={"messages": []})
    http_client.get("/nowhere")
    after = scrape(http_client.get("/metrics").text)
    grown = {name: value - before.get(name, 0) for name, value in after.items()}
    assert grown["requests_total", "200", "POST /v1/chat/completions"] == 3
    assert grown["requests_total", "400", "POST /v1/chat/completions"] == 1
    assert grown["requests_total", "404", "unknown"] == 1
    assert grown["prompt_tokens_total",] == sum(usage["prompt_tokens"] for usage in usages)
    assert grown["cached_tokens_total",] == sum(
        usage["prompt_tokens_details"]["cached_tokens"] for usage in usages) > 0
    assert grown["generated_tokens_total",] == 15
    assert grown["time_to_first_token_seconds_count",] == 3
    assert grown["inter_token_seconds_count",] == 12
    assert grown["batch_tokens_count",] == grown["steps_total",] == 15
    assert grown["batch_tokens_sum",] == grown["prompt_tokens_total",] - grown[
        "cached_tokens_total",] + 12
    assert grown["decode_errors_total",] == after["waiting_requests",] == after["busy_slots",] == 0
    long = threading.Thread(target=lambda: [http_client.post(
        "/v1/completions", json={"prompt": "word " * 450, "max_tokens": 1})])
    long.start()
    wait_for(lambda: http_client.get("/slots").json()[0]["state"] == "prefilling"
             or http_client.get("/slots").json()[1]["state"] == "prefilling")
    started = time.monotonic()
    for path in ("/metrics", "/health", "/slots"):
        assert http_client.get(path).status_code == 200
    assert long.is_alive() and time.monotonic() - started < 2
    long.join()


def test_slots_tell_what_they_do(start_server):
    http_client = start_server(PARALLEL="2")
    body = {"prompt": "Once upon a time", "max_tokens": 200, "temperature": 0, "stream": True,
            "ignore_eos": True}
    with httpx.stream("POST", f"{http_client.base_url}/v1/completions", json=body) as reply:
        lines = reply.iter_lines()
        for _ in range(20):
            next(lines)
        busy, idle = sorted(http_client.get("/slots").json(), key=lambda slot: slot["state"])
        assert busy["state"] == "decoding" and idle["state"] == "idle"
        assert busy["generated"] >= 5 and busy["tokens"] >= busy["generated"]
        assert busy["tokens_per_second"] > 0 == idle["tokens"]
    wait_for(lambda: {slot["state"] for slot in http_client.get("/slots").json()} == {"idle"})
    http_client.post("/v1/completions", json={**body, "stream": False, "max_tokens": 1})
    assert sum(slot["tokens"] for slot in http_client.get("/slots").json()) > 4  # kept as a prefix


@pytest.mark.parametrize("error, status, code, retries", [
    (engine.QueueFull("1 waits"), 503, "queue_full", True), (engine.EngineClosed("over"), 503, "shutting_down", True),
    (engine.EngineFault("broken"), 500, "engine_error", False),
    (type("Worse", (engine.EngineFault,), {})("broken"), 500, "engine_error", False),
    (TimeoutError("a disk"), 500, None, False)])
def test_what_fails_under_a_request_is_told_for_what_it_is(error, status, code, retries, monkeypatch, caplog):
    """A timeout that is not the client's is not called that; local apps are told in their own words."""
    def fail(*_args, **_how):
        raise error

    monkeypatch.setitem(conftest.house().routes, ("GET", "/fails"), server.Route(fail, "fails"))
    monkeypatch.setattr(apps, "answer_app", fail)
    with listening() as running:
        answer = ask(running, "/fails")
        assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)
        assert ("retry-after" in answer.headers) == retries
        assert ("Traceback" in caplog.text) == (code is None)
        told = ask(running, "/chat", "POST", json.dumps({"messages": HI})).json()["detail"]
        assert told.startswith("Chat service unavailable: ") == retries, told


def test_what_fails_around_requests_is_told(monkeypatch, caplog):
    """Nobody but the log hears of a mistake in what a feature does there."""
    monkeypatch.setattr(crowds.PatientHandler, "await_request", lambda _: 1 / 0)
    with listening() as running:
        with pytest.raises(httpx.RemoteProtocolError):
            ask(running, "/")
        wait_for(lambda: "ZeroDivisionError" in caplog.text)


def test_names_that_features_give_stay_when_the_model_has_been_loaded():
    models = server.Models(server.Config(model_aliases=["alias"]), server.House(), threading.Event())
    models.named["echo"] = echo = object()
    models.default.load = lambda _go_on: types.SimpleNamespace(model=types.SimpleNamespace(name="own"))
    models.start()
    assert models.find("echo") is echo and models.find("alias") is models.find("own") is models.default


def test_health_says_stalled_and_draining():
    """Not OK while nothing generates, whatever the reason."""
    class Engine:
        seconds = 0.0
        stats, n_waiting = engine.Stats(), 3
        model = type("Model", (), {"name": "fake"})

        def seconds_in_step(self):
            return self.seconds

        def close(self, drain_seconds):
            return True

    with listening(stall_seconds=5) as running:
        running.models.default.engine = Engine()
        running.models._tickets.clear()
        assert ask(running, "/health").json() == {"status": "ok", "model": "fake", "slots": 0,
                                                  "busy": 0, "waiting": 3}
        running.models.default.engine.seconds = 5.5
        stalled = ask(running, "/health")
        assert (stalled.status_code, stalled.json()["status"]) == (503, "stalled")
        running.stopping.set()
        draining = ask(running, "/health")
        assert (draining.status_code, draining.json()["status"]) == (503, "draining")
        assert draining.headers["retry-after"]
        assert ask(running, "/v1/chat/completions", "POST", json.dumps({"messages": HI})).json()[
            "error"]["code"] == "shutting_down"


# ==== Faults ==============================================================================


@pytest.mark.parametrize("kept", [4, 100_000, 50_000_000])
def test_a_truncated_model_is_a_clear_error_and_served_once_it_is_whole(tmp_path, kept):
    """A download or copy that is still under way: the server stays up, says so, and looks again
    when the file changes."""
    whole = conftest.default_model()
    path = tmp_path / "arriving.gguf"
    path.write_bytes(whole.read_bytes()[:kept])
    with listening(model_path=str(path), n_ctx=256, parallel=1) as running:
        threading.Thread(target=running.models.start, daemon=True).start()
        wait_for(lambda: ask(running, "/health").json()["status"] == "failed")
        assert "cannot load" in ask(running, "/health").json()["error"]
        refused = ask(running, "/v1/chat/completions", "POST", json.dumps({"messages": HI}))
        assert refused.status_code == 503 and refused.json()["error"]["code"] == "model_failed"
        if kept == 50_000_000:
            shutil.copy(whole, path)
            wait_for(lambda: ask(running, "/health").json()["status"] == "ok", seconds=30)


@pytest.mark.parametrize("harm, words", [
    (lambda path: path.unlink(), "has vanished"),
    (lambda path: os.truncate(path, path.stat().st_size - 1), "shrank from"),
])
def test_a_model_that_is_harmed_while_it_loads_is_refused(tmp_path, harm, words):
    """Its first token would read beyond the end of the file, which kills the process."""
    path = tmp_path / "harmed.gguf"
    shutil.copy(conftest.default_model(), path)

    def on_progress(fraction):
        if fraction == 1 and path.exists() and path.stat().st_size % 10 == 2:
            harm(path)
        return True

    with pytest.raises(engine.BrokenModel, match=words):
        engine.load_engine(path, n_ctx=256, parallel=1, n_gpu_layers=0, prefill_chunk=96,
                           max_queue=4, on_progress=on_progress)


def test_close_is_a_word_among_others():
    """In a list of options, but not as a part of another one."""
    house = server.load_features(["wire"])
    for wish, n_answers in ((b"foo, Close", 1), (b"notclose", 2)):
        running = server.Server(house.Config(port=0, keep_alive_timeout=0.5))
        threading.Thread(target=running.serve_forever, args=(0.02,), daemon=True).start()
        asked = b"GET / HTTP/1.1\r\nHost: localhost\r\nConnection: %b\r\n\r\n" % wish
        assert send_raw(running, asked * 2).count(b"HTTP/1.1 200") == n_answers, wish
        running.drain()


def test_without_wire_no_line_is_reflected_and_no_mails_body_minded():
    """http.server reads heads as those of e-mails: what concerns their bodies is nothing here."""
    running = server.Server(server.load_features(["browsers"]).Config(port=0))
    threading.Thread(target=running.serve_forever, args=(0.02,), daemon=True).start()
    head = b"OPTIONS /v1/models HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n%b\r\n\r\n"
    page = b"Origin: http://localhost\r\nAccess-Control-Request-Method: POST\r\n"
    for more, status in ((page + b"Access-Control-Request-Headers: a\r Set-Cookie: x=1", b"400"),
                         (b"Content-Type: multipart/mixed; boundary=x", b"204"), (b"no colon", b"400")):
        answer = send_raw(running, head % more)
        assert answer.startswith(b"HTTP/1.1 " + status) and b"Set-Cookie" not in answer, more
    running.drain()
