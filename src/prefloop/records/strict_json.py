"""JSON from a stranger: what the standard parser lets through silently is an error here."""

from __future__ import annotations

import json
from typing import Any

MAX_DEPTH = 64  # far below where code that walks a value calls itself too often


def load_json(text: str, max_depth: int = MAX_DEPTH) -> Any:
    """The value of a JSON text, as `strict_loads` reads it, that can be stored and walked.

    Raises:
        ValueError: it is not such a text, holds half a character, or nests deeper than `max_depth`.
    """
    value = strict_loads(text)
    # Only many brackets can nest deeply: most texts need no walk.
    if text.count("{") + text.count("[") > max_depth and not _within(value, max_depth):
        raise ValueError(f"nested deeper than {max_depth} levels")
    if not is_storable(value):
        raise ValueError("it holds half a character (a lone surrogate)")
    return value


def is_storable(value: object) -> bool:
    """Whether a JSON value can be written as UTF-8 (no lone surrogates, no NaN, not too deep)."""
    try:
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
    except (ValueError, RecursionError, TypeError):
        return False
    return True


def _within(value: object, max_depth: int) -> bool:
    level = [value]
    for _ in range(max_depth + 1):
        level = [inner for outer in level if isinstance(outer, dict | list) for inner in _inside(outer)]
        if not level:
            return True
    return False


def _inside(value: dict[str, Any] | list[Any]) -> list[Any]:
    return list(value.values()) if isinstance(value, dict) else value


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
