"""Crowds: who makes room when all connections are taken.

What for: a server that others reach: clients that dawdle keep nobody out. How it works: at
`max_connections` the one that has kept the server waiting for longest, with its request or by not
reading an answer, makes room; if there is none, the newcomer is told why it is refused. It costs
microseconds a request, and a thread for each who is told. It reads no setting of its own, and sends
a 503.
"""

import contextlib
import select
import socket
import socketserver
import time
import weakref

import server

MAX_REFUSALS = 64  # connections above max_connections that are told why they are refused
ACCEPT_PAUSE_SECONDS = 0.1  # when the process has no file descriptor left for a connection


class Crowd:
    """The connections of a server that keep it waiting, oldest first."""

    def __init__(self, running: server.Server):
        self.running = running
        # Both are guarded by the server's `changed`.
        self.unready: dict[socket.socket, None] = {}
        self.refused: set[socket.socket] = set()  # not among the server's connections
        self.admit, self.accept = running.process_request, running.get_request
        self.forget = running.shutdown_request

    def process_request(self, connection: socket.socket, client_address) -> None:
        """As Server.process_request; but one that keeps us waiting makes room first, and where
        there is none, some are told."""
        running, oldest = self.running, None
        with running.changed:
            is_full = len(running.connections) >= running.config.max_connections
            if is_full:
                oldest = next((each for each in self.unready if each in running.connections), None)
            if oldest:
                del self.unready[oldest]
                running.connections.remove(oldest)
            tells = is_full and not oldest and len(self.refused) < MAX_REFUSALS
            if tells:
                self.refused.add(connection)
        if oldest:
            with contextlib.suppress(OSError):
                oldest.shutdown(socket.SHUT_RDWR)  # its thread's read ends now
        if tells:
            socketserver.ThreadingMixIn.process_request(self.running, connection, client_address)
        else:
            self.admit(connection, client_address)

    def shutdown_request(self, connection: socket.socket) -> None:
        """As Server.shutdown_request."""
        with self.running.changed:
            self.unready.pop(connection, None)
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
            elif connection in self.running.connections:  # not yet told to make room
                self.unready[connection] = None


class PatientHandler:
    """What stands in front of Handler's methods: it notes when the client must act."""

    def setup(self) -> None:
        super().setup()
        self.room = select.poll()  # in the kernel's buffer, for what is written
        self.room.register(self.connection, select.POLLOUT)

    def await_request(self) -> bool:
        """As Connection.await_request."""
        crowds[self.server].note(self.connection, True)
        return super().await_request()

    def body_size(self) -> float:
        """As Connection.body_size; but who is refused is told so. A small body is read, so that
        closing does not reset the connection."""
        size = super().body_size()
        if self.connection in crowds[self.server].refused:
            if size <= server.SMALL_BODY:
                self.read_body(size, server.SMALL_BODY)
            self.close_connection = True
            raise server.unavailable(
                f"{self.server.config.max_connections} connections are open, which is the limit "
                "(max_connections)", "too_many_connections")
        return size

    def read_body(self, size: float, limit: int) -> bytes:
        """As Connection.read_body."""
        body = super().read_body(size, limit)
        crowds[self.server].note(self.connection, False)
        return body

    def write(self, data: bytes) -> None:
        """As Connection.write. A large answer, or one that the kernel has no room for, waits."""
        waits = len(data) > server.SMALL_BODY or not self.room.poll(0)
        if waits:
            crowds[self.server].note(self.connection, True)
        super().write(data)
        if waits:
            crowds[self.server].note(self.connection, False)


crowds: "weakref.WeakKeyDictionary[server.Server, Crowd]" = weakref.WeakKeyDictionary()


def start(running: server.Server) -> None:
    """Have the crowd decide who is let in."""
    crowd = crowds[running] = Crowd(running)
    running.process_request, running.get_request = crowd.process_request, crowd.get_request
    running.shutdown_request = crowd.shutdown_request


METHODS = {"Handler": PatientHandler}
