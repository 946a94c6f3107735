"""Samplers: a server with this feature alone, and one without it.

    1  the chain    llama.cpp's order, whatever is asked for
    2  HTTP         each has an effect that can be seen, and a wrong value is refused by name
"""

import contextlib
import dataclasses
import sys
import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from llama_cpp import llama_cpp as lib

import conftest
from test_contract import CHAT, COMPLETIONS, HA, HI, WORD, complete, post, refused

sys.path.insert(0, str(conftest.ROOT))
import engine  # noqa: E402
import server  # noqa: E402
from features import samplers  # noqa: E402

HOUSE = server.load_features(["samplers"])

# ==== 1. The chain ========================================================================

# What asks for each sampler, in llama.cpp's order.
IN_ORDER = {
    "logit-bias": {"logit_bias": {5: 1.0}}, "penalties": {"presence_penalty": 0.5},
    "penalties of the prompt": {"repeat_penalty": 1.5}, "dry": {"dry_multiplier": 1.0},
    "top-n-sigma": {"top_n_sigma": 2.0}, "top-k": {"top_k": 9}, "typical": {"typical_p": 0.9},
    "top-p": {"top_p": 0.9}, "min-p": {"min_p": 0.1}, "xtc": {"xtc_probability": 0.5}}
MIROSTAT = {1: "mirostat", 2: "mirostat-v2"}


@pytest.fixture(scope="module")
def model():
    model = engine.Model(conftest.default_model(), n_gpu_layers=0)
    yield model
    model.close()


def names_of(model, asked: set[str], **more) -> list[str]:
    """The samplers of the chain for what is asked, by llama.cpp's names."""
    params = HOUSE.type_of(engine.SamplingParams)(seed=1, **more, **{
        name: value for each in asked for name, value in IN_ORDER[each].items()})
    samplers = [*params.chain(model, 64, np.array([1, -2, 3], np.int32))]
    names = [lib.llama_sampler_name(sampler).decode() for sampler in samplers]
    for sampler in samplers:
        lib.llama_sampler_free(sampler)
    return names


@settings(database=None, deadline=None)
@given(asked=st.sets(st.sampled_from([*IN_ORDER])))
def test_the_order_is_llama_cpp_s_whatever_is_asked_for(model, asked):
    """And what was not asked for is not there. Greedy needs none but what changes the logits;
    Mirostat takes the place of all but the bias."""
    wanted = [each.removesuffix(" of the prompt") for each in IN_ORDER if each in asked]
    assert names_of(model, asked, temperature=0.5) == [*wanted, "temp", "dist"]
    greedy = [name for name in names_of(model, asked, temperature=0) if name != "top-n-sigma"]
    changing = ("logit-bias", "penalties", "dry")
    assert greedy[-1] == "greedy" and greedy[:-1] == [each for each in wanted if each in changing]
    for version, name in MIROSTAT.items():
        assert names_of(model, asked, temperature=0.5, mirostat=version) == [
            *wanted[:1] * ("logit-bias" in asked), "temp", name]


def test_only_what_changes_the_likeliest_token_needs_a_chain(model):
    new = HOUSE.type_of(engine.SamplingParams)
    for asked, is_argmax in (({}, True), ({"top_n_sigma": 1.0, "typical_p": 0.5}, True),
                             ({"xtc_probability": 1.0}, True), ({"repeat_penalty": 1.1}, False),
                             ({"dry_multiplier": 0.1}, False), ({"mirostat": 2}, False),
                             ({"frequency_penalty": 0.1}, False)):
        assert new(temperature=0, **asked).is_argmax() is is_argmax
        assert not new(temperature=0.5, **asked).is_argmax()


# ==== 2. HTTP =============================================================================


@contextlib.contextmanager
def serving(house):
    """HTTP to a server in this process with these features and no others, its replies checked."""
    running = server.Server(house.Config(port=0, n_ctx=512, parallel=4))
    threading.Thread(target=running.serve_forever, args=(0.02,), daemon=True).start()
    running.models.start()
    with conftest.checking_client(running.url) as http:
        yield http
    assert running.drain()


@pytest.fixture(scope="module")
def http():
    with serving(HOUSE) as http:
        yield http


@pytest.mark.parametrize("narrow", [
    {"top_n_sigma": 0.001},
    {"mirostat": 1, "mirostat_tau": 0.001},
    {"mirostat": 2, "mirostat_tau": 0.001},
    {"mirostat": 2, "mirostat_tau": 0.5, "mirostat_eta": 0.0001},
    {"xtc_probability": 1, "xtc_threshold": 1, "temperature": 0.01},  # above 0.5: no top choices
    {"xtc_probability": 0, "xtc_threshold": 0.01, "temperature": 0.01},
])
def test_samplers_that_leave_only_the_likeliest_are_greedy(http, narrow):
    """However hot, one candidate is no choice."""
    wild = {"temperature": 1.5, "top_k": 0, "top_p": 1, "min_p": 0, "seed": 1, "max_tokens": 20}
    assert complete(http, WORD, **{**wild, **narrow}) == complete(http, WORD, max_tokens=20)


@pytest.mark.parametrize("wide", [
    {"top_n_sigma": 3},
    {"mirostat": 1, "mirostat_tau": 8},
    {"mirostat": 2, "mirostat_tau": 8},
    {"mirostat": 2, "mirostat_tau": 0.5, "mirostat_eta": 10},
    {"xtc_probability": 1, "xtc_threshold": 0.01, "temperature": 0.01},
])
def test_the_same_samplers_opened_are_not(http, wide):
    wild = {"temperature": 1.5, "top_k": 0, "top_p": 1, "min_p": 0, "seed": 1, "max_tokens": 20}
    assert complete(http, WORD, **{**wild, **wide}) != complete(http, WORD, max_tokens=20)


def test_typical_p_keeps_the_tokens_of_average_surprise(http):
    """Near 0 only the most typical one is left, and it is not the likeliest."""
    body = {"prompt": WORD, "max_tokens": 1, "temperature": 1, "top_k": 0, "top_p": 1, "min_p": 0,
            "n": 8, "seed": 1}
    free = {choice["text"] for choice in post(http, COMPLETIONS, body)["choices"]}
    typical = {choice["text"] for choice in post(http, COMPLETIONS,
                                                 {**body, "typical_p": 0.0001})["choices"]}
    assert len(typical) == 1 < len(free) and typical != {complete(http, WORD, max_tokens=1)}


@pytest.mark.parametrize("options, repeats", [
    ({"repeat_penalty": 1}, True),
    ({"repeat_penalty": 2}, False),
    ({"dry_multiplier": 0}, True),
    ({"dry_multiplier": 5, "dry_allowed_length": 1}, False),
    ({"dry_multiplier": 5, "dry_allowed_length": 900}, True),
    ({"dry_multiplier": 5, "dry_allowed_length": 1, "dry_penalty_last_n": 0}, True),
    ({"dry_multiplier": 5, "dry_allowed_length": 1, "dry_penalty_last_n": 64}, False),
    ({"dry_multiplier": 5, "dry_allowed_length": 1, "dry_sequence_breakers": ["ha"]}, True),
    ({"dry_multiplier": 5, "dry_allowed_length": 1, "dry_sequence_breakers": ["*"]}, False),
    ({"dry_multiplier": 0.001, "dry_allowed_length": 1, "dry_base": 1}, True),
    ({"dry_multiplier": 0.001, "dry_allowed_length": 1, "dry_base": 10}, False),
])
def test_penalties_end_a_repetition_that_goes_on_without_them(http, options, repeats):
    assert (complete(http, HA, **options) == complete(http, HA)) is repeats


def test_a_token_that_is_barred_does_not_come(http, model):
    """Nor does the end where that is ignored; what is wished for comes."""
    first = complete(http, WORD, max_tokens=1)
    [token] = model.tokenize(first, bos=False).tolist()
    assert complete(http, WORD, max_tokens=1, logit_bias={str(token): -100}) != first
    assert complete(http, WORD, max_tokens=1, logit_bias={str(token): -100}, temperature=0.01) != first
    wished = complete(http, WORD, max_tokens=3, logit_bias={"28": 100})
    assert wished == model.piece(28).decode() * 3
    for options in ({}, {"logit_bias": {str(token): 1}}, {"temperature": 0.01}):
        [choice] = post(http, CHAT, {"messages": HI, "temperature": 0, "max_tokens": 24,
                                     "ignore_eos": True, **options})["choices"]
        assert choice["finish_reason"] == "length"


@pytest.mark.parametrize("bias, param, words", [
    ({"5": 101}, "logit_bias.5", "between -100 and 100"), ([1], "logit_bias", "an object"),
    ({"49152": 1}, "logit_bias", '"49152" is not a token id of this model (0 to 49151)'),
    ({"two": 1}, "logit_bias", '"two" is not a token id'),
    ({"9" * 5000: 1}, "logit_bias", "is not a token id")])
def test_a_wrong_bias_is_refused_by_its_key(http, bias, param, words):
    for path, body in ((CHAT, {"messages": HI}), (COMPLETIONS, {"prompt": HA})):
        error = post(http, path, {**body, "logit_bias": bias}, 400)["error"]
        assert error["param"] == param and words in error["message"]
        assert error["code"] in ("invalid_value", "invalid_type")


@pytest.mark.parametrize("name, wrong", [
    ("typical_p", "low"), ("typical_p", -0.1), ("repeat_penalty", -1), ("repeat_penalty", "much"),
    ("mirostat", 3), ("mirostat", "v2"), ("mirostat_tau", -1), ("mirostat_eta", "slow"),
    ("dry_multiplier", -1), ("dry_base", "two"), ("dry_allowed_length", -2),
    ("dry_penalty_last_n", -2), ("dry_sequence_breakers", [5]), ("dry_sequence_breakers", "\n"),
    ("xtc_probability", 2), ("xtc_threshold", -1), ("top_n_sigma", "one")])
def test_a_wrong_sampler_is_refused_by_name(http, name, wrong):
    refused(http, CHAT, {"messages": HI, "max_tokens": 2, name: wrong}, name)


def test_without_the_feature_each_field_names_it():
    """But what asks for nothing is served."""
    with serving(server.load_features([])) as http:
        for field in [*dataclasses.fields(samplers.SamplerFields), *dataclasses.fields(samplers.BiasFields)]:
            value = ["."] if field.name == "dry_sequence_breakers" else 1
            for path, body in ((CHAT, {"messages": HI}), (COMPLETIONS, {"prompt": HA})):
                said = refused(http, path, {**body, field.name: value}, field.name)
                assert "needs the feature samplers" in said
        assert complete(http, HA, mirostat=0, dry_sequence_breakers=[])
