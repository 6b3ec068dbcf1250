import json
import os
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from prefloop.formats import export_dataset, export_trajectories, import_file
from prefloop.records import (
    AuthorKind,
    Dataset,
    Ended,
    Labelled,
    Message,
    Pair,
    PrefloopError,
    Role,
    Task,
    Thread,
    ToolCall,
    Trajectory,
    content_hash,
)
from prefloop.store import Store

PARAMETERS = {"type": "object", "properties": {"a": {"type": "integer"}}}
TOOLS = ({"type": "function", "function": {"name": "f", "parameters": PARAMETERS}},)
ASK = Message(Role.USER, "Do it.")
SEARCH = Message(Role.ASSISTANT, tool_calls=(ToolCall("search", {"city": "Oslo"}, "c1"),))
FOUND = Message(Role.TOOL, "2 flights", tool_call_id="c1", name="search")
BOOK = Message(Role.ASSISTANT, tool_calls=(ToolCall("book", {"id": 7, "seat": {"row": 1}}, "c2"),))
BOOK_TEXT = Message(Role.ASSISTANT, tool_calls=(ToolCall("book", {"id": "seven"}),))
BROKEN = Message(Role.ASSISTANT, tool_calls=(ToolCall("book", "{not json"),))
DONE = Message(Role.ASSISTANT, "Done.", reasoning_content="It is booked.")


def add(store, *completions, prompt=(ASK,), tools=TOOLS):
    task = Task("test", messages=prompt, tools=tools)
    store.add_tasks([task])
    made = [
        Trajectory(
            content_hash(task.id, str(completion)),
            task.id,
            (*prompt, *completion),
            len(prompt),
            Ended.DONE,
            AuthorKind.HUMAN,
            "h",
        )
        for i, completion in enumerate(completions)
    ]
    store.add_trajectories(made)
    return made


def lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def said(trajectory):
    return [message.to_dict() for message in trajectory.messages]


def test_the_prompt_of_a_pair_is_the_shared_beginning(store, tmp_path):
    a, b = add(store, (SEARCH, FOUND, BOOK), (SEARCH, FOUND, DONE))
    assert export_dataset(store, [Pair(a.task_id, a.id, b.id)], tmp_path / "p.jsonl") == 1
    (row,) = lines(tmp_path / "p.jsonl")
    assert [m["role"] for m in row["prompt"]] == ["user", "assistant", "tool"]
    assert row["chosen"][0]["tool_calls"][0]["function"] == {
        "name": "book",
        "arguments": '{"id": 7, "seat": {"row": 1}}',
    }
    assert row["rejected"] == [DONE.to_dict()]
    assert json.loads(row["tools"]) == list(TOOLS)


def test_each_side_keeps_a_message_where_one_begins_the_other(store, tmp_path):
    a, b = add(store, (SEARCH, FOUND, DONE), (SEARCH, FOUND))
    export_dataset(store, [Pair(a.task_id, a.id, b.id)], tmp_path / "p.jsonl")
    (row,) = lines(tmp_path / "p.jsonl")
    assert (len(row["prompt"]), len(row["chosen"]), len(row["rejected"])) == (2, 2, 1)


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
@pytest.mark.parametrize("format_name", ["trl-preference", "trl-unpaired"])
def test_export_then_import_gives_the_same_messages(store, tmp_path, suffix, format_name):
    trajectories = add(store, (SEARCH, FOUND, BOOK), (SEARCH, FOUND, BOOK_TEXT), (BROKEN,), (DONE,))
    pairs = [Pair(trajectories[0].task_id, trajectories[i].id, trajectories[i + 1].id) for i in (0, 2)]
    path = tmp_path / f"p.{suffix}"
    export_dataset(store, Dataset({}, tuple(pairs)), path, format=format_name)
    with Store(str(tmp_path / "second.db")) as second:
        report = import_file(second, path)
        assert report.num_skipped == 0
        assert report.num_comparisons == (2 if format_name == "trl-preference" else 0)
        assert report.num_judgements == (0 if format_name == "trl-preference" else 4)
        back = second.trajectories()
        assert [task.tools for task in second.tasks().values()] == [TOOLS] * report.num_tasks
    assert sorted(map(said, back), key=str) == sorted(map(said, trajectories), key=str)


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_chats_survive_export_and_import(store, tmp_path, suffix):
    trajectories = add(store, (SEARCH, FOUND, BOOK, DONE), (DONE,))
    path = tmp_path / f"chats.{suffix}"
    assert export_trajectories(store, [t.id for t in trajectories], path) == 2
    with Store(str(tmp_path / "second.db")) as second:
        import_file(second, path, format="openai-chat")
        back = second.trajectories()
        (task,) = second.tasks().values()
    assert task.tools == TOOLS and task.messages == (ASK,)
    assert sorted(map(said, back), key=str) == sorted(map(said, trajectories), key=str)


def test_a_parquet_file_has_only_the_fields_that_occur(store, tmp_path):
    import pyarrow.parquet as parquet

    a, b = add(store, (Message(Role.ASSISTANT, "x"),), (Message(Role.ASSISTANT, "y"),), tools=())
    export_dataset(store, [Pair(a.task_id, a.id, b.id)], tmp_path / "p.parquet")
    schema = parquet.read_schema(tmp_path / "p.parquet")
    assert schema.names == ["prompt", "chosen", "rejected"]
    assert [field.name for field in schema.field("chosen").type.value_type] == ["role", "content"]


TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=60)
JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(prompt=TEXT, texts=st.tuples(TEXT, TEXT), arguments=st.dictionaries(TEXT, JSON, max_size=3))
@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_any_text_comes_back_as_it_was(store, tmp_path, suffix, prompt, texts, arguments):
    texts = (texts[0], texts[1] + "!") if texts[0] == texts[1] else texts
    calls = (ToolCall("f", arguments),)
    answers = [Message(Role.ASSISTANT, text, tool_calls=calls) for text in texts]
    chosen, rejected = add(store, *((answer,) for answer in answers), prompt=(Message(Role.USER, prompt),), tools=())
    path = tmp_path / f"any.{suffix}"
    export_dataset(store, [Pair(chosen.task_id, chosen.id, rejected.id)], path, force=True)
    report = import_file(store, path)
    assert report.num_skipped == 0
    task = Task("prompts", messages=(Message(Role.USER, prompt),))
    back = [t.completion for t in store.trajectories(author_kind=AuthorKind.IMPORT) if t.task_id == task.id]
    assert all((answer,) in back for answer in answers)


def test_an_existing_file_is_kept_unless_forced_and_a_failure_leaves_none(store, tmp_path):
    a, b, c = add(store, (DONE,), (SEARCH,), (DONE,))
    path = tmp_path / "out" / "p.jsonl"
    pair = Pair(a.task_id, a.id, b.id)
    export_dataset(store, [pair], path)
    before = path.read_bytes()
    with pytest.raises(PrefloopError, match="--force"):
        export_dataset(store, [pair, pair], path)
    assert path.read_bytes() == before
    export_dataset(store, [pair, pair], path, force=True)
    assert len(lines(path)) == 2
    with pytest.raises(PrefloopError, match="say the same"):
        export_dataset(store, [pair, Pair(a.task_id, a.id, c.id)], path, force=True)
    assert len(lines(path)) == 2
    assert os.listdir(path.parent) == ["p.jsonl"]


def test_what_cannot_be_exported_says_so(store, tmp_path):
    a, b = add(store, (DONE,), (SEARCH,))
    path = tmp_path / "p.jsonl"
    with pytest.raises(PrefloopError, match="empty"):
        export_dataset(store, [], path)
    with pytest.raises(PrefloopError, match="nobody is not in"):
        export_dataset(store, [Pair(a.task_id, a.id, "nobody")], path)
    with pytest.raises(PrefloopError, match="trl-preference"):
        export_dataset(store, [Pair(a.task_id, a.id, b.id)], path, format="trl")
    with pytest.raises(PrefloopError, match="openai-chat"):
        export_dataset(store, Dataset({}, trajectory_ids=(a.id,)), path)
    store.erase(b.id)
    with pytest.raises(PrefloopError, match="erased"):
        export_dataset(store, [Pair(a.task_id, a.id, b.id)], path)
    assert not path.exists()


def test_an_agents_conversations_are_rows_of_chats_and_no_rows_of_preferences(store, tmp_path):
    (plain,) = add(store, (DONE,))
    other = ({"type": "function", "function": {"name": "g"}},)
    threads = (Thread(0, 2, 1, TOOLS), Thread(2, 4, 1, other))
    agent = replace(plain, id="agent", messages=(ASK, SEARCH, ASK, BOOK), threads=threads)
    store.add_trajectories([agent])
    assert export_trajectories(store, ["agent"], tmp_path / "c.jsonl") == 2
    first, second = lines(tmp_path / "c.jsonl")
    assert [m["role"] for m in first["messages"]] == ["user", "assistant"]
    assert json.loads(first["tools"]) == list(TOOLS) and json.loads(second["tools"]) == list(other)
    assert second["messages"][1]["tool_calls"][0]["function"]["name"] == "book"
    with pytest.raises(PrefloopError, match=r"trajectory agent holds 2 conversations.* openai-chat"):
        export_dataset(store, [Pair(plain.task_id, "agent", plain.id)], tmp_path / "p.jsonl")


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_labelled_trajectories_are_exported_with_their_labels(store, tmp_path, suffix):
    a, b, c = add(store, (DONE,), (SEARCH, FOUND, DONE), (BOOK,))
    labelled = (Labelled(b.id, False), Labelled(a.id, True), Labelled(c.id, True))
    dataset = store.add_dataset(Dataset({"of": "labelled"}, labelled=labelled))
    path = tmp_path / f"l.{suffix}"
    assert export_dataset(store, dataset, path, format="trl-unpaired") == 3
    if suffix == "jsonl":
        rows = lines(path)
        assert [row["label"] for row in rows] == [False, True, True]
        assert [[m["role"] for m in row["prompt"]] for row in rows] == [["user"]] * 3
        assert [len(row["completion"]) for row in rows] == [3, 1, 1]
        assert rows[1]["completion"] == [DONE.to_dict()] and json.loads(rows[0]["tools"]) == list(TOOLS)
    with Store(str(tmp_path / "other.db")) as other:
        import_file(other, path)
        said_of = {str(said(t)): t.id for t in other.trajectories()}
        scores = {judgement.trajectory_id: judgement.score for judgement in other.judgements()}
        assert [scores[said_of[str(said(t))]] for t in (a, b, c)] == [1.0, 0.0, 1.0]


def test_labels_are_refused_where_a_format_cannot_say_them(store, tmp_path):
    (a,) = add(store, (DONE,))
    dataset = store.add_dataset(Dataset({"of": "labelled"}, labelled=(Labelled(a.id, True),)))
    steps = store.add_dataset(Dataset({"of": "steps"}, labelled=(Labelled(a.id, None),)))
    for name in ("trl-preference", "openai-chat"):
        with pytest.raises(PrefloopError, match=rf"holds labelled .* cannot be {name}: use the format trl-unpaired"):
            export_dataset(store, dataset, tmp_path / "x.jsonl", format=name)
    for name in ("trl-unpaired", "openai-chat"):
        with pytest.raises(PrefloopError, match=f"labels of steps, so it cannot be {name}"):
            export_dataset(store, steps, tmp_path / "x.jsonl", format=name)
    assert not (tmp_path / "x.jsonl").exists()


def test_a_dataset_is_exported_by_its_id_and_demonstrations_as_chats(store, tmp_path):
    a, b = add(store, (DONE,), (SEARCH,))
    pairs = store.add_dataset(Dataset({"kind": "pairs"}, (Pair(a.task_id, a.id, b.id),)))
    demonstrations = store.add_dataset(Dataset({"kind": "top"}, trajectory_ids=(b.id, a.id)))
    assert export_dataset(store, pairs, tmp_path / "p.jsonl") == 1
    assert export_dataset(store, pairs, tmp_path / "c.jsonl", format="openai-chat") == 1
    assert export_dataset(store, demonstrations, tmp_path / "d.jsonl", format="openai-chat") == 2
    assert [row["messages"][-1]["role"] for row in lines(tmp_path / "d.jsonl")] == ["assistant", "assistant"]
    assert lines(tmp_path / "c.jsonl")[0]["messages"][-1] == DONE.to_dict()
