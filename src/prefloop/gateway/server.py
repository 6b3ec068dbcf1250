"""The gateway on the network: OpenAI's endpoint, and the routes that open and close episodes."""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
import threading
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING
from urllib.parse import unquote

from prefloop.environments.base import Outcome
from prefloop.environments.outcomes import OUTCOME_KEYS, read_outcome
from prefloop.gateway.core import Gateway, key_of
from prefloop.gateway.episodes import BEGAN_MIDWAY, Name
from prefloop.gateway.refusal import RefusedError
from prefloop.gateway.replies import Replies, as_refusal, respond
from prefloop.gateway.wire import encoded, read_json, read_request
from prefloop.records import JSONObject, PrefloopError
from prefloop.serving import LOOPBACK, TooLargeError, bind, loopback_hosts, read_body, require_packages, url_of

if TYPE_CHECKING:
    from starlette.types import Message, Receive, Scope, Send

HOW_TO_NAME = (
    "say which task and episode this is: headers X-Prefloop-Task and X-Prefloop-Episode, or the API key "
    "TOKEN/TASK/EPISODE (none/TASK/EPISODE where no token is set), percent-encoded"
)
OTHER_APIS = ("/v1/responses", "/v1/completions", "/v1/messages", "/v1/embeddings")
CHAT_INSTEAD = ": set the client to chat completions (POST /v1/chat/completions)"
BODY_DEADLINE_S = 30
SPARE_CONNECTIONS = 256  # beyond two for each episode or request in flight: idle ones, graders, people
log = logging.getLogger(__name__)
_OUTCOME_KEYS = OUTCOME_KEYS | {"task", "episode", "reason"}


class App:
    """The gateway as an ASGI application.

    Args:
        gateway: what answers.
        model: the name that replies bear.
        token: the API key that is asked for; empty for none.
        port: the port of the loopback that is served; None where any host may be named.
    """

    def __init__(self, gateway: Gateway, model: str, token: str, port: int | None) -> None:
        self._gateway = gateway
        self._model = model
        self._token = token.encode()
        self._hosts = None if port is None else loopback_hosts(port)
        self._replies: Replies | None = None
        self._routes: dict[tuple[str, str], Callable[..., Awaitable[JSONObject]]] = {
            ("GET", "/health"): self._health,
            ("GET", "/v1/models"): self._models,
            ("GET", "/episodes"): self._episodes,
            ("POST", "/episodes"): self._open,
            ("POST", "/outcome"): self._outcome,
        }

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        if scope["type"] != "http":
            return
        begun = False

        async def watched(message: Message) -> None:
            nonlocal begun
            begun = True
            await send(message)

        try:
            await self._answer(scope, receive, watched)
        except Exception as error:  # a fault met by one request is its client's to hear of, and nobody else's
            if not isinstance(error, PrefloopError):
                log.exception("a request failed")
            if begun:
                raise
            refusal = as_refusal(error)
            closing = {"connection": "close"} if refusal.status == 408 else {}
            await respond(send, refusal.status, encoded(refusal.body()), refusal.headers() | closing)

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = {name: value.decode("latin-1") for name, value in scope["headers"]}
        path, method = scope["path"].rstrip("/"), scope["method"]
        self._check_host(headers)
        name = self._authorized(headers, needed=path != "/health")
        if (method, path) == ("POST", "/v1/chat/completions"):
            asked = read_request(await self._body(headers, receive), self._gateway.settings.ignore)
            if self._replies is None:
                self._replies = Replies(self._gateway, self._model)
            await self._replies.answer(_whole(name), asked, receive, send)
            return
        route = self._routes.get((method, path))
        if route is None:
            advice = CHAT_INSTEAD if path in OTHER_APIS else ""
            raise RefusedError(404, "unknown_route", f"{method} {path} is not served here{advice}")
        body = await self._body(headers, receive) if method == "POST" else {}
        await respond(send, 200, encoded(await route(name, body)))

    def _check_host(self, headers: dict[bytes, str]) -> None:
        if self._hosts is not None and headers.get(b"host", "").lower() not in self._hosts:
            raise RefusedError(400, "unknown_host", "this host is not served here")

    def _authorized(self, headers: dict[bytes, str], *, needed: bool) -> Name:
        """The task and episode that a request names, empty where it does not."""
        scheme, _, key = headers.get(b"authorization", "").partition(" ")
        token, *suffix = key.strip().split("/") if scheme.lower() == "bearer" else [""]
        if needed and self._token and not hmac.compare_digest(token.encode("latin-1"), self._token):
            raise RefusedError(
                401, "invalid_api_key", "the API key should be the gateway's token, or TOKEN/TASK/EPISODE"
            )
        named = tuple(_unquoted(part) for part in suffix) if len(suffix) == 2 else ("", "")
        task = _unquoted(headers.get(b"x-prefloop-task", "")) or named[0]
        return task, _unquoted(headers.get(b"x-prefloop-episode", "")) or named[1]

    async def _body(self, headers: dict[bytes, str], receive: Receive) -> JSONObject:
        if headers.get(b"content-type", "").split(";")[0].strip().lower() != "application/json":
            raise RefusedError(415, "unsupported_media_type", "the body should be application/json")
        limit = self._gateway.settings.max_body_bytes
        too_large = RefusedError(413, "body_too_large", f"the body is larger than {limit} bytes")
        length = headers.get(b"content-length", "0")
        if not length.isdigit() or int(length) > limit:
            raise too_large
        try:
            async with asyncio.timeout(BODY_DEADLINE_S):
                return read_json(await read_body(receive, limit))
        except TooLargeError:
            raise too_large from None
        except TimeoutError:
            raise RefusedError(
                408, "body_too_slow", f"the body did not come within {BODY_DEADLINE_S} s", retry_after_s=1
            ) from None

    # --- routes -------------------------------------------------------------------------------------------------

    async def _health(self, _name: Name, _body: JSONObject) -> JSONObject:
        return {"status": "ok", "open_episodes": len(self._gateway.states())}

    async def _models(self, _name: Name, _body: JSONObject) -> JSONObject:
        model = {"id": self._model, "object": "model", "created": 0, "owned_by": "prefloop"}
        return {"object": "list", "data": [model]}

    async def _episodes(self, _name: Name, _body: JSONObject) -> JSONObject:
        return {"episodes": self._gateway.states()}

    async def _open(self, name: Name, body: JSONObject) -> JSONObject:
        _check_keys(body, {"task", "episode"})
        name = _whole((_text(body, "task") or name[0], _text(body, "episode") or name[1]))
        return self._gateway.open(name).state()

    async def _outcome(self, name: Name, body: JSONObject) -> JSONObject:
        _check_keys(body, _OUTCOME_KEYS)
        task, episode = _text(body, "task") or name[0], _text(body, "episode") or name[1]
        name = self._gateway.named(episode) if episode and not task else _whole((task, episode))
        outcome, reason = _outcome_in(body), _text(body, "reason")
        trajectory = await asyncio.to_thread(self._gateway.post, name, outcome, reason)
        shown: JSONObject = {"task": name[0], "episode": name[1]}
        if trajectory is None:
            return shown
        return {
            **shown,
            "trajectory": trajectory.id,
            "ended": trajectory.ended.value,
            "num_turns": trajectory.num_turns,
            "num_threads": len(trajectory.threads),
            **({BEGAN_MIDWAY: True} if BEGAN_MIDWAY in trajectory.extra else {}),
        }


def _unquoted(part: str) -> str:
    try:
        return unquote(part, errors="strict")
    except UnicodeDecodeError:  # other bytes of the kind would name the same
        raise RefusedError(400, "invalid_name", f"{part!r} is no percent-encoded UTF-8") from None


def _whole(name: Name) -> Name:
    if not all(name):
        raise RefusedError(400, "episode_needed", HOW_TO_NAME)
    return name


def _check_keys(body: JSONObject, known: set[str] | frozenset[str]) -> None:
    unknown = sorted(body.keys() - known)
    if unknown:
        raise RefusedError(400, "unknown_key", f"unknown key {unknown[0]}; known: {', '.join(sorted(known))}")


def _text(body: JSONObject, key: str) -> str:
    value = body.get(key)
    if value is not None and not isinstance(value, str):
        raise RefusedError(400, "invalid_value", f"{key} should be a string, not {json.dumps(value)[:60]}", param=key)
    return value or ""


def _outcome_in(body: JSONObject) -> Outcome | None:
    try:
        return read_outcome(body)
    except PrefloopError as error:
        raise RefusedError(400, "invalid_value", str(error)) from None


class GatewayServer:
    """A gateway served from a thread of its own; `close` ends it.

    Args:
        gateway: what answers.
        model: the name that replies bear.
        host: where it listens; any but the loopback needs a token.
        port: 0 takes a free one; the settings' when left out.
        token: the API key that agents must send; empty for none.
        grace_s: how long replies in the making may take when it is closed.

    Raises:
        PrefloopError: the extra `web` is missing, the port cannot be had, or a host that others reach has no token.
    """

    def __init__(
        self,
        gateway: Gateway,
        *,
        model: str = "policy",
        host: str = "127.0.0.1",
        port: int | None = None,
        token: str = "",
        grace_s: float = 5.0,
    ) -> None:
        require_packages("the gateway", "starlette", "uvicorn")
        import uvicorn

        _check_token(host, token)
        self._gateway, self._token = gateway, token
        bound = bind(host, gateway.settings.port if port is None else port)
        self.url = url_of(bound)
        app = App(gateway, model, token, bound.getsockname()[1] if host in LOOPBACK else None)
        config = uvicorn.Config(
            app, log_level="warning", access_log=False, server_header=False, proxy_headers=False, lifespan="off",
            ws="none", timeout_keep_alive=75, timeout_graceful_shutdown=max(1, round(grace_s)),
            callback_notify=self._tick, timeout_notify=0,
            limit_concurrency=SPARE_CONNECTIONS + 2 * max(gateway.settings.max_queue, gateway.settings.max_episodes),
        )  # fmt: skip
        self._server = uvicorn.Server(config)
        self._keeper = ThreadPoolExecutor(1, thread_name_prefix="prefloop-keeper")
        self._keeping: asyncio.Future[PrefloopError | None] | None = None
        self._thread = threading.Thread(target=self._server.run, args=([bound],), name="prefloop-gateway", daemon=True)
        self._thread.start()
        started = threading.Event()
        while not self._server.started and self._thread.is_alive():
            started.wait(0.005)

    @property
    def base_url(self) -> str:
        """What an agent's `base_url` is set to."""
        return f"{self.url}/v1"

    def environment(self, name: Name) -> dict[str, str]:
        """Variables under which an unmodified agent asks this gateway, in this episode."""
        return {"OPENAI_BASE_URL": self.base_url, "OPENAI_API_KEY": key_of(name, self._token)}

    def __enter__(self) -> GatewayServer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    async def _tick(self) -> None:
        """Once a second. What is raised here would end the server; and a store that waits must not make this wait."""
        try:
            self._gateway.end_overdue()
        except Exception:
            log.exception("the deadlines of episodes could not be looked at")
        if self._keeping is None or self._keeping.done():
            self._keeping = asyncio.get_running_loop().run_in_executor(self._keeper, self._gateway.keep_closed)

    def check(self) -> None:
        """See that it still serves.

        Raises:
            PrefloopError: its thread has died, or the policy cannot be sampled any more.
        """
        self._gateway.check()
        if not self._thread.is_alive():
            raise PrefloopError("the gateway's server has stopped: see what it said above, and start it again")

    def close(self) -> None:
        """Refuse what comes, let replies in the making end, and close the episodes that agents left open."""
        self._gateway.drain()
        self._server.should_exit = True
        self._thread.join()
        self._keeper.shutdown()
        self._gateway.close_all()


def _check_token(host: str, token: str) -> None:
    if not token and host not in LOOPBACK:
        raise PrefloopError(
            f"host {host} can be reached by others: set a token by PREFLOOP_GATEWAY_TOKEN or --token-file"
        )
    if "/" in token or not token.isascii() or not token.isprintable() or " " in token:
        raise PrefloopError("the gateway's token should be printable ASCII without spaces and slashes")
