"""What is shown of a reply before it is whole is never taken back."""

from __future__ import annotations

import numpy as np
import pytest
from gateway_runs import policy
from hypothesis import example, given, settings
from hypothesis import strategies as st
from test_conversations import TOOL, voice

from prefloop.chat import AssistantParser
from prefloop.chat.calls import CALL_FORMATS
from prefloop.gateway.streaming import ReplyStream
from prefloop.records import Message, Role

PARTS = st.sampled_from(
    ["Hello", " there", "\n", "\n\n", " ", "<", "<tool", "<tool_call>", "</tool_call>", "{", "}", "[", "]", "é", "东京",
     '{"name": "look", "arguments": {}}', '{"name": "look", "parameters": {}}', "<function=look>", "</function>",
     "<think>", "</think>", "look", "<|channel|>", "<|message|>", "final", "analysis", " to=functions.look"]
)  # fmt: skip
FORMATS = [*CALL_FORMATS, "text"]


@pytest.mark.parametrize("thinking", [False, True])
@pytest.mark.parametrize("tool_format", FORMATS)
@example(parts=["\n", "Hello", "\n", "<tool_call>", '{"name": "look", "arguments": {}}', "</tool_call>"], steps=1,
         in_thought=None, with_tools=True)  # fmt: skip
@given(parts=st.lists(PARTS, max_size=9), steps=st.integers(1, 5), in_thought=st.sampled_from([None, False, True]),
       with_tools=st.booleans())  # fmt: skip
@settings(max_examples=150, deadline=None)
def test_what_is_shown_is_the_reply_in_the_end(tool_format, thinking, parts, steps, in_thought, with_tools):
    renderer = voice(thinking).renderer
    text = "".join(parts)
    message = AssistantParser(renderer, tool_format).parse_text(text, in_thought, [TOOL])
    if message.tool_calls and not with_tools:
        message = AssistantParser(renderer, "text").parse_text(text, in_thought)
    stream = ReplyStream(renderer, tool_format, in_thought, with_tools=with_tools)
    pieces = [stream.feed(text[:end]) for end in range(0, len(text) + 1, steps)]
    reasoning, content = ("".join(part) for part in zip(*pieces, strict=True))
    assert message.reasoning_content.startswith(reasoning) and message.content.startswith(content)
    rest = stream.rest(message)
    assert (reasoning + rest[0], content + rest[1]) == (message.reasoning_content, message.content)


def test_words_are_shown_as_they_come_up_to_what_may_be_a_call():
    stream = ReplyStream(voice().renderer, "hermes")
    text = "Let me see. <b>now</b>\n<tool_call>"
    pieces = [stream.feed(text[:end])[1] for end in range(len(text) + 1)]
    assert "".join(pieces) == "Let me see. <b>now</b>"
    assert pieces[3] == "t" and pieces[13] == ""
    assert stream.rest(Message(Role.ASSISTANT, "Let me see. <b>now</b>")) == ("", "")


def test_thoughts_come_before_the_content():
    stream = ReplyStream(voice(thinking=True).renderer, "text")
    assert stream.feed("<think>\nA long thought") == ("A long thought", "")
    assert stream.feed("<think>\nA long thought.\n</think>\n\nIt is") == (".", "It is")
    assert stream.rest(Message(Role.ASSISTANT, "It is.", "A long thought.")) == ("", ".")


@pytest.mark.parametrize(
    ("in_thought", "tool_format", "text", "shown"),
    [
        (False, "text", "It is", ("", "It is")),  # the prompt has closed the thought, or the policy skips it
        (False, "text", "Use </think> to end", ("", "Use </think> to end")),
        (None, "text", "It is", ("", "")),
        (True, "text", "Hm", ("Hm", "")),
        (True, "text", "Hm</thi", ("Hm", "")),
        (False, "harmony", "<|channel|>analysis<|message|>Hm<|end|><|start|>assistant<|channel|>final<|message|>It is",
         ("Hm", "It is")),
    ],
)  # fmt: skip
def test_what_is_certain_depends_on_the_prompt_and_the_format(in_thought, tool_format, text, shown):
    stream = ReplyStream(voice(thinking=True).renderer, tool_format, in_thought)
    pieces = [stream.feed(text[:end]) for end in range(len(text) + 1)]
    assert tuple("".join(part) for part in zip(*pieces, strict=True)) == shown


def test_an_unfinished_character_waits_for_its_bytes():
    _, renderer = policy()
    ids = renderer.encoder.encode("größer").ids
    stream, decode = ReplyStream(renderer, "text"), renderer.encoder.decode
    pieces = [stream.feed(decode(list(ids[:n])))[1] for n in range(len(ids) + 1)]
    assert "".join(pieces) == "größer" and not any("\ufffd" in piece for piece in pieces)
    assert np.count_nonzero(pieces) > 2
