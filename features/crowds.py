"""Crowds: who makes room when all connections are taken.

What for: a server that others reach: clients that dawdle keep nobody out. How it works: at
`max_connections` the one that has kept the server waiting for longest, with its request or by not
reading an answer, makes room; if there is none, the newcomer is told why it is refused. It costs
microseconds a request, and a thread for each who is told. It reads the setting `max_connections`,
and sends that refusal, a 503.
"""

import contextlib
import dataclasses
import select
import socket
import time

import server

MAX_REFUSALS = 64  # connections above max_connections that are told why they are refused
ACCEPT_PAUSE_SECONDS = 0.1  # when the process has no file descriptor left for a connection


@dataclasses.dataclass
class Settings:
    """How many connections may be open."""

    max_connections: int = server.setting("server", 512, low=1, high=2**15)


class Crowd:
    """The connections of a server."""

    def __init__(self, running: server.Server):
        self.running = running
        # These three are guarded by the server's `changed`.
        self.connections: set[socket.socket] = set()
        self.unready: dict[socket.socket, None] = {}  # of these, who keeps it waiting, oldest first
        self.refused: set[socket.socket] = set()  # above the limit
        self.admit, self.accept = running.process_request, running.get_request
        self.forget = running.shutdown_request

    def process_request(self, connection: socket.socket, client_address) -> None:
        """As the server's; but at the limit one that keeps us waiting makes room first, and where
        there is none, some are told."""
        with self.running.changed:
            is_full = len(self.connections) >= self.running.config.max_connections
            oldest = next(iter(self.unready), None) if is_full else None
            if oldest:
                del self.unready[oldest]
                self.connections.remove(oldest)
            may_come = oldest or not is_full
            if may_come or len(self.refused) < MAX_REFUSALS:
                (self.connections if may_come else self.refused).add(connection)
        if oldest:
            with contextlib.suppress(OSError):
                oldest.shutdown(socket.SHUT_RDWR)  # its thread's read ends now
        if may_come or connection in self.refused:
            self.admit(connection, client_address)
        else:
            self.forget(connection)

    def shutdown_request(self, connection: socket.socket) -> None:
        """As the server's."""
        with self.running.changed:
            self.unready.pop(connection, None)
            self.connections.discard(connection)
            self.refused.discard(connection)
        self.forget(connection)

    def get_request(self):
        """Accept a connection. When that fails, the listening socket stays readable: without a
        pause the loop would spin."""
        try:
            return self.accept()
        except OSError as error:
            server.log.warning("cannot accept a connection: %s", error)
            time.sleep(ACCEPT_PAUSE_SECONDS)
            raise

    def note(self, connection: socket.socket, waits: bool) -> None:
        """Note whether it is the client that must act."""
        with self.running.changed:
            if not waits:
                self.unready.pop(connection, None)
            elif connection in self.connections:  # not yet told to make room
                self.unready[connection] = None


class PatientHandler:
    """What stands in front of Handler's methods: it notes when the client must act."""

    def setup(self) -> None:
        super().setup()
        self.crowd = self.server.models.crowd
        self.room = select.poll()  # in the kernel's buffer, for what is written
        self.room.register(self.connection, select.POLLOUT)

    def await_request(self) -> bool:
        """As Connection.await_request."""
        self.crowd.note(self.connection, True)
        return super().await_request()

    def check_origin(self, knows_host: bool) -> None:
        """As Handler.check_origin; then, who is refused is told so. A small body is read, so that
        closing does not reset the connection."""
        super().check_origin(knows_host)
        if self.connection in self.crowd.refused:
            if (size := self.body_size()) <= server.SMALL_BODY:
                self.read_body(size, server.SMALL_BODY)
            self.close_connection = True
            raise server.unavailable(
                f"{self.server.config.max_connections} connections are open, which is the limit "
                "(max_connections)", "too_many_connections")

    def read_body(self, size: float, limit: int) -> bytes:
        """As Connection.read_body."""
        body = super().read_body(size, limit)
        self.crowd.note(self.connection, False)
        return body

    def write(self, data: bytes) -> None:
        """As Connection.write. A large answer, or one that the kernel has no room for, waits."""
        waits = len(data) > server.SMALL_BODY or not self.room.poll(0)
        if waits:
            self.crowd.note(self.connection, True)
        super().write(data)
        if waits:
            self.crowd.note(self.connection, False)


def start(running: server.Server) -> None:
    """Have the crowd decide who is let in."""
    crowd = running.models.crowd = Crowd(running)
    running.process_request, running.get_request = crowd.process_request, crowd.get_request
    running.shutdown_request = crowd.shutdown_request


class CountedModels:
    """What stands in front of Models' methods."""

    crowd: Crowd | None = None

    def samples(self) -> dict:
        """As Models.samples."""
        n_open = len(self.crowd.connections) if self.crowd else 0
        return {**super().samples(), "connections": ("open connections", n_open)}


METHODS = {"Handler": PatientHandler, "Models": CountedModels}
