"""The templates that TRL ships: what each gives for a family's tokenizer is what docs/templates.md says."""

import re
from datetime import datetime
from pathlib import Path
from typing import get_args

import numpy as np
import pytest

pytest.importorskip("transformers", reason="the extra 'train' is not installed")

from prefloop.chat import (
    AssistantParser,
    ChatRenderer,
    PathBuilder,
    StepFinder,
    render_demonstration,
    steps_of,
    stop_ids,
)
from prefloop.chat.calls import CALL_FORMATS, ToolFormat
from prefloop.chat.template import TEMPLATE_DATE
from prefloop.records import AuthorKind, Ended, Message, PrefloopError, Role, Source, Trajectory
from templates.families import CASES, OSLO, ROME, STEMS, TOOL, family, renderer_for, tokenizer_for

pytestmark = pytest.mark.skipif(not STEMS, reason="trl is not installed (extra 'oracle')")

PAGE = Path(__file__).parents[2] / "docs" / "templates.md"
COLUMNS = ("several turns", "thinking", "a call", "two calls", "thinking and a call")
REASONS = {
    "no tools": "does not show the tools that it is given",
    "no calls": "drops the tool call arguments of message 1",
    "one call": "drops the tool call arguments of message 1|only supports single tool-calls",
    "not shown": r"drops the reasoning of message \d",
    "thought closed": r"its own generation prompt followed by the turn: where the prompt has '\\n</think>",
    "no header": "header '<.turn>model.n', which its generation prompt lacks",
}


def page_rows(section: str) -> list[str]:
    """The rows of a section's table."""
    text = PAGE.read_text().split(f"## {section}\n")[1].split("\n## ")[0]
    return [line for line in text.splitlines() if line.startswith("| `")]


def documented() -> dict[str, dict[str, str]]:
    """What the page's table says of each template that it names."""
    rows = (line.strip("| \n").split(" | ") for line in page_rows("Which templates"))
    return {
        stem: dict(zip(COLUMNS, cells, strict=True)) for head, *cells in rows for stem in re.findall("`(.+?)`", head)
    }


def outcome(stem: str, case: str) -> str:
    """What the page says of a template in a case."""
    if case == "one turn":
        return "one path"
    said = documented()
    return said.get(stem, said[stem.removesuffix("_training")])[case]


CELLS = [(stem, case) for stem in STEMS for case in CASES]


def plain_text(stem, messages, tools, add_generation_prompt):
    """The template's text as transformers renders it, at the date at which prefloop's clock stands."""
    renderer = renderer_for(stem)
    parts = "idefics3" in stem or "llava" in stem or "smolvlm" in stem
    dicts = [message.to_dict() for message in messages]
    for message in dicts:
        if parts:
            message["content"] = [{"type": "text", "text": message["content"]}]
        if "reasoning_content" in message:
            message["thinking"] = message["reasoning_content"]
    text = renderer.tokenizer.apply_chat_template(
        dicts, tools=list(tools) or None, tokenize=False, add_generation_prompt=add_generation_prompt
    )
    for style in ("%Y-%m-%d", "%d %b %Y"):
        text = text.replace(datetime.now().strftime(style), TEMPLATE_DATE.strftime(style))
    return text


def normal(stem, text):
    """A text as the tokenizer can give it back: some control tokens swallow the white space after them."""
    encoder = renderer_for(stem).encoder
    pieces = encoder.split(text)
    return "".join(encoder.control_name(t) or encoder.decode(encoder.encode(piece).ids) for piece, t in pieces)


def test_every_template_is_on_the_page():
    said = documented()
    assert {stem.removesuffix("_training") for stem in STEMS} <= set(said)
    assert set(said) <= set(STEMS)


@pytest.mark.parametrize(("stem", "case"), [cell for cell in CELLS if outcome(*cell) in REASONS])
def test_what_a_template_cannot_show_is_refused_with_its_reason(stem, case):
    messages, tools = CASES[case]
    with pytest.raises(PrefloopError, match=REASONS[outcome(stem, case)]):
        render_demonstration(renderer_for(stem), messages, tools, 1)


@pytest.mark.parametrize(("stem", "case"), [cell for cell in CELLS if outcome(*cell) not in REASONS])
def test_masks_are_exact(stem, case):
    """Each turn is what the model says, in the context that the template itself asks from."""
    messages, tools = CASES[case]
    renderer = renderer_for(stem)
    paths = render_demonstration(renderer, messages, tools, 1)
    said = {}
    for path in paths:
        first = int(np.flatnonzero(path.loss_mask)[0])
        asked = plain_text(stem, messages[: int(path.message[first])], tools, True)
        assert renderer.encoder.decode(path.token[:first].tolist()) == normal(stem, asked)
        for index in set(path.message[path.loss_mask].tolist()):
            assert index not in said
            said[index] = renderer.encoder.decode(path.token[path.loss_mask & (path.message == index)].tolist())
    turns = [index for index, message in enumerate(messages) if message.role is Role.ASSISTANT]
    assert said == {index: family(stem).turn(messages[index]) for index in turns}
    assert (len(paths) > 1) is (outcome(stem, case) == "new paths")
    assert all(path.token[path.loss_mask][-1] in stop_ids(renderer) for path in paths)


@pytest.mark.parametrize(("stem", "case"), [cell for cell in CELLS if outcome(*cell) not in REASONS])
def test_rollouts_of_the_same_tokens_are_the_demonstration(stem, case):
    """Sampled tokens are kept, and a path opens exactly where the next prompt does not extend them."""
    messages, tools = CASES[case]
    renderer = renderer_for(stem)
    wanted = render_demonstration(renderer, messages, tools, 1)
    turns = [index for index, message in enumerate(messages) if message.role is Role.ASSISTANT]
    builder = PathBuilder(renderer, messages[:1], tools)
    for turn, following in zip(turns, [*turns[1:], None], strict=True):
        (sampled,) = [p.token[p.loss_mask & (p.message == turn)] for p in wanted if turn in p.message[p.loss_mask]]
        builder.append_sampled(sampled, np.full(len(sampled), -0.5), messages[turn])
        if following is not None:
            builder.extend(messages[turn + 1 : following])
    for made, path in zip(builder.paths(), wanted, strict=True):
        assert made.token.tolist() == path.token.tolist()
        assert made.source.tolist() == path.source.tolist()
        assert np.array_equal(np.isnan(made.logprob), made.source != Source.SAMPLED)


def test_training_templates_of_a_family_say_the_same():
    """GLM's own template has no stop token; its training template spells out the one that is taken here."""
    for case, (messages, tools) in CASES.items():
        own, training = (
            [path.token.tolist() for path in render_demonstration(renderer_for(stem), messages, tools, 1)]
            for stem in ("glm4moe", "glm4moe_training")
        )
        assert own == training, case


def test_the_formats_of_the_page_are_those_that_are_found():
    rows = [re.findall("`(.+?)`", line) for line in page_rows("How tool calls are read")]
    assert {"auto", *(names[0] for names in rows)} == set(get_args(ToolFormat))
    said = {stem: names[0] for names in rows for stem in names[1:] if stem in STEMS}
    assert set(said.values()) == set(CALL_FORMATS)
    for stem in STEMS:
        found = AssistantParser(renderer_for(stem)).tool_format
        assert found == said.get(stem.removesuffix("_training"), "text"), stem


@pytest.mark.parametrize("stem", ["qwen2_5", "qwen3_5_think", "glm4moe"])
def test_steps_end_with_their_calls(stem):
    renderer = renderer_for(stem)
    asked, _, *_ = CASES["two calls"][0]
    both = Message(Role.ASSISTANT, "Both.", "Which?" if family(stem).thinks else "", (OSLO, ROME))
    attempt = Trajectory("t1", "task", (asked, both), 1, Ended.DONE, AuthorKind.HUMAN, "ann")
    paths = render_demonstration(renderer, attempt.messages, (TOOL,), 1)
    first, last = (StepFinder(renderer).end(attempt, paths, place) for place in steps_of(attempt, "tool_call"))
    text = renderer.encoder.decode(paths[0].token[: first.token + 1].tolist())
    assert text.endswith("</tool_call>")
    assert ("Oslo" in text.split("Both.")[1], "Rome" in text.split("Both.")[1]) == (True, False)
    assert (first.ends_turn, last.ends_turn) == (False, True)


@pytest.mark.parametrize(
    ("stem", "thinks", "said"),
    [
        ("qwen3", False, ["Sure.<|im_end|>", "Bye<|im_end|>"]),  # the prompt has the empty thought
        ("glm4moe", False, ["\nSure.<|user|>", "\nBye<|user|>"]),
        ("nemotron_3_nano", False, ["Sure.<|im_end|>", "Bye<|im_end|>"]),
        ("qwen3_5_nothink", True, ["\n</think>\n\nSure.<|im_end|>", "\n</think>\n\nBye<|im_end|>"]),
    ],
)
def test_variables_say_whether_a_template_thinks(stem, thinks, said):
    renderer = ChatRenderer(tokenizer_for(stem), variables={"enable_thinking": thinks})
    paths = render_demonstration(renderer, *CASES["several turns"], 1)
    spoken = "".join(renderer.encoder.decode(path.token[path.loss_mask].tolist()) for path in paths)
    assert spoken == "".join(said)
    assert renderer.template_hash != renderer_for(stem).template_hash


def test_a_thought_that_a_prompt_opens_in_its_own_way_is_closed_in_it():
    """Gemma 4 opens a channel after a tool's result; an answer without reasoning closes it at once."""
    renderer = ChatRenderer(tokenizer_for("gemma4_v5"), variables={"enable_thinking": True})
    (path,) = render_demonstration(renderer, *CASES["a call"], 1)
    said = renderer.encoder.decode(path.token[path.loss_mask & (path.message == 3)].tolist())
    assert said == "\n<channel|>Bye<turn|>"


def test_a_template_that_drops_what_a_tool_said_is_refused():
    source = tokenizer_for("qwen2_5").chat_template.replace(
        "{{- message.content }}\n        {{- '\\n</tool_response>' }}", ""
    )
    assert source != tokenizer_for("qwen2_5").chat_template
    renderer = ChatRenderer(tokenizer_for("qwen2_5"), chat_template=source)
    messages, tools = CASES["a call"]
    builder = PathBuilder(renderer, messages[:1], tools)
    builder.append_demonstrated(messages[1])
    with pytest.raises(PrefloopError, match=r"drops the content of message 2 \(role tool\); use a template that shows"):
        builder.extend(messages[2:3])
