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

    def answer(self) -> None:
        """As Handler.answer; also OPTIONS: what a path takes, and to a browser, that a page may
        send it."""
        if self.command != "OPTIONS":
            return super().answer()
        self.tally.route = self.command
        self.check_origin(self.check_host())
        self.read_body(self.body_size(), server.SMALL_BODY)
        methods, asked = ", ".join([*self.methods_of_path(), self.command]), self.headers
        headers = {"Allow": methods}
        if "origin" in asked and "access-control-request-method" in asked:
            headers |= {"Access-Control-Allow-Methods": methods,
                        "Access-Control-Max-Age": str(PREFLIGHT_SECONDS),
                        "Access-Control-Allow-Headers":
                            asked.get("access-control-request-headers", "Authorization")}
            if "access-control-request-private-network" in asked:
                headers["Access-Control-Allow-Private-Network"] = "true"
        self.send_head(204, headers)

    def methods_of_path(self) -> list[str]:
        """The methods that the path takes. Raises ApiError 404."""
        routes = self.server.house.routes
        if self.path == "*":
            return sorted({method for method, _ in routes})
        try:
            server.find_route(routes, self.command, self.path)
        except server.ApiError as error:
            if error.status != 405:
                raise
            return error.headers["Allow"].split(", ")


METHODS = {"Handler": CorsHandler}
