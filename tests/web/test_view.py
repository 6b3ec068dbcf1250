import json
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefloop.feedback.desk import Shown
from prefloop.records import AuthorKind, Ended, Message, Role, Task, Thread, ToolCall, Trajectory
from prefloop.web.view import (
    FOLD_LINES,
    FOLD_ROWS,
    MAX_DIFF_WORDS,
    Piece,
    message_view,
    pair_view,
    shared_length,
    side_by_side,
    word_diff,
)


def said(text):
    return Message(Role.ASSISTANT, text)


def called(name, call_id="", **arguments):
    return Message(Role.ASSISTANT, tool_calls=(ToolCall(name, arguments, call_id),))


def result(value):
    return Message(Role.TOOL, value if isinstance(value, str) else json.dumps(value))


def test_the_shared_beginning_ends_at_the_first_difference():
    start = [Message(Role.USER, "hi"), called("search", city="Tokyo")]
    assert shared_length([*start, said("a"), said("c")], [*start, said("b"), said("c")]) == 2
    assert shared_length(start, [*start, said("a")]) == 2
    assert shared_length([called("search", "id-1", city="Tokyo")], [called("search", "id-2", city="Tokyo")]) == 1
    assert shared_length([said("a")], [said("b")]) == 0


def side(*conversations, tools=()):
    threads, messages = [], []
    for conversation in conversations:
        threads.append(Thread(len(messages), len(messages) + len(conversation), 1, tools))
        messages += conversation
    return Trajectory(
        "id", "task", tuple(messages), 1, Ended.DONE, AuthorKind.CHECKPOINT, "author", "run", 0,
        threads=tuple(threads),
    )  # fmt: skip


def pair_of(left, right, task_tools=()):
    pair = SimpleNamespace(id="pair")
    return pair_view(Shown(pair, Task("agent", {"task": "t"}, tools=task_tools), left, right, True))


def tool(name):
    return {"type": "function", "function": {"name": name}}


def test_several_conversations_are_told_apart_and_their_tools_named():
    asked, helper = Message(Role.USER, "hi"), Message(Role.USER, "look it up")
    left = side([asked, said("a")], [helper, said("b")], tools=(tool("search"),))
    right = side([asked, said("a")], [helper, said("c")], [helper, said("d")], tools=(tool("search"), tool("book")))
    found = pair_of(left, right, (tool("ask"),))
    assert found.tools == ("ask", "search", "book")
    assert [view.heading for view in found.shared] == ["Conversation 1", "", "Conversation 2"]
    assert [view.heading for view in found.left] == [""]
    assert [view.heading for view in found.right] == ["", "Conversation 3 of 3", ""]
    alone = pair_of(side([asked, said("a"), helper, said("b")]), left)
    assert [view.heading for view in alone.shared] == ["", ""] and {view.heading for view in alone.left} == {""}
    assert [view.heading for view in alone.right] == ["Conversation 2 of 2", ""]
    assert [view.heading for view in pair_of(left, left).shared] == [
        "Conversation 1 of 2",
        "",
        "Conversation 2 of 2",
        "",
    ]
    one = side([asked, said("a")])
    assert [view.heading for view in pair_of(one, side([asked, said("b")])).shared] == [""]


def test_changed_arguments_are_marked():
    (left,), (right,) = side_by_side(
        [called("filter", max_price=300, direct=True)], [called("filter", max_price=400, direct=True, city="Tokyo")]
    )
    assert [(c.name, c.value, c.changed) for c in left.calls[0].cells] == [
        ("max_price", "300", True),
        ("direct", "true", False),
    ]
    assert [c.name for c in right.calls[0].cells if c.changed] == ["max_price", "city"]
    assert not left.calls[0].changed


def test_what_only_one_side_does_is_marked():
    start, end = [called("search"), result("3 found")], [called("book", id="F1"), said("done")]
    left, right = side_by_side([*start, *end], [*start, called("filter", direct=True), result("1 found"), *end])
    assert [(m.same, m.alone) for m in left] == [(True, False)] * 4
    assert [(m.same, m.alone) for m in right] == [(True, False)] * 2 + [(False, True)] * 2 + [(True, False)] * 2
    assert right[2].calls[0].changed


def test_another_tool_in_the_same_place_is_marked():
    (left,), (right,) = side_by_side([called("book", id=1)], [called("search", id=1)])
    assert left.calls[0].changed
    assert right.calls[0].changed


def test_rows_that_the_other_side_lacks_are_marked():
    rows = [{"flight": "A1", "price": 3}, {"flight": "A2", "price": 4}]
    (left,), (right,) = side_by_side([result(rows)], [result(rows[1:])])
    assert left.table.columns == ("flight", "price")
    assert left.table.changed == {0}
    assert right.table.changed == frozenset()


def test_words_that_differ_are_marked():
    assert word_diff("booked flight 12 for you", "booked flight 17 for you") == (
        Piece("booked flight "),
        Piece("12", changed=True),
        Piece(" for you"),
    )
    assert word_diff("same", "same") == (Piece("same"),)
    assert word_diff("nothing in common", "all else") == (Piece("nothing in common"),)
    assert word_diff("", "all else") == ()
    assert not any(p.changed for p in word_diff("a " * (MAX_DIFF_WORDS + 1), "a b " * MAX_DIFF_WORDS))


@given(st.text(alphabet="ab \n\t\u2028\x1c", max_size=40), st.text(alphabet="ab \n", max_size=40))
def test_marking_never_changes_a_text(text, other):
    pieces = word_diff(text, other)
    assert "".join(piece.text for piece in pieces) == text
    assert all(piece.text.strip() == piece.text for piece in pieces if piece.changed)


def test_long_results_are_folded_and_short_ones_are_not():
    assert message_view(result("short")).summary == ""
    long = "\n".join(f"line {i}" for i in range(FOLD_LINES + 1))
    assert message_view(result(long)).summary == f"{' '.join(long.split())[:80]}… ({FOLD_LINES + 1} lines)"
    table = message_view(result([{"n": i} for i in range(FOLD_ROWS + 1)]))
    assert (len(table.table.rows), table.summary) == (FOLD_ROWS + 1, f"{FOLD_ROWS + 1} rows")
    assert message_view(result([{"n": i} for i in range(FOLD_ROWS)])).summary == ""
    assert message_view(said("word " * 10_000)).summary == ""  # what is judged is never hidden


def test_structured_results_are_laid_out():
    assert message_view(result({"flights": [{"a": 1}, {"a": 2, "b": None}]})).table.rows == (("1", ""), ("2", "null"))
    nested = message_view(result({"user": {"name": "Ann", "flights": list(range(40))}}))
    assert nested.table is None
    assert nested.pieces[0].text.startswith('{\n  "user": {\n    "name": "Ann"')


@pytest.mark.parametrize(
    "text", ['{"score": 2, "score": 10}', "[" * 5000 + "]" * 5000, "{not json", "NaN", "1" * 5000, '"text"', "", "[]x"]
)
def test_odd_results_are_shown_as_they_are(text):
    view = message_view(result(text))
    assert "".join(piece.text for piece in view.pieces) == text
    assert view.table is None


@pytest.mark.parametrize("depth", [100, 900, 2000])
def test_deep_results_do_not_break_the_page(depth):
    view = message_view(result("[" * depth + "]" * depth))
    assert "".join("".join(piece.text for piece in view.pieces).split()) == "[" * depth + "]" * depth


def test_malformed_arguments_are_shown_raw():
    call = message_view(Message(Role.ASSISTANT, tool_calls=(ToolCall("book", '{"id": '),))).calls[0]
    assert (call.raw, call.cells) == ('{"id": ', ())
