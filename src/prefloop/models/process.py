"""A process reward model that is here scores the steps of trajectories."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from prefloop.chat import StepFinder, steps_of, trajectory_paths
from prefloop.chat.steps import StepEnd
from prefloop.clients.scoring import Scores
from prefloop.models.reward_scorer import LocalScorer
from prefloop.records import JSONObject, PrefloopError, Task, TokenPath, Trajectory

Found = tuple[tuple[TokenPath, ...], list[StepEnd]]


class ProcessRewardScorer(LocalScorer):
    """A `RewardScorer` over a process reward model: for each step the probability σ(score) that it is right.

    The score of a step is read at its last token, in the path in which the policy said it.
    """

    def reads(self) -> JSONObject:
        """The ends of steps."""
        return {"step": self.model.step, "separator": self.model.separator}

    def score(self, trajectories: Sequence[Trajectory], tasks: Sequence[Task]) -> list[Scores]:
        """The members' probabilities for each step; a failure where a trajectory cannot be read."""
        found = [self._find(trajectory, task) for trajectory, task in zip(trajectories, tasks, strict=True)]
        read = [one for one in found if not isinstance(one, Scores)]
        paths = [path for own, _ in read for path in own]
        tokens = [[end.token for end in ends if end.path == i] for own, ends in read for i in range(len(own))]
        scored = iter(self.model.scores(paths, tokens, self.max_tokens))
        return [one if isinstance(one, Scores) else _probabilities(one, scored) for one in found]

    def _find(self, trajectory: Trajectory, task: Task) -> Scores | Found:
        """The paths of a trajectory and where its steps end in them; or why it cannot be scored."""
        try:
            paths = trajectory_paths(self.renderer, trajectory, task.tools)
            places = steps_of(trajectory, self.model.step, self.model.separator)
            finder = StepFinder(self.renderer, self.model.separator)
            ends = [finder.end(trajectory, paths, place) for place in places]
        except PrefloopError as error:
            return Scores(failure=str(error))
        return self.too_long(paths) or (paths, ends)


def _probabilities(found: Found, scored: Iterator[NDArray[np.float64]]) -> Scores:
    """The members' probabilities of one trajectory's steps, from the scores of its paths."""
    paths, ends = found
    by_path = [iter(next(scored)) for _ in paths]
    scores = [next(by_path[end.path]) for end in ends]
    return Scores(steps=tuple(tuple((1 / (1 + np.exp(-members))).tolist()) for members in scores))
