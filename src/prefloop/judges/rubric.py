"""What a language-model judge grades by: weighted criteria with an anchored scale, read from a file.

A rubric is TOML (`.toml`), or Markdown whose front matter between `+++` lines is that TOML and whose body is
guidance for the judge:

    name = "booking"
    [[criteria]]
    name = "outcome"
    weight = 3.0
    question = "Is the right flight booked?"
    anchors = { 0 = "none", 5 = "the cheapest that fits" }
"""

from __future__ import annotations

import hashlib
import tomllib
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Annotated

from pydantic import Field, StringConstraints, model_validator

from prefloop.config import Settings, parse_settings
from prefloop.records import JSONObject, PrefloopError

LOWEST, HIGHEST = 0, 5  # the scale on which models agree best with people (arXiv:2601.03444)
POINTS = tuple(range(LOWEST, HIGHEST + 1))
MAX_BYTES = 200_000

Name = Annotated[str, StringConstraints(pattern=r"^[a-z][a-z0-9_]{0,39}$")]
Text = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1)]


class Criterion(Settings):
    """One question with what the points of its scale mean; both ends must be described."""

    name: Name
    question: Text
    weight: float = Field(default=1.0, gt=0.0)
    anchors: dict[str, Text]

    @model_validator(mode="after")
    def _check(self) -> Criterion:
        points = {str(point) for point in POINTS}
        if not {str(LOWEST), str(HIGHEST)} <= set(self.anchors) <= points:
            raise ValueError(f"anchors should describe {LOWEST} and {HIGHEST}, and others between them as needed")
        return self

    def described(self) -> str:
        """The criterion as the judge reads it."""
        anchors = "\n".join(f"  - {point}: {self.anchors[point]}" for point in sorted(self.anchors))
        return f"- `{self.name}`: {self.question}\n{anchors}"


class Rubric(Settings):
    """Criteria and guidance; `hash` is the SHA-256 of the file's bytes."""

    name: Text
    criteria: list[Criterion] = Field(min_length=1, max_length=20)
    guidance: str = ""
    hash: str = ""

    @model_validator(mode="after")
    def _check(self) -> Rubric:
        if len({criterion.name for criterion in self.criteria}) < len(self.criteria):
            raise ValueError("the names of criteria should differ")
        return self

    def value(self, points: Mapping[str, float]) -> float:
        """The weighted mean of the criteria's points, on the scale 0 to 5."""
        total = sum(criterion.weight for criterion in self.criteria)
        mean = sum(criterion.weight * points[criterion.name] for criterion in self.criteria) / total
        return min(max(points.values()), max(min(points.values()), mean))  # rounding must not leave the range

    def verdict_schema(self) -> JSONObject:
        """The JSON schema of a verdict. Only types and enumerations: servers know little more."""
        names = [criterion.name for criterion in self.criteria]
        point = {"type": "integer", "enum": list(POINTS)}
        return _object(
            rationale={"type": "string"},
            scores=_object(**dict.fromkeys(names, point)),
            nonce={"type": "string"},
        )


def _object(**properties: JSONObject) -> JSONObject:
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


def load_rubric(path: str = "") -> Rubric:
    """The rubric of a file, or the one that ships with prefloop.

    Raises:
        PrefloopError: the file is missing, too large, not UTF-8 or TOML, or a key of it is wrong.
    """
    raw = _read(path)
    where = f"rubric {path or 'of prefloop'}"
    try:
        text = raw.decode("utf-8").replace("\r\n", "\n")
        header, guidance = _split(text) if text.startswith("+++\n") else (text, "")
        data = tomllib.loads(header)
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError and TOMLDecodeError are ValueErrors
        raise PrefloopError(f"{where} is neither TOML nor Markdown with TOML between +++ lines: {error}") from None
    if "hash" in data or (guidance and "guidance" in data):
        raise PrefloopError(f"{where}: the keys hash and guidance are filled in from the file itself")
    extra = {"hash": hashlib.sha256(raw).hexdigest(), **({"guidance": guidance.strip()} if guidance else {})}
    return parse_settings(Rubric, {**data, **extra}, where)


def _read(path: str) -> bytes:
    if not path:
        return (files("prefloop.judges") / "prompts" / "rubric.md").read_bytes()
    try:
        with Path(path).open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise PrefloopError(f"rubric {path} cannot be read: {error.strerror}") from None
    if len(raw) > MAX_BYTES:
        raise PrefloopError(f"rubric {path} is larger than {MAX_BYTES} bytes")
    return raw


def _split(text: str) -> tuple[str, str]:
    header, end, body = text.removeprefix("+++\n").partition("\n+++\n")
    if not end:
        raise ValueError("the front matter does not end with a +++ line")
    return header, body
