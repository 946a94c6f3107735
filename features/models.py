"""Several models: loaded when they are asked for, unloaded for one another.

What for: a machine whose memory holds one model or two, and clients that want more of them, by
name. How it works: a request for a model that is not there waits while one that has nothing to do,
or has had its turn, gives its memory back; `max_loaded` of them stay. It costs a loading time at
each change. It reads the settings `models`, `models_dir`, `max_loaded`, `turn_seconds` and
`default_regular_model`; an entry of `models` may set anew for its model what the section `model`
sets for all. A stream that waits for its model is told so: `: loading NAME 5%`.
"""

import contextlib
import dataclasses
import os
import re
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import engine
import server
from features.pooled import PooledModel, Ticket
from features.settings import NO_PATH
from server import POLL_SECONDS

MODEL_NAME = r"[A-Za-z0-9][\w./:@+-]*"
NEWS_SECONDS = 1.0  # between two comments in a stream that waits for its model
LAST_STEP_SECONDS = 5.0  # at the end, for a step of loading that cannot be interrupted
IDLE_GRACE_SECONDS = 0.2  # a client that sends one request after the other is back within this


@dataclasses.dataclass
class ModelEntry:
    """A model with a name: a GGUF file, with what differs from the settings of the section
    `model`."""

    model_path: str | None = None
    mmproj: str | None = None
    chat_template_file: str | None = None
    n_ctx: int | None = server.option(low=0, high=server.MAX_N_CTX)
    parallel: int | None = server.option(low=1, high=256)
    n_gpu_layers: int | None = server.option(low=-1, high=server.INT32_MAX)
    draft_model_path: str | None = None

    OWN = ("mmproj", "chat_template_file", "draft_model_path")  # never those of the section

    def is_here(self) -> bool:
        """Whether it is a model of this machine."""
        return True

    def given_settings(self) -> list[str]:
        """What it says of a model of this machine."""
        return [field.name for field in dataclasses.fields(ModelEntry)
                if getattr(self, field.name) is not None]

    def settings(self, config: server.Config, house: server.House) -> server.Config:
        """The settings for this model. Raises ConfigError for one that no feature honours."""
        own = {name: getattr(self, name) for name in self.given_settings()}
        own |= {name: getattr(self, name) for name in self.OWN}
        there = {field.name for field in dataclasses.fields(config)}
        for name in self.given_settings():
            if name not in there:
                raise server.ConfigError(f"models: {house.unknown_setting(name)}")
        return dataclasses.replace(config, **{
            name: value for name, value in own.items() if name in there})

    def check(self, at: str) -> None:
        """Refuse an entry without a model."""
        if self.is_here() and self.model_path is None:
            raise server.invalid(at, f"{at}: name either a model_path or a base_url")


@dataclasses.dataclass
class Settings:
    """Which models there are, and how many at a time."""

    models_dir: str | None = server.setting("model", None, path="folder")
    max_loaded: int = server.setting("model", 1, low=1, high=64)
    turn_seconds: float = server.setting("model", 10.0, low=0, high=server.DAY)
    default_regular_model: str | None = server.setting("model", None)
    models: dict[str, ModelEntry] = dataclasses.field(
        default_factory=dict, metadata={"section": "model", "secret": True})

    def check(self, _at: str) -> None:
        """Refuse names and numbers that cannot be."""
        for name, entry in self.models.items():
            if not isinstance(name, str) or not re.fullmatch(MODEL_NAME, name):
                raise server.invalid("models", f"models: {server.describe(name)} is no name for a "
                                     "model; use letters, digits and ./:@+_-, in quotes if need be")
            if (entry.parallel or 0) > self.n_batch:
                raise server.invalid(f"models.{name}", f"models.{name}.parallel is "
                                     f"{entry.parallel}, but n_batch is only {self.n_batch}")


class Pool(server.Models):
    """Keeps at most `max_loaded` models loaded: those that are asked for.

    A model is unloaded for another one, the least recently used first, when it has nothing to do,
    or has had its turn; then it takes no new users, and finishes its work. So clients of two models
    that never pause don't make them change places with every request. One thread loads and unloads;
    nothing else waits for it but who wants a model that is not there.
    """

    def __init__(self, config: server.Config, house: server.House, stopping: threading.Event):
        """Raises ConfigError."""
        super().__init__(config, house, stopping)
        if config.models_dir and not Path(os.path.expanduser(config.models_dir)).is_dir():
            raise server.ConfigError(f"models_dir: {config.models_dir} is not a folder")
        self._new_model = house.type_of(PooledModel)
        local = {name: self._new_model(entry.model_path, entry.settings(config, house), house,
                                       name=name)
                 for name, entry in config.models.items() if entry.is_here()}
        own, wanted = model_name(config.model_path, house), config.default_regular_model
        if config.model_path or not (wanted or config.models) or \
                wanted == own and not getattr(config, "openai_base_url", None):
            local = {own: self._new_model(config.model_path, config, house, name=own), **local}
        self._models, self.named = local, {**local, **self.named}
        self._thread = threading.Thread(target=self._run, name="loader", daemon=True)
        self.n_loads = 0
        self.retired = engine.Stats()  # the counts of engines that are gone
        # Guards all that is below and the models' standing; notified when any of it changes.
        self._changed = threading.Condition()
        self._first: Ticket | None = None  # the server's own, for the default model
        self._tickets: list[Ticket] = []
        self._working_on: PooledModel | None = None
        try:
            self.default = self.find(wanted or next(iter(self.named)))
        except server.ApiError as error:
            raise server.ConfigError(f"default_regular_model: {error.message}") from None
        aliases = dict.fromkeys(config.model_aliases, self.default)
        self.named |= aliases | {name: target for name, target in self.named.items()
                                 if name == server.ANY}  # an engine that has all other names
        if isinstance(self.default, PooledModel):
            self._first = Ticket(self.default)
            self._tickets.append(self._first)

    # ---- any thread ------------------------------------------------------------------

    def start(self) -> None:
        """Start the thread; wait until the default model is loaded, or everything stops."""
        self._thread.start()
        with self._changed:
            while self.is_starting and not self.stopping.is_set():
                self._changed.wait(POLL_SECONDS)

    def check(self) -> None:
        """As Models.check. Raises ApiError, too, where the file has to change first."""
        if self.is_starting and self.default.error and not self.stopping.is_set():
            raise server.unavailable(self.default.error, "model_failed")
        super().check()

    def names(self) -> dict[str, Any]:
        """As Models.names."""
        return {**self.local_models(), **super().names()}

    def find(self, name: str | None) -> Any:
        """As Models.find; for None, where the default was unloaded by hand, any that is loaded."""
        if name is not None:
            return self.named.get(name) or self.local_models().get(name) or super().find(name)
        default = self.default
        if isinstance(default, PooledModel) and default.is_off:
            default = next(iter(self.loaded()), None)
        if default is None:
            raise server.unavailable("No model loaded", "no_model_loaded")
        return default

    def local_models(self) -> dict[str, "PooledModel"]:
        """All that can be loaded right now, by name."""
        found = {model.name: model for model in self._scan()}
        with self._changed:
            for name, model in found.items():
                self._models.setdefault(name, model)
            return {name: model for name, model in self._models.items()
                    if model.engine or not model.is_in_folder or name in found}

    def _scan(self) -> list["PooledModel"]:
        """The GGUF files in models_dir, by their names without the ending."""
        folder = Path(os.path.expanduser(self.config.models_dir or ""))
        files = engine.model_files(folder) if self.config.models_dir else []
        settings = ModelEntry().settings(self.config, self.house)
        return [self._new_model(str(file), settings, self.house, name=file.stem, is_in_folder=True)
                for file in files if re.fullmatch(MODEL_NAME, file.stem)]

    @property
    def is_starting(self) -> bool:
        """As Models.is_starting."""
        return self._first in self._tickets

    @property
    def n_waiting(self) -> int:
        """Requests that wait for a model."""
        return len(self._tickets) - self.is_starting

    def loaded(self) -> list[PooledModel]:
        """Those that are loaded, the most recently used first."""
        models = [model for model in list(self._models.values()) if model.engine]
        return sorted(models, key=lambda model: -model.last_used)

    def engines(self) -> dict[str, engine.Engine]:
        """The engines of those, by the models' names; each may be closed at any time."""
        engines = {model.name: model.engine for model in self.loaded()}
        return {name: engine for name, engine in engines.items() if engine}

    @contextlib.contextmanager
    def use(self, model: PooledModel, wait: Callable[[], None]) -> Iterator[None]:
        """Within this a model stays loaded. wait: called while it is not yet there, every moment.
        Raises ApiError, and what `wait` raises."""
        self._enter(model, wait)
        try:
            yield
        finally:
            self._leave(model)

    def _leave(self, model: PooledModel) -> None:
        with self._changed:
            model.n_users -= 1
            model.last_used = time.monotonic()
            self._changed.notify_all()

    def _enter(self, model: PooledModel, wait: Callable[[], None]) -> None:
        ticket = None
        try:
            while True:
                with self._changed:
                    if self.stopping.is_set():
                        raise server.unavailable("the server is shutting down", "shutting_down")
                    if ticket and ticket.error:
                        raise server.unavailable(ticket.error, "model_failed")
                    if model.engine and not model.is_leaving:
                        model.n_users += 1
                        model.last_used, model.is_off = time.monotonic(), False
                        return
                    if ticket is None:
                        self._check_waiting(model)
                        ticket = Ticket(model)
                        self._tickets.append(ticket)
                        self._changed.notify_all()
                    self._changed.wait(POLL_SECONDS)
                wait()
        finally:
            with self._changed:
                if ticket:
                    self._tickets.remove(ticket)

    def _check_waiting(self, model: PooledModel) -> None:
        """Refuse what it makes no sense to wait for."""
        if model is self.default:
            self.check()
        if model.is_hopeless():
            raise server.unavailable(model.error, "model_failed")
        try:  # known before another model has to go for it
            for name, file in model.files().items():
                if name != "chat_template_file" and not NO_PATH.match(file):
                    engine.find_model_file(file, server.HERE, setting=name)
        except engine.ModelError as error:
            raise server.unavailable(str(error), "model_failed") from None
        if len(self._tickets) >= self.config.max_queue:
            raise server.unavailable(
                f"{len(self._tickets)} requests are waiting for a model already", "queue_full")

    def load(self, model: PooledModel, exclusive: bool, wait: Callable[[], None]) -> None:
        """Load a model; with `exclusive`, unload all others before. Raises as `use` does."""
        model.error = None  # who asks like this wants it tried, whatever happened before
        if exclusive:
            self.unload([other for other in self.loaded() if other is not model], wait)
        with self.use(model, wait):
            pass

    def unload(self, models: list[PooledModel], wait: Callable[[], None]) -> None:
        """Give the memory of these models back, when their work is done."""
        with self._changed:
            for model in models:
                model.is_off = True
                model.must_go = model.engine is not None or model is self._working_on
                model.is_leaving |= model.must_go
            self._changed.notify_all()
        while any(model.must_go for model in models):
            with self._changed:
                if self.stopping.is_set():
                    raise server.unavailable("the server is shutting down", "shutting_down")
                self._changed.wait(POLL_SECONDS)
            wait()

    def stats(self) -> engine.Stats:
        """The counts of all engines, present and gone."""
        with self._changed:
            return super().stats() + self.retired

    def health(self) -> dict:
        """As Models.health, or failed; and which model is being loaded while others are served."""
        body = super().health()
        if body["status"] == "loading" and self.default.error:
            return {"status": "failed", "error": self.default.error}
        coming = self._working_on
        if body["status"] == "ok" and coming and coming.progress is not None:
            body["loading"] = {"model": coming.name, "progress": round(coming.progress, 2)}
        return body

    def samples(self) -> dict:
        """As Models.samples."""
        return {**super().samples(), "model_loads_total": ("models loaded", self.n_loads),
                "loaded_models": ("models that are loaded now", len(self.engines())),
                "waiting_for_model": ("requests that wait for a model", self.n_waiting)}

    def close(self) -> bool:
        """As Models.close; False, too, when a step of loading does not end."""
        closed = super().close()
        if self._thread.ident:
            self._thread.join(LAST_STEP_SECONDS)
        return closed and not self._thread.is_alive()

    # ---- the loader's thread only ------------------------------------------------------

    def _run(self) -> None:
        while not self.stopping.is_set():
            with self._changed:
                work, self._working_on = self._choose()
                if work is None:
                    self._changed.wait(POLL_SECONDS)
            if work:
                try:
                    work(self._working_on)
                except Exception:
                    server.log.exception("cannot load or unload %s", self._working_on.name)
                with self._changed:
                    self._working_on = None
                    self._changed.notify_all()

    def _choose(self) -> tuple[Callable[[PooledModel], None] | None, PooledModel | None]:
        """What to do now, with which model."""
        loaded, now = self.loaded(), time.monotonic()
        for model in loaded:
            if model.must_go and not model.n_users:
                return self._unload, model
        waiting = [ticket.model for ticket in self._tickets if not ticket.error]
        wanted = next((model for model in waiting
                       if not model.engine and not model.is_hopeless()), None)
        goes = None
        if wanted and len(loaded) >= self.config.max_loaded:
            best = min(loaded, key=lambda model: (model.n_users > 0, not model.is_leaving,
                                                  model.last_used))
            is_idle = not best.n_users and best not in waiting \
                and now - best.last_used >= IDLE_GRACE_SECONDS
            goes = best if is_idle or now - best.loaded_at >= self.config.turn_seconds else None
        for model in loaded:  # anew every time: who asked may have gone
            model.is_leaving = model.must_go or model is goes
        if wanted and len(loaded) < self.config.max_loaded:
            return self._load, wanted
        return (self._unload, goes) if goes and not goes.n_users else (None, None)

    def _load(self, model: PooledModel) -> None:
        try:
            model.progress, model.seen = 0.0, model.look()
            loaded = model.load(lambda: not self.stopping.is_set())
            model.seen = model.look()
        except Exception as error:
            self._fail(model, error)
        else:
            with self._changed:
                model.engine, model.error, model.loaded_at = loaded, None, time.monotonic()
                model.last_used, model.is_leaving = model.loaded_at, model.must_go
                self.n_loads += 1
                self._tickets = [ticket for ticket in self._tickets if ticket is not self._first
                                 or model is not self.default]
        finally:
            model.progress = None

    def _fail(self, model: PooledModel, error: Exception) -> None:
        """A broken file may still be on its way, and is tried again when it changes. Anything else
        that is wrong with the default model at the start is wrong with the settings."""
        if not isinstance(error, engine.ModelError):
            server.log.exception("loading %s failed", model.name)
        is_first = self.is_starting and model is self.default
        if self.stopping.is_set():  # it is the stop that interrupted the loading
            return
        with self._changed:
            model.error, model.is_broken = str(error), isinstance(error, engine.BrokenModel)
            model.failed_at, model.must_go = time.monotonic(), False
            for ticket in self._tickets:
                if ticket.model is model and ticket is not self._first:
                    ticket.error = model.error
        if is_first and not isinstance(error, engine.BrokenModel):
            self.fatal_error = model.error
            self.stopping.set()
        else:
            server.log.error("error: %s%s", error, "; waiting for the file to change" * is_first)

    def _unload(self, model: PooledModel) -> None:
        with self._changed:
            gone, model.engine, model.is_leaving = model.engine, None, False
            self.retired += dataclasses.replace(gone.stats, slots=())
        server.log.info("unloading %s", model.name)
        try:
            if gone.close():
                gone.model.close()
            else:
                server.log.error("%s is stuck in a step: its memory is lost", model.name)
        finally:
            with self._changed:
                model.must_go = False


def model_name(path: str | None, house: server.House) -> str:
    """The name of a model that has none in the settings: its file's, without the ending."""
    path = path or next(iter(house.having("DEFAULT_MODEL")), None)
    with contextlib.suppress(engine.ModelError):
        if path is None or Path(os.path.expanduser(path)).is_dir():
            return engine.find_model_file(path, server.HERE / "models").stem
    return Path(path or "model").stem


class WaitingHandler:
    """What stands in front of Handler's methods."""

    @contextlib.contextmanager
    def lease(self, model: PooledModel) -> Iterator[None]:
        """As Handler.lease; from its second second on, a stream tells that it waits."""
        began = time.monotonic()

        def wait() -> None:
            self.check_connection()
            if self.streams and time.monotonic() - max(began, self.last_write) > NEWS_SECONDS:
                progress = model.progress or 0.0
                self.write_sign(f"loading {model.name} {progress:.0%}", {
                    "type": "loading", "model": model.name, "progress": round(progress, 2)})

        with self.server.models.use(model, wait):
            self.loaded = model.engine
            yield


NEEDS = ("pings",)
METHODS = {"Models": Pool, "Handler": WaitingHandler}
