"""Makes two models from SmolLM2-135M-Instruct, to test and measure speculative decoding.

    python tests/make_deep_model.py DIRECTORY  # ten seconds; needs numpy, gguf, 0.9 GB

deep.gguf (807 MB), the target: SmolLM2 with 100 more layers whose outputs are zero. Its logits
are SmolLM2's, bit for bit, but a row costs about six times as much; so SmolLM2, as its draft, is
always right. Rows must share work, or there is nothing to gain. SmolLM2's Q4_1 has no kernel for
that: 5 rows cost 3.5 times one. The added layers are F16: 5 rows of deep.gguf cost 1.8 times one,
and drafts of 4 tokens, all of them right, make it 1.9 to 2.0 times as fast on two cores (1.7 with
Q8_0 and 210 layers, 1.1 with Q4_0 and 120).

degraded.gguf (94 MB), a poor draft: SmolLM2 without two layers. Of 626 tokens that SmolLM2
chose greedily in 12 chats, it would have chosen 61 % too.
"""

import os
import sys
from pathlib import Path

import gguf
import numpy as np

ROOT = Path(__file__).resolve().parent.parent
LAYERS = 130  # of deep.gguf; SmolLM2 has 30
ADDED = gguf.GGMLQuantizationType.F16
OUTPUTS = ("attn_output.weight", "ffn_down.weight")  # what a layer adds to the residual stream
LEFT_OUT = (18, 22)  # by degraded.gguf


def make_deep(base: Path, target: Path, n_layers: int = LAYERS):
    """The base with `n_layers` layers: its own, then copies of them that add nothing."""
    if target.exists():
        return
    reader = gguf.GGUFReader(base)
    layers = layers_of(reader)
    idle = [{part: idle_tensor(part, *tensor) for part, tensor in layer.items()}
            for layer in layers[:n_layers - len(layers)]]
    added = [idle[i % len(idle)] for i in range(n_layers - len(layers))]
    write(reader, layers + added, target)


def make_degraded(base: Path, target: Path):
    """The base without the layers LEFT_OUT."""
    if target.exists():
        return
    reader = gguf.GGUFReader(base)
    write(reader, [layer for i, layer in enumerate(layers_of(reader)) if i not in LEFT_OUT], target)


def layers_of(reader: gguf.GGUFReader) -> list[dict]:
    """Each layer's tensors, as data and type, by their names within the layer."""
    layers = {}
    for tensor in reader.tensors:
        if tensor.name.startswith("blk."):
            _, i, part = tensor.name.split(".", 2)
            layers.setdefault(int(i), {})[part] = tensor.data, tensor.tensor_type
    return [layers[i] for i in sorted(layers)]


def idle_tensor(part: str, data: np.ndarray, kind: gguf.GGMLQuantizationType) -> tuple:
    """A tensor, as data and type, of a layer that computes as much as its model but adds 0."""
    if data.ndim == 1:
        return data, kind  # llama.cpp wants norms in F32
    weights = gguf.quants.dequantize(data, kind)
    if part in OUTPUTS:
        weights = np.zeros_like(weights)
    return gguf.quants.quantize(weights, ADDED), ADDED


def write(reader: gguf.GGUFReader, layers: list[dict], target: Path):
    """Write the model of the reader with these layers instead of its own."""
    architecture = reader.get_field("general.architecture").contents()
    scratch = target.with_name(f"{target.name}.{os.getpid()}.part")
    writer = gguf.GGUFWriter(scratch, architecture)  # which adds general.architecture
    for key, field in reader.fields.items():
        if not key.startswith("GGUF.") and key != "general.architecture":
            value = len(layers) if key == architecture + ".block_count" else field.contents()
            writer.add_key_value(key, value, field.types[0], field.types[-1])
    tensors = {tensor.name: (tensor.data, tensor.tensor_type) for tensor in reader.tensors
               if not tensor.name.startswith("blk.")}
    tensors |= {f"blk.{i}.{part}": tensor for i, layer in enumerate(layers)
                for part, tensor in layer.items()}
    for name, (data, kind) in tensors.items():
        writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    os.replace(scratch, target)


def main(directory: str):
    sys.path.insert(0, str(ROOT))
    from features import downloads  # here, so that tests import this file without llama.cpp
    base = Path(downloads.fetch(None, ROOT / "models"))
    Path(directory).mkdir(parents=True, exist_ok=True)
    make_deep(base, Path(directory, "deep.gguf"))
    make_degraded(base, Path(directory, "degraded.gguf"))


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: make_deep_model.py DIRECTORY")
    main(sys.argv[1])
