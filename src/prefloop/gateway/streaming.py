"""What of a reply may be shown before it is whole."""

from __future__ import annotations

from typing import Final

from prefloop.chat import ChatRenderer

# What ends the text that is certainly content, by the format of calls; the empty text: nothing is certain.
_TAG: Final = ("<tool_call>",)
OPENINGS: Final = {"text": (), "hermes": _TAG, "xml": _TAG, "glm": _TAG, "llama3": ("<", "{", "[")}
NOTHING_CERTAIN: Final = ("",)
_THOUGHT: Final = "</think>"
_UNFINISHED: Final = "\ufffd"  # a character of which some bytes are still to come


class ContentStream:
    """The content of a reply piece by piece: what is shown is never taken back.

    Text is shown up to where a tool call may begin; what follows is shown when the reply is whole. The reasoning of
    a thinking template is not content: nothing is shown before it has ended. White space is held back until
    something follows, because it is not part of the content before a call.
    """

    def __init__(self, renderer: ChatRenderer, tool_format: str) -> None:
        self._thinks = _THOUGHT in renderer.template_source
        self._openings = OPENINGS.get(tool_format, NOTHING_CERTAIN)
        self._shown = ""

    def feed(self, text: str) -> str:
        """What more may be shown, of a reply that reads `text` so far."""
        if self._thinks:
            _, thought, text = text.partition(_THOUGHT)
            text = text.lstrip("\n") if thought else ""
        if self._openings and text[:1].isspace():
            return ""  # it belongs to the content only if no call follows
        for opening in self._openings:
            text = text[: _first(text, opening)]
        return self._more(text.rstrip(_UNFINISHED).rstrip())

    def rest(self, content: str) -> str:
        """What was not shown yet of the whole reply's content."""
        return self._more(content)

    def _more(self, text: str) -> str:
        if not text.startswith(self._shown):
            return ""
        more, self._shown = text[len(self._shown) :], text
        return more


def _first(text: str, opening: str) -> int:
    """Where `opening` begins in the text, or may begin at its end."""
    found = text.find(opening)
    if found >= 0:
        return found
    for length in range(min(len(opening) - 1, len(text)), 0, -1):
        if text.endswith(opening[:length]):
            return len(text) - length
    return len(text)
