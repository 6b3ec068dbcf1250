"""What the field says about learning from preferences, tested on toy tasks at equal budgets, with a verdict each.

    python benchmarks/claims.py [--json PATH] [--only PATTERN] [--quick] [--seed N]

All claims are tested on the single-turn task whose true reward is known (`_language.py`), from one start policy a seed.
What is compared has the same budget, which each claim's function says. A claim holds, does not hold, or cannot be told
by a rule that was stated before its seeds were run (`_claims_rules.py`; docs/claims.md says what was changed after),
over differences within seeds 21 to 25; settings were chosen on seed 1. docs/claims.md has the claims, their sources and
what they came to.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial

import numpy as np
import torch
import transformers
from rich.console import Console
from rich.table import Table

from _claims_cost import cheaper
from _claims_gradients import high_variance
from _claims_kl import DPO_BETAS, RLOO_BETAS, higher_beta, without_penalty
from _claims_pairs import online_pairs, without_reference
from _claims_rules import Figures, Part, verdict_of
from _claims_selection import moving_judge, top_k
from _common import WIDTH, Cell, Measured, Options, parse_options, run_cells, versions
from _language import World
from prefloop.stats.intervals import Interval

FIRST_SEED, NUM_SEEDS = 21, 5
DESIGN_SEED, NUM_QUICK_SEEDS = 1, 2  # a verdict is of two seeds at least

Experiment = Callable[[World, bool], dict[str, float]]

EXPERIMENTS: Mapping[str, Experiment] = {
    "top_k": top_k,
    "judge": moving_judge,
    "penalty": without_penalty,
    "beta": higher_beta,
    "pairs": online_pairs,
    "reference": without_reference,
    "variance": high_variance,
    "cost": cheaper,
}


@dataclass(frozen=True)
class Claim:
    """What is said, by whom, the experiment that tells, and what has to hold over seeds."""

    says: str
    source: str
    experiment: str
    parts: tuple[Part, ...]


def _falling(kind: str, betas: Sequence[float]) -> tuple[Part, ...]:
    """KL at each β above that at the next."""
    names = [f"kl_{kind}_{beta:g}" for beta in betas]
    return tuple(Part(lower, higher, least=1.1, ratio=True) for lower, higher in itertools.pairwise(names))


def _more_varied(name: str) -> tuple[Part, ...]:
    """An estimator's gradient, and the ends of runs with it, vary more than those of RLOO and PPO."""
    both = [(kind, other) for kind in ("variance", "spread") for other in ("rloo", "ppo")]
    return tuple(Part(f"{kind}_{name}", f"{kind}_{other}", least=1.1, ratio=True) for kind, other in both)


CLAIMS: Mapping[str, Claim] = {
    "top_k": Claim(
        "The top-K filter makes updates more sample-efficient than all or random trajectories",
        "Dong et al. 2023, arXiv:2304.06767; Gulcehre et al. 2023, arXiv:2308.08998",
        "top_k",
        (Part("gold_top_0.3", "gold_top_1", least=0.2), Part("gold_top_0.3", "gold_random_0.3", least=0.2)),
    ),
    "top_k_gradient": Claim(
        "The same against all trajectories, each weighed by its advantage (RLOO)",
        "Xiong et al. 2025, arXiv:2504.11343",
        "top_k",
        (Part("gold_top_0.3", "gold_gradient", least=0.2),),
    ),
    "frozen_judge": Claim(
        "A frozen judge keeps training stable where the policy's own implicit reward, which moves with it, does not",
        "Wang et al. 2024, arXiv:2410.12735; against Chen et al. 2024, arXiv:2406.09760",
        "judge",
        (Part("fall_implicit_moving", "fall_implicit_frozen", least=0.2, strict=True),),
    ),
    "frozen_model": Claim(
        "A frozen reward model keeps training stable where one that learns from its own labels does not",
        "Yuan et al. 2024, arXiv:2401.10020, whose judge is trained on its own labels",
        "judge",
        (Part("fall_model_moving", "fall_model_frozen", least=0.2, strict=True),),
    ),
    "kl_penalty": Claim(
        "Without the KL penalty the policy drifts to high-scoring nonsense",
        "Stiennon et al. 2020, arXiv:2009.01325; Gao et al. 2022, arXiv:2210.10760",
        "penalty",
        (
            Part("fall_free", least=0.2, strict=True),
            Part("proxy_since_peak_free"),
            Part("gold_penalised", "gold_free", least=0.2),
        ),
    ),
    "higher_beta": Claim(
        "Higher β is more conservative",
        "Rafailov et al. 2023, arXiv:2305.18290; Rafailov et al. 2024, arXiv:2406.02900",
        "beta",
        (*_falling("dpo", DPO_BETAS), *_falling("rloo", RLOO_BETAS)),
    ),
    "online_pairs": Claim(
        "Online pairs close the gap that offline DPO has from distribution shift",
        "Guo et al. 2024, arXiv:2402.04792; Tang et al. 2024, arXiv:2405.08448",
        "pairs",
        (Part("gap", least=0.2), Part("gold_online", "gold_own", least=-0.2)),
    ),
    "simpo": Claim(
        "SimPO needs no reference and loses little",
        "Meng et al. 2024, arXiv:2405.14734",
        "reference",
        (Part("gold_simpo", "gold_dpo", least=-0.2),),
    ),
    "plain_variance": Claim(
        "REINFORCE without a baseline has higher variance than RLOO and PPO",
        "Ahmadian et al. 2024, arXiv:2402.14740; Schulman et al. 2016, arXiv:1506.02438",
        "variance",
        _more_varied("plain"),
    ),
    "reinforce_variance": Claim(
        "REINFORCE with a running baseline has higher variance than RLOO and PPO",
        "Williams 1992; Ahmadian et al. 2024, arXiv:2402.14740",
        "variance",
        _more_varied("reinforce"),
    ),
    "dpo_cheaper": Claim(
        "DPO is cheaper than PPO for the same success",
        "Rafailov et al. 2023, arXiv:2305.18290",
        "cost",
        # Where PPO does not come to the target, its seconds are too few, which the claim can bear; where DPO does not,
        # there is no such success.
        (Part("reached_dpo", least=1.0), Part("s_ppo", "s_dpo", least=1.1, ratio=True)),
    ),
}


def measure(seed: int, experiment: str, options: Options) -> Measured:
    """A cell: one experiment on one world."""
    found = EXPERIMENTS[experiment](world_of(seed, options.quick), options.quick)
    rows = [{"figure": name, "value": f"{value:.3f}"} for name, value in found.items()]
    return Measured({f"{experiment}_{name}_seed_{seed}": value for name, value in found.items()}, rows)


@lru_cache(maxsize=1)
def world_of(seed: int, quick: bool) -> World:
    """The world of a seed, made once for all of its cells."""
    return World(seed, num_pairs=256, sft_steps=60) if quick else World(seed)


def conclude(figures: Mapping[str, float]) -> dict[str, float]:
    """Means over seeds, the difference of each claim's parts with its interval, and the verdicts, which are printed."""
    over: defaultdict[str, dict[int, float]] = defaultdict(dict)
    for name, value in figures.items():
        stem, _, seed = name.rpartition("_seed_")
        over[stem][int(seed)] = value
    found = {name: float(np.mean(list(values.values()))) for name, values in over.items()}
    table = Table(title="verdicts", show_lines=True)
    for column in ("claim", "part", "least", "mean [95 %]", "verdict"):
        table.add_column(column)
    for name, claim in CLAIMS.items():
        by_seed = _by_seed(over, claim.experiment)
        if len(by_seed) > 1:
            found |= _conclude(name, claim, by_seed, table)
    if table.row_count:
        Console(width=WIDTH).print(table)
    return found


def _by_seed(over: Mapping[str, Mapping[int, float]], experiment: str) -> list[dict[str, float]]:
    """The figures of an experiment, seed by seed."""
    rows: defaultdict[int, dict[str, float]] = defaultdict(dict)
    for name, values in over.items():
        for seed, value in values.items():
            if name.startswith(f"{experiment}_"):
                rows[seed][name.removeprefix(f"{experiment}_")] = value
    return list(rows.values())


def _conclude(name: str, claim: Claim, by_seed: Sequence[Figures], table: Table) -> dict[str, float]:
    """One claim's part of `conclude`."""
    intervals = [part.interval(by_seed) for part in claim.parts]
    verdicts = [part.verdict(interval) for part, interval in zip(claim.parts, intervals, strict=True)]
    found = {f"{name}_verdict": float((whole := verdict_of(verdicts)).value)}
    for part, interval, verdict in zip(claim.parts, intervals, verdicts, strict=True):
        sign = "×" if part.ratio else ""
        table.add_row(name, part.name, f"{sign}{part.least:g}", _shown(sign, interval), verdict.text)
        if interval is None:
            continue
        found |= {
            f"{name}_{part.name}": interval.value,
            f"{name}_{part.name}_low": interval.low,
            f"{name}_{part.name}_high": interval.high,
        }
    table.add_row(claim.says, claim.source, "", "", whole.text.upper())
    return found


def _shown(sign: str, interval: Interval | None) -> str:
    if interval is None:
        return "no ratio: a figure is not above 0"
    return f"{sign}{interval.value:.2f} [{interval.low:.2f}, {interval.high:.2f}]"


def main(options: Options) -> None:
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    first = options.first_seed(DESIGN_SEED if options.quick else FIRST_SEED)
    seeds = range(first, first + (NUM_QUICK_SEEDS if options.quick else NUM_SEEDS))
    cells: dict[str, Cell] = {
        f"{experiment}_{seed}": partial(measure, seed, experiment) for seed in seeds for experiment in EXPERIMENTS
    }
    run_cells("claims", cells, options, versions("prefloop", "torch", "transformers"), summary=conclude)


if __name__ == "__main__":
    main(parse_options(__doc__, default_seed=None))
