"""The knobs of curation."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from prefloop.config import Settings


class CurationSettings(Settings):
    """How judgements become pairs.

    `scope`: the best `fraction` is kept of each task's trajectories ("group"), or of all together ("batch", which
    favours easy tasks). `rejected`: which of the same task's others is rejected: the "lowest", a "random" one, or a
    "moderate" one (nearest the task's lower quartile, so that the worst outliers do not teach). `margin`: the least
    gap of a pair, in units of the "score" or of the "noise" (the sd of one judgement, measured from replicates).
    `confirm`: how many fresh judgements of each member of a selected pair decide whether it stays and how probable
    it is. `prefer_people`: people's votes make pairs and overrule the judge; `vote_reliability` is the probability
    that one vote is right. `precision_sample`: how many pairs an independent rater checks at most.
    """

    scope: Literal["group", "batch"] = "group"
    fraction: float = Field(default=0.3, gt=0, le=1)
    rejected: Literal["lowest", "random", "moderate"] = "lowest"
    margin: float = Field(default=0.1, ge=0)
    margin_unit: Literal["score", "noise"] = "score"
    confirm: int = Field(default=0, ge=0)
    prefer_people: bool = True
    vote_reliability: float = Field(default=0.9, gt=0.5, lt=1)
    precision_sample: int = Field(default=200, ge=1)
