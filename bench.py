"""Measure OpenAI-compatible servers side by side, in one run on one machine.

    python bench.py NAME=URL [NAME=URL ...]
    python bench.py --start ours --start llama_cpp.server --start llama-server=PATH
    python bench.py --start ours --start llama-server=PATH --write
    python bench.py --from-json docs/bench.json

The first server is the one the others are compared with. Each scenario is run on every server in
turn, several times over, so that a machine whose speed drifts treats them all alike; figures are
medians over the rounds, of which the heavy scenarios run a third. Scenarios come in groups, each
with the settings it needs: servers that bench.py starts are started anew for each group, running
ones are used as they are. Greedy sampling, end-of-text biased away (`--eos` names its token ids),
so every reply has the length asked for, unless a scenario says otherwise. Prompts are new in every
round and the same for every server. The last line is JSON.

`--write` keeps the results in docs/bench.json, beside those of scenarios measured before, draws plots
and writes the table in docs/measure.md; `--from-json` does so without measuring, plots beside FILE.
"""

import argparse
import contextlib
import datetime
import functools
import http.client
import importlib.metadata
import itertools
import json
import os
import platform
import random
import re
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.parse
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Callable, NamedTuple

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "docs" / "bench.json"
REPORT = HERE / "docs" / "measure.md"  # has the table, between two marks
START_SECONDS = 120  # a server that does not answer by then has failed
MB = 1e6
WORDS = ("time year people way day man thing woman life child world school state family student "
         "group country problem hand part place case week company system program question work "
         "government number night point home water room mother area money story fact month lot "
         "right study book eye job word business issue side kind head house service friend").split()


# ---- requests ------------------------------------------------------------------------------


class Stream:
    """One request and when its pieces arrived. All times are seconds since `started`."""

    def __init__(self, url: str, messages: list[dict], max_tokens: int, eos: list[int], **more):
        """more: further fields of the body."""
        self.url = url
        self.body = json.dumps({
            "model": model_at(url), "messages": messages, "stream": True, "max_tokens": max_tokens,
            "temperature": 0, "logit_bias": {str(token): -100 for token in eos},
            "stream_options": {"include_usage": True}, **more})
        self.max_tokens = max_tokens
        self.arrivals: list[float] = []
        self.text: list[str] = []
        self.usage: dict = {}

    def run(self) -> "Stream":
        """Send the request and read the stream to its end."""
        self.started = time.perf_counter()
        connection = connect(self.url)
        path = urllib.parse.urlsplit(self.url).path.rstrip("/") + "/v1/chat/completions"
        connection.request("POST", path, self.body, {"Content-Type": "application/json"})
        response = connection.getresponse()
        if response.status != 200:
            raise RuntimeError(f"{self.url}: {response.status} {response.read()[:300]}")
        while line := response.readline():
            if line.startswith(b"data: {"):
                self._take(json.loads(line[len(b"data: "):]))
        connection.close()
        return self

    def _take(self, chunk: dict) -> None:
        if "error" in chunk:
            raise RuntimeError(f"{self.url}: {chunk['error']}")
        self.usage = chunk.get("usage") or self.usage
        for choice in chunk["choices"]:
            if choice["delta"].get("content"):
                self.arrivals.append(time.perf_counter() - self.started)
                self.text.append(choice["delta"]["content"])

    @property
    def n_tokens(self) -> int:
        return self.usage.get("completion_tokens") or self.max_tokens

    @property
    def gaps(self) -> list[float]:
        return [b - a for a, b in itertools.pairwise(self.arrivals)]

    @property
    def speed(self) -> float:
        """Tokens per second of the decode."""
        return (self.n_tokens - 1) / (self.arrivals[-1] - self.arrivals[0])


def connect(url: str) -> http.client.HTTPConnection:
    """A connection that gives up after ten minutes of silence."""
    parts = urllib.parse.urlsplit(url)
    return http.client.HTTPConnection(parts.hostname, parts.port, timeout=600)


def fetch(connection: http.client.HTTPConnection, url: str, path: str,
          body: str | None = None) -> tuple[int, bytes]:
    """Status and body of a reply that is not streamed: to a POST of `body`, or to a GET."""
    connection.request("POST" if body else "GET", urllib.parse.urlsplit(url).path.rstrip("/")
                       + path, body, {"Content-Type": "application/json"})
    response = connection.getresponse()
    return response.status, response.read()


@functools.cache
def model_at(url: str) -> str:
    """The first model that a server lists."""
    with contextlib.closing(connect(url)) as connection:
        status, body = fetch(connection, url, "/v1/models")
    if status != 200:
        raise RuntimeError(f"{url}: {status} {body[:300]}")
    return json.loads(body)["data"][0]["id"]


def run_together(streams: list[Stream]) -> float:
    """Run streams at the same time; return the seconds until the last one ended."""
    started = time.perf_counter()
    with ThreadPoolExecutor(len(streams)) as pool:
        list(pool.map(Stream.run, streams))
    return time.perf_counter() - started


@contextlib.contextmanager
def running(streams: list[Stream], n_arrived: int):
    """Run streams beside the body of a `with`, which begins when each has `n_arrived` pieces."""
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(run_together, streams)
        while not future.done() and min(len(s.arrivals) for s in streams) < n_arrived:
            time.sleep(0.005)
        yield
        future.result()


# ---- servers ---------------------------------------------------------------------------------


class Server:
    """A server to measure: one that runs at `url`, or one that `command` starts there."""

    def __init__(self, name: str, url: str, command: list[str] | None = None):
        self.name, self.url, self.command = name, url, command

    def start(self) -> None:
        """Start the process and wait until it has answered a completion."""
        quiet = subprocess.DEVNULL
        self.process = subprocess.Popen(self.command, stdout=quiet, stderr=quiet)
        deadline = time.monotonic() + START_SECONDS
        try:
            while not self.answers():
                if self.process.poll() is not None or time.monotonic() > deadline:
                    raise SystemExit(f"{self.name} did not start: {' '.join(self.command)}")
                time.sleep(0.05)
        except BaseException:  # Ctrl-C, too, must not leave it behind
            self.stop()
            raise

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait()

    def answers(self) -> bool:
        """Whether it can generate."""
        try:
            Stream(self.url, user("hi"), 1, []).run()
            return True
        except (OSError, RuntimeError, http.client.HTTPException):
            return False

    def memory(self) -> tuple[float, float]:
        """Megabytes resident in the process and its children: all, and without pages of files."""
        processes = {}
        for path in Path("/proc").glob("[0-9]*/status"):
            with contextlib.suppress(OSError):  # one that has ended meanwhile
                fields = dict(line.split(":", 1) for line in path.read_text().splitlines())
                processes[int(fields["Pid"])] = fields
        family = {self.process.pid}
        while more := {pid for pid, fields in processes.items()
                       if int(fields["PPid"]) in family} - family:
            family |= more
        return tuple(sum(int(processes[pid].get(field, "0").split()[0]) for pid in family)
                     * 1024 / MB for field in ("VmRSS", "RssAnon"))


def free_port() -> int:
    """A port that nobody listens on right now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def command_for(kind: str, port: int, group: "Group", model: str, threads: int) -> list[str]:
    """The command line that starts a server on `port`: for all the same model, threads, slots."""
    slots, n_ctx, threads = str(group.slots), str(group.n_ctx), str(threads)
    if kind == "ours":
        return ["env", f"N_THREADS={threads}", f"PARALLEL={slots}", f"N_CTX={n_ctx}",
                sys.executable, str(HERE / "server.py"), "--model", model, "--port", str(port)]
    if kind == "llama_cpp.server":
        return [sys.executable, "-m", "llama_cpp.server", "--model", model, "--port", str(port),
                "--n_ctx", n_ctx, "--n_threads", threads, "--n_threads_batch", threads,
                "--interrupt_requests", "false"]
    name, _, path = kind.partition("=")
    if name == "llama-server" and path:
        return [path, "-m", model, "--port", str(port), "-t", threads, "-np", slots,
                "-c", str(group.n_ctx * group.slots)]
    raise SystemExit(f"--start takes ours, llama_cpp.server or llama-server=PATH, not {kind!r}")


def servers_for(group: "Group", options: argparse.Namespace, made: Path) -> list[Server]:
    """The servers to measure a group's scenarios on: each kind in its variants. `made` is a folder
    for made models."""
    others = [Server(*server.split("=", 1)) for server in options.servers]
    if not options.start:
        return others
    sys.path.insert(0, str(HERE))
    import engine
    from features import downloads
    model = downloads.fetch(options.model, HERE / "models") or options.model
    model = str(engine.find_model_file(model, HERE / "models"))
    if group.made and not any(made.iterdir()):
        subprocess.run([sys.executable, str(HERE / "tests" / "make_deep_model.py"), str(made)],
                       check=True)
    servers = []
    for kind in options.start:
        name = kind.partition("=")[0]
        for label, settings in group.variants.get(name, {"": []}).items():
            port = free_port()
            served = str(made / group.made) if group.made else model
            command = command_for(kind, port, group, served, options.threads)
            settings = [text.format(model=model, made=made) for text in settings]
            # Ours takes settings from the environment, the others as flags.
            command = ["env", *settings, *command] if name == "ours" else [*command, *settings]
            servers.append(Server(f"{name} {label}".strip(), f"http://127.0.0.1:{port}", command))
    return servers + others


# ---- scenarios: each takes a server, a seeded random generator and EOS ids -------------------


def text_of(n_words: int, rng: random.Random) -> str:
    """Random English words: about as many tokens, and shared with no other prompt."""
    return " ".join(rng.choice(WORDS) for _ in range(n_words))


def user(text: str) -> list[dict]:
    """A conversation of one user message."""
    return [{"role": "user", "content": text}]


def percentile(values: list[float], share: float) -> float:
    """The value below which this share (0 to 1) of them lies, by nearest rank."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def gaps_of(streams: list[Stream]) -> dict[str, float]:
    """Figures of the pauses between the pieces of streams."""
    gaps = [gap for stream in streams for gap in stream.gaps]
    return {"gap p50 ms": 1e3 * statistics.median(gaps),
            "gap p99 ms": 1e3 * percentile(gaps, 0.99), "gap max ms": 1e3 * max(gaps)}


def single(server: Server, rng: random.Random, eos: list[int]) -> dict[str, float]:
    """One stream alone."""
    stream = Stream(server.url, user("Tell a story about: " + text_of(20, rng)), 160, eos).run()
    return {"tokens/s": stream.speed, "ttft ms": 1e3 * stream.arrivals[0], **gaps_of([stream])}


def stories(server: Server, rng: random.Random, eos: list[int], n_streams: int,
            n_tokens: int) -> dict[str, float]:
    """Figures of several different prompts at once."""
    streams = [Stream(server.url, user("Tell a story about: " + text_of(30, rng)), n_tokens, eos)
               for _ in range(n_streams)]
    seconds = run_together(streams)
    return {"tokens/s": sum(stream.n_tokens for stream in streams) / seconds,
            "ttft p50 ms": 1e3 * statistics.median(s.arrivals[0] for s in streams),
            **gaps_of(streams)}


def eight(server: Server, rng: random.Random, eos: list[int]) -> dict[str, float]:
    """Eight different prompts at once."""
    return stories(server, rng, eos, 8, 96)


def sixteen(server: Server, rng: random.Random, eos: list[int]) -> dict[str, float]:
    """Sixteen different prompts at once."""
    return stories(server, rng, eos, 16, 96)


N_STREAMS = (1, 2, 4, 8, 16, 32, 64)


def growth(server: Server, rng: random.Random, eos: list[int]) -> dict[str, float]:
    """More and more streams at once, up to four times as many as there are slots."""
    figures = {}
    for n_streams in N_STREAMS:
        for figure, value in stories(server, rng, eos, n_streams, 48).items():
            if figure in ("tokens/s", "gap p99 ms", "ttft p50 ms"):
                figures[f"{n_streams} at once: {figure}"] = value
    return figures


def shared(server: Server, rng: random.Random, eos: list[int]) -> dict[str, float]:
    """Eight at once over one new system prompt of more than 1,000 tokens."""
    system = {"role": "system", "content": "Background: " + text_of(1150, rng)}
    streams = [Stream(server.url, [system, *user(f"Question {i}: {text_of(8, rng)}?")], 16, eos)
               for i in range(8)]
    seconds = run_together(streams)
    firsts = [stream.arrivals[0] for stream in streams]
    return {"ttft p50 s": statistics.median(firsts), "ttft max s": max(firsts), "total s": seconds}


def beside(server: Server, rng: random.Random, eos: list[int]) -> dict[str, float]:
    """A prompt of 1,000 tokens arrives beside a running stream."""
    stream = Stream(server.url, user("Tell a long story about: " + text_of(20, rng)), 400, eos)
    late = Stream(server.url, user("Summarize: " + text_of(1000, rng)), 8, eos)
    with running([stream], 20):  # well under way
        late.run()
    offset = late.started - stream.started
    return {"stream's longest gap s": max(
                gap for gap, at in zip(stream.gaps, stream.arrivals[1:]) if at >= offset),
            "newcomer's ttft s": late.arrivals[0]}


def short(server: Server, rng: random.Random, eos: list[int]) -> dict[str, float]:
    """Short prompts, one after the other, while one of 6,000 words is being read."""
    long = Stream(server.url, user("Summarize: " + text_of(6000, rng)), 4, eos)
    late = [Stream(server.url, user(f"A {rng.choice(WORDS)}?"), 4, eos) for _ in range(3)]
    with running([long], 0):
        time.sleep(1)  # well under way
        for stream in late:
            stream.run()
    return {"short prompt's ttft s": max(stream.arrivals[0] for stream in late),
            "long prompt's ttft s": long.arrivals[0]}


def take_turn(server: Server, messages: list[dict], rng: random.Random, eos: list[int],
              n_tokens: int) -> Stream:
    """Ask the next question of a conversation and add the reply to it."""
    messages += user("And then? " + text_of(20, rng))
    stream = Stream(server.url, messages, n_tokens, eos).run()
    messages.append({"role": "assistant", "content": "".join(stream.text)})
    return stream


def conversation(server: Server, rng: random.Random, eos: list[int]) -> dict[str, float]:
    """Six turns of one conversation."""
    messages = [{"role": "system", "content": "You are terse. " + text_of(200, rng)}]
    turns = [take_turn(server, messages, rng, eos, 48) for _ in range(6)]
    figures = {"turn 1 ttft ms": 1e3 * turns[0].arrivals[0],
               "turns 2-6 ttft p50 ms": 1e3 * statistics.median(t.arrivals[0] for t in turns[1:])}
    evaluated = [turn.usage["prompt_tokens"] - turn.usage["prompt_tokens_details"]["cached_tokens"]
                 for turn in turns if "cached_tokens" in (
                     turn.usage.get("prompt_tokens_details") or {})]
    if evaluated:
        figures["turns 2-6 evaluated tokens max"] = max(evaluated[1:])
    return figures


def conversations(server: Server, rng: random.Random, eos: list[int]) -> dict[str, float]:
    """Twelve conversations take turns on four slots; then one that stays in its slot."""
    def ttft(n_conversations: int) -> float:
        """The median of turns 2 to 4, in milliseconds."""
        talks = [[{"role": "system", "content": "You are terse. " + text_of(400, rng)}]
                 for _ in range(n_conversations)]
        turns = [[take_turn(server, talk, rng, eos, 16).arrivals[0] for talk in talks]
                 for _ in range(4)]
        return 1e3 * statistics.median(itertools.chain(*turns[1:]))

    many, alone = ttft(12), ttft(1)
    return {"turns 2-4 ttft p50 ms": many, "alone: turns 2-4 ttft p50 ms": alone,
            "many/alone": many / alone}


N_REQUESTS = 20  # of each client
HEALTH_SECONDS = 2.0  # long enough for a 99th percentile, shorter than the streams beside it


def health(server: Server) -> dict[str, float]:
    """GET /health again and again on one connection, if the server has it."""
    seconds, started = [], time.perf_counter()
    with contextlib.closing(connect(server.url)) as connection:
        while (begun := time.perf_counter()) < started + HEALTH_SECONDS:
            if fetch(connection, server.url, "/health")[0] != 200:
                return {}
            seconds.append(time.perf_counter() - begun)
    return {"req/s": len(seconds) / sum(seconds), "p99 ms": 1e3 * percentile(seconds, 0.99)}


def requests(server: Server, rng: random.Random, eos: list[int]) -> dict[str, float]:
    """A cached prompt with max_tokens 1, streamed on new connections, plain on kept ones; and
    GET /health."""
    messages = user("Say one word about: " + text_of(20, rng))
    Stream(server.url, messages, 1, eos).run()  # from here on the prompt is cached
    body = json.dumps({"model": model_at(server.url), "messages": messages, "max_tokens": 1})

    def on_new(_: int) -> None:
        for _ in range(N_REQUESTS):
            Stream(server.url, messages, 1, eos).run()

    def on_kept(_: int) -> None:  # llama-server keeps none on which it has streamed
        with contextlib.closing(connect(server.url)) as connection:
            for _ in range(N_REQUESTS):
                status, reply = fetch(connection, server.url, "/v1/chat/completions", body)
                if status != 200:
                    raise RuntimeError(f"{server.url}: {status} {reply[:300]}")

    figures = {}
    for n_clients, (how, ask) in itertools.product(
            (1, 4), (("new", on_new), ("kept", on_kept))):
        started = time.perf_counter()
        with ThreadPoolExecutor(n_clients) as pool:
            list(pool.map(ask, range(n_clients)))
        figures[f"{n_clients} at once, {how} connections: req/s"] = (
            N_REQUESTS * n_clients / (time.perf_counter() - started))
    figures |= {f"health: {figure}": value for figure, value in health(server).items()}
    streams = [Stream(server.url, user("Tell a story about: " + text_of(20, rng)), 96, eos)
               for _ in range(4)]
    with running(streams, 1):
        figures |= {f"health beside 4: {figure}": value
                    for figure, value in health(server).items()}
    return figures


PEOPLE = {"type": "array", "minItems": 4, "maxItems": 6, "items": {
    "type": "object", "additionalProperties": False, "required": ["name", "age", "job", "likes"],
    "properties": {"name": {"type": "string", "maxLength": 40}, "age": {"type": "integer"},
                   "job": {"enum": ["baker", "pilot", "nurse", "farmer"]},
                   "likes": {"type": "array", "maxItems": 3,
                             "items": {"type": "string", "maxLength": 40}}}}}


def constrained(server: Server, rng: random.Random, eos: list[int]) -> dict[str, float]:
    """A reply held to a JSON Schema, against a free one to the same prompt."""
    messages = user(f"Describe four people as JSON. Their town is {text_of(3, rng)}.")
    seconds = {}
    for kind, more in (("free", {}), ("constrained", {"response_format": {
            "type": "json_schema", "json_schema": {"name": "people", "schema": PEOPLE}}})):
        stream = Stream(server.url, messages, 160, eos, **more).run()
        seconds[kind] = 1 / stream.speed
    return {"free ms/token": 1e3 * seconds["free"],
            "constrained ms/token": 1e3 * seconds["constrained"],
            "constrained/free": seconds["constrained"] / seconds["free"]}


# Texts that a model of 135 million parameters really repeats.
STORY = (
    "The harbor at {} was quiet in the early morning. Old {} carried {} baskets of herring to the "
    "market, where Mrs. Finch weighed them and wrote each number in her red book. By noon the "
    "square was full of people from the hills, and the baker sold {} loaves before the bell rang. "
    "When the rain came, everybody ran under the arches, and somebody began to sing a song about "
    "the sea. {} counted his coins twice, bought a ribbon for his daughter, and walked home along "
    "the river.")


def repetitive(server: Server, rng: random.Random, _: list[int]) -> dict[str, float]:
    """Replies that repeat the prompt (free to end): a text, a text with errors, and a list."""
    names = [name.capitalize() for name in rng.sample(WORDS, 3)]
    story = STORY.format(names[0], names[1], rng.randrange(3, 99), rng.randrange(3, 99), names[1])
    items = "\n".join(f"{number}. {text_of(2, rng)}: {rng.randrange(100, 999)} dollars"
                      for number in range(1, 19))
    speeds = {}
    for task, words in (
            ("copy", f"Repeat the following text exactly, word for word:\n\n{story}"),
            ("correct", "Fix the spelling in this text and write it again. Change nothing else."
                        f"\n\n{story.replace('morning', 'mornning').replace('coins', 'cions')}"),
            ("list", f"Copy this list:\n\n{items}")):
        speeds[task] = Stream(server.url, user(words), 200, []).run().speed
    return {"tokens/s": statistics.harmonic_mean(speeds.values()),
            **{f"{task}: tokens/s": speed for task, speed in speeds.items()}}


def plain(server: Server, rng: random.Random, eos: list[int]) -> dict[str, float]:
    """A reply that repeats nothing: a story at temperature 0.8."""
    messages = user("Tell a story about: " + text_of(20, rng))
    stream = Stream(server.url, messages, 240, eos, temperature=0.8, seed=rng.getrandbits(31)).run()
    return {"tokens/s": stream.speed}


def drafts(server: Server, rng: random.Random, eos: list[int]) -> dict[str, float]:
    """A large model for which a small one drafts: one stream, and four at once."""
    stream = Stream(server.url, user("Tell a story about: " + text_of(20, rng)), 128, eos).run()
    four = stories(server, rng, eos, 4, 48)
    return {"1 stream: tokens/s": stream.speed, "4 streams: tokens/s": four["tokens/s"]}


N_CONTEXT = (512, 1024, 2048, 4096, 7900)  # words, each about a token; 8192 hold the reply, too


def context(server: Server, rng: random.Random, eos: list[int]) -> dict[str, float]:
    """Time per token after a longer and longer prompt; each begins with the one before."""
    words, figures = text_of(N_CONTEXT[-1], rng).split(), {}
    for n_words in N_CONTEXT:
        stream = Stream(server.url, user(" ".join(words[:n_words])), 32, eos).run()
        figures[f"{n_words} tokens: ms/token"] = 1e3 / stream.speed
    return figures


def startup(server: Server, rng: random.Random, eos: list[int]) -> dict[str, float]:
    """From the start of the process to its first answer; memory then, and with eight streams."""
    if not server.command:
        return {}
    server.stop()
    started = time.perf_counter()
    server.start()
    figures = {"start s": time.perf_counter() - started}
    figures["memory MB"], figures["own memory MB"] = server.memory()
    streams = [Stream(server.url, user("Tell a story about: " + text_of(30, rng)), 48, eos)
               for _ in range(8)]
    with running(streams, 24):  # half of the reply
        figures["8 streams: memory MB"], figures["8 streams: own memory MB"] = server.memory()
    return figures


class Group(NamedTuple):
    """Scenarios that are run on servers with the same settings."""
    scenarios: tuple[Callable, ...]
    slots: int
    n_ctx: int  # tokens per slot
    variants: dict[str, dict[str, list[str]]] = {}  # kind of server: label: its own settings
    made: str = ""  # the model, if it is one of those that tests/make_deep_model.py writes


LLAMA_DRAFT = ("--spec-type", "draft-simple", "--spec-draft-n-max", "8", "-md")
# In settings, {model} is the GGUF file and {made} the folder of the made ones.
GROUPS = (
    Group((single, eight, shared, beside, conversation, requests, constrained), 8, 2048),
    Group((startup,), 8, 2048),
    Group((repetitive, plain), 4, 2048, {
        "ours": {"": ["DRAFT=null"], "prompt-lookup": ["DRAFT=prompt-lookup"]},
        # Of its kinds of drafts and sizes the fastest at copying; its own sizes are 12 and 48.
        "llama-server": {"": [], "ngram": [
            "--spec-type", "ngram-simple", "--spec-ngram-simple-size-n", "4",
            "--spec-ngram-simple-size-m", "16"]}}),
    Group((sixteen, growth), 16, 1024),
    Group((conversations,), 4, 1024),
    Group((context,), 1, 8192),
    Group((short,), 4, 8192),
    Group((drafts,), 4, 1024, {
        "ours": {"": ["DRAFT=null"], "draft": ["DRAFT=null", "DRAFT_MODEL_PATH={model}"],
                 "poor draft": ["DRAFT=null", "DRAFT_MODEL_PATH={made}/degraded.gguf"]},
        "llama-server": {  # -md alone loads the model and never asks it
            "": [], "draft": [*LLAMA_DRAFT, "{model}"],
            "poor draft": [*LLAMA_DRAFT, "{made}/degraded.gguf"]}}, made="deep.gguf"),
)
SCENARIOS = {scenario.__name__: scenario for group in GROUPS for scenario in group.scenarios}
HEAVY = (growth, conversations, context, short, drafts)  # a third of the rounds: minutes each
HIGHER_IS_BETTER = ("tokens/s", "req/s")


# ---- the run ---------------------------------------------------------------------------------


def measure(group: Group, names: list[str], options: argparse.Namespace, made: Path):
    """Run those scenarios of a group that are named; yields each one's name and results."""
    arguments = [re.sub("(^|=)/.*/", r"\1", argument) for argument in sys.argv[1:]]  # no folders
    command = " ".join(["python bench.py", *arguments])
    with contextlib.ExitStack() as stack:
        servers = servers_for(group, options, made)
        for server in servers:
            if server.command:
                server.start()
                stack.callback(server.stop)
        for scenario in group.scenarios:
            if (name := scenario.__name__) not in names:
                continue
            figures: dict[str, dict[str, list[float]]] = {}
            for turn in range(-(-options.rounds // 3) if scenario in HEAVY else options.rounds):
                for server in servers:
                    rng = random.Random(f"{options.seed} {name} {turn}")
                    for figure, value in scenario(server, rng, options.eos).items():
                        figures.setdefault(figure, {}).setdefault(server.name, []).append(
                            float(f"{value:.5g}"))
            yield name, {
                "date": datetime.date.today().isoformat(), "slots": group.slots,
                "tokens per slot": group.n_ctx, "threads": options.threads, "seed": options.seed,
                "model": group.made or model_at(servers[0].url), "command": command,
                "servers": [server.name for server in servers], "rounds": figures}


def medians(result: dict) -> dict[str, dict[str, float]]:
    """{figure: {server: median over the rounds}} of one scenario."""
    return {figure: {server: statistics.median(values) for server, values in by_server.items()}
            for figure, by_server in result["rounds"].items()}


def number(value: float) -> str:
    """With three digits or so."""
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def show(name: str, result: dict) -> None:
    """Print one scenario: a row per figure, and what the first server's is divided by each."""
    print(f"\n{name}: {' '.join(SCENARIOS[name].__doc__.split())}")
    servers, first = result["servers"], result["servers"][0]
    print(f"{'':42}" + "".join(f"{server:>26}" for server in servers))
    for figure, values in medians(result).items():
        cells = []
        for server in servers:
            cell = number(values[server]) if server in values else "-"
            if server != first and values.get(server) and first in values:
                cell += f" ({values[first] / values[server]:.2f})"
            cells.append(f"{cell:>26}")
        better = "higher" if figure.endswith(HIGHER_IS_BETTER) else "lower"
        print(f"{figure + ' (' + better + ')':>42}" + "".join(cells), flush=True)


def describe_machine(options: argparse.Namespace) -> dict:
    """What the figures depend on."""
    cpu = re.search(r"(?m)^model name\s*:\s*(.*)", Path("/proc/cpuinfo").read_text())
    versions = {"python": platform.python_version(),
                "llama-cpp-python": importlib.metadata.version("llama-cpp-python")}
    for kind in options.start:
        name, _, path = kind.partition("=")
        if path:
            version = subprocess.run([path, "--version"], capture_output=True, text=True)
            versions[name] = (version.stderr + version.stdout).splitlines()[0]
    return {"cpu": cpu[1] if cpu else platform.machine(), "cores": os.cpu_count(),
            "system": f"{platform.system()} {platform.release()}", "versions": versions}


# ---- what is written: a JSON file, plots, a table --------------------------------------------


class Row(NamedTuple):
    """A row of the table."""
    text: str
    scenario: str
    figure: str
    target: float | None = None  # of the ratio: at least for a speed, else at most
    beyond: float | None = None  # a target for how much more than the peer's it is, in its unit
    variants: tuple[str, str] = ("", "")  # of the first server, and of its peers


LOOKUP, NGRAM = ("prompt-lookup", ""), ("prompt-lookup", "ngram")
DRAFT, POOR_DRAFT = ("draft", "draft"), ("poor draft", "poor draft")
ROWS = (
    Row("one stream, tokens/s", "single", "tokens/s", 1.0),
    Row("8 streams, tokens/s", "eight", "tokens/s", 1.0),
    Row("16 streams, tokens/s", "sixteen", "tokens/s", 1.0),
    Row("64 streams on 16 slots, tokens/s", "growth", "64 at once: tokens/s"),
    Row("8 over a new shared prefix: time to first token, s", "shared", "ttft p50 s", 0.4),
    Row("beside a 1,000-word prompt: longest gap, s", "beside", "stream's longest gap s", 0.2),
    Row("that prompt's time to first token, s", "beside", "newcomer's ttft s"),
    Row("short prompts beside one of 6,000 words: longest time to first token, s", "short",
        "short prompt's ttft s", 1.0),
    Row("that long prompt's time to first token, s", "short", "long prompt's ttft s"),
    Row("conversation: time to first token, ms", "conversation", "turns 2-6 ttft p50 ms"),
    Row("12 conversations on 4 slots: the same, ms", "conversations", "turns 2-4 ttft p50 ms", 1.0),
    Row("after 7,900 words, ms/token", "context", "7900 tokens: ms/token"),
    Row("repeating the prompt, no drafts, tokens/s", "repetitive", "tokens/s"),
    Row("the same, prompt-lookup here, none there, tokens/s", "repetitive", "tokens/s", 1.5, None,
        LOOKUP),
    Row("the same, prompt-lookup here, ngram-simple there, tokens/s", "repetitive", "tokens/s",
        variants=NGRAM),
    Row("new text, no drafts, tokens/s", "plain", "tokens/s"),
    Row("the same, prompt-lookup here, none there, tokens/s", "plain", "tokens/s", variants=LOOKUP),
    Row("the same, prompt-lookup here, ngram-simple there, tokens/s", "plain", "tokens/s",
        variants=NGRAM),
    Row("large model, no drafts, tokens/s", "drafts", "1 stream: tokens/s"),
    Row("large model, perfect drafts here, none there, tokens/s", "drafts", "1 stream: tokens/s",
        1.5, variants=("draft", "")),
    Row("large model, perfect drafts, tokens/s", "drafts", "1 stream: tokens/s", variants=DRAFT),
    Row("large model, poor drafts, tokens/s", "drafts", "1 stream: tokens/s", variants=POOR_DRAFT),
    Row("large model, perfect drafts, 4 streams, tokens/s", "drafts", "4 streams: tokens/s",
        variants=DRAFT),
    Row("JSON Schema, ms/token", "constrained", "constrained ms/token"),
    Row("cached prompt, 1 client, requests/s", "requests", "1 at once, kept connections: req/s"),
    Row("cached prompt, 4 clients, requests/s", "requests", "4 at once, kept connections: req/s"),
    Row("GET /health beside 4 streams, requests/s", "requests", "health beside 4: req/s"),
    Row("start to first answer, s", "startup", "start s", beyond=2),
    Row("memory with 8 streams, MB", "startup", "8 streams: memory MB", beyond=100),
)


def values_of(row: Row, document: dict) -> list[float | None]:
    """A row's figure of each server; None where it has not been measured."""
    result = document["scenarios"].get(row.scenario)
    by_server = medians(result).get(row.figure, {}) if result else {}
    first = document["servers"][0]
    return [by_server.get(f"{name} {row.variants[name != first]}".strip())
            for name in document["servers"]]


def table(document: dict) -> str:
    """The results in Markdown, with the first server's ratio to the second."""
    servers = document["servers"]
    head = ["", *servers, *([f"{servers[0]} / {servers[1]}", "target"] if servers[1:] else [])]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for row in ROWS:
        values = values_of(row, document)
        if values[0] is None:
            continue
        cells = [row.text, *("-" if value is None else number(value) for value in values)]
        if servers[1:]:
            cells.append("-" if not values[1] else f"{values[0] - values[1]:+.1f}" if row.beyond
                         else f"{values[0] / values[1]:.2f}")
            sign = "≥" if row.figure.endswith(HIGHER_IS_BETTER) else "≤"
            cells.append(f"{sign} {row.target}" if row.target else
                         f"≤ {row.beyond} more" if row.beyond else "")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def write_all(document: dict, folder: Path) -> None:
    """Draw the plots, and renew the table between the marks in REPORT."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot
    pyplot.rcParams |= {
        "svg.fonttype": "none", "svg.hashsalt": "bench", "font.family": "sans-serif",
        "font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
        "axes.axisbelow": True, "grid.color": "#e5e5e5", "legend.frameon": False,
        "axes.prop_cycle": matplotlib.cycler(color=["#1f6fb2", "#d9822b", "#7a7a7a", "#4f9d69"])}
    plots = {
        "growth": draw_lines(pyplot, document, "growth", N_STREAMS, "streams at once, 16 slots", {
            "Tokens per second, all streams (higher is better)": "{} at once: tokens/s",
            "99th percentile of gaps, ms (lower is better)": "{} at once: gap p99 ms"}),
        "context": draw_lines(pyplot, document, "context", N_CONTEXT, "tokens of context", {
            "Milliseconds per generated token (lower is better)": "{} tokens: ms/token"}),
        "speed": draw_speed(pyplot, document)}
    for name, figure in plots.items():
        if figure:
            # Without a date, the same results give the same file.
            figure.savefig(folder / f"{name}.svg", metadata={"Date": None}, bbox_inches="tight",
                           facecolor="white")
    text, n_tables = re.subn(r"(?s)(<!-- bench -->\n).*?(<!-- /bench -->)",
                             lambda marks: f"{marks[1]}{table(document)}\n{marks[2]}",
                             REPORT.read_text())
    if n_tables:
        REPORT.write_text(text)
    else:
        print(f"{REPORT} has no <!-- bench --> and <!-- /bench -->: no table", file=sys.stderr)


def draw_lines(pyplot, document: dict, scenario: str, xs: tuple[int, ...], x_label: str,
               panels: dict[str, str]):
    """One line per server over xs. panels: title: name of the figure, where {} stands for x."""
    if not (result := document["scenarios"].get(scenario)):
        return None
    figure, all_axes = pyplot.subplots(1, len(panels), figsize=(5 * len(panels), 3.4),
                                       squeeze=False)
    for axes, (title, name) in zip(all_axes[0], panels.items()):
        for server in result["servers"]:
            values = [medians(result)[name.format(x)][server] for x in xs]
            axes.plot(xs, values, marker="o", markersize=4, label=server)
        axes.set_title(title, fontsize=10)
        axes.set_xlabel(x_label)
        axes.set_xscale("log", base=2)
        axes.set_xticks(xs, [f"{x:,}" for x in xs])
        axes.minorticks_off()
        axes.set_ylim(bottom=0)
        axes.legend()
    figure.tight_layout()
    return figure


def draw_speed(pyplot, document: dict):
    """How many times as fast as the second server the first is, row by row of the table."""
    bars = []
    for row in ROWS:
        first, second, *_ = [*values_of(row, document), None]
        if first and second and row.beyond is None:
            higher = row.figure.endswith(HIGHER_IS_BETTER)
            bars.append((row.text.rpartition(", ")[0],
                         first / second if higher else second / first))
    if not bars:
        return None
    figure, axes = pyplot.subplots(figsize=(7, 0.8 + 0.27 * len(bars)))
    names, ratios = zip(*bars[::-1])
    axes.barh(range(len(bars)), [ratio - 1 for ratio in ratios], left=1, height=0.6,
              color=["#1f6fb2" if ratio >= 1 else "#d9822b" for ratio in ratios])
    for y, ratio in enumerate(ratios):
        axes.annotate(f"{ratio:.2f}", (ratio, y), (4 if ratio >= 1 else -4, 0), va="center",
                      textcoords="offset points", ha="left" if ratio >= 1 else "right", fontsize=9)
    axes.axvline(1, color="#333333", linewidth=1)
    axes.set_xscale("log")
    ticks = (0.25, 0.5, 1, 2, 4, 8, 16)
    axes.set_xticks(ticks, [f"{tick:g}×" for tick in ticks])
    axes.minorticks_off()
    axes.set_xlim(min(0.8, min(ratios) / 1.4), max(1.25, max(ratios) * 1.4))
    axes.set_yticks(range(len(bars)), names)
    axes.grid(axis="y", visible=False)
    axes.set_title(f"{document['servers'][0]}: how many times as fast as "
                   f"{document['servers'][1]} (right of the line: faster)", fontsize=10, loc="left")
    return figure


# ---- the command line ------------------------------------------------------------------------


def read_options() -> argparse.Namespace:
    """The command line; exits with a message where it makes no sense."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("servers", nargs="*", metavar="NAME=URL", help="a running server")
    parser.add_argument("--start", action="append", default=[], metavar="KIND",
                        help="start a server: ours, llama_cpp.server or llama-server=PATH")
    parser.add_argument("--model", help="GGUF for the started servers (default: the server's own)")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3, help="heavy scenarios run a third: "
                        + ", ".join(scenario.__name__ for scenario in HEAVY))
    parser.add_argument("--seed", type=int, default=int(time.time()), help="of the prompts")
    parser.add_argument("--eos", type=lambda text: [int(t) for t in text.split(",") if t],
                        default=[0, 2, 4], help="end-of-text token ids (default: SmolLM2's)")
    parser.add_argument("--scenarios", type=lambda text: text.split(","), default=list(SCENARIOS),
                        help=f"which, comma-separated, of {','.join(SCENARIOS)}")
    parser.add_argument("--write", action="store_true",
                        help="keep the results in docs/, draw the plots, write the table")
    parser.add_argument("--from-json", type=Path, metavar="FILE",
                        help="measure nothing: plots beside FILE, and the table")
    options = parser.parse_args()
    if unknown := set(options.scenarios) - set(SCENARIOS):
        parser.error(f"no such scenario: {', '.join(sorted(unknown))}")
    if not (options.servers or options.start or options.from_json):
        parser.error("name a server (NAME=URL) or --start one")
    return options


def main() -> None:
    """Start or find the servers, run the scenarios in turns, print the tables."""
    options = read_options()
    if options.from_json:
        return write_all(json.loads(options.from_json.read_text()), options.from_json.parent)
    names = [server.partition("=")[0] for server in options.start + options.servers]
    document = {"machine": describe_machine(options), "servers": names, "scenarios": {}}
    if options.write and RESULTS.exists():
        before = json.loads(RESULTS.read_text())
        document["scenarios"] = before["scenarios"]
        document["servers"] = list(dict.fromkeys(before["servers"] + names))
    with tempfile.TemporaryDirectory() as made:
        for group in GROUPS:
            if not any(scenario.__name__ in options.scenarios for scenario in group.scenarios):
                continue
            for name, result in measure(group, options.scenarios, options, Path(made)):
                show(name, result)
                document["scenarios"][name] = result
                if options.write:  # after each scenario, so that a run cut short loses little
                    RESULTS.parent.mkdir(exist_ok=True)
                    RESULTS.write_text(json.dumps(document, indent=1) + "\n")
    if options.write:
        write_all(document, RESULTS.parent)
    print(json.dumps(document))


if __name__ == "__main__":
    main()
