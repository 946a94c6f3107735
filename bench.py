"""Measure OpenAI-compatible servers side by side, in one run on one machine.

    python bench.py NAME=URL [NAME=URL ...]
    python bench.py --start ours --start llama_cpp.server --start llama-server=PATH

The first server is the one the others are compared with. Each scenario is run on every server in
turn, several times over, so that a machine whose speed drifts treats them all alike; figures are
medians over the rounds. Greedy sampling, end-of-text biased away (`--eos` names its token ids), so
every reply has the length asked for. Prompts are new in every round and the same for every server.
The last line is JSON.
"""

import argparse
import contextlib
import functools
import http.client
import json
import random
import socket
import statistics
import subprocess
import sys
import threading
import time
import urllib.parse
from pathlib import Path

HERE = Path(__file__).resolve().parent
START_SECONDS = 120  # a server that does not answer by then has failed
WORDS = ("time year people way day man thing woman life child world school state family student "
         "group country problem hand part place case week company system program question work "
         "government number night point home water room mother area money story fact month lot "
         "right study book eye job word business issue side kind head house service friend").split()


# ---- one streamed request ------------------------------------------------------------------


class Stream:
    """One request and when its pieces arrived. All times are seconds since `started`."""

    def __init__(self, url: str, messages: list[dict], max_tokens: int, eos: list[int], **more):
        """more: further fields of the body."""
        self.url = urllib.parse.urlsplit(url)
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
        connection = http.client.HTTPConnection(self.url.hostname, self.url.port, timeout=600)
        connection.request("POST", self.url.path.rstrip("/") + "/v1/chat/completions", self.body,
                           {"Content-Type": "application/json"})
        response = connection.getresponse()
        if response.status != 200:
            raise RuntimeError(f"{self.url.netloc}: {response.status} {response.read()[:300]}")
        while line := response.readline():
            if line.startswith(b"data: {"):
                self._take(json.loads(line[len(b"data: "):]))
        connection.close()
        self.total = time.perf_counter() - self.started
        return self

    def _take(self, chunk: dict) -> None:
        if "error" in chunk:
            raise RuntimeError(f"{self.url.netloc}: {chunk['error']}")
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
        return [b - a for a, b in zip(self.arrivals, self.arrivals[1:])]


@functools.cache
def model_at(url: str) -> str:
    """The first model that a server lists."""
    parts = urllib.parse.urlsplit(url)
    connection = http.client.HTTPConnection(parts.hostname, parts.port, timeout=10)
    connection.request("GET", parts.path.rstrip("/") + "/v1/models")
    response = connection.getresponse()
    body = response.read()
    connection.close()
    if response.status != 200:
        raise RuntimeError(f"{parts.netloc}: {response.status} {body[:300]}")
    return json.loads(body)["data"][0]["id"]


def run_together(streams: list[Stream]) -> float:
    """Run streams at the same time; return the seconds until the last one ended."""
    started = time.perf_counter()
    errors: list[BaseException] = []

    def run(stream: Stream) -> None:
        try:
            stream.run()
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(stream,)) for stream in streams]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return time.perf_counter() - started


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


# ---- scenarios: each takes a base URL, a seeded random generator and EOS ids -----------------


def single(url: str, rng: random.Random, eos: list[int]) -> dict[str, float]:
    """One stream alone."""
    stream = Stream(url, user("Tell a story about: " + text_of(20, rng)), 160, eos).run()
    gaps = stream.gaps
    return {"tokens/s": (stream.n_tokens - 1) / (stream.arrivals[-1] - stream.arrivals[0]),
            "ttft ms": 1e3 * stream.arrivals[0], "gap p50 ms": 1e3 * statistics.median(gaps),
            "gap p99 ms": 1e3 * percentile(gaps, 0.99), "gap max ms": 1e3 * max(gaps)}


def eight(url: str, rng: random.Random, eos: list[int]) -> dict[str, float]:
    """Eight different prompts at once."""
    streams = [Stream(url, user("Tell a story about: " + text_of(30, rng)), 96, eos)
               for _ in range(8)]
    seconds = run_together(streams)
    gaps = [gap for stream in streams for gap in stream.gaps]
    return {"tokens/s": sum(stream.n_tokens for stream in streams) / seconds,
            "ttft p50 ms": 1e3 * statistics.median(s.arrivals[0] for s in streams),
            "gap p50 ms": 1e3 * statistics.median(gaps),
            "gap p99 ms": 1e3 * percentile(gaps, 0.99), "gap max ms": 1e3 * max(gaps)}


def shared(url: str, rng: random.Random, eos: list[int]) -> dict[str, float]:
    """Eight at once over one new system prompt of more than 1,000 tokens."""
    system = {"role": "system", "content": "Background: " + text_of(1150, rng)}
    streams = [Stream(url, [system, *user(f"Question {i}: {text_of(8, rng)}?")], 16, eos)
               for i in range(8)]
    seconds = run_together(streams)
    firsts = [stream.arrivals[0] for stream in streams]
    return {"ttft p50 s": statistics.median(firsts), "ttft max s": max(firsts), "total s": seconds}


def beside(url: str, rng: random.Random, eos: list[int]) -> dict[str, float]:
    """A prompt of 1,000 tokens arrives beside a running stream."""
    running = Stream(url, user("Tell a long story about: " + text_of(20, rng)), 400, eos)
    late = Stream(url, user("Summarize: " + text_of(1000, rng)), 8, eos)
    thread = threading.Thread(target=running.run)
    thread.start()
    while len(running.arrivals) < 20:  # well under way
        time.sleep(0.005)
    late.run()
    thread.join()
    offset = late.started - running.started
    return {"stream's longest gap s": max(
                gap for gap, at in zip(running.gaps, running.arrivals[1:]) if at >= offset),
            "newcomer's ttft s": late.arrivals[0]}


def conversation(url: str, rng: random.Random, eos: list[int]) -> dict[str, float]:
    """Six turns of one conversation."""
    messages = [{"role": "system", "content": "You are terse. " + text_of(200, rng)}]
    firsts, evaluated = [], []
    for _ in range(6):
        messages += user("And then? " + text_of(20, rng))
        stream = Stream(url, messages, 48, eos).run()
        messages.append({"role": "assistant", "content": "".join(stream.text)})
        firsts.append(stream.arrivals[0])
        details = stream.usage.get("prompt_tokens_details") or {}
        if "cached_tokens" in details:
            evaluated.append(stream.usage["prompt_tokens"] - details["cached_tokens"])
    figures = {"turn 1 ttft ms": 1e3 * firsts[0],
               "turns 2-6 ttft p50 ms": 1e3 * statistics.median(firsts[1:])}
    if evaluated:
        figures["turns 2-6 evaluated tokens max"] = max(evaluated[1:])
    return figures


def rate(url: str, rng: random.Random, eos: list[int]) -> dict[str, float]:
    """Requests per second with max_tokens 1, one after the other and four at a time."""
    messages = user("Say one word about: " + text_of(20, rng))
    Stream(url, messages, 1, eos).run()  # from here on the prompt is cached

    def some() -> None:
        for _ in range(20):
            Stream(url, messages, 1, eos).run()

    figures = {}
    for n_clients in (1, 4):
        threads = [threading.Thread(target=some) for _ in range(n_clients)]
        started = time.perf_counter()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        figures[f"{n_clients} client{'s' * (n_clients > 1)} req/s"] = (
            20 * n_clients / (time.perf_counter() - started))
    return figures


PEOPLE = {"type": "array", "minItems": 4, "maxItems": 6, "items": {
    "type": "object", "additionalProperties": False, "required": ["name", "age", "job", "likes"],
    "properties": {"name": {"type": "string", "maxLength": 40}, "age": {"type": "integer"},
                   "job": {"enum": ["baker", "pilot", "nurse", "farmer"]},
                   "likes": {"type": "array", "maxItems": 3,
                             "items": {"type": "string", "maxLength": 40}}}}}


def constrained(url: str, rng: random.Random, eos: list[int]) -> dict[str, float]:
    """A reply held to a JSON Schema, against a free one to the same prompt."""
    messages = user(f"Describe four people as JSON. Their town is {text_of(3, rng)}.")
    seconds = {}
    for kind, more in (("free", {}), ("constrained", {"response_format": {
            "type": "json_schema", "json_schema": {"name": "people", "schema": PEOPLE}}})):
        stream = Stream(url, messages, 160, eos, **more).run()
        seconds[kind] = (stream.arrivals[-1] - stream.arrivals[0]) / (stream.n_tokens - 1)
    return {"free ms/token": 1e3 * seconds["free"],
            "constrained ms/token": 1e3 * seconds["constrained"],
            "constrained/free": seconds["constrained"] / seconds["free"]}


SCENARIOS = {scenario.__name__: scenario
             for scenario in (single, eight, shared, beside, conversation, rate, constrained)}
HIGHER_IS_BETTER = ("tokens/s", "req/s")


# ---- servers ---------------------------------------------------------------------------------


def free_port() -> int:
    """A port that nobody listens on right now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def command_for(kind: str, port: int, options: argparse.Namespace) -> list[str]:
    """The command line that starts a server on `port`, with the same model, threads and slots."""
    sys.path.insert(0, str(HERE))
    import engine
    model = str(engine.find_model_file(options.model, HERE / "models"))
    threads, slots, n_ctx = str(options.threads), str(options.slots), str(options.n_ctx)
    if kind == "ours":
        return ["env", f"N_THREADS={threads}", f"PARALLEL={slots}", f"N_CTX={n_ctx}",
                sys.executable, str(HERE / "server.py"),
                "--model", model, "--port", str(port)]
    if kind == "llama_cpp.server":
        return [sys.executable, "-m", "llama_cpp.server", "--model", model, "--port", str(port),
                "--n_ctx", n_ctx, "--n_threads", threads, "--n_threads_batch", threads,
                "--interrupt_requests", "false"]
    name, _, path = kind.partition("=")
    if name == "llama-server" and path:
        return [path, "-m", model, "--port", str(port), "-t", threads, "-np", slots,
                "-c", str(options.n_ctx * options.slots)]
    raise SystemExit(f"--start takes ours, llama_cpp.server or llama-server=PATH, not {kind!r}")


@contextlib.contextmanager
def started(kind: str, options: argparse.Namespace):
    """Run a server for the time of the benchmark; yields its name and URL."""
    port = free_port()
    command = command_for(kind, port, options)
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    url = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + START_SECONDS
        while not answers(url):
            if process.poll() is not None or time.monotonic() > deadline:
                raise SystemExit(f"{kind} did not start: {' '.join(command)}")
            time.sleep(0.2)
        yield kind.partition("=")[0], url
    finally:
        process.terminate()
        process.wait()


def answers(url: str) -> bool:
    """Whether the server can generate."""
    try:
        Stream(url, user("hi"), 1, []).run()
        return True
    except (OSError, RuntimeError, http.client.HTTPException):
        return False


# ---- the run ---------------------------------------------------------------------------------


def measure(servers: dict[str, str], names: list[str], options: argparse.Namespace) -> dict:
    """Return {scenario: {figure: {server: median}}}."""
    results: dict = {}
    for name in names:
        rounds: dict[str, list[dict[str, float]]] = {server: [] for server in servers}
        for turn in range(options.rounds):
            for server, url in servers.items():
                rng = random.Random(f"{options.seed} {name} {turn}")
                rounds[server].append(SCENARIOS[name](url, rng, options.eos))
        figures = {figure: None for runs in rounds.values() for run in runs for figure in run}
        results[name] = {figure: {
            server: statistics.median(run[figure] for run in runs)
            for server, runs in rounds.items() if figure in runs[0]} for figure in figures}
        show(name, results[name], list(servers))
    return results


def show(name: str, figures: dict, servers: list[str]) -> None:
    """Print one scenario: a row per figure, a column per server, and the ratios to the first."""
    print(f"\n{name}: {SCENARIOS[name].__doc__}")
    ratios = [f"{servers[0]} / {peer}" for peer in servers[1:]]
    print("  " + " ".join(f"{head:>28}" for head in ["", *servers, *ratios]))
    for figure, by_server in figures.items():
        cells = [f"{by_server[s]:.1f}" if s in by_server else "-" for s in servers]
        if by_server.get(servers[0]) and by_server[servers[0]] < 10:
            cells = [f"{by_server[s]:.3f}" if s in by_server else "-" for s in servers]
        for peer in servers[1:]:
            both = peer in by_server and servers[0] in by_server and by_server[peer]
            cells.append(f"{by_server[servers[0]] / by_server[peer]:.2f}" if both else "-")
        better = "higher" if figure.endswith(HIGHER_IS_BETTER) else "lower"
        print(f"  {figure + ' (' + better + ')':>28} " + " ".join(f"{c:>28}" for c in cells[:]),
              flush=True)


def main() -> None:
    """Start or find the servers, run the scenarios in turns, print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("servers", nargs="*", metavar="NAME=URL", help="a running server")
    parser.add_argument("--start", action="append", default=[], metavar="KIND",
                        help="start a server: ours, llama_cpp.server or llama-server=PATH")
    parser.add_argument("--model", help="GGUF for the started servers (default: the server's own)")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--slots", type=int, default=8)
    parser.add_argument("--n-ctx", type=int, default=2048, help="tokens per slot")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seed", type=int, default=int(time.time()), help="of the prompts")
    parser.add_argument("--eos", type=lambda text: [int(t) for t in text.split(",") if t],
                        default=[0, 2, 4], help="end-of-text token ids (default: SmolLM2's)")
    parser.add_argument("--scenarios", default=",".join(SCENARIOS), help="which, comma-separated")
    options = parser.parse_args()
    with contextlib.ExitStack() as stack:
        servers = dict(stack.enter_context(started(kind, options)) for kind in options.start)
        servers |= dict(server.split("=", 1) for server in options.servers)
        if not servers:
            parser.error("name a server (NAME=URL) or --start one")
        results = measure(servers, options.scenarios.split(","), options)
    print(json.dumps({"servers": list(servers), "threads": options.threads, "slots": options.slots,
                      "n_ctx": options.n_ctx, "rounds": options.rounds, "seed": options.seed,
                      "results": results}))


if __name__ == "__main__":
    main()
