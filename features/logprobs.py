"""Log-probabilities: how sure a model was of each token of a chat's reply, and of which others.

What for: programs that weigh answers, classify by the likeliest word, or look for where a model
guesses. How it works: the engine counts them when it is asked to, and an event brings those of the
tokens whose text it completes; they wait for the next chunk, and go out with it. It costs a softmax
over the vocabulary for each token, and with `top_logprobs` a search in it: 0.06 and 0.14 ms where
there are 49,152. It reads the fields `logprobs` and `top_logprobs` of a chat, and sends
`logprobs.content`, by https://platform.openai.com/docs/api-reference/chat/object. Those of
completions have another shape: legacy.py.
"""

import collections
import dataclasses
from collections.abc import Iterator

import engine
import server

LOWEST_LOGPROB = -9999.0  # what the OpenAI API sends for an impossible token; JSON has no -inf


@dataclasses.dataclass
class ChatFields:
    """Whether to tell of each token, and of how many in its place."""

    logprobs: bool = False
    top_logprobs: int | None = server.option(low=0, high=20)

    def check(self, _at: str) -> None:
        """Refuse what fields together make impossible."""
        if self.top_logprobs and not self.logprobs:
            raise server.invalid("top_logprobs", f"top_logprobs: {self.top_logprobs} was sent, but "
                                                 "it needs logprobs: true")


FIELDS = {"ChatBody": ChatFields}


class ScoredReply:
    """A reply whose chunks carry log-probabilities where the engine is asked for them."""

    def __init__(self, handler: server.Handler, body: server.GenerationBody):
        super().__init__(handler, body)
        # By choice: what waits for its next chunk.
        self.unsent: dict[int, list[engine.TokenLogprob]] = collections.defaultdict(list)

    def parts(self, event: engine.Event) -> Iterator[dict]:
        """As Generation.parts."""
        self.unsent[event.request.index] += event.logprobs
        yield from super().parts(event)

    def chunk(self, choice: engine.Request, part: dict, reason: str | None = None) -> dict:
        """As Generation.chunk, with the log-probabilities that have waited for it."""
        chunk = super().chunk(choice, part, reason)
        if "n_top_logprobs" in self.more:
            [told] = chunk["choices"]
            told["logprobs"] = self.logprobs(choice.index, self.unsent.pop(choice.index, []))
        return chunk

    def logprobs(self, index: int, tokens: list[engine.TokenLogprob]) -> dict:
        """Log-probabilities of a choice's next tokens, as its chunks have them."""
        raise NotImplementedError


class ScoredChat:
    """How a chat asks for them, and has them."""

    def __init__(self, handler: server.Handler, body: server.ChatBody):
        super().__init__(handler, body)
        if body.logprobs:
            self.more["n_top_logprobs"] = body.top_logprobs or 0

    def logprobs(self, index: int, tokens: list[engine.TokenLogprob]) -> dict:
        """As ScoredReply.logprobs."""
        model = self.model
        return {"content": [{**token_entry(model, entry.token, entry.logprob), "top_logprobs": [
            token_entry(model, *other) for other in entry.top]} for entry in tokens],
            "refusal": None}


METHODS = {"Generation": ScoredReply, "Chat": ScoredChat}


def token_entry(model: engine.Model, token: int, logprob: float) -> dict:
    """A token as a chat's log-probabilities have it."""
    piece = model.piece(token, special=True)
    return {"token": piece.decode("utf-8", "replace"), "logprob": max(logprob, LOWEST_LOGPROB),
            "bytes": [*piece]}
