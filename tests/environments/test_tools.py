import json

import pytest

from prefloop.environments.booking import TOOLS, Booking
from prefloop.environments.tools import answer_calls
from prefloop.records import Message, Role, Split, ToolCall


def search(city):
    if city == "Atlantis":
        raise ValueError("no such city")
    return [city] if city != "Rome" else "full of cats"


def answer(*calls: ToolCall) -> list[Message]:
    return list(answer_calls(Message(Role.ASSISTANT, tool_calls=calls), TOOLS, {"search_flights": search}))


def test_each_call_gets_its_answer_in_order():
    rome, oslo = answer(
        ToolCall("search_flights", {"city": "Rome"}, "a"), ToolCall("search_flights", {"city": "Oslo"}, "b")
    )
    assert (rome.role, rome.name, rome.tool_call_id, rome.content) == (Role.TOOL, "search_flights", "a", "full of cats")
    assert (oslo.tool_call_id, oslo.content) == ("b", '["Oslo"]')
    assert answer() == []


@pytest.mark.parametrize(
    ("call", "problem"),
    [
        (ToolCall("search_flight", {"city": "Rome"}), "there is no tool search_flight: did you mean search_flights?"),
        (ToolCall("search_flights", '{"city": "Ro'), "the arguments of search_flights are not a JSON object: "),
        (ToolCall("search_flights", {}), "search_flights lacks the argument city (string)"),
        (ToolCall("search_flights", {"city": 7}), "the argument city of search_flights must be string, not 7"),
        (ToolCall("search_flights", {"city": "Atlantis"}), "no such city"),
        (ToolCall("search_flights", {"city": "Rome", "why": "x"}), "search_flights got an unexpected keyword argument"),
    ],
)
def test_a_call_that_cannot_be_run_is_answered_by_its_error(call, problem):
    (told,) = answer(call)
    assert told.role is Role.TOOL
    assert json.loads(told.content)["error"].startswith(problem)


def test_what_a_function_gets_wrong_itself_is_not_told_to_the_agent():
    call = Message(Role.ASSISTANT, tool_calls=(ToolCall("search_flights", {"city": "Rome"}),))
    with pytest.raises(TypeError, match="unsupported operand"):
        answer_calls(call, TOOLS, {"search_flights": lambda city: len(city) + None})


@pytest.mark.parametrize("call", [ToolCall("fly", {}, "a"), ToolCall("book_flight", "{broken", "b")])
def test_booking_tells_the_agent_what_was_wrong_and_goes_on(call):
    environment = Booking()
    step = environment.reset(environment.tasks(Split.TRAIN, 1)[0], 0).step(Message(Role.ASSISTANT, tool_calls=(call,)))
    assert not step.done
    (told,) = step.messages
    assert (told.role, told.tool_call_id, list(json.loads(told.content))) == (Role.TOOL, call.id, ["error"])
