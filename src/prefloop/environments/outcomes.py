"""What a grader says of an episode, as JSON: the command of a run file, or whoever posts it to the gateway."""

from __future__ import annotations

import json

from prefloop.environments.base import Outcome
from prefloop.records import JSONObject, PrefloopError

OUTCOME_KEYS = frozenset({"value", "score", "success", "metrics"})


def read_outcome(said: JSONObject) -> Outcome | None:
    """The outcome in a JSON object; None where it holds neither value, score nor success. Other keys are not read.

    `value` defaults to the score, `score` to a value from 0 to 1, both to 1 for a success and 0 for none; `success`
    to a score of at least 0.5. A metric that is true or false counts as 1 or 0.

    Raises:
        PrefloopError: naming the key that is wrong or missing.
    """
    value, score, success = _number(said, "value"), _number(said, "score"), said.get("success")
    if success is not None and not isinstance(success, bool):
        raise PrefloopError(f"success should be true or false, not {_shown(success)}")
    metrics = said.get("metrics") or {}
    if not isinstance(metrics, dict) or "success" in metrics:
        raise PrefloopError(f"metrics should be an object of numbers, without success, not {_shown(metrics)}")
    numbers = {name: _metric(metrics, name) for name in metrics}
    if value is None and score is None and success is None:
        return None
    if score is None:
        score = value if value is not None else float(bool(success))
    if not 0 <= score <= 1:
        raise PrefloopError(f"score should be from 0 to 1, not {score:g}: give it beside the value")
    if success is not None and score == float(not success):
        raise PrefloopError(f"score {score:g} and success {_shown(success)} contradict each other: leave one out")
    reached = success if success is not None else score >= 0.5
    return Outcome(value if value is not None else score, score, reached, numbers)


def _number(said: JSONObject, key: str) -> float | None:
    found = said.get(key)
    if found is None:
        return None
    if isinstance(found, bool) or not isinstance(found, int | float) or not abs(found) < 1e300:
        raise PrefloopError(f"{key} should be a finite number, not {_shown(found)}")
    return float(found)


def _metric(metrics: JSONObject, name: str) -> float:
    flag = metrics[name]
    found = float(flag) if isinstance(flag, bool) else _number(metrics, name)
    if found is None:
        raise PrefloopError(f"metrics: {name} should be a finite number, not null")
    return found


def _shown(value: object) -> str:
    return json.dumps(value, default=str)[:100]
