"""Worked examples: every clause of what curation promises, by hand."""

from dataclasses import replace

import pytest

from curation_makers import group, judgement, trajectory, vote
from prefloop.curation import CurationSettings, curate
from prefloop.records import PrefloopError, Verdict

EIGHT = (0.1, 0.9, 0.2, 0.8, 0.3, 0.7, 0.5, 0.6)


def ids(curated) -> list[tuple[str, str]]:
    return [(pair.chosen_id, pair.rejected_id) for pair in curated.dataset.pairs]


def test_a_group_of_eight_keeps_three_and_pairs_them_with_the_three_lowest():
    trajectories, judgements = group("t", EIGHT)
    curated = curate(trajectories, judgements, CurationSettings())
    assert curated.kept_ids == ("t1", "t3", "t5")  # ceil(0.3 * 8) = 3: .9, .8, .7
    assert ids(curated) == [("t1", "t0"), ("t3", "t2"), ("t5", "t4")]  # .9-.1, .8-.2, .7-.3
    assert [pair.gap for pair in curated.dataset.pairs] == pytest.approx([0.8, 0.6, 0.4])
    first = curated.dataset.pairs[0]
    assert first.evidence == (judgements[1].id, judgements[0].id)
    assert (first.task_id, first.probability, first.weight) == ("t", 1.0, 1.0)


def test_the_report_counts_everything():
    trajectories, judgements = group("t", EIGHT)
    others, more = group("u", (0.5, 0.5, None))
    report = curate(trajectories + others, judgements + more, CurationSettings()).report
    expected = {
        "num_scored": 10,
        "num_unscored": 1,
        "num_duplicates": 0,
        "num_kept": 4,
        "num_pairs": 3,
        "num_tasks": 2,
        "num_tasks_without_pair": 1,
        "num_marked": 0,
        "num_human_pairs": 0,
        "num_contradicted": 0,
        "num_unconfirmed": 0,
        "noise_sd": None,
        "pair_precision": None,
        "kept_share_by_task": {"min": 3 / 8, "median": 7 / 16, "max": 0.5},
    }
    assert {key: report[key] for key in expected} == expected
    assert report["mean_gap"] == pytest.approx(0.6)
    assert sum(report["kept_scores"]["counts"]) == 4
    assert sum(report["dropped_scores"]["counts"]) == 6
    assert report["kept_scores"]["edges"] == report["dropped_scores"]["edges"]
    # The assistant wrote its name and a call: the name is all that differs, and all names are as long.
    assert report["length_chosen"] == report["length_rejected"] == len("t1") + len('["book_flight",{"id":"F1"}]')


def test_a_batch_wide_cut_favours_easy_tasks_and_the_report_shows_it():
    easy, easy_scores = group("easy", (0.9, 0.95, 0.99, 0.8))
    hard, hard_scores = group("hard", (0.1, 0.2, 0.3, 0.0))
    settings = CurationSettings(scope="batch")
    curated = curate(easy + hard, easy_scores + hard_scores, settings)
    assert curated.kept_ids == ("easy2", "easy1", "easy0")  # ceil(0.3 * 8) of the whole batch
    assert curated.report["kept_share_by_task"] == {"min": 0.0, "median": 0.375, "max": 0.75}
    assert ids(curated) == [("easy2", "easy3")]  # only one was not kept
    assert curated.report["num_tasks_without_pair"] == 1


@pytest.mark.parametrize(
    ("num", "fraction", "expected"), [(10, 0.3, 3), (30, 0.1, 3), (8, 0.3, 3), (1, 0.3, 1), (4, 1.0, 4)]
)
def test_the_kept_share_is_rounded_up_without_floating_point_excess(num: int, fraction: float, expected: int):
    trajectories, judgements = group("t", [i / 40 for i in range(num)])
    assert curate(trajectories, judgements, CurationSettings(fraction=fraction)).report["num_kept"] == expected


def test_the_margin_holds_at_the_edge_and_equal_scores_never_pair():
    trajectories, judgements = group("t", (0.8, 0.5, 0.5, 0.5))
    assert len(ids(curate(trajectories, judgements, CurationSettings(margin=0.3)))) == 1  # 0.8 - 0.5 < 0.3 in floats
    assert not ids(curate(trajectories, judgements, CurationSettings(margin=0.31)))
    trajectories, judgements = group("t", (0.5,) * 8)
    assert not ids(curate(trajectories, judgements, CurationSettings(margin=0)))


def test_moderate_rejections_leave_the_worst_outliers_alone():
    trajectories, judgements = group("t", (0.9, 0.5, 0.45, 0.4, 0.0))
    lowest = curate(trajectories, judgements, CurationSettings(fraction=0.1))
    moderate = curate(trajectories, judgements, CurationSettings(fraction=0.1, rejected="moderate"))
    assert ids(lowest) == [("t0", "t4")]
    assert ids(moderate) == [("t0", "t3")]  # 0.4 is the lower quartile of the five


def test_random_rejections_are_seeded_and_still_keep_the_margin():
    trajectories, judgements = group("t", (0.9, *[0.1 + 0.05 * i for i in range(10)]))
    drawn = {
        ids(curate(trajectories, judgements, CurationSettings(fraction=0.05, rejected="random"), seed=seed))[0][1]
        for seed in range(40)
    }
    assert len(drawn) > 5
    tight = CurationSettings(fraction=0.05, rejected="random", margin=0.75)
    assert {ids(curate(trajectories, judgements, tight, seed=seed))[0][1] for seed in range(20)} == {"t1", "t2"}


def test_identical_completions_count_once_and_their_judgements_are_replicates():
    # Ids of tool calls are drawn by servers: they do not make a completion another one.
    same = [trajectory(f"s{i}", text="the same") for i in range(3)]
    other = trajectory("o", text="another")
    judgements = [judgement("s0", 0.9), judgement("s1", 0.6), judgement("s2", None), judgement("o", 0.2)]
    curated = curate([*same, other], judgements, CurationSettings())
    assert curated.report["num_duplicates"] == 2
    assert curated.report["num_scored"] == 2
    (pair,) = curated.dataset.pairs
    assert pair.chosen_id in {"s0", "s1", "s2"} and pair.rejected_id == "o"
    assert pair.gap == pytest.approx(0.75 - 0.2)
    assert set(pair.evidence) == {judgements[0].id, judgements[1].id, judgements[3].id}


def test_the_same_words_on_two_tasks_are_two_completions():
    both = [trajectory("a", "t", text="same"), trajectory("b", "u", text="same")]
    assert curate(both, [judgement("a", 0.5), judgement("b", 0.5)], CurationSettings()).report["num_duplicates"] == 0


def test_failed_judgements_are_not_numbers():
    trajectories, judgements = group("t", (0.9, None, 0.5, None))
    curated = curate(trajectories, judgements, CurationSettings())
    assert ids(curated) == [("t0", "t2")]
    assert curated.report["num_scored"] == curated.report["num_unscored"] == 2


def test_replicates_are_averaged_and_raters_never_mixed():
    trajectories, judgements = group("t", (0.9, 0.6))
    judgements += [judgement("t0", 0.1, replicate=1), judgement("t1", 0.8, replicate=1)]
    assert curate(trajectories, judgements, CurationSettings()).dataset.pairs[0].chosen_id == "t1"  # .7 against .5
    stranger = judgement("t0", 1.0, rater="stranger")
    with pytest.raises(PrefloopError, match="2 raters judged these trajectories: name one of judge, stranger"):
        curate(trajectories, [*judgements, stranger], CurationSettings())
    named = curate(trajectories, [*judgements, stranger], CurationSettings(), rater_id="judge")
    assert ids(named) == [("t1", "t0")]


def test_judgements_of_trajectories_elsewhere_are_left_out():
    trajectories, judgements = group("t", (0.9, 0.1))
    curated = curate(trajectories, [*judgements, judgement("elsewhere", 1.0, rater="x")], CurationSettings())
    assert curated.kept_ids == ("t0",)


def test_pairs_that_may_owe_to_luck_are_marked():
    trajectories, judgements = group("t", (0.9, 0.1))
    others, more = group("u", (0.9, 0.1))
    others = [replace(one, group_seeded=False) for one in others]
    curated = curate(trajectories + others, judgements + more, CurationSettings())
    assert curated.report["num_marked"] == 1
    (at,) = curated.dataset.recipe["not_group_seeded"]
    assert curated.dataset.pairs[at].task_id == "u"


def test_a_margin_in_units_of_noise():
    trajectories, judgements = group("t", (0.8, 0.4, 0.4))
    with pytest.raises(PrefloopError, match="no trajectory was judged twice"):
        curate(trajectories, judgements, CurationSettings(margin_unit="noise", margin=1))
    # Replicates .7 and .9, .3 and .5, .35 and .45: pooled variance (.02 + .02 + .005) / 3, sd .1225.
    pairs = ((0.7, 0.9), (0.3, 0.5), (0.35, 0.45))
    judgements = [judgement(f"t{i}", s, replicate=r) for i, two in enumerate(pairs) for r, s in enumerate(two)]
    curated = curate(trajectories, judgements, CurationSettings(margin_unit="noise", margin=3.2))
    assert curated.report["noise_sd"] == pytest.approx(0.015**0.5)
    assert curated.report["num_pairs"] == 1  # the gap is .4 = 3.27 sd
    assert not ids(curate(trajectories, judgements, CurationSettings(margin_unit="noise", margin=3.3)))


def test_nothing_to_curate_gives_nothing_and_says_so():
    report = curate([], [], CurationSettings()).report
    assert (report["num_pairs"], report["num_scored"], report["kept_share_by_task"]) == (0, 0, None)
    assert report["mean_gap"] is None and report["length_chosen"] is None


def test_pair_precision_is_an_independent_opinion_of_a_sample():
    trajectories, judgements, verified = [], [], {}
    for task in range(60):
        new, scores = group(f"t{task:02d}-", (0.9, 0.1))
        trajectories, judgements = trajectories + new, judgements + scores
        # 30 right, 10 wrong, 10 tied, 10 that nobody verified.
        outcome = {0: (1.0, 0.0), 1: (0.0, 1.0), 2: (1.0, 1.0)}.get((task >= 30) + (task >= 40) + (task >= 50))
        verified.update(dict(zip([t.id for t in new], outcome, strict=True)) if outcome else {})
    report = curate(trajectories, judgements, CurationSettings(), verified=verified).report
    assert report["pair_precision"]["value"] == 0.75
    assert report["pair_precision"]["n"] == 40
    assert report["pair_precision"]["low"] == pytest.approx(0.598, abs=1e-3)  # Wilson, 30 of 40
    assert report["num_precision_ties"] == 10
    sampled = curate(trajectories, judgements, CurationSettings(precision_sample=20), verified=verified).report
    assert sampled["pair_precision"]["n"] + sampled["num_precision_ties"] == 20


def test_a_vote_makes_a_pair_and_overrules_the_judge():
    trajectories, judgements = group("t", (0.9, 0.1, 0.5))
    against = [vote("t0", "t1", Verdict.B)]
    curated = curate(trajectories, judgements, CurationSettings(), comparisons=against)
    assert ids(curated) == [("t1", "t0")]
    (pair,) = curated.dataset.pairs
    assert pair.probability == pytest.approx(0.9)
    assert pair.evidence == (against[0].id,)
    assert (curated.report["num_human_pairs"], curated.report["num_contradicted"]) == (1, 1)
    alone = curate(trajectories, judgements, CurationSettings(prefer_people=False), comparisons=against)
    assert ids(alone) == [("t0", "t1")]


def test_a_vote_that_agrees_with_the_judge_replaces_its_pair():
    trajectories, judgements = group("t", (0.9, 0.1))
    curated = curate(trajectories, judgements, CurationSettings(), comparisons=[vote("t0", "t1", Verdict.A)])
    assert ids(curated) == [("t0", "t1")]
    assert (curated.report["num_human_pairs"], curated.report["num_contradicted"]) == (1, 0)


def test_votes_add_up():
    trajectories, _ = group("t", (None, None))
    votes = [vote("t0", "t1", Verdict.A, "ann"), vote("t1", "t0", Verdict.B, "bob"), vote("t0", "t1", Verdict.B, "cy")]
    (pair,) = curate(trajectories, [], CurationSettings(), comparisons=votes).dataset.pairs
    assert (pair.chosen_id, pair.probability) == ("t0", pytest.approx(0.9))  # 2 against 1: a lead of one vote
    assert len(pair.evidence) == 3
    (pair,) = curate(trajectories, [], CurationSettings(), comparisons=votes[:2]).dataset.pairs
    assert pair.probability == pytest.approx(0.81 / 0.82)
    assert not ids(curate(trajectories, [], CurationSettings(), comparisons=votes[1:]))  # one each


@pytest.mark.parametrize("verdict", [Verdict.TIE, Verdict.BOTH_BAD, Verdict.BOTH_GOOD, Verdict.SKIP])
def test_indecisive_votes_decide_nothing(verdict: Verdict):
    trajectories, judgements = group("t", (0.9, 0.1))
    curated = curate(trajectories, judgements, CurationSettings(), comparisons=[vote("t0", "t1", verdict)])
    assert (ids(curated), curated.report["num_human_pairs"]) == ([("t0", "t1")], 0)


def test_votes_elsewhere_are_counted_and_votes_across_tasks_refused():
    trajectories, judgements = group("t", (0.9, 0.1))
    others, more = group("u", (0.9, 0.1))
    curated = curate(trajectories, judgements, CurationSettings(), comparisons=[vote("t0", "u0", Verdict.A)])
    assert curated.report["num_votes_elsewhere"] == 1
    with pytest.raises(PrefloopError, match="trajectories of two tasks, t and u"):
        curate(trajectories + others, judgements + more, CurationSettings(), comparisons=[vote("t0", "u0", Verdict.A)])


def test_a_vote_between_identical_completions_decides_nothing():
    same = [trajectory("a", text="x"), trajectory("b", text="x"), trajectory("c", text="y")]
    votes = [vote("a", "b", Verdict.A), vote("b", "c", Verdict.A, "bob"), vote("a", "c", Verdict.A, "cy")]
    (pair,) = curate(same, [], CurationSettings(), comparisons=votes).dataset.pairs
    assert pair.probability == pytest.approx(0.81 / 0.82)  # two votes for the same words


def test_the_dataset_knows_its_recipe_and_demonstrations_are_the_kept():
    trajectories, judgements = group("t", EIGHT)
    curated = curate(trajectories, judgements, CurationSettings(), seed=7, run_id="r", iteration=3)
    recipe = curated.dataset.recipe
    assert recipe["curation"]["fraction"] == 0.3
    assert (recipe["rater_id"], recipe["seed"], recipe["num_replicates"]) == ("judge", 7, 1)
    assert (curated.dataset.run_id, curated.dataset.iteration) == ("r", 3)
    assert curated.demonstrations.trajectory_ids == curated.kept_ids
    assert curated.demonstrations.id != curated.dataset.id


def test_an_attempt_in_which_nothing_was_said_is_left_out_and_counted():
    trajectories, judgements = group("t", [0.9, 0.1, 0.0])
    silent = replace(trajectories[2], messages=trajectories[2].messages[:1])
    found = curate(
        [*trajectories[:2], silent],
        judgements,
        CurationSettings(fraction=0.5),
        comparisons=[vote("t2", "t0", Verdict.A)],
    )
    assert (found.report["num_without_turns"], found.report["num_scored"], found.report["num_unscored"]) == (1, 2, 0)
    named = {i for dataset in (found.dataset, found.demonstrations, found.labelled) for i in dataset.all_trajectory_ids}
    assert named == {"t0", "t1"}
