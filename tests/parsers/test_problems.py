"""What is wrong with a call, in words that the agent reads as the tool's answer."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefloop.chat import call_problem
from prefloop.chat.calls.base import UNREADABLE
from prefloop.environments.booking import TOOLS, Booking
from prefloop.records import Message, Role, Split, ToolCall

MORE = {
    "type": "function",
    "function": {
        "name": "pay",
        "parameters": {
            "properties": {
                "how": {"enum": ["card", "cash"]},
                "sum": {"type": "number"},
                "tip": {"type": ["integer", "null"]},
                "to": {"type": "array", "items": {"type": "object", "properties": {"id": {"type": "integer"}}}},
            },
        },
    },
}  # fmt: skip
BARE = {"function": {"name": "ping"}}


@pytest.mark.parametrize(
    ("call", "problem"),
    [
        (ToolCall("search_flights", {"city": "Oslo"}), ""),
        (ToolCall("filter_results", {"max_price": 5, "direct": True}), ""),
        (ToolCall("pay", {}), ""),
        (ToolCall("pay", {"sum": 3, "tip": None, "how": "cash", "unheard": [1]}), ""),
        (ToolCall("ping", {"anything": 1}), ""),
        (ToolCall("serch_flights", {"city": "Oslo"}), "there is no tool serch_flights: did you mean search_flights?"),
        (ToolCall("teleport", {}),
         "there is no tool teleport: the tools are search_flights, filter_results, book_flight, pay, ping"),
        (ToolCall(UNREADABLE, '{"name": 3}'), "the call cannot be read: it names no tool; "
         "the tools are search_flights, filter_results, book_flight, pay, ping"),
        (ToolCall("search_flights", '{"city": "Os'), "the arguments of search_flights are not a JSON object: "
         "Unterminated string starting at: line 1 column 10 (char 9)"),
        (ToolCall("search_flights", "[1]"), "the arguments of search_flights are not a JSON object"),
        (ToolCall("search_flights", {}), "search_flights lacks the argument city (string)"),
        (ToolCall("search_flights", {"city": 3}), "the argument city of search_flights must be string, not 3"),
        (ToolCall("filter_results", {"max_price": True, "direct": True}),
         "the argument max_price of filter_results must be integer, not true"),
        (ToolCall("filter_results", {"max_price": 2.5, "direct": True}),
         "the argument max_price of filter_results must be integer, not 2.5"),
        (ToolCall("pay", {"tip": "a lot"}), 'the argument tip of pay must be integer or null, not "a lot"'),
        (ToolCall("pay", {"how": "gold"}), 'the argument how of pay must be one of ["card", "cash"], not "gold"'),
        (ToolCall("pay", {"to": [{"id": 1, "unheard": "a"}]}), ""),
        (ToolCall("pay", {"to": [{}, 3]}), "the argument to[1] of pay must be object, not 3"),
        (ToolCall("pay", {"to": [{"id": "a"}]}), 'the argument to[0].id of pay must be integer, not "a"'),
    ],
)  # fmt: skip
def test_problems(call, problem):
    assert call_problem(call, (*TOOLS, MORE, BARE)) == problem


def test_without_tools_there_is_none_to_call():
    assert call_problem(ToolCall("f", {}), ()) == "there is no tool f: there are none"


def test_the_agent_sees_its_error_as_the_tools_answer():
    environment = Booking()
    (task,) = environment.tasks(Split.TRAIN, 1)
    episode = environment.reset(task, 0)
    calls = (
        ToolCall("find_flights", {}, "a"), ToolCall("search_flights", '{"city":', "b"),
        ToolCall("filter_results", {"max_price": 5}, "c"), ToolCall("search_flights", {"city": "Oslo"}, "d"),
    )  # fmt: skip
    answers = episode.step(Message(Role.ASSISTANT, tool_calls=calls)).messages
    assert [(answer.role, answer.tool_call_id) for answer in answers] == [(Role.TOOL, call.id) for call in calls]
    errors = [json.loads(answer.content)["error"] for answer in answers[:3]]
    assert errors == [call_problem(call, TOOLS) for call in calls[:3]]
    assert errors[2] == "filter_results lacks the argument direct (boolean)"
    assert isinstance(json.loads(answers[3].content), list)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(), lambda v: st.lists(v) | st.dictionaries(st.text(), v)
)


@given(JSON, JSON)
def test_no_schema_and_no_arguments_break_it(schema, value):
    tool = {"function": {"name": "f", "parameters": {"properties": {"x": schema}, "required": schema}}}
    assert isinstance(call_problem(ToolCall("f", {"x": value}), [tool]), str)
    assert isinstance(call_problem(ToolCall("f", json.dumps(value)), [tool]), str)
