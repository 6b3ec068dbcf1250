"""What each rollout of an iteration is worth, frozen as a dataset; and how much of that each of its tokens deserves."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from prefloop.credit.gae import whiten
from prefloop.credit.groups import Baseline, Credit, group_mean, leave_one_out, running_baseline, without_spread
from prefloop.credit.settings import RewardSettings
from prefloop.credit.shaping import adapted_kl_coef, shaped, weighted_sum
from prefloop.records import Dataset, Ended, JSONObject, Judgement, PrefloopError, Source, Status, Trajectory, Valued
from prefloop.stages.context import Run

if TYPE_CHECKING:
    from prefloop.batch.examples import Logprobs, RolloutGroup

Floats = NDArray[np.float64]


# --- rewards ----------------------------------------------------------------------------------------------------


def valued_dataset(run: Run, iteration: int, trajectories: Sequence[Trajectory]) -> Dataset:
    """The rollouts that have a reward and say something, with it; those whose judge failed are not in it."""
    settings = run.settings.reward
    said = [trajectory for trajectory in trajectories if trajectory.num_turns]
    if settings.length_penalty:
        said = run.store.trajectories([trajectory.id for trajectory in said], with_paths=True)
    by_trajectory: dict[str, list[Judgement]] = {}
    ids = [trajectory.id for trajectory in said]
    for judgement in run.store.judgements(trajectory_ids=ids, rater_id=run.judge.rater.id):
        if judgement.status is Status.OK and judgement.value is not None:
            by_trajectory.setdefault(judgement.trajectory_id, []).append(judgement)
    verdicts = run.verdicts(ids) if settings.verified else {}
    values = {
        "judge": [_mean(by_trajectory.get(t.id, ())) for t in said],
        "verified": [_mean([verdicts[t.id]] if t.id in verdicts else ()) for t in said],
    }
    rewards = rewards_of(said, values, settings)
    valued = [
        Valued(t.id, float(reward), tuple(j.id for j in by_trajectory.get(t.id, ()) if settings.judge))
        for t, reward in zip(said, rewards, strict=True)
        if np.isfinite(reward)
    ]
    recipe = {"of": "rollouts", "reward": settings.model_dump(mode="json"), "rater_id": run.judge.rater.id}
    return Dataset(recipe, run_id=run.id, iteration=iteration, valued=tuple(valued))


def rewards_of(
    trajectories: Sequence[Trajectory], values: Mapping[str, Sequence[float]], settings: RewardSettings
) -> Floats:
    """The reward of each trajectory from the values of its sources, NaN where one that has weight has none."""
    weights = {"judge": settings.judge, "verified": settings.verified}
    value_S = weighted_sum({name: np.array(found, dtype=np.float64) for name, found in values.items()}, weights)
    value_S = shaped(
        value_S,
        clip=None if settings.clip is None else (settings.clip[0], settings.clip[1]),
        stopped_S=[t.ended not in (Ended.LENGTH, Ended.MAX_TURNS, Ended.DEADLINE) for t in trajectories],
        missing_stop_penalty=settings.missing_stop_penalty,
        num_tokens_S=[_num_own(t) for t in trajectories],
        length_penalty=settings.length_penalty,
        free_tokens=settings.free_tokens,
    )
    return whiten([value_S], keep_mean=True)[0] if settings.whiten else value_S


def _mean(judgements: Sequence[Judgement]) -> float:
    """The mean of their values, NaN where there is none."""
    found = [judgement.value for judgement in judgements if judgement.value is not None]
    return sum(found) / len(found) if found else math.nan


def _num_own(trajectory: Trajectory) -> int:
    return sum(int((path.source == Source.SAMPLED).sum()) for path in trajectory.token_paths)


# --- credit -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Credited:
    """Groups of rollouts with the advantage of each token, and what the report says of them."""

    groups: list[RolloutGroup]
    detail: JSONObject


def credit_groups(
    groups: Sequence[RolloutGroup],
    reward_S: Floats,
    knobs: Mapping[str, Any],
    baseline: Baseline,
) -> Credited:
    """Advantages of the attempts of groups, in whose order their rewards [S] are.

    Where KL is part of the reward, groups hold the log-probs of the policy and of the reference, and each attempt pays
    for the sum of their differences over its own tokens (k1).
    """
    counts = [len(group.samples) for group in groups]
    group_S = np.repeat(np.arange(len(groups)), counts)
    kl_S = np.concatenate([_kl(group) for group in groups]) if groups else np.zeros(0)
    pays = bool(knobs["kl_coef"]) and knobs["kl_as"] == "reward"
    penalised_S = reward_S - knobs["kl_coef"] * kl_S if pays else reward_S
    credit, after = _advantages(penalised_S, reward_S, group_S, knobs, baseline)
    advantages = np.split(credit.advantage_S, np.cumsum(counts)[:-1])
    credited = [replace(group, advantage=_spread(group, own)) for group, own in zip(groups, advantages, strict=True)]
    flat_S = without_spread(reward_S, group_S, noise=knobs["min_spread"])
    detail: JSONObject = {
        "num": len(reward_S),
        "reward": float(reward_S.mean()),
        "reward_sd": float(reward_S.std(ddof=1)) if len(reward_S) > 1 else 0.0,
        "num_groups": len(groups),
        "num_groups_without_spread": len(set(group_S[flat_S].tolist())),
        "kl_of_rollouts": float(kl_S.mean()) if pays else None,
        "kl_coef": knobs["kl_coef"],
        "baseline": {"total": after.total, "num": after.num},
    }
    if pays and knobs["kl_target"] is not None:
        how = {"horizon": knobs["kl_horizon"], "num": len(reward_S)}
        detail["next_kl_coef"] = adapted_kl_coef(knobs["kl_coef"], float(kl_S.mean()), knobs["kl_target"], **how)
    return Credited(credited, detail)


def _advantages(
    penalised_S: Floats, reward_S: Floats, group_S: NDArray[np.int64], knobs: Mapping[str, Any], baseline: Baseline
) -> tuple[Credit, Baseline]:
    """The advantage of each attempt, and the baseline of the next iteration."""
    noise = float(knobs["min_spread"])
    if noise:  # whether there is anything to choose is a question of rewards, not of KL
        penalised_S = np.where(without_spread(reward_S, group_S, noise=noise), np.nan, penalised_S)
    match knobs["baseline"]:
        case "running":
            return running_baseline(penalised_S, baseline)
        case "leave_one_out":
            return leave_one_out(penalised_S, group_S), baseline
        case "group_mean":
            return group_mean(penalised_S, group_S, scale=knobs["scale"]), baseline
        case _:
            return Credit(np.nan_to_num(penalised_S), 0, 0), baseline


def _kl(group: RolloutGroup) -> Floats:
    """k1 of each attempt, nats, over its own tokens; 0 where log-probs are not known."""
    if not (group.old_logprob and group.ref_logprob):
        return np.zeros(len(group.samples))
    gaps = (old - ref for old, ref in zip(group.old_logprob, group.ref_logprob, strict=True))
    sums = [sum(float(next(gaps)[path.loss_mask].sum(dtype=np.float64)) for path in sample) for sample in group.samples]
    return np.array(sums)


def _spread(group: RolloutGroup, advantage: Floats) -> Logprobs:
    """Each attempt's advantage at each of its own tokens, an array for each path."""
    return tuple(
        value * path.loss_mask for value, sample in zip(advantage, group.samples, strict=True) for path in sample
    )


def check_sampled(trajectory: Trajectory, paths: Sequence[Any]) -> None:
    """See that a rollout's tokens are those that the policy sampled, with their log-probs.

    Raises:
        PrefloopError: they are not: it was rendered from messages.
    """
    if any(np.isnan(path.logprob[path.loss_mask]).any() for path in paths):
        raise PrefloopError(
            f"trajectory {trajectory.id[:12]}: its tokens are not those that this policy sampled (another tokenizer or "
            "chat template, or a server that gives no tokens): policy gradients need them; train by pairs (dpo) instead"
        )
