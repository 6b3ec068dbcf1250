import math
from collections import Counter
from itertools import combinations

import pytest

from prefloop.feedback.queue import (
    MAX_GROUP,
    QueueSettings,
    build_queue,
    comparable,
    find_judge,
    mean_scores,
    pair_id,
    select_pairs,
    uncertainty,
)
from prefloop.records import (
    AuthorKind,
    Ended,
    Judgement,
    Message,
    PrefloopError,
    Rater,
    RaterKind,
    Role,
    Split,
    Status,
    Task,
    ToolCall,
    Trajectory,
)
from prefloop.store import Store

TASK = Task("prompt", messages=(Message(Role.USER, "Hello"),))


def said(name, *messages, task=TASK, run_id=""):
    return Trajectory(
        name, task.id, (*task.messages, *messages), 1, Ended.DONE, AuthorKind.IMPORT, "someone", run_id=run_id
    )


def reply(name, text, **options):
    return said(name, Message(Role.ASSISTANT, text), **options)


@pytest.fixture
def store(tmp_path):
    with Store(str(tmp_path / "store.db")) as store:
        store.add_tasks([TASK])
        yield store


def score(store, rater, **scores):
    store.add_raters([rater])
    store.add_judgements(Judgement(name, rater.id, Status.OK, value, value) for name, value in scores.items())


def test_only_different_trajectories_of_one_task_are_compared():
    other = Task("prompt", messages=(Message(Role.USER, "Bye"),))
    groups = comparable(
        [
            reply("c", "one"),
            reply("a", "two"),
            reply("b", "one"),  # as c
            said("d"),  # says nothing
            reply("e", "three", task=other),  # alone in its task
        ]
    )
    assert groups == {TASK.id: ["a", "b"]}


def test_ids_of_tool_calls_do_not_make_a_difference():
    def calling(name, call_id, city):
        call = Message(Role.ASSISTANT, tool_calls=(ToolCall("search", {"city": city}, call_id),))
        return said(name, call, Message(Role.TOOL, "none", tool_call_id=call_id, name="search"))

    groups = comparable([calling("a", "1", "Tokyo"), calling("b", "2", "Tokyo"), calling("c", "1", "Osaka")])
    assert groups == {TASK.id: ["a", "c"]}


def test_every_pair_is_drawn_once_and_all_tasks_come_early():
    groups = {f"task{i}": [f"{i}-{j}" for j in range(4)] for i in range(5)}
    pairs = select_pairs(groups, {}, explore=0.25, num_pairs=100, seed=0)
    assert {(p.a, p.b) for p in pairs} == {pair for ids in groups.values() for pair in combinations(ids, 2)}
    assert len(pairs) == 30
    for start in range(0, 30, 5):
        assert len({p.task_id for p in pairs[start : start + 5]}) == 5
    assert select_pairs(groups, {}, explore=0.25, num_pairs=7, seed=0) == pairs[:7]


def test_the_queue_depends_on_the_seed_alone():
    groups = {f"task{i}": [f"{i}-{j}" for j in range(4)] for i in range(5)}
    backwards = {task: ids[::-1] for task, ids in reversed(groups.items())}
    options = {"scores": {"0-0": 0.3, "0-1": 0.9}, "explore": 0.25, "num_pairs": 20}
    assert select_pairs(groups, seed=1, **options) == select_pairs(backwards, seed=1, **options)
    assert select_pairs(groups, seed=1, **options) != select_pairs(groups, seed=2, **options)


def test_the_propensity_is_the_frequency_of_the_draw():
    groups = {"t": ["a", "b", "c"]}
    scores = {"a": 0.5, "b": 0.52, "c": 0.9}
    num = 3000
    first = [select_pairs(groups, scores, explore=0.25, num_pairs=1, seed=seed)[0] for seed in range(num)]
    counts = Counter((p.a, p.b) for p in first)
    propensity = {(p.a, p.b): p.propensity for p in first}
    assert sum(propensity.values()) == pytest.approx(1.0)
    for pair, expected in propensity.items():
        deviation = math.sqrt(expected * (1 - expected) / num)
        assert counts[pair] / num == pytest.approx(expected, abs=4 * deviation)
    weights = [uncertainty(0.02), uncertainty(0.4), uncertainty(0.38)]
    assert propensity["a", "b"] == pytest.approx(0.25 / 3 + 0.75 * weights[0] / sum(weights))


def test_propensities_make_estimates_unbiased():
    """The mean over all pairs, estimated from draws weighted as Farquhar et al. (2021, equation 11) say."""
    groups = {"t": [f"{i}" for i in range(6)]}
    scores = {f"{i}": i / 5 for i in range(6)}
    truth = {pair: float(int(pair[0]) * 7 % 5 + int(pair[1])) for pair in combinations(groups["t"], 2)}
    n, m = len(truth), 6

    def estimate(seed):
        total = 0.0
        for i, p in enumerate(select_pairs(groups, scores, explore=0.25, num_pairs=m, seed=seed), start=1):
            weight = 1 + (n - m) / (n - i) * (1 / ((n - i + 1) * p.propensity) - 1)
            total += weight * truth[p.a, p.b]
        return total / m

    estimates = [estimate(seed) for seed in range(3000)]
    mean = sum(estimates) / len(estimates)
    error = math.sqrt(sum((e - mean) ** 2 for e in estimates) / len(estimates) ** 2)
    plain = [
        truth[p.a, p.b] for s in range(3000) for p in select_pairs(groups, scores, explore=0.25, num_pairs=m, seed=s)
    ]
    expected = sum(truth.values()) / n
    assert mean == pytest.approx(expected, abs=4 * error)
    assert abs(sum(plain) / len(plain) - expected) > 4 * error  # without the weights it would be wrong


def test_near_ties_are_asked_most():
    groups = {"t": [f"{i}" for i in range(5)]}
    scores = {"0": 0.1, "1": 0.11, "2": 0.5, "3": 0.8, "4": 1.0}
    first = [select_pairs(groups, scores, explore=0.25, num_pairs=1, seed=seed)[0] for seed in range(300)]
    share = sum((p.a, p.b) == ("0", "1") for p in first) / 300
    assert share > 0.3  # a tenth if they were drawn alike
    assert len({(p.a, p.b) for p in first}) == 10


def test_uncertainty():
    assert uncertainty(0.0) == 1.0
    assert uncertainty(None) == 1.0
    assert uncertainty(0.1) == pytest.approx(4 * 0.7310586 * 0.2689414)
    assert uncertainty(-1.0) == uncertainty(1.0) > 0.0


def test_large_groups_are_thinned_and_say_so():
    ids = [f"{i:03d}" for i in range(100)]
    pairs = select_pairs({"t": ids}, {}, explore=1.0, num_pairs=10_000, seed=0)
    assert len(pairs) == MAX_GROUP * (MAX_GROUP - 1) // 2
    assert pairs[0].propensity == pytest.approx(1 / (100 * 99 / 2))


def test_the_queue_of_one_run(store):
    store.add_run("r1", "one", "runs/one", {})
    store.add_trajectories([reply("a", "x", run_id="r1"), reply("b", "y", run_id="r1"), reply("c", "z")])
    assert [(p.a, p.b) for p in build_queue(store, QueueSettings(run_id="r1"))] == [("a", "b")]
    assert len(build_queue(store, QueueSettings())) == 3
    with pytest.raises(PrefloopError, match="no run nope"):
        build_queue(store, QueueSettings(run_id="nope"))


def test_the_judge_with_most_scores_is_used(store):
    store.add_trajectories([reply("a", "x"), reply("b", "y"), reply("c", "z")])
    human, few, many = (
        Rater(RaterKind.HUMAN, "ann"),
        Rater(RaterKind.JUDGE, "few"),
        Rater(RaterKind.REWARD_MODEL, "many"),
    )
    assert find_judge(store, "", ["a", "b", "c"]) is None
    score(store, human, a=1.0, b=0.0, c=0.0)
    score(store, few, a=1.0)
    assert find_judge(store, "", ["a", "b", "c"]) == few
    score(store, many, a=1.0, b=0.5)
    assert find_judge(store, "", ["a", "b", "c"]) == many
    assert find_judge(store, "few", []) == few
    assert find_judge(store, many.id, []) == many
    with pytest.raises(PrefloopError, match=r"no rater 'fw'.*known raters: ann, few, many"):
        find_judge(store, "fw", [])
    store.add_raters([Rater(RaterKind.JUDGE, "few", {"version": 2})])
    with pytest.raises(PrefloopError, match="several raters"):
        find_judge(store, "few", [])


def test_failed_judgements_are_not_scores(store):
    judge = Rater(RaterKind.JUDGE, "judge")
    store.add_trajectories([reply("a", "x"), reply("b", "y")])
    score(store, judge, a=0.25)
    store.add_judgements(
        [
            Judgement("a", judge.id, Status.OK, 0.75, 0.75, replicate=1),
            Judgement("a", judge.id, Status.TIMEOUT, replicate=2),
            Judgement("b", judge.id, Status.REFUSED),
        ]
    )
    assert mean_scores(store, judge.id, ["a", "b"]) == {"a": 0.5}


def test_a_pair_has_one_id_in_either_order():
    assert pair_id("a", "b") == pair_id("b", "a") != pair_id("a", "c")


def test_nobody_is_asked_about_held_out_tasks(store):
    held_out = Task("prompt", messages=(Message(Role.USER, "Later"),), split=Split.HELD_OUT)
    store.add_tasks([held_out])
    for task in (TASK, held_out):
        store.add_trajectories(reply(f"{task.id[:4]}-{text}", text, task=task) for text in ("yes", "no"))
    assert [pair.task_id for pair in build_queue(store, QueueSettings())] == [TASK.id]
