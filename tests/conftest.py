"""A real server in a process of its own, and clients that check the shape of all they get.

The server runs under this Python, if llama_cpp is installed here; else under the repository's
.venv, so that clients with many dependencies can be tested from a virtual environment of theirs.
"""

import contextlib
import functools
import importlib.util
import json
import os
import re
import ssl
import subprocess
import sys
import threading
from pathlib import Path

import httpx
import pytest

import openai_schemas

ROOT = Path(__file__).resolve().parent.parent
FEATURES = re.search(r"^features: \[(.*?)\]", (ROOT / "config.yaml").read_text(),
                     re.M | re.S)[1].replace("\n", " ").replace(" ", "").split(",")
DOCS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
SETTINGS = {"N_CTX": "1024", "PARALLEL": "4", "DRAIN_SECONDS": "2",
            "MODEL_ALIASES": "[gpt-4o-mini, text-embedding-3-small]"}

# Under pytest-xdist (`pytest -n 2`) each worker, and the servers that it starts, has processors of its
# own: threads of two models that share them wait for one another, which takes ten times as long.
if worker := os.environ.get("PYTEST_XDIST_WORKER"):
    n_workers, processors = int(os.environ["PYTEST_XDIST_WORKER_COUNT"]), sorted(os.sched_getaffinity(0))
    if n_workers <= len(processors):
        number = int(worker.removeprefix("gw")) % n_workers  # one that replaces a dead one counts on
        os.sched_setaffinity(0, processors[number::n_workers])

# httpx reads all certificates, for 30 ms, for each request that has no client of its own. One context
# does for all of them: what the tests talk to has no certificate.
ssl.create_default_context = functools.cache(ssl.create_default_context)

# The heavy clients' tests belong to the environment of requirements-clients.txt.
collect_ignore = [] if importlib.util.find_spec("langchain_openai") else ["test_clients.py"]
# So do Ray's, in that of requirements-ray.txt.
collect_ignore += [] if importlib.util.find_spec("ray") else ["test_ray.py"]

# The files that take longest, longest first: with `--dist loadfile` a worker takes the next file when
# it has done one, and so both end at about the same time.
LONGEST = ("test_contract", "test_house", "test_vision", "test_models", "test_structured", "test_drafts",
           "test_forms", "test_limits", "test_elsewhere", "test_responses", "test_messages",
           "test_verbatim")


def blocks_of(language: str, files: list[Path] = DOCS) -> list[str]:
    """The fenced blocks of a language in the docs, in their order."""
    return [block for file in files for block in re.findall(
        rf"^```{language}\n(.*?)^```$", file.read_text(), re.M | re.S)]


def pytest_addoption(parser):
    parser.addoption("--long", action="store_true", help="the long form of test_soak.py")
    parser.addoption("--slow", action="store_true", help="also those tests that take very long")
    parser.addoption("--agents", metavar="FOLDER", help="where npm has installed what test_agents.py runs")


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: runs with --slow only, as in .ci/run")
    config.option.loadscopereorder = False  # xdist's own order is by the number of tests


def pytest_collection_modifyitems(config, items):
    """Leave out what takes very long, unless it is asked for; the longest files first."""
    items.sort(key=lambda item: (*LONGEST, item.path.stem).index(item.path.stem))
    for item in items:
        if "slow" in item.keywords and not (config.getoption("--slow") or config.getoption("--long")):
            item.add_marker(pytest.mark.skip(reason="needs --slow"))


def config(**settings):
    """Settings with all features that config.yaml names, for a server in this process."""
    return house().Config(**settings)


def with_features(text: str) -> str:
    """The text of a config file, with the list of all features in front."""
    return f"features: [{', '.join(FEATURES)}]\n{text}"


def entry(**settings):
    """An entry of `models`, as for `config`."""
    from features import models
    return house().type_of(models.ModelEntry)(**settings)


def default_model() -> Path:
    """Its file; in a clean checkout it is fetched first."""
    sys.path.insert(0, str(ROOT))
    from features import downloads
    return Path(downloads.fetch(None, ROOT / "models"))


@functools.cache
def house():
    """All features that config.yaml names."""
    sys.path.insert(0, str(ROOT))
    import server  # not in the environments of other clients
    from features import loopback
    loopback.POLL_SECONDS = 0.02  # as the servers in this process, of which hundreds end
    return server.load_features(FEATURES)


def server_python() -> str:
    return (sys.executable if importlib.util.find_spec("llama_cpp")
            else str(ROOT / ".venv" / "bin" / "python"))


@contextlib.contextmanager
def serve(**settings):
    """`python server.py` on a free port; yields its address. It must live to the end."""
    process = subprocess.Popen(
        [server_python(), str(ROOT / "server.py"), "--port", "0"], text=True, cwd=ROOT,
        env={**os.environ, "PYTHONUNBUFFERED": "1", **SETTINGS, **settings},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    lines = []
    for line in process.stdout:
        lines.append(line)
        if match := re.match(r"try: curl (http://\S+)/v1/chat/completions -H", line):
            break
    else:
        raise AssertionError(f"the server did not start: {''.join(lines)}")
    reader = threading.Thread(target=lambda: lines.extend(process.stdout), daemon=True)
    reader.start()  # a full pipe would block the server
    try:
        yield match[1]
    finally:
        died = process.poll()
        process.terminate()
        process.wait(timeout=60)
    assert died is None, f"the server died with {died}: {''.join(lines[-30:])}"
    assert process.returncode == 0


def check_response(response: httpx.Response) -> None:
    """An httpx hook: every reply and every chunk of a stream has the API's shape."""
    response.read()
    try:
        asked = json.loads(response.request.content or b"null")
    except (ValueError, RecursionError):
        asked = None
    openai_schemas.check_exchange(response.request.url.path, asked, response.status_code,
                                  response.headers.get("content-type", ""), response.text)


def checking_client(url: str) -> httpx.Client:
    return httpx.Client(base_url=url, timeout=60, event_hooks={"response": [check_response]})


@pytest.fixture(scope="session")
def url():
    """The address of the server that most tests share."""
    with serve() as address:
        yield address


@pytest.fixture(scope="session")
def http(url):
    """Raw HTTP to the shared server, all replies checked."""
    with checking_client(url) as client:
        yield client


@pytest.fixture(scope="session")
def start_server():
    """A function that starts one more server, with settings of its own, and gives raw HTTP."""
    with contextlib.ExitStack() as stack:
        def start(**settings):
            return stack.enter_context(checking_client(stack.enter_context(serve(**settings))))
        yield start


@pytest.fixture(scope="module")
def bare():
    """The default model without an engine, for its vocabulary and for templates of one's own."""
    sys.path.insert(0, str(ROOT))
    import engine  # not in the environments of other clients
    model = engine.Model(default_model(), n_gpu_layers=0)
    yield model
    model.close()
