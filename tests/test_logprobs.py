"""Log-probabilities: a server with this feature alone. In all features' company: test_contract.py."""

import sys

import pytest

import conftest
from test_contract import CHAT, HI, ask, ask_streamed, post, refused
from test_samplers import serving

sys.path.insert(0, str(conftest.ROOT))
import server  # noqa: E402


@pytest.fixture(scope="module")
def http():
    with serving(server.load_features(["logprobs"])) as http:
        yield http


def bytes_of(entries: list[dict]) -> bytes:
    return b"".join(bytes(entry["bytes"]) for entry in entries)


def test_chat_logprobs_add_up_to_the_text(http):
    """Each token with its bytes; joined they are the reply."""
    [reply] = post(http, CHAT, {"messages": HI, "logprobs": True, "top_logprobs": 3, "max_tokens": 30,
                                "temperature": 0})["choices"]
    content = reply["logprobs"]["content"]
    assert bytes_of(content).decode(errors="ignore") == reply["message"]["content"]
    for entry in content:
        assert entry["logprob"] <= 0 and len(entry["top_logprobs"]) == 3
        assert entry["top_logprobs"][0]["logprob"] == pytest.approx(entry["logprob"])  # greedy
    without = ask(http, logprobs=True, max_tokens=2)
    assert without["logprobs"]["content"][0]["top_logprobs"] == []
    assert ask(http)["logprobs"] is None


def test_a_stream_with_logprobs_is_the_stream_without_them(http):
    """The same pieces, the same tokens as unstreamed; the first chunk, which has no text, has none."""
    asked = {"text": "Write one line about 🌧 and 雨.", "max_tokens": 16}
    plain, streamed = ask_streamed(http, **asked), ask_streamed(http, logprobs=True, top_logprobs=2, **asked)
    assert streamed["message"] == plain["message"] and plain["logprobs"] is None
    whole = ask(http, logprobs=True, top_logprobs=2, **asked)
    assert [entry["bytes"] for entry in streamed["logprobs"]["content"]] == [
        entry["bytes"] for entry in whole["logprobs"]["content"]]


def test_each_choice_has_its_own(http):
    for choice in post(http, CHAT, {"messages": HI, "n": 3, "seed": 1, "temperature": 1, "max_tokens": 6,
                                    "logprobs": True})["choices"]:
        assert bytes_of(choice["logprobs"]["content"]).decode() == choice["message"]["content"]


def test_the_tokens_of_a_stop_sequence_are_not_told(http):
    text = ask(http, text="Count from 1 to 9 with commas.", max_tokens=60)["message"]["content"]
    stop = text[len(text) // 2:][:4]
    stopped = ask(http, text="Count from 1 to 9 with commas.", max_tokens=60, stop=["@@@", stop], logprobs=True)
    assert stopped["message"]["content"] == text[:text.index(stop)]
    joined = bytes_of(stopped["logprobs"]["content"]).decode()
    assert joined.startswith(stopped["message"]["content"]) and stop not in joined


@pytest.mark.parametrize("fields", [{"logprobs": True, "top_logprobs": 21}, {"top_logprobs": 2}])
def test_top_logprobs_need_logprobs_and_are_20_at_most(http, fields):
    refused(http, CHAT, {"messages": HI, **fields}, "top_logprobs")


def test_without_the_feature_its_name_is_told():
    """And who asks for none is served."""
    with serving(server.load_features([])) as http:
        said = refused(http, CHAT, {"messages": HI, "logprobs": True}, "logprobs")
        assert "needs the feature logprobs" in said
        reply = post(http, CHAT, {"messages": HI, "logprobs": False, "top_logprobs": None, "max_tokens": 2})
        assert reply["choices"][0]["logprobs"] is None
