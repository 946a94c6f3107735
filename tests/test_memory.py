"""Prefixes that have lost their slot: kept in host memory, and brought back.

    1  the store        what stays and what goes
    2  the scheduler    on a fake context whose cells are what a reply depends on
    3  the real model   by HTTP: more conversations than slots
"""

import re
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import engine  # noqa: E402
from features import drafts, memory  # noqa: E402
from test_models import CHAT, get, listening, post  # noqa: E402
from test_server import (FakeContext, FakeModel, FakeSampler, next_byte, reply_to,  # noqa: E402
                         result, run)

PROPERTY = settings(database=None, deadline=None, print_blob=True,
                    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])

# ==== 1. The store ========================================================================


def ids(text) -> np.ndarray:
    return np.frombuffer(text if isinstance(text, bytes) else text.encode(), np.uint8).astype(
        np.int32)


class Cells:
    """A context whose slots have states of so many bytes, each of them the mark."""

    def __init__(self, n_bytes: int, mark: int = 0):
        self.state = np.full(n_bytes, mark, np.uint8)

    def state_size(self, seq_id):
        return self.state.nbytes

    def save(self, seq_id):
        return self.state


def put(store, text, n_bytes: int, mark: int = 0) -> None:
    store.put(ids(text), Cells(n_bytes, mark), 0)


def kept(store) -> list[str]:
    """The texts of a store, the oldest first."""
    return [bytes(tokens.tolist()).decode() for tokens, _ in store._entries]


def test_what_was_not_used_for_longest_goes_first():
    store = memory.MemoryStore(30)
    for text in ("one", "two", "three"):
        put(store, text, 10)
    assert kept(store) == ["one", "two", "three"] and store.n_bytes == 30 and len(store) == 3
    n, index = store.longest(ids("one more"))
    assert n == 3
    tokens, _ = store.get(index)
    assert bytes(tokens.tolist()) == b"one" and kept(store) == ["two", "three", "one"]
    put(store, "four", 15)
    assert kept(store) == ["one", "four"] and store.n_bytes == 25


def test_an_entry_that_a_newer_one_continues_goes():
    """The newer one can do all that it could."""
    store = memory.MemoryStore(100)
    for text in ("a turn", "other", "a turn and the next", "a turn"):
        put(store, text, 10)
    assert kept(store) == ["other", "a turn and the next", "a turn"]
    put(store, "a turn and the next", 20, mark=9)
    assert kept(store) == ["other", "a turn and the next"] and store.n_bytes == 30
    assert store.get(1)[1][0] == 9


def test_the_longest_shared_beginning_is_found_or_the_longest_whole_entry():
    """A part of an entry will do only if its model's cells can be cut."""
    store = memory.MemoryStore(100)
    assert store.longest(ids("anything"))[0] == 0
    for text in ("abcdefgh-tail", "abcd", "xyz"):
        put(store, text, 10)
    assert store.longest(ids("abcdefghij")) == (8, 0)
    assert store.longest(ids("abcdefghij"), whole=True) == (4, 1)
    assert store.longest(ids("ab"), whole=True)[0] == 0
    assert store.longest(ids("xyz"), whole=True) == (3, 2)
    assert store.longest(ids(""))[0] == 0


def test_room_is_what_could_be_made():
    store = memory.MemoryStore(20)
    put(store, "full", 20)
    put(store, "too large", 21)
    assert kept(store) == ["full"]
    put(store, "fits", 20)
    assert kept(store) == ["fits"]
    put(nothing := memory.MemoryStore(0), "a", 1)
    assert kept(nothing) == []


moves = st.lists(st.tuples(st.text("ab", max_size=6), st.integers(1, 40), st.booleans()),
                 max_size=40)


@PROPERTY
@given(moves=moves, max_bytes=st.integers(1, 100))
def test_a_store_never_holds_more_than_it_may_and_finds_what_it_holds(moves, max_bytes):
    """Compared with a plain list: bytes, order, what is found; a state stays with its tokens."""
    store, entries = memory.MemoryStore(max_bytes), []
    for number, (text, n_bytes, looks) in enumerate(moves):
        if looks:
            def shared(entry):
                return engine.common_prefix(ids(text), ids(entry[0]))
            n, index = store.longest(ids(text))
            assert n == max(map(shared, entries), default=0)
            if n:
                found = entries.pop(index)
                assert shared(found) == n
                entries.append(found)
                tokens, got = store.get(index)
                assert (bytes(tokens.tolist()).decode(), got[0]) == (found[0], found[2])
        else:
            put(store, text, n_bytes, number)
        if not looks and n_bytes <= max_bytes:
            entries = [entry for entry in entries if not text.startswith(entry[0])]
            while sum(entry[1] for entry in entries) + n_bytes > max_bytes:
                entries.pop(0)
            entries.append((text, n_bytes, number))
        assert kept(store) == [entry[0] for entry in entries]
        assert store.n_bytes == sum(entry[1] for entry in entries) <= max_bytes


def test_the_store_has_a_bounded_number_of_entries():
    """Each prompt is compared with all of them while the streams wait."""
    store = memory.MemoryStore(10**9)
    for number in range(store.MAX_ENTRIES + 3):
        store.put(np.array([number, 1, 2], dtype=np.int32), Cells(4), 0)
    assert len(store) == store.MAX_ENTRIES and store.n_bytes == 4 * store.MAX_ENTRIES
    assert store.longest(np.array([0, 1, 2], dtype=np.int32))[0] == 0
    assert store.longest(np.array([3, 1, 2], dtype=np.int32))[0] == 3


# ==== 2. The scheduler ====================================================================


class WindowContext(FakeContext):
    """A sliding window: what a restored slot held is good to its end only; cut before it, the slot
    lacks cells that come next, and must be empty."""

    def __init__(self, **options):
        super().__init__(**options)
        self.good_from = [0] * self.parallel  # the shortest text for which each slot has all cells

    def restore(self, seq_id, state):
        super().restore(seq_id, state)
        self.good_from[seq_id] = len(state)
        return True

    def copy(self, source, target):
        super().copy(source, target)
        self.good_from[target] = self.good_from[source]

    def trim(self, seq_id, n_keep):
        if n_keep == 0:
            self.good_from[seq_id] = 0
        elif n_keep < self.good_from[seq_id]:
            return self.trim(seq_id, 0)
        return super().trim(seq_id, n_keep)


def storing_engine(n_bytes=4096, context=None, model=None, looks_up=False, **options):
    """An engine on a fake context, whose states have one byte for each token."""
    context = context or FakeContext(**{"parallel": 2, **options})
    fake = engine.Engine(model or FakeModel(), context, 32, 99)
    fake.prefixes.store = memory.MemoryStore(n_bytes)
    if looks_up and fake.model.can_rewind:
        fake.drafter = drafts.Drafts(looks_up)
    return fake


def ask(prompt: bytes, n=4, sampler=next_byte) -> engine.Request:
    return engine.Request(ids(prompt), FakeSampler(sampler), n)


def long(text: str) -> bytes:
    return (text * 40)[:60].encode()


def answered(fake, prompt: bytes, n=4) -> engine.Request:
    """A request that has run to its end, with the reply that its prompt must have."""
    request = ask(prompt, n)
    run(fake, request)
    assert result(request) == (reply_to(prompt, n), "length")
    for slot in fake._slots:
        assert len(fake.context.cells[slot.seq_id]) == slot.n_cached
    return request


def test_a_conversation_whose_slot_was_overwritten_comes_back():
    """Its next turn computes what is new; without a store, all of it."""
    for n_bytes, n_restored in ((4096, 1), (0, 0)):
        fake = storing_engine(n_bytes)
        first = answered(fake, long("first conversation"), n=9)
        for text in ("another one", "third", "number four"):
            answered(fake, long(text))
        prompt = bytes(first.prompt.tolist()) + reply_to(long("first conversation"), 9).encode()
        second = answered(fake, prompt + b" And a second turn.")
        assert second.n_reused == (60 + 8) * n_restored
        assert fake._counts.n_restored == n_restored
        assert len(fake.prefixes.store) == (3 if n_bytes else 0)


def test_a_beginning_that_conversations_share_comes_back_too():
    """If the model's cells can be cut, a part of what was stored will do."""
    fake = storing_engine(parallel=1)
    answered(fake, long("You are a poet.") + b"one")
    answered(fake, long("Something else"))
    assert answered(fake, long("You are a poet.") + b"two").n_reused == 60
    whole = storing_engine(parallel=1, model=whole_only())
    answered(whole, long("You are a poet.") + b"one")
    answered(whole, long("Something else"))
    assert answered(whole, long("You are a poet.") + b"two").n_reused == 0


def whole_only():
    model = FakeModel()
    model.can_cut = False
    return model


def test_what_another_slot_holds_too_is_not_stored():
    fake = storing_engine(parallel=2)
    answered(fake, long("The same prompt"))
    answered(fake, long("The same prompt") + b"!")
    answered(fake, long("Another"))
    answered(fake, long("And another"))
    assert len(fake.prefixes.store) == 1


def test_a_few_tokens_are_not_worth_storing():
    fake = storing_engine(parallel=1)
    answered(fake, b"a" * (engine.MIN_SHARED_TOKENS - 4), n=4)
    answered(fake, long("Another"))
    assert len(fake.prefixes.store) == 0


def test_a_state_that_is_larger_than_the_store_is_not_taken():
    """Nor does it drive out what is there."""
    fake = storing_engine(70, parallel=1)
    fake.context.save = lambda seq_id, save=fake.context.save: (
        save(seq_id) if fake.context.state_size(seq_id) <= 70 else pytest.fail("in vain"))
    answered(fake, long("fits"))
    answered(fake, long("A very long one") + long("which does not fit"))
    answered(fake, long("Another"))
    assert len(fake.prefixes.store) == 1 and fake.prefixes.store.n_bytes == 63
    assert answered(fake, long("fits") + b"!").n_reused == 60


def test_a_slot_that_is_being_copied_is_never_restored_into():
    """llama.cpp copies with the next decode, but restores at once: FakeContext looks."""
    fake = storing_engine(parallel=3)
    for text in ("stored", "b", "c", "d"):
        answered(fake, long(text))
    idle = min(fake._slots, key=lambda slot: slot.last_used)
    source = bytes(idle.tokens[: idle.n_cached].tolist())
    copier, back = ask(source[:40] + b"another end"), ask(long("stored") + b"!")
    run(fake, copier, back)
    assert fake._counts.n_restored == 1 and back.n_reused == 60
    for request in (copier, back):
        assert result(request) == (reply_to(bytes(request.prompt.tolist()), 4), "length")
    # When all that is idle is being copied, the prompt is computed.
    for slot in fake._slots:
        fake.context.being_copied.add(slot.seq_id)
    for text in "bcd":
        run(fake, request := ask(long(text) + long("!" + text)))
        assert result(request) == (reply_to(bytes(request.prompt.tolist()), 4), "length")


def test_a_state_that_cannot_be_restored_costs_its_prefill_only():
    """llama.cpp says no, and the slot is empty."""
    fake = storing_engine(parallel=1)
    answered(fake, long("first"))
    answered(fake, long("second"))
    fake.context.restore = lambda seq_id, state: bool(fake.context.trim(seq_id, 0))
    assert answered(fake, long("first") + b"!").n_reused == 0
    assert fake._counts.n_restored == 0


@pytest.mark.parametrize("method", ["save", "state_size"])
def test_no_memory_for_a_state_costs_nothing_else(method, caplog):
    fake = storing_engine(parallel=1)

    def full(*_):
        raise MemoryError
    setattr(fake.context, method, full)
    for text in ("first", "second", "first"):
        assert answered(fake, long(text)).n_reused == 0
    assert len(fake.prefixes.store) == 0 and "cache_ram_mib" in caplog.text


def test_an_entry_that_its_own_restoring_would_drive_out_still_comes_back():
    """In a store for one, the slot's text takes the place of what goes into the slot."""
    fake = storing_engine(70, parallel=1)
    for text in ("first", "second", "first", "second", "second", "first"):
        answered(fake, long(text))
    assert fake._counts.n_restored == 3 and len(fake.prefixes.store) == 1


def test_a_failing_restore_ends_one_request_and_no_other():
    """Whatever it left in the slot is never used."""
    fake = storing_engine(parallel=1)
    answered(fake, long("first"))
    answered(fake, long("second"))
    restore = fake.context.restore

    def half(seq_id, state):
        restore(seq_id, state[:30])
        raise OSError("broken")
    fake.context.restore = half
    run(fake, bad := ask(long("first") + b"!"))
    assert "broken" in result(bad)[1]
    fake.context.restore = restore
    assert answered(fake, long("second") + b"!").n_reused in (0, 60)
    assert answered(fake, long("first") + b"?").n_reused == 60


def test_the_same_prompt_again_is_right_where_cells_cannot_be_cut():
    """All of its text is stored, and its last token is computed again: one less than is there."""
    fake = storing_engine(model=whole_only(), context=WindowContext(parallel=1))
    answered(fake, long("first"), n=1)
    answered(fake, long("second"))
    answered(fake, long("first"), n=4)


def test_a_restored_conversation_may_be_edited_where_cells_cannot_be_cut():
    """A client takes back its last message: the restored slot lacks the cells for that."""
    fake = storing_engine(model=whole_only(), context=WindowContext(parallel=1))
    answered(fake, long("first"))
    answered(fake, long("second"))
    prompt = long("first") + reply_to(long("first"), 4).encode()
    assert answered(fake, prompt + b" and a next turn").n_reused > 60
    answered(fake, prompt[:40] + b" and another middle and end")


def test_a_restored_conversation_may_be_copied_where_cells_cannot_be_cut():
    """Somebody else's prompt begins like it, but ends sooner."""
    fake = storing_engine(model=whole_only(), context=WindowContext(parallel=3))
    for text in "first", "2", "3", "4":
        answered(fake, long(text))
    prompt = long("first") + reply_to(long("first"), 4).encode()
    answered(fake, prompt + b" and a next turn")
    answered(fake, prompt[:24] + b" and an end")


conversations = st.lists(st.fixed_dictionaries({
    "who": st.integers(0, 5), "more": st.integers(1, 50), "n": st.integers(0, 20),
    "keep": st.just(1.0) | st.floats(0, 1), "beside": st.booleans(), "cancels": st.booleans()}),
    min_size=1, max_size=25)


class Refuser:
    """Makes a context's restore or save fail now and then."""

    def __init__(self, context, every):
        self.calls, self.every = 0, every
        self.restore, self.save = context.restore, context.save
        context.restore, context.save = self.may_restore, self.may_save
        self.context = context

    def fails(self):
        self.calls += 1
        return self.every and self.calls % self.every == 0

    def may_restore(self, seq_id, state):
        if self.fails():
            self.context.trim(seq_id, 0)
            return False
        return self.restore(seq_id, state)

    def may_save(self, seq_id):
        if self.fails():
            raise MemoryError
        return self.save(seq_id)


@PROPERTY
@given(turns=conversations, n_bytes=st.sampled_from([0, 60, 150, 400, 5000]),
       parallel=st.integers(1, 3), kind=st.sampled_from(["all", "no cut", "no rewind"]),
       every=st.sampled_from([0, 2, 5]), looks_up=st.booleans())
def test_every_reply_is_that_of_its_prompt(turns, n_bytes, parallel, kind, every, looks_up):
    """Conversations that go on, are taken back and end, on few slots and a small store, with
    drafts or without: the fake's next byte depends on all cells. The slots say what is there, and
    the store stays within its bytes."""
    model = FakeModel()
    model.can_cut, model.can_rewind = kind == "all", kind != "no rewind"
    fake = storing_engine(n_bytes, model=model, looks_up=looks_up, context=FakeContext(
        parallel=parallel, can_trim=model.can_rewind, n_batch=32, n_ctx=400))
    Refuser(fake.context, every)
    texts = {who: b"%d" % who * 20 if who < 3 else b"You are a helpful one." for who in range(6)}
    flying = []
    for turn in turns:
        who, text = turn["who"], texts[turn["who"]]
        text = text[: max(1, int(turn["keep"] * len(text)))] + bytes([65 + who]) * turn["more"]
        text = text[-300:]
        request = ask(text, turn["n"])
        flying.append((text, turn, request))
        fake.submit([request])
        fake.step()
        if turn["cancels"]:
            request.cancel()
        if not turn["beside"]:
            finish(fake, flying, texts)
    finish(fake, flying, texts)


def finish(fake, flying, texts):
    """Step to the end, looking at slots and store, and take the replies in."""
    for _ in range(2000):
        if not fake._waiting and not fake._busy():
            break
        fake.step()
        for slot in fake._slots:
            assert fake.context.cells[slot.seq_id] == slot.tokens[: slot.n_cached].tolist()
        assert fake.prefixes.store.n_bytes <= fake.prefixes.store._max_bytes
        assert fake.prefixes.store.n_bytes == sum(len(tokens) for tokens, _ in fake.prefixes.store._entries)
    while flying:
        text, turn, request = flying.pop()
        reply = reply_to(text, turn["n"])
        if turn["cancels"]:
            continue
        assert result(request) == (reply, "length")
        texts[turn["who"]] = text + reply.encode()


# ==== 3. The real model ===================================================================

TURNS = ["{}: what is that, who uses it, since when, and why?", "And where is it found?"]
THINGS = ["harbour", "glacier", "violin", "lantern", "meadow", "compass"]


def talk(running):
    """Six conversations in turns: (replies, tokens of the prompt, cached) of each turn."""
    chats, turns = {thing: [] for thing in THINGS}, []
    for question in TURNS:
        for thing, messages in chats.items():
            messages.append({"role": "user", "content": question.format(thing)})
            response = post(running, CHAT, messages=messages, max_tokens=10, temperature=0)
            assert response.status_code == 200, response.text
            reply = response.json()
            text, usage = reply["choices"][0]["message"]["content"], reply["usage"]
            messages.append({"role": "assistant", "content": text})
            turns.append((thing, text, usage["prompt_tokens"],
                          usage["prompt_tokens_details"]["cached_tokens"]))
    return turns


def restored(running) -> int:
    text = get(running, "/metrics").text
    return int(float(re.search(r"(?m)^\w*restored_prefixes_total (\S+)$", text)[1]))


# With at most 32 rows in a batch and fewer than 256 tokens of context, llama.cpp's results do not
# depend on the batch's shape, so greedy replies don't depend on what was cached.
SMALL = {"n_ctx": 512, "parallel": 2, "n_batch": 32, "n_threads": 1, "draft": None}


@pytest.fixture(scope="module")
def plain_turns():
    with listening({}, cache_ram_mib=0, **SMALL) as running:
        turns = talk(running)
        assert restored(running) == 0 and len(running.models.loaded()[0].engine.prefixes.store) == 0
    return turns


@pytest.mark.slow
def test_six_conversations_on_two_slots_keep_their_prefixes(plain_turns):
    """From the second turn on each has the whole prompt of the turn before; the replies are those
    of a server that stores nothing."""
    with listening({}, **SMALL) as running:
        turns = talk(running)
        assert [turn[:3] for turn in turns] == [turn[:3] for turn in plain_turns]
        assert max(n_prompt for _, _, n_prompt, _ in turns) < 240
        n = len(THINGS)
        for before, (thing, _, _, n_cached) in zip(turns, turns[n:]):
            assert before[0] == thing and n_cached >= before[2]
        assert restored(running) >= n - 1
        cached_without = sum(n_cached for *_, n_cached in plain_turns)
        assert sum(n_cached for *_, n_cached in turns) > 1.5 * cached_without


@pytest.mark.slow
def test_a_small_store_stays_small_and_changes_no_reply(plain_turns):
    """Of six conversations of some MiB, three MiB hold one or two."""
    with listening({}, cache_ram_mib=3, **SMALL) as running:
        store, most = running.models.loaded()[0].engine.prefixes.store, 0
        put = store.put

        def watched(*arguments):
            nonlocal most
            put(*arguments)
            most = max(most, store.n_bytes)
        store.put = watched
        turns = talk(running)
        assert [turn[:3] for turn in turns] == [turn[:3] for turn in plain_turns]
        assert 0 < most <= 3 * 2**20
        assert store.n_bytes == sum(state.nbytes for _, state in store._entries)
