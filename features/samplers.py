"""Samplers: what llama.cpp knows besides temperature, top k, top p, min p and OpenAI's penalties.

What it is for. Replies that don't repeat themselves (repeat penalty, DRY), and other ways to leave
out tokens (typical p, top n sigma, XTC) or to hold the surprise at a level (Mirostat); tokens that
come more or less often, or never (`logit_bias`, and `ignore_eos` for those that end a reply).

How it works. All are llama.cpp's own. engine.SamplingParams makes the chain of samplers by which a
row of logits becomes a token; here its fields and its methods are added to, and each sampler goes
where llama.cpp has it: penalties, repeat penalty, DRY, top n sigma, top k, typical p, top p, min p,
XTC, temperature. Mirostat stands in place of all but the bias and the temperature.

What it costs. Nothing where none is asked for. With penalties even greedy replies need the chain,
0.2 ms a token; DRY looks back over `dry_penalty_last_n` tokens.

What it reads and sends. The fields of SamplerFields and BiasFields, in chats and completions.
"""

import ctypes
import dataclasses
import math
import re
from collections.abc import Iterator

import numpy as np
from llama_cpp import llama_cpp as lib

import engine
import server

N_LIKELIEST = 100  # llama.cpp's, for Mirostat's estimate of the distribution's exponent


@dataclasses.dataclass
class SamplerFields:
    """What is added to engine.SamplingParams, and stands in front of it: `super()` is that.
    Meanings and neutral values are those of tools/server/README.md in llama.cpp's sources."""

    # Keep the most typical that together have this probability.
    typical_p: float = server.option(1.0, low=0, high=1)
    # Standard deviations below the peak; < 0: off.
    top_n_sigma: float = server.option(-1.0, low=-1, high=1000)
    # Divides the logits of the last tokens; how many, of the prompt too; -1: all.
    repeat_penalty: float = server.option(1.0, low=0.01, high=100)
    repeat_last_n: int = server.option(64, low=-1, high=server.INT32_MAX)
    # DRY, "don't repeat yourself": against sequences longer than the allowed length.
    dry_multiplier: float = server.option(0.0, low=0, high=100)
    dry_base: float = server.option(1.75, low=1, high=100)
    dry_allowed_length: int = server.option(2, low=0, high=server.INT32_MAX)
    # Tokens looked back at; -1: all.
    dry_penalty_last_n: int = server.option(-1, low=-1, high=server.INT32_MAX)
    dry_sequence_breakers: list[str] = dataclasses.field(
        default_factory=lambda: ["\n", ":", '"', "*"], metadata={"max_length": 8})
    # XTC, "exclude top choices": the chance to drop all but the last of those at least so probable.
    xtc_probability: float = server.option(0.0, low=0, high=1)
    xtc_threshold: float = server.option(0.1, low=0, high=1)
    # 1, 2: steer the surprise towards tau (bits) at the rate eta, cut no candidates off.
    mirostat: int = server.option(0, low=0, high=2)
    mirostat_tau: float = server.option(5.0, low=0, high=100)
    mirostat_eta: float = server.option(0.1, low=0, high=100)
    # What is added to logits, by token id; of a body it is made by `join`.
    logit_bias: dict[int, float] = dataclasses.field(default_factory=dict)

    def is_argmax(self) -> bool:
        """As SamplingParams has it."""
        return super().is_argmax() and not (
            self.mirostat or self.repeat_penalty != 1 or self.dry_multiplier)

    def penalties(self, model: engine.Model, n_ctx: int, prompt: np.ndarray) -> Iterator:
        """As SamplingParams has it, then those that look at the end of the prompt, too."""
        if self.mirostat:
            return
        yield from super().penalties(model, n_ctx, prompt)
        if self.repeat_penalty != 1:
            window = n_ctx if self.repeat_last_n < 0 else min(self.repeat_last_n, n_ctx)
            yield after(prompt, window, lib.llama_sampler_init_penalties(
                model.n_vocab, window, self.repeat_penalty, 0.0, 0.0))
        if self.dry_multiplier:
            window = n_ctx if self.dry_penalty_last_n < 0 else min(self.dry_penalty_last_n, n_ctx)
            breakers = [breaker.encode() for breaker in self.dry_sequence_breakers]
            yield after(prompt, window, lib.llama_sampler_init_dry(
                model.vocab, self.dry_multiplier, self.dry_base, self.dry_allowed_length, window,
                (ctypes.c_char_p * len(breakers))(*breakers), len(breakers)))

    def choice(self, model: engine.Model, seed: int) -> Iterator:
        """As SamplingParams has it, or Mirostat."""
        if not self.mirostat:
            yield from super().choice(model, seed)
            return
        yield lib.llama_sampler_init_temp(max(self.temperature, engine.GREEDY_BELOW))
        if self.mirostat == 1:
            yield lib.llama_sampler_init_mirostat(
                model.n_vocab, seed, self.mirostat_tau, self.mirostat_eta, N_LIKELIEST)
        else:
            yield lib.llama_sampler_init_mirostat_v2(seed, self.mirostat_tau, self.mirostat_eta)

    def filters(self, seed: int) -> Iterator:
        """As SamplingParams has it, with others before, between and behind."""
        if self.top_n_sigma >= 0:
            yield lib.llama_sampler_init_top_n_sigma(self.top_n_sigma)
        others = super().filters(seed)
        if self.top_k > 0:  # the first of them
            yield next(others)
        if self.typical_p < 1:
            yield lib.llama_sampler_init_typical(self.typical_p, engine.KEEP_AT_LEAST)
        yield from others
        if self.xtc_probability:
            yield lib.llama_sampler_init_xtc(
                self.xtc_probability, self.xtc_threshold, engine.KEEP_AT_LEAST, seed)


def after(prompt: np.ndarray, n_last: int, sampler):
    """A sampler, with the last tokens of the prompt as text so far."""
    for token in prompt[max(0, len(prompt) - n_last):].tolist():
        if token >= 0:  # else a part of an image
            lib.llama_sampler_accept(sampler, token)
    return sampler


@dataclasses.dataclass
class BiasFields:
    """What tokens are more or less likely, as it is sent: JSON's keys are strings."""

    logit_bias: dict[str, float] | None = server.option(low=-100, high=100)
    ignore_eos: bool = False


FIELDS = {"SamplingParams": SamplerFields, "GenerationBody": BiasFields}


def join(wanted: server.Generation) -> None:
    """Read the bias by token id; a wrong one must not reach the model. Raises ApiError."""
    body, model = wanted.body, wanted.model
    bias = body.logit_bias or {}
    for token in bias:
        if not (re.fullmatch("[0-9]{1,11}", token) and int(token) < model.n_vocab):
            raise server.invalid("logit_bias", f"logit_bias: the key {server.describe(token)} is "
                                 f"not a token id of this model (0 to {model.n_vocab - 1})")
    body.logit_bias = {int(token): value for token, value in bias.items()} | dict.fromkeys(
        model.end_tokens if body.ignore_eos else (), -math.inf)
