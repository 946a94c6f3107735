"""The house: two files that are a complete small server, and features that plug in.

    1  shape     sizes, and which file imports which
    2  alone     the two files, copied into an empty folder, serve, and pass test_server.py
    3  on, off   features by name: what is said of one that is off, not there, broken, or claims twice
    4  each      the core with one feature at a time
    5  writing   the example of docs/features.md
"""

import ast
import logging
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
import yaml

import conftest
import engine
import server
from conftest import FEATURES, ROOT
from features import settings
from test_models import running_process

CORE = ("server.py", "engine.py")
ALL = [*CORE, *(f"features/{file.name}" for file in sorted((ROOT / "features").glob("*.py")))]
LIMITS = dict.fromkeys(CORE, 1500)  # lines at most, as are these, but for the columns
MAX_FEATURE, MAX_CLASS, MAX_FUNCTION, MAX_COLUMNS = 450, 400, 60, 100


# ==== 1. Shape ============================================================================


@pytest.mark.parametrize("name", ALL)
def test_no_file_class_or_function_is_too_long(name):
    text = (ROOT / name).read_text()
    tree = ast.parse(text)
    assert len(text.splitlines()) <= LIMITS.get(name, MAX_FEATURE)
    assert max(map(len, text.splitlines())) <= MAX_COLUMNS
    assert ast.get_docstring(tree)
    for node in ast.walk(tree):
        size = getattr(node, "end_lineno", 0) - getattr(node, "lineno", 0) + 1
        if isinstance(node, ast.ClassDef):
            assert size <= MAX_CLASS, f"class {node.name} has {size} lines"
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            assert size <= MAX_FUNCTION, f"{node.name} has {size} lines"


def imports_of(name: str) -> set[str]:
    """The modules of the project that a file imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse((ROOT / name).read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom) and node.module == "features":
            found |= {f"features.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module)
    return {each for each in found if each in ("server", "engine") or each.startswith("features")}


def test_arrows_run_one_way():
    """Features to server to engine, never back, and in no circle."""
    assert imports_of("engine.py") == set()
    assert imports_of("server.py") <= {"engine", "server"}  # at the end, it hands over to itself
    graph = {Path(name).stem: {each.rpartition(".")[2] for each in imports_of(name)}
             - {"server", "engine"} for name in ALL if name not in CORE}
    while graph:
        free = {name for name, needed in graph.items() if not needed & graph.keys()}
        assert free, f"a circle among {sorted(graph)}"
        graph = {name: needed for name, needed in graph.items() if name not in free}


@pytest.mark.parametrize("name", CORE)
def test_the_two_files_name_no_feature(name):
    """Neither in an import nor in a text: `features` itself is a word of theirs."""
    tree = ast.parse((ROOT / name).read_text())
    words = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)
             and isinstance(node.value, str) and " " not in node.value}
    words |= {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    # Words of their own, of templates and of the API's replies.
    allowed = {"models", "memory", "tokens", "tools", "drafts", "turns", "messages", "responses", "logprobs"}
    assert not words & set(FEATURES) - allowed


def test_python_server_py_loads_each_file_once():
    code = ("import runpy, sys; sys.argv = ['server.py', '--version']\n"
            "try: runpy.run_path('server.py', run_name='__main__')\n"
            "except SystemExit: pass\n"
            "import server; print(server.Config.__module__)")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "server", done.stderr


# ==== 2. Alone ============================================================================


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """A folder with the two files, their tests and the default model."""
    folder = tmp_path_factory.mktemp("alone")
    for name in (*CORE, "test_server.py"):
        shutil.copy(ROOT / name, folder)
    (folder / "models").mkdir()
    model = conftest.default_model()
    (folder / "models" / model.name).symlink_to(model)
    return folder


def test_the_two_files_pass_their_tests_alone(alone):
    done = subprocess.run([sys.executable, "-m", "pytest", "-q", "--no-header", "-p", "no:cacheprovider",
                           "test_server.py"], cwd=alone, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]


def test_the_two_files_serve_alone(alone):
    """Without config.yaml, too; what only a feature has is not there."""
    with running_process(alone / "server.py", "--port", "0", folder=str(alone)) as (_, url, _):
        asked = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 4}
        assert httpx.post(f"{url}/v1/chat/completions", json=asked, timeout=60).status_code == 200
        assert "twofile_slots 4\n" in (told := httpx.get(f"{url}/metrics").text)
        assert not re.search("draft|restored|model_loads", told)
        for path in ("/v1/embeddings", "/tokenize", "/chat"):
            assert httpx.post(url + path, json={}).status_code == 404
        reply = httpx.post(f"{url}/v1/chat/completions", json={**asked, "grammar": "x"}, timeout=60)
        assert reply.headers["x-ignored-fields"] == "grammar"


def test_alone_a_key_in_the_wrong_section_is_not_swallowed(tmp_path):
    """Least of all the list of features."""
    for name in CORE:
        shutil.copy(ROOT / name, tmp_path)
    for text, words in (("server: {features: [rates]}", "features does not belong in section server"),
                        ("model: {port: 5}", "port does not belong in section model"),
                        ("auth: {enabled: true}", "unknown key 'enabled'"), ("server: [5]", "unknown key 'server'")):
        (tmp_path / "config.yaml").write_text(text)
        done = subprocess.run([sys.executable, "server.py"], cwd=tmp_path, text=True, capture_output=True,
                              timeout=60)
        assert done.returncode == 2 and done.stderr == f"error: {tmp_path}/config.yaml: {words}\n"


def test_alone_and_without_a_model_it_says_what_to_set(tmp_path):
    """Nothing is fetched; a name of the hub means nothing."""
    for name in CORE:
        shutil.copy(ROOT / name, tmp_path)
    for flags, words in (([], f"no .gguf file in the folder {tmp_path}/models: set model_path"),
                         (["--model", "hf:o/r/f.gguf"], "model file not found: hf:o/r/f.gguf (set model_path to a GGUF file")):
        done = subprocess.run([sys.executable, "server.py", "--port", "0", *flags], cwd=tmp_path,
                              text=True, capture_output=True, timeout=60)
        assert done.returncode == 2 and done.stderr.startswith(f"error: {words}"), done.stderr


# ==== 3. On and off =======================================================================


def load(tmp_path, text: str):
    (tmp_path / "config.yaml").write_text(text)
    return server.load_config(["--config", str(tmp_path / "config.yaml")], {})


def test_a_field_of_a_feature_that_is_off_names_it():
    house = server.load_features(["structured", "reasoning"])
    for field, value, feature in (("tools", [{}], "tools"), ("prediction", {"type": "content"}, "predictions")):
        with pytest.raises(server.ApiError, match=f"{field}: needs the feature {feature}") as caught:
            server.read_object(house.type_of(server.ChatBody), {
                "messages": [{"role": "user", "content": "Hi"}], field: value}, "", server.Reading(house))
        assert caught.value.status == 400 and caught.value.param == field
    server.read_object(house.type_of(server.ChatBody), {  # what asks for nothing needs nothing
        "messages": [{"role": "user", "content": "Hi"}], "tools": [], "prediction": None},
        "", server.Reading(house))


def test_a_setting_of_a_feature_that_is_off_names_it(tmp_path):
    with pytest.raises(server.ConfigError, match="unknown key 'cache_ram_mib': it needs the feature memory"):
        load(tmp_path, "cache_ram_mib: 5")
    assert load(tmp_path, "features: [memory]\ncache_ram_mib: 5").cache_ram_mib == 5
    with pytest.raises(server.ConfigError, match=r"take it out, and likewise rate_limiting_enabled \(rates\), "
                       r"draft \(drafts\), mmproj \(vision\)$"):
        load(tmp_path, "cache_ram_mib: 5\nport: 0\nrate_limiting:\n  enabled: true\n"
             "model:\n  draft: null\n  mmproj: null")


def test_a_variable_of_a_feature_that_is_off_is_told(caplog):
    server.load_config(["--config", os.devnull], {"CACHE_RAM_MIB": "5"})
    assert "CACHE_RAM_MIB is ignored: it needs the feature memory" in caplog.text


def test_a_server_without_features_says_so(caplog):
    """A settings file of one's own that names none is easily written by mistake."""
    caplog.set_level(logging.INFO, "server")
    server.load_features([])
    assert "features: none is on" in caplog.text


def test_what_is_switched_on_for_another_feature_is_told(caplog):
    caplog.set_level(logging.INFO, "server")
    server.load_features(["tools", "reasoning"])
    assert "features: structured is on, too: tools needs it" in caplog.text
    assert "reasoning is on, too" not in caplog.text


def test_a_model_stays_itself_with_methods_in_front():
    """Not equal to another one of the same file, as dataclasses with new fields would be."""
    house = server.load_features(["downloads"])
    model = house.type_of(server.LocalModel)
    one, other = (model("x.gguf", house.Config(), house) for _ in range(2))
    assert isinstance(one, settings.FoundModel) and len({one, other}) == 2


def test_a_name_that_only_a_feature_could_fetch_is_no_path():
    with pytest.raises(engine.ModelError, match="hf:a/b/c.gguf .* is no path, and no feature"):
        settings.find_file(server.load_features([]), "hf:a/b/c.gguf", ROOT)


def test_a_field_of_a_feature_that_is_off_may_ask_for_nothing_only():
    """Null, empty, or what it would be anyway; false and 0 can ask for something."""
    house = server.load_features([])
    for cls, field, nothing, something in (
            (server.ChatBody, "parallel_tool_calls", None, False), (server.ChatBody, "cache_prompt", True, False),
            (server.CompletionBody, "logprobs", None, 0), (server.CompletionBody, "echo", False, True),
            (server.ChatBody, "typical_p", 1.0, 0), (server.ChatBody, "tools", [], [{}])):
        body = {"prompt": "Hi"} if cls is server.CompletionBody else {
            "messages": [{"role": "user", "content": "Hi"}]}
        server.read_object(cls, {**body, field: nothing}, "", server.Reading(house))
        with pytest.raises(server.ApiError, match=f"{field}: needs the feature"):
            server.read_object(cls, {**body, field: something}, "", server.Reading(house))


@pytest.mark.parametrize("text, words", [
    ("FIELDS = None", "FIELDS must be a dict"), ("ROUTES = []", "ROUTES must be a dict"),
    ("class A:\n    x: int = 0\nFIELDS = {'ChatBody': A}", "what it adds to ChatBody must be a dataclass"),
    ("import dataclasses\n@dataclasses.dataclass\nclass A:\n    x: int = 0\nFIELDS = {'ChatBodyy': A}",
     "extends ChatBodyy, which there is not"),
    ("import dataclasses\n@dataclasses.dataclass\nclass Settings:\n    x: int = 0",
     "the setting x must be a server.setting"),
    ("Settings = None", "what it adds to Config must be a dataclass"),
    ("ROUTES = {('GET', '/x'): print}", "must be a server.Route"),
    ("class A: pass\nMETHODS = {'ChatBody': A}", "METHODS must have classes for Handler, "),
    ("METHODS = {'Handler': 5}", "METHODS must have classes for Handler, "),
    ("def join(): pass", "join is called with 1 arguments: too many positional arguments"),
    ("def equip(loaded, settings, more): pass", "equip is called with 2 arguments: missing a required"),
    ("import sys; sys.exit(3)", "cannot be imported: SystemExit")])
def test_a_feature_that_exports_something_else_is_one_sentence(text, words, monkeypatch, tmp_path):
    folder = tmp_path / "features"
    folder.mkdir()
    name = f"odd{abs(hash(text))}"  # a module is imported once
    (folder / f"{name}.py").write_text(text)
    import features as package
    monkeypatch.setattr(package, "FOLDER", folder)
    monkeypatch.setattr(package, "__path__", [str(folder)])
    with pytest.raises(server.ConfigError, match=words) as caught:
        server.load_features([name])
    assert str(caught.value).startswith(f"features: {name}") and "\n" not in str(caught.value)


@pytest.mark.parametrize("text", [
    "FIELDS = dict(ChatBody=int)", "FIELDS = {'ChatBody': int.x, **{}, 3: f()}", "FIELDS = None",
    "class Settings:\n    a.b: int\n", "def", "\x00", b"\xff\xfe"])
def test_a_file_that_is_off_cannot_stop_the_start(text, monkeypatch, tmp_path):
    """It is read for the names of its fields, and nothing more."""
    folder = tmp_path / "features"
    shutil.copytree(ROOT / "features", folder)
    (folder / "odd.py").write_bytes(text if isinstance(text, bytes) else text.encode())
    (folder / "folder.py").mkdir()
    import features as package
    monkeypatch.setattr(package, "FOLDER", folder)
    house = server.load_features(["memory"])
    assert house.feature_of(server.ChatBody, "tools")[0] == "tools"


@pytest.mark.parametrize("features, words", [
    (["schemas"], "schemas is a part of other features"), (["ring"], "ring needs itself"),
    (["structurd"], '"structurd" is not in the folder features, but structured is'),
    (["nope"], '"nope" is not in the folder features, which has again, apps, broken, browsers, compat, '),
    (["ours"], "features.ours claims the field n_ctx of Config, which is there already"),
    (["../server"], "is not in the folder"), ([7], "is not in the folder"),
    (["broken"], "broken cannot be imported: SyntaxError"),
    (["raising"], "raising cannot be imported: ZeroDivisionError"),
    (["memory", "again"], "features.again claims the field cache_ram_mib of Config"),
    (["tokens", "tokens2"], "features.tokens2 claims the path POST /tokenize"),
    (["path"], "features.path claims the path GET /health")])
def test_a_feature_that_cannot_be_is_one_sentence(features, words, monkeypatch, tmp_path):
    folder = tmp_path / "features"
    shutil.copytree(ROOT / "features", folder)
    route = "import server\nROUTES = {('POST', '%s'): server.Route(print, '')}\n"
    (folder / "ours.py").write_text("import dataclasses, server\n@dataclasses.dataclass\nclass Settings:\n"
                                    "    n_ctx: bool = server.setting('generation', False)\n")
    (folder / "broken.py").write_text("def join(")
    (folder / "ring.py").write_text("NEEDS = ('rung',)\nROUTES = {}\n")
    (folder / "rung.py").write_text("NEEDS = ('ring',)\nROUTES = {}\n")
    (folder / "raising.py").write_text("1 / 0")
    (folder / "again.py").write_text((ROOT / "features" / "memory.py").read_text())
    (folder / "tokens2.py").write_text(route % "/tokenize")
    (folder / "path.py").write_text((route % "/health").replace("POST", "GET"))
    import features as package
    monkeypatch.setattr(package, "FOLDER", folder)
    monkeypatch.setattr(package, "__path__", [str(folder)])
    with pytest.raises(server.ConfigError, match=words) as caught:
        server.load_features(features)
    assert str(caught.value).startswith("features: ") and "\n" not in str(caught.value)


def test_config_yaml_shows_every_setting_with_its_default():
    """The file in the repository is the documentation."""
    shipped = yaml.safe_load((ROOT / "config.yaml").read_text())
    assert shipped.pop("features") == FEATURES
    defaults = conftest.config()
    for field in server.dataclasses.fields(defaults):
        section, name = field.metadata["section"], field.name
        if name == "features":
            continue
        default = getattr(defaults, name)
        where = shipped if name in shipped else shipped[section]
        shown = where.pop(name.replace(f"{section}_enabled", "enabled"))
        assert shown == (list(default) if isinstance(default, tuple) else default), name
    assert not any(shipped.values())


@pytest.mark.parametrize("change, param, words", [
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
     "messages[0].content[0].image_url.url", "required"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
     "messages[0].content[0].image_url", "belong together"),
    ({"messages": [{"role": "user", "content": [{"type": "input_audio"}]}]},
     "messages[0].content[0].type", "'image_url'"),
    ({"tools": [{"type": "function"}]}, "tools[0].function", "required"),
    ({"response_format": {"type": "yaml"}}, "response_format.type", "'json_schema'"),
    ({"store": True}, "store", "not stored; got true"),
])
def test_a_wrong_field_of_a_feature_is_refused_by_name(change, param, words):
    house = conftest.house()
    with pytest.raises(server.ApiError) as caught:
        server.read_object(house.type_of(server.ChatBody), {
            "messages": [{"role": "user", "content": "hi"}], **change}, "", server.Reading(house))
    assert caught.value.status == 400 and caught.value.param == param
    assert words in caught.value.message


# ==== 4. Each ==============================================================================


@pytest.mark.slow
@pytest.mark.parametrize("feature", FEATURES)
def test_the_core_runs_with_each_feature_alone(feature, tmp_path):
    """And what it needs. A chat is served; nothing is missing that only another has."""
    (tmp_path / "config.yaml").write_text(f"features: [{feature}]\nn_ctx: 256\nport: 0\n")
    started = [ROOT / "server.py", "--config", tmp_path / "config.yaml", "--model",
               conftest.default_model()]
    with running_process(*started) as (_, url, _):
        asked = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 4}
        reply = httpx.post(f"{url}/v1/chat/completions", json=asked, timeout=60)
        assert reply.status_code == 200 and reply.json()["choices"][0]["message"]["content"]
        assert httpx.post(f"{url}/v1/completions", json={"prompt": "Rain", "max_tokens": 2},
                          timeout=60).status_code == 200


# ==== 5. Writing one =======================================================================


def test_the_example_of_the_docs_plugs_in(alone, tmp_path):
    text = (ROOT / "docs" / "features.md").read_text()
    code = re.search(r"<!-- example -->\n```python\n(.*?)```", text, re.S)[1]
    folder = tmp_path / "with"
    shutil.copytree(alone, folder, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "features").mkdir()
    for name in ("__init__.py", "environment.py", "settings.py"):
        shutil.copy(ROOT / "features" / name, folder / "features")
    (folder / "features" / "shout.py").write_text(code)
    asked = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 8, "temperature": 0}

    def said(url: str, **fields) -> str:
        reply = httpx.post(f"{url}/v1/chat/completions", json={**asked, **fields}, timeout=60)
        return reply.json()["choices"][0]["message"]["content"]

    with running_process(folder / "server.py", folder=str(folder), FEATURES="shout", PORT="0",
                         N_CTX="256") as (_, url, _):
        assert said(url, shout=True) == said(url).upper() != said(url)
        assert httpx.get(f"{url}/shout").json() == {"always": False}
    with running_process(folder / "server.py", folder=str(folder), PORT="0", N_CTX="256") as (_, url, _):
        assert httpx.get(f"{url}/shout").status_code == 404
        reply = httpx.post(f"{url}/v1/chat/completions", json={**asked, "shout": True}, timeout=60)
        assert reply.status_code == 400 and "needs the feature shout" in reply.text
