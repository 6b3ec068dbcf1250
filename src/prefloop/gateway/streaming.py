"""What of a reply may be shown before it is whole."""

from __future__ import annotations

from typing import Final

from prefloop.chat import ChatRenderer
from prefloop.chat.calls.harmony import Harmony, within_messages
from prefloop.chat.parse import THINK, THOUGHT, split_reasoning
from prefloop.records import Message

# What ends the text that is certainly content, by the format of calls; the empty text: nothing is certain.
_TAG: Final = ("<tool_call>",)
OPENINGS: Final = {"text": (), "hermes": _TAG, "xml": _TAG, "glm": _TAG, "llama3": ("<", "{", "[")}
NOTHING_CERTAIN: Final = ("",)
_UNFINISHED: Final = "\ufffd"  # a character of which some bytes are still to come


class ReplyStream:
    """The reasoning and the content of a reply piece by piece: what is shown is never taken back.

    Text is shown up to where a tool call may begin; what follows is shown when the reply is whole. White space is
    held back until something follows, because it is not part of the content before a call.

    Args:
        renderer: for the template.
        tool_format: how calls are written.
        in_thought: whether the prompt has opened the reasoning, as in `split_reasoning`.
        with_tools: whether calls are read at all.
    """

    def __init__(
        self, renderer: ChatRenderer, tool_format: str, in_thought: bool | None = None, *, with_tools: bool = True
    ) -> None:
        self._thinks = THOUGHT in renderer.template_source
        self._in_thought = in_thought
        self._harmony = Harmony() if tool_format == "harmony" and with_tools else None
        self._openings = OPENINGS.get(tool_format, NOTHING_CERTAIN)
        self._reasoning = self._content = ""

    def feed(self, text: str) -> tuple[str, str]:
        """What more may be shown of the reasoning and of the content, of a reply that reads `text` so far."""
        return self._more(*(_held(part) for part in self._certain(text)))

    def rest(self, message: Message) -> tuple[str, str]:
        """What was not shown yet of the whole reply."""
        return self._more(message.reasoning_content, message.content)

    def _certain(self, text: str) -> tuple[str, str]:
        reasoning = ""
        if self._thinks:
            start = text.lstrip()
            opened = self._in_thought or start.startswith(THINK)
            if THINK.startswith(start) or not (opened or THOUGHT in text or self._in_thought is not None):
                return "", ""
            if opened and THOUGHT not in text:
                thought = start.removeprefix(THINK)
                return thought[: _first(thought, THOUGHT)].lstrip("\n"), ""
            reasoning, text = split_reasoning(text, self._in_thought)
        if self._harmony is not None:
            reading = self._harmony.read(within_messages(text))
            return reasoning or reading.reasoning, reading.content
        if self._openings and text[:1].isspace():
            return reasoning, ""  # it belongs to the content only if no call follows
        for opening in self._openings:
            text = text[: _first(text, opening)]
        return reasoning, text

    def _more(self, reasoning: str, content: str) -> tuple[str, str]:
        thought, self._reasoning = _new(reasoning, self._reasoning)
        said, self._content = _new(content, self._content)
        return thought, said


def _held(text: str) -> str:
    return text.rstrip(_UNFINISHED).rstrip()


def _new(text: str, shown: str) -> tuple[str, str]:
    """What a text adds to what was shown of it, and what is shown then."""
    return (text[len(shown) :], text) if text.startswith(shown) else ("", shown)


def _first(text: str, opening: str) -> int:
    """Where `opening` begins in the text, or may begin at its end."""
    found = text.find(opening)
    if found >= 0:
        return found
    for length in range(min(len(opening) - 1, len(text)), 0, -1):
        if text.endswith(opening[:length]):
            return len(text) - length
    return len(text)
