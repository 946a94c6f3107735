"""Rates: how many requests a client may send.

What for: a server that several share: none of them takes it all, and keys cannot be guessed by the
thousand. How it works: a token bucket for each key, or else for each address; it holds the requests
of a minute and fills evenly, so that a minute's requests may come at once. Who has none left gets a
429 that says when to come again. It costs microseconds a request. It reads the settings
`rate_limiting_enabled` and `requests_per_minute`, and sends the headers `x-ratelimit-*` and
`Retry-After`.
"""

import dataclasses
import ipaddress
import math
import threading
import time
import weakref

import server

MAX_BUCKETS = 10_000  # clients that are remembered


@dataclasses.dataclass
class Settings:
    """Whether requests are counted, and how many there may be."""

    rate_limiting_enabled: bool = server.setting("rate_limiting", False)
    requests_per_minute: int = server.setting("rate_limiting", 60, low=1, high=10**6)


class RateLimiter:
    """A token bucket for each client."""

    def __init__(self, per_minute: int):
        self.per_minute = per_minute
        self.lock = threading.Lock()
        self.buckets: dict[str, tuple[float, float]] = {}  # client: (requests left, when)

    def take(self, client: str) -> dict[str, str]:
        """Count one request; return the headers that tell what is left. Raises ApiError 429."""
        now, seconds_each = time.monotonic(), 60 / self.per_minute
        with self.lock:
            left, then = self.buckets.pop(client, (self.per_minute, now))
            left = min(self.per_minute, left + (now - then) / seconds_each)
            may = left >= 1
            left -= may
            self.buckets[client] = (left, now)  # the last place: seen last
            if len(self.buckets) > MAX_BUCKETS:
                del self.buckets[next(iter(self.buckets))]
        headers = {"x-ratelimit-limit-requests": str(self.per_minute),
                   "x-ratelimit-remaining-requests": str(int(left)),
                   "x-ratelimit-reset-requests":
                       f"{(self.per_minute - left) * seconds_each:.3f}s"}
        if not may:
            wait = math.ceil((1 - left) * seconds_each)
            raise server.ApiError(
                429, f"{self.per_minute} requests a minute are allowed; the next one in {wait} "
                     "seconds", code="rate_limit_exceeded",
                headers=headers | {"Retry-After": str(wait)})
        return headers


def client_of(address: str) -> str:
    """Who an address belongs to: an IPv6 client has a whole /64 to come from."""
    ip = server.read_address(address)
    return str(ip) if ip.version == 4 else str(ipaddress.ip_network((ip, 64), strict=False))


class CountingHandler:
    """What stands in front of Handler's methods."""

    def authorise(self) -> None:
        """As Handler.authorise. Wrong keys count, too, for the address that they come from."""
        try:
            super().authorise()
        finally:  # a 429 goes before a 401
            if limiter := limiters.get(self.server):
                client = f"key {self.key}" if self.key else client_of(self.client_address[0])
                self.answer_headers |= limiter.take(client)


limiters: "weakref.WeakKeyDictionary[server.Server, RateLimiter]" = weakref.WeakKeyDictionary()


def start(running: server.Server) -> None:
    """Give the server its limiter."""
    if running.config.rate_limiting_enabled:
        limiters[running] = RateLimiter(running.config.requests_per_minute)


METHODS = {"Handler": CountingHandler}
