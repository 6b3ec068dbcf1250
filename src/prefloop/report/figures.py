"""The plots of a report. Each is left out, not drawn empty, where the run has nothing to show in it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from prefloop.evaluation.judging import Calibration
from prefloop.report import words
from prefloop.report.record import Iteration, RunRecord
from prefloop.report.svg import BAD, FIRST, GRID, MUTED, SECOND, THIRD, draw

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclass(frozen=True, slots=True)
class Figure:
    """A plot with the words around it; `svg` is markup, its words escaped.

    `section` is where in the report it stands: curves or judge.
    """

    title: str
    caption: str
    svg: str
    wide: bool = False
    section: str = "curves"


def figures(record: RunRecord, calibration: Calibration | None) -> list[Figure]:
    """All plots that the run has data for, in reading order."""
    turns = record.iterations
    drawn = [
        _success(record),
        _judge_against_verified(turns),
        _kl(record),
        _pairs(turns),
        _precision(turns),
        _lengths(turns),
        _reward(turns),
        _without_choice(turns),
        _explained(turns),
        _loss(turns),
        _sft_loss(record),
        _calibration(calibration),
        _scores(turns),
    ]
    return [figure for figure in drawn if figure is not None]


# --- outcomes -----------------------------------------------------------------------------------------------


def _success(record: RunRecord) -> Figure | None:
    points = record.successes()
    if not points:
        return None
    full = _full_evaluations(record)
    rolled_back = [turn.number for turn in record.iterations if turn.train.get("rolled_back")]

    def paint(axes: Axes) -> None:
        _line_with_intervals(axes, points, FIRST, "after each update")
        _diamonds(axes, full)
        for number in rolled_back:
            axes.axvline(number, color=BAD, linewidth=1.2, linestyle=(0, (3, 3)))
        _share_axis(axes)
        _updates_axis(axes, [updates for updates, _ in points])
        _legend(axes)

    caption = (
        "Verified success at temperature 1 with 95 % intervals: line on the guard tasks, diamonds on all held-out."
    )
    if rolled_back:
        caption += " Dashed: an update that the guards rolled back."
    return Figure("Success", caption, draw("success", _said("Success", points), paint, wide=True), wide=True)


def _full_evaluations(record: RunRecord) -> list[tuple[int, Mapping[str, Any]]]:
    found = [(0, record.start_evaluation), (record.end_number, record.end_evaluation)]
    measured = [(at, detail.get("sampled") or {}) for at, detail in found if not detail.get("guard")]
    return [(at, sampled["success"]) for at, sampled in measured if sampled.get("success")]


def _diamonds(axes: Axes, points: Sequence[tuple[int, Mapping[str, Any]]]) -> None:
    if points:
        at, shares = zip(*[(at, share["value"]) for at, share in points], strict=True)
        axes.plot(at, shares, "D", color=SECOND, markersize=7, label="all held-out tasks", zorder=4)


def _judge_against_verified(turns: Sequence[Iteration]) -> Figure | None:
    judged = [(turn.number, turn.judge["mean_score"]) for turn in turns if turn.judge.get("mean_score") is not None]
    verified = [
        (turn.number, turn.judge["mean_verified_score"])
        for turn in turns
        if turn.judge.get("mean_verified_score") is not None
    ]
    success = [(turn.number, turn.judge["success"]) for turn in turns if turn.judge.get("success")]
    if not judged:
        return None

    def paint(axes: Axes) -> None:
        axes.plot(*zip(*judged, strict=True), "o-", color=FIRST, label="judge's score")
        if verified:
            axes.plot(*zip(*verified, strict=True), "s-", color=THIRD, label="verified score")
        if success:
            _line_with_intervals(axes, success, SECOND, "verified success")
        _share_axis(axes)
        _iterations_axis(axes, [at for at, _ in judged])
        _legend(axes)

    caption = (
        "Means over the rollouts of each iteration. If the first rises without the others, the judge is being gamed."
    )
    return Figure(
        "Judge against truth", caption, draw("judge", _said("Judge's mean score", judged), paint, wide=True), wide=True
    )


def _kl(record: RunRecord) -> Figure | None:
    points = [(turn.number, turn.kl) for turn in record.iterations if turn.kl is not None]
    if not points:
        return None
    points.insert(0, (0, 0.0))  # the start policy is where the distance is measured from

    def paint(axes: Axes) -> None:
        axes.plot(*zip(*points, strict=True), "o-", color=FIRST)
        _from_zero(axes, [kl for _, kl in points])
        axes.set_ylabel("nats a trajectory")
        _updates_axis(axes, [updates for updates, _ in points])

    caption = "KL divergence of the policy from the start policy, on its own samples."
    return Figure("Distance from the start", caption, draw("kl", _said("KL in nats", points), paint))


# --- the judge ----------------------------------------------------------------------------------------------


def _calibration(calibration: Calibration | None) -> Figure | None:
    if calibration is None:
        return None
    points = [(one.mean_score, one.success.to_dict()) for one in calibration.bins]

    def paint(axes: Axes) -> None:
        axes.plot([0, 1], [0, 1], color=MUTED, linewidth=1, linestyle=(0, (3, 3)))
        _line_with_intervals(axes, points, FIRST, "")
        _share_axis(axes, "verified success")
        axes.set_xlim(-0.03, 1.03)
        axes.set_xlabel("judge's score")

    separation = ""
    if calibration.separation is not None:
        separation = f" A success outscores a failure {words.percent(calibration.separation)} of the time."
    caption = f"Verified success among all rollouts of like score.{separation}"
    return Figure(
        "Judge's score and outcome",
        caption,
        draw("calibration", _said("Success by score", points), paint),
        section="judge",
    )


def reliability(found: Mapping[str, Any]) -> Figure:
    """A reward model's confidence against truth on held-out pairs (`Reliability` as a dictionary)."""
    points = [(one["mean_score"], one["success"]) for one in found["bins"]]

    def paint(axes: Axes) -> None:
        axes.plot([0.5, 1], [0.5, 1], color=MUTED, linewidth=1, linestyle=(0, (3, 3)))
        _line_with_intervals(axes, points, FIRST, "")
        _share_axis(axes, "right")
        axes.set_xlim(0.485, 1.015)
        axes.set_xlabel("confidence")

    caption = (
        f"How often the side that scores higher is the better one, by confidence. Calibration error "
        f"{found['ece']:.3f}; a calibrated model shows up to {found['ece_by_chance']:.3f} by chance."
    )
    return Figure("Confidence and truth", caption, draw("reliability", _said("Right by confidence", points), paint))


def _scores(turns: Sequence[Iteration]) -> Figure | None:
    found = [turn.curate for turn in turns if turn.curate.get("kept_scores") and turn.curate.get("dropped_scores")]
    if not found:
        return None
    edges = found[0]["kept_scores"]["edges"]
    kept = _summed([curate["kept_scores"]["counts"] for curate in found])
    dropped = _summed([curate["dropped_scores"]["counts"] for curate in found])
    width = edges[1] - edges[0]

    def paint(axes: Axes) -> None:
        left = edges[:-1]
        axes.bar(left, dropped, width * 0.9, align="edge", color=MUTED, alpha=0.45, label="dropped", linewidth=0)
        axes.bar(left, kept, width * 0.9, dropped, align="edge", color=FIRST, label="kept", linewidth=0)
        axes.set_xlabel("judge's score")
        axes.set_ylabel("rollouts")
        _legend(axes)

    caption = f"All iterations: {sum(kept):,} rollouts kept for training, {sum(dropped):,} dropped."
    return Figure("Scores kept and dropped", caption, draw("scores", caption, paint), section="judge")


def _summed(rows: Sequence[Sequence[int]]) -> list[int]:
    return [sum(column) for column in zip(*rows, strict=True)]


# --- the buffer ---------------------------------------------------------------------------------------------


def _pairs(turns: Sequence[Iteration]) -> Figure | None:
    points = [(turn.number, turn.curate["num_pairs"]) for turn in turns if "num_pairs" in turn.curate]
    human = [(turn.number, turn.curate.get("num_human_pairs", 0)) for turn in turns if turn.curate]
    if not points:
        return None

    def paint(axes: Axes) -> None:
        _bars(axes, points, FIRST, "all pairs")
        if any(num for _, num in human):
            _bars(axes, human, SECOND, "from people's votes")
            _legend(axes)
        axes.locator_params(axis="y", integer=True)
        _iterations_axis(axes, [at for at, _ in points])

    caption = "Preference pairs that each iteration trained on."
    return Figure("Pairs", caption, draw("pairs", _said("Pairs", points), paint))


def _precision(turns: Sequence[Iteration]) -> Figure | None:
    points = [(turn.number, turn.curate["pair_precision"]) for turn in turns if turn.curate.get("pair_precision")]
    if not points:
        return None

    def paint(axes: Axes) -> None:
        axes.axhline(0.5, color=MUTED, linewidth=1, linestyle=(0, (3, 3)))
        _line_with_intervals(axes, points, FIRST, "")
        _share_axis(axes)
        _iterations_axis(axes, [at for at, _ in points])

    caption = "Share of sampled pairs that the verified outcome orders the same way; dashed: a coin."
    return Figure("Pair precision", caption, draw("precision", _said("Pair precision", points), paint))


def _lengths(turns: Sequence[Iteration]) -> Figure | None:
    found = [turn for turn in turns if turn.curate.get("length_chosen") is not None]
    if not found:
        return None
    at = [turn.number for turn in found]
    chosen = [turn.curate["length_chosen"] for turn in found]
    rejected = [turn.curate["length_rejected"] for turn in found]

    def paint(axes: Axes) -> None:
        axes.plot(at, chosen, "o-", color=FIRST, label="chosen")
        axes.plot(at, rejected, "s-", color=MUTED, label="rejected")
        axes.set_ylabel("characters")
        _from_zero(axes, [*chosen, *rejected])
        _iterations_axis(axes, at)
        _legend(axes)

    caption = "Mean length of what the assistant wrote. A lasting gap teaches length instead of quality."
    said = _said("Length of chosen", list(zip(at, chosen, strict=True)))
    return Figure("Length of chosen and rejected", caption, draw("lengths", said, paint))


# --- learning from own rollouts -------------------------------------------------------------------------------


def _reward(turns: Sequence[Iteration]) -> Figure | None:
    points = [(turn.number, turn.credit["reward_interval"]) for turn in turns if turn.credit.get("reward_interval")]
    if not points:
        return None

    def paint(axes: Axes) -> None:
        _line_with_intervals(axes, points, FIRST, "")
        axes.set_ylabel("reward")
        _iterations_axis(axes, [at for at, _ in points])

    caption = "Mean of what the rollouts of each iteration were worth, KL not counted, with 95 % intervals over tasks."
    said = _said("Reward", [(at, point["value"]) for at, point in points])
    return Figure("Reward of the rollouts", caption, draw("reward", said, paint))


def _without_choice(turns: Sequence[Iteration]) -> Figure | None:
    credited = [(turn.number, turn.credit) for turn in turns if "num_groups_without_spread" in turn.credit]
    points = [(at, c["num_groups_without_spread"] / c["num_groups"]) for at, c in credited]
    if not points:
        return None

    def paint(axes: Axes) -> None:
        _bars(axes, points, MUTED, "")
        _share_axis(axes)
        _iterations_axis(axes, [at for at, _ in points])

    caption = (
        "Share of tasks whose attempts were all worth the same, so that nothing but their KL is learned from; "
        "rollout.redraws draws others in their place."
    )
    return Figure("Tasks with nothing to choose", caption, draw("flat", _said("Share of tasks", points), paint))


def _explained(turns: Sequence[Iteration]) -> Figure | None:
    points = [
        (t.number, t.credit["explained_variance"]) for t in turns if t.credit.get("explained_variance") is not None
    ]
    if not points:
        return None

    def paint(axes: Axes) -> None:
        axes.axhline(0.0, color=MUTED, linewidth=1, linestyle=(0, (3, 3)))
        axes.plot(*zip(*points, strict=True), "o-", color=FIRST)
        _iterations_axis(axes, [at for at, _ in points])

    caption = "How much of the variance of returns the critic foretold, before it learned from them; dashed: nothing."
    return Figure("The critic", caption, draw("critic", _said("Explained variance", points), paint))


# --- training -----------------------------------------------------------------------------------------------


def _loss(turns: Sequence[Iteration]) -> Figure | None:
    trained = [turn for turn in turns if turn.train.get("loss")]
    if not trained:
        return None
    steps = [(turn.number, [loss for loss in turn.train["loss"] if loss is not None]) for turn in trained]

    def paint(axes: Axes) -> None:
        first = 0
        for number, loss in steps:
            axes.axvline(first, color=GRID, linewidth=1)
            marker = "o" if len(loss) < 4 else ""  # a line needs more than a point or two to be seen
            axes.plot(range(first, first + len(loss)), loss, marker=marker, color=FIRST, linewidth=1.4)
            axes.annotate(str(number), (first, 1), xycoords=("data", "axes fraction"), xytext=(3, -9),
                          textcoords="offset points", color=MUTED, fontsize=8)  # fmt: skip
            first += len(loss)
        axes.set_xlabel("optimizer step")

    algorithm = next((turn.train["algorithm"] for turn in trained if turn.train.get("algorithm")), "training")
    caption = f"Loss of {algorithm}, step by step; a line and a number where an iteration begins."
    return Figure("Training loss", caption, draw("loss", caption, paint))


def _sft_loss(record: RunRecord) -> Figure | None:
    loss = [value for value in record.before.get("sft", {}).get("loss") or [] if value is not None]
    if not loss:
        return None

    def paint(axes: Axes) -> None:
        axes.plot(range(1, len(loss) + 1), loss, color=THIRD, linewidth=1.4)
        axes.set_xlabel("optimizer step")
        _from_zero(axes, loss)

    caption = "Cross-entropy on the demonstrations, nats a token: how the start policy was made."
    return Figure("Loss of the first training", caption, draw("sft", caption, paint))


# --- axes ---------------------------------------------------------------------------------------------------


def _line_with_intervals(axes: Axes, points: Sequence[tuple[float, Mapping[str, Any]]], color: str, label: str) -> None:
    at = [x for x, _ in points]
    axes.vlines(at, [p["low"] for _, p in points], [p["high"] for _, p in points], color=color, alpha=0.45, linewidth=3)
    axes.plot(at, [p["value"] for _, p in points], "o-", color=color, label=label)


def _bars(axes: Axes, points: Sequence[tuple[int, float]], color: str, label: str) -> None:
    axes.bar([x for x, _ in points], [y for _, y in points], width=0.62, color=color, label=label, linewidth=0)


def _legend(axes: Axes) -> None:
    """The legend above the plot, where it can hide nothing."""
    axes.legend(loc="lower left", bbox_to_anchor=(-0.02, 1.0), ncols=3, borderaxespad=0.2)


def _share_axis(axes: Axes, label: str = "") -> None:
    axes.set_ylim(-0.03, 1.03)
    axes.set_yticks([0, 0.25, 0.5, 0.75, 1], ["0", "25 %", "50 %", "75 %", "100 %"])
    axes.set_ylabel(label)


def _from_zero(axes: Axes, values: Sequence[float]) -> None:
    """An axis from 0 (or below, where an estimate is) with room for whole markers at both ends."""
    low, high = min(0.0, *values), max(*values, 0.0)
    room = 0.05 * (high - low) or 1.0
    axes.set_ylim(low - room, high + room)


def _updates_axis(axes: Axes, at: Sequence[int]) -> None:
    shown = _thinned(at)
    axes.set_xticks(shown, ["start" if updates == 0 else str(updates) for updates in shown])
    axes.set_xlabel("updates")


def _iterations_axis(axes: Axes, at: Sequence[int]) -> None:
    axes.set_xticks(_thinned(at))
    axes.set_xlabel("iteration")
    axes.margins(x=0.08)


def _thinned(at: Sequence[int], most: int = 12) -> list[int]:
    step = -(-len(at) // most)
    return list(at)[::step]


def _said(name: str, points: Sequence[tuple[float, Any]]) -> str:
    """What a screen reader says of a curve: every point, its interval where it has one."""
    told = [f"{words.number(at)}: {_told(value)}" for at, value in points]
    return f"{name}. {'; '.join(told)}."


def _told(value: float | Mapping[str, Any]) -> str:
    return words.share_with_interval(value) if isinstance(value, Mapping) else words.number(value)
