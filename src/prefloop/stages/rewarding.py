"""What each rollout of an iteration is worth, frozen as a dataset; and how much of that each of its tokens deserves."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from prefloop.credit.gae import TokenCredit, gae, whiten
from prefloop.credit.groups import Baseline, divisor, group_mean, leave_one_out, running_baseline, without_spread
from prefloop.credit.settings import RewardSettings, StepReward
from prefloop.credit.shaping import adapted_kl_coef, penalised, shaped, weighted_sum
from prefloop.credit.steps import Paid, at_tokens, returns_per_turn, step_rewards
from prefloop.losses.registry import resolve_knobs
from prefloop.records import Dataset, Ended, JSONObject, Judgement, PrefloopError, Source, Status, Trajectory, Valued
from prefloop.stages.context import Run
from prefloop.stats.intervals import cluster_bootstrap

if TYPE_CHECKING:
    from prefloop.batch.examples import Logprobs, RolloutGroup
    from prefloop.training.logprobs import Values

Floats = NDArray[np.float64]

CUT_OFF = (Ended.LENGTH, Ended.MAX_TURNS, Ended.DEADLINE)
"""How a rollout ends that the policy did not end itself."""


# --- rewards ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Worth:
    """What a rollout is worth: its reward as a member of a dataset, its task, and what its steps are paid, [K]."""

    valued: Valued
    task_id: str
    reward_K: Floats


def valued_dataset(run: Run, iteration: int, trajectories: Sequence[Trajectory]) -> tuple[Dataset, JSONObject]:
    """The rollouts to learn from, with their rewards; and how many are not in it, and why.

    Those whose judge failed have no reward; and where other tasks took the place of those with nothing to choose, these
    are left out.
    """
    found = worth_of(run, trajectories)
    noise = judge_noise(run, found) if run.settings.train.min_spread == "noise" and found else None
    flat = tasks_without_choice(run, found) if run.settings.rollout.redraws else set()
    valued = tuple(one.valued for one in found if one.task_id not in flat)
    settings = run.settings.reward
    recipe = {"of": "rollouts", "reward": settings.model_dump(mode="json"), "rater_id": run.judge.rater.id}
    dataset = Dataset(recipe, run_id=run.id, iteration=iteration, valued=valued)
    return dataset, {
        "num_without_reward": len(trajectories) - len(found),
        **({"num_without_choice": len(found) - len(valued)} if run.settings.rollout.redraws else {}),
        **({} if noise is None else {"judge_noise": noise}),
    }


def worth_of(run: Run, trajectories: Sequence[Trajectory]) -> list[Worth]:
    """What rollouts are worth, of those that have a reward and say something."""
    settings, how = run.settings.reward, run.settings.paid_steps
    said = [trajectory for trajectory in trajectories if trajectory.num_turns]
    if settings.length_penalty:
        said = run.store.trajectories([trajectory.id for trajectory in said], with_paths=True)
    by_trajectory: dict[str, list[Judgement]] = {trajectory.id: [] for trajectory in said}
    for judgement in run.store.judgements(trajectory_ids=list(by_trajectory), rater_id=run.judge.rater.id):
        if judgement.status is Status.OK and judgement.value is not None:
            by_trajectory[judgement.trajectory_id].append(judgement)
    verdicts = run.verdicts(by_trajectory) if settings.verified else {}
    along = [_paid_along(by_trajectory[t.id], how) for t in said]
    values = {
        "judge": [
            _mean(by_trajectory[t.id]) if how is None else float(reward_K.sum())
            for t, reward_K in zip(said, along, strict=True)
        ],
        "verified": [_mean([verdicts[t.id]] if t.id in verdicts else ()) for t in said],
    }
    rewards = rewards_of(said, values, settings).tolist()
    evidence = [tuple(j.id for j in by_trajectory[t.id] if settings.judge) for t in said]
    return [
        Worth(Valued(t.id, reward, ids), t.task_id, settings.judge * reward_K)
        for t, reward, ids, reward_K in zip(said, rewards, evidence, along, strict=True)
        if np.isfinite(reward)
    ]


def tasks_without_choice(run: Run, found: Sequence[Worth]) -> set[str]:
    """The tasks whose attempts leave nothing to choose, or fewer than two of which have a reward."""
    if not found:
        return set()
    knobs = resolve_knobs(run.settings.train.algorithm, run.settings.train)
    noise = judge_noise(run, found) if knobs["min_spread"] == "noise" else float(knobs["min_spread"])
    group_S = np.unique([one.task_id for one in found], return_inverse=True)[1]
    plain_SK = _padded([returns_per_turn(_completed(one.reward_K, one.valued.value)) for one in found])
    flat_S = nothing_to_choose(plain_SK, group_S, noise)
    return {one.task_id for one, flat in zip(found, flat_S.tolist(), strict=True) if flat}


def judge_noise(run: Run, found: Sequence[Worth]) -> float:
    """The standard deviation that the judge's own noise gives a reward, in the unit of rewards.

    That of one judgement around its rollout's mean, pooled over rollouts that were judged at least twice with n - 1
    degrees of freedom each, makes that of the mean of a rollout's replicates, with the weight that the judge has.

    Raises:
        PrefloopError: no rollout was judged twice.
    """
    known = {judgement_id for one in found for judgement_id in one.valued.evidence}
    values: dict[str, list[float]] = {one.valued.trajectory_id: [] for one in found}
    for judgement in run.store.judgements(trajectory_ids=list(values), rater_id=run.judge.rater.id):
        if judgement.id in known and judgement.value is not None:
            values[judgement.trajectory_id].append(judgement.value)
    freedom = sum(len(own) - 1 for own in values.values() if own)
    if not freedom:
        raise PrefloopError(
            f"the noise of judge {run.judge.rater.name} cannot be measured: no rollout of the iteration has two "
            "judgements; give train.min_spread as a number"
        )
    variance = sum(len(own) * float(np.var(own)) for own in values.values() if own) / freedom
    each = np.mean([1 / len(own) for own in values.values() if own])
    return run.settings.reward.judge * math.sqrt(variance * float(each))


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


def rewards_of_steps(judgements: Sequence[Judgement], how: StepReward) -> Floats:
    """What the steps of one trajectory are paid, [K], by the mean of the replicates of a judge of steps."""
    return step_rewards(np.mean([judgement.criteria["steps"] for judgement in judgements], axis=0), how)


def _paid_along(judgements: Sequence[Judgement], how: StepReward | None) -> Floats:
    """What the steps of one trajectory are paid, [K]: 0 where they are not, NaN where the judge has said nothing."""
    if how is None:
        return np.zeros(1)
    return rewards_of_steps(judgements, how) if judgements else np.array([math.nan])


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


@dataclass(frozen=True, slots=True)
class _Returns:
    """What S attempts came to from each of their steps on.

    `reward_SK` is 0 after an attempt's last step, and NaN of one without a reward; `plain_SK` the same undiscounted.
    `price_SK` is what KL costs from each step on. `step_SU` has the step of each own token of each attempt.
    """

    reward_SK: Floats
    plain_SK: Floats
    price_SK: Floats
    step_SU: list[NDArray[np.int64]]


def credit_groups(
    groups: Sequence[RolloutGroup],
    reward_S: Floats,
    knobs: Mapping[str, Any],
    baselines: Sequence[Baseline] = (),
    paid: Sequence[Paid] = (),
) -> Credited:
    """Advantages of the attempts of groups, in whose order their rewards [S] are.

    Where KL is part of the reward, groups hold the log-probs of the policy and of the reference, and each attempt pays
    for the differences over its own tokens (k1). Where attempts are `paid` along the way, each token has the advantage
    of the step that it belongs to, whose return is compared with those of the steps of the same number; what is left
    of the reward comes with the last step. `baselines` are the running ones, step by step.
    """
    counts = [len(group.samples) for group in groups]
    group_S = np.repeat(np.arange(len(groups)), counts)
    returns = _returns(groups, reward_S, knobs, paid)
    advantage_SK, after = _advantages(returns, group_S, knobs, baselines)
    own = iter([advantage_K[step_U] for advantage_K, step_U in zip(advantage_SK, returns.step_SU, strict=True)])
    credited = [replace(group, advantage=_by_path(group, [next(own) for _ in group.samples])) for group in groups]
    flat_S = nothing_to_choose(returns.plain_SK, group_S, knobs["min_spread"])
    detail = {
        **_detail(groups, reward_S, knobs),
        "num_groups_without_spread": len(set(group_S[flat_S].tolist())),
        "baselines": [{"total": one.total, "num": one.num} for one in after],
    }
    return Credited(credited, detail)


def _returns(
    groups: Sequence[RolloutGroup], reward_S: Floats, knobs: Mapping[str, Any], paid: Sequence[Paid]
) -> _Returns:
    """The returns of attempts, step by step; of one that is not paid along the way, all of it is one step."""
    lengths = [sum(int(path.loss_mask.sum()) for path in sample) for group in groups for sample in group.samples]
    paid = paid or [Paid.whole(length) for length in lengths]
    spent_SU = [np.zeros(length) for length in lengths]
    if _pays(knobs):
        spent_SU = [knobs["kl_coef"] * kl_U for group in groups for kl_U in _kl_of_tokens(group)]
    step_SU = [one.step_of_tokens(length) for one, length in zip(paid, lengths, strict=True)]
    rewards, plain, prices = [], [], []
    for one, reward, step_U, spent_U in zip(paid, reward_S, step_SU, spent_SU, strict=True):
        reward_K = _completed(one.reward_K, float(reward))
        spent_K = np.bincount(step_U, weights=spent_U, minlength=len(reward_K))
        rewards.append(returns_per_turn(reward_K, discount=knobs["turn_discount"]))
        plain.append(returns_per_turn(reward_K))
        prices.append(returns_per_turn(spent_K, discount=knobs["turn_discount"]))
    return _Returns(_padded(rewards), _padded(plain), _padded(prices), step_SU)


def _completed(reward_K: Floats, reward: float) -> Floats:
    """Rewards of steps [K], with what they leave of the whole reward at the last."""
    rest_K = np.zeros_like(reward_K)
    rest_K[-1] = reward - reward_K.sum()
    return reward_K + rest_K


def _padded(returns: Sequence[Floats]) -> Floats:
    """Returns of attempts as [S, K]: 0 after an attempt's last step, NaN of one whose reward is not known."""
    padded_SK = np.zeros((len(returns), max(map(len, returns))))
    for row, return_K in zip(padded_SK, returns, strict=True):
        row[: len(return_K)] = return_K
    padded_SK[np.isnan(padded_SK[:, 0])] = np.nan
    return padded_SK


def nothing_to_choose(return_SK: Floats, group_S: NDArray[np.int64], noise: float) -> NDArray[np.bool_]:
    """Which attempts are of a group in which there is nothing to choose, bool [S].

    Their returns are equal from every step on, or those of the whole differ by less than `noise`.
    """
    label_SK = _by_step(group_S, return_SK)
    flat_S = without_spread(return_SK.ravel(), label_SK.ravel()).reshape(return_SK.shape).all(axis=1)
    return flat_S | without_spread(return_SK[:, 0], group_S, noise=noise) if noise else np.asarray(flat_S)


def _by_step(group_S: NDArray[np.int64], return_SK: Floats) -> NDArray[np.int64]:
    """A label for each step number of each group, [S, K]: those of one label are compared."""
    num_steps = return_SK.shape[1]
    return np.asarray(group_S[:, None] * num_steps + np.arange(num_steps))


def credit_tokens(
    groups: Sequence[RolloutGroup],
    reward_S: Floats,
    cut_S: Sequence[bool],
    values: Sequence[Values],
    knobs: Mapping[str, Any],
    paid: Sequence[Paid] = (),
) -> Credited:
    """Advantages and returns of each own token of groups' attempts, by what a critic expects (`credit.gae`).

    An attempt's steps are its own tokens in time order, over all paths; its reward [S] comes with the last, but for
    what it is `paid` along the way, and where KL is part of the reward each token pays for its own (k1). One that was
    cut off (`cut_S`) is worth what the critic expects after its last token, too.
    """
    along: Sequence[Paid | None] = paid or [None] * len(cut_S)
    ends = iter(zip(reward_S.tolist(), cut_S, along, strict=True))
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
    group: RolloutGroup, values: Values, ends: Iterator[tuple[float, bool, Paid | None]], knobs: Mapping[str, Any]
) -> list[TokenCredit]:
    """The credit of each attempt of a group; `ends` gives each one's reward, whether it was cut off, and its steps."""
    value_SU, after_SU = _by_attempt(group, values.before), _by_attempt(group, values.after)
    logprob_SU = ref_SU = [np.zeros_like(value_U) for value_U in value_SU]
    if _pays(knobs):
        logprob_SU, ref_SU = _by_attempt(group, group.old_logprob), _by_attempt(group, group.ref_logprob)
    how = {"gae_lambda": knobs["gae_lambda"], "discount": knobs["discount"]}
    credit = []
    for logprob_U, ref_U, value_U, after_U in zip(logprob_SU, ref_SU, value_SU, after_SU, strict=True):
        reward, cut, steps = next(ends)
        along_U = np.zeros_like(value_U) if steps is None else at_tokens(steps.reward_K, steps.token_K, len(value_U))
        reward_U = along_U + penalised(reward - along_U.sum(), logprob_U, ref_U, kl_coef=knobs["kl_coef"])
        credit.append(gae(reward_U, value_U, float(after_U[-1]) if cut else 0.0, **how))
    return credit


def _pays(knobs: Mapping[str, Any]) -> bool:
    """Whether KL is part of the reward."""
    return bool(knobs["kl_coef"]) and knobs["kl_as"] == "reward"


def _detail(groups: Sequence[RolloutGroup], reward_S: Floats, knobs: Mapping[str, Any]) -> JSONObject:
    """What the report says of any objective's credit."""
    kl = float(_kl(groups).mean()) if _pays(knobs) else None
    task_S = [index for index, group in enumerate(groups) for _ in group.samples]
    several = len(groups) > 1 and bool(np.isfinite(reward_S).all())
    detail: JSONObject = {
        "num": len(reward_S),
        "reward": float(reward_S.mean()),
        "reward_sd": float(reward_S.std(ddof=1)) if len(reward_S) > 1 else 0.0,
        "reward_interval": cluster_bootstrap(reward_S, task_S).to_dict() if several else None,
        "num_groups": len(groups),
        "kl_of_rollouts": kl,
        "kl_coef": knobs["kl_coef"],
    }
    if kl is not None and knobs["kl_target"] is not None:
        how = {"horizon": knobs["kl_horizon"] or len(reward_S), "num": len(reward_S)}
        detail["next_kl_coef"] = adapted_kl_coef(knobs["kl_coef"], kl, knobs["kl_target"], **how)
    return detail


def _advantages(
    returns: _Returns, group_S: NDArray[np.int64], knobs: Mapping[str, Any], baselines: Sequence[Baseline]
) -> tuple[Floats, Sequence[Baseline]]:
    """The advantage of each step of each attempt, [S, K], and the baselines of the next iteration.

    Whether there is anything to choose, and what to divide by, are questions of rewards alone: KL keeps its price,
    also where all rewards are the same. With `min_spread` groups that do not reach it have no advantage at all.
    """
    reward_SK, noise = returns.reward_SK, float(knobs["min_spread"])
    if noise:
        flat_S = without_spread(returns.plain_SK[:, 0], group_S, noise=noise)
        reward_SK = np.where(flat_S[:, None], np.nan, reward_SK)
    if knobs["baseline"] == "group_mean":
        reward_SK = reward_SK / divisor(reward_SK[:, 0], group_S, knobs["scale"])[:, None]
    return_SK = reward_SK - returns.price_SK
    flat = return_SK.ravel(), _by_step(group_S, return_SK).ravel()
    match knobs["baseline"]:
        case "running":
            return _over_earlier(return_SK, baselines)
        case "leave_one_out":
            return leave_one_out(*flat).advantage_S.reshape(return_SK.shape), baselines
        case "group_mean":
            return group_mean(*flat).advantage_S.reshape(return_SK.shape), baselines
        case _:
            return np.nan_to_num(return_SK), baselines


def _over_earlier(return_SK: Floats, baselines: Sequence[Baseline]) -> tuple[Floats, Sequence[Baseline]]:
    """Advantages over running baselines, step by step; whoever had fewer steps, now or earlier, counts as 0 beyond."""
    num_steps = return_SK.shape[1]
    padded_SK = np.pad(return_SK, ((0, 0), (0, max(0, len(baselines) - num_steps))))
    padded_SK[np.isnan(return_SK[:, 0])] = np.nan
    unseen = Baseline(0.0, baselines[0].num if baselines else 0.0)
    before = [*baselines, *[unseen] * (num_steps - len(baselines))]
    found = [running_baseline(return_S, one) for return_S, one in zip(padded_SK.T, before, strict=True)]
    advantage_SK = np.stack([credit.advantage_S for credit, _ in found], axis=1)
    return advantage_SK[:, :num_steps], [after for _, after in found]


def _kl(groups: Sequence[RolloutGroup]) -> Floats:
    """k1 of each attempt of the groups, nats, over its own tokens."""
    return np.array([float(kl_U.sum()) for group in groups for kl_U in _kl_of_tokens(group)])


def _kl_of_tokens(group: RolloutGroup) -> list[Floats]:
    """k1 of each own token of each attempt, [U] nats."""
    logprobs = zip(_by_attempt(group, group.old_logprob), _by_attempt(group, group.ref_logprob), strict=True)
    return [old_U - ref_U for old_U, ref_U in logprobs]


def _by_attempt(group: RolloutGroup, arrays: Logprobs) -> list[Floats]:
    """The numbers of each attempt's own tokens in time order, [U], from an array for each path."""
    rest = iter(arrays)
    own = ([next(rest)[path.loss_mask] for path in sample] for sample in group.samples)
    joined = [np.concatenate(parts, dtype=np.float64) for parts in own]
    return [own_U[order_U] for own_U, order_U in zip(joined, group.order, strict=True)] if group.order else joined


def _by_path(group: RolloutGroup, own_SU: Sequence[Floats]) -> Logprobs:
    """Numbers of each attempt's own tokens in time order as an array for each path, 0 at other tokens."""
    if group.order:
        own_SU = [own_U[np.argsort(order_U)] for own_U, order_U in zip(own_SU, group.order, strict=True)]
    arrays = []
    for own_U, sample in zip(own_SU, group.samples, strict=True):
        rest = iter(np.split(own_U, np.cumsum([path.loss_mask.sum() for path in sample])[:-1]))
        for path in sample:
            array = np.zeros(len(path.loss_mask))
            array[path.loss_mask] = next(rest)
            arrays.append(array)
    return tuple(arrays)


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
