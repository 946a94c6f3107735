"""The server sees: images through both dialects, what is refused of them, and what they cannot do.

The real model with tiny-vision.mmproj.gguf, which knows the colour of a shape and little else; real
sockets, the real openai client. make_vision_model.py made the model.
"""

import base64
import concurrent.futures
import contextlib
import functools
import http.server
import io
import itertools
import json
import os
import random
import socket
import struct
import sys
import threading
import time
import zlib

import gguf
import httpx
import numpy as np
import openai
import PIL.ExifTags
import PIL.Image
import PIL.ImageOps
import pytest

import conftest
from features import files, vision
from make_vision_model import COLORS, PRODUCT, SEED, SHAPES, pictures, png
from test_limits import listening, wait_for

N_POSITIONS = 16  # of an image in a prompt
TEST_SEED = 20_000  # the training drew its pictures with SEED
N_PICTURES = 42  # each colour with each shape, twice
ORDER = np.arange(N_PICTURES)
NAMES = [list(COLORS)[number] for number in ORDER % len(COLORS)]
PICTURES = pictures(np.random.default_rng(TEST_SEED), ORDER % len(COLORS),
                    ORDER // len(COLORS) % len(SHAPES))
RED, GREEN, BLUE = (png(PICTURES[NAMES.index(name)]) for name in ("red", "green", "blue"))


def saved(picture: np.ndarray | PIL.Image.Image, kind="JPEG", **options) -> bytes:
    file = io.BytesIO()
    picture = PIL.Image.fromarray(picture) if isinstance(picture, np.ndarray) else picture
    picture.save(file, kind, **options)
    return file.getvalue()


JPEG = saved(PICTURES[NAMES.index("green")], quality=90)


@pytest.fixture(scope="module")
def running():
    """A server in this process: the default model sees, `blind` is the same without a projector.
    With so small a prefill_chunk an image takes two steps while anything else generates. What has
    lost its slot is forgotten, so that a test knows what is cached."""
    path = str(conftest.default_model())
    with listening(model_path=path, mmproj=str(PRODUCT), n_ctx=768, parallel=4, max_loaded=2,
                   prefill_chunk=10, model_aliases=["seer"], n_gpu_layers=0, cache_ram_mib=0,
                   models={"blind": conftest.entry(model_path=path, n_ctx=256)}) as running:
        running.models.start()
        yield running


@pytest.fixture(scope="module")
def web(running):
    with httpx.Client(base_url=running.url, timeout=60) as client:
        yield client


@pytest.fixture(scope="module")
def client(running):
    return openai.OpenAI(base_url=f"{running.url}/v1", api_key="unused")


@pytest.fixture(autouse=True)
def alive(web):
    """After each test the server still answers, and no slot is left busy."""
    yield
    wait_for(lambda: {slot["state"] for slot in web.get("/slots").json()} == {"idle"})
    assert ask(web, user(text="Hi"), max_tokens=1).status_code == 200


def uri(file: bytes, kind="image/png") -> str:
    return f"data:{kind};base64,{base64.b64encode(file).decode()}"


def decoded(file: bytes) -> np.ndarray:
    vision.inspect(file)
    return vision.decode(file)


def user(*files: bytes | str, text="What is the color?") -> dict:
    """A user's message: images, which are files or URLs, and behind them a text."""
    urls = [file if isinstance(file, str) else uri(file, "image/*") for file in files]
    return {"role": "user", "content": [
        *({"type": "image_url", "image_url": {"url": url}} for url in urls),
        {"type": "text", "text": text}]}


def ask(web, *messages: dict, **options) -> httpx.Response:
    return web.post("/v1/chat/completions", json={
        "messages": messages, "temperature": 0, "max_tokens": 10, **options})


def answer(web, *messages: dict, **options) -> tuple[str, int, int]:
    """What the model says, the prompt's tokens, and how many of them were cached."""
    reply = ask(web, *messages, **options)
    assert reply.status_code == 200, reply.text
    usage = reply.json()["usage"]
    return (reply.json()["choices"][0]["message"]["content"], usage["prompt_tokens"],
            usage["prompt_tokens_details"]["cached_tokens"])


def refusal(reply: httpx.Response) -> str:
    """The message of a 400, in either dialect."""
    assert reply.status_code == 400, reply.text
    body = reply.json()
    return body["error"]["message"] if "error" in body else body["detail"]


def colors_in(text: str) -> list[str]:
    return [name for name in COLORS if name in text.lower()]


def text_tokens(web, *messages: dict) -> list[int]:
    """How many tokens each text has that stands before, between and behind the images."""
    prompt = web.post("/apply-template", json={"messages": messages}).json()["prompt"]
    return [len(web.post("/tokenize", json={"content": text}).json()["tokens"])
            for text in prompt.split("<image>")]


# ==== It sees ==============================================================================


def test_the_little_model_is_small_and_made_for_smollm2():
    assert PRODUCT.stat().st_size < 2_000_000
    field = gguf.GGUFReader(PRODUCT).get_field("clip.vision.projection_dim")
    assert field.contents() == 576 and SEED != TEST_SEED


@pytest.mark.slow
def test_nine_of_ten_new_pictures_are_named_right(client):
    """PNG and JPEG, four at a time."""
    def look(number: int) -> str:
        url = uri(saved(PICTURES[number], quality=90), "image/jpeg") if number % 3 == 0 else \
            uri(png(PICTURES[number]))
        return client.chat.completions.create(model="seer", messages=[user(url)], temperature=0,
                                              max_tokens=9).choices[0].message.content

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        pairs = list(zip(NAMES, pool.map(look, ORDER)))
    wrong = [pair for pair in pairs if colors_in(pair[1]) != [pair[0]]]
    assert len(wrong) <= 0.1 * N_PICTURES, wrong


@pytest.mark.slow
def test_apps_show_their_pictures_as_bare_base64_or_data_uris(web):
    """/chat/vision finds the model that sees."""
    def look(number: int) -> str:
        bare = {"data_base64": uri(png(PICTURES[number]))[22:], "mime_type": "image/png"}
        image = bare if number % 2 else {"data_base64": uri(png(PICTURES[number]))}
        return web.post("/chat/vision", json={
            "messages": [{"role": "user", "content": "What is the color?", "images": [image]}],
            "config": {"temperature": 0, "maxTokens": 9}}).json()["content"]

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        pairs = list(zip(NAMES[::5], pool.map(look, ORDER[::5])))
    wrong = [pair for pair in pairs if colors_in(pair[1]) != [pair[0]]]
    assert len(wrong) <= 0.1 * len(pairs), wrong


def test_a_second_turn_about_an_image_finds_it_in_the_cache(web):
    """It counts as 16 tokens; the answer is the same as without the cache."""
    text, n_prompt, _ = answer(web, user(GREEN))
    assert n_prompt == sum(text_tokens(web, user(GREEN))) + N_POSITIONS
    turns = user(GREEN), {"role": "assistant", "content": text}, user(text="Say it again.")
    again, n_again, n_cached = answer(web, *turns)
    assert n_again > n_cached >= n_prompt
    assert answer(web, *turns, cache_prompt=False) == (again, n_again, 0)


def test_two_images_never_share_a_cache(web):
    """The text before them does, and behind them nothing."""
    text = "Look, and then tell me in a few words: what is the color?"
    before = text_tokens(web, user(RED, text=text))[0]
    said = []
    for file in (RED, BLUE, RED, png(PICTURES[0] ^ 1)):
        content, n_prompt, n_cached = answer(web, user(file, text=text))
        said.append((colors_in(content), n_cached - before, n_cached == n_prompt - 1))
    assert said[1] == (["blue"], 0, False)
    assert said[2][::2] == (["red"], True)
    assert said[3] == (["red"], 0, False)  # nearly the same picture


def test_a_conversation_about_an_image_comes_back_to_a_slot():
    """From host memory, its image included, as whole as it was."""
    path = str(conftest.default_model())
    with listening(model_path=path, mmproj=str(PRODUCT), n_ctx=512, parallel=1,
                   n_gpu_layers=0) as running:
        running.models.start()
        with httpx.Client(base_url=running.url, timeout=60) as web:
            said, n_prompt, _ = answer(web, user(RED))
            assert colors_in(said) == ["red"]
            for other in "Write one word.", "And another, please, about the sea and its fish.":
                web.post("/v1/completions", json={"prompt": other, "max_tokens": 2})
            assert answer(web, user(RED)) == (said, n_prompt, n_prompt - 1)


def test_two_images_in_one_message(web):
    """Each counts, and the model reads both."""
    turn = user(RED, png(PICTURES[NAMES.index("red", 7)]))
    content, n_prompt, _ = answer(web, turn)
    assert n_prompt == sum(text_tokens(web, turn)) + 2 * N_POSITIONS
    assert colors_in(content) == ["red"]
    mixed, n_mixed, _ = answer(web, user(RED, BLUE))
    assert answer(web, user(RED, BLUE), cache_prompt=False) == (mixed, n_mixed, 0)


def test_streams_choices_and_schemas_see_too(client, web):
    """With the same answer."""
    whole, _, _ = answer(web, user(BLUE))
    chunks = client.chat.completions.create(
        model="seer", messages=[user(BLUE)], temperature=0, max_tokens=10, stream=True)
    assert "".join(part.choices[0].delta.content or "" for part in chunks) == whole
    both = ask(web, user(BLUE), n=2).json()["choices"]
    assert [choice["message"]["content"] for choice in both] == [whole, whole]
    schema = {"type": "object", "properties": {"color": {"enum": list(COLORS)}},
              "required": ["color"], "additionalProperties": False}
    content, _, _ = answer(web, user(BLUE), max_tokens=30, response_format={
        "type": "json_schema", "json_schema": {"name": "c", "strict": True, "schema": schema}})
    assert json.loads(content) == {"color": "blue"}


@pytest.mark.slow
def test_other_streams_go_on_while_images_are_read(running, web):
    """The longest gap in a text stream beside requests with five new images each."""
    times = []

    def read() -> None:
        with httpx.stream("POST", f"{running.url}/v1/completions", timeout=60, json={
                "prompt": "Once", "max_tokens": 60, "ignore_eos": True, "stream": True}) as reply:
            times.extend(time.monotonic() for line in reply.iter_lines() if "text" in line)

    reader = threading.Thread(target=read)
    reader.start()
    wait_for(lambda: any(slot["state"] == "decoding" for slot in web.get("/slots").json()))
    fresh = [png(picture ^ 2) for picture in PICTURES]
    with concurrent.futures.ThreadPoolExecutor(3) as pool:
        replies = list(pool.map(lambda start: ask(web, user(*fresh[start:start + 5]),
                                                  max_tokens=2), range(0, 20, 5)))
    reader.join()
    assert {reply.status_code for reply in replies} == {200} and len(times) >= 30
    assert max(b - a for a, b in itertools.pairwise(times)) < 3


# ==== What is refused ======================================================================


@pytest.mark.parametrize("messages, words", [
    ([user("http://example.com/a.png")], "allow_image_urls"),
    ([user("HTTPS://example.com/a.png")], "allow_image_urls"),
    ([user("file:///etc/passwd")], "messages[0].content[0]: "),
    ([user("")], "messages[0].content[0]: "),
    ([{**user(RED), "role": "system"}], "messages[0].content[0]: a system message cannot"),
    ([user(RED), {**user(RED), "role": "assistant"}], "messages[1].content[0]: "),
    ([{"role": "user", "content": [{"type": "image_url"}]}], "messages[0].content[0]"),
    ([{"role": "user", "content": [{"type": "text", "image_url": {"url": uri(RED)}}]}],
     "messages[0].content[0]"),
    ([user(*[RED] * 60)], "context is 768 tokens"),
], ids=itertools.count())
def test_images_where_they_cannot_be_are_refused_with_their_place(web, messages, words):
    assert words in refusal(ask(web, *messages))


def test_a_text_model_refuses_images(web):
    """The message says where the image stands."""
    refused = refusal(ask(web, user(text="Hi"), user(RED), model="blind"))
    assert refused.startswith("messages[1].content[0]: blind reads no images")


def chunk(kind: bytes, data: bytes) -> bytes:
    """One of a PNG's."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def a_png(width: int, height: int, data: bytes, before=b"", color_type=2) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, 8, color_type, 0, 0, 0)
    return PNG_START + before + chunk(b"IHDR", header) + chunk(b"IDAT", data) + PNG_END


PNG_START, PNG_END = b"\x89PNG\r\n\x1a\n", b"\0\0\0\0IEND\xaeB`\x82"
BLACK = zlib.compress(bytes(7100 * 7101))
HIDDEN = a_png(7100, 7100, BLACK[2:-4], chunk(b"CgBI", struct.pack(">II", 1, 1)), 0)  # Apple's own
WAV = b"RIFF\x2c\0\0\0WAVEfmt \x10\0\0\0\1\0\1\0\x40\x1f\0\0\x80\x3e\0\0\2\0\x10\0data" + bytes(12)


@pytest.mark.parametrize("url, words", [
    (uri(RED[:200]), "cut off"), (uri(RED[:-12]), "cut off"), (uri(RED[:30]), "cut off"),
    (uri(PNG_START), "no JPEG, PNG, WebP or GIF file"),
    (uri(RED[:100] + b"?" + RED[101:]), "damaged"),
    (uri(a_png(48, 48, b"")), "damaged"), (uri(a_png(0, 0, BLACK)), "damaged"),
    (uri(a_png(60_000, 60_000, BLACK)), "60000 x 60000"), (uri(PNG_START + PNG_END), ""),
    (uri(HIDDEN), "7100 x 7100"), (uri(JPEG[:2] + JPEG[300:], "image/jpeg"), "damaged"),
    (uri(JPEG[:-2], "image/jpeg"), "cut off"), (uri(JPEG[:300], "image/jpeg"), "cut off"),
    (uri(b"\xff\xd8\xff", "image/jpeg"), "cut off"),
    (uri(b"\xff\xd8\xff\xd9" * 9, "image/jpeg"), ""),
    ("data:image/png;base64,", "no JPEG, PNG, WebP or GIF file, or is damaged or cut off near"),
    ("data:image/png;base64,?!", "Base64"),
    ("data:image/png;base64,é", "Base64"), ("data:image/png;base64,AAAAA", "Base64"),
    ("data:image/png,abc", "must be like"), ("data:", "must be like"), ("data:,", "must be like"),
    (uri(RED).replace(";base64", ""), "must be like"), (uri(b"just text", "text/plain"), "no JPEG"),
    (uri(saved(PICTURES[0], "GIF")[:-300], "image/gif"), "cut off"),
    (uri(saved(PICTURES[0], "GIF")[:5], "image/gif"), "cut off"),
    (uri(saved(PICTURES[0], "BMP"), "image/bmp"), "no JPEG"),
    (uri(saved(PICTURES[0], "TIFF"), "image/tiff"), "no JPEG"), (uri(WAV, "audio/wav"), "no JPEG"),
    (uri(b"ID3\4" + bytes(500), "audio/mpeg"), "no JPEG"),
    (uri(b"\xff\xfb\x90\0" + bytes(500)), "no JPEG"),
    (uri(b"RIFF\0\0\0\0WEBPVP8 ", "image/webp"), "damaged"),
], ids=itertools.count())
def test_broken_and_lying_images_are_refused_with_a_message(web, url, words):
    """In both dialects, and in short."""
    message = refusal(ask(web, user(url)))
    assert message.startswith("messages[0].content[0]: ") and words in message
    assert len(message) < 300
    message = refusal(web.post("/chat/vision", json={"messages": [
        {"role": "user", "images": [{"data_base64": url}]}]}))
    assert message.startswith("messages[0].content[0]: ") and words in message


@pytest.mark.parametrize("url", [
    uri(png(np.zeros((1, 1, 3), np.uint8))), uri(png(np.zeros((1, 5000, 3), np.uint8))),
    uri(png(np.zeros((60_000, 1, 3), np.uint8))), uri(RED, "image/*"), uri(RED, ""),
    uri(RED, "IMAGE/PNG"), uri(RED, "application/octet-stream"), uri(JPEG, "image/jpg"),
    uri(RED, "image/jpeg"), uri(JPEG, "image/png"), uri(RED, "text/html"),  # read by their bytes
    uri(a_png(1, 1, BLACK)),  # what is behind its only pixel is not unpacked
    uri(RED, "image/png;charset=utf-8"), uri(RED + b"more"), uri(JPEG + b"more", "image/jpeg"),
    "DATA" + uri(RED)[4:], uri(RED)[:99] + "\r\n " + uri(RED)[99:],
], ids=itertools.count())
def test_odd_images_are_fine(web, url):
    """A picture of any shape has the same 16 positions."""
    assert answer(web, user(url), max_tokens=1)[1] == answer(web, user(RED), max_tokens=1)[1]


def repaired(file: bytes) -> bytes:
    """A PNG whose checksums are right again, as far as its chunks can be followed."""
    position, out = 8, file[:8]
    with contextlib.suppress(struct.error):
        while position < len(file):
            length, = struct.unpack_from(">I", file, position)
            out += chunk(file[position + 4:position + 8], file[position + 8:position + 8 + length])
            position += length + 12
    return out


def test_no_mutation_of_a_file_is_more_than_refused(web):
    """Random bytes in PNGs, half of them with right checksums, and in JPEGs: 200 or 400."""
    rng, files, packed = random.Random(5), [], saved(PICTURES[3], "PNG", optimize=True)
    for number in range(300):
        file = bytearray((packed, packed, JPEG)[number % 3])
        for _ in range(rng.choice((1, 1, 2, 5, 20))):
            place = rng.randrange(len(file)) if rng.random() < 0.6 else rng.randrange(8, 60)
            file[place] = rng.choice((rng.randrange(256), 0, 255, file[place] ^ 1 << number % 8))
        files.append(repaired(bytes(file)) if number % 3 == 0 else bytes(file))
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        seen = list(pool.map(lambda file: web.post("/apply-template", json={
            "messages": [user(file)]}).status_code, files))
        said = list(pool.map(lambda file: ask(web, user(file), max_tokens=1).status_code,
                             files[::6]))
    assert set(seen) == {200, 400} and seen[::6] == said
    assert seen[2::3].count(200) > 10  # a JPEG has no checksums


def test_images_need_pillow_and_nothing_else_does(web, monkeypatch):
    """Without it the message says what to install, before a model is loaded."""
    blue, red = (saved(PICTURES[NAMES.index(name)], "WEBP") for name in ("blue", "red"))
    assert colors_in(answer(web, user(uri(blue, "image/webp")))[0]) == ["blue"]
    assert "damaged" in refusal(ask(web, user(uri(blue[:200], "image/webp"))))
    for name in ("PIL", "PIL.Image", "PIL.ImageOps"):
        monkeypatch.setitem(sys.modules, name, None)
    for file in (red, GREEN, JPEG):
        message = refusal(ask(web, user(file)))
        assert "pip install -r features/requirements.txt" in message
    assert "Base64" in refusal(ask(web, user("data:image/png;base64,?!")))
    assert ask(web, user(text="Hi"), max_tokens=1).status_code == 200


@pytest.mark.parametrize("kind", ["GIF", "WEBP"])
def test_of_an_animation_the_first_picture_is_read(web, kind):
    """Its colours, and not those of the fifty that follow."""
    red, blue = (PIL.Image.fromarray(PICTURES[NAMES.index(name)]) for name in ("red", "blue"))
    assert colors_in(answer(web, user(saved(blue, kind)))[0]) == ["blue"]
    file = saved(red, kind, save_all=True, append_images=[blue] * 50)
    assert colors_in(answer(web, user(file))[0]) == ["red"]


def test_a_text_cannot_forge_an_image(web):
    """What stands for images inside is just text where a user writes it."""
    text = "<__media__> <image 00112233445566778899aabbccddeeff> [IMG] What is that?"
    assert text in web.post("/apply-template", json={"messages": [user(text=text)]}).text
    for turn, n_images in ((user(text=text), 0), (user(RED, text=text), 1)):
        assert answer(web, turn, max_tokens=1)[1] == \
            sum(text_tokens(web, turn)) + n_images * N_POSITIONS


# ==== Images from the web ==================================================================


class Site(http.server.BaseHTTPRequestHandler):
    """A web server that is not always what it should be."""

    PLACES = {"/away": "http://localhost:1/", "/loop": "/loop", "/odd": "http://[",
              "/local": "/red.png", "/file": "file:///etc/passwd", "/words": "/a b\u00e9"}

    def do_GET(self):
        place = self.PLACES.get(self.path)
        self.send_response(302 if place else 404 if self.path == "/none" else 200)
        if place:
            self.send_header("Location", place)
        self.end_headers()
        if self.path == "/reset":
            self.wfile.write(RED[:50])
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            os.close(self.connection.detach())
            return
        with contextlib.suppress(OSError):
            for _ in range(50 if self.path == "/slow" else 0):
                self.wfile.write(b"?")
                time.sleep(0.05)
            self.wfile.write({"/page": b"<html>", "/big": bytes(2**20 + 1)}.get(self.path, RED))

    def log_message(self, *_):
        pass


@pytest.fixture
def site(running, monkeypatch):
    """Its address."""
    monkeypatch.setattr(running.config, "allow_image_urls", True)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Site) as site:
        threading.Thread(target=site.serve_forever, args=(0.02,), daemon=True).start()
        yield f"http://127.0.0.1:{site.server_port}"
        site.shutdown()


@pytest.mark.parametrize("host", [
    "127.0.0.1", "localhost", "127.1", "2130706433", "0x7f000001", "0177.0.0.1", "0.0.0.0", "[::1]",
    "[::ffff:127.0.0.1]", "[::]", "[::127.0.0.1]", "[64:ff9b::7f00:1]", "[2002:7f00:1::]",
    "169.254.169.254", "10.0.0.1", "192.168.1.1", "100.64.0.1", "224.0.0.1", "[fe80::1%25lo]",
    "user@example.com", "no-such-host.invalid", "", "."])
def test_an_address_that_is_not_public_is_refused(web, site, host):
    """Nobody reaches through the server what is behind it."""
    message = refusal(ask(web, user(f"http://{host}:{site.rpartition(':')[2]}/red.png")))
    assert "is not at a public address" in message or "is no address on the web" in message


@pytest.mark.parametrize("path, words", [
    ("/red.png", None), ("/local", None), ("/away", "localhost:1/\" is not at a public address"),
    ("/loop", "redirects"), ("/file", "no address on the web"), ("/odd", ""), ("/words", ""),
    ("/none", "answered 404"), ("/page", "no JPEG"), ("/big", "more than 1 MB"),
    ("/slow", "the 1 seconds"), ("/reset", "cannot fetch")])
def test_an_image_is_fetched_within_limits(web, site, path, words, monkeypatch):
    """For once one address of ours is taken for a public one; each redirect is looked at."""
    look = files.public_address
    monkeypatch.setattr(vision, "IMAGE_SECONDS", 1.0)
    monkeypatch.setattr(files, "IMAGE_SECONDS", 1.0)
    monkeypatch.setattr(vision, "MAX_IMAGES_MB", 1)
    monkeypatch.setattr(files, "MAX_IMAGES_MB", 1)
    monkeypatch.setattr(files, "public_address", lambda url: "127.0.0.1" if url.startswith(
        site + "/") else look(url))
    started, reply = time.monotonic(), ask(web, user(site + path))
    assert time.monotonic() - started < 5
    if words is None:
        assert colors_in(reply.json()["choices"][0]["message"]["content"]) == ["red"]
    else:
        assert words in refusal(reply)


# ==== Inside ===============================================================================


def test_a_request_cancelled_within_an_image_leaves_its_slot_usable(running, web):
    """The next one computes that image anew: it is kept whole or not at all."""
    turn = user(*[png(picture ^ 4) for picture in PICTURES[:6]])
    before, between, *_ = text_tokens(web, turn)
    step = N_POSITIONS + between

    def within(state: str) -> list[int]:
        """The slots in a state that hold some images and a part of one: how many tokens."""
        return [slot["tokens"] for slot in web.get("/slots").json() if slot["state"] == state
                and slot["tokens"] > before + step
                and 0 < (slot["tokens"] - before) % step < N_POSITIONS]

    wanted, n_prompt, _ = answer(web, turn, cache_prompt=False, max_tokens=4)
    web.post("/v1/completions", json={"prompt": ["Once"] * 4, "max_tokens": 1,
                                      "cache_prompt": False})  # all slots forget the images
    with httpx.stream("POST", f"{running.url}/v1/completions", json={
            "prompt": "Once", "max_tokens": 700, "ignore_eos": True, "stream": True}) as reply:
        lines = reply.iter_lines()
        next(lines)
        with socket.create_connection(("127.0.0.1", running.server_port)) as raw:
            body = json.dumps({"messages": [turn]}).encode()
            raw.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n"
                        b"Content-Length: %d\r\n\r\n%b" % (len(body), body))
            wait_for(lambda: within("prefilling"))
        wait_for(lambda: not any(slot["state"] == "prefilling"
                                 for slot in web.get("/slots").json()))
        held = within("idle")
    content, _, n_cached = answer(web, turn, max_tokens=4)
    assert content == wanted and 0 < n_cached < n_prompt
    assert (n_cached - before) % step in (0, N_POSITIONS) and (not held or n_cached < held[0])


def test_what_stands_behind_a_pngs_pixels_costs_nothing():
    """Each piece of it was once appended to all before it: 20 seconds."""
    file = a_png(1, 1, zlib.compress(b"\0\0\0\0"))
    junk = b"".join(chunk(b"IDAT", bytes(500)) for _ in range(19_000))
    started = time.monotonic()
    assert decoded(file[:-len(PNG_END)] + junk + PNG_END).tolist() == [[[0, 0, 0]]]
    assert time.monotonic() - started < 2


def test_base64_of_blanks_only_is_read_at_once():
    started = time.monotonic()
    assert vision.read_data_uri("data:image/png;base64," + " \n" * 4_000_000) == b""
    assert time.monotonic() - started < 1


def test_a_good_file_of_any_mode_is_read(web):
    """Whatever stands before it in the file, such as a thumbnail."""
    picture, exif = PIL.Image.new("RGB", (70, 50), (250, 10, 10)), PIL.Image.Exif()
    exif[0x010E] = saved(PICTURES[0]).decode("latin-1")
    for mode, options in itertools.product(("RGB", "L", "CMYK"), (
            {}, {"progressive": True}, {"exif": exif}, {"comment": b"\xff\xd9\xff\xc0" * 9})):
        file = saved(picture.convert(mode), **options)
        wanted = np.asarray(picture.convert(mode).convert("RGB"), np.int16)
        for file in (file, file[:2] + b"\xff\xff" + file[2:]):
            assert abs(decoded(file) - wanted).max() <= 2
    for mode in ("RGB", "RGBA", "L", "LA", "P", "1"):
        same = picture.convert(mode)
        file = saved(same, "PNG")
        assert (decoded(file) == np.asarray(same.convert("RGB"))).all()
        assert ask(web, user(file), max_tokens=1).status_code == 200


def test_sixteen_bits_become_eight():
    """Pillow's own conversion of grey ones turns all above 255 into white."""
    values = np.arange(60 * 70, dtype=np.uint16).reshape(60, 70) * 15
    wanted = np.dstack([values >> 8] * 3)
    assert (decoded(saved(PIL.Image.fromarray(values), "PNG")) == wanted).all()
    rows = np.repeat(values.astype(">u2")[..., None], 3, 2).reshape(60, -1).view(np.uint8)
    header = struct.pack(">IIBBBBB", 70, 60, 16, 2, 0, 0, 0)
    data = zlib.compress(np.pad(rows, ((0, 0), (1, 0))).tobytes())
    file = PNG_START + chunk(b"IHDR", header) + chunk(b"IDAT", data) + PNG_END
    assert (decoded(file) == wanted).all()


@pytest.mark.parametrize("kind, mode", [
    ("PNG", "RGBA"), ("PNG", "LA"), ("PNG", "P"), ("PNG", "RGB"), ("PNG", "L"), ("WEBP", "RGBA"),
    ("GIF", "P")])
def test_what_is_transparent_is_white(kind, mode):
    """Black writing on nothing, of which a decoder that drops alpha leaves black on black."""
    alpha = np.zeros((50, 70), np.uint8)
    alpha[20:30, 20:50] = 255
    picture, options = PIL.Image.new("RGBA", (70, 50), (0, 0, 0, 0)), {}
    picture.putalpha(PIL.Image.fromarray(alpha))
    if mode == "P":
        picture = PIL.Image.fromarray((alpha == 0).astype(np.uint8), "P")
        picture.putpalette([0, 0, 0, 0, 0, 0])
        options = {"transparency": 1}
    elif mode in ("RGB", "L"):  # a colour that stands for nothing
        picture = PIL.Image.fromarray(np.where(alpha, 0, 9).astype(np.uint8)).convert(mode)
        options = {"transparency": 9 if mode == "L" else (9, 9, 9)}
    else:
        picture = picture.convert(mode)
    wanted = np.dstack([255 - alpha] * 3)
    assert (decoded(saved(picture, kind, lossless=True, **options)) == wanted).all()


def test_what_is_half_transparent_is_half_white():
    picture = PIL.Image.new("RGBA", (9, 9), (0, 100, 200, 128))
    assert decoded(saved(picture, "PNG"))[0, 0].tolist() == [127, 177, 227]


TURNS = {1: lambda a: a, 2: np.fliplr, 3: lambda a: np.rot90(a, 2), 4: np.flipud,
         5: lambda a: a.swapaxes(0, 1), 6: lambda a: np.rot90(a, -1),
         7: lambda a: np.rot90(a, 2).swapaxes(0, 1), 8: np.rot90}  # EXIF 2.32, 4.6.4 A: Orientation


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", TURNS)
def test_a_photo_is_turned_as_its_exif_block_says(kind, orientation):
    """Cameras store what their sensor saw. It once went to the model like that."""
    picture = np.repeat(np.repeat(np.random.default_rng(5).integers(
        0, 256, (3, 4, 3), dtype=np.uint8), 16, 0), 16, 1)  # no two corners are the same
    exif = PIL.Image.Exif()
    exif[PIL.ExifTags.Base.Orientation] = orientation
    options = {"quality": 95, "subsampling": 0} if kind == "JPEG" else {"lossless": True}
    file = saved(picture, kind, exif=exif, **options)
    seen = decoded(file)
    with PIL.Image.open(io.BytesIO(file)) as image:
        assert (seen == np.asarray(PIL.ImageOps.exif_transpose(image).convert("RGB"))).all()
    assert seen.shape == TURNS[orientation](picture).shape
    assert abs(seen.astype(np.int16) - TURNS[orientation](picture)).max() <= (kind == "JPEG") * 16


def test_a_turned_photo_is_the_same_to_the_model(running):
    """Its rows are those of the upright one."""
    reader = vision.projectors[next(iter(running.models.engines().values()))]
    exif = PIL.Image.Exif()
    exif[PIL.ExifTags.Base.Orientation] = 6
    lying = np.rot90(PICTURES[0])
    upright, turned, untold = (reader.read(file)[0].rows for file in (
        png(PICTURES[0]), saved(lying, "PNG", exif=exif), saved(lying, "PNG")))
    assert (turned == upright).all() and (untold != upright).any()


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_an_exif_block_that_is_damaged_turns_nothing():
    wanted = decoded(JPEG)
    for block in (b"", b"II", b"II*\0\x08\0\0\0\xff\xff", b"MM\0*" + bytes(range(200)),
                  b"II*\0\x08\0\0\0\1\0\x12\1\3\0\1\0\0\0\x63\0\0\0\0\0\0\0"):
        block = b"Exif\0\0" + block
        file = JPEG[:2] + b"\xff\xe1" + struct.pack(">H", len(block) + 2) + block + JPEG[2:]
        assert (decoded(file) == wanted).all()


# ---- files made to cost more than they are worth; making them costs, too, and so is left to the tests

FILE_BYTES = 12_000_000  # what fits a request, as Base64
PNG, GIF = saved(PICTURES[0], "PNG"), saved(PICTURES[0], "GIF")
GIF_PALETTE_END = 13 + 3 * 2 ** (GIF[10] % 8 + 1)
PACKED = zlib.compress(bytes(10**6))


@functools.cache
def large_progressive() -> bytes:
    return saved(PIL.Image.new("RGB", (8000, 6250)), progressive=True)


def segments(marker: int, data: bytes) -> bytes:
    """As many of a JPEG's as fit, before a picture."""
    one = b"\xff%c" % marker + struct.pack(">H", len(data) + 2) + data
    return JPEG[:2] + one * (FILE_BYTES // len(one)) + JPEG[2:]


def chunks(kind: bytes, data: bytes) -> bytes:
    """As many of a PNG's as fit, before a picture."""
    one = chunk(kind, data)
    return PNG[:33] + one * (FILE_BYTES // len(one)) + PNG[33:]


def gif_comment(block: bytes) -> bytes:
    return GIF[:GIF_PALETTE_END] + b"\x21\xfe" + block * (FILE_BYTES // len(block)) + b"\0" \
        + GIF[GIF_PALETTE_END:]


def with_scans(file: bytes, n: int) -> bytes:
    """A JPEG with its last scan n times more."""
    return file[:-2] + file[file.rindex(b"\xff\xda"):-2] * n + file[-2:]


BOMBS = {
    "7100 x 7100": [lambda: HIDDEN],
    "60000 x 60000": [
        lambda: a_png(60_000, 60_000, BLACK),
        lambda: JPEG.replace(struct.pack(">HH", 48, 48), struct.pack(">HH", 60_000, 60_000)),
        lambda: GIF[:6] + struct.pack("<HH", 60_000, 60_000) + GIF[10:]],
    "16383 x 4000": [lambda: saved(
        PIL.Image.new("RGB", (16383, 4000)), "WEBP", lossless=True, method=0)],
    "too many pieces": [
        lambda: segments(0xE1, b"Exif\0\0x"), lambda: segments(0xE1, b"Exif\0\0" + bytes(3000)),
        lambda: segments(0xFE, b""), lambda: JPEG[:2] + b"\xff" * FILE_BYTES + JPEG[2:],
        lambda: chunks(b"tEXt", b"a\0b"), lambda: chunks(b"IDAT", b""),
        lambda: chunks(b"iCCP", b"a\0\0" + PACKED), lambda: gif_comment(b"\1a")],
    "too many scans": [lambda: with_scans(large_progressive(), 60),
                       lambda: with_scans(saved(PICTURES[0], progressive=True), 100_000)],
    "damaged or cut off": [
        lambda: chunks(b"zTXt", b"a\0\0" + PACKED),
        lambda: PNG[:33] + chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(10**8))) + PNG[33:],
        lambda: a_png(7000, 7000, b"")]}


@pytest.mark.parametrize("words, make", [(words, make) for words, makes in BOMBS.items()
                                         for make in makes], ids=itertools.count())
def test_a_bomb_is_refused_before_it_costs_much(words, make, monkeypatch):
    """Seconds of the processor, and memory: what is not unpacked takes none. It once took minutes
    to join a million pieces of an EXIF block."""
    monkeypatch.setattr(vision, "OPEN_SECONDS", 0.3)
    file = make()
    started, n_bytes = time.thread_time(), resident_bytes()
    with pytest.raises(vision.ImageError, match=words):
        decoded(file)
    assert time.thread_time() - started < vision.OPEN_SECONDS + 0.5
    assert resident_bytes() - n_bytes < 200e6


def resident_bytes() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGESIZE")


@pytest.mark.parametrize("make", [
    lambda: saved(PICTURES[0], "GIF", save_all=True, append_images=[
        PIL.Image.new("P", (48, 48), i % 200) for i in range(5000)]),
    lambda: gif_comment(b"\xff" + bytes(255)), lambda: with_scans(large_progressive(), 38),
    lambda: with_scans(saved(PICTURES[0], progressive=True), 30_000)], ids=itertools.count())
def test_what_is_odd_but_cheap_is_read(make):
    file = make()
    started = time.thread_time()
    assert decoded(file).shape[2] == 3
    assert time.thread_time() - started < 6  # a twentieth for all but the large one with 48 scans
