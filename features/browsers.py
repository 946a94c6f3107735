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
            try:
                super().check_origin(knows_host)
            except server.ApiError as error:
                error.message += "; if they should, add the origin to cors_origins"
                raise
        self.answer_headers |= {"Access-Control-Allow-Origin": "*" if "*" in allowed else origin,
                                "Access-Control-Expose-Headers": "*", "Vary": "Origin"}

    def routes_here(self) -> dict:
        """As Handler.routes_here; every path takes OPTIONS, and `*`, which is all of them, only
        that."""
        found = {} if self.path == "*" else super().routes_here()
        pattern = next((pattern for pattern, _, _ in found.values()), "*")
        taken = found or {"HEAD", *(method for method, _ in self.server.house.routes)}
        methods = ", ".join(sorted({*taken, "OPTIONS"}))
        return found | {"OPTIONS": (pattern, OPTIONS, (methods,))}


def options(handler: server.Handler, methods: str) -> None:
    """What a path takes; to a browser, that a page may send it (a preflight)."""
    asked, headers = handler.headers, {"Allow": methods}
    if "origin" in asked and "access-control-request-method" in asked:
        headers |= {"Access-Control-Allow-Methods": methods,
                    "Access-Control-Max-Age": str(PREFLIGHT_SECONDS),
                    "Access-Control-Allow-Headers":
                        asked.get("access-control-request-headers", "Authorization")}
        if "access-control-request-private-network" in asked:
            headers["Access-Control-Allow-Private-Network"] = "true"
    handler.send_head(204, headers)


OPTIONS = server.Route(options, "what a path takes", is_public=True)
METHODS = {"Handler": CorsHandler}
