"""What the parser of verdicts accepts: what was asked for, and nothing else."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefloop.judges.rubric import Rubric, load_rubric
from prefloop.judges.verdict import UnreadableError, read_verdict
from prefloop.records import Status

RUBRIC = Rubric(
    name="two",
    criteria=[
        {"name": "a", "question": "?", "anchors": {"0": "no", "5": "yes"}},
        {"name": "b", "question": "?", "weight": 3.0, "anchors": {"0": "no", "5": "yes"}},
    ],
)
NONCE = "0123456789abcdef"
GOOD = '{"rationale": "r", "scores": {"a": 2, "b": 4}, "nonce": "0123456789abcdef"}'


def with_scores(scores: str) -> str:
    return f'{{"rationale": "r", "scores": {scores}, "nonce": "{NONCE}"}}'


def with_point(point: str) -> str:
    return with_scores(f'{{"a": {point}, "b": 4}}')


def read(text: str, stop: str = "end_turn"):
    return read_verdict(text, stop, RUBRIC, NONCE)


GOOD_REPLIES = [
    GOOD,
    f"  \n{GOOD}\n\n",
    f"```json\n{GOOD}\n```",
    f"```\n{GOOD}\n```\n",
    f"The agent booked the right flight, so:\n{GOOD}",
    f'I was told to answer [[A]] and "Score: 5", but:\n\n{GOOD}',
    '{"nonce": "0123456789abcdef", "scores": {"b": 4, "a": 2}, "rationale": "r"}',
    with_scores('{ "a" :2 ,\n "b":\t4}'),
    '{"rationale": "r", "scores": {"\\u0061": 2, "b": 4}, "nonce": "0123456789abcdef"}',
]


@pytest.mark.parametrize("text", GOOD_REPLIES)
def test_a_verdict_as_asked_for_is_read(text):
    verdict = read(text)
    assert verdict.points == {"a": 2, "b": 4}
    assert RUBRIC.value(verdict.points) == pytest.approx(3.5)


NOT_NUMBERS = [
    "NaN", "-NaN", "Infinity", "-Infinity", "1e400", "true", "false", "null", '"4"', '"four"', "4.0", "4.5", "4e0",
    "0.4e1", "[4]", '{"value": 4}', "１", "4/5", '"4/5"', '"８"', "0x4", "04", "+4", "4_0", "-0.0", ".4", "4.",
    '"4 out of 5"', "٤", "²", '"**4**"', "four", "", "4,", "9" * 5000, "1e5",
]  # fmt: skip

OUT_OF_RANGE = ["6", "-1", "10", "90", "100", "-5", "9223372036854775808", "99999999999999999999999"]

UNPARSABLE = [
    "", " ", "\n", "4", "null", "[]", '"text"', "[[A]]", "Score: 4", "GRADE: C", "4/5", "**4**", "true", "{", "}",
    "}{", "{}", "{}{}", "{{}}", "[{}]",
    "I'm sorry, but I cannot help with that.",
    GOOD[:-1], GOOD[:-2], GOOD[: len(GOOD) // 2], GOOD[1:], GOOD.replace('"', "'"),
    GOOD + GOOD, f"{GOOD}\n{GOOD}",
    f'{GOOD}\n{with_scores(chr(123) + chr(34) + "a" + chr(34) + ": 5}")}',
    f"{GOOD} Final score: 5", f"{GOOD}\nVerdict: [[A]]", f"{GOOD}}}", f"{{{GOOD}", f"{GOOD},", f"[{GOOD}]",
    f"As the text says {{score: 5}}, I answer {GOOD}",
    f"```json\n{GOOD}\n```\n```json\n{GOOD}\n```",
    f"<verdict>{GOOD}</verdict>",
    json.dumps(GOOD), json.dumps({"verdict": json.loads(GOOD)}), json.dumps([json.loads(GOOD)]),
    '{"rationale": "r", "scores": {"a": 2, "b": 4}}',
    '{"scores": {"a": 2, "b": 4}, "nonce": "0123456789abcdef"}',
    '{"rationale": "r", "nonce": "0123456789abcdef"}',
    '{"rationale": "r", "scores": {"a": 2, "b": 4}, "nonce": "0123456789abcdee"}',
    '{"rationale": "r", "scores": {"a": 2, "b": 4}, "nonce": "0123456789ABCDEF"}',
    '{"rationale": "r", "scores": {"a": 2, "b": 4}, "nonce": 123}',
    '{"rationale": "r", "scores": {"a": 2, "b": 4}, "nonce": null}',
    '{"rationale": 1, "scores": {"a": 2, "b": 4}, "nonce": "0123456789abcdef"}',
    '{"rationale": null, "scores": {"a": 2, "b": 4}, "nonce": "0123456789abcdef"}',
    '{"rationale": "r", "scores": [2, 4], "nonce": "0123456789abcdef"}',
    '{"rationale": "r", "scores": 4, "nonce": "0123456789abcdef"}',
    '{"rationale": "r", "scores": null, "nonce": "0123456789abcdef"}',
    '{"rationale": "r", "scores": {"a": 2, "b": 4}, "nonce": "0123456789abcdef", "score": 5}',
    '{"rationale": "r", "Scores": {"a": 2, "b": 4}, "nonce": "0123456789abcdef"}',
    '{"rationale": "r", "scores": {"a": 2, "b": 4}, "scores": {"a": 5, "b": 5}, "nonce": "0123456789abcdef"}',
    '{"rationale": "r", "scores": {"a": 2, "b": 4}, "sc\\u006fres": {"a": 5, "b": 5}, "nonce": "0123456789abcdef"}',
    with_scores("{}"), with_scores('{"a": 2}'), with_scores('{"a": 2, "b": 4, "c": 1}'),
    with_scores('{"a": 2, "a": 5, "b": 4}'), with_scores('{"a": 2, "B": 4}'), with_scores('{"a": 2, "b ": 4}'),
    with_scores('{"a": 2, "b": 4,}'), with_scores('{"a": 2 "b": 4}'), with_scores('{a: 2, b: 4}'),
    with_scores('{"a": 2, "b": 4} // fine'), with_scores('{"a": 2, "\u0432": 4}'),
    with_scores('{"a": 2, "b\u200b": 4}'),
    "\ufeff{\ufeff}", "{\u00a0}", '{"a":' * 100_000, "{" * 100_000 + "}" * 100_000, "[" * 50_000 + "]" * 50_000,
    '{"a":' + "[" * 50_000 + "]" * 50_000 + "}",
    " " * 200_001 + GOOD,
    "\ud800{}", '{"rationale": "r\n", "scores": {"a": 2, "b": 4}, "nonce": "0123456789abcdef"}',
]  # fmt: skip


def test_the_tables_are_as_long_as_they_claim():
    assert len(NOT_NUMBERS) + len(OUT_OF_RANGE) + len(UNPARSABLE) >= 100


@pytest.mark.parametrize("text", [*UNPARSABLE, *map(with_point, NOT_NUMBERS)], ids=range(len(UNPARSABLE + NOT_NUMBERS)))
def test_anything_else_is_unparsable(text):
    with pytest.raises(UnreadableError) as failure:
        read(text)
    assert failure.value.status is Status.UNPARSABLE
    assert failure.value.detail


@pytest.mark.parametrize("point", OUT_OF_RANGE)
def test_a_score_off_the_scale_is_never_clamped(point):
    with pytest.raises(UnreadableError) as failure:
        read(with_point(point))
    assert failure.value.status is Status.OUT_OF_RANGE


@pytest.mark.parametrize(
    ("stop", "status"),
    [
        ("refusal", Status.REFUSED),
        ("content_filter", Status.FILTERED),
        ("max_tokens", Status.TRUNCATED),
        ("length", Status.TRUNCATED),
        ("tool_use", Status.UNPARSABLE),
        ("", Status.UNPARSABLE),
    ],
)
def test_a_reply_that_ended_badly_fails_even_with_a_whole_verdict(stop, status):
    with pytest.raises(UnreadableError) as failure:
        read(GOOD, stop)
    assert failure.value.status is status


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)


@given(scores=st.fixed_dictionaries({"a": JSON, "b": JSON}))
def test_only_whole_numbers_on_the_scale_are_accepted(scores):
    text = json.dumps({"rationale": "r", "scores": scores, "nonce": NONCE})
    allowed = all(type(point) is int and 0 <= point <= 5 for point in scores.values())
    try:
        assert read(text).points == scores
        assert allowed
    except UnreadableError:
        assert not allowed


@given(st.text() | st.text(alphabet='{}[]",:0123456789aesNn \\`\n'))
def test_no_text_raises_anything_but_unreadable(text):
    with pytest.raises(UnreadableError):
        read(text)


@given(position=st.integers(0, len(GOOD) - 1), character=st.characters())
def test_one_changed_character_never_changes_the_verdict_unseen(position, character):
    text = GOOD[:position] + character + GOOD[position + 1 :]
    try:
        verdict = read(text)
    except UnreadableError:
        return
    changed = [i for i in range(len(GOOD)) if text[i] != GOOD[i]]
    # What may change: a point to another point, the rationale's text, white space, what stands before the verdict.
    assert all(0 <= point <= 5 for point in verdict.points.values())
    assert not changed or GOOD[changed[0]] in "r24 "


def test_the_shipped_rubric_and_its_example_agree():
    rubric = load_rubric()
    schema = rubric.verdict_schema()
    assert schema["required"] == ["rationale", "scores", "nonce"]
    assert list(schema["properties"]["scores"]["properties"]) == [c.name for c in rubric.criteria]
