"""The model: loading, text, sampling, scheduling.

This file knows nothing of HTTP, and no JSON. It turns prompts (arrays of token ids) into events
(pieces of text), for many requests at once, with one llama.cpp context for each model. Read it from
top to bottom; each of its ten parts builds on those above it; the last is the loop. Features plug
in by three small classes whose default does nothing (Constraint, Drafter, PrefixStore), and by
Piece, which stands for tokens.
Words: a *slot* is a lane of the context, a *request* its guest; *prefill* reads a prompt into the
KV cache, *decode* produces one token per *step*, or several where *drafted* ones come true; a
*batch* is the rows of one llama_decode.

Threads: each loaded model has one, which runs `Engine.step` until it is unloaded. Handler threads
prepare requests (tokenize, build the sampler), `Engine.submit` them and read their events.
"""

import bisect
import codecs
import contextlib
import copy
import ctypes
import dataclasses
import functools
import itertools
import logging
import math
import os
import queue
import re
import secrets
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path

import jinja2
import numpy as np
from llama_cpp import llama_chat_format
from llama_cpp import llama_cpp as lib  # llama.h by ctypes, name by name

log = logging.getLogger("engine")

# ==== 1. Errors =========================================================================


class ModelError(Exception):
    """The model cannot be loaded; the message is one sentence for the person at the keyboard."""


class BrokenModel(ModelError):
    """The file is there, but incomplete, damaged, of an unknown kind, or suddenly gone."""


class TemplateError(Exception):
    """The chat template refused the messages; the message is the template's own."""


class QueueFull(Exception):
    """The waiting queue is at its limit."""


class EngineClosed(Exception):
    """The engine takes no new requests, or ends those it has: it is shutting down."""


class EngineFault(Exception):
    """A request failed inside the engine, through no fault of the client's."""


# ==== 2. Text: from token bytes to text that may be sent ================================


class StopMatcher:
    """Finds the first stop sequence in text that arrives in pieces.

    Holds back only what may still become a stop sequence. The one that ends first wins; of
    several that end together, the longest. What is held back is shorter than a stop sequence, so
    work per character does not grow with the text so far.

    >>> matcher = StopMatcher(["END"])
    >>> matcher.feed("The E"), matcher.feed("NTER key. THE EN"), matcher.feed("D.")
    (('The ', ''), ('ENTER key. THE ', ''), ('', 'END'))
    """

    def __init__(self, stops: list[str]):
        self._stops = stops
        self._held = ""  # text that may still become part of a stop sequence

    def feed(self, text: str) -> tuple[str, str]:
        """Return the text that may be sent now, and the stop sequence that was completed, or ""."""
        if not self._stops:
            return text, ""
        pending, self._held = self._held + text, ""
        ends = [(pending.index(stop) + len(stop), len(stop))
                for stop in self._stops if stop in pending]
        if ends:
            end, length = min(ends, key=lambda found: (found[0], -found[1]))
            return pending[: end - length], pending[end - length : end]
        n_sendable = next((n for n in range(len(pending)) if any(
            stop.startswith(pending[n:]) for stop in self._stops)), len(pending))
        self._held = pending[n_sendable:]
        return pending[:n_sendable], ""

    def flush(self) -> str:
        """Return what was held back; the text has ended without completing a stop sequence."""
        held, self._held = self._held, ""
        return held


class TextStream:
    """One request's way from token bytes to text: incremental UTF-8, then stop sequences. A
    character split over tokens appears when its last byte does; one that the end of the reply
    cuts off never does. Bytes that can never be UTF-8 become U+FFFD. `n_decoded` and `n_sent`
    count characters, so that log-probabilities can be sent with their token's text."""

    def __init__(self, stops: list[str]):
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._stops = StopMatcher(stops)
        self.n_decoded = self.n_sent = 0

    def feed(self, piece: bytes, final: bool = False) -> tuple[str, str]:
        """Take one token's bytes; return the text to send and the stop that was completed."""
        decoded = self._utf8.decode(piece)
        self.n_decoded += len(decoded)
        text, stopped = self._stops.feed(decoded)
        if final and not stopped:
            text += self._stops.flush()
        self.n_sent += len(text)
        return text, stopped


# ==== 3. Model files ====================================================================

GGUF_MAGIC = b"GGUF"  # https://github.com/ggml-org/ggml/blob/master/docs/gguf.md


def find_model_file(model_path: str | None, models_dir: Path, setting: str = "model_path") -> Path:
    """Return the GGUF file to load: a file or the one in a folder; where none is named, the one in
    `models_dir`. setting: what to set to another one, for the message. Raises ModelError."""
    path = Path(os.path.expanduser(model_path)) if model_path else models_dir
    try:
        if not model_path or path.is_dir():
            files = model_files(path)
            if not files:
                raise ModelError(f"no .gguf file in the folder {path}: set {setting} to one")
            if len(files) > 1:
                names = ", ".join(file.name for file in files)
                raise ModelError(f"the folder {path} holds {len(files)} models ({names}): name one "
                                 f"of them, by {setting}")
            path = files[0]
        if not path.is_file():
            what = "not a file" if path.exists() else "model file not found"
            raise ModelError(f"{what}: {path} (set {setting} to a GGUF file, or leave it out)")
        with open(path, "rb") as file:
            magic = file.read(len(GGUF_MAGIC))
    except OSError as error:
        raise ModelError(f"cannot read the model file {path}: {error.strerror}") from error
    if magic != GGUF_MAGIC:
        raise ModelError(f"not a GGUF file: {path} starts with {magic!r}, not {GGUF_MAGIC!r}")
    return path


def model_files(folder: Path) -> list[Path]:
    """The models in a folder, without image projectors and the later parts of split files."""
    return sorted(file for file in folder.glob("*.gguf") if file.is_file()
                  and not re.search("(?i)mmproj|-(?!00001)[0-9]{5}-of-", file.name))


# ==== 4. The model ======================================================================

NATIVE_ERROR = 4  # ggml.h: GGML_LOG_LEVEL_ERROR
native_errors: deque[str] = deque(maxlen=8)  # llama.cpp's last complaints


@lib.llama_log_callback
def on_native_log(level: int, text: bytes, _user_data) -> None:
    """Keep llama.cpp's own log out of the console, but remember why something failed."""
    if level == NATIVE_ERROR:
        native_errors.append(text.decode("utf-8", "replace").strip())


# Tokens that a text may name: control, user defined, unknown (llama.h: enum llama_token_attr).
SPECIAL_TOKEN = (lib.LLAMA_TOKEN_ATTR_CONTROL | lib.LLAMA_TOKEN_ATTR_USER_DEFINED
                 | lib.LLAMA_TOKEN_ATTR_UNKNOWN)
CHATML = ("{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
          "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
MAX_METADATA = 256  # bytes of a value
MAX_TEMPLATE_SECONDS = 2.0  # a long conversation takes milliseconds
TEMPLATE_FILE = "<template>"  # what Jinja calls the code of a template
MAX_RUN = 8192  # characters: up to 430 bytes of stack each, in threads of 8 MB
LONG_RUN = re.compile(rf"\S{{{MAX_RUN}}}|\S++|\s{{{MAX_RUN}}}|\s++")


def physical_cores() -> int:
    """The physical cores this process may use; hyper-threads only slow matrix products down, and
    more threads than a container has processors stall it: they spin while they wait."""
    topology = "/sys/devices/system/cpu/cpu{}/topology/thread_siblings_list"
    try:
        cores = len({Path(topology.format(n)).read_text() for n in os.sched_getaffinity(0)})
    except (AttributeError, OSError):  # not Linux, or no /sys
        cores = os.cpu_count() or 1
    try:  # cgroup v2: microseconds of processor time in each period, or "max"
        group = Path("/proc/self/cgroup").read_text().split("::")[-1].strip()
        quota, period = Path(f"/sys/fs/cgroup{group}/cpu.max").read_text().split()
        return max(1, min(cores, int(quota) // int(period)))
    except (OSError, ValueError):  # no such file, or "max"
        return cores


def _pointer(array: np.ndarray, ctype):
    """A ctypes pointer to a numpy array's memory; the array must outlive it."""
    return array.ctypes.data_as(ctypes.POINTER(ctype))


@dataclasses.dataclass(frozen=True, eq=False)
class Piece:
    """Rows of an image in place of tokens. In a prompt its positions are `ids`, which are negative
    and made of its content: the prefix cache needs to know nothing else, and keeps it whole or not
    at all. Made by a handler thread; its memory must not change afterwards."""

    ids: np.ndarray  # int32, shape (n_positions,), each below 0
    # In place of token embeddings: float32, (n_tokens, n_embd); each takes a cell of the KV cache.
    rows: np.ndarray
    # For a model that must read it in one piece, since it has fewer positions than tokens or
    # `sees_ahead`: decodes it, given a llama_context, the first position, a seq_id and n_batch, and
    # returns llama_decode's code. Engine thread, under the model lock. None: it is cut as text is.
    decode_whole: Callable[[int, int, int, int], int] | None = None
    sees_ahead: bool = False  # each row attends to all: they must fit in one batch


class Model:
    """Weights, vocabulary and chat template of one GGUF file. Safe to use from any thread."""

    def __init__(self, path: Path, n_gpu_layers: int = -1, on_progress=lambda fraction: True,
                 chat_template_file: str | None = None):
        """n_gpu_layers: layers to put on the GPU, -1 for all. on_progress: called with 0.0 to
        1.0; loading stops when it returns False. chat_template_file: Jinja, in place of the
        GGUF's own. Raises ModelError."""
        lib.llama_log_set(on_native_log, ctypes.c_void_p(None))
        lib.llama_backend_init()
        params = lib.llama_model_default_params()
        params.n_gpu_layers = n_gpu_layers
        params.progress_callback = lib.llama_progress_callback(
            lambda fraction, _: on_progress(fraction))
        native_errors.clear()
        self.path, self.name = path, path.stem
        self.pointer = lib.llama_model_load_from_file(os.fsencode(path), params)
        if not self.pointer:
            if not native_errors:
                raise ModelError(f"cannot load {path}: loading was interrupted")
            raise BrokenModel(f"cannot load {path}: {native_errors[0]}")
        self.vocab = lib.llama_model_get_vocab(self.pointer)
        self.n_vocab: int = lib.llama_vocab_n_tokens(self.vocab)
        self.n_ctx_train: int = lib.llama_model_n_ctx_train(self.pointer)
        self.n_params: int = lib.llama_model_n_params(self.pointer)
        self.size_bytes: int = lib.llama_model_size(self.pointer)
        self.n_embd: int = lib.llama_model_n_embd_out(self.pointer)
        self.quantization = self._told(lib.llama_model_desc).split()[-1]  # of most weights: "Q4_1"
        header = functools.partial(self._told, lib.llama_model_meta_val_str)  # the GGUF's, by key
        self.architecture = header(b"general.architecture")
        # Embedding models say how to make one vector of a text; generative ones do not.
        self.pools = header(f"{self.architecture}.pooling_type".encode()) not in ("", "0")
        self.generates = header(f"{self.architecture}.attention.causal".encode()) != "false"
        self.on_gpu = bool(n_gpu_layers and lib.llama_supports_gpu_offload())
        # A recurrent state cannot forget its last tokens, as a draft that was wrong must be.
        self.can_rewind = not (lib.llama_model_is_recurrent(self.pointer)
                               or lib.llama_model_is_hybrid(self.pointer))
        self.n_swa: int = lib.llama_model_n_swa(self.pointer)  # tokens of a sliding window, or 0
        # Saved states leave out what the window has passed: they are good to their end only.
        self.can_cut = self.can_rewind and not self.n_swa
        self.parts = contextlib.ExitStack()  # what features made of the weights; is freed first
        try:
            self._read_vocabulary()
            self._load_chat_template(chat_template_file)
        except ModelError:
            self.close()
            raise

    def _read_vocabulary(self) -> None:
        """What has to be known of its tokens again and again. Raises BrokenModel."""
        if lib.llama_vocab_type(self.vocab) == lib.LLAMA_VOCAB_TYPE_NONE:
            raise BrokenModel(f"cannot load {self.path}: it has no vocabulary")
        self._bos = lib.llama_vocab_bos(self.vocab)
        self._add_bos = bool(lib.llama_vocab_get_add_bos(self.vocab))
        # What an embedding model was trained to see at the end of a text: SEP, EOS or nothing.
        self._end_of_text = lib.llama_vocab_sep(self.vocab) \
            if lib.llama_vocab_get_add_sep(self.vocab) else lib.llama_vocab_eos(self.vocab) \
            if lib.llama_vocab_get_add_eos(self.vocab) else -1
        tokens = range(self.n_vocab)
        self.end_tokens = frozenset(  # EOS, end of turn and the like: they end the generation
            token for token in tokens if lib.llama_vocab_is_eog(self.vocab, token))
        self._specials = {
            self.piece(token, special=True).decode("utf-8", "replace"): token for token in tokens
            if lib.llama_vocab_get_attr(self.vocab, token) & SPECIAL_TOKEN}
        self._specials.pop("", None)
        self._shown: set[int] = set()  # control tokens that belong to the text

    def _load_chat_template(self, file: str | None) -> None:
        """Take the chat template of a file, or else the GGUF's own."""
        native = lib.llama_model_chat_template(self.pointer, None)
        self.has_template = bool(file or native)
        try:
            source = Path(os.path.expanduser(file)).read_text() if file else None
        except (OSError, ValueError) as error:
            raise ModelError(f"the chat template in {file} is unusable: {error}") from error
        self.set_template(source or (native or CHATML.encode()).decode("utf-8", "replace"),
                          file or self.path)

    def set_template(self, source: str, where: str | Path = "this family") -> None:
        """Render chats by a Jinja template, which is from `where`. Raises ModelError."""
        bos, eos = (self.piece(token, special=True).decode() if token >= 0 else ""
                    for token in (self._bos, lib.llama_vocab_eos(self.vocab)))
        try:
            self._template = llama_chat_format.Jinja2ChatFormatter(
                source, eos_token=eos, bos_token=bos)
        except Exception as error:  # jinja2's; a template is a program
            raise ModelError(f"the chat template in {where} is unusable: {error}") from error
        self.template_source = source

    def show(self, texts: Iterable[str]) -> None:
        """Let control tokens that are such texts be part of what a reply shows."""
        self._shown |= {self._specials[text] for text in texts if text in self._specials}

    def _told(self, function: Callable, *arguments) -> str:
        """What a function of llama.cpp writes about the model; "" where there is nothing."""
        buffer = ctypes.create_string_buffer(MAX_METADATA)
        function(self.pointer, *arguments, buffer, MAX_METADATA)
        return buffer.value.decode("utf-8", "replace")

    def close(self) -> None:
        """Free its parts, then the weights. Nothing of this model may be called afterwards."""
        self.parts.close()
        lib.llama_model_free(self.pointer)

    def fewest_tokens(self, text: str) -> int:
        """A lower bound of the tokens in a text, found in no time: a text that cannot fit is
        refused before llama.cpp spends seconds or minutes on it."""
        opener, lengths = self._openers
        starts = (match.start() for match in opener.finditer(text))
        n_specials = sum(any(text[start:start + length] in self._specials for length in lengths)
                         for start in starts)
        n_bytes = len("".join(text.split()).encode())  # some tokenizers drop white space
        return max(n_specials, n_bytes // self._longest_piece)

    @functools.cached_property
    def _openers(self) -> tuple[re.Pattern, list[int]]:
        """What special tokens that cannot overlap begin with (`<`, but not the newline of which
        some vocabularies have runs), and their lengths."""
        further_in = set("".join(text[1:] for text in self._specials))
        openers = {text[0] for text in self._specials} - further_in
        lengths = {len(text) for text in self._specials if text[0] in openers}
        pattern = "[" + "".join(map(re.escape, sorted(openers))) + "]" if openers else "(?!)"
        return re.compile(pattern), sorted(lengths)

    @functools.cached_property
    def _longest_piece(self) -> int:
        """Bytes of the longest token."""
        return max(len(self.piece(token, special=True)) for token in range(self.n_vocab))

    def tokenize(self, text: str, bos: bool = True, special: bool = True) -> np.ndarray:
        """Return the token ids (int32) of a text; with `bos` with exactly one BOS if the model
        wants one. With `special`, special tokens written out in the text (a chat template's)
        become those tokens."""
        parts = []
        for part in self._cut_long_runs(text):
            data = part.encode()
            tokens = np.empty(len(data) + 2, dtype=np.int32)  # a token covers a byte or more
            n = lib.llama_tokenize(self.vocab, data, len(data), _pointer(tokens, lib.llama_token),
                                   len(tokens), False, special)
            if n < 0:
                raise ValueError(f"llama.cpp cannot tokenize this text of {len(data)} bytes")
            parts.append(tokens[:n])
        tokens = np.concatenate(parts)
        if bos and self._add_bos and (len(tokens) == 0 or tokens[0] != self._bos):
            tokens = np.insert(tokens, 0, self._bos)
        if bos and self.pools and self._end_of_text >= 0:
            tokens = np.append(tokens, self._end_of_text).astype(np.int32)
        return tokens

    def _cut_long_runs(self, text: str) -> list[str]:
        """Cut a text where it runs on for very long without white space, or with nothing else.
        subtle: for many vocabularies llama.cpp splits words with std::regex, which recurses for
        each character: 40,000 letters overflow the stack and end the process. A cut costs a token
        or so; it never goes through a special token."""
        parts, start = [], 0
        for run in LONG_RUN.finditer(text):
            cut = run.end()
            if cut - run.start() == MAX_RUN:
                for special in self._specials:
                    across = text.find(special, cut - len(special) + 1, cut + len(special) - 1)
                    cut = across if across > start else cut
                parts.append(text[start:cut])
                start = cut
        return [*parts, text[start:]]

    def piece(self, token: int, special: bool = False) -> bytes:
        """Return a token's bytes; a control token is empty unless `special` asks for its name or
        it is one that a chat format writes."""
        special = special or token in self._shown
        n = -32  # bytes, negative while there is too little room; most tokens are shorter
        while n < 0:  # 3 us a time: not worth a cache
            buffer = ctypes.create_string_buffer(-n)
            n = lib.llama_token_to_piece(self.vocab, token, buffer, -n, 0, special)
        return buffer.raw[:n]

    def render_chat(self, messages: list[dict], add_generation_prompt: bool = True,
                    options: dict | None = None) -> str:
        """Return the prompt for `messages`. options: what else the template may read, such as
        `tools`. Raises TemplateError."""
        deadline = time.monotonic() + MAX_TEMPLATE_SECONDS

        def watch(frame, _event, _argument):
            """A trace function, called for each line: it can end a loop that writes nothing."""
            if time.monotonic() > deadline:
                raise TimeoutError(f"it ran longer than {MAX_TEMPLATE_SECONDS:g} seconds")
            return watch if frame.f_code.co_filename == TEMPLATE_FILE else None

        template = copy.copy(self._template)
        template.add_generation_prompt = add_generation_prompt
        tracer = sys.gettrace()
        sys.settrace(watch)
        try:
            try:
                return template(messages=messages, **(options := options or {})).prompt
            except (TypeError, jinja2.UndefinedError):
                if options.get("tools") is not None:
                    raise
                return template(messages=messages, **options | {"tools": []}).prompt  # some need it
        except Exception as error:  # a template is a program: it can raise anything
            raise TemplateError(str(error) or type(error).__name__) from error
        finally:
            sys.settrace(tracer)


# ==== 5. Sampling: from one row of logits to one token ==================================

GREEDY_BELOW = 1e-3  # temperature: dividing logits by less overflows, and changes nothing anyway
KEEP_AT_LEAST = 1  # tokens, which a filter must leave
N_SEEDS = 2**32 - 1  # seeds are 32 bit, and llama.h keeps 0xFFFFFFFF for "random"
NO_TOKEN = -1  # nothing may follow: the reply ends
N_DRAWS = 8  # before NO_TOKEN: a constraint may refuse what it did not rule out, a few tokens
CANDIDATE = np.dtype([("id", np.int32), ("logit", np.float32), ("p", np.float32)])


def knob(default, low: float = -math.inf, high: float = math.inf):
    """A field of SamplingParams with its inclusive limits."""
    return dataclasses.field(default=default, metadata={"low": low, "high": high})


@dataclasses.dataclass
class SamplingParams:
    """How to choose a token. Names, meanings and neutral values are the OpenAI API's and
    llama.cpp's (tools/server/README.md in its sources)."""

    temperature: float = knob(1.0, 0, 2)  # 0 (below GREEDY_BELOW) takes the likeliest token
    top_k: int = knob(0, -1, 2**31 - 1)  # keep the k likeliest; 0 and -1 keep all
    top_p: float = knob(1.0, 0, 1)  # keep the likeliest that together have this probability
    min_p: float = knob(0.0, 0, 1)  # drop what is less likely than this times the likeliest
    presence_penalty: float = knob(0.0, -2, 2)  # off the logit of each token generated before
    frequency_penalty: float = knob(0.0, -2, 2)  # the same, times how often
    min_tokens: int = knob(0, 0, 2**31 - 1)  # no end before so many tokens
    seed: int | None = knob(None, -(2**63), 2**63 - 1)  # None: a new one every time
    logit_bias = {}  # added to logits, by token id; no field, as bodies have all of these

    def is_argmax(self) -> bool:
        """Whether the largest of the biased logits is all that is asked for."""
        return self.temperature < GREEDY_BELOW and not (
            self.presence_penalty or self.frequency_penalty)

    def chain(self, model: Model, n_ctx: int, prompt: np.ndarray) -> Iterator:
        """Yield new samplers in llama.cpp's order, without those that would do nothing. n_ctx:
        tokens that prompt and reply may have. prompt: token ids, below 0 for parts of images."""
        if self.logit_bias:
            biases = (lib.llama_logit_bias * len(self.logit_bias))(*self.logit_bias.items())
            yield lib.llama_sampler_init_logit_bias(model.n_vocab, len(biases), biases)
        yield from self.penalties(model, n_ctx, prompt)
        yield from self.choice(
            model, secrets.randbelow(N_SEEDS) if self.seed is None else self.seed % N_SEEDS)

    def penalties(self, model: Model, n_ctx: int, prompt: np.ndarray) -> Iterator:
        """What makes tokens less likely because they were there before."""
        if self.presence_penalty or self.frequency_penalty:
            # OpenAI counts the whole reply: the window is as long as a reply can be.
            yield lib.llama_sampler_init_penalties(
                model.n_vocab, n_ctx, 1.0, self.frequency_penalty, self.presence_penalty)

    def choice(self, model: Model, seed: int) -> Iterator:
        """What chooses one token."""
        if self.temperature < GREEDY_BELOW:
            yield lib.llama_sampler_init_greedy()
            return
        yield from self.filters(seed)
        yield lib.llama_sampler_init_temp(self.temperature)
        yield lib.llama_sampler_init_dist(seed)

    def filters(self, seed: int) -> Iterator:
        """What leaves out unlikely tokens, but never all."""
        if self.top_k > 0:
            yield lib.llama_sampler_init_top_k(self.top_k)
        if self.top_p < 1:
            yield lib.llama_sampler_init_top_p(self.top_p, KEEP_AT_LEAST)
        if self.min_p:
            yield lib.llama_sampler_init_min_p(self.min_p, KEEP_AT_LEAST)


class GrammarError(ValueError):
    """A reply cannot go on under its grammar; the message says why."""


class Constraint:
    """What a reply may be, token by token. Engine thread, under the model lock, so an answer takes
    a small part of a millisecond. This one allows everything."""

    def take(self, token: int) -> bool:
        """Read a chosen token; False, and nothing is changed, if it may not come here. Raises
        GrammarError."""
        return True

    def restrict(self, logits: np.ndarray) -> None:
        """Set the logits, float32 of shape (n_vocab,), of all tokens that may not come here to
        -inf. Raises GrammarError."""


class Sampler:
    """One request's choice of tokens: llama.cpp's chain of samplers, within its constraint.

    Greedy sampling without penalties needs no chain: the largest logit is found ten times faster
    in place than in the array of structs that llama.cpp makes of a row for its samplers.
    """

    def __init__(self, model: Model, params: SamplingParams, n_ctx: int, prompt: np.ndarray,
                 constraint: Constraint | None = None):
        """n_ctx, prompt: as for SamplingParams.chain."""
        self._model, self._constraint, self._min_tokens = model, constraint, params.min_tokens
        self._n_taken = 0
        self._is_argmax = params.is_argmax()
        self._biased = np.fromiter(params.logit_bias.keys(), dtype=np.int32)  # token ids
        self._bias = np.fromiter(params.logit_bias.values(), dtype=np.float32)
        self._chain = lib.llama_sampler_chain_init(lib.llama_sampler_chain_default_params())
        for sampler in () if self._is_argmax else params.chain(model, n_ctx, prompt):
            lib.llama_sampler_chain_add(self._chain, sampler)

    def __del__(self, free=lib.llama_sampler_free):  # bound: modules may be gone at exit
        free(self._chain)

    def sample(self, context: "Context", row: int) -> int:
        """Choose a token from a row of the last batch, and note it as chosen."""
        if self._constraint is None and self._n_taken >= self._min_tokens:
            self._n_taken += 1
            if self._is_argmax:
                return self._draw(context.logits(row))
            return lib.llama_sampler_sample(self._chain, context.pointer, row)
        # A free draw is right most of the time, and costs less than looking at all tokens first.
        token = self._draw(context.logits(row))
        if self._take(token):
            return token
        logits = context.logits(row).copy()
        if self._constraint:
            self._constraint.restrict(logits)
        if self._n_taken < self._min_tokens:
            logits[list(self._model.end_tokens)] = -math.inf
        for _ in range(N_DRAWS):
            logits[token] = -math.inf  # what was refused once is not drawn again
            token = self._draw(logits) if np.isfinite(logits).any() else NO_TOKEN
            if token == NO_TOKEN or self._take(token):
                return token
        return NO_TOKEN

    def _draw(self, logits: np.ndarray) -> int:
        """A token from logits of shape (n_vocab,), by the chain."""
        if self._is_argmax:
            if len(self._biased):
                logits = logits.copy()
                logits[self._biased] += self._bias
            return int(logits.argmax())
        candidates = np.zeros(len(logits), dtype=CANDIDATE)
        candidates["id"] = np.arange(len(logits), dtype=np.int32)
        candidates["logit"] = logits
        array = lib.llama_token_data_array(  # of the same memory
            data=_pointer(candidates, lib.llama_token_data), size=len(candidates), selected=-1)
        lib.llama_sampler_apply(self._chain, array)
        return array.data[array.selected].id

    def _take(self, token: int) -> bool:
        """Note a token as chosen; False if it may not come here."""
        if self._n_taken < self._min_tokens and token in self._model.end_tokens:
            return False
        if self._constraint and not self._constraint.take(token):
            return False
        lib.llama_sampler_accept(self._chain, token)
        self._n_taken += 1
        return True


@dataclasses.dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A token, its natural-log probability, and the likeliest tokens in its place."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]  # (token, logprob), likeliest first


def token_logprob(logits: np.ndarray, token: int, n_top: int) -> TokenLogprob:
    """Return the log-probability of `token` under softmax(logits), and the `n_top` likeliest.
    logits: shape (n_vocab,), as the model wrote them: before temperature, bias and penalties.
    Raises ValueError where they are not numbers."""
    if math.isnan(logits[token]):
        raise ValueError("the model's logits are not numbers: its file may be damaged")
    logprobs = logits - logits.max()  # exp must not overflow
    logprobs -= np.log(np.exp(logprobs).sum())
    top = np.argpartition(logits, -n_top)[-n_top:].tolist() if n_top else []
    top.sort(key=logits.__getitem__, reverse=True)
    return TokenLogprob(token, float(logprobs[token]), tuple((t, float(logprobs[t])) for t in top))


# ==== 6. The context: one KV cache split into slots, one batch at a time ================

DECODE_OK, DECODE_NO_ROOM = 0, 1  # what llama_decode returns (llama.h)
FLASH_ATTN = {"auto": lib.LLAMA_FLASH_ATTN_TYPE_AUTO, True: lib.LLAMA_FLASH_ATTN_TYPE_ENABLED,
              False: lib.LLAMA_FLASH_ATTN_TYPE_DISABLED}


@dataclasses.dataclass
class Chunk:
    """Consecutive tokens of one slot in a batch: a decode row and what is drafted to follow it, or
    a piece of a prompt. Rows of an image go in a batch of their own."""

    slot: "Slot"
    tokens: np.ndarray | list[int]
    wants_logits: bool  # of its last token, and of the one before each drafted one
    wants_all: bool = False  # logits of each token
    n_draft: int = 0  # how many of the tokens are drafted
    row: int = -1  # the last token's row in the batch, set by Context.decode
    image: Piece | None = None  # what `tokens` are a part of, ...
    first_row: int = 0  # ... from which of its rows on


class Context:
    """A llama.cpp context: KV cache and compute buffers. Only under the model lock."""

    def __init__(self, model: Model, n_ctx: int, parallel: int, n_batch: int = 256,
                 n_ubatch: int = 512, n_threads: int = 0, flash_attn: bool | str = "auto",
                 embeds: bool = False):
        """n_ctx: tokens per slot; parallel: slots; n_batch: rows of a decode; n_ubatch: rows
        computed at a time; n_threads: 0 takes the physical cores; embeds: give hidden states, not
        logits, and share n_ctx cells between the slots. Raises ModelError."""
        params = lib.llama_context_default_params()
        params.n_ctx = n_ctx if embeds else n_ctx * parallel  # of all slots together
        params.n_seq_max = parallel
        # Each slot has its own stream of n_ctx cells: its attention reads its own tokens only, and
        # no request's context shrinks because others run beside it.
        params.kv_unified = params.embeddings = embeds
        params.n_batch = n_batch
        params.n_ubatch = min(n_ubatch, n_batch)
        self.n_threads = n_threads or physical_cores()
        params.n_threads = params.n_threads_batch = self.n_threads
        params.flash_attn_type = FLASH_ATTN[flash_attn]
        native_errors.clear()
        self.pointer = lib.llama_init_from_model(model.pointer, params)
        if not self.pointer:
            reason = native_errors[-1] if native_errors else "not enough memory?"
            raise ModelError(f"cannot make a context of {parallel} slots with {n_ctx} tokens each: "
                             f"{reason} (lower n_ctx or parallel)")
        self._memory = lib.llama_get_memory(self.pointer)
        self.n_vocab, self.n_embd, self.parallel = model.n_vocab, model.n_embd, parallel
        self.n_ctx = n_ctx  # llama.cpp pads to 256; what was promised is what is used
        self.n_batch = n = lib.llama_n_batch(self.pointer)
        # A llama_batch over numpy arrays, so that a chunk is written by slices, not by rows.
        self._token, self._pos, self._seq_id = np.zeros((3, n), dtype=np.int32)
        self._wants_logits = np.zeros(n, dtype=np.int8)
        self._n_seq_id = np.ones(n, dtype=np.int32)  # each row belongs to one slot
        row_offsets = self._seq_id.itemsize * np.arange(n, dtype=np.uintp)
        self._seq_pointers = self._seq_id.ctypes.data + row_offsets
        self._batch = lib.llama_batch(
            token=_pointer(self._token, lib.llama_token), pos=_pointer(self._pos, lib.llama_pos),
            n_seq_id=_pointer(self._n_seq_id, ctypes.c_int32),
            seq_id=_pointer(self._seq_pointers, ctypes.POINTER(lib.llama_seq_id)),
            logits=_pointer(self._wants_logits, ctypes.c_int8))
        self._n_swa = model.n_swa
        self.being_copied: set[int] = set()  # slots whose cells the next decode copies

    def close(self) -> None:
        """Free the KV cache and compute buffers."""
        lib.llama_free(self.pointer)

    def decode(self, chunks: list[Chunk]) -> int:
        """Compute a batch; return llama_decode's code. On success each chunk's `row` is valid.
        The chunks have at most n_batch tokens together, and each continues its slot; one with an
        image is alone."""
        image, end = chunks[0].image, 0
        if image and image.decode_whole:
            slot = chunks[0].slot
            return image.decode_whole(self.pointer, slot.n_cached, slot.seq_id, self.n_batch)
        for chunk in chunks:
            start, end = end, end + len(chunk.tokens)
            self._token[start:end] = chunk.tokens  # of an image: not read
            self._pos[start:end] = chunk.slot.n_cached + np.arange(end - start)
            self._seq_id[start:end] = chunk.slot.seq_id
            chunk.row = end - 1
            self._wants_logits[start:end] = chunk.wants_all
            self._wants_logits[chunk.row - chunk.n_draft : end] |= chunk.wants_logits
        batch = self._batch
        batch.n_tokens = end
        if image:
            rows = _pointer(image.rows[chunks[0].first_row:], ctypes.c_float)
            batch = lib.llama_batch.from_buffer_copy(batch)
            batch.token, batch.embd = None, rows
        code = lib.llama_decode(self.pointer, batch)
        lib.llama_synchronize(self.pointer)  # a GPU goes on by itself, and decodes are timed
        if code == DECODE_OK:
            self.being_copied.clear()
        return code

    def logits(self, row: int) -> np.ndarray:
        """The raw logits of a row, float32 of shape (n_vocab,); valid until the next decode."""
        pointer = lib.llama_get_logits_ith(self.pointer, row)
        return np.ctypeslib.as_array(pointer, shape=(self.n_vocab,))

    def copy(self, source: int, target: int) -> None:
        """Make slot `target` a copy of slot `source`, which may be running. llama.cpp moves the
        cells of the whole slot, at the start of the next decode."""
        self.being_copied.add(source)
        lib.llama_memory_seq_cp(self._memory, source, target, -1, -1)

    def state_size(self, seq_id: int) -> int:
        """Bytes that `save` would give."""
        return lib.llama_state_seq_get_size(self.pointer, seq_id)

    def save(self, seq_id: int) -> np.ndarray:
        """A slot's cells as bytes, uint8 of shape (n,)."""
        state = np.empty(self.state_size(seq_id), dtype=np.uint8)
        lib.llama_state_seq_get_data(
            self.pointer, _pointer(state, ctypes.c_uint8), len(state), seq_id)
        return state

    def restore(self, seq_id: int, state: np.ndarray) -> bool:
        """Put back what `save` gave, in place of a slot's cells; when False, the slot is empty.
        subtle: at once, not with the next decode. What is `being_copied` must stay until then."""
        return bool(lib.llama_state_seq_set_data(
            self.pointer, _pointer(state, ctypes.c_uint8), len(state), seq_id))

    def trim(self, seq_id: int, n_keep: int) -> int:
        """Forget a slot's tokens from `n_keep` on; return how many are left. subtle: models with
        recurrent state cannot forget a part, and where a window slides over the text, a restored
        slot lacks what it had passed; then everything goes, and 0 is left."""
        lacks_cells = self._n_swa and lib.llama_memory_seq_pos_min(
            self._memory, seq_id) > max(0, n_keep - self._n_swa + 1)
        if lib.llama_memory_seq_rm(self._memory, seq_id, n_keep, -1) and not lacks_cells:
            return n_keep
        lib.llama_memory_seq_rm(self._memory, seq_id, -1, -1)
        return 0


# ==== 7. Requests and slots =============================================================


@dataclasses.dataclass(frozen=True, slots=True)
class Event:
    """What the engine tells a handler. A request's last one has `finish_reason` or `error`."""

    request: "Request"
    text: str = ""
    logprobs: tuple[TokenLogprob, ...] = ()
    finish_reason: str | None = None  # "stop" or "length"
    error: EngineFault | EngineClosed | GrammarError | None = None


@dataclasses.dataclass(eq=False)
class Request:
    """The guest: one choice being generated. Made by a handler thread; after `submit` everything
    but `cancelled` and `n_read` belongs to the engine thread. Others may read the counts, which are
    final after the last event."""

    # subtle: a bound on events, not bytes. An event is one token's text, so this is half a
    # minute of a fast stream: who is further behind than that has stopped reading.
    MAX_UNREAD_EVENTS = 4096

    prompt: np.ndarray  # token ids, int32, shape (n,), n >= 1
    sampler: Sampler
    max_tokens: int  # 0: only read the prompt
    stops: dataclasses.InitVar[list[str]] = ()
    n_top_logprobs: int | None = None  # None: no log-probabilities
    index: int = 0  # which choice of its reply
    # Called with the logits, shape (n_vocab,), in front of each token that its prompt is computed
    # for, and that token. Engine thread, under the model lock.
    on_prompt: Callable[[np.ndarray, int], None] | None = None
    reuses: bool = True  # may take a cached prefix
    events: queue.SimpleQueue | None = None  # shared by the choices of a reply; None: its own
    images: dict[int, Piece] = dataclasses.field(default_factory=dict)  # by their first position
    expected: np.ndarray | None = None  # token ids, int32, shape (n,): what the reply may be like
    drafting: object = None  # what the engine's drafter keeps for it

    def __post_init__(self, stops: list[str]):
        self.events = self.events or queue.SimpleQueue()
        self.cancelled = False  # set by the handler, read by the engine
        self.n_sent = 0  # events; written by the engine
        self.n_read = 0  # events; written by the handler
        self.arrival = 0  # place in the order of arrival, set by submit
        self.n_reused = 0  # prompt tokens that were in the KV cache already
        self.n_generated = self.n_accepted = self.n_rejected = 0  # tokens; the last two drafted
        self.stopped_by = ""  # the stop sequence that ended it, if one did
        # time.perf_counter(), seconds
        self.submitted = self.placed = self.first_token = self.last_token = 0.0
        self._text = TextStream(stops)
        self._unsent_logprobs: deque[tuple[int, TokenLogprob]] = deque()

    @property
    def n_prompt(self) -> int:
        """Tokens of the prompt; an image may have more of them than positions."""
        return len(self.prompt) + extra_tokens(self.images)

    def image_at(self, position: int) -> tuple[int, int, Piece | None]:
        """The image that covers a position of the prompt: its first position, the one behind it,
        and itself; in text that position, the text's end, None. (Images are in their order.)"""
        for start, image in self.images.items():
            if position < start + len(image.ids):
                return (start, start + len(image.ids), image) if start <= position else \
                    (position, start, None)
        return position, len(self.prompt), None

    def cancel(self) -> None:
        """Stop generating, soon; no further event is promised."""
        self.cancelled = True

    def push(self, piece: bytes, is_end: bool, logprob: TokenLogprob | None) -> Event:
        """Take one token; return the text it completes and the finish_reason, if any."""
        self.n_generated += 1
        self.last_token = time.perf_counter()
        if logprob is not None and not is_end:
            self._unsent_logprobs.append((self._text.n_decoded, logprob))
        is_full = self.n_generated >= self.max_tokens
        text, self.stopped_by = self._text.feed(piece, final=is_end or is_full)
        finish_reason = "stop" if is_end or self.stopped_by else "length" if is_full else None
        # A token's text is sent if it starts before the end of what was sent; so the tokens of a
        # stop sequence are left out. Without one, the last event takes whatever is left.
        waiting, logprobs, ends = self._unsent_logprobs, [], finish_reason and not self.stopped_by
        while waiting and (waiting[0][0] < self._text.n_sent or ends):
            logprobs.append(waiting.popleft()[1])
        return Event(self, text, tuple(logprobs), finish_reason)

    def send(self, event: Event) -> None:
        """Pass an event to the handler; one that stopped reading is given up."""
        if self.n_sent - self.n_read > self.MAX_UNREAD_EVENTS:
            self.cancel()
            fault = EngineFault("the client reads more slowly than the model writes")
            event = Event(self, error=fault)
        self.n_sent += 1
        self.events.put(event)


def extra_tokens(images: dict[int, Piece]) -> int:
    """How many more tokens than positions images have."""
    return sum(len(image.rows) - len(image.ids) for image in images.values())


class Slot:
    """A lane: a permanent seq_id, its cached tokens, and its guest, if any. Engine thread only."""

    def __init__(self, seq_id: int, n_ctx: int):
        self.seq_id = seq_id
        self.tokens = np.empty(n_ctx, dtype=np.int32)
        self.n_cached = 0  # tokens[:n_cached] are in the KV cache
        self.request: Request | None = None
        self.next_token: int | None = None  # sampled, not yet in the KV cache
        self.last_used = 0  # step number, for choosing the least recently used

    @property
    def is_prefilling(self) -> bool:
        return self.request is not None and self.next_token is None

    def stats(self) -> "SlotStats":
        request = self.request
        if request is None:
            return SlotStats(self.seq_id, "idle", self.n_cached)
        speed = (request.n_generated - 1) / (request.last_token - request.first_token) \
            if request.n_generated > 1 else 0.0
        return SlotStats(self.seq_id, "prefilling" if self.is_prefilling else "decoding",
                         self.n_cached, request.n_reused, request.n_generated, speed)


def common_prefix(a: np.ndarray, b: np.ndarray) -> int:
    """The number of leading elements that two arrays share."""
    n = min(len(a), len(b))
    return int(np.append(a[:n] != b[:n], True).argmax())  # the first True


@dataclasses.dataclass(frozen=True, slots=True)
class SlotStats:
    """What a slot does right now."""

    id: int
    state: str  # "idle", "prefilling" or "decoding"
    tokens: int  # in its KV cache
    cached: int = 0  # of its request's prompt, reused
    generated: int = 0
    tokens_per_second: float = 0.0  # since its first token


class Histogram:
    """Values counted by size. `bounds`: the inclusive upper ends of all buckets but the last."""

    def __init__(self, bounds: tuple[float, ...], counts: Sequence[int] = (), total: float = 0.0):
        self.bounds, self.total = bounds, total
        self.counts = list(counts or [0] * (len(bounds) + 1))

    def add(self, value: float) -> None:
        self.counts[bisect.bisect_left(self.bounds, value)] += 1
        self.total += value

    def copy(self) -> "Histogram":
        return Histogram(self.bounds, self.counts, self.total)

    def __add__(self, other: "Histogram") -> "Histogram":
        counts = [a + b for a, b in zip(self.counts, other.counts)]
        return Histogram(self.bounds, counts, self.total + other.total)


def histogram(*bounds: float):
    """A field of Stats."""
    return dataclasses.field(default_factory=functools.partial(Histogram, bounds))


@dataclasses.dataclass(slots=True)
class Stats:
    """Counts since the start, and the slots. The engine counts in one of its own; when requests got
    slots, and after a step, a copy replaces the one that others read, so reading needs no lock."""

    slots: tuple[SlotStats, ...] = ()
    n_steps: int = 0
    n_prompt: int = 0  # tokens of the prompts that have got a slot
    n_cached: int = 0  # of these, tokens that were in the KV cache already
    n_generated: int = 0
    n_accepted: int = 0  # of these, tokens that were drafted
    n_rejected: int = 0  # tokens drafted in vain
    n_restored: int = 0  # prefixes that came back from the store
    n_decode_errors: int = 0
    # Tokens in each batch; seconds from submit to the first token, from one token to the next.
    batch: Histogram = histogram(1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
    first_token: Histogram = histogram(0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300)
    inter_token: Histogram = histogram(0.003, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5)

    @property
    def n_busy(self) -> int:
        return sum(slot.state != "idle" for slot in self.slots)

    def copy(self, slots: list[Slot]) -> "Stats":
        return dataclasses.replace(
            self, slots=tuple([slot.stats() for slot in slots]), batch=self.batch.copy(),
            first_token=self.first_token.copy(), inter_token=self.inter_token.copy())

    def __add__(self, other: "Stats") -> "Stats":
        return Stats(*[getattr(self, field.name) + getattr(other, field.name)
                       for field in dataclasses.fields(self)])


# ==== 8. What features may add ==========================================================

# A Constraint (part 5) and a Piece (part 4) come with a request; these two come with an engine.


class Drafter:
    """Guesses tokens ahead of the replies, and is told what became of them. This one guesses none.

    One batch verifies what is drafted behind a slot's own token, since rows cost less than steps:
    row by row the request's sampler chooses, for as long as it chooses what was drafted. So a reply
    is distributed as it would be without drafts (speculative decoding: arxiv.org/abs/2211.17192).
    Engine thread, under the model lock, but for `prepare`: what it takes, all streams wait for.
    """

    def prepare(self, requests: list[Request]) -> None:
        """Give the choices of one reply what it wants to keep for each, in `Request.drafting`.
        Handler thread, before they are queued; may take what reading the prompts takes."""

    def drafts(self, slots: list[Slot], n_prefill: int, room: int) -> dict[Slot, list[int]]:
        """Tokens that may follow the `next_token` of slots that decode; of those left out, none.
        Each is an id of the vocabulary; a reply must have place for one token more than its
        draft. n_prefill: rows of prompts in the same batch. room: rows that are left in it."""
        return {}

    def verified(self, slot: Slot, tokens: list[int]) -> None:
        """Hear the next tokens of a slot's reply: as many drafted ones as were right, and one more;
        none if the batch failed. When the reply has ended with them, `slot.request` is None."""

    def note(self, n_rows: int, n_draft: int, seconds: float) -> None:
        """Hear what a decode without prompts has taken; n_draft of its rows were drafted."""


class PrefixStore:
    """Where a prefix goes when its slot is taken, and comes back from. This one keeps nothing.

    Engine thread, under the model lock, when a request gets its slot: all streams wait for it. What
    it takes must be small against computing the prefix again. May raise: that request fails.
    """

    def longest(self, prompt: np.ndarray, whole: bool = False) -> tuple[int, int]:
        """How many tokens a prompt (int32, shape (n,)) shares with the best entry, and its key for
        `get`. whole: only entries count that are shared to their end."""
        return 0, -1

    def put(self, tokens: np.ndarray, context: Context, seq_id: int) -> None:
        """Keep what a slot holds, if there is room: its tokens (int32, shape (n,), which will be
        overwritten) and its cells, which Context.save gives."""

    def get(self, key: int) -> tuple[np.ndarray, np.ndarray]:
        """The tokens of an entry, and the state for Context.restore. They stay as they are until
        both are in a slot, whatever is put meanwhile."""
        raise NotImplementedError


# ==== 9. Prefixes: which slot a prompt gets, with how much of it cached =================

# Sharing a prefix copies the cells of a whole slot, which costs about as much as prefilling
# this many tokens: fewer are computed again instead.
MIN_SHARED_TOKENS = 16


@dataclasses.dataclass(eq=False)
class PrefixCache:
    """What the slots hold, idle and running, and what lies in the store, as prefixes of prompts.
    Engine thread, under the model lock."""

    slots: list[Slot]
    context: Context
    can_cut: bool  # a part of what was stored will do, for this model
    counts: Stats
    store: PrefixStore = dataclasses.field(default_factory=PrefixStore)  # `equip` may replace it

    def place(self, request: Request) -> bool:
        """Put a request into an idle slot with as much of its prompt cached as can be had. False
        when none is idle, or when another request is prefilling a prefix of this prompt right now:
        copying it soon is cheaper than computing it twice."""
        idle = [slot for slot in self.slots if slot.request is None]
        if not idle:
            return False
        prompt = request.prompt
        reusable = prompt if request.reuses else prompt[:0]
        shared = {s: common_prefix(reusable, s.tokens[: s.n_cached]) for s in self.slots}
        source = max(self.slots, key=lambda slot: (shared[slot], slot.request is None))
        # A part of what was stored will do only if the cells before it are there, too.
        n_stored, stored = self.store.longest(reusable, whole=not self.can_cut)
        coming = [common_prefix(reusable, s.request.prompt) for s in self.slots if s.is_prefilling]
        if max(coming, default=0) - max(shared[source], n_stored) >= MIN_SHARED_TOKENS:
            return False
        restorable = [slot for slot in idle if slot.seq_id not in self.context.being_copied]
        if restorable and n_stored - shared[source] >= MIN_SHARED_TOKENS:
            target = min(restorable, key=lambda slot: slot.last_used)
            self._restore(target, stored)
        else:
            target = self._share(source, shared, idle)
        # The last prompt token is always computed: its logits choose the first new token.
        keep = min(common_prefix(reusable, target.tokens[: target.n_cached]), len(prompt) - 1)
        start, _, image = request.image_at(keep)
        keep = start if image else keep  # an image is kept whole or not at all
        self._save(target, keep)
        target.n_cached = request.n_reused = self.context.trim(target.seq_id, keep)
        target.request, request.placed = request, time.perf_counter()
        self.counts.n_prompt += request.n_prompt
        self.counts.n_cached += request.n_reused
        return True

    def _share(self, source: Slot, shared: dict[Slot, int], idle: list[Slot]) -> Slot:
        """Choose an idle slot for a prompt, and let it have the prefix that `source` shares with
        the prompt, if copying is cheaper than computing. shared: tokens of each slot."""
        # Overwrite the slot with the prefix when this prompt continues it, else the least recently
        # used, so that a short common beginning costs nobody a long conversation.
        target = min(idle, key=lambda slot: slot.last_used)
        if source in idle and shared[source] and 2 * shared[source] >= source.n_cached:
            target = source
        if shared[source] - shared[target] >= MIN_SHARED_TOKENS:
            self._save(target, 0)
            self.context.copy(source.seq_id, target.seq_id)
            target.n_cached = source.n_cached
            target.tokens[: target.n_cached] = source.tokens[: source.n_cached]
        return target

    def _save(self, slot: Slot, n_kept: int) -> None:
        """Offer a slot's tokens to the store if more than their first `n_kept` are about to be
        lost, and nobody else has them."""
        tokens = slot.tokens[: slot.n_cached]
        n_safe = max([n_kept, self.store.longest(tokens)[0]] + [
            common_prefix(tokens, other.tokens[: other.n_cached])
            for other in self.slots if other is not slot])
        if len(tokens) - n_safe >= MIN_SHARED_TOKENS:
            self.store.put(tokens, self.context, slot.seq_id)

    def _restore(self, slot: Slot, key: int) -> None:
        """Put an entry of the store into an idle slot."""
        tokens, state = self.store.get(key)
        self._save(slot, 0)
        slot.n_cached = 0  # whatever happens now
        if self.context.restore(slot.seq_id, state):
            slot.n_cached = len(tokens)
            slot.tokens[: len(tokens)] = tokens
            self.counts.n_restored += 1


# ==== 10. The engine ===================================================================

LAST_STEP_SECONDS = 10.0  # for the step that runs when the time to drain is over
FAULT_PAUSE_SECONDS = 0.5  # a fault that comes back at once must not fill the log or a core


class Engine:
    """Runs many requests through one context: continuous batching with prefix reuse."""

    def __init__(self, model: Model, context: Context, prefill_chunk: int = 96,
                 max_queue: int = 128):
        """prefill_chunk: prompt tokens per step while anything decodes. max_queue: requests
        that may wait for a slot. The context becomes the engine's own; the model does not."""
        self.model, self.context, self.n_ctx = model, context, context.n_ctx
        self._prefill_chunk, self._max_queue = prefill_chunk, max_queue
        self.capabilities, self.facts = list[str](), dict[str, str]()  # that features tell of it
        self._slots = [Slot(i, context.n_ctx) for i in range(context.parallel)]
        self.drafter = Drafter()  # a feature's `equip` may replace it, before there are requests
        self._counts = Stats()
        self.prefixes = PrefixCache(self._slots, context, model.can_cut, self._counts)
        self.stats = self._counts.copy(self._slots)
        # Events leave at the end of a step: a handler awake before would take the GIL from it.
        self._outbox: deque[Event] = deque()
        self._arrivals = itertools.count(1)
        self._step_began: float | None = None  # time.monotonic(); None between steps
        # Protects the context: held for one step at a time, and by close(). See between_steps.
        self.model_lock = threading.Lock()
        # Protects the waiting queue, the errands and the deadline; notified when one changes.
        self.changed = threading.Condition()
        self._errands: deque[tuple[Callable, Future]] = deque()
        self._waiting: deque[Request] = deque()
        self._deadline: float | None = None  # set by close(): when to give up what still runs
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    # ---- any thread ------------------------------------------------------------------

    def start(self) -> "Engine":
        """Start the engine thread."""
        self._thread.start()
        return self

    def submit(self, requests: list[Request]) -> None:
        """Queue the choices of one reply, all or none. Raises QueueFull when the queue is full
        before them (an empty server refuses no reply for its many choices), or EngineClosed."""
        for request in requests:
            assert 0 < request.n_prompt < self.n_ctx, "checked by the handler"
            assert request.images or 0 <= request.prompt.min()
            assert 0 <= request.prompt[-1] and request.prompt.max() < self.model.n_vocab
            request.max_tokens = min(request.max_tokens, self.n_ctx - request.n_prompt)
        self._check_open(self._max_queue)
        self.drafter.prepare(requests)
        with self.changed:
            self._check_open(self._max_queue)
            for request in requests:
                request.arrival, request.submitted = next(self._arrivals), time.perf_counter()
            self._waiting.extend(requests)
            self.changed.notify()

    def _check_open(self, most: float = math.inf) -> None:
        if self._deadline is not None:
            raise EngineClosed("the server is shutting down")
        if len(self._waiting) >= most:
            raise QueueFull(f"{len(self._waiting)} of at most {most} are waiting for a slot")

    @property
    def n_waiting(self) -> int:
        """Requests that wait for a slot."""
        return len(self._waiting)

    def seconds_in_step(self) -> float:
        """How long the present step has taken; 0 between steps, infinite if the engine is dead."""
        began = self._step_began  # read once: the engine thread may end the step right now
        if not self._thread.is_alive():
            return math.inf
        return 0.0 if began is None else time.monotonic() - began

    def between_steps(self, errand: Callable):
        """Run a function on the engine thread, under the model lock, between two steps; return
        what it returns. Raises EngineClosed, or what it raises. (Who just waited for the lock
        could wait for ever. And subtle: decodes belong on one thread. GNU's OpenMP keeps workers
        for each; where they outnumber the processors, a step takes 1.4 times as long.)"""
        future: Future = Future()
        with self.changed:
            self._check_open()
            self._errands.append((errand, future))
            self.changed.notify()
        return future.result()

    def close(self, drain_seconds: float = 0) -> bool:
        """Take no new requests, let those present finish for a while, then free the context.
        False when a step does not end: then everything is left as it is."""
        with self.changed:
            self._deadline = time.monotonic() + drain_seconds
            self.changed.notify()
        if self._thread.ident:  # it was started
            self._thread.join(drain_seconds + LAST_STEP_SECONDS)
        if self._thread.is_alive():
            return False
        with self.model_lock:
            self.context.close()
        self.drafter, self.prefixes.store = Drafter(), PrefixStore()  # requests keep this engine
        return True

    # ---- engine thread only ----------------------------------------------------------

    def _run(self) -> None:
        """Step while there is work, sleep while there is none, until closed and done."""
        while True:
            try:
                if not self._wait_for_work():
                    return
                self._step_began = time.monotonic()
                if self._deadline is not None and self._step_began > self._deadline:
                    self._fail_everyone(EngineClosed("the server is shutting down"))
                self.step()
            except Exception as error:
                self._survive(error)
            finally:
                self._step_began = None

    def _wait_for_work(self) -> bool:
        """Sleep until there is something to do; False when closed and done."""
        with self.changed:
            while not (self._waiting or self._errands or self._busy()):
                if self._deadline is not None:
                    return False
                self.changed.wait()
        return True

    def _survive(self, error: Exception) -> None:
        """End what was under way when a step failed: the engine thread must outlive any fault."""
        log.error("step %d failed", self._counts.n_steps, exc_info=error)
        try:
            self._fail_everyone(EngineFault(f"the engine failed: {describe(error)}"))
        except Exception:
            log.exception("cannot end the requests of the failed step either; trying again")
            time.sleep(FAULT_PAUSE_SECONDS)

    def step(self) -> None:
        """One turn of the loop: admit, fill, decode, sample."""
        with self.model_lock:
            self._counts.n_steps += 1
            self._run_errand()
            self._admit()
            for batch in self._fill():
                self._decode_and_sample(batch)
        self._publish()

    def _run_errand(self) -> None:
        """One at a time, so that many cannot hold up the streams."""
        with self.changed:
            if not self._errands:
                return
            errand, future = self._errands.popleft()
        try:
            future.set_result(errand())
        except Exception as error:
            future.set_exception(error)

    def _publish(self) -> None:
        """Let the events out, and be seen what has changed."""
        while self._outbox:
            self._outbox[0].request.send(self._outbox[0])
            self._outbox.popleft()  # now, so that no fault can lose it
        self.stats = self._counts.copy(self._slots)

    def _busy(self) -> list[Slot]:
        return [slot for slot in self._slots if slot.request is not None]

    def _admit(self) -> None:
        """Free the slots of cancelled requests, and give waiting requests the idle ones."""
        for slot in self._busy():
            if slot.request.cancelled:
                slot.request.sampler = None  # unread events keep the request: free its grammar now
                self._release(slot)
        with self.changed:
            waiting = list(self._waiting)
        held = set()  # prompts that wait for others; the choices of a reply share theirs
        for request in waiting:
            try:
                leaves = request.cancelled or id(request.prompt) not in held and (
                    self.prefixes.place(request))
            except Exception as error:
                log.exception("cannot admit a request")
                fault = EngineFault(f"cannot start the request: {describe(error)}")
                self._outbox.append(Event(request, error=fault))
                leaves = True
            if not leaves:
                held.add(id(request.prompt))
                continue
            with self.changed:
                self._waiting.remove(request)
        if waiting:
            self._publish()  # who is there now, before a decode that may take long

    def _fill(self) -> list[list[Chunk]]:
        """Choose the rows of the next batch: every decoding slot's token and what is drafted after
        it, then prompt tokens, the shortest rest first, but half of them of the prompt that came
        first: a short one waits for no long one, nor that for ever. Only a few of them while
        anything decodes, so that no stream stalls. Images have batches of their own behind it."""
        decoding = [slot for slot in self._slots if slot.next_token is not None]
        room = self.context.n_batch - len(decoding)
        prompts, images, n_left = [], [], min(room, self._prefill_chunk) if decoding else room
        rests = {slot: len(slot.request.prompt) - slot.n_cached
                 for slot in self._slots if slot.is_prefilling}
        first = min(rests, key=lambda slot: slot.request.arrival, default=None)
        n_kept = min(n_left // 2, rests.get(first, 0))  # for the first one
        for slot in sorted(rests, key=rests.get):
            prompt, n_kept = slot.request.prompt, 0 if slot is first else n_kept
            start, end, image = slot.request.image_at(slot.n_cached)
            if not (image and image.decode_whole):
                end = min(end, slot.n_cached + n_left - n_kept)
            if slot.n_cached < end and n_left > n_kept:
                tokens = prompt[slot.n_cached : end]
                (images if image else prompts).append(Chunk(
                    slot, tokens, end == len(prompt), slot.request.on_prompt is not None,
                    image=image, first_row=slot.n_cached - start))
                n_left -= len(tokens)
        n_prefill = sum(len(chunk.tokens) for chunk in prompts)
        drafts = dict.fromkeys(decoding, []) | (
            self.drafter.drafts(decoding, n_prefill, room - n_prefill) if decoding else {})
        batch = [Chunk(slot, [slot.next_token, *drafts[slot]], True, n_draft=len(drafts[slot]))
                 for slot in decoding] + prompts
        return [batch] * bool(batch) + [[chunk] for chunk in images]

    def _decode_and_sample(self, chunks: list[Chunk]) -> None:
        """Compute the chunks in one batch, and choose tokens where their prompts are read."""
        n_rows, began = sum(len(chunk.tokens) for chunk in chunks), time.perf_counter()
        try:
            code = self.context.decode(chunks)
        except Exception as error:
            log.exception("llama_decode raised")
            code = describe(error)
        if code != DECODE_OK:
            self._decode_apart(chunks, code)
            return
        self._counts.batch.add(n_rows)
        if all(chunk.slot.next_token is not None for chunk in chunks):  # nothing is prefilled
            n_draft = sum(chunk.n_draft for chunk in chunks)
            self.drafter.note(n_rows, n_draft, time.perf_counter() - began)
        for chunk in chunks:
            self._take_logits(chunk)

    def _decode_apart(self, chunks: list[Chunk], code: int | str) -> None:
        """Find out whose fault it is that a batch has failed: compute its chunks one by one,
        without drafts, so that only a request that cannot be computed alone fails."""
        self._counts.n_decode_errors += 1
        has_drafts = any(chunk.n_draft for chunk in chunks)
        for chunk in chunks:  # drop what part of the batch may have reached the cache
            slot = chunk.slot
            if chunk.n_draft:
                self.drafter.verified(slot, [])
                chunk.tokens, chunk.n_draft = chunk.tokens[:1], 0
            if self.context.trim(slot.seq_id, slot.n_cached) < slot.n_cached:
                self._fail(slot, EngineFault(f"llama_decode failed with {code}; state lost"))
        chunks = [chunk for chunk in chunks if chunk.slot.request is not None]
        if len(chunks) > 1 or chunks and has_drafts:
            log.warning("llama_decode returned %s for %d requests: one by one", code, len(chunks))
            for chunk in chunks:
                self._decode_and_sample([chunk])
        elif chunks:
            slot, half = chunks[0].slot, chunks[0].tokens[: len(chunks[0].tokens) // 2]
            may_halve = len(half) and not (chunks[0].image and chunks[0].image.decode_whole)
            if code == DECODE_NO_ROOM and may_halve:  # the rest follows in the next step
                self._decode_and_sample([dataclasses.replace(
                    chunks[0], tokens=half, wants_logits=False)])
            else:
                self._fail(slot, EngineFault(f"llama_decode failed with {code}"))

    def _take_logits(self, chunk: Chunk) -> None:
        """Note that a chunk is computed, and use its logits; an error ends this request only."""
        slot, start = chunk.slot, chunk.slot.n_cached
        end = start + len(chunk.tokens)
        slot.tokens[start:end] = chunk.tokens
        slot.n_cached = end - chunk.n_draft
        try:
            if chunk.wants_all:
                following = slot.request.prompt[start + 1 : end + 1].tolist()
                for row, token in enumerate(following, start=chunk.row + 1 - len(chunk.tokens)):
                    slot.request.on_prompt(self.context.logits(row), token)
            if chunk.wants_logits:
                self._verify(chunk)
            if slot.n_cached < end:  # drafted in vain
                n_left = self.context.trim(slot.seq_id, slot.n_cached)
                if n_left < slot.n_cached and slot.request:
                    raise EngineFault("the KV cache cannot forget what was drafted")
                slot.n_cached = n_left
        except GrammarError as error:  # the client's own
            self._fail(slot, error)
        except Exception as error:
            log.exception("sampling failed")
            self._fail(slot, EngineFault(f"sampling failed: {describe(error)}"))

    def _verify(self, chunk: Chunk) -> None:
        """Choose tokens for one slot, row by row, for as long as they are what was drafted."""
        slot, request, n_draft = chunk.slot, chunk.slot.request, chunk.n_draft
        drafted, chosen = chunk.tokens[len(chunk.tokens) - n_draft:], []
        for row, draft in enumerate([*drafted, NO_TOKEN], start=chunk.row - n_draft):
            chosen.append(self._sample(slot, row))
            if slot.request is None or chosen[-1] != draft:
                break
            slot.n_cached += 1
        n_true = len(chosen) - 1
        for counts in (request, self._counts):
            counts.n_accepted += n_true
            counts.n_rejected += n_draft - n_true
        self.drafter.verified(slot, chosen)

    def _sample(self, slot: Slot, row: int) -> int:
        """Choose the next token of one slot from a row, send its text, and return it."""
        request = slot.request
        if request.n_generated == 0:
            request.first_token = request.last_token = time.perf_counter()
            self._counts.first_token.add(request.first_token - request.submitted)
        if request.max_tokens == 0:
            self._outbox.append(Event(request, finish_reason="length"))
            self._release(slot)
            return NO_TOKEN
        token = request.sampler.sample(self.context, row)
        logprob = None
        if request.n_top_logprobs is not None and token != NO_TOKEN:
            logprob = token_logprob(self.context.logits(row), token, request.n_top_logprobs)
        is_end = token in self.model.end_tokens or token == NO_TOKEN
        before = request.last_token
        event = request.push(b"" if is_end else self.model.piece(token), is_end, logprob)
        self._counts.n_generated += 1
        if request.n_generated > 1:
            self._counts.inter_token.add(request.last_token - before)
        if event.text or event.finish_reason:
            self._outbox.append(event)
        slot.next_token = token
        if event.finish_reason:
            self._release(slot)
        return token

    def _release(self, slot: Slot) -> None:
        """Make a slot idle. Its KV cache stays, as the prefix of some later prompt."""
        slot.request = slot.next_token = None
        slot.last_used = self._counts.n_steps

    def _fail(self, slot: Slot, error: EngineFault | EngineClosed | GrammarError) -> None:
        """End a request with an error, and forget its cache, which may be in any state."""
        self._outbox.append(Event(slot.request, error=error))
        self._release(slot)
        slot.n_cached = 0
        self.context.trim(slot.seq_id, 0)

    def _fail_everyone(self, error: EngineFault | EngineClosed) -> None:
        """End all requests and errands with an error, after the events that they still have."""
        with self.changed:
            lost, self._waiting = self._waiting, deque()
            errands, self._errands = self._errands, deque()
        self._outbox += [Event(request, error=error) for request in lost]
        for _, future in errands:
            future.set_exception(error)
        with self.model_lock:
            for slot in self._busy():
                self._fail(slot, error)
        self._publish()


def describe(error: Exception) -> str:
    """An exception in a message."""
    return f"{type(error).__name__}: {error}"


def load_engine(path: Path, *, n_ctx: int, parallel: int, n_gpu_layers: int, prefill_chunk: int,
                max_queue: int, chat_template_file: str | None = None,
                on_progress=lambda fraction: True,
                equip: Callable[[Engine], None] = lambda loaded: None,
                **context_options) -> Engine:
    """Load a model and start an engine on it. n_ctx: tokens per request, 0 for as many as the
    model was trained for. equip: gives the engine, before anybody else has it, what features add.
    `context_options`: Context's. Raises ModelError; BrokenModel if another file could do better."""
    size = file_size(path)
    with contextlib.ExitStack() as undo:
        model = Model(path, n_gpu_layers, on_progress, chat_template_file)
        undo.callback(model.close)
        if n_ctx > model.n_ctx_train:
            log.warning("n_ctx is %d, but %s was trained for %d tokens: text beyond that may be "
                        "poor", n_ctx, model.name, model.n_ctx_train)
        # The weights are read from the file as they are used. Where its end is missing, the first
        # token would kill the process.
        if (now := file_size(path)) < size:
            raise BrokenModel(f"{path} shrank from {size} to {now} bytes while it was loaded")
        context = Context(model, n_ctx or model.n_ctx_train, parallel, **context_options)
        loaded = Engine(model, context, prefill_chunk, max_queue)
        undo.callback(loaded.close)
        equip(loaded)
        loaded.start()
        undo.pop_all()
    return loaded


def file_size(path: Path) -> int:
    """The bytes of a model file. Raises BrokenModel when it is gone."""
    try:
        return path.stat().st_size
    except OSError as error:
        raise BrokenModel(f"the model file {path} has vanished: {error.strerror}") from error
