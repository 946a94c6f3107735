"""Files that a request names: a data: URI, or an address on the web, into bytes.

From the web a file comes only from public addresses, also after a redirect, so that nobody reaches
through this server what is not public. It is no feature by itself: vision.py gets images here.
"""

import binascii
import contextlib
import http.client
import ipaddress
import socket
import time
import urllib.parse
from collections.abc import Callable

import server
from features.web import TooLarge, Unreachable, read_all, request_elsewhere


class ImageError(ValueError):
    """An image that cannot be read; the message says why."""


MAX_ABOUT = 200  # characters of a data: URI before its comma that are looked at
MAX_REDIRECTS = 3
IMAGE_SECONDS = 10.0  # for all images of a request that come from the web
MAX_IMAGES_MB = 20  # of all these together


def read_data_uri(url: str) -> bytes:
    """The file in a data: URI (RFC 2397) in Base64; its type says nothing. Raises ImageError."""
    about, comma, data = url.partition(",")
    if not comma or "base64" not in about[:MAX_ABOUT].lower().split(";"):
        raise ImageError("a data: URI must be like data:image/png;base64,...")
    try:
        return binascii.a2b_base64("".join(data.split()).encode("ascii"), strict_mode=True)
    except ValueError:
        raise ImageError("the data: URI is not valid Base64") from None


def fetch_image(url: str, until: float, limit: int, check: Callable[[], None]) -> bytes:
    """An image from the web: from public addresses only, also after a redirect, so that nobody
    reaches through us what is not public. until: time.monotonic(); limit: bytes; check: called all
    the time, may raise. Raises ImageError."""
    def check_both() -> None:
        check()
        if time.monotonic() > until:
            raise TimeoutError

    headers = {"Accept": "image/*", "User-Agent": server.NAME}
    try:
        for _ in range(MAX_REDIRECTS + 1):
            check_both()
            with request_elsewhere("GET", url, None, headers, IMAGE_SECONDS, check_both,
                                          public_address(url)) as response:
                location = response.headers.get("Location")
                if 300 <= response.status < 400 and location:
                    with contextlib.suppress(ValueError):  # else public_address says it
                        location = urllib.parse.urljoin(url, location)
                    url = location
                    continue
                if response.status != 200:
                    raise ImageError(f"{server.describe(url)} answered {response.status}")
                return read_all(response, limit)
    except TimeoutError:
        raise ImageError("fetching images takes more than the "
                         f"{IMAGE_SECONDS:g} seconds of a request") from None
    except TooLarge:
        raise ImageError("the images of a request that are fetched are more than "
                         f"{MAX_IMAGES_MB} MB") from None
    except (Unreachable, http.client.HTTPException) as error:
        raise ImageError(f"cannot fetch {server.describe(url)}: "
                         f"{server.describe(str(error))}") from None
    raise ImageError(f"more than {MAX_REDIRECTS} redirects")


def public_address(url: str) -> str:
    """One address of a URL's host, all of which must be public. Raises ImageError."""
    try:
        parts = urllib.parse.urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname or "@" in parts.netloc:
            raise ValueError
        found = socket.getaddrinfo(parts.hostname, parts.port or 0, type=socket.SOCK_STREAM)
    except (OSError, ValueError):
        raise ImageError(f"{server.describe(url)} is no address on the web") from None
    addresses = [entry[4][0] for entry in found]
    if not all(map(is_public, addresses)):
        raise ImageError(f"{server.describe(url)} is not at a public address")
    return addresses[0]


GLOBAL_UNICAST = ipaddress.ip_network("2000::/3")  # RFC 4291, 2.4
NAT64 = ipaddress.ip_network("64:ff9b::/96")  # RFC 6052


def is_public(text: str) -> bool:
    """Whether everybody can reach an address. One that stands for an IPv4 address is that."""
    address = server.read_address(text)
    if address is None or address.version == 4:
        return address is not None and address.is_global and not address.is_multicast
    inner = address.sixtofour or (address.teredo or (None, None))[1]
    if address in NAT64:
        inner = ipaddress.IPv4Address(int(address) % 2**32)
    return is_public(str(inner)) if inner else address in GLOBAL_UNICAST and address.is_global
