"""Advice follows from what a store holds, and names its numbers."""

from __future__ import annotations

import shlex
from dataclasses import replace
from pathlib import Path

import pytest

from prefloop.config import apply_overrides, parse_settings, read_run_file
from prefloop.records import AuthorKind, Comparison, Judgement, Rater, RaterKind, Status, StepLabel, Verdict
from prefloop.stages.advising import ENOUGH_PAIRS, FEW_PAIRS, Holdings, advise, holdings
from prefloop.stages.context import CIRCUMSTANTIAL
from prefloop.stages.settings import RunSettings
from prefloop.store import Store
from store_records import JUDGE, TASK
from store_records import trajectory as attempt

EXAMPLES = Path(__file__).parents[2] / "examples"


def objectives(found):
    return [advice.objective for advice in advise(found)]


@pytest.mark.parametrize(
    ("found", "expected", "said"),
    [
        (Holdings(), ["–"], "nothing to learn from yet"),
        (Holdings(num_shown=40), ["sft"], "40 conversations"),
        (Holdings(num_pairs=FEW_PAIRS - 1), ["–", "dpo"], "are few"),
        (Holdings(num_pairs=FEW_PAIRS, num_ties=3, num_shown=9), ["dpo"], "3 ties count half"),
        (Holdings(num_pairs=ENOUGH_PAIRS), ["dpo", "reward"], "1,000 decided comparisons"),
        (Holdings(num_good=5, num_bad=2), ["kto"], "5 good and 2 bad"),
        (Holdings(num_good=5, num_shown=5), ["sft"], "imitate"),
        (Holdings(num_steps=7), ["process_reward"], "7 labelled steps"),
        (Holdings(environment="prompts", num_attempts=8), ["dpo", "rloo"], "environment prompts verifies nothing"),
        (Holdings(environment="booking"), ["–"], "no attempt of the policy is there yet"),
        (
            Holdings(environment="booking", num_attempts=200, num_verified=200, num_successes=60),
            ["grpo", "dpo"],
            "30% of 200 attempts",
        ),
        (
            Holdings(environment="booking", num_attempts=200, num_verified=200, num_successes=1),
            ["sft"],
            "imitate first",
        ),
        (
            Holdings(environment="booking", num_attempts=200, num_verified=200, num_successes=200),
            ["–"],
            "little is left to learn",
        ),
    ],
)
def test_each_kind_of_rows_has_its_objective(found, expected, said):
    assert objectives(found) == expected
    assert said in " ".join(advice.reason for advice in advise(found))


@pytest.fixture
def store(tmp_path):
    with Store(str(tmp_path / "s.db")) as opened:
        yield opened


def test_holdings_count_what_stands(store):
    store.add_tasks([TASK])
    store.add_raters([JUDGE])
    store.add_run("r0", "first", "runs/first", {"name": "first", "environment": {"name": "booking"}})
    store.add_trajectories(attempt(name, run_id="r0", extra={"stage": "rollout"}) for name in ("x", "y"))
    person, test = Rater(RaterKind.HUMAN, "ann", {}), Rater(RaterKind.TEST, "environment", {})
    store.add_raters([person, test])
    vote = Comparison("x", "y", person.id, Status.OK, Verdict.A, "1")
    store.add_comparisons([vote, Comparison("x", "y", person.id, Status.OK, Verdict.TIE, "2", replaces=vote.id)])
    before = holdings(store)
    assert (before.num_pairs, before.num_ties, before.environment) == (0, 1, "booking")
    store.add_comparisons([Comparison("y", "x", person.id, Status.OK, Verdict.B, "3")])
    store.add_judgements([
        Judgement("x", person.id, Status.OK, 1.0, 1.0),
        Judgement("y", person.id, Status.OK, 0.0, 0.0),
        Judgement("x", test.id, Status.OK, 1.0, 1.0, criteria={"success": 1.0}),
        Judgement("y", test.id, Status.OK, 0.0, 0.0, criteria={"success": 0.0}),
    ])  # fmt: skip
    store.add_step_labels([StepLabel("x", person.id, 1, 1.0)])
    after = holdings(store)
    assert (after.num_pairs, after.num_ties) == (1, 1)
    assert (after.num_good, after.num_bad, after.num_verified, after.num_successes) == (1, 1, 2, 1)
    assert after.num_steps == 1 and after.num_shown + after.num_attempts == 2


def test_success_is_that_of_the_newest_policy_s_sampled_attempts_alone(store):
    test = Rater(RaterKind.TEST, "environment", {})
    store.add_tasks([TASK])
    store.add_raters([test])
    for name in ("old", "new"):
        store.add_run(name, name, f"runs/{name}", {"name": name, "environment": {"name": "booking"}})
    store.add_run("fit", "model", "model", {"objective": "dpo"})  # a training on data of one's own, later
    shown = {"author_kind": AuthorKind.DEMONSTRATOR, "author": "booking"}
    rows = [
        ("another run", "old", 5, "rollout", 1.0, {}),
        ("shown", "new", -1, "demonstration", 1.0, shown),
        ("start", "new", -1, "evaluate_sampled", 1.0, {}),
        ("first", "new", 0, "rollout", 1.0, {}),
        ("second", "new", 1, "rollout", 0.0, {}),
        ("third", "new", 1, "rollout", 0.0, {}),
        ("completed", "new", 1, "value", 1.0, {}),
        ("greedy", "new", 2, "evaluate_greedy", 1.0, {}),
    ]
    for name, run_id, iteration, stage, success, by in rows:
        store.add_trajectories([attempt(name, run_id=run_id, iteration=iteration, extra={"stage": stage}, **by)])
        store.add_judgements([Judgement(name, test.id, Status.OK, success, success, criteria={"success": success})])
    found = holdings(store)
    assert (found.environment, found.num_attempts, found.num_verified, found.num_successes) == ("booking", 2, 2, 0)
    assert found.num_shown == 0 and found.names == ("old", "new", "model")
    assert objectives(found) == ["sft"]


ADVISED = [
    Holdings(environment="e", num_attempts=9),
    *(Holdings(environment="e", num_attempts=9, num_verified=9, num_successes=num) for num in (0, 5)),
]


@pytest.mark.parametrize("found", ADVISED, ids=["not verified", "no success", "successes"])
@pytest.mark.parametrize("example", ["booking", "booking-grpo", "dialogue"])
@pytest.mark.parametrize("changes", [
    (),
    ("train.algorithm=ppo", "train.beta=", "train.nll_coef=", "train.kl_coef=", "train.critic.num_epochs=2"),
    ("train.algorithm=spin", "train.kl_coef=", "train.baseline=", "rollout.samples_per_task=1", "curation.fraction=1.0",
     "gateway.sampling=request", "rollout.sampling.top_p=0.9"),
    ("train.algorithm=dpo", "train.kl_coef=", "train.held_out=0.2", "train.evaluate_every=5", "curation.confirm=2"),
    ("train.algorithm=rloo", "train.beta=", "train.nll_coef=", "rollout.redraws=2"),
])  # fmt: skip
def test_the_commands_that_are_advised_for_a_run_file_can_be_given(found, example, changes):
    data = apply_overrides(read_run_file(EXAMPLES / f"{example}.toml"), changes)
    settings = parse_settings(RunSettings, data, "run").model_dump(mode="json", exclude=CIRCUMSTANTIAL)
    there = replace(found, settings=settings, names=(example, f"{example}-grpo"))
    for advice in advise(there):
        assert advice.command.startswith("prefloop run RUN.toml")
        sets = [word for word in shlex.split(advice.command) if "=" in word]
        advised = parse_settings(RunSettings, apply_overrides(data, sets), "advised")
        assert advice.objective == "sft" or advised.train.algorithm == advice.objective
        assert (advised.name not in there.names) == bool(sets)
        if advice.objective == "grpo":
            assert (advised.reward.judge, advised.reward.verified) == (0.0, 1.0)


def test_a_run_file_that_does_it_already_is_run_as_it_is():
    data = {"name": "mine", "train": {"algorithm": "rloo", "kl_coef": 0.1}, "rollout": {"redraws": 1}}
    found = Holdings(environment="prompts", num_attempts=9, settings=data, names=("mine", "mine-dpo"))
    assert [advice.command for advice in advise(found)] == [
        "prefloop run RUN.toml --set name=mine-dpo-2 --set train.algorithm=dpo --set train.kl_coef= "
        "--set rollout.redraws=",
        "prefloop run RUN.toml",
    ]
