"""A run as its events tell it, with what is missing named."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from sqlalchemy import select

from prefloop.records import Checkpoint, JSONObject, PrefloopError, RaterKind
from prefloop.store import Store, schema

STAGES = ("demonstrations", "sft", "rollout", "judge", "curate", "train", "evaluate")
BEFORE_LOOP = -1


@dataclass(frozen=True, slots=True)
class Iteration:
    """One turn of the loop; the detail of each stage is empty until that stage has finished.

    `number` counts from 1, as people do; `index` is the one in the store.
    """

    index: int
    number: int
    rollout: JSONObject
    judge: JSONObject
    curate: JSONObject
    train: JSONObject
    evaluate: JSONObject
    guard: JSONObject

    @property
    def success(self) -> JSONObject:
        """Success of the policy that came out, an interval: evaluated, else on the guard tasks, else empty."""
        return dict(self._measured().get("success") or {})

    @property
    def kl(self) -> float | None:
        """Its KL to the start policy in nats a trajectory; None where it was not measured."""
        found = self._measured().get("kl_per_trajectory")
        return None if found is None else float(found)

    @property
    def credit(self) -> JSONObject:
        """What its rollouts were worth and how that became advantages; empty where it learned from something else."""
        return dict(self.train.get("credit") or {})

    def _measured(self) -> JSONObject:
        return dict((self.evaluate or self.guard).get("sampled") or {})

    def missing(self) -> list[str]:
        """The stages that left no event."""
        return [stage for stage in ("rollout", "judge", "curate", "train") if not getattr(self, stage)]


@dataclass(frozen=True, slots=True)
class RunRecord:
    """All that the events, checkpoints and datasets of a run say."""

    run_id: str
    name: str
    settings: JSONObject
    settings_hash: str
    created_at: float
    before: Mapping[str, JSONObject]
    iterations: tuple[Iteration, ...]
    finish: JSONObject
    end_evaluation: JSONObject
    checkpoints: Mapping[str, Checkpoint] = field(default_factory=dict)
    num_members: Mapping[str, int] = field(default_factory=dict)

    @property
    def start_evaluation(self) -> JSONObject:
        """The evaluation of the start policy; empty where there is none yet."""
        return self.before.get("evaluate", {})

    @property
    def start_checkpoint(self) -> str:
        """The id of the start policy, or an empty text."""
        return str(
            self.finish.get("start_checkpoint")
            or self.before.get("policy", self.start_evaluation).get("checkpoint_id", "")
        )

    @property
    def end_checkpoint(self) -> str:
        """The id of the end policy, or an empty text."""
        return str(self.finish.get("end_checkpoint") or self.end_evaluation.get("checkpoint_id") or "")

    @property
    def end_number(self) -> int:
        """The number of updates behind the end policy, which is the best one and not always the last."""
        made = {turn.train.get("checkpoint_id"): turn.number for turn in self.iterations}
        return made.get(self.end_checkpoint, len(self.iterations))

    def successes(self) -> list[tuple[int, JSONObject]]:
        """(number of updates behind it, success as an interval) of the start and of each update, where measured.

        All on the guard tasks where the run has measured the start on them too.
        """
        measured = self.before.get("guard") or self.start_evaluation
        start = (measured.get("sampled") or {}).get("success") or {}
        return [
            (at, success) for at, success in [(0, start), *((t.number, t.success) for t in self.iterations)] if success
        ]

    def seconds_by_stage(self) -> dict[str, float]:
        """Wall time of each stage in seconds: as the run recorded it, else summed from the stages' events."""
        recorded = self.finish.get("seconds_by_stage")
        if recorded:
            known = [stage for stage in STAGES if stage in recorded]
            return {stage: float(recorded[stage]) for stage in dict.fromkeys([*known, *recorded])}
        details = [*self.before.items()]
        details += [(stage, getattr(turn, stage)) for turn in self.iterations for stage in STAGES[2:]]
        found = {stage: [d["seconds"] for name, d in details if name == stage and "seconds" in d] for stage in STAGES}
        return {stage: float(sum(seconds)) for stage, seconds in found.items() if seconds}

    def missing(self) -> list[str]:
        """What a finished run would have and this one does not, in words."""
        gaps = []
        if not self.start_evaluation:
            gaps.append("the start policy has not been evaluated")
        if not self.iterations:
            gaps.append("no iteration has begun")
        elif self.iterations[-1].missing() and not self.finish:
            last = self.iterations[-1]
            gaps.append(f"iteration {last.number} has not finished: no {', '.join(last.missing())} yet")
        if self.iterations and not self.end_evaluation:
            gaps.append("the end policy has not been evaluated on all held-out tasks")
        if not self.finish:
            gaps.append("the run has not finished")
        return gaps


def read_run(store: Store, run_id: str) -> RunRecord:
    """Read a run's record from the store.

    Raises:
        PrefloopError: there is no such run.
    """
    head = store.run(run_id)
    if head is None:
        known = ", ".join(row["id"] for row in store.runs()[-5:]) or "none"
        raise PrefloopError(f"there is no run {run_id} in {store.location}; the newest there: {known}")
    details: dict[int, dict[str, JSONObject]] = {}
    for row in store.events(run_id):
        details.setdefault(row["iteration"], {})[row["kind"]] = dict(row["detail"])
    finish = next((found["finish"] for _, found in sorted(details.items()) if "finish" in found), {})
    return RunRecord(
        run_id=run_id,
        name=head["name"],
        settings=dict(head["settings"]),
        settings_hash=head["settings_hash"],
        created_at=head["created_at"],
        before=details.get(BEFORE_LOOP, {}),
        iterations=_iterations(details),
        finish=finish,
        end_evaluation=_end_evaluation(details, finish),
        checkpoints={checkpoint.id: checkpoint for checkpoint in store.checkpoints(run_id=run_id)},
        num_members={row["id"]: row["num_members"] for row in store.datasets(run_id=run_id)},
    )


def _iterations(details: Mapping[int, Mapping[str, JSONObject]]) -> tuple[Iteration, ...]:
    turns = [index for index, found in sorted(details.items()) if index > BEFORE_LOOP and "rollout" in found]
    return tuple(
        Iteration(index, number, *(details[index].get(stage, {}) for stage in (*STAGES[2:], "guard")))
        for number, index in enumerate(turns, 1)
    )


def _end_evaluation(details: Mapping[int, Mapping[str, JSONObject]], finish: JSONObject) -> JSONObject:
    """The last evaluation on all held-out tasks after the start; of the end policy where the run names it."""
    found = [detail["evaluate"] for index, detail in sorted(details.items()) if index >= 0 and "evaluate" in detail]
    full = [detail for detail in found if not detail.get("guard")]
    of_end = [detail for detail in full if detail.get("checkpoint_id") == finish.get("end_checkpoint")]
    return (of_end or full or [{}])[-1]


def verified_rater(store: Store, run_id: str) -> str | None:
    """The id of the test rater whose judgements are the run's verified outcomes, or None."""
    judgement, trajectory, rater = schema.judgement, schema.trajectory, schema.rater
    query = (
        select(judgement.c.rater_id)
        .join(trajectory, trajectory.c.id == judgement.c.trajectory_id)
        .join(rater, rater.c.id == judgement.c.rater_id)
        .where(trajectory.c.run_id == run_id, rater.c.kind == RaterKind.TEST.value, rater.c.name.endswith(":verified"))
        .order_by(judgement.c.rater_id)
        .limit(1)
    )
    with store.reading() as connection:
        return connection.execute(query).scalar()
