"""What each rollout of an iteration is worth, frozen as a dataset; and how much of that each of its tokens deserves."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from prefloop.credit.gae import TokenCredit, gae, whiten
from prefloop.credit.groups import Baseline, Credit, group_mean, leave_one_out, running_baseline, without_spread
from prefloop.credit.settings import RewardSettings
from prefloop.credit.shaping import adapted_kl_coef, penalised, shaped, weighted_sum
from prefloop.records import Dataset, Ended, JSONObject, Judgement, PrefloopError, Source, Status, Trajectory, Valued
from prefloop.stages.context import Run

if TYPE_CHECKING:
    from prefloop.batch.examples import Logprobs, RolloutGroup
    from prefloop.training.logprobs import Values

Floats = NDArray[np.float64]

CUT_OFF = (Ended.LENGTH, Ended.MAX_TURNS, Ended.DEADLINE)
"""How a rollout ends that the policy did not end itself."""


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
        stopped_S=[t.ended not in CUT_OFF for t in trajectories],
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
    penalised_S = reward_S - knobs["kl_coef"] * _kl(groups) if _pays(knobs) else reward_S
    credit, after = _advantages(penalised_S, reward_S, group_S, knobs, baseline)
    advantages = np.split(credit.advantage_S, np.cumsum(counts)[:-1])
    credited = [replace(group, advantage=_spread(group, own)) for group, own in zip(groups, advantages, strict=True)]
    flat_S = without_spread(reward_S, group_S, noise=knobs["min_spread"])
    detail = {
        **_detail(groups, reward_S, knobs),
        "num_groups_without_spread": len(set(group_S[flat_S].tolist())),
        "baseline": {"total": after.total, "num": after.num},
    }
    return Credited(credited, detail)


def credit_tokens(
    groups: Sequence[RolloutGroup],
    reward_S: Floats,
    cut_S: Sequence[bool],
    values: Sequence[Values],
    knobs: Mapping[str, Any],
) -> Credited:
    """Advantages and returns of each own token of groups' attempts, by what a critic expects (`credit.gae`).

    An attempt's steps are its own tokens in time order, path after path; its reward [S] comes with the last, and where
    KL is part of the reward each token pays for its own (k1). One that was cut off (`cut_S`) is worth what the critic
    expects after its last token, too.
    """
    ends = iter(zip(reward_S.tolist(), cut_S, strict=True))
    found = [_token_credit(group, one, ends, knobs) for group, one in zip(groups, values, strict=True)]
    advantages = [credit.advantage_U for of_group in found for credit in of_group]
    white = iter(whiten(advantages) if knobs["whiten_advantages"] else advantages)
    credited = [
        replace(
            group,
            advantage=_by_path(group, [next(white) for _ in group.samples]),
            ret=_by_path(group, [credit.return_U for credit in of_group]),
            old_value=valued.before,
        )
        for group, of_group, valued in zip(groups, found, values, strict=True)
    ]
    variance = float(np.concatenate([credit.return_U for of_group in found for credit in of_group]).var())
    error = float((np.concatenate(advantages) ** 2).mean())  # an advantage is the return less the value
    detail: JSONObject = {
        **_detail(groups, reward_S, knobs),
        "num_cut_off": sum(cut_S),
        "return_variance": variance,
        "explained_variance": 1 - error / variance if variance else None,
    }
    return Credited(credited, detail)


def _token_credit(
    group: RolloutGroup, values: Values, ends: Iterator[tuple[float, bool]], knobs: Mapping[str, Any]
) -> list[TokenCredit]:
    """The credit of each attempt of a group; `ends` gives each one's reward, and whether it was cut off."""
    value_SU = _by_attempt(group, values.before)
    logprob_SU = ref_SU = [np.zeros_like(value_U) for value_U in value_SU]
    if _pays(knobs):
        logprob_SU, ref_SU = _by_attempt(group, group.old_logprob), _by_attempt(group, group.ref_logprob)
    how = {"gae_lambda": knobs["gae_lambda"], "discount": knobs["discount"]}
    credit = []
    for logprob_U, ref_U, value_U, after in zip(logprob_SU, ref_SU, value_SU, values.after, strict=True):
        reward, cut = next(ends)
        reward_U = penalised(reward, logprob_U, ref_U, kl_coef=knobs["kl_coef"])
        credit.append(gae(reward_U, value_U, float(after) if cut else 0.0, **how))
    return credit


def _pays(knobs: Mapping[str, Any]) -> bool:
    """Whether KL is part of the reward."""
    return bool(knobs["kl_coef"]) and knobs["kl_as"] == "reward"


def _detail(groups: Sequence[RolloutGroup], reward_S: Floats, knobs: Mapping[str, Any]) -> JSONObject:
    """What the report says of any objective's credit."""
    kl = float(_kl(groups).mean()) if _pays(knobs) else None
    detail: JSONObject = {
        "num": len(reward_S),
        "reward": float(reward_S.mean()),
        "reward_sd": float(reward_S.std(ddof=1)) if len(reward_S) > 1 else 0.0,
        "num_groups": len(groups),
        "kl_of_rollouts": kl,
        "kl_coef": knobs["kl_coef"],
    }
    if kl is not None and knobs["kl_target"] is not None:
        how = {"horizon": knobs["kl_horizon"], "num": len(reward_S)}
        detail["next_kl_coef"] = adapted_kl_coef(knobs["kl_coef"], kl, knobs["kl_target"], **how)
    return detail


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


def _kl(groups: Sequence[RolloutGroup]) -> Floats:
    """k1 of each attempt of the groups, nats, over its own tokens."""
    sums = []
    for group in groups:
        logprobs = zip(_by_attempt(group, group.old_logprob), _by_attempt(group, group.ref_logprob), strict=True)
        sums += [float((old_U - ref_U).sum()) for old_U, ref_U in logprobs]
    return np.array(sums)


def _by_attempt(group: RolloutGroup, arrays: Logprobs) -> list[Floats]:
    """The numbers of each attempt's own tokens in time order, [U], from an array for each path."""
    rest = iter(arrays)
    own = ([next(rest)[path.loss_mask] for path in sample] for sample in group.samples)
    return [np.concatenate(parts, dtype=np.float64) for parts in own]


def _by_path(group: RolloutGroup, own_SU: Sequence[Floats]) -> Logprobs:
    """Numbers of each attempt's own tokens as an array for each path, 0 at other tokens."""
    arrays = []
    for own_U, sample in zip(own_SU, group.samples, strict=True):
        rest = iter(np.split(own_U, np.cumsum([path.loss_mask.sum() for path in sample])[:-1]))
        for path in sample:
            array = np.zeros(len(path.loss_mask))
            array[path.loss_mask] = next(rest)
            arrays.append(array)
    return tuple(arrays)


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
