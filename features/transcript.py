"""Transcript: what clients say, in the console.

What for: to see what an application really sends. How it works: the text of each message of a chat
is a line of the log, as one line, with the request's id; of an image, that there is one. It costs
the lines. It reads the setting `log_messages`, which is off: conversations are private. It sends
nothing.
"""

import dataclasses
import math

import server


@dataclasses.dataclass
class Settings:
    """Whether to."""

    log_messages: bool = server.setting("server", False)


def receive(handler: server.Handler, body, target) -> None:
    """Log the messages of a chat, which is a dict where it goes elsewhere. Raises nothing."""
    if not handler.server.config.log_messages:
        return
    messages = body.get("messages") if isinstance(body, dict) else [
        dataclasses.asdict(message) for message in body.messages] \
        if isinstance(body, server.ChatBody) else ()
    for message in messages if isinstance(messages, list) else ():
        if isinstance(message, dict):
            content = message.get("content")
            for text in content if isinstance(content, list) else [content]:
                if isinstance(text, dict):  # a part; an image would fill the log
                    kind = text.get("type")
                    text = text.get("text") if kind == "text" else f"<{kind}>"
                server.log.info("%s %s: %s", handler.tally.id,
                                server.printable(str(message.get("role"))),
                                server.describe(text, most=math.inf))
