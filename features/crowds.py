"""Crowds: who makes room when all connections are taken.

What for: a server that others reach: clients that dawdle keep nobody out. How it works: at
`max_connections` the one that has kept the server waiting for longest, with its request or by not
reading an answer, makes room; if there is none, the newcomer is refused. It costs microseconds a
request. It reads no setting of its own, and sends nothing.
"""

import contextlib
import select
import socket
import time
import weakref

import server

ACCEPT_PAUSE_SECONDS = 0.1  # when the process has no file descriptor left for a connection


class Crowd:
    """The connections of a server that keep it waiting, oldest first."""

    def __init__(self, running: server.Server):
        self.running = running
        self.unready: dict[socket.socket, None] = {}  # guarded by the server's `changed`
        self.admit, self.accept = running.process_request, running.get_request
        self.forget = running.shutdown_request

    def process_request(self, connection: socket.socket, client_address) -> None:
        """As Server.process_request; but one that keeps us waiting makes room first."""
        running, oldest = self.running, None
        with running.changed:
            served = [each for each, is_refused in running.connections.items() if not is_refused]
            if len(served) >= running.config.max_connections:
                oldest = next((each for each in self.unready if each in served), None)
            if oldest:
                del self.unready[oldest], running.connections[oldest]
        if oldest:
            with contextlib.suppress(OSError):
                oldest.shutdown(socket.SHUT_RDWR)  # its thread's read ends now
        self.admit(connection, client_address)

    def shutdown_request(self, connection: socket.socket) -> None:
        """As Server.shutdown_request."""
        with self.running.changed:
            self.unready.pop(connection, None)
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
