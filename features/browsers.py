"""Browsers: which web pages may use the server.

What for: pages that talk to the model from the browser of somebody who is at this machine. How it
works: by itself the server refuses requests that come from pages of elsewhere; this lets in those
of a list, and tells the browser, as the CORS protocol wants it
(https://fetch.spec.whatwg.org/#http-cors-protocol), that the page may read the answer: never with
credentials. A preflight needs no key. It costs microseconds a request. It reads the setting
`cors_origins` and the headers `Origin` and `Access-Control-Request-*`, and sends
`Access-Control-*`.
"""

import dataclasses

import server

PREFLIGHT_SECONDS = 600  # how long a browser may remember one


@dataclasses.dataclass
class Settings:
    """The origins of pages that may use the server."""

    cors_origins: list[str] = server.setting("server", (), like=(
        r"\*|null|[a-z][a-z0-9+.-]*://[^\s/]+", "like https://app.example"))


class CorsHandler:
    """What stands in front of Handler's methods."""

    def check_origin(self, knows_host: bool) -> None:
        """As Handler.check_origin; but pages of the list may come, and those that may, read."""
        origin, allowed = self.headers.get("origin"), self.server.config.cors_origins
        if origin is None:
            return
        if not (origin in allowed or "*" in allowed):
            super().check_origin(knows_host)
        self.answer_headers |= {"Access-Control-Allow-Origin": "*" if "*" in allowed else origin,
                                "Access-Control-Expose-Headers": "*", "Vary": "Origin"}
        wanted = self.headers.get("access-control-request-method")
        if self.command == "OPTIONS" and wanted:  # what it may really send, its answer tells
            self.answer_headers |= {
                "Access-Control-Allow-Methods": wanted,
                "Access-Control-Allow-Headers":
                    self.headers.get("access-control-request-headers", "Authorization"),
                "Access-Control-Max-Age": str(PREFLIGHT_SECONDS)}
            if "access-control-request-private-network" in self.headers:
                self.answer_headers["Access-Control-Allow-Private-Network"] = "true"


METHODS = {"Handler": CorsHandler}
