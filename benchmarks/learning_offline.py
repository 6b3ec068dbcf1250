"""What offline objectives learn: true reward against KL, the masking of tool tokens, process against outcome rewards.

    python benchmarks/learning_offline.py [--json PATH] [--only PATTERN] [--quick] [--seed N]

`frontier-*`: a single-turn task whose true reward is known (`_language.py`). Every objective learns from the same
2,000 noisy preferences, with a small sweep of its own; `best-of-n-*` ranks the start policy's completions by a reward
model of the same preferences. A setting is chosen on one set of fresh prompts and reported on another. `masking-*`: DPO
on the booking task, with tool tokens left out of the loss, counted in it, and through TRL's own DPOTrainer, which
counts them. `chains-*`: process rewards, outcome models and majority vote at best-of-n (`_chains.py`). The plot lies in
out/benchmarks/learning_offline.svg.
"""

from __future__ import annotations

import copy
import math
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
import transformers
from torch import nn

import _chains
import _masking
from _common import STATE, Cell, Measured, Options, parse_options, run_cells, versions
from _language import NUM_PROMPT, STOP, World, path_of, train_steps
from prefloop.batch.examples import Demonstration
from prefloop.batch.packed import pack
from prefloop.models.forward import forward
from prefloop.training.algorithms import make_algorithm
from prefloop.training.step import TrainingStep

NUM_SEEDS = 5
KL_LEVELS = (0.5, 1.0, 2.0)
BEST_OF = (1, 2, 4, 8, 16, 32, 64)
SELECTION, TEST, BON = 10, 20, 30  # sets of fresh prompts
Setting = tuple[float, Mapping[str, Any]]
Path = list[tuple[float, float]]  # (KL, true reward) along a training, the start first

SWEEPS: dict[str, Sequence[Setting]] = {
    "sft": [(lr, {}) for lr in (3e-4, 1e-3, 3e-3)],
    "dpo": [(5e-4, {"beta": beta}) for beta in (0.05, 0.1, 0.3)],
    "ipo": [(5e-4, {"beta": beta}) for beta in (0.03, 0.1, 0.3)],
    "kto": [(5e-4, {"beta": beta}) for beta in (0.05, 0.1, 0.3)],
    "simpo": [(5e-4, {"beta": beta, "gamma": gamma}) for beta, gamma in ((2.0, 1.0), (4.0, 1.0), (8.0, 2.0))],
    "orpo": [(lr, {"beta": beta}) for lr, beta in ((1e-3, 1.0), (1e-3, 5.0), (3e-3, 1.0))],
}


# --- reward against KL -----------------------------------------------------------------------------------------


def frontier(seed: int, options: Options) -> Measured:
    """All methods on one language."""
    quick = options.quick
    world = World(options.seed + seed, num_pairs=256 if quick else 2000, sft_steps=60 if quick else 400)
    found: dict[str, float] = {}
    for method, sweep in SWEEPS.items():
        tried = [learn(world, method, setting, quick) for setting in (sweep[1:2] if quick else sweep)]
        for name, value in summary_of(tried).items():
            found[f"{method}_{name}_{seed}"] = value
    return Measured(found, [{"method": name, **rows} for name, rows in table_of(found, [seed]).items()])


def learn(world: World, method: str, setting: Setting, quick: bool) -> tuple[Path, Path]:
    """One training; (KL, reward) along it on the prompts for selection, and on those for the report."""
    learning_rate, knobs = setting
    algorithm = make_algorithm(method, **knobs)
    policy = world.copy_of_start()
    paths: tuple[Path, Path] = ([(0.0, 0.0)], [(0.0, 0.0)])
    num_steps = 10 if quick else 100
    stops = {num_steps} if quick else {10, 20, 35, 60, 100}

    def look(step: int) -> None:
        for path, draw in zip(paths, (SELECTION, TEST), strict=True):
            if step in stops:
                reward, kl = world.evaluate(policy, draw, 64 if quick else 512)
                path.append((kl, reward))

    reference = world.start if algorithm.needs_reference else None
    examples = world.examples(algorithm)
    train_steps(
        policy, algorithm, examples, num_steps=num_steps, learning_rate=learning_rate, reference=reference, at=look
    )
    return paths


def at_levels(path: Path, levels: Sequence[float] = KL_LEVELS) -> dict[str, float]:
    """The reward at each KL level that the path reaches, by interpolation, and at its end."""
    kl, reward = (np.array(values) for values in zip(*path, strict=True))
    found = {"gold_end": float(reward[-1]), "kl_end": float(kl[-1])}
    for level in levels:
        above = np.flatnonzero(kl >= level)
        if len(above):
            i = int(above[0])
            share = (level - kl[i - 1]) / (kl[i] - kl[i - 1])
            found[f"gold_at_kl_{level:g}"] = float(reward[i - 1] + share * (reward[i] - reward[i - 1]))
    return found


def summary_of(tried: Sequence[tuple[Path, Path]]) -> dict[str, float]:
    """For each figure the setting that is best on the prompts for selection, as it does on the others."""
    selection, test = ([at_levels(paths[k]) for paths in tried] for k in (0, 1))
    found: dict[str, float] = {}
    for name in ("gold_end", *(f"gold_at_kl_{level:g}" for level in KL_LEVELS)):
        there = [i for i in range(len(tried)) if name in selection[i] and name in test[i]]
        if there:
            best = max(there, key=lambda i: selection[i][name])
            found[name] = test[best][name]
            if name == "gold_end":
                found["kl_end"] = test[best]["kl_end"]
    return found


def best_of_n(seed: int, options: Options) -> Measured:
    """Best-of-n by a reward model of the same preferences; the KL of best-of-n is log n - (n - 1) / n."""
    quick = options.quick
    world = World(options.seed + seed, num_pairs=256 if quick else 2000, sft_steps=60 if quick else 400)
    scorer, accuracy = reward_model(world, quick)
    num_prompts, most = (16, 4) if quick else (256, BEST_OF[-1])
    prompts = np.repeat(world.language.sentences(num_prompts, draw=BON, length=NUM_PROMPT), most, axis=0)
    completions = world.sample(world.start, prompts, BON)
    batch = pack([Demonstration((path_of(p, c),)) for p, c in zip(prompts, completions, strict=True)])
    last_V = torch.zeros_like(batch.loss_mask_V).index_fill(0, batch.last_visit_S, True)
    with torch.no_grad():
        score_TH = forward(scorer.eval(), batch, {"score"}, read_V=last_V).score_TH
    assert score_TH is not None
    score = score_TH[batch.visit_token_V[batch.last_visit_S], 0].numpy().reshape(num_prompts, most)
    gold = world.gold(prompts, completions).reshape(num_prompts, most)
    path = []
    for n in (n for n in BEST_OF if n <= most):
        best = score[:, :n].argmax(1)
        path.append((math.log(n) - (n - 1) / n, float(gold[np.arange(num_prompts), best].mean())))
    found = {f"bon_{name}_{seed}": value for name, value in at_levels(path).items()}
    rows = [{"method": name, **row} for name, row in table_of(found, [seed]).items()]
    return Measured(found | {f"bon_reward_model_accuracy_{seed}": accuracy}, rows)


def reward_model(world: World, quick: bool) -> tuple[nn.Module, float]:
    """Bradley–Terry on the same preferences, from the start policy: the best of a sweep on a tenth held out.

    Returns the model and its accuracy on those, whose labels are as noisy as the others.
    """
    held_out, trained_on = world.pairs[: len(world.pairs) // 10], world.pairs[len(world.pairs) // 10 :]
    algorithm = make_algorithm("reward", center_coef=0.01)
    tried: list[tuple[float, float, nn.Module]] = []
    for learning_rate, num_steps in ((1e-3, 60), (1e-3, 120), (2e-3, 60), (2e-3, 120), (4e-3, 60)):
        config = copy.deepcopy(world.start.config)
        config.num_labels, config.pad_token_id = 1, STOP + 1
        torch.manual_seed(world.seed)
        model = transformers.LlamaForSequenceClassification(config)
        model.model.load_state_dict(world.start.model.state_dict())
        train_steps(model, algorithm, trained_on, num_steps=5 if quick else num_steps, learning_rate=learning_rate)
        measured = TrainingStep(model, None, algorithm, torch.optim.SGD(model.parameters(), lr=0.0)).evaluate(held_out)
        tried.append((measured["loss"], measured["accuracy"], model))
    _, accuracy, best = min(tried, key=lambda one: one[0])
    return best, accuracy


def table_of(figures: Mapping[str, float], seeds: Sequence[int]) -> dict[str, dict[str, str]]:
    """Mean and standard deviation over seeds of every method's figures."""
    rows: dict[str, dict[str, str]] = {}
    for method in (*SWEEPS, "bon"):
        if not any(name.startswith(f"{method}_") for name in figures):
            continue
        rows[method] = {}
        for name in (*(f"gold_at_kl_{level:g}" for level in KL_LEVELS), "gold_end", "kl_end"):
            values = [figures[key] for seed in seeds if (key := f"{method}_{name}_{seed}") in figures]
            if values:
                spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
                rows[method][name.replace("_", " ")] = f"{statistics.mean(values):.2f}{spread} ({len(values)})"
    return rows


# --- over seeds ------------------------------------------------------------------------------------------------


def over_seeds(figures: dict[str, float]) -> dict[str, float]:
    """Mean and standard deviation of every figure that ends in the number of a seed."""
    groups: defaultdict[str, list[float]] = defaultdict(list)
    for name, value in figures.items():
        stem, _, seed = name.rpartition("_")
        if seed.isdigit():
            groups[stem].append(value)
    means = {name: statistics.mean(values) for name, values in groups.items()}
    spreads = {f"{name}_sd": statistics.stdev(values) for name, values in groups.items() if len(values) > 1}
    plot(means, spreads)
    return means | spreads


def plot(means: Mapping[str, float], spreads: Mapping[str, float]) -> None:
    """True reward against KL: a panel for each method, its line and a band of one sd over the other methods' lines."""
    curves = {method: curve for method in (*SWEEPS, "bon") if len(curve := curve_of(method, means, spreads)) > 1}
    if not curves:
        return
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    num_rows = -(-len(curves) // 4)
    figure, grid = pyplot.subplots(
        num_rows, 4, figsize=(10, 0.6 + 2.4 * num_rows), sharex=True, sharey=True, squeeze=False, layout="constrained"
    )
    for axes, method in zip(grid.flat, curves, strict=False):
        for curve in curves.values():
            axes.plot(*np.array(curve).T[:2], color="0.8", linewidth=1)
        kl, mean, spread = np.array(curves[method]).T
        axes.fill_between(kl, mean - spread, mean + spread, color="C0", alpha=0.25, linewidth=0)
        axes.plot(kl, mean, marker="o", markersize=4, color="C0")
        title = f"{'best-of-n' if method == 'bon' else method}: {mean[-1]:.2f} at {kl[-1]:.1f}"
        axes.set_title(title, fontsize="medium", fontweight="bold")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
        axes.margins(y=0.12)
    for axes in grid.flat[len(curves) :]:
        axes.set_visible(False)
    for axes in grid.flat[max(len(curves) - 4, 0) : len(curves)]:
        axes.tick_params(labelbottom=True)
    figure.supxlabel("KL to the start policy, nats a completion", fontsize="medium")
    figure.supylabel("true reward, sd of the start policy", fontsize="medium")
    figure.suptitle(
        "True reward at equal KL: mean, one sd over languages; in grey the other methods", fontsize="medium"
    )
    STATE.mkdir(parents=True, exist_ok=True)
    figure.savefig(STATE / "learning_offline.svg")
    pyplot.close(figure)


def curve_of(method: str, means: Mapping[str, float], spreads: Mapping[str, float]) -> list[tuple[float, float, float]]:
    """(KL, reward, its standard deviation) from the start to the mean end; only some seeds reach the levels beyond."""
    end = means.get(f"{method}_kl_end", 0.0)
    places = {f"gold_at_kl_{level:g}": level for level in KL_LEVELS if level < end} | {"gold_end": end}
    known = [(kl, f"{method}_{name}") for name, kl in places.items() if f"{method}_{name}" in means]
    return [(0.0, 0.0, 0.0), *((kl, means[name], spreads.get(f"{name}_sd", 0.0)) for kl, name in known)]


def cells(quick: bool) -> dict[str, Cell]:
    """All cells by name."""
    seeds = range(1 if quick else NUM_SEEDS)
    frontiers: dict[str, Cell] = {f"frontier-{seed}": partial(frontier, seed) for seed in seeds}
    ranked: dict[str, Cell] = {f"best-of-n-{seed}": partial(best_of_n, seed) for seed in seeds}
    return {**frontiers, **ranked, **_masking.cells(quick), **_chains.cells(quick)}


def main(options: Options) -> None:
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    caption = "true reward in sd of the start policy; mean ± sd over seeds (number of seeds); "
    caption += versions("prefloop", "trl", "torch", "transformers")
    run_cells("learning_offline", cells(options.quick), options, caption, summary=over_seeds)


if __name__ == "__main__":
    main(parse_options(__doc__))
