from __future__ import annotations

import json
from collections import Counter

import pytest

from prefloop.environments.booking import BOOKED, CITIES, HABITS, Booking
from prefloop.records import Message, Role, Split, ToolCall

ENVIRONMENT = Booking()


def call(name: str, **arguments) -> Message:
    return Message(Role.ASSISTANT, tool_calls=(ToolCall(name, arguments),))


def play(episode, *messages: Message):
    steps = [episode.step(message) for message in messages]
    return [json.loads(step.messages[0].content) if step.messages else None for step in steps], episode.outcome()


def good_flight(task, found):
    wanted = task.specification
    return [f for f in found if f["price"] <= wanted["max_price"] and not (wanted["direct"] and f["stops"])]


def expert(task):
    wanted = task.specification
    episode = ENVIRONMENT.reset(task, 0)
    found = json.loads(episode.step(call("search_flights", city=wanted["city"])).messages[0].content)
    episode.step(call("filter_results", max_price=wanted["max_price"], direct=wanted["direct"]))
    episode.step(call("book_flight", flight_id=good_flight(task, found)[0]["id"]))
    assert episode.step(Message(Role.ASSISTANT, BOOKED)).done
    return episode.outcome()


def test_exactly_one_flight_meets_each_request():
    for task in [*ENVIRONMENT.tasks(Split.TRAIN, 200), *ENVIRONMENT.tasks(Split.HELD_OUT, 200)]:
        found = ENVIRONMENT.reset(task, 3).flights(task.specification["city"])
        assert len(good_flight(task, found)) == 1
        assert len({flight["id"] for flight in found}) == 4


def test_train_and_held_out_tasks_never_meet():
    train = {task.id for task in ENVIRONMENT.tasks(Split.TRAIN, 2000)}
    held_out = {task.id for task in ENVIRONMENT.tasks(Split.HELD_OUT, 2000)}
    assert len(train) == len(held_out) == 2000
    assert not train & held_out


def test_the_same_task_and_seed_is_the_same_world_and_another_seed_is_not():
    (task,) = ENVIRONMENT.tasks(Split.TRAIN, 1)
    worlds = [json.dumps([ENVIRONMENT.reset(task, seed).flights(city) for city in CITIES]) for seed in (0, 0, 1)]
    assert worlds[0] == worlds[1] != worlds[2]
    assert list(ENVIRONMENT.tasks(Split.TRAIN, 3, first=7)) == list(ENVIRONMENT.tasks(Split.TRAIN, 10))[7:]


def test_the_right_way_succeeds_without_penalty():
    for task in ENVIRONMENT.tasks(Split.TRAIN, 50):
        outcome = expert(task)
        assert outcome.success
        assert outcome.value == 1.0
        assert outcome.score == 1.0
        assert sum(value for name, value in outcome.metrics.items() if name != "turns") == 0


def test_each_way_to_go_wrong_is_counted():
    (task,) = ENVIRONMENT.tasks(Split.TRAIN, 1)
    wanted = task.specification
    long = "one two three four five six seven eight"
    (errors, *_), outcome = play(
        ENVIRONMENT.reset(task, 0),
        call("filter_results", max_price=500, direct=True),
        call("teleport", city="Mars"),
        Message(Role.ASSISTANT, long, tool_calls=(ToolCall("search_flights", "{broken"),)),
        call("search_flights", city="Atlantis"),
        call("search_flights", city=wanted["city"]),
        call("book_flight", flight_id="XX00"),
        Message(Role.ASSISTANT, BOOKED),
    )
    assert errors == {"error": "search first"}
    assert not outcome.success
    counted = {name: value for name, value in outcome.metrics.items() if value}
    assert counted == {
        "turns": 7, "wrong_order": 1, "wrong_tool": 1, "malformed": 1, "invented_ids": 1, "errors": 5, "chatter": 2,
        "no_booking": 1,
    }  # fmt: skip
    # 0.3 for the invented id, 5 · 0.05 for errors, 3 · 0.05 for turns beyond 4, 2 · 0.01 for words beyond 6
    assert outcome.value == pytest.approx(-(0.3 + 0.25 + 0.15 + 0.02))
    assert outcome.score == pytest.approx((outcome.value + 1) / 2)


@pytest.mark.parametrize("which", ["price", "stops", "city"])
def test_ignored_constraints_are_failures(which):
    for task in ENVIRONMENT.tasks(Split.TRAIN, 200):
        wanted = task.specification
        city = next(c for c in CITIES if c != wanted["city"]) if which == "city" else wanted["city"]
        episode = ENVIRONMENT.reset(task, 0)
        found = json.loads(episode.step(call("search_flights", city=city)).messages[0].content)
        dear = [f for f in found if f["price"] > wanted["max_price"]]
        stopping = [f for f in found if wanted["direct"] and f["stops"] and f not in dear]
        wrong = {"price": dear, "stops": stopping, "city": found}[which]
        if not wrong:
            continue
        episode.step(call("book_flight", flight_id=wrong[0]["id"]))
        episode.step(Message(Role.ASSISTANT, BOOKED))
        assert not episode.outcome().success
        assert episode.outcome().metrics["ignored_constraints"] >= 1


def test_a_booking_without_a_closing_message_is_no_success():
    (task,) = ENVIRONMENT.tasks(Split.TRAIN, 1)
    episode = ENVIRONMENT.reset(task, 0)
    found = json.loads(episode.step(call("search_flights", city=task.specification["city"])).messages[0].content)
    episode.step(call("book_flight", flight_id=good_flight(task, found)[0]["id"]))
    assert not episode.outcome().success


def test_arguments_of_a_wrong_type_are_errors_not_exceptions():
    (task,) = ENVIRONMENT.tasks(Split.TRAIN, 1)
    episode = ENVIRONMENT.reset(task, 0)
    replies, outcome = play(
        episode,
        call("search_flights", city=["Tokyo"]),
        call("search_flights", city=task.specification["city"]),
        call("filter_results", max_price="100", direct=True),
        call("filter_results", max_price=True),
        call("book_flight", flight_id={"id": 1}),
        call("book_flight"),
    )
    assert [("error" in reply) for reply in replies] == [True, False, True, True, True, True]
    assert outcome.metrics["errors"] == 5


def test_the_demonstrators_majority_habit_is_bad():
    tasks = ENVIRONMENT.tasks(Split.TRAIN, 2000)
    demonstrated = [ENVIRONMENT.demonstrate(task, 0) for task in tasks]
    skipping = sum(not any(c.name == "filter_results" for m in ms for c in m.tool_calls) for ms, _ in demonstrated)
    assert skipping / len(tasks) > 0.55
    assert 0.30 < sum(outcome.success for _, outcome in demonstrated) / len(tasks) < 0.50
    assert sum(HABITS.values()) == pytest.approx(1.0)
    assert Counter(ms[-1].role for ms, _ in demonstrated) == {Role.ASSISTANT: 2000}
    assert ENVIRONMENT.demonstrate(tasks[0], 0) == ENVIRONMENT.demonstrate(tasks[0], 0)
