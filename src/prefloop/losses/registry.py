"""Every objective on one line: its function, what it learns from, and the defaults of its knobs.

Free of torch, so that a run file can be checked without it. To add a loss of preference pairs, write the function
and add its line (docs/how-to-add-a-loss.md).
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Literal

from prefloop.losses.settings import LossSettings
from prefloop.records import PrefloopError

Records = Literal["demonstrations", "pairs", "labelled samples", "steps"]


@dataclass(frozen=True, slots=True)
class Objective:
    """An objective: `function` as module.name within `prefloop.losses`, and its knobs with their defaults.

    `reference`: it needs a reference model. `couples`: the loss of a row depends on the others of the optimizer step.
    """

    function: str
    summary: str
    knobs: Mapping[str, Any]
    records: Records = "pairs"
    reference: bool = True
    couples: bool = False

    def load(self) -> Callable[..., Any]:
        """The function."""
        module, _, name = self.function.partition(".")
        loaded: Callable[..., Any] = getattr(import_module(f"prefloop.losses.{module}"), name)
        return loaded


def _pairs(function: str, summary: str, *, reference: bool = True, couples: bool = False, **knobs: Any) -> Objective:
    """An objective of preference pairs, to which the chosen's likelihood and other losses may be added."""
    added = {"nll_coef": 0.0, "nll_reduction": "pair", "nll_scope": "completion", "mixture": {}}
    return Objective(
        function,
        summary,
        {**knobs, **{k: v for k, v in added.items() if k not in knobs}},
        reference=reference,
        couples=couples,
    )


OBJECTIVES: Mapping[str, Objective] = {
    "sft": Objective("sft.sft", "imitate demonstrations", {"dft": False}, "demonstrations", reference=False),
    "dpo": _pairs("dpo.dpo", "direct preference optimisation", beta=0.1, label_smoothing=0.0),
    "ipo": _pairs("ipo.ipo", "identity preference optimisation", beta=0.1, reduction="sum"),
    "simpo": _pairs(
        "simpo.simpo", "simple preference optimisation", beta=2.0, gamma=1.0, label_smoothing=0.0, reference=False
    ),
    "cpo": _pairs(
        "simpo.cpo", "contrastive preference optimisation", beta=0.1, label_smoothing=0.0, nll_coef=1.0, reference=False
    ),
    "orpo": _pairs("orpo.orpo", "odds-ratio preference optimisation", beta=0.1, nll_coef=1.0, reference=False),
    "kto": Objective(
        "kto.kto",
        "Kahneman-Tversky optimisation",
        {"beta": 0.1, "kl": "derangement", "desirable_weight": 1.0, "undesirable_weight": 1.0},
        "labelled samples",
    ),
    "reward": Objective(
        "reward.bradley_terry",
        "a reward model of preference pairs",
        {"ties": "half", "tie_strength": 1.0, "center_coef": 0.0},
        reference=False,
    ),
    "process_reward": Objective("reward.step_cross_entropy", "a reward model of steps", {}, "steps", reference=False),
}


def objective(name: str) -> Objective:
    """The objective of a name.

    Raises:
        PrefloopError: there is none, with the nearest name.
    """
    if name not in OBJECTIVES:
        near = difflib.get_close_matches(name, OBJECTIVES, 1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise PrefloopError(f"objective {name!r} is not one of {', '.join(OBJECTIVES)}{hint}")
    return OBJECTIVES[name]


def resolve_knobs(name: str, settings: LossSettings) -> dict[str, Any]:
    """The objective's knobs: what was set, else its defaults.

    Raises:
        PrefloopError: no such objective, or a knob that it does not have.
    """
    found = objective(name)
    given = {key: getattr(settings, key) for key in LossSettings.model_fields if getattr(settings, key) is not None}
    for key in given:
        if key not in found.knobs:
            known = ", ".join(found.knobs) or "no knobs"
            raise PrefloopError(f"{key}: objective {name!r} has no such knob; it has {known}")
    return {**found.knobs, **given}
