"""What an update of the policy learns from: the iteration's dataset as examples of its objective, and its reference."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from prefloop.credit.groups import Baseline
from prefloop.credit.steps import Paid
from prefloop.losses.registry import objective, resolve_knobs
from prefloop.records import Dataset, JSONObject, PrefloopError, Split, Valued, counted
from prefloop.stages.context import Run
from prefloop.stages.critic import STAGE as CRITIC
from prefloop.stages.critic import Attempts, credit_by_critic
from prefloop.stages.examples import Paths, example_of
from prefloop.stages.rewarding import CUT_OFF, Credited, check_sampled, credit_groups
from prefloop.stages.rollouts import iteration_rollouts
from prefloop.stages.selecting import Corpus, Rows, Skips, read_corpus, rows_of_dataset
from prefloop.stages.step_credit import paid_rollouts, time_order
from prefloop.training.settings import UpdateSettings, count_steps

Floats = NDArray[np.floating[Any]]

MIN_EFFECTIVE_SHARE = 0.9
"""An iteration warns of an `effective_share` below: trainer / sampler then deviates by a third of its mean."""

if TYPE_CHECKING:
    from torch import nn

    from prefloop.batch.examples import Demonstration, Example, RolloutGroup
    from prefloop.models.load import Policy
    from prefloop.training.algorithm import Algorithm


@dataclass(slots=True)
class UpdateData:
    """What a training is given; `reference` is None where none is needed or all examples hold its log-probs.

    `warnings` are what to know of it, `detail` what is noted of how it was made.
    """

    algorithm: Algorithm
    examples: list[Example]
    held_out: list[Example]
    reference: nn.Module | None = None
    warnings: list[str] = field(default_factory=list)
    detail: JSONObject = field(default_factory=dict)


def rows_to_learn(run: Run, dataset: Dataset, settings: UpdateSettings) -> Rows:
    """The members of a dataset as the objective learns from them: pairs also serve labels and demonstrations.

    Raises:
        PrefloopError: the dataset holds something else.
    """
    skips = Skips("skip")
    rows = rows_of_dataset(run.store, dataset.id, objective(settings.algorithm).records, skips)
    if skips.num:
        raise PrefloopError(f"{settings.algorithm} cannot learn from dataset {dataset.id[:12]}: {skips.listed[0]}")
    return rows


def why_nothing_to_learn(rows: Rows, settings: UpdateSettings, num_without_choice: int = 0) -> str:
    """Why the rows are not enough for the objective; empty where they are.

    `num_without_choice` rollouts are not among them because the attempts at their tasks leave nothing to choose.
    """
    records = objective(settings.algorithm).records
    if not rows.members and num_without_choice:
        return (
            f"nothing to train on: {counted(num_without_choice, 'rollout')} with a reward, and at no task do they "
            "differ by enough to choose (train.min_spread)"
        )
    if not rows.members:
        lacks = {"pairs": "pair met the margin", "rollouts": "rollout has a reward"}
        return f"nothing to train on: no {lacks.get(records, 'trajectory met the margin')}"
    if records == "labelled samples" and len({getattr(member, "desirable", None) for member in rows.members}) == 1:
        return "nothing to train on: all labels are of one class"
    return ""


def update_data(
    run: Run, policy: Policy, iteration: int, before: str, rows: Rows, settings: UpdateSettings
) -> UpdateData:
    """The examples of the rows for a policy, some of them held out, with what the objective needs beside them.

    Raises:
        PrefloopError: samples for a reference point that are not there, or a trajectory that was erased.
    """
    corpus = read_corpus(run.store, rows)
    found = run.policies.paths(policy, list(corpus.trajectories.values()), corpus.tasks)
    paths = dict(zip(corpus.trajectories, found, strict=True))
    reference = run.checkpoint_before(0) if settings.reference == "start" else before
    if objective(settings.algorithm).records == "rollouts":
        return _of_rollouts(run, policy, iteration, reference, _Rollouts(rows, corpus, paths), settings)

    def examples(part: Rows) -> list[Example]:
        return [example_of(member, paths, name) for member, name in zip(part.members, part.names, strict=True)]

    train, held_out, warnings = _split(rows, corpus, settings)
    data = UpdateData(_algorithm(run, policy, iteration, settings), examples(train), examples(held_out), None, warnings)
    data.warnings += _weight_advice(train, data.algorithm)
    if data.algorithm.needs_reference:
        _add_reference(run, data, reference, settings)
    return data


class _Rollouts(NamedTuple):
    """The rollouts that have a reward, and their token paths by trajectory."""

    rows: Rows
    corpus: Corpus
    paths: Mapping[str, Paths]


def _of_rollouts(
    run: Run, policy: Policy, iteration: int, reference: str, rollouts: _Rollouts, settings: UpdateSettings
) -> UpdateData:
    """Groups of rollouts by task, each token with its advantage."""
    import torch

    from prefloop.losses.mismatch import sampling_mismatch
    from prefloop.training.logprobs import logprobs_of
    from prefloop.training.policy_gradient import PolicyGradient, reads_old_logprobs

    sampling = run.settings.rollout.sampling
    knobs = online_knobs(run, iteration, settings)
    algorithm = PolicyGradient(settings.algorithm, knobs, sampling.temperature, sampling.max_new_tokens)
    attempts, num_lost = _groups(run, policy, rollouts)
    groups = attempts.groups
    options: dict[str, Any] = {"max_tokens": settings.max_tokens, "autocast": settings.precision == "bfloat16"}
    mismatch: JSONObject = {}  # without this pass the one step tells it: `with_mismatch`
    if reads_old_logprobs(knobs, count_steps(settings, len(groups))):
        olds = logprobs_of(policy.model, groups, temperature=sampling.temperature, **options)
        groups = [replace(group, old_logprob=old) for group, old in zip(groups, olds, strict=True)]
        gap = sampling_mismatch(*(torch.from_numpy(np.concatenate(own)) for own in _own_logprobs(groups)))
        mismatch["sampling_mismatch"] = gap.to_dict()
    if knobs["kl_coef"]:
        groups = _with_reference(run, reference, settings, sampling.temperature)(groups)
    credited = _credited(run, iteration, policy, replace(attempts, groups=groups), knobs)
    detail = {**credited.detail, **mismatch}
    if attempts.paid:
        detail["num_without_steps"] = num_lost
    warnings = _without_advantage(credited)
    warnings += [f"critic: {text}" for text in detail.get(CRITIC, {}).get("warnings", [])]
    return UpdateData(algorithm, list(credited.groups), [], warnings=warnings, detail=detail)


def _without_advantage(credited: Credited) -> list[str]:
    """A warning where rewards move the policy nowhere."""
    if any(array.any() for group in credited.groups for array in group.advantage):
        return []
    return [
        "no rollout has an advantage: at no task do rewards differ, or by enough (train.min_spread); what moves the "
        "policy is the optimizer's momentum, and what the loss has beside the advantages"
    ]


def with_mismatch(credit: JSONObject, history: Sequence[Mapping[str, float]]) -> JSONObject:
    """What is noted of credit, with how far sampler and trainer disagree, by its first step unless it is there."""
    from prefloop.losses.mismatch import METRICS

    if "sampling_mismatch" in credit or not history or "effective_share" not in history[0]:
        return credit
    return {**credit, "sampling_mismatch": {part: history[0][name] for part, name in METRICS.items()}}


def mismatch_warnings(credit: JSONObject) -> list[str]:
    """A warning where the tokens that were sampled say little of the policy that learns from them."""
    found = credit.get("sampling_mismatch")
    if found is None or found["effective_share"] >= MIN_EFFECTIVE_SHARE:
        return []
    return [
        f"sampler and trainer disagree: the sampled tokens count for {found['effective_share']:.0%} of their number "
        f"(effective_share below {MIN_EFFECTIVE_SHARE:.0%}), and their log-probs differ by {found['mean']:.3g} nats in "
        "the mean: see that the sampler has the policy's weights, in a precision near the trainer's, and no truncation "
        "of its own; train.mismatch says how such tokens are weighed"
    ]


def _credited(run: Run, iteration: int, policy: Policy, attempts: Attempts, knobs: Mapping[str, Any]) -> Credited:
    """What each token deserves, by a critic or by comparing attempts."""
    if objective(run.settings.train.algorithm).critic:
        return credit_by_critic(run, iteration, policy, attempts, knobs)
    baselines = [Baseline(**one) for one in _credit_before(run, iteration).get("baselines", [])]
    return credit_groups(attempts.groups, attempts.reward_S, knobs, baselines, attempts.paid)


def _own_logprobs(groups: Sequence[RolloutGroup]) -> tuple[list[Floats], list[Floats]]:
    """The log-probs of own tokens, path by path: the trainer's, and those that they were sampled with."""
    paths = [path for group in groups for sample in group.samples for path in sample]
    olds = [array for group in groups for array in group.old_logprob]
    own = [array[path.loss_mask] for array, path in zip(olds, paths, strict=True)]
    return own, [path.logprob[path.loss_mask] for path in paths]


def online_knobs(run: Run, iteration: int, settings: UpdateSettings) -> dict[str, Any]:
    """The knobs of an objective of rollouts in an iteration.

    Where the whole reward is verified, KL costs nothing unless it is set; where it has a target, what it costs follows
    from the last iteration that had something to learn from. The judge's noise is what was measured of the iteration.
    """
    knobs = resolve_knobs(settings.algorithm, settings)
    if settings.kl_coef is None and not run.settings.reward.judge:
        knobs["kl_coef"] = 0.0
    knobs["kl_coef"] = _credit_before(run, iteration).get("next_kl_coef", knobs["kl_coef"])
    if knobs.get("min_spread") == "noise":
        knobs["min_spread"] = run.require(iteration, "curate")["judge_noise"]
    return knobs


def _credit_before(run: Run, iteration: int) -> JSONObject:
    """What was noted of credit in the last iteration that had something to learn from; nothing if there is none."""
    for earlier in reversed(range(iteration)):
        if found := (run.found(earlier, "train") or {}).get("credit"):
            return dict(found)
    return {}


def _groups(run: Run, policy: Policy, rollouts: _Rollouts) -> tuple[Attempts, int]:
    """The attempts at each task together, and in their order what each was worth and whether it was cut off.

    Where steps are paid, with what each was paid along the way, and how many were left out because that is not known.

    Raises:
        PrefloopError: it is known of none; and as `check_sampled`.
    """
    from prefloop.batch.examples import RolloutGroup

    valued = [member for member in rollouts.rows.members if isinstance(member, Valued)]  # as rows of rollouts are
    how, paid = run.settings.paid_steps, dict[str, Paid]()
    known = valued
    if how is not None:
        paid = paid_rollouts(run, policy, how, valued, rollouts.corpus.trajectories, rollouts.paths)
        known = [member for member in valued if member.trajectory_id in paid]
        if not known:
            raise PrefloopError(
                f"the steps of none of {len(valued)} rollouts can be found in its tokens: set reward.steps to 'whole'"
            )
    by_task: dict[str, list[Valued]] = {}
    for member in known:
        trajectory = rollouts.corpus.trajectories[member.trajectory_id]
        check_sampled(trajectory, rollouts.paths[trajectory.id])
        by_task.setdefault(trajectory.task_id, []).append(member)
    groups = []
    for task_id, members in by_task.items():
        paths = tuple(rollouts.paths[one.trajectory_id] for one in members)
        attempts = [rollouts.corpus.trajectories[one.trajectory_id] for one in members]
        order = tuple(map(time_order, attempts, paths))
        groups.append(RolloutGroup(paths, (), order=order, name=task_id))
    members = [one for members in by_task.values() for one in members]
    cut_S = [rollouts.corpus.trajectories[one.trajectory_id].ended in CUT_OFF for one in members]
    along = [paid[one.trajectory_id] for one in members] if paid else []
    return Attempts(groups, np.array([one.value for one in members]), cut_S, along), len(valued) - len(known)


def _split(rows: Rows, corpus: Corpus, settings: UpdateSettings) -> tuple[Rows, Rows, list[str]]:
    """The rows to train on and those held out; an iteration with too few rows for both holds none out, and says so."""
    held = [corpus.place(member, settings.held_out)[0] is Split.HELD_OUT for member in rows.members]
    train, held_out = rows.part([not out for out in held]), rows.part(held)
    if settings.held_out and (not held_out.members or why_nothing_to_learn(train, settings)):
        return rows, rows.part([False] * len(held)), ["too few rows to hold any out: trained without evaluation"]
    return train, held_out, []


def _algorithm(run: Run, policy: Policy, iteration: int, settings: UpdateSettings) -> Algorithm:
    """The objective; KTO's reference point is the KL on the iteration's own rollouts unless `kl` says otherwise."""
    from prefloop.training.algorithms import KTO, make_algorithm

    algorithm = make_algorithm(settings.algorithm, settings)
    if not isinstance(algorithm, KTO) or settings.kl not in (None, "samples"):
        return algorithm
    samples = _fresh_samples(run, policy, iteration)
    if not samples and settings.kl is None:  # of imported rows
        return algorithm
    return replace(algorithm, knobs={**algorithm.knobs, "kl": "samples"}, samples=tuple(samples))


def _fresh_samples(run: Run, policy: Policy, iteration: int) -> list[Demonstration]:
    """What the policy wrote in this iteration, before its update."""
    from prefloop.batch.examples import Demonstration

    rollouts = iteration_rollouts(run, iteration, with_paths=True)
    written = [one for one in rollouts if any(path.loss_mask.any() for path in one.token_paths)]
    tasks = run.store.tasks({one.task_id for one in written})
    paths = run.policies.paths(policy, written, tasks)
    return [Demonstration(own, name=one.id) for own, one in zip(paths, written, strict=True)]


def _weight_advice(rows: Rows, algorithm: Algorithm) -> list[str]:
    """What the paper says of KTO's weights where they are others."""
    from prefloop.losses.kto import weight_advice
    from prefloop.training.algorithms import KTO

    if not isinstance(algorithm, KTO):
        return []
    sums = {True: 0.0, False: 0.0}
    for member in rows.members:
        sums[bool(getattr(member, "desirable", False))] += getattr(member, "weight", 1.0)
    knobs = {key: algorithm.knobs[key] for key in ("desirable_weight", "undesirable_weight")}
    advice = weight_advice(sums[True], sums[False], **knobs)
    return [] if advice.followed else [advice.sentence]


def _add_reference(run: Run, data: UpdateData, checkpoint_id: str, settings: UpdateSettings) -> None:
    """The reference itself where it must be there, else its log-probs with the examples."""
    from prefloop.training.algorithms import KTO
    from prefloop.training.reference import following

    if settings.sync_reference_every is not None:
        data.reference = following(run.policies.reference(checkpoint_id))
        return
    scored = _with_reference(run, checkpoint_id, settings, 1.0)
    data.examples, data.held_out = scored(data.examples), scored(data.held_out)
    if not isinstance(data.algorithm, KTO):
        return
    if data.algorithm.samples:
        data.algorithm = replace(data.algorithm, samples=tuple(scored(data.algorithm.samples)))
    elif data.algorithm.knobs["kl"] != "none":
        data.reference = run.policies.reference(checkpoint_id)  # completions are dealt to other prompts at each step


def _with_reference(run: Run, checkpoint_id: str, settings: UpdateSettings, temperature: float) -> Callable[[Any], Any]:
    """What gives examples the log-probs of a checkpoint, those that the store keeps or computed."""
    from prefloop.training.reference import precision_of, stored_reference
    from prefloop.training.weights import loaded_hash, weights_hash

    checkpoint = run.store.checkpoint(checkpoint_id)
    assert checkpoint is not None
    return partial(
        stored_reference,
        run.store,
        lambda: run.policies.reference(checkpoint_id),
        loaded_hash(weights_hash(checkpoint.path), run.settings.policy.quantization),
        precision=precision_of(run.settings.policy.dtype, settings.precision),
        max_tokens=settings.max_tokens,
        temperature=temperature,
    )
