"""Update the policy on the iteration's dataset, and take back an update that harms it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from prefloop.evaluation.guard import Decision, evaluation_guard, kl_guard
from prefloop.records import Checkpoint, Dataset, JSONObject, PrefloopError
from prefloop.rollout import derived_seed
from prefloop.stages.context import BEFORE, Run
from prefloop.stages.curating import dataset_of
from prefloop.stages.evaluating import Evaluated, guard_evaluation
from prefloop.stats.intervals import Interval
from prefloop.training.settings import UpdateSettings

if TYPE_CHECKING:
    from prefloop.batch.examples import Example
    from prefloop.models.load import Policy
    from prefloop.training.algorithms import Algorithm

STAGE, GUARD = "train", "guard"


@dataclass(frozen=True, slots=True)
class _Attempt:
    """One try of an update, and whether the guards accept it; one that diverged could not be evaluated."""

    number: int
    policy: Policy
    learning_rate: float
    history: list[dict[str, float]]
    evaluated: Evaluated | None
    decision: Decision

    def to_dict(self) -> JSONObject:
        return {
            "learning_rate": self.learning_rate,
            "kl": self.evaluated.kl.per_trajectory if self.evaluated else None,
            "success": _plain(self.evaluated.success) if self.evaluated else None,
            **self.decision.to_dict(),
        }


def train_stage(run: Run, iteration: int) -> None:
    """Train on the iteration's dataset; an update that the guards refuse is tried again more gently.

    Raises:
        PrefloopError: the iteration is not curated yet, or the policy is served and has no weights here.
    """
    if run.found(iteration, STAGE) is not None:
        return
    if run.settings.policy.server is not None:
        raise PrefloopError(
            f"run {run.settings.name}: the weights of a served policy are not here to be trained; "
            "`prefloop export` writes its pairs for another trainer"
        )

    from prefloop.training.trainer import forget_state

    settings = run.settings.train
    before = run.checkpoint_before(iteration)
    run.require(iteration, "curate")
    dataset = dataset_of(run, iteration, "pairs" if settings.algorithm == "dpo" else "demonstrations")
    with run.recorded(iteration, STAGE) as detail:
        detail |= {"algorithm": settings.algorithm, "dataset_id": dataset.id}
        if not (dataset.pairs or dataset.trajectory_ids):
            detail |= {"checkpoint_id": before, "steps": 0, "attempts": [], "rolled_back": False, "loss": []}
            detail["reason"] = "nothing to train on: no pair met the margin"
            run.store.add_event(run.id, iteration, GUARD, _guarded(run, iteration - 1))
            return
        attempts = _attempts(run, iteration, before, dataset)
        last = attempts[-1]
        accepted = last.decision.accepted
        guarded = _guarded(run, iteration - 1)
        if accepted and last.evaluated is not None:
            checkpoint = _save(run, iteration, before, dataset, last)
            guarded = _guard_detail(run, checkpoint.id, last.evaluated)
        run.store.add_event(run.id, iteration, GUARD, guarded)
        detail |= {
            "checkpoint_id": checkpoint.id if accepted else before,
            "steps": len(last.history),
            "loss": [metrics.get("loss") for metrics in last.history],
            "metrics": _means(last.history),
            "attempts": [attempt.to_dict() for attempt in attempts],
            "rolled_back": not accepted,
        }
    forget_state(_states(run, iteration))


def _attempts(run: Run, iteration: int, before: str, dataset: Dataset) -> list[_Attempt]:
    guard, settings = run.settings.guard, run.settings.train
    success_before = _success_before(run, iteration)
    learning_rate = settings.learning_rate
    if settings.decay == "linear":
        learning_rate *= 1 - iteration / run.settings.iterations
    attempts: list[_Attempt] = []
    for number in range(guard.max_retries + 1):
        gentler = settings.model_copy(update={"learning_rate": learning_rate * guard.retry_factor**number})
        attempts.append(_attempt(run, iteration, before, dataset, gentler, number, success_before))
        if attempts[-1].decision.accepted:
            break
    return attempts


def _attempt(
    run: Run,
    iteration: int,
    before: str,
    dataset: Dataset,
    settings: UpdateSettings,
    number: int,
    success_before: Interval | None,
) -> _Attempt:
    from prefloop.models.draw import DivergedError
    from prefloop.training.trainer import train

    policy = run.policies.take(before)
    history: list[dict[str, float]] = []
    evaluated = None
    try:
        result = train(
            policy.model,
            None,
            _algorithm(settings),
            _examples(run, policy, before, dataset, settings),
            settings,
            seed=derived_seed(run.settings.seed, STAGE, iteration),
            identity=f"{before} {dataset.id}",
            state_directory=_states(run, iteration),
            on_step=lambda step, _, metrics: run.progress.advance(step, f"loss {metrics.get('loss', 0):.3f}"),
        )
        history = result.history
        evaluated = guard_evaluation(run, policy)
        decision = _decide(run, success_before, evaluated)
    except DivergedError as error:
        decision = Decision(False, str(error))
    return _Attempt(number, policy, settings.learning_rate, history, evaluated, decision)


def _save(run: Run, iteration: int, before: str, dataset: Dataset, accepted: _Attempt) -> Checkpoint:
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
    return checkpoint


def _states(run: Run, iteration: int) -> Path:
    return run.directory / "training" / f"{iteration:03d}"


def _algorithm(settings: UpdateSettings) -> Algorithm:
    from prefloop.training.algorithms import make_algorithm

    return make_algorithm(settings.algorithm, settings)


def _examples(run: Run, policy: Policy, before: str, dataset: Dataset, settings: UpdateSettings) -> list[Example]:
    from prefloop.batch.examples import Demonstration, PreferencePair
    from prefloop.training.step import with_reference

    ids = dict.fromkeys([*dataset.trajectory_ids, *(i for p in dataset.pairs for i in (p.chosen_id, p.rejected_id))])
    trajectories = run.store.trajectories(ids, with_paths=True)
    tasks = run.store.tasks({t.task_id for t in trajectories})
    found = run.policies.paths(policy, trajectories, tasks)
    paths = {t.id: p for t, p in zip(trajectories, found, strict=True)}
    if settings.algorithm == "sft":
        return [Demonstration(paths[i], name=i) for i in dataset.trajectory_ids]
    pairs = [
        PreferencePair(
            paths[p.chosen_id],
            paths[p.rejected_id],
            probability=p.probability,
            weight=p.weight,
            name=f"{p.chosen_id} over {p.rejected_id}",
        )
        for p in dataset.pairs
    ]
    reference = run.checkpoint_before(0) if settings.reference == "start" else before
    return [*with_reference(run.policies.reference(reference), pairs, max_tokens=settings.max_tokens)]


def _decide(run: Run, before: Interval | None, evaluated: Evaluated) -> Decision:
    guard = run.settings.guard
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
        found = _guard_detail(run, start, guard_evaluation(run, run.policies.get(start)))
        run.store.add_event(run.id, BEFORE, GUARD, found)
    return found


def _guard_detail(run: Run, checkpoint_id: str, evaluated: Evaluated) -> JSONObject:
    return {
        "checkpoint_id": checkpoint_id,
        "num_tasks": run.settings.guard.num_tasks,
        "sampled": {"success": _plain(evaluated.success), **evaluated.kl.to_dict()},
    }


def _success_before(run: Run, iteration: int) -> Interval | None:
    """Success on the guard tasks of the policy that the iteration starts from."""
    success = _guarded(run, iteration - 1)["sampled"]["success"]
    return None if success is None else Interval(**success)


def _plain(success: Interval | None) -> JSONObject | None:
    return None if success is None else success.to_dict()


def _means(history: list[dict[str, float]]) -> dict[str, float]:
    names = sorted({name for metrics in history for name in metrics})
    found = {name: [metrics[name] for metrics in history if name in metrics] for name in names}
    return {name: sum(values) / len(values) for name, values in found.items()}
