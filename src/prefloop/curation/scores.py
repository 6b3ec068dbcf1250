"""From judgements to one score a distinct completion."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from prefloop.records import Judgement, PrefloopError, Trajectory, canonical_json, content_hash


@dataclass(frozen=True, slots=True)
class Scored:
    """A trajectory with its mean score in [0, 1] and the ids of the judgements behind it."""

    id: str
    task_id: str
    score: float
    evidence: tuple[str, ...]


def tie_break(seed: int, *names: str) -> str:
    """A hash that orders what scores leave equal: another seed, another order, whatever order rows came in."""
    return content_hash("tie", seed, *names)


def by_trajectory(judgements: Iterable[Judgement]) -> dict[str, list[Judgement]]:
    """Judgements that hold a score, by trajectory, ordered by replicate; failed ones are not numbers."""
    found: dict[str, list[Judgement]] = defaultdict(list)
    for judgement in judgements:
        if judgement.score is not None:
            found[judgement.trajectory_id].append(judgement)
    return {key: sorted(group, key=lambda j: j.replicate) for key, group in sorted(found.items())}


def mean_score(judgements: Sequence[Judgement]) -> float:
    """The mean over replicates, exact whatever their order."""
    return math.fsum(j.score for j in judgements if j.score is not None) / len(judgements)


def noise_sd(*samples: Iterable[Judgement]) -> float:
    """The standard deviation of one judgement's score around its trajectory's mean.

    Pooled within trajectories that were judged at least twice, with n - 1 degrees of freedom each. Several samples
    are pooled without mixing them: where one was selected by its scores, their means differ by the selection.

    Raises:
        PrefloopError: no trajectory was judged twice, so that nothing can be said about noise.
    """
    squares: list[float] = []
    freedom = 0
    for sample in samples:
        for group in by_trajectory(sample).values():
            mean = mean_score(group)
            squares += [(j.score - mean) ** 2 for j in group if j.score is not None]
            freedom += len(group) - 1
    if freedom == 0:
        raise PrefloopError(
            "the judge's noise cannot be measured: no trajectory was judged twice; "
            "judge with at least 2 replicates, or give the margin in units of the score"
        )
    return math.sqrt(math.fsum(squares) / freedom)


def has_replicates(judgements: Iterable[Judgement]) -> bool:
    """Whether some trajectory has two scores, so that the noise can be measured."""
    return any(len(group) > 1 for group in by_trajectory(judgements).values())


def representatives(trajectories: Iterable[Trajectory], seed: int) -> dict[str, Trajectory]:
    """For each trajectory id the one that stands for all identical completions of its task."""
    same: dict[str, list[Trajectory]] = defaultdict(list)
    for trajectory in {t.id: t for t in trajectories}.values():
        same[_completion_key(trajectory)].append(trajectory)
    first = {key: min(group, key=lambda t: tie_break(seed, t.id)) for key, group in same.items()}
    return {t.id: first[key] for key, group in same.items() for t in group}


def _completion_key(trajectory: Trajectory) -> str:
    """What the completion says: ids of tool calls are names that servers draw, and left out."""
    said = []
    for message in trajectory.completion:
        calls = tuple(replace(call, id="") for call in message.tool_calls)
        said.append(replace(message, tool_calls=calls, tool_call_id="").to_dict())
    return canonical_json([trajectory.task_id, said])


@dataclass(frozen=True, slots=True)
class Pool:
    """What curation chooses from.

    `trajectories` by id, without the `num_without_turns` in which nothing was said; `standing_for` gives the
    representative of identical completions for each id; `judgements` are the rater's that select, `num_replicates`
    how many replicates do; `scored` has every representative with a score.
    """

    trajectories: Mapping[str, Trajectory]
    standing_for: Mapping[str, Trajectory]
    rater_id: str | None
    num_replicates: int
    judgements: tuple[Judgement, ...]
    scored: tuple[Scored, ...]
    num_without_turns: int

    @property
    def distinct_ids(self) -> set[str]:
        """The ids of the representatives."""
        return {trajectory.id for trajectory in self.standing_for.values()}


def make_pool(
    trajectories: Iterable[Trajectory],
    judgements: Iterable[Judgement],
    *,
    rater_id: str | None,
    num_replicates: int | None,
    seed: int,
) -> Pool:
    """Gather distinct completions and their scores; the arguments are those of `curate`.

    Raises:
        PrefloopError: several raters judged and none is named (their units must not be mixed).
    """
    given = {trajectory.id: trajectory for trajectory in trajectories}
    by_id = {trajectory_id: trajectory for trajectory_id, trajectory in given.items() if trajectory.num_turns}
    of_these = [j for j in judgements if j.trajectory_id in by_id]
    rater_id = _only_rater(of_these) if rater_id is None else rater_id
    by_rater = [j for j in of_these if j.rater_id == rater_id]
    if num_replicates is None:
        num_replicates = 1 + max((j.replicate for j in by_rater), default=-1)
    selecting = tuple(j for j in by_rater if j.replicate < num_replicates)
    standing_for = representatives(by_id.values(), seed)
    scored = tuple(_score(selecting, standing_for))
    return Pool(by_id, standing_for, rater_id, num_replicates, selecting, scored, len(given) - len(by_id))


def _only_rater(judgements: Iterable[Judgement]) -> str | None:
    raters = sorted({judgement.rater_id for judgement in judgements})
    if len(raters) > 1:
        raise PrefloopError(f"{len(raters)} raters judged these trajectories: name one of {', '.join(raters)}")
    return raters[0] if raters else None


def _score(judgements: Iterable[Judgement], standing_for: Mapping[str, Trajectory]) -> list[Scored]:
    """Every distinct completion that has a score, ordered by id.

    Judgements of identical completions are replicates of one another and enter one mean.
    """
    pooled: dict[str, list[Judgement]] = defaultdict(list)
    for trajectory_id, group in by_trajectory(judgements).items():
        pooled[standing_for[trajectory_id].id] += group
    return [
        Scored(key, standing_for[key].task_id, mean_score(group), tuple(sorted(j.id for j in group)))
        for key, group in sorted(pooled.items())
    ]
