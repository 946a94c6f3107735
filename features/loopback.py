"""Loopback: the default address under both of its versions.

What for: clients that take `localhost` for ::1, and do not try 127.0.0.1 behind it. How it works:
where `host` is 127.0.0.1 and the machine has ::1, a second socket listens there, on the same port,
and hands its connections to the server. It costs a thread that waits. It reads the setting `host`,
and sends nothing.
"""

import contextlib
import socket
import socketserver
import threading
import time

import server

ACCEPT_PAUSE_SECONDS = 0.1  # when the process has no file descriptor left for a connection
POLL_SECONDS = 0.1  # between two looks at whether to end: the server's own end waits for one


class SecondSocket(socketserver.TCPServer):
    """Listens on ::1; the server answers. A connection there is like any other of the server's."""

    address_family = socket.AF_INET6
    allow_reuse_address = True
    request_queue_size = server.Server.request_queue_size

    def __init__(self, running: server.Server):
        """Raises OSError where there is no such address, or its port is taken."""
        self.running = running
        super().__init__(("::1", running.server_address[1]), server.Handler)

    def get_request(self):
        """Accept a connection. A socket that cannot stays readable: a pause, or the loop spins."""
        try:
            return super().get_request()
        except OSError:
            time.sleep(ACCEPT_PAUSE_SECONDS)
            raise

    def process_request(self, connection: socket.socket, client_address) -> None:
        """As the server's."""
        self.running.process_request(connection, client_address)

    def shutdown_request(self, connection: socket.socket) -> None:
        """As the server's."""
        self.running.shutdown_request(connection)

    def handle_error(self, request, client_address) -> None:
        """As the server's."""
        self.running.handle_error(request, client_address)


def start(running: server.Server) -> None:
    """Listen there, too, from when the server listens until it no longer does."""
    if running.config.host != "127.0.0.1":
        return
    activate, close = running.server_activate, running.server_close
    second: list[SecondSocket] = []

    def activate_both() -> None:
        activate()
        if not running.socket.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
            return  # a server of another kind, which listens nowhere
        with contextlib.suppress(OSError):
            second.append(SecondSocket(running))
            threading.Thread(target=second[0].serve_forever, args=(POLL_SECONDS,),
                             name="accept ::1", daemon=True).start()

    def close_both() -> None:
        for each in second:
            each.shutdown()
            each.server_close()
        close()

    running.server_activate, running.server_close = activate_both, close_both
