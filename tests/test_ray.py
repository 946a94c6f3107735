"""examples/ray_serve.py on one machine: two replicas behind Ray's proxy.

Ray has many dependencies, so this runs in an environment of its own: requirements-ray.txt has the
commands. All replies pass openai_schemas.py.
"""

import concurrent.futures
import json
import os
import secrets
import socket
import sys
import time

import httpx
import openai
import pytest

from conftest import ROOT, checking_client

# Read as ray is imported: nothing is reported to its makers, and no token is written to ~/.ray.
os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
sys.path.insert(0, str(ROOT))  # Ray hands it on to the replicas

import ray
from ray import serve

MODEL = "gpt-4o-mini"
SETTINGS = {"N_CTX": "512", "PARALLEL": "2", "N_THREADS": "1", "DRAIN_SECONDS": "2",
            "MODEL_ALIASES": MODEL}
QUESTION = [{"role": "user", "content": "What is rain?"}]
GREEDY = {"model": MODEL, "messages": QUESTION, "temperature": 0, "max_tokens": 24}
ENDLESS = {**GREEDY, "max_tokens": 400, "ignore_eos": True}  # ten seconds and more
CHAT = "/v1/chat/completions"


@pytest.fixture(scope="module")
def url():
    from examples import ray_serve

    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with pytest.MonkeyPatch.context() as patch:
        for name, value in SETTINGS.items():
            patch.setenv(name, value)
        app = ray_serve.app(ray_serve.Scale(min_replicas=2, max_replicas=2))
    ray.init("local", num_cpus=4, include_dashboard=False, object_store_memory=10**8)
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        serve.run(app)
        yield f"http://127.0.0.1:{port}"
        serve.shutdown()
    finally:
        ray.shutdown()


@pytest.fixture(scope="module")
def http(url):
    with checking_client(url) as client:
        yield client


@pytest.fixture(scope="module")
def client(url, http):
    return openai.OpenAI(base_url=f"{url}/v1", api_key="unused", max_retries=0, http_client=http)


def health(http, seconds: float, enough) -> dict[str, dict]:
    """What each replica says of itself, asked again and again until that is enough."""
    seen, until = {}, time.monotonic() + seconds
    while not enough(seen):
        assert time.monotonic() < until, seen
        reply = http.get("/health")
        assert reply.status_code == 200
        seen[reply.headers["x-replica"]] = reply.json()
    return seen


def are_idle(seen: dict[str, dict]) -> bool:
    return len(seen) == 2 and not any(each["busy"] or each["waiting"] for each in seen.values())


def test_a_stream_adds_up_to_the_reply(client):
    reply = client.chat.completions.create(**GREEDY).choices[0]
    chunks = [chunk.choices[0] for chunk in client.chat.completions.create(**GREEDY, stream=True)]
    assert "".join(chunk.delta.content or "" for chunk in chunks) == reply.message.content != ""
    assert chunks[-1].finish_reason == reply.finish_reason == "length"


def test_a_stream_arrives_as_it_is_made(url):
    with httpx.stream("POST", url + CHAT, json={**GREEDY, "stream": True}, timeout=60) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        pieces = [(time.monotonic(), piece) for piece in response.iter_raw()]
    assert pieces[-1][1].endswith(b"data: [DONE]\n\n")
    assert len(pieces) > 8 and pieces[-1][0] - pieces[0][0] > 0.1


def test_refusals_are_those_of_the_server(client, http):
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(**{**GREEDY, "max_tokens": -1})
    assert (caught.value.param, caught.value.code) == ("max_tokens", "invalid_value")
    assert http.post(CHAT, content=b"{").json()["error"]["code"] == "invalid_json"
    assert http.get("/v1/models/nobody%2Fs").json()["error"]["message"].startswith(
        'the model "nobody/s" does not exist')
    assert http.get("/v1/models", headers={"Host": "evil.example"}).status_code == 403
    assert http.get("/v1/models", headers={"X-Forwarded-For": "nonsense"}).status_code == 200


def test_other_paths_and_methods_are_served(url, client):
    assert MODEL in [model.id for model in client.models.list()]
    assert client.completions.create(model=MODEL, prompt="Rain", max_tokens=3).choices[0].text
    assert len(client.embeddings.create(model=MODEL, input=["a", "b"]).data) == 2
    head = httpx.head(f"{url}/v1/models")
    assert int(head.headers["content-length"]) > 0 and not head.content
    assert len(head.headers.get_list("x-request-id")) == 1
    assert httpx.options(f"{url}/v1/models").headers["allow"] == "GET, HEAD, OPTIONS"


def test_a_schema_is_kept(client):
    """The process that tries schemas out is started by one of Ray's."""
    reply = client.chat.completions.create(
        **{**GREEDY, "max_tokens": 64}, response_format={"type": "json_schema", "json_schema": {
            "name": "answer", "schema": {
                "type": "object", "additionalProperties": False, "required": ["wet"],
                "properties": {"wet": {"type": "boolean"}}}}})
    assert isinstance(json.loads(reply.choices[0].message.content)["wet"], bool)


def test_both_replicas_answer(http):
    with concurrent.futures.ThreadPoolExecutor() as threads:
        replies = list(threads.map(lambda _: http.post(CHAT, json=GREEDY), range(8)))
    assert {reply.status_code for reply in replies} == {200}
    assert len({reply.headers["x-replica"] for reply in replies}) == 2
    assert len({reply.json()["choices"][0]["message"]["content"] for reply in replies}) == 1


def test_who_hangs_up_frees_the_slot(url, http):
    """Streaming or not; all would otherwise keep the four slots busy for a minute."""
    for _ in range(6):
        with httpx.stream("POST", url + CHAT, json={**ENDLESS, "stream": True},
                          timeout=60) as response:
            assert next(response.iter_raw())
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(url + CHAT, json=ENDLESS, timeout=0.5)
    health(http, 10, are_idle)


def test_a_lost_replica_is_replaced(http):
    names = set(health(http, 10, lambda seen: len(seen) == 2))
    lost = names.pop()
    actors = ray.util.list_named_actors(all_namespaces=True)
    actor = next(each for each in actors if each["name"].endswith(f"#{lost}"))
    ray.kill(ray.get_actor(actor["name"], actor["namespace"]))
    reply = http.post(CHAT, json=GREEDY)
    assert reply.status_code == 200 and {reply.headers["x-replica"]} == names
    health(http, 60, lambda seen: len(set(seen) | names) == 2)
    assert http.post(CHAT, json=GREEDY).status_code == 200
