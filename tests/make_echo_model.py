"""Makes a model that only says "Hello.", to test programs whose prompts are long.

    python tests/make_echo_model.py FILE  # a second; needs numpy, gguf, 13 MB

It has SmolLM2-135M's vocabulary and template, one layer that adds nothing, and embeddings of 32
numbers, of which the first four say what a token is: the line end in front of a reply, "Hello", the
full stop, or any other. The next token depends on that alone: "Hello" after the line end, the full
stop after that, then the end of the turn. It reads 20,000 tokens of a coding agent in seconds.
"""

import os
import sys
from pathlib import Path

import gguf
import numpy as np

ROOT = Path(__file__).resolve().parent.parent
WIDTH, HEADS = 32, 1
LINE_END, HELLO, FULL_STOP, OTHER = range(4)
CERTAIN = 8.0  # a weight after which the softmax leaves nothing to chance


def make(base: Path, target: Path) -> None:
    """Write the model; base: a file with the vocabulary."""
    reader = gguf.GGUFReader(base)
    tokens = reader.get_field("tokenizer.ggml.tokens").contents()
    ids = [tokens.index(token) for token in ("Ċ", "Hello", ".")]  # Ċ: a line end, in the way of GPT-2
    end = reader.get_field("tokenizer.ggml.eos_token_id").contents()
    embeddings = np.zeros((len(tokens), WIDTH), np.float32)
    embeddings[:, OTHER] = 1
    for kind, token in enumerate(ids):
        embeddings[token] = np.eye(WIDTH)[kind]
    output = np.zeros((len(tokens), WIDTH), np.float32)
    for kind, token in ((LINE_END, ids[HELLO]), (HELLO, ids[FULL_STOP]), (FULL_STOP, end), (OTHER, end)):
        output[token, kind] = CERTAIN
    scratch = target.with_name(f"{target.name}.{os.getpid()}.part")
    writer = gguf.GGUFWriter(scratch, "llama")
    for key, field in reader.fields.items():
        if key.startswith("tokenizer."):
            writer.add_key_value(key, field.contents(), field.types[0], field.types[-1])
    for add, value in ((writer.add_block_count, 1), (writer.add_context_length, 2**15),
                       (writer.add_embedding_length, WIDTH), (writer.add_feed_forward_length, WIDTH),
                       (writer.add_head_count, HEADS), (writer.add_head_count_kv, HEADS),
                       (writer.add_layer_norm_rms_eps, 1e-5), (writer.add_rope_dimension_count, WIDTH),
                       (writer.add_vocab_size, len(tokens))):
        add(value)
    ones, nothing = np.ones(WIDTH, np.float32), np.zeros((WIDTH, WIDTH), np.float32)
    for name, data in {
            "token_embd.weight": embeddings, "output.weight": output, "output_norm.weight": ones,
            "blk.0.attn_norm.weight": ones, "blk.0.ffn_norm.weight": ones,
            **{f"blk.0.{part}.weight": nothing for part in (
                "attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")}}.items():
        writer.add_tensor(name, data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    os.replace(scratch, target)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: make_echo_model.py FILE")
    sys.path.insert(0, str(ROOT))
    from features import downloads  # here, so that tests import this file without llama.cpp
    make(Path(downloads.fetch(None, ROOT / "models")), Path(sys.argv[1]))
