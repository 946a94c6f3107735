"""Requests of our own over HTTP: what elsewhere.py and files.py ask other servers with.

It is no feature by itself. Each request is watched: while it waits, a function is called again and
again, which may raise, so that a client that hangs up or a server that stops ends it at once.
"""

import contextlib
import functools
import http.client
import io
import select
import socket
import ssl
import time
import urllib.parse
from collections.abc import Callable, Iterator

from server import POLL_SECONDS

CONNECT_SECONDS = 10.0
PIECE = 65536  # bytes passed on at a time, at most
MAX_PIECE = 2**20  # bytes of a line


class Unreachable(Exception):
    """No connection; the message is the system's reason."""


class WatchedConnection(io.RawIOBase):
    """A connection to another server. `check` is called all the time, and may raise. Raises
    TimeoutError after `seconds` without progress, http.client.HTTPException when it breaks."""

    def __init__(self, connection: socket.socket, seconds: float, check: Callable[[], None]):
        self.connection, self.seconds, self.check = connection, seconds, check
        connection.setblocking(False)
        self.file = io.BufferedReader(self)

    def readable(self) -> bool:
        return True

    def wait(self, event: int) -> None:
        """Wait until the connection can be read (select.POLLIN) or written (POLLOUT)."""
        poll, until = select.poll(), time.monotonic() + self.seconds
        poll.register(self.connection, event)
        while not poll.poll(POLL_SECONDS * 1000):
            self.check()
            if time.monotonic() > until:
                raise TimeoutError

    def readinto(self, buffer) -> int:
        self.check()
        while True:
            try:
                return self.connection.recv_into(buffer)
            except (BlockingIOError, ssl.SSLWantReadError):
                self.wait(select.POLLIN)
            except OSError as error:
                raise http.client.HTTPException(str(error)) from None

    def send(self, data: bytes) -> None:
        """Send it all, unless the other side closes: it may have answered already."""
        view = memoryview(data)
        with contextlib.suppress(ConnectionError):
            while view:
                try:
                    view = view[self.connection.send(view[:PIECE]):]
                except (BlockingIOError, ssl.SSLWantWriteError):
                    self.wait(select.POLLOUT)

    def makefile(self, _mode: str) -> io.BufferedReader:
        """What http.client asks of a socket; the same for a response that follows another."""
        return self.file


@functools.cache
def tls_context() -> ssl.SSLContext:
    """The system's certificates, read once."""
    return ssl.create_default_context()


@contextlib.contextmanager
def request_elsewhere(method: str, url: str, body: bytes | None, headers: dict[str, str],
                      seconds: float, check: Callable[[], None], address: str | None = None
                      ) -> Iterator[http.client.HTTPResponse]:
    """An HTTP request to another server, without following redirects. address: where to connect,
    in place of what the name in the URL resolves to. Raises Unreachable, TimeoutError (see
    WatchedConnection), http.client.HTTPException."""
    parts = urllib.parse.urlsplit(url)
    is_tls = parts.scheme == "https"
    with contextlib.ExitStack() as stack:
        try:
            client = http.client.HTTPConnection(parts.hostname, parts.port or (80, 443)[is_tls])
            client.default_port = (80, 443)[is_tls]  # is not named in the Host header
            connection = stack.enter_context(socket.create_connection(
                (address or parts.hostname, client.port), min(seconds, CONNECT_SECONDS)))
            if is_tls:
                connection = stack.enter_context(tls_context().wrap_socket(
                    connection, server_hostname=parts.hostname))
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            client.sock = connection
            target = urllib.parse.urlunsplit(("", "", parts.path or "/", parts.query, ""))
            length = {"Content-Length": str(len(body))} if body is not None else {}
            client.request(method, target, None, headers | length)
        except (OSError, ValueError) as error:  # ValueError: a port or name that cannot be
            raise Unreachable(getattr(error, "strerror", None) or str(error)) from None
        watched = WatchedConnection(connection, seconds, check)
        watched.send(body or b"")
        stack.callback(watched.file.close)
        responses: list[http.client.HTTPResponse] = []  # one that is let go closes the connection
        while not responses or responses[-1].status < 200:  # 1xx are hints before the answer
            responses.append(http.client.HTTPResponse(watched, method=method))
            responses[-1].begin()
            if responses[-1].status == 101 or responses[-1].status >= 600:
                raise http.client.HTTPException(f"status {responses[-1].status}")
        yield responses[-1]


class TooLarge(http.client.HTTPException):
    """A body is larger than what we take."""


def read_pieces(response: http.client.HTTPResponse) -> Iterator[bytes]:
    """A body as it arrives. Raises http.client.HTTPException when it is malformed or breaks off."""
    try:
        while piece := response.read1(PIECE):
            yield piece
    except ValueError as error:  # the size of a chunk is none
        raise http.client.HTTPException(str(error)) from None
    if response.length:
        raise http.client.IncompleteRead(b"", response.length)


def read_all(response: http.client.HTTPResponse, limit: int) -> bytes:
    """A body of at most `limit` bytes. Raises TooLarge, http.client.HTTPException."""
    body = bytearray()
    for piece in read_pieces(response):
        body += piece
        if len(body) > limit:
            raise TooLarge
    return bytes(body)


def read_lines(response: http.client.HTTPResponse, limit: int) -> Iterator[bytes]:
    """The lines of a body of at most `limit` bytes, as read_all."""
    rest, n_bytes = b"", 0
    for piece in read_pieces(response):
        *lines, rest = (rest + piece).split(b"\n")
        n_bytes += len(piece)
        if n_bytes > limit or len(rest) > MAX_PIECE:
            raise TooLarge
        yield from lines
    yield rest
