"""Wire: HTTP/1.1 by the letter of RFC 9112.

What for: a server that stands behind a proxy, or in the open: what two servers could read
differently is refused (a bare CR or LF, a folded line, a blank in front of a colon, a header that
was sent twice), so that nobody smuggles a request in; and for clients that send bodies in chunks.
How it works: its methods stand in front of those of server.Handler, which reads heads as Python's
http.server does. It costs some microseconds a request. It reads heads and bodies, and sends `100
Continue`.
"""

import http.client
import math
import re

import server
from server import ApiError

MAX_TARGET = 8192  # bytes of a request line; nginx has the same
MAX_HEAD = 32768  # bytes of a head
MAX_HEADERS = 100
MAX_CHUNK_LINE = 256  # bytes of a chunk's size and extensions
METHODS_KNOWN = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")
ONCE = ("host", "content-length", "transfer-encoding", "authorization", "x-api-key", "origin",
        "connection", "expect")  # sent twice, two readers could choose differently
REQUEST_LINE = re.compile(r"([!#$%&'*+.^_`|~0-9A-Za-z-]+) ([!-~]+) HTTP/([0-9])\.([0-9])")
HEADER_LINE = re.compile(  # a value has no control characters but the tab
    r"([!#$%&'*+.^_`|~0-9A-Za-z-]+):([^\x00-\x08\x0a-\x1f\x7f]*)")
CHUNK_LINE = re.compile(r"([0-9A-Fa-f]{1,8})[ \t]*(?:;[^\x00-\x08\x0a-\x1f\x7f]*)?")


class StrictReader:
    """What stands in front of Handler's methods; `super()` is that."""

    def await_request(self) -> bool:
        """As Connection.await_request; old clients send an empty line behind a body."""
        comes = super().await_request()
        if comes and self.rfile.peek(1)[:2] == b"\r\n":
            self.rfile.read(2)
            comes = super().await_request()
        return comes

    def parse_request(self) -> bool:
        """As http.server's, from `raw_requestline` on. Raises ApiError, whose message quotes no
        line: it is logged, and a key may stand in the line."""
        self.close_connection = True
        too_long = ApiError(414, f"the request line is longer than {MAX_TARGET} bytes")
        match = REQUEST_LINE.fullmatch(ending(self.raw_requestline, MAX_TARGET, too_long))
        if not match:
            raise ApiError(400, "the request line is not `METHOD TARGET HTTP/1.1`")
        self.command, self.path, major, minor = match.groups()
        if major != "1":
            raise ApiError(505, f"HTTP/{major}.{minor} was sent; this server speaks HTTP/1.1")
        if self.command not in METHODS_KNOWN:
            raise ApiError(501, f"unknown method {server.describe(self.command)}")
        if not re.match("(?i)/|https?://", self.path) and (self.command, self.path) != (
                "OPTIONS", "*"):
            raise ApiError(400, "the target of the request line is not a path")
        self.request_version = "HTTP/1.0" if minor == "0" else "HTTP/1.1"
        self.headers = http.client.HTTPMessage()
        room, n_lines = MAX_HEAD, 0
        while line := self.read_line(room, ApiError(431, f"the head is over {MAX_HEAD} bytes")):
            room, n_lines = room - len(line), n_lines + 1
            if n_lines > MAX_HEADERS:
                raise ApiError(431, f"the request has more than {MAX_HEADERS} headers")
            match = HEADER_LINE.fullmatch(line)
            if not match:
                raise ApiError(400, f"line {n_lines} of the headers is malformed")
            self.headers[match[1]] = match[2].strip(" \t")
        if twice := [name for name in ONCE if len(self.headers.get_all(name, ())) > 1]:
            raise ApiError(400, f"the header {twice[0]} was sent twice")
        wish = re.split("[ \t,]+", self.headers.get("connection", "").lower())
        self.close_connection = "close" in wish or (
            self.request_version == "HTTP/1.0" and "keep-alive" not in wish)
        return True

    def read_line(self, limit: int, too_long: ApiError) -> str:
        """A line without its end."""
        return ending(self.rfile.readline(limit + 1), limit, too_long)

    def body_size(self) -> float:
        """As Connection.body_size; infinite for a chunked body, which tells its end itself. What is
        compressed is refused: it could unpack to anything."""
        packed = self.headers.get("content-encoding", "identity")
        if packed.lower() != "identity":
            raise ApiError(415, f"the body is compressed ({server.describe(packed)}); send it as "
                                "it is", code="unsupported_media_type")
        coding = self.headers.get("transfer-encoding")
        if coding is None:
            return super().body_size()
        has_length = "content-length" in self.headers
        if has_length or self.request_version == "HTTP/1.0":
            where = "beside Content-Length" if has_length else "in HTTP/1.0"
            raise ApiError(400, f"Transfer-Encoding was sent {where}")
        if coding.lower() != "chunked":
            raise ApiError(501, f"Transfer-Encoding: {server.describe(coding)} was sent; only "
                                "chunked is served")
        return math.inf

    def receive_body(self, size: float, limit: int) -> bytes:
        """As Connection.receive_body. Only now is it sure that the body is wanted."""
        expects = self.headers.get("expect", "").lower() == "100-continue" \
            and self.request_version != "HTTP/1.0"
        if expects and (size <= limit or size == math.inf):
            self.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        return self.read_chunked(limit) if size == math.inf else super().receive_body(size, limit)

    def read_chunked(self, limit: int) -> bytes:
        """A body in chunked transfer coding (RFC 9112, 7.1). Extensions and trailers mean nothing
        here. Raises ApiError."""
        malformed = ApiError(400, "the chunked body is malformed")
        body = bytearray()
        while True:
            size = CHUNK_LINE.fullmatch(self.read_line(MAX_CHUNK_LINE, malformed))
            if not size:
                raise malformed
            n_bytes = int(size[1], 16)
            if n_bytes == 0:
                break
            if len(body) + n_bytes > limit:
                raise ApiError(413, f"the body has more than {len(body)} bytes, the limit is "
                                    f"{limit} (max_body_mb)", code="body_too_large")
            body += super().receive_body(n_bytes, limit)
            if super().receive_body(2, limit) != b"\r\n":
                raise malformed
        for _ in range(MAX_HEADERS):
            line = self.read_line(MAX_TARGET, malformed)
            if not line:
                return bytes(body)
            if not HEADER_LINE.fullmatch(line):
                break
        raise malformed


def ending(line: bytes, limit: int, too_long: ApiError) -> str:
    """A line without its end, which is CR LF and nothing less. Raises ApiError."""
    if len(line) > limit:
        raise too_long
    if not line.endswith(b"\n"):
        raise ConnectionError("the client hung up")
    if not line.endswith(b"\r\n"):
        raise ApiError(400, "a line ends in a bare LF, not in CR LF")
    return line[:-2].decode("latin-1")


METHODS = {"Handler": StrictReader}
