"""Speculative decoding: drafts may change how fast a reply comes, and nothing else.

    1  any text          random conversations on a fake context, with and without drafts
    2  the rule          odds, prices, what pays, and what drafts cost, by a clock of our own
    3  the real model    by HTTP: the same text, log-probabilities and stream
    4  predictions       the `prediction` of a chat
    5  draft models      the default model, drafted for by itself and by a poor copy
    6  settings          null, and what is refused

On exactness. On a CPU llama.cpp's flash attention adds in another order where a batch has 64 rows
of a slot or more, and for a single row beyond 256 tokens of context; then logits differ by 0.1, and
greedy near-ties flip. So here the real model's prompts and replies have fewer than 250 tokens
together, and its batches 32 rows at most.
"""

import concurrent.futures
import contextlib
import gc
import itertools
import json
import random
import re
import sys
import threading
import time
import types
import weakref
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import conftest  # noqa: E402
import engine  # noqa: E402
import make_deep_model  # noqa: E402
from features import drafts, memory  # noqa: E402
import server  # noqa: E402
from test_embeddings_gguf import POOLING, write_bert  # noqa: E402
from test_models import CHAT, get, post  # noqa: E402
from test_server import END, FakeContext, FakeModel, FakeSampler, result, start  # noqa: E402

PROPERTY = settings(database=None, deadline=None, print_blob=True, max_examples=25,
                    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])

# ==== 1. Any text =========================================================================


def repeating(seed: int, order: int, n_letters: int, whim: int):
    """A text that mostly depends on its last tokens, so it repeats itself; sometimes, on all of
    them, so a wrong cell shows, and sometimes it ends."""
    def choose(prefix):
        by_all = hash((seed, prefix))
        if by_all % 61 == 0:
            return END
        part = prefix if by_all % whim == 0 else prefix[-order:]
        return ord("a") + hash((seed, part)) % n_letters
    return choose


class RandomSampler:
    """Chooses by chance, from the row it is given; each call uses up one random number."""

    def __init__(self, seed, choose):
        self.random, self.choose = random.Random(seed), choose

    def sample(self, context, row):
        token = self.choose(context.rows[row])
        return token if self.random.random() < 0.8 else ord("a") + self.random.randrange(2)


class RowContext(FakeContext):
    """Counts the drafted rows, and fakes logits for a draft model: `choose` is what it thinks."""

    def __init__(self, choose=lambda prefix: (0, 0.0), **options):
        super().__init__(**options)
        self.n_drafted, self.most_drafted, self.choose = 0, 0, choose

    def decode(self, chunks):
        for chunk in chunks:
            assert min(chunk.tokens[len(chunk.tokens) - chunk.n_draft:], default=0) >= 0
        if code := super().decode(chunks):
            return code
        self.n_drafted += sum(chunk.n_draft for chunk in chunks)
        self.most_drafted = max(self.most_drafted, *(chunk.n_draft for chunk in chunks))
        return 0

    def logits(self, row):
        token, certainty = self.choose(self.rows[row])
        logits = np.zeros(FakeModel.n_vocab, np.float32)
        logits[token] = certainty
        return logits


class SetPrice(drafts.Price):
    """What a row costs, in decodes of one row, is what a test sets; so is a guess of a model."""

    def __init__(self, row, guess=0.0):
        super().__init__()
        self.row, self.guess = row, guess

    def note(self, n_rows, n_draft, seconds):
        pass

    def of(self, n_slots, more_seconds=0.0):
        plain = 1 + self.row * (n_slots - 1)
        return n_slots * (self.row + (self.guess if more_seconds else 0)) / plain


class SmallModel(FakeModel):
    vocab = None


def fake_draft_model(guess, **options) -> drafts.DraftModel:
    """guess: (token, how sure it is) after a prefix."""
    with mock.patch.object(drafts.lib, "llama_vocab_get_text", lambda vocab, token: token):
        return drafts.DraftModel(SmallModel(), RowContext(guess, **options), SmallModel())


def drafting_engine(price, draft_model=None, looks_up=True, prefill_chunk=32, **options):
    """An engine on a RowContext, on which a row more costs `price` decodes."""
    fake = engine.Engine(FakeModel(), RowContext(**options), prefill_chunk, 99)
    fake.prefixes.store = memory.MemoryStore(10_000)
    fake.drafter = drafts.Drafts(looks_up, draft_model)
    fake.drafter.price = SetPrice(price)
    return fake


def ask(prompt: bytes, n, sampler, stops=(), prediction=b"") -> engine.Request:
    tokens = np.frombuffer(prompt, np.uint8).astype(np.int32)
    expected = np.frombuffer(prediction, np.uint8).astype(np.int32)
    return engine.Request(tokens, sampler, n, list(stops),
                          expected=expected if prediction else None)


def check_cells(context, slots):
    """What slots say of their caches is true."""
    for slot in slots:
        assert context.cells[slot.seq_id] == slot.tokens[: slot.n_cached].tolist()


def text_so_far(request) -> str:
    text = ""
    while not request.events.empty():
        event = request.events.get()
        assert event.error is None
        text += event.text
    return text


def play(fake, guests, make_sampler):
    """Let guests come and go at their steps, and check each step; return their requests."""
    requests = [ask(guest["prompt"], guest["n"], make_sampler(guest), guest["stops"],
                    guest["prediction"]) for guest in guests]
    for step in range(1000):
        for guest, request in zip(guests, requests):
            if guest["comes"] == step:
                fake.submit([request])
            if guest["goes"] == step:
                request.cancel()
        if step > 20 and not fake._waiting and not fake._busy():
            break
        fake.step()
        check_cells(fake.context, fake._slots)
        if model := fake.drafter.model:
            check_cells(model._context, model._slots)
    else:
        raise AssertionError("the engine does not come to an end")
    counts = fake._counts
    assert counts.n_accepted + counts.n_rejected == fake.context.n_drafted
    assert counts.n_accepted == sum(request.n_accepted for request in requests)
    assert counts.n_rejected == sum(request.n_rejected for request in requests)
    assert counts.n_generated == sum(request.n_generated for request in requests)
    for request in requests:
        assert request.n_accepted <= request.n_generated <= request.max_tokens
    return requests


def alone(guest, sampler, n_ctx):
    """The reply without drafts, company or cache."""
    context = FakeContext(parallel=1, n_ctx=n_ctx, n_batch=512)
    plain = engine.Engine(FakeModel(), context, 512, 9)
    tokens = np.frombuffer(guest["prompt"], np.uint8).astype(np.int32)
    request = engine.Request(tokens, sampler, guest["n"], guest["stops"])
    plain.submit([request])
    while plain._waiting or plain._busy():
        plain.step()
    return *result(request), request.n_generated


def check_replies(guests, requests, make_sampler, n_ctx):
    for guest, request in zip(guests, requests):
        text, reason, n_generated = alone(guest, make_sampler(guest), n_ctx)
        if guest["goes"] >= 0:  # cancelled somewhere, or too late
            assert text.startswith(text_so_far(request))
        else:
            assert (*result(request), request.n_generated) == (text, reason, n_generated)


few_letters = st.text("ab", min_size=1, max_size=50).map(str.encode)
guest_lists = st.lists(st.fixed_dictionaries({
    "prompt": few_letters, "n": st.integers(0, 60), "seed": st.none() | st.integers(0, 99),
    "stops": st.lists(st.text("abc", min_size=1, max_size=5), max_size=2),
    "prediction": st.just(b"") | few_letters, "comes": st.integers(0, 15),
    "goes": st.just(-1) | st.integers(0, 30)}), min_size=1, max_size=5)
texts = st.builds(repeating, st.integers(0, 99), st.integers(1, 4), st.integers(1, 4),
                  st.sampled_from([5, 11, 50]))
engines = st.fixed_dictionaries({
    "parallel": st.integers(1, 4), "n_batch": st.sampled_from([4, 7, 16, 64]),
    "n_ctx": st.sampled_from([52, 64, 128]), "prefill_chunk": st.integers(1, 32),
    "price": st.sampled_from([0.0, 0.01, 0.1, 0.5, 1.0])})


def sampler_maker(choose):
    return lambda guest: FakeSampler(choose) if guest["seed"] is None else RandomSampler(
        guest["seed"], choose)


@PROPERTY
@given(guests=guest_lists, choose=texts, options=engines)
def test_looked_up_drafts_change_no_reply(guests, choose, options):
    """Whatever the sampler, the stops and the company: text, end and counts are those without
    drafts; the cache holds what the slots say, and nothing exceeds batch, context or limit."""
    fake = drafting_engine(**options)
    requests = play(fake, guests, sampler_maker(choose))
    check_replies(guests, requests, sampler_maker(choose), options["n_ctx"])


@PROPERTY
@given(guests=guest_lists, choose=texts, options=engines, quality=st.integers(0, 100),
       certainty=st.sampled_from([0.1, 3.0, 6.0, 20.0]), looks_up=st.booleans(),
       n_ctx=st.sampled_from([20, 64, 128]))
def test_the_drafts_of_a_model_change_no_reply(guests, choose, options, quality, certainty,
                                               looks_up, n_ctx):
    """Nor do those of a draft model: good or bad, sure of itself or not, with a context like
    the target's or a smaller one. It never fails, and its cache stays what its slots say."""
    def guess(prefix):
        luck = hash((prefix, "luck")) % 100
        return (choose(prefix) if luck < quality else ord("a") + luck % 5), certainty
    draft = fake_draft_model(guess, parallel=options["parallel"], n_batch=options["n_batch"],
                             n_ctx=n_ctx)
    fake = drafting_engine(draft_model=draft, looks_up=looks_up, **options)
    requests = play(fake, guests, sampler_maker(choose))
    assert fake.drafter.model is draft, "the draft model failed, and was left"
    check_replies(guests, requests, sampler_maker(choose), options["n_ctx"])


@PROPERTY
@given(guests=guest_lists, choose=texts, options=engines, code=st.sampled_from([1, -1]),
       every=st.integers(1, 4))
def test_a_batch_that_fails_for_its_drafts_costs_no_request(guests, choose, options, code, every):
    """If llama_decode refuses batches with drafts, they are computed without: the same replies."""
    fake, asked = drafting_engine(**options), [0]

    def refuse(chunks):
        asked[0] += 1
        return code if any(chunk.n_draft for chunk in chunks) and asked[0] % every == 0 else 0
    fake.context.code_for = refuse
    requests = play(fake, guests, sampler_maker(choose))
    check_replies(guests, requests, sampler_maker(choose), options["n_ctx"])


@pytest.mark.parametrize("code", [1, -1])
def test_a_single_stream_survives_a_refused_draft(code):
    """The same with one request, whose row alone would be computed."""
    fake = drafting_engine(0.0, parallel=1)
    fake.context.code_for = lambda chunks: code if any(chunk.n_draft for chunk in chunks) else 0
    request = ask(b"abcabcabc", 12, FakeSampler(lambda prefix: prefix[-3]))
    fake.submit([request])
    while fake._waiting or fake._busy():
        fake.step()
    assert result(request) == ("abc" * 4, "length") and fake._counts.n_decode_errors > 0


def test_a_text_that_repeats_itself_comes_in_few_steps():
    """Free rows are used: up to MAX_DRAFT tokens in one step."""
    fake = drafting_engine(0.0)
    request = ask(b"abcabcabc", 300, FakeSampler(lambda prefix: prefix[-3]))
    fake.submit([request])
    while fake._waiting or fake._busy():
        fake.step()
    assert result(request) == ("abc" * 100, "length")
    assert fake.context.most_drafted == drafts.MAX_DRAFT and fake._counts.n_steps < 20
    assert request.n_accepted > 270 and request.n_rejected == 0


def test_without_lookup_and_prediction_nothing_is_drafted():
    """Also for a model that cannot forget a wrong draft, whatever was predicted."""
    for can_rewind, looks_up, prediction in ((True, False, b""), (False, True, b"abcabc")):
        fake = drafting_engine(0.0)
        fake.drafter, fake.model.can_rewind = engine.Drafter(), can_rewind
        fake.model.generates, fake.model.parts = True, contextlib.ExitStack()
        drafts.equip(fake, types.SimpleNamespace(**{"draft": drafts.PROMPT_LOOKUP if looks_up else None,
                            "draft_model_path": None}))
        request = ask(b"abcabcabc", 30, FakeSampler(lambda prefix: prefix[-3]),
                      prediction=prediction)
        fake.submit([request])
        while fake._waiting or fake._busy():
            fake.step()
        assert result(request) == ("abc" * 10, "length") and fake.context.n_drafted == 0


def test_an_image_is_never_drafted():
    """Its ids are negative; the text before one stood there before, and ends the draft."""
    ids = np.array([-5, -6, -7], np.int32)
    text = np.frombuffer(b"see this:", np.uint8).astype(np.int32)
    prompt = np.concatenate([text, ids, text])[:-1]
    lookup = drafts.PromptLookup(prompt)
    for token in b":":
        lookup.feed(token)
    assert lookup.n_matched and list(lookup.guesses()) == []
    fake = drafting_engine(0.0)
    fake.prefixes.store = engine.PrefixStore()  # a fake context's states are bytes
    request = ask(b"x", 40, FakeSampler(lambda prefix: b"see this:"[len(prefix) % 9]))
    request.prompt = prompt
    request.images = {9: engine.Piece(ids, np.zeros((3, 1), np.float32))}
    fake.submit([request])
    while fake._waiting or fake._busy():  # RowContext looks at each draft
        fake.step()
    assert result(request)[1] == "length" and request.n_accepted > 0


def test_long_prompts_at_once_do_not_end_the_draft_model():
    """It is asked when the others are done, and then reads in pieces, as its batch holds them."""
    def choose(prefix):
        return ord("a") + hash(prefix) % 3
    draft = fake_draft_model(lambda prefix: (choose(prefix), 20.0), parallel=3, n_batch=16)
    fake = drafting_engine(0.0, draft, looks_up=False, parallel=3, n_batch=256)
    asked = [ask(bytes([letter]) * 60, n, FakeSampler(choose)) for letter, n in
             ((b"x"[0], 5), (b"y"[0], 9), (b"z"[0], 50))]
    for request in asked:
        fake.submit([request])
    while fake._waiting or fake._busy():
        fake.step()
    assert fake.drafter.model is draft
    assert asked[-1].n_accepted > 20


# ==== 2. The rule =========================================================================

MAX_SLOWDOWN = 1.03  # what is promised


def after(outcomes):
    """A lookup whose guesses for matches of two tokens came true or not, and its odds of it."""
    lookup = drafts.PromptLookup(np.array([1, 2, 3], dtype=np.int32))
    for outcome in outcomes:
        lookup._next, lookup.n_matched = 2, 2
        lookup._tokens[2] = 3
        lookup.feed(3 if outcome else 4)
        assert all(0 <= odds <= 1 for odds in lookup._odds)
    return lookup


def test_odds_begin_with_the_length_of_the_match_and_follow_what_happens():
    """Of each length apart; the longer, the better."""
    fresh = after([])._odds
    assert fresh == sorted(fresh) and fresh[0] < 0.4 and fresh[-1] > 0.95
    right, wrong = after([True] * 100)._odds, after([False] * 100)._odds
    of_two = (2).bit_length()
    assert right[of_two] > 0.93 and wrong[of_two] < 0.07
    assert right[of_two + 1 :] == wrong[of_two + 1 :] == fresh[of_two + 1 :]
    assert after([True] * 100 + [False] * 100)._odds[of_two] < 0.07  # the world may change


@given(outcomes=st.lists(st.booleans(), max_size=60))
@settings(database=None, deadline=None)
def test_odds_are_always_a_probability(outcomes):
    after(outcomes)


def noisy_price(seed=1, n=400, base=0.010, row=0.005):
    """A Price that has seen decodes of mostly one row, with 10 % of noise."""
    noise, price = random.Random(seed), drafts.Price()
    for _ in range(n):
        rows = noise.choice([1, 1, 1, 2, 3, 5, 8])
        price.note(rows, rows - 1, (base + row * rows) * noise.uniform(0.9, 1.1))
    return price


@pytest.mark.parametrize("seed", range(5))
def test_a_price_is_found_among_noisy_decodes(seed):
    """A row is a third of a decode of one row."""
    assert noisy_price(seed).of(1) == pytest.approx(1 / 3, rel=0.3)


@pytest.mark.parametrize("rows", [1, 8])
def test_a_price_survives_a_decode_that_took_a_thousand_times_as_long(rows):
    """The machine slept; the price is hardly moved, and soon back."""
    price = noisy_price()
    price.note(rows, rows - 1, 1000 * (0.010 + 0.005 * rows))
    assert price.of(1) < 0.5
    for _ in range(60):
        for each in (1, 1, 4):
            price.note(each, each - 1, 0.010 + 0.005 * each)
    assert price.of(1) == pytest.approx(1 / 3, rel=0.3)


def test_a_price_that_was_too_high_is_forgotten():
    """Else nothing would be drafted any more, and nothing learned."""
    price = noisy_price(row=0.0)
    for _ in range(50):
        price.note(2, 1, 1.0)
    assert price.of(1) > 0.9
    for _ in range(500):
        price.note(1, 0, 0.010)
    assert price.of(1) < 0.6


@given(decodes=st.lists(st.tuples(st.integers(1, 300), st.integers(0, 300), st.floats(0, 100)),
                        min_size=1))
@settings(database=None, deadline=None)
def test_a_price_is_never_negative(decodes):
    price = drafts.Price()
    for n, n_draft, seconds in decodes:
        price.note(n + n_draft, n_draft, seconds)
        assert all(price.of(n) >= 0 for n in (1, 8, 300))


def test_without_decodes_nothing_is_drafted():
    drafter = drafts.Drafts(True)
    [slot] = decoding_slots(1)
    slot.request.drafting.lookup = Sure(0.99)
    assert drafter.drafts([slot], 0, 100).get(slot, []) == []


class Sure:
    """A lookup that always knows what follows, with the same odds."""

    n_matched = 99

    def __init__(self, odds):
        self.odds = odds

    def guesses(self):
        return zip(itertools.repeat(5), itertools.repeat(self.odds))


def decoding_slots(n):
    slots = [engine.Slot(i, 64) for i in range(n)]
    for slot in slots:
        slot.request = engine.Request(np.array([1], np.int32), None, 1000)
        slot.request.drafting = drafts.Drafting(None)
        slot.request.n_generated, slot.next_token = 1, 7
    return slots


def drafted(price, n_slots, odds, n_prefill=0, room=2000, n_drafting=None):
    """The lengths of the drafts."""
    drafter, slots = drafts.Drafts(True), decoding_slots(n_slots)
    drafter.price = SetPrice(price)
    for slot in slots[:n_drafting]:
        slot.request.drafting.lookup = Sure(odds)
    found = drafter.drafts(slots, n_prefill, room)
    return [len(found.get(slot, ())) for slot in slots]


def test_what_odds_and_rows_are_worth_is_drafted():
    """Nothing at bad odds; all that there is room for where rows are free; the better the odds,
    the more."""
    def length(*arguments, **options):
        return drafted(*arguments, **options)[0]
    assert length(0.5, 1, 0.3) == 0
    assert length(1.0, 1, 0.99) == 0  # a row costs a decode
    assert length(0.0, 1, 0.9) == drafts.MAX_DRAFT and length(0.0, 1, 0.9, room=9) == 9
    lengths = [length(0.1, 1, odds) for odds in (0.1, 0.5, 0.8, 0.9, 0.99)]
    assert lengths == sorted(lengths) and lengths[0] == 0 < lengths[1] and lengths[-1] > 6
    assert length(0.1, 1, 0.9, n_prefill=8) == 0  # whose slots would wait, and gain nothing


@pytest.mark.parametrize("price", [0.0, 0.05, 0.1, 0.3, 0.6])
@pytest.mark.parametrize("odds", [0.3, 0.6, 0.9, 0.99])
@pytest.mark.parametrize("n_slots", [1, 4])
def test_no_other_length_promises_more(price, odds, n_slots):
    """Tokens by seconds: with the margin left out of account, within a row of the best."""
    lengths = drafted(price, n_slots, odds)
    assert len(set(lengths)) == 1

    def speed(n):
        return sum(odds**k for k in range(n + 1)) / (1 + price * (n_slots * (n + 1) - 1))
    best = max(range(drafts.MAX_DRAFT + 1), key=speed)
    assert speed(lengths[0]) >= 0.95 * speed(best) and (lengths[0] <= best or price == 0)


@pytest.mark.parametrize("price", [0.002, 0.02, 0.1, 0.5])
@pytest.mark.parametrize("n_others", [1, 3, 8])
def test_those_without_drafts_become_slower_by_at_most_three_percent(price, n_others):
    n_drafted = sum(drafted(price, n_others + 1, 0.95, n_drafting=1))
    without = 1 + price * n_others
    assert without + price * n_drafted <= MAX_SLOWDOWN * without + 1e-9
    assert n_drafted > 0 or price > 0.002


def test_nothing_is_drafted_behind_the_last_token_of_a_reply():
    """The last one needs no draft behind it."""
    drafter, slots = drafts.Drafts(True), decoding_slots(1)
    drafter.price, slots[0].request.drafting.lookup = SetPrice(0.0), Sure(0.9)
    slots[0].request.max_tokens = 5  # of which one is there
    assert drafter.drafts(slots, 0, 100)[slots[0]] == [5, 5, 5]


def test_a_draft_model_is_asked_only_while_one_reply_is_written():
    """Its guesses are decodes, which others would wait for."""
    draft = fake_draft_model(lambda prefix: (ord("b"), 20.0), parallel=2)
    fake = drafting_engine(0.0, draft, looks_up=False, parallel=2)
    long, short = (ask(b"aaaa", n, FakeSampler(lambda prefix: ord("b"))) for n in (60, 9))
    for request in (long, short):
        fake.submit([request])
    fake.step()
    while len(fake._busy()) == 2:
        fake.step()
    assert fake.context.n_drafted == 0 and short.n_generated == 9
    while fake._busy():
        fake.step()
    assert long.n_accepted > 20


class Clock:
    """The engine's seconds, which pass in decodes only."""

    def __init__(self, monkeypatch):
        self.now = 0.0
        for module in (engine, drafts):
            monkeypatch.setattr(module, "time", types.SimpleNamespace(
                perf_counter=lambda: self.now, monotonic=time.monotonic, sleep=time.sleep))

    def times(self, context, base, row):
        """Let the decodes of a context take base + row * rows seconds."""
        decode = context.decode

        def timed(chunks):
            self.now += base + row * sum(len(chunk.tokens) for chunk in chunks)
            return decode(chunks)
        context.decode = timed


def timed_engine(draft_model=None, **options):
    """An engine that learns its prices by the clock."""
    fake = engine.Engine(FakeModel(), RowContext(**options))
    fake.drafter = drafts.Drafts(draft_model is None, draft_model)
    return fake


def seconds_of(clock, fake, requests):
    """What the steps take from the first step in which nobody prefills."""
    for request in requests:
        fake.submit([request])
    while fake._waiting or any(slot.is_prefilling for slot in fake._slots):
        fake.step()
    began = clock.now
    while fake._busy():
        fake.step()
    return clock.now - began


def contrary(request, n_letters=3):
    """A text in which every pair has stood before, and never goes on as it did."""
    def choose(prefix):
        guess = next(request.drafting.lookup.guesses(), (0, 0))[0]
        letters = [letter for letter in range(97, 97 + n_letters) if letter != guess]
        return letters[hash(prefix) % len(letters)]
    return choose


@pytest.mark.parametrize("row", [0.0001, 0.001, 0.005, 0.02])
@pytest.mark.parametrize("n_slots", [1, 4])
def test_lookups_that_never_come_true_cost_three_percent_at_most(monkeypatch, row, n_slots):
    """Over 500 tokens, whatever a row costs beside a decode's 10 ms."""
    clock = Clock(monkeypatch)
    fake = timed_engine(n_ctx=600)
    clock.times(fake.context, 0.010, row)
    asked = []
    for number in range(n_slots):
        request = ask(b"%d: " % number + b"abcacbbca" * 4, 501, None)
        request.sampler = FakeSampler(contrary(request))
        asked.append(request)
    seconds = seconds_of(clock, fake, asked)
    assert fake._counts.n_accepted == 0
    assert seconds <= MAX_SLOWDOWN * 500 * (0.010 + row * n_slots)


@pytest.mark.parametrize("row, faster", [(0.0001, 4), (0.001, 2.5), (0.005, 1.3)])
def test_a_text_that_repeats_itself_takes_less_time(monkeypatch, row, faster):
    """By the clock: the pace is learned from the decodes alone."""
    clock = Clock(monkeypatch)
    fake = timed_engine(n_ctx=600)
    clock.times(fake.context, 0.010, row)
    sentence = b"The same sentence comes again and again. "
    request = ask(sentence * 2, 401, FakeSampler(lambda prefix: prefix[-len(sentence)]))
    seconds = seconds_of(clock, fake, [request])
    assert 400 * (0.010 + row) / seconds > faster


@pytest.mark.parametrize("certainty", [0.1, 20.0])
def test_a_draft_model_that_is_always_wrong_is_left_alone(monkeypatch, certainty):
    """Its own time counts too: over 500 tokens three percent are lost, and what the first of them
    took, from which it was learned."""
    clock = Clock(monkeypatch)
    draft = fake_draft_model(lambda prefix: (ord("?"), certainty), parallel=1, n_ctx=600)
    fake = timed_engine(draft, parallel=1, n_ctx=600)
    clock.times(fake.context, 0.010, 0.001)
    clock.times(draft._context, 0.001, 0.0)
    request = ask(b"Once", 1001, FakeSampler(lambda prefix: 97 + hash(prefix) % 26))
    fake.submit([request])
    marks = []
    while fake._waiting or fake._busy():
        fake.step()
        marks.append((request.n_generated, clock.now))
    assert fake._counts.n_accepted == 0
    [middle] = [now for n, now in marks if n == 501]
    assert marks[-1][1] - middle <= MAX_SLOWDOWN * 500 * 0.011


def test_a_draft_model_that_failed_is_tried_again(monkeypatch):
    """A text may come to what the draft model knows: then it drafts again, though whatever it was
    sure of has been wrong for long."""
    clock = Clock(monkeypatch)
    draft = fake_draft_model(lambda prefix: (97, 20.0), parallel=1, n_ctx=1400)
    fake = timed_engine(draft, parallel=1, n_ctx=1400)
    clock.times(fake.context, 0.010, 0.001)
    clock.times(draft._context, 0.001, 0.0)
    request = ask(b"Once", 1300, FakeSampler(
        lambda prefix: 98 + hash(prefix) % 20 if len(prefix) < 300 else 97))
    seconds_of(clock, fake, [request])
    assert request.n_accepted > 500


def test_a_good_draft_model_makes_a_reply_faster(monkeypatch):
    clock = Clock(monkeypatch)

    def choose(prefix):
        return 97 + hash(prefix) % 26
    draft = fake_draft_model(lambda prefix: (choose(prefix), 20.0), parallel=1, n_ctx=600)
    fake = timed_engine(draft, parallel=1, n_ctx=600)
    clock.times(fake.context, 0.010, 0.001)
    clock.times(draft._context, 0.001, 0.0)
    request = ask(b"Once", 301, FakeSampler(choose))
    assert 300 * 0.011 / seconds_of(clock, fake, [request]) > 2


# ==== 3. The real model ===================================================================

PARAGRAPH = ("The river rises in the hills above the old mill, and on its way to the sea it passes "
             "three small towns. In the first of them a baker sells dark bread to the boatmen.")
STORY = [{"role": "user", "content": "Tell me a story of a fox."}]
COPY = [{"role": "user",
         "content": f"Repeat the following text exactly, word for word:\n\n{PARAGRAPH}"}]
NAMED = {"type": "json_schema", "json_schema": {"name": "towns", "schema": {
    "type": "object", "additionalProperties": False, "required": ["towns"],
    "properties": {"towns": {"type": "array", "minItems": 4, "maxItems": 4,
                             "items": {"const": "three small towns"}}}}}}


@contextlib.contextmanager
def serving(**options):
    """A server in this process with its default model; a row costs a tenth of a decode, whatever
    else the machine does."""
    running = server.Server(conftest.config(**{
        "port": 0, "n_ctx": 512, "parallel": 4, "n_batch": 32, "n_threads": 1, **options}))
    threading.Thread(target=running.serve_forever, args=(0.02,), daemon=True).start()
    running.models.start()
    try:
        running.engine = running.models.loaded()[0].engine
        running.engine.drafter.price = SetPrice(0.1)
        yield running
    finally:
        assert running.drain()


@pytest.fixture(scope="module")
def with_drafts():
    with serving() as running:
        yield running


@pytest.fixture(scope="module")
def without_drafts():
    with serving(draft=None) as running:
        yield running


def chat(running, messages=COPY, **body):
    """The reply to a chat, or the chunks of its stream; greedy."""
    body = {"messages": messages, "temperature": 0, "max_tokens": 45, **body}
    response = post(running, CHAT, **body)
    assert response.status_code == 200, response.text
    if not body.get("stream"):
        reply = response.json()
        assert reply["usage"]["total_tokens"] < 250, "too long for exact results"
        return reply
    lines = [line[6:] for line in response.text.splitlines() if line.startswith("data: ")]
    assert lines.pop() == "[DONE]"
    return [json.loads(line) for line in lines]


def accepted(usage) -> int:
    return usage["completion_tokens_details"]["accepted_prediction_tokens"]


def flattened(value, path=()) -> dict:
    """The leaves of a JSON value by their paths."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(
        value, list) else None
    if items is None:
        return {path: value}
    return {leaf: inner for key, part in items
            for leaf, inner in flattened(part, (*path, key)).items()}


def same(one, other):
    """Whether replies have the same choices: log-probabilities as good as equal, all else equal."""
    ones, others = flattened(one), flattened(other)
    assert ones.keys() == others.keys()
    for path, value in ones.items():
        if path[-1] == "logprob":
            assert value == pytest.approx(others[path], abs=1e-4), path
        else:
            assert value == others[path], path


WAYS = {
    "plain": {},
    "a limit within a draft": {"max_tokens": 23},
    "stop at a word's end": {"stop": [" three"]},
    "stop within a token": {"stop": ["ree sm", "zzz"], "logprobs": True},
    "logprobs": {"logprobs": True, "top_logprobs": 3, "max_tokens": 20},
    "two choices": {"n": 2, "max_tokens": 20},
    "seeded": {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.1, "seed": 3},
    "seeded, two choices": {"temperature": 0.7, "top_p": 0.9, "n": 2, "seed": 5,
                            "max_tokens": 20},
    "grammar": {"grammar": 'root ::= "The river rises in the hills" [^\\n]{0,90} "."',
                "max_tokens": 25},
    "schema": {"response_format": NAMED, "max_tokens": 32},
    "bias": {"logit_bias": {"28": -100, "282": -3}, "max_tokens": 20},
    "no end before": {"min_tokens": 44, "max_tokens": 46},
    "penalties": {"frequency_penalty": 0.1, "presence_penalty": 0.1, "repeat_penalty": 1.02,
                  "max_tokens": 20},
}


@pytest.mark.parametrize("way", WAYS)
def test_a_copied_text_is_the_same_with_and_without_drafts(with_drafts, without_drafts, way):
    """Text, finish_reason and log-probabilities. (Fewer than 250 tokens: see "On exactness".)"""
    one, other = (chat(running, **WAYS[way]) for running in (with_drafts, without_drafts))
    same(one["choices"], other["choices"])
    assert one["usage"]["completion_tokens"] == other["usage"]["completion_tokens"]
    assert accepted(one["usage"]) > 0 == accepted(other["usage"]), "nothing was tested"
    assert other["usage"]["completion_tokens_details"]["rejected_prediction_tokens"] == 0


@pytest.mark.parametrize("way", ["stop within a token", "two choices"])
def test_a_stream_is_cut_into_the_same_pieces_with_and_without_drafts(with_drafts, without_drafts,
                                                                      way):
    """A drafted run arrives token by token, as the others do. (Fewer than 250 tokens.)"""
    streams = []
    for running in (with_drafts, without_drafts):
        chunks = chat(running, stream=True, stream_options={"include_usage": True}, **WAYS[way])
        by_choice = {}
        for chunk in chunks:
            for choice in chunk["choices"]:
                by_choice.setdefault(choice["index"], []).append(choice)
        streams.append((by_choice, accepted(chunks[-1]["usage"])))
    (one, n_one), (other, n_other) = streams
    assert n_one > 0 == n_other
    for index in other:
        same(one[index], other[index])


def test_most_of_a_copy_is_drafted_and_the_metrics_say_so(with_drafts):
    """More than half of the reply."""
    def count(outcome):
        text = get(with_drafts, "/metrics").text
        return int(float(re.search(rf"(?m)^\w*{outcome}_draft_tokens_total (\S+)$", text)[1]))
    before = count("accepted"), count("rejected")
    usage = chat(with_drafts)["usage"]
    assert accepted(usage) > usage["completion_tokens"] / 2
    assert count("accepted") - before[0] == accepted(usage)
    assert count("rejected") - before[1] == \
        usage["completion_tokens_details"]["rejected_prediction_tokens"]


def test_copies_in_company_are_drafted_and_the_same(with_drafts):
    """Four at once, of which two are no copies: all as they are alone."""
    asked = [{"max_tokens": 30}, {"messages": STORY, "max_tokens": 20}, {"max_tokens": 25},
             {"messages": STORY, "max_tokens": 20, "temperature": 1.0, "seed": 2}]
    apart = [chat(with_drafts, **body)["choices"] for body in asked]
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda body: chat(with_drafts, **body)["choices"], asked))
    same(together, apart)


# ==== 4. Predictions ======================================================================

def predicted(content) -> dict:
    return {"prediction": {"type": "content", "content": content}}


@pytest.fixture(scope="module")
def story(without_drafts) -> str:
    reply = chat(without_drafts, STORY, max_tokens=40)
    return reply["choices"][0]["message"]["content"]


def test_a_predicted_reply_comes_from_its_prediction_up_to_the_change_and_after(
        without_drafts, story):
    """Also where nothing is looked up (draft: null). As a text or as parts."""
    words = story.split(" ")
    changed = " ".join([*words[:9], "SOMETHING", "ELSE", *words[11:]])
    for content in (changed, [{"type": "text", "text": changed[:50]},
                              {"type": "text", "text": changed[50:]}]):
        reply = chat(without_drafts, STORY, max_tokens=40, **predicted(content))
        assert reply["choices"][0]["message"]["content"] == story
        assert accepted(reply["usage"]) > 20
        assert reply["usage"]["completion_tokens"] == 40


@pytest.mark.parametrize("content", ["", " ", [], "Something that has nothing to do with it. " * 9,
                                     "<|im_end|><|im_end|>", "🦊漢字\0", None])
def test_a_prediction_never_changes_the_reply(with_drafts, without_drafts, story, content):
    """Empty, wrong, odd or the reply itself."""
    content = story if content is None else content
    running = with_drafts if content == story else without_drafts
    reply = chat(running, STORY, max_tokens=40, **predicted(content))
    assert reply["choices"][0]["message"]["content"] == story


@pytest.mark.parametrize("prediction, param", [
    ("a text", "prediction"), (["a"], "prediction"), ({}, "prediction"),
    ({"type": "content"}, "prediction.content"), ({"content": "a"}, "prediction.type"),
    ({"type": "text", "content": "a"}, "prediction.type"),
    ({"type": "content", "content": 7}, "prediction.content"),
    ({"type": "content", "content": ["a"]}, "prediction.content[0]"),
    ({"type": "content", "content": [{"type": "text", "text": 7}]}, "prediction.content[0].text"),
    ({"type": "content", "content": [{"type": "image_url", "image_url": {
        "url": "data:image/png;base64,AAAA"}}]}, "prediction.content"),
    ({"type": "content", "content": "word " * 600}, "prediction"),
    ({"type": "content", "content": "x" * 500_000}, "prediction"),
])
def test_a_wrong_prediction_is_400_and_named(without_drafts, prediction, param):
    response = post(without_drafts, CHAT, messages=STORY, prediction=prediction, max_tokens=1)
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert error["param"].startswith("prediction") and "prediction" in error["message"]
    assert error["param"] == param or param == "prediction"


# ==== 5. Draft models =====================================================================


@pytest.fixture(scope="module")
def gguf():
    return conftest.default_model()


@pytest.fixture(scope="module")
def degraded(gguf, tmp_path_factory):
    path = tmp_path_factory.mktemp("draft") / "degraded.gguf"
    make_deep_model.make_degraded(gguf, path)
    return path


@contextlib.contextmanager
def loaded(gguf, **options):
    """An engine for which rows and the draft model's time cost nearly nothing."""
    context_options = {"n_batch": 32, "n_threads": 1}
    settings = {**context_options, "n_ubatch": 32, "flash_attn": "auto", "draft": None,
                "draft_model_path": None, "draft_n_ctx": 0, "draft_n_gpu_layers": 0,
                "house": conftest.house(), **options}
    running = engine.load_engine(gguf, n_ctx=512, parallel=2, n_gpu_layers=0, prefill_chunk=32,
                                 max_queue=9, **context_options,
                                 equip=lambda loaded: drafts.equip(
                                     loaded, types.SimpleNamespace(**settings)))
    running.drafter.price = SetPrice(0.05)
    try:
        yield running
    finally:
        assert running.close()
        running.model.close()


def write(running, text, n=24, **params) -> tuple[str, engine.Request]:
    tokens = running.model.tokenize(running.model.render_chat([{"role": "user", "content": text}]))
    sampler = engine.Sampler(running.model, engine.SamplingParams(**{"temperature": 0, **params}),
                             running.n_ctx, tokens)
    request = engine.Request(tokens, sampler, n)
    running.submit([request])
    text = ""
    while not (event := request.events.get(timeout=60)).finish_reason:
        assert not event.error, event.error
        text += event.text
    assert len(tokens) + request.n_generated < 250
    return text + event.text, request


@pytest.fixture(scope="module")
def plain_replies(gguf):
    with loaded(gguf) as running:
        return [write(running, "Tell me a story of a fox.")[0],
                write(running, "Tell me a story of a fox.", temperature=1.0, seed=4)[0]]


@pytest.mark.parametrize("draft", ["itself", "degraded"])
def test_a_draft_model_changes_no_reply(gguf, degraded, plain_replies, draft):
    """Greedy and seeded; what drafts for itself is nearly always right."""
    with loaded(gguf, draft_model_path=str(gguf if draft == "itself" else degraded)) as running:
        replies = [write(running, "Tell me a story of a fox."),
                   write(running, "Tell me a story of a fox.", temperature=1.0, seed=4)]
        assert [text for text, _ in replies] == plain_replies
        greedy = replies[0][1]
        share = greedy.n_accepted / (greedy.n_accepted + greedy.n_rejected)
        assert share > (0.9 if draft == "itself" else 0.2) and greedy.n_accepted > 2
        assert running.drafter.model, "it has failed"


def test_a_draft_model_lets_go_of_a_finished_request():
    """It holds a sampler, and with that perhaps a grammar."""
    draft = fake_draft_model(lambda prefix: (ord("b"), 20.0), parallel=1, n_ctx=64)
    fake = drafting_engine(0.0, draft_model=draft, looks_up=False, parallel=1, n_ctx=64)
    request = ask(b"aaaa", 12, FakeSampler(lambda prefix: ord("b")))
    fake.submit([request])
    while fake._waiting or fake._busy():
        fake.step()
    assert request.n_accepted > 3
    gone = weakref.ref(request)
    del request
    gc.collect()
    assert gone() is None


def test_choices_share_what_is_looked_up_in_their_prompt():
    """The table of a long prompt is made once; what each choice writes stays its own."""
    prompt = np.array([1, 2, 3, 1], dtype=np.int32)
    choices = [engine.Request(prompt, None, 9) for _ in range(2)]
    drafting_engine(0.0).drafter.prepare(choices)
    first, second = (choice.drafting.lookup for choice in choices)
    assert first._before is second._before
    first.feed(2)
    assert [token for token, _ in itertools.islice(first.guesses(), 2)] == [3, 1]
    assert second.n_matched == 0 and len(second._tokens) == 4
    second.feed(9)
    assert second.n_matched == 0 and first.n_matched == 2


def test_a_draft_model_with_a_small_context_stops_drafting_at_its_end(gguf, degraded,
                                                                      plain_replies):
    with loaded(gguf, draft_model_path=str(degraded), draft_n_ctx=50) as running:
        text, request = write(running, "Tell me a story of a fox.")
        assert text == plain_replies[0] and running.drafter.model
        assert 0 < request.n_accepted and request.n_prompt < 45
        most = running.drafter.model._slots[0].n_cached
        assert most <= 50 < request.n_prompt + request.n_generated


def test_a_draft_model_with_another_vocabulary_is_refused_by_its_token(gguf, tmp_path):
    """One token's text differs: the message names the files and that token."""
    token, content = 28000, gguf.read_bytes()
    model = engine.Model(gguf, n_gpu_layers=0)
    text = engine.lib.llama_vocab_get_text(model.vocab, token)
    where = content.index(len(text).to_bytes(8, "little") + text) + 8
    other = bytes([text[0] ^ 1]) + text[1:]
    path = tmp_path / "other.gguf"
    path.write_bytes(content[:where] + other + content[where + len(text):])
    def load_draft_model(path, target):
        context = types.SimpleNamespace(n_ctx=64, parallel=1)
        return drafts.load_draft_model(
            str(path), types.SimpleNamespace(model=target, context=context),
            types.SimpleNamespace(draft_n_ctx=64, draft_n_gpu_layers=0, n_batch=64, n_ubatch=64,
                                  n_threads=1, flash_attn="auto", house=conftest.house()))
    try:
        with pytest.raises(engine.ModelError) as caught:
            load_draft_model(path, model)
        for part in (str(path), str(gguf), f"token {token}", repr(text), repr(other)):
            assert part in str(caught.value)
    finally:
        model.close()


def test_a_server_refuses_an_unusable_draft_model_in_one_sentence(tmp_path):
    """Missing, no model, or one that writes nothing: exit code 2, and the file's name."""
    bert = write_bert(tmp_path / "bert.gguf", POOLING["mean"])
    text = tmp_path / "text.gguf"
    text.write_text("This is not a model")
    words = {str(tmp_path / "missing.gguf"): ["draft_model_path", "not found"],
             str(text): ["not a GGUF file"],
             str(bert): ["draft_model_path", "cannot draft", "embeddings only"]}
    processes = []
    for number, path in enumerate(words):
        file = tmp_path / f"{number}.yaml"
        file.write_text(conftest.with_features(f"draft_model_path: {path}\nn_ctx: 256\n"))
        processes.append(start("--config", str(file)))
    for process, (path, parts) in zip(processes, words.items()):
        _, stderr = process.communicate(timeout=60)
        assert process.returncode == 2
        assert stderr.startswith("error: ") and stderr.count("\n") == 1
        assert all(part in stderr for part in [path, *parts]), stderr


def test_a_models_entry_has_a_draft_model_of_its_own(gguf, degraded):
    """It drafts for that one only; the reply is the same."""
    entries = {"fast": conftest.entry(model_path=str(gguf), draft_model_path=str(degraded)),
               "slow": conftest.entry(model_path=str(gguf))}
    with serving(models=entries, n_ctx=256, max_loaded=2, draft=None) as running:
        replies = []
        for name in entries:
            assert chat(running, STORY, model=name, max_tokens=1)
            by_name = {model.name: model.engine for model in running.models.loaded()}
            drafter = by_name[name].drafter
            assert bool(drafter.model) == (name == "fast")
            drafter.price = SetPrice(0.02)
            replies.append(chat(running, STORY, model=name, max_tokens=20))
        same(replies[0]["choices"], replies[1]["choices"])
        assert accepted(replies[0]["usage"]) > 2 and accepted(replies[1]["usage"]) == 0


# ==== 6. Settings =========================================================================


def read(tmp_path, text="", **environ) -> server.Config:
    file = tmp_path / "config.yaml"
    file.write_text(conftest.with_features(text))
    return server.load_config(["--config", str(file)], environ)


def test_drafts_are_looked_up_unless_null_is_said(tmp_path):
    assert read(tmp_path).draft == drafts.PROMPT_LOOKUP
    assert read(tmp_path, "draft: prompt-lookup").draft == drafts.PROMPT_LOOKUP
    assert read(tmp_path, "model:\n  draft: null").draft is None
    assert read(tmp_path, DRAFT="null").draft is None
    assert read(tmp_path, "draft: null", DRAFT="prompt-lookup").draft == drafts.PROMPT_LOOKUP
    assert read(tmp_path, DRAFT="").draft == drafts.PROMPT_LOOKUP


def test_null_in_the_file_is_no_limit_of_a_reply(tmp_path):
    """It is not the default, which has one."""
    assert read(tmp_path).max_tokens == 1024
    assert read(tmp_path, "generation:\n  max_tokens: null").max_tokens is None
    assert read(tmp_path, MAX_TOKENS="null").max_tokens is None
    with serving(max_tokens=None, n_ctx=64, parallel=1) as running:
        body = {"messages": STORY, "temperature": 0, "ignore_eos": True}
        usage = post(running, CHAT, **body).json()["usage"]
        assert usage["total_tokens"] == 64


@pytest.mark.parametrize("text, words", [
    ("draft: lookup", "draft: expected 'prompt-lookup', got \"lookup\""),
    ("draft: true", "draft: expected 'prompt-lookup'"),
    ("draft: 5", "draft: expected 'prompt-lookup'"),
    ("draft_n_ctx: -1", "draft_n_ctx must be between 0"),
    ("draft_n_gpu_layers: -2", "draft_n_gpu_layers must be between -1"),
    ("draft_model_path: 7", "draft_model_path: expected a string"),
    ("cache_ram_mib: -1", "cache_ram_mib must be between 0"),
    ("cache_ram_mib: lots", "cache_ram_mib: expected a number"),
    ("models: {a: {base_url: 'http://b/v1', draft_model_path: d.gguf}}",
     "models.a: draft_model_path means nothing beside a base_url"),
])
def test_a_wrong_draft_setting_is_one_sentence(tmp_path, text, words):
    with pytest.raises(server.ConfigError) as caught:
        read(tmp_path, text)
    assert words in str(caught.value) and str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_wrong_draft_in_the_environment_names_its_variable(tmp_path):
    with pytest.raises(server.ConfigError, match="environment variable DRAFT: draft: expected"):
        read(tmp_path, DRAFT="yes please")


def test_paths_of_draft_models_are_relative_to_the_file(tmp_path):
    config = read(tmp_path, "draft_model_path: d.gguf\n"
                            "models: {a: {model_path: m.gguf, draft_model_path: e.gguf}}")
    assert config.draft_model_path == str(tmp_path / "d.gguf")
    assert config.models["a"].draft_model_path == str(tmp_path / "e.gguf")
