"""Tokens: texts into token ids and back, and the prompt that a conversation makes.

What for: clients that count or cut texts by the model's own tokens, and people who want to see what
the model reads; other features take token ids in place of texts by its functions. How it works: the
model's tokenizer, or everything that a chat goes through until its prompt is made, without a slot.
It costs a tokenization. It reads the bodies of `/tokenize`, `/detokenize` and `/apply-template`,
which are llama-server's, or have vLLM's names; with `/tokenizer_info`, which is vLLM's, they are
what lm-eval's remote tokenizer asks for. It sends nothing elsewhere.
"""

import dataclasses

import numpy as np
from llama_cpp import llama_cpp as lib

import server
from features.marks import shown

MAX_INPUTS = 2048  # texts in one request, as the OpenAI reference has it for embeddings
Prompts = str | list[str] | list[int] | list[list[int]]


@dataclasses.dataclass
class TokenizeBody:
    """POST /tokenize, as llama-server's, and as vLLM's: `prompt`, `add_special_tokens`."""

    content: str | None = None
    model: str | None = None
    add_special: bool = False
    parse_special: bool = True
    with_pieces: bool = False
    prompt: str | None = None
    add_special_tokens: bool = True

    def check(self, _at: str) -> None:
        """Refuse none and two texts."""
        if (self.content is None) == (self.prompt is None):
            raise server.invalid("content", "send either content (llama-server's name of the text) "
                                            "or prompt (vLLM's)")


@dataclasses.dataclass
class DetokenizeBody:
    """POST /detokenize, as llama-server's"""

    tokens: list[int]
    model: str | None = None


def post_tokenize(handler, request: TokenizeBody) -> None:
    """The tokens of a text, with what each of them is if asked for."""
    model = handler.loaded.model
    text, begins = (request.content, request.add_special) if request.prompt is None else \
        (request.prompt, request.add_special_tokens)
    tokens = model.tokenize(text, begins, request.parse_special)
    reply = {} if request.prompt is None else {
        "count": len(tokens), "max_model_len": handler.loaded.n_ctx}
    handler.send_json({**reply, "tokens": [
        {"id": token, "piece": piece_json(model.piece(token, special=True))}
        if request.with_pieces else token for token in tokens.tolist()]})


def post_detokenize(handler, request: DetokenizeBody) -> None:
    """The text of tokens. Raises ApiError."""
    model = handler.loaded.model
    check_tokens(handler, request.tokens, "tokens")
    pieces = b"".join(model.piece(token, special=True) for token in request.tokens)
    text = pieces.decode("utf-8", "replace")
    handler.send_json({"content": text, "prompt": text})


def get_tokenizer(handler) -> None:
    """What the default model's tokenizer is, in the names of Hugging Face's configuration."""
    handler.server.models.check()
    target = handler.server.models.find(None)
    if not isinstance(target, server.LocalModel):
        raise server.ApiError(404, f"the default model is at {target.name}, an engine elsewhere",
                              code="not_found")
    with handler.lease(target):
        model = handler.loaded.model
        ids = {name: token(model.vocab) for name, token in (
            ("bos_token", lib.llama_vocab_bos), ("eos_token", lib.llama_vocab_eos),
            ("pad_token", lib.llama_vocab_pad))}
        handler.send_json({
            "tokenizer_class": "llama.cpp", "model_max_length": handler.loaded.n_ctx,
            "vocab_size": model.n_vocab, "chat_template": model.template_source, **{
                name: model.piece(token, special=True).decode("utf-8", "replace") if token >= 0
                else None for name, token in ids.items()}})


def post_template(handler, body: server.ChatBody) -> None:
    """The prompt that a chat would be. Raises ApiError."""
    chat = handler.join(server.Chat, body)
    handler.send_json({"prompt": shown(chat, chat.render())})


def prompts_in(sent: Prompts) -> list[str | list[int]]:
    """The texts and lists of token ids that were sent, as one list."""
    is_one = isinstance(sent, str) or sent and isinstance(sent[0], int)
    return [sent] if is_one else sent


def read_prompts(handler, prompts: list[str | list[int]], param: str, n_reply: int = 1
                 ) -> list[np.ndarray]:
    """The tokens of each. n_reply: tokens of the context that a reply needs. Raises ApiError."""
    if not 0 < len(prompts) <= MAX_INPUTS:
        raise server.invalid(param, f"{param}: {len(prompts)} texts were sent; send 1 to "
                                    f"{MAX_INPUTS}")
    return [handler.tokenize(prompt, param, n_reply) if isinstance(prompt, str) else
            read_tokens(handler, prompt, param, n_reply) for prompt in prompts]


def read_tokens(handler, tokens: list[int], param: str, n_reply: int) -> np.ndarray:
    """Token ids from a client; 400 when there are none, or too many."""
    check_tokens(handler, tokens, param)
    handler.check_length(len(tokens), param, n_reply)
    return np.array(tokens, dtype=np.int32)


def check_tokens(handler, tokens: list[int], param: str) -> None:
    """400 for a token outside the vocabulary, which would end the process in C."""
    n_vocab = handler.loaded.model.n_vocab
    if wrong := [token for token in tokens if not 0 <= token < n_vocab]:
        raise server.invalid(param, f"{param}: {server.describe(wrong[0])} is not a token id of "
                                    f"this model (0 to {n_vocab - 1})")


def piece_json(piece: bytes) -> str | list[int]:
    """A token's bytes for JSON: as text, or one by one where they are only part of a character."""
    try:
        return piece.decode()
    except UnicodeDecodeError:
        return list(piece)


ROUTES = {
    ("POST", "/tokenize"): server.Route(post_tokenize, "content to tokens", TokenizeBody),
    ("POST", "/detokenize"): server.Route(post_detokenize, "tokens to content", DetokenizeBody),
    ("GET", "/tokenizer_info"): server.Route(get_tokenizer, "the default model's tokenizer"),
    ("POST", "/apply-template"): server.Route(
        post_template, "the body of a chat to the prompt that the model would read",
        server.ChatBody),
}
