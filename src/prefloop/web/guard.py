"""What stands before every route of a local page: who may ask, how much they may send, what the browser may do.

A page on the loopback is reachable from every site open in the same browser. The `Host` allow-list stops DNS
rebinding, the check of `Origin` and `Sec-Fetch-Site` stops cross-site writes, and the content policy stops whatever
text might do if it ever became markup.
"""

from __future__ import annotations

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from prefloop.serving import TooLargeError, loopback_hosts, read_body

MAX_BODY_BYTES = 16 * 1024

CONTENT_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
    "form-action 'self'; frame-ancestors 'none'; base-uri 'none'"
)
SECURITY_HEADERS = {
    "content-security-policy": CONTENT_POLICY,
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-store",
}


class Guard:
    """ASGI middleware that refuses what does not come from a page of ours; `port` is the one that is served."""

    def __init__(self, app: ASGIApp, port: int) -> None:
        self.app = app
        self.hosts = loopback_hosts(port)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, or refuse it with 400, 403, 405, 413 or 415."""
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":
            return  # there are no WebSockets here
        send = _with_security_headers(send)
        refusal = self.refusal(scope["method"], Headers(scope=scope))
        if refusal is not None:
            await _refuse(*refusal)(scope, receive, send)
            return
        try:
            body = await read_body(receive, MAX_BODY_BYTES)
        except TooLargeError:
            await _refuse(413, f"the body is larger than {MAX_BODY_BYTES} bytes")(scope, receive, send)
            return
        await self.app(scope, _replay(body, receive), send)

    def refusal(self, method: str, headers: Headers) -> tuple[int, str] | None:
        """The status and reason with which a request is refused, or None."""
        hosts = headers.getlist("host")
        if len(hosts) != 1 or hosts[0].lower() not in self.hosts:
            return 400, "this host is not served here"
        if method in ("GET", "HEAD"):
            return None
        if method != "POST":
            return 405, "only GET, HEAD and POST are served here"
        if not self._is_same_origin(headers):
            return 403, "this request does not come from the page"
        if headers.get("content-type", "").split(";")[0].strip().lower() != "application/json":
            return 415, "the body should be application/json"
        length = headers.get("content-length", "0")
        if not length.isdigit() or int(length) > MAX_BODY_BYTES:
            return 413, f"the body is larger than {MAX_BODY_BYTES} bytes"
        return None

    def _is_same_origin(self, headers: Headers) -> bool:
        """Whether the browser says so: every header that it sent agrees, and it sent at least one."""
        origins, sites = headers.getlist("origin"), headers.getlist("sec-fetch-site")
        own = f"http://{headers['host'].lower()}"
        return bool(origins or sites) and all(o == own for o in origins) and all(s == "same-origin" for s in sites)


def _refuse(status: int, reason: str) -> JSONResponse:
    return JSONResponse({"error": reason}, status, {"connection": "close"})


def _replay(body: bytes, receive: Receive) -> Receive:
    pending: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replayed() -> Message:
        return pending.pop() if pending else await receive()

    return replayed


def _with_security_headers(send: Send) -> Send:
    async def secured(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = MutableHeaders(scope=message)
            for name, value in SECURITY_HEADERS.items():
                headers[name] = value
        await send(message)

    return secured
