import io
from dataclasses import replace

from rich.console import Console
from synthetic_run import JUDGE, RUN, SyntheticRun

from prefloop.live import _line
from prefloop.records import Comparison, Rater, RaterKind, Status, Verdict
from prefloop.report import final_table
from prefloop.report.record import read_run
from prefloop.report.summary import agreement_with_people, final_rows, verdict


def _run(start, end, paired=None, store=None, **more):
    store.add_run(RUN, "x", "", {})
    for iteration, success in ((-1, start), (0, end)):
        sampled = {"success": success, "metrics": {"turns": 3.0, "invented_ids": 0.1 * (2 + iteration)}, **more}
        detail = {"checkpoint_id": str(iteration), "num_tasks": success["n"], "sampled": sampled, "greedy": None}
        store.add_event(RUN, iteration, "evaluate", {**detail, "guard": False})
    store.add_event(RUN, 0, "rollout", {"num": 1})
    store.add_event(RUN, 1, "finish", {"paired": paired})
    return read_run(store, RUN)


def _share(value, low, high):
    return {"value": value, "low": low, "high": high, "n": 100}


def _paired(value, low, high):
    return {"better": 9, "worse": 5, "same": 86, "difference": _share(value, low, high), "p_value": 0.01}


def test_a_rise_a_fall_and_no_measurable_change(store):
    record = _run(_share(0.5, 0.4, 0.6), _share(0.54, 0.44, 0.64), _paired(0.04, -0.04, 0.12), store)
    found = verdict(record)
    assert found.tone == "open"
    assert found.headline.startswith("Success on 100 held-out tasks did not change measurably: 50.0 % [40.0, 60.0] to")
    assert "9 won, 5 lost, 86 unchanged; +4.0 points [−4.0, +12.0], p = 0.01." in found.details[0]


def test_a_fall_is_called_a_fall(store):
    found = verdict(_run(_share(0.5, 0.4, 0.6), _share(0.3, 0.2, 0.4), _paired(-0.2, -0.3, -0.1), store))
    assert found.tone == "bad"
    assert "fell from" in found.headline


def test_without_pairs_only_intervals_that_do_not_meet_tell(store):
    assert verdict(_run(_share(0.5, 0.4, 0.6), _share(0.65, 0.55, 0.75), None, store)).tone == "open"


def test_both_the_interval_and_the_exact_test_must_agree(store):
    paired = {**_paired(-0.094, -0.187, -0.003), "p_value": 0.064}
    record = _run(_share(0.19, 0.12, 0.28), _share(0.09, 0.05, 0.17), paired, store)
    assert "did not change measurably" in verdict(record).headline
    assert final_rows(record)[0].better is None


def test_rows_mark_what_got_better_and_dash_what_is_unknown(store):
    record = _run(_share(0.3, 0.2, 0.4), _share(0.6, 0.5, 0.7), None, store, kl_per_trajectory=2.5)
    rows = {row.name: row for row in final_rows(record)}
    assert rows["Success, sampled"].better is True
    assert (rows["Success, greedy"].start, rows["Success, greedy"].end) == ("–", "–")
    assert rows["KL from start, nats a trajectory"].end == "2.50"
    assert (rows["Invented ids"].start, rows["Invented ids"].end) == ("0.100", "0.200")
    assert rows["Invented ids"].better is None  # a mean without an interval moved nowhere for certain


def test_terminal_table_of_a_finished_run(finished):
    _, store, _ = finished
    out = io.StringIO()
    Console(file=out, width=120).print(final_table(store, RUN))
    text = out.getvalue()
    for line in ("Success, sampled", "Success, greedy", "Invented ids", "Time, SFT", "38 s", "2 min 8 s", "3.60"):
        assert line in text


def test_terminal_table_of_a_run_that_has_only_begun(store):
    SyntheticRun(store).begin()
    out = io.StringIO()
    Console(file=out, width=120).print(final_table(store, RUN))
    assert "There is no evaluation yet" in out.getvalue()


def test_agreement_with_people_in_words(store):
    SyntheticRun(store, num_tasks=4, num_iterations=1).build()
    record = read_run(store, RUN)

    def said(found):
        return agreement_with_people(store, replace(record, finish={"agreement_with_people": found}))

    found = {
        "num": 40,
        "share": 0.85,
        "low": 0.709,
        "high": 0.929,
        "num_unscored": 2,
        "num_judge_ties": 0,
        "kappa": 0.7,
    }
    assert said(found)["sentence"] == (
        "The judge orders 85.0 % [70.9, 92.9] of 40 decisive votes as people did; "
        "left out: 2 on pairs it did not score."
    )
    assert said(found)["others"] == {"Kappa": 0.7}
    assert said({"num": 0, "share": None, "low": None, "high": None})["sentence"] == "no human votes"
    assert said(None)["sentence"] == "no human votes"


def test_votes_that_came_after_the_run_count(store):
    SyntheticRun(store, num_tasks=4, num_iterations=1).build()
    person = Rater(RaterKind.HUMAN, "ada")
    store.add_raters([person])
    scores = {j.trajectory_id: j.score for j in store.judgements(rater_id=JUDGE.id)}
    ranked = sorted(scores, key=scores.get)
    votes = [(ranked[-1], ranked[0], Verdict.A), (ranked[0], ranked[-2], Verdict.B), (ranked[-1], ranked[1], Verdict.B)]
    store.add_comparisons(
        Comparison(a, b, person.id, Status.OK, verdict, f"vote {n}") for n, (a, b, verdict) in enumerate(votes)
    )
    sentence = agreement_with_people(store, read_run(store, RUN))["sentence"]
    assert sentence.startswith("The judge orders 66.7 %") and "of 3 decisive votes" in sentence


def test_where_nothing_is_verified_only_the_judge_is_quoted(store):
    store.add_run(RUN, "x", "", {})
    for iteration, score in ((-1, 0.4), (0, 0.7)):
        sampled = {"success": None, "metrics": {"turns": 1.0}, "mean_judge_score": score, "kl_per_trajectory": 1.0}
        detail = {"checkpoint_id": str(iteration), "num_tasks": 9, "sampled": sampled, "greedy": None, "guard": False}
        store.add_event(RUN, iteration, "evaluate", detail)
    found = verdict(read_run(store, RUN))
    assert found.headline.startswith(
        "Nothing is verified here; the training judge's mean score went from 0.400 to 0.700"
    )
    assert found.tone == "open"


def test_what_was_not_graded_is_said_wherever_success_is(store):
    success = {"value": 1.0, "low": 0.439, "high": 1.0, "n": 3}
    record = _run(success, success, None, store, num_unverified=3)
    for event in (record.start_evaluation, record.end_evaluation):
        event["num_tasks"] = 6
    found = verdict(record)
    assert found.headline.startswith("Success on 3 held-out tasks")
    assert found.details[0] == (
        "Success is of graded episodes alone: "
        "3 of 6 were not graded (start policy); 3 of 6 were not graded (end policy)."
    )
    row = final_rows(record)[0]
    assert row.start == row.end == "100.0 % [43.9, 100.0]; 3 of 6 were not graded"
    assert _line(0, "evaluate", record.end_evaluation).endswith("of 3 held-out tasks succeed; 3 of 6 were not graded")
