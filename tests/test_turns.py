"""Turns: no message is lost, whatever a chat template takes.

Trials of templates.SMALL, and of the real templates where LLAMA_CPP_TEMPLATES names their folder
(see templates.py). The last ones ask a real server.
"""

import json
import logging

import pytest

import engine
import templates
from features import families, reasoning, tools, turns, verbatim
from features.marks import shown

OWN_VARIABLES = {"fireworks-ai-llama-3-firefunction-v2"}  # wants `functions` and `datetime` of its caller
NAMES = [*templates.SMALL, *sorted(templates.REAL.keys() - OWN_VARIABLES)]
# A letter is a message, as in turns.ROLES.
CONVERSATIONS = ["u", "s", "su", "ssu", "usu", "us", "suasu", "suas", "sus", "uas", "uu", "suu", "uauu",
                 "uuauu", "uaau", "uaa", "aau", "au", "sau", "a", "sa", "sssa", "ssuuaasau", "susasusu"]
WITH_TOOLS = ["uctau", "uctu", "suctsu", "subtau", "uabttu", "sssuctuuacta", "uctctu"]


def load(model: engine.Model, name: str) -> templates.Loaded:
    """The model with a template."""
    model.set_template({**templates.SMALL, **templates.REAL}[name])
    return templates.Loaded(model, reasoning, tools, turns, verbatim)


def messages_of(roles: str) -> list[dict]:
    """A conversation as clients send it."""
    messages = turns.conversation(roles)
    for message in messages:
        for call in message.get("tool_calls", ()):
            call["function"]["arguments"] = json.dumps(call["function"]["arguments"])
    return messages


def lost(loaded: templates.Loaded, roles: str, **fields) -> list[str]:
    """The words of a conversation that are not in its prompt just once, or why there is none."""
    chat = templates.chat_of(loaded, {"messages": messages_of(roles), **fields})
    prompt = shown(chat, chat.render())
    words = [turns.WORD.format(place) for place, letter in enumerate(roles) if letter != "c"]
    return [word for word in words if prompt.count(word) != 1]


@pytest.mark.parametrize("name", NAMES)
def test_no_message_is_lost(bare, name):
    """A system message anywhere, any role after any other."""
    loaded, problems = load(bare, name), {}
    for roles in CONVERSATIONS:
        try:
            problems[roles] = lost(loaded, roles)
        except Exception as error:
            problems[roles] = str(error)
    assert not any(problems.values()), {roles: what for roles, what in problems.items() if what}


TOOLS = [{"type": "function", "function": {"name": "quokka", "description": "Hops.", "parameters": {
    "type": "object", "properties": {}}}}]


@pytest.mark.parametrize("name", NAMES)
def test_no_message_around_a_tools_result_is_lost(bare, name):
    """A user who speaks behind a result, text beside a call."""
    loaded = load(bare, name)
    if not turns.takes(loaded.model, frozenset(), "uctau") and tools._forms[loaded].takes_calls:
        return  # calls of another shape, or none: the feature `tools` has to see to that first
    problems = {}
    for roles in WITH_TOOLS:
        try:
            problems[roles] = lost(loaded, roles, tools=TOOLS)
        except Exception as error:
            problems[roles] = str(error)
    assert not any(problems.values()), {roles: what for roles, what in problems.items() if what}


def test_what_a_template_takes_is_left_as_it_is(bare):
    """Nothing is merged without need, and nothing is changed in place."""
    loaded = load(bare, "takes everything")
    assert turns.known[loaded] == frozenset()
    for roles in CONVERSATIONS:
        messages = messages_of(roles)
        before = json.dumps(messages)
        n_front = len(roles) - len(roles.lstrip("s"))
        assert len(turns.merged(messages, frozenset())) == len(messages) - max(0, n_front - 1)
        turns.merged(messages, frozenset(turns.TRIALS))
        assert json.dumps(messages) == before


def test_the_habits_of_templates_are_seen_from_their_renderings(bare):
    strict = {turns.USERS, turns.ASSISTANTS, turns.NO_OPENING, turns.LATE_SYSTEM}
    for name, habits in {
            "refuses a late system message": {turns.LATE_SYSTEM},
            "drops a late system message": {turns.LATE_SYSTEM},
            "keeps the last system message": {turns.LATE_SYSTEM},
            "no system, alternating": {turns.NO_SYSTEM, *strict},
            "alternating but for tools": {*strict, turns.AFTER_RESULT, turns.BESIDE_CALL},
            "the system message in the last user's": {turns.NO_SYSTEM, turns.LATE_SYSTEM,
                                                      turns.BESIDE_CALL},
            "no chat without a user": {turns.NO_USER}}.items():
        assert turns.known[load(bare, name)] == habits, name


def test_merged_messages_keep_all_that_is_said_and_its_order(bare):
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    merged = turns.merged([
        {"role": "developer", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "user", "content": "c"}, {"role": "system", "content": "d"},
        {"role": "user", "content": "e"},
        {"role": "assistant", "content": "f", "reasoning_content": "g"},
        {"role": "assistant", "content": "h", "reasoning_content": "i", "tool_calls": [call]},
        {"role": "assistant", "content": None, "tool_calls": [call]}],
        frozenset({turns.USERS, turns.ASSISTANTS, turns.LATE_SYSTEM}))
    assert [(turn["role"], turn["content"]) for turn in merged] == [
        ("system", "a\nb\n\nd"), ("user", "c\n\ne"), ("assistant", "f\n\nh")]
    assert merged[2]["reasoning_content"] == "g\n\ni" and merged[2]["tool_calls"] == [call, call]


def test_a_family_without_system_messages_gets_them_from_the_user(bare):
    """The families' own templates say so themselves."""
    for family in ("gemma", "mistral"):
        bare.set_template(families.FAMILY_TEMPLATES[family])
        assert turns.NO_SYSTEM in turns.habits_of(bare)[0]


def test_the_log_says_once_what_is_merged(bare, caplog):
    with caplog.at_level(logging.INFO, "turns"):
        load(bare, "takes everything")
        assert not caplog.messages
        load(bare, "no chat without a user")
        line, = caplog.messages
        assert "does not take a chat without a user message; these are merged" in line
        caplog.clear()
        bare.set_template("{{ messages[0].content }}{{ messages[1].content }}{{ messages[2].content }}")
        templates.Loaded(bare, turns)
        assert caplog.records[-1].levelname == "WARNING" and "loses or refuses" in caplog.messages[-1]


def test_a_template_that_renders_nothing_or_never_ends_does_not_stop_the_start(bare):
    for source in ("{{ raise_exception('no') }}", "nothing", "{{ messages.no.such }}"):
        bare.set_template(source)
        assert turns.habits_of(bare) == (frozenset(), [])


def test_a_server_with_a_strict_template_serves_what_clients_send(start_server, tmp_path):
    """A real model answers conversations that its template alone would refuse."""
    file = tmp_path / "template.jinja"
    file.write_text(templates.SMALL["no system, alternating"])
    http = start_server(CHAT_TEMPLATE_FILE=str(file), PARALLEL="1", N_CTX="1024")
    for roles in ("usu", "uu", "s", "sau", "susasusu"):
        body = {"messages": messages_of(roles), "max_tokens": 1}
        reply = http.post("/v1/chat/completions", json=body)
        assert reply.status_code == 200, (roles, reply.text)
    prompt = http.post("/apply-template", json=body).json()["prompt"]
    assert prompt.count("<start_of_turn>user") == 2  # of susasusu
