import tomllib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefloop.report import words


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (1204, "1,204"), (0.01234, "0.0123"), (3.978, "3.98"), (-0.5, "−0.500"), (12345.6, "12,346"), (1.0, "1"),
     (None, "–"), (float("nan"), "–")],
)  # fmt: skip
def test_numbers(value, text):
    assert words.number(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.84, "0.8 s"), (42.2, "42 s"), (125, "2 min 5 s"), (12_000, "3 h 20 min"), (59.9, "60 s"), (None, "–")],
)
def test_times(value, text):
    assert words.seconds(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0134, "p = 0.013"), (1, "p = 1"), (5e-4, "p < 0.001"), (3e-61, "p < 1e-60"), (0.0, "p < 1e-300")],
)
def test_p_values_are_never_overstated(value, text):
    assert words.p_value(value) == text


def test_shares_and_differences():
    interval = {"value": 0.328, "low": 0.289, "high": 0.37, "n": 512}
    assert words.share_with_interval(interval) == "32.8 % [28.9, 37.0]"
    assert words.share_with_interval(None) == "–"
    difference = {"value": -0.02, "low": -0.05, "high": 0.01, "n": 512}
    assert words.points_with_interval(difference) == "−2.0 points [−5.0, +1.0]"


def test_titles():
    assert [words.title(name) for name in ("invented_ids", "num_threads", "sft")] == ["Invented ids", "Threads", "SFT"]


keys = st.text("abcdefgh_ ü.", min_size=1, max_size=6)
scalars = (
    st.booleans()
    | st.integers(-(2**40), 2**40)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=12)
)
settings = st.recursive(
    st.dictionaries(keys, scalars | st.lists(scalars, max_size=3), max_size=4),
    lambda inner: st.dictionaries(keys, inner | scalars, max_size=3),
    max_leaves=8,
)


@given(settings)
def test_settings_are_toml_that_reads_back(value):
    assert tomllib.loads(words.toml_text(value)) == value


def test_what_is_not_set_is_said():
    text = words.toml_text({"store": None, "stages": [{"name": "a", "num": 2}]})
    assert text == '# store is not set\nstages = [{ name = "a", num = 2 }]\n'
