"""Legacy: what only the older of OpenAI's two endpoints for text has.

What for: programs that weigh texts (an evaluation harness asks for the log-probability of each
token of a prompt), editors that fill in what is missing between two texts, and scripts from before
chats. How it works: a completion has other ways to read its prompts and to write its chunks. It
costs what its replies cost: `best_of` generates more than it shows, and a prompt whose tokens are
scored is computed whole, whatever the KV cache holds. It reads the fields `logprobs`, `echo`,
`suffix` and `best_of` of /v1/completions, and token ids as its prompt, and sends what the reference
has for them:
https://platform.openai.com/docs/api-reference/completions
"""

import codecs
import collections
import dataclasses
import functools
import math
from collections.abc import Iterator

import numpy as np
from llama_cpp import llama_cpp as lib

import engine
import server
from features import tokens
from features.logprobs import LOWEST_LOGPROB
from server import MAX_CHOICES

NEEDS = ("tokens", "logprobs")


@dataclasses.dataclass
class CompletionFields:
    """What else a text completion may ask for; a prompt may be token ids."""

    prompt: tokens.Prompts | None = dataclasses.field(kw_only=True)  # null, "": from the beginning
    logprobs: int | None = server.option(low=0, high=20)
    echo: bool = False
    suffix: str | None = None
    best_of: int | None = server.option(low=1, high=128)

    def check(self, at: str) -> None:
        """Refuse what fields together make impossible."""
        best_of = self.best_of or self.n
        if best_of < self.n or (best_of > self.n and self.stream):
            raise server.invalid("best_of", f"best_of: {best_of} was sent; it must be at least n "
                                            f"({self.n}), and equal to n in a stream")
        if self.suffix and not isinstance(self.prompt, str):
            raise server.invalid("suffix", "suffix: the prompt must be one string, and not empty")


FIELDS = {"CompletionBody": CompletionFields}


class LegacyReply:
    """What a completion does in other ways."""

    def __init__(self, handler: server.Handler, body: server.CompletionBody):
        super().__init__(handler, body)
        self.n_each = body.best_of or body.n
        if body.logprobs is not None or self.n_each > body.n:  # `fold` weighs by them
            self.more["n_top_logprobs"] = body.logprobs or 0
        self.scores: dict[int, list[engine.TokenLogprob]] = {}  # of prompts, by the first choice
        # By choice: characters of the text so far, and the decoder of its bytes; log-probabilities.
        self.offsets: collections.Counter[int] = collections.Counter()
        self.decoders = collections.defaultdict(
            lambda: codecs.getincrementaldecoder("utf-8")("replace"))
        self.shown: dict[int, list[float]] = collections.defaultdict(list)
        self.echoed: set[int] = set()  # choices whose prompt has been told
        self.in_prompt = False  # whether the next chunk is the echoed prompt

    def read(self) -> list[np.ndarray]:
        """As Generation.read: with a suffix, the prompt for what stands before it."""
        body, handler, model = self.body, self.handler, self.model
        if not body.suffix:
            prompts = tokens.prompts_in(server.given(body.prompt, ""))
            self.check_count(prompts)
            prompts = [beginning(model) if prompt == "" else prompt for prompt in prompts]
            return tokens.read_prompts(handler, prompts, "prompt")
        for param in ("prompt", "suffix"):
            handler.check_fewest(getattr(body, param), param, 1)
        prompt = infill(model, body.prompt, body.suffix)
        if prompt is None:
            raise server.invalid("suffix", "suffix: this model was not trained to fill in; leave "
                                 "it out, or load one with fill-in-the-middle tokens")
        handler.check_length(len(prompt), "prompt", 1)
        return [prompt]

    def check_count(self, prompts: list) -> None:
        """400 for no prompts, or too many with so many replies each."""
        more = "best_of" if self.body.best_of else "n"
        at, most = more if prompts and self.n_each > 1 else "prompt", MAX_CHOICES // self.n_each
        if not 0 < len(prompts) <= most:
            raise server.invalid(at, f"{at}: {len(prompts)} prompts with {self.n_each} replies "
                                     f"each were asked for; send 1 to {most} prompts")

    def make_choices(self) -> None:
        """As Generation.make_choices. The first choice of each prompt reads it whole for `echo`
        with `logprobs`: its first token has no log-probability."""
        super().make_choices()
        for choice in self.choices[:: self.n_each]:
            if self.body.echo and self.body.logprobs is not None:
                scores = [engine.TokenLogprob(int(choice.prompt[0]), None, ())]
                self.scores[choice.index] = scores
                choice.reuses, choice.on_prompt = False, functools.partial(self._score, scores)

    def _score(self, scores: list[engine.TokenLogprob], logits: np.ndarray, token: int) -> None:
        scores.append(engine.token_logprob(logits, token, self.body.logprobs))

    def parts(self, event: engine.Event) -> Iterator[dict]:
        """As Generation.parts: with `echo`, the prompt first."""
        choice = event.request
        if self.body.echo and choice.index not in self.echoed:
            self.echoed.add(choice.index)
            first = choice.index - choice.index % self.n_each
            self.unsent[choice.index] += self.scores.get(first, ())
            text = b"".join(self.model.piece(int(token), special=True) for token in choice.prompt)
            self.in_prompt = True
            yield {"text": text.decode("utf-8", "replace")}
        yield from super().parts(event)

    def logprobs(self, index: int, tokens: list[engine.TokenLogprob]) -> dict | None:
        """As ScoredReply.logprobs; offsets count characters from the start of the choice's text.
        None where only `fold` wanted them."""
        texts, offsets = [token_name(self.model, entry.token) for entry in tokens], []
        for entry in tokens:  # a character may be several tokens, and the text lacks control tokens
            offsets.append(self.offsets[index])
            piece = self.model.piece(entry.token, special=self.in_prompt)
            self.offsets[index] += len(self.decoders[index].decode(piece))
        if not self.in_prompt:  # `fold` weighs the replies, not their prompt
            self.shown[index] += [entry.logprob for entry in tokens]
        self.in_prompt = False
        return None if self.body.logprobs is None else {
            "tokens": texts, "text_offset": offsets,
            "token_logprobs": [None if entry.logprob is None else max(
                entry.logprob, LOWEST_LOGPROB) for entry in tokens],
            "top_logprobs": [None if entry.logprob is None else {
                token_name(self.model, token): max(logprob, LOWEST_LOGPROB)
                for token, logprob in (*entry.top, (entry.token, entry.logprob))}
                for entry in tokens]}

    def fold(self, chunks: Iterator[dict]) -> dict:
        """As Generation.fold: of each prompt the n replies whose tokens, as many as the text has,
        are the likeliest."""
        def mean(choice: dict) -> float:
            shown = self.shown[choice["index"]]
            return sum(shown) / len(shown) if shown else -math.inf

        reply, n_each = super().fold(chunks), self.n_each
        if n_each > self.body.n:
            groups = [reply["choices"][start : start + n_each]
                      for start in range(0, len(reply["choices"]), n_each)]
            kept = [choice for group in groups
                    for choice in sorted(group, key=mean, reverse=True)[: self.body.n]]
            reply["choices"] = [{**choice, "index": place} for place, choice in enumerate(kept)]
        return reply


METHODS = {"Completion": LegacyReply}


def token_name(model: engine.Model, token: int) -> str:
    """What a token is called where names are keys: its text, or as OpenAI has it the bytes of one
    that is only a part of a character; those of two such tokens would be the same text."""
    piece = model.piece(token, special=True)
    try:
        return piece.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in piece)


def beginning(model: engine.Model) -> list[int]:
    """The token that a document begins with: the one for that, or else the one that ends one."""
    marks = [mark(model.vocab) for mark in (lib.llama_vocab_bos, lib.llama_vocab_eos)]
    return [mark for mark in marks if mark >= 0][:1]


def infill(model: engine.Model, prefix: str, suffix: str) -> np.ndarray | None:
    """The prompt (token ids, int32) for what belongs between two texts; None if the model was not
    trained so. https://arxiv.org/abs/2207.14255"""
    marks = [mark(model.vocab) for mark in (
        lib.llama_vocab_fim_pre, lib.llama_vocab_fim_suf, lib.llama_vocab_fim_mid)]
    if min(marks) < 0:
        return None
    bos = model.tokenize("")
    before, after = model.tokenize(prefix, bos=False), model.tokenize(suffix, bos=False)
    return np.concatenate([np.array(part, dtype=np.int32) for part in (
        bos, marks[:1], before, marks[1:2], after, marks[2:])])
