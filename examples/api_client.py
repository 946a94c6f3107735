"""What the server can do, with nothing but the standard library.

    python examples/api_client.py [completion] [stream] [chat] [tools] [image] [app]

Without names, all but `image`, which needs a vision model and a file:

    python examples/api_client.py image --file picture.png --model some-vision-model

The server's address and key come from OPENAI_BASE_URL and OPENAI_API_KEY, or --url and --key.
"""

import argparse
import base64
import json
import mimetypes
import os
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path


class Client:
    """Talks to an OpenAI-compatible server."""

    def __init__(self, url: str, key: str | None, model: str | None):
        """url: up to and including /v1; model: None for the server's default."""
        self.url, self.model = url.rstrip("/"), model
        self.headers = {"Content-Type": "application/json"}
        if key:
            self.headers["Authorization"] = f"Bearer {key}"

    def send(self, path: str, body: dict):
        """The open response to a POST. Raises RuntimeError with the server's own words."""
        request = urllib.request.Request(self.url + path, json.dumps(body).encode(), self.headers)
        try:
            return urllib.request.urlopen(request, timeout=600)
        except urllib.error.HTTPError as error:
            raise RuntimeError(f"{error.code}: {error.read().decode()}") from None

    def post(self, path: str, body: dict) -> dict:
        """The reply, parsed."""
        with self.send(path, {"model": self.model, **body}) as response:
            return json.load(response)

    def stream(self, path: str, body: dict) -> Iterator[dict]:
        """The chunks of a streamed reply, one at a time."""
        with self.send(path, {"model": self.model, "stream": True, **body}) as response:
            for line in response:
                if line.startswith(b"data: ") and line.strip() != b"data: [DONE]":
                    chunk = json.loads(line.removeprefix(b"data: "))
                    if "error" in chunk:
                        raise RuntimeError(chunk["error"]["message"])
                    yield chunk


def completion(client: Client) -> None:
    """A text goes on."""
    reply = client.post("/completions", {"prompt": "Rain is", "max_tokens": 24})
    print("Rain is" + reply["choices"][0]["text"])


def stream(client: Client) -> None:
    """A reply is shown while it is written."""
    question = [{"role": "user", "content": "What is rain?"}]
    for chunk in client.stream("/chat/completions", {"messages": question, "max_tokens": 60}):
        print(chunk["choices"][0]["delta"].get("content") or "", end="", flush=True)
    print()


def chat(client: Client) -> None:
    """A conversation of two turns: the messages so far are sent again every time."""
    messages = [{"role": "system", "content": "Answer in one sentence."}]
    for question in ("What is the capital of France?", "Which river flows through it?"):
        messages.append({"role": "user", "content": question})
        reply = client.post("/chat/completions", {"messages": messages, "max_tokens": 60})
        messages.append(reply["choices"][0]["message"])
        print(f"{question}\n  {messages[-1]['content']}")
    cached = reply["usage"]["prompt_tokens_details"]["cached_tokens"]
    print(f"  ({cached} of {reply['usage']['prompt_tokens']} prompt tokens were cached)")


def tools(client: Client) -> None:
    """The model calls a function of ours, and answers with what it returned."""
    weather = {"type": "function", "function": {
        "name": "get_weather", "description": "The weather in a city", "parameters": {
            "type": "object", "properties": {"city": {"type": "string", "maxLength": 30}},
            "required": ["city"], "additionalProperties": False}}}
    messages = [{"role": "user", "content": "How is the weather in Paris?"}]
    reply = client.post("/chat/completions", {
        "messages": messages, "tools": [weather], "tool_choice": "required",
        "parallel_tool_calls": False, "temperature": 0})
    message = reply["choices"][0]["message"]
    call = message["tool_calls"][0]
    print(f"{call['function']['name']}({call['function']['arguments']})")
    messages += [message, {"role": "tool", "tool_call_id": call["id"], "content": "22 C, sunny"}]
    reply = client.post("/chat/completions", {"messages": messages, "max_tokens": 60})
    print(reply["choices"][0]["message"]["content"])


def image(client: Client, file: Path) -> None:
    """A question about a picture."""
    kind = mimetypes.guess_type(file)[0] or "image/png"
    url = f"data:{kind};base64,{base64.b64encode(file.read_bytes()).decode()}"
    reply = client.post("/chat/completions", {"max_tokens": 60, "temperature": 0, "messages": [{
        "role": "user", "content": [{"type": "image_url", "image_url": {"url": url}},
                                    {"type": "text", "text": "What is the color?"}]}]})
    print(reply["choices"][0]["message"]["content"])


def app(client: Client) -> None:
    """The simpler dialect of local apps: its stream is one JSON object a line."""
    local = Client(client.url.removesuffix("/v1"), None, None)
    local.headers = client.headers
    body = {"messages": [{"role": "user", "content": "What is snow?"}],
            "config": {"temperature": 0.7, "maxTokens": 60}}
    if client.model:
        body["model_key"] = client.model
    with local.send("/chat/stream", body) as response:
        for line in map(json.loads, response):
            if line["type"] == "error":
                raise RuntimeError(line["detail"])
            if line["type"] == "fragment":
                print(line["content"], end="", flush=True)
    print(f"\n({line['predicted_tokens']} tokens, {line['stop_reason']})")


def main() -> int:
    """Run the examples that are named; 1 if one fails."""
    examples = {each.__name__: each for each in (completion, stream, chat, tools, app)}
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME",
                        help=f"{', '.join(examples)} or image; default: all but image")
    parser.add_argument("--url", default=os.environ.get("OPENAI_BASE_URL",
                                                        "http://127.0.0.1:8080/v1"))
    parser.add_argument("--key", default=os.environ.get("OPENAI_API_KEY"))
    parser.add_argument("--model", help="default: the server's")
    parser.add_argument("--file", type=Path, help="the picture for `image`")
    arguments = parser.parse_args()
    if unknown := set(arguments.names) - {*examples, "image"}:
        parser.error(f"there is no example {min(unknown)}")
    if "image" in arguments.names and not arguments.file:
        parser.error("image needs --file")
    client = Client(arguments.url, arguments.key, arguments.model)
    examples["image"] = lambda client: image(client, arguments.file)
    try:
        for name in arguments.names or [name for name in examples if name != "image"]:
            print(f"== {name}")
            examples[name](client)
    except (RuntimeError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
