"""Predictions: OpenAI's predicted outputs, a text that the reply may be like in many places.

What for: edits of a text, where most of the reply is known before. How it works: the prediction's
tokens are what drafts.py drafts first, so what the reply shares with it comes faster, and the reply
is what it would be without. It costs a tokenization, and at worst some rows that are drafted in
vain. It reads the field `prediction` of a chat; `usage` counts what was accepted and rejected.
https://platform.openai.com/docs/guides/predicted-outputs
"""

import dataclasses
from typing import Literal

import server

NEEDS = ("drafts",)


@dataclasses.dataclass
class Prediction:
    """The text."""

    type: Literal["content"]
    content: str | list[server.Part]

    def check(self, at: str) -> None:
        """Refuse what is no text."""
        if any(getattr(part, "image_url", None) for part in self.content
               if isinstance(part, server.Part)):
            raise server.invalid(f"{at}.content", f"{at}.content: only text can be predicted")


@dataclasses.dataclass
class ChatFields:
    """What the reply may be like."""

    prediction: Prediction | None = None


FIELDS = {"ChatBody": ChatFields}


def join(wanted: server.Generation) -> None:
    """Read the prediction. Raises ApiError."""
    predicted = getattr(wanted.body, "prediction", None)
    text = server.text_of(dataclasses.asdict(predicted)["content"]) if predicted else ""
    if text:
        wanted.handler.check_fewest(text, "prediction", 0)
        tokens = wanted.model.tokenize(text, bos=False, special=False)
        wanted.handler.check_length(len(tokens), "prediction", 0)
        wanted.more["expected"] = tokens
