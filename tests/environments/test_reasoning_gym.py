import subprocess
import sys
import threading

import pytest

from prefloop.environments.guarded import EpisodeFailedError, GuardedEpisode
from prefloop.environments.reasoning_gym import INSTRUCTION, ReasoningGym, ReasoningGymSettings
from prefloop.records import Ended, Message, PrefloopError, Role, Split, Task

DATASETS = (
    "basic_arithmetic", "leg_counting", "chain_sum", "gcd", "lcm", "spell_backward", "word_sorting", "base_conversion",
    "caesar_cipher", "simple_equations", "countdown", "number_sorting", "maze", "knights_knaves",
    "family_relationships",
)  # fmt: skip

pytestmark = [pytest.mark.slow, pytest.mark.adapter]


@pytest.fixture(scope="module", autouse=True)
def _package():
    pytest.importorskip("reasoning_gym")


def make(dataset="chain_sum", **settings):
    return ReasoningGym(ReasoningGymSettings(dataset=dataset, **settings))


def answer(gym, task, text):
    episode = gym.reset(task, seed=0)
    assert episode.step(Message(Role.ASSISTANT, text)).done
    return episode.outcome()


def own_answer(gym, task):
    return gym._entry(task.specification["index"])["answer"]


@pytest.mark.parametrize("dataset", DATASETS)
@pytest.mark.parametrize("split", list(Split))
def test_own_answers_score_one_and_nonsense_does_not(dataset, split):
    gym = make(dataset, seed=7)
    for task in gym.tasks(split, 2):
        right = answer(gym, task, f"Let me think. <answer>{own_answer(gym, task)}</answer>")
        assert (right.value, right.score, right.success, right.metrics["tagged"]) == (1.0, 1.0, True, 1.0)
        assert not answer(gym, task, "<answer>I do not know</answer>").success


def test_own_answers_score_one_in_every_dataset_that_has_them():
    from reasoning_gym.factory import DATASETS as ALL

    without = {"boxnet", "graph_color", "propositional_logic", "rubiks_cube", "rush_hour"}  # many answers are right
    config = {"datasets": [{"name": name, "weight": 1.0, "config": {}} for name in ("gcd", "lcm")]}
    scores = {}
    for dataset in sorted(ALL.keys() - without):
        gym = make(dataset, config=config if dataset == "composite" else {}, seed=1)
        (task,) = gym.tasks(Split.TRAIN, 1)
        scores[dataset] = answer(gym, task, f"<answer>{own_answer(gym, task)}</answer>").value
    assert len(scores) >= 101
    assert {dataset: score for dataset, score in scores.items() if score != 1.0} == {}


@pytest.mark.parametrize("dataset", ["emoji_mystery", "rectangle_count", "sokoban"])
def test_questions_of_signs_are_told_apart(dataset):
    gym = make(dataset)
    tasks = [*gym.tasks(Split.TRAIN, 16), *gym.tasks(Split.HELD_OUT, 4)]
    assert len({task.cluster for task in tasks}) == 20


def test_the_last_tags_count_and_without_tags_the_whole_text():
    gym = make()
    (task,) = gym.tasks(Split.TRAIN, 1)
    right = own_answer(gym, task)
    assert answer(gym, task, f"<answer>0.5</answer> no, <answer>\n{right}\n</answer>").success
    assert not answer(gym, task, f"<answer>{right}</answer> no, <answer>wrong</answer>").success
    untagged = answer(gym, task, f" {right}\n")
    assert untagged.success and untagged.metrics["tagged"] == 0.0


def test_an_episode_without_an_answer_fails():
    gym = make()
    outcome = gym.reset(gym.tasks(Split.TRAIN, 1)[0], seed=0).outcome()
    assert (outcome.value, outcome.success) == (0.0, False)


def test_splits_are_disjoint_and_tasks_the_same_each_time():
    gym = make(seed=3)
    train, held_out = gym.tasks(Split.TRAIN, 80), gym.tasks(Split.HELD_OUT, 20)
    questions = [task.messages[-1].content for task in (*train, *held_out)]
    assert len(set(questions)) == 100
    again = make(seed=3)
    # The other split first, and in pieces: the order of asking must not matter.
    assert list(again.tasks(Split.HELD_OUT, 20)) == list(held_out)
    assert [*again.tasks(Split.TRAIN, 30), *again.tasks(Split.TRAIN, 50, first=30)] == list(train)
    assert train[0].messages[0].content == INSTRUCTION
    other = {task.messages[-1].content for task in make(seed=4).tasks(Split.HELD_OUT, 60)}
    assert not other & {task.messages[-1].content for task in gym.tasks(Split.TRAIN, 200)}


def test_a_dataset_with_few_questions_says_how_many_it_has():
    gym = make("gcd", config={"min_value": 1, "max_value": 3, "min_numbers": 2, "max_numbers": 2})
    with pytest.raises(PrefloopError, match=r"has \d distinct train questions, 500 were asked for"):
        gym.tasks(Split.TRAIN, 500)


def test_unknown_datasets_configs_and_foreign_tasks_are_refused():
    with pytest.raises(PrefloopError, match="no dataset 'chain_summ'"):
        make("chain_summ").tasks(Split.TRAIN, 1)
    with pytest.raises(PrefloopError, match="refuses its config"):
        make(config={"bogus": 1}).tasks(Split.TRAIN, 1)
    with pytest.raises(PrefloopError, match="refuses its config"):
        make("composite", config={"datasets": [{"nmae": "gcd"}]}).tasks(Split.TRAIN, 1)
    gym = make()
    (task,) = gym.tasks(Split.TRAIN, 1)
    foreign = Task(task.environment, task.specification, task.seed, (Message(Role.USER, "1 + 1?"),))
    with pytest.raises(PrefloopError, match="does not fit"):
        gym.reset(foreign, seed=0)


def test_without_the_package_the_error_names_the_extra():
    script = (
        "import sys; sys.modules['reasoning_gym'] = None; sys.modules['reasoning_gym.factory'] = None\n"
        "from prefloop.environments.reasoning_gym import ReasoningGym, ReasoningGymSettings\n"
        "from prefloop.records import Split\n"
        "ReasoningGym(ReasoningGymSettings(dataset='gcd')).tasks(Split.TRAIN, 1)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert "pip install 'prefloop[reasoning-gym]'" in done.stderr


def test_a_scorer_that_hangs_ends_its_own_episode(monkeypatch):
    gate = threading.Event()
    gym = make(step_deadline_s=0.05)
    first, second = (GuardedEpisode(gym, task, 0) for task in gym.tasks(Split.TRAIN, 2))
    monkeypatch.setattr(type(gym._dataset), "score_answer", lambda *_, **__: gate.wait())
    with pytest.raises(EpisodeFailedError, match=r"no answer within 0\.05 s") as failed:
        first.step(Message(Role.ASSISTANT, "<answer>9**9**9</answer>"))
    assert failed.value.ended is Ended.DEADLINE
    monkeypatch.setattr(type(gym._dataset), "score_answer", lambda *_, **__: 1.0)
    second.step(Message(Role.ASSISTANT, "7"))
    assert second.outcome().success
    gate.set()
