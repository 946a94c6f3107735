"""Memory: prefixes that have lost their slot wait in host memory, and come back.

What it is for. A conversation's next turn begins with all that was said before, and the engine
computes only what is new, as long as a slot still holds the rest. With more conversations than
slots the next one takes a slot, and the prefix would be gone. Here it is kept: to copy the state of
a slot takes milliseconds, to compute it again takes seconds.

How it works. Before the engine overwrites a slot it offers what nobody else holds to the store,
which asks llama.cpp for the slot's keys and values, as bytes. A new prompt is compared with all
entries; if one has more of it than any slot, its bytes go into a slot. An entry that a longer one
continues goes, and where room is short the least recently used go. For models that cannot cut their
state (recurrent ones, sliding windows) only a whole entry will do.

What it costs. Memory up to the setting, per loaded model: for SmolLM2-135M 23 KB a token, for a
model of 8 billion parameters with grouped attention about 128 KB. A prompt that gets a slot is
compared with MAX_ENTRIES entries in a millisecond or so.

What it reads and sends. The setting `cache_ram_mib`; 0 keeps nothing. Replies say in
`cached_tokens` what they had from it, /metrics in `restored_prefixes_total`.
"""

import dataclasses
import itertools
import logging

import numpy as np

import engine
import server

log = logging.getLogger("memory")


class MemoryStore(engine.PrefixStore):
    """Prefixes as bytes in host memory; the least recently used go first. Keys are indices into
    the entries, good until the next `put` or `get`."""

    MAX_ENTRIES = 256  # all are compared with each prompt that wants a slot: a millisecond or so

    def __init__(self, max_bytes: int):
        self._max_bytes, self.n_bytes = max_bytes, 0
        self._entries: list[tuple[np.ndarray, np.ndarray]] = []  # (tokens, state), oldest first

    def __len__(self) -> int:
        return len(self._entries)

    def longest(self, prompt: np.ndarray, whole: bool = False) -> tuple[int, int]:
        """As PrefixStore has it."""
        shared = [engine.common_prefix(prompt, tokens) for tokens, _ in self._entries]
        if whole:
            shared = [n if n == len(tokens) else 0
                      for n, (tokens, _) in zip(shared, self._entries)]
        return max(zip(shared, itertools.count()), default=(0, -1))

    def put(self, tokens: np.ndarray, context: engine.Context, seq_id: int) -> None:
        """As PrefixStore has it; entries that the new one continues go."""
        try:
            if context.state_size(seq_id) > self._max_bytes:
                return
            entry = tokens.copy(), context.save(seq_id)
        except MemoryError:
            log.warning("no memory left to store a prefix: lower cache_ram_mib")
            return
        for older in self._entries[:]:
            if engine.common_prefix(older[0], tokens) == len(older[0]):
                self._remove(older)
        while len(self) >= self.MAX_ENTRIES or self.n_bytes + entry[1].nbytes > self._max_bytes:
            self._remove(self._entries[0])
        self._entries.append(entry)
        self.n_bytes += entry[1].nbytes

    def _remove(self, entry: tuple[np.ndarray, np.ndarray]) -> None:
        self._entries = [each for each in self._entries if each is not entry]
        self.n_bytes -= entry[1].nbytes

    def get(self, key: int) -> tuple[np.ndarray, np.ndarray]:
        """As PrefixStore has it; the entry is now the latest."""
        self._entries.append(self._entries.pop(key))
        return self._entries[-1]


@dataclasses.dataclass
class Settings:
    """How much memory."""

    cache_ram_mib: float = server.setting("model", 512.0, low=0, high=2**20)


class MemoryCounts(server.Models):
    """Counts the prefixes that came back."""

    def samples(self) -> dict:
        """As Models.samples."""
        return {**super().samples(), "restored_prefixes_total": (
            "prefixes back from host memory", self.stats().n_restored)}


METHODS = {"Models": MemoryCounts}


def equip(loaded: engine.Engine, settings: server.Config) -> None:
    """Give a model a store of `cache_ram_mib`. Loader thread, before anybody has the engine."""
    loaded.prefixes.store = MemoryStore(int(settings.cache_ram_mib * 2**20))
