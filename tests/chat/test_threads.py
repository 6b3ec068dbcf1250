"""Agents that hold several conversations in a trajectory: each is rendered on its own, indices stay the same."""

import pytest

from prefloop.chat import steps_of, trajectory_paths
from prefloop.judges.render import _material
from prefloop.records import AuthorKind, Ended, Message, Role, Thread, ToolCall, Trajectory

ORDERS = ({"type": "function", "function": {"name": "orders", "parameters": {}}},)
MAIN = (
    Message(Role.SYSTEM, "Plan."),
    Message(Role.USER, "Where is my parcel?"),
    Message(Role.ASSISTANT, tool_calls=(ToolCall("orders", {"id": 7}, "c1"),)),
    Message(Role.TOOL, "in Oslo", tool_call_id="c1"),
    Message(Role.ASSISTANT, "In Oslo."),
)
SUB = (
    Message(Role.SYSTEM, "Check the answer."),
    Message(Role.ASSISTANT, "What was it?"),  # context: written by the agent's author
    Message(Role.USER, "In Oslo."),
    Message(Role.ASSISTANT, "Right."),
)


@pytest.fixture
def agent() -> Trajectory:
    threads = (Thread(0, 5, 2, ORDERS), Thread(5, 9, 3))
    kind = AuthorKind.CHECKPOINT
    return Trajectory("agent", "task", MAIN + SUB, 2, Ended.DONE, kind, "c", threads=threads)


def test_each_thread_is_a_context_of_its_own(chatml, agent):
    first, second = trajectory_paths(chatml, agent)
    decode = chatml.encoder.decode
    assert '"name": "orders"' in decode(first.token.tolist()) and "Oslo" in decode(first.token.tolist())
    assert decode(second.token.tolist()).startswith("<|im_start|>system\nCheck the answer.<|im_end|>")
    assert "orders" not in decode(second.token.tolist())
    assert decode(second.token[second.loss_mask].tolist()) == "Right.<|im_end|>"
    assert set(first.message[first.loss_mask].tolist()) == {2, 4}
    assert set(second.message[second.loss_mask].tolist()) == {8}
    assert set(second.message.tolist()) <= {-1, 5, 6, 7, 8}


def test_only_what_was_said_in_the_attempt_is_a_turn(agent):
    assert agent.own_turns == (2, 4, 8)
    assert agent.num_turns == 3
    assert [place.message for place in steps_of(agent, "turn")] == [2, 4, 8]


def test_a_judge_reads_where_each_conversation_begins(agent):
    text = _material(agent, ())
    first, second = text.index("[conversation 1 of 2"), text.index("[conversation 2 of 2")
    assert first < text.index("orders") < text.index("In Oslo.") < second < text.index("Check the answer.")
    assert "[message 7: agent, given with the task]" in text and "[message 9: agent]" in text
