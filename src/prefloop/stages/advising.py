"""Which objective fits what a store holds, with the reason: rules of thumb, each with its number. Free of torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import count
from typing import Any

from sqlalchemy import ColumnElement, Select, func, select

from prefloop.losses.registry import objective
from prefloop.losses.settings import LossSettings
from prefloop.records import AuthorKind, JSONObject, RaterKind, Verdict
from prefloop.stages.evaluating import SAMPLED
from prefloop.stages.rollouts import STAGE as ROLLOUT
from prefloop.stats.intervals import proportion
from prefloop.store import Store, schema

FEW_PAIRS = 50  # with a fifth held out, accuracy is known to about 15 points either way
ENOUGH_PAIRS = 1000  # for a reward model that is to be optimised: proxies of few preferences are over-optimised early
GOOD_FROM = 0.5  # the score from which a judged trajectory counts as good
HARDLY_EVER = 0.02  # share of successes below which groups of eight hold none in most tasks
NEARLY_ALWAYS = 0.98
MORE_TO_IMITATE = 10  # times as many demonstrations, where imitation left the policy with hardly any success
OF_THE_POLICY = (ROLLOUT, SAMPLED)  # not its greedy attempts, nor those from the middle of others

REFUSED_BY_ROLLOUTS: Mapping[str, Callable[[Any], bool]] = {
    "rollout.samples_per_task": lambda num: num < 2,
    "rollout.sampling.top_p": lambda share: share < 1,
    "gateway.sampling": lambda who: who == "request",
    "curation.confirm": bool,
    "train.held_out": bool,
    "train.evaluate_every": bool,
    "train.patience": bool,
    "train.sync_reference_every": bool,
}
"""Keys, and at which of their values objectives of rollouts refuse a run file; at their defaults they do not."""


@dataclass(frozen=True, slots=True)
class Holdings:
    """What somebody could learn from: counts of the rows of a store.

    `num_pairs` decided comparisons and `num_ties`; `num_good` and `num_bad` trajectories by the scores of people and
    judges; `num_steps` labelled steps; `num_shown` trajectories of people and files.

    Of the newest run in an environment: `environment` is its name, empty where there is no such run, `settings` are the
    run's; of `num_attempts` that its newest policy sampled `num_verified` have a verified outcome, `num_successes` of
    them well. `names` are those of all runs.
    """

    num_pairs: int = 0
    num_ties: int = 0
    num_good: int = 0
    num_bad: int = 0
    num_steps: int = 0
    num_shown: int = 0
    num_attempts: int = 0
    num_verified: int = 0
    num_successes: int = 0
    environment: str = ""
    settings: JSONObject = field(default_factory=dict)
    names: tuple[str, ...] = ()


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
        joined = j.join(r, r.c.id == j.c.rater_id).join(t, t.c.id == j.c.trajectory_id)
        judged_ones = func.count(j.c.trajectory_id.distinct())
        return select(judged_ones).select_from(joined).where(j.c.status == "ok", *conditions)

    runs = store.runs()
    newest = next((run for run in reversed(runs) if run["settings"].get("environment")), None)
    is_test = r.c.kind == RaterKind.TEST.value
    by_policy = t.c.author_kind.in_([AuthorKind.CHECKPOINT.value, AuthorKind.REMOTE_MODEL.value])
    verdicts = {
        "num_pairs": c.c.verdict.in_([Verdict.A.value, Verdict.B.value]),
        "num_ties": c.c.verdict.in_([Verdict.TIE.value, Verdict.BOTH_GOOD.value, Verdict.BOTH_BAD.value]),
    }
    replaced = select(c.c.replaces).where(c.c.replaces.is_not(None))
    counts = {name: select(func.count()).where(c.c.id.not_in(replaced), said) for name, said in verdicts.items()}
    shown = ~by_policy & (t.c.author_kind != AuthorKind.DEMONSTRATOR.value)  # a run imitates its demonstrator itself
    counts |= {
        "num_good": judged(~is_test, j.c.score >= GOOD_FROM),
        "num_bad": judged(~is_test, j.c.score < GOOD_FROM),
        "num_steps": select(func.count()).select_from(schema.step_label),
        "num_shown": select(func.count()).where(shown, t.c.messages.is_not(None)),
    }
    if newest is not None:
        own = (t.c.run_id == newest["id"]) & by_policy & t.c.extra["stage"].as_string().in_(OF_THE_POLICY)
        last = own & (t.c.iteration == select(func.max(t.c.iteration)).where(own).scalar_subquery())
        counts["num_attempts"] = select(func.count()).where(last)
        counts["num_verified"] = judged(is_test, last)
        counts["num_successes"] = judged(is_test, last, j.c.criteria["success"].as_float() > 0)
    with store.reading() as connection:
        found = {name: int(connection.execute(query).scalar_one()) for name, query in counts.items()}
    settings = newest["settings"] if newest is not None else {}
    environment = settings.get("environment", {}).get("name", "")
    return Holdings(**found, environment=environment, settings=settings, names=tuple(run["name"] for run in runs))


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
    where = f"environment {found.environment}"
    if not found.num_attempts:
        yield Advice("–", f"{where}: no attempt of the policy is there yet that would tell", "prefloop run RUN.toml")
        return
    if not found.num_verified:
        reason = (
            f"{where} verifies nothing, so that a judge decides: pairs of the best and the worst need its order alone"
        )
        yield Advice("dpo", reason, _run_by(found, "dpo"))
        reason = "every attempt counts, with KL as its price: where pairs leave too little"
        yield Advice("rloo", reason, _run_by(found, "rloo"))
        return
    share = proportion([True] * found.num_successes + [False] * (found.num_verified - found.num_successes))
    attempts = f"{found.num_verified:,} attempts of the newest policy"
    said = f"{where} verifies outcomes, and {share.value:.0%} of {attempts} succeeded"
    if share.value < HARDLY_EVER:
        yield Advice("sft", f"{said}: hardly any group would hold a success; imitate first", _imitation(found))
        return
    if share.value > NEARLY_ALWAYS:
        yield Advice("–", f"{said}: little is left to learn; make the tasks harder", "prefloop evaluate RUN.toml")
        return
    reason = f"{said}: a reward that cannot be fooled, and groups with both"
    yield Advice("grpo", reason, _run_by(found, "grpo", {"reward.judge": 0, "reward.verified": 1}))
    reason = "pairs of the best and the worst: fewer forward passes, and any judge will do"
    yield Advice("dpo", reason, _run_by(found, "dpo"))


def _run_by(found: Holdings, algorithm: str, rewards: Mapping[str, int] | None = None) -> str:
    """The command for the newest run file by another algorithm: keys that it has not, or refuses, are taken out."""
    given, known = found.settings, objective(algorithm)
    sets: dict[str, Any] = {"train.algorithm": algorithm, **(rewards or {})}
    sets = {key: value for key, value in sets.items() if _at(given, key) != value}
    refused = REFUSED_BY_ROLLOUTS if known.records == "rollouts" else {"rollout.redraws": bool}
    knobs = {f"train.{key}" for key in LossSettings.model_fields if key not in known.knobs}
    knobs |= set() if known.critic else {"train.critic"}
    taken = [key for key in sorted(knobs) if _at(given, key) is not None]
    taken += [key for key, is_refused in refused.items() if _at(given, key) is not None and is_refused(_at(given, key))]
    return _command(found, algorithm, {**sets, **dict.fromkeys(taken, "")})


def _imitation(found: Holdings) -> str:
    """The command for more imitation: of the environment's demonstrator where the newest run had one."""
    num = _at(found.settings, "sft.num_demonstrations")
    if num is None:
        return "prefloop train sft --data FILE --model MODEL"
    return _command(found, "sft", {"sft.num_demonstrations": num * MORE_TO_IMITATE, "sft.num_steps": ""})


def _command(found: Holdings, what: str, sets: Mapping[str, Any]) -> str:
    """The command for the newest run file with some keys set, under a name that no run has; nothing set: as it is."""
    stem = f"{found.settings.get('name', 'NAME')}-{what}"
    names = (stem if number == 1 else f"{stem}-{number}" for number in count(1))
    named = {"name": next(name for name in names if name not in found.names), **sets} if sets else {}
    return " ".join(["prefloop run RUN.toml", *(f"--set {key}={value}" for key, value in named.items())])


def _at(settings: JSONObject, key: str) -> Any:
    """The value of a dotted key, None where there is none."""
    value: Any = settings
    for part in key.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


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
