"""Update the policy on the iteration's dataset, and take back an update that harms it."""

from __future__ import annotations

import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from prefloop.evaluation.guard import Decision, evaluation_guard, kl_guard
from prefloop.losses.registry import objective
from prefloop.records import Checkpoint, Dataset, DivergedError, JSONObject, PrefloopError, counted
from prefloop.rollout import derived_seed
from prefloop.stages.ages import Fresh, fresh_rows
from prefloop.stages.context import BEFORE, Run
from prefloop.stages.curating import dataset_of
from prefloop.stages.evaluating import Evaluated, guard_evaluation, kl_detail
from prefloop.stages.looking import ID_LENGTH
from prefloop.stages.selecting import Rows
from prefloop.stages.update_data import (
    UpdateData,
    mismatch_warnings,
    rows_to_learn,
    update_data,
    why_nothing_to_learn,
    with_mismatch,
)
from prefloop.stats.intervals import Interval
from prefloop.store.ages import add_ages
from prefloop.training.settings import MAX_UPDATE_KL, UpdateSettings, count_steps

if TYPE_CHECKING:
    from prefloop.models.load import Policy
    from prefloop.training.state import Carried, TrainingResult

STAGE, GUARD = "train", "guard"
MOMENTS = "moments"


@dataclass(frozen=True, slots=True)
class _Attempt:
    """One try of an update, and whether the guards accept it.

    One that diverged could not be evaluated, nor one of an agent that runs elsewhere. A refused `policy` is None: the
    next try should not have to hold it beside its own.
    """

    number: int
    policy: Policy | None
    learning_rate: float
    result: TrainingResult
    warnings: list[str]
    evaluated: Evaluated | None
    decision: Decision
    credit: JSONObject

    def to_dict(self) -> JSONObject:
        kl = self.evaluated.kl if self.evaluated else None
        return {
            "learning_rate": self.learning_rate,
            "kl": kl.per_trajectory if kl else None,
            "kl_se": kl.per_trajectory_se if kl else None,
            "success": _plain(self.evaluated.success) if self.evaluated else None,
            **self.decision.to_dict(),
            "steps": len(self.result.history),
            "stopped": self.result.stopped,
            "skipped": [asdict(skipped) for skipped in self.result.skipped],
        }


def train_stage(run: Run, iteration: int) -> None:
    """Train on the iteration's dataset; an update that the guards refuse is tried again more gently.

    Raises:
        PrefloopError: the iteration is not curated yet, or the policy is served and has no weights here.
        DivergedError: as `check_progress`.
    """
    if run.found(iteration, STAGE) is not None:
        return
    check_progress(run, iteration)
    if run.settings.policy.server is not None:
        raise PrefloopError(
            f"run {run.settings.name}: the weights of a served policy are not here to be trained; "
            "`prefloop export` writes its pairs for another trainer"
        )

    settings = run.settings.train
    before = run.checkpoint_before(iteration)
    dataset = dataset_of(run, iteration, settings.algorithm)
    found = rows_to_learn(run, dataset, settings)
    with run.recorded(iteration, STAGE) as detail:
        fresh = fresh_rows(run, before, found, settings.max_age)
        detail |= {"algorithm": settings.algorithm, "dataset_id": dataset.id}
        detail["age"] = fresh.to_dict(settings.num_epochs)
        left_out = (run.found(iteration, "curate") or {}).get("num_without_choice", 0)
        if reason := _why_not(found, fresh, settings, left_out):
            detail |= {"checkpoint_id": before, "steps": 0, "attempts": [], "rolled_back": False, "loss": []}
            detail["reason"] = reason
            run.store.add_event(run.id, iteration, GUARD, _guarded(run, iteration - 1))
            return
        add_ages(run.store, run.id, iteration, fresh.ages)
        attempts = _attempts(run, iteration, before, dataset, fresh)
        last = attempts[-1]
        accepted = last.decision.accepted
        guarded = _guarded(run, iteration - 1)
        if accepted:
            checkpoint = _save(run, iteration, before, dataset, last)
            guarded = _guard_detail(run, checkpoint.id, last.evaluated)
        run.store.add_event(run.id, iteration, GUARD, guarded)
        detail |= {
            **last.result.summary(),
            "checkpoint_id": checkpoint.id if accepted else before,
            "attempts": [attempt.to_dict() for attempt in attempts],
            "rolled_back": not accepted,
            "warnings": [*fresh.warnings, *last.warnings],
            **({"credit": last.credit} if last.credit else {}),
        }
    _clear(run, iteration)


def check_progress(run: Run, iteration: int) -> None:
    """See that the last updates before an iteration were not all taken back; nothing is done that would be again.

    Raises:
        DivergedError: those of the last `guard.max_rolled_back` iterations were.
    """
    refused: list[JSONObject] = []
    for number in reversed(range(iteration)):
        trained = run.found(number, STAGE)
        if trained is None or not trained["rolled_back"]:
            break
        refused.insert(0, trained)
    if len(refused) < run.settings.guard.max_rolled_back:
        return
    last = refused[-1]
    checkpoint = run.store.checkpoint(last["checkpoint_id"])
    assert checkpoint is not None
    rates = " and ".join(f"{attempt['learning_rate']:.3g}" for attempt in (last["attempts"][0], last["attempts"][-1]))
    raise DivergedError(
        f"run {run.settings.name} stops: the updates of its last {counted(len(refused), 'iteration')} were all taken "
        f"back (the last one: {last['attempts'][-1]['reason']}); the last good policy is checkpoint "
        f"{checkpoint.id[:ID_LENGTH]} in {checkpoint.path}: go on from it under another name (policy.model = that "
        f"folder) with a learning rate below those that were tried ({rates}), or let this run try on by a greater "
        "guard.max_rolled_back"
    )


def _why_not(found: Rows, fresh: Fresh, settings: UpdateSettings, num_without_choice: int) -> str:
    """Why there is nothing to learn; empty where there is."""
    reason = why_nothing_to_learn(fresh.rows, settings, num_without_choice)
    if reason and fresh.num_too_old and not why_nothing_to_learn(found, settings):
        return f"{reason}: {fresh.warnings[-1]}"
    return reason


def _max_update_kl(run: Run, fresh: Fresh, settings: UpdateSettings) -> float | None:
    """How far the update may go, where that can be told: how likely the policy before it found the tokens is known.

    Objectives of rollouts compute it; for the others it is what the sampler said, if it drew from the policy itself.
    """
    limit, sampling = run.settings.guard.max_update_kl, run.settings.rollout.sampling
    if objective(settings.algorithm).records == "rollouts":
        return MAX_UPDATE_KL if limit is None else limit
    drawn_as_is = sampling.temperature == 1.0 and sampling.top_p == 1.0 and fresh.all_of_now
    return limit if drawn_as_is else None


def _attempts(run: Run, iteration: int, before: str, dataset: Dataset, fresh: Fresh) -> list[_Attempt]:
    guard, settings = run.settings.guard, run.settings.train
    success_before = _success_before(run, iteration)
    learning_rate = settings.learning_rate
    if settings.decay == "linear":
        learning_rate *= 1 - iteration / run.settings.iterations
    attempts: list[_Attempt] = []
    for number in range(guard.max_retries + 1):
        gentler = settings.model_copy(update={"learning_rate": learning_rate * guard.retry_factor**number})
        attempts.append(_attempt(run, iteration, before, dataset, fresh, gentler, number, success_before))
        if attempts[-1].decision.accepted:
            break
    return attempts


def _attempt(
    run: Run,
    iteration: int,
    before: str,
    dataset: Dataset,
    fresh: Fresh,
    settings: UpdateSettings,
    number: int,
    success_before: Interval | None,
) -> _Attempt:
    policy = run.policies.take(before)
    data = update_data(run, policy, iteration, before, fresh.rows, settings)
    settings, shortened = _warmed_up_within(settings, len(data.examples))
    limit, carried = _max_update_kl(run, fresh, settings), _carried(run, iteration, settings, number)
    result, failure = _fit(run, iteration, policy, data, settings, limit, carried, number, f"{before} {dataset.id}")
    evaluated, decision = (None, Decision(False, failure)) if failure else _guard(run, policy, success_before)
    kept = policy if decision.accepted else None
    credit = with_mismatch(data.detail, result.history)
    told = [*shortened, *mismatch_warnings(credit), *_without_moments(run, iteration, carried)]
    warnings = [*data.warnings, *told, *result.warnings]
    return _Attempt(number, kept, settings.learning_rate, result, warnings, evaluated, decision, credit)


def _warmed_up_within(settings: UpdateSettings, num_examples: int) -> tuple[UpdateSettings, list[str]]:
    """The settings with a warm-up that the update is long enough for, and a warning where they ask for a longer one.

    How long an update is depends on what the iteration left to learn from: an iteration that left less than others
    should not end the run.
    """
    num_steps = count_steps(settings, num_examples)
    if settings.warmup_steps <= num_steps:
        return settings, []
    steps = counted(num_steps, "step")
    warning = f"the update has {steps}, and train.warmup_steps is {settings.warmup_steps}: its warm-up is as short"
    return settings.model_copy(update={"warmup_steps": num_steps}), [warning]


def _fit(
    run: Run,
    iteration: int,
    policy: Policy,
    data: UpdateData,
    settings: UpdateSettings,
    max_update_kl: float | None,
    carried: Carried,
    number: int,
    identity: str,
) -> tuple[TrainingResult, str]:
    """Train the policy; returns what it came to, and why it diverged (empty where it did not)."""
    from prefloop.training.trainer import TrainingDivergedError, train

    if settings.held_out and not data.held_out:
        settings = settings.model_copy(update={"evaluate_every": None, "patience": None})
    with run.writers(iteration, STAGE, settings, number) as writers:
        try:
            result = train(
                policy.model,
                data.reference,
                data.algorithm,
                data.examples,
                settings,
                seed=derived_seed(run.settings.seed, STAGE, iteration),
                identity=identity,
                state_directory=_states(run, iteration),
                held_out=data.held_out,
                carried=carried,
                max_update_kl=max_update_kl,
                writers=writers,
                on_step=lambda step, _, metrics: run.progress.advance(step, f"loss {metrics.get('loss', 0):.3f}"),
            )
        except TrainingDivergedError as error:
            return error.result, str(error.__cause__ or error)
    return result, ""


def _guard(run: Run, policy: Policy, success_before: Interval | None) -> tuple[Evaluated | None, Decision]:
    if absent := run.environment.absent():
        return None, Decision(True, f"not guarded: {absent}")
    try:
        evaluated = guard_evaluation(run, policy)
    except DivergedError as error:
        return None, Decision(False, str(error))
    return evaluated, _decide(run, success_before, evaluated)


def _save(run: Run, iteration: int, before: str, dataset: Dataset, accepted: _Attempt) -> Checkpoint:
    assert accepted.policy is not None
    checkpoint = run.policies.save(
        accepted.policy,
        algorithm=run.settings.train.algorithm,
        iteration=iteration,
        parent_id=before,
        dataset_id=dataset.id,
        attempt=accepted.number,
    )
    run.store.add_checkpoint(checkpoint)
    run.policies.keep(checkpoint.id, accepted.policy)
    if (left := _left_moments(run, iteration, accepted.number)).exists():
        kept = _moments_of(run, checkpoint.id)
        shutil.rmtree(kept, ignore_errors=True)
        kept.parent.mkdir(exist_ok=True)
        left.replace(kept)
    return checkpoint


def _carried(run: Run, iteration: int, settings: UpdateSettings, number: int) -> Carried:
    """An objective of rollouts goes on with the optimizer's moments of the last update that was kept.

    Its iterations are a few steps each of one training on ever new rollouts; pairs and demonstrations of an iteration
    make a training of their own, which begins without any.
    """
    from prefloop.training.state import Carried

    if objective(settings.algorithm).records != "rollouts":
        return Carried()
    begin = _moments_of(run, run.checkpoint_before(iteration))
    return Carried(begin if begin.exists() else None, _left_moments(run, iteration, number))


def _moments_of(run: Run, checkpoint_id: str) -> Path:
    """Where the optimizer's moments of the update that made a checkpoint are, if there are any."""
    return run.directory / MOMENTS / checkpoint_id[:ID_LENGTH]


def _without_moments(run: Run, iteration: int, carried: Carried) -> list[str]:
    """A warning where the moments of the update before should be there and are not."""
    before = run.checkpoint_before(iteration)
    if carried.end is None or carried.begin is not None or before == run.checkpoint_before(0):
        return []
    return [f"the optimizer begins anew: the moments of the update before are not in {_moments_of(run, before)}"]


def _left_moments(run: Run, iteration: int, number: int) -> Path:
    """Where a try of an update leaves its own."""
    return _states(run, iteration) / f"{MOMENTS}-{number}"


def _clear(run: Run, iteration: int) -> None:
    """Remove what a recorded update needed: its states, and moments but for those of the policy that is kept."""
    shutil.rmtree(_states(run, iteration), ignore_errors=True)
    kept = _moments_of(run, run.checkpoint_before(iteration + 1))
    for old in kept.parent.glob("*"):
        if old != kept:
            shutil.rmtree(old, ignore_errors=True)


def _states(run: Run, iteration: int) -> Path:
    return run.directory / "training" / f"{iteration:03d}"


def _decide(run: Run, before: Interval | None, evaluated: Evaluated) -> Decision:
    guard = run.settings.guard
    if evaluated.kl is None:
        return Decision(False, "on the guard tasks it said nothing: their prompts are as long as the model can read")
    decisions = [kl_guard(evaluated.kl.per_trajectory, guard.max_kl)]
    if before is not None and evaluated.success is not None:
        decisions.insert(0, evaluation_guard(before, evaluated.success, guard.max_drop))
    refused = [decision for decision in decisions if not decision.accepted]
    return Decision(not refused, "; ".join(decision.reason for decision in refused or decisions))


def _guarded(run: Run, iteration: int) -> JSONObject:
    """What the guard measured of the policy that was kept after an iteration, or of the start policy."""
    found = run.found(iteration, GUARD)
    if found is None:
        start = run.checkpoint_before(0)
        absent = run.environment.absent()
        found = _guard_detail(run, start, None if absent else guard_evaluation(run, run.policies.get(start)))
        run.store.add_event(run.id, BEFORE, GUARD, found)
    return found


def _guard_detail(run: Run, checkpoint_id: str, evaluated: Evaluated | None) -> JSONObject:
    if evaluated is None:
        return {"checkpoint_id": checkpoint_id, "num_tasks": 0, "sampled": None, "skipped": run.environment.absent()}
    return {
        "checkpoint_id": checkpoint_id,
        "num_tasks": run.settings.guard.num_tasks,
        "sampled": {"success": _plain(evaluated.success), **kl_detail(evaluated.kl)},
    }


def _success_before(run: Run, iteration: int) -> Interval | None:
    """Success on the guard tasks of the policy that the iteration starts from."""
    success = (_guarded(run, iteration - 1)["sampled"] or {}).get("success")
    return None if success is None else Interval(**success)


def _plain(success: Interval | None) -> JSONObject | None:
    return None if success is None else success.to_dict()
