"""Reading a judge's reply: a verdict exactly as it was asked for, or a typed failure; nothing is guessed.

No value is clamped, converted or completed. Change what this module accepts, and raise `PARSER_VERSION`: a new
parser is a new rater over the same stored replies.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from prefloop.judges.render import visible
from prefloop.judges.rubric import HIGHEST, LOWEST, Rubric
from prefloop.records import Status
from prefloop.records.strict_json import strict_loads

PARSER_VERSION = 1

MAX_CHARACTERS = 200_000
ENDED_WELL = frozenset({"end_turn", "stop", "stop_sequence"})
ENDED_BADLY = {
    "refusal": Status.REFUSED,
    "content_filter": Status.FILTERED,
    "max_tokens": Status.TRUNCATED,
    "length": Status.TRUNCATED,
    "model_context_window_exceeded": Status.TRUNCATED,
}


class UnreadableError(Exception):
    """A reply that is no verdict: why."""

    def __init__(self, status: Status, detail: str) -> None:
        super().__init__(detail)
        self.status = status
        self.detail = detail


@dataclass(frozen=True, slots=True)
class ReadVerdict:
    """The points of each criterion, and the judge's reasons."""

    points: dict[str, int]
    rationale: str


def read_verdict(text: str, stop: str, rubric: Rubric, nonce: str) -> ReadVerdict:
    """The verdict in a reply that ended by the server's reason `stop`.

    The verdict is all that lies between the first and the last brace, and closes the reply: a reply with two
    objects, whatever they say, has none.

    Raises:
        UnreadableError: refused, filtered, truncated, unparsable or out_of_range, with what was wrong.
    """
    if stop not in ENDED_WELL:
        raise UnreadableError(ENDED_BADLY.get(stop, Status.UNPARSABLE), f"the reply ended by {visible(stop)[:40]!r}")
    verdict = _json_object(text)
    _check_keys(verdict, {"rationale", "scores", "nonce"}, "the verdict")
    if verdict["nonce"] != nonce:
        raise _unparsable("the verdict does not repeat the nonce of this question")
    if not isinstance(verdict["rationale"], str):
        raise _unparsable("the rationale is not a string")
    scores = verdict["scores"]
    if not isinstance(scores, dict):
        raise _unparsable("'scores' is not an object")
    _check_keys(scores, {criterion.name for criterion in rubric.criteria}, "'scores'")
    points = {criterion.name: _point(criterion.name, scores[criterion.name]) for criterion in rubric.criteria}
    return ReadVerdict(points, visible(verdict["rationale"]))


def _json_object(text: str) -> dict[str, Any]:
    first, last = text.find("{"), text.rfind("}")
    if not 0 <= first < last:
        raise _unparsable("the reply holds no JSON object")
    if len(text) > MAX_CHARACTERS:
        raise _unparsable(f"the reply is longer than {MAX_CHARACTERS} characters")
    if text[last + 1 :].strip(" \t\r\n`"):
        raise _unparsable("text follows the verdict")
    try:
        found = strict_loads(text[first : last + 1])
    except ValueError as error:
        raise _unparsable(f"the reply is not one JSON object: {error}") from None
    if not isinstance(found, dict):
        raise _unparsable("the reply is not a JSON object")
    return found


def _check_keys(found: dict[str, Any], wanted: set[str], where: str) -> None:
    missing, extra = sorted(wanted - found.keys()), sorted(found.keys() - wanted)
    if missing:
        raise _unparsable(f"{where} lacks {missing[0]!r}")
    if extra:
        raise _unparsable(f"{where} has the unknown key {visible(extra[0])[:40]!r}")


def _point(name: str, value: object) -> int:
    if type(value) is not int:  # a bool is an int to isinstance
        raise _unparsable(f"the score of {name!r} is a {type(value).__name__}, not a whole number")
    if not LOWEST <= value <= HIGHEST:
        raise UnreadableError(Status.OUT_OF_RANGE, f"the score of {name!r} is not between {LOWEST} and {HIGHEST}")
    return value


def _unparsable(detail: str) -> UnreadableError:
    return UnreadableError(Status.UNPARSABLE, detail)
