"""Pooled: a model that comes and goes, and how it stands; models.py has the pool.

A model that could not be loaded is tried again when one of its files has changed, since a file may
still be on its way; until then who asks for it is told why it failed. It is no feature by itself.
"""

import contextlib
import dataclasses
import math
import os
import time

import engine
import server

RELOAD_SECONDS = 2.0  # between looks whether a model file that could not be loaded has changed


@dataclasses.dataclass(eq=False)
class PooledModel(server.LocalModel):
    """A model that comes and goes. What it says more of how it stands is the Pool's."""

    name: str = ""
    is_in_folder: bool = False  # of the models_dir, from which it may vanish
    error: str | None = None  # why it could not be loaded the last time
    is_broken: bool = False  # it could not be loaded, and it was a file's fault, ...
    seen: tuple = ()  # ... what its files looked like then ...
    failed_at: float = -math.inf  # ... and when; time.monotonic()
    n_users: int = 0
    loaded_at: float = 0.0  # time.monotonic()
    last_used: float = 0.0
    is_leaving: bool = False  # takes no new users, and is unloaded when the last one has gone
    must_go: bool = False  # leaves because somebody unloads it by hand
    is_off: bool = False  # has been unloaded by hand: only who asks for it by name loads it again

    def equip(self, loaded: engine.Engine) -> None:
        """As LocalModel.equip; under its own name."""
        loaded.model.name = self.name
        super().equip(loaded)

    def entry(self, name: str) -> dict:
        """As LocalModel.entry, with llama-server's `meta` of a loaded model, and what older clients
        look for: what it is another name of, and the classic list of permissions."""
        about, loaded = {}, self.engine  # read once: it may be unloaded right now
        if loaded:
            facts = {key: getattr(loaded.model, key) for key in (
                "n_ctx_train", "n_params", "n_vocab", "n_embd", "architecture", "quantization")}
            about["meta"] = {
                "n_ctx": loaded.n_ctx, **facts, "size": loaded.model.size_bytes, **loaded.facts,
                "capabilities": ["completion"] * loaded.model.generates + loaded.capabilities}
        may = {f"allow_{what}": what not in ("create_engine", "fine_tuning", "search_indices")
               for what in ("create_engine", "sampling", "logprobs", "search_indices", "view",
                            "fine_tuning")}
        return {**super().entry(name), **about, "root": self.name, "parent": None, "permission": [
            {"id": f"modelperm-{server.NAME}", "object": "model_permission",
             "created": server.STARTED, **may, "organization": "*", "group": None,
             "is_blocking": False}]}

    def files(self) -> dict[str, str]:
        """Its files, by the settings that name them."""
        names = [field.name for field in dataclasses.fields(self.settings)
                 if field.metadata.get("path") == "file" and field.name != "model_path"]
        files = {"model_path": self.path, **{name: getattr(self.settings, name) for name in names}}
        for files_of in self.house.having("files_of"):
            files |= files_of(self)
        return {name: file for name, file in files.items() if file}

    def look(self) -> tuple:
        """What changes when one of its files does."""
        seen = []
        for file in self.files().values():
            with contextlib.suppress(OSError):
                stat = os.stat(os.path.expanduser(file))
                seen.append((stat.st_ino, stat.st_size, stat.st_mtime_ns))
        return tuple(seen)

    def is_hopeless(self) -> bool:
        """Whether to load it would fail again: it just has, or its files are what they were when
        they were broken."""
        return self.error is not None and (
            time.monotonic() - self.failed_at < RELOAD_SECONDS
            or self.is_broken and self.seen == self.look())


@dataclasses.dataclass(eq=False)
class Ticket:
    """One that waits for a model."""

    model: PooledModel
    error: str | None = None  # why it waits in vain
