"""Which objective fits what a store holds, with the reason: rules of thumb, each with its number. Free of torch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from sqlalchemy import ColumnElement, Select, func, select

from prefloop.records import AuthorKind, RaterKind, Verdict
from prefloop.stats.intervals import proportion
from prefloop.store import Store, schema

FEW_PAIRS = 50  # with a fifth held out, accuracy is known to about 15 points either way
ENOUGH_PAIRS = 1000  # for a reward model that is to be optimised: proxies of few preferences are over-optimised early
GOOD_FROM = 0.5  # the score from which a judged trajectory counts as good
HARDLY_EVER = 0.02  # share of successes below which groups of eight hold none in most tasks
NEARLY_ALWAYS = 0.98


@dataclass(frozen=True, slots=True)
class Holdings:
    """What somebody could learn from: counts of the rows of a store.

    `num_pairs` decided comparisons and `num_ties`; `num_good` and `num_bad` trajectories by the scores of people and
    judges; `num_steps` labelled steps; `num_shown` trajectories of people, demonstrators and files; `num_rollouts` of
    policies; `num_verified` of those with a verified outcome, `num_successes` of them well. `environment` is the newest
    run's, empty where there is none.
    """

    num_pairs: int = 0
    num_ties: int = 0
    num_good: int = 0
    num_bad: int = 0
    num_steps: int = 0
    num_shown: int = 0
    num_rollouts: int = 0
    num_verified: int = 0
    num_successes: int = 0
    environment: str = ""


@dataclass(frozen=True, slots=True)
class Advice:
    """An objective, why, and the command."""

    objective: str
    reason: str
    command: str


def holdings(store: Store) -> Holdings:
    """Count what a store holds."""
    j, t, c, r = schema.judgement, schema.trajectory, schema.comparison, schema.rater

    def judged(*conditions: ColumnElement[bool]) -> Select[int]:
        joined = j.join(r, r.c.id == j.c.rater_id)
        judged_ones = func.count(j.c.trajectory_id.distinct())
        return select(judged_ones).select_from(joined).where(j.c.status == "ok", *conditions)

    is_test = r.c.kind == RaterKind.TEST.value
    by_policy = t.c.author_kind.in_([AuthorKind.CHECKPOINT.value, AuthorKind.REMOTE_MODEL.value])
    verdicts = {
        "num_pairs": c.c.verdict.in_([Verdict.A.value, Verdict.B.value]),
        "num_ties": c.c.verdict.in_([Verdict.TIE.value, Verdict.BOTH_GOOD.value, Verdict.BOTH_BAD.value]),
    }
    replaced = select(c.c.replaces).where(c.c.replaces.is_not(None))
    counts = {name: select(func.count()).where(c.c.id.not_in(replaced), said) for name, said in verdicts.items()}
    counts |= {
        "num_good": judged(~is_test, j.c.score >= GOOD_FROM),
        "num_bad": judged(~is_test, j.c.score < GOOD_FROM),
        "num_verified": judged(is_test),
        "num_successes": judged(is_test, j.c.criteria["success"].as_float() > 0),
        "num_steps": select(func.count()).select_from(schema.step_label),
        "num_shown": select(func.count()).where(~by_policy, t.c.messages.is_not(None)),
        "num_rollouts": select(func.count()).where(by_policy, t.c.messages.is_not(None)),
    }
    with store.reading() as connection:
        found = {name: int(connection.execute(query).scalar_one()) for name, query in counts.items()}
    runs = store.runs()
    environment = runs[-1]["settings"].get("environment", {}).get("name", "") if runs else ""
    return Holdings(**found, environment=environment)


def advise(found: Holdings) -> list[Advice]:
    """What to train with what is there, the most promising first."""
    return [*_of_an_environment(found), *_of_rows(found)] or [
        Advice(
            "–",
            "the store holds nothing to learn from yet: import chats, preferences or labels, or run in an environment",
            "prefloop import DATA, or prefloop run RUN.toml",
        )
    ]


def _of_an_environment(found: Holdings) -> Iterator[Advice]:
    if not found.environment:
        return
    run, where = "prefloop run RUN.toml --set train.algorithm=", f"environment {found.environment}"
    if not found.num_verified:
        yield Advice(
            "dpo",
            f"{where} verifies nothing, so that a judge decides: pairs of the best and the worst need its order alone",
            f"{run}dpo",
        )
        yield Advice("rloo", "every attempt counts, with KL as its price: where pairs leave too little", f"{run}rloo")
        return
    share = proportion([True] * found.num_successes + [False] * (found.num_verified - found.num_successes))
    said = f"{where} verifies outcomes, and {share.value:.0%} of {found.num_verified:,} attempts succeeded"
    if share.value < HARDLY_EVER:
        yield Advice("sft", f"{said}: hardly any group would hold a success; imitate first", f"{run}sft")
        return
    if share.value > NEARLY_ALWAYS:
        yield Advice("–", f"{said}: little is left to learn; make the tasks harder", "prefloop evaluate RUN.toml")
        return
    verified = " --set reward.judge=0 --set reward.verified=1"
    yield Advice("grpo", f"{said}: a reward that cannot be fooled, and groups with both", f"{run}grpo{verified}")
    yield Advice("dpo", "pairs of the best and the worst: fewer forward passes, and any judge will do", f"{run}dpo")


def _of_rows(found: Holdings) -> Iterator[Advice]:
    train = "prefloop train {} --dataset ID --model MODEL"
    if found.num_pairs:
        pairs = f"{found.num_pairs:,} decided comparisons"
        if found.num_pairs < FEW_PAIRS:
            reason = f"{pairs} are few: from {FEW_PAIRS} on held-out accuracy begins to mean something"
            yield Advice("–", reason, "prefloop annotate")
        ties = f" ({found.num_ties:,} ties count half)" if found.num_ties else ""
        reason = f"{pairs}{ties}: both sides of each are known; simpo where memory is short"
        yield Advice("dpo", reason, train.format("dpo"))
        if found.num_pairs >= ENOUGH_PAIRS:
            reason = f"{pairs} are enough for a reward model that scores rollouts as a judge"
            yield Advice("reward", reason, train.format("reward"))
    if found.num_good and found.num_bad and not found.environment:  # there, labels are of rollouts
        labels = f"{found.num_good:,} good and {found.num_bad:,} bad answers, each on its own"
        yield Advice("kto", f"{labels}: no pairs needed", "prefloop train kto --data FILE --model MODEL")
    if found.num_steps:
        reason = f"{found.num_steps:,} labelled steps: a model of steps sees where a chain goes wrong"
        yield Advice("process_reward", reason, "prefloop train process_reward --data FILE --model MODEL")
    if found.num_shown and not (found.num_pairs or found.num_bad):
        shown = f"{found.num_shown:,} conversations and no word on which are better: imitate them"
        yield Advice("sft", shown, "prefloop train sft --data FILE --model MODEL")
