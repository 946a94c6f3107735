"""Makes tests/tiny-vision.mmproj.gguf, with which SmolLM2-135M-Instruct sees.

    python tests/make_vision_model.py  # needs models/SmolLM2-135M-Instruct.Q4_1.gguf, numpy, gguf

The pictures show one shape in one colour on grey. The model is a little vision transformer with
llava's `mlp` projector. It never meets SmolLM2 in training: it learns by regression that its 16
output tokens, one per patch, are SmolLM2's own embeddings of the 16 tokens of CAPTION, filled in
for the picture. So SmolLM2 reads the caption where the picture stands in the prompt.

The gradients are written out by hand; numpy is all it takes.
"""

import argparse
import re
import time
from pathlib import Path

import gguf
import numpy as np

HERE = Path(__file__).resolve().parent
BASE = HERE.parent / "models" / "SmolLM2-135M-Instruct.Q4_1.gguf"
PRODUCT = HERE / "tiny-vision.mmproj.gguf"
SEED = 1  # of the training; the test draws its pictures with other ones

CAPTION = "This picture shows a {color} {shape}. The color of the {shape} is {color}.\n"
COLORS = {"red": (215, 30, 30), "green": (25, 150, 40), "blue": (30, 50, 215),
          "yellow": (240, 220, 30), "purple": (130, 30, 150), "black": (12, 12, 12),
          "white": (245, 245, 245)}
SHAPES = ("circle", "square", "triangle")

SIZE, PATCH = 48, 12  # pixels: 4 x 4 patches, for the caption's 16 tokens
WIDTH, HEADS, LAYERS, HIDDEN, PROJECTOR = 96, 3, 3, 192, 192
EPS = 1e-5


# ==== Pictures ==========================================================================


def pictures(rng: np.random.Generator, colors: np.ndarray, shapes: np.ndarray) -> np.ndarray:
    """One picture for each index of a colour and of a shape: uint8, [n, SIZE, SIZE, 3]."""
    def draw(low, high, *shape):
        return rng.uniform(low, high, (len(colors), *(shape or (1, 1)))).astype(np.float32)

    radius, turn = draw(0.18, 0.42) * SIZE, draw(-0.3, 0.3)
    room = SIZE / 2 - radius
    y, x = np.mgrid[:SIZE, :SIZE].astype(np.float32)[:, None] - (SIZE - 1) / 2
    y, x = y - room * draw(-1, 1), x - room * draw(-1, 1)
    u, v = x * np.cos(turn) + y * np.sin(turn), y * np.cos(turn) - x * np.sin(turn)
    circle = np.hypot(u, v) * 1.1
    square = np.maximum(abs(u), abs(v)) * 1.25
    triangle = np.maximum(v, 0.866 * abs(u) - 0.5 * v) * 1.7 + 0.15 * radius
    kind = shapes[:, None, None]
    distance = np.where(kind == 0, circle, np.where(kind == 1, square, triangle))
    sharpness = draw(0.5, 3)  # of the edges
    mask = np.clip((radius - distance) * sharpness + 0.5, 0, 1)[..., None]
    ink = np.array(list(COLORS.values()), np.float32)[colors] + draw(-22, 22, 3)
    paper = draw(75, 185, 1) + draw(-6, 6, 3)
    image = mask * ink[:, None, None] + (1 - mask) * paper[:, None, None]
    noise = rng.standard_normal(image.shape, np.float32) * draw(0, 10, 1, 1, 1)
    return np.clip(image + noise, 0, 255).round().astype(np.uint8)


def patches_of(images: np.ndarray) -> np.ndarray:
    """As clip.cpp sees them: normalised, [n, patch, channel * row * column]."""
    side = SIZE // PATCH
    scaled = images.astype(np.float32) / 127.5 - 1  # image_mean and image_std are 0.5
    grid = scaled.reshape(-1, side, PATCH, side, PATCH, 3).transpose(0, 1, 3, 5, 2, 4)
    return np.ascontiguousarray(grid).reshape(len(images), side * side, -1)


def caption_embeddings(base: Path) -> np.ndarray:
    """SmolLM2's embeddings of each caption: [colour, shape, token, n_embd]."""
    reader = gguf.GGUFReader(base)
    vocab = {token: i for i, token in
             enumerate(reader.get_field("tokenizer.ggml.tokens").contents())}
    table = next(t for t in reader.tensors if t.name == "token_embd.weight")

    def embed(color: str, shape: str) -> np.ndarray:
        words = re.findall(r" ?\w+|\W", CAPTION.format(color=color, shape=shape))
        rows = [vocab[word.replace(" ", "Ġ").replace("\n", "Ċ")] for word in words]
        return gguf.quants.dequantize(table.data[rows], table.tensor_type)

    return np.stack([[embed(color, shape) for shape in SHAPES] for color in COLORS])


# ==== The model: each part returns its output and the way back ==========================


class Vit:
    def __init__(self, rng: np.random.Generator, n_tokens: int, n_embd: int):
        self.weights: dict[str, np.ndarray] = {}
        self.gradients: dict[str, np.ndarray] = {}

        def layer(name: str, n_in: int, n_out: int, scale: float = 1.0):
            self.weights[name + ".weight"] = rng.normal(0, scale / n_in**0.5, (n_out, n_in))
            self.weights[name + ".bias"] = np.zeros(n_out)

        def norm(name: str):
            self.weights[name + ".weight"] = np.ones(WIDTH)
            self.weights[name + ".bias"] = np.zeros(WIDTH)

        layer("v.patch_embd", 3 * PATCH * PATCH, WIDTH)
        self.weights["v.position_embd.weight"] = rng.normal(0, 0.3, (n_tokens, WIDTH))
        for i in range(LAYERS):
            for name in ("attn_q", "attn_k", "attn_v"):
                layer(f"v.blk.{i}.{name}", WIDTH, WIDTH)
            layer(f"v.blk.{i}.attn_out", WIDTH, WIDTH, 0.4)
            layer(f"v.blk.{i}.ffn_up", WIDTH, HIDDEN)
            layer(f"v.blk.{i}.ffn_down", HIDDEN, WIDTH, 0.4)
            norm(f"v.blk.{i}.ln1")
            norm(f"v.blk.{i}.ln2")
        norm("v.post_ln")
        layer("mm.0", WIDTH, PROJECTOR)
        layer("mm.2", PROJECTOR, n_embd)
        self.weights = {name: w.astype(np.float32) for name, w in self.weights.items()}

    def linear(self, name: str, x: np.ndarray):
        weight = self.weights[name + ".weight"]

        def back(dy):
            flat = dy.reshape(-1, dy.shape[-1])
            self.gradients[name + ".weight"] = flat.T @ x.reshape(-1, x.shape[-1])
            self.gradients[name + ".bias"] = flat.sum(0)
            return dy @ weight
        return x @ weight.T + self.weights[name + ".bias"], back

    def norm(self, name: str, x: np.ndarray):
        weight = self.weights[name + ".weight"]
        centred = x - x.mean(-1, keepdims=True)
        spread = np.sqrt((centred * centred).mean(-1, keepdims=True) + EPS)
        unit = centred / spread

        def back(dy):
            self.gradients[name + ".weight"] = (dy * unit).sum((0, 1))
            self.gradients[name + ".bias"] = dy.sum((0, 1))
            dy = dy * weight
            along = unit * (dy * unit).mean(-1, keepdims=True)
            return (dy - dy.mean(-1, keepdims=True) - along) / spread
        return unit * weight + self.weights[name + ".bias"], back

    def gelu(self, x: np.ndarray):
        t = np.tanh(0.7978846 * x * (1 + 0.044715 * x * x))

        def back(dy):
            slope = 0.7978846 * (1 + 3 * 0.044715 * x * x) * (1 - t * t)
            return dy * 0.5 * (1 + t + x * slope)
        return 0.5 * x * (1 + t), back

    def attention(self, name: str, x: np.ndarray):
        def split(y):  # into heads
            return y.reshape(*y.shape[:2], HEADS, -1).swapaxes(1, 2)

        def join(y):
            return y.swapaxes(1, 2).reshape(x.shape)

        (q, q_back), (k, k_back), (v, v_back) = (
            self.linear(name + part, x) for part in ("_q", "_k", "_v"))
        q, k, v = split(q), split(k), split(v)
        scale = np.float32((WIDTH / HEADS) ** -0.5)
        scores = q @ k.swapaxes(2, 3) * scale
        p = np.exp(scores - scores.max(-1, keepdims=True))
        p /= p.sum(-1, keepdims=True)
        out, out_back = self.linear(name + "_out", join(p @ v))

        def back(dy):
            dy = split(out_back(dy))
            dp = dy @ v.swapaxes(2, 3)
            ds = p * (dp - (dp * p).sum(-1, keepdims=True)) * scale
            return (q_back(join(ds @ k)) + k_back(join(ds.swapaxes(2, 3) @ q))
                    + v_back(join(p.swapaxes(2, 3) @ dy)))
        return out, back

    def forward(self, patches: np.ndarray):
        x, patch_back = self.linear("v.patch_embd", patches)
        x = x + self.weights["v.position_embd.weight"]
        steps = []  # (is_residual, ways back), in order
        for i in range(LAYERS):
            y, norm_back = self.norm(f"v.blk.{i}.ln1", x)
            y, attention_back = self.attention(f"v.blk.{i}.attn", y)
            x = x + y
            y, norm2_back = self.norm(f"v.blk.{i}.ln2", x)
            y, up_back = self.linear(f"v.blk.{i}.ffn_up", y)
            y, gelu_back = self.gelu(y)
            y, down_back = self.linear(f"v.blk.{i}.ffn_down", y)
            x = x + y
            steps += [(norm_back, attention_back), (norm2_back, up_back, gelu_back, down_back)]
        x, post_back = self.norm("v.post_ln", x)
        x, in_back = self.linear("mm.0", x)
        x, gelu_back = self.gelu(x)
        x, out_back = self.linear("mm.2", x)
        head = (post_back, in_back, gelu_back, out_back)

        def back(dy):
            for way in reversed(head):
                dy = way(dy)
            for ways in reversed(steps):  # the residual parts
                inner = dy
                for way in reversed(ways):
                    inner = way(inner)
                dy = dy + inner
            self.gradients["v.position_embd.weight"] = dy.sum(0)
            patch_back(dy)
        return x, back


def train(vit: Vit, captions: np.ndarray, rng: np.random.Generator, n_steps: int, batch: int):
    """Adam; `captions` have unit variance."""
    first = {name: np.zeros_like(w) for name, w in vit.weights.items()}
    second = {name: np.zeros_like(w) for name, w in vit.weights.items()}
    started, mean_loss = time.monotonic(), 1.0
    for step in range(1, n_steps + 1):
        colors = rng.integers(len(COLORS), size=batch)
        shapes = rng.integers(len(SHAPES), size=batch)
        out, back = vit.forward(patches_of(pictures(rng, colors, shapes)))
        error = out - captions[colors, shapes]
        back(error * np.float32(2 / error.size * 100))  # Adam does not see the 100
        rate = 2e-3 * min(1, step / 100) * 0.5 * (1 + np.cos(np.pi * step / n_steps)) + 1e-6
        for name, g in vit.gradients.items():
            first[name] += 0.1 * (g - first[name])
            second[name] += 0.01 * (g * g - second[name])
            unbiased = np.sqrt(second[name] / (1 - 0.99**step)) + 1e-8
            vit.weights[name] -= rate / (1 - 0.9**step) * first[name] / unbiased
        mean_loss += 0.02 * ((error * error).mean() - mean_loss)
        if step % 100 == 0:
            print(f"step {step}: loss {mean_loss:.4f}, {time.monotonic() - started:.0f} s",
                  flush=True)


def save(vit: Vit, file: Path, n_embd: int):
    writer = gguf.GGUFWriter(file, "clip")
    writer.add_name("Tiny vision for SmolLM2-135M-Instruct")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    writer.add_bool("clip.has_vision_encoder", True)
    writer.add_string("clip.projector_type", "mlp")
    writer.add_bool("clip.use_gelu", True)
    for key, value in {"image_size": SIZE, "patch_size": PATCH, "embedding_length": WIDTH,
                       "feed_forward_length": HIDDEN, "projection_dim": n_embd,
                       "block_count": LAYERS, "attention.head_count": HEADS}.items():
        writer.add_uint32("clip.vision." + key, value)
    writer.add_float32("clip.vision.attention.layer_norm_epsilon", EPS)
    writer.add_array("clip.vision.image_mean", [0.5, 0.5, 0.5])
    writer.add_array("clip.vision.image_std", [0.5, 0.5, 0.5])
    # Without this, llava leaves out the last layer.
    writer.add_array("clip.vision.feature_layer", [LAYERS])
    for name, w in vit.weights.items():
        if name == "v.patch_embd.weight":
            w = w.reshape(WIDTH, 3, PATCH, PATCH)
        half = w.ndim > 1 and "position" not in name
        writer.add_tensor(name, w.astype(np.float16 if half else np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base", type=Path, default=BASE)
    parser.add_argument("--out", type=Path, default=PRODUCT)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--batch", type=int, default=64)
    args = parser.parse_args()
    rng = np.random.default_rng(SEED)
    captions = caption_embeddings(args.base)
    n_tokens, n_embd = captions.shape[2:]
    assert n_tokens == (SIZE // PATCH) ** 2
    unit = captions.std()
    vit = Vit(rng, n_tokens, n_embd)
    train(vit, captions / unit, rng, args.steps, args.batch)
    for part in ("mm.2.weight", "mm.2.bias"):
        vit.weights[part] *= unit
    save(vit, args.out, n_embd)
    print(f"{args.out}: {args.out.stat().st_size} bytes")


if __name__ == "__main__":
    main()
