"""What README.md and docs/ say holds, as far as text alone can show: links, tables, names, sizes.
test_examples.py runs what they show."""

import importlib
import re
import types
import subprocess
import sys

import pytest
import yaml

import field_table
from conftest import DOCS, ROOT, blocks_of

sys.path.insert(0, str(ROOT))
import conftest  # noqa: E402
import server  # noqa: E402

README = ROOT / "README.md"


def prose_of(text: str) -> str:
    """A Markdown text without its fenced blocks."""
    return re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S)


def anchors_of(text: str) -> set[str]:
    """The anchors that GitHub gives the headings: lower case, hyphens for blanks, nothing but
    letters, digits, - and _; those that are there already get a number."""
    found: list[str] = []
    for heading in re.findall(r"^#+ +(.+?) *$", prose_of(text), re.M):
        anchor = re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
        n_before = sum(re.fullmatch(rf"{re.escape(anchor)}(-\d+)?", each) is not None
                       for each in found)
        found.append(f"{anchor}-{n_before}" if n_before else anchor)
    return set(found)


def test_anchors_are_github_s():
    text = "# A `b`: c_d, e-f\n## The end\n```\n# no heading\n```\n### The end\n"
    assert anchors_of(text) == {"a-b-c_d-e-f", "the-end", "the-end-1"}


@pytest.mark.parametrize("file", DOCS, ids=lambda file: file.name)
def test_every_relative_link_leads_to_a_file_or_a_heading(file):
    """Links and pictures; outside of code, which shows brackets of other kinds."""
    links = re.findall(r"\]\(([^)\s]+)\)", prose_of(file.read_text()))
    wrong = []
    for link in links:
        path, _, anchor = link.partition("#")
        if re.match(r"https?:", link):
            continue
        target = (file.parent / path).resolve() if path else file
        is_there = target.exists() and target.is_relative_to(ROOT)
        if not is_there or anchor and anchor not in anchors_of(target.read_text()):
            wrong.append(link)
    assert links and not wrong


def test_the_readme_is_short_and_leads_to_every_other_file():
    text = README.read_text()
    assert len(text.splitlines()) <= 250
    others = {str(file.relative_to(ROOT)) for file in DOCS} - {"README.md"}
    assert others <= set(re.findall(r"\]\(([^)#\s]+)", text))


def test_the_api_lists_every_field_with_what_becomes_of_it():
    """A field is honoured, without effect, or refused; the tables are the contract."""
    _, written, _ = field_table.parts(field_table.FILE.read_text())
    assert written == field_table.make(), "run: python tests/field_table.py"


def test_the_api_lists_every_route():
    table = (ROOT / "docs" / "api.md").read_text().partition("## Routes")[2].partition("\n## ")[0]
    assert sorted(re.findall(r"`([A-Z]+) (/\S*)`", table)) == sorted(
        conftest.house().routes)


def settings_in(text: str) -> dict:
    """Those in the tables of a text: {key: default}."""
    rows = re.findall(r"^\| `(\w+)` \| `(.*?)` \|", text, re.M)
    assert len({name for name, _ in rows}) == len(rows), "a key stands there twice"
    return {name: yaml.safe_load(default) for name, default in rows}


def test_the_tables_of_settings_say_what_config_yaml_says():
    """docs/operate.md has every key, the README some."""
    found = {}
    for section, content in yaml.safe_load((ROOT / "config.yaml").read_text()).items():
        for name, value in content.items() if isinstance(content, dict) and content else \
                [(section, content)]:
            found[f"{section}_enabled" if name == "enabled" else name] = value
    assert settings_in((ROOT / "docs" / "operate.md").read_text()) == found
    some = settings_in(README.read_text())
    assert len(some) == 10 and some.items() <= found.items()


@pytest.mark.parametrize("file", DOCS, ids=lambda file: file.name)
def test_settings_that_are_shown_can_be_used(file, tmp_path):
    """Each block of YAML is a config file that starts a server."""
    for text in blocks_of("yaml", [file]):
        if "features:" not in text:
            text = conftest.with_features(text)
        (tmp_path / "config.yaml").write_text(text)
        assert server.load_config(["--config", str(tmp_path / "config.yaml")], {})


def test_the_ladder_names_what_is_there():
    """Each row of Read the code: a file, and the classes and functions to read in it."""
    section = README.read_text().partition("## Read the code")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| \d+ \| \[(\S+)\.py\]\(\S+\): (.*?) \|", section, re.M)
    assert {"engine", "server"} < {file for file, _ in rows}
    for file, names in rows:
        for name in re.findall(r"`(.*?)`", names):
            found = importlib.import_module(file.replace("/", "."))
            for part in name.split("."):
                assert hasattr(found, part), f"{file}.py has no {name}"
                found = getattr(found, part)


def test_metrics_are_listed_by_their_names():
    """What /metrics gives, of a server that has answered nothing yet."""
    idle = server.Server(conftest.config(port=0))
    idle.server_close()
    sent: list[bytes] = []
    server.Handler.get_metrics(types.SimpleNamespace(server=idle, send_body=lambda body, _: sent.append(body)))
    told = re.findall(rf"^# TYPE {server.NAME}_(\w+) ", sent[0].decode(), re.M)
    text = (ROOT / "docs" / "operate.md").read_text()
    names = [row.split("|")[1] for row in text.partition("| metric |")[2].partition("\n\n")[0]
             .splitlines() if row.startswith("| `")]
    assert sorted(told) == sorted(re.findall(r"`(\w+)`", " ".join(names)))


def test_ci_finds_the_test_commands():
    """Three lines, one an environment: what .ci/run takes from the README, it runs."""
    script = re.search(r"<\((sed .*)\)$", (ROOT / ".ci" / "run").read_text(), re.M)[1]
    lines = subprocess.run(["bash", "-c", script], cwd=ROOT, capture_output=True, text=True,
                           check=True).stdout.splitlines()
    assert len(lines) == 3 and all("-m pytest" in line for line in lines)


def test_the_first_command_installs_what_the_features_need():
    first = blocks_of("sh", [README])[0]
    assert "-r requirements.txt -r features/requirements.txt" in first


def test_docs_speak_of_no_file_that_is_gone():
    """Paths in running text, with or without a link."""
    for file in DOCS:
        text = prose_of(file.read_text())
        for path in re.findall(r"\b((?:features|tests|examples|docs)/[\w.]+\.\w+)", text):
            assert (ROOT / path).exists() or "NAME" in path, f"{file.name}: {path}"
