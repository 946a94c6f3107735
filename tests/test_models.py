"""Several models: which one is loaded when, what its clients see meanwhile, and the settings.

All models are the default one, under several names.
"""

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

import conftest
import engine
import server
from features import models, pooled, vision

KEY = "sk-a-secret-key"
HI = [{"role": "user", "content": "Say hello."}]
SIZES = {"n_ctx": 256, "parallel": 2}
CHAT = "/v1/chat/completions"


@pytest.fixture(scope="module")
def gguf():
    return conftest.default_model()


@contextlib.contextmanager
def listening(models, **settings):
    """A server in this process, its default model loaded; models: {name: file}."""
    entries = {name: conftest.entry(model_path=str(file)) for name, file in models.items()}
    running = server.Server(conftest.config(**{
        "port": 0, "turn_seconds": 0.0, **SIZES, "models": entries, **settings}))
    threading.Thread(target=running.serve_forever, args=(0.02,), daemon=True).start()
    running.models.start()
    try:
        yield running
    finally:
        running.stopping.set()
        running.models._thread.join(10)
        ended = not running.models._thread.is_alive()
        assert running.drain() and ended


def get(running, path):
    return httpx.get(running.url + path, timeout=30)


def post(running, path, timeout=60, **body):
    return httpx.post(running.url + path, json=body, timeout=timeout)


def ask(running, model=None, n_tokens=4):
    """One chat, greedy."""
    return post(running, CHAT, model=model, messages=HI, max_tokens=n_tokens, temperature=0)


def text_of(response):
    assert response.status_code == 200, response.text
    return response.json()["choices"][0]["message"]["content"]


def stream_lines(running, path, seen, **body):
    """The lines of a stream, in `seen`, which grows while they arrive."""
    with httpx.stream("POST", running.url + path, timeout=60,
                      json={"messages": HI, **body}) as response:
        for line in response.iter_lines():
            seen += [line] if line else []
    return seen


@contextlib.contextmanager
def streaming(running, model, n_tokens):
    """A stream that has begun; yields the future of all its lines."""
    seen = []
    with ThreadPoolExecutor() as threads:
        stream = threads.submit(stream_lines, running, CHAT, seen, model=model, stream=True,
                                max_tokens=n_tokens, ignore_eos=True)
        wait_for(lambda: len(seen) > 1)
        yield stream


def is_whole(lines):
    return lines[-1] == "data: [DONE]" and '"finish_reason":"length"' in lines[-2]


def wait_for(condition, seconds=20):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def listed(running, which="available"):
    return {each["model_key"]: each for each in get(running, "/models").json()[which]}


@pytest.fixture
def gate(monkeypatch, tmp_path, gguf):
    """gate.file: a model whose loading stays at 42 % until the gate is set."""
    gate, real = threading.Event(), engine.load_engine

    def load_engine(path, *, on_progress, **options):
        while path.stem == "slow" and not gate.wait(0.05):
            if not on_progress(0.42):
                raise engine.ModelError("interrupted")
        return real(path, on_progress=on_progress, **options)

    monkeypatch.setattr(engine, "load_engine", load_engine)
    gate.file = tmp_path / "slow.gguf"
    gate.file.symlink_to(gguf)
    gate.close = gate.set
    yield gate
    gate.set()


@contextlib.contextmanager
def running_process(*arguments, until="ready: ", folder=None, **environ):
    """`python ARGUMENTS` until it has said so; yields the process, its address, the last line."""
    clean = {name: value for name, value in os.environ.items() if name not in ("PORT", "MODEL_ID")}
    process = subprocess.Popen(
        [conftest.server_python(), *map(str, arguments)], stdout=subprocess.PIPE, cwd=folder,
        stderr=subprocess.STDOUT, text=True, env={**clean, "PYTHONUNBUFFERED": "1", **environ})
    said = ""
    try:
        while until not in said:
            line = process.stdout.readline()
            said += line
            assert line, said
        threading.Thread(target=process.stdout.read, daemon=True).start()  # a full pipe would block
        yield process, re.search(r"listens on (\S+)", said)[1], line
    finally:
        process.terminate()
        process.wait(timeout=20)


# ==== Which model is loaded ===============================================================


def test_with_room_for_one_a_request_for_another_changes_them(gguf):
    """The old one goes, the new one comes, and both say the same."""
    with listening({"a": gguf, "b": gguf}) as running:
        alone = text_of(ask(running, "a", 12))
        assert text_of(ask(running, None, 12)) == alone and running.models.n_loads == 1
        assert text_of(ask(running, "b", 12)) == alone and {*listed(running, "loaded")} == {"b"}
        assert text_of(ask(running, "a", 12)) == alone and {*listed(running, "loaded")} == {"a"}
        assert "twofile_model_loads_total 3" in get(running, "/metrics").text


@pytest.mark.parametrize("wrong", [
    {"tool_choice": "required"}, {"grammar": ""}, {"grammar": "x", "json_schema": {}},
    {"response_format": {"type": "json_schema"}}, {"stop": [""]},
    {"tools": [{"type": "function", "function": {"name": "a b"}}]}])
def test_what_is_wrong_with_a_body_is_said_before_a_model_is_loaded_for_it(gguf, wrong):
    with listening({"a": gguf, "b": gguf}) as running:
        assert post(running, CHAT, model="b", messages=HI, max_tokens=1, **wrong).status_code == 400
        assert {*listed(running, "loaded")} == {"a"} and running.models.n_loads == 1


def test_with_room_for_two_the_least_recently_used_one_goes(gguf):
    """Not the one that has been there for longest."""
    with listening(dict.fromkeys("abc", gguf), max_loaded=2) as running:
        alone = text_of(ask(running, "a", 12))
        assert text_of(ask(running, "b", 12)) == alone
        assert text_of(ask(running, "a", 12)) == alone and running.models.n_loads == 2
        assert text_of(ask(running, "c", 12)) == alone
        assert {*listed(running, "loaded")} == {"a", "c"} and running.models.n_loads == 3


def test_running_work_is_finished_before_its_model_goes(gguf):
    """A stream on a is whole; then b answers."""
    with listening({"a": gguf, "b": gguf}) as running, streaming(running, "a", 40) as stream:
        assert text_of(ask(running, "b")) and stream.done() and is_whole(stream.result())


def test_only_one_model_leaves_for_another(gguf):
    """Both were at work when a third was asked for; the one that stays longer need not go."""
    with listening(dict.fromkeys("abc", gguf), max_loaded=2) as running, \
            streaming(running, "b", 90) as long, streaming(running, "a", 10) as short:
        assert text_of(ask(running, "c")) and not long.done() and is_whole(short.result())
        assert is_whole(long.result())
        time.sleep(0.5)
        assert {*listed(running, "loaded")} == {"b", "c"}


@pytest.mark.slow
def test_two_busy_clients_do_not_make_the_models_change_places_all_the_time(gguf):
    """Each model has its turn: all are served, in few loads, and nobody waits for long."""
    with listening({"a": gguf, "b": gguf}, turn_seconds=2.0) as running:
        def client(name):
            waits = []
            for _ in range(12):
                began = time.monotonic()
                assert text_of(ask(running, name))
                waits.append(time.monotonic() - began)
            return waits

        with ThreadPoolExecutor() as threads:
            waits = [wait for each in threads.map(client, "ab") for wait in each]
        assert running.models.n_loads <= 6 and len(waits) == 24 and max(waits) < 10


# ==== Loading and unloading by hand =======================================================


def resident(process):
    """Bytes."""
    with open(f"/proc/{process.pid}/status") as file:
        return 1024 * int(re.search(r"VmRSS:\s+(\d+)", file.read())[1])


def test_unloading_gives_the_memory_back(gguf):
    """The KV cache alone is 188 MB."""
    models = {"elsewhere": {"base_url": "http://127.0.0.1:9/v1"}, "a": {"model_path": str(gguf)}}
    with running_process(conftest.ROOT / "server.py", until="listens", MODELS=json.dumps(models),
                         DEFAULT_REGULAR_MODEL="elsewhere", N_CTX="4096", PARALLEL="2",
                         PORT="0") as (process, url, _):
        before, body = resident(process), {"model_key": "a"}
        assert httpx.post(url + "/models/load", json=body, timeout=60).json()["loaded"]
        added = resident(process) - before
        assert added > 200e6
        assert httpx.post(url + "/models/unload", json=body, timeout=60).json() == {
            "unloaded": True, "models": ["a"]}
        assert resident(process) - before < 0.2 * added


def test_what_was_unloaded_by_hand_comes_back_only_by_its_name(gguf):
    """Who names none is refused, in the shape of either dialect."""
    with listening({"a": gguf, "b": gguf}) as running:
        assert post(running, "/models/unload", unload_all=True).json()["models"] == ["a"]
        assert not listed(running, "loaded") and get(running, "/health").json() == {"status": "ok"}
        refused = ask(running)
        assert (refused.status_code, refused.json()["error"]["message"]) == (503, "No model loaded")
        for path in ("/chat", "/chat/regular", "/chat/stream"):
            refused = post(running, path, messages=HI)
            assert refused.status_code == 503 and refused.json() == {
                "detail": "Chat service unavailable: No model loaded"}
        assert text_of(ask(running, "a")) == text_of(ask(running))
        for body in ({}, {"model_key": "a", "unload_all": True}, {"model_key": 5}):
            assert post(running, "/models/unload", **body).status_code == 400
        assert post(running, "/models/unload", model_key="x").status_code == 404


def test_unload_all_means_the_default_model_even_if_another_is_in_its_place(gguf):
    """Who names none does not bring it back."""
    with listening({"a": gguf, "b": gguf}) as running:
        assert text_of(ask(running, "b"))
        assert post(running, "/models/unload", unload_all=True).json()["models"] == ["b"]
        assert ask(running).status_code == 503


def test_exclusive_loading_waits_for_the_others_work(gguf):
    """Then they go, though there is room."""
    with listening({"a": gguf, "b": gguf}, max_loaded=2) as running, \
            streaming(running, "a", 40) as stream:
        done = post(running, "/models/load", model_key="b", exclusive=True)
        assert done.json() == {"loaded": True, "model": "b"} and stream.done()
        assert is_whole(stream.result()) and {*listed(running, "loaded")} == {"b"}
        assert text_of(ask(running))  # in place of a, whoever is there


def test_unloading_does_not_wait_for_a_loading_after_it(gate):
    """Who asked for the model meanwhile has it loaded again, once."""
    gate.set()
    with listening({"slow": gate.file}) as running, streaming(running, "slow", 60) as stream, \
            ThreadPoolExecutor() as threads:
        gate.clear()
        unloading = threads.submit(post, running, "/models/unload", 30, model_key="slow")
        wait_for(lambda: running.models.default.is_leaving)
        late = threads.submit(ask, running, "slow")
        try:
            assert unloading.result(timeout=10).json() == {"unloaded": True, "models": ["slow"]}
        finally:
            gate.set()
        assert is_whole(stream.result()) and text_of(late.result()) and running.models.n_loads == 2


def test_the_end_does_not_wait_for_an_unloading(gguf):
    """Who asked for it is told."""
    with listening({"a": gguf}, drain_seconds=0.5) as running, streaming(running, "a", 60), \
            ThreadPoolExecutor() as threads:
        unloading = threads.submit(post, running, "/models/unload", 3, model_key="a")
        wait_for(lambda: running.models.default.is_leaving)
        running.stopping.set()
        assert unloading.result().status_code == 503


def test_load_has_its_shapes_and_takes_names_only(gguf):
    """No path, however written, reaches the disk. GET /help tells of all routes."""
    with listening({"a": gguf, "org/b": gguf}, models_dir=str(gguf.parent)) as running:
        done = post(running, "/models/load", model_key="org/b")
        assert done.status_code == 200 and done.json() == {"loaded": True, "model": "org/b"}
        for name in ("x", "../a", f"../models/{gguf.stem}", str(gguf), gguf.name, f"./{gguf}",
                     "hf:a/b/c.gguf", "org%2fb", "%2e/a", "a/", "A", "a\0", "a/../a"):
            refused = post(running, "/models/load", model_key=name)
            assert refused.status_code == 404 and refused.json() == {
                "loaded": False, "error": "Failed to load model: Model not found"}, name
            assert ask(running, name).status_code == 404
        assert running.models.n_loads == 2 and {*listed(running)} == {"a", "org/b", gguf.stem}
        entry = {"model_key": "org/b", "vision": False, "loaded": True}
        assert listed(running, "loaded") == {"org/b": entry} and listed(running)["org/b"] == entry
        assert listed(running)["a"] == {"model_key": "a", "vision": False, "loaded": False}
        helped = get(running, "/help").json()["routes"]
        assert [(each["method"], each["path"]) for each in helped] == list(
            conftest.house().routes)
        assert ["exclusive", "model_key"] in [each["body"] for each in helped]


def test_a_model_without_its_file_harms_no_other(tmp_path, gguf, monkeypatch):
    """503 with the reason; the others go on. Each time that the file appears, it is served."""
    monkeypatch.setattr(pooled, "RELOAD_SECONDS", 0.1)
    file, away = tmp_path / "late.gguf", tmp_path / "away"
    os.link(gguf, away)
    with listening({"a": gguf, "late": file}) as running:
        for _ in range(2):
            refused = ask(running, "late")
            why = f"model file not found: {file} ("
            assert refused.status_code == 503 and refused.json()["error"]["code"] == "model_failed"
            assert refused.json()["error"]["message"].startswith(why)
            refused = post(running, "/models/load", model_key="late")
            assert refused.status_code == 503 and refused.json()["loaded"] is False
            assert refused.json()["error"].startswith(f"Failed to load model: {why}")
            refused = post(running, "/chat", model_key="late", messages=HI)
            assert refused.json()["detail"].startswith(f"Chat service unavailable: {why}")
            assert text_of(ask(running, "a")) and get(running, "/health").status_code == 200
            away.rename(file)
            time.sleep(0.2)
            assert text_of(ask(running, "late"))
            file.rename(away)
            assert text_of(ask(running, "a"))


def test_a_folder_of_models(tmp_path, gguf):
    """Files are found by their names, also later; a projector is none, but gives its model eyes."""
    os.link(gguf, tmp_path / "seer.gguf")
    for name in ("seer.mmproj.gguf", "mmproj-other.gguf"):
        shutil.copy(conftest.ROOT / "tests" / "tiny-vision.mmproj.gguf", tmp_path / name)
    (tmp_path / "big-00002-of-00003.gguf").touch()
    (tmp_path / "readme.txt").touch()
    with listening({"a": gguf}, models_dir=str(tmp_path)) as running:
        def vision():
            return {name: entry["vision"] for name, entry in listed(running).items()}

        assert vision() == {"a": False, "seer": True}
        os.link(gguf, tmp_path / "other.gguf")
        os.link(gguf, tmp_path / "later.gguf")
        assert vision() == {"a": False, "seer": True, "other": True, "later": False}
        assert text_of(ask(running, "later"))
        (tmp_path / "other.gguf").unlink()
        (tmp_path / "later.gguf").unlink()  # loaded, and so still there
        assert vision() == {"a": False, "seer": True, "later": False}
        done = post(running, "/chat/vision", messages=HI, config={"maxTokens": 4})
        assert done.json()["model"] == "seer"
        meta = get(running, "/v1/models/seer").json()["meta"]
        assert "vision" in meta["capabilities"]
        assert vision() == {"a": False, "seer": True} and ask(running, "later").status_code == 404


# ==== While a model loads =================================================================


def test_what_clients_see_while_a_model_loads(gguf, gate):
    """Health and the other models answer, streams are told of the progress, one that hangs up is
    forgotten, and at most max_queue wait."""
    with listening({"a": gguf, "slow": gate.file}, max_loaded=2, max_queue=3) as running, \
            streaming(running, "a", 30) as other, ThreadPoolExecutor() as threads, \
            contextlib.closing(gate):  # else who waits behind it would hide what failed
        quick, pool, seen, told = text_of(ask(running, "a")), running.models, [], []
        stream = threads.submit(stream_lines, running, CHAT, seen, model="slow", stream=True,
                                max_tokens=4, ignore_eos=True)
        app = threads.submit(stream_lines, running, "/chat/stream", told, model_key="slow",
                             config={"maxTokens": 4})
        body = json.dumps({"model": "slow", "messages": HI}).encode()
        with socket.create_connection(("127.0.0.1", running.server_port)) as raw:
            raw.sendall(b"POST %b HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n%b"
                        % (CHAT.encode(), len(body), body))
            wait_for(lambda: pool.n_waiting == 3
                     and pool.health().get("loading", {}).get("progress"))
            began = time.monotonic()
            refused, health = ask(running, "slow"), get(running, "/health")
            assert refused.status_code == 503 and "retry-after" in refused.headers
            assert refused.json()["error"]["code"] == "queue_full"
            assert health.status_code == 200 and health.json()["status"] == "ok"
            assert health.json()["loading"] == {"model": "slow", "progress": 0.42}
            assert time.monotonic() - began < 2
        wait_for(lambda: pool.n_waiting == 2)
        assert is_whole(other.result()) and text_of(ask(running, "a")) == quick
        wait_for(lambda: len(seen) > 1 and len(told) > 1)
        assert pool.n_loads == 1
        gate.set()
        assert ": loading slow 42%" in stream.result() and is_whole(stream.result())
        told = list(map(json.loads, app.result()))
        assert {"type": "loading", "model": "slow", "progress": 0.42} in told
        assert told[-1]["type"] == "done" and told[0]["type"] == "loading" and pool.n_waiting == 0
        assert "loading" not in get(running, "/health").json()


SLOW_SERVER = """
import sys, time
sys.path.insert(0, ROOT)
import engine, server
real = engine.load_engine
def load_engine(path, *, on_progress, **options):
    while path.stem == "slow" and on_progress(0.42):
        time.sleep(0.05)
    return real(path, on_progress=on_progress, **options)
engine.load_engine = load_engine
sys.exit(server.main(["--port", "0"]))
"""


def test_a_signal_ends_the_loading(gguf, gate):
    """Who waits for the model is told; the server ends soon, with code 0."""
    models = {"a": {"model_path": str(gguf)}, "slow": {"model_path": str(gate.file)}}
    code = SLOW_SERVER.replace("ROOT", repr(str(conftest.ROOT)))
    with running_process("-c", code, MODELS=json.dumps(models), N_CTX="256", PARALLEL="2") as (
            process, url, _), ThreadPoolExecutor() as threads:
        waiting = threads.submit(httpx.post, url + CHAT, timeout=30,
                                 json={"model": "slow", "messages": HI})
        wait_for(lambda: "loading" in httpx.get(url + "/health").json())
        began = time.monotonic()
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=20) == 0 and time.monotonic() - began < 3
        assert waiting.result().status_code == 503
        assert waiting.result().json()["error"]["code"] == "shutting_down"


# ==== Settings ============================================================================


def config_of(tmp_path, text="", environ=()):
    file = tmp_path / "c.yaml"
    file.write_text(conftest.with_features(text))
    return server.load_config(["--config", str(file)], dict(environ))


BIG = f'models:\n  big: {{base_url: "http://b/v1", api_key: {KEY}'


@pytest.mark.parametrize("text, words", [
    ({"MODELS": f"[{KEY}, {{"}, "environment variable MODELS"),
    ({"API_KEYS": f"[{KEY}, {{"}, "environment variable API_KEYS"),
    ("models: [a]", "models: expected an object"),
    ("models: {a: null}", "models.a: expected an object"),
    (f"models: {{a: {KEY}}}", "models.a: expected an object"),
    ("models: {a: {}}", "models.a: name either a model_path or a base_url"),
    (BIG + ", model_path: x}", "models.big: name either a model_path or a base_url"),
    ("models: {a: {model_path: x, nctx: 4}}", "unknown key 'models.a.nctx'"),
    ("models: {a: {model_path: x, n_ctx: -1}}", "models.a.n_ctx must be between 0 and"),
    ("models: {a: {model_path: [x]}}", "models.a.model_path: expected a string"),
    ("models: {a: {model_path: x, parallel: 20}}\nn_batch: 16", "models.a"),
    (f"models: {{a: {{model_path: x, api_key: {KEY}}}}}", "api_key means nothing beside"),
    (BIG + ", mmproj: x}", "models.big: mmproj means nothing beside a base_url"),
    (BIG + " 2}", "models.big.base_url: the key beside it must be printable ASCII without"),
    (f"models: {{big: {{base_url: 'http://u:{KEY}@b'}}}}", "must be like http://box:8000/v1"),
    (BIG.replace(KEY, f"[{KEY}]") + "}", "models.big.api_key: expected a string"),
    ("models: {big: {base_url: 'ftp://b'}}", "must be like http://box:8000/v1"),
    ("models: {'a b': {model_path: x}}", 'models: "a b" is no name for a model'),
    ("models: {7: {model_path: x}}", "models"),
    ("models: &a {x: *a}", "c.yaml"),
    (BIG, "c.yaml"),  # a brace is missing
    ("max_loaded: 0", "max_loaded must be between 1 and 64"),
    ("openai_base_url: http://b/v1?x", "openai_base_url: must be like"),
    (f"openai_api_key: [{KEY}]", "openai_api_key: expected a string"),
])
def test_wrong_models_are_one_sentence_that_names_the_place(tmp_path, text, words):
    """And never shows a key."""
    with pytest.raises(server.ConfigError) as caught:
        config_of(tmp_path, *([text] if isinstance(text, str) else ["", text]))
    said = str(caught.value)
    assert words in said and KEY not in said and "\n" not in said


def test_wrong_names_stop_the_server():
    """A default model that there is not, a folder that is none."""
    for name, words in (("default_regular_model", 'default_regular_model: the model "x" does not'),
                        ("default_vision_model", 'default_vision_model: the model "x" does not'),
                        ("models_dir", "models_dir: x is not a folder")):
        with pytest.raises(server.ConfigError, match=words):
            server.Server(conftest.config(port=0, **{name: "x"}))


def test_paths_in_a_file_are_relative_to_it(tmp_path):
    """Those of the entries, too; names on the hub stay as they are."""
    config = config_of(tmp_path, "models_dir: m\nmodel: {mmproj: p.gguf, model_path: hf:o/r/f.gguf}"
                                 "\nmodels: {a: {model_path: sub/a.gguf, mmproj: /p.gguf}}")
    entry = config.models["a"]
    assert (config.models_dir, config.mmproj) == (f"{tmp_path}/m", f"{tmp_path}/p.gguf")
    assert (entry.model_path, entry.mmproj) == (f"{tmp_path}/sub/a.gguf", "/p.gguf")
    assert config.model_path == "hf:o/r/f.gguf"


def test_variables_of_local_apps(tmp_path):
    """Two names for one setting are refused; an empty variable is none."""
    config = config_of(tmp_path, "port: 1", {
        "MODEL_ID": "hf:o/r/f.gguf", "BATCH_MAX": "7", "HOST": "::1", "PORT": "9", "MMPROJ": "",
        "CORS_ORIGINS": "http://a,http://b", "DEFAULT_REGULAR_MODEL": "r",
        "DEFAULT_VISION_MODEL": "v", "OPENAI_BASE_URL": "http://b/v1", "OPENAI_API_KEY": "12"})
    assert (config.model_path, config.parallel, config.host, config.port, config.mmproj) == (
        "hf:o/r/f.gguf", 7, "::1", 9, None)
    assert config.cors_origins == ["http://a", "http://b"]
    assert (config.default_regular_model, config.default_vision_model) == ("r", "v")
    assert (config.openai_base_url, config.openai_api_key) == ("http://b/v1", "12")
    with pytest.raises(server.ConfigError, match="BATCH_MAX and PARALLEL mean the same"):
        config_of(tmp_path, "", {"BATCH_MAX": "7", "PARALLEL": "8"})


def test_a_models_broken_projector_is_read_again_when_it_is_whole(gguf, tmp_path):
    """Not only the model's own file counts; and a projector that arrives later is noticed."""
    (tmp_path / "eyes.gguf").symlink_to(gguf)
    whole = (conftest.ROOT / "tests" / "tiny-vision.mmproj.gguf").read_bytes()
    with listening({}, models_dir=str(tmp_path), default_regular_model="eyes") as running:
        assert not vision.sees(running.models.local_models()["eyes"])
        running.models.unload(running.models.loaded(), lambda: None)
        (tmp_path / "eyes.mmproj.gguf").write_bytes(whole[:9000])
        failed = httpx.post(running.url + "/models/load", json={"model_key": "eyes"}, timeout=30)
        assert failed.status_code == 503 and "mmproj" in failed.json()["error"]
        (tmp_path / "eyes.mmproj.gguf").write_bytes(whole)
        loaded = httpx.post(running.url + "/models/load", json={"model_key": "eyes"}, timeout=30)
        assert loaded.json() == {"loaded": True, "model": "eyes"}
        assert running.models.engines()["eyes"] in vision.projectors
