"""Every objective on one line: its function, what it learns from, and the defaults of its knobs.

Free of torch, so that a run file can be checked without it. To add a loss of preference pairs, write the function
and add its line (docs/how-to-add-a-loss.md).
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Literal, NamedTuple

from prefloop.losses.settings import LossSettings
from prefloop.records import PrefloopError

Records = Literal["demonstrations", "pairs", "labelled samples", "steps", "rollouts"]

ADDED: Mapping[str, Any] = {"nll_coef": 0.0, "nll_reduction": "pair", "nll_scope": "completion", "mixture": {}}
"""Knobs of all objectives of preference pairs, with their usual defaults: what is added to the loss itself."""


@dataclass(frozen=True, slots=True)
class Objective:
    """An objective: `function` as module.name within `prefloop.losses`, and its knobs with their defaults.

    `reference`: it needs a reference model. `couples`: the loss of a row depends on the others of the optimizer step.
    `per_token`: the reward that it implies is a mean over a completion's tokens. `above_zero`: knobs that must be.
    `of_policy`: what is trained is a policy, not a reward model. `margins`: it reads by how much chosen is better.
    `critic`: a model beside the policy says what each token is compared with.
    `fresh`: it learns in the loop alone, where rows are made anew in each iteration; `self_play`: of demonstrations
    against the policy's own attempts, with the policy before the update as its reference.
    """

    function: str
    summary: str
    knobs: Mapping[str, Any]
    records: Records = "pairs"
    reference: bool = True
    couples: bool = False
    per_token: bool = False
    above_zero: tuple[str, ...] = ()
    of_policy: bool = True
    margins: bool = False
    critic: bool = False
    fresh: bool = False
    self_play: bool = False

    def load(self) -> Callable[..., Any]:
        """The function."""
        module, _, name = self.function.partition(".")
        loaded: Callable[..., Any] = getattr(import_module(f"prefloop.losses.{module}"), name)
        return loaded


CREDITED: Mapping[str, Any] = {
    "kl_coef": 0.05, "kl_target": None, "kl_horizon": None, "kl_as": "reward", "entropy_coef": 0.0,
    "mismatch": "truncate", "mismatch_low": 0.5, "mismatch_high": 2.0,
}  # fmt: skip
"""Knobs of all policy gradients, with their usual defaults."""


def _rollouts(function: str, summary: str, knobs: Mapping[str, Any]) -> Objective:
    """An objective of the policy's own rollouts, whose rewards are compared with each other."""
    return Objective(
        function, summary, {**CREDITED, "min_spread": 0.0, "turn_discount": 1.0, **knobs}, "rollouts", fresh=True
    )


def _with_critic(function: str, summary: str, knobs: Mapping[str, Any]) -> Objective:
    """An objective of the policy's own rollouts, whose tokens are compared with what a critic expected."""
    own = {"gae_lambda": 1.0, "discount": 1.0, "whiten_advantages": True, "clip_value": 0.2}
    return Objective(function, summary, {**CREDITED, **own, **knobs}, "rollouts", critic=True, fresh=True)


def _pairs(function: str, summary: str, knobs: Mapping[str, Any], **traits: Any) -> Objective:
    """An objective of preference pairs, to which the chosen's likelihood and other losses may be added."""
    return Objective(function, summary, {**ADDED, **knobs}, **traits)


# fmt: off
OBJECTIVES: Mapping[str, Objective] = {
    "sft": Objective("sft.sft", "imitate demonstrations", {"dft": False}, "demonstrations", reference=False),
    "dpo": _pairs("dpo.dpo", "direct preference optimisation", {"beta": 0.1, "label_smoothing": 0.0}),
    "robust": _pairs("dpo.robust", "DPO unbiased by flipped labels", {"beta": 0.1, "label_smoothing": 0.1}),
    "dpo_norm": _pairs("dpo.dpo_norm", "length-normalised DPO", {"beta": 5.0}, per_token=True),
    "hinge": _pairs("dpo.hinge", "DPO with a hinge loss", {"beta": 0.1}),
    "exo": _pairs("dpo.exo", "efficient exact optimisation", {"beta": 0.1, "label_smoothing": 1e-3}, above_zero=("label_smoothing",)),
    "discopop": _pairs("dpo.discopop", "discovered preference optimisation", {"beta": 0.05, "tau": 0.05}),
    "f_dpo": _pairs("dpo.f_dpo", "DPO under an f-divergence", {"beta": 0.1, "divergence": "js", "divergence_alpha": 0.5}),
    "ld_dpo": _pairs("dpo.ld_dpo", "length-desensitised DPO", {"beta": 0.1, "ld_alpha": 0.5}),
    "ipo": _pairs("squared.ipo", "identity preference optimisation", {"beta": 0.1, "reduction": "sum"}),
    "sppo": _pairs("squared.sppo", "self-play preference optimisation", {"beta": 0.1}),
    "nca": _pairs("anchored.nca", "noise-contrastive alignment", {"beta": 0.01}),
    "bco": _pairs("anchored.bco", "binary classifier optimisation", {"beta": 0.01}),
    "apo_zero": _pairs("anchored.apo_zero", "anchored preference optimisation, chosen up", {"beta": 0.1}),
    "apo_down": _pairs("anchored.apo_down", "anchored preference optimisation, both down", {"beta": 0.1}),
    "aot": _pairs("transport.aot", "optimal transport of margins", {"beta": 0.1, "label_smoothing": 0.0}, couples=True),
    "aot_unpaired": _pairs("transport.aot_unpaired", "optimal transport of sides", {"beta": 0.1, "label_smoothing": 0.0}, couples=True),
    "cpo": _pairs("reference_free.cpo", "contrastive preference optimisation", {"beta": 0.1, "label_smoothing": 0.0, "nll_coef": 1.0}, reference=False),
    "simpo": _pairs("reference_free.simpo", "simple preference optimisation", {"beta": 2.0, "gamma": 1.0, "label_smoothing": 0.0}, reference=False, per_token=True),
    "orpo": _pairs("reference_free.orpo", "odds-ratio preference optimisation", {"beta": 0.1, "nll_coef": 1.0}, reference=False, per_token=True),
    "kto": Objective("kto.kto", "Kahneman-Tversky optimisation", {"beta": 0.1, "kl": "derangement", "desirable_weight": 1.0, "undesirable_weight": 1.0}, "labelled samples"),
    "rejection_sampling": Objective("sft.sft", "imitate the best attempt at each task", {"dft": False}, "demonstrations", reference=False, fresh=True),
    "online_dpo": _pairs("dpo.dpo", "DPO on the best and the worst attempt at each task", {"beta": 0.1, "label_smoothing": 0.0}, fresh=True),
    "spin": _pairs("dpo.dpo", "demonstrations against the policy's own attempts", {"beta": 0.1, "label_smoothing": 0.0}, fresh=True, self_play=True),
    "reinforce": _rollouts("policy_gradient.reinforce", "REINFORCE with a running baseline", {"baseline": "running", "ratio": "none", "clip_low": 0.2, "clip_high": 0.2, "denominator": "samples"}),
    "rloo": _rollouts("policy_gradient.sequence_clipped", "REINFORCE, leave-one-out", {"baseline": "leave_one_out", "ratio": "sequence", "clip_low": 0.2, "clip_high": 0.2, "denominator": "samples"}),
    "grpo": _rollouts("policy_gradient.clipped", "group-relative policy optimisation", {"baseline": "group_mean", "scale": "none", "ratio": "token", "clip_low": 0.2, "clip_high": 0.28, "denominator": "constant"}),
    "ppo": _with_critic("policy_gradient.clipped", "proximal policy optimisation with a critic", {"ratio": "token", "clip_low": 0.2, "clip_high": 0.2, "denominator": "tokens"}),
    "reward": Objective("reward.bradley_terry", "a reward model of preference pairs", {"ties": "half", "tie_strength": 1.0, "center_coef": 0.0}, reference=False, of_policy=False, margins=True),
    "process_reward": Objective("reward.step_cross_entropy", "a reward model of steps", {}, "steps", reference=False, of_policy=False),
}
# fmt: on


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


def losses_of_pairs() -> list[str]:
    """The losses of preference pairs that may be mixed."""
    return [name for name, found in OBJECTIVES.items() if "mixture" in found.knobs and not found.fresh]


READ_WITH: Mapping[str, tuple[str, tuple[Any, ...]]] = {
    "scale": ("baseline", ("group_mean",)),
    "clip_low": ("ratio", ("token", "sequence", "sequence_mean")),
    "clip_high": ("ratio", ("token", "sequence", "sequence_mean")),
    "kl_target": ("kl_as", ("reward",)),
    "mismatch_low": ("mismatch", ("mask", "sequence")),
    "mismatch_high": ("mismatch", ("truncate", "mask", "sequence")),
}
"""Knobs that are read only where another has one of these values."""


class Part(NamedTuple):
    """One of the losses that an objective sums: its weight, and the arguments of its function beside the pairs."""

    weight: float
    arguments: Mapping[str, Any]


def resolve_knobs(name: str, settings: LossSettings) -> dict[str, Any]:
    """The objective's knobs: what was set, else its defaults.

    Raises:
        PrefloopError: no such objective, a knob that neither it nor a loss of its mixture has, a mixture with
            something that is no loss of preference pairs, a knob that is 0 where it must not be, or one that another
            contradicts.
    """
    found, given = objective(name), _given(settings)
    parts = resolve_parts(name, settings)
    known = dict.fromkeys(knob for part in (name, *parts) for knob in objective(part).knobs)
    for key in given:
        if key not in known:
            raise PrefloopError(f"{key}: objective {name!r} has no such knob; it has {', '.join(known) or 'no knobs'}")
    knobs = {**found.knobs, **{key: value for key, value in given.items() if key in found.knobs}}
    _check_together(knobs, {key for key, value in given.items() if value != found.knobs.get(key)})
    return knobs


def _check_together(knobs: Mapping[str, Any], changed: Collection[str]) -> None:
    """See that every knob that is not at its default is read.

    Raises:
        PrefloopError: one is not, or the bounds of the mismatch exclude each other.
    """
    for key, (other, values) in READ_WITH.items():
        if key in changed and knobs[other] not in values:
            wanted = " or ".join(repr(value) for value in values)
            raise PrefloopError(f"{key} says nothing where {other} is {knobs[other]!r}: leave it out, or take {wanted}")
    if knobs.get("kl_target") is not None and not knobs["kl_coef"]:
        raise PrefloopError("kl_target adapts kl_coef, which stays 0 where it is 0: leave it out, or begin above 0")
    if "kl_horizon" in changed and knobs["kl_target"] is None:
        raise PrefloopError("kl_horizon says nothing without kl_target: leave it out, or set both")
    if knobs.get("mismatch") in ("mask", "sequence") and knobs["mismatch_low"] > knobs["mismatch_high"]:
        raise PrefloopError(
            f"mismatch_low {knobs['mismatch_low']} is above mismatch_high {knobs['mismatch_high']}: nothing would count"
        )


def resolve_parts(name: str, settings: LossSettings) -> dict[str, Part]:
    """The losses of preference pairs that an objective sums, by name; none where it learns from something else.

    A knob that is set counts for every loss that has it; one that is not has each loss's own default. The
    objective's own loss weighs 1 unless the mixture names it, too.

    Raises:
        PrefloopError: as `resolve_knobs`.
    """
    given = _given(settings)
    if "mixture" not in objective(name).knobs:
        return {}
    parts = {}
    for part, weight in {name: 1.0, **given.get("mixture", {})}.items():
        if part != name and part not in (of_pairs := losses_of_pairs()):
            raise PrefloopError(f"mixture: {part!r} is not a loss of preference pairs, which are {', '.join(of_pairs)}")
        found = objective(part)
        arguments = {key: given.get(key, default) for key, default in found.knobs.items() if key not in ADDED}
        for key in found.above_zero:
            if not arguments[key]:
                raise PrefloopError(f"{key}: objective {part!r} needs it above 0, such as {found.knobs[key]}")
        parts[part] = Part(weight, arguments)
    return parts


def needs_reference(name: str, settings: LossSettings) -> bool:
    """Whether an objective reads a reference, its own loss or one of its mixture.

    Raises:
        PrefloopError: as `resolve_knobs`.
    """
    return any(objective(part).reference for part in (name, *resolve_parts(name, settings)))


def _given(settings: LossSettings) -> dict[str, Any]:
    values = {key: getattr(settings, key) for key in LossSettings.model_fields}
    return {key: value for key, value in values.items() if value is not None}
