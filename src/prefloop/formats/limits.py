"""What a file from somebody else may cost, and strict JSON: no file can exhaust memory or smuggle odd values in."""

from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import dataclass
from typing import Any, NoReturn

from prefloop.records import PrefloopError

MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class Limits:
    """Limits of an imported file.

    `max_row_bytes` is the size of one row as JSON, `max_nodes` the number of its opening brackets (those inside
    texts count too), `max_depth` how deep it nests. `max_bytes` is the size of the file after decompression;
    `max_ratio` bounds decompressed over compressed bytes. Honest text packs to a tenth, with long prompts that every
    row repeats to a hundredth; a bomb of gzip to a thousandth. Parquet, which stores a repeated text once, may unpack
    to ten times `max_ratio`, but a row and ten values of it must take a byte or more.
    """

    max_row_bytes: int = 4 * MIB
    max_nodes: int = 100_000
    max_depth: int = 64
    max_rows: int = 20_000_000
    max_bytes: int = 64 << 30
    max_ratio: float = 200.0


class RowProblemError(Exception):
    """What is wrong with one row: the key it lies under and the reason."""

    def __init__(self, key: str, reason: str) -> None:
        super().__init__(f"{key}: {reason}" if key else reason)
        self.key = key
        self.reason = reason


@dataclass(frozen=True, slots=True)
class RawRow:
    """A row of a file: where it begins (from 1), its size, and its value or what is wrong with it."""

    line: int
    num_bytes: int
    value: Any = None
    problem: RowProblemError | None = None


def too_large(limits: Limits) -> RowProblemError:
    """The problem of a row beyond `max_row_bytes`."""
    return RowProblemError("", f"the row is larger than {limits.max_row_bytes} bytes")


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"the number {text[:40]} is too large")
    return value


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        twice = Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"the key {twice!r} occurs twice in one object")
    return found


DECODER = json.JSONDecoder(object_pairs_hook=_unique_keys, parse_constant=_refuse_constant, parse_float=_finite)


def parse_json(text: str, limits: Limits) -> Any:
    """The value of a JSON text, with unique keys and finite numbers, within the limits.

    Raises:
        RowProblemError: it is not such a text.
    """
    _check_nodes(text, limits)
    try:
        value = DECODER.decode(text)
    except RecursionError:
        raise RowProblemError("", f"nested deeper than {limits.max_depth} levels") from None
    except ValueError as error:
        raise RowProblemError("", f"not valid JSON: {str(error).split(';')[0]}") from None
    check_json(value, text, limits)
    return value


def _check_nodes(text: str, limits: Limits) -> int:
    num_nodes = text.count("{") + text.count("[")
    if num_nodes > limits.max_nodes:
        raise RowProblemError("", f"more than {limits.max_nodes} objects and lists in one row")
    return num_nodes


def check_json(value: object, text: str, limits: Limits) -> None:
    """Hold a value and the JSON text that it was decoded from against the limits.

    Raises:
        RowProblemError: it is too large, nests too deep, or holds text that cannot be stored.
    """
    if len(text) > limits.max_row_bytes:
        raise too_large(limits)
    # Only many brackets can nest deeply, and only an escape can write a NUL or a surrogate: most rows need no walk.
    if _check_nodes(text, limits) > limits.max_depth or "\\u" in text:
        check_value(value, limits)


def check_value(value: object, limits: Limits, key: str = "") -> None:
    """Refuse what no JSON text or database can hold, wherever it lies in a value.

    Raises:
        RowProblemError: a lone surrogate, a NUL, a number that is not finite, a type that JSON lacks, or nesting that
            is too deep.
    """
    level: list[object] = [value]
    for _ in range(limits.max_depth + 1):
        below: list[object] = []
        for item in level:
            if isinstance(item, dict):
                below.extend(item.keys())
                below.extend(item.values())
            elif isinstance(item, list | tuple):
                below.extend(item)
            else:
                _check_leaf(item, key)
        if not below:
            return
        level = below
    raise RowProblemError(key, f"nested deeper than {limits.max_depth} levels")


def _check_leaf(leaf: object, key: str) -> None:
    if isinstance(leaf, str):
        check_text(leaf, key)
    elif isinstance(leaf, float):
        if not math.isfinite(leaf):
            raise RowProblemError(key, f"the number {leaf} is not finite")
    elif leaf is not None and not isinstance(leaf, int):
        raise RowProblemError(key, f"a value of type {type(leaf).__name__} is not JSON")


def check_text(text: str, key: str = "") -> None:
    """Refuse text that cannot be stored.

    Raises:
        RowProblemError: it holds a NUL or a lone surrogate.
    """
    if "\0" in text:
        raise RowProblemError(key, "the text holds a NUL character")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RowProblemError(key, f"the text holds a lone surrogate at character {error.start}") from None


def limit_error(name: str, what: str) -> PrefloopError:
    """The error of a file that goes beyond a limit."""
    return PrefloopError(f"{name} {what}: split it, or if you trust it unpack it first")
