"""A reward model that is here scores trajectories: rendered for it, batched over what they share, never cut."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from prefloop.chat import ChatRenderer, trajectory_paths
from prefloop.clients.scoring import Scores
from prefloop.models.attention import causal_model
from prefloop.models.reward import RewardModel
from prefloop.records import JSONObject, PrefloopError, Source, Task, TokenPath, Trajectory


class LocalRewardScorer:
    """A `RewardScorer` over an outcome reward model; `weights_hash` names all files that it was loaded from.

    Raises:
        PrefloopError: the tokenizer has no chat template, or cannot be used (`ChatRenderer`).
    """

    def __init__(self, model: RewardModel, name: str, weights_hash: str, *, max_tokens: int = 16384) -> None:
        self.model = model
        self.name = name
        self.max_tokens = max_tokens
        self._renderer = ChatRenderer(model.tokenizer)
        self._weights_hash = weights_hash

    @property
    def specification(self) -> JSONObject:
        """The weights, their precision, and which tokens are read."""
        dtype = str(next(self.model.model.parameters()).dtype)
        return {"weights": self._weights_hash, "dtype": dtype, "whole_template": self.model.whole_template}

    @property
    def num_members(self) -> int:
        """The size of the ensemble."""
        return self.model.num_members

    @property
    def centres(self) -> tuple[float, ...]:
        """The members' mean scores in training."""
        return self.model.centres

    @property
    def scale(self) -> float | None:
        """The standard deviation of their mean in training."""
        return self.model.scale

    def score(self, trajectories: Sequence[Trajectory], tasks: Sequence[Task]) -> list[Scores]:
        """The scores of each trajectory; a failure where it cannot be rendered or is longer than the context."""
        found = [self._path(trajectory, task) for trajectory, task in zip(trajectories, tasks, strict=True)]
        paths = [one for one in found if isinstance(one, TokenPath)]
        scored = iter(self.model.sequence_scores(paths, self.max_tokens).tolist())
        return [Scores(tuple(next(scored))) if isinstance(one, TokenPath) else one for one in found]

    def _path(self, trajectory: Trajectory, task: Task) -> Scores | TokenPath:
        """What the model reads of a trajectory: the last context in which the policy spoke; or why there is none."""
        try:
            if self.model.whole_template:
                path = whole_template(self._renderer, trajectory, task)
            else:
                path = trajectory_paths(self._renderer, trajectory, task.tools)[-1]
        except PrefloopError as error:
            return Scores(failure=str(error))
        longest = getattr(causal_model(self.model.model).config, "max_position_embeddings", None)
        if isinstance(longest, int) and len(path.token) > longest:
            return Scores(failure=f"it has {len(path.token)} tokens, and {self.name} reads no more than {longest}")
        return path


def whole_template(renderer: ChatRenderer, trajectory: Trajectory, task: Task) -> TokenPath:
    """All that the chat template makes of a trajectory, what follows the last turn too, as models of others read it.

    Raises:
        PrefloopError: the template refuses or drops messages, or makes next to nothing of them.
    """
    rendering = renderer.begin(trajectory.messages, task.tools)
    token, source, message = renderer.encode(renderer.pieces(rendering, len(trajectory.messages), False))
    if len(token) < 2:
        raise PrefloopError(f"trajectory {trajectory.id}: the chat template makes {len(token)} tokens of it")
    sources = np.array(source, np.uint8)
    sources[-1] = Source.SAMPLED  # a batch holds paths with something of the policy's
    return TokenPath(
        np.array(token, np.int32), sources, np.array(message, np.int32), np.full(len(token), np.nan, np.float32)
    )
