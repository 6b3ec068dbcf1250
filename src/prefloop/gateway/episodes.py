"""An open episode: an agent's conversations at a task, until they become one trajectory."""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from prefloop.chat import AssistantParser, ChatRenderer, stop_ids
from prefloop.chat.layout import ToolsDroppedError
from prefloop.clients.sampling import Sampled
from prefloop.environments.base import Outcome
from prefloop.gateway.batcher import Job
from prefloop.gateway.refusal import RefusedError
from prefloop.gateway.streaming import ReplyStream
from prefloop.gateway.threads import OpenThread, Tokens
from prefloop.records import Ended, JSONObject, Message, PrefloopError, Role, Thread, TokenPath, Trajectory
from prefloop.rollout import Attempt, Provenance, Rollout, derived_seed, numbered

Name = tuple[str, str]  # of an episode: its task's, and its own
EPISODE = "episode"  # the key of a trajectory's extra that holds the id which an agent gave its episode
BEGAN_MIDWAY = "began_midway"  # the key where the first request of an episode that nobody opened held replies already
CHARS_PER_TOKEN = 16  # no text of a real conversation has more; what is longer is refused without being tokenized


def called(name: Name) -> str:
    """An episode in words."""
    return f"episode {name[1]!r} of task {name[0]!r}"


class Voice:
    """How the policy speaks and is understood: the renderer, and what reads its tokens."""

    def __init__(self, renderer: ChatRenderer) -> None:
        self.renderer = renderer
        self._parser = AssistantParser(renderer)
        self._plain = AssistantParser(renderer, "text")
        self._stops = stop_ids(renderer)

    def read(self, sampled: Tokens, context: Tokens, tools: Sequence[JSONObject]) -> Message:
        """What sampled tokens say; where no tools were offered nothing is read as a call."""
        said, before = sampled.tolist(), context.tolist()
        message = self._parser.parse_assistant(said, before, tools)
        return message if tools or not message.tool_calls else self._plain.parse_assistant(said, before)

    def check_tools(self) -> None:
        """See that calls can be read.

        Raises:
            RefusedError: they cannot.
        """
        try:
            self._parser.require_calls()
        except PrefloopError as error:
            raise RefusedError(400, "unsupported_parameter", str(error), param="tools") from None

    def text(self, tokens: Sequence[int]) -> str:
        """The text of sampled tokens, without the one that ends a turn."""
        return self.renderer.encoder.decode([token for token in tokens if token not in self._stops])

    def shown(self, token: int) -> tuple[str, bytes | None]:
        """The text and the bytes of one sampled token, nothing of one that ends a turn."""
        text = self.text([token])
        return text, self.renderer.encoder.bytes_of(token) if text else b""

    def stream(self, context: Tokens, tools: Sequence[JSONObject]) -> ReplyStream:
        """What may be shown of a reply while it is sampled."""
        in_thought = self._parser.in_thought(context.tolist())
        return ReplyStream(self.renderer, self._parser.tool_format, in_thought, with_tools=bool(tools))


@dataclass(eq=False, slots=True)
class Turn:
    """A reply in the making: what the sampler must see, and under which draws."""

    thread: OpenThread
    number: int
    context: Tokens
    seed: int
    job: Job | None = None


class OpenEpisode:
    """What an agent has asked and was answered so far in one attempt at a task.

    Args:
        name: the task's name and the episode's.
        attempt: at which task, for the how-manieth time.
        trajectory_id: of the trajectory that it becomes; all its draws are functions of it.
        voice: how the policy speaks.
        owned: whether somebody in this process opened it and closes it.
    """

    def __init__(self, name: Name, attempt: Attempt, trajectory_id: str, voice: Voice, *, owned: bool) -> None:
        self.name = name
        self.attempt = attempt
        self.trajectory_id = trajectory_id
        self.owned = owned
        self.ended: Ended | None = None  # why no further reply is given
        self.posted: Outcome | None = None  # what the agent says of an episode that is not its own to close
        self.began_midway = False
        self.opened_at = self.last_at = time.monotonic()
        self.in_work: set[Turn] = set()
        self.rendering = threading.Lock()  # held while a request is rendered; taken before the gateway's lock
        self.over = False  # closed, or about to be: what is being rendered is wanted no more
        self._number = 0  # of turns begun
        self._voice = voice
        self._threads: list[OpenThread] = []
        self._keys: set[int] = set()
        self._overflown = False  # whether the last request did not fit into the context
        self._cut = False  # whether the last reply was cut off by its budget

    @property
    def keys(self) -> list[int]:
        """The rows of the sampler that belong to this episode."""
        return list(self._keys)

    @property
    def is_empty(self) -> bool:
        """Whether nothing was asked in it."""
        return not self._threads and not self._overflown

    @property
    def num_turns(self) -> int:
        """How many replies there are, those in the making included."""
        return self.num_said + len(self.in_work)

    @property
    def num_said(self) -> int:
        """How many replies were given."""
        return sum(thread.num_own_turns for thread in self._threads)

    def begin(self, messages: Sequence[Message], tools: tuple[JSONObject, ...], seed: int, max_context: int) -> Turn:
        """Make the next turn: of the thread that these messages go on with, else of a new one.

        Raises:
            RefusedError: the template refuses the messages, or they leave no room in the context (the episode then ends
                by length, unless the agent goes on with less).
        """
        self.last_at = time.monotonic()
        if len(messages) > max_context:  # each is a token at least
            raise self._too_long(max_context, f"{len(messages)} messages")
        if (num_chars := _num_chars(messages, tools)) > CHARS_PER_TOKEN * max_context:
            raise self._too_long(max_context, f"{num_chars} characters")
        if tools:
            self._voice.check_tools()
        try:
            thread = self._thread_for(messages, tools)
        except ToolsDroppedError as error:
            raise RefusedError(400, "unsupported_parameter", str(error), param="tools") from None
        except (PrefloopError, RecursionError) as error:
            raise RefusedError(400, "invalid_messages", str(error), param="messages") from None
        context = thread.context
        if len(context) >= max_context:  # a new thread is not even kept
            raise self._too_long(max_context, f"{len(context)}")
        if not thread.key:
            self._keep(thread)
        thread.busy, self._overflown = True, False
        # Another seed for each turn: a context that is written anew meets positions that were drawn before.
        turn = Turn(thread, self._number, context, derived_seed(thread.key, len(thread.turns), seed))
        self.last_at = time.monotonic()
        self._number += 1
        self.in_work.add(turn)
        return turn

    def _too_long(self, max_context: int, length: str) -> RefusedError:
        self._overflown = True
        return RefusedError(
            400, "context_length_exceeded",
            f"this model's maximum context length is {max_context} tokens, but the messages are {length}: shorten them",
            param="messages",
        )  # fmt: skip

    def _keep(self, thread: OpenThread) -> None:
        """Add a thread; those that were left without a reply go, so that `max_turns` bounds what an episode holds."""
        self._threads = [known for known in self._threads if known.busy or known.num_own_turns]
        thread.key = self._key(thread.context)
        self._keys.add(thread.key)
        self._threads.append(thread)

    def _thread_for(self, messages: Sequence[Message], tools: tuple[JSONObject, ...]) -> OpenThread:
        shared = [(thread.num_shared(messages), thread) for thread in self._threads]
        whole = [
            (count, thread)
            for count, thread in shared
            if count == len(thread.messages) and thread.usable and not thread.busy and thread.tools == tools
        ]
        for count, thread in sorted(whole, key=lambda found: -found[0]):
            rest = messages[count:]
            if thread.awaits_reply and not rest:
                return thread
            if not thread.awaits_reply and rest and all(message.role is not Role.ASSISTANT for message in rest):
                thread.extend(rest)
                return thread
        return self._branch(messages, tools, shared)

    def _branch(
        self, messages: Sequence[Message], tools: tuple[JSONObject, ...], shared: Sequence[tuple[int, OpenThread]]
    ) -> OpenThread:
        """A new thread, which remembers what the policy said in the one that it shares most with."""
        count, nearest = max(shared, key=lambda found: found[0], default=(0, None))
        if nearest is None or not count:
            return OpenThread(self._voice.renderer, messages, tools)
        turns = [turn for turn in nearest.turns_within(count) if turn.message < len(messages) - 1]
        return OpenThread(self._voice.renderer, [*nearest.messages[:count], *messages[count:]], tools, turns)

    def _key(self, context: Tokens) -> int:
        """The name of a thread's row: what it begins with, so that draws do not depend on which agent is faster."""
        digest = hashlib.blake2b(context.tobytes(), digest_size=16).hexdigest()
        known, number = {thread.key for thread in self._threads}, 0
        while (key := derived_seed(self.trajectory_id, digest, number)) in known:
            number += 1
        return key

    def finish(self, turn: Turn, sampled: Sampled) -> Message:
        """Add what the policy said; the message."""
        thread, cut = turn.thread, sampled.stopped == "length"
        try:
            said = self._voice.read(sampled.token, turn.context, thread.tools)
            message = numbered(said, turn.number)
            thread.say(sampled.token, sampled.logprob, message, time=self.num_said, cut=cut)
        finally:  # not before: a request that is being rendered may not go on with a thread that is being added to
            self.give_up(turn)
        self._cut = cut
        return message

    def give_up(self, turn: Turn) -> None:
        """The turn is in work no more."""
        self.in_work.discard(turn)
        turn.thread.busy = False
        self.last_at = time.monotonic()

    def stop(self, ended: Ended) -> None:
        """Give no further replies. An agent that its policy left without room ended by length, whatever came then."""
        outside = (Ended.ERROR, Ended.DEADLINE, Ended.INTERRUPTED)
        without_room = self._overflown and ended in outside
        self.ended = Ended.LENGTH if without_room or (self._cut and ended is Ended.ERROR) else ended

    def close(
        self,
        provenance: Provenance,
        outcome: Outcome | None,
        ended: Ended | None = None,
        notes: Mapping[str, str] | None = None,
        *,
        group_seeded: bool = False,
    ) -> Rollout:
        """The trajectory of all that was said, and what was verified of it."""
        spoken = [thread for thread in self._threads if thread.num_own_turns] or self._threads[:1]
        messages: list[Message] = []
        threads: list[Thread] = []
        paths: list[TokenPath] = []
        cut: list[int] = []
        for open_thread in spoken:
            start = len(messages)
            thread, own = open_thread.record(start)
            threads.append(thread)
            paths += own
            cut += [start + index for index in open_thread.cut]
            messages += open_thread.messages
        extra: JSONObject = {"stage": provenance.stage}
        extra |= {} if self.owned else {EPISODE: self.name[1]}
        extra |= {"cut": cut} if cut else {}
        extra |= {BEGAN_MIDWAY: True} if self.began_midway else {}
        extra |= {key: text for key, text in (notes or {}).items() if text}
        task = self.attempt.task
        trajectory = Trajectory(
            id=self.trajectory_id,
            task_id=task.id,
            messages=tuple(messages or task.messages),
            num_prompt_messages=threads[0].num_context if threads else len(task.messages),
            ended=self.ended or ended or (Ended.LENGTH if self._overflown or self._cut else Ended.DONE),
            author_kind=provenance.author_kind,
            author=provenance.author,
            run_id=provenance.run_id,
            iteration=provenance.iteration,
            sample=self.attempt.sample,
            seed=self.attempt.seed,
            group_seeded=group_seeded,
            token_paths=tuple(paths),
            extra=extra,
            threads=tuple(threads),
        )
        return Rollout(trajectory, outcome)

    def state(self) -> JSONObject:
        """What can be seen of it from outside."""
        task, episode = self.name
        now = time.monotonic()
        return {
            "task": task,
            "episode": episode,
            "trajectory": self.trajectory_id,
            "num_threads": len(self._threads),
            "num_turns": self.num_turns,
            "in_work": len(self.in_work),
            "ended": self.ended.value if self.ended else None,
            "open_s": round(now - self.opened_at, 3),
            "idle_s": round(now - self.last_at, 3),
        }


def _num_chars(messages: Sequence[Message], tools: Sequence[JSONObject]) -> int:
    """How long what every template shows is: contents, arguments of calls, and tools."""
    calls = [call.arguments for message in messages for call in message.tool_calls]
    shown = sum(len(a) if isinstance(a, str) else len(json.dumps(a, ensure_ascii=False)) for a in calls)
    return shown + sum(len(message.content) for message in messages) + sum(len(json.dumps(tool)) for tool in tools)
