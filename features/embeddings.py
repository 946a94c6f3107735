"""Embeddings: texts into vectors, for `/v1/embeddings`.

What it is for. Texts that mean alike get vectors that point alike; search and clustering compare
them by the cosine, which for vectors of length 1 is the dot product.

How it works. A GGUF made for embeddings pools as it says itself (the mean of its hidden states, or
that of its first token), and must read each text whole in one batch. Any other model serves, too:
its vector is the mean of the last layer's hidden states over the text's tokens, added up over
batches of any size. Either way the vectors are made in a context of their own, beside the KV cache
of the streams, for up to MAX_TEXTS texts at a time. Its decodes are errands that the engine thread
runs between its steps, one for each step, so streams go on meanwhile; before each the caller may
find that the client has gone.

What it costs. The context is made with the first use and freed with the model: a KV cache of n_ctx
tokens, which all texts share, and compute buffers. A stream waits for one batch at a time: N_BATCH
rows, but a whole text for a model that pools.

What it reads and sends. It reads the body of `/v1/embeddings`, and sends vectors.
"""

import base64
import dataclasses
import functools
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Literal

import numpy as np
from llama_cpp import llama_cpp as lib

import engine
import server
from features import tokens

NEEDS = ("tokens",)
TINY = 1e-12  # in place of a length of 0


class Embedder:
    """Texts to vectors, in a context of its own. Under the model lock, but for `batches`."""

    MAX_TEXTS = 16  # in one batch
    N_BATCH = 96  # rows, for a model that does not pool: streams wait for one batch at a time

    def __init__(self, model: engine.Model, n_ctx: int, n_threads: int):
        """n_ctx: tokens that a text may have. Raises engine.ModelError."""
        self._pools = model.pools
        self.turn = threading.Lock()  # held by a handler for one batch of `batches`
        n_batch = n_ctx if model.pools else min(n_ctx, self.N_BATCH)
        self._context = engine.Context(model, n_ctx, self.MAX_TEXTS, n_batch, n_ubatch=n_batch,
                                       n_threads=n_threads, embeds=True)

    def close(self) -> None:
        """Free the context."""
        self._context.close()

    def batches(self, texts: list[np.ndarray]) -> Iterator[list[int]]:
        """Yield the indices of the texts (token ids) that go together."""
        batch: list[int] = []
        room = self._context.n_batch
        for index, text in enumerate(texts):
            if batch and (len(text) > room or len(batch) == self.MAX_TEXTS):
                yield batch
                batch, room = [], self._context.n_batch
            batch.append(index)
            room -= len(text)
        if batch:
            yield batch

    def embed(self, texts: list[np.ndarray]) -> Iterator[np.ndarray | None]:
        """One batch of `batches` to vectors of length 1: float32, shape (len(texts), n_embd).
        Yield None after each decode but the last. No other batch may begin meanwhile."""
        context = self._context
        for seq_id in range(context.parallel):  # a batch that broke off has left something
            context.trim(seq_id, 0)
        vectors = np.zeros((len(texts), context.n_embd), dtype=np.float32)
        slots = [engine.Slot(index, 0) for index in range(len(texts))]
        for start in range(0, max(map(len, texts)), context.n_batch):
            chunks = [engine.Chunk(slot, text[start:start + context.n_batch], True, True)
                      for slot, text in zip(slots, texts)]
            code = context.decode(chunks)
            if code != engine.DECODE_OK:
                raise engine.EngineFault(f"llama_decode failed with {code}")
            self._add(vectors, chunks)
            if start + context.n_batch < max(map(len, texts)):
                yield None
        yield vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), TINY)

    def _add(self, vectors: np.ndarray, chunks: list[engine.Chunk]) -> None:
        """Add what a decode made of each chunk to its text's vector."""
        pointer, n_embd = self._context.pointer, self._context.n_embd
        if not self._pools:  # the last layer's output, shape (rows, n_embd)
            states = np.ctypeslib.as_array(lib.llama_get_embeddings(pointer),
                                           (chunks[-1].row + 1, n_embd))
        for chunk, vector in zip(chunks, vectors):
            end = chunk.row + 1
            vector += np.ctypeslib.as_array(
                lib.llama_get_embeddings_seq(pointer, chunk.slot.seq_id), (n_embd,)) \
                if self._pools else states[end - len(chunk.tokens):end].sum(axis=0)
            chunk.slot.n_cached += len(chunk.tokens)


# Each engine's; used on its engine thread only.
embedders: weakref.WeakKeyDictionary[engine.Engine, Embedder] = weakref.WeakKeyDictionary()


def embedder_of(loaded: engine.Engine) -> Embedder:
    """An engine's Embedder, made on first use. Engine thread. Raises engine.ModelError."""
    if loaded not in embedders:
        embedders[loaded] = made = Embedder(loaded.model, loaded.n_ctx, loaded.context.n_threads)
        loaded.model.parts.callback(made.close)
    return embedders[loaded]


def embed(loaded: engine.Engine, texts: list[np.ndarray], go_on: Callable[[], None]) -> np.ndarray:
    """Vectors of length 1 for texts (token ids): float32, shape (len(texts), n_embd). One decode
    between two steps, so that generation goes on; before each, `go_on` may raise. Handler thread.
    Raises engine.EngineClosed, EngineFault, ModelError."""
    embedder = loaded.between_steps(functools.partial(embedder_of, loaded))
    vectors = []
    for batch in embedder.batches(texts):
        with embedder.turn:
            work, done = embedder.embed([texts[index] for index in batch]), None
            while done is None:
                go_on()
                done = loaded.between_steps(functools.partial(next, work))
        vectors.append(done)
    return np.concatenate(vectors)


@dataclasses.dataclass
class EmbeddingBody:
    """POST /v1/embeddings"""

    input: tokens.Prompts = dataclasses.field(kw_only=True)
    model: str | None = None
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = server.option(low=1)
    user: str | None = server.option(no_effect=True)


def post_embeddings(handler, request: EmbeddingBody) -> None:
    """https://platform.openai.com/docs/api-reference/embeddings"""
    loaded = handler.loaded
    size = loaded.model.n_embd
    if (request.dimensions or 0) > size:
        raise server.invalid("dimensions", f"dimensions: {request.dimensions} was sent, this "
                             f"model's vectors have {size}")
    texts = tokens.read_prompts(handler, tokens.prompts_in(request.input), "input", n_reply=0)
    handler.tally.prompt = sum(map(len, texts))
    vectors = embed(loaded, texts, handler.check_connection)
    if request.dimensions:  # a shorter vector is the longer one's beginning, of length 1 again
        vectors = vectors[:, : request.dimensions]
        vectors = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), TINY)
    as_text = request.encoding_format == "base64"
    handler.send_json({
        "object": "list", "model": request.model or loaded.model.name,
        "data": [{"object": "embedding", "index": index,
                  "embedding": base64.b64encode(vector.astype("<f4").tobytes()).decode()
                  if as_text else vector.tolist()} for index, vector in enumerate(vectors)],
        "usage": {"prompt_tokens": handler.tally.prompt, "total_tokens": handler.tally.prompt}})


def equip(loaded, _settings) -> None:
    """Say what the model can do. Raises nothing."""
    loaded.capabilities.append("embedding")


ROUTES = {
    ("POST", "/v1/embeddings"): server.Route(
        post_embeddings, "vectors of texts or token ids, one or a list of them", EmbeddingBody),
    ("POST", "/embeddings"): server.Route(  # for bases without /v1, as llama-server has it
        post_embeddings, "as /v1/embeddings", EmbeddingBody)}
