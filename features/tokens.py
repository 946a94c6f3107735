"""Tokens: texts into token ids and back, and the prompt that a conversation makes.

What for: clients that count or cut texts by the model's own tokens, and people who want to see what
the model reads. How it works: the model's tokenizer, or everything that a chat goes through until
its prompt is made, without a slot. It costs a tokenization. It reads the bodies of `/tokenize`,
`/detokenize` and `/apply-template`, which are llama-server's, and sends nothing elsewhere.
"""

import dataclasses

import server


@dataclasses.dataclass
class TokenizeBody:
    """POST /tokenize, as llama-server's"""

    content: str
    model: str | None = None
    add_special: bool = False
    parse_special: bool = True
    with_pieces: bool = False


@dataclasses.dataclass
class DetokenizeBody:
    """POST /detokenize, as llama-server's"""

    tokens: list[int]
    model: str | None = None


def post_tokenize(handler, request: TokenizeBody) -> None:
    model = handler.loaded.model
    tokens = model.tokenize(request.content, request.add_special, request.parse_special)
    handler.send_json({"tokens": [
        {"id": token, "piece": piece_json(model.piece(token, special=True))}
        if request.with_pieces else token for token in tokens.tolist()]})


def post_detokenize(handler, request: DetokenizeBody) -> None:
    model = handler.loaded.model
    handler.check_tokens(request.tokens, "tokens")
    pieces = b"".join(model.piece(token, special=True) for token in request.tokens)
    handler.send_json({"content": pieces.decode("utf-8", "replace")})


def post_template(handler, body: server.ChatBody) -> None:
    chat = handler.join(server.Chat, body)
    handler.send_json({"prompt": chat.show(chat.render())})


def piece_json(piece: bytes) -> str | list[int]:
    """A token's bytes for JSON: as text, or one by one where they are only part of a character."""
    try:
        return piece.decode()
    except UnicodeDecodeError:
        return list(piece)


ROUTES = {
    ("POST", "/tokenize"): server.Route(post_tokenize, "content to tokens", TokenizeBody),
    ("POST", "/detokenize"): server.Route(post_detokenize, "tokens to content", DetokenizeBody),
    ("POST", "/apply-template"): server.Route(
        post_template, "the body of a chat to the prompt that the model would read",
        server.ChatBody),
}
