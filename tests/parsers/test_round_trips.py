"""A call, rendered with a family's own template and turned into tokens, is read back as it was."""

import json
import math

import pytest

pytest.importorskip("transformers", reason="the extra 'train' is not installed")
pytest.importorskip("trl.chat_template_utils", reason="trl is not installed (extra 'oracle')")

from hypothesis import assume, given, settings
from hypothesis import strategies as st
from trl.chat_template_utils import add_response_schema

from prefloop.chat import AssistantParser, ChatRenderer, render_demonstration
from prefloop.records import Message, PrefloopError, Role, ToolCall
from templates.families import OSLO, ROME, TOOL, renderer_for, tokenizer_for

FORMAT_OF = {
    "qwen2_5": "hermes", "qwen3": "hermes", "qwen3_instruct_2507": "hermes", "qwen3_vl": "hermes",
    "qwen3_5_think": "xml", "qwen3_5_nothink": "xml", "qwen3_6": "xml", "qwen3_8": "xml",
    "nemotron_3_nano": "xml", "nemotron_3_super": "xml", "nemotron_3_ultra": "xml", "nemotron_3_5_lightning": "xml",
    "glm4moe": "glm", "gptoss": "harmony", "llama3_1": "llama3", "llama3_2": "llama3",
}  # fmt: skip
ONE_CALL = ("gptoss", "llama3_1", "llama3_2")
THINKING = [
    "qwen3", "qwen3_5_think", "qwen3_8", "nemotron_3_nano", "nemotron_3_ultra", "glm4moe", "gptoss",
]  # fmt: skip
DECLARED = ("gemma4", "gemma4_v2", "gemma4_v5", "lfm2_v2", "lfm2_2_5", "lfm2_2_5_v2")  # only TRL has their formats
ASKED = Message(Role.USER, "Fly me to Oslo.")

BOOK = {
    "type": "function",
    "function": {
        "name": "book",
        "description": "Books.",
        "parameters": {
            "type": "object",
            "properties": {
                "text": {"type": "string"},
                "count": {"type": "integer"},
                "price": {"type": "number"},
                "direct": {"type": "boolean"},
                "stops": {"type": "array"},
                "who": {"type": "object"},
            },
        },
    },
}


def tokens_of(renderer, message, tools):
    """The tokens of the assistant's turn, and the prompt that they follow."""
    (path,) = render_demonstration(renderer, [ASKED, message], tools, 1)
    first = int(path.loss_mask.argmax())
    return path.token[path.loss_mask].tolist(), path.token[:first].tolist()


def read_back(renderer, message, tools=(TOOL,)):
    sampled, prompt = tokens_of(renderer, message, tools)
    return AssistantParser(renderer).parse_assistant(sampled, prompt, tools)


def without_ids(calls):
    return tuple(ToolCall(call.name, call.arguments) for call in calls)


@pytest.mark.parametrize(("stem", "name"), FORMAT_OF.items())
def test_the_format_is_the_one_that_reads_what_the_template_shows(stem, name):
    assert AssistantParser(renderer_for(stem)).tool_format == name


@pytest.mark.parametrize("stem", ["cohere2", "gemma3", "phi3", "llama3", "gemma4", "lfm2_2_5", "muse_glimmer"])
def test_a_template_whose_calls_no_format_reads_has_none(stem):
    assert AssistantParser(renderer_for(stem)).tool_format == "text"


@pytest.mark.parametrize("stem", FORMAT_OF)
def test_calls_come_back(stem):
    for calls in [(OSLO,), (OSLO, ROME)][: 1 if stem in ONE_CALL else 2]:
        message = read_back(renderer_for(stem), Message(Role.ASSISTANT, "", tool_calls=calls))
        assert message == Message(Role.ASSISTANT, "", tool_calls=without_ids(calls))


@pytest.mark.parametrize("stem", [stem for stem in FORMAT_OF if stem not in ONE_CALL])
def test_content_beside_calls_comes_back(stem):
    message = Message(Role.ASSISTANT, "Let me look.", tool_calls=(OSLO, ROME))
    back = read_back(renderer_for(stem), message)
    assert (back.content, back.tool_calls) == ("Let me look.", without_ids((OSLO, ROME)))


@pytest.mark.parametrize("stem", THINKING)
def test_reasoning_comes_back_with_calls_and_without(stem):
    for message in (Message(Role.ASSISTANT, "", "Look it up.", (OSLO,)), Message(Role.ASSISTANT, "Sure.", "Why not?")):
        back = read_back(renderer_for(stem), message)
        assert back == Message(
            Role.ASSISTANT, message.content, message.reasoning_content, without_ids(message.tool_calls)
        )


TAGS = ("tool_call", "parameter", "function", "arg_value", "arg_key", "think", "<|")
TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=20).filter(
    lambda t: not any(tag in t for tag in TAGS)
)
NUMBERS = st.integers(-(10**12), 10**12) | st.floats(-1e12, 1e12).filter(lambda x: math.isfinite(x) and x != 0)
VALUES = st.recursive(
    TEXTS | NUMBERS | st.booleans() | st.none(),
    lambda v: st.lists(v, max_size=3) | st.dictionaries(TEXTS, v, max_size=3),
    max_leaves=5,
)
ARGUMENTS = st.fixed_dictionaries(
    {},
    optional={
        "text": TEXTS, "count": st.integers(-(10**12), 10**12), "price": NUMBERS, "direct": st.booleans(),
        "stops": st.lists(VALUES, max_size=3), "who": st.dictionaries(TEXTS, VALUES, max_size=3),
    },
)  # fmt: skip


@pytest.mark.parametrize(
    "stem", ["qwen2_5", "qwen3", "qwen3_5_think", "nemotron_3_nano", "glm4moe", "gptoss", "llama3_1"]
)
@settings(max_examples=40, deadline=None)
@given(arguments=ARGUMENTS)
def test_any_arguments_come_back(stem, arguments):
    message = Message(Role.ASSISTANT, "", tool_calls=(ToolCall("book", arguments),))
    back = read_back(renderer_for(stem), message, (BOOK,))
    assert back.tool_calls == (ToolCall("book", arguments),)


@settings(max_examples=60, deadline=None)
@given(
    st.dictionaries(
        TEXTS | st.sampled_from(["</tool_call>", "<tool_call>"]), VALUES | st.sampled_from(["</tool_call>"])
    )
)
def test_json_holds_any_text(arguments):
    assume(json.dumps(arguments).count("</tool_call>") < 16)  # so many are tried
    call = ToolCall("anything", arguments)
    for stem in ("qwen2_5", "gptoss"):
        assert read_back(renderer_for(stem), Message(Role.ASSISTANT, "", tool_calls=(call,)), ()).tool_calls == (call,)


@pytest.mark.parametrize("stem", FORMAT_OF)
def test_transformers_own_parser_reads_the_same(stem):
    """TRL's response templates are the oracle for calls that are whole."""
    tokenizer = add_response_schema(tokenizer_for(stem))
    renderer = ChatRenderer(tokenizer)
    message = Message(Role.ASSISTANT, "", tool_calls=(OSLO,))
    sampled, prompt = tokens_of(renderer, message, (TOOL,))
    theirs = AssistantParser(renderer, "response_template").parse_assistant(sampled, prompt, (TOOL,))
    ours = AssistantParser(renderer, FORMAT_OF[stem]).parse_assistant(sampled, prompt, (TOOL,))
    assert theirs == ours == Message(Role.ASSISTANT, "", tool_calls=without_ids((OSLO,)))


@pytest.mark.parametrize("stem", DECLARED)
def test_a_declared_response_template_is_used_where_no_format_reads_the_calls(stem):
    renderer = ChatRenderer(add_response_schema(tokenizer_for(stem)))
    assert AssistantParser(renderer).tool_format == "response_template"
    message = read_back(renderer, Message(Role.ASSISTANT, "", tool_calls=(OSLO, ROME)))
    assert message.tool_calls == without_ids((OSLO, ROME))
    assert AssistantParser(renderer).parse_assistant(renderer.encoder.encode("Hello").ids).content == "Hello"


@pytest.mark.parametrize("stem", FORMAT_OF)
@settings(max_examples=25, deadline=None)
@given(cut=st.integers(1, 60), junk=st.text(max_size=10), at=st.integers(0, 60))
def test_calls_that_are_cut_off_or_spoilt_become_messages(stem, cut, junk, at):
    """Whatever is left of a turn reads as a message that the template can show again."""
    renderer = renderer_for(stem)
    sampled, prompt = tokens_of(renderer, Message(Role.ASSISTANT, "", tool_calls=(OSLO,)), (TOOL,))
    parser = AssistantParser(renderer)
    junk_ids = list(renderer.encoder.encode(junk.encode("utf-8", "ignore").decode()).ids)
    for tokens in (sampled[:-cut], sampled[:at] + junk_ids + sampled[at:]):
        message = parser.parse_assistant(tokens, prompt, (TOOL,))
        assert message.role is Role.ASSISTANT
        named = [call for call in message.tool_calls if call.name]
        assert len(named) == len(message.tool_calls)


def test_a_policy_with_tools_whose_calls_nothing_reads_is_refused():
    with pytest.raises(PrefloopError, match=r"no tool format reads .* response_template, set policy.tool_format"):
        AssistantParser(renderer_for("gemma4")).require_calls()
    AssistantParser(renderer_for("qwen3")).require_calls()
    AssistantParser(ChatRenderer(tokenizer_for("gemma4"), tool_format="text")).require_calls()  # asked for


def test_a_format_can_be_forced():
    renderer = ChatRenderer(tokenizer_for("qwen2_5"), tool_format="xml")
    assert AssistantParser(renderer).tool_format == "xml"
    assert AssistantParser(renderer, "text").tool_format == "text"
    with pytest.raises(PrefloopError, match="not one of"):
        AssistantParser(renderer, "yaml")
    with pytest.raises(PrefloopError, match="no response_template"):
        AssistantParser(renderer, "response_template")
