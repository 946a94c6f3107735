"""The tests a newcomer runs: `pytest`. They need a few minutes and the default model.

    1  text            stop sequences and UTF-8, over every way a text can be split
    2  validation      JSON into dataclasses
    3  the scheduler   on a fake context whose tokens prove what its KV cache held
    4  HTTP            the real model, the real openai client, real sockets on port 0
    5  the process     settings, start, signals, exit codes
"""

import http.client
import itertools
import json
import os
import queue
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import openai
import pytest

import engine
import server

HERE = Path(__file__).resolve().parent

# ==== 1. Text =============================================================================


def splits(sequence):
    """Every way to cut a sequence into two or three pieces."""
    n = len(sequence)
    for i, j in itertools.combinations_with_replacement(range(n + 1), 2):
        yield sequence[:i], sequence[i:j], sequence[j:]


@pytest.mark.parametrize("stops, text, sent, stopped", [
    (["END"], "one END two", "one ", True),
    (["END"], "ENEND", "EN", True),
    (["END"], "ENTER EN", "ENTER EN", False),
    (["aab"], "aaab", "a", True),  # a failed match may hide the start of the next one
    (["abab", "bac"], "ababac", "", True),  # the one that ends first wins
    (["c", "bc"], "abc", "a", True),  # of two that end together, the longer one
    (["\n\n", "\n\nQ"], "x\n\nQ", "x", True),
    (["停"], "你好停止", "你好", True),
])
def test_a_stop_sequence_is_found_however_the_text_is_split(stops, text, sent, stopped):
    """Whatever the tokens' borders, the same text is sent and nothing of a stop leaks."""
    for pieces in splits(text):
        matcher, output, done = engine.StopMatcher(stops), "", False
        for piece in pieces:
            if not done:
                part, done = matcher.feed(piece)
                output += part
        assert (output + ("" if done else matcher.flush()), bool(done)) == (sent, stopped), pieces


def test_text_that_cannot_become_a_stop_is_not_held_back():
    """A stream stays live: only a possible prefix of a stop sequence waits."""
    matcher = engine.StopMatcher(["END"])
    assert matcher.feed("The E") == ("The ", "")
    assert matcher.feed("A") == ("EA", "")


def test_utf8_is_whole_however_the_bytes_are_split():
    """Emoji of several code points and CJK come out whole; garbage becomes U+FFFD; a character
    that the end of the reply cuts off is left out."""
    text = "a👩‍🚀é漢字"
    for pieces in splits(text.encode()):
        stream = engine.TextStream([])
        output = [stream.feed(piece)[0] for piece in pieces] + [stream.feed(b"", final=True)[0]]
        assert "".join(output) == text
        assert all("\ufffd" not in part for part in output)
    stream = engine.TextStream([])
    assert stream.feed(b"ab\xff" + "漢".encode()[:2])[0] == "ab\ufffd"
    assert stream.feed(b"", final=True)[0] == ""


def test_stop_sequences_and_utf8_meet_across_tokens():
    """A stop sequence of multi-byte characters is found when its bytes come one by one."""
    stream, output = engine.TextStream(["終わり"]), ""
    for byte in "はい終わりました".encode():
        text, stopped = stream.feed(bytes([byte]))
        output += text
        if stopped:
            break
    assert stopped and output == "はい"


def test_logprobs_follow_the_text_they_belong_to():
    """Tokens of a held-back text wait with it; the tokens of a stop sequence are never sent."""
    request = engine.Request(np.array([1], np.int32), None, 10, ["STOP"], n_top_logprobs=0)
    sent = []
    for number, piece in enumerate([b"go ", b"S", b"T", b"A", b" ST", b"OP"]):
        event = request.push(piece, False, engine.TokenLogprob(number, -1.0, ()))
        sent.append((event.text, [entry.token for entry in event.logprobs]))
    assert sent == [("go ", [0]), ("", []), ("", []), ("STA", [1, 2, 3]), (" ", [4]), ("", [])]
    assert event.finish_reason == "stop"


def test_token_logprob_is_log_softmax():
    logits = np.array([1.0, 3.0, 2.0, -50.0], np.float32)
    entry = engine.token_logprob(logits, 2, 2)
    exact = logits - np.log(np.exp(logits).sum())
    assert entry.logprob == pytest.approx(exact[2], abs=1e-5)
    assert [token for token, _ in entry.top] == [1, 2]
    with pytest.raises(ValueError, match="not numbers"):
        engine.token_logprob(np.full(9, np.nan, np.float32), 3, 2)


# ==== 2. Validation =======================================================================


ALONE = server.House()  # no features


def refusal(cls, body) -> server.ApiError:
    with pytest.raises(server.ApiError) as caught:
        server.read_object(cls, body, "", server.Reading(ALONE))
    assert caught.value.status == 400
    return caught.value


HI = [{"role": "user", "content": "hi"}]


@pytest.mark.parametrize("change, param, words", [
    ({"messages": None}, "messages", "got null"),
    ({"messages": []}, "messages", "at least 1"),
    ({"messages": "hi"}, "messages", 'got "hi"'),
    ({"messages": ["hi"]}, "messages[0]", "an object"),
    ({"messages": [{"role": "king", "content": "hi"}]}, "messages[0].role", "'user'"),
    ({"messages": [{"role": "user"}]}, "messages[0].content", "required"),
    ({"messages": [{"role": "user", "content": 7}]}, "messages[0].content", "a string or a list"),
    ({"messages": [{"role": "user", "content": [{"type": "input_audio"}]}]},
     "messages[0].content[0].type", "'text'"),
    ({"messages": [{"role": "user", "content": "\ud83d"}]}, "messages[0].content", "surrogate"),
    ({"temperature": "hot"}, "temperature", 'expected a number, got "hot"'),
    ({"temperature": 2.1}, "temperature", "between 0 and 2"),
    ({"temperature": True}, "temperature", "got true"),
    ({"top_p": -0.1}, "top_p", "between 0 and 1, got -0.1"),
    ({"n": 0}, "n", "between 1 and 128"),
    ({"n": 1.5}, "n", "an integer"),
    ({"max_tokens": float("inf")}, "max_tokens", "an integer"),
    ({"top_k": 2**31}, "top_k", "between -1 and 2147483647"),
    ({"max_tokens": 0}, "max_tokens", "at least 1"),
    ({"max_completion_tokens": -3}, "max_completion_tokens", "at least 1"),
    ({"stop": 5}, "stop", "a string or a list"),
    ({"stop": ["x"] * 17}, "stop", "at most 16"),
    ({"stop": ["x", ""]}, "stop[1]", '"" must be 1 to 1000 characters long'),
    ({"stop": "x" * 1001}, "stop", "must be 1 to 1000 characters long"),
    ({"seed": 2**63}, "seed", "between"),
    ({"stream": "yes"}, "stream", "true or false"),
    ({"stream_options": {"include_usage": 1}}, "stream_options.include_usage", "true or false"),
])
def test_a_wrong_field_is_refused_by_name_with_the_limit(change, param, words):
    """The message says what was sent and what is allowed; `param` says where."""
    error = refusal(server.ChatBody, {"messages": HI, **change})
    assert error.param == param
    assert words in error.message


def test_what_openai_clients_send_as_nothing_is_nothing():
    """SDKs send null for what was not set, and 4.0 for 4 from languages without integers."""
    body = {"messages": HI, "temperature": None, "stop": None, "tools": None, "functions": [],
            "modalities": ["text"], "max_tokens": 4.0}
    chat = server.read_object(server.ChatBody, body, "", server.Reading(ALONE))
    assert chat.temperature == 1 and chat.max_tokens == 4 and type(chat.max_tokens) is int


def test_unknown_fields_are_named_at_every_depth():
    reading = server.Reading(ALONE)
    server.read_object(server.ChatBody, {
        "messages": [{"role": "user", "content": "hi", "mood": "good"}], "speed": 9}, "", reading)
    assert reading.ignored == ["messages[0].mood", "speed"]


# ==== 3. The scheduler, on a fake context =================================================

END = 256  # the fake model's end-of-text token; the other tokens are bytes


def next_byte(prefix: tuple[int, ...]) -> int:
    """The fake model: the next token depends on every token before it."""
    return ord("a") + hash(prefix) % 26


def reply_to(prompt: bytes, n: int) -> str:
    """What the fake model must generate for a prompt, whatever ran beside it."""
    tokens = tuple(prompt)
    for _ in range(n):
        tokens += (next_byte(tokens),)
    return bytes(tokens[len(prompt):]).decode()


class FakeModel:
    n_vocab = 257
    can_rewind = can_cut = True
    end_tokens = frozenset([END])

    def piece(self, token):
        return bytes([token])


class FakeContext:
    """Keeps each slot's tokens where llama.cpp keeps keys and values, and checks every move."""

    def __init__(self, parallel=4, n_ctx=512, n_batch=128, can_trim=True):
        self.parallel, self.n_ctx, self.n_batch, self.can_trim = parallel, n_ctx, n_batch, can_trim
        self.cells = [[] for _ in range(parallel)]
        self.batches = []  # of each decode: [(seq_id, n_tokens, wants_logits)]
        self.copies = []
        self.being_copied = set()
        self.code_for = lambda chunks: 0  # a test's way to make decodes fail

    def decode(self, chunks):
        assert 0 < sum(len(chunk.tokens) for chunk in chunks) <= self.n_batch
        if code := self.code_for(chunks):
            return code
        self.batches.append([(c.slot.seq_id, len(c.tokens), c.wants_logits) for c in chunks])
        self.rows = []
        for chunk in chunks:
            cells = self.cells[chunk.slot.seq_id]
            assert len(cells) == chunk.slot.n_cached, "positions must be consecutive"
            cells += map(int, chunk.tokens)
            assert len(cells) <= self.n_ctx
            n_rows = 1 + chunk.n_draft
            self.rows += [tuple(cells[: len(cells) - n_rows + i + 1]) for i in range(n_rows)]
            chunk.row = len(self.rows) - 1
        self.being_copied = set()
        return 0

    def copy(self, source, target):
        self.copies.append((source, target))
        self.being_copied.add(source)
        self.cells[target] = list(self.cells[source])

    def state_size(self, seq_id):
        return len(self.cells[seq_id])

    def save(self, seq_id):
        return np.array(self.cells[seq_id], dtype=np.uint8)

    def restore(self, seq_id, state):
        assert seq_id not in self.being_copied
        self.cells[seq_id] = state.tolist()
        return True

    def trim(self, seq_id, n_keep):
        if not self.can_trim and 0 < n_keep < len(self.cells[seq_id]):
            n_keep = 0
        del self.cells[seq_id][n_keep:]
        return n_keep

    def close(self):
        self.cells = None

    def prefilled(self):
        """Prompt tokens computed so far."""
        return sum(n for batch in self.batches for _, n, _ in batch if n > 1)


class FakeSampler:
    """Chooses the next byte by a function of all bytes before."""

    def __init__(self, choose):
        self.choose = choose

    def sample(self, context, row):
        return self.choose(context.rows[row])


def fake_engine(prefill_chunk=32, max_queue=16, **options):
    return engine.Engine(FakeModel(), FakeContext(**options), prefill_chunk, max_queue)


def ask(prompt: bytes, n=4, sampler=next_byte, **options) -> engine.Request:
    tokens = np.frombuffer(prompt, np.uint8).astype(np.int32)
    return engine.Request(tokens, FakeSampler(sampler), n, **options)


def run(fake, *requests, steps=500):
    """Submit requests, and step until nothing is left to do."""
    for request in requests:
        fake.submit([request])
    for _ in range(steps):
        if not fake._waiting and not fake._busy():
            return
        fake.step()
    raise AssertionError("the engine does not come to an end")


def result(request: engine.Request):
    """(text, finish_reason or error) of a finished request."""
    text = ""
    while True:
        event = request.events.get_nowait()
        text += event.text
        if event.finish_reason or event.error:
            assert request.events.empty()
            return text, event.finish_reason or str(event.error)


def test_every_request_gets_its_own_text_in_any_company():
    """More requests than slots, of many lengths, sharing prefixes: each reply depends on its
    whole prompt, so one wrong cell in any cache would show."""
    fake = fake_engine(parallel=3)
    beginnings = [b"", b"You are a helpful assistant who answers.", b"You are a helpful poet."]
    asked = [ask(beginnings[i % 3] + b"x" * (7 * i % 50) + b"%d" % i, n=1 + i % 9)
             for i in range(15)]
    run(fake, *asked)
    for request in asked:
        prompt = bytes(request.prompt.tolist())
        assert result(request) == (reply_to(prompt, request.max_tokens), "length")


def test_a_request_joins_at_the_next_step_and_leaves_when_done():
    """Continuous batching: nobody waits for the batch of somebody else to finish."""
    fake = fake_engine()
    long, short = ask(b"long", n=20), ask(b"short", n=2)
    fake.submit([long])
    for _ in range(3):
        fake.step()
    fake.submit([short])
    fake.step()
    assert len(fake.context.batches[-1]) == 2
    fake.step()
    assert result(short)[1] == "length"
    fake.step()
    assert len(fake.context.batches[-1]) == 1 and long.n_generated == 6


def test_decode_rows_come_first_and_a_long_prompt_is_read_in_small_chunks_beside_them():
    """A stream never stalls behind a long prompt; alone, the prompt fills whole batches."""
    fake = fake_engine(prefill_chunk=32, n_batch=128)
    running, late = ask(b"run", n=50), ask(b"L" * 300, n=1)
    fake.submit([running])
    fake.step()
    fake.submit([late])
    for _ in range(10):
        fake.step()
    first_chunks = fake.context.batches[1:10]
    assert all(batch[0][1] == 1 and batch[1][1] == 32 for batch in first_chunks)
    assert running.n_generated == 11
    alone = fake_engine(prefill_chunk=32, n_batch=128)
    run(alone, ask(b"L" * 300, n=1))
    assert [batch[0][1] for batch in alone.context.batches] == [128, 128, 44]


@pytest.mark.parametrize("n_running, room", [(0, 128), (1, 32)])
def test_short_prompts_do_not_wait_for_a_long_one_which_still_moves(n_running, room):
    """The shortest rest goes first, so a short prompt has its first token within three steps; but the
    prompt that came first keeps half of the room, however many short ones come."""
    fake = fake_engine(prefill_chunk=32, n_batch=128 + n_running, n_ctx=4096)
    fake.submit([ask(b"run", n=90) for _ in range(n_running)])
    fake.step()
    long = ask(b"L" * 3000, n=1)
    fake.submit([long])
    fake.step()
    slot, = [slot for slot in fake._slots if slot.request is long]
    for number in range(8):
        before = slot.n_cached
        short = ask(b"s%d" % number * 20, n=1)
        fake.submit([short])
        for _ in range(3):
            fake.step()
        assert short.n_generated == 1 and slot.n_cached - before >= 3 * room // 2
    assert result(short)[0] == reply_to(b"s7" * 20, 1)


def test_a_conversation_computes_only_its_new_tokens():
    """Turn two finds turn one's prompt and reply in the cache; unrelated requests in between take
    other slots, as long as there are any."""
    fake = fake_engine(parallel=3)
    first = ask(b"The first turn of a long conversation.", n=8)
    run(fake, first)
    run(fake, ask(b"Somebody else", n=3), ask(b"A third one, again", n=3))
    text, _ = result(first)
    second = ask(bytes(first.prompt.tolist()) + text.encode() + b" And the second turn?", n=4)
    run(fake, second)
    assert second.n_reused == len(first.prompt) + 7  # the last token was never fed back
    assert result(second)[0] == reply_to(bytes(second.prompt.tolist()), 4)


def test_a_prefix_is_copied_from_a_running_slot():
    """The other request need not have finished, and is not disturbed."""
    fake = fake_engine()
    system = b"A system prompt that many requests have in common. "
    running, second = ask(system + b"first", n=30), ask(system + b"second", n=3)
    fake.submit([running])
    fake.step()
    fake.submit([second])
    run(fake)
    assert fake.context.copies == [(0, 1)] and second.n_reused == len(system)
    assert result(running)[0] == reply_to(system + b"first", 30)
    assert result(second)[0] == reply_to(system + b"second", 3)


def test_eight_prompts_over_one_new_prefix_prefill_it_once():
    """They arrive together, so nothing is cached yet: seven wait for the first one's prefill."""
    fake = fake_engine(parallel=8, prefill_chunk=30)
    system = b"S" * 300
    asked = [ask(system + b"%d? question" % i, n=3) for i in range(8)]
    run(fake, *asked)
    assert fake.context.prefilled() == 300 + 8 * len(b"0? question")
    for i, request in enumerate(asked):
        assert result(request)[0] == reply_to(system + b"%d? question" % i, 3)


def test_the_choices_of_one_request_share_one_prefill():
    """Also when there are more choices than slots."""
    fake = fake_engine(parallel=2)
    events = queue.SimpleQueue()
    choices = [ask(b"One prompt for all the choices", index=i, events=events) for i in range(5)]
    fake.submit(choices)
    run(fake)
    assert fake.context.prefilled() == len(choices[0].prompt)
    texts = {i: "" for i in range(5)}
    while not events.empty():
        event = events.get()
        texts[event.request.index] += event.text
    assert set(texts.values()) == {reply_to(b"One prompt for all the choices", 4)}


def test_waiting_for_a_prefix_ends_when_its_owner_is_cancelled():
    """A request that waits for another's prefill must not wait for ever."""
    fake = fake_engine(n_batch=32)
    first, second = ask(b"P" * 200 + b"1"), ask(b"P" * 200 + b"2")
    fake.submit([first])
    fake.submit([second])
    fake.step()
    assert len(fake._busy()) == 1
    first.cancel()
    run(fake)
    assert result(second) == (reply_to(b"P" * 200 + b"2", 4), "length")


def test_a_cancelled_request_never_starts_or_stops_within_a_step():
    """In the queue, in prefill and while decoding."""
    fake = fake_engine(parallel=1, n_batch=32)
    decoding, queued = ask(b"one", n=100), ask(b"two")
    fake.submit([decoding])
    fake.submit([queued])
    fake.step()
    queued.cancel()
    decoding.cancel()
    fake.step()
    assert not fake._busy() and not fake._waiting and queued.n_generated == 0
    prefilling = ask(b"L" * 200)
    fake.submit([prefilling])
    fake.step()
    prefilling.cancel()
    fake.step()
    assert not fake._busy() and len(fake.context.cells[0]) == 32


def test_a_batch_that_cannot_be_computed_fails_only_the_guilty_request():
    """One poisoned request makes llama_decode refuse the whole batch."""
    fake = fake_engine()
    fake.context.code_for = lambda chunks: -1 if any(66 in c.tokens for c in chunks) else 0
    good = [ask(b"good one"), ask(b"another good one")]
    bad = ask(b"BAD")
    run(fake, good[0], bad, good[1])
    assert result(bad) == ("", "llama_decode failed with -1")
    for request in good:
        assert result(request)[1] == "length"


def test_a_chunk_that_finds_no_room_is_retried_smaller():
    """llama_decode's code 1 says: try with fewer tokens."""
    fake = fake_engine()
    fake.context.code_for = lambda chunks: int(len(chunks[0].tokens) > 10)
    request = ask(b"Thirty tokens are too many now", n=2)
    run(fake, request)
    assert result(request)[0] == reply_to(b"Thirty tokens are too many now", 2)


def test_an_exception_while_sampling_ends_that_request_only():
    def explode(prefix):
        raise ValueError("boom")
    fake = fake_engine()
    bad, good = ask(b"bad", sampler=explode), ask(b"good")
    run(fake, bad, good)
    assert result(bad) == ("", "sampling failed: ValueError: boom")
    assert result(good) == (reply_to(b"good", 4), "length")


@pytest.mark.parametrize("nth", [0, 1, 6, 30])
@pytest.mark.parametrize("owner, method", [
    *[(FakeContext, name) for name in ("decode", "trim", "copy")], (FakeModel, "piece"),
    (FakeSampler, "sample"), (engine.Request, "push"), (engine.Request, "send"),
    (engine.PrefixCache, "place"), (engine.Slot, "stats"),
    (engine.Histogram, "add"), (engine.Histogram, "copy"),
    *[(engine.Engine, name) for name in (
        "step", "_wait_for_work", "_run_errand", "_admit", "_busy", "_fill",
        "_take_logits", "_decode_and_sample", "_sample", "_release", "_fail", "_publish",
        "_fail_everyone")]])
def test_the_engine_thread_outlives_an_exception_at_any_place(owner, method, nth, monkeypatch):
    """Wherever a step raises, once: nobody waits for ever, and the next requests are served."""
    monkeypatch.setattr(engine, "FAULT_PAUSE_SECONDS", 0.01)
    fake = fake_engine(parallel=2).start()
    real, calls = getattr(owner, method), itertools.count()

    def explode_once(*arguments):
        if next(calls) == nth:
            raise ZeroDivisionError("boom")
        return real(*arguments)

    monkeypatch.setattr(owner, method, explode_once)
    requests = [ask(b"A common beginning of all %d" % number, n=20) for number in range(4)]
    for request in requests:
        fake.submit([request])
    for request in requests:
        text = ""
        while not (event := request.events.get(timeout=5)).finish_reason and not event.error:
            text += event.text
        if event.error:
            assert "boom" in str(event.error)
        else:
            assert text + event.text == reply_to(bytes(request.prompt.astype(np.uint8)), 20)
    monkeypatch.setattr(owner, method, real)
    for number in range(3):  # in every slot
        saved = ask(b"saved %d" % number, n=1)
        fake.submit([saved])
        assert saved.events.get(timeout=5).text == reply_to(b"saved %d" % number, 1)
    assert fake.close(1) and not fake._busy()


def test_an_error_comes_after_the_text_that_was_generated_before_it():
    """The events of a step leave together, in order, also when it fails in its middle."""
    fake = fake_engine()
    request = ask(b"ends in a fault", n=20, sampler=lambda prefix: (
        next_byte(prefix) if len(prefix) < 20 else 1 / 0))
    run(fake, request)
    assert result(request) == (reply_to(b"ends in a fault", 5), "sampling failed: "
                               "ZeroDivisionError: division by zero")


def test_an_engine_stuck_in_a_step_is_left_alone_and_says_so(monkeypatch):
    """llama_decode cannot be interrupted: closing gives up after a while, health knows before."""
    monkeypatch.setattr(engine, "LAST_STEP_SECONDS", 0.2)
    fake, free = fake_engine(), threading.Event()
    fake.context.code_for = lambda chunks: int(not free.wait(10))
    fake.start().submit([ask(b"stuck")])
    time.sleep(0.1)
    assert 0 < fake.seconds_in_step() < 5 and not fake.close(drain_seconds=0)
    free.set()
    assert fake.close(drain_seconds=5)


def test_a_model_that_cannot_forget_a_part_starts_again():
    """Recurrent models: trimming in the middle loses the whole slot, never correctness."""
    fake = fake_engine(parallel=1, can_trim=False)
    run(fake, ask(b"A common beginning, first end"))
    second = ask(b"A common beginning, other end")
    run(fake, second)
    assert second.n_reused == 0
    assert result(second)[0] == reply_to(b"A common beginning, other end", 4)


def test_the_end_token_and_the_context_limit_end_a_reply():
    fake = fake_engine(n_ctx=32)
    stopped = ask(b"ends", sampler=lambda prefix: END if len(prefix) > 6 else next_byte(prefix))
    full = ask(b"x" * 30, n=100)
    run(fake, stopped, full)
    assert result(stopped) == (reply_to(b"ends", 3), "stop")
    assert result(full)[1] == "length" and full.n_generated == 2


def test_a_full_queue_and_a_closed_engine_refuse_at_once():
    fake = fake_engine(max_queue=2)
    fake.submit([ask(b"1"), ask(b"2"), ask(b"3")])  # an empty queue takes all choices
    with pytest.raises(engine.QueueFull, match="3 of at most 2 are waiting"):
        fake.submit([ask(b"4")])
    fake.start().close(drain_seconds=5)
    with pytest.raises(engine.EngineClosed):
        fake.submit([ask(b"5")])


def test_closing_lets_running_requests_finish_but_not_for_ever():
    """Within the limit they finish; after it they are told why they end."""
    fake = fake_engine().start()
    patient = ask(b"patient", n=20)
    fake.submit([patient])
    fake.close(drain_seconds=10)
    assert result(patient)[1] == "length"
    fake = fake_engine(n_ctx=10**6)
    endless = ask(b"endless", n=10**6)
    fake.submit([endless])
    fake.start().close(drain_seconds=0)
    assert result(endless)[1] == "the server is shutting down"


def test_a_reader_that_stops_reading_is_given_up(monkeypatch):
    """Its events must not fill the memory."""
    monkeypatch.setattr(engine.Request, "MAX_UNREAD_EVENTS", 5)
    fake = fake_engine()
    slow = ask(b"slow", n=400)
    run(fake, slow)
    assert slow.n_generated < 10 and "reads more slowly" in result(slow)[1]


# ==== 4. HTTP, with the real model ========================================================


@pytest.fixture(scope="session")
def gguf():
    """The model: beside the features the default one, fetched if need be; alone, the one there."""
    try:
        from features import downloads
    except ImportError:
        return engine.find_model_file(None, HERE / "models")
    return Path(downloads.fetch(None, HERE / "models"))


@pytest.fixture(scope="session")
def live(gguf):
    """A server in this process on a free port, with eight slots of 1,024 tokens."""
    config = server.Config(port=0, parallel=8, n_ctx=1024, model_aliases=["gpt-4o-mini"],
                           model_path=str(gguf), max_body_mb=0.5, client_timeout=3)
    running = server.Server(config)
    threading.Thread(target=running.serve_forever, daemon=True).start()
    running.models.start()
    running.engine = running.models.default.engine
    yield running
    running.drain()


@pytest.fixture(scope="session")
def client(live):
    return openai.OpenAI(base_url=f"{live.url}/v1", api_key="unused", max_retries=0, timeout=60)


@pytest.fixture(scope="session")
def model(live):
    return live.engine.model.name


def post(live, path, body, method="POST", headers=None):
    """(status, headers, parsed body) of one request with plain http.client."""
    connection = http.client.HTTPConnection("127.0.0.1", live.server_port, timeout=60)
    data = body if isinstance(body, (bytes, type(None))) else json.dumps(body)
    connection.request(method, path, data, headers or {})
    response = connection.getresponse()
    content = response.read()
    connection.close()
    return response.status, response.headers, json.loads(content) if content else None


def chat(client, text="Say hello.", **options):
    options = {"model": "gpt-4o-mini", "temperature": 0, "max_tokens": 24, **options}
    return client.chat.completions.create(messages=[{"role": "user", "content": text}], **options)


def settle(live):
    """Wait until the engine is idle."""
    deadline = time.monotonic() + 10
    while live.engine.stats.n_busy or live.engine.n_waiting:
        assert time.monotonic() < deadline, "a slot was lost"
        time.sleep(0.02)


def test_a_chat_reply_has_text_and_honest_usage(client, model):
    reply = chat(client, "What is the capital of France?", model=model, max_tokens=40)
    assert "Paris" in reply.choices[0].message.content or len(reply.choices[0].message.content) > 5
    assert reply.choices[0].message.role == "assistant" and reply.object == "chat.completion"
    assert reply.model == model and reply.id.startswith("chatcmpl-")
    assert reply.usage.total_tokens == reply.usage.prompt_tokens + reply.usage.completion_tokens
    again = chat(client, "What is the capital of France?", model=model, max_tokens=40)
    assert again.choices[0].message.content == reply.choices[0].message.content
    assert again.usage.prompt_tokens_details.cached_tokens > 0


def test_a_stream_is_shaped_like_openais_and_equals_the_unstreamed_reply(client):
    """Role once, then text, then the finish_reason, then usage only because it was asked for."""
    whole = chat(client, "Write one line about 🌧 and 雨.", stop=["\n\n"])
    chunks = list(chat(client, "Write one line about 🌧 and 雨.", stop=["\n\n"], stream=True,
                       stream_options={"include_usage": True}))
    *body, last = chunks
    assert last.choices == [] and last.usage.completion_tokens == whole.usage.completion_tokens
    assert body[0].choices[0].delta.role == "assistant"
    assert body[0].choices[0].delta.content == ""
    assert all(c.choices[0].delta.role is None and c.usage is None for c in body[1:])
    assert [c.choices[0].finish_reason for c in body[:-1]] == [None] * (len(body) - 1)
    assert body[-1].choices[0].finish_reason == whole.choices[0].finish_reason
    assert len({chunk.id for chunk in chunks}) == 1
    text = "".join(c.choices[0].delta.content or "" for c in body)
    assert text == whole.choices[0].message.content
    unasked = list(chat(client, stream=True, max_tokens=2))
    assert all(chunk.usage is None and chunk.choices for chunk in unasked)


def test_a_text_goes_on_streamed_or_not(client, model):
    asked = dict(model=model, prompt="Once upon a time", max_tokens=8, temperature=0)
    reply = client.completions.create(**asked)
    choice = reply.choices[0]
    assert reply.object == "text_completion" and choice.finish_reason == "length" and choice.text
    streamed = list(client.completions.create(**asked, stream=True))
    assert "".join(chunk.choices[0].text for chunk in streamed) == choice.text
    default = client.completions.create(model=model, prompt="1 2 3", temperature=0)
    assert default.usage.completion_tokens <= server.LEGACY_MAX_TOKENS


def test_stop_sequences_end_the_text_before_them(client):
    reply = chat(client, "Count from 1 to 9 with commas.", max_tokens=60)
    text = reply.choices[0].message.content
    stop = text[len(text) // 2:][:4]
    stopped = chat(client, "Count from 1 to 9 with commas.", max_tokens=60, stop=["@@@", stop])
    assert stopped.choices[0].message.content == text[:text.index(stop)]
    assert stopped.choices[0].finish_reason == "stop"


def test_seeds_repeat_and_choices_differ(client):
    """The same seed gives the same choices; within a request they differ from one another."""
    options = dict(temperature=1.5, n=3, seed=11, max_tokens=12)
    first, second = (chat(client, "Invent a word.", **options) for _ in range(2))
    texts = [choice.message.content for choice in first.choices]
    assert texts == [choice.message.content for choice in second.choices]
    assert len(set(texts)) == 3 and [choice.index for choice in first.choices] == [0, 1, 2]
    assert chat(client, "Invent a word.", **{**options, "seed": 12}).choices[0].message.content \
        not in texts


def test_more_choices_than_slots_stream_and_finish(client):
    """Each choice has its role, text and end; all prefill once."""
    finished, roles = set(), []
    for chunk in chat(client, "Hi", n=11, stream=True, temperature=1, max_tokens=5):
        choice = chunk.choices[0]
        roles += [choice.index] * (choice.delta.role is not None)
        if choice.finish_reason:
            finished.add(choice.index)
    assert finished == set(range(11)) and sorted(roles) == list(range(11))


def test_penalties_and_sampling_limits_reach_the_sampler(client, model):
    """Each knob changes the reply in the way its name says."""
    plain = client.completions.create(model=model, prompt="ha ha ha ha", max_tokens=12,
                                      temperature=0)
    penalized = client.completions.create(model=model, prompt="ha ha ha ha", max_tokens=12,
                                          temperature=0, frequency_penalty=2, presence_penalty=2)
    words = penalized.choices[0].text.split()
    assert plain.choices[0].text != penalized.choices[0].text
    assert len(set(words)) >= len(words) - 1
    greedy = chat(client, max_tokens=8).choices[0].message.content
    for narrow in ({"top_k": 1}, {"min_p": 1.0}):
        reply = chat(client, max_tokens=8, temperature=2, extra_body=narrow)
        assert reply.choices[0].message.content == greedy
    assert chat(client, max_tokens=8, temperature=2, top_p=0).choices[0].message.content == greedy


def test_messages_may_be_parts_and_developer_is_system(live, client, model):
    """The same prompt tokens, whichever way it is written."""
    plain = [{"role": "system", "content": "Be brief.\nBe kind."}, *HI]
    parts = [{"role": "developer", "content": [{"type": "text", "text": "Be brief."},
                                               {"type": "text", "text": "Be kind."}]}, *HI]
    a, b = (client.chat.completions.create(model=model, messages=messages, max_tokens=8,
                                           temperature=0) for messages in (plain, parts))
    assert a.choices[0].message.content == b.choices[0].message.content
    assert a.usage.prompt_tokens == b.usage.prompt_tokens


def greedy(live, *prompts):
    """What the engine makes of prompts that come at once, without HTTP, which tells no odds. Of
    each: its text, its tokens with the two likeliest of each, and how many were cached."""
    model, requests, replies = live.engine.model, [], []
    for prompt in prompts:
        tokens = model.tokenize(model.render_chat([{"role": "user", "content": prompt}]))
        sampler = engine.Sampler(model, engine.SamplingParams(temperature=0), 1024, tokens)
        requests.append(engine.Request(tokens, sampler, 24, n_top_logprobs=2))
    live.engine.submit(requests)
    for request in requests:
        events = [request.events.get(timeout=60)]
        while not events[-1].finish_reason:
            events.append(request.events.get(timeout=60))
        replies.append(("".join(event.text for event in events),
                        [entry for event in events for entry in event.logprobs], request.n_reused))
    return replies


def same_or_tied(alone, other, message):
    """Greedy replies are equal, or part at a near-tie of the first one's two likeliest tokens:
    matrix kernels for one row and for many add in a different order."""
    rounding = 0.1  # logprob difference that a different order of additions can bridge
    for ours, theirs in zip(alone[1], other[1]):
        if ours.token != theirs.token:
            (_, best), (_, second) = ours.top
            assert best - second < rounding, message
            return
    assert alone[0] == other[0], message


def test_greedy_is_the_same_alone_in_a_batch_of_eight_and_from_the_cache(live, client):
    """Company and caching are invisible."""
    prompts = [f"Name {i} things you can find in a {place}." for i, place in enumerate(
        ["kitchen", "garden", "library", "harbour", "forest", "garage", "school", "cave"], 2)]
    alone = [greedy(live, prompt)[0] for prompt in prompts]
    for prompt, first, second in zip(prompts, alone, greedy(live, *prompts)):
        same_or_tied(first, second, prompt)
        [cached] = greedy(live, prompt)
        assert cached[2] >= 16
        same_or_tied(first, cached, prompt)
        assert chat(client, prompt).usage.prompt_tokens_details.cached_tokens >= 16


def test_turn_two_evaluates_only_the_new_tokens(client, model):
    """The cache holds the prompt and the reply of turn one."""
    messages = [{"role": "system", "content": "You tell stories. " * 20},
                {"role": "user", "content": "Begin."}]
    first = client.chat.completions.create(model=model, messages=messages, max_tokens=30,
                                           temperature=0)
    messages += [{"role": "assistant", "content": first.choices[0].message.content},
                 {"role": "user", "content": "Go on."}]
    second = client.chat.completions.create(model=model, messages=messages, max_tokens=5)
    reused = second.usage.prompt_tokens_details.cached_tokens
    assert reused >= first.usage.prompt_tokens + first.usage.completion_tokens - 2


def test_four_streams_interleave_and_finish(client):
    """No request interrupts another."""
    order, lock = [], threading.Lock()

    def read(number):
        for chunk in chat(client, f"Story number {number}", stream=True, max_tokens=30):
            with lock:
                order.append(number)
    threads = [threading.Thread(target=read, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    last = [len(order) - order[::-1].index(n) for n in range(4)]
    first = [order.index(n) for n in range(4)]
    assert max(first) < min(last)


def test_models_tell_their_context_length(live, client, model):
    listed = client.models.list().data
    assert [entry.id for entry in listed] == [model, "gpt-4o-mini"]
    entry = client.models.retrieve(model)
    assert entry.max_model_len == 1024
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.retrieve("nope")
    assert caught.value.code == "model_not_found"
    with pytest.raises(openai.NotFoundError) as caught:  # it looks like the pattern of the path
        client.models.retrieve("{id}")
    assert caught.value.code == "model_not_found"


def test_health_root_and_head(live, model):
    status, _, body = post(live, "/health", None, "GET")
    assert status == 200 and body["status"] == "ok" and body["model"] == model
    status, headers, body = post(live, "/", None, "GET")
    assert body["name"] == server.NAME and "/v1/chat/completions" in body["links"]
    assert headers["x-request-id"].startswith("req_")
    status, headers, body = post(live, "/health", None, "HEAD")
    assert status == 200 and body is None and int(headers["Content-Length"]) > 0


@pytest.mark.parametrize("path, body, status, param, code", [
    ("/v1/chat/completions", {"messages": HI, "model": "gpt-9"}, 404, "model", "model_not_found"),
    ("/v1/chat/completions", {"model": "gpt-4o-mini"}, 400, "messages", "missing_field"),
    ("/v1/chat/completions", {"messages": HI, "stop": ""}, 400, "stop", "invalid_value"),
    ("/v1/chat/completions", {"messages": HI, "stream_options": {}}, 400, "stream_options",
     "invalid_value"),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": "word " * 1100}]}, 400,
     "messages", "context_length_exceeded"),
    ("/v1/completions", {"prompt": ""}, 400, "prompt", "invalid_value"),
    ("/v1/completions", {"prompt": ["a", 2]}, 400, "prompt[1]", "invalid_type"),
    ("/v1/completions", {"prompt": "word " * 1100, "stream": True}, 400, "prompt",
     "context_length_exceeded"),
    ("/v1/chat/completions", b"{", 400, None, "invalid_json"),
    ("/v1/chat/completions", b"[]", 400, None, "invalid_json"),
    ("/v1/chat/completions", b"\xff\xfe", 400, None, "invalid_json"),
    ("/v1/chat/completions", b'{"messages": NaN}', 400, None, "invalid_json"),
    ("/v1/chat/completions", b"[" * 100_000, 400, None, "invalid_json"),
    ("/v1/chat/completions", b'{"n": ' + b"1" * 5000 + b"}", 400, None, "invalid_json"),
    ("/v1/chat/completions", b" " * 600_000, 413, None, "body_too_large"),
    ("/v1/nothing", {}, 404, None, "not_found"),
    ("/v1/models", {}, 405, None, "method_not_allowed"),
])
def test_bad_requests_get_their_status_and_never_reach_the_engine(live, path, body, status, param,
                                                                  code, monkeypatch):
    """Refused in the handler, in the OpenAI error shape, with a message of substance."""
    monkeypatch.setattr(live.engine, "submit", lambda requests: pytest.fail("reached the engine"))
    got, headers, reply = post(live, path, body)
    assert (got, reply["error"]["param"], reply["error"]["code"]) == (status, param, code)
    assert set(reply["error"]) == {"message", "type", "param", "code"}
    assert len(reply["error"]["message"]) > 15 and headers["x-request-id"]


def test_the_context_limit_names_both_counts(client):
    with pytest.raises(openai.BadRequestError) as caught:
        chat(client, "word " * 1100, stream=True)
    assert re.search(r"has 11\d\d tokens.*context is 1024 tokens", caught.value.message)


def test_a_reply_that_fills_the_context_ends_in_length(client):
    """The advertised context holds, to the token."""
    words = "word " * 960
    reply = chat(client, words, max_tokens=500, extra_body={"min_tokens": 500})
    assert reply.choices[0].finish_reason == "length"
    assert reply.usage.total_tokens == 1024


def test_unknown_fields_are_served_but_named(live):
    status, headers, _ = post(live, "/v1/chat/completions",
                              {"messages": HI, "max_tokens": 1, "zeal\r\nX-Evil: 1": 1, "speed": 2})
    assert status == 200 and "X-Evil" not in headers
    assert headers["x-ignored-fields"] == r"zeal\r\nX-Evil: 1, speed"


POST = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n"


@pytest.mark.parametrize("request_bytes, status", [
    (b"GARBAGE\r\n\r\n", 400),
    (b"GET /health\r\n\r\n", 400),
    (b"GET /health HTTP/9.9\r\n\r\n", 505),
    (b"GET /health HTTP/x\r\n\r\n", 400),
    (b"GET http://[ HTTP/1.1\r\n\r\n", 400),
    (b"BREW /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n", 405),
    (b"GET /" + b"a" * 70_000 + b" HTTP/1.1\r\n\r\n", 414),
    (b"GET /health HTTP/1.1\r\n" + b"".join(b"h%d: x\r\n" % i for i in range(200)) + b"\r\n", 431),
    (b"GET /health HTTP/1.1\r\nx: " + b"a" * 70_000 + b"\r\n\r\n", 431),
    (POST + b"\r\n", 411),
    (POST + b"Content-Length: -5\r\n\r\n", 400),
    (POST + b"Content-Length: 5x\r\n\r\n", 400),
    (POST + b"Content-Length: " + b"9" * 5000 + b"\r\n\r\n", 413),
    (POST + b"Content-Length: 10\r\n\r\n{", 408),
])
def test_malformed_http_is_answered_in_the_same_error_shape(live, request_bytes, status):
    """Raw bytes that no client library would send."""
    with socket.create_connection(("127.0.0.1", live.server_port), timeout=20) as raw:
        raw.sendall(request_bytes)
        answer = b""
        while block := raw.recv(65536):
            answer += block
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 %d " % status), answer[:200]
    assert set(json.loads(body)["error"]) == {"message", "type", "param", "code"}


def test_a_connection_serves_many_requests_also_after_an_error(live):
    """Keep-alive: the body of a refused request is read, so the next one starts behind it."""
    connection = http.client.HTTPConnection("127.0.0.1", live.server_port, timeout=20)
    for path, body, status in (("/nowhere", "{}", 404), ("/v1/completions", "{", 400),
                               ("/v1/completions", '{"prompt":"a","max_tokens":1}', 200)):
        connection.request("POST", path, body)
        response = connection.getresponse()
        response.read()
        assert response.status == status
    connection.close()


def test_http_1_0_gets_a_stream_without_chunks(live):
    """Old proxies and `ab`: the stream ends with the connection."""
    body = json.dumps({"prompt": "a", "max_tokens": 2, "stream": True}).encode()
    with socket.create_connection(("127.0.0.1", live.server_port), timeout=20) as raw:
        raw.sendall(b"POST /v1/completions HTTP/1.0\r\nContent-Length: %d\r\n\r\n" % len(body)
                    + body)
        answer = b"".join(iter(lambda: raw.recv(65536), b""))
    head, _, stream = answer.partition(b"\r\n\r\n")
    assert b"chunked" not in head.lower() and stream.endswith(b"data: [DONE]\n\n")


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("last_words", [b"", b"GET /health HTTP/1.1\r\n"])
def test_a_disconnect_frees_the_slot_within_moments(live, stream, last_words):
    """Nobody generates for a closed connection, streamed or not, whatever it sent at last."""
    settle(live)
    body = json.dumps({"prompt": "Once", "max_tokens": 1000, "min_tokens": 1000,
                       "stream": stream}).encode()
    raw = socket.create_connection(("127.0.0.1", live.server_port), timeout=20)
    raw.sendall(POST + b"Content-Length: %d\r\n\r\n" % len(body) + body)
    deadline = time.monotonic() + 5
    while not live.engine.stats.n_busy:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    raw.sendall(last_words)
    raw.close()
    started = time.monotonic()
    settle(live)
    assert time.monotonic() - started < 2


def test_a_hundred_aborts_leave_a_healthy_server(live, client):
    """Clients that hang up in the queue, in a long prefill and mid-stream cost no slot."""
    def abort(number):
        body = json.dumps({"prompt": f"{number} " + "long prompt " * (number % 4 * 100),
                           "max_tokens": 500, "stream": True}).encode()
        with socket.create_connection(("127.0.0.1", live.server_port), timeout=20) as raw:
            raw.sendall(POST + b"Content-Length: %d\r\n\r\n" % len(body)
                        + body)
            raw.settimeout(0.05 * (number % 7) + 0.01)
            try:
                while raw.recv(100 * (number % 5 + 1)):
                    pass
            except TimeoutError:
                pass
    threads = [threading.Thread(target=abort, args=(number,)) for number in range(100)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    settle(live)
    assert chat(client, max_tokens=4).usage.completion_tokens > 0


def test_a_full_queue_is_503_with_retry_after(live, monkeypatch):
    monkeypatch.setattr(live.engine, "_max_queue", 0)
    status, headers, body = post(live, "/v1/completions", {"prompt": "a", "stream": True})
    assert status == 503 and headers["Retry-After"] and body["error"]["code"] == "queue_full"


def test_an_engine_error_before_the_first_token_has_its_status_and_later_is_an_event(
        live, monkeypatch):
    """A stream that fails never looks like one that succeeded: an error event and no [DONE]."""
    real = engine.Sampler.sample

    def fail_at(n):
        calls = itertools.count()
        monkeypatch.setattr(engine.Sampler, "sample", lambda sampler, context, row: (
            real(sampler, context, row) if next(calls) < n else 1 / 0))
    body = {"prompt": "Once upon", "stream": True, "temperature": 0, "max_tokens": 9}
    fail_at(0)
    status, _, reply = post(live, "/v1/completions", body)
    assert status == 500 and "ZeroDivisionError" in reply["error"]["message"]
    fail_at(3)
    connection = http.client.HTTPConnection("127.0.0.1", live.server_port, timeout=20)
    connection.request("POST", "/v1/completions", json.dumps(body))
    stream = connection.getresponse().read().decode()
    assert '"text":' in stream and '"error":' in stream and "[DONE]" not in stream
    monkeypatch.undo()
    assert post(live, "/v1/completions", {**body, "stream": False})[0] == 200


def test_a_templates_refusal_is_400_with_its_message(live, monkeypatch):
    formatter = engine.llama_chat_format.Jinja2ChatFormatter(
        "{{ raise_exception('roles must alternate') }}", "", "")
    monkeypatch.setattr(live.engine.model, "_template", formatter)
    status, _, body = post(live, "/v1/chat/completions", {"messages": HI})
    assert status == 400 and "roles must alternate" in body["error"]["message"]


@pytest.fixture(scope="session")
def vocabulary(gguf):
    """A model of our own, to be bent by the tests."""
    return engine.Model(gguf, n_gpu_layers=0)


def test_special_tokens_are_counted_once(vocabulary, monkeypatch):
    """Exactly one BOS for models that want one, whether or not the template wrote it."""
    assert vocabulary.tokenize("hi")[0] != vocabulary._bos
    monkeypatch.setattr(vocabulary, "_add_bos", True)
    bos = vocabulary.piece(vocabulary._bos, special=True).decode()
    for text in ("hi", bos + "hi"):
        assert vocabulary.tokenize(text).tolist().count(vocabulary._bos) == 1
    assert vocabulary.tokenize("").tolist() == [vocabulary._bos]


def test_an_endless_word_is_cut_before_it_reaches_the_tokenizer(vocabulary, monkeypatch):
    """With many vocabularies, 40,000 letters without a space overflow the tokenizer's stack and
    kill the process. The cut loses nothing, and special tokens stay whole."""
    text = "a" * (2 * engine.MAX_RUN + 5) + " b" + "\n" * (engine.MAX_RUN + 1)
    parts = vocabulary._cut_long_runs(text)
    runs = [run for part in parts for run in re.findall(r"\S+|\s+", part)]
    assert max(map(len, runs)) <= engine.MAX_RUN and "".join(parts) == text
    tokens = vocabulary.tokenize(text)
    assert b"".join(map(vocabulary.piece, tokens.tolist())).decode() == text
    monkeypatch.setattr(engine, "MAX_RUN", 20)
    monkeypatch.setattr(engine, "LONG_RUN", re.compile(r"\S{20}|\S++|\s{20}|\s++"))
    end = vocabulary.tokenize("<|im_end|>").tolist()
    for before in range(30):
        tokens = vocabulary.tokenize("x" * before + "<|im_end|>" + "y" * 30).tolist()
        assert tokens.count(end[0]) == 1, before


def test_a_text_that_cannot_fit_is_refused_without_tokenizing_it(live, vocabulary, monkeypatch):
    """Megabytes of special tokens take llama.cpp minutes; the lower bound takes no time and is
    never above the true count."""
    for text in ("Hello there, <|im_start|>user", " " * 5000, "<|im_end|>" * 50, "漢字🌧" * 9):
        assert vocabulary.fewest_tokens(text) <= len(vocabulary.tokenize(text))
    runs = {"\n" * n: n for n in range(1, 32)}  # Gemma has tokens for runs: they overlap
    monkeypatch.setattr(vocabulary, "_specials", {**vocabulary._specials, **runs})
    vocabulary.__dict__.pop("_openers", None)
    assert vocabulary.fewest_tokens("\n" * 310 + "<|im_end|>" * 3) == 3
    vocabulary.__dict__.pop("_openers")
    monkeypatch.setattr(live.engine.model, "tokenize", lambda text: pytest.fail("tokenized"))
    started = time.monotonic()
    for text in ("<|im_start|>" * 40_000, "a" * 500_000):
        status, _, body = post(live, "/v1/completions", {"prompt": text})
        assert status == 400 and body["error"]["code"] == "context_length_exceeded"
    assert time.monotonic() - started < 3


# ==== 5. The process ======================================================================


def start(*flags):
    """`python server.py` in a process of its own, on a free port."""
    return subprocess.Popen([sys.executable, str(HERE / "server.py"), "--port", "0", *flags],
                            env={**os.environ, "PYTHONUNBUFFERED": "1"}, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def wait_until_ready(process) -> str:
    """Read the start-up lines; return the curl line's address."""
    for line in process.stdout:
        if match := re.match(r"try: curl (http://\S+)/v1/chat/completions -H", line):
            return match[1]
    raise AssertionError(process.stderr.read())


@pytest.mark.parametrize("name, content, words", [
    ("missing.gguf", None, "model file not found"),
    ("text.gguf", b"This is not a model", "not a GGUF file"),
    ("empty.gguf", b"", "not a GGUF file"),
])
def test_an_unusable_model_is_one_sentence_and_exit_code_2(tmp_path, name, content, words):
    """Missing, or something else: no traceback, no crash."""
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    process = start("--model", str(path))
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 2
    assert stderr.startswith("error: ") and words in stderr and stderr.count("\n") == 1


def test_a_folder_stands_for_the_one_model_in_it(tmp_path, gguf):
    """One that is named, and the one for models, where none is."""
    for named in (str(tmp_path), None):
        with pytest.raises(engine.ModelError, match="no .gguf file .*: set model_path to one"):
            engine.find_model_file(named, tmp_path)
    with pytest.raises(engine.ModelError, match="no .gguf file"):
        engine.find_model_file(None, tmp_path / "missing")
    (tmp_path / "a.gguf").symlink_to(gguf)
    (tmp_path / "mmproj-a.gguf").symlink_to(gguf)
    for named in (str(tmp_path), None):
        assert engine.find_model_file(named, tmp_path) == tmp_path / "a.gguf"
    (tmp_path / "b.gguf").symlink_to(gguf)
    for named in (str(tmp_path), None):
        with pytest.raises(engine.ModelError, match="holds 2 models .a.gguf, b.gguf.: name one of "
                                                    "them, by model_path"):
            engine.find_model_file(named, tmp_path)


def test_settings_come_from_the_file_and_then_from_flags(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("n_ctx: 100\ntemperature: 0.1\nserver:\n  port: 1\n"
                    "model:\n  model_path: m.gguf")
    config = server.load_config(["--config", str(file), "--port", "3"], {})
    assert (config.n_ctx, config.temperature, config.port) == (100, 0.1, 3)
    assert config.model_path == str(tmp_path / "m.gguf")


@pytest.mark.parametrize("text, words", [
    ("n_cxt: 5", "unknown key 'n_cxt'"),
    ("server:\n  N_CTX: 5", "unknown key 'N_CTX'"),
    ("serve:\n  port: 5", "unknown key 'serve'"),
    ("7: 5", "unknown key '7'"),
    ("port: 1\nport: 2", "line 2: the key \"port\" is there twice"),
    ("port: !!bool x", "cannot read"),
    ("port: !!map [1]", "cannot read"),
    ("port: !!int ''", "cannot read"),
    ("n_ctx: .inf", "n_ctx: expected an integer"),
    ("n_ctx: {2024-01-01: 1}", "n_ctx: expected an integer"),
    ("n_ctx: &a [*a]", "n_ctx: expected an integer"),
    ("n_ctx: 2024-13-45", "cannot read"),
    ("n_ctx: " + "[" * 3000, "cannot read"),
    ("port: many", "port: expected an integer, got \"many\""),
    ("temperature: 3", "temperature must be between 0 and 2, got 3"),
    ("port: 1\nserver:\n  port: 2", "port is set twice"),
    ("- a", "expected `key: value` lines"),
    ("a: [", "cannot read"),
    ("parallel: 9\nn_batch: 8", "at least parallel"),
])
def test_a_wrong_setting_is_one_sentence(tmp_path, text, words):
    file = tmp_path / "config.yaml"
    file.write_text(text)
    with pytest.raises(server.ConfigError) as caught:
        server.load_config(["--config", str(file)], {})
    assert words in str(caught.value) and str(file) in str(caught.value) or "parallel" in words


def test_an_address_in_use_is_one_sentence_and_exit_code_2(live):
    process = start("--port", str(live.server_port))
    _, stderr = process.communicate(timeout=30)
    assert process.returncode == 2 and stderr.count("\n") == 1
    assert f"cannot listen on host '127.0.0.1', port {live.server_port}" in stderr


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_running_requests_finish_and_exits_0(number, tmp_path):
    """New requests are refused meanwhile; the access log and the messages are on the console."""
    settings = tmp_path / "c.yaml"
    settings.write_text("n_ctx: 512\nparallel: 2\ndrain_seconds: 120\n")
    process = start("--config", str(settings))
    url = wait_until_ready(process)
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="x", max_retries=0)
    stream = chat(client, "Tell me a long story.", stream=True, max_tokens=24, model=None,
                  extra_body={"model": None})
    next(stream)
    process.send_signal(number)
    rest = list(stream)
    assert rest[-1].choices[0].finish_reason in ("length", "stop")
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0 and err == ""
    assert re.search(r"req_\w+ POST /v1/chat/completions 200 prompt=\d+ cached=0 generated=\d+ "
                     r"first=\d\.\d+s total=\d+\.\d+s", out)


def test_the_port_answers_while_the_model_loads(monkeypatch):
    """Health is 503 with the progress; a request is 503 with Retry-After, not a refused
    connection."""
    loading = server.Server(server.Config(port=0))
    threading.Thread(target=loading.serve_forever, daemon=True).start()
    loading.models.default.progress = 0.25
    status, headers, body = post(loading, "/health", None, "GET")
    assert (status, body) == (503, {"status": "loading", "progress": 0.25})
    for name in (None, "its name, or none"):  # which is known when it has been loaded
        status, headers, body = post(loading, "/v1/chat/completions", {"messages": HI, "model": name})
        assert status == 503 and headers["Retry-After"] and body["error"]["code"] == "loading"
    for stop, param in (([""], "stop[0]"), ("x" * 1001, "stop")):  # said at once, not when it is loaded
        status, _, body = post(loading, "/v1/chat/completions", {"messages": HI, "stop": stop})
        assert (status, body["error"]["param"]) == (400, param)
    loading.drain()
    assert not loading.models.engines()
