"""The dialect of local apps: chats as lines of JSON, and loading and unloading by hand.

What for: desktop apps that bring a model server of their own and speak to it in this way. How it
works: a body becomes a chat completion, its chunks become fragments; nothing here generates. It
costs nothing beside the chat. It reads the bodies of `/chat` and its kin and of `/models/load` and
`/models/unload`, the setting `default_vision_model`, and the variables `MODEL_ID` and `BATCH_MAX`,
and tells at `/help` what all paths are for.
"""

import dataclasses
import functools
from collections.abc import Iterator
from typing import Literal

import engine
import server
from features import elsewhere, vision

NEEDS = ("models", "elsewhere", "vision")
ALIASES = {"MODEL_ID": "model_path", "BATCH_MAX": "parallel"}  # environment variables


@dataclasses.dataclass
class Settings:
    """Which model sees, for chats that name none."""

    default_vision_model: str | None = server.setting("model", None)


@dataclasses.dataclass
class AppImage:
    """An image: Base64, bare or as a data: URI."""

    data_base64: str
    mime_type: str = ""  # none: whatever it is


@dataclasses.dataclass
class AppMessage:
    """One turn of a conversation."""

    role: Literal["system", "user", "assistant"]
    content: str = ""
    images: list[AppImage] | None = None

    def openai(self) -> dict:
        """The same in the OpenAI shape; images come before the text."""
        if not self.images:
            return {"role": self.role, "content": self.content}
        urls = [image.data_base64 if image.data_base64.startswith("data:") else
                f"data:{image.mime_type};base64,{image.data_base64}" for image in self.images]
        return {"role": self.role, "content": [
            *({"type": "image_url", "image_url": {"url": url}} for url in urls),
            *[{"type": "text", "text": self.content}] * bool(self.content)]}


@dataclasses.dataclass
class AppOptions:
    """How to choose tokens; the metadata has the OpenAI API's name."""

    temperature: float | None = server.option(low=0, high=2, openai="temperature")
    maxTokens: int | None = server.option(low=-1, openai="max_tokens")  # -1: no limit
    topP: float | None = server.option(low=0, high=1, openai="top_p")
    presencePenalty: float | None = server.option(low=-2, high=2, openai="presence_penalty")
    frequencyPenalty: float | None = server.option(low=-2, high=2, openai="frequency_penalty")


@dataclasses.dataclass
class AppBody:
    """POST /chat and its variants"""

    messages: list[AppMessage] = dataclasses.field(kw_only=True, metadata={"min_length": 1})
    model_key: str | None = None
    config: AppOptions | None = None

    def openai(self, model: str) -> dict:
        """The same as the body of a streamed chat completion."""
        asked = self.config or AppOptions()
        if asked.maxTokens == 0:
            raise server.invalid("config.maxTokens", "config.maxTokens must be at least 1, or -1 "
                                                     "for no limit, got 0")
        if asked.maxTokens == -1:
            asked = dataclasses.replace(asked, maxTokens=server.INT32_MAX)
        options = {field.metadata["openai"]: getattr(asked, field.name)
                   for field in dataclasses.fields(AppOptions)}
        return {"model": model, "messages": [message.openai() for message in self.messages],
                "stream": True, "stream_options": {"include_usage": True},
                **{name: value for name, value in options.items() if value is not None}}


@dataclasses.dataclass
class LoadBody:
    """POST /models/load"""

    model_key: str
    exclusive: bool = False


@dataclasses.dataclass
class UnloadBody:
    """POST /models/unload"""

    model_key: str | None = None
    unload_all: bool = False

    def check(self, _at: str) -> None:
        """Refuse what says nothing, or two things."""
        if (self.model_key is not None) == self.unload_all:
            raise server.invalid("model_key", "send either model_key or unload_all: true")


class AppDialect(server.Dialect):
    """Errors are {"detail": ...}, streams lines of JSON."""

    content_type = "application/x-ndjson"

    def error(self, error: server.ApiError) -> dict:
        """As Dialect.error."""
        return {"detail": error.message}

    def event(self, data: dict | str) -> bytes:
        """As Dialect.event."""
        return server.to_json(data) + b"\n"

    def error_event(self, error: server.ApiError) -> bytes:
        """As Dialect.error_event."""
        return self.event({"type": "error", "detail": error.message})

    def sign(self, text: str, data: dict | None) -> bytes:
        """A sign of life; there are no comments."""
        return self.event(data) if data else b""


APP = AppDialect()


def get_app_models(handler) -> None:
    """Those that are loaded, and all that a request may ask for."""
    models = handler.server.models
    entries = [{"model_key": name, "vision": vision.sees(target), "loaded":
                target.engine is not None} if isinstance(target, server.LocalModel) else
               {"model_key": name, "engine": target.name} for name, target
               in models.names().items()]
    entries += [{"model_key": entry["id"], "engine": elsewhere.OTHERS}
                for entry in models.others(handler)]
    handler.send_json({"loaded": [each for each in entries if each.get("loaded")],
                       "available": entries})


def post_load(handler, request: LoadBody) -> None:
    """Load a model; one elsewhere must just answer."""
    try:
        models = handler.server.models
        target = models.find(request.model_key)
        is_here = isinstance(target, server.LocalModel)
        if not is_here:
            listed = [entry["id"] for entry in elsewhere.list_elsewhere(handler, target)]
            if request.model_key not in [*models.named, *listed]:
                raise server.ApiError(404, "Model not found")
        if is_here:
            models.load(target, request.exclusive, handler.check_connection)
        elif request.exclusive:
            models.unload(models.loaded(), handler.check_connection)
    except server.ApiError as error:
        why = "Model not found" if error.code == "model_not_found" else error.message
        return handler.send_json({"loaded": False, "error": f"Failed to load model: {why}"},
                                 error.status, error.headers)
    handler.send_json({"loaded": True, "model": request.model_key})


def post_unload(handler, request: UnloadBody) -> None:
    """Give the memory of one model or of all back, when their running work is done."""
    pool = handler.server.models
    models = list(pool.local_models().values())
    if request.model_key is not None:
        target = pool.find(request.model_key)
        if not isinstance(target, server.LocalModel):
            raise server.invalid("model_key", f"{server.describe(request.model_key)} is an engine "
                                 "elsewhere: it cannot be unloaded from here")
        models = [target]
    names = [model.name for model in models if model.engine]
    pool.unload(models, handler.check_connection)
    handler.send_json({"unloaded": True, "models": names})


def start(running: "server.Server") -> None:
    """See to it that the model that sees is there. Raises ConfigError."""
    name = running.config.default_vision_model
    if name and name not in running.config.model_aliases:  # which must name models themselves
        try:
            running.models.find(name)
        except server.ApiError as error:
            raise server.ConfigError(f"default_vision_model: {error.message}") from None


def find_model(handler, name: str | None, sees: bool):
    """What a name stands for; for None the default model, or the one for images if it `sees`.
    Raises ApiError."""
    models, config = handler.server.models, handler.server.config
    if name is not None or not sees:
        return models.find(name)
    seeing = [each for each in models.names().values()
              if isinstance(each, server.LocalModel) and vision.sees(each)]
    default = models.find(config.default_vision_model) if config.default_vision_model else \
        next(iter(seeing), None)
    if isinstance(default, server.LocalModel) and default.is_off:
        default = next((each for each in models.loaded() if each in seeing), None)
    if default is None:
        raise server.unavailable("No model loaded" if seeing else "No vision model (set "
                          "default_vision_model)", "no_model_loaded")
    return default


def post_app_chat(handler, request: AppBody, **how) -> None:
    """A chat, as answer_app says."""
    try:
        answer_app(handler, request, **how)
    except server.ApiError as error:
        if error.status == 503:
            error.message = f"Chat service unavailable: {error.message}"
        raise
    except (engine.QueueFull, engine.EngineClosed) as error:
        raise server.unavailable(f"Chat service unavailable: {error}", "unavailable") from None


def answer_app(handler, request: AppBody, sees: bool = False, streams: bool = False) -> None:
    """A chat; sees: the default model is the one for images."""
    target = find_model(handler, request.model_key, sees)
    name = request.model_key or (
        target.name if isinstance(target, server.LocalModel) else target.model)
    body = request.openai(name)
    if not isinstance(target, server.LocalModel):
        handler.receive(body, target)
        with elsewhere.ask(handler, target, "POST", "/chat/completions",
                           elsewhere.for_upstream(target, body), reads_errors=True) as response:
            return write_app_reply(handler, name, streams, elsewhere.read_chunks(
                response, target, handler.server.house))
    chat = handler.read_fields(server.ChatBody, body)
    handler.streams = streams
    handler.receive(chat, target)
    with handler.lease(target):
        handler.post_chat(chat, functools.partial(write_app_reply, handler, name, streams))


def write_app_reply(handler, name: str, streams: bool, chunks: Iterator[dict]) -> None:
    """Write a reply from the chunks of a chat completion."""
    reason, told, texts = "stop", None, []
    for chunk in chunks:
        for choice in chunk["choices"] or ():
            reason = choice.get("finish_reason") or reason
            if text := (choice.get("delta") or {}).get("content"):
                texts.append(text)
                if streams:
                    handler.write_event({"type": "fragment", "content": text})
        told = (chunk.get("usage") or {}).get("completion_tokens", told)
    n_predicted = len(texts) if told is None else told
    if streams:
        handler.write_event({"type": "done", "model": name, "predicted_tokens": n_predicted,
                          "stop_reason": reason}, is_last=True)
    else:
        handler.send_json({"model": name, "content": "".join(texts), "stop_reason": reason,
                        "predicted_tokens": n_predicted})


def get_help(handler) -> None:
    """The route table, and what the bodies hold."""
    house = handler.server.house
    handler.send_json({"name": server.NAME, "version": server.VERSION, "routes": [
        {"method": method, "path": path, "about": route.about,
         "body": sorted(house.hints(house.type_of(route.reads))) if route.reads else []}
        for (method, path), route in house.routes.items()]})


def app_chat(about: str, **how) -> server.Route:
    """A chat in this dialect; how: the arguments of answer_app."""
    return app_route(functools.partial(post_app_chat, **how), about, AppBody)


def app_route(answer, about: str, reads: type | None = None) -> server.Route:
    """A route in this dialect that finds its model, if any, by itself."""
    return server.Route(answer, about, reads, needs_model=False, dialect=APP)


ROUTES = {
    ("GET", "/help"): server.Route(get_help, "this list", is_public=True),
    ("GET", "/models"): app_route(
        get_app_models, "the models that are loaded, and those available"),
    ("POST", "/models/load"): app_route(
        post_load, "load a model; exclusive: unload the others", LoadBody),
    ("POST", "/models/unload"): app_route(post_unload, "unload a model, or all", UnloadBody),
    ("POST", "/chat"): app_chat("a chat with any model"),
    ("POST", "/chat/stream"): app_chat("the same, streamed as lines of JSON", streams=True),
    ("POST", "/chat/regular"): app_chat("a chat with the default text model"),
    ("POST", "/chat/regular/stream"): app_chat("the same, streamed", streams=True),
    ("POST", "/chat/vision"): app_chat("a chat with the default vision model", sees=True),
    ("POST", "/chat/vision/stream"): app_chat("the same, streamed", sees=True, streams=True),
}
