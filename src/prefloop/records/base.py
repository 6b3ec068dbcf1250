"""What all records rest on: errors for users, canonical JSON, and hashes as ids."""

from __future__ import annotations

import hashlib
import json
from typing import Any

JSONObject = dict[str, Any]


class PrefloopError(Exception):
    """An error whose message tells the user what was wrong, what was expected and what to do."""


class NoDeviceError(PrefloopError):
    """A device that torch cannot use here."""


class DivergedError(PrefloopError):
    """A model's numbers are no longer finite: training went too far."""


_CANONICAL = json.JSONEncoder(sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def canonical_json(value: object) -> str:
    """The one JSON text of a value: sorted keys, no spaces, no NaN."""
    return _CANONICAL.encode(value)


def counted(number: int, noun: str) -> str:
    """A number with its noun, which takes an s but for 1: `1 row`, `1,200 rows`."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def content_hash(*parts: object) -> str:
    """A 32-digit hexadecimal BLAKE2 hash of JSON-serialisable parts."""
    return hashlib.blake2b(canonical_json(parts).encode(), digest_size=16).hexdigest()
