"""A reward model that is here scores trajectories: rendered for it, batched over what they share, never cut."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import numpy as np

from prefloop.chat import ChatRenderer, trajectory_paths
from prefloop.clients.scoring import Scores
from prefloop.models.attention import causal_model
from prefloop.models.reward import RewardModel
from prefloop.records import JSONObject, PrefloopError, Source, Task, TokenPath, Trajectory


class LocalScorer(ABC):
    """What scorers of models that are here have in common; `weights_hash` names the weights.

    Raises:
        PrefloopError: the tokenizer has no chat template, or cannot be used (`ChatRenderer`).
    """

    def __init__(self, model: RewardModel, name: str, weights_hash: str, *, max_tokens: int = 16384) -> None:
        self.model = model
        self.name = name
        self.max_tokens = max_tokens
        self.renderer = ChatRenderer(model.tokenizer)
        self._weights_hash = weights_hash

    @property
    def specification(self) -> JSONObject:
        """The weights, their precision, tokenizer and chat template, and what is read."""
        return {
            "weights": self._weights_hash,
            "dtype": str(next(self.model.model.parameters()).dtype),
            "tokenizer": self.renderer.tokenizer_hash,
            "template": self.renderer.template_hash,
            "reads": self.reads(),
        }

    @abstractmethod
    def reads(self) -> JSONObject:
        """What of a trajectory is read."""

    @abstractmethod
    def score(self, trajectories: Sequence[Trajectory], tasks: Sequence[Task]) -> list[Scores]:
        """The scores of each trajectory, in their order; `tasks` are theirs, one each."""

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

    def too_long(self, paths: Sequence[TokenPath]) -> Scores | None:
        """The failure that a path is longer than the model's context; None where all fit."""
        limit = getattr(causal_model(self.model.model).config, "max_position_embeddings", None)
        longest = max(len(path.token) for path in paths)
        if not isinstance(limit, int) or longest <= limit:
            return None
        return Scores(failure=f"it has {longest} tokens, and {self.name} reads no more than {limit}")


class LocalRewardScorer(LocalScorer):
    """A `RewardScorer` over an outcome reward model."""

    def reads(self) -> JSONObject:
        """The end of the last turn, or of all that the template makes."""
        return {"whole_template": self.model.whole_template}

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
                path = whole_template(self.renderer, trajectory, task)
            else:
                path = trajectory_paths(self.renderer, trajectory, task.tools)[-1]
        except PrefloopError as error:
            return Scores(failure=str(error))
        return self.too_long([path]) or path


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
