"""Rows come from files, from frozen datasets and from the store's best; what is held out never straddles."""

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from fit_runs import Heard, chat_rows, labelled_rows, pair_rows, settings_of, step_rows, train_rows, write_rows
from prefloop.batch.examples import PreferencePair
from prefloop.formats import import_file
from prefloop.records import Dataset, Judgement, Labelled, Pair, PrefloopError, Split, Status
from prefloop.stages.fit_data import ready, select
from prefloop.stages.fit_models import load_learner
from prefloop.stages.fitting import Fitted, fit
from prefloop.store import Store


@pytest.fixture
def store(tmp_path: Path):
    with Store(str(tmp_path / "shared.db")) as opened:
        yield opened


def imported(store: Store, tmp_path: Path, rows: list) -> Store:
    import_file(store, write_rows(tmp_path / "imported.jsonl", rows))
    return store


def pairs_of(store: Store) -> tuple[Pair, ...]:
    task_of = {t.id: t.task_id for t in store.trajectories()}
    return tuple(Pair(task_of[c.trajectory_a], c.trajectory_a, c.trajectory_b) for c in store.comparisons())


def trained(store: Store, objective: str, model: Path, tmp_path: Path, **options) -> Fitted:
    return fit(settings_of(objective, model, num_steps=1, **options), store, tmp_path / "out")


# --- files ------------------------------------------------------------------------------------------------------


def test_labelled_answers_to_one_prompt_make_pairs_in_turn(store: Store, tmp_path: Path):
    """Two good ones and three bad ones: three pairs, each answer in one at least; alone, an answer makes none."""
    answers = {"one": ("g0", "b0", "g1", "b1", "b2"), "two": ("g0",), "three": ("b0",)}
    rows = [
        {"prompt": prompt, "completion": answer, "label": answer[0] == "g"}
        for prompt, given in answers.items()
        for answer in given
    ]
    options = {"data": [write_rows(tmp_path / "rows.jsonl", rows)]}
    selected = select(settings_of("dpo", tmp_path, **options, on_error="skip"), store)
    said = {t.id: t.completion[0].content for t in store.trajectories()}
    pairs = [(said[pair.chosen_id], said[pair.rejected_id]) for pair in selected.rows.members]
    assert pairs == [("g0", "b0"), ("g1", "b1"), ("g0", "b2")]
    assert selected.rows.names == ["rows.jsonl:1", "rows.jsonl:3", "rows.jsonl:1"]
    assert [len(pair.evidence) for pair in selected.rows.members] == [2, 2, 2]
    alone = "no answer to its prompt is labelled as {}: kto learns from such rows"
    assert selected.skips.listed == [f"rows.jsonl:6: {alone.format('bad')}", f"rows.jsonl:7: {alone.format('good')}"]
    with pytest.raises(PrefloopError, match=r"rows\.jsonl:6: no answer to its prompt is labelled as bad"):
        select(settings_of("dpo", tmp_path, **options), store)


@pytest.mark.parametrize("order", [(0, 1, 2, 3, 4), (4, 2, 0, 3, 1), (3, 1, 4, 2, 0)])
def test_an_answer_with_both_labels_is_a_contradiction_in_any_order(store: Store, tmp_path: Path, order: tuple):
    """A is liked and disliked, B only liked, C only disliked: B over C alone is left."""
    given = [("A", True), ("B", True), ("C", False), ("A", False), ("A", True)]
    rows = [{"prompt": "one", "completion": given[i][0], "label": given[i][1]} for i in order]
    options = {"data": [write_rows(tmp_path / "rows.jsonl", rows)]}
    selected = select(settings_of("dpo", tmp_path, **options, on_error="skip"), store)
    said = {t.id: t.completion[0].content for t in store.trajectories()}
    assert [(said[pair.chosen_id], said[pair.rejected_id]) for pair in selected.rows.members] == [("B", "C")]
    reason = "its answer is labelled as good in one row and as bad in another"
    places = [f"rows.jsonl:{line}" for line, i in enumerate(order, 1) if given[i][0] == "A"]
    assert sorted(selected.skips.listed) == [f"{place}: {reason}" for place in places]
    assert selected.skips.reasons == {reason: 3}
    with pytest.raises(PrefloopError, match=reason):
        select(settings_of("dpo", tmp_path, **options), store)


@pytest.mark.parametrize("held_out", [0, 0.2])
def test_where_nothing_is_left_the_reasons_are_told(store: Store, tmp_path: Path, held_out: float):
    said = [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}]
    rows = [{"messages": [{"role": "system", "content": str(i)}, *said], "thumb": "up"} for i in range(3)]
    options = {"data": [write_rows(tmp_path / "logs.jsonl", [*rows, {"messages": said}])], "held_out": held_out}
    with pytest.raises(PrefloopError) as raised:
        select(settings_of("dpo", tmp_path, **options, on_error="skip"), store)
    assert str(raised.value) == (
        "none of the 4 rows is left to train on: 4 were bad, 0 too long. The bad ones: no answer to its prompt is "
        "labelled as bad: kto learns from such rows (3 rows); it holds no preference: this objective learns from "
        "'chosen' and 'rejected', or from answers with a 'thumb' or 'label' (1 row)"
    )


def test_files_of_one_name_are_told_apart_and_where_they_lie_decides_nothing(model: Path, tmp_path: Path):
    found, (row,) = [], pair_rows(1)
    refused, empty = {**row, "prompt": 3}, {**row, "rejected": ""}  # by the import, and after it
    for place in ("here", "there"):
        files = []
        for folder, rows in (("d1", pair_rows(4)), ("d2", [*pair_rows(4), refused]), ("d3", [*pair_rows(2), empty])):
            (tmp_path / place / folder).mkdir(parents=True)
            files.append(write_rows(tmp_path / place / folder / "x.jsonl", rows))
        given = {"data": files[:2], "eval_data": files[2:]}
        with pytest.raises(PrefloopError, match=rf"^{re.escape(str(files[1]))}:5: "):
            train_rows("dpo", model, tmp_path / place / "out", **given)
        fitted = train_rows("dpo", model, tmp_path / place / "out", **given, on_error="skip", num_steps=1)
        bad = [row.partition(": ")[0] for row in fitted.data["skipped"]]
        assert bad == [f"{files[1]}:5", f"{files[2]}:3"]
        card = (tmp_path / place / "out" / "README.md").read_text()
        assert all(f"- file `{file}` (trl)" in card for file in files[:2])
        found.append((fitted.data["dataset_id"], fitted.data["held_out_id"]))
    assert found[0] == found[1]


def test_what_a_preference_says_beside_its_sides_reaches_the_example(store: Store, model: Path, tmp_path: Path):
    a, b, c, d = pair_rows(4)
    rows = [{**a, "margin": 1.5}, {**b, "probability": 0.75}, {**c, "tie": True}, d]
    settings = settings_of("reward", model, data=[write_rows(tmp_path / "p.jsonl", rows)])
    learner = load_learner(settings)
    data = ready(select(settings, store), settings, store, learner.renderer, learner.context, "")
    assert all(isinstance(example, PreferencePair) for example in data.examples)
    found = [(e.margin, e.probability, e.tied, e.name) for e in data.examples]
    assert found == [
        (1.5, 1.0, False, "p.jsonl:1"),
        (0.0, 0.75, False, "p.jsonl:2"),
        (0.0, 0.5, True, "p.jsonl:3"),
        (0.0, 1.0, False, "p.jsonl:4"),
    ]
    assert store.add_dataset(data.dataset) == data.detail["dataset_id"]
    assert store.dataset(data.dataset.id) == data.dataset


@pytest.mark.parametrize(
    ("objective", "rows", "unused"),
    [
        ("dpo", pair_rows, {"margin": 2, "note": 4}),
        ("reward", pair_rows, {"note": 4}),
        ("sft", pair_rows, {"margin": 2, "note": 4, "rejected": 8}),
        ("kto", labelled_rows, {"margin": 2, "note": 4}),
        ("sft", chat_rows, {"margin": 2, "note": 4}),
    ],
)
def test_columns_that_the_objective_does_not_use_are_counted(
    objective: str, rows, unused: dict, model: Path, tmp_path: Path
):
    made = rows(8)
    for i, row in enumerate(made):
        row |= {"margin": 1.0} if i < 2 else {"note": "seen"} if i % 2 else {}
        row |= {"note": "seen"} if i == 0 else {}
        row |= {"label": True} if rows is chat_rows and i < 4 else {}  # read, so that what is bad is not imitated
    heard = Heard()
    fitted = train_rows(objective, model, tmp_path / "out", made, progress=heard, num_steps=1)
    assert fitted.data["unused"] == unused
    listed = ", ".join(f"{name} (of {number} rows)" for name, number in unused.items())
    assert heard.notes.count(f"not used by {objective}: {listed}") == 1
    assert "- columns that the objective does not use: `" in (tmp_path / "out" / "README.md").read_text()


def test_margins_of_a_dataset_that_the_objective_does_not_use_are_counted(store: Store, model: Path, tmp_path: Path):
    pairs = pairs_of(imported(store, tmp_path, pair_rows(6)))
    dataset = Dataset({"by": "hand"}, (replace(pairs[0], margin=2.0), *pairs[1:]))
    store.add_dataset(dataset)
    assert trained(store, "dpo", model, tmp_path, dataset=dataset.id).data["unused"] == {"margin": 1}
    assert all("not used" not in note for note in _notes_without_more(model, tmp_path))


def _notes_without_more(model: Path, tmp_path: Path) -> list[str]:
    train_rows("dpo", model, tmp_path / "plain", pair_rows(6), progress=(heard := Heard()), num_steps=1)
    return heard.notes


def test_a_row_that_is_there_twice_counts_twice(model: Path, tmp_path: Path):
    fitted = train_rows("dpo", model, tmp_path / "out", [*pair_rows(6), *pair_rows(2)], num_steps=1)
    assert fitted.data["train"]["num_examples"] == 8


def test_several_files_are_one_dataset_in_order(model: Path, tmp_path: Path):
    files = [write_rows(tmp_path / f"{i}.jsonl", pair_rows(6)[i::2]) for i in range(2)]
    fitted = train_rows("dpo", model, tmp_path / "out", data=files, num_steps=1)
    assert [file["name"] for file in fitted.data["source"]["files"]] == ["0.jsonl", "1.jsonl"]
    assert fitted.data["train"]["num_examples"] == 6


def test_preferences_serve_labels_and_demonstrations(model: Path, tmp_path: Path):
    kto = train_rows("kto", model, tmp_path / "kto", pair_rows(6), num_steps=1)
    assert kto.data["train"]["num_examples"] == 12
    sft = train_rows("sft", model, tmp_path / "sft", pair_rows(6), num_steps=1)
    assert sft.data["train"]["num_examples"] == 6
    chats = train_rows("sft", model, tmp_path / "chats", chat_rows(6), num_steps=1)
    assert sft.data["train"]["num_tokens"] == chats.data["train"]["num_tokens"]  # the chosen sides, and a prompt each
    assert sft.train["loss"] == chats.train["loss"]


def test_formats_of_agents(model: Path, tmp_path: Path):
    call = [{"tool": "search", "args": {"to": "Rome"}}]
    rows = [
        {"prompt": f"Book {i}.", "chosen": call, "rejected": [{"tool": "book", "args": {"id": i}}]} for i in range(4)
    ]
    assert (
        train_rows("dpo", model, tmp_path / "out", rows, num_steps=1).data["source"]["files"][0]["format"]
        == "tool-calls"
    )


def test_a_plain_text_is_learnt_without_a_template(model: Path, tmp_path: Path):
    rows = [{"text": f"Fay has {i} trees."} for i in range(8)]
    fitted = train_rows("sft", model, tmp_path / "out", rows, num_epochs=1)
    start = AutoModelForCausalLM.from_pretrained(model)
    tokenizer = AutoTokenizer.from_pretrained(model)
    nll = []
    for row in rows:  # its one optimizer step sees all of them
        ids = tokenizer(f"<|end|>{row['text']}<|end|>", return_tensors="pt").input_ids  # it has no start token
        with torch.no_grad():
            nll += (-start(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])).flatten().tolist()
    assert fitted.train["loss"][0] == pytest.approx(np.mean(nll), rel=1e-5)
    assert fitted.data["train"]["num_own_tokens"] == len(nll)


def test_kto_says_what_its_paper_advises(model: Path, tmp_path: Path):
    heard = Heard()
    rows = [*labelled_rows(8), *[r for r in labelled_rows(24)[8:] if r["label"]]]
    train_rows("kto", model, tmp_path / "out", rows, num_steps=1, progress=heard)
    (advice,) = [note for note in heard.notes if note.startswith("kto: ")]
    assert "outside the advised 1 to 4/3" in advice


# --- the store --------------------------------------------------------------------------------------------------


def test_a_frozen_dataset(store: Store, model: Path, tmp_path: Path):
    imported(store, tmp_path, pair_rows(6))
    pairs = tuple(replace(pair, margin=2.0) for pair in pairs_of(store))
    frozen = store.add_dataset(Dataset({"made": "by hand"}, pairs))
    fitted = trained(store, "dpo", model, tmp_path, dataset=frozen[:10])
    assert fitted.data["source"] == {"records": "pairs", "dataset": frozen}
    mine = store.dataset(fitted.checkpoint.dataset_id)
    assert [(p.chosen_id, p.margin) for p in mine.pairs] == [(p.chosen_id, 2.0) for p in pairs]


@pytest.mark.parametrize(("objective", "num"), [("sft", 6), ("kto", 12)])
def test_a_dataset_of_pairs_for_other_objectives(store: Store, model: Path, tmp_path: Path, objective: str, num: int):
    imported(store, tmp_path, pair_rows(6))
    pairs = pairs_of(store)
    fitted = trained(store, objective, model, tmp_path, dataset=store.add_dataset(Dataset({}, pairs)))
    assert fitted.data["train"]["num_examples"] == num


def test_a_dataset_of_labels_and_one_of_steps(store: Store, model: Path, tmp_path: Path):
    imported(store, tmp_path, labelled_rows(6))
    labels = tuple(Labelled(j.trajectory_id, j.score == 1.0, evidence=(j.id,)) for j in store.judgements())
    frozen = store.add_dataset(Dataset({"of": "labels"}, labelled=labels))
    assert trained(store, "kto", model, tmp_path / "kto", dataset=frozen).data["train"]["num_examples"] == 6

    imported(store, tmp_path, step_rows(6))
    by_trajectory: dict[str, list[str]] = {}
    for label in store.step_labels():
        by_trajectory.setdefault(label.trajectory_id, []).append(label.id)
    stepped = tuple(Labelled(i, None, evidence=tuple(ids)) for i, ids in by_trajectory.items())
    frozen = store.add_dataset(Dataset({"of": "steps"}, labelled=stepped))
    fitted = trained(store, "process_reward", model, tmp_path / "prm", dataset=frozen)
    assert fitted.data["train"]["num_examples"] == 6


def test_a_dataset_of_the_wrong_kind(store: Store, model: Path, tmp_path: Path):
    imported(store, tmp_path, chat_rows(3))
    frozen = store.add_dataset(Dataset({}, trajectory_ids=tuple(t.id for t in store.trajectories())))
    with pytest.raises(
        PrefloopError, match=r"^imported\.jsonl:\d: the dataset holds a demonstration, and this obj.* pairs"
    ):
        trained(store, "dpo", model, tmp_path, dataset=frozen)


def test_the_best_of_each_task(store: Store, model: Path, tmp_path: Path):
    answers = [f"Ann has {i} cats." for i in range(3)]
    rows = [
        {"prompt": p, "completion": a, "label": True} for p in ("Say something of Ann.", "And now?") for a in answers
    ]
    imported(store, tmp_path, rows)
    (rater,) = store.raters()
    scores = dict(zip(answers, (0.2, 0.9, 0.6), strict=True))
    store.add_judgements(
        [
            Judgement(t.id, rater, Status.OK, s := scores[t.messages[-1].content], s, replicate=2)
            for t in store.trajectories()
        ]
    )
    # The mean with the file's label of 1: 0.6, 0.95 and 0.8.
    found = trained(store, "sft", model, tmp_path / "a", top_k=2)
    kept = {
        t.messages[-1].content for t in store.trajectories(store.dataset(found.checkpoint.dataset_id).trajectory_ids)
    }
    assert kept == {answers[1], answers[2]} and found.data["train"]["num_examples"] == 4
    found = trained(store, "sft", model, tmp_path / "b", top_k=2, min_score=0.9, rater="import")
    assert found.data["train"]["num_examples"] == 2
    with pytest.raises(
        PrefloopError, match=r"none of the 4 best trajectories of training tasks in .* has a score of 0\.99"
    ):
        trained(store, "sft", model, tmp_path / "c", top_k=2, min_score=0.99)
    with pytest.raises(PrefloopError, match=r"--rater nobody: name one of the raters with scores: import"):
        trained(store, "sft", model, tmp_path / "d", top_k=2, rater="nobody")


def test_the_best_are_taken_of_training_tasks_only(store: Store, model: Path, tmp_path: Path):
    import_file(store, write_rows(tmp_path / "rows.jsonl", labelled_rows(24)), held_out=0.5)
    found = trained(store, "sft", model, tmp_path, top_k=1, min_score=0.0)
    chosen = store.trajectories(store.dataset(found.checkpoint.dataset_id).trajectory_ids)
    splits = {store.tasks([t.task_id])[t.task_id].split for t in chosen}
    assert splits == {Split.TRAIN}
    assert len(chosen) == len(store.tasks(split=Split.TRAIN)) < 24


def test_a_trajectory_that_was_erased(store: Store, model: Path, tmp_path: Path):
    imported(store, tmp_path, pair_rows(3))
    pairs = pairs_of(store)
    frozen = store.add_dataset(Dataset({}, pairs))
    store.erase(pairs[0].rejected_id)
    with pytest.raises(PrefloopError, match="its trajectory was erased on request"):
        trained(store, "dpo", model, tmp_path, dataset=frozen)


# --- holding out ------------------------------------------------------------------------------------------------


def test_near_equal_prompts_are_on_one_side(model: Path, tmp_path: Path):
    rows = pair_rows(16)
    twins = [{**row, "prompt": row["prompt"].upper().replace(".", " !"), "chosen": "Yes."} for row in rows]
    fitted = train_rows("dpo", model, tmp_path / "out", [*rows, *twins], held_out=0.4, num_steps=1)
    with Store(str(tmp_path / "out.run" / "prefloop.db")) as store:
        sides = []
        for name in ("dataset_id", "held_out_id"):
            tasks = store.tasks(pair.task_id for pair in store.dataset(fitted.data[name]).pairs)
            sides.append({"".join(c for c in t.messages[0].content.lower() if c.isalnum()) for t in tasks.values()})
            assert len(tasks) == 2 * len(sides[-1])  # each prompt with its twin
        assert not sides[0] & sides[1]
        held_out = store.tasks(pair.task_id for pair in store.dataset(fitted.data["held_out_id"]).pairs)
        assert {task.split for task in held_out.values()} == {Split.HELD_OUT}


def test_texts_without_prompts_are_split_by_what_they_say(model: Path, tmp_path: Path):
    fitted = train_rows(
        "sft", model, tmp_path / "out", [{"text": f"Fay has {i} trees."} for i in range(20)], held_out=0.4
    )
    assert 2 < fitted.data["held_out"]["num_rows"] < 18


def test_a_share_that_holds_nothing_or_everything_out(model: Path, tmp_path: Path):
    with pytest.raises(PrefloopError, match=r"--held-out 0\.001: of 4 different prompts none would be held out"):
        train_rows("dpo", model, tmp_path / "a", pair_rows(4), held_out=0.001)
    with pytest.raises(PrefloopError, match=r"--held-out 0\.999: of 4 different prompts all would be held out"):
        train_rows("dpo", model, tmp_path / "b", pair_rows(4), held_out=0.999)


def test_a_file_of_held_out_rows(model: Path, tmp_path: Path):
    heard, rows = Heard(), pair_rows(12)
    others = write_rows(tmp_path / "others.jsonl", [*rows[8:], {**rows[0], "prompt": rows[0]["prompt"].upper()}])
    fitted = train_rows("dpo", model, tmp_path / "out", rows[:8], eval_data=[others], num_steps=1, progress=heard)
    assert (fitted.data["train"]["num_rows"], fitted.data["held_out"]["num_rows"]) == (8, 5)
    assert "held-out rows whose prompt is also trained on: 1" in heard.notes
    with Store(str(tmp_path / "out.run" / "prefloop.db")) as store:
        assert len(store.tasks(split=Split.HELD_OUT)) == 5


def test_a_dataset_of_the_store_can_be_held_out_of(store: Store, model: Path, tmp_path: Path):
    imported(store, tmp_path, pair_rows(20))
    pairs = pairs_of(store)
    fitted = trained(store, "dpo", model, tmp_path, dataset=store.add_dataset(Dataset({}, pairs)), held_out=0.3)
    parts = [fitted.data[name]["num_rows"] for name in ("train", "held_out")]
    assert sum(parts) == 20 and min(parts) > 0


# --- what cannot be said together -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("objective", "options", "message"),
    [
        ("dpo", {}, "rows: give one of --data FILE, --dataset ID and --top-k K; given was nothing"),
        ("sft", {"data": ["a"], "top_k": 2}, "given was --data and --top-k"),
        ("dpo", {"top_k": 2}, "--top-k: dpo learns from pairs, and the best are demonstrations"),
        ("sft", {"data": ["a"], "rater": "me"}, "they go with --top-k"),
        ("dpo", {"data": ["a"], "eval_data": ["b"], "held_out": 0.1}, "give --held-out SHARE or --eval-data FILE"),
        ("dpo", {"data": ["a"], "gamma": 1.0}, "gamma: objective 'dpo' has no such knob"),
        ("dpo", {"data": ["a"], "num_heads": 2}, "ensembles are of reward models, not of dpo"),
        ("dpo", {"data": ["a"], "separator": ";"}, "--separator ends the steps of process_reward; dpo has none"),
        ("kto", {"data": ["a"], "kl": "samples"}, "--kl samples: stored rows hold no fresh samples"),
        (
            "dpo",
            {"data": ["a"], "early_stopping_metric": "accuracy"},
            "--early-stopping-metric accuracy: dpo does not log it; give one of loss, rewards/accuracies, rewards/marg",
        ),
        ("dpo", {"data": ["a"], "early_stopping_metric": "nll_loss"}, "--early-stopping-metric nll_loss: dpo does not"),
        (
            "kto",
            {"data": ["a"], "early_stopping_metric": "rewards/accuracies"},
            "kto does not log it; give one of l",
        ),
        ("sft", {"data": ["a"], "early_stopping_metric": "accuracy"}, "sft does not log it; give one of loss"),
        ("simpo", {"data": ["a"], "reference": "r"}, "--reference: simpo has no reference; leave it out"),
        ("reward", {"data": ["a"], "reference": "r"}, "--reference: reward has no reference"),
        ("sft", {"data": ["a"], "sync_reference_every": 2}, "--sync-reference-every: sft has no reference"),
        ("cpo", {"data": ["a"], "mixture": {"orpo": 1.0}, "reference": "r"}, "--reference: cpo has no reference"),
    ],
)
def test_options_that_exclude_each_other(objective: str, options: dict, message: str):
    with pytest.raises(PrefloopError) as caught:
        settings_of(objective, Path("m"), **options)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_options_of_what_a_knob_adds():
    mixed = settings_of("simpo", Path("m"), data=["a"], mixture={"dpo": 0.5}, reference="r", sync_reference_every=2)
    assert mixed.reference == "r"
    likely = settings_of("dpo", Path("m"), data=["a"], nll_coef=1.0, early_stopping_metric="nll_loss")
    assert likely.early_stopping_metric == "nll_loss"


def test_a_file_that_is_not_there(model: Path, tmp_path: Path):
    with pytest.raises(PrefloopError, match=r"there is no file .*none\.jsonl"):
        train_rows("dpo", model, tmp_path / "out", data=[tmp_path / "none.jsonl"])


def test_the_card_and_the_event_tell_the_source(store: Store, model: Path, tmp_path: Path):
    imported(store, tmp_path, labelled_rows(6))
    trained(store, "sft", model, tmp_path, top_k=1)
    card = (tmp_path / "out" / "README.md").read_text()
    (rater,) = store.raters()
    assert f"the 1 best of each task by rater `{rater}`" in card
    assert json.dumps(rater) in json.dumps(store.datasets()[-1]["recipe"])
