"""The gateway without its wire: episodes are opened, asked, and closed into trajectories."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType
from urllib.parse import quote

from prefloop.chat import ChatRenderer
from prefloop.chat.template import StoppedError, stoppable
from prefloop.clients.sampling import Sampled, SamplingSettings
from prefloop.environments.base import Outcome
from prefloop.gateway.batcher import Batcher, Job
from prefloop.gateway.episodes import Name, OpenEpisode, Turn, Voice, called
from prefloop.gateway.keeping import Judge, Keeper, Record
from prefloop.gateway.refusal import RefusedError
from prefloop.gateway.settings import GatewaySettings
from prefloop.gateway.wire import Asked
from prefloop.records import Ended, JSONObject, Message, PrefloopError, Role, Trajectory
from prefloop.rollout import Attempt, Provenance, Rollout

Find = Callable[[str], Attempt]


class Gateway:
    """Serves a policy to agents and records what they do with it; every method may be called from any thread.

    Args:
        renderer: for the policy's tokenizer and template.
        batcher: samples the policy.
        provenance: where the trajectories come from; `author` is the checkpoint.
        max_context: the most tokens of a conversation, replies included.
        sampling: temperature, top-p and the longest reply.
        settings: limits and deadlines.
        find: the next attempt at the task of a name, for episodes that agents open; raises `PrefloopError` where
            there is no such task. Without it only `open` opens episodes.
        record: writes a closed episode that an agent opened. What `open` opened is its opener's to keep.
        judge: writes the outcome of a trajectory that is in the store, for episodes that ended without one.
        group_seeded: whether the attempts at a task share its luck.
        closed: episodes that were had before: their names are taken.
        ungraded: those of them that have no outcome, and the ids of their trajectories.
    """

    def __init__(
        self,
        renderer: ChatRenderer,
        batcher: Batcher,
        provenance: Provenance,
        max_context: int,
        sampling: SamplingSettings,
        settings: GatewaySettings,
        *,
        find: Find | None = None,
        record: Record | None = None,
        judge: Judge | None = None,
        group_seeded: bool = False,
        closed: Iterable[Name] = (),
        ungraded: Mapping[Name, str] = MappingProxyType({}),
    ) -> None:
        self.settings = settings
        self.provenance = provenance
        self.max_context = min(max_context, settings.max_context or max_context)
        self.voice = Voice(renderer)
        self._batcher = batcher
        self._sampling = sampling
        self._find = find
        self._keeper = Keeper(record, judge, ungraded)
        self._group_seeded = group_seeded
        self._lock = threading.RLock()
        self._open: dict[Name, OpenEpisode] = {}
        self._closed = set(closed)
        self._num_in_work = 0
        self._draining = False

    @property
    def recorded(self) -> Counter[Ended]:
        """How many episodes that agents opened were written down, by how they ended."""
        return self._keeper.recorded

    # --- episodes -----------------------------------------------------------------------------------------------

    def open(self, name: Name, attempt: Attempt | None = None) -> OpenEpisode:
        """Open an episode; `attempt` where the caller owns it, closes it and keeps its trajectory.

        Raises:
            RefusedError: the episode is or was open, its task is unknown, or too many are open.
        """
        with self._lock:
            if name in self._open or name in self._closed:
                was = "is open already" if name in self._open else "was closed"
                raise RefusedError(409, "duplicate_episode", f"{called(name)} {was}: use another id")
            if self._draining:
                raise _stopping()
            if len(self._open) >= self.settings.max_episodes:
                raise RefusedError(
                    429, "too_many_episodes", f"{len(self._open)} episodes are open: close some", retry_after_s=2
                )
            tried = attempt or self._attempt(name[0])
            trajectory_id = self.provenance.trajectory_id(tried)
            episode = OpenEpisode(name, tried, trajectory_id, self.voice, owned=attempt is not None)
            self._open[name] = episode
            return episode

    def _attempt(self, task: str) -> Attempt:
        if self._find is None:
            raise RefusedError(404, "unknown_episode", "episodes are opened by the environment here, not by agents")
        try:
            return self._find(task)
        except PrefloopError as error:
            raise RefusedError(404, "unknown_task", str(error)) from None

    def named(self, episode: str) -> Name:
        """The name of the one open episode of this id, else of the one that was closed without an outcome.

        Raises:
            RefusedError: there is none, or several tasks have one.
        """
        with self._lock:
            closed = [name for name in self._closed if name[1] == episode]
            found = [name for name in self._open if name[1] == episode] or [n for n in closed if n in self._keeper]
            if len(found) > 1:
                tasks = ", ".join(sorted(name[0] for name in found))
                raise RefusedError(400, "task_needed", f"several tasks have an episode {episode!r}: {tasks}; name one")
            if not found:
                raise self._not_open(closed[0] if closed else ("", episode))
            return found[0]

    def close(self, name: Name, outcome: Outcome | None = None, *, ended: Ended | None = None, **extra: str) -> Rollout:
        """End an episode; replies in the making are given up. Its trajectory, and `outcome`, else what was posted.

        `ended` stands unless a limit or a deadline ended it before; `extra` is kept beside it, where it is not empty.

        Raises:
            RefusedError: it is not open, or it cannot be written now: it is closed all the same, and will be written.
        """
        with self._lock:
            episode = self._open.get(name)
        if episode is None:
            raise self._not_open(name)
        with self._halted(episode):
            if self._open.get(name) is not episode:
                raise self._not_open(name)
            rollout = self._closed_now(episode, outcome, ended, extra)
        self._keeper.keep(name)
        return rollout

    @contextmanager
    def _halted(self, episode: OpenEpisode) -> Iterator[None]:
        """Within, nothing of an episode that is over is being rendered; what was has been given up."""
        episode.over = True
        with episode.rendering, self._lock:
            yield

    def _closed_now(
        self, episode: OpenEpisode, outcome: Outcome | None, ended: Ended | None, extra: Mapping[str, str]
    ) -> Rollout:
        """End an episode that is halted, and leave the writing to the keeper."""
        self._abandon(episode, _was_closed(episode.name))
        found = outcome or episode.posted
        rollout = episode.close(self.provenance, found, ended, extra, group_seeded=self._group_seeded)
        del self._open[episode.name]
        self._closed.add(episode.name)
        if not episode.owned:
            self._keeper.put(episode.name, rollout, episode.attempt.task)
        self._batcher.release(episode.keys)
        return rollout

    def post(self, name: Name, outcome: Outcome | None, reason: str = "") -> Trajectory | None:
        """An agent, or its grader, says how an episode went: it is closed, or kept for whoever owns it (None).

        An episode that was ended without an outcome, by a deadline or the end of a gateway, is given it afterwards.

        Raises:
            RefusedError: it is not open and has an outcome, nothing was said in it yet, or it cannot be written now:
                then the same may be posted again.
        """
        with self._lock:
            episode = self._open.get(name)
            if episode is not None and episode.owned:
                if episode.posted is not None:
                    raise RefusedError(409, "outcome_posted", f"{called(name)} has its outcome already")
                episode.posted = outcome
                return None
            if episode is not None and not episode.num_said:
                raise RefusedError(
                    409,
                    "nothing_said",
                    f"nothing was said in {called(name)}: there is nothing to grade",
                )
        if episode is None and name in self._keeper:
            return self._keeper.judge(name, outcome, reason)
        return self.close(name, outcome, reason=reason).trajectory

    def drain(self) -> None:
        """Refuse what comes from now on; replies in the making are still given."""
        with self._lock:
            self._draining = True

    def close_all(self) -> None:
        """Refuse what comes, end every episode that an agent opened as interrupted, and write all that is over.

        Raises:
            PrefloopError: the first of those that could not be written.
        """
        self.drain()
        with self._lock:
            left = [episode for episode in self._open.values() if not episode.owned]
        for episode in left:
            self._end(episode, Ended.INTERRUPTED)
        failed = self.keep_closed()
        if failed is not None:
            raise failed

    def keep_closed(self) -> PrefloopError | None:
        """Write the episodes that are over and not written yet; the first failure, after which they still wait."""
        return self._keeper.keep_all()

    def end_overdue(self) -> None:
        """End the episodes that have been open, or idle, for too long; owners still close theirs.

        Nothing is written yet: `keep_closed` does that, which may have to wait for the store.
        """
        now, limits = time.monotonic(), self.settings
        with self._lock:
            overdue = [
                episode
                for episode in self._open.values()
                if now - episode.opened_at > limits.episode_deadline_s
                or (not episode.in_work and now - episode.last_at > limits.idle_deadline_s)
            ]
        for episode in overdue:
            self._end(episode, Ended.DEADLINE)

    def _end(self, episode: OpenEpisode, ended: Ended) -> None:
        """End an episode, and close it unless it has an owner; one in which nothing was asked is forgotten."""
        with self._halted(episode):
            if self._open.get(episode.name) is not episode:
                return
            if episode.ended is None:
                episode.stop(ended)
            if ended is Ended.DEADLINE:
                self._abandon(episode, _took_too_long(episode.name))
            if episode.owned:
                return
            if episode.is_empty:
                del self._open[episode.name]
                self._closed.add(episode.name)
            else:
                self._closed_now(episode, None, None, {})

    def _not_open(self, name: Name) -> RefusedError:
        if name in self._closed:
            return _was_closed(name)
        of_task = f" of task {name[0]!r}" if name[0] else ""
        return RefusedError(404, "unknown_episode", f"there is no open episode {name[1]!r}{of_task}")

    # --- replies ------------------------------------------------------------------------------------------------

    def begin(
        self, name: Name, asked: Asked, unwanted: Callable[[], bool] = lambda: False
    ) -> tuple[OpenEpisode, Turn, SamplingSettings]:
        """Make the next turn of an episode, which is opened if it is new; stops where it becomes `unwanted`.

        A long conversation takes a while, in which only requests of the same episode wait. Whoever begins a turn
        hands it to `submit` and then to `finish` or `give_up`.

        Raises:
            RefusedError: the episode is over, the queue is full, or as `OpenEpisode.begin`.
        """
        episode = self._admitted(name, asked)
        begun = False
        try:
            with episode.rendering, stoppable(lambda: episode.over or unwanted()):
                self._check_going_on(episode)
                turn = episode.begin(asked.messages, asked.tools, asked.seed, self.max_context)
            begun = True
        except StoppedError:
            raise _took_too_long(name) if episode.ended is Ended.DEADLINE else _was_closed(name) from None
        finally:
            if not begun:
                with self._lock:
                    self._num_in_work -= 1
        return episode, turn, self._settings_of(asked, self.max_context - len(turn.context))

    def _admitted(self, name: Name, asked: Asked) -> OpenEpisode:
        """The episode of a request, which counts as in work from now on."""
        with self._lock:
            if self._draining:
                raise _stopping()
            if self._num_in_work >= self.settings.max_queue:
                raise RefusedError(
                    429, "queue_full", f"{self._num_in_work} requests are in work: wait", retry_after_s=1
                )
            episode = self._open.get(name)
            if episode is None:
                if name in self._closed:
                    raise self._not_open(name)
                episode = self.open(name)
                # Another gateway may have been killed in the middle of it: what was said there is not known here.
                episode.began_midway = any(message.role is Role.ASSISTANT for message in asked.messages)
            self._num_in_work += 1
            return episode

    def _check_going_on(self, episode: OpenEpisode) -> None:
        with self._lock:
            if episode.ended is None and episode.num_turns >= self.settings.max_turns:
                episode.stop(Ended.MAX_TURNS)
            if episode.ended is not None:
                raise RefusedError(409, f"episode_{episode.ended.value}", _why_over(episode.ended, self.settings))
            if episode.over:
                raise _was_closed(episode.name)

    def _settings_of(self, asked: Asked, room: int) -> SamplingSettings:
        update: JSONObject = {"max_new_tokens": min(asked.max_tokens or room, self._sampling.max_new_tokens, room)}
        if self.settings.sampling == "request":
            given = {"temperature": asked.temperature, "top_p": asked.top_p}
            update |= {key: value for key, value in given.items() if value is not None}
        return self._sampling.model_copy(update=update)

    def submit(self, turn: Turn, job: Job) -> None:
        """Have the reply sampled."""
        turn.job = job
        self._batcher.submit(job)

    def finish(self, episode: OpenEpisode, turn: Turn, sampled: Sampled) -> Message:
        """Record what the policy said; the message.

        Raises:
            RefusedError: the episode was closed in the meantime.
        """
        with self._lock:
            if turn not in episode.in_work:
                raise self._not_open(episode.name)
            self._num_in_work -= 1
            return episode.finish(turn, sampled)

    def give_up(self, episode: OpenEpisode, turn: Turn) -> None:
        """The reply is wanted no more; it is recorded nowhere."""
        with self._lock:
            if turn in episode.in_work:
                self._num_in_work -= 1
                episode.give_up(turn)
        if turn.job is not None:
            self._batcher.cancel(turn.job)

    def _abandon(self, episode: OpenEpisode, why: RefusedError) -> None:
        for turn in list(episode.in_work):
            self.give_up(episode, turn)
            if turn.job is not None:
                turn.job.on_done(why)

    def check(self) -> None:
        """See that the policy can be sampled.

        Raises:
            PrefloopError: it cannot any more.
        """
        self._batcher.check()

    def states(self) -> list[JSONObject]:
        """The open episodes as seen from outside."""
        with self._lock:
            return [episode.state() for episode in self._open.values()]


def key_of(name: Name, token: str = "") -> str:
    """The API key with which an agent that can set nothing else names its episode."""
    return "/".join([token or "none", *(quote(part, safe="") for part in name)])


def _stopping() -> RefusedError:
    return RefusedError(503, "shutting_down", "the gateway is shutting down", retry_after_s=5)


def _was_closed(name: Name) -> RefusedError:
    return RefusedError(409, "episode_closed", f"{called(name)} was closed: use another id")


def _took_too_long(name: Name) -> RefusedError:
    return RefusedError(504, "episode_deadline", f"{called(name)} took too long")


def _why_over(ended: Ended, settings: GatewaySettings) -> str:
    if ended is Ended.MAX_TURNS:
        return f"the episode has had its {settings.max_turns} turns: post its outcome"
    return "the episode took too long and is over"
