import pytest

from prefloop.chat.steps import steps_of
from prefloop.credit.steps import step_rewards
from prefloop.environments.arithmetic import Arithmetic, ArithmeticSettings, right_steps, verified_steps
from prefloop.records import AuthorKind, Ended, Message, PrefloopError, Role, Split, Task, Trajectory

ENVIRONMENT = Arithmetic()
TASK = Task("arithmetic", {"start": 7, "operations": [["+", 5], ["-", 4], ["+", 1]], "modulus": 10})


def outcome_of(text, task=TASK):
    episode = ENVIRONMENT.reset(task, 0)
    assert episode.step(Message(Role.ASSISTANT, text)).done
    return episode.outcome()


def test_the_chain_is_what_the_prompt_asks():
    task = ENVIRONMENT.tasks(Split.TRAIN, 1, first=5)[0]
    chain = task.specification
    asked = ", ".join(f"{operator} {operand}" for operator, operand in chain["operations"])
    assert task.messages[0].content.startswith(f"Start with {chain['start']} and count modulo 10: {asked}.")
    assert len(chain["operations"]) == 6
    value = eval_chain(chain)
    perfect, outcome = Arithmetic(ArithmeticSettings(error_rate=0)).demonstrate(task, 0)
    assert perfect[-1].content.endswith(f"= {value}")
    assert outcome.success


def eval_chain(chain):
    """The result by one expression of Python's own, without a step between."""
    total = chain["start"] + sum(operand if operator == "+" else -operand for operator, operand in chain["operations"])
    return total % chain["modulus"]


@pytest.mark.parametrize(
    ("text", "right", "success"),
    [
        ("7 + 5 = 2\n2 - 4 = 8\n8 + 1 = 9", [True, True, True], True),
        ("7 + 5 = 3\n3 - 4 = 9\n9 + 1 = 0", [False, True, True], False),
        ("7 + 5 = 3\n3 - 4 = 8\n8 + 1 = 9", [False, False, True], True),  # two errors that cancel
        ("7 + 5 = 2\n2 - 4 = 8", [True, True], False),
        ("7 + 5 = 2\n2 - 4 = 8\n8 + 1 = 9\n9 + 1 = 0", [True, True, True, False], False),
        ("7 + 5 = 2\nso 8\n8 + 1 = 9", [True, False, False], True),
        ("7 + 5 = 2\n2 - 5 = 8\n8 + 1 = 9", [True, False, True], True),  # another operand than was asked
        ("7 + 5 = " + "9" * 5000, [False], False),
        ("", [], False),
        ("7 + 5 = 2\n\n2 - 4 = 8\n  \n8 + 1 = 9\n", [True, True, True], True),  # blank lines are no steps
    ],
)
def test_a_step_is_right_or_wrong_by_the_line_before_and_the_last_result_counts(text, right, success):
    outcome = outcome_of(text)
    assert right_steps(TASK, text) == right
    assert outcome.success is success
    assert outcome.value == outcome.score == float(success)
    assert outcome.metrics == {"wrong_steps": right.count(False), "missing_steps": max(0, 3 - len(right))}


def answered(text):
    messages = (*TASK.messages, Message(Role.USER, "count"), Message(Role.ASSISTANT, text))
    return Trajectory("t", TASK.id, messages, len(messages) - 1, Ended.DONE, AuthorKind.DEMONSTRATOR, "somebody")


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ("7 + 5 = 2\n2 - 4 = 7\n7 + 1 = 8", [True, False, True]),
        ("\n7 + 5 = 2\n\n \n2 - 4 = 8\n", [True, True]),
        ("7 + 5 = 2\x0b2 - 4 = 8", [False]),  # no line break to those who cut text into steps
        ("I cannot count.", [False]),
        (" \n", [False]),
        ("", [False]),
    ],
)
def test_the_steps_of_a_trajectory_are_verified_where_they_stand(text, right):
    trajectory = answered(text)
    verified = verified_steps(TASK, trajectory)
    assert [place for place, _ in verified] == list(steps_of(trajectory, "separator"))
    assert [flag for _, flag in verified] == right
    lines = [line for line in text.split("\n") if line.strip()]
    assert [text[slice(*place.span)] for place, _ in verified if place.span] == lines


def test_verified_steps_pay_as_a_process_reward_model_would_that_is_never_wrong():
    verified = verified_steps(TASK, answered("7 + 5 = 2\n2 - 4 = 7\n7 + 1 = 8"))
    right = [float(flag) for _, flag in verified]
    assert step_rewards(right, "min").tolist() == [1.0, -1.0, 0.0]
    assert step_rewards(right, "difference").tolist() == [1.0, -1.0, 1.0]
    assert step_rewards([1.0, 1.0, 1.0], "min").tolist() == [1.0, 0.0, 0.0]


def test_an_episode_without_an_answer_has_failed():
    outcome = ENVIRONMENT.reset(TASK, 0).outcome()
    assert not outcome.success
    assert outcome.metrics["missing_steps"] == 3


def test_the_splits_never_meet():
    prompts = {split: {t.messages[0].content for t in ENVIRONMENT.tasks(split, 1000)} for split in Split}
    assert min(map(len, prompts.values())) > 990
    assert not prompts[Split.TRAIN] & prompts[Split.HELD_OUT]
    few = Arithmetic(ArithmeticSettings(num_steps=1, modulus=2, largest=3))
    train, held_out = ({t.messages[0].content for t in few.tasks(split, 50)} for split in Split)
    assert not train & held_out


def test_settings_that_leave_a_split_empty_are_refused(monkeypatch):
    monkeypatch.setattr("prefloop.environments.arithmetic.content_hash", lambda chain: "0")
    with pytest.raises(PrefloopError, match="none of 1000 chains is held_out"):
        ENVIRONMENT.tasks(Split.HELD_OUT, 1)


def test_the_demonstrator_errs_as_often_as_it_is_told():
    tasks = ENVIRONMENT.tasks(Split.TRAIN, 1000)
    outcomes = [ENVIRONMENT.demonstrate(task, 0)[1] for task in tasks]
    assert sum(o.metrics["wrong_steps"] for o in outcomes) / 6000 == pytest.approx(0.2, abs=0.02)
    assert sum(o.success for o in outcomes) / 1000 == pytest.approx(0.33, abs=0.05)
    said = [[ENVIRONMENT.demonstrate(task, seed)[0] for task in tasks[:20]] for seed in (1, 1, 2)]
    assert said[0] == said[1] != said[2]
