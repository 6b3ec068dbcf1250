import gzip
import json

import pytest

from prefloop.formats import import_file
from prefloop.formats.rows import Bundle
from prefloop.records import Judgement, Message, PrefloopError, Rater, RaterKind, Role, Split, Verdict, content_hash
from prefloop.store import Store

U, A = Role.USER, Role.ASSISTANT
SYSTEM = {"role": "system", "content": "Be brief."}
ASK = {"role": "user", "content": "What color is the sky?"}
BLUE = {"role": "assistant", "content": "It is blue."}
GREEN = {"role": "assistant", "content": "It is green."}
START = {"role": "user", "content": "The sky is"}
END = {"role": "assistant", "content": " blue."}
IMAGE = {"role": "assistant", "content": [{"type": "image_url", "image_url": "u"}]}
LEGACY = {"role": "assistant", "content": None, "function_call": {"name": "f"}}
TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}


def write(tmp_path, rows, name="rows.jsonl"):
    path = tmp_path / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def only(store):
    (trajectory,) = store.trajectories()
    (task,) = store.tasks().values()
    return task, trajectory


@pytest.mark.parametrize("row", [{"prompt": "The sky is"}, {"prompt": [ASK]}])
def test_prompt_only_rows_become_tasks_and_nothing_else(store, tmp_path, row):
    report = import_file(store, write(tmp_path, [row]))
    assert (report.num_tasks, report.num_trajectories) == (1, 0)
    (task,) = store.tasks().values()
    text = row["prompt"] if isinstance(row["prompt"], str) else ASK["content"]
    assert task.messages == (Message(U, text),)


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "The sky is", "completion": " blue."},
        {"prompt": [START], "completion": [END]},
        {"messages": [START, END]},
        {"conversations": [{"from": "human", "value": "The sky is"}, {"from": "gpt", "value": " blue."}]},
    ],
)  # fmt: skip
def test_a_prompt_with_its_completion_is_one_trajectory_in_every_spelling(store, tmp_path, row):
    import_file(store, write(tmp_path, [row]))
    task, trajectory = only(store)
    assert task.messages == (Message(U, "The sky is"),)
    assert trajectory.completion == (Message(A, " blue."),)
    assert trajectory.extra["line"] == 1 and trajectory.extra["file"] == "rows.jsonl"


def test_plain_texts_have_no_prompt_and_are_not_attempts_at_one_task(store, tmp_path):
    import_file(store, write(tmp_path, [{"text": "One."}, {"text": "Two."}]))
    found = store.trajectories()
    assert {t.messages for t in found} == {(Message(A, "One."),), (Message(A, "Two."),)}
    assert len({t.task_id for t in found}) == 2


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": [SYSTEM, ASK], "chosen": [BLUE], "rejected": [GREEN]},
        {"chosen": [SYSTEM, ASK, BLUE], "rejected": [SYSTEM, ASK, GREEN]},
    ],
)
def test_a_preference_is_a_comparison_of_two_attempts_at_one_task(store, tmp_path, row):
    rater = Rater(RaterKind.JUDGE, "ultra")
    import_file(store, write(tmp_path, [{**row, "margin": 2, "source": "x"}]), rater=rater)
    (task,) = store.tasks().values()
    assert [m.to_dict() for m in task.messages] == [SYSTEM, ASK]
    (vote,) = store.comparisons()
    chosen, rejected = store.trajectories([vote.trajectory_a, vote.trajectory_b])
    assert (chosen.completion, rejected.completion) == ((Message(A, "It is blue."),), (Message(A, "It is green."),))
    assert (vote.verdict, vote.strength, vote.rater_id) == (Verdict.A, 2.0, rater.id)
    assert chosen.extra["columns"] == {"source": "x"}


def test_a_preference_says_how_sure_it_is_and_whether_it_is_one(store, tmp_path):
    row = {"prompt": "p", "chosen": "a", "rejected": "b"}
    rows = [row, {**row, "probability": 0.75}, {**row, "tie": True}, {**row, "tie": False}, {**row, "margin": 1.5}]
    report = import_file(store, write(tmp_path, rows))
    assert (report.num_comparisons, report.num_known) == (4, 9)  # "tie": false says what its absence says
    found = {(c.verdict, c.probability, c.strength) for c in store.comparisons()}
    assert found == {
        (Verdict.A, None, None),
        (Verdict.A, 0.75, None),
        (Verdict.TIE, None, None),
        (Verdict.A, None, 1.5),
    }


def test_a_listener_hears_every_good_row_with_its_line_also_the_second_time(store, tmp_path):
    row = {"prompt": "p", "chosen": "a", "rejected": "b"}
    path = write(tmp_path, [row, {"nothing": 1}, row, {"prompt": "q", "completion": "c"}])
    heard: list[tuple[int, Bundle]] = []
    for _ in range(2):
        import_file(store, path, on_error="skip", on_row=lambda line, bundle: heard.append((line, bundle)))
    assert [line for line, _ in heard] == [1, 3, 4] * 2
    assert len(heard[0][1].comparisons) == 1 and heard[0][1].comparisons == heard[1][1].comparisons


def test_an_implicit_prompt_in_plain_text_is_found_as_trl_finds_it(store, tmp_path):
    # The example of TRL's `extract_prompt`: the last shared space goes to the completions.
    import_file(store, write(tmp_path, [{"chosen": "The sky is blue.", "rejected": "The sky is green."}]))
    (task,) = store.tasks().values()
    assert task.messages == (Message(U, "The sky is"),)
    assert {t.completion[0].content for t in store.trajectories()} == {" blue.", " green."}


def test_opposite_labels_of_one_completion_are_both_kept(store, tmp_path):
    row = {"prompt": "p", "completion": "c"}
    report = import_file(store, write(tmp_path, [{**row, "label": True}, {**row, "label": False}]))
    assert (report.num_trajectories, report.num_judgements, report.num_known) == (1, 2, 1)
    assert sorted(j.value for j in store.judgements()) == [0.0, 1.0]


def test_steps_are_spans_of_one_answer(store, tmp_path):
    row = {
        "prompt": "Which is larger?",
        "completions": ["9.8 is 9.80.", "9.11 is less.", "So 9.11."],
        "labels": [True, True, False],
    }
    report = import_file(store, write(tmp_path, [row]))
    assert report.num_step_labels == 3
    _, trajectory = only(store)
    text = trajectory.completion[0].content
    from prefloop.store import schema
    from prefloop.store.rows import step_label_from_row

    labels = [
        step_label_from_row(r) for r in store._all(schema.step_label.select().order_by(schema.step_label.c.span_start))
    ]
    assert [text[slice(*label.span)] for label in labels] == row["completions"]
    assert [label.label for label in labels] == [1.0, 1.0, 0.0]


@pytest.mark.parametrize("tools", [[TOOL], json.dumps([TOOL]), [json.dumps(TOOL)]])
def test_tools_are_read_as_a_list_or_as_json(store, tmp_path, tools):
    import_file(store, write(tmp_path, [{"prompt": [ASK], "tools": tools}]))
    (task,) = store.tasks().values()
    assert task.tools == (TOOL,)


def test_importing_twice_adds_nothing(store, tmp_path):
    rows = [{"prompt": [ASK], "chosen": [BLUE], "rejected": [GREEN]}, {"prompt": "p", "completion": "c", "label": True}]
    first = import_file(store, write(tmp_path, rows))
    before = store.counts()
    again = import_file(store, write(tmp_path, rows, "other_name.jsonl"))
    assert store.counts() == before
    assert (first.num_trajectories, again.num_trajectories, again.num_known) == (3, 0, 5)


def test_a_vote_the_other_way_is_another_comparison(store, tmp_path):
    rows = [
        {"prompt": [ASK], "chosen": [BLUE], "rejected": [GREEN]},
        {"prompt": [ASK], "chosen": [GREEN], "rejected": [BLUE]},
    ]
    assert import_file(store, write(tmp_path, rows)).num_comparisons == 2
    assert len(store.trajectories()) == 2


def calling(arguments):
    return {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": arguments}}]}


BAD_ROWS = [
    ({"prompt": "p", "chosen": "a"}, "rejected", "missing"),
    ({"prompt": "p", "chosen": "a", "rejected": "a"}, "rejected", "same"),
    ({"prompt": "p", "completion": "c", "label": "yes"}, "label", "true or false"),
    ({"messages": [{"content": "x"}]}, "messages[0]", "role"),
    ({"messages": [ASK]}, "messages", "assistant"),
    ({"messages": [ASK, IMAGE]}, "messages[1]", "image_url"),
    ({"messages": [ASK, LEGACY]}, "messages[1].function_call", "not supported"),
    ({"messages": [ASK, {**BLUE, "weight": 0}]}, "messages[1].weight", "not supported"),
    ({"messages": []}, "messages", "empty"),
    ({"prompt": "p", "tools": "{"}, "tools", "JSON"),
    ({"prompt": "p", "tools": 3}, "tools", "list"),
    ({"prompt": "p", "completions": ["a", "b"], "labels": [True]}, "labels", "2"),
    ({"prompt": "p", "chosen": "a", "rejected": "b", "margin": "big"}, "margin", "number"),
    ({"prompt": "p", "chosen": "a", "rejected": "b", "probability": 1.5}, "probability", "from 0 to 1"),
    ({"prompt": "p", "chosen": "a", "rejected": "b", "probability": 0.9, "tie": True}, "probability", "0.5"),
    ({"prompt": "p", "chosen": "a", "rejected": "b", "tie": "yes"}, "tie", "true or false"),
    ({"question": "?"}, "", "no known format"),
    ({"prompt": "nul \0"}, "", "NUL"),
    ({"prompt": "half \ud83d"}, "", "surrogate"),
    ({"messages": [ASK, calling('{"a": "\\ud800"}')]}, "messages[1].tool_calls", "surrogate"),
    ({"messages": [ASK, calling('{"a": NaN}')]}, "messages[1].tool_calls", "finite"),
    ([1, 2], "", "expected an object"),
]  # fmt: skip


@pytest.mark.parametrize(("row", "key", "reason"), BAD_ROWS)
def test_a_bad_row_is_named_and_the_good_ones_stay(store, tmp_path, row, key, reason):
    good = {"prompt": "fine", "completion": "yes"}
    path = write(tmp_path, [good, row, {**good, "completion": "also"}])
    report = import_file(store, path, format="trl", on_error="skip")
    (error,) = report.errors
    assert (error.file, error.line, error.key, report.num_skipped) == ("rows.jsonl", 2, key, 1)
    assert reason in error.reason
    assert len(store.trajectories()) == 2


def test_stop_keeps_nothing_of_the_file(store, tmp_path):
    rows = [{"prompt": f"p{i}", "completion": "c"} for i in range(2500)] + [{"prompt": 3}]
    with pytest.raises(PrefloopError, match=r"rows\.jsonl:2501: prompt: .*nothing of the file was imported"):
        import_file(store, write(tmp_path, rows))
    assert store.counts()["trajectory"] == store.counts()["task"] == 0


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"prompt": "a", "prompt": "b"}', "twice"),
        (b'{"prompt": "a", "x": NaN}', "NaN"),
        (b'{"prompt": "a", "x": -Infinity}', "Infinity"),
        (b'{"prompt": "a", "x": 1e999}', "too large"),
        (b'{"prompt": "a"', "JSON"),
        (b'{"prompt": "\xff"}', "UTF-8"),
        (b"[" * 1_000_000, "objects and lists"),
        (b"[" * 50_000, "deeper"),
        (b'{"prompt": "a", "x": ' + b"[" * 80 + b"]" * 80 + b"}", "deeper"),
        (b'{"prompt": "' + b"a" * (5 << 20) + b'"}', "larger than"),
    ],
)
def test_lines_that_are_not_good_json_are_named(store, tmp_path, line, reason):
    path = tmp_path / "lines.jsonl"
    path.write_bytes(b'{"prompt": "one"}\n' + line + b'\n{"prompt": "three"}\n')
    report = import_file(store, path, on_error="skip")
    assert [(e.line, reason in e.reason) for e in report.errors] == [(2, True)]
    assert {t.messages[0].content for t in store.tasks().values()} == {"one", "three"}


def test_bom_crlf_blank_lines_and_gzip_are_tolerated(store, tmp_path):
    text = b'\xef\xbb\xbf{"prompt": "one"}\r\n\r\n{"prompt": "two"}'
    (tmp_path / "plain.jsonl").write_bytes(text)
    (tmp_path / "packed.jsonl.gz").write_bytes(gzip.compress(text))
    assert import_file(store, tmp_path / "plain.jsonl").num_tasks == 2
    assert import_file(store, tmp_path / "packed.jsonl.gz").num_rows == 2
    assert {t.messages[0].content for t in store.tasks().values()} == {"one", "two"}


def test_a_json_list_is_read_with_the_lines_of_its_items(store, tmp_path):
    rows = [{"prompt": "x" * 70_000 + str(i)} for i in range(5)] + [{"prompt": 7}]
    (tmp_path / "rows.json").write_text(json.dumps(rows, indent=1), encoding="utf-8")
    report = import_file(store, tmp_path / "rows.json", on_error="skip")
    assert report.num_tasks == 5
    assert [e.line for e in report.errors] == [1 + 5 * 3 + 1]


def test_a_list_that_breaks_off_keeps_what_was_whole_only_when_told_to_skip(store, tmp_path):
    (tmp_path / "cut.json").write_text('[{"prompt": "one"}, {"prompt": "tw', encoding="utf-8")
    with pytest.raises(PrefloopError, match="cannot be read"):
        import_file(store, tmp_path / "cut.json")
    assert store.counts()["task"] == 0
    report = import_file(store, tmp_path / "cut.json", on_error="skip")
    assert (report.num_tasks, report.num_skipped) == (1, 1)


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("empty.jsonl", b"", "no rows"),
        ("broken.gz", b"\x1f\x8b\x08\x00nonsense", "cannot be read"),
        ("broken.parquet", b"PAR1nonsense", "Parquet"),
    ],
)
def test_unreadable_files_are_one_clear_error(store, tmp_path, name, content, reason):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(PrefloopError, match=reason):
        import_file(store, tmp_path / name, on_error="skip")


def test_a_missing_file_a_folder_and_an_unknown_format(store, tmp_path):
    with pytest.raises(PrefloopError, match="there is no file"):
        import_file(store, tmp_path / "nowhere.jsonl")
    with pytest.raises(PrefloopError, match="not a file"):
        import_file(store, tmp_path)
    with pytest.raises(PrefloopError, match="tau-bench"):
        import_file(store, tmp_path / "x", format="tau")


def test_held_out_prompts_are_a_share_and_stay_where_they_are(store, tmp_path):
    rows = [{"prompt": f"Question {i}?"} for i in range(2000)]
    import_file(store, write(tmp_path, rows), held_out=0.25)
    held_out = store.tasks(split=Split.HELD_OUT)
    # 2000 draws at 0.25 have a standard deviation of 19.4.
    assert abs(len(held_out) - 500) < 4 * 19.4
    twin = write(tmp_path, [{"prompt": "  QUESTION 7 "}], "twin.jsonl")
    import_file(store, twin, held_out=0.25)
    by_text = {t.messages[0].content: t for t in store.tasks().values()}
    assert by_text["  QUESTION 7 "].split is by_text["Question 7?"].split
    assert by_text["  QUESTION 7 "].cluster == by_text["Question 7?"].cluster


def test_a_store_that_fails_is_not_a_bad_row(store, tmp_path, monkeypatch):
    def full(_):
        raise PrefloopError("the disk is full")

    monkeypatch.setattr(store, "add_trajectories", full)
    with pytest.raises(PrefloopError, match=r"^the disk is full$"):
        import_file(store, write(tmp_path, [{"prompt": "p", "completion": "c"}]), on_error="skip")
    assert store.counts()["task"] == 0


def test_ids_do_not_depend_on_the_file(store, tmp_path):
    import_file(store, write(tmp_path, [{"prompt": "p", "completion": "c", "label": 1}]))
    task, trajectory = only(store)
    said = [{"role": "assistant", "content": "c"}]
    assert trajectory.id == content_hash("import", task.id, said, None)
    (judgement,) = store.judgements()
    assert isinstance(judgement, Judgement) and judgement.score == 1.0


# --- thumbs -----------------------------------------------------------------------------------------------------


def thumbed(answer: str, **said: object) -> dict:
    asked = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]
    asked += [{"role": "user", "content": "2 + 2?"}]
    called = {"id": "c0", "type": "function", "function": {"name": "add", "arguments": "{}"}}
    asked += [{"role": "assistant", "content": "", "tool_calls": [called]}]
    asked += [{"role": "tool", "content": "4", "tool_call_id": "c0"}]
    return {"messages": [*asked, {"role": "assistant", "content": answer}], **said}


@pytest.mark.parametrize(
    ("said", "value"), [({"thumb": "up"}, 1.0), ({"thumb": "down"}, 0.0), ({"label": True}, 1.0), ({"label": 0}, 0.0)]
)
def test_a_thumb_is_of_the_answer_to_the_last_question(said, value, tmp_path):
    (tmp_path / "logs.jsonl").write_text(json.dumps(thumbed("4", **said)) + "\n")
    with Store(":memory:") as store:
        import_file(store, tmp_path / "logs.jsonl")
        (trajectory,), (judgement,) = store.trajectories(), store.judgements()
    assert trajectory.num_prompt_messages == 3 and len(trajectory.completion) == 3
    assert (judgement.trajectory_id, judgement.value, judgement.score) == (trajectory.id, value, value)


def test_without_a_thumb_a_chat_begins_at_its_first_answer(tmp_path):
    (tmp_path / "logs.jsonl").write_text(json.dumps(thumbed("4", thumb=None)) + "\n")
    with Store(":memory:") as store:
        import_file(store, tmp_path / "logs.jsonl")
        assert store.trajectories()[0].num_prompt_messages == 1 and not store.judgements()


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"thumb": "sideways"}, r'thumb: expected "up" or "down", found "sideways"'),
        ({"thumb": True}, r'thumb: expected "up" or "down", found true'),
        ({"thumb": "up", "label": True}, "thumb: there is a 'label', too: give one of them"),
        ({"label": "good"}, "label: expected true or false"),
    ],
)
def test_thumbs_that_say_nothing(said, message, tmp_path):
    (tmp_path / "logs.jsonl").write_text(json.dumps(thumbed("4", **said)) + "\n")
    with Store(":memory:") as store, pytest.raises(PrefloopError, match=message):
        import_file(store, tmp_path / "logs.jsonl")
