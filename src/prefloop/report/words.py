"""Numbers in words for people: one place, so that the page and the terminal say the same."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from typing import Any

from prefloop.records import JSONObject

NOTHING = "–"
ACRONYMS = {"sft", "dpo", "kl"}


def percent(share: float | None, digits: int = 1) -> str:
    """A share as a percentage: 0.328 → "32.8 %"."""
    return NOTHING if share is None else f"{100 * share:.{digits}f} %"


def share_with_interval(interval: Mapping[str, Any] | None) -> str:
    """A share with its interval: "32.8 % [28.9, 37.0]"."""
    if not interval:
        return NOTHING
    return f"{percent(interval['value'])} [{100 * interval['low']:.1f}, {100 * interval['high']:.1f}]"


def not_graded(num: int | None, total: int) -> str:
    """How many of all episodes have no verdict: "3 of 6 were not graded"; empty where none is so."""
    return f"{num:,} of {total:,} {'was' if num == 1 else 'were'} not graded" if num else ""


def points_with_interval(interval: Mapping[str, Any]) -> str:
    """A difference of shares in percentage points: "+56.4 points [51.7, 60.7]"."""
    value, low, high = (f"{100 * interval[key]:+.1f}".replace("-", "−") for key in ("value", "low", "high"))
    return f"{value} points [{low}, {high}]"


def number(value: float | None, digits: int = 3) -> str:
    """A number with about three significant digits: 0.0124, 3.98, 1,204."""
    if value is None or not math.isfinite(value):
        return NOTHING
    if value == int(value) and abs(value) < 1e15:
        return f"{int(value):,}".replace("-", "−")
    size = math.floor(math.log10(abs(value)))
    return f"{value:,.{max(0, digits - 1 - size)}f}".replace("-", "−")


def seconds(value: float | None) -> str:
    """A time: "0.8 s", "42 s", "2 min 5 s", "3 h 20 min"."""
    if value is None:
        return NOTHING
    if value < 60:
        return f"{value:.1f} s" if value < 9.95 else f"{value:.0f} s"
    minutes, rest = divmod(round(value), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min"


def p_value(value: float) -> str:
    """A p-value: "p = 0.013", "p < 0.001", "p < 1e-60" (a bound, rounded up to a power of ten)."""
    if value >= 0.001:
        return f"p = {value:.2g}"
    if value >= 1e-4:
        return "p < 0.001"
    exponent = math.ceil(math.log10(value)) if value > 0 else -300
    return f"p < 1e{exponent}"


def title(name: str) -> str:
    """A key as a title: "invented_ids" → "Invented ids", "num_threads" → "Threads", "sft" → "SFT"."""
    if name in ACRONYMS:
        return name.upper()
    text = name.removeprefix("num_").replace("_", " ").strip()
    return text[:1].upper() + text[1:]


def toml_text(settings: JSONObject) -> str:
    """Settings as TOML for reading; what TOML has no word for (null) is left out of it as a comment."""
    return "\n".join(_toml_lines(settings, ())).strip() + "\n"


def _toml_lines(table: Mapping[str, Any], path: tuple[str, ...]) -> list[str]:
    plain = {key: value for key, value in table.items() if not isinstance(value, Mapping)}
    nested = {key: value for key, value in table.items() if isinstance(value, Mapping)}
    lines = [f"[{'.'.join(map(_key, path))}]"] if path and (plain or not nested) else []
    lines += [f"# {key} is not set" if value is None else _toml_line(key, value) for key, value in plain.items()]
    lines += [""] if lines else []
    for key, value in nested.items():
        lines += _toml_lines(value, (*path, key))
    return lines


def _toml_line(key: str, value: object) -> str:
    return f"{_key(key)} = {_toml_value(value)}"


def _toml_value(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_toml_value, value))}]"
    if isinstance(value, Mapping):
        return f"{{ {', '.join(_toml_line(key, inner) for key, inner in value.items() if inner is not None)} }}"
    return _quoted(str(value))


def _key(name: str) -> str:
    return name if re.fullmatch(r"[A-Za-z0-9_-]+", name) else _quoted(name)


def _quoted(text: str) -> str:
    # JSON's escapes are TOML's too, but for DEL, which only JSON allows as it is.
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")
