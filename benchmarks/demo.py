"""The demo from nothing, over seeds: how good the agent gets, how far it moves, and how long it takes.

Runs `prefloop run examples/booking.toml` in a process of its own for each seed, in a fresh directory, and reads the
figures from its store. Every seed makes its own demonstrations, model, rollouts and judge noise; the held-out tasks
are the same 512.
"""

from __future__ import annotations

import itertools
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from _common import Measured, Options, parse_options, run_cells, versions
from prefloop.stages.context import run_id
from prefloop.store import Store

RUN_FILE = Path(__file__).resolve().parents[1] / "examples" / "booking.toml"
NUM_SEEDS = 5
FIRST_SEED = 101  # not used while tuning
QUICK = ("sft.num_steps=60", "sft.num_demonstrations=400", "iterations=2", "evaluation.num_tasks=64")


def measure(seed: int, quick: bool) -> Measured:
    """One run from nothing."""
    with tempfile.TemporaryDirectory() as directory:
        overrides = [
            f"seed={seed}",
            f"policy.initial.seed={seed}",
            f"judge.rules.seed={seed}",
            f"directory={directory}",
        ]
        overrides += QUICK if quick else ()
        command = [sys.executable, "-m", "prefloop.cli", "run", str(RUN_FILE), "--store", f"{directory}/store.db"]
        for override in overrides:
            command += ["--set", override]
        started, began = time.perf_counter(), time.time()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        wall = time.perf_counter() - started
        return _figures(Path(directory) / "store.db", seed, wall, began)


def _figures(path: Path, seed: int, wall: float, began: float) -> Measured:
    run = run_id("booking")
    with Store(str(path), must_exist=True) as store:
        events = store.events(run)
        evaluations = [event["detail"] for event in events if event["kind"] == "evaluate"]
        guards = [event["detail"]["sampled"]["success"]["value"] for event in events if event["kind"] == "guard"]
        ready = next(event["created_at"] for event in events if event["kind"] == "policy") - began
    start, end = evaluations[0], evaluations[-1]
    found = {
        "success_start": start["sampled"]["success"]["value"],
        "success_end": end["sampled"]["success"]["value"],
        "success_start_greedy": start["greedy"]["success"]["value"],
        "success_end_greedy": end["greedy"]["success"]["value"],
        "kl": end["sampled"]["kl_per_trajectory"],
        "worst_drop": max(before - after for before, after in itertools.pairwise(guards)),
        "before_first_rollout_s": ready,
        "wall_s": wall,
    }
    row = {
        "start": _shares(found, "success_start"),
        "end": _shares(found, "success_end"),
        "KL": f"{found['kl']:.2f}",
        "worst drop": f"{found['worst_drop']:.3f}",
        "ready s": f"{ready:.1f}",
        "wall s": f"{wall:.1f}",
    }
    return Measured({f"{name}_seed_{seed}": value for name, value in found.items()}, [row])


def _shares(found: dict[str, float], name: str) -> str:
    return f"{found[name]:.3f} (greedy {found[f'{name}_greedy']:.3f})"


def main(options: Options) -> None:
    own = range(FIRST_SEED, FIRST_SEED + (1 if options.quick else NUM_SEEDS))
    seeds = own if options.seed is None else [options.seed]
    cells = {f"seed_{seed}": _cell(seed) for seed in seeds}
    run_cells("demo", cells, options, versions("prefloop", "torch", "transformers"), summary=_summary)


def _cell(seed: int):
    return lambda options: measure(seed, options.quick)


def _summary(figures: dict[str, float]) -> dict[str, float]:
    """Means over the seeds, and the worst of them."""
    names = {figure.rsplit("_seed_", 1)[0] for figure in figures}
    by_name = {name: [v for figure, v in figures.items() if figure.startswith(f"{name}_seed_")] for name in names}
    means = {name: statistics.mean(values) for name, values in by_name.items()}
    worst = {
        "success_end_min": min(by_name["success_end"]),
        "success_end_greedy_min": min(by_name["success_end_greedy"]),
        "kl_max": max(by_name["kl"]),
        "worst_drop_max": max(by_name["worst_drop"]),
        "wall_s_max": max(by_name["wall_s"]),
        "before_first_rollout_s_max": max(by_name["before_first_rollout_s"]),
    }
    return {**means, **worst}


if __name__ == "__main__":
    main(parse_options(__doc__, default_seed=None))
