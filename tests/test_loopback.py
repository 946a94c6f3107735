"""Loopback: `localhost` is served, whichever address a client takes it for."""

import socket
import threading

import httpx
import pytest

import conftest
import server
from test_limits import listening, wait_for


def has_ipv6() -> bool:
    try:
        with socket.create_server(("::1", 0), family=socket.AF_INET6):
            return True
    except OSError:
        return False


@pytest.mark.skipif(not has_ipv6(), reason="this machine has no ::1")
def test_the_default_address_answers_under_both_versions():
    """And under neither when it has been closed; another host is just that one."""
    with listening() as running:
        port = running.server_port
        for host in ("127.0.0.1", "[::1]"):
            assert httpx.get(f"http://{host}:{port}/").json()["name"] == "twofile"
        wait_for(lambda: sum(running.answered.values()) == 2)
    for host in ("127.0.0.1", "[::1]"):
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"http://{host}:{port}/")
    with listening(host="127.0.0.2") as running, pytest.raises(httpx.ConnectError):
        httpx.get(f"http://[::1]:{running.server_port}/")


@pytest.mark.skipif(not has_ipv6(), reason="this machine has no ::1")
def test_a_server_that_listens_nowhere_does_not_listen_there_either(monkeypatch):
    """As the replicas of examples/ray_serve.py."""
    monkeypatch.setattr(server.Server, "server_activate", lambda self: None)
    running = server.Server(conftest.config(port=0))
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("::1", running.server_port), timeout=5)
    running.server_close()


@pytest.mark.skipif(not has_ipv6(), reason="this machine has no ::1")
def test_a_port_that_is_taken_there_is_no_hindrance():
    with socket.create_server(("::1", 0), family=socket.AF_INET6) as other:
        running = server.Server(conftest.config(port=other.getsockname()[1]))
        threading.Thread(target=running.serve_forever, args=(0.02,), daemon=True).start()
        assert httpx.get(f"http://127.0.0.1:{running.server_port}/").status_code == 200
        running.drain()
