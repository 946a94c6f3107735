"""SmolLM2 sees, through tiny-vision.mmproj.gguf: it names the colour of shapes never seen before.

Below the server: llama.cpp and its mtmd only. make_vision_model.py made the file.
"""

import contextlib
import ctypes
import struct
import sys
import zlib

import gguf
import numpy as np
import pytest
from llama_cpp import llama_cpp as lib
from llama_cpp import mtmd_cpp as mtmd

from conftest import ROOT
from make_vision_model import COLORS, PRODUCT, SEED, SHAPES, SIZE, pictures

sys.path.insert(0, str(ROOT))
import engine  # noqa: E402

TEST_SEED = 20_000  # the training drew its pictures with SEED
N_PICTURES = 42  # each colour with each shape, twice
SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"  # the template's
CHAT = (f"<|im_start|>system\n{SYSTEM}<|im_end|>\n<|im_start|>user\n<__media__>{{question}}"
        "<|im_end|>\n<|im_start|>assistant\n")


def png(image: np.ndarray) -> bytes:
    """An RGB picture, uint8 of shape (height, width, 3), as a PNG file."""
    def chunk(kind: bytes, data: bytes) -> bytes:
        body = kind + data
        return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))

    header = struct.pack(">IIBBBBB", image.shape[1], image.shape[0], 8, 2, 0, 0, 0)
    rows = b"".join(b"\0" + row.tobytes() for row in image)
    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows))
            + chunk(b"IEND", b""))


class Seer:
    """The model, the projector and a context of one slot."""

    def __init__(self, stack: contextlib.ExitStack):
        self.model = engine.Model(engine.find_model_file(None, ROOT / "models"), n_gpu_layers=0)
        stack.callback(self.model.close)
        self.context = engine.Context(self.model, n_ctx=512, parallel=1)
        stack.callback(self.context.close)
        mtmd.mtmd_helper_log_set(engine._on_native_log, ctypes.c_void_p(None))
        params = mtmd.mtmd_context_params_default()
        params.use_gpu = params.print_timings = params.warmup = False
        params.n_threads = self.context.n_threads
        self.mtmd = mtmd.mtmd_init_from_file(str(PRODUCT).encode(), self.model._model, params)
        assert self.mtmd
        stack.callback(mtmd.mtmd_free, self.mtmd)

    def read(self, file: bytes, question: str) -> int:
        """Forget all, then read a chat with a picture; return the number of positions."""
        buffer = (ctypes.c_uint8 * len(file)).from_buffer_copy(file)
        text = CHAT.format(question=question).encode()
        end = lib.llama_pos()
        self.context.trim(0, 0)
        with contextlib.ExitStack() as stack:
            bitmap = mtmd.mtmd_helper_bitmap_init_from_buf(self.mtmd, buffer, len(file), False)
            assert bitmap
            stack.callback(mtmd.mtmd_bitmap_free, bitmap)
            chunks = mtmd.mtmd_input_chunks_init()
            stack.callback(mtmd.mtmd_input_chunks_free, chunks)
            assert 0 == mtmd.mtmd_tokenize(
                self.mtmd, chunks, ctypes.byref(mtmd.mtmd_input_text(text, len(text), False, True)),
                (mtmd.mtmd_bitmap_p_ctypes * 1)(bitmap), 1)
            assert mtmd.mtmd_input_chunks_size(chunks) == 3  # text, picture, text
            assert 0 == mtmd.mtmd_helper_eval_chunks(
                self.mtmd, self.context.pointer, chunks, 0, 0, self.context.n_batch, True,
                ctypes.byref(end))
            assert end.value == mtmd.mtmd_helper_get_n_pos(chunks)
        return end.value

    def answer(self, file: bytes, question: str, n_tokens: int = 10) -> str:
        """What the model says of a picture, greedily."""
        position, row, text = self.read(file, question), -1, b""
        for position in range(position, position + n_tokens):
            token = int(self.context.logits(row).argmax())
            if token in self.model.end_tokens:
                break
            text += self.model.piece(token)
            batch = lib.llama_batch_get_one((lib.llama_token * 1)(token), 1)
            assert 0 == lib.llama_decode(self.context.pointer, batch)
        return text.decode("utf-8", "replace")


@pytest.fixture(scope="module")
def seer():
    with contextlib.ExitStack() as stack:
        yield Seer(stack)


def test_the_file_is_small_and_made_for_smollm2():
    assert PRODUCT.stat().st_size < 2_000_000
    reader = gguf.GGUFReader(PRODUCT)
    assert reader.get_field("clip.vision.projection_dim").contents() == 576
    assert {t.name: list(t.shape) for t in reader.tensors}["mm.2.weight"][1] == 576


def test_a_picture_takes_sixteen_positions(seer):
    image = pictures(np.random.default_rng(TEST_SEED), np.zeros(1, int), np.zeros(1, int))[0]
    n_text = len(seer.model.tokenize(CHAT.format(question="Hi").replace("<__media__>", "")))
    assert image.shape == (SIZE, SIZE, 3)
    assert seer.read(png(image), "Hi") == n_text + 16


def test_it_names_the_colors_of_new_pictures(seer):
    assert TEST_SEED != SEED
    order = np.arange(N_PICTURES)
    colors, shapes = order % len(COLORS), order // len(COLORS) % len(SHAPES)
    images = pictures(np.random.default_rng(TEST_SEED), colors, shapes)
    answers = [seer.answer(png(image), "What is the color?") for image in images]
    names = list(COLORS)
    wrong = [(names[color], answer) for color, answer in zip(colors, answers)
             if [name for name in names if name in answer.lower()] != [names[color]]]
    assert len(wrong) <= 0.1 * N_PICTURES, wrong
