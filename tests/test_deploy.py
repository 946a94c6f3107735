"""The files for deployment, as far as they can be held to their word without a Docker engine.

What the Dockerfile says is read from its text and done: its pip and COPY lines in an empty folder,
then its ENTRYPOINT, its HEALTHCHECK, and the signal that `docker stop` sends.
"""

import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import server  # noqa: E402

COMPOSE = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
UNIT = ROOT / "examples" / "twofile.service"
DRAIN_SECONDS = server.load_config([], {}).drain_seconds
# What is no setting, but speaks to the shell, to Python and to pip.
OTHER_VARIABLES = {"PATH", "PYTHONUNBUFFERED", "PIP_NO_CACHE_DIR"}


def read_dockerfile() -> list[list[tuple[str, str]]]:
    """The stages of the Dockerfile, each a list of (instruction, its arguments)."""
    text = re.sub(r"^\s*#.*\n", "", (ROOT / "Dockerfile").read_text(), flags=re.MULTILINE)
    stages: list[list[tuple[str, str]]] = []
    for line in text.replace("\\\n", "").splitlines():
        if match := re.match(r"([A-Z]+)\s+(.+)", line):
            if match[1] == "FROM":
                stages.append([])
            if stages:  # the ARGs before the first FROM belong to none
                stages[-1].append((match[1], match[2]))
    return stages


def arguments(stage: list[tuple[str, str]], instruction: str) -> list[str]:
    return [rest for name, rest in stage if name == instruction]


BUILDER, FINAL = read_dockerfile()  # two stages, or the tests do not even begin
HEALTH = json.loads(arguments(FINAL, "HEALTHCHECK")[0].partition("CMD ")[2])
UNIT_LINES = [line.partition("=")[::2] for line in UNIT.read_text().splitlines()
              if re.match(r"[A-Z]\w*=", line)]


def unit_values(key: str) -> list[str]:
    return [value for name, value in UNIT_LINES if name == key]


# ---- the Dockerfile's text -------------------------------------------------------------


def test_the_compiler_stays_in_the_first_stage():
    """g++ is installed where llama.cpp is compiled; of that stage only /venv goes on."""
    assert "g++" in " ".join(arguments(BUILDER, "RUN"))
    final = " ".join(arguments(FINAL, "RUN"))
    assert not re.search(r"g\+\+|gcc|clang|build-essential|cmake", final)
    assert arguments(FINAL, "COPY")[0] == "--from=builder /venv /venv"


def test_the_server_is_no_root_and_may_write_its_models_only():
    """USER is a number, so that a platform which demands a user other than root can tell. The
    folder for models is made for that user before it becomes a volume; root owns the rest."""
    assert re.fullmatch(r"[1-9]\d+:[1-9]\d+", arguments(FINAL, "USER")[0])
    user = arguments(FINAL, "USER")[0].partition(":")[0]
    assert f"--uid {user}" in " ".join(arguments(FINAL, "RUN"))
    assert [words for words in " ".join(arguments(FINAL, "RUN")).split() if "/app" in words] == [
        "/app/models"]
    assert arguments(FINAL, "VOLUME") == ["/app/models"]
    assert not any("--chown" in rest for rest in arguments(FINAL, "COPY"))


def test_signals_reach_python_because_no_shell_is_in_between():
    assert json.loads(arguments(FINAL, "ENTRYPOINT")[0])[0] == "python"
    assert not arguments(FINAL, "STOPSIGNAL")  # SIGTERM is Docker's default


def test_every_copied_file_exists_and_docker_is_sent_no_other():
    """A model, a key in .env or a virtual environment never gets into an image or its cache."""
    sources = {source for rest in arguments(BUILDER + FINAL, "COPY") if "--from=" not in rest
               for source in rest.split()[:-1]}
    files = {"server.py", "engine.py", "config.yaml", "requirements.txt",
             "features/requirements.txt"}
    assert sources == files | {"features"}
    assert all((ROOT / source).is_file() for source in files)
    ignore = [line for line in (ROOT / ".dockerignore").read_text().splitlines()
              if line and not line.startswith("#")]
    files.add("features/*.py")
    assert ignore[0] == "*" and set(ignore[1:]) == {f"!{file}" for file in files}


def test_the_health_check_waits_for_a_first_start():
    """Fetching and loading a model takes minutes, in which an unhealthy container would be
    replaced; after that a hung server is noticed soon."""
    flags = dict(re.findall(r"--([\w-]+)=(\w+)", arguments(FINAL, "HEALTHCHECK")[0]))
    assert flags["start-period"] == "10m" and flags["interval"] == "30s"
    assert "8080" in arguments(FINAL, "EXPOSE")


# ---- the Dockerfile, carried out -------------------------------------------------------


class Image:
    """What the Dockerfile builds: its absolute folders lie in a temporary one."""

    def __init__(self, root: Path):
        self.root = root
        environ = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
        for stage in BUILDER, FINAL:
            here = root
            for name, rest in stage:
                if name == "WORKDIR":
                    here = Path(self.place(rest))
                    here.mkdir()
                elif name == "RUN" and "pip" in rest:  # the others are for apt-get and root
                    subprocess.run(["sh", "-ec", self.place(rest)], cwd=here, check=True,
                                   env=environ, timeout=3000)  # seconds: it may have to compile
                elif name == "COPY" and "--from=" not in rest:  # /venv lies in one place here
                    *sources, target = rest.split()
                    (here / target).mkdir(exist_ok=True)
                    for source in sources:  # of a folder what is in it, as Docker does
                        if (ROOT / source).is_dir():
                            shutil.copytree(ROOT / source, here / target, dirs_exist_ok=True,
                                            ignore=shutil.ignore_patterns("__pycache__"))
                        else:
                            shutil.copy(ROOT / source, here / target)
        self.app = here
        words = shlex.split(" ".join(arguments(FINAL, "ENV")).replace("$PATH", os.environ["PATH"]))
        self.environ = {**os.environ,
                        **dict(self.place(word).split("=", maxsplit=1) for word in words)}

    def place(self, text: str) -> str:
        return re.sub(r"(?<![\w.])/(venv|app|build)\b", rf"{self.root}/\1", text)

    def healthy(self, **environ) -> bool:
        """Run the HEALTHCHECK; a proxy in the environment must not matter to it."""
        outcome = subprocess.run(
            HEALTH, env={**self.environ, **environ, "http_proxy": "http://127.0.0.1:1"},
            capture_output=True, text=True, timeout=60)
        assert outcome.returncode in (0, 1), outcome.stderr  # Docker knows no others
        return outcome.returncode == 0


@pytest.fixture(scope="module")
def image(tmp_path_factory):
    """The Dockerfile's pip and COPY lines, carried out. pip has the wheel of llama-cpp-python in
    its cache once the requirements are installed: it is compiled here only if it isn't there."""
    built = Image(tmp_path_factory.mktemp("image"))
    # Stands for the volume: a model that is there already is not fetched once more.
    (ROOT / "models").mkdir(exist_ok=True)
    (built.app / "models").symlink_to(ROOT / "models")
    return built


@pytest.mark.slow
def test_a_container_starts_gets_healthy_serves_and_stops(image):
    """The life of a container: unhealthy until the model is loaded, healthy then, with a key or
    without; requests need the key; `docker stop` ends it with code 0."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    settings = {"PORT": port, "API_KEYS": "key-of-the-test", "N_CTX": "512", "PARALLEL": "1"}
    assert not image.healthy(PORT=port)
    output = image.root / "output"
    with output.open("w") as file:
        container = subprocess.Popen(json.loads(arguments(FINAL, "ENTRYPOINT")[0]), cwd=image.app,
                                     env={**image.environ, **settings}, stdout=file, stderr=file)
    try:
        deadline = time.monotonic() + 600  # the health check's start period
        while not image.healthy(PORT=port):
            assert container.poll() is None and time.monotonic() < deadline, output.read_text()
            time.sleep(0.3)
        url, body = f"http://127.0.0.1:{port}/v1/completions", {"prompt": "Hi", "max_tokens": 2}
        with httpx.Client(timeout=60, trust_env=False) as client:
            assert client.post(url, json=body).status_code == 401
            key = {"Authorization": "Bearer key-of-the-test"}
            assert client.post(url, json=body, headers=key).status_code == 200
        container.send_signal(signal.SIGTERM)
        assert container.wait(timeout=60) == 0, output.read_text()
    finally:
        container.kill()
        container.wait()
    assert not image.healthy(PORT=port)


@pytest.mark.slow
def test_the_final_stage_has_the_libraries_that_llama_cpp_needs(image):
    """What was compiled in the first stage finds in the second all that it loads. (Wheels that
    come compiled, like numpy's, bring along what a bare system lacks.)"""
    compiled = list((image.root / "venv").glob("lib/python*/site-packages/llama_cpp/lib/*.so"))
    told = subprocess.run(["ldd", *compiled], capture_output=True, text=True, timeout=120).stdout
    assert "not found" not in told
    needed = {Path(name).name.partition(".")[0]
              for name, path in re.findall(r"^\s+(\S+) => (\S+)", told, re.MULTILINE)
              if not path.startswith(str(image.root))}
    in_every_image = {"libc", "libm", "libdl", "libpthread", "librt", "libgcc_s", "libstdc++"}
    assert needed - in_every_image == {"libgomp"}
    assert "libgomp1" in " ".join(arguments(FINAL, "RUN"))


# ---- Compose ---------------------------------------------------------------------------


def has_compose() -> bool:
    """Whether there is a Docker client with Compose, which reads files without an engine."""
    return bool(shutil.which("docker")) and not subprocess.run(
        ["docker", "compose", "version"], capture_output=True).returncode


@pytest.mark.skipif(not has_compose(), reason="no Docker client with Compose is here")
@pytest.mark.parametrize("flags, services", [([], {"cpu"}), (["--profile", "gpu"], {"cpu", "gpu"})])
def test_compose_reads_the_file(flags, services, tmp_path):
    """Docker's own reading, for what a YAML parser cannot know: names, types and ${...}."""
    nothing = tmp_path / "env"  # in place of a developer's .env
    nothing.write_text("")
    environ = {key: value for key, value in os.environ.items()
               if key not in ("CMAKE_ARGS", "MODELS_FOLDER", "MODEL_PATH")}
    told = subprocess.run(["docker", "compose", "--env-file", str(nothing), *flags, "config"],
                          cwd=ROOT, env={**environ, "API_KEYS": "one,two"},
                          capture_output=True, text=True, timeout=60)
    assert told.returncode == 0, told.stderr
    found = yaml.safe_load(told.stdout)["services"]
    assert set(found) == services
    for service in found.values():
        assert service["environment"]["API_KEYS"] == "one,two"
        assert not service["environment"].get("MODEL_PATH")
    if "gpu" in found:
        arguments_of_cmake = found["gpu"]["build"]["args"]["CMAKE_ARGS"].split()
        assert {"-DGGML_CUDA=on", "-DGGML_NATIVE=OFF"} < set(arguments_of_cmake)


@pytest.mark.parametrize("name", COMPOSE["services"])
def test_compose_serves_this_machine_only_and_takes_rights_away(name):
    """Who copies the file gets a server that the network cannot reach, and a container that can
    change nothing but the models."""
    service = COMPOSE["services"][name]
    assert service["ports"] == ["127.0.0.1:8080:8080"]
    assert service["read_only"] and service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    models, config = service["volumes"]
    assert models.endswith(":/app/models") and config["read_only"]
    assert (ROOT / config["source"]).is_file() and config["target"] == "/app/config.yaml"


def test_compose_builds_with_arguments_that_the_dockerfile_has():
    """A misspelt build argument would be ignored with a warning. The GPU's base images replace
    both of the Dockerfile's, and have no Python of their own."""
    declared = set(re.findall(r"^ARG (\w+)", (ROOT / "Dockerfile").read_text(), re.MULTILINE))
    builds = {name: set(service["build"]["args"]) for name, service in COMPOSE["services"].items()}
    assert builds["cpu"] <= declared and builds["gpu"] == declared
    assert all("${PYTHON_PACKAGES}" in " ".join(arguments(stage, "RUN"))
               for stage in (BUILDER, FINAL))
    assert "-DGGML_CUDA=on " in COMPOSE["services"]["gpu"]["build"]["args"]["CMAKE_ARGS"]
    assert COMPOSE["services"]["gpu"]["profiles"] == ["gpu"]
    devices = COMPOSE["services"]["gpu"]["deploy"]["resources"]["reservations"]["devices"]
    assert devices == [{"driver": "nvidia", "count": "all", "capabilities": ["gpu"]}]


# ---- systemd ---------------------------------------------------------------------------


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="systemd-analyze is not here")
def test_systemd_understands_the_unit(tmp_path):
    """It warns of unknown keys and values. The folder of the installation is put elsewhere, since
    a program that is missing is an error, too."""
    python = tmp_path / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.symlink_to(sys.executable)
    unit = tmp_path / UNIT.name
    unit.write_text(UNIT.read_text().replace("/opt/twofile", str(tmp_path)))
    told = subprocess.run(["systemd-analyze", "verify", str(unit)], capture_output=True, text=True,
                          timeout=60)
    assert told.returncode == 0 and UNIT.name not in told.stderr, told.stderr


def test_the_unit_has_one_place_to_write_and_the_models_lead_there():
    """ProtectSystem=strict makes everything read-only but the state directory. The default model
    belongs beside server.py, so the instructions make a link of that name."""
    assert unit_values("ProtectSystem") == ["strict"] and unit_values("DynamicUser") == ["yes"]
    state, home = unit_values("StateDirectory")[0], unit_values("WorkingDirectory")[0]
    assert f"ln -sfnT /var/lib/{state} {home}/models" in UNIT.read_text()
    assert unit_values("ExecStart") == [f"{home}/.venv/bin/python server.py"]


def test_stopping_the_unit_spares_the_processes_of_running_requests():
    """SIGTERM for all would end the process that tries grammars out, of which drained ones may be.
    What a restart cannot mend is not restarted."""
    assert unit_values("KillSignal") == ["SIGTERM"] and unit_values("KillMode") == ["mixed"]
    assert unit_values("Restart") == ["on-failure"]
    assert unit_values("RestartPreventExitStatus") == [str(server.EXIT_UNUSABLE)]


# ---- both ------------------------------------------------------------------------------


def test_nothing_is_killed_while_running_requests_may_finish():
    """Docker's own grace is 10 seconds; the server takes drain_seconds, and a moment more."""
    graces = [service["stop_grace_period"] for service in COMPOSE["services"].values()]
    graces += [f"{seconds}s" for seconds in unit_values("TimeoutStopSec")]
    assert len(graces) == 3
    for grace in graces:
        assert int(re.fullmatch(r"(\d+)s", grace)[1]) >= DRAIN_SECONDS + 5


def test_every_variable_is_a_setting():
    """An environment variable with a wrong name would just be ignored."""
    names = set(re.findall(r"(\w+)=", " ".join(arguments(FINAL, "ENV")
                                               + unit_values("Environment"))))
    names |= set(re.findall(r"\b([A-Z_]+)=\.\.\.", UNIT.read_text()))  # of its EnvironmentFile
    for service in COMPOSE["services"].values():
        names |= set(service["environment"])
    assert {"HOST", "PORT", "API_KEYS", "MODEL_PATH"} <= names
    settings = {name.upper() for name in server.Config.__dataclass_fields__}
    assert names - OTHER_VARIABLES <= settings
