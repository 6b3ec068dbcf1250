"""True reward and proxy against √KL: the rise and fall, and what changes it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from _overoptimisation_curves import Curve, pooled_fit

Curves = Mapping[str, Mapping[int, Curve]]
GOLD, PROXY = "C0", "C1"
REMEDIES: Mapping[str, Sequence[tuple[str, str]]] = {
    "a price on KL, 100 preferences": (
        ("rl_n100_beta0", "β = 0"),
        ("rl_n100_slow_beta0", "β = 0, 0.3 of the rate"),
        ("rl_n100_beta0.05", "β = 0.05"),
        ("rl_n100_beta0.2", "β = 0.2"),
    ),
    "a price on KL, 1600 preferences": (
        ("rl_n1600_beta0", "β = 0"),
        ("rl_n1600_slow_beta0", "β = 0, 0.3 of the rate"),
        ("rl_n1600_beta0.05", "β = 0.05"),
        ("rl_n1600_beta0.2", "β = 0.2"),
    ),
    "an ensemble, 100 preferences": (
        ("rl_n100_ensemble_mean", "mean"),
        ("rl_n100_ensemble_bound1", "mean - 1 sd"),
        ("rl_n100_ensemble_bound3", "mean - 3 sd"),
    ),
    "more preferences": (
        ("rl_n100_beta0", "100"),
        ("rl_n400_beta0", "400"),
        ("rl_n1600_beta0", "1600"),
    ),
}


def draw(curves: Curves, place: Path) -> None:
    """Both plots as PNG in a folder; what was not measured is left out."""
    import matplotlib

    matplotlib.use("agg")
    place.mkdir(parents=True, exist_ok=True)
    _rise_and_fall(curves, place / "over_optimisation.png")
    _remedies(curves, place / "over_optimisation_remedies.png")


def _rise_and_fall(curves: Curves, file: Path) -> None:
    """RL at β = 0 above, best-of-n below, a column for each number of preferences."""
    from matplotlib import pyplot

    columns = [n for n in (100, 400, 1600) if curves.get(f"rl_n{n}_beta0") or curves.get(f"bon_n{n}")]
    if not columns:
        return
    figure, grid = pyplot.subplots(
        2, len(columns), figsize=(3.6 * len(columns), 5.6), sharex="row", sharey="row", squeeze=False,
        layout="constrained",
    )  # fmt: skip
    for column, n in enumerate(columns):
        for row, name in enumerate((f"rl_n{n}_beta0", f"bon_n{n}")):
            axes, found = grid[row, column], list(curves.get(name, {}).values())
            _plain(axes)
            axes.set_title(f"{'best-of-n' if row else 'RL, β = 0'}: {n} preferences", fontsize="medium")
            if found:
                _lines(axes, found)
                _fitted(axes, found)
            if not row and not column:
                axes.legend(frameon=False, fontsize="small", loc="upper left")
    figure.supxlabel(
        "d = √KL to the start policy (best-of-n: of its upper bound); ▼ KL where a fit turns", fontsize="medium"
    )
    figure.supylabel("gain, sd of the start policy", fontsize="medium")
    figure.savefig(file, dpi=130)
    pyplot.close(figure)


def _lines(axes: Any, curves: Sequence[Curve]) -> None:
    """A thin line of true reward and of proxy for each seed."""
    for i, curve in enumerate(curves):
        path = curve.smooth
        distance = np.sqrt(path.kl)
        axes.plot(distance, path.proxy, color=PROXY, linewidth=0.8, alpha=0.6, label="proxy" if not i else None)
        axes.plot(distance, path.gold, color=GOLD, linewidth=0.8, alpha=0.6, label=None if i else "true reward")


def _fitted(axes: Any, curves: Sequence[Curve]) -> None:
    """Both forms fitted to all seeds, and where they turn, if that is within what was measured."""
    farthest = max(float(np.sqrt(max(curve.kl))) for curve in curves)
    distance = np.linspace(0, farthest, 200)
    for form, label, line in (("rl", "d (α - β log d)", "--"), ("best_of_n", "d (α - β d)", "-")):
        fit = pooled_fit(curves, form)
        axes.plot(distance, fit.gain(distance), color="black", linewidth=1.4, linestyle=line, label=label)
        turn = fit.turning_point
        if turn < farthest:
            place = (turn, float(fit.gain(turn)))
            axes.plot(*place, marker="v", color="black", markersize=6)
            axes.annotate(f"{turn**2:.1f}", place, (0, 6), textcoords="offset points", ha="center", fontsize="small")


def _remedies(curves: Curves, file: Path) -> None:
    """The mean true reward over seeds, along training, of each way to hold it up."""
    from matplotlib import pyplot

    figure, grid = pyplot.subplots(2, 2, figsize=(9.5, 6.6), sharex=True, sharey=True, layout="constrained")
    for axes, (title, lines) in zip(grid.flat, REMEDIES.items(), strict=True):
        _plain(axes)
        axes.set_title(title, fontsize="medium")
        for i, (name, label) in enumerate(lines):
            if found := list(curves.get(name, {}).values()):
                _mean_line(axes, found, f"C{i}", label)
        if axes.lines:
            axes.legend(frameon=False, fontsize="small", loc="lower left")
    figure.supxlabel("√KL to the start policy", fontsize="medium")
    figure.supylabel("true reward, sd of the start policy", fontsize="medium")
    figure.savefig(file, dpi=130)
    pyplot.close(figure)


def _mean_line(axes: Any, curves: Sequence[Curve], color: str, label: str) -> None:
    """The mean over seeds at each step against the mean √KL, with a standard error around it; the end is marked."""
    paths = [curve.smooth for curve in curves]
    distance = np.mean([np.sqrt(path.kl) for path in paths], axis=0)
    gold_NL = np.array([path.gold for path in paths])
    mean = gold_NL.mean(0)
    if len(paths) > 1:
        error = gold_NL.std(0, ddof=1) / len(paths) ** 0.5
        axes.fill_between(distance, mean - error, mean + error, color=color, alpha=0.2, linewidth=0)
    axes.plot(distance, mean, color=color, label=label)
    axes.plot(distance[-1], mean[-1], marker="o", color=color, markersize=5)


def _plain(axes: Any) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    axes.axhline(0, color="0.5", linewidth=0.8)
