"""Turns: no message is lost, whatever a chat template takes.

What for: templates are written for conversations like those of the training; clients send others: a
system message in the middle, two user messages in a row, an assistant that begins. Some templates
refuse these, some leave messages out without a word. How it works: when a model is loaded, its
template renders conversations of unmistakable words; those that do not all come out show its
habits. The messages of a chat are then merged just so far that they do: system messages join the
first one, neighbours of one role become one, and where a turn must stand between two others, there
is one that says nothing. System messages at the front are always one, as models know them. It costs
about 25 renderings, some 10 ms, when a model is loaded, and for a chat nothing worth measuring. It
reads the messages of chats, and sends nothing; the log says once for each model what is merged.
"""

import functools
import itertools
import logging
import time
import weakref
from collections.abc import Callable

import engine
import server

log = logging.getLogger("turns")

# ==== 1. Habits: what a template does not take ===========================================

NO_SYSTEM, LATE_SYSTEM = "a system message", "a system message behind others"
USERS, ASSISTANTS = "two user messages in a row", "two assistant messages in a row"
NO_OPENING, NO_USER = "an assistant message that comes first", "a chat without a user message"
AFTER_RESULT, BESIDE_CALL = "a user message behind a tool's result", "text beside a tool call"
# Each is tried, with what those before it have shown, by conversations in which a letter is a
# message. A template that does not take the first one, which has nothing of it, tells nothing.
TRIALS = {
    NO_SYSTEM: ("uau", "su", "sua", "suau"),
    USERS: ("uau", "uu", "uuau", "uauu"),
    ASSISTANTS: ("uau", "uaau", "uaa"),
    NO_OPENING: ("uau", "au", "aau", "sau"),
    LATE_SYSTEM: ("uau", "usu", "suasu", "suas", "sus", "us"),
    NO_USER: ("uau", "s", "a", "sa"),
    AFTER_RESULT: ("uctau", "uctu"),
    BESIDE_CALL: ("uctau", "ubtau"),
}
ROLES = {"s": "system", "u": "user", "a": "assistant", "b": "assistant", "c": "assistant",
         "t": "tool"}  # b: text and a call; c: a call
WORD = "Quokka{}zq"  # the text of a trial's message, by its place
CALL_ID = "quokkaZq9"  # nine letters and digits: some templates take no other
FUNCTION = {"name": "quokka", "description": "", "parameters": {"type": "object", "properties": {}}}


def conversation(roles: str) -> list[dict]:
    """The messages of a trial."""
    messages: list[dict] = []
    for place, letter in enumerate(roles):
        messages.append({"role": ROLES[letter],
                         "content": "" if letter == "c" else WORD.format(place)})
        if letter in "bc":
            messages[-1]["tool_calls"] = [{"id": CALL_ID, "type": "function", "function": {
                "name": FUNCTION["name"], "arguments": {}}}]
        elif letter == "t":
            messages[-1]["tool_call_id"] = CALL_ID
    return messages


def takes(model: engine.Model, habits: frozenset[str], *trials: str) -> bool:
    """Whether the template writes all that is said in some conversations, merged for its habits."""
    for roles in trials:
        tools = [{"type": "function", "function": FUNCTION}] if "t" in roles else None
        try:
            prompt = model.render_chat(merged(conversation(roles), habits),
                                       options={"tools": tools})
        except engine.TemplateError:
            return False
        if not all(WORD.format(place) in prompt for place, letter in enumerate(roles)
                   if letter != "c"):
            return False
    return True


MAX_SECONDS = 2.0  # of the processor, for the trials; the largest template takes a tenth of it


def habits_of(model: engine.Model) -> tuple[frozenset[str], list[str]]:
    """What the template takes only as `merged` writes it, and what it does not take even so."""
    habits: frozenset[str] = frozenset()
    lost: list[str] = []
    until = time.thread_time() + MAX_SECONDS
    for habit, (plain, *trials) in TRIALS.items():
        if time.thread_time() > until:
            return habits, [*lost, "what was not tried: it is too slow"]
        if takes(model, habits, *trials) or not takes(model, habits, plain):
            continue
        if takes(model, habits | {habit}, *trials):
            habits |= {habit}
        else:
            lost.append(habit)
    return habits, lost


# ==== 2. Merging =========================================================================

NOTHING = " "  # what a turn says that says nothing; some templates refuse an empty one


def merged(messages: list[dict], habits: frozenset[str]) -> list[dict]:
    """The messages as a template of these habits takes them, all that is said in them. The
    messages that are given stay as they are."""
    turns = [{**message, "role": server.NEW_ROLES.get(message["role"], message["role"])}
             for message in messages]
    n_front = len([*itertools.takewhile(lambda turn: turn["role"] == "system", turns)])
    is_front = [place < n_front or LATE_SYSTEM in habits and turn["role"] == "system"
                for place, turn in enumerate(turns)]
    systems = [*itertools.compress(turns, is_front)]
    others = [turn for turn, moves in zip(turns, is_front) if not moves]
    front = [functools.reduce(joined, systems)] if systems else []
    if front and NO_SYSTEM in habits:
        first = {**front.pop(), "role": "user"}
        if others and others[0]["role"] == "user":
            first = joined(first, others.pop(0))
        others.insert(0, first)
    roles = [turn["role"] for turn in others]
    if NO_USER in habits and "user" not in roles or NO_OPENING in habits and roles[:1] == [
            "assistant"]:
        others.insert(0, {"role": "user", "content": NOTHING})
    return front + neighbours(others, habits)


def neighbours(turns: list[dict], habits: frozenset[str]) -> list[dict]:
    """The turns behind the system message, those merged or parted that may not follow each
    other."""
    if BESIDE_CALL in habits:
        turns = [part for turn in turns for part in parted(turn)]
    found: list[dict] = []
    for turn in turns:
        pair = (found[-1]["role"], turn["role"]) if found else ()
        if pair == ("tool", "user") and AFTER_RESULT in habits:
            found.append({"role": "assistant", "content": NOTHING})
        elif pair == ("assistant", "assistant") and {ASSISTANTS, BESIDE_CALL} <= habits \
                and turn.get("tool_calls"):
            found.append({"role": "user", "content": NOTHING})
        elif pair == ("user", "user") and USERS in habits \
                or pair == ("assistant", "assistant") and ASSISTANTS in habits:
            turn = joined(found.pop(), turn)
        found.append(turn)
    return found


def joined(first: dict, second: dict) -> dict:
    """Two messages as one, of the second's role."""
    both = {**first, **second, "content": "\n\n".join(filter(None, map(text_of, (first, second))))}
    if thoughts := [*filter(None, (each.get("reasoning_content") for each in (first, second)))]:
        both["reasoning_content"] = "\n\n".join(thoughts)
    if calls := [*(first.get("tool_calls") or ()), *(second.get("tool_calls") or ())]:
        both["tool_calls"] = calls
    return both


def parted(turn: dict) -> list[dict]:
    """A message as it is, or if it has calls, too, its text and then its calls."""
    if not (turn.get("tool_calls") and text_of(turn)):
        return [turn]
    calls = {"role": turn["role"], "content": "", "tool_calls": turn.pop("tool_calls")}
    return [turn, calls]


def text_of(turn: dict) -> str:
    """What a message says."""
    return server.text_of(turn.get("content"))


# ==== 3. The feature =====================================================================

# By engine; each is set before handlers have that engine.
known: "weakref.WeakKeyDictionary[engine.Engine, frozenset[str]]" = weakref.WeakKeyDictionary()


def equip(loaded: engine.Engine, _settings) -> None:
    """Try the model's template."""
    name = loaded.model.name
    known[loaded], lost = habits_of(loaded.model)
    if known[loaded]:
        log.info("%s: its chat template does not take %s; these are merged", name,
                 ", ".join(sorted(known[loaded])))
    if lost:
        log.warning("warning: %s: its chat template loses or refuses %s", name, ", ".join(lost))


def join(wanted: server.Generation) -> None:
    """Have a chat's messages merged when they are rendered, behind what other features do to
    them."""
    if isinstance(wanted, server.Chat):
        wanted.render = functools.partial(render, wanted, wanted.render)


def render(chat: server.Chat, render: Callable[[], str]) -> str:
    """As Chat.render."""
    chat.messages = merged(chat.messages, known[chat.loaded])
    return render()
