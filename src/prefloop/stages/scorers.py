"""Reward models of a run file: loaded, identified by their weights, and made judges."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING

from prefloop.judges.reward_model import (
    ProcessJudgeSettings,
    RewardJudgeSettings,
    RewardModelJudge,
    outcome_judge,
    process_judge,
)
from prefloop.records import content_hash

if TYPE_CHECKING:
    from prefloop.models.reward import RewardModel

SUFFIXES = frozenset({".safetensors", ".bin", ".json", ".jinja", ".model", ".txt"})
"""Of the files that decide a model's scores."""


def reward_judge(settings: RewardJudgeSettings, num_threads: int) -> RewardModelJudge:
    """The judge of kind `reward`; its model is loaded now, and hashed.

    Raises:
        PrefloopError: the model cannot be loaded or is damaged; and as `outcome_judge`.
    """
    import torch

    from prefloop.models.reward import load_reward_model
    from prefloop.models.reward_scorer import LocalRewardScorer

    torch.set_num_threads(num_threads)
    model = load_reward_model(settings.model, dtype=settings.dtype, device=settings.device)
    found = weights_hash(model, settings.model)
    return outcome_judge(LocalRewardScorer(model, settings.model, found, max_tokens=settings.max_tokens), settings)


def process_reward_judge(settings: ProcessJudgeSettings, num_threads: int) -> RewardModelJudge:
    """The judge of kind `process`; its model is loaded now, and hashed.

    Raises:
        PrefloopError: the model cannot be loaded or is damaged.
    """
    import torch

    from prefloop.models.process import ProcessRewardScorer
    from prefloop.models.reward import load_reward_model

    torch.set_num_threads(num_threads)
    model = load_reward_model(settings.model, kind="token", dtype=settings.dtype, device=settings.device)
    found = weights_hash(model, settings.model)
    return process_judge(ProcessRewardScorer(model, settings.model, found, max_tokens=settings.max_tokens), settings)


def weights_hash(model: RewardModel, name: str) -> str:
    """The hash of all that a reward model was loaded from, the model below its adapters too.

    Raises:
        PrefloopError: a directory that was saved with a manifest is not what it was.
    """
    commit = getattr(model.model.config, "_commit_hash", None)
    parts = [_saved_hash(name, commit)]
    for adapter in model.adapters if not model.own_base else ():
        parts.append(_saved_hash(str(model.model.peft_config[adapter].base_model_name_or_path), commit))
    return content_hash("reward model", *dict.fromkeys(parts))


def _saved_hash(name: str, commit: str | None) -> str:
    """The manifest's hash where there is a manifest, else that of the files; of a hub id the commit."""
    from prefloop.training.checkpoint import MANIFEST, verify

    directory = Path(name)
    if not directory.is_dir():
        return f"{name}@{commit}"
    if (directory / MANIFEST).is_file():
        return verify(directory)
    files = sorted(path for path in directory.rglob("*") if path.suffix in SUFFIXES)
    return content_hash({str(path.relative_to(directory)): _sha256(path) for path in files})


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
