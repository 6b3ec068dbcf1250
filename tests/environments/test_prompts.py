import json

import pytest

from prefloop.environments.prompts import Prompts, PromptsSettings
from prefloop.formats import import_file
from prefloop.records import Message, PrefloopError, Role, Split
from prefloop.store import Store


def environment(tmp_path, rows, **settings):
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return Prompts(PromptsSettings(path=str(path), **settings))


def test_prompts_of_any_spelling_become_single_turn_tasks(tmp_path):
    tool = {"type": "function", "function": {"name": "f", "parameters": {}}}
    chat = {"prompt": [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}], "tools": [tool]}
    rows = [
        {"prompt": "plain"},
        chat,
        {"messages": [{"role": "user", "content": "m"}, {"role": "assistant", "content": "a"}]},
    ]
    tasks = environment(tmp_path, rows, held_out=1e-9).tasks(Split.TRAIN, 3)
    assert [[m.content for m in task.messages] for task in tasks] == [["plain"], ["s", "u"], ["m"]]
    assert tasks[1].tools == (tool,)


def test_an_episode_is_one_answer_with_nothing_verified(tmp_path):
    prompts = environment(tmp_path, [{"prompt": "Say hi."}], held_out=1e-9)
    (task,) = prompts.tasks(Split.TRAIN, 1)
    episode = prompts.reset(task, seed=3)
    assert episode.messages == (Message(Role.USER, "Say hi."),) and prompts.max_turns == 1
    step = episode.step(Message(Role.ASSISTANT, "hi"))
    assert step.done and step.messages == () and episode.outcome() is None
    with pytest.raises(PrefloopError, match="twice"):
        episode.step(Message(Role.ASSISTANT, "again"))


def test_splits_are_disjoint_stable_and_keep_near_duplicates_together(tmp_path):
    rows = [{"prompt": f"Question {i}?"} for i in range(1000)] + [{"prompt": f"question  {i}"} for i in range(1000)]
    prompts = environment(tmp_path, rows, held_out=0.2)
    found = {split: prompts._by_split[split] for split in Split}
    assert sum(map(len, found.values())) == 2000
    # 1000 clusters at 0.2 have a standard deviation of 12.6, and each cluster has two prompts.
    assert abs(len(found[Split.HELD_OUT]) - 400) < 2 * 4 * 12.6
    clusters = {split: {task.cluster for task in tasks} for split, tasks in found.items()}
    assert not clusters[Split.TRAIN] & clusters[Split.HELD_OUT]
    fewer = environment(tmp_path, rows[100:200], held_out=0.2)
    kept = {task.id: task.split for tasks in found.values() for task in tasks}
    assert all(kept[task.id] is split for split in Split for task in fewer._by_split[split])


def test_tasks_go_on_where_they_left_off_and_too_few_is_an_error(tmp_path):
    prompts = environment(tmp_path, [{"prompt": f"p{i}"} for i in range(50)])
    train = len(prompts._by_split[Split.TRAIN])
    assert [*prompts.tasks(Split.TRAIN, 5), *prompts.tasks(Split.TRAIN, 5, first=5)] == prompts.tasks(Split.TRAIN, 10)
    with pytest.raises(PrefloopError, match=f"holds {train} train prompts, {train + 1} were asked for"):
        prompts.tasks(Split.TRAIN, train + 1)


def test_a_task_is_the_one_that_importing_its_prompt_makes(tmp_path):
    prompts = environment(tmp_path, [{"prompt": "Say hi."}], held_out=1e-9)
    answered = tmp_path / "answered.jsonl"
    answered.write_text(json.dumps({"prompt": "Say hi.", "completion": "hi"}), encoding="utf-8")
    with Store(str(tmp_path / "store.db")) as store:
        import_file(store, answered)
        assert set(store.tasks()) == {prompts.tasks(Split.TRAIN, 1)[0].id}


@pytest.mark.parametrize(
    ("row", "reason"), [({"text": "no prompt"}, "no prompt"), ({"prompt": 4}, "prompt"), ([], "object")]
)
def test_a_bad_row_is_named(tmp_path, row, reason):
    with pytest.raises(PrefloopError, match=rf"prompts\.jsonl:2: .*{reason}"):
        environment(tmp_path, [{"prompt": "good"}, row]).tasks(Split.TRAIN, 1)
