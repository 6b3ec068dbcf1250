"""Labels of steps that a store holds become a dataset, which trains a model that judges."""

from __future__ import annotations

import json

import pytest

from fit_runs import settings_of, step_rows, tiny_model, write_rows
from prefloop import cli
from prefloop.formats import import_file
from prefloop.judges.base import JudgeItem
from prefloop.judges.reward_model import ProcessJudgeSettings
from prefloop.records import PrefloopError, Rater, RaterKind, StepLabel
from prefloop.stages.fitting import fit
from prefloop.stages.scorers import process_reward_judge
from prefloop.stages.valuing import freeze_store_steps
from prefloop.store import Store

ANN, BOB = (Rater(RaterKind.HUMAN, name) for name in ("ann", "bob"))


@pytest.fixture
def store(tmp_path):
    with Store(str(tmp_path / "store.db")) as opened:
        import_file(opened, write_rows(tmp_path / "rows.jsonl", step_rows(6)))
        opened.add_raters([ANN, BOB])
        yield opened


def say(store, rater, *values):
    """What a rater says of the steps of the first trajectories, each label in turn."""
    imported = sorted(store.step_labels(), key=lambda label: (label.trajectory_id, label.span))
    store.add_step_labels(
        StepLabel(label.trajectory_id, rater.id, label.message, value, span=label.span)
        for label, value in zip(imported, values, strict=False)
    )
    return imported


def test_all_raters_count_unless_some_are_named(store):
    imported = say(store, ANN, 0.0)  # the first step of the first trajectory, of which the file says that it is right
    dataset, merged = freeze_store_steps(store)
    assert sum(map(len, merged.steps.values())) == len(imported) == 18
    (conflict,) = merged.conflicts
    assert conflict.startswith(f"trajectory {imported[0].trajectory_id}, message 1, characters 0 to ")
    first = merged.steps[imported[0].trajectory_id]
    assert {step.label for step in first if step.place.span == imported[0].span} == {0.5}
    assert store.dataset(dataset.id).recipe["raters"] == sorted({imported[0].rater_id, ANN.id})
    only_ann, merged = freeze_store_steps(store, ["ann"])
    assert [step.label for steps in merged.steps.values() for step in steps] == [0.0]
    assert only_ann.id != dataset.id


def test_only_steps_of_which_another_rater_says_the_same(store):
    say(store, ANN, 1.0, 0.2, 0.9)
    say(store, BOB, 0.8, 0.9)
    _, merged = freeze_store_steps(store, ["ann"], agree_with=BOB.id)
    assert [step.label for steps in merged.steps.values() for step in steps] == [1.0]
    assert merged.num_not_agreed == 2
    imported = next(rater.name for rater in store.raters().values() if rater.name not in ("ann", "bob"))
    with pytest.raises(PrefloopError, match="no labelled step is left to learn from: with 18 nobody agrees"):
        freeze_store_steps(store, [imported], agree_with=add_contrary(store, imported))


def add_contrary(store, name):
    """A rater who says the opposite of another."""
    whose = next(i for i, rater in store.raters().items() if rater.name == name)
    cy = Rater(RaterKind.HUMAN, "cy")
    store.add_raters([cy])
    labels = store.step_labels(rater_id=whose)
    store.add_step_labels(StepLabel(o.trajectory_id, cy.id, o.message, 1 - o.label, span=o.span) for o in labels)
    return cy.id


@pytest.mark.parametrize(
    ("raters", "agree_with", "option"), [(["cy"], "", "--rater cy"), ([], "cy", "--agree-with cy")]
)
def test_a_rater_that_labelled_nothing_is_refused_with_those_that_did(store, raters, agree_with, option):
    say(store, ANN, 1.0)
    with pytest.raises(PrefloopError, match=f"{option}: name one of the raters that labelled steps: .*ann"):
        freeze_store_steps(store, raters, agree_with)


def test_steps_of_held_out_tasks_train_nothing(tmp_path):
    rows = write_rows(tmp_path / "rows.jsonl", step_rows(12))
    with Store(str(tmp_path / "store.db")) as store:
        import_file(store, rows, held_out=0.5)
        dataset, _ = freeze_store_steps(store)
        tasks = store.tasks()
        splits = {tasks[t.task_id].split.value for t in store.trajectories(dataset.all_trajectory_ids)}
        assert splits == {"train"}
        assert len(dataset.labelled) < 12


def test_the_command_says_what_it_froze_and_what_contradicts(store, tmp_path, capsys):
    say(store, ANN, 0.0)
    assert cli.main(["value", "--store", str(tmp_path / "store.db")]) == 0
    said = capsys.readouterr().out
    assert "18 labelled steps; 0 left out" in said
    assert "raters contradict each other on 1 of them: trajectory" in said


@pytest.mark.parametrize(
    ("options", "reason"),
    [(["--iteration", "1"], "are of a run"), (["run.toml", "--rater", "ann"], "are of a whole store")],
)
def test_options_that_would_not_be_read_are_refused(store, tmp_path, capsys, options, reason):
    assert cli.main(["value", *options, "--store", str(tmp_path / "store.db")]) == 1
    assert reason in capsys.readouterr().err


@pytest.mark.slow
def test_from_labels_to_a_judge_of_steps(store, tmp_path):
    model = tiny_model(tmp_path)
    dataset, _ = freeze_store_steps(store)
    settings = settings_of("process_reward", model, dataset=dataset.id, num_epochs=2)
    fit(settings, store, tmp_path / "prm")
    judge = process_reward_judge(ProcessJudgeSettings(model=str(tmp_path / "prm"), aggregate="product"), 1)
    tasks = store.tasks()
    items = [JudgeItem(tasks[t.task_id], t) for t in store.trajectories(dataset.all_trajectory_ids)]
    judgements = judge.judge(items)
    assert all(len(judgement.criteria["steps"]) == 3 for judgement in judgements)
    product = (
        judgements[0].criteria["steps"][0] * judgements[0].criteria["steps"][1] * judgements[0].criteria["steps"][2]
    )
    assert judgements[0].score == pytest.approx(product)
    assert json.loads((tmp_path / "prm" / "reward_model.json").read_text())["step"] == "separator"
