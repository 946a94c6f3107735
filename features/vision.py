"""Vision: images in messages, for models that have a second GGUF file, the mmproj.

What it is for. A vision model is two networks. The language model reads rows, one vector for each
token. The other one, the projector, makes such rows of an image, and they stand in the prompt where
the image stood in the message. To the engine they are a `Piece`: rows in place of tokens, with
negative ids made of the image's content, by which the prefix cache knows it.

How it works, in the order of the file:

    1  decode   a file (files.py gets it) into RGB pixels, by Pillow, as people see it
    2  encode   pixels into Pieces, by llama.cpp's mtmd
    3  request  these steps for the messages of a chat

A file is read by its bytes, whatever its URI or the web says it is. It is turned as its EXIF block
says, since cameras store what their sensor saw, and what is transparent is laid on white: under it
most files are black, and black writing on it would be gone.

What it costs. A file is decoded and encoded once, beside the engine, in the thread of its request,
while streams go on; the rows of the last images are kept (Projector.CACHE_BYTES). An image of 50
megapixels takes 0.6 (JPEG) to 3 seconds (PNG with alpha) to decode, and 500 to 900 MB of memory
meanwhile, one image at a time for each model; Pillow gives the GIL away for all but 0.15 seconds.
What would take longer is refused: see MAX_PIXELS, MAX_SCANS and OPEN_SECONDS.

What it reads and sends. The fields are the `image_url` parts of user messages, the settings
`mmproj` and `allow_image_urls`. Only with the latter does it send anything: requests for images, to
public addresses. It needs Pillow (features/requirements.txt).
"""

import contextlib
import ctypes
import dataclasses
import functools
import hashlib
import io
import itertools
import os
import re
import secrets
import threading
import time
import warnings
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import numpy as np
from llama_cpp import llama_cpp as lib
from llama_cpp import mtmd_cpp as mtmd  # mtmd.h by ctypes, name by name

import engine
import server
from features import marks
from features.files import (
    IMAGE_SECONDS, MAX_IMAGES_MB, ImageError, fetch_image, read_data_uri)
from features.settings import find_file


# ==== 1. Decode: a file into pixels =====================================================

# Pillow's names; it reads many more, which nobody sends. A JPEG that holds several is an MPO.
KINDS = ("JPEG", "PNG", "WEBP", "GIF")
MAX_PIXELS = 50_000_000  # of an image, which takes 3 to 4 bytes each: the largest phone cameras'
# Each scan of a JPEG may go over the whole image, and be empty. Encoders write about ten. So many
# of MAX_PIXELS take two seconds; of a smaller image there may be more, for the same seconds.
MAX_SCANS = 50
SCAN_START = b"\xff\xda"  # ITU-T T.81, table B.1: SOS; within a scan a 0 follows each 0xFF
SCAN_PIXELS = 2**16  # what a scan costs besides, in pixels
# Of processor time, for all that stands around the pixels; milliseconds for what cameras write.
# subtle: Pillow reads that part in Python, piece by piece, and joins some of the pieces anew each
# time: a file of 12 MB that is made of small ones takes it minutes.
OPEN_SECONDS = 1.0
warnings.filterwarnings("ignore", module=r"PIL\.")  # of odd files, which are not ours to mend
NO_PILLOW = ("images need Pillow on the server: have its operator run pip install -r "
             "features/requirements.txt")


class MeteredFile(io.BytesIO):
    """A file in memory that may be read for OPEN_SECONDS of its thread's time. `read` raises
    ImageError when they are over."""

    def __init__(self, file: bytes):
        super().__init__(file)
        self.until = time.thread_time() + OPEN_SECONDS

    def read(self, *size: int) -> bytes:
        if time.thread_time() > self.until:
            raise ImageError("the image has too many pieces around its pixels")
        return super().read(*size)


@contextlib.contextmanager
def opened(file: io.BytesIO) -> Iterator["PIL.Image.Image"]:
    """An image of which Pillow has read what stands before the pixels. What it raises within this
    becomes an ImageError; so does Pillow where it is missing."""
    try:
        import PIL.Image
    except ImportError:
        raise ImageError(NO_PILLOW) from None
    PIL.Image.MAX_IMAGE_PIXELS = None  # its own limit, above which it warns; ours is in `inspect`
    try:
        with PIL.Image.open(file, formats=KINDS) as image:
            yield image
    except ImageError:
        raise
    except PIL.UnidentifiedImageError:
        raise ImageError("the image is no JPEG, PNG, WebP or GIF file, or is damaged or cut off "
                         f"near its start, which is {file.getvalue()[:8]!r}") from None
    except Exception as error:  # a decoder of other people's files: it can raise anything
        raise ImageError("the image is damaged or cut off: "
                         f"{server.describe(str(error))}") from None


def inspect(file: bytes) -> None:
    """Refuse what is no image, or would take too long or too much memory to decode. Raises
    ImageError. It takes milliseconds; no pixel is unpacked."""
    with opened(MeteredFile(file)) as image:
        width, height, n_pixels = image.width, image.height, image.width * image.height
        if not 0 < n_pixels <= MAX_PIXELS:
            raise ImageError(f"the image has {width} x {height} pixels; the limit is {MAX_PIXELS} "
                             "in all")
        n_scans = file.count(SCAN_START) if image.format in ("JPEG", "MPO") else 0
        if n_scans * (n_pixels + SCAN_PIXELS) > MAX_SCANS * MAX_PIXELS:
            raise ImageError(f"the image has too many scans ({n_scans})")
        image.verify()  # checksums of a PNG, up to its end: decoding may not go there


def decode(file: bytes) -> np.ndarray:
    """The pixels of a file that `inspect` let through, upright, on white, of an animation the first
    picture: RGB, uint8 of shape (height, width, 3). Raises ImageError."""
    with opened(io.BytesIO(file)) as image:
        from PIL import ImageOps

        image.load()
        with contextlib.suppress(Exception):  # an EXIF block that is damaged turns nothing
            ImageOps.exif_transpose(image, in_place=True)
        return np.asarray(_on_white(image))


def _on_white(image: "PIL.Image.Image") -> "PIL.Image.Image":
    """A loaded image of any mode as RGB."""
    import PIL.Image

    if image.mode.startswith("I"):  # 16 bits of grey, which Pillow itself would cut off at 255
        image = PIL.Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if not image.has_transparency_data:
        return image if image.mode == "RGB" else image.convert("RGB")
    image = image.convert("RGBA")
    white = PIL.Image.new("RGB", image.size, "white")
    white.paste(image, mask=image)
    return white


# ==== 2. Encode: pixels into Pieces =====================================================

N_ID_WORDS = 8  # of 31 bits each, of the SHA-256 of an image
Pieces = list[np.ndarray | engine.Piece]  # and token ids that the model wants around them


class Projector:
    """Turns image files into Pieces, by llama.cpp's mtmd. Safe to use from any thread."""

    CACHE_BYTES = 2**27  # of rows: the images of the last conversations

    def __init__(self, model: engine.Model, path: Path, n_threads: int):
        """model: the one that will read the rows. path: the mmproj. n_threads: for encoding.
        Raises engine.ModelError."""
        mtmd.mtmd_helper_log_set(engine.on_native_log, ctypes.c_void_p(None))
        params = mtmd.mtmd_context_params_default()
        params.use_gpu, params.print_timings, params.warmup = model.on_gpu, False, False
        # As many as the engine has, beside which they run: with half of them streams pause for half
        # a second at a time, because one of the engine's threads waits for the others.
        params.n_threads = n_threads
        engine.native_errors.clear()
        self._mtmd = mtmd.mtmd_init_from_file(os.fsencode(path), model.pointer, params)
        if not self._mtmd:
            reason = engine.native_errors[0] if engine.native_errors else \
                "is it for another model?"
            raise engine.BrokenModel(f"cannot load the mmproj {path}: {reason}")
        if not mtmd.mtmd_support_vision(self._mtmd):
            mtmd.mtmd_free(self._mtmd)
            raise engine.ModelError(f"the mmproj {path} is not for images")
        self._n_embd = lib.llama_model_n_embd_inp(model.pointer)
        self._marker = mtmd.mtmd_default_marker()
        self._lock = threading.Lock()  # held for one image, from its file to its rows
        self._cache: dict[bytes, Pieces] = {}  # by SHA-256, oldest use first
        self._cached_bytes = 0

    def close(self) -> None:
        """Free it. No Piece of it may be decoded afterwards."""
        self._cache.clear()
        mtmd.mtmd_free(self._mtmd)

    def read(self, file: bytes) -> Pieces:
        """What an image file, inspected, is in a prompt. Raises ImageError."""
        digest = hashlib.sha256(file).digest()
        with self._lock:
            pieces = self._cache.pop(digest, None)
            if pieces is None:
                pieces = self._encode(decode(file), digest)
                self._cached_bytes += row_bytes(pieces)
            self._cache[digest] = pieces
            while self._cached_bytes > self.CACHE_BYTES and len(self._cache) > 1:
                oldest = self._cache.pop(next(iter(self._cache)))
                self._cached_bytes -= row_bytes(oldest)
        return pieces

    def _encode(self, pixels: np.ndarray, digest: bytes) -> Pieces:
        """pixels: what `decode` gives."""
        height, width, _ = pixels.shape
        pixels = np.ascontiguousarray(pixels)
        with contextlib.ExitStack() as stack:
            bitmap = mtmd.mtmd_bitmap_init(  # which copies them
                width, height, pixels.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8)))
            stack.callback(mtmd.mtmd_bitmap_free, bitmap)
            chunks = mtmd.mtmd_input_chunks_init()
            stack.callback(mtmd.mtmd_input_chunks_free, chunks)
            text = mtmd.mtmd_input_text(self._marker, len(self._marker), False, True)
            code = mtmd.mtmd_tokenize(self._mtmd, chunks, ctypes.byref(text),
                                      (mtmd.mtmd_bitmap_p_ctypes * 1)(bitmap), 1)
            if code != 0:
                raise ImageError(f"the model cannot read the image (mtmd_tokenize: {code})")
            return [self._piece(mtmd.mtmd_input_chunks_get(chunks, i), digest + bytes([i % 256]))
                    for i in range(mtmd.mtmd_input_chunks_size(chunks))]

    def _piece(self, chunk, digest: bytes) -> np.ndarray | engine.Piece:
        """One of mtmd's chunks."""
        n_tokens = mtmd.mtmd_input_chunk_get_n_tokens(chunk)
        if mtmd.mtmd_input_chunk_get_type(chunk) == mtmd.MTMD_INPUT_CHUNK_TYPE_TEXT:
            tokens = mtmd.mtmd_input_chunk_get_tokens_text(chunk, ctypes.byref(ctypes.c_size_t()))
            return np.ctypeslib.as_array(tokens, (n_tokens,)).astype(np.int32)
        if mtmd.mtmd_encode_chunk(self._mtmd, chunk) != 0:
            raise ImageError("the model cannot encode the image")
        rows = np.ctypeslib.as_array(mtmd.mtmd_get_output_embd(self._mtmd),
                                     (n_tokens, self._n_embd)).copy()
        if not np.isfinite(rows).all():
            raise ImageError("the model makes no numbers of the image: its mmproj may be damaged")
        words = np.frombuffer(hashlib.sha256(digest).digest(), ">u4").astype(np.int64) % 2**31
        positions = np.arange(mtmd.mtmd_input_chunk_get_n_pos(chunk))
        ids = (-1 - words[positions % N_ID_WORDS]).astype(np.int32)
        sees_ahead = mtmd.mtmd_decode_use_non_causal(self._mtmd, chunk)
        if not (sees_ahead or mtmd.mtmd_decode_use_mrope(self._mtmd)):
            return engine.Piece(ids, rows)
        native = mtmd.mtmd_input_chunk_copy(chunk)

        def decode_whole(context, position: int, seq_id: int, n_batch: int) -> int:
            return mtmd.mtmd_helper_decode_image_chunk(
                self._mtmd, context, native, rows.ctypes.data_as(ctypes.POINTER(ctypes.c_float)),
                position, seq_id, n_batch, ctypes.byref(lib.llama_pos()),
                mtmd.mtmd_helper_post_decode_callback(), ctypes.c_void_p(None))

        piece = engine.Piece(ids, rows, decode_whole, sees_ahead)
        weakref.finalize(piece, mtmd.mtmd_input_chunk_free, native)
        return piece


def row_bytes(pieces: Pieces) -> int:
    """The memory that the rows of images take."""
    return sum(piece.rows.nbytes for piece in pieces if isinstance(piece, engine.Piece))


# By the engine whose model reads their rows; each is set before handlers have that engine.
projectors: weakref.WeakKeyDictionary[engine.Engine, Projector] = weakref.WeakKeyDictionary()


def equip(loaded: engine.Engine, settings: server.Config) -> None:
    """Give a model its projector, if there is an mmproj for it. Raises engine.ModelError."""
    if not (mmproj := mmproj_of(settings.mmproj, loaded.model.path)):
        return
    path = find_file(settings.house, mmproj, loaded.model.path.parent, "mmproj")
    projector = Projector(loaded.model, path, loaded.context.n_threads)
    loaded.model.parts.callback(projector.close)
    projectors[loaded] = projector
    loaded.capabilities.append("vision")


def mmproj_of(setting: str | None, path: str | Path | None) -> str | None:
    """With what a model sees: what the settings say, or else NAME.mmproj.gguf or mmproj-NAME.gguf
    beside its file NAME.gguf."""
    if setting or not path:
        return setting
    file = Path(os.path.expanduser(path))
    beside = [file.with_name(f"{file.stem}.mmproj.gguf"), file.with_name(f"mmproj-{file.name}")]
    return next((str(each) for each in beside if each.is_file()), None)


def files_of(model: "server.LocalModel") -> dict[str, str | None]:
    """The file with which a model sees, which may come and go beside its own."""
    return {"mmproj": mmproj_of(model.settings.mmproj, model.path)}


def sees(target) -> bool:
    """Whether a name stands for a model of this machine that reads images."""
    if not isinstance(target, server.LocalModel):
        return False
    if loaded := target.engine:  # files beside it may have come or gone since
        return loaded in projectors
    return bool(mmproj_of(target.settings.mmproj, target.path))


# ==== 3. Request: the images of a chat ==================================================


@dataclasses.dataclass
class Settings:
    """How models see, and where images come from."""

    mmproj: str | None = server.setting("model", None, path="file")
    allow_image_urls: bool = server.setting("server", False)


@dataclasses.dataclass
class ImageUrl:
    """Where an image is: a data: URI, or an address on the web."""

    url: str
    detail: Literal["auto", "low", "high"] | None = server.option(no_effect=True)


@dataclasses.dataclass
class PartFields:
    """An image in a message."""

    type: Literal["text", "refusal", "image_url"]
    image_url: ImageUrl | None = None

    file = b""  # what is there, which `receive` gets; `text` is then a mark in its place

    def check(self, at: str) -> None:
        """Refuse an image without an address, and the other way round."""
        if (self.type == "image_url") != (self.image_url is not None):
            raise server.invalid(f"{at}.image_url", f"{at}: the type image_url and a field "
                                 'image_url, like {"url": "data:image/png;base64,..."}, belong '
                                 "together", "missing_field")


@dataclasses.dataclass
class MessageFields:
    """Who may send images."""

    def check(self, at: str) -> None:
        """Refuse images that are not a user's."""
        for i, part in enumerate(self.content if isinstance(self.content, list) else ()):
            if part.image_url and self.role != "user":
                raise server.invalid(f"{at}.content[{i}]", f"{at}.content[{i}]: a {self.role} "
                                     "message cannot have images; a user message can")


FIELDS = {"Part": PartFields, "Message": MessageFields}


def image_parts(chat: server.ChatBody) -> Iterator[tuple[str, PartFields]]:
    """The parts that are images, and where they are."""
    for i, message in enumerate(chat.messages):
        for j, part in enumerate(message.content if isinstance(message.content, list) else ()):
            if part.image_url:
                yield f"messages[{i}].content[{j}]", part


def receive(handler: server.Handler, body, target) -> None:
    """Get the files of all images of a chat, inspected, before the model must be there. Raises
    ApiError."""
    images = [*image_parts(body)] if isinstance(body, server.ChatBody) else []
    if images and not sees(target):
        at = images[0][0]
        raise server.invalid(at, f"{at}: {target.name} reads no images; ask a vision model (one "
                                 "with an mmproj)", "unsupported_image")
    until, room = time.monotonic() + IMAGE_SECONDS, MAX_IMAGES_MB * 2**20
    for at, part in images:
        url = part.image_url.url
        with errors_at(at):
            if url[:5].lower() == "data:":
                part.file = read_data_uri(url)
            elif handler.server.config.allow_image_urls:
                part.file = fetch_image(url, until, room, handler.check_connection)
                room -= len(part.file)
            else:
                raise ImageError(f"{server.describe(url)} was sent; send a data: URI (or have "
                                 "the server set allow_image_urls)")
            inspect(part.file)
        part.text = f"<image {secrets.token_hex(16)}>"  # a mark that nobody else can write


def join(wanted: server.Generation) -> None:
    """Encode the images of a chat, for the marks in their places."""
    if not isinstance(wanted, server.Chat):
        return
    handler, marked, n_tokens = wanted.handler, {}, 0
    for at, part in image_parts(wanted.body):
        handler.check_connection()
        marked[part.text] = pieces = encode(wanted.loaded, part.file, at)
        n_tokens += sum(len(getattr(piece, "rows", piece)) for piece in pieces)
        handler.check_length(n_tokens, at, 1)
    if marked:
        wanted.read = functools.partial(read, wanted, marked)
        marks.hide(wanted, re.compile("|".join(marked)), "<image>")


def read(chat: server.Chat, marked: dict[str, Pieces]) -> list[np.ndarray]:
    """As Chat.read; the engine is told of the images. Raises ApiError."""
    prompt = chat.prompt = chat.render()
    if any(prompt.count(mark) != 1 for mark in marked):
        raise server.invalid("messages", "messages: the model's chat template does not write each "
                                         "image once", "template_error")
    parts = re.split(f"({'|'.join(map(re.escape, marked))})", prompt)
    chat.handler.check_fewest("".join(part for part in parts if part not in marked), "messages", 1)
    tokens, pieces = tokenize(chat, [marked.get(part, part) for part in parts])
    chat.handler.check_length(len(tokens) + engine.extra_tokens(pieces), "messages", 1)
    if tokens[-1] < 0:
        raise server.invalid("messages", "messages: the prompt ends with an image; add text")
    chat.more["images"] = pieces
    return [tokens]


def tokenize(chat: server.Chat, parts: list[str | Pieces]
             ) -> tuple[np.ndarray, dict[int, engine.Piece]]:
    """The token ids of texts and images, one after the other, and the Pieces by their places."""
    pieces = [piece for index, part in enumerate(parts) for piece in (
        [chat.tokenize(part, bos=index == 0)] if isinstance(part, str) else part)]
    ids = [piece.ids if isinstance(piece, engine.Piece) else piece for piece in pieces]
    starts = itertools.accumulate(map(len, ids), initial=0)
    return np.concatenate(ids), {start: piece for start, piece in zip(starts, pieces)
                                 if isinstance(piece, engine.Piece)}


def encode(loaded: engine.Engine, file: bytes, at: str) -> Pieces:
    """An image file, inspected, as the model reads it. at: its place in the request. Raises
    ApiError."""
    if loaded not in projectors:
        raise server.invalid(at, f"{at}: the model that is loaded reads no images; send text alone")
    with errors_at(at):
        pieces = projectors[loaded].read(file)
    n_batch = loaded.context.n_batch
    for piece in pieces:
        if isinstance(piece, engine.Piece) and piece.sees_ahead and len(piece.rows) > n_batch:
            raise server.invalid(at, f"{at}: this model must read the {len(piece.rows)} tokens of "
                                     f"an image at once, but n_batch is {n_batch}; raise n_batch "
                                     "and n_ubatch")
    return pieces


@contextlib.contextmanager
def errors_at(at: str) -> Iterator[None]:
    """Make an ImageError within this a 400 that names the place."""
    try:
        yield
    except ImageError as error:
        raise server.invalid(at, f"{at}: {error}", "invalid_image") from None
