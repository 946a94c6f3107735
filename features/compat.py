"""Compat: what clients of other servers send and read, besides what this one needs.

What for: clients that send all that OpenAI's reference has, those that llama-server and vLLM have
taught more fields, and monitors that read llama-server's `timings`. How it works: fields that
change nothing here are taken without a word; those for what this server does not do are a 400 that
says so, unless they ask for nothing; the others change a chat before its prompt is made. It costs
nothing. It reads those fields, and the `refusal` of messages, and sends `timings` with the end of
each reply.
"""

import dataclasses
import functools
import secrets
from collections.abc import Callable, Iterator
from typing import Any

import engine
import server
from features.thinking import lead_of


def refused(reason: str, *harmless):
    """A field of the OpenAI API that is not served, and why. harmless: its values that ask for
    nothing, besides null and empty."""
    return server.option(refused=reason, harmless=harmless)


def check_refused(sent, at: str) -> None:
    """Refuse what asks for something that is not served."""
    for field in dataclasses.fields(sent):
        value, nothing = getattr(sent, field.name), (None, False, "", [], {})
        if "refused" in field.metadata and not any(  # 0 is not False
                type(value) is type(no) and value == no
                for no in nothing + field.metadata.get("harmless", ())):
            raise server.invalid(f"{at}{field.name}", f"{at}{field.name}: "
                                 f"{field.metadata['refused']}; got {server.describe(value)}, "
                                 "leave it out", "unsupported_parameter")


@dataclasses.dataclass
class ChatFields:
    """The other fields of a chat. For those of templates see vLLM's documentation."""

    max_completion_tokens: int | None = server.option(low=-1)
    chat_template_kwargs: dict[str, Any] | None = None
    add_generation_prompt: bool = True
    continue_final_message: bool = False

    metadata: dict[str, str] | None = server.option(no_effect=True)
    safety_identifier: str | None = server.option(no_effect=True)
    prompt_cache_key: str | None = server.option(no_effect=True)
    prompt_cache_retention: str | None = server.option(no_effect=True)
    service_tier: str | None = server.option(no_effect=True)
    verbosity: str | None = server.option(no_effect=True)
    store: Any = refused("replies are not stored")
    modalities: Any = refused("only text is supported", ["text"])
    audio: Any = refused("only text is supported")
    web_search_options: Any = refused("web search is not supported")

    def check(self, _at: str) -> None:
        """Refuse what is not served, or cannot be."""
        check_refused(self, "")
        last = self.messages[-1]
        if self.continue_final_message and last.role != "assistant":
            raise server.invalid("continue_final_message", "continue_final_message: the last "
                                 f"message is the {last.role}'s, not the assistant's")
        if self.continue_final_message and not begun(last):
            raise server.invalid("continue_final_message", "continue_final_message: the last "
                                 "message must end in its content; calls and reasoning do not go "
                                 "on")
        if taken := TEMPLATE_NAMES & (self.chat_template_kwargs or {}).keys():
            raise server.invalid("chat_template_kwargs", f"chat_template_kwargs: {min(taken)!r} is "
                                 "set by the server; leave it out")


def begun(last: server.Message) -> bool:
    """Whether a message can go on: what it says last is text, or it says nothing yet."""
    names = ("tool_calls", "function_call", "reasoning_content")
    calls_or_thinks = [bool(getattr(last, name, None)) for name in names]
    return not any(calls_or_thinks[:2]) and (
        bool(last.content) or not calls_or_thinks[2])


TEMPLATE_NAMES = {"messages", "tools", "functions", "function_call", "tool_choice", "bos_token",
                  "eos_token", "add_generation_prompt", "raise_exception", "strftime_now", "self"}


@dataclasses.dataclass
class GenerationFields:
    """The other fields of any generation. Some clients send -1 where OpenAI's send nothing: for no
    limit of tokens, and for a random seed."""

    max_tokens: int | None = server.option(low=-1)
    cache_prompt: bool = True
    user: str | None = server.option(no_effect=True)

    def check(self, _at: str) -> None:
        """Refuse a reply of no tokens, where there is none; -1 as a seed is none."""
        self.seed = None if self.seed == -1 else self.seed
        for name in ("max_tokens", "max_completion_tokens"):
            if getattr(self, name, None) == 0 and isinstance(self, server.ChatBody):
                raise server.invalid(name, f"{name} must be at least 1, or -1 for no limit, got 0")
            if getattr(self, name, None) == -1:
                setattr(self, name, server.INT32_MAX)


@dataclasses.dataclass
class StreamFields:
    """The other field of `stream_options`."""

    include_obfuscation: bool = server.option(False, no_effect=True)


@dataclasses.dataclass
class CompletionFields:
    """The limit again: a completion's has another default."""

    max_tokens: int | None = server.option(server.LEGACY_MAX_TOKENS, low=-1)


@dataclasses.dataclass
class MessageFields:
    """The other fields of a message. A refusal is what an assistant said."""

    refusal: str | None = None
    audio: Any = refused("only text and images are supported")

    def check(self, at: str) -> None:
        """Refuse what asks for something that is not served, and take a refusal for text."""
        check_refused(self, f"{at}.")
        self.content = self.refusal if self.refusal and not self.content else self.content
        self.refusal = self.audio = None  # nothing for templates


# llama-server's paths for bases without /v1.
ROUTES = {
    ("POST", "/chat/completions"): server.Route(
        server.Handler.post_chat, "as /v1/chat/completions", server.ChatBody),
    ("POST", "/completions"): server.Route(
        server.Handler.post_completion, "as /v1/completions", server.CompletionBody)}
FIELDS = {"ChatBody": ChatFields, "CompletionBody": CompletionFields,
          "GenerationBody": GenerationFields, "Message": MessageFields,
          "StreamOptions": StreamFields}


class TimedReply:
    """A reply that ends with its timings."""

    def chunks(self, events: Iterator[engine.Event]) -> Iterator[dict]:
        """As Generation.chunks."""
        unfinished = len(self.choices)
        for chunk in super().chunks(events):
            unfinished -= sum(bool(choice["finish_reason"]) for choice in chunk["choices"])
            is_last = not unfinished and not (self.with_usage and chunk["choices"])
            yield {**chunk, **timings(self.choices)} if is_last else chunk

    def fold(self, chunks: Iterator[dict]) -> dict:
        """As Generation.fold."""
        return {**super().fold(chunks), **timings(self.choices)}


METHODS = {"Generation": TimedReply}


def join(wanted: server.Generation) -> None:
    """Let the other fields have their effect."""
    body = wanted.body
    wanted.more["reuses"] = body.cache_prompt
    if isinstance(wanted, server.Chat):
        wanted.options |= body.chat_template_kwargs or {}
        wanted.adds_prompt = body.add_generation_prompt
        if body.continue_final_message:
            wanted.render = functools.partial(render_begun, wanted, wanted.render)


def render_begun(chat: server.Chat, render: Callable[[], str]) -> str:
    """The prompt for a reply that goes on where the last message, the assistant's, ends: what the
    template makes of it, cut off behind its content. Raises ApiError."""
    *others, last = chat.messages
    thoughts = last.get("reasoning_content") or ""
    said = server.text_of(last["content"])
    first, end, behind = (secrets.token_hex(8) for _ in range(3))  # nobody else can write them
    chat.adds_prompt = False

    def rendered(content: str, thoughts: str | None) -> tuple[str, str]:
        """What stands before the content, and the content, as the template writes them."""
        chat.messages = [*others, {**last, "content": f"{first}{content}{end}",
                                   "reasoning_content": thoughts}]
        prompt, found, _ = render().rpartition(end)
        if not found:
            raise server.invalid("continue_final_message", "continue_final_message: the model's "
                                 "chat template does not write the last message", "template_error")
        before, found, content = prompt.rpartition(first)
        return (before, content) if found else (prompt, "")  # it took the beginning for reasoning

    before, content = rendered(said, thoughts + behind if thoughts else None)
    before, is_kept = before.replace(behind, ""), behind in before
    close = "" if (tag := lead_of(chat.loaded, before)) in content else tag
    if not close and thoughts and not is_kept and others:
        chat.messages, chat.adds_prompt = others, True
        opening = render()
        if close := lead_of(chat.loaded, opening):
            before, chat.adds_prompt = opening, False
    if close:  # the template begins to think and leaves it to the reply to end that
        before += f"{rendered(thoughts, None)[1]}\n{close}\n\n"
    return before + content


def timings(choices: list[engine.Request]) -> dict:
    """What the first choice's prompt and the slowest reply took, in llama-server's names."""
    first = choices[0]
    n_new = first.n_prompt - first.n_reused
    slowest = max(choices, key=lambda choice: choice.last_token - choice.first_token)
    return {"timings": {
        "cache_n": first.n_reused,
        **timing("prompt", n_new, (first.first_token - first.placed) * 1000),
        **timing("predicted", slowest.n_generated,
                 (slowest.last_token - slowest.first_token) * 1000)}}


def timing(what: str, n: int, ms: float) -> dict:
    """n tokens in ms milliseconds, as llama-server says it."""
    return {f"{what}_n": n, f"{what}_ms": ms, f"{what}_per_token_ms": ms / max(n, 1),
            f"{what}_per_second": n * 1000 / max(ms, 0.001)}
