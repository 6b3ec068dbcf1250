"""Episodes that are no case for the judge: broken from outside, or graded by nobody who could."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from prefloop.records import Ended, PrefloopError, Trajectory
from prefloop.stages.context import AGENT_LOGS, Run

BROKEN = (Ended.ERROR, Ended.DEADLINE, Ended.INTERRUPTED)  # what the policy was about to say was not heard


def reasons_left_out(run: Run, trajectories: Sequence[Trajectory]) -> dict[str, str]:
    """Why trajectories cannot be judged, by id; those that can are not in it.

    What was broken from outside is no failure of the policy, and none of the judge. An episode with a verdict was
    seen to its end, however it ended.
    """
    return _reasons(run, trajectories, needs_grade=run.settings.judge.kind == "rules")


def _reasons(run: Run, trajectories: Sequence[Trajectory], *, needs_grade: bool) -> dict[str, str]:
    graded = run.verdicts(trajectory.id for trajectory in trajectories)
    found = {t.id: _why_left_out(t, t.id in graded, needs_grade) for t in trajectories}
    return {trajectory_id: reason for trajectory_id, reason in found.items() if reason}


def _why_left_out(trajectory: Trajectory, graded: bool, needs_grade: bool) -> str:
    if graded:
        return ""
    if not trajectory.num_turns:
        return "nothing said"
    if trajectory.ended in BROKEN:
        return trajectory.ended.value
    return "not graded" if needs_grade else ""


def counted_reasons(left_out: Mapping[str, str]) -> dict[str, int]:
    """How many were left out, by reason."""
    return dict(sorted(Counter(left_out.values()).items()))


def nothing_to_judge(run: Run, trajectories: Sequence[Trajectory], left_out: Mapping[str, str]) -> str:
    """What is wrong where every trajectory was left out, and what to do."""
    counts = ", ".join(f"{number} {reason}" for reason, number in counted_reasons(left_out).items())
    first = next((trajectory for trajectory in trajectories if trajectory.extra.get("error")), trajectories[0])
    why = str(first.extra.get("error") or left_out[first.id])
    if why == "not graded":
        why = "nothing was verified, and judge.kind 'rules' knows nothing else"
    log = run.directory / AGENT_LOGS / f"{first.id}.log"
    printed = f" (what was printed is in {log})" if log.exists() else ""
    return (
        f"judge {run.judge.rater.name}: none of {len(trajectories)} trajectories can be judged ({counts}); the first, "
        f"{first.id}: {why}{printed}; mend that, or take another judge, and give the run file another name"
    )


def check_served(run: Run, trajectories: Sequence[Trajectory], iteration: int) -> None:
    """See that something can be judged, or voted on, of episodes that agents had through the gateway.

    It is said while more episodes can be had.

    Raises:
        PrefloopError: all were broken from outside, or nothing was said in them.
    """
    left_out = _reasons(run, trajectories, needs_grade=False)
    if len(left_out) == len(trajectories):
        counts = ", ".join(f"{number} {reason}" for reason, number in counted_reasons(left_out).items())
        raise PrefloopError(
            f"run {run.settings.name}: none of the {len(trajectories)} recorded episodes of iteration {iteration + 1} "
            f"can be judged ({counts}): start `prefloop gateway` with this run file again, and post an outcome to "
            "/outcome for each episode that it then serves"
        )
