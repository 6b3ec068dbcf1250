"""A process reward model that is here scores the steps of trajectories."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from prefloop.chat import ChatRenderer, StepFinder, steps_of, trajectory_paths
from prefloop.chat.steps import StepEnd
from prefloop.clients.scoring import Scores
from prefloop.models.attention import causal_model
from prefloop.models.reward import RewardModel
from prefloop.records import JSONObject, PrefloopError, Task, TokenPath, Trajectory

Found = tuple[tuple[TokenPath, ...], list[StepEnd]]


class ProcessRewardScorer:
    """A `RewardScorer` over a process reward model: for each step the probability σ(score) that it is right.

    The score of a step is read at its last token, in the path in which the policy said it. `weights_hash` names all
    files that the model was loaded from.

    Raises:
        PrefloopError: the tokenizer has no chat template, or cannot be used (`ChatRenderer`).
    """

    def __init__(self, model: RewardModel, name: str, weights_hash: str, *, max_tokens: int = 16384) -> None:
        self.model = model
        self.name = name
        self.max_tokens = max_tokens
        self._renderer = ChatRenderer(model.tokenizer)
        self._finder = StepFinder(self._renderer, model.separator)
        self._weights_hash = weights_hash

    @property
    def specification(self) -> JSONObject:
        """The weights, their precision, and what a step is."""
        dtype = str(next(self.model.model.parameters()).dtype)
        steps = {"step": self.model.step, "separator": self.model.separator}
        return {"weights": self._weights_hash, "dtype": dtype, **steps}

    @property
    def num_members(self) -> int:
        """The size of the ensemble."""
        return self.model.num_members

    @property
    def centres(self) -> tuple[float, ...]:
        """None: probabilities need no centre."""
        return ()

    @property
    def scale(self) -> float | None:
        """None, too."""
        return None

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
            paths = trajectory_paths(self._renderer, trajectory, task.tools)
            places = steps_of(trajectory, self.model.step, self.model.separator)
            ends = [self._finder.end(trajectory, paths, place) for place in places]
        except PrefloopError as error:
            return Scores(failure=str(error))
        limit = getattr(causal_model(self.model.model).config, "max_position_embeddings", None)
        longest = max(len(path.token) for path in paths)
        if isinstance(limit, int) and longest > limit:
            return Scores(failure=f"it has {longest} tokens, and {self.name} reads no more than {limit}")
        return paths, ends


def _probabilities(found: Found, scored: Iterator[NDArray[np.float64]]) -> Scores:
    """The members' probabilities of one trajectory's steps, from the scores of its paths."""
    paths, ends = found
    by_path = [iter(next(scored)) for _ in paths]
    scores = [next(by_path[end.path]) for end in ends]
    return Scores(steps=tuple(tuple((1 / (1 + np.exp(-members))).tolist()) for members in scores))
