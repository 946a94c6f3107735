"""Drafts: tokens guessed ahead, so that one decode brings several.

What it is for. Most of a decode's time goes into reading the weights, for one row as for several.
engine.Drafter says how guesses are verified. Two guess. `PromptLookup`: the text goes on as it did
where its last two tokens stood before, or as it is expected to (predictions.py). `DraftModel`: a
smaller GGUF with the same vocabulary writes ahead, unless the last SURE_MATCH tokens stood before.

The rule for how many. A token is drafted if its chance to count, times the seconds of the decode so
far, exceeds the tokens so far times the seconds that it adds. Its chance is the product of the odds
of all drafted tokens up to it: how many like guesses (with as long a match; of a model, all) came
true in this reply, the latest above all. The seconds are measured. So that nobody pays for drafts
of others, each of several slots reckons as though all drafted as many, and the longest are cut
until who gains least (a prompt gains nothing) loses no more than SLACK. A model is asked only while
a single reply is written; if its guesses do not pay, it rests until the reply is twice as long, and
then guesses one token, to see whether they do now.

What it costs. A lookup a few microseconds a token, and a row drafted in vain now and then; a model
its weights and KV cache, and reading each text. What it reads and sends. The settings `draft` and
`draft_...`; `usage` and /metrics count what became of drafts.
"""

import copy
import dataclasses
import itertools
import time
from collections.abc import Iterable, Iterator
from typing import Literal

import numpy as np
from llama_cpp import llama_cpp as lib

import engine
import server
from engine import Slot, log
from features.settings import find_file

PROMPT_LOOKUP = "prompt-lookup"
MAX_DRAFT = 32  # tokens for a slot in one step: hardly any gain is left in more
SLACK = 0.03  # of a decode's seconds: what drafts may cost those that gain nothing by them
MARGIN = 1.05  # by which what a token gains must exceed what it costs: odds and prices err


class PromptLookup:
    """Guesses for one request: its text goes on as it did where its last two tokens stood before.
    What is not drafted is compared, too: odds cost nothing. After `prepare`: engine thread only."""

    MAX_MATCH = 128  # tokens looked back to see how long a match is
    MAX_BITS = 32  # of a match's length
    WEIGHT = 1 / 16  # of the latest guess, in the odds of its kind

    def __init__(self, prompt: np.ndarray, expected: np.ndarray | None = None):
        """prompt, expected: token ids; the reply may be like `expected`."""
        self._tokens = prompt.tolist()
        # By the bits of a match's length; at first those of n tokens go on with odds n / (n + 2).
        self._odds = [2**bits / (2**bits + 4) for bits in range(self.MAX_BITS)]
        # tokens[_next] may follow, for the n_matched tokens before it are those at the text's end.
        self._next = self.n_matched = 0
        if expected is not None and len(expected):
            self._next, self.n_matched = len(self._tokens), 1
            self._tokens += expected.tolist()
        # What followed each pair of tokens last, by index: before the reply, and in it.
        self._before = dict(zip(itertools.pairwise(self._tokens), itertools.count(2)))
        self._behind: dict[tuple[int, int], int] = {}

    def again(self) -> "PromptLookup":
        """The same for another choice, before either has begun."""
        other = copy.copy(self)
        other._tokens, other._odds, other._behind = self._tokens.copy(), self._odds.copy(), {}
        return other

    def feed(self, token: int) -> None:
        """Take the next token of the reply."""
        tokens, bits = self._tokens, self.n_matched.bit_length()
        if self.n_matched:
            came_true = tokens[self._next] == token
            self._odds[bits] += self.WEIGHT * (came_true - self._odds[bits])
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

    def guesses(self) -> Iterator[tuple[int, float]]:
        """What may come, token by token, each with the odds that it does if those before did."""
        ahead: list[int] = []
        while self.n_matched:
            index = self._next + len(ahead)
            beyond = index - len(self._tokens)  # where a text repeats itself without end
            if (token := self._tokens[index] if beyond < 0 else ahead[beyond]) < 0:
                return  # a part of an image
            yield token, self._odds[(self.n_matched + len(ahead)).bit_length()]
            ahead.append(token)


class DraftModel:
    """A smaller model with the same vocabulary, and a context with the same slots, of which each
    reads its slot's text when a guess is wanted. Engine thread only."""

    MAX_READ = 96  # tokens of a slot's text read in one step
    WEIGHT = 1 / 8  # of the latest guess, in its seconds

    def __init__(self, model: engine.Model, context: engine.Context, target: engine.Model):
        """Raises engine.ModelError when the vocabulary is not that of the target."""
        for token in range(min(model.n_vocab, target.n_vocab)):
            texts = [lib.llama_vocab_get_text(each.vocab, token) for each in (model, target)]
            if texts[0] != texts[1]:
                raise engine.ModelError(
                    f"draft_model_path: token {token} of {model.path} is {texts[0]!r}, of "
                    f"{target.path} {texts[1]!r}; take a model of its family")
        self._context, self._n_vocab = context, min(model.n_vocab, target.n_vocab)
        self._slots = [Slot(i, context.n_ctx) for i in range(context.parallel)]
        self.seconds = 0.0  # of a guess

    def guess(self, slot: Slot, n: int, max_unread: int) -> list[int]:
        """The n likeliest tokens after a slot's text; fewer at the end of the context, none while
        it is being read, a piece in each step, or if more than max_unread tokens are left."""
        own, text = self._slots[slot.seq_id], slot.tokens[: slot.n_cached]
        same = engine.common_prefix(own.tokens[: own.n_cached], text)
        if same < own.n_cached:  # another text, or guesses that were wrong
            own.n_cached = self._context.trim(own.seq_id, same)
        unread, guesses = np.append(text[own.n_cached :], np.int32(slot.next_token)), []
        while len(guesses) < n and len(unread) <= max_unread:
            tokens, began = unread[: min(self.MAX_READ, self._context.n_batch)], time.perf_counter()
            end = own.n_cached + len(tokens)
            if end > self._context.n_ctx or tokens.min() < 0 or tokens.max() >= self._n_vocab:
                break  # negative: a part of an image
            chunk = engine.Chunk(own, tokens, len(tokens) == len(unread))
            if code := self._context.decode([chunk]):
                raise engine.EngineFault(f"llama_decode failed with {code}")
            own.tokens[own.n_cached : end], own.n_cached = tokens, end
            if not chunk.wants_logits:
                break
            guesses.append(int(self._context.logits(chunk.row)[: self._n_vocab].argmax()))
            if len(tokens) == 1:
                seconds = time.perf_counter() - began
                self.seconds += (self.WEIGHT if self.seconds else 1) * (seconds - self.seconds)
            unread = np.array(guesses[-1:], np.int32)
        return guesses


class Price:
    """What a row more costs, from decodes so far."""

    WEIGHT = 0.2  # of the latest decode
    FORGET = 0.005  # of what drafts have told, with each decode without any: it may have changed

    def __init__(self):
        self._plain: dict[int, float] = {}  # seconds of a decode without drafts, by its rows
        self._row: float | None = None  # seconds of one row more

    def note(self, n_rows: int, n_draft: int, seconds: float) -> None:
        """As engine.Drafter has it. More than twice as long: something else had the processor."""
        plain = self._plain.setdefault(n := n_rows - n_draft, seconds)
        if n_draft:
            row, weight = min(max(0.0, seconds - plain) / n_draft, plain), self.WEIGHT
        else:  # what is taken for granted until drafts tell: half of a decode of one row
            self._plain[n] += self.WEIGHT * (min(seconds, 2 * plain) - plain)
            row, weight = plain / (n + 1), self.FORGET
        self._row = row if self._row is None else self._row + weight * (row - self._row)

    def of(self, n_slots: int, more_seconds: float = 0.0) -> float:
        """The price of a row, and more seconds, in those of a token without drafts while so many
        slots decode; infinite before they have."""
        plain = self._plain.get(n_slots)
        return n_slots * (self._row + more_seconds) / plain if plain else np.inf


def worth(guesses: Iterable[tuple[int, float]], price: float) -> tuple[list[int], float]:
    """Of tokens with their odds the first that pay, and how many of them and one more will count.
    price: of each, in what a token costs without drafts."""
    draft, chance, tokens = [], 1.0, 1.0
    for token, odds in guesses:
        chance *= odds
        if chance * (1 + price * len(draft)) <= MARGIN * tokens * price:
            break
        draft.append(token)
        tokens += chance
    return draft, tokens


@dataclasses.dataclass(eq=False)
class Drafting:
    """What is kept for a request. Engine thread only, after `prepare`."""

    lookup: PromptLookup | None
    guesses: list[int] = dataclasses.field(default_factory=list)  # the draft model's latest
    share: float = 0.7  # of its guesses that came true
    rests_until: int = 0  # tokens of the reply


class Drafts(engine.Drafter):
    """Drafts what pays, from lookups and from a draft model."""

    SURE_MATCH = 8  # tokens: of shorter matches a draft model knows better what follows
    WEIGHT = 1 / 8  # of the latest guess, in the share of a draft model's that came true
    LIKELY_TOKENS = 64  # that a reply goes on for, besides as many as it has already
    WORTH_READING = 4  # tokens for a draft model to read, for each of these

    def __init__(self, looks_up: bool, model: DraftModel | None = None):
        """looks_up: also for requests that expect nothing. The model becomes its own."""
        self._looks_up, self.model, self.price = looks_up, model, Price()
        self.note = self.price.note  # as engine.Drafter has it

    def prepare(self, requests: list[engine.Request]) -> None:
        for _, choices in itertools.groupby(requests, key=lambda request: id(request.prompt)):
            first, *others = choices
            if looks_up := self._looks_up or first.expected is not None:
                lookup = PromptLookup(first.prompt, first.expected)
            for request in (first, *others):
                request.drafting = Drafting(lookup.again() if looks_up else None)

    def drafts(self, slots: list[Slot], n_prefill: int, room: int) -> dict[Slot, list[int]]:
        price, is_alone = self.price.of(len(slots)), len(slots) == 1 and n_prefill == 0
        if price == np.inf:
            return {}
        asks = is_alone and self.model is not None
        found = {slot: self._draft(slot, room, price, asks) for slot in slots}
        limit, least = MAX_DRAFT, 1.0 if n_prefill else min(tokens for _, tokens in found.values())
        spare = ((1 + SLACK) * least - 1) * (len(slots) + n_prefill * price)
        rows = min(room, spare / price if price else room)  # as many as nobody pays for
        while limit and not is_alone and sum(
                len(draft[:limit]) for draft, _ in found.values()) > rows:
            limit -= 1
        return {slot: draft[:limit] for slot, (draft, _) in found.items()}

    def _draft(self, slot: Slot, room: int, price: float, asks: bool) -> tuple[list[int], float]:
        """What pays for a slot, as `worth` has it; asks: of the draft model, too."""
        request, lookup = slot.request, slot.request.drafting.lookup
        most = max(0, min(MAX_DRAFT, room, request.max_tokens - request.n_generated - 1))
        if lookup and lookup.n_matched >= (self.SURE_MATCH if asks else 1):
            return worth(itertools.islice(lookup.guesses(), most), price)
        return self._ask(slot, most) if asks and most else [], 1.0

    def _ask(self, slot: Slot, most: int) -> list[int]:
        """The draft model's guesses, as many as pay. If it fails, go on without it."""
        own, n_done = slot.request.drafting, slot.request.n_generated
        price = self.price.of(1, self.model.seconds)
        planned, _ = worth([(engine.NO_TOKEN, own.share)] * most, price)
        if not planned and n_done < own.rests_until:
            return []
        try:
            own.guesses = self.model.guess(
                slot, len(planned) or 1, self.WORTH_READING * (self.LIKELY_TOKENS + n_done))
        except Exception:
            log.exception("the draft model failed; going on without it")
            self.model = None
        if own.guesses and not planned:
            own.rests_until = 2 * n_done
        return own.guesses

    def verified(self, slot: Slot, tokens: list[int]) -> None:
        if (own := slot.request and slot.request.drafting) is None:
            return
        for guess, token in zip(own.guesses, tokens):
            own.share += self.WEIGHT * ((guess == token) - own.share)
            own.rests_until *= guess != token
        own.guesses = []
        for token in tokens if own.lookup else ():
            own.lookup.feed(token)


@dataclasses.dataclass
class Settings:
    """What drafts."""

    draft: Literal["prompt-lookup"] | None = server.setting("model", PROMPT_LOOKUP)
    draft_model_path: str | None = server.setting("model", None, path="file")
    draft_n_ctx: int = server.setting("model", 0, low=0, high=server.MAX_N_CTX)
    draft_n_gpu_layers: int = server.setting("model", -1, low=-1, high=server.INT32_MAX)


class DraftCounts(server.Models):
    """Counts what became of drafts."""

    def samples(self) -> dict:
        """As Models.samples."""
        stats = self.stats()
        return {**super().samples(),
                "accepted_draft_tokens_total": ("tokens drafted and generated", stats.n_accepted),
                "rejected_draft_tokens_total": ("tokens drafted in vain", stats.n_rejected)}


class DraftedReply:
    """What a reply tells of drafts, too."""

    def usage(self) -> dict:
        """As Generation.usage, with what became of tokens that were drafted."""
        return {**super().usage(), "completion_tokens_details": {
            "accepted_prediction_tokens": sum(choice.n_accepted for choice in self.choices),
            "rejected_prediction_tokens": sum(choice.n_rejected for choice in self.choices)}}


METHODS = {"Models": DraftCounts, "Generation": DraftedReply}


def equip(loaded: engine.Engine, settings: server.Config) -> None:
    """Let a model have drafts. Raises ModelError."""
    file, target = settings.draft_model_path, loaded.model
    if target.can_rewind and target.generates:  # else nothing could be taken back
        loaded.drafter = Drafts(settings.draft == PROMPT_LOOKUP,
                                load_draft_model(file, loaded, settings) if file else None)
    elif file:
        log.warning("no drafts for %s: it makes embeddings, or cannot be rewound", target.name)


def load_draft_model(file: str, loaded: engine.Engine, settings: server.Config) -> DraftModel:
    """The model that drafts for another, and is freed with it. Raises engine.ModelError."""
    path = find_file(settings.house, file, loaded.model.path.parent, "draft_model_path")
    model = engine.Model(path, settings.draft_n_gpu_layers)
    loaded.model.parts.callback(model.close)
    if not (model.can_rewind and model.generates):
        raise engine.ModelError(f"draft_model_path: {path} cannot draft: embeddings only, or not "
                                "to be rewound")
    context = engine.Context(model, min(settings.draft_n_ctx or loaded.n_ctx, model.n_ctx_train),
                             loaded.context.parallel, **{name: getattr(settings, name) for name in (
                                 "n_batch", "n_ubatch", "n_threads", "flash_attn")})
    model.parts.callback(context.close)
    log.info("%s drafts for %s", model.name, loaded.model.name)
    return DraftModel(model, context, loaded.model)
