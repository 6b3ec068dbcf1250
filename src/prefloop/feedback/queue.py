"""Which pairs to ask people about, and with what probability each was picked.

Tasks are visited in rounds, each round in a fresh random order and with one pair a task, so that few votes already
cover many tasks. Within a task a pair is drawn from those left: with probability `explore` uniformly, otherwise in
proportion to how uncertain the judge is about it. Every pair carries the probability of its draw among the pairs of
its task that were left; with those, estimates from the chosen pairs of a task can be made unbiased for all of them
(Farquhar, Gal and Rainforth 2021, "On statistical bias in active learning", arXiv:2101.11665). Which tasks are
visited does not depend on scores.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from pydantic import Field

from prefloop.config import Settings
from prefloop.records import (
    JSONObject,
    Message,
    PrefloopError,
    Rater,
    RaterKind,
    Role,
    Split,
    Trajectory,
    canonical_json,
    content_hash,
)
from prefloop.store import Store

MAX_GROUP = 32  # trajectories of one task that are paired with each other: more would be half a million pairs a 1000
SCORE_SCALE = 0.1  # a difference of scores at which a judge is taken to be about 73 % sure


class QueueSettings(Settings):
    """Which pairs people are asked about.

    `run_id`: the run whose trajectories are compared, all when empty. `judge`: id or name of the rater whose scores
    say what is uncertain; the one with the most scores when empty. `explore`: the share of pairs drawn uniformly.
    `num_pairs`: the length of the queue. `votes_per_pair`: the number of people who vote on each pair.
    """

    run_id: str = ""
    judge: str = ""
    explore: float = Field(default=0.25, gt=0.0, le=1.0)
    num_pairs: int = Field(default=500, ge=1)
    votes_per_pair: int = Field(default=1, ge=1)
    seed: int = 0


@dataclass(frozen=True, slots=True)
class AskedPair:
    """Two trajectories of one task that people are asked about, their ids in order; `propensity` as drawn."""

    task_id: str
    a: str
    b: str
    propensity: float

    @property
    def id(self) -> str:
        """The pair's id, which tells nothing about its trajectories."""
        return pair_id(self.a, self.b)


def pair_id(one: str, other: str) -> str:
    """The id of the pair of two trajectories, in either order."""
    return content_hash("pair", *sorted((one, other)))


def build_queue(store: Store, settings: QueueSettings) -> list[AskedPair]:
    """The pairs of training tasks to ask about, in order; the same for the same store and settings.

    Raises:
        PrefloopError: there is no such run or judge.
    """
    if settings.run_id and store.run(settings.run_id) is None:
        raise PrefloopError(f"there is no run {settings.run_id} in {store.location}")
    trained_on = store.tasks(split=Split.TRAIN)  # a vote on a held-out task could train nothing
    found = store.trajectories(run_id=settings.run_id or None)
    groups = comparable(trajectory for trajectory in found if trajectory.task_id in trained_on)
    ids = [trajectory_id for group in groups.values() for trajectory_id in group]
    judge = find_judge(store, settings.judge, ids)
    scores = {} if judge is None else mean_scores(store, judge.id, ids)
    return select_pairs(groups, scores, explore=settings.explore, num_pairs=settings.num_pairs, seed=settings.seed)


def comparable(trajectories: Iterable[Trajectory]) -> dict[str, list[str]]:
    """For each task with at least two, the ids of its trajectories that say something and differ, sorted.

    Of trajectories with the same messages the one with the smallest id is kept.
    """
    by_content: dict[str, dict[str, str]] = {}
    for trajectory in sorted(trajectories, key=lambda t: t.id):
        if trajectory.num_turns:
            said = canonical_json([what_was_said(message) for message in trajectory.completion])
            by_content.setdefault(trajectory.task_id, {}).setdefault(said, trajectory.id)
    return {task: sorted(by_content[task].values()) for task in sorted(by_content) if len(by_content[task]) > 1}


def what_was_said(message: Message) -> JSONObject:
    """A message without the ids that only tie calls to results: equal for people means equal here."""
    said = message.to_dict()
    said.pop("tool_call_id", None)
    for call in said.get("tool_calls", ()):
        call.pop("id", None)
    return said if message.role is not Role.TOOL else {"role": said["role"], "content": said["content"]}


def find_judge(store: Store, name: str, ids: Sequence[str]) -> Rater | None:
    """The rater named (by id or name), or the judge, reward model or test with the most scores of these trajectories.

    Raises:
        PrefloopError: a name that no rater, or more than one, has.
    """
    raters = store.raters()
    if name:
        return _named(raters, name, store.location)
    machines = {RaterKind.JUDGE, RaterKind.REWARD_MODEL, RaterKind.TEST}
    counts = {rater.id: 0 for rater in raters.values() if rater.kind in machines}
    for judgement in store.judgements(trajectory_ids=ids) if counts else ():
        if judgement.score is not None and judgement.rater_id in counts:
            counts[judgement.rater_id] += 1
    best = max(counts, key=lambda rater_id: (counts[rater_id], rater_id), default=None)
    return raters[best] if best is not None and counts[best] else None


def _named(raters: Mapping[str, Rater], name: str, location: str) -> Rater:
    found = [rater for rater in raters.values() if name in (rater.id, rater.name)]
    if len(found) == 1:
        return found[0]
    if found:
        ids = ", ".join(sorted(rater.id for rater in found))
        raise PrefloopError(f"several raters in {location} are called {name!r}: name one by its id ({ids})")
    known = ", ".join(sorted({rater.name for rater in raters.values()})) or "none"
    raise PrefloopError(f"there is no rater {name!r} in {location}; known raters: {known}")


def mean_scores(store: Store, rater_id: str, ids: Iterable[str]) -> dict[str, float]:
    """The mean of a rater's scores of each trajectory, over replicates; those without a score are left out."""
    scores: dict[str, list[float]] = {}
    for judgement in store.judgements(trajectory_ids=ids, rater_id=rater_id):
        if judgement.score is not None:
            scores.setdefault(judgement.trajectory_id, []).append(judgement.score)
    return {trajectory_id: float(np.mean(values)) for trajectory_id, values in scores.items()}


def uncertainty(gap: float | None) -> float:
    """How unsure a judge is of a pair whose scores differ by `gap`, in (0, 1]; 1 where it has no opinion.

    The variance of a logistic choice with scale `SCORE_SCALE`, relative to that of a coin.
    """
    if gap is None:
        return 1.0
    probability = 1.0 / (1.0 + float(np.exp(-abs(gap) / SCORE_SCALE)))
    return 4.0 * probability * (1.0 - probability)


def select_pairs(
    groups: Mapping[str, Sequence[str]], scores: Mapping[str, float], *, explore: float, num_pairs: int, seed: int
) -> list[AskedPair]:
    """Draw up to `num_pairs` pairs without replacement, as the module's docstring says."""
    rng = np.random.default_rng(int(content_hash("annotation queue", seed), 16))
    left = {task: _TaskPairs(ids, scores, explore, rng) for task, ids in sorted(groups.items())}
    chosen: list[AskedPair] = []
    while left and len(chosen) < num_pairs:
        order = [list(left)[i] for i in rng.permutation(len(left))]
        visited = order[: num_pairs - len(chosen)]
        chosen += [AskedPair(task, *left[task].draw(rng)) for task in visited]
        left = {task: pairs for task, pairs in left.items() if pairs.pairs}
    return chosen


class _TaskPairs:
    """The pairs of one task that have not been drawn yet."""

    def __init__(
        self, ids: Sequence[str], scores: Mapping[str, float], explore: float, rng: np.random.Generator
    ) -> None:
        self.explore = explore
        kept = sorted(rng.choice(np.array(ids), MAX_GROUP, replace=False).tolist()) if len(ids) > MAX_GROUP else ids
        self.pairs = list(itertools.combinations(sorted(kept), 2))
        self.kept_share = len(self.pairs) / (len(ids) * (len(ids) - 1) / 2)
        self.weights = [uncertainty(_gap(scores, a, b)) for a, b in self.pairs]

    def draw(self, rng: np.random.Generator) -> tuple[str, str, float]:
        """Take one pair out; its ids and the probability of this draw."""
        weights = np.array(self.weights)
        probabilities = self.explore / len(weights) + (1.0 - self.explore) * weights / weights.sum()
        index = int(rng.choice(len(weights), p=probabilities / probabilities.sum()))
        a, b = self.pairs.pop(index)
        self.weights.pop(index)
        return a, b, float(probabilities[index]) * self.kept_share


def _gap(scores: Mapping[str, float], a: str, b: str) -> float | None:
    return scores[a] - scores[b] if a in scores and b in scores else None
