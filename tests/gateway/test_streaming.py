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
from prefloop.gateway.streaming import ContentStream

PARTS = st.sampled_from(
    ["Hello", " there", "\n", "\n\n", " ", "<", "<tool", "<tool_call>", "</tool_call>", "{", "}", "[", "]", "é", "东京",
     '{"name": "look", "arguments": {}}', '{"name": "look", "parameters": {}}', "<function=look>", "</function>",
     "<think>", "</think>", "look", "<|channel|>", "<|message|>", "final", "analysis", " to=functions.look"]
)  # fmt: skip
FORMATS = [*CALL_FORMATS, "text"]


@pytest.mark.parametrize("thinking", [False, True])
@pytest.mark.parametrize("tool_format", FORMATS)
@example(parts=["\n", "Hello", "\n", "<tool_call>", '{"name": "look", "arguments": {}}', "</tool_call>"], steps=1)
@given(parts=st.lists(PARTS, max_size=9), steps=st.integers(1, 5))
@settings(max_examples=150, deadline=None)
def test_what_is_shown_is_the_content_in_the_end(tool_format, thinking, parts, steps):
    renderer = voice(thinking).renderer
    parser, plain = AssistantParser(renderer, tool_format), AssistantParser(renderer, "text")
    text = "".join(parts)
    message = parser.parse_text(text, tools=[TOOL])
    for content in {message.content, plain.parse_text(text).content if message.tool_calls else message.content}:
        stream = ContentStream(renderer, tool_format)
        shown = "".join(stream.feed(text[:end]) for end in range(0, len(text) + 1, steps))
        assert content.startswith(shown)
        assert shown + stream.rest(content) == content


def test_words_are_shown_as_they_come_up_to_what_may_be_a_call():
    stream = ContentStream(voice().renderer, "hermes")
    text = "Let me see. <b>now</b>\n<tool_call>"
    pieces = [stream.feed(text[:end]) for end in range(len(text) + 1)]
    assert "".join(pieces) == "Let me see. <b>now</b>"
    assert pieces[3] == "t" and pieces[13] == ""
    assert stream.rest("Let me see. <b>now</b>") == ""


def test_thoughts_are_not_content():
    stream = ContentStream(voice(thinking=True).renderer, "text")
    assert stream.feed("<think>\nA long thought") == ""
    assert stream.feed("<think>\nA long thought.\n</think>\n\nIt is") == "It is"
    assert stream.rest("It is.") == "."


def test_an_unfinished_character_waits_for_its_bytes():
    _, renderer = policy()
    ids = renderer.encoder.encode("größer").ids
    stream, decode = ContentStream(renderer, "text"), renderer.encoder.decode
    pieces = [stream.feed(decode(list(ids[:n]))) for n in range(len(ids) + 1)]
    assert "".join(pieces) == "größer" and not any("\ufffd" in piece for piece in pieces)
    assert np.count_nonzero(pieces) > 2
