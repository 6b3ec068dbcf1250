"""Which trajectories are called good and bad, by hand."""

from __future__ import annotations

import pytest

from curation_makers import group, vote
from prefloop.curation import CurationSettings, curate
from prefloop.records import Labelled, Verdict


def labels(scores_by_task, comparisons=(), seed=0, **settings):
    trajectories, judgements = [], []
    for task, scores in scores_by_task.items():
        some, theirs = group(task, scores)
        trajectories += some
        judgements += theirs
    curated = curate(trajectories, judgements, CurationSettings(**settings), comparisons=comparisons, seed=seed)
    assert curated.labelled.labelled == curated.labels
    assert curated.labelled.recipe == {**curated.dataset.recipe, "of": "labelled"}
    counts = [sum(one.desirable is wanted for one in curated.labels) for wanted in (True, False)]
    assert [curated.report["num_desirable"], curated.report["num_undesirable"]] == counts
    return {one.trajectory_id: one.desirable for one in curated.labels}


def test_the_kept_are_desirable_and_as_many_of_the_lowest_undesirable():
    scores = {"t": [0.9, 0.1, 0.8, 0.5, 0.2, 0.6, 0.4, 0.3]}  # mean 0.475
    assert labels(scores, fraction=0.25) == {"t0": True, "t2": True, "t1": False, "t4": False}


def test_both_lie_half_the_margin_from_the_mean_of_their_group():
    scores = {"t": [0.9, 0.6, 0.5, 0.0]}  # mean 0.5
    assert labels(scores, fraction=0.5, margin=0.2) == {"t0": True, "t1": True, "t3": False}
    assert labels(scores, fraction=0.5, margin=0.21) == {"t0": True, "t3": False}
    assert labels(scores, fraction=0.5, margin=0.81) == {"t3": False}


@pytest.mark.parametrize("margin", [0.0, 0.1])
def test_equal_scores_say_nothing_and_one_success_makes_the_others_bad(margin):
    assert labels({"t": [0.4] * 6}, margin=margin) == {}
    assert labels({"t": [1.0, 0.0, 0.0, 0.0]}, fraction=0.5, margin=margin).keys() >= {"t0"}
    found = labels({"t": [1.0, 0.0, 0.0, 0.0]}, fraction=0.5, margin=margin)
    assert found["t0"] is True
    assert sorted(found.values()) == [False, False, True]  # the other kept one is no better than the rest


def test_groups_are_tasks_or_all_together():
    scores = {"easy": [1.0, 1.0], "hard": [0.0, 0.0]}
    assert labels(scores, fraction=0.5) == {}
    together = labels(scores, fraction=0.5, scope="batch")
    assert together == {"easy0": True, "easy1": True, "hard0": False, "hard1": False}


def test_people_overrule_the_judge_and_what_they_contradict_themselves_on_says_neither():
    scores = {"t": [0.9, 0.8, 0.2, 0.1]}
    assert labels(scores, fraction=0.5) == {"t0": True, "t1": True, "t2": False, "t3": False}
    votes = [vote("t3", "t0", Verdict.A), vote("t1", "t2", Verdict.A), vote("t2", "t3", Verdict.A)]
    assert labels(scores, votes, fraction=0.5) == {"t0": False, "t1": True}
    assert labels(scores, votes, fraction=0.5, prefer_people=False) == labels(scores, fraction=0.5)
    assert labels({"t": [None] * 4}, votes) == {"t0": False, "t1": True}  # votes alone


def test_labels_lead_back_to_their_judgements_and_votes():
    trajectories, judgements = group("t", [0.9, 0.8, 0.2, 0.1])
    said = vote("t0", "t3", Verdict.A)
    curated = curate(trajectories, judgements, CurationSettings(fraction=0.5), comparisons=[said])
    assert curated.labels == (
        Labelled("t0", True, evidence=(said.id,)),
        Labelled("t1", True, evidence=(judgements[1].id,)),
        Labelled("t2", False, evidence=(judgements[2].id,)),
        Labelled("t3", False, evidence=(said.id,)),
    )


def test_a_margin_in_noise_needs_noise_for_labels_too():
    from curation_makers import judgement

    trajectories, judgements = group("t", [0.9, 0.1])
    judgements += [judgement("t0", 0.7, 1), judgement("t1", 0.3, 1)]  # each noise of sd 0.1·√2
    settings = CurationSettings(margin=4.2, margin_unit="noise", fraction=0.5)
    assert [one.desirable for one in curate(trajectories, judgements, settings).labels] == [True, False]
    wider = settings.model_copy(update={"margin": 4.3})
    assert curate(trajectories, judgements, wider).labels == ()
