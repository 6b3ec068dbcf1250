"""Reading, checking and hashing run files (TOML); each component owns its settings class.

A settings class derives from `Settings`. A validator of one key raises `ValueError` with what was expected ("a base
URL"), one of several keys with a whole sentence. A run file is checked strictly: `"3"` is not a number and `1` is not
true, but `1` is good where a float is wanted.
"""

from __future__ import annotations

import copy
import difflib
import json
import re
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, ValidationError

from prefloop.records import JSONObject, PrefloopError, content_hash

S = TypeVar("S", bound="Settings")

BY_RECIPE: JSONObject = {"default": "by recipe"}
"""Of a field (`json_schema_extra`): left out, its value follows from others; a file is whole without it."""

MISSING = "there"  # what is expected of a key that is not


class Settings(BaseModel):
    """Base of every component's settings: immutable, complete by its defaults, unknown keys refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, validate_default=True)


def settings_hash(settings: Settings) -> str:
    """The hash of every value, defaults too: equal settings are equal runs however they were written."""
    return content_hash("settings", settings.model_dump(mode="json"))


def read_run_file(path: str | Path) -> JSONObject:
    """The tables of a TOML file.

    Raises:
        PrefloopError: the file is missing or unreadable, or is not TOML (naming line and column).
    """
    try:
        return tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise PrefloopError(f"there is no run file {path}") from None
    except OSError as error:
        raise PrefloopError(f"run file {path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise PrefloopError(f"run file {path} is not UTF-8 text: byte {error.start} is {error.reason}") from None
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise PrefloopError(f"run file {path} is not valid TOML: {error}") from None


def apply_overrides(data: Mapping[str, Any], overrides: Iterable[str]) -> JSONObject:
    """A copy of `data` with each `key.path=value` set; the value is read as TOML, else taken as a bare string.

    Nothing after the `=` takes the key out, whether it is there or not.

    Raises:
        PrefloopError: an override without `=` or key, or one whose path leads through something not a table.
    """
    result: JSONObject = copy.deepcopy(dict(data))
    for override in overrides:
        key, equals, text = override.partition("=")
        path = [part.strip() for part in key.split(".")]
        if not equals or not all(path):
            raise PrefloopError(f"override {override!r} should be written key.path=value")
        table, take_out = result, not text.strip()
        for depth, part in enumerate(path[:-1], start=1):
            table = table.get(part, {}) if take_out else table.setdefault(part, {})
            if not isinstance(table, dict):
                raise PrefloopError(f"override {override!r}: {'.'.join(path[:depth])} is a value, not a table")
        if take_out:
            table.pop(path[-1], None)
        else:
            table[path[-1]] = _toml_value(text.strip())
    return result


def _toml_value(text: str) -> Any:
    try:
        read = tomllib.loads(f"value = {text}")
    except (tomllib.TOMLDecodeError, RecursionError):
        return text
    return read["value"] if len(read) == 1 else text


def parse_settings(model: type[S], data: Mapping[str, Any], where: str) -> S:
    """Check `data` and make the settings; `where` names its source in messages.

    Raises:
        PrefloopError: one line for each problem: an unknown key with its nearest known name, a missing key, or a
            wrong value with what was expected and what was found.
    """
    try:
        # Through JSON, so that strictness still lets a string name an enum's member or a path.
        return model.model_validate_json(json.dumps(data, default=str), strict=True)
    except ValidationError as error:
        raise PrefloopError("\n".join(_problems(model, data, where, error))) from None


def _problems(model: type[Settings], data: Mapping[str, Any], where: str, error: ValidationError) -> list[str]:
    """One line a key; what the members of a union expected is joined with "or".

    A rule over several keys of a table tells what it wants by itself: the table is not shown.
    """
    unknown: list[str] = []
    rules: list[str] = []
    expected: dict[str, list[str]] = {}
    found: dict[str, str] = {}
    for problem in error.errors(include_url=False):
        location = problem["loc"]
        key = _dotted_key(data, location, missing=problem["type"] == "missing")
        if problem["type"] == "extra_forbidden":
            unknown.append(f"{where}: unknown key {key}{_suggestion(model, location)}")
            continue
        value = problem["input"]
        if problem["type"] == "value_error" and isinstance(value, dict):
            rules.append(": ".join(filter(None, (where, key, str(problem["ctx"]["error"])))))
            continue
        if problem["type"] in ("union_tag_invalid", "union_tag_not_found"):  # pydantic blames the table, not its key
            tag = problem["ctx"]["discriminator"].strip("'")
            key, value = f"{key}.{tag}".lstrip("."), value.get(tag) if isinstance(value, dict) else None
        found.setdefault(key, _shown(value))
        expected.setdefault(key, []).append(_expectation(problem["type"], problem["msg"], problem.get("ctx", {})))
    wrong = [_wrong(where, key, list(dict.fromkeys(wants)), found[key]) for key, wants in expected.items()]
    return unknown + wrong + rules


def _wrong(where: str, key: str, wants: Sequence[str], found: str) -> str:
    if wants == [MISSING]:
        return f"{where}: the key {key} is missing"
    subject = f"{where}: {key}" if key else where
    return f"{subject} should be {' or '.join(wants)}, not {found}"


def _expectation(kind: str, message: str, context: Mapping[str, Any]) -> str:
    match kind:
        case "missing" | "union_tag_not_found":
            return MISSING
        case "model_type" | "dict_type" | "model_attributes_type":
            return "a table"
        case "union_tag_invalid":
            return f"one of {context['expected_tags']}"
        case "string_pattern_mismatch":
            return f"text that matches {context['pattern']}"
        case "string_too_short" if context["min_length"] == 1:
            return "text that is not empty"
    return message.removeprefix("Value error, ").removeprefix("Input should be ").removeprefix("should be ")


def _shown(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _dotted_key(data: object, location: Sequence[str | int], *, missing: bool) -> str:
    """The key as the user wrote it: pydantic's location without the names of union members."""
    parts: list[str] = []
    for position, part in enumerate(location):
        last = position == len(location) - 1
        if isinstance(data, Mapping) and part in data:
            data = data[part]
        elif isinstance(data, list) and isinstance(part, int):
            data = data[part] if part < len(data) else None
        elif not (missing and last):
            continue
        parts.append(_key_part(part))
    return ".".join(parts)


def _key_part(part: str | int) -> str:
    text = str(part)
    return text if re.fullmatch(r"[\w-]+", text) else json.dumps(text)  # quoted as TOML would, always one line


def _suggestion(model: type[Settings], location: Sequence[str | int]) -> str:
    known: set[type[BaseModel]] = {model}
    for part in location[:-1]:
        fields = [parent.model_fields[str(part)] for parent in known if str(part) in parent.model_fields]
        known = {child for field in fields for child in _models(field.annotation)} or known
    names = sorted({name for parent in known for name in parent.model_fields})
    near = difflib.get_close_matches(str(location[-1]), names, n=1, cutoff=0.5)
    return f"; did you mean {near[0]}?" if near else f"; known keys: {', '.join(names)}"


def _models(annotation: Any) -> set[type[BaseModel]]:
    """The settings classes inside an annotation: optional, listed, mapped or in a union."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return {annotation}
    return {model for argument in get_args(annotation) for model in _models(argument)}
