"""gpt-oss's harmony: a turn is messages in channels, and a call is one whose recipient is a function.

`<|channel|>analysis<|message|>…<|end|>` is reasoning, `final` the answer, `commentary` with `to=functions.NAME` (in the
header's role or channel) a call, and without a recipient a word to the user beside the calls.
https://github.com/openai/harmony
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Final

from prefloop.chat.calls.base import UNREADABLE, Placed, Reading
from prefloop.records import JSONObject, ToolCall
from prefloop.records.strict_json import load_json

_MESSAGE: Final = "<|message|>"
_END_TOKENS: Final = ("<|end|>", "<|call|>", "<|return|>", "<|start|>")
_ENDS: Final = re.compile("|".join(map(re.escape, _END_TOKENS)))
_CHANNEL: Final = re.compile(r"<\|channel\|>\s*(\w+)")
_TO: Final = re.compile(r"\bto=")
_RECIPIENT: Final = re.compile(r"\bto=(?:functions\.)?([^\s<]{1,128})")


class Harmony:
    """Reads the messages of a turn."""

    def read(self, text: str, tools: Sequence[JSONObject] = ()) -> Reading:
        """As `CallFormat.read`; text outside any message is content."""
        said: dict[str, list[str]] = {"analysis": [], "content": []}
        calls: list[Placed] = []
        for start, header, body, end in _messages(text):
            channel, recipient = _CHANNEL.search(header), _RECIPIENT.search(header)
            if recipient is not None and recipient[1] not in ("assistant", "user"):
                calls.append(Placed(ToolCall(recipient[1], _arguments(body)), start, end))
            elif recipient is None and _TO.search(header):
                calls.append(Placed(ToolCall(UNREADABLE, body), start, end))
            elif body:
                said["analysis" if channel and channel[1] == "analysis" else "content"].append(body)
        return Reading("\n".join(said["content"]), tuple(calls), "\n".join(said["analysis"]))


def within_messages(text: str) -> str:
    """The text up to where the last message that has begun ends, or may end: what is read of it stays as it is."""
    begins = text.rfind(_MESSAGE)
    if begins < 0:
        return ""
    ended = _ENDS.search(text, begins)
    if ended is not None:
        return text[: ended.end()]
    cut = text.rfind("<", begins + len(_MESSAGE))
    return text if cut < 0 or not any(end.startswith(text[cut:]) for end in _END_TOKENS) else text[:cut]


def _messages(text: str) -> Iterator[tuple[int, str, str, int]]:
    """The messages of a turn: start, header, body, and where it ends, its own end token included."""
    at = 0
    while at < len(text):
        begins = text.find(_MESSAGE, at)
        if begins < 0:
            header = text[at:]
            cut = header.lstrip().startswith(("<|channel|>", "<|start|>", "to="))  # in the middle of a header
            yield at, header if cut else "", "" if cut else header, len(text)
            return
        start = begins + len(_MESSAGE)
        ended = _ENDS.search(text, start)
        end = ended.start() if ended else len(text)
        following = ended.end() if ended and ended.group() != "<|start|>" else end
        yield at, text[at:begins], text[start:end], following
        at = following


def _arguments(body: str) -> JSONObject | str:
    try:
        value = load_json(body) if body.strip() else {}
    except ValueError:
        return body
    return value if isinstance(value, dict) else body
