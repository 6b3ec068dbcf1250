"""Advice follows from what a store holds, and names its numbers."""

from __future__ import annotations

import pytest

from prefloop.records import Comparison, Judgement, Rater, RaterKind, Status, StepLabel, Verdict
from prefloop.stages.advising import ENOUGH_PAIRS, FEW_PAIRS, Holdings, advise, holdings
from prefloop.store import Store
from store_records import fill


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
        (Holdings(environment="prompts", num_rollouts=8), ["dpo", "rloo"], "environment prompts verifies nothing"),
        (Holdings(environment="booking", num_verified=200, num_successes=60), ["grpo", "dpo"], "30% of 200 attempts"),
        (Holdings(environment="booking", num_verified=200, num_successes=1), ["sft"], "imitate first"),
        (Holdings(environment="booking", num_verified=200, num_successes=200), ["–"], "little is left to learn"),
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
    fill(store, "x", "y")
    person, test = Rater(RaterKind.HUMAN, "ann", {}), Rater(RaterKind.TEST, "environment", {})
    store.add_raters([person, test])
    vote = Comparison("x", "y", person.id, Status.OK, Verdict.A, "1")
    store.add_comparisons([vote, Comparison("x", "y", person.id, Status.OK, Verdict.TIE, "2", replaces=vote.id)])
    before = holdings(store)
    assert (before.num_pairs, before.num_ties, before.environment) == (0, 1, "")
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
    assert after.num_steps == 1 and after.num_shown + after.num_rollouts == 2
