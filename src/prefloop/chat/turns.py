"""An assistant's turn as the model says it: what follows the template's own generation prompt, through a stop token.

Nobody may have sampled the turn, and the template may show it in another way than the model says it: it leaves out a
thought that its generation prompt has opened, rewrites the history before a final answer, or ends a turn with the
token that begins the reply. What the model must say is then put together from the template's own renderings.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Final

from prefloop.chat.layout import literal_pieces
from prefloop.chat.pieces import Entry, Piece, fork, num_common, split_after, text_of
from prefloop.chat.render import ChatRenderer, Rendering
from prefloop.records import Message, PrefloopError, Role, Source, ToolCall

_QUESTION: Final = Message(Role.USER, "question")
_REPLY: Final = Message(Role.ASSISTANT, "reply")
_THOUGHT: Final = "a thought"
_PROBE_CALL: Final = ToolCall("probe", {"x": "y"}, "call00001")
_OPENED: Final = re.compile(r"<(\w+)>(\s*)$")  # a prompt that ends so has begun a thought

Pieces = tuple[Piece, ...]
End = tuple[int, Pieces]
"""How a turn ends: how many pieces after its own text belong to it, and what the template's rendering lacks."""


def turn_pieces(renderer: ChatRenderer, rendering: Rendering, turn: int) -> Pieces:
    """The pieces that the model says as message `turn`, after the prompt that asks for it; the last is the stop token.

    Raises:
        PrefloopError: the template refuses or drops a message, shows the turn in a way that its own generation
            prompt does not allow, or ends it with no token.
    """
    said = _said(renderer, rendering, turn)
    own = max((index for index, piece in enumerate(said) if piece.message == turn), default=-1)
    tail = said[own + 1 :]
    key = (rendering.outline.shapes[turn], tuple(piece.control for piece in tail))
    if key not in renderer.learnt:
        renderer.learnt[key] = _end(renderer, rendering.messages[turn], tail)
    end: End | None = renderer.learnt[key]
    if end is None:
        raise PrefloopError(
            f"the template ends assistant message {turn} with no stop token, so that turn cannot be masked; "
            "use a template that ends turns with a token"
        )
    return said[: own + 1 + end[0]] + end[1]


# --- what is said -------------------------------------------------------------------------------------------


def _said(renderer: ChatRenderer, rendering: Rendering, turn: int) -> Pieces:
    """What the rendering of the conversation through the turn adds to the prompt that asks for it."""
    prompt = renderer.pieces(rendering, turn, True)
    rest = _rest(renderer.pieces(rendering, turn + 1, False), prompt, turn)
    if rest is None:
        rest = _after_opened_thought(renderer, rendering, turn)
    header = _header(renderer)
    if rest is not None and header and split_after(rest, header) is not None:
        raise PrefloopError(
            f"the template gives assistant message {turn} the header {_start(header)}, which its generation prompt "
            "lacks there, so that what the model would say is not known; use a training template"
        )
    if rest is not None:
        return rest
    shown = _since(renderer.pieces(rendering, turn + 1, False), turn)
    lacking, instead = fork(_since(prompt, turn), shown)
    raise PrefloopError(
        f"the template does not render assistant message {turn} as its own generation prompt followed by the turn: "
        f"where the prompt has {_start(lacking)}, the turn has {_start(instead)}; change the message (such as its "
        "reasoning_content) or the template's variables, or use a training template"
    )


def _header(renderer: ChatRenderer) -> Pieces:
    """What the generation prompt puts before the reply to a question."""
    if "header" not in renderer.learnt:
        asked = renderer.begin([_QUESTION])
        try:
            found = split_after(renderer.pieces(asked, 1, True), renderer.pieces(asked, 1, False))
        except PrefloopError:
            found = None
        renderer.learnt["header"] = _pieces(found or ())
    header: Pieces = renderer.learnt["header"]
    return header


def _rest(whole: Sequence[Piece], prompt: Sequence[Piece], turn: int) -> Pieces | None:
    rest = split_after(whole, prompt)
    if rest is None:  # an answer may change how what came before it is shown; its own header is the same
        rest = split_after(_since(whole, turn), _since(prompt, turn))
    return None if rest is None else _pieces(rest)


def _since(pieces: Sequence[Piece], turn: int) -> Sequence[Piece]:
    """The pieces after the last one of an earlier message."""
    earlier = (index for index, piece in enumerate(pieces) if 0 <= piece.message < turn)
    return pieces[max(earlier, default=-1) + 1 :]


def _after_opened_thought(renderer: ChatRenderer, rendering: Rendering, turn: int) -> Pieces | None:
    """The turn after a prompt that has opened a thought which the template's rendering of the turn does not have.

    It is what the template shows of the same turn with a thought; without one the thought is closed at once. Where
    the template shows no thoughts at all, it goes before what it shows, closed as it was opened (`<think>` and a line
    break: a line break, `</think>` and two line breaks). Other tags than that must stand in the template's text.
    """
    prompt = renderer.pieces(rendering, turn, True)
    opened = _OPENED.search(text_of(_since(prompt, turn)))
    closing = f"</{opened[1]}>" if opened else ""
    message = _with_thought_apart(rendering.messages[turn], closing)
    history = rendering.messages[:turn]
    thinking = replace(message, reasoning_content=message.reasoning_content or _THOUGHT)
    shown = renderer.begin([*history, thinking], rendering.tools)
    said = _rest(renderer.pieces(shown, turn + 1, False), prompt, turn)
    if said is not None:
        return said if message.reasoning_content else _without_thought(said, turn)
    if opened is None or (closing != "</think>" and closing not in renderer.template_source):
        return None
    plain = renderer.begin([*history, replace(message, reasoning_content="")], rendering.tools)
    answer = _answer(renderer, plain, turn, prompt, opened[0])
    if answer is None or f"<{opened[1]}>" in text_of(answer) or closing in text_of(answer):
        return None
    thought = (Piece(message.reasoning_content, -1, Source.PROMPT, turn),) if message.reasoning_content else ()
    return thought + _pieces(literal_pieces(renderer.encoder, opened[2] + closing + 2 * opened[2])) + answer


def _answer(
    renderer: ChatRenderer, plain: Rendering, turn: int, prompt: Sequence[Piece], opening: str
) -> Pieces | None:
    """What the turn shows after its header, the prompt's without the opening of a thought; None without a header."""
    header = split_after(prompt, renderer.pieces(plain, turn, False)) or ()
    if text_of(_pieces(header)).strip() == opening.strip():
        return None
    asked = _without_end(_since(prompt, turn), opening)
    answer = split_after(_since(renderer.pieces(plain, turn + 1, False), turn), asked)
    return None if answer is None else _pieces(answer)


def _with_thought_apart(message: Message, closing: str) -> Message:
    """The message with a thought that its content holds as its reasoning."""
    if not closing or message.reasoning_content or closing not in message.content:
        return message
    thought, _, content = message.content.partition(closing)
    thought = thought.strip().removeprefix(closing.replace("/", ""))
    return replace(message, content=content.lstrip("\n"), reasoning_content=thought.strip("\n"))


def _without_thought(said: Pieces, turn: int) -> Pieces | None:
    thoughts = [index for index, piece in enumerate(said) if piece.message == turn and piece.text == _THOUGHT]
    return said[: thoughts[0]] + said[thoughts[0] + 1 :] if len(thoughts) == 1 else None


def _without_end(pieces: Sequence[Piece], end: str) -> Sequence[Piece]:
    """The pieces without their last characters, which are `end`."""
    kept = list(pieces)
    left = len(end)
    while left:
        last = kept.pop()
        if len(last.text) > left:
            kept.append(last._replace(text=last.text[:-left]))
        left = max(0, left - len(last.text))
    return kept


def _pieces(entries: Sequence[Entry]) -> Pieces:
    return tuple(entry for entry in entries if isinstance(entry, Piece))


def _start(entries: Sequence[Entry]) -> str:
    return repr(text_of(_pieces(entries))[:40])


# --- how it ends --------------------------------------------------------------------------------------------


def _end(renderer: ChatRenderer, message: Message, tail: Pieces) -> End | None:
    """The stop token is the last control token of the turn's tail that stays when a reply follows.

    Where the template ends no turn with a token, it is the token that the reply begins with.
    """
    answered = max(_tails_when_answered(renderer, message), key=lambda other: _num_shared(tail, other))
    controls = [index for index, piece in enumerate(tail) if piece.control >= 0]
    if controls and _ends_turns(renderer):
        staying = [index for index in controls if index < _num_shared(tail, answered)]
        return (staying[-1] if staying else controls[0]) + 1, ()
    following = _pieces(split_after(answered, tail) or ())
    reply = next((index for index, piece in enumerate(following) if piece.control >= 0), -1)
    return None if reply < 0 else (len(tail), following[: reply + 1])


def _num_shared(tail: Pieces, other: Pieces) -> int:
    """How many pieces two tails share from their start, all text counted as equal."""
    return num_common([piece.control for piece in tail], [piece.control for piece in other])


def _ends_turns(renderer: ChatRenderer) -> bool:
    """Whether the template puts a token after a turn of text."""
    try:
        pieces = renderer.pieces(renderer.begin([_QUESTION, _REPLY]), 2, False)
    except PrefloopError:
        return True
    own = max((index for index, piece in enumerate(pieces) if piece.message == 1), default=-1)
    return any(piece.control >= 0 for piece in pieces[own + 1 :])


def _tails_when_answered(renderer: ChatRenderer, message: Message) -> list[Pieces]:
    """What stands between a turn and the reply to it, after each of its own pieces, the last one first.

    It need not be the last one: a reply may show the name of the call again.
    """
    reply = Message(Role.USER, "reply")
    if message.tool_calls:
        call = message.tool_calls[0]
        reply = Message(Role.TOOL, "reply", tool_call_id=call.id, name=call.name)
    try:
        pieces = renderer.pieces(renderer.begin([_QUESTION, message, reply]), 3, False)
    except PrefloopError:
        return [()]
    end = next((index for index, piece in enumerate(pieces) if piece.message == 2), len(pieces))
    return [pieces[own + 1 : end] for own in reversed(range(end)) if pieces[own].message == 1] or [pieces[:end]]


def stop_ids(renderer: ChatRenderer) -> frozenset[int]:
    """The ids at which a sampler must stop: those that end a turn of text and a turn that calls a tool.

    Raises:
        PrefloopError: the template ends a turn without a control token and the tokenizer has no end token.
    """
    ids = set(renderer.end_ids)
    for turn in (_REPLY, Message(Role.ASSISTANT, tool_calls=(_PROBE_CALL,))):
        try:
            ids.add(turn_pieces(renderer, renderer.begin([_QUESTION, turn]), 1)[-1].control)
        except PrefloopError:
            continue  # a template without tool calls
    if not ids:
        raise PrefloopError("neither the chat template nor the tokenizer ends a turn with a token: set eos_token")
    return frozenset(ids)


# --- whether all of it is said ------------------------------------------------------------------------------


def check_shown(renderer: ChatRenderer, message: Message, said: Pieces, turn: int) -> None:
    """See that the model would say all of a message: it must not learn a turn that is not the one given.

    The reasoning of a message is left out where the template never shows reasoning.

    Raises:
        PrefloopError: the template drops a part of the content, or reasoning that it shows in other turns.
    """
    text = text_of(said)
    parts = [part.strip() for part in re.split(r"</?think>", message.content)]
    if not all(part in text for part in parts):
        where = " beside its tool calls" if message.tool_calls else ""
        raise PrefloopError(
            f"the chat template drops the content of message {turn} (role assistant){where}; "
            "leave the content out, or use a template that shows it"
        )
    if message.reasoning_content.strip() not in text and shows_reasoning(renderer):
        raise PrefloopError(
            f"the chat template drops the reasoning of message {turn} (role assistant), which it shows in other turns; "
            "leave its reasoning_content out, or use a template that shows it"
        )


def shows_reasoning(renderer: ChatRenderer) -> bool:
    """Whether the template shows the reasoning of a turn of text, or of one that calls a tool."""
    if "reasoning" not in renderer.learnt:
        renderer.learnt["reasoning"] = any(_shows_thought(renderer, turn) for turn in _THOUGHTFUL)
    return bool(renderer.learnt["reasoning"])


_THOUGHTFUL: Final = (
    Message(Role.ASSISTANT, "reply", _THOUGHT),
    Message(Role.ASSISTANT, "", _THOUGHT, (_PROBE_CALL,)),
)


def _shows_thought(renderer: ChatRenderer, turn: Message) -> bool:
    try:
        return _THOUGHT in text_of(renderer.pieces(renderer.begin([_QUESTION, turn]), 2, False))
    except PrefloopError:
        return False
