"""Bad rows are errors that name them, or counted and listed; nothing is cut or left out in silence."""

import json
import shutil
from contextlib import nullcontext
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from fit_runs import Heard, chat_rows, labelled_rows, pair_rows, step_rows, train_rows, write_rows
from prefloop.chat import ChatRenderer
from prefloop.hub import DataFile
from prefloop.models.initial import CHAT_TEMPLATE
from prefloop.records import PrefloopError
from prefloop.stages.examples import LabelledSteps, LengthLimit, Prepared, prepare
from prefloop.stages.selecting import Skips, read_corpus, rows_of_files
from prefloop.store import Store

GOOD = pair_rows(12)
PROMPT = GOOD[0]["prompt"]
CALL = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "look", "arguments": {}}}]}
TOOL_ANSWER = {"role": "tool", "content": "a fact", "name": "look"}
USED_A_TOOL = {
    "messages": [{"role": "user", "content": PROMPT}, CALL, TOOL_ANSWER, {"role": "assistant", "content": "So."}]
}


def with_template(model: Path, directory: Path, old: str, new: str) -> Path:
    """The model with another chat template."""
    assert old in CHAT_TEMPLATE
    shutil.copytree(model, directory)
    (directory / "MANIFEST.json").unlink(missing_ok=True)  # else it says that the template was changed
    (directory / "chat_template.jinja").write_text(CHAT_TEMPLATE.replace(old, new))
    return directory


@pytest.mark.parametrize(
    ("objective", "rows", "bad", "reason"),
    [
        ("dpo", GOOD, {**GOOD[0], "rejected": GOOD[0]["chosen"]}, "it is the same as 'chosen'"),
        ("dpo", GOOD, {**GOOD[0], "rejected": ""}, "the completion is empty"),
        ("dpo", GOOD, {**GOOD[0], "chosen": " \n"}, "the completion is empty"),
        ("dpo", GOOD, {"prompt": PROMPT, "completion": "Yes."}, "it holds no preference"),
        ("dpo", GOOD, {"prompt": PROMPT}, "there is only a prompt"),
        ("sft", GOOD, {"messages": [{"role": "user", "content": PROMPT}]}, "no message is the assistant's"),
        ("sft", GOOD, {"prompt": PROMPT, "completion": "No.", "label": False}, "labelled as bad"),
        ("sft", GOOD, {**GOOD[0], "tie": True}, "a tie neither labels its sides nor says which to imitate"),
        ("kto", labelled_rows(12), {"prompt": PROMPT, "completion": "Yes."}, "it holds no label"),
        ("kto", labelled_rows(12), {**GOOD[0], "probability": 0.7}, "a preference of probability 0.7"),
        ("process_reward", step_rows(12), GOOD[0], "it holds no labels of steps"),
    ],
)  # fmt: skip
def test_a_bad_row_is_named_or_skipped_and_counted(
    model: Path, tmp_path: Path, objective: str, rows: list, bad: dict, reason: str
):
    rows = [*rows[:2], bad, *rows[2:]]
    with pytest.raises(PrefloopError, match=rf"^rows\.jsonl:3: .*{reason}.*--on-error skip leaves bad rows out"):
        train_rows(objective, model, tmp_path / "rows", rows)
    assert not (tmp_path / "rows").exists()
    fitted = train_rows(objective, model, tmp_path / "rows", rows, on_error="skip", num_steps=1)
    assert fitted.data["num_skipped"] == 1
    (listed,) = fitted.data["skipped"]
    assert listed.startswith("rows.jsonl:3: ") and reason in listed
    assert listed in (tmp_path / "rows" / "README.md").read_text()


@pytest.mark.parametrize("margin", ["NaN", "Infinity", "1e999"])
def test_a_margin_that_is_not_finite(model: Path, tmp_path: Path, margin: str):
    path = write_rows(tmp_path / "margins.jsonl", GOOD)
    path.write_text(path.read_text() + json.dumps({**GOOD[0], "margin": 0.5}).replace("0.5", margin) + "\n")
    with pytest.raises(PrefloopError, match=r"^margins\.jsonl:13: "):
        train_rows("reward", model, tmp_path / "out", data=[path])
    assert train_rows("reward", model, tmp_path / "out", data=[path], on_error="skip").data["num_skipped"] == 1


SYSTEM = "{% if messages[0].role == 'system' %}{{ messages[0].content }}{% endif -%}"
WITH_SYSTEM = {"messages": [{"role": "system", "content": "Be brief."}, *chat_rows(1)[0]["messages"]]}


@pytest.mark.parametrize(
    ("row", "dropped", "reason"),
    [
        (USED_A_TOOL, "<|tool|>{{ message.content }}<|end|>", r"drops .* message 2 \(role tool"),
        (WITH_SYSTEM, SYSTEM, r"drops .* message 0 \(role system"),
    ],
    ids=["tool", "system"],
)
def test_a_template_that_drops_a_role(model: Path, tmp_path: Path, row: dict, dropped: str, reason: str):
    other = with_template(model, tmp_path / "other", dropped, "")
    rows = [*chat_rows(4), row]
    with pytest.raises(PrefloopError, match=rf"^rows\.jsonl:5: .*{reason}"):
        train_rows("sft", other, tmp_path / "rows", rows)
    fitted = train_rows("sft", other, tmp_path / "rows", rows, on_error="skip", num_steps=1)
    assert fitted.data["num_skipped"] == 1 and fitted.data["train"]["num_examples"] == 4


def test_sides_that_are_equal_only_for_this_model(model: Path, tmp_path: Path):
    trims = with_template(
        model, tmp_path / "trims", "{{ message.content or '' }}", "{{ (message.content or '') | trim }}"
    )
    rows = [*GOOD, {**GOOD[0], "rejected": GOOD[0]["chosen"] + " "}]
    with pytest.raises(PrefloopError, match=r"^rows\.jsonl:13: both sides are the same for this model"):
        train_rows("dpo", trims, tmp_path / "rows", rows)


@pytest.mark.parametrize("label", [True, False])
def test_labels_of_one_class_only(model: Path, tmp_path: Path, label: bool):
    rows = [{**row, "label": label} for row in labelled_rows(6)]
    said = "true" if label else "false"
    with pytest.raises(PrefloopError, match=rf"all 6 rows, rows\.jsonl:1 to rows\.jsonl:6, have the label {said}"):
        train_rows("kto", model, tmp_path / "rows", rows, on_error="skip")


@pytest.mark.parametrize(
    ("number", "options", "reason"),
    [
        (12, {"batch_size": 1}, r"--batch-size 1: each step of the 12 rows, rows\.jsonl:1 to rows\.jsonl:12, would"),
        (17, {"kl": "rotation"}, r"--batch-size 8: of 17 rows, rows\.jsonl:1 to rows\.jsonl:17, the last step would"),
    ],
)
def test_a_step_of_one_row_is_seen_before_the_reference_is_read(
    model: Path, tmp_path: Path, number: int, options: dict, reason: str
):
    with pytest.raises(PrefloopError, match=rf"^{reason} have one row, and kto deals .* or set --kl none"):
        train_rows("kto", model, tmp_path / "rows", labelled_rows(number), **options)
    with Store(str(tmp_path / "rows.run" / "prefloop.db")) as store:
        assert not [event for run in store.runs() for event in store.events(run.id)]
    train_rows("kto", model, tmp_path / "none", labelled_rows(number), **{**options, "kl": "none"}, num_steps=1)


def test_rows_of_kto_that_all_have_one_prompt(model: Path, tmp_path: Path):
    rows = [{**row, "prompt": PROMPT} for row in labelled_rows(8)]
    with pytest.raises(PrefloopError, match=r"^all 8 rows, rows\.jsonl:1 to .*:8, have one prompt, .* set --kl none"):
        train_rows("kto", model, tmp_path / "rows", rows)
    train_rows("kto", model, tmp_path / "none", rows, kl="none", num_steps=1)


@pytest.mark.parametrize(("num_steps", "fails"), [(1, False), (2, False), (3, True), (5, True)])
def test_a_last_step_of_one_row_that_never_comes_is_no_mistake(
    model: Path, tmp_path: Path, num_steps: int, fails: bool
):
    with pytest.raises(PrefloopError, match="the last step would have one row") if fails else nullcontext():
        fitted = train_rows("kto", model, tmp_path / "rows", labelled_rows(17), num_steps=num_steps)
        assert fitted.train["steps"] == num_steps


def test_one_held_out_row_of_kto(model: Path, tmp_path: Path):
    held = write_rows(tmp_path / "held.jsonl", labelled_rows(1))
    with pytest.raises(PrefloopError, match=r"^held\.jsonl:1 is the only held-out row, and kto deals .* --kl none"):
        train_rows("kto", model, tmp_path / "rows", labelled_rows(12), eval_data=[held])
    fitted = train_rows("kto", model, tmp_path / "none", labelled_rows(12), eval_data=[held], kl="none", num_steps=1)
    assert fitted.data["held_out"]["num_examples"] == 1


@pytest.mark.parametrize("part", ["data", "eval_data"])
def test_several_turns_have_no_completion_that_kto_could_deal(model: Path, tmp_path: Path, part: str):
    call, answer, said = USED_A_TOOL["messages"][1:]
    several = {"prompt": USED_A_TOOL["messages"][:1], "completion": [call, answer, said], "label": True}
    good = write_rows(tmp_path / "good.jsonl", labelled_rows(12))
    mixed = write_rows(tmp_path / "mixed.jsonl", [*labelled_rows(12), several])
    files = {"data": [good], "eval_data": [good], part: [mixed]}
    reason = r"mixed\.jsonl:13: several turns make no sense after another task's prompt: set --kl none"
    with pytest.raises(PrefloopError, match=rf"^{reason} \(--on-error skip") as caught:
        train_rows("kto", model, tmp_path / "out", **files)
    assert "samples" not in str(caught.value)
    fitted = train_rows("kto", model, tmp_path / "out", **files, on_error="skip", num_steps=1)
    assert fitted.data["num_skipped"] == 1 and fitted.data["skipped"][0].startswith("mixed.jsonl:13: several turns")
    whole = train_rows("kto", model, tmp_path / "none", **files, kl="none", num_steps=1)
    assert whole.data["num_skipped"] == 0


def test_a_reference_with_another_tokenizer(model: Path, tmp_path: Path):
    other = with_template(model, tmp_path / "other", "<|user|>{{", "<|user|>Q: {{")
    with pytest.raises(PrefloopError, match=r"--reference .*other has another tokenizer or chat template than"):
        train_rows("dpo", model, tmp_path / "out", GOOD, reference=str(other))


# --- rows that are too long -------------------------------------------------------------------------------------


LONG = {**GOOD[0], "rejected": " ".join(["I do not know of Ann."] * 8)}


def test_rows_that_are_too_long_stop_are_left_out_or_cut(model: Path, tmp_path: Path):
    rows = [*GOOD, LONG]
    with pytest.raises(
        PrefloopError, match=r"^1 of 13 rows are longer than 40 tokens: rows\.jsonl:13 \(\d+ tokens\); --tr"
    ):
        train_rows("dpo", model, tmp_path / "rows", rows, max_length=40)

    heard = Heard()
    dropped = train_rows("dpo", model, tmp_path / "dropped", rows, max_length=40, truncate="drop", progress=heard)
    assert (dropped.data["train"]["num_dropped"], dropped.data["train"]["num_examples"]) == (1, 12)
    assert "1 of 13 training rows are too long and were left out" in heard.notes
    assert dropped.data["train"]["too_long"][0].startswith("dropped.jsonl:13 (")
    assert "too long: dropped.jsonl:13 (" in (tmp_path / "dropped" / "README.md").read_text()

    heard = Heard()
    cut = train_rows("dpo", model, tmp_path / "cut", rows, max_length=40, truncate="keep_start", progress=heard)
    counts = cut.data["train"]
    assert (counts["num_cut"], counts["num_dropped"], counts["num_examples"]) == (1, 0, 13)
    assert "1 of 13 training rows are too long: their ends were cut off" in heard.notes
    assert counts["longest"] > 40
    # What is cut is the end of the one long side: 40 tokens of it are left.
    assert counts["num_tokens"] == dropped.data["train"]["num_tokens"] + 40 + _length(model, GOOD[0])


def _length(model: Path, row: dict) -> int:
    text = f"<|user|>{row['prompt']}<|end|><|assistant|>{row['chosen']}<|end|>"
    return len(AutoTokenizer.from_pretrained(model)(text, add_special_tokens=False).input_ids)


def test_a_prompt_longer_than_the_budget(model: Path, tmp_path: Path):
    rows = [*GOOD, {**GOOD[0], "prompt": "Say something. " * 30}]
    options = {"max_length": 40, "truncate": "keep_start"}
    with pytest.raises(
        PrefloopError, match=r"^rows\.jsonl:13: its prompt has \d+ tokens: within 40 nothing of the comp"
    ):
        train_rows("dpo", model, tmp_path / "rows", rows, **options)
    fitted = train_rows("dpo", model, tmp_path / "rows", rows, **options, on_error="skip")
    assert (fitted.data["num_skipped"], fitted.data["train"]["num_cut"]) == (1, 0)


def test_only_rows_whose_prompt_is_too_long_are_bad_rows(model: Path, tmp_path: Path):
    rows = [*GOOD, {**GOOD[0], "prompt": "Say something. " * 30}]
    options = {"max_length": 40, "on_error": "skip"}
    fitted = train_rows("dpo", model, tmp_path / "rows", rows, **options)
    assert (fitted.data["num_skipped"], fitted.data["train"]["num_dropped"]) == (1, 0)
    assert fitted.data["skipped"][0].startswith("rows.jsonl:13: its prompt has ")
    assert fitted.data["train"]["num_examples"] == 12
    with pytest.raises(PrefloopError, match=r"^1 of 14 rows are longer than 40 tokens: both\.jsonl:14 \(\d+ tokens\);"):
        train_rows("dpo", model, tmp_path / "both", [*rows, LONG], **options)
    dropped = train_rows("dpo", model, tmp_path / "drop", [*rows, LONG], **options, truncate="drop", num_steps=1)
    assert (dropped.data["num_skipped"], dropped.data["train"]["num_dropped"]) == (0, 2)


def test_sides_that_are_equal_after_the_cut(model: Path, tmp_path: Path):
    rows = [*GOOD, {**LONG, "chosen": LONG["rejected"] + " Really."}]
    with pytest.raises(PrefloopError, match=r"^rows\.jsonl:13: both sides are the same in their first 40 tokens"):
        train_rows("dpo", model, tmp_path / "rows", rows, max_length=40, truncate="keep_start")


def test_steps_beyond_the_cut_are_left_out(model: Path, tmp_path: Path):
    row = {"prompt": PROMPT, "completions": ["I do not know."] * 12, "labels": [True] * 11 + [False]}
    whole, cut = (_prepared(model, tmp_path, [row], max_length=limit) for limit in (None, 20))
    assert (whole.num_cut, cut.num_cut) == (0, 1)
    (full,), (short,) = whole.examples, cut.examples
    assert len(full.steps) == 12 and full.steps[-1].label == 0.0
    assert short.steps == tuple(step for step in full.steps if step.token < len(short.paths[0].token))
    assert 0 < len(short.steps) < 12 and len(short.paths[0].token) == 20


def _prepared(model: Path, tmp_path: Path, rows: list, max_length: int | None) -> Prepared:
    file, skips = write_rows(tmp_path / "steps.jsonl", rows), Skips("stop")
    with Store(":memory:") as store:
        taken = rows_of_files(store, [DataFile(file, file.name, str(file))], "steps", skips, 0.0)
        steps = LabelledSteps({label.id: label for label in store.step_labels()})
        renderer = ChatRenderer(AutoTokenizer.from_pretrained(model))
        return prepare(taken, read_corpus(store, taken), renderer, LengthLimit(max_length, "keep_start"), skips, steps)


def test_the_models_own_context_is_the_limit(model: Path, tmp_path: Path):
    rows = [*GOOD, {**GOOD[0], "rejected": "I do not know. " * 200}]
    with pytest.raises(PrefloopError, match=r"1 of 13 rows are longer than 256 tokens"):
        train_rows("dpo", model, tmp_path / "rows", rows)
    with pytest.raises(PrefloopError, match=r"--max-length 300: .* reads 256 tokens at most"):
        train_rows("dpo", model, tmp_path / "rows", rows, max_length=300)


def test_nothing_that_is_left_is_an_error(model: Path, tmp_path: Path):
    with pytest.raises(PrefloopError, match=r"none of the 12 rows is left to train on: 0 were bad, 12 too long"):
        train_rows("dpo", model, tmp_path / "rows", GOOD, max_length=8, truncate="drop")


@pytest.mark.parametrize(("num_good", "counts"), [(0, "2 .* 2 were bad, 0 too"), (3, "5 .* 2 were bad, 3 too")])
def test_rows_that_could_not_be_imported_count_among_those_that_are_bad(
    model: Path, tmp_path: Path, num_good: int, counts: str
):
    bad = [{"prompt": 3, "completions": ["a"], "labels": [True]}, {"prompt": "a", "completions": ["a"], "labels": []}]
    for number, rows in enumerate([[*bad, *step_rows(num_good)], [*step_rows(num_good), *bad]]):
        with pytest.raises(PrefloopError, match=f"none of the {counts}"):
            train_rows(
                "process_reward", model, tmp_path / str(number), rows, on_error="skip", max_length=2, truncate="drop"
            )
