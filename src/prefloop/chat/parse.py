"""Sampled tokens → messages. Whatever a model writes becomes a message; nothing here raises on it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Final, get_args

from prefloop.chat.calls import CALL_FORMATS, Placed, Reading, ToolFormat
from prefloop.chat.render import ChatRenderer
from prefloop.chat.turns import stop_ids, turn_pieces
from prefloop.records import JSONObject, Message, PrefloopError, Role, ToolCall
from prefloop.records.strict_json import is_storable

THINK, THOUGHT = "<think>", "</think>"
_OWN = "response_template"
_LOOK_BACK: Final = 64  # tokens of the prompt in which an opened thought is looked for


class AssistantParser:
    """Reads what a policy sampled: reasoning, content and tool calls.

    Args:
        renderer: for tokenizer and template.
        tool_format: one of `CALL_FORMATS`; `response_template`, transformers' own parser; `text`, which reads no
            calls; `auto`, which takes the renderer's, or else finds it (`find_format`).

    Raises:
        PrefloopError: an unknown format, or `response_template` where the tokenizer has none.
    """

    def __init__(self, renderer: ChatRenderer, tool_format: ToolFormat = "auto") -> None:
        if tool_format not in get_args(ToolFormat):
            raise PrefloopError(f"tool format {tool_format!r} is not one of {', '.join(get_args(ToolFormat))}")
        if tool_format == _OWN and not _declares(renderer):
            raise PrefloopError(
                f"the tokenizer has no response_template: use one of the tool formats {', '.join(CALL_FORMATS)} or text"
            )
        self._renderer = renderer
        self._stops = stop_ids(renderer)
        self._thinks = THOUGHT in renderer.template_source
        self.tool_format = find_format(renderer) if tool_format == "auto" else tool_format
        self._format = CALL_FORMATS.get(self.tool_format)

    def require_calls(self) -> None:
        """See that calls can be read, for a policy that has tools.

        Raises:
            PrefloopError: nothing reads the calls of the template, and no format was asked for.
        """
        if self.tool_format == "text" and self._renderer.tool_format == "auto":
            raise PrefloopError(
                "no tool format reads the calls that the chat template shows, so that the policy could call no tool: "
                "give the tokenizer a response_template, set policy.tool_format, or give no tools"
            )

    def parse_assistant(
        self, tokens: Sequence[int], prompt: Sequence[int] = (), tools: Sequence[JSONObject] = ()
    ) -> Message:
        """The message that sampled tokens say.

        Args:
            tokens: what was sampled, with or without the stop token.
            prompt: what it followed, where the template may have begun the turn (an open `<think>`).
            tools: what the turn could call, in the OpenAI shape: they type the arguments of formats without types.
        """
        ids = self._without_stop(tokens)
        if self.tool_format == _OWN:
            message = self._by_response_template([int(token) for token in tokens], prompt, tools)
            if message is not None:
                return message
        return self.parse_text(self._renderer.encoder.decode(ids), self.in_thought(prompt), tools)

    def in_thought(self, prompt: Sequence[int]) -> bool | None:
        """Whether a prompt has opened the reasoning; None where there is none to tell."""
        if not len(prompt):
            return None
        before = self._renderer.encoder.decode([int(token) for token in prompt[-_LOOK_BACK:]])
        return before.rstrip().endswith(THINK)

    def parse_text(self, text: str, in_thought: bool | None = None, tools: Sequence[JSONObject] = ()) -> Message:
        """The message that a text says; `in_thought` as in `split_reasoning`."""
        reading = self._read(text, in_thought, tools)
        calls = tuple(placed.call for placed in reading.calls)
        return Message(Role.ASSISTANT, reading.content, reading.reasoning, calls)

    def places(self, tokens: Sequence[int]) -> tuple[Placed, ...]:
        """The calls of a turn with their places in its decoded text; none where the format cannot tell."""
        return self._read(self._renderer.encoder.decode(self._without_stop(tokens)), None, ()).calls

    def _without_stop(self, tokens: Sequence[int]) -> list[int]:
        ids = [int(token) for token in tokens]
        return ids[:-1] if ids and ids[-1] in self._stops else ids

    def _read(self, text: str, in_thought: bool | None, tools: Sequence[JSONObject]) -> Reading:
        reasoning, rest = split_reasoning(text, in_thought) if self._thinks else ("", text)
        if self._format is None:
            return Reading(rest, (), reasoning)
        reading = self._format.read(rest, tools)
        offset = len(text) - len(rest)
        calls = tuple(Placed(call, start + offset, end + offset) for call, start, end in reading.calls)
        return replace(reading, calls=calls, reasoning=reasoning or reading.reasoning)

    def _by_response_template(
        self, sampled: list[int], prompt: Sequence[int], tools: Sequence[JSONObject]
    ) -> Message | None:
        try:
            before = [int(token) for token in prompt]
            raw = self._renderer.tokenizer.parse_response(sampled, prefix=before, tools=list(tools) or None)
            message = Message.from_dict({**raw, "role": "assistant"})
            if sampled[-1] in self._stops:  # such a grammar reads the whole turn, and may leave its end as content
                end = self._renderer.encoder.control_name(sampled[-1])
                message = replace(message, content=message.content.removesuffix(end))
        except Exception:  # a declared grammar over a model's words may fail in any way; the text is then read plainly
            return None
        return message if is_storable(message.to_dict()) else None


def split_reasoning(text: str, in_thought: bool | None = None) -> tuple[str, str]:
    """Reasoning and what follows it. Reasoning that was cut off is all reasoning.

    `in_thought` says whether the prompt has opened it. Where that is not known (None), what ends a thought that the
    text does not begin does so all the same.
    """
    opened = in_thought or text.lstrip().startswith(THINK)
    if not opened and (in_thought is not None or THOUGHT not in text):
        return "", text
    body = text.lstrip().removeprefix(THINK) if opened else text
    reasoning, _, rest = body.partition(THOUGHT)
    return reasoning.strip("\n"), rest.lstrip("\n")


# --- which format a template has ----------------------------------------------------------------------------

_CALL: Final = ToolCall("probe", {"text": "word", "number": 5}, "call00001")
_TOOL: Final[JSONObject] = {
    "type": "function",
    "function": {
        "name": "probe",
        "description": "d",
        "parameters": {
            "type": "object",
            "properties": {"text": {"type": "string"}, "number": {"type": "integer"}},
        },
    },
}


def find_format(renderer: ChatRenderer) -> ToolFormat:
    """The renderer's tool format; where that is `auto`, the first that reads back a call as the template shows it.

    Formats that also read the reasoning of that turn come first. Where none reads it, it is the tokenizer's response
    template, and `text` where it has none.
    """
    if renderer.tool_format != "auto":
        return renderer.tool_format
    if "tool format" not in renderer.learnt:
        renderer.learnt["tool format"] = _first_that_reads(renderer)
    found: ToolFormat = renderer.learnt["tool format"]
    return found


def _first_that_reads(renderer: ChatRenderer) -> str:
    declared = [_OWN] if _declares(renderer) else []
    for message, ids, prompt in _shown_calls(renderer):
        for name in [*CALL_FORMATS, *declared]:
            if AssistantParser(renderer, name).parse_assistant(ids, prompt, [_TOOL]) == message:  # type: ignore[arg-type]
                return name
    return declared[0] if declared else "text"


def _shown_calls(renderer: ChatRenderer) -> Iterator[tuple[Message, list[int], list[int]]]:
    """Turns that call a tool, with and without a thought, and the tokens in which the template shows them."""
    question = Message(Role.USER, "question")
    for reasoning in ("a thought", ""):
        for tools in ((_TOOL,), ()):
            turn = Message(Role.ASSISTANT, "", reasoning, (_CALL,))
            rendering = renderer.begin([question, turn], tools)
            try:
                said = renderer.encode(turn_pieces(renderer, rendering, 1))[0]
                prompt = renderer.encode(renderer.pieces(rendering, 1, True))[0]
            except PrefloopError:
                continue  # a template without tools, without calls, or without reasoning beside them
            call = ToolCall(_CALL.name, _CALL.arguments)  # most formats write no ids
            yield replace(turn, tool_calls=(call,)), said, prompt
            break


def _declares(renderer: ChatRenderer) -> bool:
    return getattr(renderer.tokenizer, "response_template", None) is not None
