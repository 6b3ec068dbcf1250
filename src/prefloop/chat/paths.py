"""Token paths: what a policy really saw and sampled, turn by turn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from prefloop.chat.pieces import Piece, split_after, text_of
from prefloop.chat.render import ChatRenderer
from prefloop.chat.turns import check_shown, turn_pieces
from prefloop.records import JSONObject, Message, PrefloopError, Role, Source, TokenPath, Trajectory

if TYPE_CHECKING:
    from numpy.typing import ArrayLike


@dataclass
class _OpenPath:
    token: list[int] = field(default_factory=list)
    source: list[int] = field(default_factory=list)
    message: list[int] = field(default_factory=list)
    logprob: dict[int, list[float]] = field(default_factory=dict)  # by the index of the turn's first token
    num_kept: int = 0  # up to the last sampled token: what follows it trains nothing

    def add(self, token: Sequence[int], source: Sequence[int], message: Sequence[int]) -> None:
        self.token += token
        self.source += source
        self.message += message

    def add_sampled(self, token: list[int], logprob: list[float] | None, message: int) -> None:
        if logprob is not None:
            self.logprob[len(self.token)] = logprob
        self.add(token, [int(Source.SAMPLED)] * len(token), [message] * len(token))
        self.num_kept = len(self.token)


class PathBuilder:
    """Builds the token paths of one trajectory while it is rolled out.

    `context` is what the sampler must see; give what it sampled to `append_sampled`, then the environment's
    answer to `extend`. Sampled ids are kept as they are; where the template's next prompt extends the last turn,
    only what it adds after that turn is appended, else a new path opens from the prompt rendered anew.

    Args:
        renderer: for tokenizer and template.
        messages: the task's prompt.
        tools: the tools that the template shows.

    Raises:
        PrefloopError: the template refuses or drops a message or the tools.
    """

    def __init__(self, renderer: ChatRenderer, messages: Sequence[Message], tools: Sequence[JSONObject] = ()) -> None:
        self._renderer = renderer
        self._rendering = renderer.begin(messages, tools)
        self._closed: list[_OpenPath] = []
        self._sampled: list[int] = []
        self._canonical: tuple[Piece, ...] = ()  # of a turn that was demonstrated
        self._open(self._prompt())

    @property
    def context(self) -> NDArray[np.int32]:
        """The ids that the sampler's next call must see; int32 [N]."""
        return np.array(self._path.token, np.int32)

    @property
    def tools(self) -> Sequence[JSONObject]:
        """The tools that the template shows."""
        return self._rendering.tools

    @property
    def messages(self) -> tuple[Message, ...]:
        """All messages so far."""
        return tuple(self._rendering.messages)

    def append_sampled(self, tokens: ArrayLike, logprobs: ArrayLike | None, message: Message) -> None:
        """Add a turn that the policy sampled in `context`.

        Args:
            tokens: the sampled ids, with the stop token where one was sampled; at least one.
            logprobs: float, one for each token (nats), None where they are not known.
            message: what the tokens say; becomes the next message.

        Raises:
            PrefloopError: no tokens, or not as many log-probs.
        """
        ids = np.asarray(tokens, np.int64).tolist()
        values = None if logprobs is None else np.asarray(logprobs, np.float64).tolist()
        if not ids or (values is not None and len(ids) != len(values)):
            raise PrefloopError(f"a sampled turn needs tokens and a log-prob each, not {len(ids)} and {logprobs!r:.60}")
        self._path.add_sampled(ids, values, len(self._rendering.messages))
        self._renderer.add(self._rendering, [message])
        self._sampled, self._canonical = ids, ()

    def append_demonstrated(self, message: Message) -> None:
        """Add a turn that nobody sampled, as if the policy had sampled the template's rendering of it.

        Raises:
            PrefloopError: as `turn_pieces` and `check_shown`.
        """
        turn = len(self._rendering.messages)
        self._renderer.add(self._rendering, [message])
        pieces = turn_pieces(self._renderer, self._rendering, turn)
        check_shown(self._renderer, message, pieces, turn)
        self._sampled, self._canonical = self._renderer.encode(pieces)[0], pieces
        self._path.add_sampled(self._sampled, None, turn)

    def extend(self, messages: Sequence[Message]) -> None:
        """Add the environment's answer and make `context` the prompt of the next turn.

        Raises:
            PrefloopError: the template refuses or drops a message.
        """
        turn = len(self._rendering.messages) - 1
        before = self._renderer.pieces(self._rendering, turn, True)
        self._renderer.add(self._rendering, messages)
        prompt = self._prompt()
        suffix = self._after_turn(prompt, before, turn)
        if suffix is None:
            self._closed.append(self._path)
            self._open(prompt)
        else:
            self._path.add(*self._renderer.encode(suffix))

    def paths(self) -> tuple[TokenPath, ...]:
        """The paths, each up to its last sampled token; those without one are left out."""
        return tuple(self._freeze(path) for path in (*self._closed, self._path) if path.num_kept)

    def _prompt(self) -> tuple[Piece, ...]:
        return self._renderer.pieces(self._rendering, len(self._rendering.messages), True)

    def _open(self, prompt: Sequence[Piece]) -> None:
        self._path = _OpenPath()
        self._path.add(*self._renderer.prompt_tokens(prompt))

    def _after_turn(self, prompt: Sequence[Piece], before: Sequence[Piece], turn: int) -> Sequence[Piece] | None:
        """What `prompt` adds after the turn, None where it does not extend the path."""
        rest = split_after(prompt, before)
        if rest is None:
            return None
        pieces = [piece for piece in rest if isinstance(piece, Piece)]
        found = self._after_text(pieces) if not self._canonical else None
        if found is None:
            try:
                canonical = self._canonical or turn_pieces(self._renderer, self._rendering, turn)
            except PrefloopError:  # the template has no such turn: what was sampled stays in the path that is there
                return None
            after = split_after(pieces, canonical)
            if after is None:
                return None
            found = [piece for piece in after if isinstance(piece, Piece)]
            if canonical[-1].control >= 0 and self._sampled[-1] != canonical[-1].control:
                found.insert(0, canonical[-1])  # cut off by a length limit: the template ends the turn
        return found

    def _after_text(self, pieces: list[Piece]) -> list[Piece] | None:
        """What follows the sampled text in `pieces`, if they begin with exactly that and it ends with a stop."""
        text = self._renderer.encoder.decode(self._sampled)
        position = 0
        for index, piece in enumerate(pieces):
            position += len(piece.text)
            if position >= len(text):
                ends = position == len(text) and piece.control == self._sampled[-1]
                return pieces[index + 1 :] if ends and text_of(pieces[: index + 1]) == text else None
        return None

    def _freeze(self, path: _OpenPath) -> TokenPath:
        end = path.num_kept
        logprob = np.full(end, np.nan, np.float32)
        for start, values in path.logprob.items():
            logprob[start : start + len(values)] = values
        return TokenPath(
            np.array(path.token[:end], np.int32),
            np.array(path.source[:end], np.uint8),
            np.array(path.message[:end], np.int32),
            logprob,
            self._renderer.tokenizer_hash,
            self._renderer.template_hash,
        )


def render_demonstration(
    renderer: ChatRenderer,
    messages: Sequence[Message],
    tools: Sequence[JSONObject] = (),
    num_prompt_messages: int = 0,
    name: str = "",
) -> tuple[TokenPath, ...]:
    """The token paths of messages that nobody sampled, as if a policy had.

    Each assistant turn after the prompt is `SAMPLED`, through its stop token, in the one path in which the model
    would have sampled it. Log-probs are NaN.

    Args:
        renderer: for tokenizer and template.
        messages: the whole conversation.
        tools: the tools that the template shows.
        num_prompt_messages: how many first messages are the task's: their assistant turns are context.
        name: names the trajectory in errors.

    Raises:
        PrefloopError: nothing to learn from, or the template refuses, drops or cannot mask a turn.
    """
    who = f"trajectory {name or '(unnamed)'}"
    turns = [i for i in range(num_prompt_messages, len(messages)) if messages[i].role is Role.ASSISTANT]
    if not turns:
        raise PrefloopError(
            f"{who} has no assistant message after its {num_prompt_messages} prompt messages: its loss mask would be "
            "all zero; give a conversation in which the assistant speaks"
        )
    try:
        return _replay(renderer, messages, tools, turns)
    except PrefloopError as error:
        raise PrefloopError(f"{who}: {error}") from error


def trajectory_paths(
    renderer: ChatRenderer, trajectory: Trajectory, tools: Sequence[JSONObject] = ()
) -> tuple[TokenPath, ...]:
    """The paths of a trajectory: those that were sampled where they hold for this renderer, else rendered anew.

    Raises:
        PrefloopError: as `render_demonstration`.
    """
    stored, mine = trajectory.token_paths, (renderer.tokenizer_hash, renderer.template_hash)
    if stored and all((path.tokenizer_hash, path.template_hash) == mine for path in stored):
        return stored
    rendered: list[TokenPath] = []
    for thread in trajectory.conversations(tuple(tools)):
        messages = trajectory.messages[thread.start : thread.stop]
        paths = render_demonstration(renderer, messages, thread.tools, thread.num_context, trajectory.id)
        rendered += (_shifted(path, thread.start) for path in paths)
    return tuple(rendered)


def _shifted(path: TokenPath, start: int) -> TokenPath:
    """A path of a thread as one of its trajectory, whose messages begin earlier."""
    return replace(path, message=np.where(path.message < 0, path.message, path.message + start).astype(np.int32))


def _replay(
    renderer: ChatRenderer, messages: Sequence[Message], tools: Sequence[JSONObject], turns: list[int]
) -> tuple[TokenPath, ...]:
    builder = PathBuilder(renderer, messages[: turns[0]], tools)
    for turn, following in zip(turns, [*turns[1:], None], strict=True):
        builder.append_demonstrated(messages[turn])
        if following is not None:
            builder.extend(messages[turn + 1 : following])
    return builder.paths()
