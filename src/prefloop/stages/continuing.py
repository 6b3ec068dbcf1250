"""Going on from within a trajectory: what was said up to a step is said again, the rest is the policy's.

The environment is played from its beginning with the trajectory's seed; that it answers as it did is checked.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from prefloop.chat import ChatRenderer, StepFinder, StepPlace, own_tokens
from prefloop.clients.sampling import SamplingSettings, TokenSampler
from prefloop.environments.base import Environment
from prefloop.records import AuthorKind, Ended, Message, PrefloopError, Task, TokenPath, Trajectory
from prefloop.rollout import NOTHING, Attempt, LocalSpeaker, Provenance, Rollout, Tokens, Turn, open_episodes, roll_out


class Said(NamedTuple):
    """A turn that was said before: its tokens, what they say, and whether they were cut off."""

    tokens: Tokens
    message: Message
    cut: bool


@dataclass(frozen=True, slots=True, eq=False)
class Prefix:
    """A trajectory up to the end of a step: whole turns, and the tokens with which the next one begins.

    `messages` are those that the environment must give again. `is_all`: nothing is left to say.
    """

    trajectory: Trajectory
    place: StepPlace
    turns: tuple[Said, ...]
    begun: Tokens
    messages: tuple[Message, ...]
    is_all: bool


def prefix_of(trajectory: Trajectory, paths: Sequence[TokenPath], place: StepPlace, finder: StepFinder) -> Prefix:
    """The trajectory up to the end of a step; `paths` are its token paths, sampled or rendered.

    Raises:
        PrefloopError: several conversations, which nothing here can open again; as `StepFinder.end`.
    """
    if trajectory.threads:
        raise PrefloopError(
            f"trajectory {trajectory.id} is an agent's, whose conversations cannot be taken up from the middle: "
            "label its steps by people or by the judge instead"
        )
    messages = trajectory.messages
    end = finder.end(trajectory, paths, place)
    own = trajectory.own_turns
    whole = [i for i in own if i < place.message or (i == place.message and end.ends_turn)]
    begun = NOTHING
    if not end.ends_turn:
        path, tokens = own_tokens(paths, place.message)
        begun = paths[path].token[tokens[tokens <= end.token]]
    following = next((i for i in own if i not in whole), len(messages))
    said = tuple(_said(trajectory, paths, i) for i in whole)
    is_all = bool(said) and said[-1].cut
    if following == len(messages) and trajectory.ended in (Ended.DONE, Ended.MAX_TURNS):
        is_all = True
    return Prefix(trajectory, place, said, begun, messages[:following], is_all)


def _said(trajectory: Trajectory, paths: Sequence[TokenPath], message: int) -> Said:
    path, tokens = own_tokens(paths, message)
    cut = trajectory.ended is Ended.LENGTH and message == len(trajectory.messages) - 1
    return Said(paths[path].token[tokens], trajectory.messages[message], cut)


class ContinuingSpeaker:
    """A local policy that first says again what each episode's prefix says."""

    def __init__(self, speaker: LocalSpeaker, prefixes: Sequence[Prefix]) -> None:
        self._speaker = speaker
        self._prefixes = prefixes

    def speak(self, episodes: Sequence[int], turn: int) -> list[Turn]:
        """The next turn of each of these episodes, repeated or sampled."""
        said = {i: self._repeat(i, turn) for i in episodes if turn < len(self._prefixes[i].turns)}
        fresh = [i for i in episodes if i not in said]
        for i in fresh:
            if turn == len(self._prefixes[i].turns):
                self._speaker.begin(i, self._prefixes[i].begun)
        if fresh:
            said |= dict(zip(fresh, self._speaker.speak(fresh, turn), strict=True))
        return [said[i] for i in episodes]

    def _repeat(self, episode: int, turn: int) -> Turn:
        tokens, message, cut = self._prefixes[episode].turns[turn]
        self._speaker.repeat(episode, tokens, message)
        return Turn(message, cut)

    def hear(self, episode: int, messages: Sequence[Message]) -> None:
        """Take in what the environment answered."""
        self._speaker.hear(episode, messages)

    def paths(self, episode: int) -> tuple[TokenPath, ...]:
        """The token paths of an episode so far."""
        return self._speaker.paths(episode)


def go_on(
    environment: Environment,
    prefixes: Sequence[Prefix],
    tasks: Sequence[Task],
    sampler: TokenSampler,
    renderer: ChatRenderer,
    sampling: SamplingSettings,
    seed: int,
) -> list[Rollout]:
    """Go on once from each prefix; a prefix may stand there several times. `tasks` are theirs, one each.

    Raises:
        PrefloopError: an environment that does not answer as it did.
    """
    attempts = [
        Attempt(task, i, prefix.trajectory.seed) for i, (prefix, task) in enumerate(zip(prefixes, tasks, strict=True))
    ]
    episodes = open_episodes(environment, attempts)
    speaker = ContinuingSpeaker(LocalSpeaker(sampler, renderer, episodes, sampling, seed), prefixes)
    found = roll_out(environment, attempts, episodes, speaker, Provenance(AuthorKind.CHECKPOINT, "", "", -1, "value"))
    for prefix, rollout in zip(prefixes, found, strict=True):
        _check_replayed(prefix, rollout.trajectory, environment.name)
    return found


def _check_replayed(prefix: Prefix, again: Trajectory, environment: str) -> None:
    before = prefix.messages
    failed = again.ended in (Ended.ERROR, Ended.DEADLINE)  # an attempt that is lost says nothing of how it replays
    if failed or again.messages[: len(before)] == before:
        return
    both = zip(before, again.messages, strict=False)
    differs = next((i for i, (one, other) in enumerate(both) if one != other), len(again.messages))
    raise PrefloopError(
        f"trajectory {prefix.trajectory.id}: environment {environment} does not replay it: with the same seed message "
        f"{differs} is another; the value of steps needs an environment that is a function of task and seed"
    )
