import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chat_tokenizers import TEMPLATES, metaspace_backend, wrap
from prefloop.chat import ChatRenderer, StepFinder, StepPlace, render_demonstration, steps_of
from prefloop.records import AuthorKind, Ended, Message, PrefloopError, Role, ToolCall, Trajectory

ASKED = Message(Role.USER, "Add them up.")
SEARCH, BOOK = ToolCall("search_flights", {"city": "Oslo"}), ToolCall("book", {"note": "</tool_call> \n"})


def trajectory(*messages, num_prompt=1):
    return Trajectory("t1", "task", messages, num_prompt, Ended.DONE, AuthorKind.HUMAN, "someone")


def written(content, **parts):
    return trajectory(ASKED, Message(Role.ASSISTANT, content, **parts))


def said_until(renderer, finder, attempt, place, tools=()):
    """The text of the place's turn through the step's last token, and whether the turn ends with it."""
    paths = render_demonstration(renderer, attempt.messages, tools, attempt.num_prompt_messages)
    end = finder.end(attempt, paths, place)
    path = paths[end.path]
    own = np.flatnonzero(path.loss_mask & (path.message == place.message))
    return renderer.encoder.decode(path.token[own[own <= end.token]].tolist()), end.ends_turn


def test_the_steps_of_each_kind(booking):
    attempt = trajectory(*booking, num_prompt=2)
    assert steps_of(attempt, "turn") == (StepPlace(2), StepPlace(4), StepPlace(6))
    assert steps_of(attempt, "tool_call") == (StepPlace(2, 0), StepPlace(4), StepPlace(6))
    lines = written("\n \none\n\n two\n")
    assert steps_of(lines, "separator") == (StepPlace(1, span=(3, 6)), StepPlace(1, span=(8, 12)))
    assert steps_of(written("one. two", tool_calls=(SEARCH,)), "separator", ". ") == (
        StepPlace(1, span=(0, 3)),
        StepPlace(1, span=(5, 8)),
    )
    assert steps_of(written("", tool_calls=(SEARCH,)), "separator") == (StepPlace(1),)


def test_an_empty_separator_is_refused():
    with pytest.raises(PrefloopError, match="separator of steps is empty"):
        steps_of(written("one"), "separator", "")


def test_a_turn_ends_with_its_stop_token(chatml, booking, tools):
    attempt = trajectory(*booking, num_prompt=2)
    assert said_until(chatml, StepFinder(chatml), attempt, StepPlace(4), tools) == ("Booked F1234.<|im_end|>", True)


def test_a_step_of_text_ends_with_its_separators_and_the_last_one_with_the_turn(chatml):
    attempt = written("7 + 2 = 9\n\n9 - 4 = 5\n5 + 1 = 6\n")
    texts = [said_until(chatml, StepFinder(chatml), attempt, place) for place in steps_of(attempt, "separator")]
    assert texts == [
        ("7 + 2 = 9\n\n", False),
        ("7 + 2 = 9\n\n9 - 4 = 5\n", False),
        ("7 + 2 = 9\n\n9 - 4 = 5\n5 + 1 = 6\n<|im_end|>", True),
    ]
    inside = said_until(chatml, StepFinder(chatml), attempt, StepPlace(1, span=(0, 5)))
    assert inside == ("7 + 2", False)


def test_text_stands_after_the_reasoning_that_says_the_same(thinking):
    attempt = written("a\nb", reasoning_content="I think: a\nb")
    text, _ = said_until(thinking, StepFinder(thinking), attempt, StepPlace(1, span=(0, 1)))
    assert text.endswith("</think>\n\na\n")


def test_a_call_ends_with_its_closing_tag_and_the_last_one_with_the_turn(chatml, tools):
    attempt = written("Both.", tool_calls=(SEARCH, SEARCH))
    first, last = (said_until(chatml, StepFinder(chatml), attempt, p, tools) for p in steps_of(attempt, "tool_call"))
    assert first[0].startswith("Both.\n<tool_call>")
    assert first[0].endswith('"Oslo"}}\n</tool_call>')
    assert not first[1]
    assert last[0].count("</tool_call>") == 2
    assert last[0].endswith("<|im_end|>")
    assert last[1]


def test_a_closing_tag_in_a_calls_own_text_does_not_end_it(chatml, tools):
    attempt = written("", tool_calls=(BOOK, SEARCH))
    text, ends_turn = said_until(chatml, StepFinder(chatml), attempt, StepPlace(1, 0), tools)
    assert text.count("</tool_call>") == 2
    assert not ends_turn


def test_calls_that_cannot_be_told_apart_are_refused(chatml, tools):
    attempt = written("", tool_calls=(SEARCH, SEARCH))
    paths = render_demonstration(chatml, attempt.messages, tools, attempt.num_prompt_messages)
    renderer = ChatRenderer(chatml.tokenizer, tool_format="text")
    with pytest.raises(
        PrefloopError, match=r"message 1, tool call 0: its several tool calls cannot .* \(tool format text"
    ):
        StepFinder(renderer).end(attempt, paths, StepPlace(1, 0))


@pytest.mark.parametrize(
    ("place", "reason"),
    [
        (StepPlace(0), "no such message after the prompt"),
        (StepPlace(9), "no such message after the prompt"),
        (StepPlace(2), "of role tool"),
        (StepPlace(1, 1), "1 tool calls"),
        (StepPlace(1, span=(2, 99)), "5 characters"),
        (StepPlace(1, span=(2, 2)), "5 characters"),
    ],
)
def test_a_place_that_is_not_there_is_named(chatml, tools, place, reason):
    answer = Message(Role.TOOL, "none")
    attempt = trajectory(ASKED, Message(Role.ASSISTANT, "Both.", tool_calls=(SEARCH,)), answer)
    with pytest.raises(PrefloopError, match=f"trajectory t1, message {place.message}.*{reason}"):
        said_until(chatml, StepFinder(chatml), attempt, place, tools)


def test_tokens_of_another_trajectory_are_refused(chatml):
    paths = render_demonstration(chatml, written("one\ntwo").messages, (), 1)
    with pytest.raises(PrefloopError, match="does not stand in its tokens"):
        StepFinder(chatml).end(written("three\nfour"), paths, StepPlace(1, span=(0, 5)))
    with pytest.raises(PrefloopError, match="no path holds tokens"):
        StepFinder(chatml).end(trajectory(ASKED, ASKED, Message(Role.ASSISTANT, "x")), paths, StepPlace(2))


@pytest.fixture(scope="module", params=["bytes", "metaspace"])
def renderer(request, backend):
    made = backend if request.param == "bytes" else metaspace_backend()
    return ChatRenderer(wrap(made, TEMPLATES["chatml"]))


@settings(deadline=None)
@given(st.lists(st.text("ab \té€😀☺️", min_size=1, max_size=6).filter(str.strip), min_size=2, max_size=5))
def test_every_step_holds_its_text_whole_and_no_token_of_the_next(renderer, pieces):
    content = "\n".join(pieces)
    attempt = written(content)
    places = steps_of(attempt, "separator")
    assert [content[slice(*place.span)] for place in places] == pieces
    for number, place in enumerate(places[:-1], 1):
        text, ends_turn = said_until(renderer, StepFinder(renderer), attempt, place)
        assert text == "\n".join(pieces[:number]) + "\n"
        assert not ends_turn
