"""The engine as a Ray Serve deployment: replicas over a cluster, as many as the load asks for.

On one machine, where server.py, features/ and `ray[serve]` are installed:

    serve run examples.ray_serve:app

On a cluster, from any of its machines; --working-dir takes the code, not the models, to the others:

    serve start --http-host 0.0.0.0 --http-port 8080
    HOST=0.0.0.0 API_KEYS=one,two MODEL_PATH=hf:owner/repository/file.gguf N_THREADS=8 \\
        serve run --working-dir . examples.ray_serve:app min_replicas=2 max_replicas=16 num_gpus=0

The settings are server.py's, from config.yaml and the environment of `serve run`, but `port`: Ray
listens, on 127.0.0.1:8000 if not told otherwise. MODEL_PATH is a hf: name, or a path that each
machine has. N_THREADS is how many processors Ray reserves for a replica, 1 unless set.

All paths and replies are server.py's. `x-replica` says who gave one: /health, /slots and /metrics
tell of that replica only, and the rate limit and the cache of prompts are each replica's own.
"""

import asyncio
import dataclasses
import http.client
import io
import logging
import os
import socket
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pydantic
from ray import serve
from starlette.requests import Request
from starlette.responses import StreamingResponse

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import server

# Headers of one connection only, and those that Ray writes itself.
NOT_FROM_CLIENT = {b"connection", b"content-length", b"expect", b"transfer-encoding"}
NOT_TO_CLIENT = {"connection", "date", "transfer-encoding", "x-request-id"}


class ReplicaHandler(server.Handler):
    """Answers on a socket that is no TCP socket, under the id that Ray has given the request."""

    disable_nagle_algorithm = False

    def answer(self) -> None:
        self.tally.id = server.printable(self.headers.get("x-request-id", self.tally.id))
        super().answer()


PIECE = 65536  # bytes passed on at a time, at most


class Server(server.Server):
    """A server that listens nowhere; process_request gives it its connections."""

    def server_bind(self) -> None:
        self.server_name, self.server_port = self.config.host, self.config.port

    def server_activate(self) -> None:
        pass

    def finish_request(self, connection: socket.socket, client_address) -> None:
        self.house.type_of(ReplicaHandler)(connection, client_address, self)


@serve.deployment
class Replica:
    """One engine. Each request is passed to a server.Handler through a pair of sockets, so that
    reading, checking, answering and noticing who hangs up are server.py's."""

    def __init__(self, settings: dict):
        """settings: of server.Config, as plain values: its class, made of features, cannot travel."""
        logging.basicConfig(level=logging.INFO, stream=sys.stdout, format="%(asctime)s %(message)s")
        house = server.load_features(settings["features"])
        self.server = Server(server.read_object(house.Config, settings, "", server.Reading(house)))
        self.name = serve.get_replica_context().replica_id.unique_id
        self.server.models.start()
        if self.server.models.fatal_error:
            raise RuntimeError(self.server.models.fatal_error)

    def check_health(self) -> None:
        """Ray asks every few seconds, and replaces a replica that raises."""
        if self.server.models.health()["status"] == "stalled":
            raise RuntimeError("a step of the engine takes longer than stall_seconds")

    async def __call__(self, request: Request) -> StreamingResponse:
        answer = self.answer(request, await request.body())
        status, headers = await anext(answer)
        return StreamingResponse(answer, status, headers)

    async def answer(self, request: Request, body: bytes) -> AsyncIterator:
        """Yield the status and headers, then the body piece by piece as the handler writes it.
        When the client hangs up, Ray cancels this; that hangs up on the handler, too, and frees
        the slot."""
        client = request.client.host if request.client else ""  # or what a proxy here says it is
        ours, theirs = socket.socketpair()
        reader, writer = await asyncio.open_unix_connection(sock=ours)
        try:
            address = client if server.read_address(client) else "127.0.0.1"
            self.server.process_request(theirs, (address, 0))
            target = request.scope.get("raw_path") or request.url.path.encode()
            sent = [header for header in request.headers.raw if header[0] not in NOT_FROM_CLIENT]
            sent += [(b"connection", b"close"), (b"content-length", b"%d" % len(body))]
            writer.write(b"%b %b HTTP/1.1\r\n" % (request.method.encode(), target) + b"".join(
                b"%b: %b\r\n" % header for header in sent) + b"\r\n" + body)

            status = int((await reader.readline()).split()[1])
            head = http.client.parse_headers(io.BytesIO(await reader.readuntil(b"\r\n\r\n")))
            yield status, {"x-replica": self.name} | {
                name: value for name, value in head.items() if name.lower() not in NOT_TO_CLIENT}
            if "Transfer-Encoding" in head:  # chunks (RFC 9112, 7.1); the empty one is the last
                while size := int(await reader.readline(), 16):
                    yield (await reader.readexactly(size + 2))[:-2]
            else:
                while piece := await reader.read(PIECE):
                    yield piece
        finally:
            writer.close()


class Scale(pydantic.BaseModel):
    """What may stand behind the app's name in `serve run`."""

    min_replicas: int = 2
    max_replicas: int = 4
    num_gpus: float = 0  # of each replica


def app(scale: Scale) -> serve.Application:
    """Replicas come and go so that each has about as many requests as slots. One that gets more
    has the next request at hand when a slot is free; the others wait in Ray, for any replica."""
    config = server.load_config([], os.environ)
    # Replicas that each took all processors of their machine would stand in each other's way.
    config = dataclasses.replace(config, n_threads=config.n_threads or 1)
    return Replica.options(
        autoscaling_config={"min_replicas": scale.min_replicas, "max_replicas": scale.max_replicas,
                            "target_ongoing_requests": config.parallel},
        max_ongoing_requests=2 * config.parallel, max_queued_requests=config.max_queue,
        graceful_shutdown_timeout_s=config.drain_seconds,
        ray_actor_options={"num_cpus": config.n_threads, "num_gpus": scale.num_gpus},
    ).bind(dataclasses.asdict(config))
