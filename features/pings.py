"""Pings: signs of life in a stream that is silent.

What for: proxies and clients that give up a connection on which nothing comes, while a request
waits for a slot or its prompt is read. How it works: whoever waits looks every moment whether the
client is still there; when a stream has been silent for too long, that look writes a comment, or
what the API of the path has in its place. It costs nothing while tokens come. It reads the setting
`ping_interval`, and sends `: ping`.
"""

import dataclasses
import time
from collections.abc import Iterator

import engine
import server


@dataclasses.dataclass
class Settings:
    """When a stream is silent: seconds, 0 is never."""

    ping_interval: float = server.setting("server", 15.0, low=0, high=server.DAY)


class LivelyHandler:
    """What stands in front of Handler's methods."""

    def handle_one_request(self) -> None:
        """As Connection.handle_one_request."""
        self.streams = self.may_ping = False  # whether its reply is a stream; if that may begin
        self.last_write = 0.0  # time.monotonic()
        super().handle_one_request()

    def read_fields(self, cls: type, sent: dict):
        """As Handler.read_fields."""
        request = super().read_fields(cls, sent)
        self.streams = bool(getattr(request, "stream", False))
        return request

    def write_piece(self, piece: bytes, is_last: bool = False) -> None:
        """As Connection.write_piece."""
        super().write_piece(piece, is_last)
        self.last_write = time.monotonic()

    def events(self, choices: list[engine.Request]) -> Iterator[engine.Event]:
        """As Handler.events. Only now is it sure that the request is not refused."""
        self.may_ping, self.last_write = True, time.monotonic()
        yield from super().events(choices)

    def check_connection(self) -> None:
        """As Connection.check_connection."""
        super().check_connection()
        seconds = self.server.config.ping_interval
        if self.streams and self.may_ping and 0 < seconds < time.monotonic() - self.last_write:
            self.write_sign("ping")

    def write_sign(self, text: str, data: dict | None = None) -> None:
        """Write a sign of life: what the dialect's `sign` makes of a text and data, if anything; a
        comment where the dialect has none."""
        sign = getattr(self.dialect, "sign", None)
        if piece := sign(text, data) if sign else comment(text):
            self.write_piece(piece)


def comment(text: str) -> bytes:
    """A comment among server-sent events."""
    return f": {text}\n\n".encode()


METHODS = {"Handler": LivelyHandler}
