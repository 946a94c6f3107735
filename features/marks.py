"""Marks: what stands in a chat's prompt only until it becomes tokens.

vision.py writes a mark where an image is, verbatim.py characters beside what spells a special
token. Who shows a prompt to people asks here how it reads without them. It is no feature by itself.
"""

import re
import weakref

import server

# By chat, its marks and what is shown in place of them.
_hidden: "weakref.WeakKeyDictionary[server.Chat, list[tuple[re.Pattern, str]]]" = \
    weakref.WeakKeyDictionary()


def hide(chat: server.Chat, marks: re.Pattern, instead: str) -> None:
    """Have something else shown in place of marks."""
    _hidden.setdefault(chat, []).append((marks, instead))


def shown(chat: server.Chat, prompt: str) -> str:
    """A chat's prompt for people to read."""
    for marks, instead in _hidden.get(chat, ()):
        prompt = marks.sub(instead, prompt)
    return prompt
