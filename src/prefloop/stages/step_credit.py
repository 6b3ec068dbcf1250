"""What rollouts are paid along the way: the judgements of a process reward model, at the policy's own tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from prefloop.chat import StepFinder, steps_of
from prefloop.chat.steps import StepEnd
from prefloop.credit.settings import StepReward
from prefloop.credit.steps import Paid
from prefloop.records import Judgement, PrefloopError, Trajectory, Valued
from prefloop.stages.context import Run
from prefloop.stages.examples import Paths
from prefloop.stages.rewarding import rewards_of_steps

if TYPE_CHECKING:
    from prefloop.models.load import Policy


def paid_rollouts(
    run: Run,
    policy: Policy,
    how: StepReward,
    members: Sequence[Valued],
    trajectories: Mapping[str, Trajectory],
    paths: Mapping[str, Paths],
) -> dict[str, Paid]:
    """What each rollout is paid along the way, by its id; one whose steps cannot be found in its tokens is not in it.

    A step is what the model of steps reads as one; its end is found among the tokens of the policy, which may have
    another tokenizer.
    """
    reads = run.judge.rater.specification["scorer"]["reads"]
    finder = StepFinder(run.policies.renderer(policy), reads["separator"])
    judgements = _evidence(run, members)
    paid = {}
    for member in members:
        trajectory, own = trajectories[member.trajectory_id], paths[member.trajectory_id]
        places = steps_of(trajectory, reads["step"], reads["separator"])
        try:
            ends = [finder.end(trajectory, own, place) for place in places]
        except PrefloopError:
            continue
        reward_K = run.settings.reward.judge * rewards_of_steps(judgements[trajectory.id], how)
        place_U = np.argsort(time_order(trajectory, own))
        token_K = np.array([place_U[_own_place(own, end)] for end in ends])
        order = np.argsort(token_K, kind="stable")
        paid[trajectory.id] = Paid(reward_K[order], token_K[order])
    return paid


def time_order(trajectory: Trajectory, paths: Paths) -> NDArray[np.int64]:
    """The places of a rollout's own tokens, counted path after path, in the order in which they were said, [U]."""
    time_M = np.zeros(len(trajectory.messages), dtype=np.int64)
    time_M[list(trajectory.own_turns)] = np.arange(trajectory.num_turns)
    message_U = np.concatenate([path.message[path.loss_mask] for path in paths])
    return np.argsort(time_M[message_U], kind="stable")


def _evidence(run: Run, members: Sequence[Valued]) -> dict[str, list[Judgement]]:
    """The judgements that rollouts' rewards were made of."""
    wanted = {judgement_id for member in members for judgement_id in member.evidence}
    found: dict[str, list[Judgement]] = {member.trajectory_id: [] for member in members}
    for judgement in run.store.judgements(trajectory_ids=list(found), rater_id=run.judge.rater.id):
        if judgement.id in wanted:
            found[judgement.trajectory_id].append(judgement)
    return found


def _own_place(paths: Paths, end: StepEnd) -> int:
    """The place of a step's last token among all own tokens of its trajectory, path after path."""
    before = sum(int(path.loss_mask.sum()) for path in paths[: end.path])
    return before + int(paths[end.path].loss_mask[: end.token].sum())
