"""What is shown is run as it is shown: the curl lines and snippets of README.md and docs/, and
examples/api_client.py."""

import os
import re
import subprocess
import sys

import httpx
import numpy as np
import openai
import pytest

from conftest import DOCS, ROOT, blocks_of, house, serve
from make_vision_model import COLORS, PRODUCT, SHAPES, pictures, png

sys.path.insert(0, str(ROOT))

GREEN = list(COLORS).index("green")
# Beside the shells' own: what fails is the end, and an HTTP error is a failure.
SHELL = "set -euo pipefail\ncurl() { command curl --fail-with-body -sS \"$@\"; echo; }\n"


@pytest.fixture(scope="module")
def url():
    """A server whose default model sees."""
    with serve(MMPROJ=str(PRODUCT), TEMPERATURE="0", MAX_TOKENS="64") as address:
        yield address


@pytest.fixture
def picture(tmp_path):
    """A green circle or the like, picture.png."""
    image = pictures(np.random.default_rng(7), np.array([GREEN]), np.array([len(SHAPES) - 1]))[0]
    (tmp_path / "picture.png").write_bytes(png(image))
    return tmp_path / "picture.png"


@pytest.mark.slow
def test_every_curl_line_of_the_docs_works_and_every_route_has_one(url, picture):
    """In their order, in a shell, beside a picture.png. None stands outside of a block that is
    run."""
    shown = [block for block in blocks_of("sh") if "curl http://127.0.0.1:8080/" in block]
    n_printed = sum(len(re.findall(r"\bcurl +(?=-|.?http)", file.read_text())) for file in DOCS)
    assert n_printed == "".join(shown).count("curl http://127.0.0.1:8080/")
    script = SHELL + "".join(shown).replace("http://127.0.0.1:8080", url)
    done = subprocess.run(["bash", "-c", script], cwd=picture.parent, capture_output=True,
                          text=True, timeout=120)
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr
    assert done.stdout.count("green") >= 3, "the picture's color, three ways"
    seen = set(re.findall(r'route="(\S+ \S+)",status="200"', httpx.get(f"{url}/metrics").text))
    assert seen == {f"{method} {path}" for method, path in house().routes}


def run_snippet(word: str, url: str) -> str:
    """What the docs' Python block with this word prints."""
    blocks = blocks_of("python")
    code, = [block for block in blocks if word in block]
    code = code.replace("http://127.0.0.1:8080", url)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_readmes_openai_snippet_prints_an_answer(url):
    assert "rain" in run_snippet("from openai import", url).lower()


def test_a_client_made_for_lm_studio_finds_its_way(url):
    """It takes the first model of the list, sends a made-up key, and streams."""
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="lm-studio")
    first = client.models.list().data[0].id
    stream = client.chat.completions.create(model=first, stream=True, max_tokens=16, messages=[
        {"role": "system", "content": "Always answer in rhymes."},
        {"role": "user", "content": "Introduce yourself."}])
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream).strip()


@pytest.mark.slow
def test_the_example_client_shows_all_that_it_names(url, picture):
    """Each example prints its name, and something the server said."""
    command = [sys.executable, str(ROOT / "examples" / "api_client.py")]
    environ = {**os.environ, "OPENAI_BASE_URL": f"{url}/v1", "OPENAI_API_KEY": "unused"}
    names = ["completion", "stream", "chat", "tools", "app"]

    def run(*arguments):
        return subprocess.run([*command, *arguments], capture_output=True, text=True, timeout=120,
                              env=environ)
    done = run()
    assert done.returncode == 0, done.stderr
    shown = re.split(r"^== (\w+)\n", done.stdout, flags=re.M)[1:]
    assert shown[::2] == names and all(text.strip() for text in shown[1::2])
    assert "get_weather({" in shown[7] and "prompt tokens were cached" in shown[5]
    seen = run("image", "--file", str(picture))
    assert seen.returncode == 0 and "green" in seen.stdout
    failed = run("chat", "--model", "nobody")
    assert failed.returncode == 1 and "404" in failed.stderr
    assert run("dance").returncode == 2
