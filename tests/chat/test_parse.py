import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prefloop.chat import AssistantParser, render_demonstration
from prefloop.chat.parse import split_reasoning
from prefloop.records import Message, PrefloopError, Role, ToolCall


@pytest.fixture(scope="module")
def parser(chatml):
    return AssistantParser(chatml)


def block(text):
    return f"<tool_call>\n{text}\n</tool_call>"


CALL = '{"name": "search_flights", "arguments": {"city": "Oslo"}}'
OSLO = ToolCall("search_flights", {"city": "Oslo"})


@pytest.mark.parametrize(
    ("text", "content", "calls"),
    [
        ("Just text.\n", "Just text.\n", ()),
        (block(CALL), "", (OSLO,)),
        ("Let me see.\n" + block(CALL), "Let me see.", (OSLO,)),
        (block(CALL) + "\n" + block(CALL) + "\nDone", "Done", (OSLO, OSLO)),
        ("<tool_call>" + CALL, "", (OSLO,)),  # cut off before the end marker
        (block('{"name": "f"}'), "", (ToolCall("f", {}),)),
        (block("no json"), block("no json"), ()),
        (block('{"name": 3}'), block('{"name": 3}'), ()),
        ("</tool_call>", "</tool_call>", ()),
    ],
)
def test_hermes_calls(text, content, calls):
    assert split_hermes(text) == (content, calls)


@pytest.mark.parametrize(
    "broken",
    [
        '{"name": "f", "arguments": {"a":',
        '{"name": "f", "arguments": [1]}',
        '{"name": "f", "arguments": {"a": NaN}}',
        '{"name": "f", "arguments": {"a": 1e999}}',
        '{"name": "f", "arguments": {"a": "\\ud800"}}',
        '{"name": "f", "name": "g"}',
    ],
)
def test_a_broken_call_with_a_name_keeps_its_text_as_arguments(broken):
    assert split_hermes(block(broken)) == ("", (ToolCall("f", broken),))


def test_llama3_calls():
    assert split_llama3('{"name": "f", "parameters": {"a": 1}}') == ("", (ToolCall("f", {"a": 1}),))
    assert split_llama3("Hello") == ("Hello", ())
    assert split_llama3('{"name": "f", "parameters"') == ("", (ToolCall("f", '{"name": "f", "parameters"'),))


@pytest.mark.parametrize(
    ("text", "in_thought", "expected"),
    [
        ("plain", False, ("", "plain")),
        ("<think>\nhmm\n</think>\n\nYes", False, ("hmm", "Yes")),
        ("hmm\n</think>\n\nYes", True, ("hmm", "Yes")),
        ("<think>\ncut off", False, ("cut off", "")),
        ("a</think>b</think>c", False, ("a", "b</think>c")),
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


def test_transformers_own_parser_is_used_where_the_tokenizer_declares_one(make_renderer):
    renderer = make_renderer("chatml")
    renderer.tokenizer.response_template = {
        "start_anchor": "<|im_start|>assistant\n",
        "defaults": {"role": "assistant"},
        "fields": {"content": {"close": "<|im_end|>"}},
    }
    parser = AssistantParser(renderer)
    assert parser.tool_format == "response_template"
    prompt = renderer.render_prompt([Message(Role.USER, "x")]).token
    assert parser.parse_assistant(renderer.encoder.encode("Hello").ids, prompt).content == "Hello"


def test_formats_are_named_or_read_from_the_template(make_renderer, chatml):
    assert AssistantParser(chatml).tool_format == "hermes"
    assert AssistantParser(make_renderer("llama3")).tool_format == "llama3"
    assert AssistantParser(make_renderer("thinking")).tool_format == "text"
    assert AssistantParser(chatml, "text").parse_text(block(CALL)).tool_calls == ()
    with pytest.raises(PrefloopError, match="not one of"):
        AssistantParser(chatml, "xml")
    with pytest.raises(PrefloopError, match="no response_template"):
        AssistantParser(chatml, "response_template")


PARTS = [
    "<tool_call>", "</tool_call>", "<think>", "</think>", '{"name": "f"', '"arguments": ', "{", "}", "[", '"', "\\",
    "\\ud800", "NaN", "1e999", "null", ",", "\n", "é", "\x00", "9" * 5000, "[" * 5000,
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
