"""One conversation of an agent, while it is going on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from prefloop.chat import ChatRenderer, PathBuilder
from prefloop.records import JSONObject, Message, Role, Source, Thread, TokenPath, ToolCall, parse_arguments

Tokens = NDArray[np.int32]


@dataclass(frozen=True, slots=True, eq=False)
class OwnTurn:
    """An assistant message that the policy sampled: its index in the thread, and its ids; int32 [N].

    `time` is how many turns of the episode were said before it.
    """

    message: int
    token: Tokens
    time: int


def says_the_same(theirs: Message, ours: Message) -> bool:
    """Whether a message that an agent sends back is the one of ours.

    Frameworks drop the reasoning of an assistant's turn, the content beside its tool calls, and space around it.
    Arguments are sent as text, so that a malformed call whose text is a JSON object comes back as an object.
    """
    if theirs.role is not ours.role or theirs.tool_call_id != ours.tool_call_id:
        return False
    if ours.role is not Role.ASSISTANT:
        return theirs.content == ours.content
    content = theirs.content.strip()
    same_content = content == ours.content.strip() or bool(ours.tool_calls and not content)
    return same_content and list(map(_as_sent, theirs.tool_calls)) == list(map(_as_sent, ours.tool_calls))


def _as_sent(call: ToolCall) -> ToolCall:
    return replace(call, arguments=parse_arguments(call.arguments)) if isinstance(call.arguments, str) else call


class OpenThread:
    """A conversation with its own messages and tools, and the token paths of what the policy said in it.

    Args:
        renderer: for tokenizer and template.
        messages: what was said before; the next message is the policy's.
        tools: the tools that the template shows.
        turns: assistant messages among these that the policy said in another thread: their sampled ids are seen
            again as they were, but learned there, not here.

    Raises:
        PrefloopError: the template refuses or drops a message or the tools.
    """

    def __init__(
        self,
        renderer: ChatRenderer,
        messages: Sequence[Message],
        tools: tuple[JSONObject, ...],
        turns: Sequence[OwnTurn] = (),
    ) -> None:
        starts = [*(turn.message for turn in turns), len(messages)]
        self._builder = PathBuilder(renderer, messages[: starts[0]], tools)
        for turn, following in zip(turns, starts[1:], strict=True):
            self._builder.append_sampled(turn.token, None, messages[turn.message])
            self._builder.extend(messages[turn.message + 1 : following])
        self.messages = list(messages)
        self.num_context = len(messages)
        self.tools = tools
        self.turns = list(turns)
        self.cut: list[int] = []  # messages whose reply was cut off by its budget
        self.key = 0
        self.busy = False
        self.usable = True

    @property
    def context(self) -> Tokens:
        """The ids that the sampler's next call must see; int32 [N]."""
        return self._builder.context

    @property
    def num_own_turns(self) -> int:
        """How many assistant messages were said here."""
        return sum(turn.message >= self.num_context for turn in self.turns)

    @property
    def awaits_reply(self) -> bool:
        """Whether the last message is not the policy's own: a request was refused or given up before its reply."""
        return not self.turns or self.turns[-1].message < len(self.messages) - 1

    def num_shared(self, messages: Sequence[Message]) -> int:
        """How many first messages of a request are those of this thread."""
        count = 0
        for theirs, ours in zip(messages, self.messages, strict=False):
            if not says_the_same(theirs, ours):
                break
            count += 1
        return count

    def extend(self, messages: Sequence[Message]) -> None:
        """Add what the agent answered to the policy's last message.

        Raises:
            PrefloopError: the template refuses or drops a message; the thread cannot be gone on with.
        """
        self.usable = False
        self._builder.extend(messages)
        self.usable = True
        self.messages += messages

    def say(self, token: Tokens, logprob: NDArray[np.float32], message: Message, *, time: int, cut: bool) -> None:
        """Add what the policy said; int32 [N] and float32 [N]."""
        self._builder.append_sampled(token, logprob, message)
        self.turns.append(OwnTurn(len(self.messages), token, time))
        if cut:
            self.cut.append(len(self.messages))
        self.messages.append(message)

    def turns_within(self, count: int) -> list[OwnTurn]:
        """The policy's own turns among the first `count` messages."""
        return [turn for turn in self.turns if turn.message < count]

    def record(self, start: int) -> tuple[Thread, list[TokenPath]]:
        """The thread and its token paths, where its messages begin at `start` of the trajectory's."""
        times = tuple(turn.time for turn in self.turns if turn.message >= self.num_context)
        thread = Thread(start, start + len(self.messages), self.num_context, self.tools, times)
        placed = [_placed(path, start, self.num_context) for path in self._builder.paths()]
        return thread, [path for path in placed if path.loss_mask.any()]


def _placed(path: TokenPath, start: int, num_context: int) -> TokenPath:
    """A path as one of a trajectory's, up to its last token that is learned here."""
    context = (path.source == Source.SAMPLED) & (path.message < num_context)
    source = np.where(context, np.uint8(Source.PROMPT), path.source)
    own = np.flatnonzero(source == Source.SAMPLED)
    end = int(own[-1]) + 1 if len(own) else 0
    message = np.where(path.message < 0, path.message, path.message + start).astype(np.int32)
    return replace(path, token=path.token[:end], source=source[:end], message=message[:end], logprob=path.logprob[:end])
