"""Telling: a chat's chunks as a response of OpenAI's Responses API.

A response has items: reasoning, messages, calls. `Response` tells them one after the other, as the
events of https://platform.openai.com/docs/api-reference/responses-streaming, and keeps the whole
response up to date with them: each snapshot in an event is that, and the unstreamed reply is what
it is at the end. There is nothing that sums reasoning up: where a summary is asked for, it is the
reasoning. It is no feature by itself; responses.py is.
"""

import time
from collections.abc import Callable, Iterator

import server
from features import pings, protocols
from features.items import Tools, new_id


class Response(protocols.Story):
    """A response while it is made."""

    def __init__(self, wanted: server.Chat, reply: dict, tools: Tools, summarizes: bool,
                 keep: Callable[[dict], None]):
        """reply: what is known of it beforehand. keep: takes the response when it is whole."""
        super().__init__(wanted, reply)
        self.tools, self.summarizes, self.keep = tools, summarizes, keep

    def events(self, chunks: Iterator[dict]) -> Iterator[dict]:
        """As Story.events; the first two tell that the prompt is taken, not that it is read."""
        yield from self.snapshots("created", "in_progress")
        yield from super().events(chunks)

    def snapshots(self, *names: str) -> Iterator[dict]:
        """Events that carry the response as it is."""
        for name in names:
            yield {"type": f"response.{name}", "response": self.reply}

    def open(self, call: dict) -> Iterator[dict]:
        """As Story.open."""
        kind = {"text": "message", "call": "function_call"}.get(self.kind, self.kind)
        self.item = {"id": new_id(kind), "type": kind, "status": "in_progress"}
        self.logprobs: list[dict] = []
        if self.kind == "text":
            self.item |= {"role": "assistant", "content": []}
        elif self.kind == "reasoning":
            self.item |= {"summary": [], "content": []}
        else:
            namespace, name = self.tools.namespaces.get(
                call["function"]["name"], (None, call["function"]["name"]))
            self.item |= {"call_id": call["id"], "name": name, "arguments": "",
                          **({"namespace": namespace} if namespace else {})}
        yield {"type": "response.output_item.added", "output_index": len(self.reply["output"]),
               "item": self.item}
        if self.kind == "reasoning" and self.summarizes:
            yield self.event("reasoning_summary_part.added", summary_index=0, part={
                "type": "summary_text", "text": ""})
        if self.kind != "call":
            yield self.event("content_part.added", content_index=0, part=self.part(""))

    def add(self, text: str, logprobs: list[dict]) -> Iterator[dict]:
        """As Story.add."""
        if self.kind == "call":
            yield self.event("function_call_arguments.delta", delta=text)
        elif self.kind == "text":
            self.logprobs += logprobs
            yield self.event("output_text.delta", content_index=0, delta=text,
                             logprobs=without_bytes(logprobs))
        else:
            yield self.event("reasoning_text.delta", content_index=0, delta=text)
            if self.summarizes:
                yield self.event("reasoning_summary_text.delta", summary_index=0, delta=text)

    def close(self, is_whole: bool) -> Iterator[dict]:
        """As Story.close."""
        text = "".join(self.texts)
        if self.kind == "call":
            self.item["arguments"] = text
            yield self.event("function_call_arguments.done", name=self.item["name"],
                             arguments=text)
        else:
            self.item["content"] = [self.part(text)]
            done = {"logprobs": without_bytes(self.logprobs)} if self.kind == "text" else {}
            kind = "output_text" if self.kind == "text" else "reasoning_text"
            yield self.event(f"{kind}.done", content_index=0, text=text, **done)
            yield self.event("content_part.done", content_index=0, part=self.part(text))
        if self.kind == "reasoning" and self.summarizes:
            self.item["summary"] = [{"type": "summary_text", "text": text}]
            yield self.event("reasoning_summary_text.done", summary_index=0, text=text)
            yield self.event("reasoning_summary_part.done", summary_index=0,
                             part=self.item["summary"][0])
        self.item["status"] = "completed" if is_whole else "incomplete"
        yield {"type": "response.output_item.done", "output_index": len(self.reply["output"]),
               "item": self.item}
        self.reply["output"].append(self.item)

    def end(self, reason: str) -> Iterator[dict]:
        """As Story.end."""
        n_prompt, n_cached, n_reply, n_thought = self.counts()
        status = "incomplete" if reason == "length" else "completed"
        self.reply |= {
            "status": status, "completed_at": int(time.time()) if status == "completed" else None,
            "incomplete_details": {"reason": "max_output_tokens"} if reason == "length" else None,
            "usage": {"input_tokens": n_prompt,
                      "input_tokens_details": {"cached_tokens": n_cached, "cache_write_tokens": 0},
                      "output_tokens": n_reply,
                      "output_tokens_details": {"reasoning_tokens": n_thought},
                      "total_tokens": n_prompt + n_reply}}
        self.keep(self.reply)
        yield from self.snapshots(status)

    def event(self, what: str, **more) -> dict:
        """An event of the item that is open."""
        return {"type": f"response.{what}", "item_id": self.item["id"],
                "output_index": len(self.reply["output"]), **more}

    def part(self, text: str) -> dict:
        """The content of the item that is open."""
        if self.kind == "reasoning":
            return {"type": "reasoning_text", "text": text}
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": self.logprobs}


def without_bytes(logprobs: list[dict]) -> list[dict]:
    """Log-probabilities as events have them."""
    return [{name: [{key: value for key, value in top.items() if key != "bytes"} for top in entry]
             if name == "top_logprobs" else entry for name, entry in each.items()
             if name != "bytes"} for each in logprobs]


class Events(protocols.NamedEvents):
    """A response's stream: its events are numbered, and it ends with what became of it. Outside of
    one, errors are as in all of OpenAI's API."""

    def __init__(self, reply: dict | None = None, keep: Callable[[dict], None] | None = None):
        """reply, keep: as for Response; None: no stream has begun."""
        self.reply, self.keep, self.number = reply, keep, 0

    def event(self, data: dict | str) -> bytes:
        """As Dialect.event."""
        self.number += 1
        return super().event({**data, "sequence_number": self.number - 1})

    def error_event(self, error: server.ApiError) -> bytes:
        """As Dialect.error_event."""
        if self.reply is None:
            return protocols.NamedEvents.event(self, {
                "type": "error", "code": error.code, "message": error.message,
                "param": error.param, "sequence_number": 0})
        return self.event(self.failed(error))

    def failed(self, error: server.ApiError) -> dict:
        """The event of a response that came to nothing."""
        known = error.code if error.code == "context_length_exceeded" else \
            "server_error" if error.status >= 500 else "invalid_prompt"
        self.reply |= {"status": "failed", "error": {"code": known, "message": error.message}}
        self.keep(self.reply)
        return {"type": "response.failed", "response": self.reply}

    def sign(self, text: str, data: dict | None) -> bytes:
        """A sign of life; api.openai.com sends this event while it is silent."""
        return self.event({"type": "keepalive"}) if self.number else pings.comment(text)
