from __future__ import annotations

import random
from collections import Counter
from pathlib import Path

import pytest

from prefloop import cli
from prefloop.environments.dialogue import (
    CLOSED_QUESTIONS,
    DRINKS,
    FOODS,
    HABITS,
    OPEN_QUESTIONS,
    SHARES,
    Dialogue,
    DialogueSettings,
    Level,
    is_open,
    is_question,
    level_of_answer,
    phrase,
    read_level,
    sentence,
)
from prefloop.records import Message, Role, Split, ToolCall
from prefloop.stages.context import BEFORE, run_id
from prefloop.store import Store

ENVIRONMENT = Dialogue()
NUM = 600
THRESHOLD = 0.6  # success beyond which a policy must have taken notice of the level


def say(text: str) -> Message:
    return Message(Role.ASSISTANT, text)


def level_of(task) -> Level:
    return Level[task.specification["level"].upper()]


def played(tutor, task, environment=ENVIRONMENT):
    """The outcome of a tutor: a function of the task's messages and what the learner has said since."""
    episode = environment.reset(task, 0)
    heard = [message.content for message in episode.messages]
    for _ in range(environment.max_turns):
        step = episode.step(say(tutor(task.specification, heard)))
        if step.done:
            break
        heard += [message.content for message in step.messages]
    return episode.outcome()


def success(tutor, split=Split.HELD_OUT, environment=ENVIRONMENT) -> float:
    return sum(played(tutor, task, environment).success for task in environment.tasks(split, NUM)) / NUM


def expert(order, heard):
    level = read_level(heard[-1])
    return OPEN_QUESTIONS[0] if level is None else phrase(level, order)


@pytest.mark.parametrize("split", Split)
def test_who_reads_the_level_is_always_right(split):
    outcomes = [played(expert, task) for task in ENVIRONMENT.tasks(split, NUM)]
    assert all(outcome.success and outcome.value == 1.0 and outcome.score == 1.0 for outcome in outcomes)
    assert {outcome.metrics["asked_too_much"] for outcome in outcomes} == {0.0}
    assert {outcome.metrics["turns"] for outcome in outcomes} == {1.0, 2.0}


def test_who_ignores_the_level_fails_whatever_it_always_says():
    always = [success(lambda order, heard, level=level: phrase(level, order)) for level in Level]
    assert always == pytest.approx(list(SHARES.values()), abs=0.06)
    # Asking and not listening is no better; nor is always taking the most common level.
    commonest = max(SHARES, key=SHARES.__getitem__)
    asks_first = success(lambda order, heard: OPEN_QUESTIONS[0] if len(heard) == 2 else phrase(commonest, order))
    assert asks_first == always[commonest]
    assert max(*always, asks_first) < THRESHOLD - 0.1
    assert success(lambda order, heard: "Hello, Tea and Scone, please.") == 0


def test_who_guesses_is_at_chance():
    draw = random.Random(0)
    assert success(lambda order, heard: phrase(draw.choice(list(Level)), order)) == pytest.approx(1 / 3, abs=0.06)


def test_who_reads_without_asking_knows_the_level_of_talkative_learners_only():
    def reads(order, heard):
        return phrase(read_level(heard[-1]) or Level.BEGINNER, order)

    talkative = ENVIRONMENT.settings.talkative
    assert success(reads) == pytest.approx(talkative + (1 - talkative) * SHARES[Level.BEGINNER], abs=0.06)
    assert success(reads) < THRESHOLD + 0.05
    silent = Dialogue(DialogueSettings(talkative=0.0))
    assert success(reads, environment=silent) < THRESHOLD - 0.1
    assert success(expert, environment=silent) == 1.0


def test_counting_wrong_verbs_alone_does_not_tell_the_level():
    """Some beginners make no mistake and some intermediates make one: length and words have to be read, too."""
    wrong = {
        level: sum(_has_wrong_verb(sentence(level, random.Random(i))) for i in range(NUM)) / NUM for level in Level
    }
    assert wrong[Level.BEGINNER] == pytest.approx(0.7, abs=0.06)
    assert wrong[Level.INTERMEDIATE] == pytest.approx(0.3, abs=0.06)
    assert wrong[Level.ADVANCED] == 0.0


def _has_wrong_verb(text: str) -> bool:
    return any(f"I {verb} " in text for verb in ("go to", "see", "find", "draw", "leave"))


@pytest.mark.parametrize("level", Level)
def test_every_sentence_of_a_learner_shows_the_level(level):
    said = {sentence(level, random.Random(i)) for i in range(NUM)}
    assert {read_level(text) for text in said} == {level}
    assert len(said) > (30 if level is Level.BEGINNER else 250)


def test_the_prompt_does_not_show_the_level_but_where_the_learner_does():
    tasks = ENVIRONMENT.tasks(Split.TRAIN, NUM)
    shown = [read_level(task.messages[-1].content) for task in tasks]
    assert all(level in (None, level_of(task)) for level, task in zip(shown, tasks, strict=True))
    assert sum(level is not None for level in shown) / NUM == pytest.approx(0.3, abs=0.06)
    silent = {task.messages[-1].content for task, level in zip(tasks, shown, strict=True) if level is None}
    words = {word.strip("?,") for text in silent for word in text.split()}
    assert words <= {*DRINKS, *FOODS, "The", "phrase", "for", "and", "how"}


def test_train_and_held_out_tasks_never_meet_and_have_no_end():
    tasks = {split: ENVIRONMENT.tasks(split, 2000) for split in Split}
    ids = {split: {task.id for task in found} for split, found in tasks.items()}
    orders = {
        split: {(t.specification["drink"], t.specification["food"]) for t in found} for split, found in tasks.items()
    }
    assert len(ids[Split.TRAIN]) == len(ids[Split.HELD_OUT]) == 2000
    assert not ids[Split.TRAIN] & ids[Split.HELD_OUT]
    assert not orders[Split.TRAIN] & orders[Split.HELD_OUT]
    assert len(orders[Split.TRAIN] | orders[Split.HELD_OUT]) == len(DRINKS) * len(FOODS)
    assert list(ENVIRONMENT.tasks(Split.TRAIN, 3, first=7)) == list(tasks[Split.TRAIN])[7:10]


def test_the_same_task_and_seed_is_the_same_learner_and_another_seed_is_not():
    task = ENVIRONMENT.tasks(Split.TRAIN, 1)[0]

    def answers(seed):
        episode = ENVIRONMENT.reset(task, seed)
        return [episode.step(say(question)).messages[0].content for question in OPEN_QUESTIONS]

    assert answers(0) == answers(0) != answers(1)
    assert len(set(answers(0))) > 1


def silent_task():
    return next(t for t in ENVIRONMENT.tasks(Split.TRAIN, 20) if read_level(t.messages[-1].content) is None)


def test_each_way_to_go_wrong_is_counted():
    task = silent_task()
    episode = ENVIRONMENT.reset(task, 0)
    call = ToolCall("look_up", {"learner": 1}, "call_0_0")
    (refused,) = episode.step(Message(Role.ASSISTANT, tool_calls=(call,))).messages
    assert (refused.role, refused.tool_call_id) == (Role.TOOL, "call_0_0")
    assert refused.content == '{"error": "there is no tool look_up: there are none"}'
    assert episode.step(say(CLOSED_QUESTIONS[0])).messages[0].content in ("Yes.", "No.")
    assert read_level(episode.step(say(OPEN_QUESTIONS[0])).messages[0].content) is level_of(task)
    assert not episode.step(say(OPEN_QUESTIONS[1])).done
    assert episode.step(say("Enjoy your stay.")).done
    outcome = episode.outcome()
    assert not outcome.success
    counted = {name: value for name, value in outcome.metrics.items() if value}
    assert counted == {"turns": 5, "questions": 3, "asked_too_much": 2, "unclear": 1, "errors": 1}
    assert outcome.value == pytest.approx(-0.4)  # a tenth each
    assert outcome.score == pytest.approx(0.3)


def test_an_answer_above_or_below_the_learner_is_told_as_such():
    for task in ENVIRONMENT.tasks(Split.TRAIN, 40):
        for level in Level:
            metrics = played(lambda order, heard, level=level: phrase(level, order), task).metrics
            assert metrics["right_level"] == (level is level_of(task))
            assert metrics["too_hard"] == (level > level_of(task))
            assert metrics["too_easy"] == (level < level_of(task))


def test_who_is_asked_too_often_leaves():
    episode = ENVIRONMENT.reset(silent_task(), 0)
    done = [episode.step(say(OPEN_QUESTIONS[0])).done for _ in range(4)]
    assert done == [False, False, False, True]
    metrics = episode.outcome().metrics
    assert (metrics["left"], metrics["no_answer"], metrics["asked_too_much"]) == (1, 1, 3)


def test_an_episode_that_was_cut_short_has_failed():
    outcome = ENVIRONMENT.reset(silent_task(), 0).outcome()
    assert not outcome.success
    assert outcome.metrics["no_answer"] == 1


@pytest.mark.parametrize(
    ("text", "asks", "takes_more"),
    [
        *((question, True, True) for question in OPEN_QUESTIONS),
        *((question, True, False) for question in CLOSED_QUESTIONS),
        ("Good morning! How are you?", True, True),
        ("Let me see. Is this your first time here?", True, False),
        ("Could you tell me about your day?", True, True),
        ("Hello, Tea and Cake, please.", False, True),
        ("", False, True),
    ],
)
def test_questions_are_told_from_answers_and_open_ones_from_closed(text, asks, takes_more):
    assert is_question(text) is asks
    if asks:
        assert is_open(text) is takes_more


def test_an_answer_is_of_the_level_whose_whole_phrase_it_is():
    order = {"drink": "Chai", "food": "Toast"}
    assert [level_of_answer(phrase(level, order), order) for level in Level] == list(Level)
    assert level_of_answer(" i would like chai and toast please", order) is Level.INTERMEDIATE
    assert level_of_answer("I would like Chai and Cake, please.", order) is None
    assert level_of_answer("Chai", order) is None
    both = f"{phrase(Level.BEGINNER, order)} {phrase(Level.ADVANCED, order)}"
    assert level_of_answer(both, order) is None


def test_the_demonstrators_majority_habit_is_bad():
    tasks = ENVIRONMENT.tasks(Split.TRAIN, 2000)
    shown = [ENVIRONMENT.demonstrate(task, 0) for task in tasks]
    at_once = Counter(
        level_of_answer(messages[2].content, task.specification)
        for task, (messages, _) in zip(tasks, shown, strict=True)
        if read_level(messages[1].content) is None
    )
    assert at_once[Level.ADVANCED] / at_once.total() > 0.55  # so that greedy decoding shows off, too
    assert SHARES[Level.ADVANCED] == min(SHARES.values())
    assert 0.25 < sum(outcome.success for _, outcome in shown) / 2000 < 0.45
    assert sum(HABITS.values()) == pytest.approx(1.0)
    assert ENVIRONMENT.demonstrate(tasks[0], 0) == ENVIRONMENT.demonstrate(tasks[0], 0)
    assert {messages[-1].role for messages, _ in shown} == {Role.ASSISTANT}


@pytest.mark.slow
def test_the_example_starts_as_its_demonstrator_and_learns_to_take_notice(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    example = Path(__file__).parents[2] / "examples" / "dialogue.toml"
    assert cli.main(["run", str(example), "--set", "iterations=3", "--set", "evaluation.num_tasks=128"]) == 0
    with Store("runs/prefloop.db") as store:
        start, end = (store.event(run_id("dialogue"), iteration, "evaluate") for iteration in (BEFORE, 3))
    assert 0.15 < start["sampled"]["success"]["value"] < 0.5
    assert start["greedy"]["success"]["value"] < 0.5
    assert end["sampled"]["success"]["value"] > THRESHOLD
    assert end["greedy"]["success"]["value"] > THRESHOLD
    assert end["sampled"]["metrics"]["questions"] > start["sampled"]["metrics"]["questions"]
