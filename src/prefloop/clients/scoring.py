"""What a judge asks of a reward model: scores of trajectories, and one protocol for whoever computes them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from prefloop.records import JSONObject, Task, Trajectory


@dataclass(frozen=True, slots=True)
class Scores:
    """What a reward model says of one trajectory, for each member of its ensemble (one where it is none).

    `members` are scores of the whole, in the model's own unit; a process reward model gives in `steps`, for each
    step, each member's probability that the step is right. `failure` says why there is neither.
    """

    members: tuple[float, ...] = ()
    steps: tuple[tuple[float, ...], ...] = ()
    failure: str = ""


class RewardScorer(Protocol):
    """A frozen reward model."""

    @property
    def name(self) -> str:
        """What people call it."""
        ...

    @property
    def specification(self) -> JSONObject:
        """All that decides its scores: the hash of the weights, and how they are computed."""
        ...

    @property
    def num_members(self) -> int:
        """The size of the ensemble; 1 where there is none."""
        ...

    @property
    def centres(self) -> tuple[float, ...]:
        """The mean score of each member over the trajectories it was trained on; empty where that is not known."""
        ...

    @property
    def scale(self) -> float | None:
        """The standard deviation of the members' mean over those trajectories; None where it is not known."""
        ...

    def score(self, trajectories: Sequence[Trajectory], tasks: Sequence[Task]) -> list[Scores]:
        """The scores of each trajectory, in their order; `tasks` are theirs, one each."""
        ...
