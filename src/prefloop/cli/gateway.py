"""`prefloop gateway`: serve a run's policy to agents, and record what they do with it."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from prefloop.cli.plumbing import (
    IgnoreMemoryOption,
    RunFile,
    SetOption,
    StoreOption,
    console,
    ending_signals,
    open_stage,
)
from prefloop.gateway.core import Gateway
from prefloop.records import PrefloopError, counted

TOKEN_VARIABLE = "PREFLOOP_GATEWAY_TOKEN"


def gateway(
    file: RunFile,
    *,
    port: Annotated[int | None, Parameter(help="as gateway.port of the run file when left out; 0: a free one")] = None,
    host: Annotated[str, Parameter(help="where to listen; other machines reach it only with a token")] = "127.0.0.1",
    token_file: Annotated[
        Path | None, Parameter(help=f"a file with the API key that agents must send (else {TOKEN_VARIABLE}, if set)")
    ] = None,
    checkpoint: Annotated[
        str, Parameter(help="id of a checkpoint (or its beginning); the current one if left out")
    ] = "",
    ignore_memory: IgnoreMemoryOption = False,
    store: StoreOption = None,
    overrides: SetOption = None,
) -> None:
    """Serve the policy to agents in OpenAI's format; their episodes are the iteration's rollouts."""
    from prefloop.stages.gateway import check_checkpoint, iteration_to_serve, served
    from prefloop.stages.start import start_policy

    token = _token(token_file)
    with open_stage(file, store, overrides, ignore_memory=ignore_memory) as run:
        iteration = iteration_to_serve(run)
        run.environment.check()
        start_policy(run)
        checkpoint_id = check_checkpoint(run, checkpoint) if checkpoint else run.checkpoint_before(iteration)
        with (
            interrupted() as stop,
            served(run, iteration, checkpoint_id, host=host, port=port, token=token) as (open_gateway, server),
        ):
            console.print(
                f"iteration {iteration + 1}, checkpoint {checkpoint_id}: {server.base_url} (stop with Ctrl-C)",
                highlight=False,
                soft_wrap=True,
            )
            while not stop.wait(0.5):
                server.check()
        _print_recorded(open_gateway, iteration, file)


@contextmanager
def interrupted() -> Iterator[threading.Event]:
    """An event that Ctrl-C, SIGTERM and SIGHUP set, so that what is in work can end; the second Ctrl-C is as always."""
    stop = threading.Event()
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, *ending_signals())}

    def ask_to_stop(number: int, _frame: object) -> None:
        stop.set()
        signal.signal(number, before[signal.Signals(number)])

    for number in before:
        signal.signal(number, ask_to_stop)
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _token(file: Path | None) -> str:
    if file is None:
        return os.environ.get(TOKEN_VARIABLE, "")
    try:
        token = file.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise PrefloopError(f"{file} cannot be read as the gateway's token: {error}") from None
    if not token:
        raise PrefloopError(f"{file} is empty: expected the token that agents send as their API key")
    return token


def _print_recorded(gateway: Gateway, iteration: int, file: Path) -> None:
    ended = ", ".join(f"{number} {end.value}" for end, number in sorted(gateway.recorded.items()))
    total = sum(gateway.recorded.values())
    text = f"recorded {counted(total, 'episode')} of iteration {iteration + 1}" + (f": {ended}" if ended else "")
    if total:
        text += f"; `prefloop run {file}` goes on with them, `prefloop gateway {file}` adds more"
    console.print(text, highlight=False, soft_wrap=True)
