"""What the servers of this machine share: their socket, their hosts, and bodies of a bounded length."""

from __future__ import annotations

import importlib.util
import socket
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from prefloop.records import PrefloopError

LOOPBACK = ("127.0.0.1", "localhost", "::1")

Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]


class TooLargeError(Exception):
    """A request's body is larger than is allowed."""


def require_packages(what: str, *packages: str) -> None:
    """Check that these packages of the extra `web` are installed.

    Raises:
        PrefloopError: `what` needs some that are not.
    """
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise PrefloopError(f"{what} needs {', '.join(missing)}: pip install 'prefloop[web]'")


def loopback_hosts(port: int) -> frozenset[str]:
    """What `Host` may say where the loopback is served: another name was made to point here (DNS rebinding)."""
    return frozenset(f"{name}:{port}" for name in ("127.0.0.1", "localhost", "[::1]"))


def bind(host: str, port: int, option: str = "--port") -> socket.socket:
    """A listening socket; port 0 takes a free one.

    Raises:
        PrefloopError: the host or port cannot be had.
    """
    bound = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind((host, port))
        bound.listen(128)
    except (OSError, OverflowError) as error:
        bound.close()
        reason = getattr(error, "strerror", None) or str(error)
        raise PrefloopError(f"port {port} of {host} cannot be used ({reason}): choose another with {option}") from None
    return bound


def url_of(bound: socket.socket) -> str:
    """The address of a listening socket, without a slash at its end."""
    host, port = bound.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


async def read_body(receive: Receive, limit: int) -> bytes:
    """The whole body of a request, whatever length was announced.

    Raises:
        TooLargeError: it is larger than `limit` bytes.
    """
    body, more = b"", True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            break
        body += message.get("body", b"")
        more = message.get("more_body", False)
        if len(body) > limit:
            raise TooLargeError
    return body
