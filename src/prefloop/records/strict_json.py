"""JSON from a stranger: what the standard parser lets through silently is an error here."""

from __future__ import annotations

import json
from typing import Any


def strict_loads(text: str) -> Any:
    """The value of a JSON text.

    Beyond the standard parser it refuses duplicate keys (the last would win), NaN and Infinity, and numbers that
    overflow to infinity.

    Raises:
        ValueError: the text is not JSON in this sense, or is nested too deeply.
    """
    try:
        return json.loads(text, object_pairs_hook=_unique, parse_constant=_refuse, parse_float=_finite)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"duplicate key {next(n for n in names if names.count(n) > 1)!r}")
    return found


def _refuse(constant: str) -> float:
    raise ValueError(f"{constant} is not a JSON number")


def _finite(text: str) -> float:
    number = float(text)
    if number in (float("inf"), float("-inf")):
        raise ValueError(f"{text} is too large")
    return number
