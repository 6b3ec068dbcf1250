"""What an attempt is worth to objectives that learn from rollouts; free of torch."""

from __future__ import annotations

from typing import Literal, TypeAlias

from pydantic import Field, model_validator

from prefloop.config import Settings

StepReward: TypeAlias = Literal["min", "difference", "sum"]


class RewardSettings(Settings):
    """The reward of a rollout: judge · (the judge's value) + verified · (the environment's), with what is taken off it.

    Values are in their raters' own units; the judge's is the mean of its replicates. The sum is clipped to `clip`;
    then `missing_stop_penalty` is taken off where the attempt was cut off (at the longest reply, the last turn or the
    deadline), and `length_penalty` for each token of its own beyond `free_tokens`. With `whiten` the rewards of an
    iteration are divided by their standard deviation, their mean staying.

    `steps` says how a judge of kind `process` pays each step (`prefloop.credit.steps`): as the minimum (the default),
    as differences of value, as a sum; or not, its "whole" value coming at the end.
    """

    judge: float = Field(default=1.0, ge=0)
    verified: float = Field(default=0.0, ge=0)
    steps: StepReward | Literal["whole"] | None = None
    clip: list[float] | None = Field(default=None, min_length=2, max_length=2)
    missing_stop_penalty: float = Field(default=0.0, ge=0)
    length_penalty: float = Field(default=0.0, ge=0)
    free_tokens: int = Field(default=0, ge=0)
    whiten: bool = False

    @model_validator(mode="after")
    def _says_something(self) -> RewardSettings:
        if not self.judge and not self.verified:
            raise ValueError("judge and verified are both 0: give one of them a weight")
        if self.clip is not None and not self.clip[0] < self.clip[1]:
            raise ValueError(f"clip should be [low, high] with low below high, not {self.clip}")
        if self.free_tokens and not self.length_penalty:
            raise ValueError("free_tokens says nothing without length_penalty: leave it out, or set both")
        return self
