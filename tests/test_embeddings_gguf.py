"""A dedicated embedding model: a tiny BERT with random weights, made here, so that nothing is
downloaded. It pools itself, is not causal, has no chat template and cannot generate.

    1  the engine    embeddings.embed on it
    2  the server    `server.py --model`, by HTTP
"""

import base64
import string
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import engine  # noqa: E402
from features import embeddings  # noqa: E402

WORDS = "the a cat dog sat on mat and rain sun is was in city of paris london good bad".split()
# In GGUF a word's first piece carries U+2581, and those that go on a word ("##s") are bare.
VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]",
              *["\u2581" + word for word in WORDS],
              *["\u2581" + char for char in string.ascii_lowercase + string.digits + ".,!?"
                if char != "a"],
              *string.ascii_lowercase, *string.digits, "s", "ing", "ed"]
VOCABULARY = list(dict.fromkeys(VOCABULARY))
N_CTX, N_EMBD, N_FF, N_HEAD, N_LAYER = 64, 32, 64, 4, 2
POOLING = {"mean": gguf.PoolingType.MEAN, "cls": gguf.PoolingType.CLS}


def write_bert(path: Path, pooling: gguf.PoolingType) -> Path:
    """Names as in gguf-py's constants; shapes as in llama.cpp's src/models/bert.cpp."""
    random = np.random.default_rng(7)
    writer = gguf.GGUFWriter(path, "bert")
    writer.add_name("tiny")
    writer.add_context_length(N_CTX)
    writer.add_embedding_length(N_EMBD)
    writer.add_feed_forward_length(N_FF)
    writer.add_block_count(N_LAYER)
    writer.add_head_count(N_HEAD)
    writer.add_layer_norm_eps(1e-12)
    writer.add_causal_attention(False)
    writer.add_pooling_type(pooling)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    writer.add_tokenizer_model("bert")
    writer.add_token_list(VOCABULARY)
    writer.add_token_type_count(2)
    control = [gguf.TokenType.UNKNOWN if token == "[UNK]" else gguf.TokenType.CONTROL
               if token[0] == "[" else gguf.TokenType.NORMAL for token in VOCABULARY]
    writer.add_token_types(control)
    for name in ("pad", "unk", "sep", "mask"):
        token = VOCABULARY.index(f"[{name.upper()}]")
        getattr(writer, f"add_{name}_token_id")(token)
    writer.add_bos_token_id(VOCABULARY.index("[CLS]"))
    writer.add_eos_token_id(VOCABULARY.index("[SEP]"))
    norms = ["token_embd_norm"]
    matrices = {"token_embd": (len(VOCABULARY), N_EMBD), "position_embd": (N_CTX, N_EMBD),
                "token_types": (2, N_EMBD)}
    for i in range(N_LAYER):
        matrices |= {f"blk.{i}.attn_{name}": (N_EMBD, N_EMBD) for name in ("q", "k", "v", "output")}
        matrices |= {f"blk.{i}.ffn_up": (N_FF, N_EMBD), f"blk.{i}.ffn_down": (N_EMBD, N_FF)}
        norms += [f"blk.{i}.attn_output_norm", f"blk.{i}.layer_output_norm"]
    for name, shape in matrices.items():
        weights = random.normal(0, 0.3, shape).astype(np.float32)
        writer.add_tensor(f"{name}.weight", weights)
        if name.startswith("blk"):
            writer.add_tensor(f"{name}.bias", np.zeros(shape[0], np.float32))
    for name in norms:
        writer.add_tensor(f"{name}.weight", np.ones(N_EMBD, np.float32))
        writer.add_tensor(f"{name}.bias", np.zeros(N_EMBD, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module", params=POOLING)
def path(request, tmp_path_factory):
    return write_bert(tmp_path_factory.mktemp("bert") / f"tiny-{request.param}.gguf",
                      POOLING[request.param])


TEXTS = ["the cat sat on the mat.", "a dog", "rain and sun in the city of london",
         "is paris good, bad? 42!", "x", *(f"the {word} was {word}ed" for word in WORDS)]


def cosines(one, other) -> np.ndarray:
    """Of vectors in pairs, which must have length 1."""
    one, other = np.asarray(one), np.asarray(other)
    for vectors in (one, other):
        assert np.linalg.norm(vectors, axis=1) == pytest.approx(1, abs=1e-4)
    return (one * other).sum(axis=1)


# ==== 1. The engine =======================================================================


@pytest.fixture(scope="module")
def loaded(path):
    loaded = engine.load_engine(path, n_ctx=N_CTX, parallel=2, n_gpu_layers=0, prefill_chunk=32,
                                max_queue=8)
    yield loaded
    loaded.close()
    loaded.model.close()


def test_the_engine_sees_what_kind_of_model_it_is(loaded):
    model = loaded.model
    assert (model.architecture, model.pools, model.generates) == ("bert", True, False)
    assert (model.n_embd, model.n_ctx_train, model.n_vocab) == (N_EMBD, N_CTX, len(VOCABULARY))


def test_texts_are_tokenized_as_the_model_was_trained(loaded):
    """BERT's texts begin with [CLS] and end with [SEP], each once."""
    tokens = [VOCABULARY[token] for token in loaded.model.tokenize("The dogs, rain!")]
    assert tokens == ["[CLS]", "\u2581the", "\u2581dog", "s", "\u2581,", "\u2581rain", "\u2581!",
                      "[SEP]"]


def test_a_text_has_the_same_vector_alone_and_among_others(loaded):
    tokens = [loaded.model.tokenize(text) for text in TEXTS]
    together = embeddings.embed(loaded, tokens, lambda: None)
    alone = np.concatenate([embeddings.embed(loaded, [each], lambda: None) for each in tokens])
    assert together.shape == (len(TEXTS), N_EMBD)
    assert cosines(together, alone).min() > 0.999
    assert cosines(together[:1], together[2:3]) < 0.99, "different texts differ"


# ==== 2. The server =======================================================================


@pytest.fixture(scope="module")
def http(path):
    """The server on this model. That it lives to the end, and exits 0, `serve` checks."""
    import conftest
    with conftest.serve(MODEL_PATH=str(path), N_CTX=str(N_CTX), MODEL_ALIASES="[]") as address:
        with conftest.checking_client(address) as client:
            yield client


def embed(http, **body) -> np.ndarray:
    response = http.post("/v1/embeddings", json=body)
    assert response.status_code == 200, response.text
    data = response.json()["data"]
    assert [entry["index"] for entry in data] == list(range(len(data)))
    return np.array([entry["embedding"] for entry in data])


def refused(http, route, **body) -> str:
    """400 with the error's message."""
    response = http.post(route, json=body)
    assert response.status_code == 400, response.text
    return response.json()["error"]["message"]


def test_embeddings_of_several_texts_equal_those_of_each(http):
    together = embed(http, input=TEXTS)
    alone = np.concatenate([embed(http, input=text) for text in TEXTS])
    assert together.shape == (len(TEXTS), N_EMBD)
    assert cosines(together, alone).min() > 0.999
    tokens = http.post("/tokenize", json={"content": TEXTS[0], "add_special": True}).json()["tokens"]
    assert cosines(embed(http, input=tokens), together[:1]).min() > 0.999
    assert cosines(embed(http, input=TEXTS[:1], dimensions=8), together[:1, :8] /
                   np.linalg.norm(together[0, :8])).min() > 0.999


def test_base64_holds_the_same_numbers(http):
    body = {"input": TEXTS[0], "encoding_format": "base64"}
    [entry] = http.post("/v1/embeddings", json=body).json()["data"]
    vector = np.frombuffer(base64.b64decode(entry["embedding"]), "<f4")
    assert vector == pytest.approx(embed(http, input=TEXTS[0])[0])


def test_a_text_that_fills_the_context_fits_and_a_longer_one_is_400(http):
    fills = " ".join(["cat"] * (N_CTX - 2))  # with [CLS] and [SEP]
    assert embed(http, input=[fills, "dog", fills]).shape == (3, N_EMBD)
    for text in (fills + " cat cat", "cat " * 5000, "x" * 100_000):
        message = refused(http, "/v1/embeddings", input=["dog", text])
        assert f"the context is {N_CTX} tokens" in message
    assert embed(http, input="dog").shape == (1, N_EMBD)


@pytest.mark.parametrize("route, body", [
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": "Hi"}]}),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": "Hi"}], "stream": True}),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": "Hi"}], "response_format": {
        "type": "json_object"}}),
    ("/v1/completions", {"prompt": "Hi"}), ("/v1/completions", {"prompt": "a", "suffix": "b"})])
def test_what_needs_a_generative_model_is_a_400_that_says_so(http, route, body):
    message = refused(http, route, **body)
    assert "embedding" in message or "fill" in message
    assert embed(http, input="dog").shape == (1, N_EMBD)


def test_the_models_entry_tells_what_it_can(http):
    [entry] = http.get("/v1/models").json()["data"]
    assert entry["meta"]["capabilities"] == ["embedding"]
    assert http.get("/health").status_code == 200


def test_text_and_tokens_go_both_ways(http):
    tokens = http.post("/tokenize", json={"content": "the dogs"}).json()["tokens"]
    text = http.post("/detokenize", json={"tokens": tokens}).json()["content"]
    assert "dogs" in text.replace("[CLS]", "").replace("[SEP]", "")
