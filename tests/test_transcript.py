"""The transcript: what clients say, in the console, if the settings ask for it."""

import logging
import types

import httpx
import pytest

import conftest
import server
from features import transcript
from test_models import listening


@pytest.fixture
def said(caplog):
    """What has been logged about messages so far."""
    caplog.set_level(logging.INFO, "server")
    return lambda: [record.getMessage().partition(" ")[2] for record in caplog.records
                    if record.getMessage().startswith("req_") and ": " in record.getMessage()]


def test_each_message_is_a_line_that_cannot_forge_another(said):
    """Parts, what is no text, and what would end a line or hide in a terminal."""
    with listening({}, log_messages=True) as running:
        messages = [{"role": "system", "content": "Be\nbrief.\x1b[2J\x9b31m\u2028\x7f"},
                    {"role": "user", "content": [{"type": "text", "text": "Hi"},
                                                 {"type": "text", "text": "there"}]}]
        reply = httpx.post(f"{running.url}/v1/chat/completions", timeout=60,
                           json={"messages": messages, "max_tokens": 2})
        assert reply.status_code == 200
    assert said() == [r'system: "Be\nbrief.\u001b[2J\u009b31m\u2028\u007f"', 'user: "Hi"', 'user: "there"']


def test_nothing_is_logged_unless_the_settings_ask_for_it(said):
    with listening({}) as running:
        httpx.post(f"{running.url}/v1/chat/completions", timeout=60, json={
            "messages": [{"role": "user", "content": "A secret"}], "max_tokens": 2})
    assert said() == []


def test_of_an_image_the_log_says_that_there_is_one(said):
    """A file as text would fill the log. What goes elsewhere is logged as it came."""
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
    handler = types.SimpleNamespace(
        tally=server.Tally(), server=types.SimpleNamespace(config=conftest.config(log_messages=True)))
    for body in ({"messages": [{"role": "user", "content": [image]}, {"role": 5}, "no message"]},
                 {"messages": 7}, {}, server.CompletionBody(prompt="Hi")):
        transcript.receive(handler, body, None)
    assert said() == ['user: "<image_url>"', "5: null"]
