"""What each tool format reads: one call and several, cut off, malformed, and typed by the tool's schema."""

import json

import pytest

pytest.importorskip("numpy")

from hypothesis import given, settings
from hypothesis import strategies as st

from prefloop.chat.calls import CALL_FORMATS
from prefloop.chat.calls.base import UNREADABLE
from prefloop.records import ToolCall

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "book",
            "parameters": {
                "type": "object",
                "properties": {
                    "id": {"type": "string"},
                    "seats": {"type": "integer"},
                    "price": {"type": "number"},
                    "direct": {"type": "boolean"},
                    "stops": {"type": "array"},
                    "who": {"type": "object"},
                    "note": {"anyOf": [{"type": "string"}, {"type": "null"}]},
                    "until": {"type": ["integer", "string"]},
                },
            },
        },
    }
]
OSLO, ROME = ToolCall("find", {"city": "Oslo"}), ToolCall("find", {"city": "Rome"})


def hermes(text):
    return f"<tool_call>\n{text}\n</tool_call>"


def xml(*pairs, name="find"):
    inner = "".join(f"<parameter={key}>\n{value}\n</parameter>\n" for key, value in pairs)
    return f"<tool_call>\n<function={name}>\n{inner}</function>\n</tool_call>"


def glm(*pairs, name="find"):
    inner = "".join(f"<arg_key>{key}</arg_key>\n<arg_value>{value}</arg_value>\n" for key, value in pairs)
    return f"<tool_call>{name}\n{inner}</tool_call>"


def harmony(body, name="find"):
    return f" to=functions.{name}<|channel|>commentary json<|message|>{body}<|call|>"


JSON = '{"name": "find", "arguments": {"city": "Oslo"}}'
JSON2 = '{"name": "find", "arguments": {"city": "Rome"}}'
LLAMA = '{"name": "find", "parameters": {"city": "Oslo"}}'
LLAMA2 = '{"name": "find", "parameters": {"city": "Rome"}}'
ANALYSIS = "<|channel|>analysis<|message|>Look it up.<|end|><|start|>assistant"


@pytest.mark.parametrize(
    ("name", "text", "content", "calls"),
    [
        ("hermes", "Just text.\n", "Just text.\n", ()),
        ("hermes", hermes(JSON), "", (OSLO,)),
        ("hermes", "Let me see.\n" + hermes(JSON), "Let me see.", (OSLO,)),
        ("hermes", hermes(JSON) + "\n" + hermes(JSON2) + "\nDone", "Done", (OSLO, ROME)),
        ("hermes", "<tool_call>" + JSON, "", (OSLO,)),  # cut off before the end marker
        ("hermes", hermes('{"name": "f"}'), "", (ToolCall("f", {}),)),
        ("hermes", hermes("no json"), "", (ToolCall(UNREADABLE, "no json"),)),
        ("hermes", "Wait\n" + hermes('{"name": 3}') + hermes(JSON), "Wait",
         (ToolCall(UNREADABLE, '{"name": 3}'), OSLO)),
        ("hermes", "Put it in <tool_call> tags", "Put it in <tool_call> tags", ()),
        ("hermes", "</tool_call>", "</tool_call>", ()),
        ("hermes", hermes('{"name": "f", "arguments": null}'), "", (ToolCall("f", {}),)),
        ("hermes", hermes('{"name": "f", "arguments": "{\\"a\\": 1}"}'), "", (ToolCall("f", {"a": 1}),)),
        ("hermes", hermes('{"id": "x", "type": "function", "name": "f", "arguments": ""}'), "", (ToolCall("f", {}),)),
        ("hermes", hermes('{"name": "f", "arguments": {"x": "</tool_call><tool_call>"}}'), "",
         (ToolCall("f", {"x": "</tool_call><tool_call>"}),)),
        ("hermes", '<tool_call>{"name": "f", "argu' + hermes(JSON), "", (ToolCall("f", '{"name": "f", "argu'), OSLO)),
        ("xml", "Just text.", "Just text.", ()),
        ("xml", xml(("city", "Oslo")), "", (OSLO,)),
        ("xml", "Wait\n\n" + xml(("city", "Oslo")) + "\n" + xml(("city", "Rome")), "Wait", (OSLO, ROME)),
        ("xml", xml(name="list"), "", (ToolCall("list", {}),)),
        ("xml", xml(("x", "a\n\n</parameter>b")), "", (ToolCall("find", {"x": "a\n\n</parameter>b"}),)),
        ("xml", "<tool_call>\n<function=find>\n<parameter=city>\nOs", "",
         (ToolCall("find", "<function=find>\n<parameter=city>\nOs"),)),
        ("xml", xml(("city", "Oslo"), ("city", "Rome")).removesuffix("\n</tool_call>"), "",
         (ToolCall("find", xml(("city", "Oslo"), ("city", "Rome"))[12:-13]),)),
        ("xml", hermes("nothing"), "", (ToolCall(UNREADABLE, "nothing"),)),
        ("glm", glm(("city", "Oslo")), "", (OSLO,)),
        ("glm", "Wait\n" + glm(("city", "Oslo")) + "\n" + glm(("city", "Rome")), "Wait", (OSLO, ROME)),
        ("glm", "<tool_call>find<arg_key>city</arg_key><arg_value>Oslo</arg_value></tool_call>", "", (OSLO,)),
        ("glm", "<tool_call>list\n</tool_call>", "", (ToolCall("list", {}),)),
        ("glm", "<tool_call>find\n<arg_key>city</arg_key>\n<arg_va", "",
         (ToolCall("find", "find\n<arg_key>city</arg_key>\n<arg_va"),)),
        ("glm", hermes("two words"), "", (ToolCall(UNREADABLE, "two words"),)),
        ("llama3", LLAMA, "", (OSLO,)),
        ("llama3", "<|python_tag|>" + LLAMA, "", (OSLO,)),
        ("llama3", LLAMA + "; " + LLAMA2, "", (OSLO, ROME)),
        ("llama3", LLAMA + "\n" + LLAMA2, "", (OSLO, ROME)),
        ("llama3", "Hello", "Hello", ()),
        ("llama3", '{"answer": 42}', '{"answer": 42}', ()),
        ("llama3", '{"name": "Anna", "age": 5}', '{"name": "Anna", "age": 5}', ()),
        ("llama3", LLAMA + '; {"name": "Anna", "age": 5}', LLAMA + '; {"name": "Anna", "age": 5}', ()),
        ("llama3", '{"name": "f"}', "", (ToolCall("f", {}),)),
        ("llama3", '{"name": "f", "parameters": "{}"}', "", (ToolCall("f", {}),)),
        ("llama3", '{"name": "f", "parameters"', "", (ToolCall("f", '{"name": "f", "parameters"'),)),
        ("llama3", LLAMA + "; " + LLAMA2[:-3], "", (OSLO, ToolCall("find", LLAMA2[:-3]))),
        ("llama3", '<|python_tag|>find.call(city="Oslo")', "", (OSLO,)),
        ("llama3", "<|python_tag|>find.call(__import__('os'))", "", (ToolCall("find", "find.call(__import__('os'))"),)),
        ("llama3", "<|python_tag|>print(1)", "", (ToolCall(UNREADABLE, "print(1)"),)),
        ("llama3", '{"parameters": {"city": "Oslo"}}', "", (ToolCall(UNREADABLE, '{"parameters": {"city": "Oslo"}}'),)),
        ("harmony", "<|channel|>final<|message|>Yes<|return|>", "Yes", ()),
        ("harmony", harmony('{"city": "Oslo"}'), "", (OSLO,)),
        ("harmony", "<|channel|>commentary to=functions.find <|constrain|>json<|message|>" + '{"city": "Oslo"}', "",
         (OSLO,)),  # as gpt-oss itself writes it, the stop token taken off
        ("harmony", harmony('{"city": "Oslo"}') + "<|start|>assistant" + harmony('{"city": "Rome"}'), "", (OSLO, ROME)),
        ("harmony", ANALYSIS + harmony('{"city": '), "", (ToolCall("find", '{"city": '),)),
        ("harmony", ANALYSIS + "<|channel|>final<|message|>Cut o", "Cut o", ()),
        ("harmony", "<|channel|>commentary to=<|message|>{}<|call|>", "", (ToolCall(UNREADABLE, "{}"),)),
        ("harmony", "<|channel|>comm", "", ()),
        ("harmony", "no channels at all", "no channels at all", ()),
        ("harmony", "<|channel|>commentary<|message|>I look.<|end|><|start|>assistant" + harmony('{"city": "Oslo"}'),
         "I look.", (OSLO,)),
    ],
)  # fmt: skip
def test_calls(name, text, content, calls):
    reading = CALL_FORMATS[name].read(text)
    assert (reading.content, tuple(placed.call for placed in reading.calls)) == (content, calls)


def test_harmony_reads_the_analysis_as_reasoning():
    reading = CALL_FORMATS["harmony"].read(ANALYSIS + harmony('{"city": "Oslo"}'))
    assert reading.reasoning == "Look it up."


@pytest.mark.parametrize(
    "broken",
    [
        '{"name": "f", "arguments": {"a":',
        '{"name": "f", "arguments": [1]}',
        '{"name": "f", "arguments": []}',
        '{"name": "f", "arguments": "[1]"}',
        '{"name": "f", "parameters": {"a": 1}}',
        '{"name": "f", "arguments": {}, "more": 1}',
        '{"name": "f", "arguments": {"a": NaN}}',
        '{"name": "f", "arguments": {"a": 1e999}}',
        '{"name": "f", "arguments": {"a": "\\ud800"}}',
        '{"name": "f", "name": "g"}',
    ],
)
def test_a_broken_call_with_a_name_keeps_its_text_as_arguments(broken):
    (placed,) = CALL_FORMATS["hermes"].read(hermes(broken)).calls
    assert placed.call == ToolCall("f", broken)


VALUES = [
    ("id", "007", "007"), ("id", "true", "true"), ("id", '{"a": 1}', '{"a": 1}'), ("id", "  x ", "  x "),
    ("seats", "3", 3), ("seats", "three", "three"), ("seats", "2.5", "2.5"), ("seats", "3.0", 3.0),
    ("price", "12.5", 12.5), ("price", "12", 12), ("price", "NaN", "NaN"), ("price", "1e999", "1e999"),
    ("direct", "True", True), ("direct", "false", False), ("direct", "1", "1"),
    ("stops", '["a", null]', ["a", None]), ("stops", "{}", "{}"), ("who", '{"a": 1}', {"a": 1}), ("who", "[1]", "[1]"),
    ("note", "None", None), ("note", "null", None), ("note", "nil", "nil"), ("note", "5", "5"),
    ("until", "5", 5), ("until", "May", "May"),
    ("other", "5", 5), ("other", "Oslo", "Oslo"), ("other", "True", True), ("other", "None", None), ("other", "[", "["),
]  # fmt: skip


@pytest.mark.parametrize(("key", "text", "value"), VALUES)
@pytest.mark.parametrize(("name", "write"), [("xml", xml), ("glm", glm)])
def test_values_are_typed_by_the_tools_schema(name, write, key, text, value):
    (placed,) = CALL_FORMATS[name].read(write((key, text), name="book"), TOOLS).calls
    found = placed.call.arguments[key]
    assert (found, type(found)) == (value, type(value))


def test_types_of_odd_schemas_are_no_types():
    for schema in ({"type": 3}, {"type": [1]}, {"anyOf": "x"}, "string", {"type": {"a": 1}}):
        tool = {"function": {"name": "book", "parameters": {"properties": {"id": schema}}}}
        (placed,) = CALL_FORMATS["xml"].read(xml(("id", "7"), name="book"), [tool]).calls
        assert placed.call.arguments == {"id": 7}


def test_calls_are_placed_where_they_stand():
    text = "Wait\n" + hermes(JSON) + "\n" + hermes(JSON2) + "<|im_end|>"
    places = [text[start:end] for _, start, end in CALL_FORMATS["hermes"].read(text).calls]
    assert places == [hermes(JSON), hermes(JSON2)]
    text = LLAMA + "; " + LLAMA2
    assert [text[start:end] for _, start, end in CALL_FORMATS["llama3"].read(text).calls] == [LLAMA, LLAMA2]
    text = ANALYSIS + harmony("{}") + "<|start|>assistant" + harmony("{}")
    assert [text[:end].count("<|call|>") for _, _, end in CALL_FORMATS["harmony"].read(text).calls] == [1, 2]


PARTS = [
    "<tool_call>", "</tool_call>", '{"name": "f"', '"arguments": ', '"parameters": ', "{", "}", "[", '"', "\\",
    "\\ud800", "NaN", "1e999", "null", ",", ";", "\n", "é", "\x00", "9" * 5000, "[" * 5000, "<function=f>",
    "</function>", "<parameter=a>", "</parameter>", "find\n", "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>",
    "<|channel|>", "analysis", "commentary", " to=functions.f", "<|message|>", "<|end|>", "<|start|>", "<|call|>",
    "<|python_tag|>", "f.call(", "a=1", ")", "(" * 300, "\ud800",
]  # fmt: skip


@settings(max_examples=300, deadline=None)
@given(st.lists(st.sampled_from(PARTS) | st.text(max_size=8), max_size=14).map("".join))
def test_no_text_breaks_a_format(text):
    for reader in CALL_FORMATS.values():
        reading = reader.read(text, TOOLS)
        at = 0
        for call, start, end in reading.calls:
            assert at <= start <= end <= len(text)
            at = end
            assert call.name
            json.dumps(call.to_dict(), allow_nan=False)
