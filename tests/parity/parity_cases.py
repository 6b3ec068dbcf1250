"""The one table of what the parity tests hold against the papers, against TRL and against themselves."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from packed_examples import (
    agent_demonstrations,
    agent_labels,
    agent_pairs,
    agent_steps,
    single_turn_labels,
)
from prefloop.losses.registry import objective
from prefloop.training.algorithm import Algorithm
from prefloop.training.algorithms import make_algorithm

ROWS = {
    "demonstrations": agent_demonstrations,
    "pairs": agent_pairs,
    "labelled samples": agent_labels,
    "steps": agent_steps,
}


@dataclass(frozen=True)
class Case:
    """An objective with knobs; `rows(num, seed)` makes its examples, by default agents' branching trajectories.

    `of_difference`: the loss depends on log-probs only through the difference of chosen's and rejected's sums, so
    that a token which both share has no gradient. `of_order`: it depends on the order of the rows, and why.
    `of_count`: a row twice is not a row of weight 2, and why. `kl_samples`: how many fresh samples KTO is given.
    """

    objective: str
    knobs: Mapping[str, Any] = field(default_factory=dict)
    rows: Callable[..., Any] | None = None
    of_difference: bool = False
    of_order: str = ""
    of_count: str = ""
    kl_samples: int = 0

    @property
    def id(self) -> str:
        return "-".join([self.objective, *(f"{key}={value}" for key, value in self.knobs.items())]).replace(" ", "")

    @property
    def head(self) -> str:
        return {"reward": "score", "process_reward": "scores"}.get(self.objective, "logits")

    @property
    def algorithm(self) -> Algorithm:
        made: Any = make_algorithm(self.objective, **self.knobs)
        return replace(made, samples=agent_demonstrations(self.kl_samples, 75)) if self.kl_samples else made

    def examples(self, num: int, seed: int = 0) -> Any:
        return (self.rows or ROWS[objective(self.objective).records])(num, seed)


def case(name: str, /, **knobs: Any) -> Case:
    return Case(name, knobs)


def difference(name: str, /, **knobs: Any) -> Case:
    return Case(name, knobs, of_difference=True)


def sure_pairs(num: int, seed: int = 0) -> Any:
    """Pairs as losses that compare whole batches need them."""
    return [replace(pair, probability=1.0, tied=False, weight=2.0) for pair in agent_pairs(num, seed)]


DEALT = "TRL's form: its reference point goes by the places of the rows in a batch"
EQUAL = "it takes pairs of equal weight alone"
COUNTED = "its reference point counts every row once"

CASES = (
    case("sft"),
    case("sft", dft=True),
    difference("dpo", beta=0.3, label_smoothing=0.0),
    difference("dpo", beta=0.3, label_smoothing=0.2),
    case("dpo", beta=0.3, label_smoothing=0.0, nll_coef=0.7),
    case("dpo", beta=0.3, label_smoothing=0.0, nll_coef=0.7, nll_reduction="token"),
    case("dpo", beta=0.3, label_smoothing=0.0, nll_coef=0.7, nll_scope="sequence"),
    case("dpo", beta=0.3, label_smoothing=0.1, reduction="mean", mixture={"ipo": 0.2, "orpo": 0.5}),
    difference("robust", beta=0.3, label_smoothing=0.2),
    case("dpo_norm", beta=2.0),
    difference("hinge", beta=0.3),
    difference("exo", beta=0.3, label_smoothing=0.05),
    difference("discopop", beta=0.3, tau=0.7),
    difference("f_dpo", beta=0.3, divergence="reverse_kl", divergence_alpha=0.5),
    case("f_dpo", beta=0.3, divergence="forward_kl", divergence_alpha=0.5),
    case("f_dpo", beta=0.3, divergence="js", divergence_alpha=0.5),
    case("f_dpo", beta=0.3, divergence="alpha", divergence_alpha=0.3),
    difference("ld_dpo", beta=0.3, ld_alpha=0.4),
    difference("ipo", beta=0.2, reduction="sum"),
    case("ipo", beta=0.2, reduction="mean"),
    case("sppo", beta=0.3),
    case("nca", beta=0.3),
    case("bco", beta=0.3),
    case("apo_zero", beta=0.3),
    case("apo_down", beta=0.3),
    Case("aot", {"beta": 0.3, "label_smoothing": 0.1}, sure_pairs, of_difference=True, of_count=EQUAL),
    Case("aot_unpaired", {"beta": 0.3, "label_smoothing": 0.1}, sure_pairs, of_count=EQUAL),
    case("simpo", beta=1.3, gamma=0.4, label_smoothing=0.1),
    case("cpo", beta=0.3, label_smoothing=0.1),
    difference("cpo", beta=0.3, label_smoothing=0.0, nll_coef=0.0),
    case("orpo", beta=0.7),
    case("orpo", beta=0.7, nll_scope="sequence", nll_reduction="token"),
    Case("kto", {"beta": 0.3, "kl": "derangement"}, single_turn_labels, of_count=COUNTED),
    Case(
        "kto",
        {"beta": 0.3, "kl": "rotation", "desirable_weight": 1.2, "undesirable_weight": 0.7},
        single_turn_labels,
        of_order=DEALT,
        of_count=COUNTED,
    ),
    Case("kto", {"beta": 0.3, "kl": "samples"}, kl_samples=3),
    case("kto", beta=0.3, kl="none", desirable_weight=1.2, undesirable_weight=0.7),
    case("reward", ties="half", center_coef=0.05),
    case("reward", ties="davidson", tie_strength=1.7),
    case("process_reward"),
)
