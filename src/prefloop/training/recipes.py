"""What a training does where nothing is said: one recipe for each objective, in full and with LoRA. Free of torch.

The reasons stand in docs/recipes.md, which a test holds against this table.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from prefloop.losses.registry import Records, objective
from prefloop.records import JSONObject

LORA_RATE = 10.0
"""An adapter takes about ten times the learning rate of whole weights (Schulman et al. 2025, LoRA Without Regret)."""

RATES: Mapping[Records, float] = {
    "demonstrations": 2e-5, "pairs": 1e-6, "labelled samples": 1e-6, "steps": 1e-5, "rollouts": 1e-6,
}  # fmt: skip
"""The learning rate of whole weights, by what is learnt from."""

REWARD_RATE = 1e-4


def learning_rate(name: str, *, lora: bool) -> float:
    """The learning rate of an objective.

    Raises:
        PrefloopError: there is no such objective.
    """
    rate = REWARD_RATE if name == "reward" else RATES[objective(name).records]
    return float(f"{rate * LORA_RATE:g}") if lora else rate  # 1e-05, not 9.999999999999999e-06


def recipe(name: str, *, lora: bool, gpu: bool) -> JSONObject:
    """The settings of a training of an objective that nobody has to give.

    Raises:
        PrefloopError: as `learning_rate`.
    """
    return {
        "learning_rate": learning_rate(name, lora=lora),
        "precision": "bfloat16" if gpu else "float32",
        "gradient_checkpointing": gpu,
    }


def curation(name: str, samples_per_task: Any) -> JSONObject:
    """How an iteration's attempts are chosen from where nobody says: for some objectives the one best of each task.

    Nothing where the number of attempts is none.
    """
    one = name in ("online_dpo", "rejection_sampling") and isinstance(samples_per_task, int) and samples_per_task > 0
    return {"fraction": 1.0 / samples_per_task, "margin": 0.0} if one else {}


def filled(given: Mapping[str, Any], name: str, *, lora: bool, gpu: bool) -> JSONObject:
    """Settings with the recipe in place of those that are not given."""
    return {**recipe(name, lora=lora, gpu=gpu), **{key: value for key, value in given.items() if value is not None}}
