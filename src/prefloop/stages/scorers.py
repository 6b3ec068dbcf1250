"""Reward models of a run file: loaded, identified by their weights, and made judges."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from prefloop.judges.reward_model import (
    ProcessJudgeSettings,
    RewardJudgeSettings,
    RewardModelJudge,
    ScorerSettings,
    outcome_judge,
    process_judge,
)
from prefloop.records import content_hash

if TYPE_CHECKING:
    from prefloop.models.reward import Kind
    from prefloop.models.reward_scorer import LocalScorer

S = TypeVar("S", bound="LocalScorer")


def reward_judge(settings: RewardJudgeSettings, num_threads: int) -> RewardModelJudge:
    """The judge of kind `reward`; its model is loaded now, and hashed.

    Raises:
        PrefloopError: the model cannot be loaded or is damaged; and as `outcome_judge`.
    """
    from prefloop.models.reward_scorer import LocalRewardScorer

    return outcome_judge(_load(LocalRewardScorer, "sequence", settings, num_threads), settings)


def process_reward_judge(settings: ProcessJudgeSettings, num_threads: int) -> RewardModelJudge:
    """The judge of kind `process`; its model is loaded now, and hashed.

    Raises:
        PrefloopError: the model cannot be loaded or is damaged.
    """
    from prefloop.models.process import ProcessRewardScorer

    return process_judge(_load(ProcessRewardScorer, "token", settings, num_threads), settings)


def _load(scorer: type[S], kind: Kind, settings: ScorerSettings, num_threads: int) -> S:
    """A scorer over the model, whose files are verified where a manifest lists them."""
    import torch

    from prefloop.models.reward import load_reward_model
    from prefloop.training.checkpoint import MANIFEST, verify
    from prefloop.training.weights import weights_hash

    torch.set_num_threads(num_threads)
    if (Path(settings.model) / MANIFEST).is_file():
        verify(Path(settings.model))
    model = load_reward_model(settings.model, kind=kind, dtype=settings.dtype, device=settings.device)
    places = [settings.model] if len(model.adapters) < 2 else [f"{settings.model}/{name}" for name in model.adapters]
    found = content_hash("reward model", [weights_hash(place) for place in places])
    return scorer(model, settings.model, found, max_tokens=settings.max_tokens)
