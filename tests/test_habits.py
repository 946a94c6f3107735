"""Habits: what clients send and read that no reference has, and all servers of this kind take.

    1  paths and names     bases without /v1, any model's name
    2  fields              -1 for nothing, no prompt, log-probabilities by name
    3  bytes               line ends in JSON, marks in front of it, compressed bodies
    4  settings            switches of 0 and 1, marks, keys given twice
    5  a remote tokenizer  as lm-eval asks for it
"""

import gzip
import json

import httpx
import pytest

import conftest
import server
from test_contract import CHAT, COMPLETIONS, EMBEDDINGS, HI, post, refused
from test_limits import listening

# ==== 1. Paths and names ==================================================================


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS, EMBEDDINGS])
def test_a_base_without_v1_finds_the_same(http, path):
    body = {CHAT: {"messages": HI, "max_tokens": 2}, COMPLETIONS: {"prompt": "Rain", "max_tokens": 2},
            EMBEDDINGS: {"input": "Rain"}}[path]
    replies = [post(http, each, {**body, **({} if path == EMBEDDINGS else {"temperature": 0})})
               for each in (path, path.removeprefix("/v1"))]
    for reply in replies:
        for name in ("id", "created", "timings", "usage"):
            reply.pop(name, None)
    assert replies[0] == replies[1]


def test_any_name_of_a_model_will_do_if_the_settings_say_so():
    """And where they don't, the refusal says how; no name, and an empty one, are the default."""
    asked = {"messages": HI}
    with listening(model_aliases=["*"]) as running:
        for name in ("gpt-9", "", None):
            reply = httpx.post(running.url + CHAT, json={**asked, "model": name})
            assert reply.json()["error"]["code"] == "loading", name
        assert "*" not in running.models.names()
    with listening() as running:
        reply = httpx.post(running.url + CHAT, json={**asked, "model": "gpt-9"})
        assert reply.status_code == 404 and 'model_aliases: ["*"]' in reply.json()["error"]["message"]


# ==== 2. Fields ===========================================================================


def test_minus_one_is_no_limit_and_no_seed(http):
    """A limit of -1 tokens ends where the model does, or the context; a seed of -1 is another each time."""
    wild = {"messages": HI, "temperature": 2, "top_k": 0, "top_p": 1, "min_p": 0, "seed": -1,
            "max_tokens": 6}
    said = {post(http, CHAT, wild)["choices"][0]["message"]["content"] for _ in range(4)}
    assert len(said) > 1
    for path, body in ((CHAT, {"messages": HI}), (COMPLETIONS, {"prompt": "Rain"})):
        reply = post(http, path, {**body, "max_tokens": -1, "temperature": 0, "stop": ["e", "a", "i", "o"]})
        assert reply["choices"][0]["finish_reason"] == "stop"
    house = conftest.house()
    for cls, body in ((server.ChatBody, {"messages": HI}), (server.CompletionBody, {"prompt": "Rain"})):
        for name, number, limit in (("max_tokens", -1, server.INT32_MAX), ("max_tokens", 7, 7), ("max_tokens", None, {
                server.ChatBody: None, server.CompletionBody: server.LEGACY_MAX_TOKENS}[cls])):
            read = server.read_object(house.type_of(cls), {**body, name: number}, "", server.Reading(house))
            assert read.max_tokens == limit
    for name in ("max_tokens", "max_completion_tokens"):
        for number in (0, -2):
            refused(http, CHAT, {"messages": HI, name: number}, name)


def test_no_prompt_is_the_beginning_of_a_document(http):
    for prompt in ("", None, [""]):
        reply = post(http, COMPLETIONS, {"prompt": prompt, "max_tokens": 3, "temperature": 0})
        assert reply["usage"]["prompt_tokens"] == 1 and reply["choices"][0]["text"]


def test_the_token_that_was_chosen_is_among_the_likeliest(http):
    """As OpenAI's reference says: up to one more than were asked for."""
    asked = {"prompt": "Once", "max_tokens": 12, "logprobs": 1, "seed": 5, "top_k": 0, "top_p": 1, "min_p": 0}
    for temperature, sizes in ((2, {2}), (0, {1})):
        reply = post(http, COMPLETIONS, {**asked, "temperature": temperature})
        told = reply["choices"][0]["logprobs"]
        assert all(token in top for token, top in zip(told["tokens"], told["top_logprobs"]))
        assert {len(top) for top in told["top_logprobs"]} == sizes


def test_parts_of_a_character_have_names_of_their_own(http):
    """Each is bytes that are no text; as keys of one object they would fall together."""
    reply = post(http, COMPLETIONS, {"prompt": "\N{CLOUD WITH RAIN} \N{OWL} \N{CRAB}", "max_tokens": 0,
                                     "echo": True, "logprobs": 1})
    told = reply["choices"][0]["logprobs"]
    parts = [token for token in told["tokens"] if token.startswith("bytes:")]
    assert len(set(parts)) > 3 and "\ufffd" not in "".join(told["tokens"])
    joined = b"".join(bytes.fromhex(token[6:].replace("\\x", "")) if token.startswith("bytes:")
                      else token.encode() for token in told["tokens"])
    assert joined.decode() == reply["choices"][0]["text"]


# ==== 3. Bytes ============================================================================


def test_what_some_readers_take_for_a_line_s_end_is_escaped():
    """Splitting a stream by str.splitlines must not cut an event in two."""
    text = "a\u2028b\u2029c\u0085d\ne"
    data = server.to_json({"text": text})
    assert json.loads(data) == {"text": text} and len(data.decode().splitlines()) == 1


def test_a_mark_in_front_of_json_is_none_of_it(http):
    sent = b"\xef\xbb\xbf" + json.dumps({"messages": HI, "max_tokens": 1}).encode()
    assert http.post(CHAT, content=sent).status_code == 200


def test_a_compressed_body_is_415():
    packed = gzip.compress(json.dumps({"messages": HI}).encode())
    with listening() as running:
        reply = httpx.post(running.url + CHAT, content=packed, headers={"Content-Encoding": "gzip"})
        assert reply.status_code == 415 and '"gzip"' in reply.json()["error"]["message"]
        reply = httpx.post(running.url + CHAT, json={"messages": HI},
                           headers={"Content-Encoding": "identity"})
        assert reply.json()["error"]["code"] == "loading"


# ==== 4. Settings =========================================================================


def test_switches_take_0_and_1_in_the_environment():
    for text, value in (("1", True), ("0", False), ("true", True), ("no", False)):
        config = server.load_config([], {"AUTH_ENABLED": text, "API_KEYS": "x", "PARALLEL": "1"})
        assert config.auth_enabled is value and config.parallel == 1


def test_a_mark_in_front_of_settings_is_none_of_them(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_bytes(b"\xef\xbb\xbfport: 5\n")
    assert server.load_config(["--config", str(file)], {}).port == 5
    from features import environment
    file.write_bytes(b"\xef\xbb\xbfPORT=5\n")
    assert environment.read_env_file(file) == {"PORT": "5"}


@pytest.mark.parametrize("text, line", [
    ("port: 1\nport: 2\n", 2), ("server:\n  port: 1\n  host: h\n  port: 2\n", 4),
    ("features: [models]\nmodels:\n  a: {model_path: x}\n  a: {model_path: y}\n", 4)])
def test_a_key_that_is_given_twice_is_an_error(tmp_path, text, line):
    """YAML's reader would take the last without a word."""
    file = tmp_path / "c.yaml"
    file.write_text(text)
    with pytest.raises(server.ConfigError, match=f"line {line}: the key .* is there twice"):
        server.load_config(["--config", str(file)], {})


# ==== 5. A remote tokenizer ===============================================================


def test_a_remote_tokenizer_finds_what_it_asks_for(http):
    """The requests of lm-eval's, which are for vLLM's paths."""
    info = http.get("/tokenizer_info").json()
    assert info["eos_token"] == "<|im_end|>" and "messages" in info["chat_template"]
    listed = post(http, "/tokenize", {"prompt": "Rain is wet.", "add_special_tokens": False})
    assert listed["count"] == len(listed["tokens"]) and listed["max_model_len"] == 1024
    assert listed["tokens"] == post(http, "/tokenize", {"content": "Rain is wet."})["tokens"]
    assert post(http, "/detokenize", {"tokens": listed["tokens"]})["prompt"] == "Rain is wet."
    assert len(post(http, "/tokenize", {"prompt": info["eos_token"]})["tokens"]) == 1
    refused(http, "/tokenize", {"prompt": "a", "content": "a"}, "content")
