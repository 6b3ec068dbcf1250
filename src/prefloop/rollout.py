"""Environment × policy → trajectories.

All episodes of a unit go in lock step, a turn at a time, so that a local policy samples them in one batch. What
goes wrong in an episode is kept as data: it ends with `error` and says why. A draw is a function of the unit's
seed, the row and the position, so that a unit that is rolled out again gives the same trajectories.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from prefloop.chat import AssistantParser, ChatRenderer, PathBuilder
from prefloop.clients.sampling import Conversation, MessageSampler, Sampled, SamplingSettings, TokenSampler
from prefloop.environments.base import Environment, Episode, Outcome
from prefloop.environments.guarded import EpisodeFailedError, GuardedEpisode
from prefloop.records import (
    AuthorKind,
    Ended,
    JSONObject,
    Message,
    PrefloopError,
    Role,
    Status,
    Task,
    TokenPath,
    ToolCall,
    Trajectory,
    content_hash,
)

Tokens: TypeAlias = NDArray[np.int32]
NOTHING: Tokens = np.zeros(0, np.int32)


@dataclass(frozen=True, slots=True)
class Attempt:
    """A task to be tried, for the `sample`-th time; `seed` is the environment's and the same for a group."""

    task: Task
    sample: int
    seed: int


@dataclass(frozen=True, slots=True)
class Provenance:
    """Where trajectories come from; `stage` says for what they were made."""

    author_kind: AuthorKind
    author: str
    run_id: str
    iteration: int
    stage: str

    def trajectory_id(self, attempt: Attempt) -> str:
        """The id of an attempt's trajectory: where it comes from, not what it says."""
        where = (self.run_id, self.stage, self.iteration, self.author)
        return content_hash("trajectory", *where, attempt.task.id, attempt.sample, attempt.seed)


@dataclass(frozen=True, slots=True)
class Rollout:
    """A trajectory and what the environment verified of it (None: nothing can be verified)."""

    trajectory: Trajectory
    outcome: Outcome | None


@dataclass(frozen=True, slots=True)
class Turn:
    """What a policy said: a message, or why there is none. `cut` says that it ran out of tokens."""

    message: Message | None
    cut: bool = False
    error: str = ""


class Speaker(Protocol):
    """A policy in conversation with many episodes, each named by its index."""

    def speak(self, episodes: Sequence[int], turn: int) -> list[Turn]:
        """The next assistant message of each of these episodes."""
        ...

    def hear(self, episode: int, messages: Sequence[Message]) -> None:
        """Take in what the environment answered."""
        ...

    def paths(self, episode: int) -> tuple[TokenPath, ...]:
        """The token paths of an episode so far; none for a policy without tokens."""
        ...


class LocalSpeaker:
    """A policy whose weights are here: token ids are kept exactly as sampled."""

    def __init__(
        self,
        sampler: TokenSampler,
        renderer: ChatRenderer,
        episodes: Sequence[GuardedEpisode],
        settings: SamplingSettings,
        seed: int,
    ) -> None:
        self._session = sampler.session()
        self._parser = AssistantParser(renderer)
        if any(episode.tools for episode in episodes):
            self._parser.require_calls()
        self._settings = settings
        self._seed = seed
        self._builders = {
            i: PathBuilder(renderer, episode.messages, episode.tools)
            for i, episode in enumerate(episodes)
            if episode.failure is None
        }
        self._begun: dict[int, Tokens] = {}

    def repeat(self, episode: int, tokens: Tokens, message: Message) -> None:
        """Take an episode's next turn as it was said before; int [N] and what they say."""
        self._builders[episode].append_sampled(tokens, None, message)

    def begin(self, episode: int, tokens: Tokens) -> None:
        """Make an episode's next turn begin with these tokens, int [N]: only what follows them is sampled."""
        self._begun[episode] = tokens

    def speak(self, episodes: Sequence[int], turn: int) -> list[Turn]:
        """Sample each episode's next turn in one batch."""
        begun = [self._begun.pop(i, NOTHING) for i in episodes]
        contexts = [np.concatenate([self._builders[i].context, b]) for i, b in zip(episodes, begun, strict=True)]
        budgets = [max(0, self._settings.max_new_tokens - len(b)) for b in begun]
        # A seed for each turn: a context that is written anew meets positions that were drawn before.
        seed = derived_seed(self._seed, turn)
        sampled = self._session.generate(contexts, list(episodes), self._settings, seed, budgets)
        return [self._turn(*found, turn) for found in zip(episodes, begun, sampled, strict=True)]

    def _turn(self, episode: int, begun: Tokens, sampled: Sampled, turn: int) -> Turn:
        tokens = np.concatenate([begun, sampled.token])
        if not len(tokens):
            return Turn(None, cut=True)
        builder = self._builders[episode]
        message = numbered(self._parser.parse_assistant(tokens.tolist(), builder.context.tolist(), builder.tools), turn)
        builder.append_sampled(tokens, np.concatenate([np.full(len(begun), np.nan), sampled.logprob]), message)
        return Turn(message, cut=sampled.stopped == "length")

    def hear(self, episode: int, messages: Sequence[Message]) -> None:
        """Append what the environment said to the episode's context."""
        self._builders[episode].extend(messages)

    def paths(self, episode: int) -> tuple[TokenPath, ...]:
        """The token paths of an episode so far; none of one that could not be opened."""
        return self._builders[episode].paths() if episode in self._builders else ()


class RemoteSpeaker:
    """A policy behind a server: messages only."""

    def __init__(
        self, sampler: MessageSampler, episodes: Sequence[Episode], settings: SamplingSettings, seed: int
    ) -> None:
        self._sampler = sampler
        self._settings = settings
        self._seed = seed
        self._tools = [episode.tools for episode in episodes]
        self._messages = [list(episode.messages) for episode in episodes]

    def speak(self, episodes: Sequence[int], turn: int) -> list[Turn]:
        """Ask the server for each episode's next turn."""
        asked = [Conversation(tuple(self._messages[i]), self._tools[i]) for i in episodes]
        turns = []
        replies = self._sampler.reply(asked, self._settings, derived_seed(self._seed, turn))
        for i, reply in zip(episodes, replies, strict=True):
            if reply.status is not Status.OK or reply.message is None:
                turns.append(Turn(None, error=f"{reply.status.value}: {reply.detail}"))
                continue
            self._messages[i].append(reply.message)
            turns.append(Turn(reply.message, cut=reply.stopped == "length"))
        return turns

    def hear(self, episode: int, messages: Sequence[Message]) -> None:
        """Append what the environment said."""
        self._messages[episode] += messages

    def paths(self, episode: int) -> tuple[TokenPath, ...]:
        """None: a server gives no tokens."""
        return ()


@dataclass
class _Record:
    """What an episode has come to so far."""

    messages: list[Message]
    ended: Ended | None = None
    error: str = ""

    def fail(self, error: EpisodeFailedError) -> None:
        """End by what the environment did."""
        self.ended, self.error = error.ended, str(error)


def roll_out(
    environment: Environment,
    attempts: Sequence[Attempt],
    episodes: Sequence[GuardedEpisode],
    speaker: Speaker,
    provenance: Provenance,
) -> list[Rollout]:
    """Play every attempt to its end; one rollout for each attempt, in order.

    `episodes` are those that `environment` opened for the attempts and that `speaker` was made with; they are closed.
    """
    records = [_Record(list(episode.messages)) for episode in episodes]
    for record, episode in zip(records, episodes, strict=True):
        if episode.failure is not None:
            record.fail(episode.failure)
    with _closed_at_last(episodes):
        for turn in range(environment.max_turns):
            active = [i for i, record in enumerate(records) if record.ended is None]
            if not active:
                break
            for i, said in zip(active, speaker.speak(active, turn), strict=True):
                answered = _take_turn(records[i], episodes[i], said)
                if records[i].ended is None:
                    _listen(records[i], speaker, i, answered)
        return [
            _finish(attempt, record, episode, speaker.paths(i), environment, provenance)
            for i, (attempt, record, episode) in enumerate(zip(attempts, records, episodes, strict=True))
        ]


@contextmanager
def _closed_at_last(episodes: Sequence[GuardedEpisode]) -> Iterator[None]:
    """See that no process of an environment stays behind where the policy fails."""
    try:
        yield
    finally:
        for episode in episodes:
            with suppress(EpisodeFailedError):
                episode.close()


def open_episodes(environment: Environment, attempts: Sequence[Attempt]) -> list[GuardedEpisode]:
    """An episode for each attempt; one that could not be opened says why, and its rollout is that failure."""
    return [GuardedEpisode(environment, attempt.task, attempt.seed) for attempt in attempts]


def unit_seed(seed: int, provenance: Provenance, attempts: Sequence[Attempt]) -> int:
    """The seed of a unit's draws: a function of the run's seed and of what the unit is."""
    return derived_seed(seed, provenance.stage, provenance.iteration, attempts[0].task.id)


def derived_seed(*parts: object) -> int:
    """A 63-bit seed that is a function of the parts."""
    return int(content_hash("seed", *parts)[:16], 16) >> 1


def _listen(record: _Record, speaker: Speaker, episode: int, answered: Sequence[Message]) -> None:
    try:
        speaker.hear(episode, answered)
    except PrefloopError as error:  # the chat template refuses what the environment said
        record.ended, record.error = Ended.ERROR, str(error)


def _take_turn(record: _Record, episode: GuardedEpisode, said: Turn) -> tuple[Message, ...]:
    if said.message is not None:
        record.messages.append(said.message)
    if said.error:
        record.ended, record.error = Ended.ERROR, said.error
        return ()
    if said.cut or said.message is None:
        record.ended = Ended.LENGTH
        return ()
    try:
        step = episode.step(said.message)
    except EpisodeFailedError as error:  # it belongs to its episode, not to the run
        record.fail(error)
        return ()
    record.messages += step.messages
    record.ended = Ended.DONE if step.done else None
    return step.messages


def _finish(
    attempt: Attempt,
    record: _Record,
    episode: GuardedEpisode,
    paths: tuple[TokenPath, ...],
    environment: Environment,
    provenance: Provenance,
) -> Rollout:
    outcome = _outcome(record, episode)
    extra: JSONObject = {"stage": provenance.stage}
    if record.error:
        extra["error"] = record.error
    try:
        episode.close()
    except EpisodeFailedError as error:  # what was said and verified stays as it is
        extra["error_at_close"] = str(error)
    trajectory = Trajectory(
        id=provenance.trajectory_id(attempt),
        task_id=attempt.task.id,
        messages=tuple(record.messages),
        num_prompt_messages=len(episode.messages),
        ended=record.ended or Ended.MAX_TURNS,
        author_kind=provenance.author_kind,
        author=provenance.author,
        run_id=provenance.run_id,
        iteration=provenance.iteration,
        sample=attempt.sample,
        seed=attempt.seed,
        group_seeded=environment.group_seeded,
        token_paths=paths,
        extra=extra,
    )
    return Rollout(trajectory, outcome)


def _outcome(record: _Record, episode: GuardedEpisode) -> Outcome | None:
    """What the environment verifies; an episode that failed has no outcome, which is not a bad one."""
    if record.error:
        return None
    try:
        return episode.outcome()
    except EpisodeFailedError as error:
        record.fail(error)
        return None


def numbered(message: Message, turn: int) -> Message:
    """The message with an id for each tool call, which its answer refers to."""
    calls = tuple(ToolCall(c.name, c.arguments, c.id or f"call_{turn}_{n}") for n, c in enumerate(message.tool_calls))
    return Message(Role.ASSISTANT, message.content, message.reasoning_content, calls)
