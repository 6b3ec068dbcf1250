"""A command that scores an episode: it reads what was asked and done as JSON, and prints a score as JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from threading import Event

from prefloop.environments.base import Outcome
from prefloop.environments.commands import Ran, run_command
from prefloop.environments.outcomes import OUTCOME_KEYS, read_outcome
from prefloop.records import Message, PrefloopError, Task
from prefloop.records.strict_json import strict_loads


class GraderFailedError(PrefloopError):
    """A grader that gave no number, and what it had printed."""

    def __init__(self, message: str, ran: Ran) -> None:
        super().__init__(message)
        self.ran = ran


def run_grader(
    command: Sequence[str],
    environment: Mapping[str, str],
    task: Task,
    messages: Sequence[Message],
    *,
    output: str,
    ended: str,
    deadline_s: float,
    stop: Event | None = None,
) -> Outcome:
    """What a grader says of an episode.

    It reads `{"task", "messages", "output", "ended"}` as JSON from its standard input, and the last line that it prints
    is a JSON object with a `score` in [0, 1], as `read_outcome` reads it.

    Raises:
        GraderFailedError: it fails, is too slow, or says something else.
        PrefloopError: it cannot be started.
    """
    said = {
        "task": task.specification,
        "messages": [message.to_dict() for message in messages],
        "output": output,
        "ended": ended,
    }
    ran = run_command(command, environment, deadline_s=deadline_s, stdin=json.dumps(said), stop=stop)
    if ran.failure:
        raise GraderFailedError(f"the grader {ran.failure}", ran)
    try:
        return _outcome(ran.output)
    except PrefloopError as error:
        raise GraderFailedError(str(error), ran) from None


def _outcome(printed: str) -> Outcome:
    line = next((line for line in reversed(printed.splitlines()) if line.strip()), "")
    try:
        said = strict_loads(line)
    except ValueError as error:
        said, problem = None, str(error)
    else:
        problem = "expected a JSON object"
    if not isinstance(said, dict):
        shown = f"{line.strip()[:100]!r}, which is no score ({problem})" if line else "nothing"
        raise PrefloopError(f'the grader printed {shown}: its last line should be such as {{"score": 0.5}}')
    if unknown := said.keys() - OUTCOME_KEYS:
        raise PrefloopError(f"the grader said {min(unknown)!r}: it may say {', '.join(sorted(OUTCOME_KEYS))}")
    try:
        outcome = read_outcome(said)
    except PrefloopError as error:
        raise PrefloopError(f"what the grader said is wrong: {error}") from None
    if outcome is None:
        raise PrefloopError("the grader gave no score")
    return outcome
