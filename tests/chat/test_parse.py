import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chat_tokenizers import byte_level_backend, metaspace_backend
from prefloop.chat import AssistantParser, render_demonstration
from prefloop.chat.encoding import TextEncoder
from prefloop.chat.parse import split_reasoning
from prefloop.records import Message, Role, ToolCall


@pytest.fixture(scope="module")
def parser(chatml):
    return AssistantParser(chatml)


@pytest.mark.parametrize(
    ("text", "in_thought", "expected"),
    [
        ("plain", False, ("", "plain")),
        ("<think>\nhmm\n</think>\n\nYes", False, ("hmm", "Yes")),
        ("hmm\n</think>\n\nYes", True, ("hmm", "Yes")),
        ("<think>\ncut off", False, ("cut off", "")),
        ("a</think>b</think>c", None, ("a", "b</think>c")),
        ("a</think>b</think>c", False, ("", "a</think>b</think>c")),
    ],
)
def test_reasoning(text, in_thought, expected):
    assert split_reasoning(text, in_thought) == expected


def test_a_demonstration_parses_back_to_its_messages(chatml, parser, booking, tools):
    (path,) = render_demonstration(chatml, booking, tools, 2)
    for index in (2, 4, 6):
        tokens = path.token[path.loss_mask & (path.message == index)]
        assert parser.parse_assistant(tokens) == booking[index]


def test_reasoning_is_read_where_the_template_has_it(thinking, chatml):
    parser = AssistantParser(thinking)
    message = Message(Role.ASSISTANT, "Booked.", reasoning_content="Oslo it is")
    (path,) = render_demonstration(thinking, [Message(Role.USER, "x"), message], (), 1)
    assert parser.parse_assistant(path.token[path.loss_mask]) == message
    begun = [*thinking.encoder.encode("<think>").ids]
    assert parser.parse_text("so</think>Yes", in_thought=True) == Message(Role.ASSISTANT, "Yes", "so")
    assert parser.parse_assistant(thinking.encoder.encode("so").ids, begun) == Message(Role.ASSISTANT, "", "so")
    assert AssistantParser(chatml).parse_text("<think>a</think>b").content == "<think>a</think>b"


def test_the_tokenizers_response_template_is_used_where_no_format_reads_the_calls(make_renderer):
    renderer = make_renderer("thinking")  # shows no calls
    assert AssistantParser(renderer).tool_format == "text"
    renderer = make_renderer("thinking")
    renderer.tokenizer.response_template = {
        "start_anchor": "<|im_start|>assistant\n",
        "defaults": {"role": "assistant"},
        "fields": {"content": {"close": "<|im_end|>"}},
    }
    parser = AssistantParser(renderer)
    assert parser.tool_format == "response_template"
    prompt = renderer.render_prompt([Message(Role.USER, "x")]).token
    assert parser.parse_assistant(renderer.encoder.encode("Hello").ids, prompt).content == "Hello"


def test_calls_are_read_in_the_text_after_the_reasoning(make_renderer, thinking):
    parser = AssistantParser(thinking, "hermes")
    call = '<tool_call>{"name": "f", "arguments": {}}</tool_call>'
    message = parser.parse_text(f"<think>\nshould I {call}?\n</think>\n\nYes\n{call}")
    assert message == Message(Role.ASSISTANT, "Yes", f"should I {call}?", (ToolCall("f", {}),))
    ids = thinking.encoder.encode(f"<think>{call}</think>\n\n{call} and").ids
    (placed,) = parser.places(ids)
    assert thinking.encoder.decode(ids)[: placed.end].endswith(f"</think>\n\n{call}")
    assert AssistantParser(make_renderer("chatml"), "text").parse_text(call).tool_calls == ()


PARTS = [
    "<tool_call>", "</tool_call>", "<think>", "</think>", '{"name": "f"', '"arguments": ', "{", "}", "\n", "é", "\x00",
]  # fmt: skip


@settings(max_examples=400, deadline=None)
@given(st.lists(st.sampled_from(PARTS) | st.text(max_size=8), max_size=12).map("".join), st.booleans())
def test_no_text_breaks_the_parser(parser, thinking, text, in_thought):
    for reader in (parser, AssistantParser(thinking, "hermes"), AssistantParser(thinking, "llama3")):
        message = reader.parse_text(text, in_thought)
        assert message.role is Role.ASSISTANT
        for call in message.tool_calls:
            json.dumps(call.to_dict(), allow_nan=False)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 380), max_size=60))
def test_no_tokens_break_the_parser_and_every_message_can_be_shown_again(chatml, parser, tokens):
    message = parser.parse_assistant(tokens)
    prompt = chatml.render_prompt([Message(Role.USER, "x"), message, Message(Role.USER, "y")])
    assert len(prompt.token) > 0


@pytest.mark.parametrize("make", [byte_level_backend, metaspace_backend])
def test_the_bytes_of_tokens_make_the_text(make):
    encoder, text = TextEncoder(make()), "größe 東京 🙂 \ufffd"
    assert b"".join(encoder.bytes_of(token) or b"" for token in encoder.encode(text).ids).decode() == text
