"""The environment: settings from variables and from `.env`, beside config.yaml and flags."""

import os
import shutil
import subprocess
import sys

import httpx
import pytest

import conftest
import server
from features import environment
from test_models import KEY, gguf, running_process  # noqa: F401  gguf is a fixture


def test_settings_come_from_file_environment_and_flags_in_this_order(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("n_ctx: 100\ntemperature: 0.1\nserver:\n  port: 1\n"
                    "model:\n  model_path: m.gguf")
    config = server.load_config(["--config", str(file), "--port", "3"],
                                {"PORT": "2", "TEMPERATURE": "0.2"})
    assert (config.n_ctx, config.temperature, config.port) == (100, 0.2, 3)
    assert config.model_path == str(tmp_path / "m.gguf")


@pytest.mark.parametrize("text, words", [
    ("n_cxt: 5", "unknown key 'n_cxt'; the nearest is 'n_ctx'"),
    ("server:\n  N_CTX: 5", "unknown key 'N_CTX'; the nearest is 'n_ctx'"),
    ("server:\n  n_ctx: 5", "n_ctx belongs in section model, not server"),
    ("server: [5]", "section server holds `key: value` lines, nothing else"),
    ("auth:\n  enabled: true\n  auth_enabled: true", "auth_enabled is set twice"),
    ("rate_limiting:\n  enabled: true", "unknown key 'rate_limiting': it needs the feature rates (see `features`); "
     "take it out, and likewise rate_limiting_enabled (rates)"),
    ("rate_limiting:", "unknown key 'rate_limiting': it needs the feature rates (see `features`)"),
    ("serve:\n  port: 5", "unknown key 'serve'; the nearest is 'server'")])
def test_a_wrong_key_is_told_what_may_be_meant(tmp_path, text, words):
    """What the two files alone call an unknown key."""
    file = tmp_path / "config.yaml"
    file.write_text(text)
    with pytest.raises(server.ConfigError) as caught:
        server.load_config(["--config", str(file)], {})
    assert str(caught.value) == f"{file}: {words}"


@pytest.mark.parametrize("value", ["!!bool x", "!!map [1]", "!!int ''", "!!timestamp x", "2024-13-45"])
def test_what_yaml_cannot_read_in_a_variable_is_one_sentence(value):
    """Its reader has more errors than its own."""
    with pytest.raises(server.ConfigError, match="environment variable PORT: .* is not a value"):
        server.load_config([], {"PORT": value})


def test_features_may_come_from_the_environment():
    config = server.load_config(["--config", os.devnull], {"FEATURES": "memory, tokens"})
    assert config.features == ["memory", "tokens"] and config.cache_ram_mib == 512
    assert not server.load_config(["--config", os.devnull], {"FEATURES": ""}).features  # is not set


def test_keys_come_from_the_environment_as_a_list_with_commas():
    config = server.load_config([], {"API_KEYS": "one, 22,three", "CORS_ORIGINS": "[http://a.b]",
                                     "RATE_LIMITING_ENABLED": "true"})
    assert config.api_keys == ["one", "22", "three"] and config.cors_origins == ["http://a.b"]
    assert config.rate_limiting_enabled


def test_a_wrong_environment_variable_is_one_sentence_and_exit_code_2():
    for value, words in (("[1", "'[1' is not a value"), ("x", "port: expected an integer")):
        process = subprocess.run([sys.executable, str(conftest.ROOT / "server.py")], text=True,
                                 env={**os.environ, "PORT": value}, capture_output=True)
        assert process.returncode == 2 and process.stderr.count("\n") == 1
        assert "environment variable PORT" in process.stderr and words in process.stderr


def test_a_dotenv_file(tmp_path):
    """Quotes, comments, `export`; a line that is wrong is named by its number only."""
    file = tmp_path / ".env"
    assert environment.read_env_file(file) == {}
    file.write_text("# a comment\n\n  A=1  \nexport B = two words # comment\nC=\"x # 'y' \" # z\n"
                    "D='say \"hi\"'\nE=\nF=a#b=c\n  # indented\nA=2\nG=it's\n")
    assert environment.read_env_file(file) == {
        "A": "2", "B": "two words", "C": "x # 'y' ", "D": 'say "hi"', "E": "", "F": "a#b=c",
        "G": "it's"}
    for line in (KEY, f"{KEY}=1", f"= {KEY}", f"K=\"{KEY}", f"K='{KEY}'x"):
        file.write_text(f"A=1\n{line}\n")
        with pytest.raises(server.ConfigError) as caught:
            environment.read_env_file(file)
        assert f"{file}: line 2" in str(caught.value) and KEY not in str(caught.value)


def test_a_name_in_a_dotenv_file_that_is_almost_a_setting_s_is_told(tmp_path, monkeypatch, caplog):
    """Nobody believes in a key that is none; other programs' variables are their own business."""
    monkeypatch.setattr(server, "HERE", tmp_path)
    (tmp_path / ".env").write_text("API_KEY=secret\nN_CTXX=5\nPORT=5\nPOSTGRES_PORT=5432\n")
    environment.settings(server.load_features([]), {})
    assert [record.getMessage() for record in caplog.records if "nearest" in record.getMessage()] == [
        f"warning: {name} in .env is no setting; the nearest is {near}"
        for name, near in (("API_KEY", "API_KEYS"), ("N_CTXX", "N_CTX"))]


def test_a_dotenv_file_beside_the_server_is_used(tmp_path, gguf):
    """But what the environment says itself wins."""
    for name in ("server.py", "engine.py"):
        shutil.copy(conftest.ROOT / name, tmp_path)
    shutil.copytree(conftest.ROOT / "features", tmp_path / "features")
    (tmp_path / "mine.gguf").symlink_to(gguf)
    (tmp_path / ".env").write_text(f"PORT=0\nFEATURES=apps\nexport MODEL_ID='{tmp_path}/mine.gguf'\nBATCH_MAX=3"
                                   "\nN_CTX=4096\n")
    with running_process(tmp_path / "server.py", folder="/", N_CTX="256") as (_, url, line):
        assert line.startswith("ready: mine on") and "3 slots of 256 tokens" in line
        assert httpx.get(url + "/v1/models").json()["data"][0]["id"] == "mine"
