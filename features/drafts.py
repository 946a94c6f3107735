"""Drafts: tokens guessed ahead, so that one decode brings several.

What it is for. Most of a decode's time goes into reading the weights, for one row as for several;
and what comes next is often easy to guess. engine.Drafter says how guesses are verified: they may
change how fast a reply comes, and nothing else.

How it works. Two guess. `PromptLookup`: the text goes on as it did where its last two tokens stood
before, or as a `prediction` says. `DraftModel`: a smaller GGUF with the same vocabulary writes
ahead; where the last SURE_MATCH tokens agree with a place before, it is not asked.

The rule for how many. A token is drafted if its chance to count, times the seconds of the decode so
far, exceeds the tokens so far times the seconds that it adds. Its chance is the product of the odds
of all drafted tokens up to it; odds are the share of guesses of the same kind that came true in this
reply, the latest above all: of a lookup's, those with as long a match, drafted or not; of a model's,
all. The seconds are measured: what decodes with drafts took longer than those without. So that
nobody pays for drafts of others, each of several slots reckons as though all drafted as many as it
does, and then none drafts more than the one that would draft least, unless all those rows add less
than SLACK to the decode; beside a prompt that is being read nothing is drafted; and a model, each of
whose guesses is a decode, is asked only while one reply is written. If its guesses do not pay, it
rests, each time LONGER, and then guesses one token, to see whether they do now.

What it costs. A lookup a few microseconds a token, and now and then a row that is drafted in vain:
on new text nothing that could be measured. A model its weights and KV cache, and reading each text
that it drafts for, MAX_READ tokens in a step.

What it reads and sends. The settings `draft`, `draft_model_path`, `draft_n_ctx`,
`draft_n_gpu_layers`; the `prediction` of a chat, which server.py tokenizes. `usage` and /metrics
count accepted and rejected tokens.
"""

import contextlib
import copy
import dataclasses
import itertools
import logging
import math
import time
from collections.abc import Iterable, Iterator

import numpy as np
from llama_cpp import llama_cpp as lib

import engine
from engine import Slot

log = logging.getLogger("drafts")

PROMPT_LOOKUP = "prompt-lookup"
MAX_DRAFT = 32  # tokens for a slot in one step: hardly any gain is left in more
SLACK = 0.03  # of a decode's seconds: what drafts may cost those that gain nothing by them
MARGIN = 1.05  # by which what a token gains must exceed what it costs: odds and prices err


# ==== 1. Who guesses ====================================================================


class PromptLookup:
    """Guesses for one request: its text goes on as it did where its last two tokens stood before.
    What is not drafted is compared, too, so the odds cost nothing to learn. After `prepare`: engine
    thread only."""

    MAX_MATCH = 128  # tokens looked back to see how long a match is
    N_LEVELS = 8  # of a match's length, by its bits: 1, 2 to 3, 4 to 7, ..., 128 and more
    WEIGHT = 1 / 16  # of the latest guess, in the odds of its level

    def __init__(self, prompt: np.ndarray, expected: np.ndarray | None = None):
        """prompt, expected: token ids; the reply may be like `expected`."""
        self._tokens = prompt.tolist()
        # Before anything is known, a match of n tokens is taken to go on with odds n / (n + 2).
        self._odds = [2**level / (2**level + 2) for level in range(self.N_LEVELS)]
        # The text may go on with tokens[_next], because the n_matched tokens before it are those
        # at the text's end; none: nothing is known.
        self._next = self.n_matched = 0
        if expected is not None and len(expected):
            self._next, self.n_matched = len(self._tokens), 1
            self._tokens += expected.tolist()
        # Where each pair of tokens stood last: the index of what followed it. Before the reply,
        # which choices share, and in the reply.
        self._before = dict(zip(itertools.pairwise(self._tokens), itertools.count(2)))
        self._behind: dict[tuple[int, int], int] = {}

    def again(self) -> "PromptLookup":
        """The same for another choice, before either has begun."""
        other = copy.copy(self)
        other._tokens, other._odds, other._behind = self._tokens.copy(), self._odds.copy(), {}
        return other

    def feed(self, token: int) -> None:
        """Take the next token of the reply."""
        tokens = self._tokens
        if self.n_matched:
            came_true, level = tokens[self._next] == token, self._level(self.n_matched)
            self._odds[level] += self.WEIGHT * (came_true - self._odds[level])
            self.n_matched = self.n_matched + 1 if came_true else 0
            self._next += 1
        pair = (tokens[-1], token)
        tokens.append(token)
        found = self._behind.get(pair) or self._before.get(pair)
        if not self.n_matched and found:
            self._next, n = found, 2
            while n < min(self.MAX_MATCH, self._next) and tokens[self._next - 1 - n] == tokens[~n]:
                n += 1
            self.n_matched = n
        self._behind[pair] = len(tokens)

    def _level(self, n_matched: int) -> int:
        return min(n_matched.bit_length(), self.N_LEVELS) - 1

    def guesses(self) -> Iterator[tuple[int, float]]:
        """What may come, token by token, each with the odds that it does if those before did."""
        ahead: list[int] = []
        while self.n_matched:
            index = self._next + len(ahead)
            beyond = index - len(self._tokens)  # where a text repeats itself without end
            token = self._tokens[index] if beyond < 0 else ahead[beyond]
            if token < 0:
                return  # a part of an image
            ahead.append(token)
            yield token, self._odds[self._level(self.n_matched + len(ahead) - 1)]


class DraftModel:
    """A smaller model with the same vocabulary. Its own context has the same slots; each reads its
    slot's text when a guess is wanted. Engine thread only."""

    MAX_READ = 96  # tokens of a slot's text read in one step
    WEIGHT = 1 / 8  # of the latest guess, in its seconds

    def __init__(self, model: engine.Model, context: engine.Context, target: engine.Model):
        """The draft model and its context, which become its own. Raises engine.ModelError when
        its vocabulary is not that of the target."""
        for token in range(min(model.n_vocab, target.n_vocab)):
            texts = [lib.llama_vocab_get_text(each.vocab, token) for each in (model, target)]
            if texts[0] != texts[1]:
                raise engine.ModelError(
                    f"draft_model_path: {model.path} has another vocabulary than {target.path}: "
                    f"token {token} is {texts[0]!r}, not {texts[1]!r}; take a smaller model of "
                    "the same family")
        self._model, self._context = model, context
        self._n_vocab = min(model.n_vocab, target.n_vocab)
        self._slots = [Slot(i, context.n_ctx) for i in range(context.parallel)]
        self.seconds = 0.0  # of a guess

    def close(self) -> None:
        """Free context and weights."""
        self._context.close()
        self._model.close()

    def guess(self, slot: Slot, n: int, max_unread: int) -> list[int]:
        """The n likeliest tokens after a slot's text; fewer at the end of the context. None while
        the text is being read, a piece in each step, or if more of it than max_unread is left."""
        own, text = self._slots[slot.seq_id], slot.tokens[: slot.n_cached]
        same = engine.common_prefix(own.tokens[: own.n_cached], text)
        if same < own.n_cached:  # another text, or guesses that were wrong
            own.n_cached = self._context.trim(own.seq_id, same)
        unread, guesses = np.append(text[own.n_cached :], np.int32(slot.next_token)), []
        while len(guesses) < n and len(unread) <= max_unread:
            tokens = unread[: min(self.MAX_READ, self._context.n_batch)]
            end, began = own.n_cached + len(tokens), time.perf_counter()
            if end > self._context.n_ctx or tokens.min() < 0 or tokens.max() >= self._n_vocab:
                break  # negative: a part of an image
            chunk = engine.Chunk(own, tokens, len(tokens) == len(unread))
            if code := self._context.decode([chunk]):
                log.warning("llama_decode returned %s for the draft model", code)
                own.n_cached = self._context.trim(own.seq_id, 0)
                break
            own.tokens[own.n_cached : end], own.n_cached = tokens, end
            if not chunk.wants_logits:
                break
            guesses.append(int(self._context.logits(chunk.row)[: self._n_vocab].argmax()))
            if len(tokens) == 1:
                self.seconds += self.WEIGHT * (time.perf_counter() - began - self.seconds)
            unread = np.array(guesses[-1:], np.int32)
        return guesses


# ==== 2. The rule for how many ==========================================================


class Price:
    """What a row more costs, from decodes so far."""

    WEIGHT = 0.1  # of the latest decode
    OUTLIER = 4.0  # times what was expected: something else had the processor
    FORGET = 0.01  # of what drafts have told, with each decode without any: it may have changed

    def __init__(self):
        self._plain: dict[int, float] = {}  # seconds of a decode without drafts, by its rows
        self._row: float | None = None  # seconds of one row more

    def note(self, n_rows: int, n_draft: int, seconds: float) -> None:
        """As engine.Drafter has it."""
        n, plain = n_rows - n_draft, self._plain.setdefault(n_rows - n_draft, seconds)
        if n_draft:
            row, weight = min(max(0.0, seconds - plain) / n_draft, plain), self.WEIGHT
        else:  # what is taken for granted until drafts tell: half of a decode of one row
            self._plain[n] += self.WEIGHT * (min(seconds, self.OUTLIER * plain) - plain)
            row, weight = plain / (n + 1), self.FORGET
        self._row = row if self._row is None else self._row + weight * (row - self._row)

    def of(self, n_slots: int, more_seconds: float = 0.0) -> float:
        """The price of a row, and more seconds, in those of a token while so many slots decode
        without drafts; infinite before they have."""
        plain = self._plain.get(n_slots)
        return n_slots * (self._row + more_seconds) / plain if plain else math.inf


def worth(guesses: Iterable[tuple[int, float]], price: float) -> list[int]:
    """Of tokens that come with their odds the first that pay. price: of each, in what a token
    costs without drafts."""
    draft, chance, tokens, seconds = [], 1.0, 1.0, 1.0
    for token, odds in guesses:
        chance *= odds
        if chance * seconds <= MARGIN * tokens * price:
            break
        draft.append(token)
        tokens += chance
        seconds += price
    return draft


@dataclasses.dataclass(eq=False)
class Drafting:
    """What is kept for a request. Engine thread only, after `prepare`."""

    lookup: PromptLookup | None
    guesses: list[int] = dataclasses.field(default_factory=list)  # the draft model's latest
    share: float = 0.8  # of its guesses that came true
    pause: int = 16  # tokens that it rests when its guesses do not pay
    rests_until: int = 0  # tokens of the reply


class Drafts(engine.Drafter):
    """Drafts what pays, from lookups and from a draft model."""

    SURE_MATCH = 8  # tokens: of shorter matches a draft model knows better what follows
    WEIGHT = 1 / 8  # of the latest guess, in the share of a draft model's that came true
    LONGER = 4  # times
    LIKELY_TOKENS = 64  # that a reply goes on for, besides as many as it has already
    WORTH_READING = 4  # tokens for a draft model to read, for each that the reply may still have

    def __init__(self, looks_up: bool, model: DraftModel | None = None):
        """looks_up: also for requests that expect nothing. The model becomes its own."""
        self._looks_up, self.model, self.price = looks_up, model, Price()

    def close(self) -> None:
        """Free the draft model."""
        model, self.model = self.model, None
        if model:
            model.close()

    def prepare(self, requests: list[engine.Request]) -> None:
        first: dict[int, PromptLookup] = {}  # by prompt: choices share what is found there
        for request in requests:
            key, lookup = id(request.prompt), None
            if self._looks_up or request.expected is not None:
                lookup = first[key].again() if key in first else first.setdefault(
                    key, PromptLookup(request.prompt, request.expected))
            request.drafting = Drafting(lookup)

    def drafts(self, slots: list[Slot], n_prefill: int, room: int) -> dict[Slot, list[int]]:
        price = self.price.of(len(slots))
        if n_prefill or price == math.inf:
            return {}
        drafts, asks = {}, self.model is not None and len(slots) == 1
        for slot in slots:
            request, lookup = slot.request, slot.request.drafting.lookup
            most = max(0, min(MAX_DRAFT, room // len(slots),
                              request.max_tokens - request.n_generated - 1))
            is_found = lookup and lookup.n_matched >= (self.SURE_MATCH if asks else 1)
            drafts[slot] = worth(itertools.islice(lookup.guesses(), most), price) if is_found \
                else self._ask(slot, most) if asks and most else []
        most = max(min(map(len, drafts.values())), int(SLACK / max(price, SLACK / MAX_DRAFT)))
        return {slot: draft[:most] for slot, draft in drafts.items()}

    def _ask(self, slot: Slot, most: int) -> list[int]:
        """The draft model's guesses, as many as pay. If it fails, go on without it."""
        request, own = slot.request, slot.request.drafting
        n_done, n_left = request.n_generated, request.max_tokens - request.n_generated
        n = len(worth([(engine.NO_TOKEN, own.share)] * most,
                      self.price.of(1, self.model.seconds)))
        if n == 0 and n_done < own.rests_until:
            return []
        try:
            own.guesses = self.model.guess(
                slot, max(n, 1), self.WORTH_READING * min(n_left, n_done + self.LIKELY_TOKENS))
        except Exception:
            log.exception("the draft model failed; going on without it")
            self.close()
        if own.guesses:
            own.rests_until = n_done + (0 if n else own.pause)
            own.pause = Drafting.pause if n else self.LONGER * own.pause
        return own.guesses

    def verified(self, slot: Slot, tokens: list[int]) -> None:
        if slot.request is None:
            return
        own = slot.request.drafting
        for guess, token in zip(own.guesses, tokens):
            own.share += self.WEIGHT * ((guess == token) - own.share)
        if own.guesses[:1] == tokens[:1]:
            own.rests_until = 0
        own.guesses = []
        for token in tokens if own.lookup else ():
            own.lookup.feed(token)

    def note(self, n_rows: int, n_draft: int, seconds: float) -> None:
        self.price.note(n_rows, n_draft, seconds)


# ==== 3. Loading ========================================================================


def equip(loaded: engine.Engine, options: dict) -> None:
    """Let a model have drafts. Loader thread, before anybody has the engine. Raises
    engine.ModelError."""
    file, target = options["draft_model_path"], loaded.model
    if target.can_rewind and target.generates:  # else nothing could be taken back
        model = load_draft_model(file, loaded, options) if file else None
        loaded.drafter = Drafts(options["draft"] == PROMPT_LOOKUP, model)
        target.parts.callback(loaded.drafter.close)
    elif file:
        log.warning("no drafts for %s: it makes embeddings only, or its recurrent state cannot be "
                    "rewound", target.name)


def load_draft_model(file: str, loaded: engine.Engine, options: dict) -> DraftModel:
    """The model that drafts for another. Raises engine.ModelError."""
    target, context = loaded.model, loaded.context
    path = engine.find_model_file(file, target.path.parent, setting="draft_model_path")
    with contextlib.ExitStack() as undo:
        try:
            model = engine.Model(path, options["draft_n_gpu_layers"])
        except engine.ModelError as error:
            raise type(error)(f"draft_model_path: {error}") from None
        undo.callback(model.close)
        if not (model.can_rewind and model.generates):
            raise engine.ModelError(f"draft_model_path: {path} cannot draft: it makes embeddings "
                                    "only, or its recurrent state cannot be rewound")
        n_ctx = min(options["draft_n_ctx"] or context.n_ctx, model.n_ctx_train)
        own = engine.Context(model, n_ctx, context.parallel, **{
            name: options[name] for name in ("n_batch", "n_ubatch", "n_threads", "flash_attn")})
        undo.callback(own.close)
        drafter = DraftModel(model, own, target)
        undo.pop_all()
    log.info("%s drafts for %s", model.name, target.name)
    return drafter
