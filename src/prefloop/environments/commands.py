"""Commands of users as subprocesses: bounded in time and in what they print, ended together with their children."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from threading import Event
from typing import IO, Literal

from prefloop.records import PrefloopError

MAX_PRINTED = 1 << 20  # bytes on each of standard output and standard error
GRACE_S = 2.0  # between asking a command to end and ending it
SHORTEST_WAIT_S, LONGEST_WAIT_S = 0.002, 0.05
# What a program needs to start. Nothing that says who somebody is: a policy may drive it, and read what it holds.
PASSED_ON = (
    "PATH", "HOME", "USER", "SHELL", "LANG", "LC_ALL", "LC_CTYPE", "TZ", "TMPDIR", "VIRTUAL_ENV", "CONDA_PREFIX",
    "PYTHONPATH", "LD_LIBRARY_PATH", "SSL_CERT_FILE", "SSL_CERT_DIR", "REQUESTS_CA_BUNDLE",
)  # fmt: skip


# Nothing is ever written to it: its standard input ends when whoever started it does, be it by SIGKILL.
WATCH = 'read -r _; kill -s TERM -- "-$1"; sleep "$2"; kill -s KILL -- "-$1"'

Limit = Literal["deadline", "printed", "stopped"]
BEYOND: dict[Limit, str] = {
    "deadline": "was ended at its deadline",
    "printed": f"printed more than {MAX_PRINTED:,} bytes",
    "stopped": "was ended from outside",
}


@dataclass(frozen=True, slots=True)
class Ran:
    """How a command went: its exit code (None where it was ended), what it printed, and at which limit it was ended."""

    exit_code: int | None
    output: str
    errors: str
    limit: Limit | None = None

    @property
    def failure(self) -> str:
        """What went wrong, with the last line that it printed about it; empty where it exited with 0."""
        if self.exit_code == 0:
            return ""
        how = BEYOND[self.limit] if self.limit else f"exited with {self.exit_code}"
        last = next((line.strip() for line in reversed((self.errors or self.output).splitlines()) if line.strip()), "")
        return f"{how}: {last[:500]}" if last else how


def child_environment(names: Sequence[str], **variables: str) -> dict[str, str]:
    """The environment of a command: `PASSED_ON`, what `names` name, and `variables`.

    Proxies are never asked for loopback addresses.

    Raises:
        PrefloopError: a named variable is not set.
    """
    missing = [name for name in names if name not in os.environ]
    if missing:
        raise PrefloopError(f"the environment variable {missing[0]}, which is to be passed on, is not set")
    found = {name: os.environ[name] for name in (*PASSED_ON, *names) if name in os.environ}
    no_proxy = ",".join(filter(None, (os.environ.get("NO_PROXY"), "127.0.0.1", "localhost")))
    return {**found, "NO_PROXY": no_proxy, "no_proxy": no_proxy, **variables}


def run_command(
    command: Sequence[str],
    environment: Mapping[str, str],
    *,
    deadline_s: float,
    stdin: str = "",
    stop: Event | None = None,
) -> Ran:
    """Run a command in a process group of its own, which has ended when this returns.

    It is ended after `deadline_s` seconds, when it has printed more than `MAX_PRINTED` bytes, or when `stop` is set:
    asked first, and two seconds later made to; so it is, too, when this process is killed.

    Raises:
        PrefloopError: it cannot be started.
    """
    with tempfile.TemporaryFile() as given, tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as errors:
        given.write(stdin.encode())
        given.seek(0)
        try:
            process = subprocess.Popen(
                command, stdin=given, stdout=output, stderr=errors, env=dict(environment), start_new_session=True
            )
        except OSError as error:
            raise PrefloopError(f"the command {command[0]!r} cannot be started: {error.strerror or error}") from None
        except ValueError as error:  # a NUL in an argument or in a variable
            raise PrefloopError(f"the command {command[0]!r} cannot be started: {error}") from None
        try:
            with _watched(process.pid):
                limit = _wait(process, (output, errors), time.monotonic() + deadline_s, stop or Event())
                if limit:
                    _signal(process, signal.SIGTERM)
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        process.wait(GRACE_S)
        finally:
            _signal(process, signal.SIGKILL)  # also children that outlive it
            process.wait()
        return Ran(None if limit else process.returncode, _text(output), _text(errors), limit)


@contextlib.contextmanager
def _watched(group: int) -> Iterator[None]:
    """Have a process group ended as soon as this process is gone, however that comes about."""
    command = ["/bin/sh", "-c", WATCH, "prefloop", str(group), f"{GRACE_S:.0f}"]
    nowhere = subprocess.DEVNULL
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=nowhere, stderr=nowhere, start_new_session=True
    ) as watchdog:
        try:
            yield
        finally:
            watchdog.kill()  # and only then, at the end of the block, its standard input is closed


def _wait(process: subprocess.Popen[bytes], printed: Sequence[IO[bytes]], end: float, stop: Event) -> Limit | None:
    """Wait until a command has exited; the limit that it is beyond, None where it has kept to all of them."""
    wait = SHORTEST_WAIT_S
    while process.poll() is None:
        if _too_much(printed):
            return "printed"
        if time.monotonic() >= end:
            return "deadline"
        if stop.wait(wait):
            return "stopped"
        wait = min(2 * wait, LONGEST_WAIT_S)
    return "printed" if _too_much(printed) else None  # one that was quicker than a look at it


def _too_much(printed: Sequence[IO[bytes]]) -> bool:
    return any(os.fstat(file.fileno()).st_size > MAX_PRINTED for file in printed)


def _signal(process: subprocess.Popen[bytes], number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):  # nobody of the group is left
        os.killpg(process.pid, number)


def _text(file: IO[bytes]) -> str:
    file.seek(max(0, os.fstat(file.fileno()).st_size - MAX_PRINTED))
    return file.read(MAX_PRINTED).decode(errors="replace")
