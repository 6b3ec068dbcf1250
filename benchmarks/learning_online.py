"""What algorithms learn from their own rollouts: two tasks, each algorithm with settings of its own, and TRL beside us.

    python benchmarks/learning_online.py [--json PATH] [--only PATTERN] [--quick] [--seed N]

`ALGORITHM_SEED`: the loop of `prefloop run examples/booking.toml`, 12 iterations of 64 tasks with 8 attempts each, a
noisy judge, and a guard that takes harmful updates back. All algorithms of a seed begin with one policy that imitates
the demonstrator, and have the same tasks, judge and number of attempts. `sft` has as many more demonstrations in place
of attempts, `best_of_n` picks the attempt that the judge likes best and trains nothing. `trl_grpo_SEED`: our GRPO and
TRL's GRPOTrainer from the same policy with the same loss, schedule and attempts (`_learning_trl.py`), ours without and
with the guard, which TRL does not have. `language_ALGORITHM_SEED`: a single-turn task whose true reward is known
(`_learning_language.py`).

Settings were chosen on seeds 0 and 1, the figures are of five others. Seconds are those of this process without the
evaluations on held-out tasks, which are for the reader.
"""

from __future__ import annotations

import tempfile
from collections import defaultdict
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import numpy as np
import torch

from _common import STATE, Cell, Measured, Options, locked, parse_options, run_cells, shared, versions
from _learning_booking import (
    QUICK,
    best_of_n,
    evaluated_beside,
    figures_by_name,
    imitating_more,
    loop,
    loop_with_curve,
    start_of,
    success_at,
)
from _learning_language import LANGUAGE, learn, world_of
from prefloop.records import JSONObject
from prefloop.stats.intervals import mean_interval

NUM_SEEDS = 5
FIRST_SEED = 16  # not used while tuning; 10 to 15 were looked at before the last change
STARTS = STATE / "learning_online"
BEST_OF = 8

ALGORITHMS: Mapping[str, JSONObject] = {
    "rejection_sampling": {"train": {"learning_rate": 5e-4}},
    "dpo": {"curation": {"fraction": 0.3, "margin": 0.3}, "train": {"nll_coef": 1.0, "learning_rate": 1e-3}},
    "online_dpo": {"train": {"learning_rate": 5e-4}},
    "spin": {"train": {"learning_rate": 2e-4}},
    "reinforce": {"train": {"kl_coef": 0.02, "learning_rate": 3e-4, "decay": "none"}},
    "rloo": {"train": {"kl_coef": 0.02, "learning_rate": 1e-3, "decay": "none"}},
    "grpo": {"train": {"kl_coef": 0.02, "learning_rate": 1e-3, "decay": "none"}},
    "ppo": {"train": {"kl_coef": 0.02, "learning_rate": 1e-3, "decay": "none"}},
}
"""What differs from `examples/booking.toml`, whose [curation] and [train] are left out but for the batch of 16.

`spin` can come to no more than the demonstrator, whose own success is 0.43."""

SFT: JSONObject = {"num_epochs": 3, "batch_size": 32, "learning_rate": 1e-3, "schedule": "linear"}

MATCHED: JSONObject = {"train": {"kl_coef": 0.0, "mismatch": "none", "learning_rate": 1e-3, "decay": "none"}}
TRL_OPTIONS: JSONObject = {}
UNGUARDED = ("guard.num_tasks=2", "guard.max_drop=1.0", "guard.max_kl=1e9", "guard.max_retries=0")
NOT_GREEDY = ("evaluation.greedy=false",)


def start(seed: int, quick: bool) -> str:
    """The directory of the policy that all algorithms of a seed begin with."""
    name = f"{seed}{'-quick' if quick else ''}"
    with locked(STARTS / f"{name}.lock"):
        return start_of(seed, STARTS / name, quick)


def of_loop(seed: int, algorithm: str, options: Options) -> Measured:
    """A cell: one algorithm on one seed."""
    table = ALGORITHMS[algorithm]
    table = {**table, "train": {"algorithm": algorithm, **table["train"]}}
    found = loop(seed, table, start(seed, options.quick), QUICK if options.quick else ())
    return Measured(figures_by_name(algorithm, seed, found), [row_of(found)])


def of_sft(seed: int, options: Options) -> Measured:
    """A cell: more demonstrations in place of attempts."""
    begin, quick = start(seed, options.quick), options.quick
    with tempfile.TemporaryDirectory() as directory:
        path, spent = imitating_more(seed, Path(directory), begin, SFT, quick)
        found = evaluated_beside(seed, begin, path, QUICK if quick else ()) | spent
    return Measured(figures_by_name("sft", seed, found), [row_of(found)])


def of_search(seed: int, options: Options) -> Measured:
    """A cell: the best of several attempts, as the judge sees them."""
    more = QUICK if options.quick else ()
    found = best_of_n(seed, start(seed, options.quick), BEST_OF, more)
    return Measured(figures_by_name("best_of_n", seed, found), [row_of(found)])


def beside_trl(seed: int, options: Options) -> Measured:
    """A cell: ours and TRL's, and ours with the guard."""
    from _learning_trl import trl_loop  # what it imports takes long

    begin, more = start(seed, options.quick), (*(QUICK if options.quick else ()), *NOT_GREEDY)
    table = {**MATCHED, "train": {"algorithm": "grpo", **MATCHED["train"]}}
    ours, curve = loop_with_curve(seed, table, begin, (*more, *UNGUARDED))
    theirs, their_curve = trl_loop(seed, table, begin, (*more, *UNGUARDED), **TRL_OPTIONS)
    guarded = loop(seed, table, begin, more)
    names = {"matched_grpo": ours, "matched_grpo_guarded": guarded, "trl_grpo": theirs}
    figures: dict[str, float] = {}
    for name, found in names.items():
        figures |= figures_by_name(name, seed, found)
    compared = {
        "cpu_of_trl": ours["cpu_s"] / theirs["cpu_s"],
        "guarded_cpu_of_trl": guarded["cpu_s"] / theirs["cpu_s"],
        "success_above_trl": ours["success"] - theirs["success"],
        "success_above_trl_equal_time": ours["success"] - success_at(their_curve, ours["cpu_s"]),
        "success_above_trl_half_time": success_at(curve, ours["cpu_s"] / 2)
        - success_at(their_curve, ours["cpu_s"] / 2),
    }
    figures |= figures_by_name("matched_grpo", seed, compared)
    return Measured(figures, [{"side": name, **row_of(found)} for name, found in names.items()])


def of_language(seed: int, algorithm: str, options: Options) -> Measured:
    """A cell: one algorithm on one language."""
    found, _ = learn(world_of(seed, options.quick), LANGUAGE[algorithm], options.quick)
    return Measured(figures_by_name(f"language_{algorithm}", seed, found), [row_of(found)])


COLUMNS: Mapping[str, tuple[str, str]] = {
    "success_start": ("start", ".3f"),
    "success": ("success", ".3f"),
    "greedy": ("greedy", ".3f"),
    "gold": ("true reward", ".2f"),
    "gold_at_kl_1": ("at KL 1", ".2f"),
    "gold_at_kl_2": ("at KL 2", ".2f"),
    "gold_at_kl_4": ("at KL 4", ".2f"),
    "kl": ("KL", ".2f"),
    "worst_drop": ("worst drop", ".3f"),
    "num_retries": ("tried again", ".0f"),
    "num_rolled_back": ("taken back", ".0f"),
    "num_samples": ("samples", ".0f"),
    "num_judge_calls": ("judged", ".0f"),
    "cpu_s": ("CPU s", ".1f"),
    "wall_s": ("wall s", ".1f"),
}


def row_of(found: Mapping[str, float]) -> dict[str, str]:
    """A run as people read it."""
    return {title: f"{found[name]:{form}}" for name, (title, form) in COLUMNS.items() if name in found}


def over_seeds(figures: dict[str, float]) -> dict[str, float]:
    """The mean of every figure over the seeds, with the ends of its 95 % t interval, and the worst drop of all."""
    groups: defaultdict[str, list[float]] = defaultdict(list)
    for name, value in figures.items():
        groups[name.rsplit("_seed_", 1)[0]].append(value)
    found: dict[str, float] = {}
    for name, values in groups.items():
        found[name] = float(np.mean(values))
        if len(values) > 1:
            interval = mean_interval(values)
            found |= {f"{name}_low": interval.low, f"{name}_high": interval.high}
        if name.endswith("_worst_drop"):
            found[f"{name}_max"] = max(values)
    return found


def cells_of(seed: int) -> dict[str, Cell]:
    """All cells of one seed."""
    return {
        f"sft_{seed}": partial(of_sft, seed),
        f"best_of_n_{seed}": partial(of_search, seed),
        **{f"{algorithm}_{seed}": partial(of_loop, seed, algorithm) for algorithm in ALGORITHMS},
        f"trl_grpo_{seed}": partial(beside_trl, seed),
        **{f"language_{algorithm}_{seed}": partial(of_language, seed, algorithm) for algorithm in LANGUAGE},
    }


def main(options: Options) -> None:
    torch.set_num_threads(1)
    first = options.first_seed(FIRST_SEED)
    cells: dict[str, Cell] = {}
    for seed in range(first, first + (1 if options.quick else NUM_SEEDS)):
        cells |= cells_of(seed)
    caption = versions("prefloop", "trl", "torch", "transformers")
    with shared(STARTS):
        run_cells("learning_online", cells, options, caption, summary=over_seeds)


if __name__ == "__main__":
    main(parse_options(__doc__, default_seed=None))
