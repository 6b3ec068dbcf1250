"""The annotation page: two trajectories of one task side by side, and a vote that is safe before the next pair."""

from __future__ import annotations

import socket
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal
from uuid import UUID

from pydantic import BaseModel, ConfigDict, Field

from prefloop.feedback.desk import Desk, VoteConflictError
from prefloop.feedback.queue import QueueSettings, build_queue
from prefloop.feedback.votes import Choice
from prefloop.records import PrefloopError
from prefloop.serving import LOOPBACK, bind, require_packages, url_of
from prefloop.store import Store

if TYPE_CHECKING:
    import uvicorn
    from fastapi import FastAPI, Request
    from fastapi.responses import HTMLResponse, JSONResponse

HERE = Path(__file__).parent
DEFAULT_PORT = 8417
MAX_SECONDS = 86400.0


class VoteBody(BaseModel):
    """A vote as the page sends it: the pair, the order that was on the screen, and the key of this submission."""

    model_config = ConfigDict(extra="forbid")

    pair: str = Field(pattern="^[0-9a-f]{32}$")
    order: Literal["ab", "ba"]
    choice: Choice
    seconds: float = Field(ge=0.0, le=MAX_SECONDS, allow_inf_nan=False)
    key: UUID


class UndoBody(BaseModel):
    """Which vote to take back, and the key of this submission."""

    model_config = ConfigDict(extra="forbid")

    vote: str = Field(pattern="^[0-9a-f]{32}$")
    key: UUID


def require_web() -> None:
    """Check that the extra `web` is installed.

    Raises:
        PrefloopError: it is not.
    """
    require_packages("the annotation page", "fastapi", "jinja2", "uvicorn")


def create_app(store: Store, settings: QueueSettings, rater_name: str, *, port: int = DEFAULT_PORT) -> FastAPI:
    """The annotation page of one person, as an ASGI application to be reached at `port` of the loopback.

    The queue is made once, here: what is added to the store later is asked about after a restart.

    Raises:
        PrefloopError: the extra `web` is missing, the settings name no run or judge of the store, or the rater has
            no name.
    """
    require_web()
    from fastapi import FastAPI
    from fastapi.staticfiles import StaticFiles

    from prefloop.web.guard import Guard

    desk = Desk(
        store,
        build_queue(store, settings),
        rater_name,
        seed=settings.seed,
        votes_per_pair=settings.votes_per_pair,
    )
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    app.mount("/static", StaticFiles(directory=HERE / "static"))
    _add_errors(app)
    _add_pages(app, desk)
    _add_votes(app, desk)
    app.add_middleware(Guard, port=port)
    return app


def _add_pages(app: FastAPI, desk: Desk) -> None:
    from fastapi.responses import HTMLResponse

    render = _renderer()

    def fragment() -> dict[str, Any]:
        from prefloop.web.view import pair_view

        shown = desk.next()
        return {
            "rater": desk.rater.name,
            "pair": None if shown is None else pair_view(shown),
            "progress": desk.progress(),
            "num_pairs": len(desk.queue),
        }

    def response(template: str) -> HTMLResponse:
        # Half of a surrogate pair can be in a model's JSON, but not in UTF-8.
        return HTMLResponse(render(template, fragment()).encode("utf-8", "replace"))

    @app.get("/")
    def page() -> HTMLResponse:
        return response("page.html")

    @app.get("/pair")
    def pair() -> HTMLResponse:
        return response("stage.html")


def _renderer() -> Callable[[str, dict[str, Any]], str]:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(HERE / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return lambda name, values: environment.get_template(name).render(values)


def _add_votes(app: FastAPI, desk: Desk) -> None:
    # The answers are sent after the transaction in `desk` has committed; they hold nothing that a replay would change.

    @app.post("/votes")
    def vote(body: VoteBody) -> dict[str, str]:
        return {"saved": desk.vote(body.pair, body.choice, body.order == "ab", body.seconds, str(body.key))}

    @app.post("/undo")
    def undo(body: UndoBody) -> dict[str, str]:
        return {"saved": desk.undo(body.vote, str(body.key))}


def _add_errors(app: FastAPI) -> None:
    """Errors as one line of JSON, without what was sent and without a trace."""
    from fastapi.exceptions import RequestValidationError
    from fastapi.responses import JSONResponse

    def answer(status: int, message: str | None = None) -> Callable[[Request, Exception], JSONResponse]:
        return lambda _request, error: JSONResponse({"error": message or str(error)}, status)

    app.add_exception_handler(VoteConflictError, answer(409))
    app.add_exception_handler(PrefloopError, answer(503))
    app.add_exception_handler(RequestValidationError, answer(422, "the request is not one that the page sends"))


@dataclass(frozen=True, slots=True)
class PageServer:
    """A server that is bound to its port but does not run yet; `run` blocks until `stop` or a signal."""

    server: uvicorn.Server
    socket: socket.socket
    url: str

    def run(self) -> None:
        """Serve until stopped."""
        try:
            self.server.run(sockets=[self.socket])
        finally:
            self.socket.close()

    def stop(self) -> None:
        """Ask `run` to return; from any thread."""
        self.server.should_exit = True


def open_server(
    store: Store,
    settings: QueueSettings,
    rater_name: str,
    *,
    host: str = "127.0.0.1",
    port: int = DEFAULT_PORT,
) -> PageServer:
    """Bind the annotation page to a port of the loopback; port 0 takes a free one.

    Raises:
        PrefloopError: as `create_app`; the host is not the loopback; the port is in use.
    """
    require_web()
    import uvicorn

    bound = bind_loopback(host, port)
    port = bound.getsockname()[1]
    try:
        app = create_app(store, settings, rater_name, port=port)
    except PrefloopError:
        bound.close()
        raise
    config = uvicorn.Config(
        app, log_level="warning", access_log=False, server_header=False, limit_concurrency=64, timeout_keep_alive=5,
        timeout_graceful_shutdown=2,
    )  # fmt: skip
    return PageServer(uvicorn.Server(config), bound, f"{url_of(bound)}/")


def bind_loopback(host: str, port: int) -> socket.socket:
    """A listening socket on the loopback.

    Raises:
        PrefloopError: another host, or the port cannot be had.
    """
    if host not in LOOPBACK:
        raise PrefloopError(f"the page has no login and is served on this machine only: host {host!r} is refused")
    return bind(host, port)


def serve(
    store: Store,
    settings: QueueSettings,
    rater_name: str,
    *,
    host: str = "127.0.0.1",
    port: int = DEFAULT_PORT,
    announce: Callable[[str], None] = print,
) -> None:
    """Serve the annotation page until interrupted; `announce` is given its address in a line of text.

    Raises:
        PrefloopError: as `open_server`.
    """
    page = open_server(store, settings, rater_name, host=host, port=port)
    announce(f"annotate as {rater_name}: {page.url} (stop with Ctrl-C)")
    page.run()
