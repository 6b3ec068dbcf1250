"""What the standard parser lets through."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefloop.records.strict_json import strict_loads

BAD = [
    '{"a": 1, "a": 2}', '{"x": {"a": 1, "\\u0061": 1}}', "NaN", "[Infinity]", "-Infinity", "1e400", "-1e999",
    "[" * 10**5, "9" * 5000, "", "{} {}", "\ufeff{}", "１",
]  # fmt: skip


@pytest.mark.parametrize("text", BAD, ids=range(len(BAD)))
def test_what_is_not_json_is_a_value_error(text):
    with pytest.raises(ValueError, match=r".+"):
        strict_loads(text)


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    )
)
def test_json_is_read_as_it_was_written(value):
    assert strict_loads(json.dumps(value)) == value
