"""A step of GRPO and RLOO against TRL's trainers: same model, rollouts, threads, machine and run.

    python benchmarks/speed_online.py [--json PATH] [--only PATTERN] [--quick] [--seed N] [--fresh]

Engines take turns in one process, and each cell has a process of its own (but with `--quick`): the C library keeps what
cells before it freed, which takes a third off the time of a peer whose logits are large. Ratios are of medians of
process CPU time, one thread. TRL is measured as installed and compact: its head on the completions only, as on CUDA,
which is the honest peer on a CPU. The training part (loss, backward, clipping, fused AdamW on rollouts that are there)
also stands beside a lean padded loop. Every cell first compares the loss and the gradient norm of all engines on the
same rollouts and log-probs, and stops where they differ.

Cells: `ALGORITHM_step` samples, scores and trains, `grpo_passes_2` trains twice on what it samples;
`ALGORITHM_train_gN` trains on a group of N, 512:128 tokens; `tree` on 27 branching trajectories of one root
(`tree_tools`: half of each turn is the answer of a tool); `long` on completions of 2,048 tokens; `growth_…` on groups
of 2 to 32 and on 1 to 8 turns, drawn against the number of distinct tokens in `out/benchmarks/speed_online.svg`;
`rollout` is that of `rollout.py`. Needs `pip install 'prefloop[oracle,report]'`.
"""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context

import torch

from _common import STATE, Cell, Measured, Options, parse_options, run_cells, versions
from _offline_models import SMALL
from _offline_trl import quieten
from _online_engines import ONLINE
from _online_measure import Training, measure_step, measure_training
from _online_rows import Rollouts, grouped, tree, with_turns
from rollout import measure as measure_rollout

PROMPT, COMPLETION = 512, 128
GROUPS = (2, 4, 8, 16, 32)
TURNS = (1, 2, 3, 4, 6, 8)
QUICK_SIZES = 2


def of_group(size: int, options: Options, prompt: int = PROMPT, completion: int = COMPLETION) -> Rollouts:
    shorter = 8 if options.quick else 1
    return grouped(prompt // shorter, completion // shorter, size, SMALL.vocab, options.seed)


def of_turns(turns: int, options: Options) -> Rollouts:
    """A group of 8 with a prompt of 256 tokens, turns of 64 and answers of tools of 64."""
    shorter = 8 if options.quick else 1
    return with_turns(256 // shorter, 64 // shorter, turns, 8, SMALL.vocab, options.seed)


def of_tree(options: Options, *, tools: bool = False) -> Rollouts:
    """Six turns of 100 tokens: 16,200 tokens, of which 6,800 are distinct."""
    return tree(12 if options.quick else 100, SMALL.vocab, options.seed, tools=tools)


def measure_growth(kind: str, options: Options) -> Measured:
    """How the time of a step grows with the size of the group, or with the number of turns."""
    sizes = (GROUPS if kind == "group" else TURNS)[: QUICK_SIZES if options.quick else None]
    figures, rows = {}, []
    for size in sizes:
        rollouts = partial(of_group if kind == "group" else of_turns, size)
        case = Training(f"growth_{kind}", "grpo", rollouts, str(size), peers=("compact",), repetitions=3)
        found = measure_training(case, options)
        figures |= found.figures
        rows += [{"of": str(size), **row} for row in found.rows]
    return Measured(figures, rows)


def all_cells() -> dict[str, Cell]:
    training = [
        *(
            Training(f"{algorithm}_train", algorithm, partial(of_group, size), f"g{size}")
            for algorithm in ONLINE
            for size in (8, 16)
        ),
        Training("tree", "grpo", of_tree),
        Training("tree_tools", "grpo", partial(of_tree, tools=True)),
        Training("long", "grpo", partial(of_group, 4, prompt=128, completion=2048), repetitions=3),
    ]
    return {
        **{f"{algorithm}_step": partial(measure_step, algorithm) for algorithm in ONLINE},
        "grpo_passes_2": partial(measure_step, "grpo", num_passes=2),
        **{case.figure("").replace("__", "_"): partial(measure_training, case) for case in training},
        **{f"growth_{kind}": partial(measure_growth, kind) for kind in ("group", "turns")},
        "rollout": partial(measure_rollout, "rollout"),
    }


def apart(cell: Cell) -> Cell:
    """The cell, measured in a process of its own where its figures count."""

    def measure(options: Options) -> Measured:
        if options.quick:
            prepare()
            return cell(options)
        with ProcessPoolExecutor(1, get_context("spawn"), initializer=prepare) as pool:
            return pool.submit(cell, options).result()

    return measure


def prepare() -> None:
    """One thread, and no more words from peers than is needed."""
    torch.set_num_threads(1)
    quieten()


def plot(figures: Mapping[str, float]) -> dict[str, float]:
    """Draw the growth, where it was measured; adds no figure."""
    curves = {kind: curve for kind in ("group", "turns") if (curve := curve_of(kind, figures))}
    if not curves:
        return {}
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    titles = {"group": "groups of 2 to 32, 512:128 tokens", "turns": "1 to 8 turns, groups of 8"}
    figure, grid = pyplot.subplots(1, len(curves), figsize=(5 * len(curves), 4), squeeze=False, layout="constrained")
    for axes, (kind, curve) in zip(grid.flat, curves.items(), strict=True):
        for engine, color, label in (("s", "C0", "prefloop"), ("compact_s", "C1", "TRL, compact")):
            places = [(tokens, figures[f"growth_{kind}_{engine}_{size}"]) for size, tokens in curve]
            axes.plot(*zip(*places, strict=True), marker="o", markersize=4, color=color, label=label)
        for size, tokens in curve:
            near = (tokens, figures[f"growth_{kind}_compact_s_{size}"])
            axes.annotate(str(size), near, xytext=(-3, 5), textcoords="offset points", ha="right", fontsize="small")
        axes.set(xlabel="distinct tokens", ylabel="CPU seconds of a step", xlim=(0, None), ylim=(0, None))
        axes.set_title(titles[kind], fontsize="medium")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
        axes.legend(frameon=False)
    STATE.mkdir(parents=True, exist_ok=True)
    figure.savefig(STATE / "speed_online.svg")
    pyplot.close(figure)
    return {}


def curve_of(kind: str, figures: Mapping[str, float]) -> list[tuple[int, float]]:
    """Sizes that were measured and their distinct tokens."""
    stem = f"growth_{kind}_computed_"
    return sorted((int(name.removeprefix(stem)), value) for name, value in figures.items() if name.startswith(stem))


def main(options: Options) -> None:
    caption = "an optimizer step in seconds, median [min-max], one thread, float32; "
    caption += versions("prefloop", "trl", "torch", "transformers")
    cells = {name: apart(cell) for name, cell in all_cells().items()}
    run_cells("speed_online", cells, options, caption, summary=plot)


if __name__ == "__main__":
    main(parse_options(__doc__))
