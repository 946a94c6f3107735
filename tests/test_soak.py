"""Months of bad luck in a minute: clients that hang up, dawdle, or never read, and a server that
must lose no slot, no memory and no time over them. `pytest --long` asks for ten times as much.

    1  the server and its clients   a process with its whole log, sockets that can misbehave
    2  correctness                  what a greedy reply must be, in any company
    3  connections                  many idle ones
    4  soak                         many requests, a third of them broken off
    5  slowness                     slow heads, slow bodies, slow readers; slowhttptest
    6  the end                      signals while requests run and wait
"""

import concurrent.futures
import contextlib
import dataclasses
import functools
import http.client
import json
import os
import random
import re
import resource
import shutil
import signal
import socket
import statistics
import subprocess
import threading
import time
from pathlib import Path

import pytest

import openai_schemas
from conftest import ROOT, SETTINGS, server_python

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
PARALLEL = int(SETTINGS["PARALLEL"])  # slots
START_SECONDS = 60.0  # for the model to load
ANSWER_SECONDS = 60.0  # for any one answer of a loaded server
SETTLE_SECONDS = 10.0  # for the last of the clients' hang-ups to be noticed
STOP_SECONDS = 10.0  # from the end of the drain to the exit; handlers have 5 for last words
N_FILES = 4096  # open files that a server with 1,000 connections may need
SLOWER = 3.0  # times the first token may take, at most, with idlers or dawdlers around
LONG_REPLY = 900  # tokens; takes much longer than anything here waits for it

# ==== 1. The server and its clients =======================================================


@pytest.fixture
def long(request) -> bool:
    return request.config.getoption("--long")


@dataclasses.dataclass
class Running:
    """A server process, and questions to it. Every request has a connection of its own."""

    process: subprocess.Popen
    log: Path
    host: str  # with the port

    @property
    def address(self) -> tuple[str, int]:
        name, port = self.host.split(":")
        return name, int(port)

    def connect(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection(self.host, timeout=ANSWER_SECONDS)

    def ask(self, path, body=None) -> tuple[int, str, str]:
        """(status, content type, text) of a GET, or of a POST with this body."""
        with contextlib.closing(self.connect()) as connection:
            connection.request("POST" if body else "GET", path, json.dumps(body) if body else None)
            response = connection.getresponse()
            text = response.read().decode()
            return response.status, response.getheader("Content-Type"), text

    def get(self, path, body=None):
        """The parsed answer, which must be 200."""
        status, _, text = self.ask(path, body)
        assert status == 200, text
        return json.loads(text)

    def metric(self, name, labels="") -> float:
        """The sum of the samples whose labels have these words in them."""
        samples = re.findall(rf"(?m)^twofile_{name}(?:\{{(.*)\}})? (\S+)$", self.ask("/metrics")[2])
        return sum(float(value) for having, value in samples if labels in having)

    def slots(self, state) -> int:
        """How many slots are in this state."""
        return [slot["state"] for slot in self.get("/slots")].count(state)

    def settled(self) -> bool:
        return self.slots("idle") == PARALLEL and self.metric("waiting_requests") == 0

    def rss(self) -> int:
        """Bytes of memory, shared pages included."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(re.search(r"VmRSS:\s+(\d+) kB", status)[1]) * 1024

    def stop(self, seconds=STOP_SECONDS) -> None:
        """SIGTERM must end it in time with code 0, and nothing may have gone wrong before."""
        self.process.send_signal(signal.SIGTERM)
        assert self.process.wait(timeout=float(SETTINGS["DRAIN_SECONDS"]) + seconds) == 0
        log = self.log.read_text()
        assert "Traceback" not in log, log[log.index("Traceback"):][:3000]


@contextlib.contextmanager
def running(folder: Path, **settings):
    """`python server.py` on a free port, with its whole log in a file. The test stops it."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    allowed = N_FILES if hard == resource.RLIM_INFINITY else min(N_FILES, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))  # the server inherits it
    path = folder / "log"
    with open(path, "w") as log:
        process = subprocess.Popen(
            [server_python(), str(ROOT / "server.py"), "--port", "0"], cwd=ROOT, stdout=log,
            stderr=subprocess.STDOUT,
            env={**os.environ, "PYTHONUNBUFFERED": "1", **SETTINGS, **settings})
    try:
        until(lambda: "\ntry: curl" in path.read_text() or process.poll() is not None,
              START_SECONDS, "the server starts")
        assert process.poll() is None, path.read_text()
        yield Running(process, path, re.search(r"curl http://([^/]+)/", path.read_text())[1])
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()


def until(happens, seconds: float, what: str) -> None:
    """Poll until `happens()`."""
    started = time.monotonic()
    while not happens():
        assert time.monotonic() - started < seconds, f"not within {seconds:g} s: {what}"
        time.sleep(0.05)


def chat(text: str, max_tokens: int, system="Be brief.", **options) -> dict:
    """A greedy chat's body; without an end of its own, so that it has exactly max_tokens."""
    return {"messages": [{"role": "system", "content": system},
                         {"role": "user", "content": text}],
            "max_tokens": max_tokens, "temperature": 0, "ignore_eos": True, **options}


def first_token_seconds(server: Running, n=3) -> float:
    """The median time of n chats of one token, whose prompts are all computed anew."""
    def once() -> float:
        started = time.monotonic()
        assert talk(server, chat("How are you? " * 10, 1, cache_prompt=False))[0] == 200
        return time.monotonic() - started
    return statistics.median(once() for _ in range(n))


# What a client may be doing when it hangs up.
QUITS = ["in its body", "queued", "in the prefill", "mid-stream", "before the end"]
PREFILL_SECONDS = 0.4  # of reading a prompt, within which one hangs up


def talk(server: Running, body: dict, quits: str | None = None, at: float = 1.0):
    """(status, content type, text) of a chat; None when the client hangs up. at: how much of the
    body, the prefill's time, or the stream's tokens has passed by then, from 0 to 1."""
    data = json.dumps(body).encode()
    with contextlib.closing(server.connect()) as connection:
        connection.putrequest("POST", CHAT)
        connection.putheader("Content-Length", str(len(data)))
        connection.endheaders(data[:int(at * (len(data) - 1))] if quits == QUITS[0] else data)
        if quits in QUITS[:3]:
            time.sleep(at * PREFILL_SECONDS if quits == "in the prefill" else 0)
            return None
        response = connection.getresponse()
        lines, n_tokens = [], 0
        for line in response:
            lines.append(line)
            n_tokens += b'"content":"' in line
            if quits == "mid-stream" and n_tokens > at * (body["max_tokens"] - 1) or (
                    quits == "before the end" and b'"finish_reason":"length"' in line):
                return None
        return response.status, response.getheader("Content-Type"), b"".join(lines).decode()


# ==== 2. Correctness ======================================================================
# Matrix kernels for one row and for many add in a different order, so a reply in company may
# part from the same reply alone where two tokens are almost equally likely; from there on the
# texts have nothing in common. But whatever the company, each token must be the likeliest after
# all those before it. One pass over prompt and reply, alone, tells that of every token.
#
# Another order moves a token's logprob by 0.07 (standard deviation); a token that wins in one
# loses in the other by up to 0.25. A token of another reply misses by 4 or more.

ROUNDING = 0.5  # logprob that another order of additions can bridge
STRANGE = 2.0  # logprob that a token which does not belong there misses by, at least
END_TOKENS = {"<|im_end|>", "<|endoftext|>"}  # which ignore_eos rules out


def pieces_of(body: dict, answer: tuple[int, str, str]) -> tuple[str, ...]:
    """The tokens of a whole reply of the right shape, of exactly the length asked for."""
    status, content_type, text = answer
    assert status == 200, text
    openai_schemas.check_exchange(CHAT, body, status, content_type, text)
    if body.get("stream"):
        events = openai_schemas.parse_sse(text)
        [choice] = openai_schemas.check_stream("chat.completion", events, body)
    else:
        events = [json.loads(text)]
        [choice] = events[0]["choices"]
    usage = events[-1]["usage"]
    pieces = tuple(entry["token"] for entry in choice["logprobs"]["content"])
    assert "".join(pieces) == choice["message"]["content"]
    assert len(pieces) == usage["completion_tokens"] == body["max_tokens"]
    assert choice["finish_reason"] == "length"
    return pieces


class Judge:
    """Scores replies alone, with the same model, by /v1/completions with echo."""

    def __init__(self, server: Running):
        self.server = server
        self.token = functools.cache(self.token)

    def token(self, piece: str) -> int:
        [token] = self.server.get("/tokenize", {"content": piece})["tokens"]
        return token

    def doubt(self, body: dict, pieces: tuple[str, ...]) -> float:
        """By how much, at the worst of its tokens, another one would have been likelier."""
        prompt = self.server.get("/apply-template", {"messages": body["messages"]})["prompt"]
        tokens = self.server.get("/tokenize", {"content": prompt})["tokens"]
        scored = self.server.get(COMPLETIONS, {
            "prompt": tokens + [self.token(piece) for piece in pieces], "echo": True,
            "max_tokens": 0, "logprobs": 5})["choices"][0]["logprobs"]
        assert tuple(scored["tokens"][-len(pieces):]) == pieces
        return max(
            max(logprob for piece, logprob in top.items() if piece not in END_TOKENS) - chosen
            for top, chosen in zip(scored["top_logprobs"][-len(pieces):],
                                   scored["token_logprobs"][-len(pieces):]))


# ==== 3. Connections ======================================================================

N_IDLE = 200  # connections


@pytest.mark.slow
def test_two_hundred_idle_connections_cost_a_chat_nothing(tmp_path):
    """Each had an answer and may ask again; meanwhile a chat's first token comes as soon as
    without them. When they leave, none is counted any more."""
    with running(tmp_path) as server:
        before, alone = server.metric("connections"), first_token_seconds(server)
        with contextlib.ExitStack() as stack:
            idle = [stack.enter_context(contextlib.closing(server.connect()))
                    for _ in range(N_IDLE)]
            for connection in idle:
                connection.request("GET", "/health")
                assert connection.getresponse().read()
            assert server.metric("connections") >= before + N_IDLE
            assert first_token_seconds(server) < SLOWER * alone
            assert all(connection.sock for connection in idle), "keep-alive"
            idle[0].request("GET", "/health")  # an old connection still serves
            assert idle[0].getresponse().status == 200
        until(lambda: server.metric("connections") <= before, SETTLE_SECONDS, "the gauge falls")
        server.stop()


# ==== 4. Soak =============================================================================

SEED = 4
N_CLIENTS = 12  # three times the slots: most requests wait
SHARE_OF_QUITTERS = 0.3
GROWTH = 1.05  # of the memory from half-time to the end
SYSTEMS = ["You are a patient teacher. " + "Explain with one short example. " * 4,
           "You are a ship's cook. " + "Speak plainly and about food only. " * 4]
QUESTIONS = ["What is rain?", "What is bread?", "Why do we sleep?", "How do I count to ten?"]
N_CASES = len(SYSTEMS) * len(QUESTIONS)


@dataclasses.dataclass(frozen=True)
class Job:
    """One request, and how far its client goes with it."""

    case: int  # index of the conversation
    body: dict
    quits: str | None
    at: float


def make_jobs(dice: random.Random, n: int, most_tokens: int) -> list[Job]:
    """The same jobs for the same seed; only their timing differs from run to run."""
    jobs = []
    for number in range(n):
        case = dice.randrange(N_CASES)
        quits = dice.choice(QUITS) if dice.random() < SHARE_OF_QUITTERS else None
        stream = dice.random() < 0.5 or quits in QUITS[3:]
        body = conversation(case, dice.randint(1, most_tokens), cache_prompt=dice.random() < 0.9,
                            **({"stream": True, "stream_options": {"include_usage": True}}
                               if stream else {}))
        if quits == "in the prefill":  # of a prompt that no cache has the beginning of
            body["messages"] = [{"role": "user", "content": f"{number} is a number. " * 60}]
        jobs.append(Job(case, body, quits, dice.random()))
    return jobs


def conversation(case: int, max_tokens: int, **options) -> dict:
    return chat(QUESTIONS[case % len(QUESTIONS)], max_tokens, SYSTEMS[case // len(QUESTIONS)],
                logprobs=True, **options)


@pytest.mark.slow
def test_a_soak_loses_no_slot_no_memory_and_not_one_token(tmp_path, long):
    """Twelve clients, four slots, conversations with common beginnings, and three in ten clients
    that hang up somewhere. Every reply that is waited for is whole, and token by token what the
    model says when it is alone; in the end all is idle and no bigger than at half-time."""
    n, most_tokens = (1000, 24) if long else (120, 8)
    jobs = make_jobs(random.Random(SEED), n, most_tokens)
    with running(tmp_path) as server:
        judge = Judge(server)
        bodies = [conversation(case, most_tokens) for case in range(N_CASES)]
        alone = [pieces_of(body, talk(server, body)) for body in bodies]
        assert judge.doubt(bodies[0], alone[0]) < ROUNDING
        half = most_tokens // 2
        strange = alone[0][:half] + alone[1][half:half + 1]
        assert judge.doubt(bodies[0], strange) > STRANGE, "one strange token must show"
        disputed = set()
        with concurrent.futures.ThreadPoolExecutor(N_CLIENTS) as pool:
            answers = pool.map(lambda job: talk(server, job.body, job.quits, job.at), jobs)
            for number, (job, answer) in enumerate(zip(jobs, answers)):
                if number == len(jobs) // 2:
                    at_half_time = server.rss()
                if answer and not job.quits:
                    pieces = pieces_of(job.body, answer)
                    if pieces != alone[job.case][:len(pieces)]:
                        disputed.add((job.case, pieces))
        until(server.settled, SETTLE_SECONDS, "every slot idle, nobody waiting")
        at_the_end = server.rss()
        print(f"memory: {at_half_time / 1e6:.1f} MB at half-time, then {at_the_end / 1e6:.1f} MB")
        assert at_the_end < GROWTH * at_half_time
        for case, pieces in sorted(disputed):
            assert judge.doubt(bodies[case], pieces) < ROUNDING, (case, pieces, alone[case])

        with contextlib.ExitStack() as stack:  # four streams, each of them begun before one ends
            for case in range(PARALLEL):
                connection = stack.enter_context(contextlib.closing(server.connect()))
                connection.request("POST", CHAT, json.dumps(
                    conversation(case, LONG_REPLY, stream=True)))
                assert connection.getresponse().readline().startswith(b"data: ")
            assert server.slots("decoding") == PARALLEL
        until(server.settled, SETTLE_SECONDS, "every slot idle again")
        server.stop()


# ==== 5. Slowness =========================================================================

N_SLOW = 50  # clients with slow heads, and as many with slow bodies
CLIENT_TIMEOUT = 3.0  # seconds, in this part's server
DRIP_SECONDS = 1.0  # between two bytes of a slow client
OVERTIME = 3.0  # seconds until the last of so many is cut, on a slow machine
N_UNREAD = PARALLEL - 1  # streams that nobody reads: one slot is left for the others
UNREAD_SECONDS = 30.0  # for the kernel's buffers to fill, and then the client's time to run out
RECEIVE_BUFFER = 2048  # bytes
SEGMENT = 1460  # bytes, as on a network; with loopback's own the kernel would hold 2.5 MB


class Crowd(threading.Thread):
    """Clients that send a request's beginning, and then a byte a second; who is thrown out
    comes again. `ends` has the age of each connection that ended, and its last words."""

    def __init__(self, address: tuple[str, int], beginnings: list[bytes]):
        super().__init__(daemon=True)
        self.address = address
        self.beginnings = beginnings
        self.gone_home = threading.Event()
        self.ends: list[list[tuple[float, bytes]]] = [[] for _ in beginnings]

    def enter(self, beginning: bytes) -> tuple[float, socket.socket]:
        client = socket.create_connection(self.address)
        client.sendall(beginning)
        client.setblocking(False)
        return time.monotonic(), client

    def run(self) -> None:
        clients = [self.enter(beginning) for beginning in self.beginnings]
        while not self.gone_home.wait(DRIP_SECONDS):
            for number, (born, client) in enumerate(clients):
                try:
                    client.send(b"a")
                    words = client.recv(4096)
                except BlockingIOError:
                    continue  # still tolerated
                except OSError:
                    words = b""
                client.close()
                self.ends[number].append((time.monotonic() - born, words))
                try:
                    clients[number] = self.enter(self.beginnings[number])
                except OSError:
                    return  # the server has ended
        for _, client in clients:
            client.close()


def never_read(server: Running, body: dict) -> socket.socket:
    """Ask for a stream, and leave it where it is."""
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, RECEIVE_BUFFER)
    client.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, SEGMENT)
    client.connect(server.address)
    data = json.dumps(body).encode()
    client.sendall(b"POST %b HTTP/1.1\r\nHost: %b\r\nContent-Length: %d\r\n\r\n%b" % (
        CHAT.encode(), server.host.encode(), len(data), data))
    return client


@pytest.mark.slow
def test_slow_heads_slow_bodies_and_streams_that_nobody_reads_delay_nobody(tmp_path):
    """A hundred clients dawdle and three streams are never read: others have their first token
    about as soon as beside three streams that are read. Who dawdles is out after client_timeout;
    who does not read loses the slot."""
    body = chat("Tell a long story.", LONG_REPLY, stream=True, logprobs=True, top_logprobs=20)
    with running(tmp_path, CLIENT_TIMEOUT=str(CLIENT_TIMEOUT)) as server:
        with concurrent.futures.ThreadPoolExecutor(N_UNREAD) as pool:
            for _ in range(N_UNREAD):  # they read a part of the story
                pool.submit(talk, server, body, "mid-stream", 0.1)
            until(lambda: server.slots("decoding") == N_UNREAD, SETTLE_SECONDS, "three streams")
            alone = first_token_seconds(server)
        until(server.settled, SETTLE_SECONDS, "the readers leave")

        cut = server.metric("requests_total", 'status="499"')
        host = f"Host: {server.host}\r\n".encode()
        crowd = Crowd(server.address, N_SLOW * [
            b"GET /health HTTP/1.1\r\n" + host + b"X-Slow: ",
            b"POST /v1/chat/completions HTTP/1.1\r\n" + host + b"Content-Length: 9999\r\n\r\n"])
        crowd.start()
        with contextlib.ExitStack() as stack:
            for _ in range(N_UNREAD):
                stack.enter_context(contextlib.closing(never_read(server, body)))
            until(lambda: server.slots("decoding") == N_UNREAD, SETTLE_SECONDS, "three streams")
            assert first_token_seconds(server) < SLOWER * alone
            until(server.settled, UNREAD_SECONDS, "slots of unread streams are freed")
            assert server.metric("requests_total", 'status="499"') == cut + N_UNREAD
        until(lambda: all(crowd.ends), 2 * CLIENT_TIMEOUT + OVERTIME, "every dawdler is cut")
        crowd.gone_home.set()
        crowd.join()
        for age, words in sum(crowd.ends, []):
            assert age < CLIENT_TIMEOUT + OVERTIME and (not words or b" 408 " in words[:20]), words
        server.stop()


SLOW_MODES = {  # of slowhttptest; a byte or some every second
    "heads": ["-H", "-u", "http://{}/health"],
    "bodies": ["-B", "-t", "POST", "-f", "application/json", "-u", "http://{}" + CHAT],
    "reads": ["-X", "-w", "10", "-y", "20", "-n", "1", "-z", "5", "-k", "3",
              "-u", "http://{}/metrics"]}
TOOL_SECONDS = 20.0  # for the tool to end after its time is over


@pytest.mark.skipif(not shutil.which("slowhttptest"), reason="needs Debian's slowhttptest")
def test_slowhttptest_finds_the_server_available(tmp_path, long):
    """An attacker that others have written: slow heads, slow bodies and slow reads (the short
    form has them at once, the long one in turn). Chats are answered during and after it."""
    n, seconds = (1000, 30) if long else (100, 5)
    with running(tmp_path, MAX_CONNECTIONS=str(N_FILES // 2)) as server:
        for modes in [[mode] for mode in SLOW_MODES] if long else [[*SLOW_MODES]]:
            before = server.metric("connections")
            tools = [subprocess.Popen(
                ["slowhttptest", "-c", str(n), "-r", str(n), "-l", str(seconds), "-i", "1",
                 "-p", "3", *(word.format(server.host) for word in SLOW_MODES[mode])],
                text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) for mode in modes]
            until(lambda: server.metric("connections") > n / 2, seconds, "the attack is on")
            n_answers = 0
            while any(tool.poll() is None for tool in tools):
                assert server.get("/health")["status"] == "ok"
                assert server.get(CHAT, chat("Hi", 2))["usage"]["completion_tokens"] == 2
                n_answers += 1
            assert n_answers >= seconds / 2
            for tool in tools:
                said = tool.communicate(timeout=TOOL_SECONDS)[0]
                assert tool.returncode == 0 and re.search(r"service available:\W.*YES", said), said
                assert not re.search(r"service available:\W.*NO", said), said
            until(lambda: server.metric("connections") <= before, SETTLE_SECONDS, "all are gone")
        assert server.get(CHAT, chat("Hi", 2))["usage"]["completion_tokens"] == 2
        server.stop()


# ==== 6. The end ==========================================================================


def is_broken_off(text: str) -> bool:
    """A stream whose last event is an error; [DONE] would say that all is well."""
    last = text.rstrip().rsplit("\n\n", 1)[-1]
    return last.startswith('data: {"error":') and "[DONE]" not in text


def test_a_signal_ends_what_runs_and_what_waits_within_the_drain(tmp_path):
    """Four streams run and four requests wait when SIGTERM comes. Those that cannot finish end in
    an error; nobody hangs, nobody is told that a cut story is whole; the exit code is 0."""
    body = chat("Tell a long story.", LONG_REPLY, stream=True)
    with concurrent.futures.ThreadPoolExecutor(2 * PARALLEL) as pool, \
            running(tmp_path, DRAIN_SECONDS="1") as server:
        streams = [pool.submit(talk, server, body) for _ in range(PARALLEL)]
        until(lambda: server.slots("decoding") == PARALLEL, SETTLE_SECONDS, "four streams run")
        waiting = [pool.submit(talk, server, {**body, "stream": number % 2 == 0})
                   for number in range(PARALLEL)]
        until(lambda: server.metric("waiting_requests") == PARALLEL, SETTLE_SECONDS, "four wait")
        server.process.send_signal(signal.SIGTERM)
        until(lambda: server.ask("/health")[0] == 503, 1, "it says that it ends")
        status, _, text = server.ask(CHAT, body)
        assert status == 503, text
        openai_schemas.check_exchange(CHAT, body, status, "application/json", text)
        assert server.process.wait(timeout=1 + STOP_SECONDS) == 0
        for status, _, text in (stream.result() for stream in streams):
            assert status == 200 and (is_broken_off(text) or text.endswith("[DONE]\n\n")), text
        for status, content_type, text in (request.result() for request in waiting):
            if status == 503:
                openai_schemas.check_exchange(CHAT, body, status, content_type, text)
            else:
                assert status == 200 and is_broken_off(text), text
        assert "Traceback" not in server.log.read_text()


def test_a_second_signal_ends_at_once(tmp_path):
    """Who presses Ctrl-C twice has stopped waiting."""
    with running(tmp_path, DRAIN_SECONDS="600") as server, \
            contextlib.closing(server.connect()) as connection:
        connection.request("POST", CHAT, json.dumps(chat("Go on.", LONG_REPLY, stream=True)))
        assert connection.getresponse().readline().startswith(b"data: ")
        server.process.send_signal(signal.SIGTERM)
        until(lambda: server.ask("/health")[0] == 503, SETTLE_SECONDS, "the drain begins")
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(timeout=2) == 0
        assert "Traceback" not in server.log.read_text()
