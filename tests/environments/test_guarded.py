"""Episodes of environments that raise, hang, or give what is no answer."""

from __future__ import annotations

import threading
from dataclasses import replace
from typing import ClassVar

import numpy as np
import pytest

from prefloop.environments.base import Environment, Episode, Outcome, Step
from prefloop.environments.booking import Booking
from prefloop.environments.guarded import EpisodeFailedError, GuardedEpisode, sound_demonstration, sound_tasks
from prefloop.records import Ended, Message, PrefloopError, Role, Split, Task, ToolCall

HELLO = (Message(Role.USER, "hello"),)
SAID = Message(Role.ASSISTANT, tool_calls=(ToolCall("look", {}, "call_0_0"), ToolCall("look", {}, "call_0_1")))
ANSWERED = Message(Role.TOOL, "seen", tool_call_id="call_0_0")
WON = Outcome(1.0, 1.0, success=True, metrics={"turns": 1.0})
NEVER = threading.Event()


def raises(error: BaseException):
    def function(*_):
        raise error

    return function


class Wild(Environment):
    """Does at each call what it is told: a value to return, or a function to call."""

    name = "wild"
    max_turns = 3

    def __init__(self, deadline_s=None, **told) -> None:
        self.step_deadline_s = deadline_s
        self.told = told
        self.episodes: list[WildEpisode] = []

    def tasks(self, split, num, *, first=0):
        tasks = [Task(self.name, {}, number, HELLO, split=split) for number in range(first, first + num)]
        return answer("tasks", self.told, tasks)

    def demonstrate(self, task, seed):
        return answer("demonstrate", self.told, ((*HELLO, Message(Role.ASSISTANT, "hi")), WON))

    def reset(self, task, seed):
        answer("reset", self.told, None)
        self.episodes.append(WildEpisode(self.told))
        return self.episodes[-1]


def answer(name, told, default):
    found = told.get(name, default)
    return found() if callable(found) else found


class WildEpisode(Episode):
    def __init__(self, told) -> None:
        self.told = told
        self.messages = told.get("messages", HELLO)
        self.tools = told.get("tools", ())
        self.threads: list[int] = [threading.get_ident()]
        self.num_closed = 0

    def step(self, message):
        self.threads.append(threading.get_ident())
        return answer("step", self.told, Step(done=True))

    def outcome(self):
        self.threads.append(threading.get_ident())
        return answer("outcome", self.told, WON)

    def close(self):
        self.num_closed += 1
        answer("close", self.told, None)


def opened(deadline_s=None, **told) -> GuardedEpisode:
    environment = Wild(deadline_s, **told)
    return GuardedEpisode(environment, environment.tasks(Split.TRAIN, 1)[0], 0)


@pytest.fixture
def gate():
    """What calls wait for that hang: it opens when the test is over, so that their threads end."""
    event = threading.Event()
    yield event
    event.set()


def failure_of(call) -> EpisodeFailedError:
    with pytest.raises(EpisodeFailedError) as failed:
        call()
    return failed.value


@pytest.mark.parametrize("deadline_s", [None, 60.0])
def test_what_is_sound_passes_as_it_is(deadline_s):
    step = Step((ANSWERED, Message(Role.USER, "and now?")))
    episode = opened(deadline_s, step=step)
    assert episode.failure is None
    assert (episode.messages, episode.tools) == (HELLO, ())
    assert episode.step(SAID) is step
    assert episode.outcome() is WON
    episode.close()


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (ValueError("not today"), "environment raised ValueError: not today"),
        (SystemExit(3), "environment raised SystemExit: 3"),
        (TimeoutError("its own"), "environment raised TimeoutError: its own"),
        (OSError("no file \udcff"), "environment raised OSError: no file \\udcff"),
    ],
)
@pytest.mark.parametrize("deadline_s", [None, 60.0])
@pytest.mark.parametrize("call", ["reset", "step", "outcome"])
def test_what_it_raises_is_a_failure_of_its_episode(error, text, deadline_s, call):
    episode = opened(deadline_s, **{call: raises(error)})
    found = (
        episode.failure
        if call == "reset"
        else failure_of({"step": lambda: episode.step(SAID)}.get(call, episode.outcome))
    )
    assert (found.ended, str(found)) == (Ended.ERROR, text)
    episode.close()


def test_the_person_who_ends_a_run_does_end_it():
    with pytest.raises(KeyboardInterrupt):
        opened(step=raises(KeyboardInterrupt())).step(SAID)


def test_an_exception_whose_text_cannot_be_had_is_told_all_the_same():
    class OddError(Exception):
        def __str__(self):
            raise KeyError("text")

    assert "OddError: (its text cannot be had: KeyError)" in str(
        failure_of(lambda: opened(step=raises(OddError())).step(SAID))
    )


@pytest.mark.parametrize(
    ("step", "problem"),
    [
        (None, "it should be a Step, not NoneType None"),
        ((ANSWERED,), "it should be a Step, not tuple"),
        (Step([ANSWERED]), "its messages should be a tuple, not list"),
        (Step("seen"), "its messages should be a tuple, not str 'seen'"),
        (Step((ANSWERED,), done="yes"), "its done should be true or false, not str 'yes'"),
        (Step(), "it holds no message and is not done"),
        (Step(({"role": "tool", "content": "seen"},)), "message 0 should be a Message, not dict"),
        (Step((Message(Role.ASSISTANT, "me"),)), "message 0 has the role assistant"),
        (Step((Message(Role.SYSTEM, "you"),)), "message 0 has the role system"),
        (Step((Message("tool", "seen", tool_call_id="call_0_0"),)), "message 0 has the role 'tool', which is no Role"),
        (Step((ANSWERED, replace(ANSWERED, tool_call_id="call_9"))),
         "message 1 answers the tool call 'call_9', which nobody asked for (to be answered: 'call_0_1')"),
        (Step((ANSWERED, ANSWERED)), "message 1 answers the tool call 'call_0_0', which nobody asked for"),
        (Step((replace(ANSWERED, tool_call_id=""),)), "message 0 answers the tool call '', which nobody asked for"),
        (Step((replace(ANSWERED, content=None),)), "message 0 has NoneType None as its content, not a text"),
        (Step((replace(ANSWERED, content={"seen": 1}),)), "message 0 has dict {'seen': 1} as its content, not a text"),
        (Step((replace(ANSWERED, name=7),)), "message 0 has int 7 as its name, not a text"),
        (Step((replace(ANSWERED, tool_call_id=None),)), "message 0 has NoneType None as its tool_call_id"),
        (Step((replace(ANSWERED, content="half \ud800"),)), "message 0 cannot be stored"),
        (Step((Message(Role.USER, tool_calls=("look",)),)), "message 0 has tool calls that are no tuple of ToolCall"),
    ],
)  # fmt: skip
def test_what_is_no_answer_is_a_failure_that_says_why(step, problem):
    found = failure_of(lambda: opened(step=step).step(SAID))
    assert found.ended is Ended.ERROR
    assert str(found).startswith(f"environment gave a malformed answer: {problem}")


def test_an_answer_to_a_call_without_an_id_has_none():
    plain = Message(Role.ASSISTANT, tool_calls=(ToolCall("look", {}),))
    step = Step((Message(Role.TOOL, "seen"),))
    assert opened(step=step).step(plain) is step
    assert "which nobody asked for (to be answered: none)" in str(
        failure_of(lambda: opened(step=step).step(Message(Role.ASSISTANT, "hi")))
    )


@pytest.mark.parametrize(
    ("told", "problem"),
    [
        ({"messages": ()}, "its messages should be a tuple of at least one, not an empty tuple"),
        ({"messages": list(HELLO)}, "its messages should be a tuple of at least one, not list"),
        ({"messages": (*HELLO, "hi")}, "message 1 should be a Message, not str 'hi'"),
        ({"messages": (Message(Role.USER, None),)}, "message 0 has NoneType None as its content"),
        ({"tools": [{}]}, "its tools should be a tuple of objects, not list"),
        ({"tools": ("look",)}, "its tools should be a tuple of objects, not tuple"),
        ({"tools": ({"name": float("nan")},)}, "its tools cannot be stored"),
    ],
)
def test_what_is_no_episode_could_not_be_opened(told, problem):
    episode = opened(**told)
    assert str(episode.failure).startswith(f"environment gave a malformed episode: {problem}")
    assert episode.messages == HELLO  # the task's
    assert failure_of(lambda: episode.step(SAID)) is episode.failure


@pytest.mark.parametrize(
    ("outcome", "problem"),
    [
        (1.0, "it should be an Outcome or None, not float 1.0"),
        (replace(WON, value=float("nan")), "its value should be a finite number, not nan"),
        (replace(WON, value="1"), "its value should be a finite number, not '1'"),
        (replace(WON, value=np.float32(1)), "its value should be a finite number, not np.float32(1.0)"),
        (replace(WON, score=1.5), "its score should be a number from 0 to 1, not 1.5"),
        (replace(WON, score=True), "its score should be a number from 0 to 1, not True"),
        (replace(WON, success=1), "its success should be true or false, not int 1"),
        (replace(WON, metrics={"success": 1.0}), "its metrics should be numbers by name, without success"),
        (replace(WON, metrics={"turns": float("inf")}), "its metric 'turns' should be a finite number"),
        (replace(WON, metrics={3: 1.0}), "its metric 3 should be a finite number"),
    ],
)
def test_what_is_no_outcome_is_a_failure_and_never_a_number(outcome, problem):
    assert str(failure_of(opened(outcome=outcome).outcome)) == f"environment gave a malformed outcome: {problem}"


def test_an_environment_that_verifies_nothing_may_say_so():
    assert opened(outcome=lambda: None).outcome() is None


@pytest.mark.parametrize("call", ["reset", "step", "outcome"])
def test_what_hangs_is_given_up_at_the_deadline(call, gate):
    episode = opened(0.05, **{call: gate.wait})
    found = (
        episode.failure
        if call == "reset"
        else failure_of({"step": lambda: episode.step(SAID)}.get(call, episode.outcome))
    )
    assert found.ended is Ended.DEADLINE
    assert str(found) == "environment gave no answer within 0.05 s (its step_deadline_s)"
    episode.close()


def test_an_environment_may_say_itself_how_its_episode_ended():
    own = EpisodeFailedError("the tool server gave no answer within 9 s", Ended.DEADLINE)
    assert failure_of(lambda: opened(step=raises(own)).step(SAID)) is own


def test_an_episode_that_hangs_can_still_be_closed(gate):
    environment = Wild(0.05, step=gate.wait)
    episode = GuardedEpisode(environment, environment.tasks(Split.TRAIN, 1)[0], 0)
    failure_of(lambda: episode.step(SAID))
    episode.close()
    assert environment.episodes[0].num_closed == 1
    episode.close()
    assert environment.episodes[0].num_closed == 1
    assert failure_of(lambda: opened(0.05, close=gate.wait).close()).ended is Ended.DEADLINE
    assert failure_of(lambda: opened(close=raises(OSError("busy"))).close()).ended is Ended.ERROR


def threads_now() -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if thread.name == "environment"}


def test_without_a_deadline_there_is_no_thread_and_with_one_a_single_one_until_it_is_closed():
    before = threads_now()
    episodes = [opened() for _ in range(3)]
    for episode in episodes:
        episode.step(SAID)
        episode.outcome()
    assert threads_now() == before
    environment = Wild(60.0)
    tasks = environment.tasks(Split.TRAIN, 3)
    guarded = [GuardedEpisode(environment, task, 0) for task in tasks]
    for episode in guarded:
        episode.step(SAID)
        episode.outcome()
    # What belongs to one thread (a connection of sqlite3) can be used in every call of its episode.
    assert [len(set(episode.threads)) for episode in environment.episodes] == [1, 1, 1]
    begun = threads_now() - before
    assert len(begun) == 3
    for episode in guarded:
        episode.close()
    for thread in begun:
        thread.join(timeout=60)
    assert not any(thread.is_alive() for thread in begun)


def test_episodes_of_real_environments_are_sound():
    class Slow(Booking):
        step_deadline_s: ClassVar[float] = 60.0

    for environment in (Booking(), Slow()):
        task = environment.tasks(Split.TRAIN, 1)[0]
        episode = GuardedEpisode(environment, task, 0)
        call = ToolCall("search_flights", {"city": task.specification["city"]}, "call_0_0")
        (found,) = episode.step(Message(Role.ASSISTANT, tool_calls=(call,))).messages
        assert found.tool_call_id == "call_0_0"
        assert not episode.outcome().success
        episode.close()


def test_an_environment_that_says_nothing_of_deadlines_has_one():
    assert Environment.step_deadline_s == 600.0


TASK = Task("wild", {}, 0, HELLO)


@pytest.mark.parametrize(
    ("tasks", "problem"),
    [
        (None, "gave what is no list of tasks: it should be a list of tasks, not NoneType None"),
        ([TASK], "gave what is no list of tasks: it holds 1, not 2"),
        ([TASK, None], "gave what is no list of tasks: number 1 should be a Task, not NoneType None"),
        ([TASK, replace(TASK, split=Split.HELD_OUT)], "gave what is no list of tasks: number 1 is of the split <Split"),
        ([TASK, replace(TASK, messages=("hi",))], "number 1 message 0 should be a Message, not str 'hi'"),
        ([TASK, replace(TASK, specification={"x": {1}})], "number 1 cannot be stored"),
        (raises(KeyError("city")), "raised KeyError: 'city' ("),
    ],
)
def test_what_are_no_tasks_is_told_in_one_line(tasks, problem):
    assert sound_tasks(Wild(), Split.TRAIN, 2, first=3) == Wild().tasks(Split.TRAIN, 2, first=3)
    told = Wild(tasks=tasks if callable(tasks) else lambda: tasks)
    with pytest.raises(PrefloopError) as failed:
        sound_tasks(told, Split.TRAIN, 2)
    assert str(failed.value).startswith("environment wild: tasks(train, 2, first=0) ")
    assert problem in str(failed.value)


def test_an_error_of_the_environments_own_is_told_as_it_is_and_another_with_its_place():
    with pytest.raises(PrefloopError, match=r"^too few$"):
        sound_tasks(Wild(tasks=raises(PrefloopError("too few"))), Split.TRAIN, 2)
    with pytest.raises(PrefloopError, match=r"raised ZeroDivisionError: .* by zero \(.*test_guarded.py:\d+\)$"):
        sound_demonstration(Wild(60.0, demonstrate=lambda: 1 // 0), TASK, 0)


@pytest.mark.parametrize(
    ("shown", "problem"),
    [
        (None, "it should be a pair of messages and their outcome, not NoneType None"),
        ((HELLO, WON), "no message of it is the agent's"),
        (((SAID,), WON), "its messages should begin with those of the task"),
        (((*HELLO, "hi"), WON), "message 1 should be a Message, not str 'hi'"),
        (((*HELLO, SAID), None), "its outcome is None"),
        (((*HELLO, SAID), replace(WON, score=2.0)), "its score should be a number from 0 to 1, not 2.0"),
    ],
)
def test_what_is_no_demonstration_is_told_in_one_line(shown, problem):
    assert sound_demonstration(Wild(60.0), TASK, 0) == sound_demonstration(Wild(), TASK, 0)
    with pytest.raises(PrefloopError) as failed:
        sound_demonstration(Wild(demonstrate=lambda: shown), TASK, 0)
    assert f"demonstrate of task {TASK.id} gave what is no demonstration: {problem}" in str(failed.value)


def test_a_demonstration_that_hangs_is_given_up(gate):
    with pytest.raises(PrefloopError, match=r"no demonstration within 0\.2 s \(step_deadline_s for each turn\)"):
        sound_demonstration(Wild(0.05, demonstrate=gate.wait), TASK, 0)
