import json

import pytest

pytest.importorskip("transformers", reason="the extra 'train' is not installed")

from prefloop.batch.packed import pack
from prefloop.batch.stepped import stepped_samples
from prefloop.chat import ChatRenderer, StepFinder, render_demonstration
from prefloop.curation.steps import merge_step_labels
from prefloop.formats import import_file
from prefloop.models.initial import train_tokenizer
from prefloop.records import Message, PrefloopError, Role
from prefloop.store import Store

PROMPT = "Start with 7."
STEPS = ["7 + 2 = 9", "9 - 4 = 6", "6 + 1 = 7"]


@pytest.fixture(scope="module")
def renderer():
    said = (Message(Role.USER, PROMPT), Message(Role.ASSISTANT, "\n".join(STEPS)))
    return ChatRenderer(train_tokenizer([(said, ())], 300))


@pytest.fixture
def store(tmp_path):
    with Store(str(tmp_path / "store.db")) as opened:
        yield opened


def imported(store, tmp_path, *rows):
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    import_file(store, tmp_path / "rows.jsonl", format="trl")
    return store.trajectories()


def stepwise(labels, **changes):
    return {"prompt": PROMPT, "completions": STEPS, "labels": labels, **changes}


def examples(store, renderer, trajectories):
    paths = [render_demonstration(renderer, t.messages, (), t.num_prompt_messages) for t in trajectories]
    merged = merge_step_labels(store.step_labels(trajectory_ids=[t.id for t in trajectories]))
    return stepped_samples(trajectories, paths, merged.steps, StepFinder(renderer))


def test_rows_of_trl_are_labelled_at_the_separators_and_the_end_of_the_turn(store, tmp_path, renderer):
    (sample,) = examples(store, renderer, imported(store, tmp_path, stepwise([True, False, 0.25])))
    text = renderer.encoder.decode(sample.paths[0].token.tolist())
    read = [renderer.encoder.decode(sample.paths[0].token[: step.token + 1].tolist()) for step in sample.steps]
    assert read[0].endswith("= 9\n")
    assert read[1].endswith("= 6\n")
    assert read[2] == text
    assert [step.label for step in sample.steps] == [1.0, 0.0, 0.25]


def test_the_batch_reads_each_label_where_its_step_ends(store, tmp_path, renderer):
    trajectories = imported(store, tmp_path, stepwise([True, False, True]), stepwise([0.5, 0.75, 0.0]))
    samples = examples(store, renderer, trajectories)
    batch = pack(samples)
    assert batch.step_label_K.tolist() == [step.label for sample in samples for step in sample.steps]
    ends = batch.token_T[batch.visit_token_V[batch.step_visit_K]].tolist()
    newline, stop = renderer.encoder.encode("\n").ids[0], samples[0].paths[0].token[-1]
    assert ends == 2 * [newline, newline, stop]


def test_a_trajectory_without_a_label_is_named(store, tmp_path, renderer):
    (trajectory,) = imported(store, tmp_path, {"prompt": PROMPT, "completion": "7 + 2 = 9"})
    with pytest.raises(PrefloopError, match=f"trajectory {trajectory.id}: no step of it is labelled"):
        examples(store, renderer, [trajectory])


@pytest.mark.parametrize("label", [1.5, -1, "yes", None])
def test_a_label_that_is_none_names_the_row(store, tmp_path, label):
    with pytest.raises(PrefloopError, match=r"rows.jsonl.*2.*labels\[1\].*from 0 to 1"):
        imported(store, tmp_path, stepwise([True, True, True]), stepwise([True, label, True]))
